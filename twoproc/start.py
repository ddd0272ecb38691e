# Distributed under the terms of the BSD 3-Clause License.
"""The kernel that a frontend works with: being started, or found.

Start is made in main() before anything slow is imported, so that the kernel boots meanwhile; the thread that
it starts (`twoproc-start`) ends as soon as the kernel can be connected to, or cannot be started.  Called by
frontend.py and terminal.py.  Nothing here connects: no ZeroMQ is loaded.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any
from collections.abc import Callable

from . import __version__, config, connection, launcher

if TYPE_CHECKING:
    from . import ssh
    from .client import Client

# What Client.watch tells of the connection, to a person.
LINK = {"lost": "the connection to kernel %s is lost; trying again",
        "back": "the connection to kernel %s is there again",
        "refused": "kernel %s does not let your key in any more; trying again, should that change"}


class Start:
    """The kernel: being started by a thread from the first moment on, or found; raises what keeps it from being found.

    env: variables for a kernel that is started.  process: its launcher.KernelProcess, None for somebody
    else's kernel.  connection_file: None for a kernel on another machine.  name: what it is called.  join: the command
    line that joins it.  `wait` before connecting, `attend` after it, `close` at the end, which ends no kernel.
    """

    def __init__(self, arguments: argparse.Namespace, settings: config.Settings, keep: bool,
                 env: dict[str, str] | None = None):
        self.process: launcher.KernelProcess | None = None
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._tunnel: ssh.Tunnel | None = None
        self._info: connection.ConnectionInfo | None = None
        self.connection_file: str | None = None
        if arguments.ssh is not None:
            from .ssh import Tunnel
            words = ["--print-connection=" + (arguments.existing or "")]
            if arguments.existing is None:
                words += ["--or-start", *(["--name=" + arguments.name] if arguments.name else [])]
            self._tunnel = Tunnel(arguments.ssh, settings["network.ssh_python"], words)
            self.name = self._tunnel.name
            self.join = f"{join_command(self.name)} --ssh {arguments.ssh}"
            return
        if arguments.connect is not None:
            from .remote import reach
            self._info = reach(arguments.connect, settings)
            self.name = self._info.extra["twoproc_name"]
            self.join = f"{frontend_command()} --connect {self.name}"
            return
        if arguments.existing is not None:
            self._use(connection.find_connection_file(arguments.existing or None))
            return
        options: dict[str, Any] = {"name": arguments.name, "keep": keep, "env": env}
        if arguments.kernel is None:
            options["transport"] = settings["kernel.transport"]
            words = [word for item in arguments.set for word in ("--set", item)]
            if keep:        # it outlives a terminal that is closed or cut off, but not for ever
                words += ["--orphan-timeout", str(settings["kernel.orphan_timeout"])]
                words += ["--set", "recovery.notice=no"]    # we tell of its death ourselves, at once
            options["arguments"] = (["--config", arguments.config] if arguments.config else []) + words
        self.process = launcher.KernelProcess(arguments.kernel, **options)
        self._use(self.process.connection_file)
        self._thread = threading.Thread(target=self._run, name="twoproc-start", daemon=True)
        self._thread.start()

    def _use(self, path: str) -> None:
        self.connection_file, self.name = path, connection.kernel_name_of(path)
        self.join = join_command(self.name)

    def _run(self) -> None:
        try:
            self.process.start()
        except Exception as error:      # told to whoever waits, in the thread that can say it
            self.error = error

    def wait(self) -> Any:
        """What a Client connects to; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error
        return self._tunnel.info if self._tunnel is not None else self._info or self.process or self.connection_file

    def attend(self, client: Client, say: Callable[[str], None]) -> None:
        """What is known of the kernel beside its connection, goes to this client; of the connection, to say(line)."""
        if self._tunnel is not None:
            self._tunnel.attend(client, say)
        else:
            client.watch(lambda state: say(LINK[state] % self.name) if state in LINK else None)

    def close(self) -> None:
        if self._tunnel is not None:
            self._tunnel.close()

    def end(self) -> None:
        """End the kernel that was started; a found one is not ours to end."""
        if self._thread is not None:
            self._thread.join()
        if self.process is not None:
            self.process.shutdown()


