# Distributed under the terms of the BSD 3-Clause License.
"""Where the sockets are: connection files, the folder they live in, and who holds one.

A connection file is a small JSON object, the same one that Jupyter writes: a transport, an address,
five ports and the key that signs the messages ("Connection files" in Jupyter's documentation).
Whoever can read it can run code as its owner, so this file is mostly about that sentence:

* our files live in a folder that is private to the user, and we use the folder only after looking;
* a file is created under a name nobody could foresee, closed to others from its first instant,
  and renamed into place, so a reader finds the whole file or none;
* what somebody placed in the way (a link, a fifo, a file of another user) is reported, never followed;
* a kernel holds an operating system lock beside its file for as long as it lives (`Claim`).
  The lock, not a process number, says whether a file is stale.

Called by kernel, client, launcher and frontend, from any thread. Nothing here opens a ZeroMQ socket.
Every failure is a ConnectionFileError: one line for the user, and the exit code to end with.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import reprlib
import socket
import stat
import sys
import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

if sys.platform == "win32":  # by design only: nobody has run this on Windows yet
    import msvcrt
else:
    import fcntl

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
TRANSPORTS = ("ipc", "tcp")

# sizeof(sockaddr_un.sun_path) less its closing NUL: 108 on Linux, 104 on macOS and the BSDs.
IPC_PATH_LIMIT = 107 if sys.platform.startswith("linux") else 103

# A connection file is below 1 kB. What is cut off here was not written by a kernel, and is no JSON any more.
FILE_LIMIT = 1 << 20

# Seconds for which remove_stale() leaves a reserved name, or a half-written file, alone.
FRESH = 60.0

# O_NONBLOCK: opening a fifo that somebody placed must not wait for its other end.
O_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)

# The shake family has no length of its own, so it makes no signatures.
SIGNATURE_SCHEMES = {f"hmac-{name}" for name in hashlib.algorithms_guaranteed if not name.startswith("shake")}

# The same digits as those of base64.b85encode, which are B85.
Z85 = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
B85 = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"


class ConnectionFileError(Exception):
    """What is wrong with a connection file, its folder or its address, in one line.

    exit_code: 2 malformed or not found, 3 the name is in use, 4 a port is taken, 5 unsafe to use.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(" ".join(message.splitlines()))
        self.exit_code = exit_code


def _unsafe(message: str) -> ConnectionFileError:
    return ConnectionFileError(message, 5)


class ConnectionInfo(NamedTuple):
    """The content of a connection file. Jupyter's names; `extra` keeps the members we do not know.

    For ipc, `ip` is the beginning of a path and a port is the number at its end.
    """

    transport: str
    ip: str
    shell_port: int
    iopub_port: int
    stdin_port: int
    control_port: int
    hb_port: int
    key: bytes
    signature_scheme: str = "hmac-sha256"
    kernel_name: str = ""
    curve_publickey: bytes | None = None  # Z85, 40 characters, as jupyter_client >= 8.9 writes them
    curve_secretkey: bytes | None = None
    extra: Mapping[str, Any] = MappingProxyType({})
    client_publickey: bytes | None = None  # the pair that a client shows, if it has one of its own; in no file
    client_secretkey: bytes | None = None

    def port(self, channel: str) -> int:
        return int(getattr(self, f"{channel}_port"))

    def url(self, channel: str) -> str:
        """The ZeroMQ endpoint of one channel."""
        if self.transport == "ipc":
            return f"ipc://{self.ip}-{self.port(channel)}"
        host = f"[{self.ip}]" if ":" in self.ip and not self.ip.startswith("[") else self.ip
        return f"{self.transport}://{host}:{self.port(channel)}"

    @property
    def is_remote(self) -> bool:
        """Whether there is a network in between: what is cut may come back, and says nothing of the kernel."""
        return bool(self.extra.get("twoproc_remote") or self.extra.get("twoproc_forwarded")
                    or self.transport == "tcp" and not is_loopback(self.ip))

    def ipc_paths(self) -> list[str]:
        """The five socket files, none for tcp."""
        return [f"{self.ip}-{self.port(c)}" for c in CHANNELS] if self.transport == "ipc" else []

    def __repr__(self) -> str:
        # Not the tuple's own: this ends up in tracebacks and logs, and two members are secrets.
        return f"<ConnectionInfo {self.transport} {self.ip} {self.kernel_name or '-'}>"


