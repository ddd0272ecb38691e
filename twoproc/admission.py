# Distributed under the terms of the BSD 3-Clause License.
"""Who may connect: the gatekeeper of a kernel's sockets, on a thread of its own, `twoproc-admission`.

ZeroMQ asks it about every new connection (ZAP, RFC 27): from which address, with which key.  It asks access.py, and
what that answers, the sender's key, travels with every message of the connection from then on.  Without an answer
nobody is let in, so a fault here shuts the door (ZAP_ENFORCE_DOMAIN).

For a kernel that listens to other machines it also counts connections, of strangers too, and looks once a second
whether a key that was let in has been withdrawn.  It asks nothing of user code and holds nothing that others wait for.

Sources: ZeroMQ RFC 27 (ZAP), RFC 26 (CurveZMQ), zmq_socket_monitor(3).
"""
from __future__ import annotations

import contextlib
import logging
import socket
import struct
import time
from typing import Callable

import zmq

from .access import Access, Refused
from .mailbox import own_thread

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5              # between two looks whether a key was withdrawn: its reader is cut within 2 s
# A peer that speaks no CURVE, has the wrong server key, or says nothing: of that ZAP does not hear.
NO_HANDSHAKE = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
LOCAL = "local"                 # the User-Id of who may everything


class Admission:
    """One for each kernel; made, with `guard` for each socket, by main, then owned by twoproc-admission.

    on_withdrawn(): called there when somebody who was let in no longer may be.
    """

    def __init__(self, context: zmq.Context, access: Access, on_withdrawn: Callable[[], None],
                 max_connections: int = 0):
        """max_connections: of each guarded socket, by tcp; 0: not counted."""
        self._access, self._on_withdrawn = access, on_withdrawn
        self._max_connections = max_connections
        self._zap = context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind("inproc://zeromq.zap.01")
        self._monitors: dict[zmq.Socket, str] = {}
        self._connections: dict[str, set[int]] = {}     # channel -> descriptors of its open tcp connections
        self._ports: dict[str, int] = {}
        self._guests: set[str] = set()                  # keys that were let in, to be looked after

    def guard(self, sock: zmq.Socket, channel: str) -> None:
        """Let nobody connect to `sock` who was not asked for; before it is bound."""
        sock.setsockopt(zmq.ZAP_DOMAIN, channel.encode("ascii"))
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        if self._max_connections:
            monitor = sock.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | NO_HANDSHAKE)
            monitor.linger = 0
            self._monitors[monitor] = channel
            self._connections[channel] = set()

    def start(self, ports: dict[str, int]) -> None:
        """ports: by channel, those of this machine whose connections are counted."""
        self._ports = ports
        own_thread("twoproc-admission", self._run)

    # -- run by twoproc-admission only
    def _run(self) -> None:
        poller = zmq.Poller()
        for sock in (self._zap, *self._monitors):
            poller.register(sock, zmq.POLLIN)
        look_at = 0.0
        try:
            while True:
                for ready, _ in poller.poll(int(LOOK_SECONDS * 1000) if self._guests else None):
                    if ready is self._zap:
                        self._answer(self._zap.recv_multipart())
                    else:
                        self._count(ready)
                if self._guests and time.monotonic() > look_at:
                    look_at = time.monotonic() + LOOK_SECONDS
                    if withdrawn := self._access.withdrawn(self._guests):
                        self._guests -= withdrawn
                        self._on_withdrawn()
        except zmq.ContextTerminated:
            pass
        finally:
            for sock in (self._zap, *self._monitors):
                sock.close(linger=0)

    def _answer(self, frames: list[bytes]) -> None:
        """One ZAP request: version, request id, domain, address, identity, mechanism, credentials."""
        version, request_id, domain, address, _, mechanism, *credentials = frames
        status, text, user = b"200", b"", LOCAL
        try:
            user = self._access.admit(mechanism, address.decode("ascii", "replace"), credentials) or LOCAL
            if user != LOCAL:
                self._guests.add(user)
        except Refused as refusal:
            status, text, user = b"400", b"refused", ""         # a stranger is not told why
            logger.warning("%s: refused: %s", domain.decode("ascii", "replace"), refusal)
        except Exception:           # a fault of ours keeps this one out, and nobody in
            status, user = b"500", ""
            logger.exception("a connection could not be decided about; it is refused")
        self._zap.send_multipart([version, request_id, status, text, user.encode("ascii"), b""])

    def _count(self, monitor: zmq.Socket) -> None:
        """A connection came or went.  One too many is cut at once, before it has said who it is."""
        channel = self._monitors[monitor]
        open_now = self._connections[channel]
        with contextlib.suppress(zmq.Again):
            while True:
                event, endpoint = monitor.recv_multipart(zmq.NOBLOCK)
                number, descriptor = struct.unpack("=HI", event)
                if number == zmq.EVENT_DISCONNECTED:
                    open_now.discard(descriptor)
                elif number & NO_HANDSHAKE:
                    self._note_refusal(channel, "no encrypted handshake: another protocol, server key, or silence")
                elif endpoint.startswith(b"tcp:"):
                    open_now.add(descriptor)
                    if len(open_now) > self._max_connections:       # of those that an unbind has ended we do not hear
                        open_now = self._connections[channel] = {
                            other for other in open_now if self._is_open(other, channel)}
                    if len(open_now) > self._max_connections and self._is_open(descriptor, channel, cut=True):
                        self._note_refusal(channel, "more than %d connections" % self._max_connections)

    def _note_refusal(self, channel: str, reason: str) -> None:
        self._access.log.note("refuse", channel=channel, reason=reason)
        logger.warning("%s: refused: %s", channel, reason)

    def _is_open(self, descriptor: int, channel: str, cut: bool = False) -> bool:
        """Is it a connection of this channel?  Its number may be another's by now.  cut: if so, end it.

        No copy of the descriptor is made: there may be none left, which is why we are here.
        """
        try:
            sock = socket.socket(fileno=descriptor)
        except OSError:
            return False
        try:
            name = sock.getsockname()
            is_open = isinstance(name, tuple) and name[1] == self._ports.get(channel)
            if is_open and cut:
                sock.shutdown(socket.SHUT_RDWR)
            return is_open
        except OSError:
            return False
        finally:
            sock.detach()
