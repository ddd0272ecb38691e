# Distributed under the terms of the BSD 3-Clause License.
"""A terminal for tests: a pseudo-terminal with a screen in memory behind it.

    terminal = vt.Terminal(self, [sys.executable, "-m", "twoproc.frontend"], home)
    terminal.wait("In [1]:")            # until that text stands on the screen; fails with the screen shown
    terminal.send("1+1\r")

What a user sees is the last state of the screen, not the bytes that led to it; so tests look at the screen.
The emulator knows what prompt_toolkit and ordinary programs use, answers the question for the cursor's
position, and keeps what scrolls away.  Unknown sequences are collected in `Screen.unknown`.
"""
import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import termios
import time
import unicodedata

from . import support

KEYS = {"up": "\x1b[A", "down": "\x1b[B", "right": "\x1b[C", "left": "\x1b[D"}


class Screen:
    """Rows of characters and a cursor; `feed` does what a terminal would do."""

    _TOKEN = re.compile("\x1b\\[([?>=]?)([0-9;]*)([ -/]*[@-~])|\x1b\\]([^\x07\x1b]*)(?:\x07|\x1b\\\\)"
                        "|\x1b([ -/]*[0-~])|(.)", re.S)
    _WHOLE = re.compile("\x1b(\\[[?>=]?[0-9;]*[ -/]*[@-~]|\\][^\x07\x1b]*\x07|\\\\|[ -/]*[0-OQ-WYZ`-~=>])")

    def __init__(self, columns, rows, answer):
        self.columns, self.rows, self.answer = columns, rows, answer
        self.cells = [[] for _ in range(rows)]
        self.scrolled = []
        self.x = self.y = 0
        self.wraps = True
        self.is_wrap_pending = False
        self.title = ""
        self.unknown = []
        self._rest = ""

    def feed(self, text):
        text = self._rest + text
        # An escape sequence cut in two is completed by the next piece.
        cut = text.rfind("\x1b")
        tail = text[cut:] if cut >= 0 else ""
        is_cut = tail and not self._WHOLE.match(tail)
        self._rest = tail if is_cut and len(tail) < 5000 else ""
        for token in self._TOKEN.finditer(text[:cut] if self._rest else text):
            private, numbers, final, osc, escape, character = token.groups()
            if final is not None:
                self._control(private, [int(n or 0) for n in numbers.split(";")], final)
            elif osc is not None:
                if osc[:2] in ("0;", "2;"):
                    self.title = osc[2:]
                elif not osc.startswith("8;"):
                    self.unknown.append(osc)
            elif escape is not None:
                if escape not in ("=", ">", "\\"):
                    self.unknown.append(escape)
            else:
                self._character(character)

    def _character(self, c):
        if c == "\n":
            self._line_feed()
        elif c == "\r":
            self.x, self.is_wrap_pending = 0, False
        elif c == "\b":
            self.x, self.is_wrap_pending = max(0, self.x - 1), False
        elif c == "\t":
            self.x = min(self.columns - 1, self.x - self.x % 8 + 8)
        elif c >= " ":
            width = 0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
            if width == 0:
                return
            if self.is_wrap_pending or self.x + width > self.columns:
                self.x, self.is_wrap_pending = 0, False
                self._line_feed()
            row = self.cells[self.y]
            row.extend(" " * (self.x + width - len(row)))
            row[self.x] = c
            if width == 2:
                row[self.x + 1] = ""
            self.x += width
            if self.x >= self.columns:
                self.x = self.columns - 1
                self.is_wrap_pending = self.wraps

    def _line_feed(self):
        if self.y == self.rows - 1:
            self.scrolled.append(self.cells.pop(0))
            self.cells.append([])
        else:
            self.y += 1

    def _control(self, private, numbers, final):
        n = max(1, numbers[0])
        self.is_wrap_pending = False
        if private:
            if final in "hl" and 7 in numbers:
                self.wraps = final == "h"
        elif final == "A":
            self.y = max(0, self.y - n)
        elif final == "B":
            self.y = min(self.rows - 1, self.y + n)
        elif final == "C":
            self.x = min(self.columns - 1, self.x + n)
        elif final == "D":
            self.x = max(0, self.x - n)
        elif final == "G":
            self.x = min(self.columns, n) - 1
        elif final in "Hf":
            self.y = min(self.rows, n) - 1
            self.x = min(self.columns, max(1, numbers[1] if len(numbers) > 1 else 1)) - 1
        elif final == "J":
            if numbers[0] == 0:
                del self.cells[self.y][self.x:]
            for y in range(self.y + 1 if numbers[0] == 0 else 0, self.rows):
                self.cells[y] = []
        elif final == "K":
            if numbers[0] == 0:
                del self.cells[self.y][self.x:]
            else:
                self.cells[self.y] = []
        elif final == "n" and numbers[0] == 6:
            self.answer("\x1b[%d;%dR" % (self.y + 1, self.x + 1))
        elif final not in "mqt":
            self.unknown.append((private, numbers, final))

    def lines(self):
        """The rows on the screen, without what is blank at their ends and below."""
        lines = ["".join(row).rstrip() for row in self.cells]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def all_lines(self):
        return ["".join(row).rstrip() for row in self.scrolled] + self.lines()


