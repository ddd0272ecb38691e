# Distributed under the terms of the BSD 3-Clause License.
"""What two kernels do with the same wrong input, side by side, in one run: `python -m soak.compare`.

The inputs are the tables of test_messages_faults and some attacks that need a program. Each kernel is started anew
for each part, by TCP on loopback, and after every input both must still serve: kernel_info on shell and control, and
a cell. What comes out is the table in docs/security.md:

    python -m soak.compare              print it
    python -m soak.compare --write      and put it there
    python -m soak.compare --quick      without what takes a minute each

The other kernel is ipykernel, which must be installed here; or --other "command with {connection_file}".
"""
import argparse
import contextlib
import datetime
import importlib.metadata
import os
import re
import shlex
import sys
import time

import zmq

from test import support
from test.test_messages_faults import (CELL, CONTENTS, CONTROL_CONTENTS, FLOOD, FRAMES, HEADERS, HONEST, MB,
                                       SIGNATURES, changed)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCUMENT = os.path.join(ROOT, "docs", "security.md")
BEGIN, END = "<!-- compare: begin -->", "<!-- compare: end -->"
python = shlex.quote(sys.executable)
OURS = f"{python} -m twoproc.kernel -f {{connection_file}} --transport tcp"
OTHER = f"{python} -m ipykernel_launcher -f {{connection_file}}"


class Stack(contextlib.ExitStack):
    """What support wants of a TestCase: to be told what to end."""
    addCleanup = contextlib.ExitStack.callback


class Subject:
    """A kernel under test, and an honest client of it."""

    def __init__(self, command, stack):
        self.kernel = support.start_kernel(stack, command=command)
        self.client = self.kernel.client(stack)
        self.client.execute("executed = 0", store_history=False)
        self.stack = stack

    def stranger(self, **options):
        return self.kernel.client(self.stack, ready=False, key=b"not the key", **options)

    def lines(self):
        return self.kernel.log().count("\n")

    def serves(self):
        """None, or what is wrong with it."""
        try:
            for channel in ("shell", "control"):
                self.client.reply(self.client.send(channel, "kernel_info_request"), channel)
            for _ in range(3):      # what was queued behind a cell with an error is aborted
                if self.client.execute("1+1").value == "2":
                    return None
        except AssertionError:
            return "**stops answering**" if self.kernel.is_alive else "**dies**"
        return "**answers wrongly**"

    def observe(self, channel, frames, msg_id):
        """(what came of these frames, lines in the log)."""
        client, lines = self.client, self.lines()
        client.drain()
        client.send_frames(channel, frames)
        if b"interrupt_request" in b"".join(frames[2:3]):
            client.is_silent(channel, 1)        # obeyed, it would strike what we ask next
        # A socket is read in order: with the answer to this, the input has been dealt with.
        if trouble := self.serves():
            return "obeyed" if b"shutdown_request" in frames[2] else trouble, self.lines() - lines
        sentinel = client.send("shell", "kernel_info_request")
        client.reply(sentinel)
        client.output(sentinel)
        replies = [message.content for message in client.inbox[channel] if message.parent_id == msg_id]
        statuses = [message for message in client.inbox["iopub"] if message.parent_id == msg_id]
        count = int(client.execute("print(executed); executed = 0", store_history=False).text())
        if count:
            what = "executed"
        elif replies and replies[0].get("status") == "error":
            what = "error reply"
        elif replies:
            what = "reply: " + str(replies[0].get("status"))
        else:
            what = "busy and idle, no reply" if statuses else "silence"
        return what, self.lines() - lines


def inputs():
    """(part, name, channel, function from a client to (frames, msg_id)) of each message."""
    def honest(client, channel):
        header = client.header("execute_request" if channel == "shell" else HONEST[channel][0])
        return header, client.frames(header, CELL if channel == "shell" else {})
    for channel in ("shell", "control"):
        for name, change in SIGNATURES.items():
            def make(client, channel=channel, change=change):
                header, frames = honest(client, channel)
                frames[1] = change(frames[1], frames[2:6])
                return frames, header["msg_id"]
            yield "signature", name[4:], channel, make
        for name, change in FRAMES.items():
            def make(client, channel=channel, change=change):
                header, frames = honest(client, channel)
                return change(frames), header["msg_id"]
            yield "frames", name[4:], channel, make
        for name, change, _ in HEADERS:
            def make(client, channel=channel, change=change):
                header, _ = honest(client, channel)
                return client.frames(changed(header, change), HONEST[channel][1]), header["msg_id"]
            yield "header", name, channel, make
        for name, msg_type, content, _ in CONTENTS if channel == "shell" else CONTROL_CONTENTS:
            def make(client, msg_type=msg_type, content=content):
                header = client.header(msg_type)
                return client.frames(header, content), header["msg_id"]
            yield msg_type, name, channel, make