# -- CURVE keys as text: 40 characters of Z85 in connection files and for ZeroMQ, 64 hexadecimal digits in files that
# people edit, where no character means anything else. Both are 32 bytes. Source of Z85: ZeroMQ RFC 32.

def z85_of(hexkey: str) -> bytes:
    return base64.b85encode(bytes.fromhex(hexkey)).translate(bytes.maketrans(B85, Z85))


def hex_of(z85: bytes) -> str:
    """Raises ValueError for what is not the Z85 of 32 bytes."""
    with contextlib.suppress(ValueError):       # 5 digits that are more than 4 bytes
        if len(z85) == 40 and not z85.translate(None, Z85):
            return base64.b85decode(z85.translate(bytes.maketrans(Z85, B85))).hex()
    raise ValueError("not a key: expected 40 characters of Z85")


def fingerprint(hexkey: str) -> str:
    """As ssh-keygen shows keys; short enough to be compared by eye, and it is no use to who has it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(bytes.fromhex(hexkey)).digest()).decode().rstrip("=")


# -- private folders and files

def runtime_folder() -> str:
    """The private folder of everything that lives no longer than a kernel; made if missing.

    $TWOPROC_RUNTIME, else $XDG_RUNTIME_DIR/twoproc, else <tmp>/twoproc-<uid>. Exit code 5 if it is
    not ours alone: it is never repaired, for we cannot know who has been inside.
    """
    chosen = os.environ.get("TWOPROC_RUNTIME")
    if chosen:
        if not os.path.isabs(chosen):
            raise ConnectionFileError(f"TWOPROC_RUNTIME = {chosen}: give the whole path, several folders use it")
        return private_folder(chosen)
    if sys.platform == "win32":
        return private_folder(os.path.join(os.environ.get("LOCALAPPDATA") or os.path.expanduser("~"), "twoproc"))
    # `sudo` and `su` may leave us with another user's XDG_RUNTIME_DIR: whoever owns it owns what is
    # inside, so that one is passed over.
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(session) and os.path.isdir(session) and os.stat(session).st_uid == os.geteuid():
        return private_folder(os.path.join(session, "twoproc"))
    # Not tempfile.gettempdir(): where nothing else is writable it answers the current directory.
    temporary = os.environ.get("TMPDIR", "")
    return private_folder(os.path.join(temporary if os.path.isabs(temporary) else "/tmp", f"twoproc-{os.geteuid()}"))


def kernels_folder() -> str:
    """Where our connection files are: <runtime folder>/kernels."""
    return private_folder(os.path.join(runtime_folder(), "kernels"))


def make_folders(path: str, mode: int = 0o700) -> None:
    """Make a folder, and those above it that are missing, for nobody else to write in, whatever the umask.

    os.makedirs gives its mode to the last one only.  What is there already stays as it is.
    """
    above = os.path.dirname(path)
    if above != path and not os.path.isdir(above):
        make_folders(above, mode)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, mode)


def private_folder(path: str, variable: str = "TWOPROC_RUNTIME") -> str:
    """Make `path` a folder for us alone, or see that it is one; its absolute path.

    variable: of the environment; what the user is told to set when this folder cannot be used.
    """
    path = os.path.abspath(path)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
            os.chmod(path, 0o700)  # a umask such as 0777 may have taken our own bits as well
        _refuse_unsafe(path, os.lstat(path), is_folder=True)
        above = os.stat(os.path.dirname(path)).st_mode
    except OSError as error:
        raise _unsafe(f"folder {path}: {error.strerror}; set {variable} to a folder that you can write") from error
    if sys.platform != "win32" and above & stat.S_IWOTH and not above & stat.S_ISVTX:
        raise _unsafe(f"folder {path}: every user may rename it (no sticky bit above); set {variable} to another")
    return path


def leave_current_folder() -> None:
    """Import nothing more from the current folder, which `python -m` puts in front of everything; for main modules.

    What Python has taken from there already, it has: docs/security.md says how to start where that matters.
    """
    with contextlib.suppress(OSError):      # the folder has been removed
        if not getattr(sys.flags, "safe_path", False) and sys.path[:1] == [os.getcwd()]:
            sys.path.pop(0)


def leave_stdout() -> int:
    """Nobody reads what we print, and the interpreter shall not find out once more as it ends; the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13


