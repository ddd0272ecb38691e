# Distributed under the terms of the BSD 3-Clause License.
"""The session log: what a kernel was asked and what it answered, on disk before anybody else hears of it.

A kernel may die in the middle of a cell.  What it did until then is read from files that it wrote as it went:

    S.lock    locked by the operating system for as long as the kernel lives, removed when it ends properly
    S.log     one JSON object a line: `begin` before a cell runs, its outputs as they are published, `end`
    S.bulk    the same lines for the outputs beyond a cell's share of the log; a ring of two files, the older S.bulk.1
    S.fault   where faulthandler writes the line that a fatal signal struck

Three states, decided by the operating system and not by process numbers, which are given out again:
no lock file, the session was closed; its lock is held, it is alive; its lock is free, it died.

sessionlog.py writes these files in the kernel; here stands what one line is, and who reads them later.
1. LoggedSession, one session by its files.  It believes a line only if its checksum is right, and never raises
   for what a file contains.
2. sessions, find, prune, note_exit: the folder.  main: the command line.

The format, with examples, is in docs/crashlog.md.  What is made of a dead session is recovery.py's.
"""
from __future__ import annotations

import bisect
import contextlib
import functools
import json
import os
import re
import signal
import sys
import time
from typing import Any, Iterable, Iterator, NamedTuple
from zlib import crc32

from . import __version__, connection
from .connection import ConnectionFileError, is_same_file, open_private, try_lock, unlock

VERSION = 1

# Each kind of record, and the members a reader relies on. Members and kinds that are not here are kept as they are.
KINDS: dict[str, dict[str, Any]] = {
    "open": {"pid": int, "conn": str, "prev": str, "marks": dict},
    "begin": {"of": str, "ec": int, "hdr": dict},
    "out": {"seq": int, "type": str, "content": dict},
    "stdin": {"of": str, "prompt": str, "password": bool},
    "cut": {"first": int, "last": int, "records": int, "bytes": int},
    "end": {"of": str, "ok": bool, "ms": (int, float)},
    "note": {"what": str},
    "close": {"why": str, "restart": bool},
    "exit": {"status": int, "signal": str},
    "recovered": {"by": str, "how": str},
}
OUTPUTS = ("stream", "display_data", "execute_result", "update_display_data", "error", "clear_output")

CELLS = 1000            # cells whose output is still known to be theirs: a thread may print for a cell long ended
KEEP_UNKNOWN_DAYS = 30  # at least, of a session that may be alive elsewhere, since its last record
TAIL = 4096             # bytes at the end of a log in which a `close` is looked for


class StateError(Exception):
    """What is wrong with the state folder or a name in it, in one line.  exit_code: 2 not found, 5 unsafe to use."""

    def __init__(self, message: str, exit_code: int = 5) -> None:
        super().__init__(re.sub("[\x00-\x1f\x7f-\x9f]", "?", " ".join(message.splitlines())))
        self.exit_code = exit_code


class LockedError(StateError):
    """The session is alive, or somebody else is recovering it, or it is gone."""


class Limits(NamedTuple):
    """docs/configuration.md, section recovery, says what each is for; the first three are bytes."""
    per_cell: int = 256 << 10
    log: int = 64 << 20
    backlog: int = 64 << 20
    fsync: str = "interval"
    keep_crashed: int = 20
    keep_days: int = 30
    keep_closed: int = 0


def state_folder() -> str:
    """Where sessions are remembered: $TWOPROC_STATE, else $XDG_STATE_HOME/twoproc, else ~/.local/state/twoproc.

    Made if missing.  Raises StateError, exit code 5, when it is not ours alone.
    """
    chosen = os.environ.get("TWOPROC_STATE", "")
    if chosen and not os.path.isabs(chosen):
        raise StateError(f"TWOPROC_STATE = {chosen}: give the whole path, several folders use it")
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME", "")
    if not os.path.isabs(base):     # the base directory specification: a relative one is to be ignored
        base = os.path.expanduser("~/.local/state")
    folder = chosen or os.path.join(base, "twoproc")
    if not os.path.isabs(folder):
        raise StateError("no home folder is known: set HOME, or TWOPROC_STATE to a folder that you can write")
    return _private(folder)


