# Distributed under the terms of the BSD 3-Clause License.
"""A kernel on another machine for clients that know only this one: `python -m twoproc.relay NAME`.

Jupyter's clients connect to what a connection file says, and have no key of their own.  The relay has the user's:
it reaches the kernel as our own client does (remote.py), binds five sockets here and writes a connection file for
them.  The file holds the kernel's key for signatures, which the protocol needs, and never the user's.

    local ROUTER  <->  DEALER to the kernel     shell, control, stdin, hb; a message gets one identity more, and so
                                                its reply, or a question, finds the client of ours that it is for
    local XPUB    <--  SUB of the kernel        iopub, everything; who subscribes here is welcomed by us

Frames are passed on as they are.  The heartbeat is passed on, too: it beats here only while it beats there.  What the
relay adds is for clients that know nothing of a link that can be cut: it remembers which requests are not answered, has
the kernel answer again those that it knows and run those that it never got, and puts the output of the time between
in its place, out of the kernel's log.

The sockets to the kernel are a client's (clientchannels.py), and its thread, `twoproc-client`, has those of this side
as well.  Everything but the program at the end runs there; main waits to be told that there is nothing left to do.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import queue
import re
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

import zmq

from . import __version__, config, connection
from .channels import SlowReaders, bind
from .clientchannels import HELLO, RECEIVE_AT_ONCE, ClientChannels
from .client import NotReady
from .connection import CHANNELS, ConnectionFileError, ConnectionInfo
from .replay import gap_message, read_log
from .session import DELIMITER, MessageError, Session, encode

READY_SECONDS = 5.0
REFUSALS = 3                # of connections, one a second: the machine is there, and nobody listens
# A local reader of iopub may hold up the others so long: less than the kernel waits for us before it drops messages.
PATIENCE_SECONDS = 2.5
QUEUE = 500                 # messages that wait for one local reader
OPEN_REQUESTS = 1000        # remembered until they are answered
LARGE = 1 << 20             # a request of which only the header is remembered
EXIT_DIED, EXIT_REFUSED = 70, 6
# Without any sign of the kernel's machine for 6 s the link is cut.  What a kernel that does not read leaves in these
# sockets waits in its client, and beyond 100 messages of output the kernel waits for us: our memory does not grow.
_ALIVE = {zmq.HEARTBEAT_IVL: 2000, zmq.HEARTBEAT_TIMEOUT: 6000, zmq.CONNECT_TIMEOUT: 3000}
_OPTIONS = {channel: {**_ALIVE, zmq.SNDHWM: 10, zmq.RCVHWM: 100} for channel in CHANNELS}
_NUMBER = re.compile(rb'"twoproc_seq":(\d+)}$')


class Gone(Exception):
    """There is nothing left to relay; str() says why.  exit_code: 0 when somebody shut the kernel down."""

    def __init__(self, text: str, exit_code: int = EXIT_DIED):
        super().__init__(text)
        self.exit_code = exit_code


class Request:
    """What a local client asked, until it has its reply and the kernel's idle.  frames: from the header on."""

    def __init__(self, channel: str, identities: list[bytes], header: dict, frames: list[bytes]):
        self.channel, self.identities, self.header, self.frames = channel, identities, header, frames
        self.missing = {"reply", "idle"}


