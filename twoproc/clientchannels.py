# Distributed under the terms of the BSD 3-Clause License.
"""Every ZeroMQ call of a client: the other end of the five sockets, owned by its thread `twoproc-client`.

client.py says what a message means, this file says when it is sent and received.  A connection may be refused,
cut, and come back: nothing here ever waits for one.

Sources: ZeroMQ RFC 28 (ROUTER, DEALER), RFC 29 (XPUB, SUB), the messaging specification's channel list.
"""
from __future__ import annotations

import contextlib
import functools
import logging
import operator
import os
import queue
import threading
import time
from types import MappingProxyType
from typing import Any, Callable, Mapping

import zmq

from .connection import ConnectionInfo, hex_of
from .mailbox import Mailbox, own_thread
from .session import Message, MessageError, Session, SignatureError

logger = logging.getLogger(__name__)

RECEIVE_AT_ONCE = 200           # messages of one socket before the others get their turn
HELLO = b"twoproc_hello"        # asked and answered before there is a key to sign with; see remote.py
HEARTBEAT_SECONDS = 2.0         # so long until a stopped kernel is seen; a ping costs either side about 0.1 ms
_LINK_EVENTS = {                # what a connection may tell
    "connected": zmq.EVENT_HANDSHAKE_SUCCEEDED,
    "disconnected": zmq.EVENT_DISCONNECTED,
    "refused": zmq.EVENT_CONNECT_RETRIED,
    "rejected": zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,     # by what was said
    "unauthorised": zmq.EVENT_HANDSHAKE_FAILED_AUTH,        # our key was understood, and is not wanted
}
_ALL_EVENTS = functools.reduce(operator.or_, _LINK_EVENTS.values())
# With a network in between, in milliseconds.  A cut cable says nothing: a link is asked every 5 s, and 10 s without
# an answer end it.  A connect without answer is tried anew, because the system would wait a minute for its next try.
_REMOTE_OPTIONS = {zmq.HEARTBEAT_IVL: 5000, zmq.HEARTBEAT_TIMEOUT: 10_000, zmq.CONNECT_TIMEOUT: 5000,
                   zmq.HANDSHAKE_IVL: 10_000}
# A kernel that ends says goodbye on each connection and closes it.  So where one was cut, what comes by the others is
# read to their ends, but no longer than that: of a network that failed they hang.
GOODBYE_SECONDS = 0.5


def _link_event(frames: list[bytes]) -> str:
    """What a socket's monitor tells: one of _LINK_EVENTS, or ""."""
    number = memoryview(frames[0][:2]).cast("H")[0]
    return next((event for event, mask in _LINK_EVENTS.items() if number & mask), "")


def curve_keypair() -> tuple[str, str]:
    """A new pair of CURVE keys, (public, secret), as 64 hexadecimal digits each."""
    public, secret = zmq.curve_keypair()
    return hex_of(public), hex_of(secret)


