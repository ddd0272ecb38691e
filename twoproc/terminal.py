# Distributed under the terms of the BSD 3-Clause License.
"""The terminal: a prompt by prompt_toolkit in front of a kernel in another process.

    main              reads the user, writes the screen, and decides; nobody else does any of these
    twoproc-client    hears the kernel (client.py) and puts what it hears into the Inbox
    twoproc-connect   lives for a moment as we start: finds the kernel while the prompt is already up

Main waits in one of two places: in prompt_toolkit while a prompt is up, in Inbox.get while our cell runs.  In
both it empties the same Inbox, so messages keep their order and one thread owns the cursor.  Beside a prompt
the text goes above it: erase the prompt, write, draw it again, with what the user has half typed.

SIGINT is caught and put into the Inbox as well: KeyboardInterrupt is never born in this process except out of
a Ctrl-C key at a prompt, so no half-done line of ours is ever torn.

This module imports prompt_toolkit; frontend.py imports this module only on a terminal.
"""
from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any
from collections.abc import Callable

from prompt_toolkit import PromptSession
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input.typeahead import get_typeahead
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.lexers import Lexer

from . import connection, death, discovery, screen
from .client import END_OF_INPUT, Client, KernelDied
from .launcher import LaunchError
from .painter import Painter, one_line
from .prompt import Invisible, Prompt, is_allowed, lexer_of, question_keys
from .session import Message, timestamp
from .start import banner

# A second Ctrl-C within this time says that the first one did not help.
INSISTING_SECONDS = 2.0
# How long after Ctrl-C we keep what still arrives from the screen; a cell that goes on after that is shown again.
MUFFLED_SECONDS = 1.0
# Whoever was heard of this long ago counts as still there, at a kernel that does not say how many are.
PRESENCE_SECONDS = 600.0
WRITE_CHARS = 1 << 15       # between two looks for Ctrl-C while much is written
SHOWN_BYTES = 1 << 20       # of the log, at most, when the user asks for it
REDRAW_SECONDS = 0.03       # so long output above a prompt waits for more: each time the prompt is drawn again


class Inbox:
    """What other threads and signal handlers tell main.  `put` never waits and may be called by anybody.

    SimpleQueue, because a signal handler may strike inside any other's put().
    """

    def __init__(self) -> None:
        self._items: queue.SimpleQueue = queue.SimpleQueue()
        self.wake: Callable[[], None] | None = None     # set by main while prompt_toolkit's loop runs

    def put(self, kind: str, *values: Any) -> None:
        self._items.put((kind, *values))
        wake = self.wake
        if wake is not None:
            wake()

    def get(self, timeout: float | None = None) -> list[tuple]:
        """All there is, after waiting for the first; [] if the time is over."""
        items = []
        try:
            items.append(self._items.get(timeout=timeout))
            while True:
                items.append(self._items.get_nowait())
        except queue.Empty:
            return items


class Cell:
    """Our request that runs, or waits its turn."""

    def __init__(self, pending: Any, count: int | None):
        self.pending = pending
        self.count: Any = count         # execution_count; None while it waits behind somebody else's cell
        self.reply: Message | None = None
        self.replied_at = 0.0
        self.is_begun = False           # the kernel was heard to run it
        self.is_told = False            # its error was published; the reply holds it once more
        self.is_idle = False
        self.interrupted_at: float | None = None
        self.lost: str | None = None    # the kernel's cause of death


