# Distributed under the terms of the BSD 3-Clause License.
"""One kernel from the outside: requests, replies, output, input, interrupt, and its death.

    with connect() as client:                       # the newest kernel of mine; or a name, a file, a process
        client.execute("print(1)", on_output=print)

A Client may be used by any number of threads.  Each request is a Pending: sent by `submit`, completed by the
thread `twoproc-client`, waited for by whoever asked.  `execute` and its siblings are submit and wait in one.

    caller's thread                 twoproc-client
    submit -> the table             poll, verify (clientchannels.py)
                                    put iopub in order, fill its gaps (replay.InOrder)
    wait                            look up the parent's msg_id, put into that request's inbox, ring
      on_output, on_input  <-       listeners

Ctrl-C while a caller waits raises KeyboardInterrupt there and harms nothing: call `interrupt`, and wait for
the same Pending again.  `interrupt_nowait` may be called from a signal handler.

How death is noticed: by the launcher that started the kernel, by the process number in a connection file of
this machine (pidfd or kqueue), by a connection that is cut and then refused.  Silence is not death: a kernel
that is stopped, or computes in C, may go on; `silence` says for how long it has not answered.  Nor is a cut
connection, where there is a network in between: link.py finds the way back, and requests wait for it.

What was said before we came, or what we were too slow to take, a kernel that keeps a session log says again: see
`log`, `catch_up` and replay.py.  Such a message takes the same way as a live one.

Kernels written by others are met with patience: a message that cannot be read is counted and dropped, a reply
or an idle that never comes ends a wait but not the client.
"""
from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from . import connection
from .clientchannels import ClientChannels
from .connection import ConnectionInfo
from .link import Link
from .replay import Follower, InOrder, LogPage, read_log
from .session import MESSAGES, Message, Session, seal

# A kernel may reply and then never send its idle: after so many seconds without a message of that request
# its reply is enough.  A kernel with megabytes of output still to send keeps sending.
IDLE_PATIENCE = 5.0
# A gap is seen by the number of what comes after it.  Where there may be one and nothing has come for so long, we have
# the kernel say something.  It must be over before IDLE_PATIENCE is, and a frontend's own.
QUIET_SECONDS = 1.0
# The client's thread looks around once a second at least: after so long it was stopped, or kept from it.
STOPPED_SECONDS = 1.5
# So long may attaching take where it is known that it will work; else it is 4 s, and one to find the cause.
PATIENT_SECONDS = 15.0
# Output of one request that its caller has not taken yet: beyond it iopub is left unread, for everybody, until
# half of it is taken, so that the kernel waits instead of our memory growing.
UNREAD_CHARS = 64 << 20
# The last words of a dead kernel are already on the way: wait for this much silence, but no longer than that.
LAST_WORDS, LAST_WORDS_AT_MOST = 0.03, 0.4
CONNECT_SECONDS = 2.0       # so long an address is asked that does not even refuse
END_OF_INPUT = "\x04"       # as an input_reply's value, what every Jupyter kernel takes for end of file


class KernelDied(Exception):
    """The kernel is gone, and with it the answer.  cause: what ended it, as text to show."""

    def __init__(self, cause: str):
        super().__init__(("kernel " if cause.startswith("out of reach") else "kernel died: ") + cause)
        self.cause = cause


class ConnectionLost(ConnectionError):
    """The connection to a kernel on another machine was cut, and nothing more comes of this request."""


class NotReady(ConnectionError):
    """Attaching failed.  reason: refused, blocked, unauthorised, key, encryption, busy, hello, output or silent;
    str() says it to a person.  exit_code: of a program that ends for it."""

    def __init__(self, reason: str, text: str, exit_code: int = 2):
        super().__init__(text)
        self.reason, self.exit_code = reason, exit_code


def connect(target: Any = None, timeout: float | None = None, **options: Any) -> Client:
    """A client of a running kernel that has answered, and whose output arrives here from now on.

    target: None for the newest kernel of this user, a connection file, a kernel's name or the beginning of
    one, a ConnectionInfo, or a launcher.KernelProcess.  timeout: by default at most 5 s, for a process that
    we started 60 s.  options: those of Client.
    Raises ConnectionFileError, NotReady with the cause, or KernelDied.
    """
    client = Client(target, **options)
    try:
        client.wait_ready(timeout)
    except BaseException:
        client.close()
        raise
    return client


class Bell:
    """Lets one thread wait until another has something for it; rings before the wait are not lost.

    A SimpleQueue: ringing is reentrant, so that it may happen in a signal handler, and Ctrl-C ends the wait.
    """

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue = queue.SimpleQueue()
        self.ring = lambda: self._rings.put(None)

    def wait(self, timeout: float | None) -> None:
        try:
            self._rings.get(timeout=None if timeout is None else max(0.0, timeout))
            while True:
                self._rings.get_nowait()
        except queue.Empty:
            pass