def _refuse_unsafe(path: str, found: os.stat_result, is_folder: bool = False) -> None:
    """Exit code 5 unless what was found at `path` is of the right kind, and ours alone."""
    if stat.S_ISLNK(found.st_mode):
        fault = "is a symbolic link"
    elif not (stat.S_ISDIR if is_folder else stat.S_ISREG)(found.st_mode):
        fault = f"is not a {'folder' if is_folder else 'regular file'}"
    elif sys.platform == "win32":
        return  # below the user's profile, whose access list is private
    elif found.st_uid != os.geteuid():
        fault = f"belongs to another user (uid {found.st_uid}, we are {os.geteuid()})"
    elif found.st_mode & 0o077:
        fault = f"is open to other users (mode {stat.S_IMODE(found.st_mode):04o})"
    elif found.st_nlink > 1 and not is_folder:
        fault = "has another name as well (a hard link)"
    else:
        return
    raise _unsafe(f"{path}: {fault}; not used, because whoever gets at it can run code as you. "
                  f"Remove it, or choose a place of your own")


def open_private(path: str, flags: int) -> int:
    """A descriptor of a file that is ours alone; with O_CREAT of a new one, 0600 from its first instant.

    FileNotFoundError or FileExistsError, and exit code 5 for all else.
    """
    is_new = bool(flags & os.O_CREAT)
    try:
        fd = os.open(path, flags | O_SAFE | (os.O_EXCL if is_new else 0), 0o600)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        # ELOOP, and EMLINK on FreeBSD, are what O_NOFOLLOW answers to a link.
        is_link = error.errno in (errno.ELOOP, errno.EMLINK)
        raise _unsafe(f"{path}: {'is a symbolic link' if is_link else error.strerror}; not used") from error
    try:
        if is_new and sys.platform != "win32":
            with contextlib.suppress(OSError):
                os.fchmod(fd, 0o600)  # as in private_folder(); some file systems keep no permissions
        _refuse_unsafe(path, os.fstat(fd))
    except ConnectionFileError:
        os.close(fd)
        raise
    return fd


