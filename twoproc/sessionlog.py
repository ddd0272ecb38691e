# Distributed under the terms of the BSD 3-Clause License.
"""The kernel's side of the session log: every record is on disk before anybody else hears of it.

`begin` is called by main, before a cell runs; the rest by twoproc-io, in the order of the outbox.  Nothing here
raises into a cell: a failure is one warning, records are counted as lost, each later record tries again, and the
first that fits is followed by a note that says how many are missing.  An index in memory serves the kernel's clients,
so that their wait does not grow with the log.

What a line is, and the files, are crashlog.py's; docs/crashlog.md has examples.
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
import sys
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import Any, Callable, Iterator, NamedTuple

from . import __version__
from .connection import open_or_make, open_private, try_lock
from .crashlog import (
    CELLS, HEAD, OUTPUTS, VERSION, Limits, LoggedSession, StateError, as_text, boot_id, encode, host_name, is_intact,
    prune, seal, sessions, sessions_folder, started_ticks)

SPAN = 64 << 10         # bytes of a file between two entries of the index
SPANS = 20_000          # entries of the index
RETRY_SECONDS = 1.0     # between two attempts to open the files, but for cells, which each try; and two looks at where
                        # they are
WARN_SECONDS = 60.0     # between two warnings
SYNC_SECONDS = 1.0      # from a record to its fsync
_TYPES = {name: b',"type":"%b","content":' % name.encode("ascii") for name in OUTPUTS}


class Page(NamedTuple):
    """Some of a living session's records, in order.

    records: lines without their newline.  parents: the header, as JSON, of cells whose `begin` is not among them.
    next_seq: where to ask on, None at the end.  cut: something of what was asked for is no longer kept.
    """
    records: list[bytes]
    parents: dict[str, bytes]
    next_seq: int | None
    cut: bool


def _embed(raw: bytes) -> bytes:
    """JSON that came from a client, as part of a line: ASCII, no newline."""
    if raw.isascii() and b"\n" not in raw:
        return raw
    try:
        return encode(json.loads(raw)).encode("ascii")
    except (ValueError, RecursionError):
        return b"{}"


def _sealed(n: int, kind: bytes, members: bytes, content: bytes = b"") -> bytes:
    return seal(b'{"n":%d,"k":"%b","t":%.3f%b' % (n, kind, time.time(), members), content)


def _working_folder() -> str:
    try:
        return os.getcwd()
    except OSError:         # removed
        return ""


class _File:
    """A file that records are appended to: each is in it entirely, or not at all."""

    def __init__(self, path: str) -> None:
        self.fd = open_or_make(path, os.O_RDWR | os.O_APPEND)
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

    __slots__ = ("of", "room", "is_private", "is_ended", "tail", "tail_bytes", "first", "records", "bytes")

    def __init__(self, of: bytes, room: int, is_private: bool = False) -> None:
        self.of, self.room, self.is_private = of, room, is_private
        self.is_ended = False
        self.tail: deque[tuple[int, int, bytes]] = deque()      # (n, seq, line): its newest half, while it runs
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
                for found, line in zip(map(HEAD.match, lines), lines) if found and found[3] and is_intact(line)]


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
        self._no_cell = _Cell(b"", limits.per_cell >> 1)
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
        host, boot = host_name(), boot_id()
        members = {
            "v": VERSION, "pid": os.getpid(), "started": started_ticks(os.getpid()) or "", "boot": boot, "host": host,
            "user": os.environ.get("USER") or os.environ.get("USERNAME") or "", "python": sys.version.split()[0],
            "ipython": ipython_version, "twoproc": __version__, "cwd": _working_folder(), "argv": sys.argv,
            "conn": self.conn, "prev": self.prev.id if self.prev else "",
            "marks": self.prev.marks() if self.prev else {}}
        self._opening = b"," + encode(members).encode("ascii")[1:-1]
        self._record(b"open", self._opening)

    def begin(self, parent: bytes, msg_id: str, code: str, ec: int, cell_id: str | None = None,
              file: str = "") -> None:
        """A cell is about to run.  parent: the header of its request, as it came; file: its name in tracebacks."""
        self._begin(parent, msg_id, b',"ec":%d,"code":%b,"file":%b,"cell":%b' % (
            ec, as_text(code), as_text(file), as_text(cell_id)), False)

    def begin_private(self, parent: bytes, msg_id: str, code: str, ec: int) -> None:
        """The same for a cell of which only hash and length are kept, and no output."""
        digest = hashlib.blake2b(code.encode("utf-8", "surrogatepass"), key=self._private_key, digest_size=16)
        self._begin(parent, msg_id, b',"ec":%d,"hash":"%b","length":%d' % (
            ec, digest.hexdigest().encode("ascii"), len(code)), True)

    def _begin(self, parent: bytes, msg_id: str, members: bytes, is_private: bool) -> None:
        if self._is_closed:
            return
        of = as_text(msg_id)
        with self._lock:
            self._cells[parent] = _Cell(of, self.limits.per_cell >> 1, is_private)
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
            self._record(b"stdin", b',"prompt":%b,"password":%b' % (as_text(prompt), b"true" if password else b"false"),
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
        self._record(b"note", b"," + encode({"what": what, **members}).encode("ascii")[1:-1])

    def close(self, why: str, keep: bool = False) -> None:
        """The session ends properly; its files go, unless a restarted kernel is to find them (keep)."""
        if self._is_closed:
            return
        for cell in list(self._cells.values()):
            self._finish(cell)
        self._record(b"close", b',"why":%b,"restart":%b' % (as_text(why), b"true" if keep else b"false"))
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
                    members = b',"of":%b%b' % (of, members)
                if seq is not None:
                    members = b',"seq":%d%b' % (seq, members)
                line = _sealed(n, kind, members, content)
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
        self._n += 1
        assert self._log is not None
        self._append(self._log, _sealed(self._n, kind, members), self._n)
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
        self._put(b"note", b',"what":"resumed","lost":%d,"because":%b' % (self._lost, as_text(self._trouble)))
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
                holder = {"session": self.id, "pid": os.getpid(), "started": started_ticks(os.getpid()) or "",
                          "boot": boot_id(), "host": host_name(), "conn": self.conn, "cwd": _working_folder(),
                          "locking": "none" if is_locked is None else "flock"}
                file.append(encode(holder).encode("ascii") + b"\n")
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
                cell.tail_bytes -= len(cell.tail.popleft()[2])
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
            for file in filter(None, (self._log, self._bulk)):
                try:
                    file.sync()
                except Exception as error:      # the outermost loop of a thread
                    if file.fd >= 0:            # else it was closed meanwhile: the ring has turned, the session ended
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
        has_output = False          # one message at least, also where that alone is too much: a flood's are large
        for n, _, of, line in _merge(spans[at:], tails, is_reversed=True):
            if n < oldest:
                break
            if n not in found:
                size += len(line)
                if size > max_bytes and (has_output or len(line) > 8 * max_bytes):
                    return self._make_page(found, None, True)
                found[n] = of, line
                has_output = has_output or b'"k":"out"' in line[:40]
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
