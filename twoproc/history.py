# Distributed under the terms of the BSD 3-Clause License.
"""Input history in IPython's history.sqlite, opened when first needed and written when nobody waits for it."""
from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import Any

from IPython.core.history import HistoryManager
from traitlets import default

# How long another process may keep history.sqlite locked before we try again later; and, at exit, give up.
LOCK_SECONDS, LAST_LOCK_SECONDS = 0.2, 2.0
LOCKED_PAUSE_SECONDS = 10.0


class History(HistoryManager):
    """IPython's history.sqlite, opened when first needed and written when nobody waits for it.

    IPython opens it at start, lets a thread commit after every cell (the next cell waits for that), and moves
    a database aside that is only locked.  Here the inputs of cells collect in memory; writeout_cache, called
    while the kernel is idle, and the history requests open the file.  A file that cannot be used is left as it
    is: history then stays in memory and that is said once.
    """

    # Reading and writing may come from main and from a helper thread; never held while user code runs.
    db_lock: threading.RLock
    db: Any
    db_input_cache: list
    db_output_cache: list
    _is_open = False
    _last_line = 0                                  # of this session, in the file
    _has_complained = False

    def __init__(self, shell, parent=None, **traits):
        self.db_lock = threading.RLock()
        self._pid = os.getpid()
        # ":memory:" keeps IPython from starting its thread and from renaming files; `path` is the real one.
        super().__init__(shell=shell, parent=parent, hist_file=":memory:", **traits)
        wanted = parent.config.HistoryManager.get("hist_file", None) if parent is not None else None
        self.path = str(wanted or os.path.join(shell.profile_dir.location, "history.sqlite"))
        self.db_cache_size = sys.maxsize            # nobody waits on the flag that IPython would set
        self._locked_until = 0.0

    @default("enabled")
    def _is_sqlite_there(self) -> bool:
        from importlib.util import find_spec         # without the import, 3 ms of every start
        return find_spec("_sqlite3") is not None

    def init_db(self) -> None:
        pass                                        # called by IPython at start; `db` opens when first used

    @default("db")
    def _open(self):
        import sqlite3
        self._is_open = True
        if self.enabled and self.path != ":memory:":
            try:
                return self._connect(sqlite3, self.path)
            except (sqlite3.Error, OSError) as error:
                self.complain(error)
        return self._connect(sqlite3, ":memory:")

    def _connect(self, sqlite3, path):
        db = sqlite3.connect(path, timeout=LOCK_SECONDS, check_same_thread=False,
                             detect_types=sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES)
        try:
            with db:
                # IPython's tables; its frontends read and write the same file.
                db.execute("CREATE TABLE IF NOT EXISTS sessions (session integer primary key autoincrement, "
                           "start timestamp, end timestamp, num_cmds integer, remark text)")
                db.execute("CREATE TABLE IF NOT EXISTS history (session integer, line integer, source text, "
                           "source_raw text, PRIMARY KEY (session, line))")
                db.execute("CREATE TABLE IF NOT EXISTS output_history (session integer, line integer, output text, "
                           "PRIMARY KEY (session, line))")
        except BaseException:
            db.close()
            raise
        return db

    def new_session(self, conn=None) -> None:
        """Number this session: called by IPython at start and by %reset; the row is written with the first input."""
        self.session_number = self._last_line = 0

    def _start_session(self) -> None:
        import datetime
        if self.session_number == 0:
            self.session_number = self.db.execute("INSERT INTO sessions VALUES (NULL, ?, NULL, NULL, '')", (
                datetime.datetime.now().isoformat(" "),)).lastrowid

    def has_unwritten(self) -> bool:
        """Whether writeout_cache has something to do; False for a while after the file was found locked."""
        return bool(self.db_input_cache or self.db_output_cache) and self.enabled \
            and time.monotonic() > self._locked_until

    def writeout_cache(self, conn=None) -> None:
        """Write what has collected; what cannot be written now, because the file is locked, waits for the next time."""
        if not self.enabled or os.getpid() != self._pid:      # a forked child leaves the file to its parent
            return
        if not self.db_input_cache and not self.db_output_cache:
            return
        with self.db_lock:
            with self.db_input_cache_lock:
                inputs, self.db_input_cache = self.db_input_cache, []
            with self.db_output_cache_lock:
                outputs, self.db_output_cache = self.db_output_cache, []
            try:
                self._write(inputs, outputs)
            except Exception as error:
                if is_locked(error):
                    self._locked_until = time.monotonic() + LOCKED_PAUSE_SECONDS
                    with self.db_input_cache_lock:
                        self.db_input_cache = inputs + self.db_input_cache
                    with self.db_output_cache_lock:
                        self.db_output_cache = outputs + self.db_output_cache
                else:
                    self._leave_file(error, inputs, outputs)

    def _write(self, inputs: list, outputs: list) -> None:
        before = self.session_number, self._last_line
        try:
            with self.db:
                for line in inputs:
                    if line[0] <= self._last_line:
                        self.session_number = 0      # somebody set the count back: a session of its own
                    self._start_session()
                    self.db.execute("INSERT INTO history VALUES (?, ?, ?, ?)", (self.session_number, *storable(line)))
                    self._last_line = line[0]
                self.db.executemany("INSERT OR REPLACE INTO output_history VALUES (?, ?, ?)",
                                    [(self.session_number, *storable(line)) for line in outputs])
        except BaseException:
            self.session_number, self._last_line = before
            raise

    def _leave_file(self, error: Exception, inputs: list, outputs: list) -> None:
        import sqlite3
        self.complain(error)
        with contextlib.suppress(Exception):
            self.db.close()
        self.path = ":memory:"
        self.db = self._connect(sqlite3, ":memory:")
        self.new_session()
        with contextlib.suppress(Exception):        # what was wrong with these lines is wrong here as well
            self._write(inputs, outputs)

    def complain(self, error: Exception) -> None:
        """Say once, where the user sees it, that history is not kept."""
        if not self._has_complained:
            self._has_complained = True
            self.shell.publish("stream", {"name": "stderr", "text":
                "history file %s: %s; the inputs of this session stay in memory only. Repair the file or move it "
                "away.\n" % (self.path, error)})

    def get_range(self, session=0, start=1, stop=None, raw=True, output=False):
        if session < 0:                              # counted back from ours, which must have a number for that
            with self.db_lock, contextlib.suppress(Exception), self.db:
                self._start_session()
        return super().get_range(session, start, stop, raw, output)

    def get_session_info(self, session=0):
        if session <= 0:
            with self.db_lock, contextlib.suppress(Exception), self.db:
                self._start_session()
        return super().get_session_info(session)

    def reset(self, new_session=True) -> None:
        if new_session:
            self.end_session()                       # while the numbers of its lines are still its own
        super().reset(new_session)

    def end_session(self) -> None:
        """Write the rest and close the session's row; waits longer for a lock, this is the last time."""
        import datetime
        if os.getpid() != self._pid or not (self._is_open or self.db_input_cache):
            return
        try:
            with self.db_lock:
                self.db.execute("PRAGMA busy_timeout = %d" % (1000 * LAST_LOCK_SECONDS))
                self.writeout_cache()
                if self.session_number:
                    with self.db:
                        self.db.execute("UPDATE sessions SET end=?, num_cmds=? WHERE session==?", (
                            datetime.datetime.now().isoformat(" "), len(self.input_hist_parsed) - 1,
                            self.session_number))
                if self.db_input_cache:
                    raise TimeoutError("locked by another process for %d s" % LAST_LOCK_SECONDS)
        except Exception as error:                   # the end of the kernel does not depend on it
            self.complain(error)
        self.new_session()


def storable(line: tuple) -> tuple:
    """A line of history as SQLite takes it: a lone surrogate, which UTF-8 has not, becomes its escape."""
    return tuple(item.encode("utf-8", "backslashreplace").decode() if isinstance(item, str) else item for item in line)


def is_locked(error: Exception) -> bool:
    return type(error).__name__ == "OperationalError" and any(word in str(error) for word in ("locked", "busy"))
