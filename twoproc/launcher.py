# Distributed under the terms of the BSD 3-Clause License.
"""The kernel as a child process: start it, interrupt it, restart it, end it, and say what ended it.

    with launch() as process:                   # a kernel of this package
    with launch("bash") as process:             # a Jupyter kernel, by the name of its kernelspec

A kernel gets a session of its own, so that Ctrl-C in our terminal is ours alone and a closed terminal does
not end it; nothing to read; and a log file beside its connection file for whatever it writes before, beside
or after its streams, because the terminal belongs to the frontend.

Ours choose their address themselves, bind, and write the connection file last: we wait for that file, or for
the child's death.  Other kernels are given a connection file with ports that were free a moment ago.

One thread, `twoproc-launcher`, waits for each child, so there are no zombies and death is known at once.
Everything else runs in the caller's thread, and every wait is bounded.  What has to be said by message
(shutdown, interrupt) goes through a client made for that one request.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import connection
from .connection import ConnectionInfo

POLITE_SECONDS = 3.0        # from a shutdown_request to SIGTERM: a kernel's atexit functions run in it
TERM_SECONDS = 2.0          # from SIGTERM to SIGKILL
KILL_SECONDS = 2.0          # from SIGKILL until we give up: only a process stuck in the system lives so long
LOG_TAIL = 4096             # bytes of the log that may hold the last words


class LaunchError(Exception):
    """A kernel did not start; str() says why, with the end of its log.  exit_code: the child's, or 70."""

    def __init__(self, text: str, exit_code: int = 70):
        super().__init__(text)
        self.exit_code = exit_code


def launch(kernel_name: str | None = None, *, timeout: float = 30.0, **options: Any) -> KernelProcess:
    """Start a kernel; returns when its connection file is there.

    kernel_name: a kernelspec's name; None: a kernel of this package.  options: those of KernelProcess.
    Raises LaunchError, or ConnectionFileError if there is no safe place for its files.
    """
    process = KernelProcess(kernel_name, **options)
    process.start(timeout)
    return process