def banner(start: Start) -> list[str]:
    return [f"twoproc {__version__}, Python {sys.version.split()[0]}; kernel {start.name}; :help lists the commands",
            f"a second terminal joins with: {start.join}"]


def join_command(name: str) -> str:
    return f"{frontend_command()} --existing {name}"


def frontend_command() -> str:
    return f"{os.path.basename(sys.executable) or 'python'} -m {__package__}.frontend"


# -- the far side of ssh.py: `python -m twoproc.kernel --print-connection`

def print_connection(name: str, starts: bool, new_name: str | None, watches: bool, settings: config.Settings) -> int:
    """Write the connection file of a running kernel to a pipe, one line of JSON with its path in it.

    name: as for --existing, empty for the newest.  starts: one, if there is none to join, or if it is to have a name
    of its own; it lives on after us.  watches: stay until standard input ends, and write "ended CAUSE" when the kernel
    has ended, every two seconds until there is a successor.  Raises ConnectionFileError.
    """
    if sys.stdout.isatty():
        raise connection.ConnectionFileError("not shown: with a kernel's key anybody here can run code as you; "
                                             "--print-connection writes it to a pipe (to see it, to cat)")
    path = "" if starts and new_name else _alive_file(name, starts)
    if not path:
        _warn_of_logout()
        words = ["--orphan-timeout", str(settings["kernel.orphan_timeout"])]
        try:
            path = launcher.launch(name=new_name, keep=True, transport=settings["kernel.transport"],
                                   arguments=words).connection_file
        except launcher.LaunchError as error:
            raise connection.ConnectionFileError(str(error), error.exit_code) from error
    info = connection.read_connection_file(path)
    print(json.dumps({**connection.members_of(info), "twoproc_file": path}), flush=True)
    if watches:
        if "twoproc_pid" in info.extra:    # else it is somebody else's, and holds no claim that could be watched
            threading.Thread(target=_tell_ends, args=(path,), name="twoproc-watch", daemon=True).start()
        sys.stdin.buffer.read()         # ssh ends, and whoever started it
    return 0


def _alive_file(name: str, may_be_missing: bool) -> str:
    """The connection file of a kernel that can be joined; empty if there is none and that is no error."""
    if not name and may_be_missing and not connection.alive_kernels():
        return ""
    path = connection.find_connection_file(name or None)
    info = connection.read_connection_file(path)
    if "twoproc_pid" in info.extra and not connection.is_claimed(path):
        raise connection.ConnectionFileError(f"connection file {path}: its kernel has ended")
    return path


def _warn_of_logout() -> None:
    """systemd empties /run/user/UID when the last session of a user ends, if not told otherwise."""
    folder = connection.runtime_folder()
    user = os.environ.get("USER", "")
    if folder.startswith("/run/user/") and os.path.isdir("/run/systemd/system") and not os.path.exists(
            os.path.join("/var/lib/systemd/linger", user)):
        print(f"this kernel cannot be joined again after your last logout, when {folder} is removed; to keep it: "
              f"loginctl enable-linger {user}", file=sys.stderr)


def _tell_ends(path: str) -> None:
    """Run by twoproc-watch: whoever gets the lock that the kernel holds for life knows that it has ended."""
    import fcntl
    with contextlib.suppress(OSError):      # nobody listens any more, or this file system has no locks
        while True:
            with contextlib.suppress(FileNotFoundError):
                fd = connection.open_private(connection.lock_path(path), os.O_RDONLY)
                fcntl.flock(fd, fcntl.LOCK_SH)
                os.close(fd)
            # Nothing tells that it was started again, and it may have come and gone between two looks: told anew.
            turn = 0
            while turn == 0 or not connection.is_claimed(path):
                if turn % 10 == 0:
                    print("ended " + _cause_of_end(path), flush=True)
                turn += 1
                time.sleep(0.2)


def _cause_of_end(path: str) -> str:
    from . import death
    dead = death.obituary(path, None)
    if dead is not None:
        return dead.death.text
    return "its process is gone" if os.path.lexists(path) else "shut down"
