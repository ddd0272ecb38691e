# Distributed under the terms of the BSD 3-Clause License.
"""Where on the terminal the messages of a kernel go.

A screen has one cursor and several speakers: the cell that we run, the cells of others, threads that print
long after their cell, and perhaps a line that the user has half typed.  The rules, in one place:

* Our running cell writes as it likes: half lines, carriage returns, small movements of the cursor.
* Everybody else, and everybody while a prompt is up, writes whole lines, others with their name in front.
* What replaces something (clear_output, update_display) is redrawn in place only while it is the last thing
  on the screen and lower than it, and never beside a prompt; else it is shown again below.
* Nobody floods: of what piles up faster than the terminal takes it, the middle is left out, with a count.

Painter turns messages into text and remembers what that left on the screen.  terminal.py, in whose main
thread all of this runs, takes the text and writes it.
"""
from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator

from . import screen
from .session import Message

# Text that arrived while the terminal was taking the piece before: beyond this we are behind it.
BEHIND_CHARS = 1 << 20
HEAD_LINES = TAIL_LINES = 100       # of such a piece; a screen and some more
LINE_LIMIT = 1 << 20
BLOCK_LIMIT = 1 << 16               # characters; what is longer is higher than any screen


class Painter:
    """colors: False for none.  size: () -> (columns, rows).  images: a protocol of screen.image_protocol or None."""

    def __init__(self, colors: bool, size: Callable[[], tuple[int, int]], images: str | None = None,
                 raw_escapes: bool = False, others: str = "all"):
        self.colors, self.size, self.images, self.others = colors, size, images, others
        self.raw_escapes = raw_escapes
        self.is_prompt_up = False
        self.is_muffled = False         # after Ctrl-C: what is still on its way from our cell is only counted
        self._out: list[str] = []
        self._line = ""                 # what stands on the cursor's row, left by our cell
        self._line_chars = 0            # characters of the line that is being written, shown or not
        self._block: str | None = ""    # what our cell has written since it began or was cleared; None: lost track
        self._display: tuple[str, int] | None = None    # (display_id, its place in _block) if it is the last thing
        self._clear_first = False       # clear_output(wait=True) was asked for
        self._muffled = screen.Tail(TAIL_LINES)
        self._folder = ""
        self._images = 0
        self._gates: dict[tuple, screen.EscapeFilter] = {}
        self._lines: dict[tuple, screen.Lines] = {}
        self._old_lines: set[tuple] = set()

    # -- what terminal.py calls

    def take(self) -> str:
        """The text to write now."""
        text = "".join(self._out)
        self._out.clear()
        return text

    def begin_cell(self) -> None:
        """Our prompt was left at the beginning of a row; our cell writes from here."""
        self._line, self._line_chars, self._block, self._display, self._clear_first = "", 0, "", None, False
        self.is_muffled = False

    def end_cell(self) -> None:
        """Leave the cursor at the beginning of a row, with nothing unfinished in front of it."""
        self.unmuffle()
        self.flush_lines()
        self._add(self._cut_note(self._line_chars))
        self.fresh_line()
        self._block, self._display = None, None
        self._gates.clear()

    def unmuffle(self) -> None:
        self.is_muffled = False
        count, tail = self._muffled.take()
        if count:
            self.fresh_line()
            self._add(self.dim("... %s lines not shown" % format(count, ",")) + "\n")
        if tail:
            self._own_stream(tail)

    def say(self, text: str) -> None:
        """A line of the frontend's own."""
        self.fresh_line()
        self._add(text + "\n")
        self._block = None

    def fresh_line(self) -> None:
        if self._line:
            self._add("\n")

    def take_line(self) -> str:
        """The unfinished line in front of a question, taken off the screen: the question shows it again."""
        line = self._line
        if screen.rows_below(line, self.size()[0]) != 0:
            self.fresh_line()
            return ""
        if line:
            self._out.append("\r\x1b[K")
            self._line = ""
        return line

    def flush_lines(self, keys: list | None = None) -> None:
        """Show the unfinished lines of other speakers as they are."""
        for key in list(self._lines) if keys is None else keys:
            lines = self._lines.pop(key, None)
            if lines:
                self._whole_lines(key[0], lines.flush())

    def flush_old_lines(self) -> None:
        """To be called once a second: shows the unfinished lines that were there a second ago."""
        self.flush_lines([key for key in self._lines if key in self._old_lines])
        self._old_lines = set(self._lines)

    @property
    def has_unfinished_lines(self) -> bool:
        return any(self._lines.values())

    def show(self, messages: list[tuple[Message, str | None]]) -> None:
        """Iopub messages in their order, each with the name of its speaker; None: ours."""
        for message, who in _joined(messages):
            handle = getattr(self, "handle_" + message.msg_type, None)
            if handle is not None and not (who and (self.others == "off" or self.others == "inputs"
                                                    and message.msg_type != "execute_input")):
                if message.msg_type != "stream":
                    session = message.parent_header.get("session")
                    self.flush_lines([key for key in self._lines if key[1] == session])
                handle(message, who)

    # -- one kind of message each

    def handle_execute_input(self, message: Message, who: str | None) -> None:
        if who is None:
            return
        head = "%s In [%s]: " % (one_line(who), message.content.get("execution_count", "?"))
        first, *rest = screen.without_escapes(str(message.content.get("code", ""))).split("\n")
        self.fresh_line()
        for line in [head + first, *("...: ".rjust(len(head)) + line for line in rest)]:
            self._add(self.dim(line) + "\n")
        self._block = None

    def handle_stream(self, message: Message, who: str | None) -> None:
        text = str(message.content.get("text", ""))
        key = (who, message.parent_header.get("session"), message.content.get("name"))
        if self._is_ours(who):
            if self.is_muffled:
                self._muffled.feed(self._gate(key).feed(text))
            else:
                self._own_stream(self._gate(key).feed(self._excerpt(text)))
            return
        lines = self._lines.setdefault(key, screen.Lines())
        self._whole_lines(who, lines.feed(self._gate(key).feed(self._excerpt(text))))

    def handle_execute_result(self, message: Message, who: str | None) -> None:
        text = self._shown(message)
        head = "Out[%s]: " % message.content.get("execution_count", "?")
        if self._is_ours(who):
            head = self.paint("31", head) + ("\n" if "\n" in text else "")
        self._block_of_lines(head + text if who or not self.is_prompt_up else text, who)

    def handle_display_data(self, message: Message, who: str | None) -> None:
        begin = self._block_of_lines(self._shown(message), who)
        display_id = _display_id(message)
        if display_id and begin is not None:
            self._display = display_id, begin

    def handle_update_display_data(self, message: Message, who: str | None) -> None:
        if (self._is_ours(who) and self._display and self._display[0] == _display_id(message)
                and self._rub_out(self._display[1])):
            self.handle_display_data(message, who)
        else:
            self._block_of_lines(self._shown(message).rstrip("\n") + self.dim(" (updated)"), who)

    def handle_error(self, message: Message, who: str | None) -> None:
        if self._is_ours(who):
            self.unmuffle()
        self._block_of_lines(self._filtered(screen.traceback_of(message.content)), who)

    def handle_twoproc_gap(self, message: Message, who: str | None) -> None:
        """The client's own, in place of what it could not get."""
        self._whole_lines(who, [self.dim("(output missed: %s)" % message.content.get("reason", ""))])

    def handle_clear_output(self, message: Message, who: str | None) -> None:
        if self._is_ours(who):
            self._clear_first = True
            if not message.content.get("wait"):
                self._clear_if_asked()

    def _is_ours(self, who: str | None) -> bool:
        """Whether the cursor belongs to who says this."""
        return who is None and not self.is_prompt_up

    # -- colours

    def paint(self, code: str, text: str) -> str:
        return "\x1b[%sm%s\x1b[0m" % (code, text) if self.colors else text

    def dim(self, text: str) -> str:
        return self.paint("2", text)

    # -- the cursor

    def _add(self, text: str) -> None:
        """The only way onto the screen; remembers what it left there."""
        self._out.append(text)
        before, newline, last = text.rpartition("\n")
        self._line = last if newline else (self._line + text)[-LINE_LIMIT:]
        self._display = None
        if self._block is not None:
            self._block = self._block + text if len(self._block) + len(text) <= BLOCK_LIMIT else None

    def _rub_out(self, begin: int) -> bool:
        """Remove from the screen what our cell wrote from this place on; False if it cannot be done."""
        if self._block is None:
            return False
        columns, height = self.size()
        rows = screen.rows_below(self._block[begin:], columns)
        if rows is None or rows >= height:
            return False
        self._out.append("\r" + ("\x1b[%dA" % rows if rows else "") + "\x1b[J")
        self._block, self._line, self._display = self._block[:begin], "", None
        return True

    def _clear_if_asked(self) -> None:
        if self._clear_first:
            self._clear_first = False
            if not self._rub_out(0):
                self.fresh_line()
            self._block = ""

    # -- text

    def _own_stream(self, text: str) -> None:
        if text:
            self._clear_if_asked()
            self._add(self._cut_lines(text))

    def _block_of_lines(self, text: str, who: str | None) -> int | None:
        """Show what does not share its lines with anything else; its place in _block if it can be redrawn."""
        text = text.rstrip("\n")
        if not self._is_ours(who):
            self._whole_lines(who, text.split("\n") if text else [])
            return None
        self._clear_if_asked()
        self.fresh_line()
        begin = None if self._block is None else len(self._block)
        if text:
            self._add(text + "\n")
        return begin

    def _whole_lines(self, who: str | None, lines: list[str]) -> None:
        if not lines:
            return
        self.fresh_line()
        head = self.dim(one_line(who) + " | ") if who else ""
        for line in lines:
            line = screen.without_moves(line)[:LINE_LIMIT]
            self._add(head + line + ("\x1b[0m" if "\x1b" in line else "") + "\n")
        self._block = None

    def _shown(self, message: Message) -> str:
        """A MIME bundle as text, with its image drawn or saved."""
        data = message.content.get("data")
        if not isinstance(data, dict):
            return ""
        image = screen.image_in(data)
        if image is None:
            return self._filtered(screen.text_of(data))
        kind, content = image
        if content is None:
            return "(broken %s)" % kind
        if self.images and not self.is_prompt_up and not self.is_muffled:
            drawn = screen.image_escape(self.images, kind, content)
            if drawn:
                self._block = None
                return drawn
        return self._saved(kind, content)

    def _saved(self, kind: str, content: bytes) -> str:
        try:
            self._folder = self._folder or tempfile.mkdtemp(prefix="twoproc-images-")
            self._images += 1
            path = os.path.join(self._folder, "%d.%s" % (self._images, screen.IMAGES[kind]))
            with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(content)
        except OSError as error:
            return "(%s, %d bytes, not saved: %s)" % (kind, len(content), error.strerror)
        return "(%s, %s%d bytes: %s)" % (kind, screen.size_of(kind, content), len(content), path)

    def _gate(self, key: tuple) -> screen.EscapeFilter:
        if key not in self._gates:
            self._gates[key] = self._new_gate()
        return self._gates[key]

    def _new_gate(self) -> screen.EscapeFilter:
        return screen.NoFilter() if self.raw_escapes else screen.EscapeFilter(colors=self.colors)

    def _filtered(self, text: str) -> str:
        text = self._new_gate().feed(text)
        return text[:LINE_LIMIT] + self._cut_note(len(text))

    def _excerpt(self, text: str) -> str:
        """Beginning and end of a text of very many lines, with the number of those between."""
        if len(text) <= BEHIND_CHARS or text.count("\n") <= HEAD_LINES + TAIL_LINES:
            return text
        lines = text.split("\n")
        left_out = len(lines) - HEAD_LINES - TAIL_LINES
        return "\n".join([*lines[:HEAD_LINES], self.dim("... %s lines not shown" % format(left_out, ",")),
                          *lines[-TAIL_LINES:]])

    def _cut_lines(self, text: str) -> str:
        """Limit each line of our cell's; the last one goes on with the next text."""
        pieces = []
        for piece in re.split("(?<=[\r\n])", text):
            pieces.append(piece[:max(0, LINE_LIMIT - self._line_chars)])
            self._line_chars += len(piece)
            if piece.endswith(("\r", "\n")):
                pieces.append(self._cut_note(self._line_chars - 1))
                self._line_chars = 0
        return "".join(pieces)

    def _cut_note(self, chars: int) -> str:
        if chars <= LINE_LIMIT:
            return ""
        return "\n" + self.dim("(output cut at 1 MB; %s characters not shown)" % format(chars - LINE_LIMIT, ",")) + "\n"


def _display_id(message: Message) -> str | None:
    transient = message.content.get("transient")
    return transient.get("display_id") if isinstance(transient, dict) else None


def one_line(name: str) -> str:
    """Somebody else's name, safe to print: nothing but what can be seen, and not long."""
    return "".join(c for c in name if c.isprintable())[:32] or "?"


def _joined(messages: Iterable[tuple[Message, str | None]]) -> Iterator[tuple[Message, str | None]]:
    """Neighbours of one stream as one message: a flood is then cut once, not once a message."""
    for stream, entries in itertools.groupby(messages, _stream_of):
        if stream is None:
            yield from entries
            continue
        (message, who), *more = entries
        texts = [str(message.content.get("text", "")) for message, _ in [(message, who), *more]]
        yield message._replace(content={**message.content, "text": "".join(texts)}), who


def _stream_of(entry: tuple[Message, str | None]) -> tuple | None:
    message = entry[0]
    if message.msg_type != "stream":
        return None
    return message.content.get("name"), message.parent_header.get("msg_id")