class ClientChannels:
    """All sockets of one client, owned by one thread, `twoproc-client`, which makes and closes them.

    Shared with other threads: `outbox` (any thread puts).  Everything else that is assigned here is written
    by twoproc-client and may be looked at by anybody.

    Four callbacks, all called on twoproc-client, none of which may wait for anything:
    on_messages(batch)   [(channel, Message), ...] that are verified.  Within a batch output comes first: a
                         kernel publishes what a cell printed before it asks for input or replies
    on_link(event)       one of _LINK_EVENTS happened to the shell connection; where a network is in between, to any
                         but the heartbeat: then "connected" says that all of them are, iopub may come and go, and
                         "disconnected" comes when all that the others still had to tell was told
    on_tick()            after every batch and whenever asked for: returns seconds until it wants to be called
                         again, None for no wish
    on_end(error)        the thread is about to end: None after `close`, else the exception that ended it
    """

    def __init__(self, info: ConnectionInfo, read: Callable[[list[bytes]], Any], *,
                 on_messages: Callable[[list], None], on_link: Callable[[str], None],
                 on_tick: Callable[[], float | None], on_end: Callable[[BaseException | None], None],
                 heartbeat: float = HEARTBEAT_SECONDS, options: Mapping[str, dict] = MappingProxyType({})):
        """Nothing happens before `start`.

        read: Session.deserialize; what else it makes of a message's frames, on_messages is given instead.
        heartbeat: seconds between two pings; 0 for none, and what comes on hb is a message like others.
        options: of ZeroMQ for the socket of a channel, in place of ours.
        """
        self.info = info
        self.outbox = Mailbox()
        self.link = ""                      # the latest event, see on_link
        self.bad_signatures = 0             # messages dropped because their signature is not ours
        self.bad_messages = 0               # and dropped for anything else that is wrong with them
        self.silent_since: float | None = None      # time.monotonic() of the oldest ping without an answer
        self.answered_at: float | None = None       # and of the latest answer
        self._read_frames, self._options = read, options
        self._on_messages, self._on_link, self._on_tick, self._on_end = on_messages, on_link, on_tick, on_end
        self._heartbeat = heartbeat
        self._ping_at = time.monotonic() + heartbeat
        self._sockets: dict[str, zmq.Socket] = {}
        self._channels: dict[Any, str] = {}         # socket -> channel
        self._monitors: dict[Any, str] = {}         # the monitor of a channel's socket -> that channel
        self._connected: set[str] = set()           # channels, of those that have a monitor
        self._cut_until: float | None = None        # one was cut; so long the others are read
        self._descriptors: dict[Any, Callable[[], None]] = {}
        self._held: list[tuple] | None = None       # what is sent while the link is lost; see `reset`
        self._is_reading_output = True
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = own_thread("twoproc-client", self._run)

    # -- called by any thread
    def send(self, channel: str, frames: list, request: Any = None) -> None:
        """request: by which `held` names it; not sent any more if it has an error when its time comes."""
        self._put((channel, frames, request))

    def call(self, function: Callable[[], None]) -> None:
        """Have twoproc-client call `function`, after everything sent before."""
        self._put(function)

    def _put(self, item: Any) -> None:
        try:
            self.outbox.put(item)
        except OSError:
            pass        # the thread has ended, and the mailbox with it: on_end has told who waits

    def close(self, timeout: float = 2.0) -> None:
        """Close all sockets and end the thread; what was sent before has 0.3 s to leave."""
        self._put(self._close_soon)
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    # -- called by the callbacks, on twoproc-client
    def reset(self, is_urgent: bool, hold: bool = False) -> None:
        """Drop the connections with all that waits in them, and connect anew.

        A request that was on its way to a dead kernel must not be run by its successor.  is_urgent: look for
        a listener every 5 ms; else the address is dead, and every second is often enough.  hold: keep what is
        given to `send` from now on, until `release`.
        """
        self._held = (self._held or []) if hold else None
        self._close_sockets(linger=0)
        self._open(is_urgent)

    @property
    def held(self) -> list:
        return [request for _, _, request in self._held or ()]

    def release(self) -> None:
        """Send what was held, in its order."""
        held, self._held = self._held or [], None
        for channel, frames, request in held:
            if request is None or not (request.is_done or request.error):
                self.send_at_once(channel, frames)

    def send_at_once(self, channel: str, frames: list) -> bool:
        """Never waits.  False: a connection that is refused for good takes nothing, until `reset`, nor one with a
        limit that is reached."""
        try:
            self._sockets[channel].send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def watch(self, descriptor: Any, on_readable: Callable[[], None]) -> None:
        """Call `on_readable` once, when `descriptor`, of a file or a ZeroMQ socket, becomes readable."""
        self._descriptors[descriptor] = on_readable
        self._poller.register(descriptor, zmq.POLLIN)

    def unwatch(self, descriptor: Any) -> None:
        if self._descriptors.pop(descriptor, None):
            self._poller.unregister(descriptor)

    def read_output(self, is_wanted: bool) -> None:
        """Stop reading iopub while its readers cannot follow, so that the kernel slows down; or go on."""
        if is_wanted != self._is_reading_output:
            self._is_reading_output = is_wanted
            self._poller.modify(self._sockets["iopub"], zmq.POLLIN if is_wanted else 0)

    def ping(self) -> None:
        """Ask the heartbeat now, whatever the interval."""
        self._ping_at = time.monotonic()

    # -- run by twoproc-client only
    def _run(self) -> None:
        error: BaseException | None = None
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self.outbox, zmq.POLLIN)
        try:
            self._open(is_urgent=True)
            while not self._is_closing:
                self._turn()
        except Exception as mistake:    # ours: whoever waits for an answer shall hear of it
            error = mistake
        is_useful = error is None and self.link == "connected"
        self._close_sockets(linger=300 if is_useful else 0)
        self._on_end(error)
        self._context.term()
        self.outbox.close()

    def _open(self, is_urgent: bool) -> None:
        info = self.info
        # Random, and not the session id: that one stands in every message on iopub, and whoever may connect
        # could otherwise receive our replies and our passwords in our place.
        identity = os.urandom(12).hex().encode("ascii")
        for channel, kind in (("iopub", zmq.SUB), ("shell", zmq.DEALER), ("control", zmq.DEALER),
                              ("stdin", zmq.DEALER), ("hb", zmq.DEALER)):
            # hb: to the kernel a DEALER that sends the empty frame itself is a REQ, but one that may ask
            # again when its question was lost together with a kernel.
            sock = self._sockets[channel] = self._context.socket(kind)
            sock.linger = 0
            # ZeroMQ's own 100 ms would be the larger part of the wait for a new kernel.
            sock.setsockopt(zmq.RECONNECT_IVL, 5 if is_urgent else 100)
            sock.setsockopt(zmq.RECONNECT_IVL_MAX, 0 if is_urgent else 1000)
            # Pings for a dead kernel are not kept for its successor.  All else is kept, however much, for a slow one.
            sock.setsockopt(zmq.SNDHWM, 2 if channel == "hb" else 0)
            if info.is_remote:
                for option, value in _REMOTE_OPTIONS.items():
                    sock.setsockopt(option, value)
            sock.setsockopt(zmq.IPV6, info.transport == "tcp" and ":" in info.ip)
            if info.curve_publickey:
                # Who has no pair of its own does as stock Jupyter clients and shows the kernel's; a connection
                # file without the secret half is served by kernels that ask for no particular client.
                sock.curve_serverkey = info.curve_publickey
                sock.curve_publickey, sock.curve_secretkey = (
                    (info.client_publickey, info.client_secretkey) if info.client_secretkey else
                    (info.curve_publickey, info.curve_secretkey) if info.curve_secretkey else zmq.curve_keypair())
            if channel == "iopub":
                sock.setsockopt(zmq.SUBSCRIBE, b"")
            elif channel != "hb":
                sock.setsockopt(zmq.IDENTITY, identity)
            if channel == "shell" or info.is_remote and channel != "hb":
                monitor = sock.get_monitor_socket(_ALL_EVENTS)
                monitor.linger = 0
                self._monitors[monitor] = channel
                self._poller.register(monitor, zmq.POLLIN)
            for option, value in self._options.get(channel, {}).items():
                sock.setsockopt(option, value)
            with contextlib.suppress(zmq.ZMQError):     # it is no address: client.knock says so
                sock.connect(info.url(channel))
        self._connected.clear()
        self._cut_until = None
        for channel, sock in self._sockets.items():
            self._channels[sock] = channel
            self._poller.register(sock, zmq.POLLIN)
        self._is_reading_output = True
        self.silent_since = None

    def _close_sockets(self, linger: int) -> None:
        for channel in self._monitors.values():
            self._sockets[channel].disable_monitor()
        for sock in (*self._channels, *self._monitors):
            if sock in self._poller:        # iopub is not while it is not read
                self._poller.unregister(sock)
        for sock in (*self._sockets.values(), *self._monitors):
            sock.close(linger)
        self._sockets.clear()
        self._channels.clear()
        self._monitors.clear()

    def _close_soon(self) -> None:
        self._is_closing = True

    def _turn(self) -> None:
        """Wait for something to happen, and do what it asks for."""
        readable, links = set(), []
        for ready, _ in self._poller.poll(self._poll_milliseconds()):
            if ready is self.outbox or ready == self.outbox.fileno():
                self.outbox.silence()
            elif ready in self._monitors:
                links.append(ready)
            elif ready in self._channels:
                readable.add(self._channels[ready])
            elif ready in self._descriptors:
                on_readable = self._descriptors[ready]
                self.unwatch(ready)
                on_readable()
        self._drain()
        for monitor in links:
            self._read_link(monitor)
        self._receive(readable)
        if self._cut_until is not None and (not self._connected or time.monotonic() > self._cut_until):
            self._cut_until = None
            self._receive(set(self._sockets) - {"hb"})      # what has arrived before the cut, for we drop it next
            self._hear("disconnected")
        if self._heartbeat:
            self._beat()

    def _poll_milliseconds(self) -> int:
        wish = self._on_tick()
        # 1 s: safety net for a wake-up lost to Ctrl-C in another thread's put().
        seconds = 1.0 if wish is None else min(1.0, wish)
        if self._cut_until is not None:
            seconds = min(seconds, max(0.0, self._cut_until - time.monotonic()))
        if self._heartbeat:
            seconds = min(seconds, max(0.0, self._ping_at - time.monotonic()))
        return int(seconds * 1000) + 1

    def _drain(self) -> None:
        while not self._is_closing:
            try:
                item = self.outbox.pop()
            except queue.Empty:
                return
            if type(item) is not tuple:
                item()
                continue
            channel, frames, request = item
            if self._held is not None:
                self._held.append(item)
            # One that has failed: its thread was held up, and what would run it now is a dead kernel's successor.
            elif request is None or request.error is None:
                self.send_at_once(channel, frames)

    def _receive(self, readable: set) -> None:
        if self._heartbeat and "hb" in readable:
            readable.discard("hb")
            self._read_heartbeat()
        batch: list = []
        for channel in ("shell", "control", "stdin", "hb"):
            if channel in readable:
                self._read(channel, batch)
        output: list = []
        if self._is_reading_output and (batch or "iopub" in readable):
            self._read("iopub", output)     # read last and told first: see on_messages
        if output or batch:
            self._on_messages(output + batch)

    def _read(self, channel: str, batch: list) -> None:
        receive, deserialize = self._sockets[channel].recv_multipart, self._read_frames
        for _ in range(RECEIVE_AT_ONCE):
            try:
                batch.append((channel, deserialize(receive(zmq.NOBLOCK))))
            except zmq.Again:
                return
            except SignatureError:
                self.bad_signatures += 1
            except MessageError as error:
                self.bad_messages += 1
                logger.debug("%s: %s", channel, error)

    def _read_link(self, monitor: Any) -> None:
        while channel := self._monitors.get(monitor):       # on_link may have reset us
            try:
                frames = monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = _link_event(frames)
            was_connected = channel in self._connected
            if event == "connected":
                self._connected.add(channel)
                if len(self._connected) < len(self._monitors):
                    continue
            elif event:
                self._connected.discard(channel)
            if event == "disconnected" and self.info.is_remote:
                # A try that failed has its own event.  And a kernel cuts its readers when it withdraws a key; the
                # honest ones come back by themselves.
                if channel != "iopub" and was_connected and self._cut_until is None:
                    self._cut_until = time.monotonic() + GOODBYE_SECONDS
            elif event:
                self._hear(event)

    def _hear(self, event: str) -> None:
        self.link = event
        self._on_link(event)

    def _beat(self) -> None:
        now = time.monotonic()
        if now < self._ping_at:
            return
        self._ping_at = now + self._heartbeat
        if self.silent_since is None:
            self.silent_since = now
        # Asked again although the last question is open: it may have gone down with a kernel's predecessor.
        # A stopped kernel finds them all when it goes on; at one in 2 s those are few.
        self.send_at_once("hb", [b"", b"twoproc"])

    def _read_heartbeat(self) -> None:
        try:
            while True:
                self._sockets["hb"].recv_multipart(zmq.NOBLOCK)
                self.silent_since, self.answered_at = None, time.monotonic()
        except zmq.Again:
            pass