def sessions_folder(state: str | None = None) -> str:
    """<state folder>/sessions, made and looked at in the same way."""
    return _private(os.path.join(_private(state) if state else state_folder(), "sessions"))


def _private(folder: str) -> str:
    try:
        connection.make_folders(os.path.dirname(folder))
        return connection.private_folder(folder, "TWOPROC_STATE")
    except OSError as error:
        raise StateError(f"{folder}: {error.strerror}; set TWOPROC_STATE to a folder that you can write") from error
    except ConnectionFileError as error:
        raise StateError(str(error)) from error


def is_private(code: str) -> bool:
    """Whether the first line of a cell is `%%private`: then of the cell only hash and length are kept."""
    return code.lstrip()[:10].rstrip() == "%%private"


# -- one record, one line

def seal(*parts: bytes) -> bytes:
    """The line of a record: the JSON object that `parts` begin, without its closing brace, and its checksum."""
    crc = 0
    for part in parts:      # not joined first: an image of some megabytes is copied once, not twice
        crc = crc32(part, crc)
    return b"".join((*parts, b',"crc":"%08x"}\n' % crc32(b"}", crc)))


def is_intact(line: bytes) -> bool:
    """Whether this is a whole line as `seal` made it; without its newline."""
    return line[-18:] == b',"crc":"%08x"}' % crc32(b"}", crc32(memoryview(line)[:-18]))


encode = json.JSONEncoder(default=str).encode     # our own: a cell may put another in the place of json.dumps

# What a line begins with. The members of a record come in this order, so that no JSON is parsed to find a line.
HEAD = re.compile(rb'\{"n":(\d{1,15}),"k":"(\w{1,20})","t":-?[\d.]{1,20}'
                   rb'(?:,"seq":(\d{1,15}))?(?:,"of":("(?:[^"\\]|\\.)*"))?')


def parse(line: bytes) -> dict[str, Any] | None:
    """The record of one line, None if the line is damaged, or was written by something else."""
    return _decode(line) if is_intact(line) else None


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    # A right checksum says that the line is as it was written, not that it was we who wrote it.
    if type(record) is not dict or type(record.get("n")) is not int or type(record.get("k")) is not str:
        return None
    if not isinstance(record.get("t"), (int, float)) or not abs(record["t"]) < 1e11:
        return None
    wanted = KINDS.get(record["k"], {})
    return record if all(isinstance(record.get(name), kind) for name, kind in wanted.items()) else None


def as_text(value: str | None) -> bytes:
    return b"null" if value is None else encode(value).encode("ascii")


# -- who, and where

def host_name() -> str:
    return os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")


def boot_id() -> str:
    """What changes with every start of the machine; empty where there is no such thing."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def started_ticks(pid: int) -> str | None:
    """When the process was started, in ticks since the boot; None if there is no such process, "" if nobody says."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] in b"ZX" else fields[19].decode("ascii")
    except FileNotFoundError:
        return None if os.path.exists("/proc/self/stat") else ""
    except (OSError, IndexError):
        return ""


# -- 1. Reading ------------------------------------------------------------------------------------

class LoggedCell:
    """One cell of a log.  code: None for a private one, of which `length` is known; ok, ms: None while not ended.

    outputs: the contents of its messages, each with its `type`, as {"type", "content", "metadata"}.
    cut: how many of its outputs are no longer kept.
    """

    def __init__(self, begin: dict[str, Any]) -> None:
        self.of: str = begin["of"]
        self.n: int = begin["n"]
        self.t: float = begin["t"]
        self.ec: int = begin["ec"]
        self.header: dict[str, Any] = begin["hdr"]
        self.code: str | None = begin["code"] if type(begin.get("code")) is str else None
        self.hash: str | None = begin["hash"] if type(begin.get("hash")) is str else None
        self.length: int = begin["length"] if type(begin.get("length")) is int else len(self.code or "")
        self.cell_id: str | None = begin["cell"] if type(begin.get("cell")) is str else None
        self.file: str = begin["file"] if type(begin.get("file")) is str else ""
        self.outputs: list[dict[str, Any]] = []
        self.is_ended = False
        self.ok: bool | None = None
        self.ms: float | None = None
        self.cut = 0

    def end(self, record: dict[str, Any]) -> None:
        self.is_ended, self.ok, self.ms = True, record["ok"], record["ms"]


