# Distributed under the terms of the BSD 3-Clause License.
"""The kernel: a process that runs the code its clients send and tells everybody what comes of it.

    python -m twoproc.kernel                    a kernel of its own, with a name to join it by
    python -m twoproc.kernel -f FILE            the kernel of a Jupyter manager

Every request of the messaging specification has one handler here, named after it.  They are grouped by the
thread that runs them, which is also what a client feels:

    main            the user's code: execute_request and comms, one after another
    twoproc-helper  what may take a moment but need not wait for a cell: completion, inspection, history
    twoproc-io      what is answered at once, whatever the cell does: kernel_info, interrupt, shutdown

Sockets are channels.py's, the interpreter is shell.py's, the log of the session is sessionlog.py's: main writes a
cell there before it runs, twoproc-io what comes of it before it is sent.  Here is who does what when, and how it ends.
Read session.py and channels.py before, shell.py after.
"""
from __future__ import annotations

import _imp
import argparse
import atexit
import builtins
import contextlib
import faulthandler
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from _signal import signal as set_handler  # type: ignore[import-not-found]
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from . import __version__, config, connection, crashlog
from .access import Access, AccessLog, AuthorizedKeys, NotAllowed, RateLimited
from .channels import EXIT_FAULT, KernelChannels, Limits, Listen, Text, check_curve
from .crashlog import is_private
from .mailbox import own_thread
from .replies import Replies
from .session import MESSAGES, PROTOCOL_VERSION, BadMessage, Message, check_request, encode, timestamp
from .sessionlog import Page, SessionLog
from .streams import DescriptorCapture, InStream, OutStream, set_forked

if TYPE_CHECKING:
    from .crashlog import LoggedCell
    from .shell import Interpreter

logger = logging.getLogger(__package__)

NUDGE_SECONDS = 0.1             # a cell that did not run for so long is blocked in a call
GRACE = 1.0                     # seconds a running cell has to end when the kernel is told to
EXIT_SECONDS = 2.0              # that functions registered with atexit have together
LAST_INPUT_CHARS = 80
BUILTINS = dict(vars(builtins))
LOG_PAGE = 1 << 20              # bytes of twoproc_log_reply, at most, to who comes with a key
NO_INPUT = "this frontend did not offer to answer input(): its request had allow_stdin false"