class Pending:
    """One request on its way: `wait` for it, look at `is_done` and `reply`, or `cancel` it.

    twoproc-client fills it; one thread at a time may wait.
    """

    def __init__(self, client: Client, msg_type: str, msg_id: str, *, needs_reply: bool, needs_idle: bool,
                 allows_input: bool, on_message: Callable[[Message], None] | None):
        self.client = client
        self.msg_type = msg_type
        self.msg_id = msg_id
        self.reply: Message | None = None
        self.error: Exception | None = None     # KernelDied, ConnectionLost, or the client was closed
        self.is_idle = False                    # the kernel said that it has finished with this request
        self.is_done = False                    # nothing more will come
        self._needs_reply, self._needs_idle = needs_reply, needs_idle
        self._allows_input = allows_input
        self._on_message = on_message
        self._inbox: deque = deque()            # (channel, Message); twoproc-client appends, the waiter takes
        # Sizes of what went in and came out: each has one writer, so their difference needs no lock.
        self._received_chars = self._taken_chars = 0
        self._question = ""         # msg_id of the input_request that came, until that may have been in vain
        self._is_answered = False
        self._bell = Bell()
        self._heard_at = time.monotonic()

    # -- called by any thread
    def wait(self, timeout: float | None = None, *, on_output: Callable[[Message], None] | None = None,
             on_input: Callable[[str, bool], str] | None = None) -> Message | None:
        """Wait until the request is done; returns its reply (None for a message type that has none).

        on_output(message): every iopub message of this request, in order, in this thread.
        on_input(prompt, password): what the user answers; may raise EOFError, or KeyboardInterrupt, which
        interrupts the cell; without it a question is answered with end of input.
        Raises TimeoutError, on time also while output keeps coming, KernelDied, ConnectionLost.  After TimeoutError,
        KeyboardInterrupt or an exception of the callbacks it may be called again and goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            is_done, error = self.is_done, self.error       # before the inbox: all that belongs to it is there
            while self._inbox:
                # What is done waits for nobody: a wait(0) takes it all, and says so.
                if not is_done and deadline is not None and time.monotonic() > deadline:
                    raise self._timeout_error(timeout)
                self._handle(on_output, on_input)
            if is_done:
                return self.reply
            if error is not None:
                raise error
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise self._timeout_error(timeout)
            self._bell.wait(left)

    def cancel(self) -> None:
        """Expect nothing more: what still comes is dropped.  The kernel is not told; that is `interrupt`."""
        self._finish()
        with contextlib.suppress(IndexError):       # the inbox is empty
            while True:
                channel, message = self._inbox.popleft()
                self._count_taken(message)
                if channel == "stdin" and self.reply is None:
                    self.client.answer(message, END_OF_INPUT)

    def _finish(self) -> None:
        self.client._forget(self)
        self.is_done = True
        self._bell.ring()

    def _count_taken(self, message: Message) -> None:
        self._taken_chars += _size(message)
        if self.client._is_paused and self._unread_chars() < UNREAD_CHARS // 2:
            self.client._resume()

    def _unread_chars(self) -> int:
        return self._received_chars - self._taken_chars

    def _handle(self, on_output: Callable | None, on_input: Callable | None) -> None:
        try:
            channel, message = entry = self._inbox[0]
        except IndexError:
            return      # another thread has cancelled the request
        try:
            if channel == "stdin":
                self._answer(message, on_input)
            elif on_output is not None:
                on_output(message)
        finally:
            # When it was handled, well or badly: Ctrl-C before that leaves it for the next wait.
            with contextlib.suppress(IndexError):
                if self._inbox[0] is entry:
                    self._inbox.popleft()
                    self._count_taken(message)

    def _answer(self, message: Message, on_input: Callable | None) -> None:
        value = END_OF_INPUT
        try:
            if on_input is not None:
                value = on_input(str(message.content.get("prompt", "")), message.content.get("password") is True)
        except EOFError:
            pass
        except KeyboardInterrupt:
            self.client.interrupt_nowait()      # the kernel's input() raises it there
            return
        except Exception:       # the caller shall have it, and the cell not wait
            self.client.answer(message, END_OF_INPUT)
            raise
        if self.reply is None:      # else the cell ended while the user was thinking: nobody asks any more
            self.client.answer(message, value)

    def _timeout_error(self, timeout: float | None) -> TimeoutError:
        what = "reply to" if self.reply is None else "end of"
        return TimeoutError("no %s %s within %g s" % (what, self.msg_type, timeout or 0))

    # -- run by twoproc-client only
    def _ask_again(self) -> None:
        """The connection was cut, and with it maybe our answer: then the kernel repeats its question."""
        if self._is_answered:
            self._question, self._is_answered = "", False

    def _receive(self, channel: str, message: Message) -> None:
        self._heard_at = time.monotonic()
        if channel == "iopub":
            if message.msg_type == "status" and message.content.get("execution_state") == "idle":
                self.is_idle = True
        elif channel == "stdin":
            if message.msg_type != "input_request" or message.msg_id == self._question:
                return
            self._question, self._is_answered = message.msg_id, False
            if not self._allows_input:
                self.client.answer(message, END_OF_INPUT)
                return
        elif message.msg_type.endswith("_reply"):
            self.reply = self.reply or message
            # Too many requests: such a reply comes alone, so that others are not troubled.
            if message.content.get("ename") == "RateLimited" and len(message.content.get("traceback") or ()) == 1:
                self.is_idle = True
        if self._on_message is not None:
            self._on_message(message)
        if channel == "stdin" or channel == "iopub" and self._needs_idle and self._on_message is None:
            self._inbox.append((channel, message))
            self._received_chars += _size(message)
            if self._unread_chars() > UNREAD_CHARS:
                self.client._pause(self)
        if (self.reply is not None or not self._needs_reply) and (self.is_idle or not self._needs_idle):
            self._finish()
        elif self.reply is not None:
            self.client._late[self.msg_id] = self

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._bell.ring()


def _size(message: Message) -> int:
    """About how much memory a message takes: text is what there can be much of."""
    text = message.content.get("text")
    return 1000 + (len(text) if type(text) is str else 0) + sum(map(len, message.buffers))


class Client:
    """A connection to one kernel.  Thread-safe; every method that waits has a time limit.

    target: as for `connect`.  process: the KernelProcess behind a target that is a file or a ConnectionInfo.
    username: how others see us.  heartbeat: seconds between two pings, 0: none.
    Making one returns at once: `wait_ready` waits until there is somebody at the other end.
    """

    def __init__(self, target: Any = None, *, process: Any = None, username: str | None = None,
                 heartbeat: float | None = None):
        self.process = process                      # the launcher.KernelProcess, if this program started it
        self.connection_file: str | None = None     # None when we were given a ConnectionInfo
        if isinstance(target, ConnectionInfo):
            self.info = target
        else:
            if hasattr(target, "connection_file"):
                self.process, target = target, target.connection_file
            self.connection_file = connection.find_connection_file(os.fspath(target) if target else None)
            self.info = connection.read_connection_file(self.connection_file)
        # What our key may do there: view, input, run, admin; and whose key it is.  On this machine: all, nobody's.
        self.rights = str(self.info.extra.get("twoproc_rights") or "admin")
        self.user = str(self.info.extra.get("twoproc_user") or "")
        self.execution_state = ""                   # what the kernel said last: starting, busy, idle
        self.kernel_info_reply: Message | None = None
        self.died: KernelDied | None = None
        # Every request that expects something.  Callers add, twoproc-client and cancel() remove: single
        # operations on a dict, which threads and Ctrl-C leave whole.
        self._table: dict[str, Pending] = {}
        self._late: dict[str, Pending] = {}         # of these, those that have their reply and wait for idle; the same
        self._listeners: list[Callable[[Message], None]] = []       # replaced, never changed in place
        self._watchers: list[Callable[[str], None]] = []            # the same
        self._followers: list[Follower] = []        # listeners whose past wait_ready is to ask for
        self._ready_bell = Bell()
        self._order, self._link = InOrder(self), Link(self)
        self._kernel = ""                   # the session in its messages, another one for another process
        self._woken: dict[str, Pending] = {}        # twoproc-client's: who has something new since it last rang
        self._sees_output = False           # something arrived on iopub: the subscription stands
        self._was_connected = False         # since the last reset
        self._is_paused = False             # iopub is not read: somebody's inbox is full
        self._may_have_lost = False         # we were too slow, or stopped: see _look_for_loss
        self._provoked = 0                  # how often since we heard something
        self._heard_output_at = self._looked_at = time.monotonic()
        self._dying: tuple[float, float, str] | None = None     # quiet until, at the latest, cause
        self._shutdown: Message | None = None       # the shutdown_reply that a kernel sends to all
        self._is_closed = False
        self._pid = os.getpid()
        self._process_end: Any = None       # has a fileno that becomes readable then
        self._session = Session(self.info.key, self.info.signature_scheme, username=username,
                                max_frames=1 << 16, max_message=1 << 31)
        self.session, self.username = self._session.session, self._session.username
        options: dict[str, Any] = {} if heartbeat is None else {"heartbeat": heartbeat}
        self._channels = ClientChannels(self.info, self._session.deserialize, on_messages=self._receive,
                                        on_link=self._hear_link, on_tick=self._tick, on_end=self._end, **options)
        self._channels.start()
        if self.process is not None:
            self.process.on_death(self.tell_death)
        else:
            self._channels.call(self._watch_process)

    # -- called by any thread: the life of the client
    def close(self, timeout: float = 2.0) -> None:
        """End the connection and the thread; the kernel lives on.  Requests still open raise in their callers."""
        self._is_closed = True
        if self._pid != os.getpid():
            return      # a forked child has our object but not our thread; the sockets are the parent's
        if self.process is not None:
            self.process.on_death(self.tell_death, remove=True)
        self._channels.close(timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def wait_ready(self, timeout: float | None = None) -> Message:
        """Wait until the kernel has answered and its output reaches us; returns its kernel_info_reply.

        Raises NotReady with the cause, at once where it is certain, else when `timeout` is over, and KernelDied.
        The client stays usable after it: a kernel of which the reason is "busy" can be interrupted.
        """
        may_give_up = timeout is None and self.process is None
        if timeout is None:
            timeout = 4.0 if may_give_up else 60.0      # and a second to find the cause
        start = time.monotonic()
        probes: list[Pending] = []
        control: Pending | None = None
        pause = 0.05
        probe_at = start + pause
        if self.died is not None and self._is_started_again():
            self._channels.call(lambda: self._channels.reset(is_urgent=True))
        try:
            while True:
                now = time.monotonic()
                try:
                    if not probes or any(probe.error for probe in probes):
                        probes[:] = [self.submit("kernel_info_request")]
                except KernelDied:
                    # Restarted by our launcher a moment ago: the death of its predecessor is still being told.
                    if not self._is_started_again() or now >= start + timeout:
                        raise
                    self._ready_bell.wait(0.05)
                    continue
                reply = next((probe.reply for probe in probes if probe.reply), None)
                # Until then that of its predecessor stands, by whose log a gap in the output is filled.
                self.kernel_info_reply = reply or self.kernel_info_reply
                if reply is not None and self._sees_output:
                    followers, self._followers = self._followers, []
                    for follower in followers:
                        follower.ask()
                    return reply
                if may_give_up and control is not None and control.reply is not None \
                        and control.reply.content.get("implementation") == "twoproc":
                    # Such a kernel answers on shell while a cell runs.  What keeps it is a reader that has stopped,
                    # and for that one it waits limits.slow_reader_seconds.
                    timeout = PATIENT_SECONDS
                if now >= start + timeout or self._is_hopeless(now - start, may_give_up):
                    raise self._diagnose(reply, control, timeout)
                if now >= probe_at:
                    # A kernel without iopub_welcome shows that the subscription stands by a status, and for
                    # that it must be asked something after it stands.
                    if reply is not None:
                        probes.append(self.submit("kernel_info_request"))
                    elif control is None and now - start > 0.5:
                        control = self.submit("kernel_info_request", channel="control")
                        self._channels.call(self._channels.ping)
                    pause = min(1.0, 2 * pause)
                    probe_at = now + pause
                self._ready_bell.wait(min(probe_at, start + timeout) - now)
        finally:
            for probe in probes + ([control] if control else []):
                probe.cancel()

    def _is_started_again(self) -> bool:
        return self.process is not None and self.process.is_alive

    @property
    def is_alive(self) -> bool:
        """False when the kernel is known to have died, and not come back, or the client is closed."""
        return self.died is None and not self._is_closed

    @property
    def is_lost(self) -> bool:
        """True while the connection to a kernel on another machine is cut; what is sent waits for its return."""
        return self._link.is_lost

    @property
    def address(self) -> str:
        """Where the kernel is, to be shown."""
        return str(self.info.extra.get("twoproc_address") or self.info.url("shell"))

    @property
    def silence(self) -> float:
        """Seconds since the oldest heartbeat that the kernel has not answered, 0.0 while it answers."""
        since = self._channels.silent_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def dropped_messages(self) -> int:
        """Messages that came and could not be believed or read."""
        return self._channels.bad_signatures + self._channels.bad_messages

    @property
    def missed(self) -> int:
        """Messages on iopub, statuses among them, that were lost and that no log could bring back."""
        return self._order.missed

    def listen(self, callback: Callable[[Message], None]) -> Callable[[], None]:
        """Have `callback` called with every iopub message, also those that others caused; returns what ends it.

        parent_header says whose request it was: username, session.  Called on twoproc-client: must not wait.
        """
        self._listeners = [*self._listeners, callback]
        return lambda: setattr(self, "_listeners", [other for other in self._listeners if other is not callback])

    def catch_up(self, callback: Callable[[Message, bool], None], cells: int = 20, max_bytes: int = 65_536,
                 timeout: float = 5.0) -> Callable[[], None]:
        """`listen` that begins with the past, without a gap and without a duplicate; returns what ends it.

        callback(message, is_past): first, with True, what the last `cells` cells were and printed, at most about
        `max_bytes` of it, and of a cell that runs its output so far; then, with False, what is live.  Past are
        execute_input, output, the idle that ends a cell, and twoproc_gap (see gap_message); the last cell runs if
        it has no idle.  parent_header says whose each is, header["date"] when it was.  All in order, on twoproc-client.

        Where the kernel keeps no log, or does not answer in `timeout` seconds, there is no past, and live is
        everything from this call on.  Called before wait_ready, it returns at once, and wait_ready returns after
        the past was delivered; called later, it waits for that itself.
        """
        follower = Follower(self, callback, cells, max_bytes, timeout)
        stop = self.listen(follower)
        if self.kernel_info_reply is None:
            self._followers = [*self._followers, follower]
        else:
            follower.ask()
        return stop

    def watch(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Have `callback` called with "died" or "alive" when that changes; returns what ends it.

        "alive" comes when a kernel answers again at the same address.  With a network in between also with "lost"
        when the connection is cut, and "back" when the kernel has answered again, or "refused" when it
        does not let our key in any more.  Called on twoproc-client: must not wait.
        """
        self._watchers = [*self._watchers, callback]
        return lambda: setattr(self, "_watchers", [other for other in self._watchers if other is not callback])

    # -- called by any thread: requests
    def submit(self, msg_type: str, content: dict | None = None, *, channel: str | None = None,
               on_message: Callable[[Message], None] | None = None, wait_idle: bool = False,
               metadata: dict | None = None, buffers: tuple = ()) -> Pending:
        """Send a request and return at once.

        channel: by default the one of session.MESSAGES.  wait_idle: done when the kernel says idle, and its
        output is kept for the waiter, else done with the reply.  on_message: called on twoproc-client with
        each message that belongs to it, replies included, instead of keeping output; implies wait_idle.
        Raises KernelDied, ValueError for a closed client, TypeError for content that JSON cannot hold.
        """
        pending, channel, frames = self._prepare(msg_type, content, channel, on_message, wait_idle, metadata, buffers)
        self._channels.send(channel, frames, pending)
        return pending

    def _prepare(self, msg_type: str, content: dict | None = None, channel: str | None = None,
                 on_message: Callable[[Message], None] | None = None, wait_idle: bool = False,
                 metadata: dict | None = None, buffers: tuple = ()) -> tuple[Pending, str, list]:
        """All of `submit` but the sending."""
        if self._pid != os.getpid():
            raise ValueError("this client belongs to process %d, before the fork; connect again" % self._pid)
        kind = MESSAGES.get(msg_type)
        header = self._session.header(msg_type)
        frames = self._session.serialize(msg_type, content or {}, header=header,
                                         metadata=seal(metadata, buffers) or b"{}", buffers=buffers)
        pending = Pending(
            self, msg_type, json.loads(header)["msg_id"], on_message=on_message,
            needs_reply=msg_type.endswith("_request") if kind is None else kind.reply is not None,
            needs_idle=wait_idle or on_message is not None,
            allows_input=bool(content and content.get("allow_stdin")))
        self._table[pending.msg_id] = pending
        # After entering the table: whoever declares the death later, or closes us, will find the request there.
        dying = self._dying         # looked at before `died`: the one ends when the other has begun
        error: Exception | None = self.died or (KernelDied(dying[2]) if dying else None)
        if self._is_closed:
            error = ValueError("this client is closed; connect again")
        if error is not None:
            self._forget(pending)
            raise error
        return pending, channel or (kind.channels[0] if kind else "shell"), frames

    def execute_nowait(self, code: str, *, silent: bool = False, store_history: bool = True,
                       user_expressions: dict | None = None, allow_stdin: bool = False, stop_on_error: bool = True,
                       on_message: Callable[[Message], None] | None = None) -> Pending:
        """Send a cell and return at once; `wait` on the result as often as needed, with on_output and on_input.

        allow_stdin: whether the waits will have an on_input.  What nobody waits for must be cancelled: its
        output is kept, and beyond UNREAD_CHARS holds up everybody's.
        """
        return self.submit("execute_request", {
            "code": code, "silent": silent, "store_history": store_history and not silent,
            "user_expressions": user_expressions or {}, "allow_stdin": allow_stdin, "stop_on_error": stop_on_error,
        }, on_message=on_message, wait_idle=True)

    def execute(self, code: str, *, silent: bool = False, store_history: bool = True,
                user_expressions: dict | None = None, allow_stdin: bool | None = None, stop_on_error: bool = True,
                on_output: Callable[[Message], None] | None = None,
                on_input: Callable[[str, bool], str] | None = None, timeout: float | None = None) -> Message:
        """Run a cell; returns the execute_reply when the kernel is idle again and all output was handled.

        on_output, on_input, exceptions: as for Pending.wait.  An error in the cell is no exception here:
        look at content["status"].  After a TimeoutError or KeyboardInterrupt the cell goes on in the kernel
        (`interrupt` stops it) and its reply is dropped; who wants to go on waiting uses execute_nowait.
        """
        pending = self.execute_nowait(
            code, silent=silent, store_history=store_history, user_expressions=user_expressions,
            allow_stdin=on_input is not None if allow_stdin is None else allow_stdin, stop_on_error=stop_on_error)
        return self._finish(pending, timeout, on_output=on_output, on_input=on_input)

    def complete(self, code: str, cursor_pos: int | None = None, timeout: float | None = 5.0) -> Message:
        return self._ask("complete_request", {"code": code, "cursor_pos": _cursor(code, cursor_pos)}, timeout)

    def inspect(self, code: str, cursor_pos: int | None = None, detail_level: int = 0,
                timeout: float | None = 5.0) -> Message:
        return self._ask("inspect_request", {"code": code, "cursor_pos": _cursor(code, cursor_pos),
                                             "detail_level": detail_level}, timeout)

    def is_complete(self, code: str, timeout: float | None = 1.0) -> Message:
        return self._ask("is_complete_request", {"code": code}, timeout)

    def history(self, hist_access_type: str = "tail", *, timeout: float | None = 5.0, **fields: Any) -> Message:
        """fields: n, pattern, unique, session, start, stop, raw, output, as the specification names them."""
        content = {"raw": True, "output": False, "hist_access_type": hist_access_type, **fields}
        if hist_access_type in ("tail", "search"):
            content.setdefault("n", 1000)
        return self._ask("history_request", content, timeout)

    def kernel_info(self, timeout: float | None = 5.0) -> Message:
        return self._ask("kernel_info_request", {}, timeout)

    def comm_info(self, target_name: str | None = None, timeout: float | None = 5.0) -> Message:
        return self._ask("comm_info_request", {} if target_name is None else {"target_name": target_name}, timeout)

    def connect_info(self, timeout: float | None = 5.0) -> Message:
        return self._ask("connect_request", {}, timeout)

    def status(self, timeout: float | None = 5.0) -> dict:
        """What a kernel of ours says of itself (docs/protocol.md), unheard by others; {} where it is not ours.

        `rights` are then those of this moment.
        """
        info = self.kernel_info_reply
        if info is None or info.content.get("implementation") != "twoproc":
            return {}
        content = self._ask("twoproc_status_request", {}, timeout).content
        self.rights = str(content.get("rights") or self.rights)
        return content

    @property
    def keeps_log(self) -> bool:
        """Does the kernel say that it keeps a session log?  Known after wait_ready."""
        return self._can("twoproc log")

    @property
    def resumes(self) -> bool:
        """Does it say that it knows what became of a cell when the connection was cut?"""
        return self._can("twoproc resume")

    def _can(self, feature: str) -> bool:
        reply = self.kernel_info_reply
        features = reply.content.get("supported_features") if reply is not None else None
        return isinstance(features, list) and feature in features

    def log(self, cells: int = 20, max_bytes: int = 65_536, timeout: float | None = 5.0) -> LogPage:
        """What the last `cells` cells were and printed; an empty page at once where the kernel keeps no log."""
        if not self.keeps_log:
            return LogPage("", 0, [], None, False)
        return read_log(self._ask("twoproc_log_request", {"cells": cells, "max_bytes": max_bytes}, timeout))

    def interrupt(self, timeout: float | None = 5.0) -> Message | None:
        """Stop what the kernel runs, whoever sent it; returns the reply, None where a signal was sent instead."""
        if self._is_interrupted_by_signal():
            self.process.interrupt()
            return None
        return self._ask("interrupt_request", {}, timeout)

    def interrupt_nowait(self) -> None:
        """The same without waiting; may be called from a signal handler, and when the kernel is dead."""
        if self._is_interrupted_by_signal():
            self.process.interrupt()
        elif self.is_alive and self._dying is None:
            self._channels.send("control", self._session.serialize("interrupt_request", {}))

    def tell_death(self, cause: str) -> None:
        """By the launcher, or whoever else knows that the kernel has died."""
        self._channels.call(lambda: self._begin_dying(cause))

    def shutdown(self, restart: bool = False, timeout: float | None = 5.0) -> Message | None:
        """End the kernel, for everybody; returns its reply, None if it was gone before it could reply."""
        try:
            return self._ask("shutdown_request", {"restart": restart}, timeout)
        except KernelDied:
            return None

    def _ask(self, msg_type: str, content: dict, timeout: float | None) -> Message:
        return self._finish(self.submit(msg_type, content), timeout)

    def _finish(self, pending: Pending, timeout: float | None, **callbacks: Any) -> Message:
        try:
            reply = pending.wait(timeout, **callbacks)
        finally:
            pending.cancel()        # a late reply finds nobody and is dropped
        assert reply is not None
        return reply

    def _is_interrupted_by_signal(self) -> bool:
        return self.process is not None and self.process.interrupt_mode == "signal"

    def answer(self, question: Message, value: str) -> None:
        """Answer an input_request that came to an `on_message`; where there is an on_input, that one answers."""
        pending = self._pending_of(question)
        if pending is not None:
            pending._is_answered = True
        frames = self._session.serialize("input_reply", {"value": value, "status": "ok"}, question.header_bytes)
        self._channels.send("stdin", frames)

    def _forget(self, pending: Pending) -> None:
        self._table.pop(pending.msg_id, None)
        self._late.pop(pending.msg_id, None)

    def _resume(self) -> None:
        self._is_paused = False
        self._channels.call(self._order.go_on)

    # -- run by twoproc-client only
    def _receive(self, batch: list) -> None:
        for channel, message in batch:
            self._order.take(channel, message)
        if batch[0][0] == "iopub":
            self._heard_output_at = time.monotonic()
            if self._provoked:
                self._may_have_lost, self._provoked = False, 0
            elif self._order.is_counting:       # the idle of a cell is behind all that others print
                self._forgive_silence()
        self._ring()
        if self._dying is not None:
            _, latest, cause = self._dying
            self._dying = min(time.monotonic() + LAST_WORDS, latest), latest, cause

    def _deliver(self, channel: str, message: Message) -> None:
        """Hand a message to the request that caused it, and output to the listeners as well."""
        self._kernel = message.header.get("session") or self._kernel
        if message.msg_type == "shutdown_reply" and message.content.get("status") != "error":
            self._shutdown = message
        if channel == "iopub":
            self._sees_output = True
            if message.msg_type == "status":
                self.execution_state = str(message.content.get("execution_state", ""))
            for listener in self._listeners:
                self._call(listener, message)
        pending = self._pending_of(message)
        if pending is not None:
            self._call(pending._receive, channel, message)
            self._woken[pending.msg_id] = pending
        elif channel == "stdin" and message.msg_type == "input_request":
            self.answer(message, END_OF_INPUT)      # who could have answered has stopped waiting

    def _pending_of(self, message: Message) -> Pending | None:
        parent_id = message.parent_header.get("msg_id")
        return self._table.get(parent_id) if type(parent_id) is str else None

    def _ring(self) -> None:
        woken, self._woken = self._woken, {}
        for pending in woken.values():
            pending._bell.ring()
        self._ready_bell.ring()

    def _pause(self, pending: Pending) -> None:
        # Flag first, then look again: whoever takes from now on sees the flag and resumes.
        self._is_paused = True
        if pending._unread_chars() < UNREAD_CHARS // 2:
            self._is_paused = False
        self._read_output()

    def _read_output(self) -> None:
        is_wanted = not self._is_paused and not self._order.is_filling
        if not is_wanted:
            self._suspect_loss()
        self._channels.read_output(is_wanted)

    def _call(self, function: Callable, *arguments: Any) -> None:
        """Call a callback of our user; its mistake is shown, and the client lives on."""
        try:
            function(*arguments)
        except Exception:       # the user's code, and the others' messages must not suffer for it
            sys.excepthook(*sys.exc_info())

    def _tick(self) -> float | None:
        if self.is_lost:
            return self._link.tick()
        self._order.tick()
        if self._dying is None:
            return self._look_for_loss()
        quiet_until, _, cause = self._dying
        left = quiet_until - time.monotonic()
        if left <= 0:
            self._declare_dead(cause)
            return None
        return left

    def _look_for_loss(self) -> float | None:
        """Have the kernel say something, if the last it said may be lost; returns the seconds until that is known.

        By a status, not by the log: what is still on its way, in the log or not, comes before it.
        """
        now = time.monotonic()
        was_stopped = now - self._looked_at > STOPPED_SECONDS
        self._looked_at = now
        if was_stopped:
            self._suspect_loss()
        is_held = self._is_paused or self._order.is_filling
        if is_held or was_stopped:
            self._forgive_silence()
        for pending in list(self._late.values()):
            if now - pending._heard_at > IDLE_PATIENCE:
                pending._finish()
        if is_held or not (self._may_have_lost or self._late) or not self._order.is_counting or self._provoked > 6:
            return None
        # Up to seven times, after 1 to 64 s: a kernel leaves a reader out until it has read up, and does not tell.
        left = self._heard_output_at + QUIET_SECONDS * 2 ** self._provoked - now
        if left <= 0:
            self._provoked += 1
            with contextlib.suppress(KernelDied, ValueError):
                self.submit("kernel_info_request", channel="control").cancel()
            return None
        return left

    def _forgive_silence(self) -> None:
        """IDLE_PATIENCE begins anew for everybody."""
        for pending in list(self._late.values()):
            pending._heard_at = time.monotonic()

    def _suspect_loss(self) -> None:
        self._may_have_lost, self._heard_output_at, self._provoked = True, time.monotonic(), 0

    def _hear_link(self, event: str) -> None:
        if self.is_lost:
            self._link.hear(event)
        elif event == "connected":
            self._was_connected = True
            if self.died is not None and not self._link.is_over:
                self._revive()
        elif self.info.is_remote:
            if event == "unauthorised" and self._was_connected:     # iopub was cut, and may not come back
                self._link.lose(is_refused=True)
            # Told of a connection that was there, also where another socket is still connecting.
            elif event == "disconnected" and self.died is None and self._dying is None:
                if self._shutdown is None:
                    self._link.lose()
                else:
                    self._begin_dying("its connections ended")
        elif event == "refused" and self._was_connected and self.died is None and self.process is None:
            # A local address where somebody listened and nobody does: the process is gone.
            if self._process_end is None:
                self._begin_dying("its process is gone (nothing listens at %s)" % self.info.url("shell"))
        self._ready_bell.ring()

    def _watch_process(self) -> None:
        """Have the operating system tell us when the kernel's process, if we know it, has ended."""
        pid = self.info.extra.get("twoproc_pid")
        # The number means this machine only while a kernel here holds the claim on this very file; a file
        # copied from elsewhere, or left by a dead kernel, has none.
        if type(pid) is int and self.connection_file is not None and connection.is_claimed(self.connection_file):
            self._process_end = _process_end(pid)
            if self._process_end is not None:
                self._channels.watch(self._process_end.fileno(), lambda: self._hear_exit(pid))

    def _hear_exit(self, pid: int) -> None:
        self._unwatch_process()
        self._begin_dying("process %d ended" % pid)

    def _unwatch_process(self) -> None:
        descriptor, self._process_end = self._process_end, None
        if descriptor is not None:
            self._channels.unwatch(descriptor.fileno())
            descriptor.close()

    def _begin_dying(self, cause: str) -> None:
        if self.died is None and self._dying is None:
            now = time.monotonic()
            self._dying = now + LAST_WORDS, now + LAST_WORDS_AT_MOST, cause
            self._link.close()
            self._order.give_up("the kernel is gone")

    def _declare_dead(self, cause: str) -> None:
        if self._shutdown is not None:      # maybe it was among the last words
            name = str(self._shutdown.parent_header.get("username") or "a client")[:60]
            cause = "%s by %s" % ("restarted" if self._shutdown.content.get("restart") is True else "shut down",
                                  "".join(filter(str.isprintable, name)))       # it is shown at a terminal
        self.died, self._dying = KernelDied(cause), None
        self.execution_state = ""
        self._fail_all(self.died)
        self._sees_output = self._was_connected = self._is_paused = False
        self._shutdown = None
        # Its own launcher starts it again in a moment, others in their own time.
        self._channels.reset(is_urgent=self._is_started_again() or getattr(self.process, "is_restarting", False))
        self._ready_bell.ring()
        self._tell("died")

    def _revive(self) -> None:
        """Somebody listens again where our kernel died: its successor, if the key is the same."""
        if self.connection_file is not None:
            try:
                info = connection.read_connection_file(self.connection_file)
            except connection.ConnectionFileError:
                info = self.info        # not written yet, or not ours to read: a wrong key will show
            if info.key == self.info.key:
                self.info = info
        self.died = None
        if self.process is None:
            self._watch_process()
        self._tell("alive")

    def _tell(self, state: str) -> None:
        for watcher in self._watchers:
            self._call(watcher, state)

    def _fail(self, pending: Pending, error: Exception) -> None:
        self._forget(pending)
        pending._fail(error)

    def _fail_all(self, error: Exception) -> None:
        for pending in list(self._table.values()):
            self._fail(pending, error)

    def _end(self, error: BaseException | None) -> None:
        self._is_closed = True
        self._unwatch_process()
        self._link.close()
        if error is None:
            self._fail_all(ConnectionAbortedError("the client was closed while this request was waiting"))
            return
        self._fail_all(RuntimeError("the client's thread ended with %r" % error))
        sys.excepthook(type(error), error, error.__traceback__)

    # -- why attaching failed
    def _is_hopeless(self, waited: float, may_give_up: bool) -> bool:
        """Nothing but a change at the other end would help: no need to wait until the time is over."""
        if self._sees_output:
            return False
        return (self._channels.bad_signatures > 0 and waited > 0.5
                or may_give_up and self._channels.link not in ("", "connected") and waited > 1.0)

    def _diagnose(self, reply: Message | None, control: Pending | None, timeout: float) -> NotReady:
        """The cause, from what was and was not heard, and from a look at each address."""
        waited = "within %g s" % timeout
        if self._channels.link == "unauthorised":
            return NotReady("unauthorised", "the kernel at %s does not let in this key: have it authorised there"
                                            % self.address, 5)
        if self._channels.bad_signatures and not self._sees_output:
            return NotReady("key", "the kernel signs with another key than the connection file's: is the file from "
                                   "an earlier kernel at the same address?")
        if reply is not None:
            return NotReady("output", "the kernel answers, but no output arrived from iopub at %s %s"
                                      % (self.info.url("iopub"), waited))
        for channel in connection.CHANNELS:
            mechanism = knock(self.info, channel)
            if isinstance(mechanism, NotReady):
                return mechanism
            if mechanism is None:
                break       # it takes connections and says nothing: it is stopped, no use to try the others
        if control is not None and control.reply is not None:
            return NotReady("busy", "the kernel is busy: it answers on control, but not on shell %s" % waited)
        if self.info.curve_publickey and not self._was_connected:
            return NotReady("key", "the kernel at %s is encrypted with another key than the connection file's: is the "
                                   "file from an earlier kernel?" % self.info.url("shell"))
        if self._channels.answered_at is not None:
            return NotReady("key", "the kernel's heartbeat answers, but no request was answered %s: either the key "
                                   "in the connection file is wrong, or the kernel is busy" % waited)
        return NotReady("silent", "something listens at %s but does not answer, not even the heartbeat, %s: is the "
                                  "kernel's process stopped?" % (self.info.url("shell"), waited))


