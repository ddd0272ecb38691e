# Distributed under the terms of the BSD 3-Clause License.
"""What a frontend knows of a session that ended badly: of the one it was working in, and of those before.

The log of the session says what happened; this reads it for terminal.py, which asks the user what is to be done,
and for frontend.py, which has one line to say.  Nothing here runs a cell.  recovery.py is loaded when there was
a death, or when the user asks for the log: not at every start.
"""
from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import crashlog
from .connection import ConnectionFileError, open_private, write_private

if TYPE_CHECKING:
    from .client import Client
    from . import recovery
    from .crashlog import LoggedSession

SHOWN_CHARS = 1 << 14       # of what one cell printed
# Above this a log is not read only to say in passing how many cells are in it.
COUNTED_BYTES = 4 << 20
# How long we wait for what only the parent of a dead process can know. It knows at the same time as we do, that the
# process has ended, and then has to look for the session, as we had.
EXIT_SECONDS = 0.3


def obituary(connection_file: str | None, client: Client | None) -> Obituary | None:
    """What the log says about the kernel that just died; None if there is none here, or it was closed properly."""
    if connection_file is None:     # that of a kernel on another machine
        return None
    # Our kernels write their connection files; a Jupyter manager writes its own, without a process in it.
    pid = client.info.extra.get("twoproc_pid") if client is not None else None
    with contextlib.suppress(crashlog.StateError, OSError):
        for session in crashlog.sessions():
            if session.opened.get("conn") == connection_file and pid in (None, session.opened.get("pid")):
                state = session.state()
                # A process known to have ended may have left its lock to a child for a moment.
                if state == "died" or pid is not None and state != "closed":
                    _wait_exit(session)
                    return Obituary(session)
                return None
    return None


def _wait_exit(session: LoggedSession) -> None:
    until = time.monotonic() + EXIT_SECONDS
    while time.monotonic() < until:
        if session.fault_text() or any(record["k"] == "exit" for record in session.outline()):
            return
        time.sleep(0.01)


class Obituary:
    """The session of a dead kernel.  is_again: it died soon after a recovery."""

    def __init__(self, session: LoggedSession):
        from . import recovery
        self.session = session
        self.is_again = recovery.died_again(session)

    def lines(self) -> Iterator[str]:
        """What happened, and then what is saved, which may take a second for some hundred megabytes."""
        from . import recovery
        yield recovery.headline(self.session)
        yield from recovery.describe(self.session)[1:]
        if self.is_again:
            yield "  it died within %d s of a recovery: what was recovered may be what kills it" % (
                recovery.AGAIN_SECONDS)

    @functools.cached_property
    def death(self) -> recovery.Death:
        from . import recovery
        return recovery.cause(self.session)

    def text(self) -> str:
        """Its inputs and outputs, of much printed text beginning and end."""
        from . import recovery
        return "\n".join(recovery.show(self.session, SHOWN_CHARS))

    def inputs(self) -> list[str]:
        return [record["code"] for record in self.session.outline()
                if record["k"] == "begin" and isinstance(record.get("code"), str)]

    def recovered(self, by: str) -> str:
        """A fresh kernel, whose session is `by`, has taken its place: put that on record; what the user should know."""
        with contextlib.suppress(crashlog.StateError, OSError):
            with self.session.take():
                self.session.append("recovered", by=by, how="restart")
        from . import recovery
        cells, _ = recovery.replay_cells(self.session)
        what = recovery.cell_name(self.death.cell) if self.death.cell is not None else "nothing"
        text = "%s was %s again" % (what, "not run" if self.death.cell is not None else "run")
        if cells:
            first, last = recovery.cell_name(cells[0]), recovery.cell_name(cells[-1])
            text += "; %%recover replay runs %s again" % (first if first == last else "%s-%s" % (first, last))
        return text

    def line(self) -> str:
        """For who can read only one: what killed it, and where to look."""
        place = "" if self.death.cell is None else " %s" % self.death.place
        return "kernel died%s: %s; see %s" % (place, self.death.text, command("--show", self.session.id))


def command(*words: str) -> str:
    return " ".join([os.path.basename(sys.executable) or "python", "-m", "%s.crashlog" % __package__, *words])


# -- the log of a living session

def where(name: str) -> str:
    """Where the log of the session of that name is; empty for no name."""
    if not name:
        return ""
    try:
        path = crashlog.find(name).path(".log")
        return "session %s: %s, %d kB" % (name, path, os.stat(path).st_size + 999 >> 10)
    except (crashlog.StateError, OSError):
        return "session %s: not on this machine" % name


def save(name: str, path: str = "") -> str:
    """Write the session of that name to a file, by its extension as notebook or script; the whole path.

    Without a path: as a notebook in the current folder.  ValueError says why not.
    """
    from . import recovery
    if not name:
        raise ValueError("the kernel keeps no log")
    path = os.path.abspath(os.path.expanduser(path or "session-%s.ipynb" % name))
    try:
        recovery.export(crashlog.find(name), path)
    except crashlog.StateError as error:
        raise ValueError(str(error)) from error
    return path


# -- sessions of before

def news() -> str:
    """One line about the sessions that ended badly; empty if there is nothing new.

    Each is said once: <state folder>/told has the names.  Left out is what somebody has recovered, and what a
    kernel at the same address has followed: its user knows.
    """
    with contextlib.suppress(crashlog.StateError, ConnectionFileError, OSError):
        there = crashlog.sessions()
        known = _told() if there else set()
        followed = {session.opened.get("prev") for session in there}
        new = [session for session in there if session.id not in known and session.state() == "died"]
        if new:
            _tell([session.id for session in there if session.id in known] + [session.id for session in new])
        new = [session for session in new if session.id not in followed and not _is_recovered(session)]
        if new:
            from . import recovery
            return "%s did not close properly (%s%s): %s" % (
                recovery.count(len(new), "session"), "the last " if len(new) > 1 else "", _in_short(new[0]),
                command("--list"))
    return ""


def _told() -> set[str]:
    with contextlib.suppress(ConnectionFileError, OSError):
        with os.fdopen(open_private(os.path.join(crashlog.state_folder(), "told"), os.O_RDONLY),
                       encoding="utf-8", errors="replace") as file:
            return set(file.read().split())
    return set()


def _tell(names: list[str]) -> None:
    text = "".join(name + "\n" for name in names)
    write_private(os.path.join(crashlog.state_folder(), "told"), text)


def _outline(session: LoggedSession) -> list[dict]:
    return session.outline() if os.stat(session.path(".log")).st_size < COUNTED_BYTES else []


def _is_recovered(session: LoggedSession) -> bool:
    return any(record["k"] == "recovered" for record in _outline(session))


def _in_short(session: LoggedSession) -> str:
    """When it was last heard of, where, and how much it is."""
    from . import recovery
    cells = sum(record["k"] == "begin" for record in _outline(session))
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(os.stat(session.path(".log")).st_mtime))
    folder = recovery.one_line(recovery.short_path(session.opened.get("cwd", "?")))
    return ", ".join([when, folder] + [recovery.count(cells, "cell")] * bool(cells))