def running(cells: list[LoggedCell]) -> LoggedCell | None:
    """The last of a session's cells, if it was not ended; or the one within which that ran, by %recover.

    These two have one execution count.  Any other without an end has lost that record, and nothing else.
    """
    return next((cell for cell in reversed(cells) if not cell.is_ended and cell.ec == cells[-1].ec), None)


class LoggedSession:
    """A session by its files.  Nothing that they contain makes a method raise."""

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.id = folder, name
        self._held = -1
        self._opened: dict[str, Any] | None = None
        self._outline: list[dict[str, Any]] = []
        self._outlined = -1             # bytes of S.log at the time: it only grows
        self._damaged = 0
        self._counts: tuple[int, int, int] | None = None

    def __repr__(self) -> str:
        return f"<LoggedSession {self.id}>"

    def path(self, suffix: str) -> str:
        return os.path.join(self.folder, self.id + suffix)

    # -- alive or not

    def state(self) -> str:
        """"closed", "alive", "died"; "unknown" if it ran on another machine, or nobody can tell."""
        for _ in range(100):            # each round is a lock file replaced in the moment we looked
            try:
                fd = open_private(self.path(".lock"), os.O_RDONLY)
            except FileNotFoundError:
                return "closed"
            except (OSError, ConnectionFileError):
                return "unknown"
            try:
                # Shared: two who look do not see each other, and a recoverer does not hide that this one is dead.
                is_free = try_lock(fd, shared=True)
                if is_free is False:
                    return "alive"
                if is_same_file(fd, self.path(".lock")):
                    found = self._judge(bool(is_free))
                    # Killed between its `close` record and the end of it.
                    return "closed" if found == "died" and self.closed is not None else found
            finally:
                os.close(fd)
        return "unknown"

    def _judge(self, has_locks: bool) -> str:
        """A lock that nobody holds, or a file system that has none."""
        # Without a holder the machine lost power before the lock file had reached its disk.
        holder = self._holder() or self.opened
        host, boot = holder.get("host", host_name()), holder.get("boot", "")
        is_same_boot = boot == boot_id() and boot != ""
        if has_locks and holder.get("locking", "flock") == "flock":
            # Some network file systems keep locks to themselves: free here may be held there.
            return "died" if is_same_boot or host == host_name() else "unknown"
        if host != host_name() or not boot or not boot_id() or type(holder.get("pid")) is not int:
            return "unknown"
        if not is_same_boot:
            return "died"
        started = started_ticks(holder["pid"])
        if started is None or started != holder.get("started"):
            return "died" if started != "" else "unknown"
        return "alive"

    @property
    def closed(self) -> dict[str, Any] | None:
        """Its `close` record, None without one."""
        for line in reversed(self._read(".log", TAIL).split(b"\n")[:-1]):
            if b'"k":"close"' in line[:40]:
                return parse(line)
            if b'"k":"exit"' not in line[:40] and b'"k":"recovered"' not in line[:40]:
                break
        return None

    @property
    def is_restarted(self) -> bool:
        """Closed for a restart: kept for the kernel that follows."""
        record = self.closed
        return record is not None and record.get("restart") is True and self.state() == "closed"

    # -- what is in it

    @property
    def opened(self) -> dict[str, Any]:
        """Its `open` record; without one what the lock file says, at worst {}."""
        if self._opened is None:
            first = parse(next(self._lines(".log"), b""))
            self._opened = first if first is not None and first["k"] == "open" else self._holder()
        return self._opened

    def _holder(self) -> dict[str, Any]:
        try:
            holder = json.loads(self._read(".lock", 65536))
        except (ValueError, RecursionError):
            return {}
        if type(holder) is not dict or type(holder.get("pid")) is not int or type(holder.get("conn")) is not str:
            return {}
        return {**holder, "prev": "", "marks": {}}

    def _read(self, suffix: str, last: int | None = None) -> bytes:
        """A file, or its last bytes; empty if it cannot be read."""
        try:
            with open(open_private(self.path(suffix), os.O_RDONLY), "rb") as file:
                if last is not None:
                    file.seek(max(0, os.fstat(file.fileno()).st_size - last))
                return file.read()
        except (OSError, ConnectionFileError):
            return b""

    def _lines(self, suffix: str) -> Iterator[bytes]:
        """The lines of a file, none if it cannot be read.  What follows the last newline was never finished."""
        with contextlib.suppress(OSError, ConnectionFileError):
            # A line at a time: for 50 MB all at once take twice as long.
            with open(open_private(self.path(suffix), os.O_RDONLY), "rb") as file:
                yield from (line[:-1] for line in file if line[-1:] == b"\n")

    def _entries(self) -> list[tuple[int, bytes, bytes, bytes]]:
        """(n, kind, of, line) of every whole line of log and bulk, in order, each once; counts the other lines."""
        entries, damaged = {}, 0
        for suffix in (".log", ".bulk.1", ".bulk"):
            for line in self._lines(suffix):
                found = HEAD.match(line)
                if found and is_intact(line):
                    entries[int(found[1])] = int(found[1]), found[2], found[4] or b"", line
                else:
                    damaged += 1
        self._damaged = damaged
        return [entries[n] for n in sorted(entries)]

    def outline(self) -> list[dict[str, Any]]:
        """All records but outputs.  No output is parsed: a log of 64 MB takes a tenth of a second."""
        try:
            size = os.stat(self.path(".log")).st_size
        except OSError:
            return []
        if size != self._outlined:
            records = [parse(line) for line in self._lines(".log") if b'"k":"out"' not in line[:40]]
            self._outline = sorted((record for record in records if record), key=lambda record: record["n"])
            self._outlined = size
        return self._outline

    def records(self) -> list[dict[str, Any]]:
        """All records in order, each once."""
        return [record for record in (_decode(line) for _, _, _, line in self._entries()) if record]

    @property
    def damaged(self) -> int:
        """How many lines are not what was written."""
        return self._counted()[0]

    @property
    def lost(self) -> int:
        """How many records are missing, and no `cut` says that they would be."""
        return self._counted()[1]

    @property
    def cut(self) -> int:
        """How many records are missing because there was too much output, as a `cut` says."""
        return self._counted()[2]

    def _counted(self) -> tuple[int, int, int]:
        """The three of one reading, in which no output is parsed."""
        if self._counts is None:
            entries = self._entries()
            numbers = [0] + [n for n, _, _, _ in entries]
            missing, lost = (sum(last - first + 1 for first, last in gaps)
                             for gaps in (_gaps(numbers), _unexplained(numbers, _cuts(entries))))
            self._counts = self._damaged, lost, missing - lost
        return self._counts

    def inputs(self) -> list[LoggedCell]:
        """The cells in the order in which they were begun, without their outputs: those take most of the time."""
        cells = {record["of"]: LoggedCell(record) for record in self.outline() if record["k"] == "begin"}
        for record in self.outline():
            if record["k"] == "end" and record["of"] in cells:
                cells[record["of"]].end(record)
        return list(cells.values())

    def cells(self) -> list[LoggedCell]:
        """The same with their outputs."""
        entries = self._entries()
        cells: dict[str, LoggedCell] = {}
        for _, kind, _, line in entries:
            if kind not in (b"begin", b"out", b"end"):
                continue
            record = _decode(line)
            if record is None:
                continue
            if kind == b"begin":
                cells[record["of"]] = LoggedCell(record)
                continue
            cell = cells.get(record.get("of", ""))
            if cell is None:
                continue
            if kind == b"end":
                cell.end(record)
            else:
                metadata = record.get("metadata")
                cell.outputs.append({"type": record["type"], "content": record["content"],
                                     "metadata": metadata if type(metadata) is dict else {}})
        # What was cut belongs to the cell that ran at the time.
        begins = [(n, of) for n, kind, of, _ in entries if kind == b"begin"]
        by_of = {as_text(cell.of): cell for cell in cells.values()}
        cuts = _cuts(entries)
        for first, last in _gaps(n for n, _, _, _ in entries):
            at = bisect.bisect(begins, (first, b"")) - 1
            if at >= 0 and begins[at][1] in by_of:
                lost = sum(stop - start + 1 for start, stop in _unexplained([first - 1, last + 1], cuts))
                by_of[begins[at][1]].cut += last - first + 1 - lost
        return sorted(cells.values(), key=lambda cell: cell.n)

    @property
    def killer(self) -> LoggedCell | None:
        """The cell that was running when the session ended, without its output."""
        return running(self.inputs())

    def marks(self) -> dict[str, str]:
        """For each client's session the date of its newest request; also those that its predecessors knew."""
        marks = {name: date for name, date in self.opened.get("marks", {}).items() if type(date) is str}
        for record in self.outline():
            if record["k"] == "begin":
                name, date = record["hdr"].get("session"), record["hdr"].get("date")
                if type(name) is str and type(date) is str:
                    marks[name] = max(date, marks.pop(name, date))      # the newest last
        return dict(list(marks.items())[-CELLS:])

    def fault_text(self) -> str:
        """What faulthandler wrote; mostly nothing."""
        return self._read(".fault", 65536).decode("utf-8", "replace")

    # -- what a recoverer does

    @contextlib.contextmanager
    def take(self, anyway: bool = False) -> Iterator[LoggedSession]:
        """Hold this session against other recoverers; LockedError if it is alive, or one of them was faster.

        anyway: also if nobody can say whether it is alive.
        The recoverers' lock is on S.log.  With S.lock itself, a session that is being recovered would look alive.
        """
        if self._held >= 0:
            yield self
            return
        try:
            fd = open_private(self.path(".log"), os.O_RDWR | os.O_APPEND)
        except (OSError, ConnectionFileError) as error:
            raise LockedError(f"session {self.id} is gone, or cannot be read ({error})", 2) from error
        _taken.add(fd)
        try:
            _let_go_at_fork()
            if try_lock(fd) is False:
                raise LockedError(f"session {self.id} is being recovered by somebody else", 3)
            if not is_same_file(fd, self.path(".log")):     # unlinked between our open and our lock
                raise LockedError(f"session {self.id} is gone", 2)
            state = self.state()
            if state == "alive":
                raise LockedError(f"session {self.id} is running (pid {self.opened.get('pid')} "
                                  f"on {self.opened.get('host')})", 3)
            if state == "unknown" and not anyway:
                raise LockedError(f"session {self.id} may be running (pid {self.opened.get('pid')} "
                                  f"on {self.opened.get('host')}): nobody can tell from here", 3)
            self._held = fd
            yield self
        finally:
            self._held = -1
            if fd in _taken:            # else we are a child, which fell out of a cell that was run again
                _taken.remove(fd)
                unlock(fd)              # a child that was just forked may not have closed its copy yet
                os.close(fd)

    def append(self, k: str, **members: Any) -> None:
        """Write one more record, under `take`; OSError."""
        assert self._held >= 0, "take() first"
        log = self._read(".log")
        numbers = _numbers(log)
        for suffix in (".bulk.1", ".bulk"):     # up to 64 MB, and their numbers only grow
            numbers += _numbers(self._read(suffix, 1 << 20)) or _numbers(self._read(suffix))
        newest = max(numbers, default=0)
        size = os.fstat(self._held).st_size
        whole = log.rfind(b"\n") + 1
        if whole < size:                # the last record of its life was torn
            os.ftruncate(self._held, whole)
        record = {"n": newest + 1, "k": k, "t": round(time.time(), 3), **members}
        os.write(self._held, seal(json.dumps(record, separators=(",", ":")).encode("ascii")[:-1]))
        self._counts = None

    def drop(self) -> None:
        """Remove its files; LockedError if it is alive or somebody recovers it."""
        with self.take(anyway=True):
            for suffix in (".bulk", ".bulk.1", ".fault", ".log", ".lock"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path(suffix))


