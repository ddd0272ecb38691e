# Distributed under the terms of the BSD 3-Clause License.
"""Who is there: the kernels of this user on this machine, each asked a moment ago.

A connection file says that a kernel was there, and its claim that a process still has the name.  Only an answer says
that it lives: `look` asks all of them at once, on control and by the heartbeat, and waits for nobody longer than
SECONDS.  One that holds its claim and says nothing is listed as silent, and left alone: it may be stopped, or compute
in C, and go on.  What dead kernels left is removed on the way.

Kernels of other programs are found in Jupyter's folder.  Theirs hold no claim and know no question of ours: they are
there if their heartbeat answers.

Called by frontend.py for --list and by terminal.py for :kernels, in their main thread.
"""
from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import connection
from .connection import ConnectionFileError, ConnectionInfo

SECONDS = 1.0       # for an answer; one that is well gives it in a few milliseconds
AT_ONCE = 50        # kernels asked at a time: two sockets each, and the limit of descriptors may be 256


class Found(NamedTuple):
    """One kernel.  status: the content of its twoproc_status_reply, {} where there was none."""
    path: str
    info: ConnectionInfo
    is_ours: bool
    is_beating: bool = False
    status: dict[str, Any] = {}

    def members(self) -> dict[str, Any]:
        """What is known, for programs; None for what is not."""
        since = None
        with contextlib.suppress(OSError):
            since = os.stat(self.path).st_mtime     # written as it began
        return {"name": connection.kernel_name_of(self.path), "kind": "twoproc" if self.is_ours else "jupyter",
                "pid": connection.holder_pid(self.path), "started": since, "cwd": None, "clients": None,
                "last_input": None, "execution_count": None, "refused": None,
                "listen": self.info.extra.get("twoproc_listen", ""),
                **{name: value for name, value in self.status.items() if name not in ("status", "name")},
                "execution_state": self.status.get("execution_state", "silent" if self.is_ours else "unknown"),
                "heartbeat": self.is_beating, "kernel_name": self.info.kernel_name, "connection_file": self.path}

    def line(self, current: str | None = None) -> str:
        """The same for people, with nothing in it that a terminal obeys; current: the path of the reader's own."""
        known = self.members()
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(known["started"] or 0))
        if self.status:
            number = known["clients"]
            parts = ["%-6s %s client%s" % (known["execution_state"], number, "" if number == 1 else "s"),
                     _short_folder(str(known["cwd"]))]
        elif not self.is_ours:
            parts = ["of Jupyter: %s" % (self.info.kernel_name or "?")]
        else:
            parts = ["silent (%s)" % ("computes in C" if known["heartbeat"] else "stopped")]
        if known["listen"]:
            parts.append("listens at %s" % known["listen"])
        if known["refused"]:        # somebody has another key, or has no right to be there
            parts.append("refused %s message%s" % (known["refused"], "" if known["refused"] == 1 else "s"))
        if known["last_input"]:
            parts.append("last: %s" % known["last_input"])
        if self.path == current:
            parts.insert(0, "(this one)")
        return _one_line("%-16s pid %-8s since %s  " % (known["name"], known["pid"] or "?", since)) + _one_line(
            "  ".join(parts))


def look(seconds: float = SECONDS) -> list[Found]:
    """All kernels that are there, ours first, then Jupyter's, the newest first of each."""
    from .clientchannels import ask_all
    connection.remove_stale()
    there = list(_candidates())
    found = []
    for at in range(0, len(there), AT_ONCE):
        some = there[at:at + AT_ONCE]
        answers = ask_all([(kernel.info, "twoproc_status_request" if kernel.is_ours else "") for kernel in some],
                          seconds)
        found += [kernel._replace(is_beating=is_beating, status={} if reply is None else reply.content)
                  for kernel, (is_beating, reply) in zip(some, answers)]
    # What was ours and has ended while we asked is not silent.
    return [kernel for kernel in found if kernel.is_beating or kernel.status
            or kernel.is_ours and connection.is_claimed(kernel.path)]


def _candidates() -> Iterator[Found]:
    """By the files and claims: whom to ask."""
    seen = set()
    theirs = connection.jupyter_files()
    for path in [*connection.alive_kernels(), *theirs]:
        with contextlib.suppress(ConnectionFileError, OSError):     # not ours to read, or gone while we looked
            info = connection.read_connection_file(path)
            is_ours = "twoproc_pid" in info.extra
            if info.extra.get("twoproc_copy_of"):
                connection.remove_stale_copy(path, info)
            elif info.key not in seen and (connection.is_claimed(path) if is_ours else _is_anybody_there(info)):
                if info.key:
                    seen.add(info.key)
                yield Found(path, info, is_ours)


def _is_anybody_there(info: ConnectionInfo) -> bool:
    """A quick look at the heartbeat's address: in Jupyter's folder may lie hundreds of files of dead kernels."""
    try:
        if info.transport == "ipc":
            return not connection.is_dead_socket(info.url("hb")[len("ipc://"):])
        if connection.is_loopback(info.ip):
            socket.create_connection((info.ip.strip("[]"), info.hb_port), 0.1).close()
        return True
    except OSError:
        return False


def _short_folder(path: str) -> str:
    home = os.path.expanduser("~")
    return "~" + path[len(home):] if (path + os.sep).startswith(home + os.sep) else path


def _one_line(text: str) -> str:
    """Whoever named a folder, or typed an input, may have meant more than to be read."""
    return "".join(character if character.isprintable() else " " for character in text)
