# Distributed under the terms of the BSD 3-Clause License.
"""A kernel on another machine, through ssh: `python -m twoproc.frontend --ssh user@host`.

    here                                                there
    Client => five sockets in a private folder, ssh ==> sshd => the kernel's sockets
    Tunnel <- ssh's standard output                 <== python3 -m twoproc.kernel --print-connection --watch

One ssh process does it all.  Its session is a program of ours (start.print_connection), which writes the connection
file and then says when the kernel ends: a socket of ssh stays open when what it leads to is gone, and ssh may end
while the kernel lives.  The sockets are added to the connection that is there (`ssh -O forward`), so that nobody is
asked for a password twice.  Nothing of the connection file is written down here.

Keys, passwords, known hosts, proxies are ssh's own matter, and it asks at its own terminal.  An ssh that ends under us
is started again; that one may ask nothing, for the terminal is in use.
"""
from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

from . import connection
from .connection import CHANNELS, ConnectionFileError, ConnectionInfo

# Whatever the user's ssh_config says for sessions of his own: ours has no terminal, forwards five sockets and nothing
# else, and ends with us.  OpenSSH 7.6 (2017) knows them all.
OPTIONS = ("-T", "-a", "-x", "-oClearAllForwardings=yes", "-oControlPersist=no", "-oRemoteCommand=none",
           "-oExitOnForwardFailure=yes", "-oServerAliveInterval=15", "-oStreamLocalBindMask=0177")
AGAIN = ("-oBatchMode=yes", "-oConnectTimeout=15")
PAUSES = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)   # seconds before it is started again, the last one from then on
# What only the user can mend: who tries on may have himself locked out.
HOPELESS = re.compile("Permission denied|Host key verification failed|Too many authentication failures")
UNTRUSTED = 6
_DESTINATION = re.compile(r"(?:(\w[\w.+\\@-]*)@)?(\w[\w.-]*|\[[\w:.%]+\])(?::([0-9]{1,5}))?")
_SPECIAL = re.compile(r"[%$:\\]")           # what ssh reads as its own in the name of a socket


class SshError(ConnectionFileError):
    """ssh failed.  verdict: "gone", the far side says that there is no such kernel; "stuck", it would fail again until
    the user does something; "again"."""

    def __init__(self, text: str, exit_code: int = 2, verdict: str = "stuck"):
        super().__init__(text, exit_code)
        self.verdict = verdict


def parse_destination(text: str) -> tuple[list[str], str]:
    """(options, user@host) for ssh's command line, of [user@]host[:port].

    Nothing in it can be taken for an option, or be more than a name in a command of the user's ssh_config.
    """
    match = _DESTINATION.fullmatch(text)
    if match is None or not 0 < int(match[3] or 22) < 65536:
        raise SshError(f"--ssh {text[:60]!a}: expected user@host or user@host:port, with [ ] around an IPv6 address")
    return ["-p", match[3]] if match[3] else [], (f"{match[1]}@" if match[1] else "") + match[2].strip("[]")