_taken: set[int] = set()        # the descriptors of sessions that this process holds


@functools.cache
def _let_go_at_fork() -> None:
    """A cell that is run again may fork; by its copy of the descriptor the child would hold the lock as well."""
    def in_child() -> None:
        while _taken:
            os.close(_taken.pop())

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=in_child)


def _numbers(content: bytes) -> list[int]:
    lines = content.split(b"\n")
    return [int(found[1]) for line, found in zip(lines, map(HEAD.match, lines)) if found and is_intact(line)]


def _gaps(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The runs (first, last) of integers that are missing between the smallest and the largest."""
    order = sorted(numbers)
    for before, after in zip(order, order[1:]):
        if after > before + 1:
            yield before + 1, after - 1


def _cuts(entries: list[tuple[int, bytes, bytes, bytes]]) -> list[tuple[int, int]]:
    """The runs of numbers that a `cut` explains, in order and apart from each other."""
    runs: list[tuple[int, int]] = []
    records = filter(None, (_decode(line) for _, kind, _, line in entries if kind == b"cut"))
    for first, last in sorted((cut["first"], cut["last"]) for cut in records if cut["first"] <= cut["last"]):
        if runs and first <= runs[-1][1] + 1:
            runs[-1] = runs[-1][0], max(last, runs[-1][1])
        else:
            runs.append((first, last))
    return runs


def _unexplained(numbers: Iterable[int], cuts: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The gaps, or parts of them, that no `cut` covers."""
    for first, last in _gaps(numbers):
        at = bisect.bisect_left(cuts, first, key=lambda run: run[1])
        while at < len(cuts) and cuts[at][0] <= last:
            if cuts[at][0] > first:
                yield first, cuts[at][0] - 1
            first, at = cuts[at][1] + 1, at + 1
        if first <= last:
            yield first, last


# -- 2. The folder ---------------------------------------------------------------------------------

_NAME = re.compile(r"\d{8}T\d{6}-\d+-[0-9a-f]{6}")


def sessions() -> list[LoggedSession]:
    """All sessions that have a log, the newest first; StateError if the folder cannot be used."""
    folder = sessions_folder()
    names = {entry[:-4] for entry in os.listdir(folder) if entry.endswith(".log")}
    return [LoggedSession(folder, name) for name in sorted(filter(_NAME.fullmatch, names), reverse=True)]


def find(name: str | None = None) -> LoggedSession:
    """The session that is meant: by its name or the beginning of it, by its connection file or kernel's name.

    None: the newest that died.  StateError, exit code 2, if there is none, or more than one name begins so.
    """
    there = sessions()
    if name is None:
        found = [session for session in there if session.state() == "died"][:1]
    else:
        found = [session for session in there if session.id.startswith(name)]
        found = [session for session in found if session.id == name] or found
        if not found:
            path = os.path.abspath(os.path.expanduser(name))
            found = [session for session in there if session.opened.get("conn") == path or
                     connection.kernel_name_of(session.opened.get("conn", "")) == name][:1]
    if len(found) != 1:
        what = "several begin so" if found else "there is no such session"
        known = ", ".join(session.id for session in (found or there)[:5]) or "none"
        raise StateError(f"session {name or 'that died'}: {what}; there are: {known}", 2)
    return found[0]


def prune(limits: Limits = Limits()) -> None:
    """Remove what is older, or more, than is to be kept.  Never what is alive or is being recovered."""
    crashed = closed = 0
    there = sessions()
    # What a living kernel may be asked to recover.
    wanted = {session.opened.get("prev") for session in there if session.state() == "alive"}
    for session in there:
        with contextlib.suppress(StateError, OSError):      # somebody else is faster, or recovers it
            age = time.time() - os.stat(session.path(".log")).st_mtime
            state = session.state()
            if state == "died":
                crashed += 1
                is_kept = crashed <= limits.keep_crashed and age < limits.keep_days * 86400
            elif session.is_restarted:
                is_kept = age < 86400       # the kernel that follows may yet come
            elif state == "closed":
                closed += 1
                is_kept = closed <= limits.keep_closed
            else:                           # "unknown": a machine that does not come back, or a home of many machines
                is_kept = state == "alive" or age < max(limits.keep_days, KEEP_UNKNOWN_DAYS) * 86400
            if not is_kept and session.id not in wanted:
                session.drop()
    _sweep()


def _sweep() -> None:
    """Remove what is left of sessions that have no log: of one that was killed as it began, or as it ended."""
    folder = sessions_folder()
    for entry in os.listdir(folder):
        name, path = entry.partition(".")[0], os.path.join(folder, entry)
        if not _NAME.fullmatch(name) or os.path.lexists(os.path.join(folder, name + ".log")):
            continue
        with contextlib.suppress(OSError, ConnectionFileError):
            session = LoggedSession(folder, name)
            age = time.time() - os.lstat(path).st_mtime
            if age > 60 and session.state() in ("died", "closed"):
                os.unlink(path)


def note_exit(conn: str, pid: int, status: int) -> bool:
    """Record how the process ended, if its session died.  status: as subprocess has it, negative for a signal.

    For whoever waited for that process.  False if there is no such session; never raises.
    """
    name = ""
    if status < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-status).name
    patience = time.monotonic() + 0.3       # a child that it was just starting holds the lock until it has started
    with contextlib.suppress(StateError, OSError):
        for session in sessions():
            if session.opened.get("conn") == conn and session.opened.get("pid") == pid:
                while session.state() == "alive" and time.monotonic() < patience:
                    time.sleep(0.005)
                if session.state() == "died":
                    with session.take():
                        session.append("exit", status=status, signal=name)
                        return True
    return False


