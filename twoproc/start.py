# Distributed under the terms of the BSD 3-Clause License.
"""The kernel that a frontend works with: being started, or found; and how others find it.

Start is made in main() before anything slow is imported, so that the kernel boots meanwhile; the thread that
it starts (`twoproc-start`) ends as soon as the kernel can be connected to, or cannot be started.  Called by
frontend.py and terminal.py.  Nothing here connects: no ZeroMQ is loaded.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from typing import Any
from collections.abc import Iterator

from . import __version__, config, connection, launcher


class Start:
    """The kernel: being started by a thread from the first moment on, or found.

    env: variables for a kernel that is started.  process: its launcher.KernelProcess, None for somebody
    else's kernel.  `wait` before connecting.
    """

    def __init__(self, arguments: argparse.Namespace, settings: config.Settings, keep: bool,
                 env: dict[str, str] | None = None):
        self.process: launcher.KernelProcess | None = None
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None
        if arguments.existing is not None:
            self.connection_file = connection.find_connection_file(arguments.existing or None)
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
        self.connection_file = self.process.connection_file
        self._thread = threading.Thread(target=self._run, name="twoproc-start", daemon=True)
        self._thread.start()

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
        return self.process or self.connection_file

    def end(self) -> None:
        """End the kernel that was started; a found one is not ours to end."""
        if self._thread is not None:
            self._thread.join()
        if self.process is not None:
            self.process.shutdown()


def banner(name: str) -> list[str]:
    return [f"twoproc {__version__}, Python {sys.version.split()[0]}; kernel {name}; :help lists the commands",
            f"a second terminal joins with: {join_command(name)}"]


def join_command(name: str) -> str:
    return f"{os.path.basename(sys.executable) or 'python'} -m {__package__}.frontend --existing {name}"


def kernel_lines(current: str = "") -> Iterator[str]:
    """One line for each kernel of this user that lives, the newest first."""
    for path in connection.alive_kernels():
        with contextlib.suppress(OSError):
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(os.stat(path).st_mtime))
            yield (f"{connection.kernel_name_of(path):16} pid {connection.holder_pid(path) or '?':<8} since {since}"
                   + ("  (this one)" if path == current else ""))
