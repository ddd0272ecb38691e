# Distributed under the terms of the BSD 3-Clause License.
"""The prompt: its keys, history, completion and colours, in the shapes that prompt_toolkit asks for.

Made and run by terminal.py, in main.  What the prompt has to say to the rest (leave) it puts into the
terminal's inbox.  Imported on a terminal only, because prompt_toolkit is.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER, EditingMode
from prompt_toolkit.filters import (Condition, emacs_insert_mode, has_completions, has_focus, has_selection,
                                    vi_insert_mode, vi_navigation_mode)
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.key_binding.vi_state import InputMode
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout.processors import Processor, Transformation
from prompt_toolkit.lexers import DynamicLexer, Lexer, PygmentsLexer, SimpleLexer
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.styles import Style

from .cells import check_complete
from .client import Client, KernelDied
from .crashlog import StateError, is_private, state_folder
from .session import Message


class Prompt:
    """The `In [n]:` prompt, its keys, and the question whether what was typed is a whole cell.

    client: () -> the Client, or None while there is no kernel to ask.  tell: Inbox.put.
    Owned by main.  terminal.py sets `count`, `language` and `lexer` as it learns them from the kernel.
    """

    def __init__(self, settings: Any, colors: bool, client: Callable[[], Client | None], tell: Callable[..., None]):
        self._settings, self._client, self._tell = settings, client, tell
        self.count = 1
        self.language = "python"
        self.lexer: Lexer = SimpleLexer()
        self.note = ""              # a word in the toolbar, gone with the next Enter
        self.history = SavedHistory(history_path(), settings["frontend.history_lines"])
        completer = KernelCompleter(client, settings["frontend.complete_seconds"], self._note)
        self.session: PromptSession = PromptSession(
            message=self._message, prompt_continuation=self._continuation, multiline=True,
            editing_mode=EditingMode.VI if settings["frontend.editing"] == "vi" else EditingMode.EMACS,
            history=self.history, auto_suggest=AutoSuggestFromHistory(), enable_history_search=True,
            completer=completer, complete_while_typing=False,
            lexer=DynamicLexer(lambda: self.lexer), style=style_of(settings["frontend.colors"]) if colors else None,
            include_default_pygments_style=False, key_bindings=self._keys(), enable_suspend=True,
            color_depth=ColorDepth.DEPTH_4_BIT if colors else ColorDepth.DEPTH_1_BIT)

    @property
    def rights(self) -> str:
        """One of access.RIGHTS: what our key may do there; below "run" the prompt says it."""
        client = self._client()
        return "admin" if client is None else client.rights

    def _note(self, text: str) -> None:
        self.note = text
        self.session.app.invalidate()

    def _message(self) -> FormattedText:
        mode: list = []
        if self.session.editing_mode == EditingMode.VI:
            is_navigation = self.session.app.vi_state.input_mode == InputMode.NAVIGATION
            mode = [("class:prompt", "[nav] " if is_navigation else "[ins] ")]
        if not is_allowed(self.rights, "run"):
            return FormattedText([*mode, ("class:prompt", "[%s]: " % self.rights)])
        return FormattedText([*mode, ("class:prompt", "In ["), ("class:prompt.number", str(self.count)),
                              ("class:prompt", "]: ")])

    def _continuation(self, width: int, line_number: int, is_soft_wrap: bool) -> FormattedText:
        return FormattedText([("class:prompt", ("" if is_soft_wrap else "...: ").rjust(width))])

    def _keys(self) -> KeyBindings:
        keys = leaving_keys(self._tell)
        is_typing = has_focus(DEFAULT_BUFFER) & (vi_insert_mode | emacs_insert_mode)

        @keys.add("enter", filter=has_focus(DEFAULT_BUFFER) & ~has_selection & (is_typing | vi_navigation_mode))
        def _enter(event: Any) -> None:
            self._enter(event.current_buffer)

        @keys.add("c-o", filter=is_typing)
        def _new_line(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("tab", filter=is_typing & ~has_selection & Condition(self._is_in_indentation))
        def _indent(event: Any) -> None:
            column = event.current_buffer.document.cursor_position_col
            event.current_buffer.insert_text(" " * (4 - column % 4))

        @keys.add("escape", filter=has_completions & is_typing, eager=True)
        def _close_menu(event: Any) -> None:
            event.current_buffer.cancel_completion()

        @keys.add("c-x", "c-e", filter=emacs_insert_mode & has_focus(DEFAULT_BUFFER))
        @keys.add("v", filter=vi_navigation_mode & has_focus(DEFAULT_BUFFER))
        def _edit(event: Any) -> None:
            event.current_buffer.open_in_editor()

        return keys

    def _is_in_indentation(self) -> bool:
        document = self.session.default_buffer.document
        return not document.current_line_before_cursor.strip() and self.session.default_buffer.complete_state is None

    def _enter(self, buffer: Any) -> None:
        """Run the cell, or begin another line of it."""
        if buffer.complete_state is not None and buffer.complete_state.completions:
            if buffer.complete_state.current_completion is not None:
                buffer.apply_completion(buffer.complete_state.current_completion)
            else:
                buffer.cancel_completion()
            return
        document, text = buffer.document, buffer.text
        if document.text_after_cursor.strip() and document.line_count > 1:
            buffer.newline()        # as far in as this line
            return
        # However many empty lines there are, one tells that the user is done; to the kernel, two of a cell magic.
        ends = text[len(text.rstrip()):].count("\n")
        most = 2 if text.lstrip().startswith("%%") else 1
        status, indent = self._check_complete(text.rstrip() + "\n" * min(ends, most) if ends else text)
        if status == "incomplete":
            buffer.cursor_position = len(text)
            buffer.insert_text("\n" + indent)
        else:
            buffer.document = Document(text.rstrip() if "\n" in text else text)
            self.note = ""
            buffer.validate_and_handle()

    def _check_complete(self, text: str) -> tuple[str, str]:
        """Ask the kernel, but for a short time only, and only where we cannot know."""
        if not text.strip() or text.startswith(self._settings["frontend.command_prefix"]) or not is_allowed(
                self.rights, "run"):
            return "complete", ""
        is_python = self.language == "python"
        local = check_complete(text) if is_python else ("complete", "")
        client = self._client()
        if client is None or is_python and local[0] == "incomplete":
            return local
        try:
            content = client.is_complete(text, timeout=self._settings["frontend.is_complete_seconds"]).content
        except (TimeoutError, KernelDied, OSError, ValueError, RuntimeError):
            return local
        status = content.get("status")
        if status == "incomplete":
            return "incomplete", str(content.get("indent") or "")
        return ("complete", "") if status in ("complete", "invalid") else local


def leaving_keys(tell: Callable[..., None]) -> KeyBindings:
    keys = KeyBindings()

    @keys.add("c-\\")
    def _detach(event: Any) -> None:
        tell("detach")

    return keys


def question_keys(tell: Callable[..., None]) -> KeyBindings:
    """For the questions of a cell: its user can leave, and a paste of several lines answers as many questions."""
    keys = leaving_keys(tell)

    @keys.add(Keys.BracketedPaste)
    def _paste(event: Any) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        event.app.key_processor.feed_multiple([KeyPress(Keys.Enter if c == "\n" else c, c) for c in text])

    return keys


class SavedHistory(History):
    """Earlier inputs: the user's own, in a file (0600), one JSON string a line; behind them what others typed.

    `%%private` cells are remembered until the program ends and are not in the file.
    """

    _loaded_strings: list[str]      # History's own, the newest first

    def __init__(self, path: str | None, limit: int):
        super().__init__()
        self._path, self._limit = path, limit
        self._loaded_strings, self._loaded = list(self.load_history_strings()), True
        self._own = len(self._loaded_strings)       # the first so many are the user's

    def load_history_strings(self) -> Iterable[str]:
        lines: list[str] = []
        if self._path:
            with contextlib.suppress(OSError), open(self._path, encoding="utf-8", errors="replace") as file:
                lines = file.readlines()[-self._limit:]
        entries: dict[str, None] = {}
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, str):
                    entries.setdefault(entry)
        return entries

    def store_string(self, string: str) -> None:
        if self._path is None or is_private(string):
            return
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(json.dumps(string) + "\n")
        except OSError:
            self._path = None       # a full or read-only disk: the session goes on with what is in memory

    def append_string(self, string: str) -> None:
        if self._loaded_strings[:1] != [string]:
            self._own += 1
            super().append_string(string)

    def merge(self, entries: list[str]) -> None:
        """What the kernel remembers, the oldest first, from before we heard of it."""
        known = set(self._loaded_strings)
        self._loaded_strings += [entry for entry in dict.fromkeys(reversed(entries))
                                 if entry not in known and not is_private(entry)]

    def hear(self, entry: str) -> None:
        """Somebody else's input, just now."""
        if entry not in self._loaded_strings[:self._own] and not is_private(entry):
            self._loaded_strings.insert(self._own, entry)
            del self._loaded_strings[self._own + self._limit:]