def open_or_make(path: str, flags: int) -> int:
    """The same for a file that may be there or not, and may come or go meanwhile."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return open_private(path, flags)
        with contextlib.suppress(FileExistsError):
            return open_private(path, flags | os.O_CREAT)


def write_private(path: str, text: str) -> None:
    """Make or replace a file that is ours alone: a reader finds all of it, or what was there before. OSError."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.urandom(8).hex()}.tmp")
    try:
        with os.fdopen(open_private(temporary, os.O_WRONLY | os.O_CREAT), "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


# -- making, writing, reading and finding connection files

# Names to say over the phone. A number makes them unique: otter-3.
ANIMALS = (
    "ant bat bear bee boar camel carp cat cobra crab crane crow deer dove duck eagle eel elk finch fox frog goat "
    "goose hare hawk hen heron ibis jay kite koala lark lion llama lynx mole moose moth mouse newt otter owl panda "
    "pike pony puma raven robin seal shark sheep snail stork swan tiger toad trout whale wolf wren yak zebra"
).split()


def new_connection(transport: str = "ipc", name: str | None = None,
                   path: str | None = None) -> tuple[str, ConnectionInfo]:
    """Choose a name, an address and a fresh key; (path of the file to be, its content).

    Nothing but a reservation of the name is written: the kernel takes the Claim, binds, and writes
    the file last, so that a connection file always leads somewhere. tcp ports are 0 until then.
    name: the name below `kernels_folder()`; by default an animal and a number not in use.
    path: instead of a name, the file that somebody asked for.
    """
    if transport not in TRANSPORTS:
        raise ConnectionFileError(f"transport {_shown(transport)}: expected one of {', '.join(TRANSPORTS)}")
    if path is not None:
        path = os.path.abspath(path)
        # The folder of such a file may be open to others; its sockets go to ours.
        prefix = os.path.join(kernels_folder(), os.urandom(4).hex()) if transport == "ipc" else ""
    else:
        if name is None:
            path = _reserve_new_name(kernels_folder())
        elif re.fullmatch(r"[^\W_][\w.-]*", name):
            path = os.path.join(kernels_folder(), f"{name}.json")
            reserve(path)
        else:
            raise ConnectionFileError(f"kernel name {_shown(name)}: use letters, digits, '-', '_' and '.'")
        prefix = path.removesuffix(".json")
    key = os.urandom(32).hex().encode()
    if transport == "tcp":
        return path, ConnectionInfo("tcp", "127.0.0.1", 0, 0, 0, 0, 0, key)
    info = ConnectionInfo("ipc", prefix, 1, 2, 3, 4, 5, key)
    if _ipc_excess(info) > 0:
        raise ConnectionFileError(f"{prefix}: {_ipc_excess(info)} bytes too long for the path of a socket; "
                                  f"set TWOPROC_RUNTIME to a folder with a shorter name, or use tcp")
    return path, info


def _reserve_new_name(folder: str) -> str:
    """The path of a name that nobody has: its lock file is made here, and who makes a file has it alone."""
    # 1..99 first, because short names are the purpose; wider when a machine is that busy.
    import secrets      # 3 ms that a kernel whose file was named by others does not pay

    for attempt in range(1000):
        name = f"{secrets.choice(ANIMALS)}-{1 + secrets.randbelow(99 if attempt < 100 else 9999)}"
        path = os.path.join(folder, f"{name}.json")
        if not os.path.lexists(path):
            with contextlib.suppress(FileExistsError):
                os.close(open_private(lock_path(path), os.O_RDWR | os.O_CREAT))
                return path
    raise ConnectionFileError(f"no free kernel name found in {folder}; remove what is left there", exit_code=3)


def members_of(info: ConnectionInfo) -> dict[str, Any]:
    """The JSON object in its connection file."""
    members: dict[str, Any] = dict(info.extra)
    for name, value in info._asdict().items():
        if name not in ("extra", "client_publickey", "client_secretkey") and value is not None:
            members[name] = value.decode() if isinstance(value, bytes) else value
    return members


def write_connection_file(path: str, info: ConnectionInfo) -> None:
    """Write atomically, 0600 under any umask. What is in the way and not ours alone: exit code 5."""
    path = os.path.abspath(path)
    try:
        with contextlib.suppress(FileNotFoundError):
            _refuse_unsafe(path, os.lstat(path))
        write_private(path, json.dumps(members_of(info), indent=2))
    except OSError as error:
        raise _unsafe(f"connection file {path}: {error.strerror}; not written") from error


def read_connection_file(path: str, *, as_kernel: bool = False) -> ConnectionInfo:
    """Read and check a connection file.

    as_kernel: a port may be 0, "the kernel chooses": tcp ports stay 0, ipc numbers are chosen here.
    Exit code 5 if another user could read or could have written the file, 2 if its content is wrong.
    """
    path = os.path.abspath(path)
    try:
        with os.fdopen(open_private(path, os.O_RDONLY), "rb") as file:
            text = file.read(FILE_LIMIT)
    except FileNotFoundError as error:
        raise ConnectionFileError(f"connection file {path}: no such file; has its kernel ended?") from error
    return parse_connection_file(text, path, as_kernel=as_kernel)


def parse_connection_file(text: bytes, path: str, *, as_kernel: bool = False) -> ConnectionInfo:
    """Check the content of a connection file; path: where it is, for the errors."""

    def check(is_good: object, fault: str) -> None:
        if not is_good:
            raise ConnectionFileError(f"connection file {path}: {fault}")

    try:
        members = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, an endless number
        raise ConnectionFileError(f"connection file {path}: is not JSON ({error}); "
                                  f"was it written by another program?") from error
    check(isinstance(members, dict), f"holds {_shown(members)}, expected a JSON object")

    def take(name: str, default: Any = None) -> Any:
        value = members.pop(name, None)
        if value is None:
            value = default
        check(value is not None, f"no {name!r}; was it written by another program? start the kernel again")
        return value

    def take_text(name: str, default: str | None = None) -> str:
        value = take(name, default)
        # The value of a key is the one thing that no message shows.
        fault = f"{name} is {'not text' if 'key' in name else _shown(value)}, expected a string"
        check(isinstance(value, str) and not re.search("[\ud800-\udfff]", value), fault)  # no half of a pair
        return value

    transport = take_text("transport", "tcp").lower()  # the oldest files have none, and mean tcp
    check(transport in TRANSPORTS, f"transport is {_shown(transport)}, expected one of {', '.join(TRANSPORTS)}")
    ip = take_text("ip")
    # tcp: what could not stand between // and : of an endpoint. ipc: what cannot be a path.
    is_address = ip.isprintable() and not any(c in ip for c in "/ ;@")
    check(ip and "\0" not in ip and (transport == "ipc" or is_address),
          f"ip is {_shown(ip)}, expected {'an address' if transport == 'tcp' else 'a path'}")
    ports: dict[str, Any] = {}
    for name in [f"{channel}_port" for channel in CHANNELS]:
        port, least = take(name), 0 if as_kernel else 1
        check(type(port) is int and least <= port <= 65535,
              f"{name} is {_shown(port)}, expected a number from {least} to 65535")
        check(port == 0 or port not in ports.values(), f"{name} is {port} as another is; each channel needs its own")
        ports[name] = port
    scheme = take_text("signature_scheme", "hmac-sha256")
    check(scheme in SIGNATURE_SCHEMES,
          f"signature_scheme is {_shown(scheme)}, expected hmac-sha256 or another hash of hashlib")
    key = take_text("key").encode()
    curve: dict[str, Any] = {}
    for name in ("curve_publickey", "curve_secretkey"):
        curve[name] = take_text(name, "").encode() or None
        try:
            hex_of(curve[name] or b"0" * 40)
        except ValueError as error:
            raise ConnectionFileError(f"connection file {path}: {name} is {error}") from error
    check(not as_kernel or (curve["curve_publickey"] is None) == (curve["curve_secretkey"] is None),
          "curve_publickey and curve_secretkey: only one is there, a kernel needs both")
    kernel_name = take_text("kernel_name", "")
    info = ConnectionInfo(transport, ip, **ports, key=key, signature_scheme=scheme, kernel_name=kernel_name, **curve,
                          extra=MappingProxyType(members))
    if transport == "ipc":
        # A number that is free for each 0, as Jupyter does.
        free = (n for n in range(1, 65536) if n not in ports.values() and not os.path.lexists(f"{ip}-{n}"))
        chosen: dict[str, Any] = {name: next(free) for name, port in ports.items() if port == 0}
        info = info._replace(**chosen)
        excess = _ipc_excess(info)
        check(excess <= 0, f"ip makes a socket path {excess} bytes too long (at most {IPC_PATH_LIMIT}): {_shown(ip)}")
    return info


def _ipc_excess(info: ConnectionInfo) -> int:
    return max(len(os.fsencode(path)) for path in info.ipc_paths()) - IPC_PATH_LIMIT


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_shown = _short.repr


def find_connection_file(name: str | None = None) -> str:
    """The path of the connection file that the user means.

    None: the newest kernel of ours that is alive. With a path separator in it: that path. Else a
    name, or the beginning of just one name, among our kernels and then among Jupyter's. A bare name
    is never looked for in the current directory: what lies there may be anybody's.
    """
    if name and (os.sep in name or (os.altsep and os.altsep in name)):
        path = os.path.abspath(os.path.expanduser(name))
        if not os.path.lexists(path):
            raise ConnectionFileError(f"connection file {path}: no such file; has its kernel ended?")
        return path
    alive = alive_kernels()
    if not name:
        if not alive:
            raise ConnectionFileError(f"no kernel is running in {kernels_folder()}; start one, or give a file")
        return alive[0]
    wanted = name.removesuffix(".json").removeprefix("kernel-")
    candidates = {kernel_name_of(path): path for path in _connection_files(jupyter_runtime_folder()) + alive}
    matches = [path for known, path in candidates.items() if known == wanted]
    matches = matches or [path for known, path in candidates.items() if known.startswith(wanted)]
    if len(matches) == 1:
        return matches[0]
    there = ", ".join(sorted(map(kernel_name_of, matches or candidates.values()))[:10]) or "none"
    what = "several begin so" if matches else "no such kernel is running"
    raise ConnectionFileError(f"kernel {_shown(name)}: {what}; there are: {there}")


def alive_kernels() -> list[str]:
    """The connection files of our kernels whose Claim is held, newest first."""
    return _newest_first(filter(is_claimed, _connection_files(kernels_folder())))


def _newest_first(paths: Iterable[str]) -> list[str]:
    found = []
    for path in paths:
        with contextlib.suppress(OSError):  # it ended while we looked
            found.append((os.lstat(path).st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def _connection_files(folder: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), "*.json")))


