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

import argparse
import contextlib
import functools
import getpass
import html
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from . import connection, crashlog, screen
from .crashlog import LoggedCell, LoggedSession, StateError
from .export import (
    calls_recover, cell_name, definitions_of, notebook, notebook_outputs, output_of, private_words, script)

# Who recovers a session and dies within this many seconds was perhaps killed by that.
AGAIN_SECONDS = 30.0


# -- what killed it --------------------------------------------------------------------------------

class Death(NamedTuple):
    """text: what ended the process, as far as it is known; line: where in `cell`, the cell that was running;
    place: "in In [7]", "while idle, after In [6]"."""
    text: str
    line: int | None
    cell: LoggedCell | None
    place: str

    def __str__(self) -> str:
        return "died %s: %s" % (self.place, self.text)


# What faulthandler writes as the process dies. The name of a thread, in brackets, is there since Python 3.14.
_FATAL = re.compile(r"(?s:.*)^(?:Fatal Python error|Windows fatal exception): (.*)$", re.M)
_STACK = re.compile(r"^Current thread 0x\w+ (?:\[(.*)\] )?\(most recent call first\):\n((?:  .*\n?)*)", re.M)
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)', re.M)
_SIGNALS = {"segmentation fault": "SIGSEGV", "aborted": "SIGABRT", "floating point exception": "SIGFPE",
            "bus error": "SIGBUS", "illegal instruction": "SIGILL"}


def cause(session: LoggedSession, status: int | None = None) -> Death:
    """What ended the kernel of this session.

    status: as subprocess has it, minus the number of a signal, of whoever waited for the process just now;
    None: what the log says about it, if anything.
    """
    records, cells = session.outline(), session.inputs()
    cell = crashlog.running(cells)
    if status is None:
        status = next((record["status"] for record in reversed(records) if record["k"] == "exit"), None)
    notes = {record["what"]: record for record in records if record["k"] == "note"}
    own = str(notes.get("fault", {}).get("text", "")).strip().rpartition("\n")[2]
    name, shells = _signal_name(-(status or 0)), _signal_name((status or 0) - 128)
    place, line = "while idle, before the first cell", None
    if cells:
        place = "in " + cell_name(cell) if cell else "while idle, after " + cell_name(cells[-1])
    written = session.fault_text()
    fatal = _FATAL.match(written)           # the last there is
    words = fatal[1].strip() if fatal else ""
    struck = _SIGNALS.get(words.lower().replace("-", " "), "")
    # Of another signal it is somebody else's, who had the file open: the process ended otherwise.
    if fatal and (status is None or os.name == "nt" or struck in ("", name, shells)):
        where, line, is_thread = _where(written[fatal.end():], cell, cells)
        if is_thread and cell and line is None:
            place = "while %s was running" % cell_name(cell)        # which need not have had a part in it
        name = name or struck
        text = (name + ("" if struck else " (%s)" % words) if name else words) + where
    elif name:
        text = name + ": killed from outside (kill -9 or out of memory)" * (name == "SIGKILL")
    elif own:
        text = "a fault of the kernel's own, not of the cell: " + own
    elif "abandoned" in notes:
        text = "it was left alone: %s" % notes["abandoned"].get("why")
    elif status is None:
        text = "killed from outside or ended by os._exit: nothing else is known"
    else:
        text = "%s ended the process itself, status %d%s" % (
            "the cell" if cell else "something in it", status, shells and ", which is how a shell tells of " + shells)
    return Death(one_line(text), line, cell, place)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "signal %d" % number if 0 < number < 128 else ""


def _where(written: str, cell: LoggedCell | None, cells: list[LoggedCell]) -> tuple[str, int | None, bool]:
    """(" at line 3 of the cell, in lib.solve", 3, is a thread); the line is None if it is not one of this cell."""
    stack = _STACK.search(written)
    frames = _FRAME.findall(stack[2]) if stack else []          # innermost first
    is_thread = stack is None or bool(frames) and frames[-1][2] == "_bootstrap"
    parts = ["in a thread" + (" (%s)" % stack[1] if stack and stack[1] else "")] if is_thread else []
    # `file` is the name that Python has given to a cell, or its beginning; faulthandler writes ASCII.
    names = [(owner, owner.file.encode("ascii", "backslashreplace").decode("ascii"))
             for owner in filter(None, [cell, *reversed(cells)]) if owner.file]
    owner, here = next(((owner, frame) for owner, name in names for frame in frames if frame[0].startswith(name)),
                       (None, ("", "", "<nowhere>")))
    if owner:
        parts.append("at line %s of %s" % (here[1], "the cell" if owner is cell else cell_name(owner)))
    # The function of the cell, else what the cell had called.
    for frame in [here, *frames[:1]]:
        if not frame[2].startswith("<"):
            module = None if frame is here else re.search(r"(\w+)(?:[/\\]__init__)?\.py$", frame[0])
            parts.append("in " + (module[1] + "." if module else "") + frame[2])
            break
    return " " * bool(parts) + ", ".join(parts), int(here[1]) if owner and owner is cell else None, is_thread


