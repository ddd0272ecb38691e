# Distributed under the terms of the BSD 3-Clause License.
"""What is done with the log of a session that did not end properly.

crashlog.py writes and reads the log; here stands what a user wants of it: what killed the kernel, what is
saved, and its cells as text, as a notebook, as definitions, or run once more.  Three callers: the magic
%recover in a kernel (`recover`, `notice`), `python -m <package>.crashlog` (`list_lines`, `show`, `export`,
`replay`), and a frontend whose kernel died under it (`cause`, `describe`, `export`).

Two rules.  Only what is known is said: an exit status and the faulthandler's file are facts, and where both are
missing the text says so.  And nothing runs by itself: a cell is run again only when a person has seen it and
said yes, and the cell that was running at the death only if it was named.

What a log holds was written by code that may be anybody's by now, so text for a screen leaves here without
escape sequences.  All of this runs in the caller's thread; only `replay` connects, and only it loads ZeroMQ.
"""
from __future__ import annotations

import contextlib
import html
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from . import connection, crashlog, screen
from .crashlog import LoggedCell, LoggedSession, StateError
from .export import (
    calls_recover, cell_name, definitions_of, notebook, notebook_outputs, output_of, private_words, script)

# Who recovers a session and dies within this many seconds was perhaps killed by that.
AGAIN_SECONDS = 30.0