# -- the command line

def make_parser() -> Any:
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m twoproc.crashlog", description="What became of kernels, and what they had done.")
    parser.add_argument("-v", "--version", action="version", version=f"twoproc {__version__}")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="all sessions, the newest first (the default)")
    what.add_argument("--show", metavar="SESSION", help="one session: how it ended, its cells and their output")
    what.add_argument("--export", nargs=2, metavar=("SESSION", "FILE"), help="write it as FILE.py or FILE.ipynb")
    what.add_argument("--replay", metavar="SESSION", help="run its cells again, after a question")
    what.add_argument("--drop", metavar="SESSION", help="remove what is kept of it")
    parser.add_argument("--into", metavar="KERNEL", help="with --replay: a running kernel; else a new one is started")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, 2 for a session that does not exist, 3 for one in use, 5 for a folder that is not safe."""
    parser = make_parser()
    chosen = parser.parse_args(argv)
    if chosen.into is not None and chosen.replay is None:
        parser.error("--into: only with --replay")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # what a log holds, any terminal shall show
    try:
        from . import recovery      # here: a kernel needs it only after a crash

        if chosen.drop is not None:
            find(chosen.drop).drop()
        elif chosen.show is not None:
            print(*recovery.show(find(chosen.show)), sep="\n")
        elif chosen.export is not None:
            recovery.export(find(chosen.export[0]), chosen.export[1])
        elif chosen.replay is not None:
            return recovery.replay(find(chosen.replay), chosen.into)
        else:
            print("\n".join(recovery.list_lines(sessions())) or "there are no sessions")
        sys.stdout.flush()
    except BrokenPipeError:         # `| head`
        return connection.leave_stdout()
    except KeyboardInterrupt:
        return 130
    except StateError as error:
        print(f"twoproc.crashlog: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, ValueError) as error:
        print(f"twoproc.crashlog: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    import importlib
    connection.leave_current_folder()
    # Not the main() above: recovery.py imports this module by its name, and raises that one's exceptions.
    sys.exit(importlib.import_module(__spec__.name).main())     # type: ignore[name-defined]