def ask_all(questions: list[tuple[ConnectionInfo, str]], timeout: float) -> list[tuple[bool, Message | None]]:
    """Ask many kernels of this machine at once: their heartbeats, and on control the request of that type, "" for none.

    Returns for each whether its heartbeat answered, and the reply.  Who says nothing costs `timeout`, all together.
    Called by any thread: its sockets live as long as the call.
    """
    beats, replies = [False] * len(questions), [None] * len(questions)      # type: list[bool], list[Message | None]
    open_questions = {}     # socket -> (its number in questions, what may be read from it, None for a heartbeat)
    poller = zmq.Poller()
    with zmq.Context() as context:
        for number, (info, msg_type) in enumerate(questions):
            for channel in ("hb", "control") if msg_type else ("hb",):
                session = Session(info.key, info.signature_scheme) if channel == "control" else None
                sock = context.socket(zmq.DEALER)
                sock.linger = 0
                if info.curve_publickey and info.curve_secretkey:
                    sock.curve_serverkey = sock.curve_publickey = info.curve_publickey
                    sock.curve_secretkey = info.curve_secretkey
                with contextlib.suppress(zmq.ZMQError):     # no address, so no answer
                    sock.connect(info.url(channel))
                    sock.send_multipart([b"", b"twoproc"] if session is None else session.serialize(msg_type, {}))
                open_questions[sock] = number, session
                poller.register(sock, zmq.POLLIN)
        deadline = time.monotonic() + timeout
        while open_questions and (left := deadline - time.monotonic()) > 0:
            for sock, _ in poller.poll(int(left * 1000) + 1):
                number, session = open_questions[sock]
                frames = sock.recv_multipart()
                if session is None:
                    beats[number] = True
                else:
                    with contextlib.suppress(MessageError):
                        replies[number] = session.deserialize(frames)
                    if replies[number] is None:     # not from whom we have asked
                        continue
                poller.unregister(sock)
                sock.close()
                del open_questions[sock]
        for sock in open_questions:
            sock.close()
    return list(zip(beats, replies))


