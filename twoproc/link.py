# Distributed under the terms of the BSD 3-Clause License.
"""A connection that is cut and comes back: what a Client does about it, and what becomes of its requests.

With a network in between, a connection that ends says nothing of the kernel.  So the client does not call it dead:
it connects anew and anew, holds what is sent meanwhile, and asks the kernel when it answers again, with
twoproc_resume_request (docs/protocol.md), what it knows of the cells that were under way:

    it runs, or waits       the client goes on waiting: the kernel now answers to our new connection
    it has ended            the kernel sends its reply again; its output comes from the log, see replay.InOrder
    the kernel never saw it ConnectionLost: it is certain that it did not run

Then what was held is sent, in its order.  A kernel that has another session than before, or signs with another key,
is another process: the old one died, and so is told.

Part of a Client like InOrder, and run by its thread; others look at `is_lost`.
"""
from __future__ import annotations

import contextlib
import errno
import socket
import time
from typing import TYPE_CHECKING, Any

from .session import Message

if TYPE_CHECKING:
    from .client import Client, Pending

# Where a machine says itself, by refusing us, that nobody listens there any more: so long, and the kernel counts as
# dead.  Not at once, for somebody may be starting it again, or a network that is coming up may answer for it.
GONE_SECONDS = 15.0
LOOK_SECONDS = 2.5          # between two looks whether somebody listens
RETRY_SECONDS = 5.0         # ZeroMQ does not try again by itself where our key was refused


class Link:
    """Is there a connection?  And the way back to one."""

    def __init__(self, client: Client):
        self.is_lost = self._is_refused = False
        self.is_over = False                # what answers now has another key, and will not be ours
        self._client = client
        self._kernel = ""                   # the session of the kernel that we lost
        self._at_risk: list[Pending] = []   # on their way, or with the kernel, when the connection was cut
        self._question: Pending | None = None
        self._bad_signatures = 0
        self._probe: socket.socket | None = None
        self._look_at = 0.0
        self._refused_since: float | None = None
        self._retry_at: float | None = None

    def lose(self, is_refused: bool = False) -> None:
        """The connection was cut: all of it, for of five sockets the others will follow, or hang."""
        client = self._client
        if self._question is not None:
            self._question.cancel()
            self._question = None
        client._channels.reset(is_urgent=False, hold=True)
        client._read_output()
        self._bad_signatures, self._retry_at = client._channels.bad_signatures, None
        if self.is_lost:
            return
        self.is_lost, self._is_refused = True, False
        self._kernel = client._kernel
        self._at_risk = list(client._table.values())
        for pending in self._at_risk:
            pending._ask_again()
        self._look_at, self._refused_since = time.monotonic() + LOOK_SECONDS, None
        if is_refused:
            self.hear("unauthorised")
        else:
            client._tell("lost")

    def hear(self, event: str) -> None:
        """An event of the connection while it is lost."""
        if event == "connected":
            self._ask()
        elif event == "disconnected":
            self._retry_at = time.monotonic() + 1.0     # again so soon: not in a hurry
        elif event == "unauthorised" and self._retry_at is None:
            self._client._fail_all(self._lost("the kernel does not let in your key any more"))
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if not self._is_refused:
                self._is_refused = True
                self._client._tell("refused")

    def tick(self) -> float | None:
        """While it is lost: look around; returns the seconds until the next look."""
        client, now = self._client, time.monotonic()
        if client._channels.bad_signatures > self._bad_signatures:
            self.is_over = True
            client._begin_dying("another kernel answers in its place")
        elif self._retry_at is not None and now > self._retry_at:
            self.lose()
        elif now > self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._look()
        return max(0.0, min(self._look_at, self._retry_at or self._look_at) - now)

    def _look(self) -> None:
        """Connect beside ZeroMQ, which does not tell a machine that refuses from one that does not answer."""
        info = self._client.info
        if info.transport != "tcp" or info.extra.get("twoproc_forwarded"):
            return          # who listens there is not the kernel but the near end of a tunnel
        if self._probe is not None:
            self._refused_since = None      # no answer at all: that is the network
        self._end_look()
        self._probe = socket.socket(socket.AF_INET6 if ":" in info.ip else socket.AF_INET)
        self._probe.setblocking(False)
        try:
            found = self._probe.connect_ex((info.ip.strip("[]"), info.port("shell")))
        except socket.gaierror:         # by a name, and who knows it is behind the same network
            found = errno.EHOSTUNREACH
        if found == errno.EINPROGRESS:
            self._client._channels.watch(self._probe.fileno(), self._see)
        else:
            self._note(found)

    def _see(self) -> None:
        assert self._probe is not None
        self._note(self._probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _note(self, found: int) -> None:
        self._end_look()
        if found != errno.ECONNREFUSED:
            self._refused_since = None
        elif self._refused_since is None:
            self._refused_since = time.monotonic()
        elif time.monotonic() - self._refused_since > GONE_SECONDS:
            self._client._begin_dying("nothing listens at %s any more" % self._client.address)

    def _end_look(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            self._client._channels.unwatch(probe.fileno())
            probe.close()

    def close(self) -> None:
        self._end_look()
        self.is_lost, self._at_risk = False, []

    def _ask(self) -> None:
        """The kernel is asked what it knows; one of another make, whether it is the same at all."""
        client = self._client
        cells = [pending.msg_id for pending in self._at_risk if pending.msg_type == "execute_request"]
        with contextlib.suppress(ValueError):       # closed a moment ago
            self._question, channel, frames = (
                client._prepare("twoproc_resume_request", {"msg_ids": cells}) if client.resumes
                else client._prepare("kernel_info_request"))
            self._question._on_message = self._take_answer
            client._channels.send_at_once(channel, frames)

    def _take_answer(self, reply: Message) -> None:
        if not reply.msg_type.endswith("_reply"):
            return
        client = self._client
        session = reply.header.get("session")
        if self._kernel and session != self._kernel:
            client._begin_dying("restarted while the connection was lost")
            return
        at_risk, held = self._at_risk, client._channels.held
        is_known = reply.msg_type == "twoproc_resume_reply" and reply.content.get("status") == "ok"
        self._question = None
        if is_known and type(reply.content.get("rights")) is str:
            client.rights = reply.content["rights"]
        client._order.ask_again()
        for pending in at_risk:
            if pending.msg_id in client._table and pending not in held:
                error = self._fate(pending, reply.content, is_known)
                if error:
                    client._fail(pending, self._lost(error))
        self.close()
        client._suspect_loss()
        client._channels.release()
        client._tell("back")

    def _fate(self, pending: Pending, content: dict, is_known: bool) -> str:
        """Why nothing more will come of this request; empty: it will."""
        if pending.msg_type != "execute_request":
            return "%s had no answer yet: ask again" % pending.msg_type
        if not is_known:
            return "this kernel does not say what became of the cell; it may have run"
        if pending.msg_id in _list(content.get("unknown")):
            return "the cell had not reached the kernel: it is certain that it did not run"
        if pending.msg_id in _list(content.get("forgotten")):
            return "the kernel no longer keeps what became of the cell; it may have run"
        return ""

    def _lost(self, text: str) -> Exception:
        from .client import ConnectionLost          # here: client.py imports us
        return ConnectionLost("the connection to %s was lost: %s" % (self._client.address, text))


def _list(value: Any) -> list:
    return value if type(value) is list else []