class RecoveryError(StateError):
    """What cannot be done, and why, in one line.  exit_code: of the command line."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message, exit_code)


# -- what killed it --------------------------------------------------------------------------------

class Death(NamedTuple):
    """text: what ended the process, as far as it is known; signal: its name or ""; line: where in `cell`, the cell
    that was running; function: the innermost one; place: "in In [7]", "while idle, after In [6]"."""
    text: str
    signal: str = ""
    line: int | None = None
    function: str = ""
    cell: LoggedCell | None = None
    place: str = ""

    def __str__(self) -> str:
        return "died %s: %s" % (self.place, self.text)


class _Frame(NamedTuple):
    file: str
    line: int | None
    function: str


class _Fault(NamedTuple):
    """What faulthandler wrote as the process died; frames: of the thread that failed, innermost first."""
    signal: str
    text: str
    frames: list[_Frame]
    thread: str


_FATAL = re.compile(r"^(?:Fatal Python error|Windows fatal exception): (.*)$", re.M)
# A name in brackets since 3.14.
_THREAD = re.compile(r"(Current thread|Thread) 0x[0-9a-fA-F]+ ?(?:\[(.*)\] )?\(most recent call first\):")
_FRAME = re.compile(r'  File (?:"(.*)"|\?\?\?), line (\d+|\?\?\?) in (.*)')
_SIGNALS = {"segmentation fault": "SIGSEGV", "aborted": "SIGABRT", "floating point exception": "SIGFPE",
            "bus error": "SIGBUS", "illegal instruction": "SIGILL"}


def cause(session: LoggedSession, status: int | None = None) -> Death:
    """What ended the kernel of this session.

    status: as subprocess has it, minus the number of a signal, of whoever waited for the process just now;
    None: what the log says about it, if anything.
    """
    records = session.outline()
    cells = _inputs(records)
    cell = _running(cells)
    if status is None:
        status = next((record["status"] for record in reversed(records) if record["k"] == "exit"), None)
    own = next((str(record.get("text", "")) for record in records if record["k"] == "note" and
                record["what"] == "fault"), "").strip().rpartition("\n")[2]
    number = -status if status is not None and status < 0 else 0
    name, shells = _signal_name(number), _signal_name((status or 0) - 128)
    fault = _parse_fault(session.fault_text())
    if fault and status is not None and os.name != "nt" and fault.signal not in ("", name, shells):
        fault = None        # somebody else's who had the file open: the process ended otherwise
    place = "in " + cell_name(cell) if cell else "while idle, " + (
        "after " + cell_name(cells[-1]) if cells else "before the first cell")
    where, line, function = _where(fault, cell, cells) if fault else ("", None, "")
    if fault and fault.thread and cell and line is None:
        place = "while %s was running" % cell_name(cell)        # which need not have had a part in it
    if fault:
        name = name or fault.signal
        text = (name + ("" if fault.signal else " (%s)" % fault.text) if name else fault.text) + where
    elif name == "SIGKILL":
        text = "SIGKILL: killed from outside (kill -9 or out of memory)"
    elif name:
        text = name
    elif own:
        text = "a fault of the kernel's own, not of the cell: " + own
    elif status is None:
        text = "killed from outside or ended by os._exit: nothing else is known"
    else:
        text = "%s ended the process itself, status %d%s" % (
            "the cell" if cell else "something in it", status, shells and ", which is how a shell tells of " + shells)
    return Death(_line(text), name, line, function, cell, place)


def _inputs(records: list[dict]) -> list[LoggedCell]:
    """The cells without their outputs, which would take most of the time to read."""
    cells = {record["of"]: LoggedCell(record) for record in records if record["k"] == "begin"}
    for record in records:
        if record["k"] == "end" and record["of"] in cells:
            cells[record["of"]].is_ended, cells[record["of"]].ok = True, record["ok"]
    return list(cells.values())


def _running(cells: list[LoggedCell]) -> LoggedCell | None:
    """The last cell, if it was not ended; or the one within which that ran, by %recover.

    Any other without an end has lost that record, and nothing else.
    """
    return next((cell for cell in reversed(cells) if not cell.is_ended and cell.ec == cells[-1].ec), None)


def _killer(session: LoggedSession, cells: list[LoggedCell]) -> LoggedCell | None:
    """The one of these that was running at the death; that of a living kernel is just running."""
    return None if session.state() in ("alive", "closed") else _running(cells)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "signal %d" % number if 0 < number < 128 else ""


def _parse_fault(text: str) -> _Fault | None:
    fatal = list(_FATAL.finditer(text))
    if not fatal:
        return None
    words = fatal[-1][1].strip()
    current: re.Match | None = None
    frames: list[_Frame] = []
    is_here = False
    for line in text[fatal[-1].end():].splitlines():
        if not line.startswith(" "):        # a thread, an empty line, "Extension modules: ...", the stack of C
            begin = _THREAD.match(line)
            is_here = begin is not None and begin[1] == "Current thread"
            current = begin if is_here else current
        elif is_here and (found := _FRAME.match(line)):
            frames.append(_Frame(found[1] or "", int(found[2]) if found[2].isdigit() else None, found[3]))
    thread = ""
    if current is None or frames and frames[-1].function == "_bootstrap":
        thread = "in a thread" + ("" if current is None or not current[2] else " (%s)" % current[2])
    return _Fault(_SIGNALS.get(words.lower().replace("-", " "), ""), words, frames, thread)


def _where(fault: _Fault, cell: LoggedCell | None, cells: list[LoggedCell]) -> tuple[str, int | None, str]:
    """(" at line 3 of the cell, in lib.solve", 3, "lib.solve"); the line is None if it is not one of this cell."""
    # The innermost frame of a cell, and of which; the file's name begins alike for cells run within a cell.
    here, owner = next(((frame, cell) for frame in fault.frames if cell and _is_of(frame, cell)), None) or next(
        ((frame, other) for frame in fault.frames for other in reversed(cells) if _is_of(frame, other)), (None, None))
    parts = [fault.thread] if fault.thread else []
    if here is not None and owner is not None:
        parts.append("at line %s of %s" % (here.line, "the cell" if owner is cell else cell_name(owner)))
    named = here if here is not None and not here.function.startswith("<") else None
    if named is None and fault.frames and fault.frames[0] is not here and fault.frames[0].file:
        named = fault.frames[0]
    function = named.function if named is not None else ""
    if named is not None and named is not here:
        stem = os.path.splitext(named.file.replace("\\", "/"))[0].removesuffix("/__init__").rpartition("/")[2]
        function = "%s.%s" % (stem, function) if stem.isidentifier() else function
    if function:
        parts.append("in " + function)
    return " " * bool(parts) + ", ".join(parts), here.line if here and owner is cell else None, function


def _is_of(frame: _Frame, cell: LoggedCell) -> bool:
    """Whether this is code of the cell.  A name that ends in "-" is the beginning of what Python calls the cell."""
    # As faulthandler writes it: what is not ASCII as in a string literal, cut after 500 characters.
    file = cell.file.encode("ascii", "backslashreplace").decode("ascii")[:500]
    found = frame.file.removesuffix("...")
    return bool(file) and (found.startswith(file) if file.endswith("-") or len(found) >= 500 else found == file)


# -- what is saved ---------------------------------------------------------------------------------

def headline(session: LoggedSession) -> str:
    """What happened, in one line; soon there, also when there is much output to count for the other lines."""
    state, pid = session.state(), session.opened.get("pid", "unknown")
    when = "(%s, pid %s)" % (_last_time(session.outline()), pid)
    if state == "alive":
        first = "The kernel is running  (pid %s)" % pid
    elif state == "closed":
        first = "The session was closed: %s  %s" % (session.closed_why, when)
    else:
        first = "The kernel %s  %s" % (cause(session), when)
    if state == "unknown":
        first = "It ran on host %s, and may still.  If it does not: %s" % (session.opened.get("host"), first)
    return _line(first)


def describe(session: LoggedSession) -> list[str]:
    """Three lines: what happened, what is saved, what is not."""
    records = session.outline()
    begun = [record for record in records if record["k"] == "begin"]
    kept = sum(isinstance(record.get("code"), str) for record in begun)
    missing = ["variables"]
    if any(record["k"] == "cut" for record in records):     # else nobody has to parse all the output
        cut = [cell.cut for cell in session.cells() if cell.cut]
        missing += ["%s of output in %s" % (_count(sum(cut), "piece"), _count(len(cut), "cell"))] if cut else []
    lost = session.lost         # first: what this reads, `damaged` need not read again
    for number, what in ((len(begun) - kept, "private cell"), (session.damaged, "damaged record"),
                         (lost, "lost record")):
        missing += [_count(number, what)] if number else []
    saved = _count(kept, "input") + (" and what came out" if kept else "")
    return [headline(session), "  saved: " + saved, "  not saved: " + ", ".join(missing)]


def notice(session: LoggedSession) -> tuple[str, str]:
    """Three lines for a frontend that knows nothing of this log, as text and as HTML."""
    first, saved, missing = describe(session)
    lines = [first, "%s;%s" % (saved, missing[1:]), "  nothing was run again; %recover help says what can be done"]
    return "\n".join(lines), "<div><strong>%s</strong><br>%s<br>%s</div>" % tuple(
        html.escape(line.strip()) for line in lines)


def list_lines(sessions: Iterable[LoggedSession]) -> list[str]:
    """One line for each session: name, state, time, folder, cells, the last cell, what ended it."""
    lines = []
    for session in sessions:
        state, opened, records = session.state(), session.opened, session.outline()
        begun = [record for record in records if record["k"] == "begin"]
        words = {"alive": "running (pid %s)" % opened.get("pid"), "unknown": "unknown (host %s)" % opened.get("host")}
        parts = [session.id, words.get(state, state), _last_time(records, is_short=True), _home(opened.get("cwd")),
                 _count(len(begun), "cell")]
        if begun:
            first = str(begun[-1].get("code") or "(private)").strip().split("\n")[0]
            parts.append("In [%d]: %s" % (begun[-1]["ec"], first if len(first) <= 40 else first[:37] + "..."))
        if state == "died":
            parts.append(cause(session).text)
        lines.append(_line("  ".join(filter(None, parts))))
    return lines


def _last_time(records: list[dict], is_short: bool = False) -> str:
    """When the process ended, if somebody waited for it; else when it was last heard of."""
    said = [record for record in records if record["k"] != "recovered"]
    is_exact = bool(said) and said[-1]["k"] in ("exit", "close")
    try:
        day, clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(said[-1]["t"])).split()
    except (IndexError, ValueError, OverflowError, OSError):
        return "at an unknown time"
    if is_short:
        return "%s %s" % (day, clock[:5])
    clock = clock if day == time.strftime("%Y-%m-%d") else "%s %s" % (day, clock)
    return clock if is_exact else "last record " + clock


def died_again(session: LoggedSession) -> bool:
    """Whether this session died within AGAIN_SECONDS of a recovery: it was recovering another, or was recovered by
    one that died so soon.  By the clock, so it is a reason to ask once more, not one to refuse."""
    there = {other.id: other for other in crashlog.sessions()}
    began = session.opened.get("t", 0.0) - AGAIN_SECONDS
    for other in there.values():
        # Whom this one recovered has a record of that since it began: most of the others need not be read.
        with contextlib.suppress(OSError):
            if other.id != session.id and os.stat(other.path(".log")).st_mtime < began:
                continue
        for record in other.outline():
            heir = there.get(record["by"]) if record["k"] == "recovered" and record["how"] != "notice" else None
            if heir is not None and session.id in (other.id, heir.id) and heir.state() == "died":
                if max(last["t"] for last in heir.records() if last["k"] != "recovered") - record["t"] < AGAIN_SECONDS:
                    return True
    return False


# -- its cells as text -----------------------------------------------------------------------------

def show(session: LoggedSession, most: int | None = None) -> list[str]:
    """Inputs and outputs in the order in which they were, as lines for a screen.

    most: characters of a cell's printed text; of what is longer, beginning and end.
    """
    cells = session.cells()
    killer, death = _killer(session, cells), cause(session)
    lines = [session.id, *describe(session)]
    for cell, outputs in zip(cells, notebook_outputs(cells)):
        lines.append("")
        if cell is killer:
            lines.append("the kernel " + str(death))
        lines += _input_lines(cell, death.line if cell is killer else None)
        for output in outputs:
            lines += _output_text(_excerpt(output, most)).split("\n")
        if cell.cut:
            lines.append("(%s of its output not kept)" % _count(cell.cut, "piece"))
    return lines


def _input_lines(cell: LoggedCell, mark: int | None = None) -> list[str]:
    head = cell_name(cell) + ": "
    if cell.code is None:
        return ["%s(%s)" % (head, private_words(cell))]
    return [(head if at == 1 else ("---> " if at == mark else "...: ").rjust(len(head))) + _line(text)
            + ("    <--" if at == mark == 1 else "") for at, text in enumerate(cell.code.split("\n"), 1)]


def _excerpt(output: dict, most: int | None) -> dict:
    if most is None or output["output_type"] != "stream" or len(output["text"]) <= most:
        return output
    text = output["text"]
    return {**output, "text": "%s\n(%s characters not shown)\n%s" % (
        text[:most >> 1], format(len(text) - most, ","), text[-(most >> 1):])}


def _output_text(output: dict) -> str:
    if output["output_type"] == "stream":
        return _clean(output["text"]).rstrip("\n")
    if output["output_type"] == "error":
        return _clean(screen.traceback_of(output)).rstrip("\n")
    text = _clean(screen.text_of(output["data"])).rstrip("\n") or "(%s)" % ", ".join(map(_line, output["data"]))
    if output["output_type"] == "execute_result":
        return "Out[%s]: %s%s" % (output["execution_count"], "\n" if "\n" in text else "", text)
    return text


def _clean(text: str) -> str:
    """Nothing a terminal obeys, and of a line that overwrote itself what could be read in the end."""
    text = screen.without_escapes(text).replace("\b", "")
    return "\n".join(map(screen.last_state, text.split("\n")))


def _line(text: Any) -> str:
    """One line of it, with nothing a terminal obeys."""
    return " ".join(_clean(str(text).replace("\r", " ")).split("\n"))


def _count(number: int, word: str) -> str:
    return "%d %s%s" % (number, word, "" if number == 1 else "s")


def _home(path: Any) -> str:
    home, path = os.path.expanduser("~"), str(path or "")
    return "~" + path[len(home):] if home != "/" and (path + "/").startswith(home + "/") else path


# -- as a file -------------------------------------------------------------------------------------

def export(session: LoggedSession, path: str) -> None:
    """Write the session as a script (.py) or as a notebook (.ipynb); never over a file that is there."""
    cells = session.cells()
    killer, death = _killer(session, cells), str(cause(session))
    if path.lower().endswith(".ipynb"):
        text = notebook(cells, killer, death, session.id, _line(session.opened.get("python", "")))
    elif path.lower().endswith(".py"):
        text = script(cells, killer, death, [session.id, *describe(session)])
    else:
        raise RecoveryError("cannot export to %s: the name must end in .ipynb or .py" % _line(path))
    try:
        with open(path, "x", encoding="utf-8", errors="replace", newline="") as file:
            file.write(text)
    except FileExistsError:
        raise RecoveryError("%s exists already; give another name" % _line(path))
    except OSError as error:
        raise RecoveryError("cannot write %s: %s" % (_line(path), error.strerror or error), 1)


# -- run once more ---------------------------------------------------------------------------------

def definitions(session: LoggedSession) -> str:
    """Imports, functions and classes of the session as code, without the cell that was running at the death."""
    cells = _inputs(session.outline())
    killer = _killer(session, cells)
    return definitions_of([cell for cell in cells if cell is not killer])


def replay_cells(session: LoggedSession, selection: str = "") -> list[LoggedCell]:
    """The cells that a replay would run.

    selection: numbers and ranges as in "3-6,9", "" or "all" for all of them.  Never a private cell, which is not
    kept, nor a call of %recover; the cell that was running at the death only as a number of its own.
    Raises RecoveryError for a selection that is none.
    """
    return _choose(session, selection)[0]


def _choose(session: LoggedSession, selection: str) -> tuple[list[LoggedCell], list[str]]:
    """The cells to run; and those left out, with the reason."""
    cells = _inputs(session.outline())
    killer = _killer(session, cells)
    wanted: list[range] = []
    for part in filter(None, re.split(r"[\s,]+", "" if selection.strip() == "all" else selection)):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if not found:
            raise RecoveryError("replay %s: expected numbers of cells, like 3-6,9" % _line(part))
        wanted.append(range(int(found[1]), int(found[2] or found[1]) + 1))
        if not any(cell.ec in wanted[-1] for cell in cells):
            raise RecoveryError("replay %s: there is no such cell; %s" % (
                part, "the last is " + cell_name(cells[-1]) if cells else "there is none at all"))
    chosen, left_out = [], []
    for cell in cells:
        if wanted and not any(cell.ec in numbers for numbers in wanted):
            continue
        if cell.code is None:
            left_out.append("%s (private)" % cell_name(cell))
        elif calls_recover(cell.code):
            left_out.append("%s (%%recover)" % cell_name(cell))
        elif cell is killer and range(cell.ec, cell.ec + 1) not in wanted:
            left_out.append("%s (running when the kernel died)" % cell_name(cell))
        else:
            chosen.append(cell)
    return chosen, left_out


@contextlib.contextmanager
def _agreed(session: LoggedSession, selection: str, ask: Callable[[str], str],
            say: Callable[[str], None]) -> Iterator[list[LoggedCell]]:
    """Show what would be run, and ask.  The cells, while no other recoverer can have them; none if the answer is no."""
    state = session.state()
    if state == "alive":
        raise RecoveryError("session %s is running (pid %s): there is nothing to recover" % (
            session.id, session.opened.get("pid")))
    cells, left_out = _choose(session, selection)
    questions = ["Run %s again? [y/N] " % (_count(len(cells), "cell"))]
    if died_again(session):
        questions.append("A kernel died within %d s of recovering this.  Run it all the same? [y/N] " % AGAIN_SECONDS)
    if state == "unknown":
        questions.append("It may still be running, on host %s.  Run it all the same? [y/N] " % _line(
            session.opened.get("host")))
    for cell in cells:
        say("\n".join(_input_lines(cell)))
    if left_out:
        say("left out: " + ", ".join(left_out))
    if not cells:
        say("there is nothing to run")
        yield []
    elif not all(_is_yes(ask, question) for question in questions):
        say("nothing was run")
        yield []
    else:
        with session.take(anyway=True):
            yield cells


def _run_all(cells: list[LoggedCell], run: Callable[[LoggedCell], bool], say: Callable[[str], None]) -> bool:
    """Run them up to the first error that is new: what failed in the session may fail again."""
    for at, cell in enumerate(cells, 1):
        if not run(cell) and cell.ok is not False:
            rest = ", ".join(map(cell_name, cells[at:]))
            say("stopped at %s%s" % (cell_name(cell), rest and "; not run: " + rest))
            return False
    say("%s run again" % _count(len(cells), "cell"))
    return True


def _is_yes(ask: Callable[[str], str], question: str) -> bool:
    try:
        return ask(question).strip().lower() in ("y", "yes")
    except (EOFError, NotImplementedError):     # the latter: IPython's, for a frontend that has no input
        return False


def replay(session: LoggedSession, into: str | None = None, ask: Callable[[str], str] | None = None) -> int:
    """For the command line: run the cells in a kernel, a new one unless `into` names one; returns the exit status.

    A new kernel runs in the session's folder and is left running.  Ctrl-C interrupts the cell and ends the replay.
    Raises StateError.
    """
    try:
        with _agreed(session, "", ask or input, _print) as cells:
            return _replay_in_kernel(session, cells, into, ask or input) if cells else 0
    except KeyboardInterrupt:
        _print("\ninterrupted")
        return 130


def _replay_in_kernel(session: LoggedSession, cells: list[LoggedCell], into: str | None,
                      ask: Callable[[str], str]) -> int:
    from . import client, config, launcher
    from .start import join_command
    process, is_left = None, False
    try:
        if into is None:
            settings, folder = config.load(), session.opened.get("cwd")
            process = launcher.KernelProcess(
                transport=settings["kernel.transport"], keep=True,
                cwd=folder if isinstance(folder, str) and os.path.isdir(folder) else None,
                arguments=["--orphan-timeout", str(settings["kernel.orphan_timeout"])])
            process.start()
        with client.connect(process or into) as kernel:
            path, is_left = kernel.connection_file or "", True
            name, player = connection.kernel_name_of(path), _Player(kernel, ask)
            by = next((other.id for other in crashlog.sessions() if other.opened.get("conn") == path), name)
            # Before they run: if they kill this kernel too, that shall be known.
            session.append("recovered", by=by, how="replay")
            is_done = _run_all(cells, player.run, _print)
            _print("kernel %s is left running; join it with: %s" % (name, join_command(name)))
            return 130 if player.is_interrupted else 0 if is_done else 1
    except client.KernelDied as error:
        raise RecoveryError("%s; nothing more was run" % error, 70)
    except (connection.ConnectionFileError, config.ConfigError, launcher.LaunchError) as error:
        raise RecoveryError(str(error), error.exit_code)
    except client.NotReady as error:
        raise RecoveryError(str(error))
    finally:
        if process is not None and not is_left:
            process.shutdown()


class _Player:
    """Runs cells in a kernel, and prints what comes out as it comes."""

    def __init__(self, kernel: Any, ask: Callable[[str], str]):
        self.kernel, self.ask = kernel, ask
        self.is_interrupted = False
        self._gate = screen.EscapeFilter(colors=False, moves=False)

    def run(self, cell: LoggedCell) -> bool:
        for line in _input_lines(cell):
            _print(line)
        pending = self.kernel.execute_nowait(cell.code, allow_stdin=True)
        while True:
            try:
                reply = pending.wait(on_output=self._show, on_input=self._answer)
                break
            except KeyboardInterrupt:
                if self.is_interrupted:
                    raise
                self.is_interrupted = True
                self.kernel.interrupt_nowait()
        return not self.is_interrupted and reply is not None and reply.content.get("status") == "ok"

    def _show(self, message: Any) -> None:
        if message.msg_type == "stream":
            _print(self._gate.feed(str(message.content.get("text", ""))), end="")
        elif (output := output_of(message.msg_type, message.content)) is not None:
            _print(_output_text(output))

    def _answer(self, prompt: str, password: bool) -> str:
        if password:
            import getpass
            return getpass.getpass(_line(prompt))
        return self.ask(_line(prompt))


def _print(text: str, end: str = "\n") -> None:
    """To stdout at once, whatever its encoding cannot hold as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)


