# Distributed under the terms of the BSD 3-Clause License.
"""What a kernel said before we came, or faster than we could read, made into messages again.

A kernel that keeps a session log answers twoproc_log_request with records of it (docs/protocol.md).  read_log makes
ordinary iopub messages of them, so that past and live take one way through every reader.  It has two users, both
parts of a Client and run by its thread:

    InOrder     iopub in the order of its numbers; what is missing is asked for and delivered in its place
    Follower    a listener that begins with the past
"""
from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from .session import MESSAGES, PROTOCOL_VERSION, UTC, Message, MessageType, encode

if TYPE_CHECKING:
    from .client import Client, Pending

# A gap in the output is filled with pages of this size: each holds up the kernel's other answers for about 10 ms.
# One that takes longer than REFILL_SECONDS does not come any more.
REFILL_BYTES, REFILL_SECONDS = 1 << 20, 10.0
# So far before a gap its first page begins: `begin` and `end` may be recorded with a number that is too small.
SEQ_MARGIN = 10
REQUESTS_REMEMBERED = 4000

_UNKNOWN = MessageType(())


class LogPage(NamedTuple):
    """What a kernel's session log says.

    session: the log's name, "" where none is kept.  seq: the newest number when the page was made; what is live
    has a larger one.  messages: as they were on iopub, oldest first; see read_log.  next_seq: where to go on
    asking, None at the end.  cut: something is left out; a message of type twoproc_gap stands in its place.
    """
    session: str
    seq: int
    messages: list[Message]
    next_seq: int | None
    cut: bool


def read_log(reply: Message, first: int | None = None, last: int | None = None) -> LogPage:
    """A twoproc_log_reply as messages, so that past and live take one way through every reader.

    first, last: the numbers that were asked for, if it was by numbers.  A record `begin` is an execute_input, `out`
    what it was, `end` the idle of its cell; msg_id is made up, parent_header the request's own.  twoproc_seq is
    exact for output only; begin and end are recorded a moment before their messages have a number.  Statuses
    of other requests, comms and the code of private cells are not in the log.
    """
    content = reply.content
    newest, next_seq, is_cut = content.get("seq"), content.get("next_seq"), content.get("cut") is True
    newest = newest if type(newest) is int else 0
    records, parents = content.get("records"), dict(_object(content.get("parents")))
    messages: list[Message] = []
    for record in map(_object, records if isinstance(records, list) else ()):
        kind, number = record.get("k"), record.get("seq")
        parent = _object(record.get("hdr") if kind == "begin" else parents.get(str(record.get("of"))))
        msg_type, said = {
            "begin": ("execute_input", {"code": record.get("code"), "execution_count": record.get("ec")}),
            "out": (record.get("type"), record.get("content")),
            "end": ("status", {"execution_state": "idle"})}.get(str(kind), (None, None))
        if kind == "begin":
            parents[str(parent.get("msg_id"))] = parent
            if type(record.get("code")) is not str:     # private
                continue
        # A number above the newest: recorded, not published yet, it will come live.
        if type(msg_type) is str and "iopub" in MESSAGES.get(msg_type, _UNKNOWN).channels and type(said) is dict \
                and not (type(number) is int and number > newest):
            messages.append(_past_message(reply.header, msg_type, said, parent, record))
    if is_cut:
        _mark_gap(messages, reply.header, first, last if type(next_seq) is not int else next_seq - 1)
    return LogPage(str(content.get("session", "")), newest, messages, next_seq if type(next_seq) is int else None,
                   is_cut)


def _past_message(kernel: dict, msg_type: str, content: dict, parent: dict, record: dict) -> Message:
    """kernel: a header of the kernel that said it."""
    number = record.get("seq")
    header = {"msg_id": "%s_log_%s" % (kernel.get("session"), record.get("n")), "msg_type": msg_type,
              "session": kernel.get("session"), "username": kernel.get("username", ""),
              "date": _date(record.get("t")), "version": PROTOCOL_VERSION}
    metadata = {**_object(record.get("metadata")), **({"twoproc_seq": number} if type(number) is int else {})}
    return Message(header, parent, metadata, content, [], [], encode(header))


def _mark_gap(messages: list[Message], kernel: dict, first: int | None, last: int | None) -> None:
    """Something is missing.  Of the last cells it is output older than the first there is; the inputs are whole.  Of
    a range of numbers it is most likely where they jump farthest."""
    count, place, reason = 0, 0, "it is no longer kept"
    if first is None:
        place = next((index for index, message in enumerate(messages) if message.msg_type != "execute_input"),
                     len(messages))
        reason = "too much to show it all"
    else:
        before = first - 1
        for index in range(len(messages) + 1):
            number = _number(messages[index]) if index < len(messages) else None if last is None else last + 1
            if number is not None:
                if number - before - 1 > count:
                    count, place = number - before - 1, index
                before = number
    neighbours = messages[place:place + 1] or messages[-1:]
    messages.insert(place, gap_message(count, reason, kernel, neighbours[0].parent_header if neighbours else {}))