def hello(url: str, server_key: bytes, pair: tuple[bytes, bytes], timeout: float) -> tuple[bytes | None, str]:
    """Say hello on the control address of a kernel on another machine, and wait for the answer.

    Returns the answer, a JSON object, or None; and the latest event of _LINK_EVENTS, "" if there was none.
    Called by any thread: its sockets live as long as the call.
    """
    deadline = time.monotonic() + timeout
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.setsockopt(zmq.IPV6, url.startswith("tcp://["))
        sock.setsockopt(zmq.MAXMSGSIZE, 100_000)    # it has 300 bytes
        sock.curve_serverkey = server_key
        sock.curve_publickey, sock.curve_secretkey = pair
        monitor, event = sock.get_monitor_socket(_ALL_EVENTS), ""
        try:
            sock.connect(url)
            sock.send(HELLO, zmq.NOBLOCK)       # kept until the handshake is done
            poller = zmq.Poller()
            poller.register(sock, zmq.POLLIN)
            poller.register(monitor, zmq.POLLIN)
            while (left := deadline - time.monotonic()) > 0 and event not in ("rejected", "unauthorised"):
                for ready, _ in poller.poll(int(left * 1000) + 1):
                    frames = ready.recv_multipart()
                    if ready is sock and frames[0] == HELLO and len(frames) == 2:
                        return frames[1], "connected"
                    if ready is monitor:
                        event = _link_event(frames) or event
            return None, event
        finally:
            sock.disable_monitor()
            monitor.close(0)
