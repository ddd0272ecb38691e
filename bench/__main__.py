# Distributed under the terms of the BSD 3-Clause License.
"""Kernels measured side by side: `python -m bench`, or `make bench`.

A round is one life of each kernel, from its spawn to its exit. The lives run in lockstep: the first section for
every kernel, then the second for every kernel, and so on, the order of the kernels reversed from round to round;
whatever else the machine does meets all of them alike. What is compared is therefore the ratio within a round,
and a row shows the median of those ratios. README.md beside this file says how to read the table.
"""
import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time

from .wire import Listener, MissedError, Peer, Subject, now

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SPIN = "import time; _end = time.time() + {}\nwhile time.time() < _end: pass"

# Figure: (unit, what twoproc aims at: a ratio to ipykernel 7.4, or words).
FIGURES = {
    "spawn to kernel_info_reply": ("ms", 0.20),
    "spawn to first execute_reply": ("ms", 0.45),
    "first completion": ("ms", 0.5),
    "idle: memory": ("MB", 0.75),
    "idle: threads": ("", None),
    "idle: context switches": ("/s", None),
    "pass, silent": ("ms", 0.25),
    "pass, with history": ("ms", 0.20),
    "kernel_info": ("ms", 0.35),
    "completion": ("ms", 0.5),
    "queued cells": ("cells/s", 8),
    "abort of a queue behind an error": ("ms", 0.3),
    "control while a cell spins": ("ms", 0.15),
    "kernel_info on shell while a cell spins": ("ms", None),
    "first print": ("ms", 0.1),
    "100,000 lines printed": ("ms", 0.6),
    "displays, each": ("ms", 0.25),
    "SIGINT ends a loop": ("ms", 0.5),
    "interrupt_request ends a loop": ("ms", 0.5),
    "interrupt_request ends a sleep": ("ms", 0.5),
    "shutdown, idle": ("ms", 0.2),
    "shutdown, busy": ("ms", None),
    "parent dead": ("ms", 0.05),
    "session log: cost of a cell": ("us", "60 us"),
    "last 20 cells, after 10": ("ms", "500 ms"),
    "last 20 cells, after 60 MB": ("ms", "500 ms"),
    "pass, by ipc": ("us", None),
    "pass, by tcp": ("us", None),
    "pass, by tcp with CURVE": ("us", None),
    "pass: CURVE to plain tcp": ("x", "x1.5"),
    "1 MB printed, by ipc": ("ms", None),
    "1 MB printed, by tcp": ("ms", None),
    "1 MB printed, by tcp with CURVE": ("ms", None),
    "1 MB printed: CURVE to plain tcp": ("x", "x1.5"),
}
SCALES = {"ms": 1e3, "us": 1e6}
MORE_IS_BETTER = {"queued cells"}


# -- the sections of a life; each yields (figure, seconds or number)

def start(kernel, size):
    """The client knocks before there is anybody; two questions wait at the door."""
    asked = {}

    def ask(peer):
        asked["kernel_info"], asked["execute"] = peer.send("kernel_info_request"), peer.send_execute("1+1", True)
    kernel.spawn(ask)
    for what in asked:
        figure = "spawn to kernel_info_reply" if what == "kernel_info" else "spawn to first execute_reply"
        yield figure, kernel.peer.follow(asked[what], kernel.spawned_at, idle=False).reply_at
    kernel.peer.wait_ready()
    kernel.peer.execute("import os", silent=True)
    yield "first completion", complete(kernel)


def idle(kernel, size):
    time.sleep(1)           # whatever it still does after its start
    before, begin = kernel.switches(), now()
    time.sleep(2 * size)
    yield "idle: context switches", (kernel.switches() - before) / (now() - begin)
    yield "idle: memory", kernel.memory() / 1e6
    yield "idle: threads", kernel.threads()


def round_trips(kernel, size):
    """Until the reply and the idle are both here."""
    peer = kernel.peer
    peer.execute("import os", silent=True)      # for the completions
    for figure, options in (("pass, silent", {"silent": True}), ("pass, with history", {"history": True})):
        for _ in range(20):
            peer.execute("pass", **options)
        yield figure, statistics.median(peer.execute("pass", **options).done_at for _ in range(100 * size))
    yield "kernel_info", statistics.median(
        peer.ask("kernel_info_request", idle=True).reply_at for _ in range(50 * size))
    yield "completion", statistics.median(complete(kernel) for _ in range(10 * size))


def complete(kernel):
    answer = kernel.peer.ask("complete_request", {"code": "os.pa", "cursor_pos": 5}, idle=True)
    if not any(match.endswith("path") for match in answer.reply["matches"]):
        raise MissedError(f"os.pa completed to {answer.reply['matches']}")
    return answer.reply_at


