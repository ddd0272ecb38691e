# Distributed under the terms of the BSD 3-Clause License.
"""Every ZeroMQ call of the kernel: its five sockets, and the threads that own them.

A ZeroMQ socket belongs to one thread.  Here that is `twoproc-io`, and `twoproc-heartbeat` beside it; everybody
else puts something into a Mailbox and that thread wakes.

    KernelChannels   shell, control and stdin ROUTERs, the iopub XPUB, and the outbox: one FIFO for all of them
    beat             an echo that goes on while a cell holds the interpreter lock

What crosses between threads is immutable: a Message, or an entry of the outbox.  What a message means is not
known here: kernel.py says what to do with each, this file says when and on which thread.  The other end of the
five sockets is in clientchannels.py.

Sources: ZeroMQ RFC 28 (ROUTER, DEALER), RFC 29 (XPUB, SUB), the messaging specification's channel list.
"""
from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import socket
import stat
import threading
import time
from collections import deque
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import zmq

from .access import Access
from .admission import LOCAL, Admission
from .connection import CHANNELS, ConnectionFileError, ConnectionInfo, address, is_dead_socket, remove_sockets
from .mailbox import Mailbox, own_thread
from .session import BadMessage, MalformedMessage, Message, MessageError, Session, encode, seal

logger = logging.getLogger(__name__)


class Limits(NamedTuple):
    """Bounds of the kernel's channels; docs/configuration.md, section limits, says what each is for."""
    max_frame: int = 64 << 20
    max_frames: int = 64
    max_message: int = 128 << 20
    stream_chunk: int = 64 << 10
    iopub_queue: int = 500
    slow_reader_seconds: float = 5.0
    replay_memory: int = 65_536
    outbox: int = 16 << 20


class Listen(NamedTuple):
    """Where clients on other machines connect: five ports in a row, shell first, on the sockets that there are."""
    host: str
    ports: tuple[int, ...]              # to be tried as the first of the five, in this order
    handshake_seconds: float = 5.0
    max_connections: int = 64


class Outgoing(NamedTuple):
    """An entry of the outbox: a message whose content is already bytes; number and signature come last.

    So does the header, unless the sender must know its msg_id.  identities: for iopub a topic other than msg_type.
    """
    channel: str
    msg_type: str
    content: bytes
    parent: bytes
    metadata: bytes
    buffers: list[bytes]
    identities: Iterable
    header: bytes | None = None


class Text(NamedTuple):
    """An entry of the outbox: something written to a stream, joined with its neighbours when it leaves."""
    name: str
    text: str
    parent: bytes


MAX_QUEUED_REQUESTS = 10_000    # beyond it shell is left unread, and ZeroMQ makes the sender wait
MAX_IDENTITIES = 10_000         # of clients, remembered with the key of each
HELLO = b"twoproc_hello"        # what a client on another machine says first, and the beginning of the answer
RECEIVE_SECONDS = 0.01          # that one socket is read before the others get their turn
MAX_SUBSCRIPTIONS = 10_000      # to iopub, and
MAX_TOPICS = 1 << 20            # bytes in their topics, each of which ZeroMQ keeps in about 50; see _welcome
EXIT_FAULT = 70                 # the exit status after a fault of ours
DRAIN_SECONDS = 0.02            # of sending before the sockets get their turn
SETTLE_SECONDS = 0.25           # between two looks at a reader that was given up
REPEAT_SECONDS = 2.0            # until the idles are repeated although another one is still full


def check_curve() -> None:
    """Raises ConnectionFileError, exit code 5, where this ZeroMQ cannot keep strangers out."""
    version = zmq.zmq_version_info()
    if version < (4, 3, 3) or not zmq.has("curve"):     # 4.3.3: CVE-2020-15166 and others, by clients without a key
        raise ConnectionFileError("libzmq %s%s is not safe to listen with; install a pyzmq with 4.3.3 or newer, with "
                                  "CURVE" % (zmq.zmq_version(), "" if zmq.has("curve") else " without CURVE"), 5)