def gap_message(count: int, reason: str, kernel: dict, parent: dict) -> Message:
    """A message of our own in place of output that is lost: type twoproc_gap, content messages (about how many; 0
    where that is not known) and reason, to be shown as `(output missed: <reason>)`."""
    return _past_message(kernel, "twoproc_gap", {"messages": count, "reason": reason}, parent,
                         {"n": "gap", "t": time.time()})


def _number(message: Message) -> int | None:
    """The number that our kernels give each message on iopub."""
    number = message.metadata.get("twoproc_seq")
    return number if type(number) is int else None


def _object(value: Any) -> dict:
    return value if type(value) is dict else {}


def _date(seconds: Any) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


class InOrder:
    """Lets iopub through in the order of its numbers, and fills what is missing from the kernel's session log.

    Our kernels number what they publish.  A number that jumps says that we were too slow, or away: it and what
    follows is held, iopub is left unread, so that this is little, and the missing range is asked for, page by
    page.  Replies to cells and questions are held with it: what was printed comes before them.  Numbers
    without a record (statuses of others, comms) are passed over; of what the log has no more, twoproc_gap tells.

    Run by twoproc-client; others look at `is_filling` and `missed`.
    """

    def __init__(self, client: Client):
        self.is_filling = False
        self.missed = 0
        self._client = client
        self._kernel: Any = None            # the session in its headers: a new process counts from 1
        self._newest = 0                    # number delivered, or given up
        self._told: dict[tuple, None] = {}              # what is told once of a request, the newest last; see _is_news
        self._held: deque = deque()                     # (channel, Message)
        self._missing = 1, 0                            # first and last number of the gap
        self._next = 1                                  # where the next page begins
        self._question: Pending | None = None
        self._looked_at = self._waited = 0.0

    @property
    def is_counting(self) -> bool:
        """Does this kernel number what it publishes?"""
        return self._kernel is not None

    def take(self, channel: str, message: Message) -> None:
        """Deliver it, hold it, or drop it as known."""
        if self.is_filling and self._is_ordered(channel, message):
            self._held.append((channel, message))
        elif channel != "iopub" or self._is_next(message):
            self._client._deliver(channel, message)

    def go_on(self) -> None:
        """Ask for the next page, unless the readers cannot follow; then `Client._resume` calls again."""
        if self.is_filling and self._question is None and not self._client._is_paused:
            self._ask()
        self._client._read_output()

    def ask_again(self) -> None:
        """The connection was cut, and with it went the question, or its answer."""
        if self._question is not None:
            self._question.cancel()
            self._question = None
            self.go_on()

    def tick(self) -> None:
        """Called at least once a second."""
        if self._question is None:
            return
        # More than a second between two looks: it was us who were stopped.  And a kernel whose heart does not
        # beat is stopped, too.
        now = time.monotonic()
        if self._client._channels.silent_since is None:
            self._waited += min(1.0, now - self._looked_at)
        self._looked_at = now
        if self._waited > REFILL_SECONDS:
            self.give_up("the kernel's log did not answer")

    def give_up(self, reason: str) -> None:
        """Go on without what is missing."""
        if self.is_filling:
            if self._question is not None:
                self._question.cancel()
            self._miss(self._missing[1], reason, self._held[0][1])
            self._release()

    def _is_ordered(self, channel: str, message: Message) -> bool:
        if channel == "shell":
            pending = self._client._pending_of(message)
            return pending is not None and pending._needs_idle
        return channel != "control"

    def _is_next(self, message: Message) -> bool:
        number, kernel = _number(message), message.header.get("session")
        if number is None:
            return True
        if kernel != self._kernel:
            # What the first kernel said before is for `catch_up`; its successor we follow from the beginning.
            is_first = self._kernel is None
            if is_first and message.content.get("execution_state") == "idle":
                return self._is_news(message)       # repeated, maybe: then its number is an old one
            self._kernel = kernel
            self._newest = number - 1 if is_first or self._why_not() else 0
        if number <= self._newest:
            # A kernel repeats the idles that a slow reader may have lost, with the numbers they had.
            return message.msg_type == "status" and self._is_news(message)
        if number > self._newest + 1:
            reason = self._why_not()
            if not reason:
                self._begin(message, number - 1)
                return False
            self._miss(number - 1, reason, message)
        self._newest = number
        return self._is_news(message)

    def _is_news(self, message: Message) -> bool:
        """False for a cell's input or idle that was delivered before.

        Their numbers in the log are a little too small: either may come from a page and live, once is enough.
        """
        msg_id = message.parent_header.get("msg_id")
        if message.msg_type != "execute_input" and message.content.get("execution_state") != "idle" \
                or type(msg_id) is not str:
            return True
        what = message.msg_type, msg_id
        if what in self._told:
            return False
        self._told[what] = None
        if len(self._told) > REQUESTS_REMEMBERED:
            del self._told[next(iter(self._told))]
        return True

    def _why_not(self) -> str:
        client = self._client
        if client._dying is not None or client.died is not None or client._is_closed:
            return "the kernel is gone"
        return "" if client.keeps_log else "the kernel keeps no log"

    def _begin(self, message: Message, last: int) -> None:
        self.is_filling = True
        self._missing = self._newest + 1, last
        self._next = max(1, self._newest + 1 - SEQ_MARGIN)
        self._held.append(("iopub", message))
        self.go_on()

    def _ask(self) -> None:
        from .client import KernelDied          # here: client.py imports us
        try:
            question = self._client.submit("twoproc_log_request", {
                "from_seq": self._next, "to_seq": self._missing[1], "max_bytes": REFILL_BYTES})
        except (KernelDied, ValueError):        # closed a moment ago
            self.give_up("the kernel is gone")
            return
        # Set only now: given to submit, it would have the question wait for its idle, which we do not read.
        question._on_message = self._take_page
        self._question, self._looked_at, self._waited = question, time.monotonic(), 0.0

    def _take_page(self, reply: Message) -> None:
        first, last = self._missing
        page = read_log(reply, self._next, last)
        if not page.session:
            self.give_up("the kernel keeps no log")
            return
        for message in page.messages:
            if message.msg_type == "twoproc_gap":
                self.missed += message.content["messages"]
            elif message.msg_type in ("execute_input", "status"):
                if not self._is_news(message):
                    continue
            elif not first <= (_number(message) or 0) <= last:
                continue
            self._client._deliver("iopub", message)
        self._question = None       # only now: should one of these lines fail, the time limit ends it
        if page.next_seq is not None and self._next < page.next_seq <= last:
            self._next = page.next_seq
            self._newest = max(self._newest, page.next_seq - 1)
            self.go_on()
        else:
            self._newest = last
            self._release()

    def _miss(self, last: int, reason: str, message: Message) -> None:
        count, self._newest = last - self._newest, last
        self.missed += count
        self._client._deliver("iopub", gap_message(count, reason, message.header, message.parent_header))

    def _release(self) -> None:
        held, self._held = self._held, deque()
        self._question = None
        self.is_filling = False
        for channel, message in held:
            self.take(channel, message)     # there may be another gap among them: then the rest is held again
        self._client._read_output()
        self._client._ring()