# -- the magic -------------------------------------------------------------------------------------

USAGE = """\
%recover                  what happened to the session before this one
%recover list             all sessions that are still there
%recover show             its inputs and outputs
%recover replay [3-6,9]   run its cells again, after asking; without the one that was running at the end
%recover defs             run its imports, functions and classes again
%recover export FILE      write it as .ipynb or .py
%recover drop             delete it
%recover status           where this session is logged
The name of a session, from the list, may follow: %recover show 20261123T091402-4711-a1b2c3"""


def recover(line: str, log: Any, run: Callable[[LoggedCell], bool], say: Callable[[str], None],
            ask: Callable[[str], str] | None = None) -> None:
    """The body of the magic %recover.  Whatever cannot be done is one line, never an exception.

    log: the SessionLog of this kernel, None if it keeps none.  run(cell): run it here and show what comes out;
    whether it ended without an error.  say(text): show it.  ask(question): by default input().
    """
    try:
        _recover(line, log, run, say, ask or input)
    except StateError as error:
        say("%%recover: %s" % error)
    except OSError as error:
        say("%%recover: %s" % _line(error))


def _recover(line: str, log: Any, run: Callable[[LoggedCell], bool], say: Callable[[str], None],
             ask: Callable[[str], str]) -> None:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise RecoveryError("%s in: %s" % (error, _line(line)))
    names = [word for word in words[1:] if re.match(r"\d{8}T\d", word)]
    verb, rest = words[0] if words else "", [word for word in words[1:] if word not in names]
    if verb not in ("", "help", "list", "status", "show", "replay", "defs", "export", "drop"):
        raise RecoveryError("there is no %r; %%recover help lists what there is" % _line(verb))
    if len(names) > 1 or len(rest) != (verb == "export") and verb != "replay":
        raise RecoveryError("too %s words after %r; %%recover help shows how it is written" % (
            "few" if verb == "export" and not rest else "many", verb))
    if verb == "help":
        return say(USAGE)
    if verb == "list":
        return say("\n".join(list_lines(crashlog.sessions())) or "there are no sessions")
    if verb == "status":
        return say("\n".join(_status(log)))
    session = crashlog.find(names[0]) if names else _latest(log)
    if session is None:
        return say("no earlier session is left: each was closed properly")
    by = log.id if log is not None else "a kernel without a log"
    if verb == "":
        again = ["  it died within %d s of a recovery" % AGAIN_SECONDS] if died_again(session) else []
        say("\n".join([*describe(session), *again, "  %recover help says what can be done"]))
    elif verb == "show":
        say("\n".join(show(session)))
    elif verb == "replay":
        with _agreed(session, ",".join(rest), ask, say) as cells:
            if cells:
                session.append("recovered", by=by, how="replay")
                _run_all(cells, run, say)
    elif verb == "defs":
        code = definitions(session)
        say(_clean(code).rstrip("\n") or "there are no definitions")
        if code:
            with session.take(anyway=True):
                session.append("recovered", by=by, how="defs")
                run(LoggedCell({"of": "", "n": 0, "t": 0.0, "ec": 0, "hdr": {}, "code": code}))
    elif verb == "export":
        path = os.path.abspath(os.path.expanduser(rest[0]))
        export(session, path)
        say("%s written" % _line(path))
    elif _is_yes(ask, "Delete session %s, %s? [y/N] " % (session.id, _count(len(_inputs(session.outline())), "cell"))):
        session.drop()
        say("deleted")
    else:
        say("nothing was deleted")


def _latest(log: Any) -> LoggedSession | None:
    """The session before this one with the same connection file; else the newest that died, here if one did."""
    if log is not None and log.prev is not None and os.path.lexists(log.prev.path(".log")):
        return log.prev
    dead = [session for session in crashlog.sessions() if session.state() == "died"]
    here = [session for session in dead if session.opened.get("cwd") == os.getcwd()]
    return (here or dead)[0] if dead else None


def _status(log: Any) -> list[str]:
    if log is None or not log.is_on:
        return ["this session is not logged"]
    path = os.path.join(log.folder, log.id + ".log")
    lines = ["this session is logged: %s, %d kB" % (_line(path), os.stat(path).st_size // 1000)]
    return lines + ["before it: " + line for line in list_lines([log.prev] if log.prev is not None else [])]
