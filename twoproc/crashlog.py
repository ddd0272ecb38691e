# Distributed under the terms of the BSD 3-Clause License.
"""The session log: what a kernel was asked and what it answered, on disk before anybody else hears of it.

A kernel may die in the middle of a cell.  What it did until then is read from files that it wrote as it went:

    S.lock    locked by the operating system for as long as the kernel lives, removed when it ends properly
    S.log     one JSON object a line: `begin` before a cell runs, its outputs as they are published, `end`
    S.bulk    the same lines for the outputs beyond a cell's share of the log; a ring of two files, the older S.bulk.1
    S.fault   where faulthandler writes the line that a fatal signal struck

Three states, decided by the operating system and not by process numbers, which are given out again:
no lock file, the session was closed; its lock is held, it is alive; its lock is free, it died.

1. SessionLog, the kernel's side.  `begin` is called by main, the rest by twoproc-io in the order of the outbox.
   Nothing here raises into a cell: a failure is one warning, records are counted as lost, each later record tries
   again, and the first that fits is followed by a note that says how many are missing.
2. LoggedSession, for whoever reads a log.  It believes a line only if its checksum is right, and never raises
   for what a file contains.
3. sessions, find, prune, note_exit: the folder.  main: the command line.

The format, with examples, is in docs/crashlog.md.  What is made of a dead session is recovery.py's.
"""
from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import heapq
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import Any, Callable, Iterable, Iterator, NamedTuple
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
SPAN = 64 << 10         # bytes of a file between two entries of the index
SPANS = 20_000          # entries of the index
RETRY_SECONDS = 1.0     # between two attempts to open the files, but for cells, which each try; and two looks at where
                        # they are
WARN_SECONDS = 60.0     # between two warnings
SYNC_SECONDS = 1.0      # from a record to its fsync
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


class Page(NamedTuple):
    """Some of a living session's records, in order.

    records: lines without their newline.  parents: the header, as JSON, of cells whose `begin` is not among them.
    next_seq: where to ask on, None at the end.  cut: something of what was asked for is no longer kept.
    """
    records: list[bytes]
    parents: dict[str, bytes]
    next_seq: int | None
    cut: bool


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
        os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
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


_encode = json.JSONEncoder(default=str).encode     # our own: a cell may put another in the place of json.dumps
_TYPES = {name: b',"type":"%b","content":' % name.encode("ascii") for name in OUTPUTS}