def messages(commands, progress):
    """{(part, name): {channel: [(what, lines) of each kernel]}} in order."""
    table = {}
    with Stack() as stack:
        subjects = [Subject(command, stack) for command in commands]
        for part, name, channel, make in inputs():
            progress(f"{part}: {name} on {channel}")
            found = table.setdefault((part, name), {})[channel] = []
            for place, subject in enumerate(subjects):
                found.append(subject.observe(channel, *make(subject.client)))
                if not subject.kernel.is_alive or found[-1][0].startswith("**"):
                    subjects[place] = Subject(commands[place], stack)
    return table


def in_rows(table):
    """The same as rows of text; neighbours with the same result share one."""
    rows = []
    for (part, name), channels in table.items():
        cells, lines = [], []
        for place in range(2):
            said = {channel: found[place][0] for channel, found in channels.items()}
            texts = set(said.values())
            cells.append(texts.pop() if len(texts) == 1 else "; ".join(f"{c}: {text}" for c, text in said.items()))
            lines.append([found[place][1] for found in channels.values()])
        if rows and rows[-1][0] == part and rows[-1][2] == cells:
            rows[-1][1].append(name)
            for old, new in zip(rows[-1][3], lines):
                old += new
        else:
            rows.append((part, [name], cells, lines))
    for part, names, cells, lines in rows:
        spans = [str(min(span)) if min(span) == max(span) else f"{min(span)}-{max(span)}" for span in lines]
        yield f"{part}: {'; '.join(names)}", cells[0], spans[0], cells[1], spans[1]


LARGE_TOPIC = """
import sys, time, zmq
socket = zmq.Context().socket(zmq.SUB)
socket.connect(sys.argv[1])
socket.subscribe(b"x" * (4 << 20))
time.sleep(60)
"""


# -- attacks: each takes a Subject and returns what came of it

def large_frame(subject):
    before = subject.kernel.memory()
    peer = subject.stranger(channels=("shell",))
    peer.send_frames("shell", [support.DELIMITER, b"0" * 64, b"x" * (64 * MB + 1), b"{}", b"{}", b"{}"])
    peer.is_silent("shell", 2)
    peer.close()
    subject.serves()
    return f"{max(0, subject.kernel.memory() - before) >> 20} MB more afterwards"


def stdin_without_reader(subject):
    before = subject.kernel.memory()
    peer = subject.stranger(channels=("stdin",))
    for _ in range(4):
        peer.sockets["stdin"].send(b"x" * (256 * MB), copy=False)
    peer.is_silent("stdin", 4)
    return f"{max(0, subject.kernel.memory() - before) >> 20} MB more"


def large_heartbeat(subject):
    peer = subject.stranger(channels=("hb",))
    peer.sockets["hb"].send(b"x" * (50 * MB))
    return "not echoed" if peer.is_silent("hb", 3) else "echoed"


def large_topic(subject):
    before = subject.kernel.memory()
    # In a process that is killed: whoever closes such a socket has libzmq recurse once for each byte of the topic.
    peer = support.Process(subject.stack, [sys.executable, "-c", LARGE_TOPIC, subject.client.url("iopub")])
    subject.client.is_silent("stdin", 5)
    grown = max(0, subject.kernel.memory() - before) >> 20
    peer.end()
    trouble = subject.serves()
    return f"{grown} MB more" + (f", then {trouble}" if trouble else "")


def flood(subject):
    size = os.path.getsize(subject.kernel.err_path)
    seconds = 5
    process = support.Process(subject.stack, [sys.executable, "-c", FLOOD, "words", subject.client.url("control"),
                                              str(seconds)], home=subject.kernel.home)
    waits = []
    while process.is_alive:
        started = time.monotonic()
        subject.client.request("control", "kernel_info_request", deadline=60)
        waits.append(time.monotonic() - started)
        subject.client.drain()
    written = (os.path.getsize(subject.kernel.err_path) - size) / seconds / MB
    return f"answers within {1000 * max(waits):.0f} ms; {written:.1f} MB of log a second"