def kernel_name_of(path: str) -> str:
    """otter-3 for .../kernels/otter-3.json, and for the kernel-otter-3.json of Jupyter's folder."""
    return os.path.basename(path).removesuffix(".json").removeprefix("kernel-")


def jupyter_data_folder() -> str:
    """Where Jupyter keeps what is the user's; not made, and not checked, by us."""
    environ, home = os.environ, os.path.expanduser("~")
    if environ.get("JUPYTER_DATA_DIR"):
        return environ["JUPYTER_DATA_DIR"]
    if sys.platform == "darwin" and not environ.get("JUPYTER_PLATFORM_DIRS"):
        return os.path.join(home, "Library", "Jupyter")
    if sys.platform == "win32":
        return os.path.join(environ.get("APPDATA") or home, "jupyter")
    return os.path.join(environ.get("XDG_DATA_HOME") or os.path.join(home, ".local", "share"), "jupyter")


def jupyter_runtime_folder() -> str:
    """Where Jupyter keeps its connection files."""
    return os.environ.get("JUPYTER_RUNTIME_DIR") or os.path.join(jupyter_data_folder(), "runtime")


def publish_to_jupyter(path: str, info: ConnectionInfo) -> None:
    """Copy the file to where `jupyter console --existing` looks; it says of which file it is a copy, and where."""
    copy = _published_path(path)
    if copy == os.path.abspath(path):
        return
    info = info._replace(extra={**info.extra, "twoproc_copy_of": os.path.abspath(path),
                                "twoproc_host": socket.gethostname()})
    with contextlib.suppress(OSError):  # writing tells
        make_folders(os.path.dirname(copy))
    write_connection_file(copy, info)