# What a line begins with. The members of a record come in this order, so that no JSON is parsed to find a line.
_HEAD = re.compile(rb'\{"n":(\d{1,15}),"k":"(\w{1,20})","t":-?[\d.]{1,20}'
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


def _embed(raw: bytes) -> bytes:
    """JSON that came from a client, as part of a line: ASCII, no newline."""
    if raw.isascii() and b"\n" not in raw:
        return raw
    try:
        return _encode(json.loads(raw)).encode("ascii")
    except (ValueError, RecursionError):
        return b"{}"


def _text(value: str | None) -> bytes:
    return b"null" if value is None else _encode(value).encode("ascii")


# -- 1. The kernel's side --------------------------------------------------------------------------

class _File:
    """A file that records are appended to: each is in it entirely, or not at all."""

    def __init__(self, path: str) -> None:
        try:
            self.fd = open_private(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        except FileExistsError:
            self.fd = open_private(path, os.O_RDWR | os.O_APPEND)
        found = os.fstat(self.fd)
        self.path, self.size, self.is_torn = path, found.st_size, False
        self._identity = found.st_dev, found.st_ino
        self.first_n = self.last_n = self.records = 0       # kept for S.bulk: what goes when the ring turns

    def append(self, data: bytes) -> None:
        if self.is_torn:
            self._restore()
        written = os.write(self.fd, data)
        if written != len(data):
            self.is_torn = True         # stays so if the next line fails: then it is tried before the next record
            self._restore()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
        self.size += written

    def _restore(self) -> None:
        os.ftruncate(self.fd, self.size)
        self.is_torn = False

    def is_ours(self) -> bool:
        """Whether the descriptor is still this file, and the file still has a name.

        A cell may close descriptors that are not its own, and open others under their numbers; and who cleans
        up a home folder does not ask which of its files are in use.
        """
        try:
            found = os.fstat(self.fd)
        except OSError as error:
            if error.errno == errno.EBADF:
                self.fd = -1
            return self.fd >= 0
        if (found.st_dev, found.st_ino) != self._identity:
            self.fd = -1                # somebody else's now, and not ours to close
            return False
        return found.st_nlink > 0

    def is_sound(self) -> bool:
        """The same, and whether it is still where it was: a folder may be moved."""
        if not self.is_ours():
            return False
        try:
            found = os.lstat(self.path)
        except OSError as error:        # a cell that became another user may not look, but can write
            return error.errno not in (errno.ENOENT, errno.ENOTDIR)
        return (found.st_dev, found.st_ino) == self._identity

    def sync(self) -> None:
        try:
            getattr(os, "fdatasync", os.fsync)(self.fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):      # a file system without
                raise

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class _Cell:
    """What has become of the output of one cell.  room: what is left of its first half, which goes to S.log."""

    __slots__ = ("of", "parent", "room", "is_private", "is_ended", "tail", "tail_bytes", "first", "records", "bytes")

    def __init__(self, of: bytes, parent: bytes, room: int, is_private: bool = False) -> None:
        self.of, self.parent, self.room, self.is_private = of, parent, room, is_private
        self.is_ended = False
        self.tail: list[tuple[int, int, bytes]] = []    # (n, seq, line): its newest half, while it runs; a few hundred
        self.tail_bytes = self.first = self.records = self.bytes = 0


class _Span:
    """An entry of the index: where the records from `n` on are, with numbers from `seq` to `last`; no file: gone."""

    __slots__ = ("n", "seq", "last", "file", "start", "end")

    def __init__(self, n: int, seq: int, last: int, file: _File | None, start: int, end: int) -> None:
        self.n, self.seq, self.last, self.file, self.start, self.end = n, seq, last, file, start, end

    def lines(self) -> list[_Line]:
        """The records that have their place among the messages."""
        if self.file is None:
            return []
        try:
            lines = os.pread(self.file.fd, self.end - self.start, self.start).split(b"\n")
        except OSError:
            return []
        return [(int(found[1]), int(found[3]), found[4] or b"", line)
                for found, line in zip(map(_HEAD.match, lines), lines) if found and found[3] and is_intact(line)]


class SessionLog:
    """The log of the session that this process is.

    One threading.RLock around everything that writes: main begins cells while twoproc-io logs the output of the
    one before.  It is held for one record, never while `warn` is called, which may print, which may be logged.
    """

    def __init__(self, conn: str, limits: Limits = Limits(), warn: Callable[[str], None] = lambda text: None) -> None:
        """Take the lock and open the files.  conn: the connection file, the name that a restarted kernel shares.

        warn(text): told once when nothing can be recorded.  It must not raise.
        """
        self.conn, self.limits = conn, limits
        self.id = "%s-%d-%s" % (time.strftime("%Y%m%dT%H%M%S", time.gmtime()), os.getpid(), os.urandom(3).hex())
        self.folder = ""
        self.prev: LoggedSession | None = None
        self.is_prev_told = False       # the kernel's: the user has seen what became of it
        self.fault: Any = None
        self._warn, self._warned_at = warn, -WARN_SECONDS
        self._lock = threading.RLock()
        self._lock_file: _File | None = None
        self._log: _File | None = None
        self._bulk: _File | None = None
        self._old_bulk: _File | None = None
        self._opening = b""             # the members of the `open` record, for a file that has none (_is_opened)
        self._is_opened = False
        self._n = 0
        self._seq = 0                   # the newest message published, of any type
        self._trouble: str | None = None
        self._lost = 0
        self._tried_at = self._checked_at = 0.0
        self._is_closed = False
        self._cells: dict[bytes, _Cell] = {}        # by the header of the request, as it came
        self._parents: dict[bytes, bytes] = {}      # the header by its msg_id
        self._no_cell = _Cell(b"", b"", limits.per_cell >> 1)
        self._no_cell.is_ended = True
        self._private_key = os.urandom(32)          # never written: a hash tells nobody else what the code was
        self._spans: list[_Span] = []
        self._tails: deque[_Span] = deque(maxlen=CELLS)     # lines of S.bulk that are in S.log as well
        self._begins: deque[_Span] = deque(maxlen=CELLS)
        self._is_dirty = False
        self._wake: SimpleQueue[bool] = SimpleQueue()
        self._ending = threading.Event()
        # Whatever is wrong, the kernel starts.  The predecessor first: it is found also where nothing can be written.
        with contextlib.suppress(Exception):
            self.prev = _predecessor(conn)
        try:
            with self._lock:
                self._open_files()
        except Exception as error:
            self._fail(error)

    @property
    def is_on(self) -> bool:
        return self._log is not None and self._trouble is None and not self._is_closed

    # -- called by main

    def open(self, ipython_version: str) -> None:
        """Write the first record."""
        host, boot = _host(), _boot()
        members = {
            "v": VERSION, "pid": os.getpid(), "started": _started(os.getpid()) or "", "boot": boot, "host": host,
            "user": os.environ.get("USER") or os.environ.get("USERNAME") or "", "python": sys.version.split()[0],
            "ipython": ipython_version, "twoproc": __version__, "cwd": _working_folder(), "argv": sys.argv,
            "conn": self.conn, "prev": self.prev.id if self.prev else "",
            "marks": self.prev.marks() if self.prev else {}}
        self._opening = b"," + _encode(members).encode("ascii")[1:-1]
        self._record(b"open", self._opening)

    def begin(self, parent: bytes, msg_id: str, code: str, ec: int, cell_id: Any = None, file: str = "") -> None:
        """A cell is about to run.  parent: the header of its request, as it came; file: its name in tracebacks."""
        self._begin(parent, msg_id, b',"ec":%d,"code":%b,"file":%b,"cell":%b' % (
            ec, _text(code), _text(file), _text(cell_id if isinstance(cell_id, str) else None)), False)

    def begin_private(self, parent: bytes, msg_id: str, code: str, ec: int) -> None:
        """The same for a cell of which only hash and length are kept, and no output."""
        digest = hashlib.blake2b(code.encode("utf-8", "surrogatepass"), key=self._private_key, digest_size=16)
        self._begin(parent, msg_id, b',"ec":%d,"hash":"%b","length":%d' % (
            ec, digest.hexdigest().encode("ascii"), len(code)), True)

    def _begin(self, parent: bytes, msg_id: str, members: bytes, is_private: bool) -> None:
        if self._is_closed:
            return
        of = _text(msg_id)
        with self._lock:
            self._cells[parent] = _Cell(of, parent, self.limits.per_cell >> 1, is_private)
            self._parents[of] = parent
            if len(self._cells) > CELLS:
                # With a default: two clients may have counted their messages from 1.
                self._parents.pop(self._cells.pop(next(iter(self._cells))).of, None)
        self._record(b"begin", b'%b,"hdr":%b' % (members, _embed(parent)), of)

    # -- called by twoproc-io

    def published(self, msg_type: str, seq: int, content: bytes, parent: bytes, metadata: bytes = b"{}") -> None:
        """A message is about to be sent on iopub; to be called for each, also for those that are not recorded."""
        self._seq = seq
        if msg_type not in _TYPES or self._is_closed:
            return
        cell = self._cells.get(parent)
        if cell is None:
            if b"execute_request" in parent:    # a silent one, or one that is long forgotten
                return
            cell = self._no_cell
        if cell.is_private:
            return
        more = b"" if metadata == b"{}" else b',"metadata":' + metadata
        self._record(b"out", _TYPES[msg_type], cell.of, seq, cell, content + more)

    def asked(self, parent: bytes, prompt: str, password: bool) -> None:
        """A cell asks for input; what is answered is never recorded."""
        cell = self._cells.get(parent)
        if cell is not None and not cell.is_private:
            self._record(b"stdin", b',"prompt":%b,"password":%b' % (_text(prompt), b"true" if password else b"false"),
                         cell.of)

    def end(self, parent: bytes, ok: bool, seconds: float, seq: int) -> None:
        cell = self._cells.get(parent)
        if cell is None or self._is_closed:
            return
        self._finish(cell)
        self._record(b"end", b',"ok":%b,"ms":%.3f' % (b"true" if ok else b"false", seconds * 1000), cell.of, seq)

    # -- called by any thread

    def is_writing(self) -> bool:
        """Whether the calling thread is in the middle of a record: a signal handler may ask, or a finalizer."""
        return self._lock._is_owned()   # type: ignore[attr-defined]    # in all Pythons; threading.Condition asks so

    def note(self, what: str, **members: Any) -> None:
        self._record(b"note", b"," + _encode({"what": what, **members}).encode("ascii")[1:-1])

    def close(self, why: str, keep: bool = False) -> None:
        """The session ends properly; its files go, unless a restarted kernel is to find them (keep)."""
        if self._is_closed:
            return
        for cell in list(self._cells.values()):
            self._finish(cell)
        self._record(b"close", b',"why":%b,"restart":%b' % (_text(why), b"true" if keep else b"false"))
        with self._lock:
            self._is_closed = True
            self._ending.set()
            self._wake.put(False)
            keep = keep or self.limits.keep_closed > 0
            base = os.path.join(self.folder, self.id)
            for suffix in () if keep else (".bulk", ".bulk.1", ".fault", ".log"):
                with contextlib.suppress(OSError):
                    os.unlink(base + suffix)
            # The lock goes last, and while it is held: who finds it free finds a session that died. If we are
            # killed in between, the log's `close` record, or its absence, says so.
            if self._lock_file is not None:
                with contextlib.suppress(OSError):
                    if self._lock_file.is_sound():
                        os.unlink(base + ".lock")
            self._close_files()
        if self.prev is not None:
            with contextlib.suppress(StateError, OSError):
                if self.prev.is_restarted and self.limits.keep_closed == 0:
                    self.prev.drop()
                elif self.is_prev_told:
                    with self.prev.take():
                        self.prev.append("recovered", by=self.id, how="notice")

    def close_in_child(self) -> None:
        """In a child of fork: let go of everything.  An flock is shared with the child, and would outlive the kernel.

        The lock of our own is left alone: another thread may have held it when the fork came.
        """
        self._is_closed = True
        if self.fault is not None:
            # faulthandler keeps the number. From here on it tells the child's story where the child's errors go.
            with contextlib.suppress(OSError):
                os.dup2(2, self.fault.fileno(), inheritable=False)
        self._lock = threading.RLock()
        self._close_files()

    def _close_files(self) -> None:
        for file in (self._log, self._bulk, self._old_bulk, self._lock_file):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    # -- the one place that writes

    def _record(self, kind: bytes, members: bytes, of: bytes = b"", seq: int | None = None, cell: _Cell | None = None,
                content: bytes = b"") -> None:
        """Append one record.  seq: the number of its message; None: of the next one, for what has an `of`."""
        try:
            with self._lock:
                if self._is_closed:
                    return
                if kind == b"begin" and self._log is not None:
                    self._check_files()
                is_open = (self._log and self._lock_file) is not None or self._reopen(at_once=kind == b"begin")
                if is_open and self._opening and not self._is_opened and kind != b"open":
                    self._is_opened = self._put(b"open", self._opening)
                self._n = n = self._n + 1
                if not is_open:
                    self._lose(seq if kind == b"out" else None)
                    return
                if of:
                    seq = self._seq + 1 if seq is None else seq
                    head = b'{"n":%d,"k":"%b","t":%.3f,"seq":%d,"of":%b%b' % (n, kind, time.time(), seq, of, members)
                elif seq is not None:
                    head = b'{"n":%d,"k":"%b","t":%.3f,"seq":%d%b' % (n, kind, time.time(), seq, members)
                else:
                    head = b'{"n":%d,"k":"%b","t":%.3f%b' % (n, kind, time.time(), members)
                line = seal(head, content) if content else seal(head)
                file = self._log if cell is None else self._file_for(cell, n, seq or 0, line)
                assert file is not None
                self._append(file, line, n, seq)
                if file is self._bulk and file.size > self.limits.backlog:
                    self._turn(file)
                if kind == b"begin":
                    self._begins.append(_Span(n, 0, 0, file, file.size - len(line), file.size))
                elif kind == b"open":
                    self._is_opened = True
                if self._trouble is not None:
                    self._resume()
        except Exception as error:      # a full disk, a folder taken away, a fault of ours: none of them a cell's
            self._fail(error)
            with self._lock:
                self._lose(seq if kind == b"out" else None)

    def _lose(self, seq: int | None) -> None:
        """A record is missing, and the message of that number with it; under the lock."""
        self._lost += 1
        spans = self._spans
        if seq is not None and spans and spans[-1].file is None:
            spans[-1].last = seq
        elif seq is not None:
            spans.append(_Span(self._n, seq, seq, None, 0, 0))

    def _put(self, kind: bytes, members: bytes) -> bool:
        """Append a record of our own making to S.log, under the lock; OSError."""
        self._n = n = self._n + 1
        assert self._log is not None
        self._append(self._log, seal(b'{"n":%d,"k":"%b","t":%.3f%b' % (n, kind, time.time(), members)), n)
        return True

    def _append(self, file: _File, line: bytes, n: int, seq: int | None = None) -> None:
        start = file.size
        file.append(line)
        spans = self._spans
        # What has no number of its own must not break the order: entries are found by bisection.
        seq = max(self._seq, spans[-1].last if spans else 0) if seq is None else seq
        if spans and spans[-1].file is file and spans[-1].end == start and start - spans[-1].start < SPAN:
            spans[-1].end, spans[-1].last = file.size, seq
        else:
            spans.append(_Span(n, seq, seq, file, start, file.size))
            if len(spans) > SPANS:
                at = SPANS // 10
                spans[:at] = [_Span(spans[0].n, spans[0].seq, spans[at - 1].last, None, 0, 0)]
        if self.limits.fsync == "always":
            file.sync()
        elif not self._is_dirty:
            self._is_dirty = True
            self._wake.put(True)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            is_news = self._trouble is None and time.monotonic() - self._warned_at > WARN_SECONDS
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._trouble = "%s: %s" % (type(error).__name__, reason)
            if is_news:
                self._warned_at = time.monotonic()
        if is_news:
            with contextlib.suppress(Exception):    # our caller runs a cell, whatever becomes of a warning
                self._warn("the session log cannot be written (%s): cells run on, what they do is not recorded "
                           "until that is mended" % reason)

    def _resume(self) -> None:
        """A record was written again after some were not."""
        self._put(b"note", b',"what":"resumed","lost":%d,"because":%b' % (self._lost, _text(self._trouble)))
        self._trouble, self._lost = None, 0

    # -- files

    def _reopen(self, at_once: bool) -> bool:
        # Not for each record of a flood: the folder is looked at anew each time.
        if not at_once and time.monotonic() - self._tried_at < RETRY_SECONDS:
            return False
        self._open_files()
        return True

    def _open_files(self) -> None:
        self._tried_at = time.monotonic()
        # Once chosen it stays: a cell may change the environment.
        self.folder = sessions_folder(os.path.dirname(self.folder))
        base = os.path.join(self.folder, self.id)
        if self._lock_file is None:
            self._lock_file = self._make_lock(base + ".lock")
        if self._log is None:
            self._log = _File(base + ".log")
            self._is_opened = self._log.size > 0        # not so in one made anew, its predecessor taken away
        if self.fault is None:
            self.fault = os.fdopen(open_private(base + ".fault", os.O_WRONLY | os.O_APPEND | os.O_CREAT), "wb", 0)

    def _make_lock(self, path: str) -> _File:
        """The lock file, locked before it has its name: nobody ever sees it free while we live."""
        temporary = "%s.%s.tmp" % (path, os.urandom(4).hex())
        try:
            file = _File(temporary)
            try:
                is_locked = try_lock(file.fd)
                holder = {"session": self.id, "pid": os.getpid(), "started": _started(os.getpid()) or "",
                          "boot": _boot(), "host": _host(), "conn": self.conn, "cwd": _working_folder(),
                          "locking": "none" if is_locked is None else "flock"}
                file.append(_encode(holder).encode("ascii") + b"\n")
                os.rename(temporary, path)
                file.path = path
            except BaseException:
                file.close()
                raise
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        return file

    def _check_files(self) -> None:
        """Before each cell: what is no longer ours is opened anew.  Where files are is looked at once a second."""
        now = time.monotonic()
        if self._log is not None and self._log.is_ours() and now - self._checked_at < RETRY_SECONDS:
            return
        self._checked_at = now
        for name in ("_lock_file", "_log", "_bulk", "_old_bulk"):
            file = getattr(self, name)
            if file is not None and not file.is_sound():
                setattr(self, name, None)
                self._gone(file)

    def _file_for(self, cell: _Cell, n: int, seq: int, line: bytes) -> _File:
        """S.log for the first half of a cell's output, S.bulk for the rest; its newest half is kept for the end."""
        assert self._log is not None
        if len(line) <= cell.room and self._log.size + len(line) <= self.limits.log:
            cell.room -= len(line)
            return self._log
        cell.room = 0                   # what comes now is later, also where a smaller one would fit
        if not cell.is_ended:
            cell.first = cell.first or n
            cell.records += 1
            cell.bytes += len(line)
            cell.tail.append((n, seq, line))
            cell.tail_bytes += len(line)
            while cell.tail_bytes > self.limits.per_cell >> 1:
                cell.tail_bytes -= len(cell.tail.pop(0)[2])
        if self._bulk is None:
            self._bulk = _File(os.path.join(self.folder, self.id + ".bulk"))
        bulk = self._bulk
        bulk.first_n = bulk.first_n or n
        bulk.last_n = n
        bulk.records += 1
        return bulk

    def _turn(self, bulk: _File) -> None:
        """S.bulk is full: it becomes S.bulk.1, and the one that was S.bulk.1 is gone."""
        base, gone = os.path.join(self.folder, self.id), self._old_bulk
        if gone is not None and gone.records:       # said before it is so: we may be killed in between
            self._put(b"cut", b',"first":%d,"last":%d,"records":%d,"bytes":%d' % (
                gone.first_n, gone.last_n, gone.records, gone.size))
            gone.records = 0
        os.rename(base + ".bulk", base + ".bulk.1")
        bulk.path, self._old_bulk, self._bulk = base + ".bulk.1", bulk, None
        if gone is not None:
            self._gone(gone)

    def _gone(self, file: _File) -> None:
        """This file is no longer kept: so says the index from now on, in one entry for neighbours."""
        spans: list[_Span] = []
        for span in self._spans:
            if span.file is file:
                span.file = None
            if spans and spans[-1].file is span.file is None:
                spans[-1].last = span.last
            else:
                spans.append(span)
        self._spans = spans
        self._begins = deque((begin for begin in self._begins if begin.file is not file), CELLS)
        self._tails = deque((tail for tail in self._tails if tail.file is not file), CELLS)
        file.close()

    def _finish(self, cell: _Cell) -> None:
        """A cell has ended: what was cut out of the middle of its output, and the newest half again, for S.log."""
        cell.is_ended = True
        if not cell.records:
            return
        try:
            with self._lock:
                if self._is_closed or self._log is None:
                    return
                lines = [line for _, _, line in cell.tail]
                if self._log.size + cell.tail_bytes > self.limits.log:
                    lines = []
                dropped, first_kept = cell.records - len(lines), cell.tail[0] if lines else None
                if dropped:
                    self._put(b"cut", b',"of":%b,"first":%d,"last":%d,"records":%d,"bytes":%d' % (
                        cell.of, cell.first, first_kept[0] - 1 if first_kept else self._n, dropped,
                        cell.bytes - sum(map(len, lines))))
                if first_kept:
                    start = self._log.size
                    self._log.append(b"".join(lines))       # one write for all: they were written before
                    self._tails.append(_Span(*first_kept[:2], cell.tail[-1][1], self._log, start, self._log.size))
        except Exception as error:
            self._fail(error)
        finally:
            cell.tail.clear()
            cell.records = 0

    # -- thread twoproc-log: removes what is too old, then sleeps until something was written, and syncs a second of it

    def start_sync(self, own_thread: Callable[[str, Callable[[], None]], Any]) -> None:
        """own_thread: channels.own_thread, or another starter of threads.  The thread ends with `close`."""
        own_thread("twoproc-log", self._sync)

    def _sync(self) -> None:
        with contextlib.suppress(StateError, OSError):
            prune(self.limits)
        while self.limits.fsync == "interval" and self._wake.get():
            self._ending.wait(SYNC_SECONDS)
            self._is_dirty = False      # before the sync: what is written during it has its own
            try:
                for file in (self._log, self._bulk):
                    if file is not None and not self._is_closed:
                        file.sync()
            except Exception as error:  # the outermost loop of a thread
                if not self._is_closed:
                    self._fail(error)

    # -- for the living kernel's clients, by twoproc-io

    def recent(self, cells: int | None, max_bytes: int) -> Page:
        """The newest cells (None: all that are known) and what was published since, about `max_bytes` at most.

        When that is too much, all codes are preferred to old output, and new output to old.
        """
        with self._lock:
            begins = list(self._begins)[-cells if cells else None:] if cells != 0 else []
            spans, tails = list(self._spans), list(self._tails)
        found: dict[int, tuple[bytes, bytes]] = {}      # n: (of, line)
        size, cut = 0, False
        for begin in reversed(begins):
            if size + begin.end - begin.start > max_bytes >> 1 and found:
                cut = True
                break
            for n, _, of, line in begin.lines():
                found[n] = of, line
                size += len(line)
        if not found:
            return Page([], {}, None, cut)
        oldest = min(found)
        at = max(0, bisect.bisect(spans, oldest, key=lambda span: span.n) - 1)
        for n, _, of, line in _merge(spans[at:], tails, is_reversed=True):
            if n < oldest:
                break
            if n not in found:
                size += len(line)
                if size > max_bytes:
                    return self._make_page(found, None, True)
                found[n] = of, line
        return self._make_page(found, None, cut or any(span.file is None for span in spans[at:]))

    def between(self, first_seq: int, last_seq: int, max_bytes: int) -> Page:
        """The records of the messages with these numbers, as many as fit, but one at least."""
        with self._lock:
            at = bisect.bisect_left(self._spans, first_seq, key=lambda span: span.last)
            spans = self._spans[at:bisect.bisect_right(self._spans, last_seq, key=lambda span: span.seq)]
            gone = [span.seq for span in spans if span.file is None]
            tails = [tail for tail in self._tails if gone and tail.seq <= last_seq and tail.last >= first_seq]
        found: dict[int, tuple[bytes, bytes]] = {}
        size, newest, next_seq = 0, 0, None
        for n, seq, of, line in _merge(spans, tails):
            if seq > last_seq:
                break
            if seq >= first_seq and n not in found:
                if found and size + len(line) > max_bytes and seq > newest:
                    next_seq = seq
                    break
                found[n] = of, line
                size += len(line)
                newest = seq
        return self._make_page(found, next_seq, any(next_seq is None or seq < next_seq for seq in gone))

    def _make_page(self, found: dict[int, tuple[bytes, bytes]], next_seq: int | None, cut: bool) -> Page:
        records = [found[n] for n in sorted(found)]
        begun = {of for of, line in records if b'"k":"begin"' in line[:40]}
        wanted = {of: self._parents.get(of) for of, _ in records if of not in begun}    # main forgets old ones
        parents = {json.loads(of): _embed(parent) for of, parent in wanted.items() if parent is not None}
        return Page([line for _, line in records], parents, next_seq, cut)


_Line = tuple[int, int, bytes, bytes]       # n, seq, of, the line itself


def _merge(spans: list[_Span], tails: list[_Span], is_reversed: bool = False) -> Iterator[_Line]:
    """The records of both in order, some twice; read as they are asked for."""
    step = -1 if is_reversed else 1
    groups: list[tuple[int, list[_Span]]] = []      # tails of cells that ran within each other
    for tail in sorted(tails, key=lambda tail: tail.seq):
        last, within = groups.pop() if groups and tail.seq <= groups[-1][0] else (0, [])
        groups.append((max(last, tail.last), [*within, tail]))
    return heapq.merge(
        (line for span in spans[::step] for line in span.lines()[::step]),
        (line for _, group in groups[::step]
         for line in sorted(itertools.chain(*(tail.lines() for tail in group)))[::step]),
        key=lambda line: step * line[0])


def _predecessor(conn: str) -> LoggedSession | None:
    """The session that a kernel with this connection file replaces: it died, or was closed for a restart."""
    same = [session for session in sessions() if session.opened.get("conn") == conn]
    # By name, which is by date, and dates may be set back: so what another one has replaced is left out.
    replaced = {session.opened["prev"] for session in same}
    for session in same:
        if session.id not in replaced and (session.is_restarted or session.state() == "died"):
            return session
    return None


# -- who, and where

def _host() -> str:
    return os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")


def _boot() -> str:
    """What changes with every start of the machine; empty where there is no such thing."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When the process was started, in ticks since the boot; None if there is no such process, "" if nobody says."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] in b"ZX" else fields[19].decode("ascii")
    except FileNotFoundError:
        return None if os.path.exists("/proc/self/stat") else ""
    except (OSError, IndexError):
        return ""


def _working_folder() -> str:
    try:
        return os.getcwd()
    except OSError:         # removed
        return ""


# -- 2. Reading ------------------------------------------------------------------------------------

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
        self._marks: dict[str, str] | None = None

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
        host, boot = holder.get("host", _host()), holder.get("boot", "")
        is_same_boot = boot == _boot() and boot != ""
        if has_locks and holder.get("locking", "flock") == "flock":
            # Some network file systems keep locks to themselves: free here may be held there.
            return "died" if is_same_boot or host == _host() else "unknown"
        if host != _host() or not boot or not _boot() or type(holder.get("pid")) is not int:
            return "unknown"
        if not is_same_boot:
            return "died"
        started = _started(holder["pid"])
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
    def closed_why(self) -> str | None:
        record = self.closed
        return record["why"] if record else None

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
            self._opened = next(filter(None, map(parse, self._first_lines())), None) or self._holder()
        return self._opened

    def _first_lines(self) -> Iterator[bytes]:
        with contextlib.suppress(OSError, ConnectionFileError):
            with open(open_private(self.path(".log"), os.O_RDONLY), "rb") as file:
                for line in file:
                    if b'"k":"open"' in line[:40]:
                        yield line[:-1]
                    if file.tell() > 1 << 20:
                        return

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
                found = _HEAD.match(line)
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
        by_of = {_text(cell.of): cell for cell in cells.values()}
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
        if self._marks is not None:
            return self._marks
        marks = {name: date for name, date in self.opened.get("marks", {}).items() if type(date) is str}
        for record in self.outline():
            if record["k"] == "begin":
                name, date = record["hdr"].get("session"), record["hdr"].get("date")
                if type(name) is str and type(date) is str:
                    marks[name] = max(date, marks.pop(name, date))      # the newest last
        self._marks = dict(list(marks.items())[-CELLS:])
        return self._marks

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
        try:
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
            unlock(fd)                  # closing is not enough if a cell that was run meanwhile has forked
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


def _numbers(content: bytes) -> list[int]:
    lines = content.split(b"\n")
    return [int(found[1]) for line, found in zip(lines, map(_HEAD.match, lines)) if found and is_intact(line)]


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


# -- 3. The folder ---------------------------------------------------------------------------------

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
    except BrokenPipeError:         # `| head`; the interpreter shall not find out once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
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
    # Not the main() above: recovery.py imports this module by its name, and raises that one's exceptions.
    sys.exit(importlib.import_module(__spec__.name).main())     # type: ignore[name-defined]