def _killer(session: LoggedSession, cells: list[LoggedCell]) -> LoggedCell | None:
    """The one of these that was running at the death; that of a living kernel is just running."""
    return None if session.state() in ("alive", "closed") else crashlog.running(cells)


# -- what is saved ---------------------------------------------------------------------------------

def headline(session: LoggedSession) -> str:
    """What happened, in one line; soon there, also when there is much output to count for the other lines."""
    state, pid = session.state(), session.opened.get("pid", "unknown")
    when = "(%s, pid %s)" % (_last_time(session), pid)
    if state == "alive":
        first = "The kernel is running  (pid %s)" % pid
    elif state == "closed":
        first = "The session was closed: %s  %s" % ((session.closed or {}).get("why", "no record says why"), when)
    else:
        first = "The kernel %s  %s" % (cause(session), when)
    if state == "unknown":
        first = "It ran on host %s, and may still.  If it does not: %s" % (session.opened.get("host"), first)
    return one_line(first)


def describe(session: LoggedSession) -> list[str]:
    """Three lines: what happened, what is saved, what is not."""
    cells, missing = session.inputs(), ["variables"]
    kept = sum(cell.code is not None for cell in cells)
    for number, what in ((session.cut, "piece"), (len(cells) - kept, "private cell"),
                         (session.damaged, "damaged record"), (session.lost, "lost record")):
        missing += [count(number, what) + " of output" * (what == "piece")] if number else []
    saved = count(kept, "input") + (" and what came out" if kept else "")
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
        state, opened, cells = session.state(), session.opened, session.inputs()
        words = {"alive": "running (pid %s)" % opened.get("pid"), "unknown": "unknown (host %s)" % opened.get("host")}
        parts = [session.id, words.get(state, state), _last_time(session), short_path(opened.get("cwd")),
                 count(len(cells), "cell")]
        if cells:
            first = _input_lines(cells[-1])[0]
            parts.append(first if len(first) <= 50 else first[:47] + "...")
        if state == "died":
            parts.append(cause(session).text)
        lines.append(one_line("  ".join(filter(None, parts))))
    return lines


def _last(session: LoggedSession) -> dict:
    """The last record of its kernel, or of whoever waited for that; outputs, of which there may be many, left out."""
    said = [record for record in session.outline() if record["k"] != "recovered"]
    return said[-1] if said else {"k": "", "t": float("nan")}


def _last_time(session: LoggedSession) -> str:
    """When the process ended, if somebody waited for it; else when it was last heard of."""
    last = _last(session)
    try:
        day, clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last["t"])).split()
    except (ValueError, OverflowError, OSError):
        return "at an unknown time"
    clock = clock if day == time.strftime("%Y-%m-%d") else "%s %s" % (day, clock)
    return clock if last["k"] in ("exit", "close") else "last record " + clock


def died_again(session: LoggedSession) -> bool:
    """Whether this session died within AGAIN_SECONDS of a recovery: it was recovering another, or was recovered by
    one that died so soon.  By the clock, so it is a reason to say so, not one to refuse."""
    there = {other.id: other for other in crashlog.sessions()} | {session.id: session}
    began = session.opened.get("t", 0.0) - AGAIN_SECONDS
    for other in there.values():
        # Whom this one recovered has a record of that since it began: most of the others need not be read.
        with contextlib.suppress(OSError):
            if other.id != session.id and os.stat(other.path(".log")).st_mtime < began:
                continue
        for record in other.outline():
            heir = there.get(record["by"]) if record["k"] == "recovered" and record["how"] != "notice" else None
            if heir is not None and session.id in (other.id, heir.id) and heir.state() == "died":
                if _last(heir)["t"] - record["t"] < AGAIN_SECONDS:
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
            lines += _output_text(output, most).split("\n")
        if cell.cut:
            lines.append("(%s of its output not kept)" % count(cell.cut, "piece"))
    return lines


def _input_lines(cell: LoggedCell, mark: int | None = None) -> list[str]:
    head = cell_name(cell) + ": "
    if cell.code is None:
        return ["%s(%s)" % (head, private_words(cell))]
    return [(head if at == 1 else "...: ".rjust(len(head))) + one_line(text) + "    <---" * (at == mark)
            for at, text in enumerate(cell.code.split("\n"), 1)]