class Kernel:
    """One kernel in one process; `run` belongs to the main thread and returns the exit status.

    Written by main, read by the others: `running`, the message that main works on; None while it waits.
    Written once by whoever is first: `ending`, why the kernel ends.
    """

    def __init__(self, channels: KernelChannels, completion_seconds: float = 1.0, orphan_timeout: float = 0):
        self.channels = channels
        self.running: Message | None = None
        self.ending: str | None = None
        self.exit_status = 0
        self.is_abandoned = False
        self._finishing = threading.Lock()      # taken by the thread that runs `finish`
        self.tidy: Callable[[], None] = lambda: None    # what is left to do when the sockets are closed
        self.claim: connection.Claim | None = None
        self.log: SessionLog | None = None      # None: not wanted
        self._marks: dict[str, str] = {}        # client's session -> date of the last cell it sent our predecessors
        self.notice: tuple[str, str] | None = None      # of a crash before us, as text and as HTML
        self._is_notice_told = False
        self.log_warning = ""           # of the log, from before anybody could hear of it
        self._is_child = False
        self.name = ""
        self.capture = DescriptorCapture()
        self.stderr: Any = sys.stderr           # that of the process, when cells have got theirs
        self._is_reading_asked = False          # twoproc-io's: a reading of the capture is in the outbox
        self.interpreter: Interpreter | None = None
        self._helpers = Helpers(self, completion_seconds)
        self._orphan_timeout = orphan_timeout
        self._parent_pid = 0            # where there is no pidfd to watch
        self._alone_since = time.monotonic()
        self._end_at: float | None = None       # when a cell has had its time to end,
        self._exit_at: float | None = None      # and when `finish`, once it has begun, has had its own
        self.ends_on_exit = False       # see _leave_if_alone
        self._leave_at: float | None = None
        self._replies = Replies()
        self._asking: Question | None = None    # what an input_reply may answer
        self._cells = 0
        self._runs_user_code = False
        self._interrupted: Message | None = None    # the cell that was interrupted before its code began
        self._again: tuple[Message | None, float] = None, 0.0       # the cell to interrupt again, and when
        # See _nudge_if_blocked.  macOS has no clock for a thread, and SIGINT alone has to do.
        self._main_clock = time.pthread_getcpuclockid(threading.get_ident()) \
            if hasattr(time, "pthread_getcpuclockid") else None
        self._main_used: float | None = None
        self._nudge_at = 0.0
        self._nudges: tuple[Message | None, int] = None, 0      # the cell, and how often since it last went on
        self._cell_sigint: Any = signal.default_int_handler
        self.process, self.started = os.getpid(), time.time()
        self.last_input = ""                # one line of it, for twoproc_status_request; of no private cell
        self._leads_group = hasattr(os, "getpgrp") and os.getpgrp() == os.getpid()
        channels.on_message, channels.on_hello = self.on_message, self.hello
        channels.on_bad_message = self.on_bad_message
        channels.on_tick = self.on_tick

    def use_log(self, log: SessionLog) -> None:
        """From now on what is run and published goes into this log; before the channels start."""
        self.log = log
        self._marks = log.prev.marks() if log.prev is not None else {}
        self.channels.on_publish = log.published
        self.channels.may_not_wait = log.is_writing     # twoproc-io needs the lock that is held then
        self.channels.on_fault = self.note_fault
        if log.fault is not None:
            faulthandler.enable(log.fault)

    def note_fault(self) -> None:
        """Called while an exception that nobody expected ends the kernel."""
        if self.log is not None:
            self.log.note("fault", text=traceback.format_exc())

    # -- run by twoproc-io: must not wait

    def on_message(self, channel: str, message: Message) -> None:
        """Everything verified that a client sends comes through here and goes to the thread that handles it."""
        kind = message.msg_type
        if message.user:
            self._check_access(message)
        if channel == "stdin":
            self.input_reply(message)
            return
        if kind not in MESSAGES or MESSAGES[kind].fields is None:
            logger.warning("%s: unknown message type %.60r", channel, kind)
            with self.answering(message):
                pass
            return
        message = message._replace(content=check_request(message, channel))
        if kind == "execute_request" and self._was_before_restart(message.header):
            raise BadMessage("execute_request: dated %.40s, not after what this client sent to the kernel before it "
                             "was restarted; it is not run again" % message.header.get("date"), message)
        if kind == "twoproc_status_request":
            # Without busy and idle: to everybody else a list of kernels is not somebody who came.
            self.twoproc_status_request(channel, message)
        elif kind in self.AT_ONCE:
            with self.answering(message):
                self.AT_ONCE[kind](self, channel, message)
        elif kind in self.BY_HELPER:
            self._helpers.submit(message)
        else:
            if kind == "execute_request":
                self._replies.note_request(message)
            self.channels.requests.put(message)
            if kind != "execute_request" and self.interpreter is not None:
                # A cell that awaits the answer of a widget gets it from its own loop.
                self.interpreter.call_in_running_loop(self.handle_comms)

    def on_bad_message(self, channel: str, error: BadMessage) -> None:
        """An honest client with a bug must not wait for ever: an error reply, and idle."""
        message = error.message
        if message.user and error.name == "BadMessage":
            try:
                self._check_access(message)
            except BadMessage as refusal:       # this comes before what else is wrong with it
                error = refusal
        logger.warning("%s: %s", channel, error)
        kind = MESSAGES.get(message.msg_type)
        if channel == "stdin":
            return
        content: dict[str, Any] = {"status": "error", "ename": error.name, "evalue": str(error),
                                   "traceback": ["%s: %s" % (error.name, error)]}
        if kind is not None and kind.reply == "execute_reply":
            content["execution_count"] = self.execution_count
        if error.name == "RateLimited":         # to the sender alone: others need not hear of it
            if kind is not None and kind.reply is not None:
                self.channels.reply_now(channel, message, kind.reply, content)
            return
        with self.answering(message):
            if kind is not None and kind.reply is not None:
                self.reply(message, kind.reply, content, channel)

    def _check_access(self, message: Message) -> None:
        """Raises BadMessage: for whoever is not of this machine, each message is looked at anew."""
        access, kind = self.channels.access, message.msg_type
        assert access is not None
        try:
            access.check(message.user, kind)
        except (NotAllowed, RateLimited) as error:
            raise BadMessage(str(error), message, type(error).__name__) from None
        if kind in ("execute_request", "interrupt_request", "shutdown_request"):
            access.note(kind.removesuffix("_request"), message.user)

    def hello(self, user: str) -> bytes:
        """To a client on another machine, which has no connection file: what it needs of ours."""
        access, info = self.channels.access, self.channels.info
        assert access is not None
        rights = access.rights(user)
        if not rights:
            return b"{}"
        access.note("hello", user, rights=rights)
        return encode({"key": info.key.decode("ascii"), "signature_scheme": info.signature_scheme,
                       "kernel_name": self.name, "user": access.name(user), "rights": rights,
                       "session": "" if self.log is None else self.log.id})

    def kernel_info_request(self, channel: str, message: Message) -> None:
        content = kernel_info()
        if self.log is not None:
            content = {**content, "supported_features": [*content["supported_features"], "twoproc log"]}
        if self.notice is not None:
            content = {**content, "banner": "%s\n\n%s" % (content["banner"], self.notice[0])}
        if channel == "control":
            self.channels.reply_now(channel, message, "kernel_info_reply", content)
        else:
            self.reply(message, "kernel_info_reply", content)

    def connect_request(self, channel: str, message: Message) -> None:
        ports = {name + "_port": self.channels.info.port(name) for name in connection.CHANNELS}
        self.reply(message, "connect_reply", {"status": "ok", **ports}, channel)

    def twoproc_log_request(self, channel: str, message: Message) -> None:
        """The last `cells` with their output, or what was published from from_seq to to_seq."""
        content, newest = message.content, self.channels.published
        page, session = Page([], {}, None, False), ""
        if self.log is not None:
            session, limit = self.log.id, min(content["max_bytes"], self.channels.limits.max_frame // 2)
            if message.user:        # he may not read it: what waits for him in the socket is ours to bear
                limit = min(limit, LOG_PAGE)
            if content["from_seq"] is not None:
                last = newest if content["to_seq"] is None else min(newest, content["to_seq"])
                page = self.log.between(content["from_seq"], last, limit)
            else:
                page = self.log.recent(content["cells"] or 0, limit)
        parents = b",".join(b"%s:%s" % (json.dumps(msg_id).encode(), header) for msg_id, header in page.parents.items())
        rest = encode({"status": "ok", "session": session, "seq": newest, "next_seq": page.next_seq, "cut": page.cut})
        self.channels.reply_now(channel, message, "twoproc_log_reply", b'{"records":[%s],"parents":{%s},%s' % (
            b",".join(page.records), parents, rest[1:]))

    def twoproc_status_request(self, channel: str, message: Message) -> None:
        """Who we are and what we do, for a list of kernels."""
        folder = ""
        with contextlib.suppress(OSError):      # it was removed
            folder = os.getcwd()
        state = "starting" if self.interpreter is None else "idle" if self.running is None else "busy"
        port, listen = self.channels.listening, self.channels.listen
        self.channels.reply_now(channel, message, "twoproc_status_reply", {
            "status": "ok", "name": self.name, "pid": self.process, "started": self.started, "cwd": folder,
            "execution_state": state, "clients": self.channels.subscribers, "execution_count": self.execution_count,
            "last_input": self.last_input, "refused": self.channels.refused,
            "rights": self.channels.rights(message.user),
            "listen": connection.address(listen.host, port) if listen and port else ""})

    def twoproc_resume_request(self, channel: str, message: Message) -> None:
        """A client's connection was cut, and it is back with a new identity: what it may have missed of its cells."""
        unknown, forgotten, ended = self._replies.resume(message, message.content["msg_ids"])
        for cell in ended:
            self.channels.send("shell", "execute_reply", cell.reply or b"", cell.header_bytes,
                               identities=cell.identities)
            self.channels.send("iopub", "status", {"execution_state": "idle"}, cell.header_bytes)
        asking = self._asking
        if asking is not None and asking.answers.empty() and asking.cell.msg_id in message.content["msg_ids"] \
                and self._replies.route(asking.cell) == message.identities:     # since the resume above: it is his
            self._send_question(asking)
        rights = self.channels.rights(message.user)     # they may have changed meanwhile
        self.reply(message, "twoproc_resume_reply", {"status": "ok", "unknown": unknown, "forgotten": forgotten,
                                                     "rights": rights})

    def _was_before_restart(self, header: dict) -> bool:
        """A message captured from the wire and sent again to our successor with the same key is not run twice."""
        mark = self._marks.get(header["session"])
        return mark is not None and timestamp(header.get("date")) <= timestamp(mark) > float("-inf")    # that: no date

    def interrupt_request(self, channel: str, message: Message) -> None:
        self.interrupt()
        self.channels.reply_now(channel, message, "interrupt_reply", {"status": "ok"})

    def shutdown_request(self, channel: str, message: Message) -> None:
        content = {"status": "ok", "restart": message.content["restart"]}
        self.channels.reply_now(channel, message, "shutdown_reply", content)
        self.channels.send("iopub", "shutdown_reply", content, message.header_bytes)
        self.end("restart" if message.content["restart"] else "shutdown")

    def input_reply(self, message: Message) -> None:
        """Accepted from the client that was asked, for the question that is open.

        Stock clients leave the parent header empty; one that is there must name the question.
        """
        asking = self._asking
        value = message.content.get("value")
        parent = message.parent_header.get("msg_id")
        if message.msg_type != "input_reply" or not isinstance(value, str):
            logger.warning("stdin: %.60s without a string as value", message.msg_type)
        elif asking is None or not asking.answers.empty() or message.identities != self._replies.route(asking.cell) \
                or parent not in (None, json.loads(asking.header)["msg_id"]):
            logger.warning("stdin: an input_reply that nobody was asked for")
        else:
            asking.answers.put(value)

    AT_ONCE: dict[str, Callable[..., None]] = {
        "kernel_info_request": kernel_info_request, "connect_request": connect_request,
        "interrupt_request": interrupt_request, "shutdown_request": shutdown_request,
        "twoproc_log_request": twoproc_log_request, "twoproc_resume_request": twoproc_resume_request}

    def interrupt(self) -> None:
        """KeyboardInterrupt for the user's code, SIGINT for its children in our process group, as in a terminal.

        pthread_kill, not _thread.interrupt_main: only a signal ends a system call of the main thread.
        """
        # First the note, then the look: main looks at the note after it has said that user code runs.
        self._interrupted = self.running
        if not self._runs_user_code:
            return
        self._interrupted = None
        if self._leads_group:
            os.killpg(0, signal.SIGINT)
        elif hasattr(signal, "pthread_kill"):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            signal.raise_signal(signal.SIGINT)

    def interrupt_again(self) -> None:
        """The interrupt of the running cell was swallowed, see set_signals: once more, for main alone.

        By twoproc-io, when main has surely left what swallowed the first one.
        """
        self._again = self.running, time.monotonic() + 0.03

    def _interrupt_if_swallowed(self, now: float) -> None:
        running, at = self._again
        if running is not None and now > at:
            self._again = None, 0.0
            if self._runs_user_code and self.running is running and hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _nudge_if_blocked(self, now: float) -> None:
        """When the cell has blocked, and once more: have main look for a signal that it got before.

        A SIGINT that arrives while main waits for the interpreter lock is only noted, and the next look may
        come after the call that then blocks: of 400 interrupts just after `execute_input`, 8 waited for the end
        of time.sleep().  A second signal ends the system call, main looks, and goes on waiting if there was
        nothing (PEP 475).  SIGURG, because whoever does not handle it never sees it.  Twice, because main may
        have gone on to another call that blocks just after the first one: the look alone does not tell.
        """
        if self._main_clock is None or now < self._nudge_at:
            return
        used, before = time.clock_gettime(self._main_clock), self._main_used
        self._main_used, self._nudge_at = used, now + NUDGE_SECONDS
        running, (nudged, times) = self.running, self._nudges
        if running is not nudged or before is not None and used != before:
            self._nudges = running, 0
        elif before is not None and times < 2 and signal.getsignal(signal.SIGURG) is look_for_signals:
            self._main_used = None      # what runs until the next look is this look of main's
            self._nudges = running, times + 1
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)

    def end(self, why: str, status: int = 0) -> None:
        """Have the kernel end: at once if idle, after the running cell was interrupted, or after GRACE."""
        if self.ending is None:
            self.exit_status = status
            self.ending = why
            # A cell may have deleted some, and the end takes threads, which take print(): it would be a death.
            for name, value in BUILTINS.items():
                builtins.__dict__.setdefault(name, value)
            self._end_at = time.monotonic() + GRACE
            if self.interpreter is not None:
                self.interpreter.is_ending = True
            self.channels.requests.put(None)
            self.channels.call(lambda: None)    # twoproc-io is to look at the time
            self.interrupt()

    def abandon(self, why: str) -> None:
        """End because nobody is left who would end us: what the session was is kept for whoever looks for it."""
        if self.ending is None:
            self.is_abandoned = True
            self.end(why)

    def on_tick(self) -> float | None:
        """Called before twoproc-io waits; returns the longest it may, in seconds, None for ever."""
        now = time.monotonic()
        waits = [self._helpers.expire(now)]
        end_at = self._exit_at or self._end_at
        if end_at is not None:
            if now > end_at:
                end_at = self._end_hard()
            waits.append(max(0.0, end_at - now) + 0.01)
        elif self._leave_at is not None:
            if now > self._leave_at:
                self.end("exit in a cell")
            waits.append(max(0.0, self._leave_at - now) + 0.01)
        if self.capture.has_grown():
            if not self._is_reading_asked:      # else a slow reader of iopub would have us ask without end
                self._is_reading_asked = True
                self.call_to_read_capture(None)
        elif self.running is None and self.capture.has_writers(self._cells):
            waits.append(0.1)       # a background process that may write something
        elif self.running is None:
            self.capture.shrink()
        if self.running is not None:
            waits.append(0.02)
            self._nudge_if_blocked(now)
            self._interrupt_if_swallowed(now)
            asking = self._asking
            if asking is not None and asking.header == self.channels.unasked:
                self.channels.unasked = None    # until it has left the outbox in vain once more
                self._send_question(asking)
        if self._parent_pid and os.getppid() != self._parent_pid:
            self.abandon("its parent, process %d, has ended" % self._parent_pid)
        elif self._parent_pid:
            waits.append(1.0)
        if self._orphan_timeout:
            if self.channels.subscribers or self.running is not None:
                self._alone_since = now
            elif now - self._alone_since > self._orphan_timeout:
                self.abandon("nobody was connected for %.0f s" % self._orphan_timeout)
            waits.append(max(0.0, self._alone_since + self._orphan_timeout - now) + 0.1)
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def watch_parent(self, pid: int) -> None:
        """End when the process that started us does; before the channels start."""
        try:
            descriptor = os.pidfd_open(pid)         # it wakes poll(): nothing to look at once a second
        except ProcessLookupError:
            if os.getppid() == 1:
                self.abandon("its parent, process %d, has ended" % pid)
            return              # a process number of another container: then there is nothing to watch
        except (AttributeError, OSError):
            self._parent_pid = os.getppid() if os.getppid() != 1 else 0
            return
        self.channels.watch(descriptor, lambda: self.abandon("its parent, process %d, has ended" % pid))

    def _end_hard(self) -> float:
        """The cell did not react to its interrupt, or a function registered with atexit hangs: go without it.

        Returns when to look again.
        """
        if self._exit_at is None:
            logger.warning("ending (%s) although a cell still runs", self.ending)
            # On a busy machine the cell may end in this very moment, and main finish: the lock decides between the
            # two, and the exit functions have their time from when it was taken.
            own_thread("twoproc-end", self.finish)
            self._end_at = time.monotonic() + EXIT_SECONDS
            return self._end_at
        logger.warning("ending (%s) although an exit function still runs, or the history is still written", self.ending)
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(self.stderr)        # which one, is asked afterwards
        with contextlib.suppress(Exception):
            self._put_away()
        os._exit(self.exit_status)

    def _put_away(self) -> None:
        """The last thing of all: close the log, remove the files."""
        if self.log is not None and self.is_abandoned:
            self.log.note("abandoned", why=self.ending)
        elif self.log is not None:
            self.log.close(self.ending or "", keep=self.ending == "restart")
        self.tidy()

    def _read_capture(self, parent: bytes | None, mark: dict[str, int]) -> list:
        """Entries for the front of the outbox: what was written to the descriptors before `mark` was taken."""
        self._is_reading_asked = False
        header = self.parent_bytes() if parent is None else parent
        entries: list = [Text(name, text, header) for name, text in self.capture.read(mark)]
        if entries:
            entries.append(functools.partial(self._read_capture, header, mark))
        return entries

    # -- run by any thread

    @contextlib.contextmanager
    def answering(self, message: Message):  # type: ignore[no-untyped-def]
        """busy, then whatever the handler says, then idle: around every request but a cell."""
        self.status("busy", message)
        try:
            yield
        finally:
            self.idle(message)

    def idle(self, message: Message) -> None:
        self.status("idle", message)
        running = self.running
        if running is not None and running is not message:
            # A client may read any idle as "the kernel is idle"; the cell that runs says otherwise.
            self.status("busy", running)

    def status(self, state: str, message: Message) -> None:
        self.channels.send("iopub", "status", b'{"execution_state":"%s"}' % state.encode(), message.header_bytes)

    def reply(self, message: Message, msg_type: str, content: dict, channel: str = "shell") -> None:
        try:
            data = encode(content)
        except Exception as error:      # in what the user's objects gave us is something that is not JSON
            content = {"status": "error", "ename": type(error).__name__, "evalue": str(error), "traceback": []}
            if msg_type == "execute_reply":
                content["execution_count"] = self.execution_count
            data = encode(content)
        if msg_type == "execute_reply":
            self._replies.note_reply(message, data)
        elif message.user and self.channels.access is not None:
            try:
                self.channels.access.charge(message.user, len(data))
            except RateLimited as error:
                data = encode({"status": "error", "ename": "RateLimited", "evalue": str(error), "traceback": []})
        self.channels.send(channel, msg_type, data, message.header_bytes, identities=self._replies.route(message))

    def publish(self, msg_type: str, content: dict, metadata: dict | None = None, buffers: Any = (),
                parent: Message | None = None) -> None:
        """Tell everybody; the parent is the cell that the calling thread works for."""
        if os.getpid() != self.process:         # a child of fork can but write
            text = "\n".join(content.get("traceback", ())) or content.get("data", {}).get("text/plain")
            if isinstance(text, str) and text:
                print(text, file=sys.stderr if msg_type == "error" else sys.stdout)
            return
        if parent is None:
            self.before_write()
        header = self.parent_bytes() if parent is None else parent.header_bytes
        self.channels.send("iopub", msg_type, content, header, metadata, buffers or ())

    def parent_bytes(self) -> bytes:
        parent = self.interpreter.current_parent() if self.interpreter is not None else self.running
        return b"{}" if parent is None else parent.header_bytes

    def write_stream(self, name: str, text: str) -> None:
        self.channels.write(name, text, self.parent_bytes())

    def before_write(self) -> None:
        """Python is about to say something: what a child or C wrote before belongs in front of it."""
        if self.capture.has_grown():
            self.call_to_read_capture(self.parent_bytes())

    def call_to_read_capture(self, parent: bytes | None) -> None:
        """Have twoproc-io publish, behind all that is queued, what was written to the descriptors until now."""
        self.channels.call(functools.partial(self._read_capture, parent, self.capture.mark()))

    @property
    def execution_count(self) -> int:
        return self.interpreter.execution_count if self.interpreter is not None else 0

    # -- run by twoproc-helper

    def answer(self, message: Message) -> dict:
        """The content of the reply to a request that looks at the interpreter and changes nothing."""
        return self.BY_HELPER[message.msg_type](self.interpreter, message.content)

    BY_HELPER: dict[str, Callable[[Any, dict], dict]] = {
        "complete_request": lambda shell, content: shell.complete(content["code"], content["cursor_pos"]),
        "inspect_request": lambda shell, content: shell.inspect(
            content["code"], content["cursor_pos"], content["detail_level"]),
        "is_complete_request": lambda shell, content: shell.is_complete(content["code"]),
        "history_request": lambda shell, content: shell.history(content),
        "comm_info_request": lambda shell, content: shell.comm_info(content["target_name"])}

    # -- run by main

    def run(self, make_interpreter: Callable[[Kernel], Interpreter]) -> None:
        """Serve until told to end.  The channels are already started."""
        self.interpreter = make_interpreter(self)
        self.interpreter.on_await = self.handle_comms
        self._helpers.start()
        while self.ending is None:
            try:
                message = self._next_request()
                if message is not None and message.msg_type == "execute_request":
                    self.execute_request(message)
                elif message is not None:
                    self.comm(message)
            except BaseException as error:      # by the user's handler of a signal that came between two cells
                if self.running is not None:
                    raise
                tell(error)
            if os.getpid() != self.process:
                self._end_child()

    def _next_request(self) -> Message | None:
        """The next cell or comm message; None when there is another reason to look around."""
        interpreter, requests = self.interpreter, self.channels.requests
        assert interpreter is not None
        try:
            if requests:
                return requests.pop()
            if interpreter.inputhook is None and not interpreter.has_pending_tasks():
                return requests.get(timeout=1.0 if interpreter.has_unwritten_history() else None)
            self._run_alone(lambda: interpreter.wait_for(requests))
            requests.silence()
        except Empty:
            interpreter.write_history()
        return None

    def execute_request(self, message: Message) -> None:
        """Run a cell.  Source: messaging specification, "Execute"."""
        assert self.interpreter is not None
        if not self._may_still_run(message):
            with self.answering(message):
                self.reply(message, "execute_reply", {"status": "aborted"})
            return
        content = message.content
        self.running = message
        self._cells += 1
        self.channels.busy_parent = message.header_bytes
        self.interpreter.set_parent(message)
        is_stored = content["store_history"] and not content["silent"]
        is_logged = self.log is not None and is_stored
        if is_stored and not is_private(content["code"]):
            first, _, rest = content["code"].strip().partition("\n")
            self.last_input = first[:LAST_INPUT_CHARS] + ("..." if rest or len(first) > LAST_INPUT_CHARS else "")
        if is_logged:       # on disk before anybody hears of it
            self._log_begin(message.header_bytes, message.msg_id, content["code"], message.metadata.get("cellId"))
        began = time.monotonic()
        self.status("busy", message)
        if not content["silent"]:
            self.publish("execute_input", {"code": content["code"], "execution_count": self.execution_count},
                         parent=message)
            if content["store_history"]:        # else it is a frontend's own, and nobody looks
                self._publish_notice(message)
                self._tell_log_warning(message)
        reply = self.interpreter.execute(content["code"], content["silent"], is_stored, content["user_expressions"],
                                         message.metadata.get("cellId"), self.run_user_code)
        if os.getpid() != self.process:
            self.exit_status = int(reply["status"] == "error")
            return
        self.call_to_read_capture(message.header_bytes)
        if is_logged:
            self._log_end(message.header_bytes, reply["status"] == "ok", time.monotonic() - began)
        self.running = None
        self.channels.busy_parent = None
        if reply["status"] == "error" and content["stop_on_error"] and not content["silent"]:
            self._reply_and_abort(message, reply)
        else:
            self.reply(message, "execute_reply", reply)
            self.status("idle", message)
        if any(payload.get("source") == "ask_exit" and not payload.get("keepkernel")
               for payload in reply.get("payload", ())):
            self._leave_if_alone()

    def _may_still_run(self, message: Message) -> bool:
        """False for what was waiting here when the key that sent it was withdrawn."""
        return self.channels.rights(message.user) in ("run", "admin")

    def _log_begin(self, parent: bytes, msg_id: str, code: str, cell_id: Any = None) -> None:
        assert self.log is not None
        if is_private(code):
            self.log.begin_private(parent, msg_id, code, self.execution_count)
        else:
            file = os.environ.get("IPYKERNEL_CELL_NAME") or "<ipython-input-%d-" % self.execution_count
            self.log.begin(parent, msg_id, code, self.execution_count,
                           cell_id if isinstance(cell_id, str) else None, file)

    def _log_end(self, parent: bytes, ok: bool, seconds: float) -> None:
        """Behind the output of the cell and before its reply."""
        log, channels = self.log, self.channels
        assert log is not None
        channels.call(lambda: log.end(parent, ok, seconds, channels.published + 1))

    def _publish_notice(self, message: Message) -> None:
        if self.notice is not None and not self._is_notice_told:
            (text, html), self._is_notice_told = self.notice, True
            if self.log is not None:
                self.log.is_prev_told = True
            self.publish("display_data", {"data": {"text/plain": text, "text/html": html}, "metadata": {},
                                          "transient": {}}, parent=message)

    def _tell_log_warning(self, message: Message) -> None:
        text, self.log_warning = self.log_warning, ""
        if text and self.log is not None and not self.log.is_on:     # else this cell's begin could be written
            self.channels.write("stderr", text, message.header_bytes)

    def recover(self, line: str) -> None:
        """The magic %recover: what is done with the session before this one, if that was not closed properly."""
        from . import recovery
        recovery.recover(line, self.log, self._run_recovered, print)

    def _run_recovered(self, cell: LoggedCell) -> bool:
        """Run a cell of another session within the running one; logged as a cell of its own, for it may kill too."""
        assert self.interpreter is not None and cell.code is not None
        if self.log is None:
            return self.interpreter.run_within(cell.code)
        header, code = self.channels.session.header("execute_request"), cell.code
        # By twoproc-io: Ctrl-C raises here, and must not do so between a record and the note of its length.
        is_begun: SimpleQueue[None] = SimpleQueue()

        def begin() -> None:
            self._log_begin(header, json.loads(header)["msg_id"], code)
            is_begun.put(None)
        self.channels.call(begin)
        began, is_done = time.monotonic(), False
        try:
            is_begun.get()
            is_done = self.interpreter.run_within(code)
        finally:
            self._log_end(header, is_done, time.monotonic() - began)
        return is_done

    def run_user_code(self, function: Callable[[], Any]) -> Any:
        """Call `function`; while it runs, and only then, SIGINT is KeyboardInterrupt in the main thread.

        signal.default_int_handler, not a function of ours: its frame would stand in every traceback, and
        asyncio.run() handles Ctrl-C itself only where it finds this very handler.  A handler that the
        user's code installs is kept for the following cells.
        """
        if self._runs_user_code:
            return function()
        try:
            self._runs_user_code = True
            set_handler(signal.SIGINT, self._cell_sigint)
            interrupted, self._interrupted = self._interrupted, None
            if self.ending is not None or interrupted is not None and interrupted is self.running:
                raise KeyboardInterrupt
            return function()
        finally:
            # The C function, because the one in signal.py is Python, and within Python Ctrl-C can strike. It may
            # strike once more as this call begins, and then not again.
            try:
                handler = set_handler(signal.SIGINT, self.note_sigint)
            except KeyboardInterrupt:
                handler = set_handler(signal.SIGINT, self.note_sigint)
            self._cell_sigint = signal.default_int_handler if handler in (None, self.note_sigint) else handler
            self._runs_user_code = False
            # An import that Ctrl-C ended within importlib's few lines of Python keeps the import lock (3.10 to
            # 3.14), and every other thread that imports then waits for ever. Only its owner can give it back.
            while _imp.lock_held():
                try:
                    _imp.release_lock()
                except RuntimeError:        # another thread's, who is importing just now
                    break

    def note_sigint(self, number: int, frame: Any) -> None:
        """Ctrl-C while no user code runs: for the cell that is about to run its code, else for nobody."""
        self._interrupted = self.running

    def _run_alone(self, function: Callable[[], Any]) -> None:
        """Run user code that no cell waits for: a task, a widget's handler.  It cannot end the kernel."""
        try:
            self.run_user_code(function)
        except KeyboardInterrupt:
            if self._runs_user_code:        # a cell awaits meanwhile, and it is the one to be ended
                raise
        except BaseException as error:      # SystemExit among them: asyncio lets it through
            tell(error)

    def ask(self, prompt: str, password: bool) -> str:
        """input(): ask the client that sent the running cell, and wait for its answer.

        Raises EOFError when that client answers with an end of file or cannot be asked, KeyboardInterrupt.
        """
        message = self.running
        if self._is_child:          # of fork: the answer would come to the kernel
            raise EOFError
        if message is None or not message.content.get("allow_stdin"):
            from .shell import StdinNotImplementedError
            raise StdinNotImplementedError(NO_INPUT)
        self._asking = asking = Question(message, self.channels.session.header("input_request"),
                                         {"prompt": prompt, "password": password}, SimpleQueue())
        try:
            self.before_write()
            if self.log is not None:
                self.channels.call(functools.partial(self.log.asked, message.header_bytes, prompt, password))
            self._send_question(asking)
            value = asking.answers.get()
        finally:
            self._asking = None
        if value == "\x04":
            raise EOFError
        return value

    def _send_question(self, asking: Question) -> None:
        self.channels.send("stdin", "input_request", asking.content, asking.cell.header_bytes,
                           identities=self._replies.route(asking.cell), header=asking.header)

    def _reply_and_abort(self, message: Message, reply: dict) -> None:
        """Send the error reply, and answer `aborted` what its client had sent before it could know.

        twoproc-io does both in one go: first it takes in what has arrived, then it replies; whatever this
        client sends after reading the reply comes later and runs.  Other clients' requests stay.
        """
        done: SimpleQueue[None] = SimpleQueue()

        def abort() -> None:
            self.channels.receive_shell()
            queued = list(self.channels.requests.take(
                lambda other: other is not None and other.msg_type == "execute_request"
                and self._replies.route(other) == self._replies.route(message)))    # all: a relay has several
            self.reply(message, "execute_reply", reply)
            self.status("idle", message)
            for other in queued:
                with self.answering(other):
                    self.reply(other, "execute_reply", {"status": "aborted"})
            done.put(None)
        self.channels.call(abort)
        done.get()

    def handle_comms(self) -> None:
        """Called by the running loop of a cell: the comm messages that came meanwhile, and nothing else."""
        for message in self.channels.requests.take(
                lambda other: other is not None and other.msg_type != "execute_request"):
            self.comm(message)

    def comm(self, message: Message) -> None:
        """comm_open, comm_msg, comm_close.  A handler of theirs is the user's code."""
        assert self.interpreter is not None
        if not self._may_still_run(message):
            return
        with self.answering(message):
            handle = getattr(self.interpreter, message.msg_type)
            self._run_alone(lambda: handle(message))
            self.call_to_read_capture(message.header_bytes)

    def _leave_if_alone(self) -> None:
        """`exit` in a cell ends the kernel of a Jupyter manager, as its users expect, unless somebody else
        watches too.  Our own frontend decides itself: whoever only joined a kernel leaves without it."""
        if self.ends_on_exit and self.channels.subscribers <= 1 and self._leave_at is None:
            self._leave_at = time.monotonic() + 0.1     # stock clients read replies only while the kernel lives
            self.channels.call(lambda: None)

    def in_child(self) -> None:
        """In a child of fork: keep nothing that is the kernel's, and be ended by a signal as any child is."""
        if self._is_child:          # a child of that child: nothing of ours is left
            return
        self._is_child = True
        if self.claim is not None:
            self.claim.close()
        if self.log is not None:
            self.log.close_in_child()
        set_forked()
        for number in (signal.SIGTERM, signal.SIGHUP):
            if getattr(signal.getsignal(number), "is_ours", False):
                signal.signal(number, signal.SIG_DFL)
        self.channels.close_in_child()
        if self.running is None and self.interpreter is not None and self.interpreter.has_pending_tasks():
            # By a task between two cells: it must not wait beside us for the next request, whose bell would ring once.
            self.interpreter.loop.call_soon(self._end_child)

    def _end_child(self) -> None:
        """A child of fork fell out of its cell: it must not go on as a second kernel."""
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(self.exit_status)

    def finish(self) -> None:
        """Say goodbye and end the process now: exit handlers run, threads of the user are not waited for.

        Run by main; or, when main is stuck in a cell, by a thread of its own, `twoproc-end`.  Only once.
        """
        if not self._finishing.acquire(blocking=False):
            time.sleep(60)          # the other one ends the process
        self._exit_at = time.monotonic() + EXIT_SECONDS
        self.channels.call(lambda: None)
        logger.info("ending: %s", self.ending)
        # Each by itself, and whatever the user's objects do in here, we leave.  The history beside the exit functions:
        # its file may be locked, or on a disk that is slow to sync, and that costs nobody those functions.
        history = own_thread("twoproc-history", self._close_history)
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        self._exit_at = time.monotonic() + EXIT_SECONDS
        history.join()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        self.call_to_read_capture(None)
        if self.running is not None:
            self.status("idle", self.running)
        self._exit_at = time.monotonic() + 60       # stop has a limit of its own, which is not to be taken for this one
        self.channels.stop()
        self._put_away()
        os._exit(self.exit_status)

    def _close_history(self) -> None:
        with contextlib.suppress(Exception):
            if self.interpreter is not None:
                self.interpreter.close()