def replay(subject):
    kept = []
    for _ in range(5):
        header = subject.client.header("execute_request")
        kept.append(subject.client.frames(header, CELL))
        subject.client.send_frames("shell", kept[-1])
        subject.client.result(header["msg_id"])
    subject.client.execute("executed = 0")
    stranger = subject.stranger(channels=("control",))
    junk = list(kept[0])
    for number in range(130_000):
        junk[1] = b"%064x" % number
        stranger.send_frames("control", junk)
        if number % 1000 == 0:
            subject.client.request("control", "kernel_info_request", deadline=120)
            subject.client.drain()
    subject.client.request("control", "kernel_info_request", deadline=300)
    for frames in kept:
        subject.client.send_frames("shell", frames)
    subject.client.reply(subject.client.send("shell", "kernel_info_request"), deadline=60)
    subject.client.drain()
    count = int(subject.client.execute("print(executed)").text())
    return f"**{count} of 5 executed again**" if count else "none of 5 executed again"


def same_identity(subject):
    victim = subject.client
    msg_id = victim.send_execute("import time; time.sleep(2)")
    victim.wait_running(msg_id)
    thief = subject.stranger(channels=("shell",), identity=victim.identity).sockets["shell"]
    if thief.poll(5000):
        return "**the stranger gets the victim's reply**"
    return "the victim gets its reply" if victim.reply(msg_id) else ""


def stuck_reader(subject):
    before = subject.kernel.memory()
    reader = zmq.Context.instance().socket(zmq.SUB)
    reader.linger, reader.rcvhwm = 0, 1
    reader.setsockopt(zmq.RCVBUF, 4096)
    reader.connect(subject.client.url("iopub"))
    reader.subscribe(b"")
    subject.client.is_silent("stdin", 0.5)
    started = time.monotonic()
    msg_id = subject.client.send_execute("for i in range(400): print('x' * 500_000)")
    subject.client.reply(msg_id, deadline=120)
    seconds = time.monotonic() - started
    subject.client.drain()
    grown = max(0, subject.kernel.memory() - before) >> 20
    reader.close()
    return f"{grown} MB more; {seconds:.0f} s"


ATTACKS = [
    ("64 MB frame on shell", large_frame, False),
    ("4 x 256 MB to stdin", stdin_without_reader, False),
    ("50 MB heartbeat", large_heartbeat, False),
    ("a subscription of 4 MB to iopub", large_topic, False),
    ("junk on control, 5 s", flood, False),
    ("five signed cells sent again after 130,000 messages of junk", replay, True),
    ("a second peer with the routing identity of a client whose cell runs", same_identity, False),
    ("a reader of iopub that stops, while 200 MB are printed", stuck_reader, True),
]


def attacks(commands, is_quick, progress):
    for name, attack, is_slow in ATTACKS:
        if is_slow and is_quick:
            continue
        cells = []
        for command in commands:
            progress(f"{name}: {command.split()[2]}")
            with Stack() as stack:
                subject = Subject(command, stack)
                try:
                    cells.append(attack(subject))
                except AssertionError as error:
                    cells.append("**stops answering**" if subject.kernel.is_alive else "**dies**")
                    progress(str(error))
        yield name, *cells


def write_table(commands, is_quick, progress):
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in
                         ("ipykernel", "ipython", "pyzmq") if commands[1] == OTHER or name != "ipykernel")
    yield (f"{datetime.date.today()}, Python {sys.version.split()[0]}, {versions}, libzmq {zmq.zmq_version()}, "
           "loopback TCP.")
    yield ""
    yield "With the right key, a wrong message on shell and on control:"
    yield ""
    yield "| input | twoproc | log, lines | ipykernel | log, lines |"
    yield "| --- | --- | --- | --- | --- |"
    for row in in_rows(messages(commands, progress)):
        yield "| %s |" % " | ".join(row)
    yield ""
    yield "Without the key:"
    yield ""
    yield "| input | twoproc | ipykernel |"
    yield "| --- | --- | --- |"
    for row in attacks(commands, is_quick, progress):
        yield "| %s |" % " | ".join(row)


def main():
    parser = argparse.ArgumentParser(prog="python -m soak.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("--other", default=OTHER, metavar="COMMAND", help="the other kernel's command")
    parser.add_argument("--quick", action="store_true", help="without what takes a minute each")
    parser.add_argument("--write", action="store_true", help="put the table into docs/security.md")
    arguments = parser.parse_args()
    table = "\n".join(write_table([OURS, arguments.other], arguments.quick,
                                  lambda text: print(text, file=sys.stderr, flush=True)))
    print(table)
    if arguments.write:
        with open(DOCUMENT, encoding="utf-8") as file:
            text = file.read()
        with open(DOCUMENT, "w", encoding="utf-8") as file:
            file.write(re.sub(f"(?s)(?<={BEGIN}\n).*(?={END})", lambda _: f"\n{table}\n\n", text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