class KernelChannels:
    """All sockets of the kernel process but the heartbeat, owned by one thread, `twoproc-io`.

    The main thread binds them here, so that a port in use is its exception, and hands them over in `start`.
    Shared with other threads: `outbox` (any thread puts) and `requests` (twoproc-io puts, main takes).

    on_message(channel, message) and on_bad_message(channel, error) are called on twoproc-io for whatever is
    verified, in the order received, and must not wait for anything.  on_publish(msg_type, seq, content, parent,
    metadata) is called there for whatever is about to be sent on iopub, in the order sent.
    """

    def __init__(self, info: ConnectionInfo, limits: Limits = Limits(), access: Access | None = None,
                 listen: Listen | None = None):
        """Bind all sockets of `info`, port 0 meaning any; `self.info` then holds the ports there are.

        access: who may connect, and what; None: whoever gets here.  listen: bind its five ports as well, and
        set `listening` to the first; `info` must then have CURVE keys.
        Raises ConnectionFileError (exit code 4) naming port and channel, with nothing left bound.
        """
        self.limits, self.access, self.listen = limits, access, listen
        self.listening: int | None = None
        self.session = Session(info.key, info.signature_scheme, replay_memory=limits.replay_memory,
                               max_frames=limits.max_frames, max_message=limits.max_message)
        self.outbox = Mailbox()
        self.requests = Mailbox()
        self.on_message: Callable[[str, Message], None] = lambda channel, message: None
        self.on_bad_message: Callable[[str, BadMessage], None] = lambda channel, error: None
        self.on_tick: Callable[[], float | None] = lambda: None
        self.on_publish: Callable[[str, int, bytes, bytes, bytes], None] = lambda *message: None
        self.on_hello: Callable[[str], bytes] = lambda user: b"{}"
        self.on_fault: Callable[[], None] = lambda: None
        self.may_not_wait: Callable[[], bool] = lambda: False   # the calling thread, for room in the outbox
        self.busy_parent: bytes | None = None       # the running cell's header; see _settle
        self.subscribers = 0                        # subscriptions to iopub: one for each usual client
        self.refused = 0                            # messages that were answered by silence: see session.MessageError
        self._topics = 0                            # the bytes of their topics
        self._flood_at = 0.0                        # when there were too many of them; see _welcome
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket] = {}
        self._socket_files: list[str] = []
        self._admission = None if access is None else Admission(
            self._context, access, self._cut_readers_soon, listen.max_connections if listen else 0)
        self._owners: dict[bytes, str] = {}         # identity -> the key that used it first; see _owner_of
        self._is_to_cut = False                     # somebody lost the right to read iopub
        self._cut: list[str] = []                   # where it is not yet bound again after that
        try:
            for channel, kind in (("shell", zmq.ROUTER), ("control", zmq.ROUTER), ("stdin", zmq.ROUTER),
                                  ("iopub", zmq.XPUB), ("hb", zmq.ROUTER)):
                info = self._bind(info, channel, kind)
            if listen is not None:
                self.listening = self._listen(listen)
        except BaseException:
            self._context.destroy(linger=0)
            remove_sockets(self._socket_files)
            raise
        self.info = info
        self._heartbeat = self._sockets.pop("hb")
        self._names = {sock: channel for channel, sock in self._sockets.items()}
        self.unasked: bytes | None = None           # header of a question to who has not connected stdin yet
        self.published = 0                          # twoproc_seq of the newest iopub message
        self._put_bytes = self._sent_bytes = 0      # what waits in the outbox, roughly: see _wait_for_room
        self._text_sent = 0.0
        self._head: list | None = None              # the iopub message that a full reader did not take
        self._has_more = False                      # the outbox, when _drain had to leave it
        self._patience = SlowReaders(limits.slow_reader_seconds)
        self._is_losing = False                     # a full reader was given up and has not caught up; see _settle
        self._owed: deque = deque(maxlen=1000)      # idle messages that it may have lost
        self._settle_at = self._repeat_at = self._repeat_pause = 0.0
        self._was_read_up = False
        self._descriptors: dict[int, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None
        self._stop_at: float | None = None

    def _bind(self, info: ConnectionInfo, channel: str, kind: int) -> ConnectionInfo:
        sock = self._sockets[channel] = self._context.socket(kind)
        sock.linger = 1000
        sock.setsockopt(zmq.HANDSHAKE_IVL, int(1000 * (self.listen.handshake_seconds if self.listen else 5.0)))
        # The heartbeat by ipc is for whoever gets into the folder: it answers newcomers also while a cell computes in
        # C and lets no other thread run, twoproc-admission included.
        if self._admission is not None and (channel != "hb" or info.curve_secretkey):
            self._admission.guard(sock, channel)
        if self.listen is not None:
            # A peer whose machine or network is gone frees its identity, for it may come back.
            sock.setsockopt(zmq.HEARTBEAT_IVL, 5000)
            sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15_000)
            sock.setsockopt(zmq.IPV6, ":" in self.listen.host)
        # A peer without a key reaches this far: what is larger costs it the connection and us no memory. To iopub
        # nothing is said but topics; ZeroMQ took 6 GB for one of 60 MB.
        sock.setsockopt(zmq.MAXMSGSIZE, 1024 if channel in ("hb", "iopub") else self.limits.max_frame)
        # What waits in a socket of ours is a message each, of any size: 1000 of them, ZeroMQ's default, took 800 MB
        # of a stranger's junk. A sender who is not read fast enough waits; his own socket has his other messages.
        sock.setsockopt(zmq.RCVHWM, 10)
        if channel == "iopub":
            sock.setsockopt(zmq.SNDHWM, self.limits.iopub_queue)
            sock.setsockopt(zmq.XPUB_NODROP, 1)
            sock.setsockopt(zmq.XPUB_VERBOSER, 1)   # each subscriber is seen to come and go, not each topic
        else:
            # Replies that a client has yet to read; one from elsewhere may ask for many and read none, on control for
            # pages of the log.
            sock.setsockopt(zmq.SNDHWM, 100 if channel == "hb" else 100_000 if self.listen is None
                            else 32 if channel == "control" else 10_000)
        if info.curve_secretkey and info.curve_publickey:
            sock.curve_server = True
            sock.curve_secretkey, sock.curve_publickey = info.curve_secretkey, info.curve_publickey
        if channel == "stdin":
            sock.setsockopt(zmq.ROUTER_MANDATORY, 1)    # of the others, what is for nobody is dropped
        info = bind(sock, info, channel)
        if info.transport == "ipc":
            self._socket_files.append(info.url(channel)[len("ipc://"):])
        return info

    def _listen(self, listen: Listen) -> int:
        """Bind five ports in a row; all of them, or none and the next five are tried.  Returns the first."""
        error: zmq.ZMQError | None = None
        for first in listen.ports:
            bound: list[tuple[zmq.Socket, str]] = []
            try:
                for offset, channel in enumerate(CHANNELS):
                    url = address(listen.host, first + offset)
                    self._sockets[channel].bind(url)
                    bound.append((self._sockets[channel], url))
                return first
            except zmq.ZMQError as why:
                error = why
                for sock, url in bound:
                    sock.unbind(url)
            if error.errno != errno.EADDRINUSE:
                break
        raise ConnectionFileError("%s: cannot listen, port %d (%s): %s; choose another address or port, or stop the "
                                  "program that has it" % (listen.host, first + offset, channel, error.strerror), 4)

    # -- called by the main thread
    def start(self) -> None:
        if self._admission is not None:
            self._admission.start(dict(zip(CHANNELS, self._remote_ports())))
        own_thread("twoproc-heartbeat", lambda: beat(self._heartbeat))
        self._thread = own_thread("twoproc-io", self._run_or_die)

    def stop(self, seconds: float = 2.0) -> None:
        """Send what is queued, close everything, end both threads; takes at most about `seconds`."""
        # Not by way of the outbox: behind a reader that is stuck it would never be heard.
        self._stop_at = time.monotonic() + seconds
        self.outbox.ring()
        if self._thread is not None:
            self._thread.join(seconds + 1)

    # -- called by any thread
    def send(self, channel: str, msg_type: str, content: dict | bytes, parent: bytes = b"{}",
             metadata: dict | None = None, buffers: Iterable = (), identities: Iterable = (),
             header: bytes | None = None) -> None:
        """Queue one message; raises TypeError if the content is not JSON.  Waits while the outbox is full.

        Everything is encoded or copied here, by its owner's thread: the owner may change it afterwards, and
        what cannot be sent is the owner's error, not the end of twoproc-io.
        """
        if not isinstance(content, bytes):
            content = encode(content)
        buffers = [buffer if isinstance(buffer, bytes) else memoryview(buffer).tobytes() for buffer in buffers]
        metadata = seal(metadata, buffers)
        self._put_bytes += len(content) + sum(map(len, buffers)) + 64
        if self._put_bytes - self._sent_bytes > self.limits.outbox:
            self._wait_for_room()
        self.outbox.put(Outgoing(channel, msg_type, content, parent, encode(metadata) if metadata else b"{}",
                                 buffers, identities, header))

    def write(self, name: str, text: str, parent: bytes) -> None:
        """Queue text for a stream: cheap, because a cell may print a million lines.

        The first line leaves at once.  In a flood the next are collected until on_tick wakes twoproc-io,
        because every time that it wakes costs the cell a change of the interpreter lock.
        """
        # Spelt out here, without a call for each step: these lines run for every word that is printed.
        self._put_bytes += len(text) + 64
        if self._put_bytes - self._sent_bytes > self.limits.outbox:
            self._wait_for_room()
        self.outbox.append(tuple.__new__(Text, (name, text, parent)))
        # Looked at after the text is there: a cell that ends in this moment rings for its reply later.
        if self.busy_parent is None or (
                ("\n" in text or "\r" in text) and time.monotonic() - self._text_sent > 0.01):
            self.outbox.ring()

    def write_first(self, name: str, text: str, parent: bytes) -> None:
        """The same in front of all that waits: before the idle of the cell whose output is just leaving."""
        self._put_bytes += len(text) + 64
        self.outbox.put_back([Text(name, text, parent)])
        self.outbox.ring()

    def call(self, function: Callable[[], list | None]) -> None:
        """Have twoproc-io call `function` when everything queued before has been sent.

        What it returns, entries for the outbox, goes in front of everything that was queued after it.
        """
        self.outbox.put(function)

    def rights(self, user: str) -> str:
        """One of access.RIGHTS; empty for a key that is no longer good."""
        return "admin" if self.access is None else self.access.rights(user)

    def _cut_readers_soon(self) -> None:
        self._is_to_cut = True          # not by way of the outbox: the reader to be cut may be the one that is stuck
        self.outbox.ring()

    def _wait_for_room(self) -> None:
        # Back pressure, as in a terminal.  A sleep, not a condition: Ctrl-C may strike here, and so may a
        # signal handler that prints.  The two sums are not exact when threads race; an empty outbox resets
        # them, and a bound needs no more.  An empty outbox has room for anything, however large.
        while self._put_bytes - self._sent_bytes > self.limits.outbox and self.outbox \
                and threading.current_thread() is not self._thread:
            if self._stop_at is not None or self.may_not_wait():
                return
            time.sleep(0.002)

    # -- called by handlers on twoproc-io
    def reply_now(self, channel: str, message: Message, msg_type: str, content: dict | bytes) -> None:
        """Answer at once, past the outbox: for control, which must not wait for output."""
        frames = self.session.serialize(msg_type, content, message.header_bytes)
        self._send(self._sockets[channel], [*message.identities, *frames])

    def watch(self, descriptor: int, on_readable: Callable[[], None]) -> None:
        """Call `on_readable` on twoproc-io once, when `descriptor` becomes readable; before start()."""
        self._descriptors[descriptor] = on_readable

    def receive_shell(self) -> None:
        """Take in everything that shell has received by now, without answering anything yet."""
        until = time.monotonic() + 0.5      # a stranger's junk may come without end
        # 5 ms: of a queue of cells ten are in the socket, and ZeroMQ is about to fetch the next.
        while (self._receive("shell") or self._sockets["shell"].poll(5)) and time.monotonic() < until:
            pass

    # -- run by twoproc-io only
    def _run_or_die(self) -> None:
        """A kernel whose sockets nobody serves looks alive and answers nothing: better that it is seen to die."""
        try:
            self._run()
        except BaseException:
            logger.critical("a fault of twoproc's own ended twoproc-io, and with it the kernel", exc_info=True)
            self.on_fault()
            os._exit(EXIT_FAULT)

    def _run(self) -> None:
        poller = self._poller = zmq.Poller()
        for sock in self._sockets.values():
            poller.register(sock, zmq.POLLIN)
        poller.register(self.outbox, zmq.POLLIN)
        for descriptor in self._descriptors:
            poller.register(descriptor, zmq.POLLIN)
        is_reading_shell = True
        while self._stop_at is None or (self._head or self.outbox) and time.monotonic() < self._stop_at:
            if is_reading_shell != (len(self.requests) < MAX_QUEUED_REQUESTS):
                is_reading_shell = not is_reading_shell
                poller.modify(self._sockets["shell"], zmq.POLLIN if is_reading_shell else 0)
            for ready, _ in poller.poll(self._poll_milliseconds(is_reading_shell)):
                if ready is self.outbox or ready == self.outbox.fileno():
                    self.outbox.silence()
                elif ready in self._names:
                    self._receive(self._names[ready])
                elif ready in self._descriptors:
                    poller.unregister(ready)
                    self._descriptors.pop(ready)()
            if self._is_to_cut or self._cut:
                self._cut_readers()
            self._drain()
        for sock in self._sockets.values():
            sock.close()
        self._context.term()        # waits for the linger of each, and for the heartbeat to leave

    def _poll_milliseconds(self, is_reading_shell: bool) -> int | None:
        """How long nothing can happen: None, for ever, in an idle kernel."""
        waits = [self.on_tick()]
        if self._has_more:
            return 0
        if self._head is not None:
            waits.append(0.005)     # poll() calls iopub writable while send says it is full
        if self._cut:
            waits.append(0.005)     # until the system has let go of the port
        if self._is_losing:
            waits.append(SETTLE_SECONDS)
        if not is_reading_shell:
            waits.append(0.05)
        if self.busy_parent is not None:
            waits.append(1.0)       # a cell runs: safety net for a wake-up lost to Ctrl-C
        known = [seconds for seconds in waits if seconds is not None]
        return int(min(known) * 1000) + 1 if known else None

    def _receive(self, channel: str) -> bool:
        """Take in what there is, for RECEIVE_SECONDS; False when that was all."""
        sock = self._sockets[channel]
        until = time.monotonic() + RECEIVE_SECONDS
        user = ""
        while time.monotonic() < until:
            try:
                if channel == "iopub":
                    self._welcome(sock.recv_multipart(zmq.NOBLOCK, copy=False)[0])
                    continue
                if self.listen is None:
                    frames = sock.recv_multipart(zmq.NOBLOCK)
                else:
                    parts = sock.recv_multipart(zmq.NOBLOCK, copy=False)
                    user, frames = self._user_of(parts[-1]), [part.bytes for part in parts]
            except zmq.Again:
                return False
            try:
                self._handle(sock, channel, user, frames)
            except MessageError as error:
                self.refused += 1
                logger.warning("%s: %s", channel, error)
            except Exception:       # a fault of ours costs this message its answer, not everybody the kernel
                logger.exception("%s: a message could not be handled", channel)
        return True

    def _handle(self, sock: zmq.Socket, channel: str, user: str, frames: list[bytes]) -> None:
        if self.listen is not None:
            self._check_owner(frames[0], user)
            if channel == "control" and frames[1:] == [HELLO]:
                self._send(sock, [frames[0], HELLO, self.on_hello(user)])
                return
        try:
            message = self.session.deserialize(frames, self.rights(user) in ("run", "admin"), user)
            self.on_message(channel, message._replace(user=user) if user else message)
        except BadMessage as error:
            error.message = error.message._replace(user=user)
            self.on_bad_message(channel, error)

    @staticmethod
    def _user_of(frame: zmq.Frame) -> str:
        """What twoproc-admission said of the connection that this frame came by."""
        user = str(frame.get("User-Id"))
        return "" if user == LOCAL else user

    def _check_owner(self, identity: bytes, user: str) -> None:
        """An identity belongs to the key that used it first: nobody comes into another's replies and questions."""
        if self._owners.setdefault(identity, user) != user:
            raise MalformedMessage("identity %.40r belongs to another key" % identity)
        if len(self._owners) > MAX_IDENTITIES:
            del self._owners[next(iter(self._owners))]

    def _cut_readers(self) -> None:
        """Somebody's key was withdrawn: cut everybody who reads iopub by tcp; the others come back at once.

        ZeroMQ asks for a key when a connection is made and never again, and no single one can be cut.  Who comes
        back has missed some messages, sees that by their numbers, and gets them from the session log.
        """
        iopub = self._sockets["iopub"]
        if self._is_to_cut:
            self._is_to_cut = False     # first: it may be asked for once more while we are at it
            self._cut.clear()
            if self.listen is not None and self.listening is not None:
                self._cut.append(address(self.listen.host, self.listening + CHANNELS.index("iopub")))
            if self.info.transport == "tcp":
                self._cut.append(self.info.url("iopub"))
            for url in self._cut:
                with contextlib.suppress(zmq.ZMQError):
                    iopub.unbind(url)
        with contextlib.suppress(zmq.ZMQError):     # a port may still be closing: tried again
            while self._cut:
                iopub.bind(self._cut[-1])
                self._cut.pop()

    def _remote_ports(self) -> range:
        return range(self.listening, self.listening + len(CHANNELS)) if self.listening else range(0)

    def _welcome(self, received: zmq.Frame) -> None:
        """A subscription came (1 and the topic) or went (0): JEP 65, iopub_welcome."""
        frame = received.bytes
        if frame[:1] == b"\x00":
            self.subscribers -= 1
            self._topics -= len(frame)
        elif frame[:1] == b"\x01":
            self.subscribers += 1
            self._topics += len(frame)
            if self.subscribers > MAX_SUBSCRIPTIONS or self._topics > MAX_TOPICS:
                # Somebody subscribes without end, 80 MB a second; by ZeroMQ he cannot be cut alone. Whoever is honest
                # is back in a moment. Twice a second: that one may come back as well, until his key is withdrawn.
                if self.access is not None:
                    self.access.note("limit", self._user_of(received), channel="iopub")
                logger.warning("iopub: more than %d subscriptions, or %d bytes of topics: all who read it by tcp are "
                               "cut", MAX_SUBSCRIPTIONS, MAX_TOPICS)
                if time.monotonic() > self._flood_at:
                    self._flood_at = time.monotonic() + 0.5
                    self._is_to_cut = True
                return
            topic = frame[1:]
            content = encode({"subscription": topic.decode("utf-8", "replace")})
            # By way of the outbox's front: there may be a head that waits for another reader.
            self.outbox.put_back([Outgoing("iopub", "iopub_welcome", content, b"{}", b"{}", [], [topic])])

    def _drain(self) -> None:
        """Send what the outbox holds, in order, until it is empty or a reader of iopub is full.

        Not longer than DRAIN_SECONDS: a cell may print as fast as we send, and control must be heard meanwhile.
        """
        self._has_more = False
        if self._is_losing:
            self._settle()
        if self._head is not None and not self._publish_head():
            return
        outbox = self.outbox
        until = time.monotonic() + DRAIN_SECONDS
        while self._head is None:
            if time.monotonic() > until:
                self._has_more = True
                return
            try:
                entry = outbox.pop()
            except queue.Empty:
                self._put_bytes = self._sent_bytes = 0
                return
            if type(entry) is Text:
                self._publish_text(entry)
            elif type(entry) is Outgoing:
                self._sent_bytes += len(entry.content) + sum(map(len, entry.buffers)) + 64
                if entry.channel == "iopub":
                    self._publish(entry.msg_type, entry.content, entry.parent, entry.metadata, entry.buffers,
                                  b"".join(entry.identities))
                else:
                    frames = [*entry.identities, *self.session.serialize(entry.msg_type, entry.content, entry.parent,
                                                                         header=entry.header)]
                    if not self._send(self._sockets[entry.channel], frames) and entry.channel == "stdin":
                        self.unasked = entry.header
            else:
                outbox.put_back(entry() or ())

    def _publish_text(self, first: Text) -> None:
        """Publish this text and the neighbours it can be joined with, at most stream_chunk characters a message."""
        first_name, text, first_parent = first
        parts, size, limit = [text], len(text), self.limits.stream_chunk
        entries = self.outbox._items
        while size < limit and entries:
            entry = entries.popleft()       # first: another thread may put something in front, see write_first
            if type(entry) is not Text or entry.name != first_name or entry.parent != first_parent:
                entries.appendleft(entry)
                break
            parts.append(entry.text)
            size += len(entry.text)
        self._sent_bytes += size + 64 * len(parts)
        self._text_sent = time.monotonic()
        text = "".join(parts)
        if size > limit:
            self.outbox.put_back([Text(first.name, text[at:at + limit], first.parent)
                                  for at in range(limit, size, limit)])
            self._put_bytes += size - limit + 64 * (size // limit)
            text = text[:limit]
        self._publish("stream", encode({"name": first.name, "text": text}), first.parent)

    def _publish(self, msg_type: str, content: bytes, parent: bytes, metadata: bytes = b"{}", buffers: Iterable = (),
                 topic: bytes = b"") -> None:
        self.published += 1
        self.on_publish(msg_type, self.published, content, parent, metadata)    # into the log before it is seen
        number = b'"twoproc_seq":%d}' % self.published
        metadata = b"{" + number if metadata == b"{}" else metadata[:-1] + b"," + number
        frames = self.session.serialize(msg_type, content, parent, metadata, buffers)
        self._head = [topic or msg_type.encode("ascii"), *frames]
        self._publish_head()

    def _publish_head(self) -> bool:
        """Send the head; False: a reader is full, and it is not yet time to let that reader lose."""
        assert self._head is not None
        iopub = self._sockets["iopub"]
        if not self._send(iopub, self._head):
            if not self._patience.is_over():
                return False
            logger.warning("a reader of iopub is too slow: it loses messages until it catches up")
            # One message sent without NODROP passes by the readers that are full, and from then on ZeroMQ leaves
            # these out of account until they have read half of their queue.  All others stay protected by it.
            iopub.setsockopt(zmq.XPUB_NODROP, 0)
            self._send(iopub, self._head)
            iopub.setsockopt(zmq.XPUB_NODROP, 1)
            self._patience = SlowReaders(self.limits.slow_reader_seconds)
            self._is_losing, self._settle_at, self._was_read_up = True, 0.0, False
            self._repeat_at, self._repeat_pause = time.monotonic() + REPEAT_SECONDS, REPEAT_SECONDS
        if self._is_losing and b'"execution_state":"idle"' in self._head[-1]:
            self._owed.append(self._head)
        self._patience.sent()
        self._head = None
        return True

    def _settle(self) -> None:
        """Once the readers that were given up have caught up, repeat the idles they have lost; and now and then before.

        A stock client waits for a cell's idle for ever.  Those who had it already ignore its repetition.
        ZeroMQ does not tell who is left out of account, the system does: such a reader's connection is full.
        Looked at twice, because a connection may be empty for a moment between two messages of the queue.
        """
        now = time.monotonic()
        if now < self._settle_at:
            return
        self._settle_at = now + SETTLE_SECONDS
        is_read_up = self._is_read_up()
        have_all_read = is_read_up and self._was_read_up
        self._was_read_up = is_read_up
        if have_all_read or now > self._repeat_at:
            # Ever more rarely while one is stuck: another that was given up may have caught up long ago.
            self._repeat_at, self._repeat_pause = now + self._repeat_pause, 2 * self._repeat_pause
            iopub = self._sockets["iopub"]
            if have_all_read:       # what it has no room for follows when it has read these
                while self._owed and self._send(iopub, self._owed[0]):
                    self._owed.popleft()
                self._is_losing = bool(self._owed)
            else:
                all(self._send(iopub, message) for message in self._owed)
            if self.busy_parent is not None:
                self.outbox.put_back([Outgoing("iopub", "status", b'{"execution_state":"busy"}', self.busy_parent,
                                               b"{}", [], [])])

    def _is_read_up(self) -> bool:
        """Have the readers of iopub taken everything that was handed to the system for them?"""
        try:
            from fcntl import ioctl
            from termios import TIOCOUTQ
        except ImportError:         # Windows
            return True
        here = {self.info.iopub_port if self.info.transport == "tcp" else self.info.url("iopub")[len("ipc://"):]}
        if self.listening:
            here.add(self.listening + CHANNELS.index("iopub"))
        for descriptor, name in _own_sockets():
            try:
                is_ours = (name[1] if isinstance(name, tuple) else name) in here
                if is_ours and any(ioctl(descriptor, TIOCOUTQ, bytes(4))):
                    return False
            except OSError:         # the listening socket
                continue
        return True

    @staticmethod
    def _send(sock: zmq.Socket, frames: list) -> bool:
        """False when the socket cannot take the message now; then nothing of it was sent."""
        try:
            # Copied, however large: what it was lent pyzmq frees as exit functions run, and ZeroMQ may still read it.
            sock.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    # -- called in a forked child
    def close_in_child(self) -> None:
        """Close the descriptors under which a child of fork holds our listening sockets.

        Without it a child that outlives the kernel keeps its ports busy.  libzmq's own objects are left
        alone: they belong to threads that do not exist here.
        """
        ours = {*self._remote_ports(), *(self.info.port(channel) for channel in CHANNELS)}
        for descriptor, name in list(_own_sockets()):
            if name[1] in ours if isinstance(name, tuple) else str(name).startswith(self.info.ip + "-"):
                os.close(descriptor)


def bind(sock: zmq.Socket, info: ConnectionInfo, channel: str) -> ConnectionInfo:
    """Bind the socket of a channel, port 0 meaning any; returns `info` with the port there is.

    Raises ConnectionFileError, exit code 4 or 5.
    """
    url, port = info.url(channel), info.port(channel)
    umask = os.umask(0o077)                     # an ipc socket is a file
    try:
        if info.transport == "ipc":
            _check_socket_path(url[len("ipc://"):], channel)
        elif port == 0:
            url = url[:url.rindex(":")] + ":*"
        sock.bind(url)
    except zmq.ZMQError as error:
        raise ConnectionFileError("%s: cannot listen for %s: %s; choose another address, or stop the program "
                                  "that has it" % (url, channel, error.strerror), 4) from None
    finally:
        os.umask(umask)
    if info.transport != "ipc" and port == 0:
        port = int(sock.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
    ports: dict[str, Any] = {channel + "_port": port}
    return info._replace(**ports)


class SlowReaders:
    """How long readers of iopub may hold up everybody.

    Waiting adds up while it lasts and is forgiven at the same rate while messages leave.  So a reader that
    keeps us waiting less than half of the time is waited for as long as it likes, and one that has stopped
    is given up after `seconds`.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._seconds, self._clock = seconds, clock
        self._balance = 0.0
        self._waiting_since: float | None = None
        self._sending_since = clock()

    def is_over(self) -> bool:
        now = self._clock()
        if self._waiting_since is None:
            self._balance = max(0.0, self._balance - (now - self._sending_since))
            self._waiting_since = now
        return self._balance + now - self._waiting_since > self._seconds

    def sent(self) -> None:
        if self._waiting_since is not None:
            self._sending_since = self._clock()
            self._balance += self._sending_since - self._waiting_since
            self._waiting_since = None


def beat(sock: zmq.Socket) -> None:
    """Echo what is sent, in C and without the interpreter lock: thread `twoproc-heartbeat`.

    So a cell that computes for a minute in C does not look dead.  Frames over 1 kB cost the sender its
    connection (MAXMSGSIZE): an echo without a key must not amplify.  Ends when the context is terminated.
    """
    with contextlib.suppress(zmq.ContextTerminated):
        zmq.proxy(sock, sock)
    sock.close(linger=0)


def _check_socket_path(path: str, channel: str) -> None:
    """ZeroMQ removes whatever stands where an ipc socket goes: let that be a dead socket and nothing else."""
    try:
        is_dead, is_socket = is_dead_socket(path), stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return
    if not is_socket:
        raise ConnectionFileError("%s: cannot listen for %s: something that is not a socket stands there; remove it"
                                  % (path, channel), 5)
    if not is_dead:
        raise ConnectionFileError("%s: cannot listen for %s: another program listens there; choose another address"
                                  % (path, channel), 4)


def _own_sockets() -> Iterator[tuple[int, Any]]:
    """(descriptor, its getsockname()) of every socket of this process."""
    try:
        descriptors: Iterable[int] = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        descriptors = range(3, 256)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):      # it is none
            sock = socket.socket(fileno=descriptor)
            try:
                name = sock.getsockname()
            finally:
                sock.detach()
            yield descriptor, name