class Question(NamedTuple):
    """What input() asks, and where its answer goes: none can come to another question."""
    cell: Message
    header: bytes
    content: dict
    answers: SimpleQueue[str]


class Helpers:
    """Threads `twoproc-helper` that answer what may run the user's code for a while: a slow __dir__, a getter.

    One works, in order.  A request that is not answered in time gets an empty reply from twoproc-io, and when
    the thread is stuck in it another takes over, up to LIMIT; the late result is dropped.
    """

    LIMIT = 4
    EMPTY: dict[str, Callable[[dict], dict]] = {
        "complete_request": lambda content: {"status": "ok", "matches": [], "cursor_start": content["cursor_pos"],
                                             "cursor_end": content["cursor_pos"], "metadata": {}},
        "inspect_request": lambda content: {"status": "ok", "found": False, "data": {}, "metadata": {}},
        "is_complete_request": lambda content: {"status": "unknown"},
        "history_request": lambda content: {"status": "ok", "history": []},
        "comm_info_request": lambda content: {"status": "ok", "comms": {}}}

    def __init__(self, kernel: Kernel, seconds: float):
        self._kernel, self._seconds = kernel, seconds
        self._tasks: SimpleQueue[Task] = SimpleQueue()
        self._waiting: list[Task] = []      # twoproc-io's: not yet known to be answered, oldest first
        self._threads = 0
        self._ready = False

    # -- run by main
    def start(self) -> None:
        """The interpreter is there: from now on the clock of each request runs."""
        now = time.monotonic()
        for task in list(self._waiting):
            task.deadline = now + self._seconds
        self._ready = True
        self._add_thread()
        self._kernel.channels.call(lambda: None)        # twoproc-io is to look at the clock

    def _add_thread(self) -> None:
        self._threads += 1
        own_thread("twoproc-helper", self._run)

    # -- run by twoproc-io
    def submit(self, message: Message) -> None:
        task = Task(message, time.monotonic() + self._seconds)
        self._kernel.status("busy", message)
        self._waiting.append(task)
        self._tasks.put(task)

    def expire(self, now: float) -> float | None:
        """Answer what is overdue; returns the seconds until the next may be."""
        waiting = self._waiting = [task for task in self._waiting if not task.is_answered()]
        if not waiting or not self._ready:
            return None
        for task in waiting:
            if now < task.deadline:
                continue
            task.is_replaced = task.is_started and self._threads < self.LIMIT
            if task.claim():
                self._finish(task, self.EMPTY[task.message.msg_type](task.message.content))
                if task.is_replaced:
                    self._add_thread()
        return max(0.0, min(task.deadline for task in waiting) - now)

    # -- run by twoproc-helper
    def _run(self) -> None:
        while True:
            task = self._tasks.get()
            if task.is_answered():
                continue
            task.is_started = True
            try:
                content = self._kernel.answer(task.message)
            except BaseException as error:      # a __dir__ or __getattr__ of the user raised, maybe SystemExit
                content = {"status": "error", "ename": type(error).__name__, "evalue": str(error), "traceback": []}
            if task.claim():
                self._finish(task, content)
            elif task.is_replaced:              # we were late, somebody took our place
                self._threads -= 1
                return

    def _finish(self, task: Task, content: dict) -> None:
        self._kernel.reply(task.message, MESSAGES[task.message.msg_type].reply or "", content)
        self._kernel.idle(task.message)


