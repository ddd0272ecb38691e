# Distributed under the terms of the BSD 3-Clause License.
"""What a kernel sends, as text that a terminal may show.

Output comes from code that we did not write, perhaps from another machine or typed by another user, and a
terminal obeys what it is sent: it changes its title, fills the clipboard, answers questions by typing.  So
there is one gate, EscapeFilter, and everything a kernel says passes it before it reaches a screen.  Beside it
stand the small questions of the same kind: which of the forms in a MIME bundle a terminal can show, how many
rows a text occupies, what a line that overwrites itself finally says.

Called by frontend.py and terminal.py, in their main thread.  Text in, text out: nothing here writes, waits or
knows a socket.
"""
from __future__ import annotations

import base64
import binascii
import json
import re
import unicodedata
from html.parser import HTMLParser

# -- the gate --------------------------------------------------------------------------------------

# What a terminal obeys without an escape: everything below blank but BS, TAB, LF and CR, DEL, and the C1
# controls, which some terminals take for the beginning of a sequence.
_SUSPECT = re.compile("[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SEQUENCE = re.compile(
    "(?P<color>\x1b\\[[0-9;:]*m)"
    # At most 99: enough for nested progress bars, too little to paint over what somebody else said.
    "|(?P<move>\x1b\\[[0-9]{0,2}[ABCDGK]|\x1b\\[[0-2]?J)"
    "|(?P<link>\x1b\\]8;[^;\x07\x1b]*;(?:(?:https?|file|mailto):[!-~]{1,2000})?(?:\x07|\x1b\\\\))"
    "|(?P<string>\x1b[\\]PX^_])"
    "|\x1b\\[[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-~]|[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# The beginning of a sequence whose end may come with the next piece of text.
_UNFINISHED = re.compile("\x1b(?:\\[[0-?]*[ -/]*|[ -/]*|\\]8?|\\]8;[^\x07\x1b]*\x1b?)\\Z")
_STRING_END = re.compile("[\x07\x18\x1a\x9c]|\x1b\\\\|(?=\x1b.)", re.S)
PENDING_LIMIT = 4096


class EscapeFilter:
    """Lets colours, CR LF TAB BS, small movements of the cursor and links through; drops every other control.

    colors, moves: False drops those too.  Sequences may be cut anywhere between two calls of `feed`.
    A string command (clipboard, title, images) is dropped up to its end without being kept, so it cannot
    grow in memory; any escape ends it early, as in a terminal.
    """

    def __init__(self, colors: bool = True, moves: bool = True):
        self._keep = {"link"} | ({"color"} if colors else set()) | ({"move"} if moves else set())
        if not colors and not moves:
            self._keep.clear()
        self._pending = ""
        self._in_string = False

    def feed(self, text: str) -> str:
        if self._pending:
            text, self._pending = self._pending + text, ""
        elif not self._in_string and not _SUSPECT.search(text):
            return text
        kept = []
        at = 0
        while True:
            if self._in_string:
                end = _STRING_END.search(text, at)
                if end is None:
                    self._pending = "\x1b" if text.endswith("\x1b", at) else ""    # of ESC \, cut in two
                    break
                self._in_string, at = False, end.end()
            found = _SUSPECT.search(text, at)
            if found is None:
                kept.append(text[at:])
                break
            kept.append(text[at:found.start()])
            at = found.start()
            if _UNFINISHED.match(text, at) and len(text) - at <= PENDING_LIMIT:
                self._pending = text[at:]
                break
            sequence = _SEQUENCE.match(text, at)
            if sequence is None:        # an escape before something that no sequence goes on with
                at += 1
                continue
            at = sequence.end()
            if sequence.lastgroup in self._keep:
                kept.append(sequence.group())
            elif sequence.lastgroup == "string":
                self._in_string = True
        return "".join(kept)


class NoFilter(EscapeFilter):
    """Everything through, for who has asked for raw escapes."""

    def feed(self, text: str) -> str:
        return text


def without_escapes(text: str) -> str:
    return EscapeFilter(colors=False, moves=False).feed(text)


def without_moves(text: str) -> str:
    """One line with nothing that takes the cursor off it or over what stands there."""
    return EscapeFilter(moves=False).feed(text).replace("\b", "").replace("\r", "")


# -- lines -----------------------------------------------------------------------------------------

class Lines:
    """Whole lines out of a stream that somebody else writes, for a screen that shows our own half-typed one.

    A line that overwrites itself after a carriage return (a progress bar) is one line: its last state.
    """
    LIMIT = 1 << 20     # characters kept of a line that does not end

    def __init__(self) -> None:
        self._unfinished = ""

    def feed(self, text: str) -> list[str]:
        *lines, rest = (self._unfinished + text).split("\n")
        # What a later state overwrites is forgotten at once; a return at the very end may be half of CR LF.
        cut = rest.rfind("\r", 0, -1)
        self._unfinished = rest[cut + 1:][:self.LIMIT]
        return [last_state(line) for line in lines]

    def flush(self) -> list[str]:
        rest, self._unfinished = self._unfinished, ""
        return [last_state(rest)] if rest.strip("\r") else []

    def __bool__(self) -> bool:
        return bool(self._unfinished)


class Tail:
    """The last lines of a text, and the number of those before them."""

    def __init__(self, limit: int):
        self._limit = limit
        self._kept, self._dropped = "", 0

    def feed(self, text: str) -> None:
        lines = (self._kept + text).split("\n")
        self._dropped += max(0, len(lines) - self._limit)
        self._kept = "\n".join(lines[-self._limit:])

    def take(self) -> tuple[int, str]:
        result = self._dropped, self._kept
        self._kept, self._dropped = "", 0
        return result


def last_state(line: str) -> str:
    """What can be read in the end of a line with carriage returns; a shorter state leaves nothing behind."""
    return line.rstrip("\r").rpartition("\r")[2]


def rows_below(text: str, columns: int) -> int | None:
    """Rows from the one where this text began to the one where it left the cursor; None if that cannot be said."""
    if re.search("\x1b\\[[0-9]*[ABCDGJ]|\x08", text):
        return None
    row = column = 0
    for c in re.sub("\x1b(\\[[0-9;:]*[mK]|\\]8;[^\x07\x1b]*(\x07|\x1b\\\\))", "", text):
        if c == "\n":
            row, column = row + 1, 0
        elif c == "\r":
            column = 0
        elif c == "\t":
            column = min(column // 8 * 8 + 8, columns - 1)
        else:
            width = _width_of(c)
            if column + width > columns:
                row, column = row + 1, 0
            column += width
    return row


def _width_of(c: str) -> int:
    if c.isascii():
        return 1
    if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


# -- MIME bundles ----------------------------------------------------------------------------------

_NAMELESS = re.compile(r"<[\w.]+ object( at 0x[0-9a-fA-F]+)?>|<IPython\.core\.display\.\w+ object>")


def text_of(data: dict) -> str:
    """The form of a MIME bundle that says most in a terminal; "" if it has none."""
    plain = data.get("text/plain")
    if isinstance(plain, list):     # older kernels send lists of lines
        plain = "".join(map(str, plain))
    if isinstance(plain, str) and not _NAMELESS.fullmatch(plain.strip()):
        return plain
    for kind in ("text/markdown", "text/latex"):
        if isinstance(data.get(kind), str):
            return data[kind]
    if isinstance(data.get("text/html"), str):
        return text_of_html(data["text/html"]) or plain or ""
    if isinstance(plain, str):
        return plain
    for kind, value in data.items():
        if kind.endswith("json"):
            return json.dumps(value, ensure_ascii=False, indent=1)
        if kind.startswith("text/") and isinstance(value, str):
            return value
    return ""


class _Stripper(HTMLParser):
    BLOCKS = {"p", "div", "br", "tr", "table", "ul", "ol", "li", "pre", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "dt",
              "dd", "blockquote", "section", "article"}
    SILENT = {"script", "style", "head", "template"}

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent = self._pre = 0

    def handle_starttag(self, tag, attrs):
        if tag in self.SILENT:
            self._silent += 1
        elif tag in self.BLOCKS:
            self.parts.append("\n- " if tag == "li" else "\n")
        elif tag in ("td", "th"):
            self.parts.append("\t")
        self._pre += tag == "pre"

    def handle_endtag(self, tag):
        if tag in self.SILENT:
            self._silent = max(0, self._silent - 1)
        elif tag in self.BLOCKS and tag not in ("br", "li"):
            self.parts.append("\n")
        self._pre = max(0, self._pre - (tag == "pre"))

    def handle_data(self, data):
        if not self._silent:
            # In <pre> blanks count: they are held as no-break spaces until the others are gone.
            self.parts.append(data.replace(" ", "\xa0") if self._pre else re.sub(r"[ \t\r\n]+", " ", data))


def text_of_html(html: str) -> str:
    """What remains of HTML when only text can be shown: blocks on lines of their own, cells apart."""
    stripper = _Stripper()
    stripper.feed(html)
    stripper.close()
    lines = [line.strip(" ").lstrip("\t") for line in "".join(stripper.parts).split("\n")]
    return "\n".join(line.rstrip() for line in lines if line.strip()).replace("\xa0", " ").expandtabs()


def traceback_of(content: dict) -> str:
    """The traceback of an error message; of kernels that send none, its name and value."""
    lines = content.get("traceback")
    text = "\n".join(map(str, lines)) if isinstance(lines, list) else ""
    return text or ": ".join(filter(None, (str(content.get("ename", "")), str(content.get("evalue", "")))))


# -- images ----------------------------------------------------------------------------------------

IMAGES = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/svg+xml": "svg", "application/pdf": "pdf"}


def image_in(data: dict) -> tuple[str, bytes | None] | None:
    """(MIME type, bytes) of the first image in a bundle, None if it has none; the bytes are None if broken."""
    for kind in IMAGES:
        if kind not in data:
            continue
        value = data[kind]
        if isinstance(value, list):
            value = "".join(map(str, value))
        if not isinstance(value, str):
            return kind, None
        if kind == "image/svg+xml":
            return kind, value.encode("utf-8", "replace")
        try:
            content = base64.b64decode(value)
        except (binascii.Error, ValueError):
            return kind, None
        return kind, content if _is_whole(kind, content) else None
    return None


def _is_whole(kind: str, content: bytes) -> bool:
    """Begins and ends as its format demands; a viewer or a terminal is not to be tried with half a file."""
    if kind == "image/png":
        return content.startswith(b"\x89PNG\r\n\x1a\n") and content[12:16] == b"IHDR" and b"IEND" in content[-16:]
    if kind == "image/jpeg":
        return content.startswith(b"\xff\xd8") and b"\xff\xd9" in content[-64:]
    if kind == "image/gif":
        return content.startswith((b"GIF87a", b"GIF89a")) and content.endswith(b";")
    return bool(content)


def size_of(kind: str, content: bytes) -> str:
    """`640x480, ` of a PNG, nothing of others."""
    if kind == "image/png":
        return "%dx%d, " % (int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big"))
    return ""


def image_protocol(environ: dict) -> str | None:
    """How this terminal shows images: "kitty", "iterm2", or None; never behind a multiplexer that would not know."""
    if environ.get("TMUX") or environ.get("STY") or environ.get("TERM", "").startswith(("screen", "tmux")):
        return None
    if environ.get("KITTY_WINDOW_ID") or environ.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm", "mintty"):
        return "iterm2"
    return None


def image_escape(protocol: str, kind: str, content: bytes) -> str | None:
    """The sequence that draws an image; None if the protocol does not know its format."""
    encoded = base64.b64encode(content).decode("ascii")
    if protocol == "iterm2" and kind != "image/svg+xml":
        return "\x1b]1337;File=inline=1;size=%d:%s\x07\n" % (len(content), encoded)
    if protocol == "kitty" and kind == "image/png":
        pieces = [encoded[at:at + 4096] for at in range(0, len(encoded), 4096)]
        return "".join("\x1b_G%sm=%d;%s\x1b\\" % ("a=T,f=100," if at == 0 else "", at < len(pieces) - 1, piece)
                       for at, piece in enumerate(pieces)) + "\n"
    return None