class Terminal:
    """One user, one terminal, one kernel at a time.

    start: a start.Start.  new_start: returns that of another kernel, by its name, or for None of a fresh one.
    keep: leaving never ends the kernel.  source: a frontend.Source to run before the first prompt.
    """

    def __init__(self, start: Any, settings: Any, *, new_start: Callable[[str | None], Any], keep: bool = False,
                 is_quiet: bool = False, source: Any = None):
        self.settings = settings
        self.start, self.new_start = start, new_start
        self.keep, self.is_quiet, self.source = keep, is_quiet, source
        self.inbox = Inbox()
        self.client: Client | None = None
        self.exit_code: int | None = None
        self.cell: Cell | None = None
        self.is_called_off = False          # Ctrl-C since the last prompt
        self.busy: tuple[str, str, Any, float] | None = None    # msg_id, who, count, since: somebody else's cell
        self.others: dict[str, tuple[str, float]] = {}          # session -> name, when last heard of
        self.died: str | None = None        # the cause, from the death of the kernel until it is replaced
        self.dead: death.Obituary | None = None     # what its log says about that, if it has one
        self.lost = ""                      # what to say about the running cell if there is no log
        self._is_death_told = False
        self.next_input: Document | None = None
        self.actions: list[Callable[[], None]] = []     # what main does next, instead of asking for input
        self.connect_error: Exception | None = None
        self.is_settled = False             # the kernel was found, or was not
        self._has_looked_back = False       # for sessions that ended badly before
        self._early: list[tuple[Client, Message, bool]] = []    # heard before the client was ready
        self._interrupts = 0                # SIGINTs so far
        self._app: Any = None
        colors = settings["frontend.colors"] != "off" and not os.environ.get("NO_COLOR")
        images = screen.image_protocol(dict(os.environ)) if settings["frontend.images"] == "auto" else None
        self.painter = Painter(colors, shutil.get_terminal_size, images,
                               settings["frontend.raw_escapes"], settings["frontend.other_output"])
        self.answers = InMemoryHistory()
        self.prompt = Prompt(settings, colors, lambda: None if self.died is not None else self.client, self.inbox.put)
        self.session = self.prompt.session
        self.session.app.before_render += self._draw_toolbar

    @property
    def process(self) -> Any:
        """The launcher.KernelProcess of a kernel that we started, else None."""
        return self.start.process

    @property
    def name(self) -> str:
        return self.start.name

    # -- the life of the program

    def run(self) -> int:
        """Until the user leaves; returns the exit code."""
        self._catch_signals()
        for line in [] if self.is_quiet else banner(self.start):
            self.painter.say(line)
        self._write(self.painter.take())
        self.connect()
        if self.process is None:
            # Somebody else's kernel: its prompt number is worth waiting for; one that is slow is not.
            self.pump_until(lambda: self.is_settled, 1.0)
        if self.source is not None and self._wait_client():
            if self.prompt.language == "python" and is_allowed(self.client.rights, "run"):
                self.client.execute(self.source.prelude(), silent=True)
            self.run_cell(self.source.code)
        while self.exit_code is None:
            if self.actions:
                self.actions.pop(0)()
                continue
            text = self.ask_cell()
            if text is not None and text.strip():
                self.pump(0)        # somebody may have come a moment ago
                self.submit(text)
        self._forget_dead()
        if self.client is not None:
            self.client.close(timeout=0.5)
        return self.exit_code

    def _catch_signals(self) -> None:
        def interrupt(*_: Any) -> None:
            self._interrupts += 1
            self.inbox.put("interrupt")
        signal.signal(signal.SIGINT, interrupt)
        # The kernel outlives a lost terminal: losing work is worse than an orphan, and --list shows it.
        for number in (signal.SIGQUIT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.inbox.put("detach"))

    def connect(self) -> None:
        """Find the kernel in a thread; "ready" or "failed" comes into the inbox."""
        if self.client is not None:
            self.client.close(0.5)
        if self.cell is not None:
            self.cell.lost = "restarted"
        self.client, self.connect_error, self.died, self.busy = None, None, None, None
        self.prompt.count, self.is_settled, self._is_death_told = 1, False, False
        self.others.clear()
        threading.Thread(target=self._connect, args=(self.start,), name="twoproc-connect", daemon=True).start()

    def _connect(self, start: Any) -> None:
        """Run by twoproc-connect."""
        client = None
        try:
            client = Client(start.wait())
            start.attend(client, functools.partial(self.inbox.put, "say"))
            client.catch_up(lambda message, is_past: self.inbox.put("iopub", client, message, is_past),
                            self.settings["frontend.catch_up"] if start.process is None else 0)
            client.watch(lambda state: self.inbox.put(state, client) if state in ("died", "alive") else None)
            info = client.wait_ready().content
            language = info.get("language_info") or {}
            entries: list = []
            if start.process is None:
                with contextlib.suppress(TimeoutError):
                    entries = client.history("range", session=0, start=1, timeout=1.0).content.get("history") or []
            count = max((entry[1] for entry in entries), default=0) + 1
            self.inbox.put("ready", start, client, str(language.get("name") or "python").lower(), count)
            # All that follows can be done without for a moment.
            lexer = lexer_of(language)
            with contextlib.suppress(TimeoutError):
                entries[:0] = client.history("tail", n=1000, timeout=2.0).content.get("history") or []
            news = "" if self._has_looked_back else death.news()
            self._has_looked_back = True
            self.inbox.put("details", client, lexer, [entry[2] for entry in entries], news)
        except Exception as error:      # whatever it is, main shows it in one line and says what can be done
            if client is None or client is not self.client:
                self.inbox.put("failed", start, error)
            if client is not None and client is not self.client:
                client.close(0)

    # -- what comes out of the inbox

    def pump(self, timeout: float | None) -> None:
        """Wait for news, handle it, and show it.  Main, while no prompt is up."""
        items = self.inbox.get(timeout)
        if not items:
            self.painter.flush_old_lines()
        self._handle(items)
        self._write(self.painter.take())

    def pump_until(self, predicate: Callable[[], bool], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not predicate() and self.exit_code is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.pump(left)
        return True

    def _handle(self, items: list[tuple]) -> None:
        messages: list = []
        for kind, *values in items:
            if kind == "iopub":
                client, message, is_past = values
                if client is self.client:
                    self._note_message(message)
                    messages.append((message, self._speaker(message)))
                    if message.msg_type == "status" and self._is_mine(message):
                        self.painter.show(messages)
                        messages = []
                elif self.client is None:
                    self._early.append((client, message, is_past))
                continue
            self.painter.show(messages)
            messages = []
            getattr(self, "handle_" + kind)(*values)
        self.painter.show(messages)

    def _is_mine(self, message: Message) -> bool:
        return self.cell is not None and message.parent_header.get("msg_id") == self.cell.pending.msg_id

    def _speaker(self, message: Message) -> str | None:
        """None for us, and for what the kernel says by itself; else the name of who caused it."""
        session = message.parent_header.get("session")
        if not session or self.client is None or session == self.client.session:
            return None
        return _name_of(message)

    def _show_past(self, messages: list[Message]) -> None:
        """What was before we came, between two rules; a cell that runs is not past, and goes on below them."""
        ended = {message.parent_header.get("msg_id") for message in messages if message.msg_type == "status"}
        begun = [number for number, message in enumerate(messages) if message.msg_type == "execute_input"]
        at = len(messages)
        if begun and messages[begun[-1]].parent_header.get("msg_id") not in ended:
            at = begun[-1]
        for message in messages:
            self._note_message(message, is_past=True)
        if at:
            self.painter.say(self.painter.dim("-- earlier --"))
            self._show_by_name(messages[:at])
            self.painter.say(self.painter.dim("-- now --"))
        self._show_by_name(messages[at:])

    def _show_by_name(self, messages: list[Message]) -> None:
        self.painter.show([(message, _name_of(message)) for message in messages])
        self.painter.flush_lines()

    def _note_message(self, message: Message, is_past: bool = False) -> None:
        """Who is there, who is busy, which number comes next."""
        who = self._speaker(message)
        parent = message.parent_header
        # By the kernel's clock only for what is past: it may run on another machine.
        said = max(0.0, timestamp(message.header.get("date"))) if is_past else time.time()
        if who is not None:
            self.others[str(parent.get("session"))] = who, said
        state = message.content.get("execution_state") if message.msg_type == "status" else None
        if message.msg_type == "execute_input":
            count = message.content.get("execution_count")
            if type(count) is int:      # what is past may end before the newest, which is not in the log if private
                self.prompt.count = max(count + 1, self.prompt.count if is_past else 0)
            if self._is_mine(message):
                self.cell.count, self.cell.is_begun = count, True
            elif who is not None:
                self.busy = str(parent.get("msg_id")), who, count, said
                self.prompt.history.hear(str(message.content.get("code", "")))
        elif message.msg_type == "error" and self._is_mine(message):
            self.cell.is_told = True
        elif state == "idle":
            if self._is_mine(message):
                self.cell.is_idle = True
            elif self.busy is not None and self.busy[0] == parent.get("msg_id"):
                self.busy = None
                self.painter.flush_lines()

    def handle_ready(self, start: Any, client: Client, language: str, count: int) -> None:
        if start is not self.start:
            client.close(0)
            return
        self.client, self.is_settled = client, True
        self.prompt.language, self.prompt.count = language, max(self.prompt.count, count)
        early, self._early = [entry for entry in self._early if entry[0] is client], []
        self._show_past([message for _, message, is_past in early if is_past])
        self._handle([("iopub", *entry) for entry in early if not entry[2]])

    def handle_details(self, client: Client, lexer: Lexer, inputs: list, news: str) -> None:
        if client is self.client:
            self.prompt.lexer = lexer
            self.prompt.history.merge([entry for entry in inputs if isinstance(entry, str)])
            if news:
                self.painter.say(news)

    def handle_failed(self, start: Any, error: Exception) -> None:
        if start is self.start and self.client is None:
            self.connect_error, self.is_settled = error, True
            self._interrupt_prompt(self._choose_after_failure)

    def handle_message(self, message: Message) -> None:
        """Of our own request: its reply, or a question."""
        if self.cell is None or message.parent_header.get("msg_id") != self.cell.pending.msg_id:
            return
        if message.msg_type == "execute_reply":
            self.cell.reply, self.cell.replied_at = message, time.monotonic()
            self._end_question()
        elif message.msg_type == "input_request":
            self.actions.append(functools.partial(self._answer, message))

    def handle_say(self, line: str) -> None:
        self.painter.say(line)

    def handle_interrupt(self) -> None:
        """SIGINT: Ctrl-C while no prompt is up, or sent by somebody."""
        if self._app is None:
            self.painter.say("")        # the terminal itself has written ^C
            if self.cell is not None:
                self._interrupt_cell()
            self.is_called_off = True

    def handle_detach(self) -> None:
        if self._app is None:
            self.painter.say("")        # the terminal itself has written ^\\
            self.detach()
        else:
            self._interrupt_prompt(self.detach)

    def handle_died(self, client: Client) -> None:
        if client is not self.client or self.died is not None:
            return
        self.died, self.busy = client.died.cause if client.died else "unknown cause", None
        if self.cell is not None:
            self.cell.lost = self.died
            self._end_question()
        elif self._app is self.session.app and self.session.default_buffer.text.strip():
            # Who is typing goes on typing; a key would else be taken for an answer.
            self._tell_death()
        else:
            self._interrupt_prompt(self._choose_after_death)

    def handle_alive(self, client: Client) -> None:
        """A successor answers at the same address."""
        if client is self.client and self.died is not None:
            self.died, self._is_death_told = None, False
            self.prompt.count = 1
            self.painter.say("kernel %s is back" % self.name)
            self._end_question()

    # -- a prompt, with the inbox behind it

    def _run_prompt(self, session: PromptSession, **options: Any) -> Any:
        """PromptSession.prompt, with output above it; None if something ended it from here.

        Raises KeyboardInterrupt and EOFError for Ctrl-C and Ctrl-D.
        """
        self._write(self.painter.take())
        self._app = session.app
        self._app.renderer.cpr_not_supported_callback = None     # it would print a warning
        self.painter.is_prompt_up = True

        def pre_run() -> None:
            loop, context = asyncio.get_running_loop(), contextvars.copy_context()
            is_planned = False

            def drain() -> None:
                nonlocal is_planned
                is_planned = False
                # Not while an editor has the screen, which takes what has collected meanwhile with the next tick.
                if self._app is not None and not self._app.is_done and not self._app._running_in_terminal:
                    self._draw_above_prompt()

            def wake() -> None:
                nonlocal is_planned
                if not is_planned:
                    is_planned = True
                    # RuntimeError: the loop has just ended; what was put is found by the next wait.
                    with contextlib.suppress(RuntimeError):
                        loop.call_soon_threadsafe(loop.call_later, REDRAW_SECONDS, drain, context=context)

            def tick() -> None:
                """Every second: the time in the toolbar, half lines that have waited long enough."""
                self.painter.flush_old_lines()
                drain()
                loop.call_later(1.0, tick)

            self.inbox.wake = wake
            loop.call_soon(drain)
            loop.call_later(1.0, tick)

        try:
            return session.prompt(pre_run=pre_run, handle_sigint=False, set_exception_handler=False, **options)
        finally:
            self.inbox.wake = self._app = None
            session.app.erase_when_done = False
            self.painter.is_prompt_up = False

    def _draw_above_prompt(self) -> None:
        items = self.inbox.get(0)
        self._handle(items)
        if self._app.is_done:       # by what was handled: the text comes behind it
            return
        text = self.painter.take()
        # As prompt_toolkit's run_in_terminal does it, but at once, and without giving the keyboard back to
        # the terminal meanwhile: what is typed in that moment would be echoed into the output.
        if text:
            self._app.renderer.erase()
            self._write(text)
            self._app.renderer.request_absolute_cursor_position()
        if items or text or self._toolbar() != self.session.bottom_toolbar:
            self._app.invalidate()

    def _interrupt_prompt(self, action: Callable[[], None] | None) -> None:
        """End the prompt that is up, keeping what is half typed, and have main do something else first."""
        if action is not None and action not in self.actions:
            self.actions.append(action)
        app = self._app
        if app is not None and app.is_running and not app.is_done:
            if app is self.session.app:
                self.next_input = self.session.default_buffer.document
                app.erase_when_done = True      # it will be shown again
            app.exit(result=None)

    def _end_question(self) -> None:
        """Nobody waits for the answer any more."""
        if self._app is not None and self._app is not self.session.app:
            self._interrupt_prompt(None)

    def _toolbar(self) -> str | None:
        parts = []
        if self.died is not None:
            parts.append("no kernel")
        elif self.client is not None and self.client.is_lost:
            parts.append("connection lost")
        elif self.client is not None and self.client.silence > 4:
            parts.append("no answer for %d s" % self.client.silence)
        if self.busy is not None:
            _, who, count, since = self.busy
            parts.append("busy: %s In [%s] %d:%02d" % (who, count, *divmod(max(0, int(time.time() - since)), 60)))
        if self.prompt.note:
            parts.append(self.prompt.note)
        return " " + "   ".join(parts) if parts else None

    def _draw_toolbar(self, app: Any) -> None:
        self.session.bottom_toolbar = self._toolbar()

    def _write(self, text: str) -> None:
        """The only place that writes to the screen beside prompt_toolkit."""
        interrupts = self._interrupts
        for at in range(0, len(text), WRITE_CHARS):
            sys.stdout.write(text[at:at + WRITE_CHARS])
            sys.stdout.flush()
            if at and self._interrupts > interrupts and self.cell is not None and self._app is None:
                # The user wants this to end: neither the rest of this piece nor what comes behind it.
                self._write("\x1b[0m\n" + self.painter.dim("... %s characters not shown\n" % format(
                    max(0, len(text) - at - WRITE_CHARS), ",")))
                return

    # -- asking for a cell

    def ask_cell(self) -> str | None:
        """What the user typed; None if there is something else to do first."""
        default, self.next_input, self.is_called_off = self.next_input or Document(), None, False
        self._write(self.painter.take() + "\n")
        try:
            return self._run_prompt(self.session, default=default)
        except KeyboardInterrupt:
            return None
        except EOFError:
            self.leave(asks=True)
            return None

    # -- running a cell

    def submit(self, text: str) -> None:
        prefix = self.settings["frontend.command_prefix"]
        if text.startswith(prefix):
            self.command(text[len(prefix):].strip())
        elif self.prompt.language == "python" and _LEAVING.fullmatch(text.strip()):
            # Not sent: a kernel that is not ours would end by it, for everybody.
            self.leave(asks=False, keeps="keep" in text)
        else:
            self.run_cell(text)

    def run_cell(self, text: str) -> None:
        """Send one input and stay with it until it is done, lost, or left alone."""
        if not self._wait_client():
            self.next_input = Document(text)
            return
        if not self._may("run", "running code"):
            return
        if self.client.is_lost:     # not kept for its return: nobody could take that back, nor say when it is
            self.painter.say("not sent: the connection to kernel %s is lost" % self.name)
            self.next_input = Document(text)
            return
        try:
            pending = self.client.execute_nowait(text, allow_stdin=True, on_message=self._hear)
        except KernelDied as died:
            self.died, self.next_input = self.died or died.cause, Document(text)
            self._choose_after_death()
            return
        self.cell = cell = Cell(pending, None if self.busy else self.prompt.count)
        if self.busy is not None:
            self.painter.say(self.painter.dim("queued (1 before: %s In [%s])" % self.busy[1:3]))
            self._write(self.painter.take())        # now: the next news may be that the other's is done
        self.painter.begin_cell()
        while not self._is_over(cell):
            self.pump(self._patience(cell))
            while self.actions and self.cell is cell and not self._is_over(cell):
                self.actions.pop(0)()
        self.cell = None
        self.painter.end_cell()
        cell.pending.cancel()
        if cell.lost is not None:
            if cell.count is None:      # it had not begun: typed once is enough
                self.next_input = Document(text)
            else:
                self.lost = " while running In [%s], which is lost" % cell.count
            self._choose_after_death()
        elif cell.reply is not None:
            self._handle_payload(cell.reply.content.get("payload"))
            if not cell.is_told:
                self._is_refused(cell.reply)
        elif cell.pending.error is not None:
            self.painter.say(str(cell.pending.error))
            if not cell.is_begun:
                self.next_input = Document(text)

    def _hear(self, message: Message) -> None:
        """Run by twoproc-client: output comes to us by `listen`, in order with that of others."""
        if message.msg_type in ("execute_reply", "input_request"):
            self.inbox.put("message", message)

    def _is_over(self, cell: Cell) -> bool:
        # 2 s: for kernels that never say idle.
        return (self.exit_code is not None or self.cell is not cell or cell.lost is not None
                or isinstance(cell.pending.error, ConnectionError)      # not that of a death, which is told by itself
                or cell.reply is not None and (cell.is_idle or time.monotonic() > cell.replied_at + 2.0))

    def _patience(self, cell: Cell) -> float | None:
        if cell.reply is not None:
            return 0.5
        if self.painter.is_muffled and cell.interrupted_at is not None:
            left = cell.interrupted_at + MUFFLED_SECONDS - time.monotonic()
            if left <= 0:
                self.painter.unmuffle()
                return 0
            return left
        return 1.0 if self.painter.has_unfinished_lines or self.client is not None and self.client.is_lost else None

    def _may(self, needed: str, what: str) -> bool:
        """Does our key have this right at the kernel?  If not that is said, and nothing should be sent."""
        client = self.client
        if client is None or is_allowed(client.rights, needed):
            return True
        self._ask_kernel()      # it may have been given meanwhile
        if is_allowed(client.rights, needed):
            return True
        self.painter.say("%s: kernel %s gives your key%s the right %r, and %s needs %r" % (
            "view only" if client.rights == "view" else "not allowed", self.name,
            " (%s)" % client.user if client.user else "", client.rights, what, needed))
        return False

    def _is_refused(self, reply: Message | None) -> bool:
        """An error of the kernel's own in a reply, of which nothing was published, is said in one line."""
        content = reply.content if reply is not None else {}
        if content.get("status") != "error":
            return False
        self.painter.say(" ".join(screen.without_escapes(
            "kernel %s: %s: %s" % (self.name, content.get("ename"), content.get("evalue"))).split()))
        if content.get("ename") == "NotAllowed":
            self._ask_kernel()
        return True

    def _wait_client(self) -> bool:
        """The first Enter may come before the kernel; it is not lost.  False if none came, or by Ctrl-C."""
        while not self.is_settled and self.exit_code is None and not self.is_called_off:
            self.pump(None)
        return self.client is not None and not self.is_called_off

    def _interrupt_cell(self) -> None:
        cell = self.cell
        if self._is_queued():       # the interrupt would be for what runs, and so for somebody else
            self.actions.append(self._choose_while_queued)
            return
        now = time.monotonic()
        is_insisting = cell.interrupted_at is not None and now - cell.interrupted_at < INSISTING_SECONDS
        cell.interrupted_at = now
        self.painter.is_muffled = True
        try:
            self.client.interrupt_nowait()
        except ValueError:      # this client was just closed
            return
        if is_insisting:
            self.actions.append(self._choose_after_insisting)

    def _is_queued(self) -> bool:
        return self.cell is not None and self.cell.count is None and self.busy is not None

    def _choose_while_queued(self) -> None:
        if self.busy is None or not self._is_queued():
            return
        choice = self.choose("%s In [%s] runs before yours. [w]ait [d]etach [i]nterrupt it: " % self.busy[1:3])
        if choice == "d":
            self.detach()
        elif choice == "i" and self._is_queued():
            self.client.interrupt_nowait()

    def _choose_after_insisting(self) -> None:
        cell = self.cell
        if cell is None or self.pump_until(lambda: self._is_over(cell), 0.5):
            return
        self.painter.unmuffle()
        choice = self.choose("It does not stop. [w]ait [d]etach%s: " % (" [r]estart [k]ill" if self.process else ""))
        if cell is not self.cell or self._is_over(cell):
            return
        cell.interrupted_at = None
        if choice == "d":
            self.detach()
        elif choice == "r":
            self._restart()
        elif choice == "k":
            self.process.kill()

    # -- questions of the kernel

    def _answer(self, question: Message) -> None:
        cell = self.cell
        if cell is None or cell.reply is not None or cell.lost is not None:
            return
        password = question.content.get("password") is True
        self.painter.flush_lines()
        message = self.painter.take_line() + screen.EscapeFilter(colors=self.painter.colors, moves=False).feed(
            str(question.content.get("prompt", "")))
        # prompt_toolkit would show these characters by name.
        message = "\n".join(map(screen.last_state, message.replace("\b", "").split("\n"))).expandtabs()
        session: PromptSession = PromptSession(
            message=ANSI(message), history=InMemoryHistory() if password else self.answers,
            enable_history_search=not password, input_processors=[Invisible()] if password else None,
            key_bindings=question_keys(self.inbox.put), enable_suspend=True,
            color_depth=self.session.color_depth, editing_mode=self.session.editing_mode)
        try:
            answer = self._run_prompt(session)
        except EOFError:
            answer = END_OF_INPUT
        except KeyboardInterrupt:
            answer = None
            self._interrupt_cell()      # the kernel's input() raises it there
        finally:
            self.painter.begin_cell()
        if answer is not None and cell.reply is None:   # else the cell ended, or we leave, while the user was thinking
            self.client.answer(question, answer)

    def choose(self, question: str, default: str = "") -> str:
        """One of the letters in brackets, by one key; Enter means `default`, Ctrl-D [q]uit where there is one.

        Empty for no answer: by Ctrl-C, and if something else happened that ends the question.
        """
        letters = re.findall(r"\[(\w)\]", question)
        keys = KeyBindings()

        @keys.add("<any>")
        def _chosen(event: Any) -> None:
            if event.data.lower() in letters:
                event.current_buffer.insert_text(event.data)
                event.app.exit(result=event.data.lower())

        self.painter.flush_lines()
        self.painter.fresh_line()
        session: PromptSession = PromptSession(message=question, key_bindings=keys, history=InMemoryHistory(),
                                               color_depth=self.session.color_depth)
        try:
            answer = self._run_prompt(session)
        except KeyboardInterrupt:
            return ""
        except EOFError:
            return "q" if "q" in letters else ""
        return "" if answer is None else answer or default

    def _keep_typed(self) -> bool:
        """What was typed before a question came up is no answer to it: it goes into the next prompt as text."""
        source = self.session.app.input
        with source.raw_mode():
            keys = [*get_typeahead(source), *source.read_keys(), *source.flush_keys()]
        text = "".join(key.data for key in keys if key.data.isprintable() or not key.data.strip())
        text = text.replace("\r", "\n").strip("\n")
        if text:
            self.next_input = Document((self.next_input.text if self.next_input else "") + text)
        return bool(text)

    # -- payloads

    def _handle_payload(self, payload: Any) -> None:
        for part in payload if isinstance(payload, list) else []:
            source = part.get("source") if isinstance(part, dict) else None
            if source == "set_next_input":
                self.next_input = Document(str(part.get("text", "")))
            elif source == "page":
                self.page(screen.text_of(part.get("data") or {"text/plain": str(part.get("text", ""))}))
            elif source in ("edit", "edit_magic"):
                self._edit_file(str(part.get("filename", "")), part.get("line_number"))
            elif source == "ask_exit":
                self.leave(asks=False, keeps=bool(part.get("keepkernel")))

    def page(self, text: str) -> None:
        """On the screen if there is room, else in the pager."""
        text = screen.EscapeFilter(colors=self.painter.colors, moves=False).feed(text).rstrip("\n")
        columns, height = self.painter.size()
        rows = screen.rows_below(text, columns)
        if rows is not None and rows < height - 2:
            self.painter.say(text)
            return
        # As git does it: less is to show colours, unless the user has told it something else.
        if self._run_program(os.environ.get("PAGER") or "less", env={"LESS": "-R", **os.environ},
                             input=text.encode("utf-8", "backslashreplace")) == 127:
            self.painter.say(text)

    def _edit_file(self, path: str, line: Any) -> None:
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
        place = " +%d" % line if type(line) is int else ""
        try:
            self._run_program("%s%s %s" % (editor, place, shlex.quote(path)))
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
        except OSError as error:
            self.painter.say("not edited: %s" % error)
            return
        # Shown before it runs: what was written in the editor is the user's next input, to be confirmed by Enter.
        self.next_input = Document(text.rstrip() if text.count("\n") <= 100 else "%%run -i %s" % shlex.quote(path))

    def _run_program(self, command: str, **options: Any) -> int:
        """Lend the screen to a pager or an editor; its exit status.  Ctrl-C is for it alone meanwhile."""
        self._write(self.painter.take())
        handler = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            return subprocess.run(command, shell=True, **options).returncode
        finally:
            signal.signal(signal.SIGINT, handler)

    # -- commands to the frontend

    COMMANDS: dict[str, tuple[str, str]] = {
        "help": ("", "these commands"),
        "interrupt": ("", "stop what the kernel runs, whoever started it"),
        "restart": ("", "a fresh interpreter at the same address, for everybody"),
        "shutdown": ("", "end the kernel and leave"),
        "detach": ("", "leave; the kernel lives on"),
        "who": ("", "who else was seen at this kernel"),
        "last": ("N", "the last N cells again, whoever ran them"),
        "log": ("", "where the session's log is"),
        "save": ("FILE", "write the session to a file, .ipynb or .py"),
        "kernels": ("", "your kernels on this machine"),
        "connect": ("NAME", "leave this kernel for another"),
    }

    def command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        prefix = self.settings["frontend.command_prefix"]
        if name not in self.COMMANDS:
            self.painter.say("%s%s: no such command; there are %s"
                             % (prefix, name, ", ".join(prefix + known for known in self.COMMANDS)))
        elif name not in ("interrupt", "last", "log", "restart", "save") or self._wait_client():
            with self._one_line(prefix + name):
                getattr(self, "command_" + name)(argument.strip())

    def command_help(self, argument: str) -> None:
        prefix = self.settings["frontend.command_prefix"]
        for name, (parameter, meaning) in self.COMMANDS.items():
            self.painter.say("%-16s %s" % ((prefix + name + " " + parameter), meaning))
        self.painter.say("%-16s %s" % ("Ctrl-D", "leave"))
        self.painter.say("%-16s %s" % ("Ctrl-\\", "detach, also while a cell runs"))

    def command_interrupt(self, argument: str) -> None:
        if self._may("run", "interrupting") and not self._is_refused(self.client.interrupt(timeout=2.0)):
            self.painter.say("interrupted")

    def command_restart(self, argument: str) -> None:
        if self.process is None:
            raise ValueError("only who started kernel %s can restart it; :shutdown ends it" % self.name)
        if self.choose("Restart kernel %s? Its variables are lost%s. [y]es [n]o: " % (
                self.name, self._for_others())) == "y":
            self._restart()

    def _restart(self) -> None:
        self.painter.say("restarting kernel %s" % self.name)
        self._write(self.painter.take())
        self.client.close(0.5)      # before the death that it would report
        with self._one_line("not restarted"):
            self.process.restart()
        self.connect()      # which finds out what there is if that failed

    def command_shutdown(self, argument: str) -> None:
        if not self._may("admin", "ending the kernel"):
            return
        if self.process is not None and not self._others_now() or self.choose(
                "End kernel %s%s? [y]es [n]o: " % (self.name, self._for_others())) == "y":
            self._end_kernel()

    def command_detach(self, argument: str) -> None:
        self.detach()

    def command_who(self, argument: str) -> None:
        for name, heard in self.others.values():
            self.painter.say("%-16s heard %d s ago" % (name, time.time() - heard))
        clients = self._ask_kernel()
        if clients:
            self.painter.say("%d client%s attached, this terminal among them" % (clients, "s"[clients < 2:]))
        elif not self.others:
            self.painter.say("nobody else was heard of; the kernel tells only when somebody does something")

    def command_last(self, argument: str) -> None:
        if not argument.isdecimal():
            raise ValueError("how many?")
        page = self.client.log(int(argument), SHOWN_BYTES)
        if not page.session:
            raise ValueError("the kernel keeps no log")
        self._show_by_name(page.messages)

    def command_log(self, argument: str) -> None:
        self.painter.say(death.where(self.client.log(0).session) or "the kernel keeps no log")

    def command_save(self, argument: str) -> None:
        self.painter.say("saved to " + death.save(self.client.log(0).session, argument))

    def command_kernels(self, argument: str) -> None:
        for kernel in discovery.look():
            self.painter.say(kernel.line(self.start.connection_file)[:self.painter.size()[0] - 1])

    def command_connect(self, argument: str) -> None:
        if not argument:
            raise ValueError("which one?")
        found = self.new_start(argument)
        self.painter.say("left kernel %s, it lives on" % self.name)
        self._join(found)

    def _join(self, start: Any) -> None:
        self._forget_dead()
        before, self.start = self.start, start
        self.connect()
        before.close()
        self.pump_until(lambda: self.is_settled, 5.0)
        if self.client is not None:
            self.painter.say("now at kernel %s" % self.name)

    @contextlib.contextmanager
    def _one_line(self, what: str):
        """An error in here is one line on the screen, and the session goes on."""
        try:
            yield
        except (KernelDied, TimeoutError, OSError, ValueError, connection.ConnectionFileError, LaunchError) as error:
            self.painter.say("%s: %s" % (what, error))

    # -- leaving

    def _ask_kernel(self) -> int:
        """How many are attached to a kernel of ours, 0 where it does not say; the client learns its rights by it."""
        clients: Any = 0
        if self.client is not None:
            with contextlib.suppress(KernelDied, TimeoutError, OSError, ValueError):
                clients = self.client.status(timeout=0.5).get("clients")
        return clients if type(clients) is int else 0

    def _others_now(self) -> list[str]:
        """Who else is there: by name who was heard of, and not at all if nobody is attached any more."""
        limit = time.time() - PRESENCE_SECONDS
        heard = sorted({name for name, heard in self.others.values() if heard > limit})
        clients = self._ask_kernel()
        if clients < 1 or clients > 1 and heard:
            return heard
        return [] if clients < 2 else ["somebody" if clients == 2 else "%d others" % (clients - 1)]

    def _for_others(self) -> str:
        others = self._others_now()
        return ", also for " + ", ".join(others) if others else ""

    def leave(self, asks: bool, keeps: bool = False) -> None:
        """Ctrl-D (asks) and `exit`: end our own kernel if we are alone, else only go."""
        if self.process is None or keeps or self.keep or self.died is not None or self._others_now():
            self.detach()
        elif asks and self.settings["frontend.confirm_exit"]:
            choice = self.choose("End kernel %s too? [y]es [k]eep it [n]o, stay: " % self.name)
            if choice == "y":
                self._end_kernel()
            elif choice == "k":
                self.detach()
        else:
            self._end_kernel()

    def detach(self) -> None:
        self.painter.fresh_line()
        if self.died is not None:
            self.exit_code = 70
            return
        # Who leaves before the kernel is up could not be taken at his word otherwise.
        self.pump_until(lambda: self.is_settled, 10.0)
        if self.connect_error is not None:
            self.painter.say("kernel %s: %s" % (self.name, self.connect_error))
            self.exit_code = 70
            return
        self.painter.say("left kernel %s, it lives on%s; join it again with: %s" % (
            self.name, self._for_others().replace(", also", ""), self.start.join))
        self._write(self.painter.take())
        self.exit_code = 0

    def _end_kernel(self) -> None:
        name = self.name
        with self._one_line("kernel %s" % name):
            if self.process is not None:
                self.process.shutdown()
            elif self._wait_client():
                if self._is_refused(self.client.shutdown(timeout=5.0)):
                    return
            self.painter.say("kernel %s ended" % name)
        self._write(self.painter.take())
        self.exit_code = 0

    # -- death

    def _tell_death(self) -> None:
        if self.died is None or self._is_death_told:
            return
        self._is_death_told = True
        is_wanted = self.died.startswith(("shut down", "restarted", "out of reach"))
        self.dead = None if is_wanted else death.obituary(self.start.connection_file, self.client)
        if self.dead is None:
            self.painter.say("kernel %s%s %s%s" % (self.name, "" if is_wanted else " died:", self.died, self.lost))
        else:
            for number, line in enumerate(self.dead.lines()):
                if number == 0 and self.died.endswith("from its launcher"):
                    # The user's own [k]ill, of which the log does not know.
                    line = "The kernel was ended %s: %s" % (self.dead.death.place, self.died)
                self.painter.say(line)
                if self._app is None:
                    self._write(self.painter.take())
            if self.process is None:
                self.painter.say("  this terminal goes on with kernel %s if whoever started it restarts it" % self.name)
        self.lost = ""
        for line in self.process.last_words() if self.process is not None and not is_wanted else []:
            self.painter.say("  " + screen.without_escapes(line))

    def _choose_after_death(self) -> None:
        if self._keep_typed() and not self._is_death_told:
            self.painter.say("")        # the terminal itself has shown it, behind the output
        self._tell_death()
        if self.died is not None and self.died.startswith("restarted"):
            # Somebody starts it again: its successor answers in a moment.
            self.pump_until(lambda: self.died is None, 10.0)
        while self.died is not None and self.exit_code is None:
            choice = self._ask_after_death()
            if self.died is None:       # it came back while the user was thinking
                return
            if choice == "s":
                self.page(self.dead.text())
            elif choice == "e":
                with self._one_line("not exported"):
                    self.painter.say("exported to " + death.save(self.dead.session.id))
            elif choice == "r":
                self._recover()
                return
            elif choice == "n":
                self._start_new()
                return
            elif choice == "q":
                self.exit_code = 70
            elif self.actions:
                return

    def _ask_after_death(self) -> str:
        is_mine = self.process is not None
        if self.dead is None:
            return self.choose("[r]estart [n]ew kernel [q]uit: " if is_mine else "[n]ew kernel [q]uit: ", "q")
        rest = "[n]ew session  [s]how  [e]xport .ipynb  "
        if not is_mine:
            return self.choose(rest + "[q]uit ? ")
        if self.dead.is_again:      # recovering it may be what kills it: nobody shall do that by pressing Enter
            return self.choose(rest + "[r]ecover again  [q]uit ? ")
        return self.choose("[r]ecover  " + rest + "[q]uit ? ", "r")

    def _recover(self) -> None:
        """A fresh interpreter at the same address, which knows what was there before; nothing is run."""
        dead = self.dead
        self._restart()
        if dead is not None and self.pump_until(lambda: self.is_settled, 30.0):
            self.prompt.history.merge(dead.inputs())
            with self._one_line("its log"):
                if self.client is not None:
                    self.painter.say(dead.recovered(self.client.log(0).session))

    def _choose_after_failure(self) -> None:
        while self.connect_error is not None and self.exit_code is None:
            error = self.connect_error
            self.painter.say("kernel %s: %s" % (self.name, error))
            if self.choose("[n]ew kernel [q]uit: ", "q") == "n":
                self._start_new()
            else:
                self.exit_code = 70 if isinstance(error, KernelDied) else getattr(error, "exit_code", 2)

    def _forget_dead(self) -> None:
        """Who was told of the death and goes has no more use for its files; its session log stays."""
        if self._is_death_told and self.process is not None:
            self.process.remove_files()

    def _start_new(self) -> None:
        with self._one_line("no kernel could be started"):
            self._join(self.new_start(None))


# -- small helpers

_LEAVING = re.compile(r"(exit|quit)(\((keep_kernel\s*=\s*True|True)?\))?")


def _name_of(message: Message) -> str:
    return one_line(str(message.parent_header.get("username") or "somebody"))