class Relay:
    """Five sockets here, five of a client, and what is under way between them.

    info: how to reach the kernel.  local: where to listen, port 0 meaning any; `self.local` has the ports there are.
    say(text) is called with what the user should hear: the link is lost, or back.
    """

    def __init__(self, info: ConnectionInfo, local: ConnectionInfo, say: Callable[[str], None],
                 max_frame: int = 64 << 20):
        self.info, self.local, self._say = info, local, say
        self._session = Session(info.key, info.signature_scheme, username="relay", max_message=1 << 31)
        self._news: queue.SimpleQueue = queue.SimpleQueue()     # None when output reaches us; why we have ended
        self._near: dict[str, zmq.Socket] = {}
        self._unsent: dict[str, deque] = {channel: deque() for channel in CHANNELS}    # for which there is no room yet
        self._arrived: deque = deque()              # output of the kernel, not yet looked at
        self._output: deque = deque()               # what is to be published, in order
        self._patience = SlowReaders(PATIENCE_SECONDS)
        self._owed: deque = deque(maxlen=100)       # idles that a reader may have lost that was given up,
        self._repeats: deque = deque()              # and when they are repeated
        self._welcomes: list[bytes] = []            # topics whose subscriber waits until we are subscribed ourselves
        self._is_subscribed = False
        self._requests: dict[str, Request] = {}
        self._questions: dict[str, Callable[[list[bytes]], None]] = {}      # msg_id -> who takes the reply
        self._fates = 0                             # clients whose cells the kernel is being asked about
        self._newest = 0                            # twoproc_seq of the newest output
        self._gap: tuple[int, int] | None = None    # what is missing before the last message of _output,
        self._gap_until = 0.0                       # and how long we wait for it
        self._is_linked = True
        self._look_at: float | None = None          # while the link is cut: when to see whether somebody listens
        self._refusals = 0
        self._is_told = False
        self._ended = ""                            # by whom
        self._context = zmq.Context()
        try:
            for channel in CHANNELS:
                self._bind(channel, max_frame)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._far = ClientChannels(info, lambda frames: frames, on_messages=self._hear, on_link=self._hear_link,
                                   on_tick=self._look_around, on_end=self._end, heartbeat=0, options=_OPTIONS)
        self._far.start()

    def _bind(self, channel: str, max_frame: int) -> None:
        sock = self._near[channel] = self._context.socket(zmq.XPUB if channel == "iopub" else zmq.ROUTER)
        sock.linger = 300
        sock.setsockopt(zmq.MAXMSGSIZE, 1024 if channel in ("hb", "iopub") else max_frame)
        sock.setsockopt(zmq.RCVHWM, 10)     # as the kernel's: a stranger may say much by loopback, and wait
        if channel == "iopub":
            sock.setsockopt(zmq.SNDHWM, QUEUE)
            sock.setsockopt(zmq.XPUB_NODROP, 1)
            sock.setsockopt(zmq.XPUB_VERBOSE, 1)
        else:
            sock.setsockopt(zmq.SNDHWM, 10_000)     # a client that leaves so many replies unread loses the next
        self.local = bind(sock, self.local, channel)

    # -- called by the program
    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Until the kernel's output reaches us, so that who finds our connection file finds a kernel behind it."""
        try:
            error = self._news.get(timeout=seconds)
        except queue.Empty:
            raise NotReady("silent", "the kernel at %s let us in, but its output does not reach us within %g s"
                           % (self.info.url("iopub"), seconds)) from None
        if error is not None:
            raise error

    def run(self) -> NoReturn:
        """Relay until there is nothing left to: raises Gone, or what a signal handler raises."""
        while True:
            error = self._news.get()
            if error is not None:
                raise error

    def close(self) -> None:
        self._far.close()

    # -- run by twoproc-client: from this side to the kernel
    def _pass_requests(self, channel: str) -> None:
        for _ in range(RECEIVE_AT_ONCE):
            if self._unsent[channel] or not (frames := _receive(self._near[channel])):
                return
            if channel in ("shell", "control"):
                self._remember(channel, frames)
            self._send(channel, frames)

    def _send(self, channel: str, frames: list) -> None:
        unsent = self._unsent[channel]
        if unsent or not self._far.send_at_once(channel, frames):
            unsent.append(frames)

    def _remember(self, channel: str, frames: list[bytes]) -> None:
        """What has an answer, for the case that the link is cut.

        Not what has no good signature: over loopback any user of this machine may say it, and it would get ours.
        """
        with contextlib.suppress(MessageError):     # the kernel, too, is silent to that
            message = self._session.deserialize(frames)
            if message.msg_type.endswith("_request"):
                kept = frames[len(message.identities) + 2:]
                self._requests[message.msg_id] = Request(channel, message.identities, message.header,
                                                         kept if sum(map(len, kept)) < LARGE else kept[:1])
            if len(self._requests) > OPEN_REQUESTS:     # a refusal for its rate, for one, has no idle
                del self._requests[next(iter(self._requests))]

    def _hear_subscribers(self) -> None:
        while frames := _receive(self._near["iopub"]):
            if frames[0][:1] == b"\x01":
                self._welcomes.append(frames[0][1:])
        self._welcome()

    def _welcome(self) -> None:
        """JEP 65: whoever subscribes is told that from now on output reaches him.  The kernel sees us alone."""
        while self._is_subscribed and self._welcomes:
            topic = self._welcomes.pop()
            self._output.appendleft([topic or b"iopub_welcome", *self._session.serialize(
                "iopub_welcome", {"subscription": topic.decode("utf-8", "replace")})])

    # -- from the kernel to this side
    def _hear(self, batch: list) -> None:
        for channel, frames in batch:
            if channel == "iopub":
                if frames[0] == b"shutdown_reply":
                    self._ended = "shut down by %s" % json.loads(frames[4]).get("username", "a client")
                self._arrived.append(frames)
                self._pass_output()
            elif frames[0] == HELLO:
                self._hear_hello(frames[-1])
            elif channel not in ("shell", "control") or not self._is_for_us(frames):
                self._near[channel].send_multipart(frames)      # a ROUTER drops what is for somebody who has left

    def _is_for_us(self, frames: list[bytes]) -> bool:
        """A reply: to a question of ours, or to one that we remember."""
        at = frames.index(DELIMITER)
        msg_id = json.loads(frames[at + 3]).get("msg_id")
        handler = self._questions.pop(msg_id, None)
        if handler is not None:
            handler(frames[at:])
            return True
        self._note_answer(msg_id, "reply")
        return False

    def _note_answer(self, msg_id: str, what: str) -> None:
        request = self._requests.get(msg_id)
        if request is not None:
            request.missing.discard(what)
            if not request.missing:
                del self._requests[msg_id]

    def _pass_output(self) -> None:
        """Until all is said, what was before is still on its way, or a local reader is full."""
        while self._publish() and self._arrived:
            frames = self._arrived.popleft()
            self._output.append(frames)
            if not self._is_subscribed:
                self._is_subscribed = True
                self._news.put(None)
                self._welcome()
            is_idle = frames[0] == b"status" and b'"idle"' in frames[6]
            if is_idle:
                self._note_answer(json.loads(frames[4]).get("msg_id"), "idle")
                if self._repeats:
                    self._owed.append(frames)
            # The first may not be an idle, which the kernel repeats with the number that it had.
            if (found := _NUMBER.search(frames[5])) and (self._newest or not is_idle):
                newest, self._newest = self._newest, max(self._newest, int(found[1]))
                if newest and self._newest > newest + 1:
                    self._ask_for_past(newest + 1, self._newest - 1)

    def _publish(self) -> bool:
        """False: what was before is on its way, or a local reader is full and it is not yet time to let it lose."""
        iopub = self._near["iopub"]
        while self._output and self._gap is None:
            if not _send(iopub, self._output[0]):
                if not self._patience.is_over():
                    return False
                self._say("a local reader of output is too slow: it loses messages until it catches up")
                iopub.setsockopt(zmq.XPUB_NODROP, 0)    # see channels.py
                _send(iopub, self._output[0])
                iopub.setsockopt(zmq.XPUB_NODROP, 1)
                self._patience = SlowReaders(PATIENCE_SECONDS)
                # A stock client waits for its idle for ever.  Nobody says when that reader has caught up: so ever
                # more rarely, for an hour.
                self._repeats = deque(time.monotonic() + 2 ** n for n in range(12))
            self._patience.sent()
            self._output.popleft()
        return not self._output

    def _ask_for_past(self, first: int, last: int) -> None:
        """Our kernels number what they publish; of what we missed while we were cut off the output is in their log."""
        self._gap, self._gap_until = (first, last), time.monotonic() + READY_SECONDS
        self._ask("control", [], {}, "twoproc_log_request", {"from_seq": first, "to_seq": last},
                  functools.partial(self._hear_past, first, last))

    def _hear_past(self, first: int, last: int, frames: list[bytes]) -> None:
        """A page of it goes before the message that showed the gap."""
        if self._gap != (first, last):
            return          # it came too late, or was asked for twice
        self._gap, held = None, self._output.pop()
        reply = self._session.deserialize(frames)
        page = read_log(reply, first, last)
        for message in page.messages if page.session else [
                gap_message(last - first + 1, "the kernel keeps no log", reply.header, {})]:
            kind, content = message.msg_type, message.content
            if kind == "twoproc_gap":
                kind, content = "stream", {"name": "stderr", "text": "(output missed: %s)\n" % content["reason"]}
            elif not first <= message.metadata.get("twoproc_seq", 0) <= last:
                continue
            self._output.append([kind.encode(), *self._session.serialize(
                kind, content, encode(message.parent_header), message.metadata,
                header=encode({**message.header, "msg_type": kind}))])
        self._output.append(held)
        if page.next_seq is not None and first < page.next_seq <= last:
            self._ask_for_past(page.next_seq, last)

    def _ask(self, channel: str, identities: list[bytes], header: dict, msg_type: str, content: dict,
             handler: Callable[[list[bytes]], None]) -> None:
        """Ask the kernel something ourselves; handler: is called with the frames of the reply.

        header: with the members that are not ours, in the name of a client.
        """
        own = json.loads(self._session.header(msg_type))
        self._questions[own["msg_id"]] = handler
        frames = self._session.serialize(msg_type, content, header=encode({**own, **header}))
        self._send(channel, [*identities, *frames])

    # -- the link
    def _look_around(self) -> float | None:
        """What has become due; returns the seconds until something may."""
        now = time.monotonic()
        if self._look_at is not None and now >= self._look_at:
            self._knock()
            self._look_at = time.monotonic() + 1
        if self._gap is not None and now > self._gap_until and self._is_linked:
            self._say("output is missing: the kernel did not say it again within %g s" % READY_SECONDS)
            self._gap = None
        self._pass_output()
        self._far.read_output(not self._output)
        if self._repeats and now > self._repeats[0] and not self._output:
            self._repeats.popleft()
            for frames in self._owed:
                _send(self._near["iopub"], frames)
            if not self._repeats:
                self._owed.clear()
        for channel, sock in self._near.items():    # what is left unread makes its sender wait
            unsent = self._unsent[channel]
            while unsent and self._far.send_at_once(channel, unsent[0]):
                unsent.popleft()
            if channel == "iopub":
                self._far.watch(sock, self._hear_subscribers)
            elif self._is_linked and not unsent and (channel != "shell" or not self._fates):
                self._far.watch(sock, functools.partial(self._pass_requests, channel))
            else:
                self._far.unwatch(sock)
        if self._output and self._gap is None:
            return 0.005            # poll() calls iopub writable while send says it is full
        if any(self._unsent.values()):
            return 0.05
        return 0.5 if self._look_at or self._repeats or self._gap else None

    def _hear_link(self, event: str) -> None:
        if event == "unauthorised":
            raise Gone("the kernel does not let your key in any more", EXIT_REFUSED)
        if event == "connected":
            self._look_at = None
            if not self._is_linked and self.info.curve_publickey:
                self._send("control", [HELLO])     # is it the same kernel?
            elif not self._is_linked:   # its answer says that the kernel, too, has all our connections
                self._ask("control", [], {}, "twoproc_status_request", {}, lambda frames: self._come_back())
        elif event == "disconnected":
            if self._ended:
                raise Gone("the kernel was " + self._ended, 0)
            # Not at once: the sockets of a process that was killed are closed one by one.
            self._look_at, self._refusals = time.monotonic() + 1, 0
            self._is_linked = self._is_subscribed = False
            self._questions.clear()     # their answers went to the connection that was
            self._fates = 0
            for unsent in self._unsent.values():
                unsent.clear()
            self._far.reset(is_urgent=False)

    def _knock(self) -> None:
        """Where nobody listens the kernel is gone; where nobody answers it may be the network, which comes back."""
        try:
            socket.create_connection((self.info.ip.strip("[]"), self.info.shell_port), 0.5).close()
        except ConnectionRefusedError:
            self._refusals += 1
            if self._refusals == REFUSALS:
                raise Gone("the kernel is gone: nothing listens at %s any more" % self.info.url("shell")) from None
            return
        except OSError:
            pass
        self._refusals = 0
        if not self._is_told:
            self._is_told = True
            self._say("the link is lost; waiting for it to come back")

    def _hear_hello(self, answer: bytes) -> None:
        said = json.loads(answer)
        if not said:
            return          # our key was withdrawn just now: the next connection is refused
        if said["key"].encode() != self.info.key:
            raise Gone("the kernel is gone, and another one has its place at %s" % self.info.url("shell"))
        self._come_back()

    def _come_back(self) -> None:
        """Have the kernel, in the name of each client, say what it knows of the requests that were under way.

        It answers the cells that it knows to the connection on which it is asked.
        """
        if self._is_told:
            self._say("the link is back")
        self._is_linked, self._is_told = True, False
        if self._gap is not None:       # seen before all connections stood, or when they were cut once more
            self._ask_for_past(*self._gap)
        cells: dict[tuple, list[Request]] = {}
        for request in self._requests.values():
            if request.header["msg_type"] == "execute_request":
                cells.setdefault((*request.identities, request.header.get("session")), []).append(request)
            elif len(request.frames) > 1:   # signed anew: if it was answered and the answer lost, it is answered again
                header, parent, _, content = request.frames[:4]
                self._send(request.channel, [*request.identities, *self._session.serialize(
                    "", content, parent, b'{"twoproc_again":true}', header=header)])
        self._fates = len(cells)
        for requests in cells.values():
            first = requests[0]
            self._ask("shell", first.identities, {"session": first.header.get("session")}, "twoproc_resume_request",
                      {"msg_ids": [request.header["msg_id"] for request in requests]}, self._hear_fate)

    def _hear_fate(self, frames: list[bytes]) -> None:
        """The answer to a twoproc_resume_request; see docs/protocol.md."""
        content = json.loads(frames[5])
        self._fates -= 1        # what was sent since goes after what goes once more
        for request in filter(None, map(self._requests.get, content.get("unknown", ()))):
            if len(request.frames) == 1:
                self._give_up(request, "the link was cut before this cell arrived, and it was too large to be kept")
            else:       # unchanged: had it been on its way nevertheless, the kernel would refuse the second one
                self._send(request.channel, [
                    *request.identities, DELIMITER, self._session.sign(request.frames[:4]), *request.frames])
        for request in filter(None, map(self._requests.get, content.get("forgotten", ()))):
            self._give_up(request, "the link was cut when this cell ended, and its reply is no longer kept")

    def _give_up(self, request: Request, text: str) -> None:
        del self._requests[request.header["msg_id"]]
        error = {"status": "error", "ename": "ConnectionLost", "evalue": text, "traceback": [text]}
        self._near["shell"].send_multipart([*request.identities, *self._session.serialize(
            "execute_reply", {**error, "execution_count": 0}, request.frames[0])])
        _send(self._near["iopub"], [b"status", *self._session.serialize(
            "status", {"execution_state": "idle"}, request.frames[0])])

    def _end(self, error: BaseException | None) -> None:
        for sock in self._near.values():
            sock.close()
        self._context.term()        # what is on its way has the linger of its socket
        self._news.put(error)