def remove_stale_copy(path: str, info: ConnectionInfo) -> None:
    """Remove what publish_to_jupyter() wrote for a kernel that is dead; Jupyter's folder may be shared by machines."""
    original = info.extra.get("twoproc_copy_of")
    if info.extra.get("twoproc_host") == socket.gethostname() and not (
            isinstance(original, str) and is_claimed(original)):
        os.unlink(path)


def jupyter_files() -> list[str]:
    """The connection files in Jupyter's folder, the newest first; most may be of kernels long dead."""
    return _newest_first(_connection_files(jupyter_runtime_folder()))


def _published_path(path: str) -> str:
    return os.path.join(os.path.abspath(jupyter_runtime_folder()), f"kernel-{kernel_name_of(path)}.json")


# -- who holds a connection file

class Claim:
    """The right to one connection file, held by one living kernel; exit code 3 if another has it.

    An exclusive flock on <connection file>.lock. The operating system drops it however the process
    ends, so nobody has to guess from a process number, which may by now belong to another program.
    Rejected: fcntl's POSIX locks, which vanish as soon as anybody in the process opens and closes the
    file. A forked child must close() its copy at once, else it holds the name after the kernel's death.

    note: empty, or why the claim is weaker than it should be (a file system without locks).
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._fd, self.note = _lock(self.path)
        if self._fd >= 0:
            # The holder's number is for people, and for the message of who comes second. Nobody decides by it.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
                os.write(self._fd, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Unlink the lock file and let go. Connection file and sockets: `remove_files`, before this."""
        if self._fd >= 0 and is_same_file(self._fd, lock_path(self.path)):
            # While the lock is held, so that nobody can have taken it in between. Windows does not unlink an
            # open file: there it stays.
            with contextlib.suppress(OSError):
                os.unlink(lock_path(self.path))
        self.close()

    def close(self) -> None:
        """Let go of the descriptor, not of the lock, which a forked child shares with its parent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()


def reserve(path: str) -> None:
    """Keep `path` for a kernel that is about to start; exit code 3 if one has it.

    For FRESH seconds nobody tidies it away, so that a restarted kernel finds its old file. That is all:
    what decides is the kernel's own Claim.
    """
    fd, _ = _lock(os.path.abspath(path))
    if fd >= 0:
        os.ftruncate(fd, 0)
        os.utime(lock_path(path))
        os.close(fd)


def lock_path(path: str) -> str:
    return f"{path}.lock"


def log_path(path: str) -> str:
    """Where a launcher sends what a kernel writes outside of its cells."""
    return f"{path.removesuffix('.json')}.log"


def is_claimed(path: str) -> bool:
    """Whether a living process holds a Claim on `path`. True also where the file system cannot tell."""
    try:
        fd = open_private(lock_path(os.path.abspath(path)), os.O_RDONLY)
    except (OSError, ConnectionFileError):
        return False
    try:
        return not try_lock(fd, shared=True)  # shared, so that two who look do not see each other
    finally:
        os.close(fd)


def holder_pid(path: str) -> int | None:
    """The process that the lock file names; to be shown, not to be trusted."""
    with contextlib.suppress(OSError, ValueError, ConnectionFileError):
        with os.fdopen(open_private(lock_path(path), os.O_RDONLY), "rb") as file:
            return int(file.read(20))
    return None


def _lock(path: str) -> tuple[int, str]:
    """(descriptor, note of the Claim); the descriptor is -1 where there can be no lock file at all."""
    lock = lock_path(path)
    # Somebody may hold the lock for an instant only: is_claimed() looking, remove_stale() tidying up.
    patience = time.monotonic() + 0.3
    while True:
        try:
            fd = open_or_make(lock, os.O_RDWR)
        except (FileNotFoundError, ConnectionFileError) as error:
            folder = os.path.dirname(path)
            # A file that a manager mounted read-only: nobody can take its name, nobody can remove it.
            if os.path.exists(path) and not os.access(folder, os.W_OK):
                return -1, f"{folder} cannot be written: nothing says that {path} is in use"
            if not os.path.isdir(folder):
                raise ConnectionFileError(f"connection file {path}: {folder}: no such folder; make it, or choose "
                                          f"another place") from error
            raise _unsafe(f"the name cannot be claimed: {error}") from error
        is_locked = try_lock(fd)
        # The name may have been unlinked, or made anew, between our open and our lock: then we
        # hold the lock of a file that nobody else will ever find.
        if is_locked is not False and is_same_file(fd, lock):
            return fd, "" if is_locked else f"{lock}: this file system has no locks; mind second kernels"
        os.close(fd)
        if is_locked is False:
            if time.monotonic() > patience:
                pid = holder_pid(path)
                by = f"the kernel with pid {pid}" if pid else "a kernel that is starting or ending"
                raise ConnectionFileError(f"kernel {kernel_name_of(path)}: the name is in use by {by} ({path}); "
                                          f"join that one, or choose another name", exit_code=3)
            time.sleep(0.005)  # nothing tells when a lock is let go, and blocking in flock() has no limit


def try_lock(fd: int, shared: bool = False) -> bool | None:
    """Whether we have the lock now; None if the file system has no locks."""
    try:
        if sys.platform == "win32":
            # Locks are mandatory there, and the content must stay readable: lock a byte far behind it.
            os.lseek(fd, 1 << 30, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            os.lseek(fd, 0, os.SEEK_SET)
        else:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK) else None
    return True


def unlock(fd: int) -> None:
    """Let go of the lock also where a forked child has this descriptor; Windows has no such children."""
    with contextlib.suppress(OSError):
        if sys.platform != "win32":
            fcntl.flock(fd, fcntl.LOCK_UN)


def is_same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except OSError:
        return False


# -- tidying up

def remove_files(path: str, info: ConnectionInfo) -> None:
    """Remove a connection file, its sockets and its published copy; for who holds the Claim."""
    remove_sockets(info.ipc_paths())
    for candidate in (path, _published_path(path)):
        # Only if it still is the file of this kernel: a later one may have taken the path.
        with contextlib.suppress(OSError, ConnectionFileError):
            if read_connection_file(candidate, as_kernel=True).key == info.key:
                os.unlink(candidate)


def remove_sockets(paths: list[str]) -> None:
    """Unlink socket files of our own, which ZeroMQ leaves when it closes them."""
    for path in paths:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)


def remove_stale() -> None:
    """Remove what dead kernels left in our folder: what has a lock that nobody holds, and old odds and ends."""
    folder = kernels_folder()
    for path in [os.path.join(folder, entry) for entry in os.listdir(folder)]:
        with contextlib.suppress(ConnectionFileError, OSError):  # somebody else may be tidying up too
            found = os.lstat(path)
            is_fresh = abs(time.time() - found.st_mtime) < FRESH
            if path.endswith(".lock"):
                is_reserved = is_fresh and found.st_size == 0  # no kernel has it yet
                if not is_reserved and not is_claimed(path.removesuffix(".lock")):
                    _remove_dead(path.removesuffix(".lock"))
            elif not is_fresh:
                # The log of a kernel that ended properly, but after its launcher, has no lock beside it.
                is_lone_log = path.endswith(".log") and not os.path.lexists(lock_path(path[:-4] + ".json"))
                if is_lone_log or path.endswith(".tmp") or is_dead_socket(path):
                    os.unlink(path)


def _remove_dead(path: str) -> None:
    with Claim(path):
        with contextlib.suppress(ConnectionFileError):  # malformed or gone: its sockets are swept by and by
            remove_files(path, read_connection_file(path, as_kernel=True))
        for left in (path, log_path(path)):
            with contextlib.suppress(OSError):
                os.unlink(left)


def is_dead_socket(path: str) -> bool:
    """Whether it is a socket file with nobody behind it, as SIGKILL leaves them."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)  # a full backlog must not hold us up; it says that somebody is there
        return sock.connect_ex(path) == errno.ECONNREFUSED