def _output_text(output: dict, most: int | None = None) -> str:
    if output["output_type"] == "stream":
        text = output["text"]
        if most is not None and len(text) > most:
            left_out = format(len(text) - most, ",")
            text = "%s\n(%s characters not shown)\n%s" % (text[:most >> 1], left_out, text[-(most >> 1):])
        return _clean(text).rstrip("\n")
    if output["output_type"] == "error":
        return _clean(screen.traceback_of(output)).rstrip("\n")
    text = _clean(screen.text_of(output["data"])).rstrip("\n") or "(%s)" % ", ".join(map(one_line, output["data"]))
    if output["output_type"] == "execute_result":
        return "Out[%s]: %s%s" % (output["execution_count"], "\n" if "\n" in text else "", text)
    return text


def _clean(text: str) -> str:
    """Nothing a terminal obeys, and of a line that overwrote itself what could be read in the end."""
    text = screen.without_escapes(text).replace("\b", "")
    return "\n".join(map(screen.last_state, text.split("\n")))


def one_line(text: Any) -> str:
    """One line of it, with nothing a terminal obeys."""
    return " ".join(_clean(str(text).replace("\r", " ")).split("\n"))


def count(number: int, word: str) -> str:
    return "%d %s%s" % (number, word, "" if number == 1 else "s")


def short_path(path: Any) -> str:
    home, path = os.path.expanduser("~"), str(path or "")
    return "~" + path[len(home):] if home != "/" and (path + "/").startswith(home + "/") else path


# -- as a file -------------------------------------------------------------------------------------

def export(session: LoggedSession, path: str) -> None:
    """Write the session as a script (.py) or as a notebook (.ipynb); never over a file that is there."""
    cells = session.cells()
    killer, death = _killer(session, cells), str(cause(session))
    if path.lower().endswith(".ipynb"):
        text = notebook(cells, killer, death, session.id, one_line(session.opened.get("python", "")))
    elif path.lower().endswith(".py"):
        text = script(cells, killer, death, [session.id, *describe(session)])
    else:
        raise StateError("cannot export to %s: the name must end in .ipynb or .py" % one_line(path), 2)
    try:
        with open(path, "x", encoding="utf-8", errors="replace", newline="") as file:
            file.write(text)
    except FileExistsError:
        raise StateError("%s exists already; give another name" % one_line(path), 2)
    except OSError as error:
        raise StateError("cannot write %s: %s" % (one_line(path), error.strerror or error), 1)


# -- run once more ---------------------------------------------------------------------------------

def replay_cells(session: LoggedSession, selection: str = "") -> tuple[list[LoggedCell], list[str]]:
    """The cells that a replay would run; and the names of those left out, with the reason.

    selection: numbers and ranges as in "3-6,9", "" for all of them.  Never a private cell, which is not kept, nor
    a call of %recover; the cell that was running at the death only as a number of its own.
    Raises StateError for a selection that is none.
    """
    cells = session.inputs()
    killer = _killer(session, cells)
    wanted: list[range] = []
    for part in selection.replace(",", " ").split():
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        wanted += [range(int(found[1]), int(found[2] or found[1]) + 1)] if found else [range(0)]
        if not any(cell.ec in wanted[-1] for cell in cells):
            raise StateError("replay %s: expected numbers of its cells, like 3-6,9" % one_line(part), 2)
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


def _agreed(session: LoggedSession, selection: str, ask: Callable[[str], str],
            say: Callable[[str], None]) -> list[LoggedCell]:
    """Show what would be run, and ask; none if the answer is no.  Under `take`."""
    cells, left_out = replay_cells(session, selection)
    for cell in cells:
        say("\n".join(_input_lines(cell)))
    if left_out:
        say("left out: " + ", ".join(left_out))
    if died_again(session):
        say("a kernel died within %d s of recovering this" % AGAIN_SECONDS)
    if session.state() == "unknown":
        say("it may still be running, on host %s" % one_line(session.opened.get("host")))
    if cells and _is_yes(ask, "Run %s again? [y/N] " % count(len(cells), "cell")):
        return cells
    say("nothing was run")
    return []


def _run_all(cells: list[LoggedCell], run: Callable[[LoggedCell], bool], say: Callable[[str], None]) -> bool:
    """Run them up to the first error that is new: what failed in the session may fail again."""
    process = os.getpid()
    for at, cell in enumerate(cells, 1):
        is_ok = run(cell)
        if os.getpid() != process:      # a child of os.fork(), which falls out of this cell as it did out of that one
            return False
        if not is_ok and cell.ok is not False:
            rest = ", ".join(map(cell_name, cells[at:]))
            say("stopped at %s%s" % (cell_name(cell), rest and "; not run: " + rest))
            return False
    say("%s run again" % count(len(cells), "cell"))
    return True