def queue(kernel, size):
    cells = 500 * size
    taken, replies = queued(kernel, ["pass"] * cells)
    if replies != ["ok"] * cells:
        raise MissedError(f"{replies.count('ok')} of {cells} queued cells were executed")
    yield "queued cells", cells / taken
    # The error waits until the whole queue has arrived behind it; that wait is no part of the figure.
    taken, replies = queued(kernel, ["import time; time.sleep(0.5); 1/0"] + ["pass"] * cells)
    if replies != ["error"] + ["aborted"] * cells:
        raise MissedError(f"of {cells} cells behind an error {replies.count('aborted')} were aborted")
    yield "abort of a queue behind an error", taken - 0.5


def queued(kernel, codes):
    """Send all, then hear all: how long that took, and the status of each reply in their order."""
    begin = now()
    waiting = {kernel.peer.send_execute(code, history=True) for code in codes}
    idles, replies = len(waiting), []
    for channel, msg_type, frames in kernel.peer.listen(60):
        if channel == "shell":
            replies.append(frames[3])
        elif msg_type == "status" and b'"idle"' in frames[3]:
            idles -= 1
        if len(replies) == len(codes) and not idles:
            taken = now() - begin
            return taken, [next(word for word in ("aborted", "error", "ok") if f'"{word}"'.encode() in reply)
                           for reply in replies]
    raise MissedError(f"{len(replies)} replies to {len(codes)} queued cells, {idles} idles missing")


def busy(kernel, size):
    peer, spinning = kernel.peer, 1.0 * size
    sent_at = now()
    cell = peer.send_execute(SPIN.format(spinning))
    next(frames for channel, msg_type, frames in peer.listen(10) if msg_type == "execute_input")
    times = []
    while now() - sent_at < spinning * 0.5:
        times.append(peer.ask("kernel_info_request", channel="control").reply_at)
        time.sleep(0.003)
    yield "control while a cell spins", statistics.median(times)
    on_shell, asked_at, replies = peer.send("kernel_info_request"), now(), 0
    for channel, _, frames in peer.listen(10):      # two replies on one channel, and we do not say which comes first
        if channel == "shell" and on_shell in frames[1]:
            yield "kernel_info on shell while a cell spins", now() - asked_at
        elif not (channel == "shell" and cell in frames[1]):
            continue
        replies += 1
        if replies == 2:
            break
    peer.wait_ready()


def output(kernel, size):
    peer, lines = kernel.peer, 100_000
    yield "first print", statistics.median(
        peer.execute("import time; print(1); time.sleep(0.25)").output_at for _ in range(size))
    answer = peer.execute(f"for i in range({lines}): print(i)")
    if "".join(answer.text) != "".join(f"{i}\n" for i in range(lines)):
        raise MissedError(f"of {lines} lines {''.join(answer.text).count(chr(10))} came")
    yield "100,000 lines printed", answer.done_at
    displays = 1000 * size
    peer.execute("from IPython.display import display", silent=True)
    answer = peer.execute(f"for i in range({displays}): display({{'text/plain': str(i)}}, raw=True)")
    if answer.outputs != displays:
        raise MissedError(f"of {displays} displays {answer.outputs} came")
    yield "displays, each", answer.done_at / displays


def interrupt(kernel, size):
    peer = kernel.peer
    for figure, code, by_signal in (("SIGINT ends a loop", "while True: pass", True),
                                    ("interrupt_request ends a loop", "while True: pass", False),
                                    ("interrupt_request ends a sleep", "import time; time.sleep(9)", False)):
        times = []
        for _ in range(3 * size):
            cell = peer.send_execute(code)
            next(frames for channel, msg_type, frames in peer.listen(10) if msg_type == "execute_input")
            time.sleep(0.05)        # into the loop
            begin = now()
            if by_signal:
                os.kill(kernel.pid, signal.SIGINT)
            else:
                peer.send("interrupt_request", channel="control")
            answer = peer.follow(cell, begin, seconds=5)
            if answer.reply.get("ename") != "KeyboardInterrupt":
                raise MissedError(f"{figure}: {answer.reply}")
            times.append(answer.reply_at)
        yield figure, statistics.median(times)


def shutdown(kernel, size):
    yield "shutdown, idle", kernel.exited_in(5, lambda: ask_shutdown(kernel))


def ask_shutdown(kernel):
    kernel.peer.send("shutdown_request", {"restart": False}, channel="control")


def shutdown_busy(kernel, size):
    restart(kernel)
    kernel.peer.send_execute("import time; time.sleep(60)")
    next(frames for channel, msg_type, frames in kernel.peer.listen(10) if msg_type == "execute_input")
    yield "shutdown, busy", kernel.exited_in(6, lambda: ask_shutdown(kernel))