class Terminal:
    """A program on a terminal of its own, ended with the test."""

    def __init__(self, case, argv, home, env=None, columns=110, rows=40):
        self.home = home
        environment = {**home.env, "TERM": "xterm-256color", "LANG": "C.UTF-8", **(env or {})}
        for name in ("NO_COLOR", "TMUX", "KITTY_WINDOW_ID", "TERM_PROGRAM"):
            if name not in (env or {}):
                environment.pop(name, None)
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(home.work)
            os.execvpe(argv[0], argv, environment)
        self.status = None
        self.raw = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")    # a character may come in two pieces
        self.screen = Screen(columns, rows, self._answer)
        self.resize(columns, rows)
        support._cleanup(case, self.end)

    def resize(self, columns, rows):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.columns, self.screen.rows = columns, rows

    def send(self, text):
        os.write(self.fd, text.encode())

    def type(self, *keys):
        """Text, and names of keys in KEYS, one after the other."""
        for key in keys:
            self.send(KEYS.get(key, key))

    def _answer(self, text):
        try:
            os.write(self.fd, text.encode())
        except OSError:
            pass

    def read(self, timeout):
        """Take what the program has written; False when nothing came, or nothing ever will."""
        if not select.select([self.fd], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:     # EIO: the last process on this terminal has ended
            data = b""
        if not data:
            return False
        text = self._decoder.decode(data)
        self.raw += text
        self.screen.feed(text)
        return True

    def wait(self, wanted, deadline=support.DEADLINE):
        """Until `wanted` (a text, or a function of the lines on a screen that is not empty) is there; the lines."""
        end = time.monotonic() + deadline
        while True:
            lines = self.screen.lines()
            if wanted in "\n".join(lines) if isinstance(wanted, str) else lines and wanted(lines):
                return lines
            left = end - time.monotonic()
            if left <= 0:
                raise support.DeadlineError(f"not on the screen within {deadline} s: {self._said(wanted)}")
            is_alive = self.is_alive
            if not self.read(min(left, 0.5)) and not is_alive:
                raise support.DeadlineError(f"ended before this was on the screen: {self._said(wanted)}")

    def _said(self, wanted):
        return (wanted if isinstance(wanted, str) else support.source_of(wanted)) + "\n" + self.show()

    def complete(self, wanted):
        """Tab until that is there: a kernel has a second for its matches, and the first ones may take longer."""
        for is_last in (False, False, True):
            self.send("\t")
            try:
                return self.wait(wanted, support.DEADLINE if is_last else 5)
            except support.DeadlineError:
                if is_last:
                    raise

    def wait_gone(self, text, deadline=support.DEADLINE):
        return self.wait(lambda lines: text not in "\n".join(lines), deadline)

    def prompt(self, number, deadline=support.DEADLINE):
        """Until the last line is the empty prompt with this number."""
        return self.wait(lambda lines: lines[-1] == f"In [{number}]:", deadline)

    def run(self, code, number):
        """Type one line, and wait for the next prompt; the screen."""
        self.send(code + "\r")
        return self.prompt(number + 1)

    def show(self):
        return "\n".join("  |" + line for line in self.screen.all_lines()[-60:])

    @property
    def is_alive(self):
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def wait_end(self, deadline=support.DEADLINE):
        """The exit status."""
        end = time.monotonic() + deadline
        while self.is_alive:
            if time.monotonic() > end:
                raise support.DeadlineError(f"still running after {deadline} s\n" + self.show())
            self.read(0.02)
        while self.read(0.05):
            pass
        return self.status

    def end(self):
        if self.is_alive:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.status = -9
        os.close(self.fd)


def end_kernels(home):
    """Kill every kernel of this home: those of a terminal outlive it."""
    for pid in kernel_pids(home):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def kernel_pids(home):
    folder = os.path.join(home.run, "kernels")
    pids = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        if name.endswith(".json"):
            with open(os.path.join(folder, name)) as file:
                pids.append(json.load(file).get("twoproc_pid"))
    return [pid for pid in pids if pid]