class Task:
    """A request on its way through a helper thread; `claim` is true for the one who may answer it."""

    def __init__(self, message: Message, deadline: float):
        self.message, self.deadline = message, deadline
        self.is_started = False
        self.is_replaced = False    # twoproc-io's, decided before its claim: the thread that is late may go
        self._once = threading.Lock()
        self.is_answered = self._once.locked

    def claim(self) -> bool:
        return self._once.acquire(blocking=False)


def tell(error: BaseException) -> None:
    """Show an error of user code that no cell waits for, from the user's part of the traceback on.

    Raised again if it has none: a fault of ours would come again and again.
    """
    part = error.__traceback__
    while part is not None and (part.tb_frame.f_globals.get("__package__") or "").startswith((__package__, "zmq")):
        part = part.tb_next
    if part is None and not isinstance(error, KeyboardInterrupt):
        raise error
    sys.excepthook(type(error), error, part)


@functools.lru_cache(maxsize=None)
def kernel_info() -> dict:
    """The content of kernel_info_reply; made without IPython, which may still be on its way."""
    return {
        "status": "ok", "protocol_version": PROTOCOL_VERSION,
        "implementation": "twoproc", "implementation_version": __version__,
        "banner": "twoproc %s -- IPython in two processes\nPython %s" % (__version__, sys.version.replace("\n", "")),
        "language_info": {
            "name": "python", "version": sys.version.split()[0], "mimetype": "text/x-python",
            "file_extension": ".py", "pygments_lexer": "ipython3", "nbconvert_exporter": "python",
            "codemirror_mode": {"name": "ipython", "version": 3}},
        "help_links": [{"text": "Python", "url": "https://docs.python.org/%d.%d" % sys.version_info[:2]},
                       {"text": "IPython", "url": "https://ipython.org/documentation.html"}],
        "debugger": False, "supported_features": ["twoproc resume"]}