def orphan(kernel, size):
    """The kernel's parent is a process of ours; we kill it."""
    parent = ("import os, subprocess, sys; os.environ['JPY_PARENT_PID'] = str(os.getpid()); "
              "print(subprocess.Popen(sys.argv[1:], stdin=-3, stdout=-3, stderr=-3, start_new_session=True).pid, "
              "flush=True); sys.stdin.read(); __import__('time').sleep(600)")
    kernel.stop()
    kernel.spawn(prefix=(sys.executable, "-c", parent))
    kernel.peer.wait_ready()
    time.sleep(0.5)
    yield "parent dead", kernel.exited_in(8, kernel.process.kill)


def session_log(kernel, size):
    """What the log costs, beside the same kernel without it; and what a client that joins has to wait."""
    restart(kernel)
    if not speaks_twoproc(kernel):
        return
    without = Subject(kernel.name + "-without-log", [*kernel.argv, "--set", "recovery.log=no"], kernel.folder,
                      kernel.transport)
    try:
        without.start()
        times = {kernel: [], without: []}
        for number in range(100 * size):
            for subject in (kernel, without) if number % 2 else (without, kernel):
                times[subject] += [subject.peer.execute("pass", history=True).done_at for _ in range(10)]
    finally:
        without.stop()
    # Of the quickest tenth: the difference is a twentieth of what is measured, and other programs would hide it.
    yield "session log: cost of a cell", quickest(times[kernel]) - quickest(times[without])
    restart(kernel)
    for number in range(10):
        kernel.peer.execute(f"print('cell', {number})", history=True)
    yield "last 20 cells, after 10", statistics.median(join(kernel, 10) for _ in range(5))
    for _ in range(1000):
        if kernel.log_size() > 60e6:
            break
        kernel.peer.execute("for _ in range(30): print('x' * 8000)", history=True)
    else:
        raise MissedError(f"its session log has {kernel.log_size()} bytes after 240 MB of output")
    for number in range(20):
        kernel.peer.execute(f"print('cell', {number})", history=True)
    yield "last 20 cells, after 60 MB", statistics.median(join(kernel, 20) for _ in range(5))


def quickest(times):
    """The middle of the quickest tenth, without the first ones."""
    times = sorted(times[50:])
    return statistics.median(times[:len(times) // 10])


def join(kernel, cells):
    """A new client: until it hears what is live, and has the last 20 cells with their output."""
    begin = now()
    peer = Peer(kernel.info)
    try:
        asked, records, is_subscribed = peer.send("twoproc_log_request", {"cells": 20, "max_bytes": 65536},
                                                  channel="control"), None, False
        for channel, _, frames in peer.listen(10):
            is_subscribed = is_subscribed or channel == "iopub"         # iopub_welcome at the latest
            if channel == "control" and asked in frames[1]:
                records = json.loads(frames[3])["records"]
            if is_subscribed and records is not None:
                taken = now() - begin
                shown = [record["content"]["text"] for record in records if record["k"] == "out"]
                if shown != [f"cell {number}\n" for number in range(cells)]:
                    raise MissedError(f"of the last {cells} cells {len(shown)} were shown")
                return taken
        raise MissedError("no answer within 10 s")
    finally:
        peer.close()


def curve(kernel, size):
    """What it costs to come from another machine: the same cells by turns of three kernels that differ in nothing else.

    The third listens: CURVE, a key that is asked for at every connection, and rights at every message.
    """
    if not speaks_twoproc(kernel):
        return
    subjects = {"ipc": Subject(kernel.name + "-ipc", kernel.argv, kernel.folder, "ipc"),
                "tcp": Subject(kernel.name + "-tcp", kernel.argv, kernel.folder, "tcp"),
                "tcp with CURVE": Listener(kernel.name + "-curve", kernel.argv, kernel.folder)}
    try:
        for subject in subjects.values():
            subject.start()
        for what, code, turns in (("pass", "pass", 50 * size), ("1 MB printed", "print('x' * 1_000_000)", 5 * size)):
            times = {way: [] for way in subjects}
            for number in range(turns + 2):
                for way in list(subjects) if number % 2 else list(subjects)[::-1]:
                    found = [subjects[way].peer.execute(code, silent=what == "pass").done_at for _ in range(10)]
                    times[way] += found if number > 1 else []      # after two turns to get warm
            middle = {way: statistics.median(found) for way, found in times.items()}
            for way, seconds in middle.items():
                yield f"{what}, by {way}", seconds
            yield f"{what}: CURVE to plain tcp", middle["tcp with CURVE"] / middle["tcp"]
    finally:
        for subject in subjects.values():
            subject.stop()


def speaks_twoproc(kernel):
    if kernel.process is None or kernel.process.poll() is not None:
        restart(kernel)
    info = kernel.peer.ask("kernel_info_request", channel="control").reply
    return "twoproc log" in info.get("supported_features", ())


SECTIONS = (start, idle, round_trips, queue, busy, output, interrupt, shutdown, shutdown_busy, orphan, session_log,
            curve)


def restart(kernel):
    kernel.stop()
    kernel.start()


# -- the book of figures

class Book:
    def __init__(self, kernels, reference):
        self.kernels, self.reference = kernels, reference
        self.values = {}        # (figure, kernel): {round: value}
        self.missed = {}        # text: how often

    def add(self, figure, kernel, number, value):
        value *= SCALES.get(FIGURES[figure][0], 1)
        self.values.setdefault((figure, kernel), {})[number] = value

    def ratio(self, figure, kernel):
        """The median of the ratios within a round; None without a common round."""
        ours, theirs = (self.values.get((figure, name), {}) for name in (kernel, self.reference))
        ratios = [ours[number] / theirs[number] for number in ours if theirs.get(number)]
        return statistics.median(ratios) if ratios else None

    def table(self):
        rows = [["figure", "unit", *self.kernels, "aim"]]
        for figure, (unit, aim) in FIGURES.items():
            row = [figure, unit]
            for kernel in self.kernels:
                values = sorted(self.values.get((figure, kernel), {}).values())
                ratio = self.ratio(figure, kernel) if kernel != self.reference else None
                row.append(" ".join(filter(None, (
                    short(statistics.median(values)) if values else "-",
                    f"({short(values[0])}-{short(values[-1])})" if len(values) > 1 else "",
                    f"x{ratio:.2f}" if ratio is not None else ""))))
            if any(figure == measured for measured, _ in self.values):
                rows.append([*row, aim if isinstance(aim, str) else f"x{aim}" if aim else ""])
        widths = [max(map(len, column)) for column in zip(*rows)]
        return [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)).join(("| ", " |"))
                for row in (rows[0], ["-" * width for width in widths], *rows[1:])]