def history_path() -> str | None:
    """<state folder>/history, the folder made; None where it cannot be kept."""
    try:
        return os.path.join(state_folder(), "history")
    except StateError:
        return None


class KernelCompleter(Completer):
    """Asks the kernel, for a limited time; late answers find nobody.

    Not in a thread: prompt_toolkit would wait for that before Enter or Ctrl-C could end the prompt.
    client: () -> the Client or None.  note: called with a word for the user when there is no answer.
    """

    def __init__(self, client: Callable[[], Client | None], busy_seconds: float, note: Callable[[str], None]):
        self._client, self._busy_seconds, self._note = client, busy_seconds, note

    def get_completions(self, document, complete_event):
        raise NotImplementedError("the kernel's answer has to be waited for: get_completions_async")

    async def get_completions_async(self, document, complete_event):
        client = self._client()
        if client is None or client.is_lost:
            return
        if not is_allowed(client.rights, "input"):
            self._note("view only: no completion")
            return
        # The limit is for a kernel that has something else to do; one at rest may be loading its completer.
        seconds = self._busy_seconds if client.execution_state == "busy" else 3.0
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Message] = loop.create_future()

        def take(message: Message) -> None:
            """Run by twoproc-client."""
            if message.msg_type == "complete_reply":
                with contextlib.suppress(RuntimeError):     # the prompt has just ended
                    loop.call_soon_threadsafe(arrive, message)

        def arrive(message: Message) -> None:
            if not answer.done():
                answer.set_result(message)

        try:
            pending = client.submit("complete_request", {
                "code": document.text, "cursor_pos": document.cursor_position}, on_message=take)
        except (KernelDied, ValueError):        # it is ending, or we are
            return
        try:
            content = (await asyncio.wait_for(answer, seconds)).content
        except asyncio.TimeoutError:
            self._note("kernel busy")
            return
        finally:
            pending.cancel()
        start, end = content.get("cursor_start"), content.get("cursor_end")
        if content.get("status") != "ok" or type(start) is not int or type(end) is not int:
            return
        types = (content.get("metadata") or {}).get("_jupyter_types_experimental") or []
        kinds = {entry.get("text"): str(entry.get("type") or "") for entry in types if isinstance(entry, dict)}
        typed = document.text[start:document.cursor_position]
        shown_from = typed.rfind(".") + 1
        for match in content.get("matches") or []:
            kind = kinds.get(match, "")
            yield Completion(match, start - document.cursor_position, display=match[shown_from:] or match,
                             display_meta="" if kind == "<unknown>" else kind)