class Tunnel:
    """An ssh process with five sockets, and a successor when it ends.  A Client connects to `info`.

    destination: [user@]host[:port].  python: the command that is Python there.  words: for print_connection there.
    Made on the main thread, which takes as long as the user is asked something.  Raises SshError.
    attend(client, say): from then on the client is told of the kernel's death, and the user, by say(line), of ssh's.

    `twoproc-ssh` reads what the far side says, and starts ssh again.  `twoproc-ssh-errors`, one for each ssh process,
    shows what that writes to its standard error while we log in, and keeps it for the cause of its end.
    """

    def __init__(self, destination: str, python: str, words: list[str]):
        if sys.platform == "win32":
            raise SshError("--ssh: not on Windows, whose ssh forwards no sockets; run it in WSL")
        self.destination, self._words = destination, words
        self._options, self._host = parse_destination(destination)
        self._python = shlex.split(python)
        self.info: ConnectionInfo | None = None     # set when the first login is over
        self.name = ""
        self._process: Any = None
        self._closing, self._attending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="twoproc-ssh", daemon=True)
        # Where connection.remove_stale() looks for sockets that nobody listens to, if we are killed.
        self._prefix = os.path.join(connection.kernels_folder(), f"ssh-{os.urandom(4).hex()}")
        # ssh makes its own socket under a name that is 17 bytes longer.
        if len(os.fsencode(self._prefix)) + 19 > connection.IPC_PATH_LIMIT or _SPECIAL.search(self._prefix):
            raise SshError(f"{self._prefix}: no name for a socket of ssh, too long or with one of % $ : \\ in it; "
                           f"set TWOPROC_RUNTIME to another folder", 5)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)       # the terminal has its own
        try:
            self._open()
        except BaseException as error:
            self.close()
            if isinstance(error, KeyboardInterrupt):
                raise SshError(f"ssh to {destination}: interrupted", 130) from None
            if isinstance(error, FileNotFoundError):
                raise SshError("--ssh: there is no program called ssh here; install OpenSSH's client") from None
            raise
        finally:
            signal.signal(signal.SIGINT, before)
        self._thread.start()

    def attend(self, client: Any, say: Callable[[str], None]) -> None:
        self._client, self._say = client, say
        # Not when ssh is: until the kernel has answered, nothing can be sent.
        client.watch(lambda state: say(f"ssh to {self.destination} is there again") if state == "back" else None)
        self._attending.set()

    def close(self) -> None:
        """End ssh and remove the sockets; the kernel lives on."""
        self._closing.set()
        self._attending.set()
        self._end_process()
        if self._thread.is_alive():
            self._thread.join(2.0)      # it may have been starting another
            self._end_process()
        self._remove_sockets()

    # -- run by whoever makes a Tunnel, later by twoproc-ssh only
    def _open(self) -> None:
        """Start ssh, read the connection file out of it, forward the sockets."""
        control, is_first = f"{self._prefix}-0", self.info is None
        self._remove_sockets()                      # an ssh that is killed leaves them
        far = shlex.join([*self._python, "-m", f"{__package__}.kernel", "--watch", *self._words])
        self._errors: deque[str] = deque(maxlen=20)
        with _keeping_signals():
            self._process = subprocess.Popen(
                ["ssh", *OPTIONS, *(() if is_first else AGAIN), "-M", "-S", control, *self._options, "--", self._host,
                 far], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=not is_first)     # at the terminal for its questions, off it when it may ask none
        self._reader = threading.Thread(target=self._read_errors, args=(self._process.stderr, self._errors),
                                        name="twoproc-ssh-errors", daemon=True)
        self._reader.start()
        if self._closing.is_set():
            self._end_process()
        line = b"-"
        while line and not line.startswith(b"{"):   # a login script may print something before
            line = self._process.stdout.readline(connection.FILE_LIMIT)
        if not line:
            said = self._end_process(patience=2.0)
            status = self._process.returncode       # ssh's own is 255; the user has heard what the first one wrote
            raise SshError(f"ssh to {self.destination}: " + (f"exit status {status}" if is_first else said),
                           UNTRUSTED if "Host key verification" in said else status if 2 <= status <= 6 else 2,
                           "gone" if 2 <= status <= 6 else "again" if (status < 0 or status == 255)
                           and not HOPELESS.search(said) else "stuck")
        there = connection.parse_connection_file(line, f"the connection file on {self._host}")
        if self.info is not None and there.key != self.info.key:
            raise SshError("another kernel has its name", verdict="gone")
        path = str(there.extra.get("twoproc_file"))
        self._words = [f"--print-connection={path}"]
        # Shown at a terminal, and part of a command line that is shown there.
        self.name = re.sub(r"[^\w.-]", "", connection.kernel_name_of(path))
        ports: dict[str, Any] = {f"{channel}_port": number for number, channel in enumerate(CHANNELS, 1)}
        here = there._replace(transport="ipc", ip=self._prefix, **ports,
                              extra=MappingProxyType({"twoproc_forwarded": True, "twoproc_address": self._host}))
        forwards = []
        for channel, path in zip(CHANNELS, here.ipc_paths()):
            target = there.url(channel).partition("://")[2]
            if there.transport == "ipc" and _SPECIAL.search(target):
                raise SshError(f"ssh to {self.destination}: it cannot forward a socket called {target!a}")
            forwards += ["-L", f"{path}:{target}"]
        # Without the user's configuration, which may forward other things as well.
        added = subprocess.run(["ssh", "-F", os.devnull, "-S", control, "-O", "forward", *forwards, "--", self._host],
                               stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True)
        from .client import NotReady, knock         # here: who is refused need not wait for ZeroMQ
        if added.returncode or isinstance(knock(here, "control"), NotReady):
            said = self._end_process(patience=0.5, is_about_sockets=True)
            said = _printable(added.stderr) or said
            raise SshError(f"ssh to {self.destination}: the kernel's sockets cannot be reached through it: {said}",
                           verdict="stuck" if self._was_ended else "again")
        self.info = self.info or here

    def _end_process(self, patience: float = 0.0, is_about_sockets: bool = False) -> str:
        """End it if it does not end by itself; the last that it wrote, or its exit status."""
        process = self._process
        if process is None:
            return ""
        self._was_ended = False
        for seconds, end in (patience, process.terminate), (1.0, process.kill), (1.0, process.poll):
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                self._was_ended = True
                end()
        with contextlib.suppress(OSError):
            process.stdin.close()
        self._reader.join(0.5)
        # A socket that leads nowhere is mostly that of a dead kernel.
        said = [line for line in self._errors if is_about_sockets or not line.startswith("channel ")]
        status = process.returncode or 0
        return said[-1] if said else signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def _remove_sockets(self) -> None:
        for path in glob.glob(f"{glob.escape(self._prefix)}-*"):
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _read_errors(self, stream: Any, lines: deque[str]) -> None:
        """Run by twoproc-ssh-errors: at once, for a question need not end its line."""
        rest = b""
        while part := stream.read1(4096):
            if self.info is None:
                with contextlib.suppress(OSError, AttributeError):
                    sys.stderr.buffer.write(part)
                    sys.stderr.buffer.flush()
            *whole, rest = (rest + part).split(b"\n")
            lines.extend(filter(None, map(_printable, whole)))

    # -- run by twoproc-ssh only
    def _run(self) -> None:
        self._attending.wait()
        while not self._closing.is_set():
            for line in iter(lambda: self._process.stdout.readline(4096), b""):
                if line.startswith(b"ended "):
                    self._client.tell_death(_printable(line[6:]))
            cause = self._end_process(patience=2.0)
            if not self._closing.is_set():
                self._say(f"ssh to {self.destination} ended: {cause}; the kernel lives on, trying again")
                self._open_again()

    def _open_again(self) -> None:
        for pause in itertools.chain(PAUSES, itertools.repeat(PAUSES[-1])):
            if self._closing.wait(pause):
                return
            try:
                return self._open()
            except (ConnectionFileError, OSError) as error:
                self._end_process()
                verdict = getattr(error, "verdict", "again" if isinstance(error, OSError) else "stuck")
                if verdict != "again":
                    self._closing.set()
                    self._client.tell_death(str(error) if verdict == "gone" else
                                            f"out of reach, but it lives on: {error}; leave, and join it again with "
                                            f"--ssh {self.destination} --existing {self.name}")


@contextlib.contextmanager
def _keeping_signals() -> Iterator[None]:
    """What is started in here does not end by Ctrl-C, which is for the cell; nor do its questions: we end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGQUIT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _printable(line: bytes) -> str:
    return "".join(filter(str.isprintable, line.decode(errors="replace"))).strip()