class KernelProcess:
    """A kernel that we started.

    kernel_name: see `launch`.  argv: instead of a kernelspec, a command in which {connection_file} stands.
    name: what the kernel is called, by default an animal and a number, or after its kernelspec.
    connection_file: where its file shall be, instead of a name.
    transport: by default ipc for our kernels, tcp for others, many of which know nothing else.
    arguments: more words for the command line.  env: variables to add.  cwd: its folder.
    keep: the kernel shall outlive us; otherwise it ends with us, however we end.
    """

    def __init__(self, kernel_name: str | None = None, *, argv: Sequence[str] | None = None, name: str | None = None,
                 connection_file: str | None = None, transport: str | None = None, arguments: Sequence[str] = (),
                 env: dict[str, str] | None = None, cwd: str | None = None, keep: bool = False):
        self.keep = keep
        self.is_ours = kernel_name is None and argv is None
        if self.is_ours:
            self.spec = _own_spec()
        elif argv is None:
            self.spec = find_kernelspec(kernel_name)
        else:
            self.spec = KernelSpec(kernel_name or "", tuple(argv))
        self.interrupt_mode = self.spec.interrupt_mode
        if connection_file is None and not self.is_ours:
            # Not among our kernels' files: what has no claim is taken for the remains of a dead kernel there.
            folder = connection.jupyter_runtime_folder()
            connection.make_folders(folder)
            name = name or "%s-%s" % (self.spec.name or "kernel", os.urandom(3).hex())
            connection_file = os.path.join(folder, "kernel-%s.json" % name)
        self.connection_file, self._info = connection.new_connection(
            transport or ("ipc" if self.is_ours else "tcp"), name, connection_file)
        self.log_file = connection.log_path(self.connection_file)
        self.process: subprocess.Popen | None = None
        self.is_restarting = False
        self._arguments = tuple(arguments)
        if self.is_ours and transport is not None:
            self._arguments = ("--transport", transport, *self._arguments)
        self._env, self._cwd = env or {}, cwd
        self._ended = threading.Event()     # set when the child was waited for, after the callbacks ran
        self._ended.set()
        self._lock = threading.Lock()       # for the callbacks and _cause together; nothing waits inside it
        self._callbacks: list[Callable[[str], None]] = []
        self._cause: str | None = None
        self._signal_sent = 0               # the latest signal of ours that may have ended it
        self._is_expected = False           # we asked it to end

    # -- starting
    def start(self, timeout: float = 30.0) -> None:
        """Start the process, and wait for the connection file if the kernel writes it itself."""
        if self.is_alive:
            raise LaunchError("the kernel is running already (pid %d)" % self.pid)
        has_file = os.path.lexists(self.connection_file)
        if not self.is_ours and not has_file:
            self._info = _choose_ports(self._info)._replace(kernel_name=self.spec.name)
            connection.write_connection_file(self.connection_file, self._info)
        self._spawn()
        if self.is_ours:
            self._wait_file(timeout, has_file)

    def _spawn(self) -> None:
        values = {"connection_file": self.connection_file, "prefix": sys.prefix,
                  "resource_dir": self.spec.resource_dir}
        # One pass and known names only: a path may hold braces, and an argument may mean its own.
        argv = [re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), word)
                for word in (*self.spec.argv, *self._arguments)]
        if re.fullmatch(r"python(3(\.\d+)?)?", argv[0]):
            argv[0] = sys.executable    # what a kernelspec in our own environment means by it
        # Append: what several processes write does not overwrite each other.
        log = connection.open_or_make(self.log_file, os.O_WRONLY | os.O_APPEND)
        os.ftruncate(log, 0)            # of the kernel before a restart
        # A thread of ours may block SIGINT; the child would inherit that, and could never be interrupted.
        mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT}) if os.name == "posix" else None
        try:
            self.process = subprocess.Popen(argv, env=self._environment(), cwd=self._cwd, stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log, start_new_session=True)
        except (OSError, ValueError) as error:      # the latter: a kernelspec with a NUL in it
            self.remove_files()
            raise LaunchError("cannot start %s: %s" % (argv[0], getattr(error, "strerror", error))) from None
        finally:
            os.close(log)
            if mask is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._ended.clear()
        self._cause, self._signal_sent, self._is_expected = None, 0, False
        threading.Thread(target=self._reap, args=(self.process,), name="twoproc-launcher", daemon=True).start()

    def _environment(self) -> dict[str, str]:
        env = dict(os.environ)
        env.pop("JPY_PARENT_PID", None)
        if not self.keep:
            env["JPY_PARENT_PID"] = str(os.getpid())
        for name, value in self.spec.env.items():
            env[name] = string.Template(str(value)).safe_substitute(os.environ)
        env.update(self._env)
        return env

    def _wait_file(self, timeout: float, was_there: bool) -> None:
        """Until the kernel has written its connection file, which it does when it can be connected to."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                with contextlib.suppress(connection.ConnectionFileError):
                    info = connection.read_connection_file(self.connection_file)
                    if not was_there or info.extra.get("twoproc_pid") in (None, self.pid):
                        self._info = info
                        return
                # Waiting for a file is looking again; its death, which is the other end, wakes us at once.
                if self._ended.wait(0.002):
                    raise LaunchError("the kernel did not start: %s%s" % (self.cause(), self._last_words_text()),
                                      self.returncode or 70)
                if time.monotonic() > deadline:
                    raise LaunchError("the kernel wrote no connection file within %g s%s" % (
                        timeout, self._last_words_text()))
        except BaseException:       # Ctrl-C too: nobody would know of a kernel that is to outlive us
            self.kill()
            self.remove_files()
            raise

    # -- looking
    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    @property
    def is_alive(self) -> bool:
        return not self._ended.is_set()

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal's number if one ended it, None while it runs."""
        return self.process.returncode if self.process is not None and not self.is_alive else None

    def cause(self) -> str:
        """What ended the kernel, by name; empty while it runs."""
        return (self._cause or "") if not self.is_alive else ""

    def last_words(self, lines: int = 5) -> list[str]:
        """The end of the log: what the kernel wrote outside of its streams."""
        try:
            with open(self.log_file, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL))
                return file.read().decode("utf-8", "replace").rstrip().splitlines()[-lines:]
        except OSError:
            return []

    def _last_words_text(self) -> str:
        return "".join("\n  " + line for line in self.last_words())

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end; returns the exit status, None if it still runs after `timeout` seconds."""
        self._ended.wait(timeout)
        return self.returncode

    def on_death(self, callback: Callable[[str], None], remove: bool = False) -> None:
        """Have callback(cause) called whenever the kernel ends, at once if it has; remove: no longer.

        Called on twoproc-launcher, or here if it is dead: must not wait.
        """
        with self._lock:
            self._callbacks = [other for other in self._callbacks if other != callback]
            if remove:
                return
            self._callbacks.append(callback)
            cause = self._cause
        if cause is not None:
            callback(cause)

    # -- run by twoproc-launcher only
    def _reap(self, process: subprocess.Popen) -> None:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})   # Ctrl-C is for the main thread
        process.wait()
        if not (self._is_expected and process.returncode == 0):
            from . import crashlog      # here: who starts a kernel does not wait for it
            crashlog.note_exit(self.connection_file, process.pid, process.returncode)
        with self._lock:
            self._cause = self._name_cause(process.returncode)
            callbacks = list(self._callbacks)
        for callback in callbacks:
            try:
                callback(self._cause)
            except Exception:       # the user's code; the others shall hear of the death too
                sys.excepthook(*sys.exc_info())
        self._ended.set()

    def _name_cause(self, returncode: int) -> str:
        if self._is_expected and returncode == 0:
            return "restarted" if self.is_restarting else "shut down"
        # 128 + n is how shells, and our kernel after it has tidied up, say that signal n ended them.
        number = -returncode if returncode < 0 else returncode - 128
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "signal %d" % number if returncode < 0 else ""
        if name and number == self._signal_sent:
            return "%s from its launcher" % name
        if returncode >= 0:
            return "exit status %d%s" % (returncode, name and " (%s)" % name)
        return "SIGKILL from outside (kill -9 or out of memory)" if name == "SIGKILL" else name

    # -- ending
    def interrupt(self, timeout: float = 5.0) -> None:
        """Stop what the kernel runs: by message, or by SIGINT to its group where the kernelspec says so."""
        if self.interrupt_mode == "signal":
            self._signal(signal.SIGINT)
        else:
            self._tell("interrupt_request", {}, timeout)

    def shutdown(self, timeout: float = POLITE_SECONDS) -> str:
        """End the kernel and its process group, and remove its files; returns the cause of its end.

        It is asked first, and after `timeout` seconds told: by SIGTERM, then by SIGKILL.
        Children that the user's code put into sessions of their own are spared.
        """
        if self.process is not None:
            self._end(timeout, restart=False)
        self.remove_files()
        return self.cause()

    def restart(self, timeout: float = 30.0, polite: float = POLITE_SECONDS) -> None:
        """End the kernel, if it lives, and start it again: same connection file, same key, same ports."""
        info = self._info
        self.is_restarting = True
        try:
            if self.process is not None:
                self._end(polite, restart=True)
            if self.is_ours:
                connection.reserve(self.connection_file)    # else somebody may tidy up before it is claimed again
            if not os.path.lexists(self.connection_file):   # a kernel that ends properly removes it
                connection.write_connection_file(self.connection_file, info)
            self.start(timeout)
        finally:
            self.is_restarting = False

    def kill(self) -> None:
        """End the kernel and its group at once."""
        self._signal(signal.SIGKILL)
        self._ended.wait(KILL_SECONDS)

    def _end(self, polite: float, restart: bool) -> None:
        self._is_expected = True
        deadline = time.monotonic() + polite
        if self.is_alive:
            if not self.is_ours:
                # Theirs run a cell to its end before they look at a shutdown_request.
                self.interrupt(min(1.0, polite))
            self._tell("shutdown_request", {"restart": restart}, polite)
            self._ended.wait(max(0.0, deadline - time.monotonic()))
        for number, seconds in ((signal.SIGTERM, TERM_SECONDS), (_SIGKILL, KILL_SECONDS)):
            if self.is_alive:
                self._signal(number)
                self._ended.wait(seconds)
        if self.is_alive:
            raise LaunchError("process %d does not end, not even by SIGKILL: it is stuck in the system" % self.pid)
        self._end_group()

    def _end_group(self) -> None:
        """What the user's code left running in the kernel's group ends with it."""
        if os.name != "posix":
            return
        deadline = time.monotonic() + 0.5
        try:
            # The kernel was waited for. While any of its group lives its number is given to nobody: a process that
            # has it now is somebody else's, with a group of its own.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, 0)
                return
            os.killpg(self.pid, signal.SIGTERM)
            while time.monotonic() < deadline:
                time.sleep(0.01)        # not our children: nothing to wait for, only to look at
                os.killpg(self.pid, 0)
            os.killpg(self.pid, _SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass        # nobody is left, or (macOS) only zombies that init has yet to fetch

    def _signal(self, number: int) -> None:
        """To the whole group: a kernelspec may start a shell that starts the kernel, and a cell its children."""
        if self.process is None or not self.is_alive:
            return
        if number != signal.SIGINT:
            self._signal_sent = number
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self.pid, number)
            else:
                self.process.send_signal(number)

    def _tell(self, msg_type: str, content: dict, timeout: float) -> None:
        """Send one request on control and wait for its reply; a kernel that gives none is a case for signals."""
        from .client import Client, KernelDied      # here: a launcher alone needs no ZeroMQ
        try:
            with Client(self._info, process=self, heartbeat=0) as client:
                client.submit(msg_type, content, channel="control").wait(timeout)
        except (TimeoutError, KernelDied):
            pass

    def remove_files(self) -> None:
        """After an end nothing is left but the log of the session."""
        if self.is_alive:
            return
        try:
            claim = connection.Claim(self.connection_file)
        except connection.ConnectionFileError:
            return      # another kernel has the name by now, and the files are its own
        connection.remove_files(self.connection_file, self._info)
        with contextlib.suppress(OSError):
            os.unlink(self.log_file)
        claim.release()

    def __enter__(self) -> KernelProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self.keep:
            self.shutdown()


_SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)       # Windows: terminate is all there is


def _choose_ports(info: ConnectionInfo) -> ConnectionInfo:
    """Ports that are free now, for a kernel that cannot choose them itself; nothing holds them until it binds."""
    if info.transport != "tcp":
        return info
    with contextlib.ExitStack() as stack:
        ports = {}
        for channel in connection.CHANNELS:
            sock = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in info.ip else socket.AF_INET))
            sock.bind((info.ip, 0))
            ports[channel + "_port"] = sock.getsockname()[1]
    return info._replace(**ports)


def _own_argv() -> tuple[str, ...]:
    """Our kernel in a new process, whatever lies in the folder that it starts in.

    Python puts the current folder in front of everything else for -m and -c: a twoproc.py or a json.py there would be
    run as us before the first cell.  So it goes before anything is imported; IPython puts it back for the cells,
    behind the standard library.  Not by -P, which Python 3.10 has not, and which the user's code would see.
    The place of this package comes last, for a source folder or a vendored copy that the new process would not find:
    not by PYTHONPATH, which the user's own children would inherit, and which would put whatever lies there in front.
    """
    root = os.path.abspath(__file__)
    for _ in __name__.split("."):
        root = os.path.dirname(root)
    code = "import sys; sys.path[:1] == [''] and sys.path.pop(0); %r in sys.path or sys.path.append(%r); " \
           "from %s.kernel import main; sys.exit(main())" % (root, root, __package__)
    return (sys.executable, "-c", code, "-f", "{connection_file}")


# -- kernelspecs: what Jupyter knows about a kernel -------------------------------------------------

class KernelSpec(NamedTuple):
    name: str
    argv: tuple[str, ...]
    display_name: str = ""
    language: str = ""
    resource_dir: str = ""
    interrupt_mode: str = "signal"      # the default of the specification: "signal" or "message"
    env: dict = {}
    metadata: dict = {}


def list_kernelspecs() -> dict[str, KernelSpec]:
    """All kernelspecs that Jupyter would find, by name; what cannot be read is left out."""
    found: dict[str, KernelSpec] = {}
    for folder in kernelspec_folders():
        with contextlib.suppress(OSError):
            for entry in sorted(os.listdir(folder)):
                name = entry.lower()
                if name not in found and re.fullmatch(r"[a-z0-9._-]+", name):
                    with contextlib.suppress(OSError, ValueError):
                        found[name] = _read_kernelspec(name, os.path.join(folder, entry))
    return found


def find_kernelspec(name: str | None) -> KernelSpec:
    """Raises LaunchError (exit code 2) naming the kernels there are."""
    specs = list_kernelspecs()
    spec = specs.get((name or "").lower())
    if spec is None:
        raise LaunchError("no kernel named %r; there are: %s" % (name, ", ".join(sorted(specs)) or "none"), 2)
    return spec


def kernelspec_folders() -> list[str]:
    """Where kernelspecs are, the first that has a name decides ("Kernel specs" in jupyter_client's documentation)."""
    user = [connection.jupyter_data_folder()]
    environment = [os.path.join(sys.prefix, "share", "jupyter")]
    # In a virtual environment Jupyter looks there first, outside of one into the user's folder first.
    prefer = os.environ.get("JUPYTER_PREFER_ENV_PATH", "")
    is_env_first = prefer.lower() not in ("", "no", "n", "false", "off", "0", "0.0") if prefer else (
        sys.prefix != sys.base_prefix)
    bases = [path for path in os.environ.get("JUPYTER_PATH", "").split(os.pathsep) if path]
    bases += environment + user if is_env_first else user + environment
    if sys.platform == "win32":
        bases.append(os.path.join(os.environ.get("PROGRAMDATA", r"C:\ProgramData"), "jupyter"))
    else:
        bases += ["/usr/local/share/jupyter", "/usr/share/jupyter"]
    return list(dict.fromkeys(os.path.join(base, "kernels") for base in bases))


def _read_kernelspec(name: str, folder: str) -> KernelSpec:
    with open(os.path.join(folder, "kernel.json"), encoding="utf-8") as file:
        members = json.load(file)
    argv = members.get("argv") if isinstance(members, dict) else None
    if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
        raise ValueError("no argv")

    def take(member: str, kind: type, default: Any) -> Any:
        value = members.get(member)
        return value if isinstance(value, kind) else default

    mode = take("interrupt_mode", str, "signal")
    return KernelSpec(name, tuple(argv), take("display_name", str, name), take("language", str, ""), folder,
                      mode if mode == "message" else "signal", take("env", dict, {}), take("metadata", dict, {}))


def _own_spec() -> KernelSpec:
    return KernelSpec("twoproc", _own_argv(), "Python 3 (twoproc)", "python", "", "message", {},
                      {"supported_encryption": ["curve"], "debugger": False})


def install_kernelspec(name: str | None = None, *, user: bool = False, prefix: str | None = None,
                       display_name: str | None = None) -> str:
    """Write a kernel.json for this interpreter and this package; returns its folder.

    user: into the user's Jupyter folder; prefix: into that installation; neither: into our own sys.prefix.
    Raises ValueError for a name that Jupyter would not find, OSError if the folder cannot be written.
    """
    name = name or "twoproc"
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise ValueError("kernelspec name %r: use letters, digits, '.', '_' and '-'" % name)
    if user and prefix:
        raise ValueError("a kernelspec goes to the user's folder or to a prefix, not to both")
    base = connection.jupyter_data_folder() if user else os.path.join(prefix or sys.prefix, "share", "jupyter")
    folder = os.path.join(os.path.abspath(base), "kernels", name.lower())
    spec = _own_spec()
    members = {"argv": list(spec.argv), "display_name": display_name or spec.display_name, "language": spec.language,
               "interrupt_mode": spec.interrupt_mode, "metadata": spec.metadata, "kernel_protocol_version": "5.5",
               "env": {}}
    connection.make_folders(folder, 0o755)
    path = os.path.join(folder, "kernel.json")
    temporary = "%s.%d.tmp" % (path, os.getpid())       # a Jupyter server may be reading the old one
    # For others to read, below a prefix; never to write: who can, runs code as whoever starts this kernel.
    with open(temporary, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o644)) as file:
        json.dump(members, file, indent=1)
        file.write("\n")
    os.replace(temporary, path)
    return folder