class Invisible(Processor):
    """A password: neither its characters nor their number."""

    def apply_transformation(self, transformation_input):
        return Transformation([], source_to_display=lambda i: 0, display_to_source=lambda i: 0)


def is_allowed(rights: str, needed: str) -> bool:
    """Does who has these rights have the needed one?  A word that we do not know is for the kernel to judge."""
    if rights == "admin":
        return True
    from .access import RIGHTS      # here, because most have all rights
    return rights not in RIGHTS or RIGHTS.index(rights) >= RIGHTS.index(needed)


def lexer_of(language: dict) -> Lexer:
    """The lexer that the kernel recommends; plain text if pygments does not know it."""
    wanted = language.get("pygments_lexer") or language.get("name") or "python"
    wanted = wanted.get("name") if isinstance(wanted, dict) else wanted
    try:
        if wanted in ("ipython3", "ipython", "python", "python3"):
            # By name pygments would look through all installed packages for it.
            try:
                from ipython_pygments_lexers import IPython3Lexer as found
            except ImportError:     # IPython before 9
                from pygments.lexers.python import PythonLexer as found
            return PygmentsLexer(found)
        from pygments.lexers import get_lexer_by_name
        return PygmentsLexer(type(get_lexer_by_name(str(wanted))))
    except Exception:       # ClassNotFound, and whatever a foreign plug-in does as it is imported
        return SimpleLexer()


def style_of(colors: str) -> Style:
    """The sixteen colours of the terminal's own theme, so that it decides what they look like."""
    string, comment, function = {
        "auto": ("ansiyellow", "ansibrightblack", "ansiblue"),
        "light": ("ansired", "ansigray", "ansiblue"),
        "dark": ("ansiyellow", "ansibrightblack", "ansibrightblue")}[colors]
    return Style.from_dict({
        "prompt": "ansigreen", "prompt.number": "ansibrightgreen bold",
        "pygments.keyword": "ansigreen", "pygments.keyword.constant": "ansigreen",
        "pygments.operator.word": "ansimagenta", "pygments.literal.string": string,
        "pygments.literal.number": "ansicyan", "pygments.comment": comment,
        "pygments.name.function": function, "pygments.name.class": function, "pygments.name.decorator": "ansimagenta",
        "pygments.name.builtin": "ansicyan", "pygments.name.exception": "ansired", "pygments.error": "ansired",
        "auto-suggestion": "ansibrightblack",
        "bottom-toolbar": "noreverse ansibrightblack", "bottom-toolbar.text": "",
    })