def short(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def versions():
    names = []
    for name in ("ipykernel", "ipython", "pyzmq"):
        try:
            names.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            names.append(f"{name} not installed")
    return (f"{datetime.date.today()}, Python {platform.python_version()}, {', '.join(names)}, "
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")


def run(kernels, book, rounds, size, sections):
    for number in range(-1, rounds):        # round -1 warms the page cache: started once and not counted
        order = kernels if number % 2 else kernels[::-1]
        for section in sections if number >= 0 else (start,):
            for kernel in order:
                try:
                    if section is not start and (kernel.process is None or kernel.process.poll() is not None):
                        restart(kernel)
                    for figure, value in section(kernel, size):
                        if number >= 0:
                            book.add(figure, kernel.name, number, value)
                except (MissedError, OSError) as error:
                    text = f"{kernel.name}: {section.__name__}: {error}"
                    book.missed[text] = book.missed.get(text, 0) + 1
                    kernel.stop()
        for kernel in kernels:
            kernel.stop()
        if number >= 0:
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure kernels side by side.")
    parser.add_argument("--kernel", action="append", metavar="NAME=COMMAND",
                        help="{connection_file} is replaced; the last one is what the others are compared with")
    parser.add_argument("--full", action="store_true", help="more rounds and larger ones, about 15 minutes")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--section", action="append", choices=[section.__name__ for section in SECTIONS],
                        help="only these (repeatable)")
    parser.add_argument("--transport", choices=("tcp", "ipc"), default="tcp")
    arguments = parser.parse_args()
    if not os.path.isdir("/proc/self/task") or not hasattr(os, "pidfd_open"):
        parser.error("the benchmark looks into /proc and waits with pidfd: it needs Linux")
    python = shlex.quote(sys.executable)
    commands = arguments.kernel or [f"twoproc={python} -m twoproc.kernel -f {{connection_file}}",
                                    f"ipykernel={python} -m ipykernel_launcher -f {{connection_file}}"]
    sections = [section for section in SECTIONS if section.__name__ in (arguments.section or section.__name__)]
    begin, folder = now(), tempfile.mkdtemp(prefix="bench-")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    kernels = []
    try:
        for command in commands:
            name, _, command = command.partition("=")
            kernels.append(Subject(name, shlex.split(command), folder, arguments.transport))
        book = Book([kernel.name for kernel in kernels], kernels[-1].name)
        run(kernels, book, arguments.rounds or (10 if arguments.full else 3), 4 if arguments.full else 1, sections)
    finally:
        for kernel in kernels:
            kernel.stop()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{versions()}, {arguments.transport}")
    print(*book.table(), sep="\n")
    for text, count in book.missed.items():
        print(f"missed {count} times: {text}")
    print(f"{now() - begin:.0f} s")


if __name__ == "__main__":
    main()