def _receive(sock: zmq.Socket) -> list[bytes]:
    try:
        return sock.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return []


def _send(sock: zmq.Socket, frames: list) -> bool:
    try:
        sock.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True


# -- the program

def make_parser() -> argparse.ArgumentParser:
    program = argparse.ArgumentParser(prog="python -m %s.relay" % __package__,
                                      description="Let Jupyter's clients use a kernel on another machine.")
    program.add_argument("target", metavar="ADDR|NAME", nargs="?",
                         help="twoproc://host:port/key, or the name of a known kernel")
    program.add_argument("--name", help="the name of the connection file (default: an animal and a number)")
    program.add_argument("--transport", choices=("ipc", "tcp"), help="how the clients on this machine connect")
    program.add_argument("--version", action="version", version="twoproc %s" % __version__)
    config.add_arguments(program)
    return program


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status, see docs/configuration.md."""
    program = make_parser()
    arguments = program.parse_args(argv)
    try:
        settings = config.load(arguments, {"--transport": ("kernel.transport", arguments.transport)})
        if arguments.show_config:
            print(settings.show(), flush=True)
            return 0
        if arguments.target is None:
            program.error("say which kernel: its address, or its name")
        from .remote import reach
        serve(reach(arguments.target, settings), arguments.name, settings)
    except BrokenPipeError:
        return connection.leave_stdout()
    except (config.ConfigError, ConnectionFileError, NotReady, Gone) as error:
        tell(str(error))
        return getattr(error, "exit_code", 2)


def tell(text: str) -> None:
    text = "".join(filter(str.isprintable, text))       # there are names of others in it
    print("twoproc.relay: %s" % text, file=sys.stderr, flush=True)


def serve(info: ConnectionInfo, name: str | None, settings: config.Settings) -> NoReturn:
    """The connection file is written when everything works, never before, and removed with the sockets."""
    path, local = connection.new_connection(settings["kernel.transport"], name)
    local = local._replace(key=info.key, signature_scheme=info.signature_scheme, kernel_name=info.kernel_name,
                           extra={"twoproc_pid": os.getpid()})
    endings = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
    relay: Relay | None = None
    with connection.Claim(path):
        try:
            for number in endings:
                signal.signal(number, end)
            relay = Relay(info, local, tell, settings["limits.max_frame_mb"] << 20)
            relay.wait_ready()
            connection.write_connection_file(path, relay.local)
            if settings["kernel.publish_jupyter"]:
                connection.publish_to_jupyter(path, relay.local)
            print(path, flush=True)
            relay.run()
        finally:
            for number in endings:
                signal.signal(number, signal.SIG_IGN)       # what is left to do takes a moment
            connection.remove_files(path, local)
            if relay is not None:
                relay.close()


def end(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number if number != signal.SIGINT else 0)


if __name__ == "__main__":
    connection.leave_current_folder()
    sys.exit(main())