class OncePerSecond(logging.Filter):
    """At most one line a second, then how many were left out: a stranger's junk must not fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0
        self._dropped = 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if logging.WARNING <= record.levelno < logging.CRITICAL and now < self._next:      # what ends us is always said
            self._dropped += 1
            return False
        if record.levelno >= logging.WARNING:
            self._next = now + 1.0
        if self._dropped:
            record.msg = "%s (and %d more)" % (record.getMessage(), self._dropped)
            record.args = ()
            self._dropped = 0
        return True


# -- the process

def main(argv: list[str] | None = None) -> int:
    """The command `python -m twoproc.kernel`; returns the exit status, see docs/configuration.md."""
    program = parser()
    arguments, unknown = program.parse_known_args(argv)
    if unknown and not arguments.connection_file:
        program.error("unrecognized arguments: " + " ".join(unknown))
    # Jupyter's programs append what they do not know themselves: `jupyter run` its script, others traits of ipykernel.
    if options := [word for word in unknown if word.startswith("-")]:
        print("%s: ignoring %s" % (program.prog, " ".join(options)), file=sys.stderr)
    try:
        settings = config.load(arguments, {"--transport": ("kernel.transport", arguments.transport),
                                           "--listen": ("network.listen", arguments.listen)})
        if arguments.show_config:
            print(settings.show(), flush=True)
            return 0
        if arguments.install_kernelspec:
            from .launcher import install_kernelspec
            print(install_kernelspec(user=not arguments.prefix, prefix=arguments.prefix, name=arguments.name),
                  flush=True)
            return 0
        if arguments.print_connection is not None:
            from .start import print_connection
            return print_connection(arguments.print_connection, arguments.or_start, arguments.name, arguments.watch,
                                    settings)
        return serve(arguments, settings)
    except BrokenPipeError:
        return connection.leave_stdout()
    except (config.ConfigError, connection.ConnectionFileError) as error:
        try:
            print("twoproc.kernel: %s" % error, file=sys.stderr)
        except OSError:             # a full disk holds our log as well; then the status alone tells
            sys.stderr = None       # type: ignore[assignment]
        return error.exit_code


def parser() -> argparse.ArgumentParser:
    program = argparse.ArgumentParser(prog="python -m %s.kernel" % __package__, description="Run an IPython kernel.")
    program.add_argument("-f", "--f", dest="connection_file", metavar="FILE",
                         help="the connection file; made if it does not exist")
    program.add_argument("--name", help="a name to join the kernel by (default: an animal and a number)")
    program.add_argument("--transport", choices=("ipc", "tcp"), help="how to be reached on this machine")
    program.add_argument("--listen", metavar="HOST[:PORT]",
                         help="be reached from other machines too, by those whose keys are authorised")
    program.add_argument("--profile-dir", metavar="DIR", help="the IPython profile (default: profile_default)")
    program.add_argument("--orphan-timeout", type=float, default=0, metavar="SECONDS",
                         help="end after so long without any client (default: never)")
    program.add_argument("--install-kernelspec", action="store_true", help="make Jupyter know this kernel, and exit")
    program.add_argument("--prefix", metavar="DIR", help="install the kernelspec below DIR, not for the user alone")
    program.add_argument("--print-connection", metavar="NAME", nargs="?", const="",
                         help="write the connection file of your newest running kernel, or of this one, to a pipe")
    program.add_argument("--or-start", action="store_true",
                         help="with --print-connection: start a kernel if none runs, or one called --name")
    program.add_argument("--watch", action="store_true",
                         help="with --print-connection: say when it ends, until standard input does")
    program.add_argument("--version", action="version", version="twoproc %s" % __version__)
    config.add_arguments(program)
    return program


def serve(arguments: argparse.Namespace, settings: config.Settings) -> int:
    """Bind, announce, run, tidy up.  The connection file is written when everything listens, never before."""
    is_given = bool(arguments.connection_file) and os.path.lexists(arguments.connection_file)
    path, info = choose_connection(arguments, settings)
    megabyte = 1 << 20
    limits = Limits(
        settings["limits.max_frame_mb"] * megabyte, settings["limits.max_frames"],
        settings["limits.max_message_mb"] * megabyte, settings["limits.stream_chunk_kb"] << 10,
        settings["limits.iopub_queue"], settings["limits.slow_reader_seconds"], settings["limits.replay_memory"],
        settings["limits.outbox_mb"] * megabyte)
    warnings = connection.check_listening(info)
    info, access, listen = who_may_connect(info, settings)
    claim = connection.Claim(path)
    try:
        channels = KernelChannels(info, limits, access, listen)
    except BaseException:
        claim.release()         # a manager's file stays where it is
        raise
    kernel = Kernel(channels, settings["kernel.completion_seconds"], arguments.orphan_timeout)

    def tidy() -> None:
        if kernel.ending != "restart":
            connection.remove_files(path, info)
        claim.release()
    kernel.tidy, kernel.claim = tidy, claim
    try:
        kernel.ends_on_exit = is_given and "twoproc_pid" not in info.extra      # a file that we wrote has it
        extra = {**channels.info.extra, "twoproc_pid": os.getpid()}
        if listen is not None:
            extra["twoproc_listen"] = connection.address(listen.host, channels.listening or 0)
        info, kernel.name = channels.info._replace(extra=extra), connection.kernel_name_of(path)
        if settings["recovery.log"]:
            kernel.use_log(make_log(kernel, settings, path))
        parent = os.environ.get("JPY_PARENT_PID", "")
        if parent.isdigit() and int(parent) > 0:
            kernel.watch_parent(int(parent))
        set_signals(kernel)
        kernel.channels.start()
        connection.write_connection_file(path, info)
        if settings["kernel.publish_jupyter"]:
            connection.publish_to_jupyter(path, info)
        if listen is not None:
            announce(kernel, extra["twoproc_listen"])
        if not arguments.connection_file and sys.stderr is not None and sys.stderr.isatty():
            print("kernel %s is ready; join it with  python -m %s.frontend --existing %s  and end it with  kill %d  "
                  "(Ctrl-C is for its cells)" % (kernel.name, __package__, kernel.name, os.getpid()), file=sys.stderr)
        kernel.stderr = kernel.capture.start()
        start_log(kernel.stderr)
        for warning in [claim.note, *warnings]:
            if warning:
                logger.warning(warning)
        kernel.run(lambda kernel: make_interpreter(kernel, arguments, path, settings["recovery.notice"]))
    except BaseException:
        kernel.note_fault()
        tidy()
        if kernel.interpreter is not None:      # threads of the user would keep what looks alive and runs nothing
            logger.critical("a fault of twoproc's own ended the main thread, and with it the kernel", exc_info=True)
            os._exit(EXIT_FAULT)
        raise
    kernel.finish()
    return kernel.exit_status


def who_may_connect(info: connection.ConnectionInfo, settings: config.Settings) \
        -> tuple[connection.ConnectionInfo, Access | None, Listen | None]:
    """The connection with the keys it shows, whom it lets in, and where it listens to other machines.

    Raises ConnectionFileError, exit code 5, where strangers could come in.
    """
    log_path = None
    if settings["log.access_log"]:
        with contextlib.suppress(crashlog.StateError):      # the session log says what is wrong with the folder
            log_path = os.path.join(crashlog.state_folder(), "access.log")
    access_log = AccessLog(log_path, settings["log.access_log_mb"] << 20)
    is_own = info.transport == "ipc" and info.curve_publickey is None       # else a manager chose how it is reached
    if not is_own and settings.origin("network.listen") == "--listen":
        raise connection.ConnectionFileError("a kernel that listens to other machines makes its own connection file; "
                                             "start it without --transport tcp and without a file of others")
    if not settings["network.listen"] or not is_own:
        if info.transport != "ipc" and info.curve_publickey is None:
            return info, None, None         # of a connection by loopback nothing is known, not even the user
        own = connection.hex_of(info.curve_publickey) if info.curve_publickey else None
        return info, Access(None, own, info.transport != "ipc", access_log, 0), None
    # Strangers may not use up the descriptors that cells need; the first 128 are those of the kernel itself.
    most = max(1, (raise_descriptor_limit() - 128) // len(connection.CHANNELS))
    listen = Listen(*connection.parse_listen(settings["network.listen"], settings["network.port_base"],
                                             settings["network.port_slots"]),
                    settings["network.handshake_seconds"], min(settings["network.max_connections"], most))
    check_curve()
    from . import keys
    host_key, authorized = settings["auth.host_key"], AuthorizedKeys(settings["auth.authorized_keys"])
    try:
        host = keys.load_pair(host_key)
    except FileNotFoundError:
        host = None
    missing = [] if host is not None else [
        "no host key in %s: run  python -m %s.keys new --host" % (host_key, __package__)]
    if not os.path.lexists(authorized.path) or not authorized.current():
        missing.append("nobody's key in %s: run  python -m %s.keys authorize LINE  for the line that each user's  "
                       "keys new  has printed" % (authorized.path, __package__))
    if host is None or missing:
        raise connection.ConnectionFileError("listen = %s: %s" % (
            settings["network.listen"], ", and ".join(missing)), 5)
    info = info._replace(curve_publickey=connection.z85_of(host.public),
                         curve_secretkey=connection.z85_of(host.secret))
    return info, Access(authorized, host.public, False, access_log, settings["limits.requests_per_second"]), listen


def raise_descriptor_limit(wanted: int = 8192) -> int:
    """How many files and sockets this process may have open from now on.

    ZeroMQ accepts what knocks faster than twoproc-admission can cut it, and in between cells open files.
    """
    try:
        import resource
    except ImportError:         # Windows
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (wanted, hard):
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                return limit
    return wanted if soft == resource.RLIM_INFINITY else soft


def announce(kernel: Kernel, address: str) -> None:
    """Where we listen, for whoever started us and for the access log."""
    access, listen = kernel.channels.access, kernel.channels.listen
    assert access is not None and access.keys is not None and listen is not None
    access.log.note("listen", name=kernel.name, address=address)
    host = listen.host
    if host in ("0.0.0.0", "::"):       # any address of this machine, whose name others may know
        import socket
        host = socket.gethostname()
    print("kernel %s listens at %s for the keys in %s; join it with  python -m %s.frontend --connect "
          "twoproc://%s/%s" % (kernel.name, address, access.keys.path, __package__,
                               connection.address(host, kernel.channels.listening or 0).removeprefix("tcp://"),
                               access.own_key), file=sys.stderr)


def make_log(kernel: Kernel, settings: config.Settings, path: str) -> SessionLog:
    """The log of this session."""
    def warn(text: str) -> None:
        """Once, in the log of the process and where the user looks."""
        logger.warning(text)
        text = "twoproc: %s\n" % text
        if kernel.interpreter is None:
            kernel.log_warning = text
        else:
            kernel.channels.write_first("stderr", text, kernel.parent_bytes())

    limits = crashlog.Limits(
        settings["recovery.max_output_per_cell_kb"] << 10, settings["recovery.max_log_mb"] << 20,
        settings["recovery.backlog_mb"] << 20, settings["recovery.fsync"], settings["recovery.keep_crashed"],
        settings["recovery.keep_days"], settings["recovery.keep_closed"])
    return SessionLog(path, limits, warn)


def choose_connection(arguments: argparse.Namespace,
                      settings: config.Settings) -> tuple[str, connection.ConnectionInfo]:
    """What is in the file that we were given, else something new."""
    path = arguments.connection_file
    if path and os.path.lexists(path):
        return os.path.abspath(path), connection.read_connection_file(path, as_kernel=True)
    if path and not os.path.dirname(path):
        path = os.path.join(connection.jupyter_runtime_folder(), path)
    return connection.new_connection(settings["kernel.transport"], arguments.name, path)


def look_for_signals(number: int, frame: Any) -> None:
    """The handler of SIGURG: that a signal came is all there is to it."""


def set_signals(kernel: Kernel) -> None:
    """SIGINT is dropped until a cell runs, also where we inherited that it be ignored (`sh -c '... &'`).

    SIGTERM and SIGHUP end the kernel as a shutdown does; the exit status is 128 + the signal's number.
    """
    def end(number: int, frame: Any) -> None:
        if os.getpid() != kernel.process:       # a child just forked; see in_child
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        kernel.end(signal.Signals(number).name, 128 + number)
    end.is_ours = True      # type: ignore[attr-defined]    # for in_child
    signal.signal(signal.SIGINT, kernel.note_sigint)
    tell = sys.unraisablehook

    def unraisable(found: Any) -> None:
        # Ctrl-C in a finalizer, or in a weak reference's callback, ends that and nothing else: the cell goes on.
        # The garbage collector calls them anywhere; a loop of prints met it once in 400 interrupts.
        if found.exc_type is KeyboardInterrupt and os.getpid() == kernel.process:
            kernel.interrupt_again()
        else:
            tell(found)
    sys.unraisablehook = unraisable
    if hasattr(signal, "SIGURG") and signal.getsignal(signal.SIGURG) is signal.SIG_DFL:
        signal.signal(signal.SIGURG, look_for_signals)
    signal.signal(signal.SIGTERM, end)
    if hasattr(signal, "pthread_sigmask"):      # and where whoever started us blocked them, from a thread perhaps
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, end)
    # In a child these wait until in_child has been there: Python forgets in a child what its handlers have noted.
    masks = threading.local()

    def before_fork() -> None:
        masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})

    def after_fork() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.before)

    def after_in_child() -> None:
        kernel.in_child()
        after_fork()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before_fork, after_in_parent=after_fork, after_in_child=after_in_child)
    sys.setswitchinterval(0.0005)       # a request during a busy loop is answered in 1.6 instead of 13 ms


def start_log(stream: Any) -> None:
    """The kernel's own log goes to the stderr it was started with, never into a cell's output."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s twoproc.kernel: %(message)s"))
    handler.addFilter(OncePerSecond())
    # It would be told on sys.stderr, which is a cell's: a disk that is full may hold both this log and that of the
    # session, and the cell's user is to hear of it once.
    handler.handleError = lambda record: None       # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.propagate = False


def make_interpreter(kernel: Kernel, arguments: argparse.Namespace, path: str, is_notice_wanted: bool) -> Interpreter:
    """Import IPython: half of the time it takes to start.  Meanwhile twoproc-io answers already."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, OutStream(name, descriptor, functools.partial(kernel.write_stream, name),
                                     kernel.before_write))
    sys.stdin = InStream(kernel.ask)
    from .shell import Interpreter
    interpreter = Interpreter(kernel.publish, kernel.ask, profile_dir=arguments.profile_dir)
    interpreter.connection_file, interpreter.recover = path, kernel.recover
    if kernel.log is not None:
        kernel.log.open(sys.modules["IPython"].__version__)
        kernel.log.start_sync(own_thread)
        before = kernel.log.prev
        if is_notice_wanted and before is not None and before.state() == "died" and not any(
                record["k"] == "recovered" for record in before.outline()):
            from . import recovery
            kernel.notice = recovery.notice(before)     # reads that whole log: not where a client waits for us to start
    return interpreter


if __name__ == "__main__":
    connection.leave_current_folder()
    sys.exit(main())
