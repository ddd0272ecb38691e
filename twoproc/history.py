# Distributed under the terms of the BSD 3-Clause License.
"""The inputs of cells in IPython's history.sqlite, opened when first needed and written when nobody waits for it.

IPython opens the file at start, lets a thread commit after every cell (the next cell waits for that), and moves
aside a database that is only locked.  Here inputs collect in memory; writeout_cache, called while the kernel is idle,
and who asks for history open the file.  A file that cannot be used is left as it is: history then stays in memory,
and that is said once.  The file is that of IPython's frontends, which read and write it at the same time.

Cells run in main, requests are answered by a helper thread, either may write: `db_lock` is held by who uses the
file, never while user code runs.
"""
from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time
from typing import Any

from IPython.core.history import HistoryManager
from traitlets import default

from .crashlog import is_private

# How long another process may keep the file locked before we try again later.
LOCK_SECONDS, LOCKED_PAUSE_SECONDS = 0.2, 10.0
LAST_LOCK_SECONDS = 2.0                             # at exit, where there is no later


class History(HistoryManager):
    """IPython's history manager, with what it does with the file replaced."""

    db: Any
    db_input_cache: list
    db_output_cache: list
    _session = 0                                    # our row of the table sessions; 0: not written yet
    _last_line = 0                                  # of this session, in the file
    _locked_until = 0.0
    _has_complained = False

    def __init__(self, shell, parent):
        self.db_lock = threading.RLock()
        self._pid = os.getpid()
        # ":memory:" keeps IPython from starting its thread and from renaming files; `path` is the real one.
        super().__init__(shell=shell, parent=parent, hist_file=":memory:")
        self.path = str(parent.config.HistoryManager.get("hist_file", None)
                        or os.path.join(shell.profile_dir.location, "history.sqlite"))
        self.db_cache_size = sys.maxsize            # nobody waits on the flag that IPython would set

    # -- what a kernel asks for

    def answer(self, request: dict) -> list:
        """The lines that a history_request wants; request: its content."""
        how = {"raw": request["raw"], "output": request["output"]}
        try:
            with self.db_lock:
                if request["hist_access_type"] == "tail":
                    return self.get_tail(request["n"] or 10, include_latest=True, **how)
                if request["hist_access_type"] == "range":
                    asked = request["session"]
                    lines = self.get_range(asked, request["start"], request["stop"], **how)
                    # IPython calls the current session 0, also where it was asked for by its number.
                    return [(session or max(asked, 0), *line) for session, *line in lines]
                return list(self.search(request["pattern"], n=request["n"], unique=request["unique"], **how))
        except Exception as error:
            self.complain(error)
            return []

    def has_unwritten(self) -> bool:
        """Whether writeout_cache has something to do; False for a while after the file was found locked."""
        return bool(self.db_input_cache or self.db_output_cache) and self.enabled \
            and time.monotonic() > self._locked_until

    def writeout_cache(self, conn=None) -> None:
        """Write what has collected; what cannot be written now, because the file is locked, waits for the next time."""
        if not self.enabled or not (self.db_input_cache or self.db_output_cache) \
                or os.getpid() != self._pid:        # a forked child leaves the file to its parent
            return
        with self.db_lock:
            # Main may append meanwhile: what is taken out at the end is what was there now.
            inputs, outputs = self.db_input_cache[:], self.db_output_cache[:]
            try:
                self._write(inputs, outputs)
            except Exception as error:
                if is_locked(error):
                    self._locked_until = time.monotonic() + LOCKED_PAUSE_SECONDS
                    return
                self.complain(error)
                self.db.close()
                self.db = connect(":memory:")
                self.new_session()
                with contextlib.suppress(Exception):        # what was wrong with these lines is wrong here as well
                    self._write(inputs, outputs)
            del self.db_input_cache[:len(inputs)], self.db_output_cache[:len(outputs)]

    def _write(self, inputs: list, outputs: list) -> None:
        before = self._session, self._last_line
        try:
            with self.db:
                for line in inputs:
                    if line[0] <= self._last_line:
                        self.new_session()           # somebody set the count back
                    self._begin_session()
                    self.db.execute("INSERT INTO history VALUES (?, ?, ?, ?)", (self._session, *storable(line)))
                    self._last_line = line[0]
                self.db.executemany("INSERT OR REPLACE INTO output_history VALUES (?, ?, ?)",
                                    [(self._session, *storable(line)) for line in outputs])
        except BaseException:
            self._session, self._last_line = before
            raise

    def store_inputs(self, line_num, source, source_raw=None):
        """Called by IPython for each cell; one that is private stays in memory."""
        # IPython leaves out `exit`, after which a kernel may go on, and what Ctrl-C ends before it gets here.
        for lines in (self.input_hist_parsed, self.input_hist_raw):
            lines += [""] * (line_num - len(lines))
        if not is_private(source_raw or source):
            super().store_inputs(line_num, source, source_raw)      # appends: no cell waits for who uses the file
            return
        with self.db_lock:
            super().store_inputs(line_num, source, source_raw)
            self.db_input_cache[:] = [line for line in self.db_input_cache if line[0] != line_num]

    def store_output(self, line_num):
        """Called by IPython after each cell, for whoever wants results in the file as well."""
        if not any(map(is_private, self.input_hist_raw[-1:])):
            super().store_output(line_num)

    def complain(self, error: Exception) -> None:
        """Say once, where the user sees it, that history is not kept."""
        if not self._has_complained and not is_locked(error):
            self._has_complained = True
            self.shell.publish("stream", {"name": "stderr", "text":
                "history file %s: %s; the inputs of this session stay in memory only. Repair the file or move it "
                "away.\n" % (self.path, error)})

    # -- what IPython calls

    @default("enabled")
    def _is_sqlite_there(self) -> bool:
        from importlib.util import find_spec         # without the import, 3 ms of every start
        return find_spec("_sqlite3") is not None

    def init_db(self) -> None:
        """At start: nothing yet, `db` opens when first used."""

    @default("db")
    def _open(self):
        if self.enabled:
            try:
                return connect(self.path)
            except Exception as error:
                if is_locked(error):
                    raise                            # and tried again at the next use
                self.complain(error)
        return connect(":memory:")

    def new_session(self, conn=None) -> None:
        """At start and by %reset; the row is written with the first input, or when its number is asked for."""
        self._session = self._last_line = 0

    def _begin_session(self) -> None:
        if not self._session:
            self._session = self.db.execute("INSERT INTO sessions VALUES (NULL, ?, NULL, NULL, '')", (
                datetime.datetime.now().isoformat(" "),)).lastrowid

    @property
    def session_number(self) -> int:
        """From which IPython counts back to earlier sessions; 0 where the file cannot be written."""
        with self.db_lock, contextlib.suppress(Exception), self.db:
            self._begin_session()
        return self._session

    def end_session(self) -> None:
        """Write the rest and close the session's row; waits longer for a lock, this is the last time."""
        if os.getpid() != self._pid or not (self._session or self.db_input_cache):
            return
        with self.db_lock, contextlib.suppress(Exception):      # the end of the kernel does not depend on it
            self.db.execute("PRAGMA busy_timeout = %d" % (1000 * LAST_LOCK_SECONDS))
            self.writeout_cache()
            with self.db:
                self.db.execute("UPDATE sessions SET end=?, num_cmds=? WHERE session==?", (
                    datetime.datetime.now().isoformat(" "), len(self.input_hist_parsed) - 1, self._session))
        if self.db_input_cache and self.enabled:
            self.complain(TimeoutError("locked by another process for %d s" % LAST_LOCK_SECONDS))
        self.new_session()


def connect(path: str) -> Any:
    """A connection to the database, with IPython's tables."""
    import sqlite3
    if path != ":memory:":                              # a new file is for us alone, and what SQLite puts beside it
        with contextlib.suppress(OSError):              # SQLite tells
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    db = sqlite3.connect(path, timeout=LOCK_SECONDS, check_same_thread=False,
                         detect_types=sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES)
    try:
        with db:
            for table in ("sessions (session integer primary key autoincrement, start timestamp, end timestamp, "
                          "num_cmds integer, remark text)",
                          "history (session integer, line integer, source text, source_raw text, "
                          "PRIMARY KEY (session, line))",
                          "output_history (session integer, line integer, output text, PRIMARY KEY (session, line))"):
                db.execute("CREATE TABLE IF NOT EXISTS " + table)
    except BaseException:
        db.close()
        raise
    return db


def is_locked(error: Exception) -> bool:
    return type(error).__name__ == "OperationalError" and "locked" in str(error)


def storable(line: tuple) -> tuple:
    """A line of history as SQLite takes it: a lone surrogate, which UTF-8 has not, becomes its escape."""
    return tuple(item.encode("utf-8", "backslashreplace").decode() if isinstance(item, str) else item for item in line)