def _is_yes(ask: Callable[[str], str], question: str) -> bool:
    try:
        return ask(question).strip().lower() in ("y", "yes")
    except (EOFError, NotImplementedError):     # the latter: IPython's, for a frontend that has no input
        return False


def replay(session: LoggedSession, into: str | None = None) -> int:
    """For the command line: run the cells in a kernel, a new one unless `into` names one; returns the exit status.

    A new kernel runs in the session's folder and is left running.  Ctrl-C interrupts the cell and ends the replay.
    Raises StateError.
    """
    from . import client, config, launcher
    try:
        with session.take(anyway=True):
            cells = _agreed(session, "", input, _say)
            return _replay_in_kernel(session, cells, into) if cells else 1
    except KeyboardInterrupt:
        _say("\ninterrupted")
        return 130
    except client.KernelDied as error:
        raise StateError("%s; nothing more was run" % error, 70)
    except (connection.ConnectionFileError, config.ConfigError, launcher.LaunchError) as error:
        raise StateError(str(error), error.exit_code)


def _replay_in_kernel(session: LoggedSession, cells: list[LoggedCell], into: str | None) -> int:
    from . import client, config, start
    if into is None:
        with contextlib.suppress(KeyError, TypeError, OSError):
            os.chdir(session.opened["cwd"])
    begun = start.Start(argparse.Namespace(existing=into, ssh=None, connect=None, name=None, kernel=None, config=None,
                                           set=[]), config.load(), keep=True)
    try:
        kernel = client.connect(begun.wait())
    except BaseException:
        begun.end()
        raise
    with kernel:
        by = next((other.id for other in crashlog.sessions()
                   if other.opened.get("conn") == begun.connection_file), begun.name)
        # Before they run: if they kill this kernel too, that shall be known.
        session.append("recovered", by=by, how="replay")
        _say("kernel %s is left running; join it with: %s" % (begun.name, begun.join))
        return 0 if _run_all(cells, functools.partial(_run_in, kernel), _say) else 1


def _run_in(kernel: Any, cell: LoggedCell) -> bool:
    _say("\n".join(_input_lines(cell)))
    pending = kernel.execute_nowait(cell.code, allow_stdin=True)
    try:
        reply = pending.wait(on_output=_show, on_input=_answer)
    except KeyboardInterrupt:
        kernel.interrupt_nowait()
        pending.wait(on_output=_show)       # its end, unless Ctrl-C comes once more
        raise
    return reply.content.get("status") == "ok"


def _show(message: Any) -> None:
    if message.msg_type == "stream":
        _say(screen.without_escapes(str(message.content.get("text", ""))), end="")
    elif (output := output_of(message.msg_type, message.content)) is not None:
        _say(_output_text(output))


def _answer(prompt: str, password: bool) -> str:
    return (getpass.getpass if password else input)(one_line(prompt))


_say = functools.partial(print, flush=True)


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
    except (StateError, OSError, ValueError) as error:      # the last one: quotes without an end
        say("%%recover: %s" % one_line(error))


def _recover(line: str, log: Any, run: Callable[[LoggedCell], bool], say: Callable[[str], None],
             ask: Callable[[str], str]) -> None:
    words = shlex.split(line)
    names = [word for word in words[1:] if re.match(r"\d{8}T\d", word)]
    verb, rest = words[0] if words else "", [word for word in words[1:] if word not in names]
    if (verb not in ("", "help", "list", "status", "show", "replay", "defs", "export", "drop") or len(names) > 1
            or len(rest) != (verb == "export") and verb != "replay"):
        raise StateError("there is no %r; %%recover help lists what there is" % one_line(line), 2)
    if verb == "help":
        return say(USAGE)
    if verb == "list":
        return say("\n".join(list_lines(crashlog.sessions())) or "there are no sessions")
    if verb == "status":
        path = "" if log is None or not log.is_on else os.path.join(log.folder, log.id + ".log")
        return say("this session is " + ("logged: " + one_line(path) if path else "not logged"))
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
        with session.take(anyway=True):
            if cells := _agreed(session, " ".join(rest), ask, say):
                session.append("recovered", by=by, how="replay")
                _run_all(cells, run, say)
    elif verb == "defs":
        cells = session.inputs()
        code = definitions_of(cells, _killer(session, cells))
        say(_clean(code).rstrip("\n") or "there are no definitions")
        if code:
            with session.take(anyway=True):
                session.append("recovered", by=by, how="defs")
                run(LoggedCell({"of": "", "n": 0, "t": 0.0, "ec": 0, "hdr": {}, "code": code}))
    elif verb == "export":
        path = os.path.abspath(os.path.expanduser(rest[0]))
        export(session, path)
        say("%s written" % one_line(path))
    elif _is_yes(ask, "Delete session %s, %s? [y/N] " % (session.id, count(len(session.inputs()), "cell"))):
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