def _cursor(code: str, cursor_pos: int | None) -> int:
    return len(code) if cursor_pos is None else cursor_pos


def _process_end(pid: int) -> Any:
    """What becomes readable when the process ends: a pidfd, a kqueue; None where there is neither.

    Without it a local death is still seen at once by the connection that is cut and refused.
    """
    try:
        if hasattr(os, "pidfd_open"):
            return io.FileIO(os.pidfd_open(pid))
        import select
        if sys.platform != "linux" and hasattr(select, "kqueue"):
            events = select.kqueue()
            events.control([select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD | select.KQ_EV_ONESHOT,
                                          select.KQ_NOTE_EXIT)], 0)
            return events
    except OSError:
        pass        # ended already, or the system is too old
    return None


# How every ZeroMQ connection begins (RFC 23): signature and version.  The other side then sends the same and its
# security mechanism; what we would send next could make it hang up before that.
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00"


def knock(info: ConnectionInfo, channel: str) -> NotReady | str | None:
    """Connect to one address as ZeroMQ would: why that fails, else its security mechanism, None if it is silent."""
    import socket
    url = info.url(channel)
    seen = b""
    try:
        if info.transport == "ipc":
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(0.5)
            sock.connect(url[len("ipc://"):])
        else:
            sock = socket.create_connection((info.ip.strip("[]"), info.port(channel)), CONNECT_SECONDS)
    except TimeoutError:
        return NotReady("blocked", "no answer from %s (%s): the machine is off, or a firewall or the network between "
                                   "us keeps that port shut" % (url, channel))
    except socket.gaierror as error:
        return NotReady("refused", "no machine is called %s (%s)" % (info.ip, error.strerror))
    except OSError as error:
        return NotReady("refused", "nothing listens for %s at %s (%s): has the kernel ended?"
                        % (channel, url, error.strerror or error))
    with sock:
        sock.settimeout(1.5)        # a network may take half a second for a word and its answer
        try:
            sock.sendall(_GREETING)
            while len(seen) < 32:
                part = sock.recv(64)
                if not part:
                    break
                seen += part
        except TimeoutError:
            return None
        except OSError:
            pass        # cut off
    if len(seen) < 32 or not seen.startswith(b"\xff"):
        return NotReady("refused", "what listens for %s at %s is not a Jupyter kernel" % (channel, url))
    mechanism = seen[12:32].rstrip(b"\0").decode("ascii", "replace")
    expected = "CURVE" if info.curve_publickey else "NULL"
    if mechanism != expected:
        words = {"NULL": "without encryption", "CURVE": "encrypted"}
        return NotReady("encryption", "the kernel at %s talks %s, the connection file says %s: is the file from an "
                        "earlier kernel?" % (url, words.get(mechanism, ascii(mechanism)), words[expected]))
    return mechanism