# -- who could reach the sockets

def check_listening(info: ConnectionInfo) -> list[str]:
    """Refuse to listen where strangers could get in; returns the warnings to log, if any.

    Called by the kernel before it binds. There is no switch to turn this off.
    """
    is_local = info.transport == "ipc" or is_loopback(info.ip)
    if not is_local and (info.curve_publickey is None or info.curve_secretkey is None):
        raise _unsafe(f"ip {_shown(info.ip)} can be reached from other machines, and the connection has no CURVE keys: "
                      f"code and output would travel in clear. Use ip 127.0.0.1, or transport_encryption = required")
    if info.key:
        return []
    if not is_local:
        raise _unsafe("the key is empty: messages would not be signed, anybody who connects could run code; use a key")
    # Only a file that we were given can have none. Jupyter's managers may want it so, and are obeyed.
    return ["the connection file has an empty key: messages are not signed, whoever can connect can run code"]


def parse_listen(text: str, base: int, slots: int) -> tuple[str, tuple[int, ...]]:
    """(numeric address, what the first port may be) for HOST or HOST:PORT; an IPv6 address with a port in brackets.

    base, slots: where no port is given, `base` is tried, and then the next ten, `slots` times in all.
    """
    host, colon, port = text.rpartition(":")
    if not colon or host.count(":") > 0 and not host.endswith("]"):
        host, port = text, ""
    ports = tuple(base + 10 * slot for slot in range(slots))
    if port:
        if not re.fullmatch("[0-9]{1,5}", port):
            raise ConnectionFileError(f"listen = {_shown(text)}: port {_shown(port)} is not a number; "
                                      f"give HOST or HOST:PORT, such as 0.0.0.0:{base}")
        ports = (int(port),)
    if not all(1 <= first <= 65535 - len(CHANNELS) + 1 for first in ports):
        raise ConnectionFileError(f"listen = {_shown(text)}: five ports from {max(ports)} on are needed, up to 65535")
    host = "0.0.0.0" if host == "*" else host.strip("[]")
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0], ports  # type: ignore[return-value]
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConnectionFileError(f"listen = {_shown(text)}: {_shown(host)}: {why}; give an address of this "
                                  f"machine") from error


def address(host: str, port: int) -> str:
    """tcp://host:port, as ZeroMQ and people write it."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def is_loopback(ip: str) -> bool:
    """Whether an address is reached from this machine only. What we cannot tell is not.

    Names are not looked up: ZeroMQ would take one for a network interface first, and what a name
    means may change. `localhost` is the one that means this machine.
    """
    import ipaddress  # here, because a kernel on ipc need not wait for it

    if ip == "localhost":
        return True
    try:
        address = ipaddress.ip_address(ip.strip("[]").partition("%")[0])
    except ValueError:
        return False
    # ::ffff:127.0.0.1 counts by its IPv4 part on every version of Python.
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