class Follower:
    """A listener of `catch_up`: keeps what is live until it has the past, then leaves out what the past has."""

    def __init__(self, client: Client, callback: Callable[[Message, bool], None], cells: int, max_bytes: int,
                 timeout: float):
        self._client, self._callback = client, callback
        self._cells, self._max_bytes, self._timeout = cells, max_bytes, timeout
        self._held: list[Message] | None = []       # live, while the past is on its way
        self._page = LogPage("", 0, [], None, False)
        self._kernel = ""                           # session of the kernel that made the page
        self._begun: set[str] = set()               # cells that the page has begun
        self._is_delivered = threading.Event()

    # -- called by any thread
    def ask(self) -> None:
        """Get the past and wait until it was delivered."""
        from .client import KernelDied
        try:
            if self._cells and self._client.keeps_log:
                reply = self._client._ask("twoproc_log_request", {
                    "cells": self._cells, "max_bytes": self._max_bytes}, self._timeout)
                page = read_log(reply)
                if page.session:        # else it could not write one: what is live is all there is
                    self._page, self._kernel = page, reply.header["session"]
        except (TimeoutError, KernelDied, ConnectionError):
            pass        # then without it
        self._client._channels.call(self._begin)
        self._is_delivered.wait(self._timeout)

    # -- run by twoproc-client only
    def __call__(self, message: Message) -> None:
        if self._held is not None:
            self._held.append(message)
        elif not self._is_in_page(message):
            self._callback(message, False)

    def _begin(self) -> None:
        held, self._held = self._held or [], None
        for message in self._page.messages:
            if message.msg_type == "execute_input":
                self._begun.add(message.parent_header.get("msg_id", ""))
            self._client._call(self._callback, message, True)
        for message in held:
            self._client._call(self, message)
        self._page = self._page._replace(messages=[])
        self._is_delivered.set()

    def _is_in_page(self, message: Message) -> bool:
        if message.header.get("session") != self._kernel:
            return False
        number = _number(message)
        # Only what tells of a loss has no number.  A cell's input is in the log a moment before it is published.
        return number is not None and number <= self._page.seq or (
            message.msg_type == "execute_input" and message.parent_header.get("msg_id") in self._begun)
