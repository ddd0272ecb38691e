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

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
import stat
import sys
import time
from collections.abc import Callable, Mapping
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

# A connection file is below 1 kB. Whatever is larger was not written by a kernel.
FILE_LIMIT = 1 << 20

# Seconds for which remove_stale() leaves a reserved name, or a half-written file, alone.
FRESH = 60.0

MALFORMED, NAME_IN_USE, PORT_IN_USE, UNSAFE = 2, 3, 4, 5

Z85 = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#")


class ConnectionFileError(Exception):
    """What is wrong with a connection file, its folder or its address, in one line.

    exit_code: 2 malformed or not found, 3 the name is in use, 4 a port is taken, 5 unsafe to use.
    """

    def __init__(self, message: str, exit_code: int = MALFORMED) -> None:
        super().__init__(" ".join(message.splitlines()))
        self.exit_code = exit_code


def _unsafe(message: str) -> ConnectionFileError:
    return ConnectionFileError(message, UNSAFE)


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

    def port(self, channel: str) -> int:
        return int(getattr(self, f"{channel}_port"))

    def url(self, channel: str) -> str:
        """The ZeroMQ endpoint of one channel."""
        if self.transport == "ipc":
            return f"ipc://{self.ip}-{self.port(channel)}"
        host = f"[{self.ip}]" if ":" in self.ip and not self.ip.startswith("[") else self.ip
        return f"{self.transport}://{host}:{self.port(channel)}"

    def ipc_paths(self) -> list[str]:
        """The five socket files, none for tcp."""
        return [f"{self.ip}-{self.port(c)}" for c in CHANNELS] if self.transport == "ipc" else []

    def __repr__(self) -> str:
        # Not the tuple's own: this ends up in tracebacks and logs, and two members are secrets.
        return f"<ConnectionInfo {self.transport} {self.ip} {self.kernel_name or '-'}>"


# -- the folder

def runtime_folder() -> str:
    """The private folder of everything that lives no longer than a kernel; made if missing.

    $TWOPROC_RUNTIME, else $XDG_RUNTIME_DIR/twoproc, else <tmp>/twoproc-<uid>. Exit code 5 if it is
    not ours alone: it is never repaired, for we cannot know who has been inside.
    """
    chosen = os.environ.get("TWOPROC_RUNTIME")
    if chosen and not os.path.isabs(chosen):
        raise ConnectionFileError(f"TWOPROC_RUNTIME = {chosen}: give the whole path, it is used from several folders")
    return private_folder(chosen or _usual_runtime_folder())


def kernels_folder() -> str:
    """Where our connection files are: <runtime folder>/kernels."""
    return private_folder(os.path.join(runtime_folder(), "kernels"))


def _usual_runtime_folder() -> str:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or os.path.expanduser(r"~\AppData\Local")
        return os.path.join(local, "twoproc", "runtime")
    # `sudo` and `su` may leave us with another user's XDG_RUNTIME_DIR: whoever owns it owns what is
    # inside, so that one is passed over.
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    with contextlib.suppress(OSError):
        if os.path.isabs(base) and os.stat(base).st_uid == os.geteuid():
            return os.path.join(base, "twoproc")
    # Not tempfile.gettempdir(): where nothing else is writable it answers the current directory.
    temporary = os.environ.get("TMPDIR", "")
    if not os.path.isabs(temporary):
        temporary = "/tmp"
    return os.path.join(temporary, f"twoproc-{os.geteuid()}")


def private_folder(path: str) -> str:
    """Make `path` a folder for us alone, or see that it is one; its absolute path."""
    path = os.path.abspath(path)
    if sys.platform == "win32":
        os.makedirs(path, exist_ok=True)  # below the user's profile, whose access list is private
        return path
    try:
        try:
            os.mkdir(path, 0o700)
            os.chmod(path, 0o700)  # a umask such as 0777 may have taken our own bits as well
        except FileExistsError:
            pass
        found = os.lstat(path)
        above = os.stat(os.path.dirname(path))
    except OSError as error:
        raise _unsafe(f"folder {path}: {error.strerror}; set TWOPROC_RUNTIME to a folder that you can write") from error
    fault = _fault(found, stat.S_ISDIR, "a folder")
    if fault is None and above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        fault = f"lies in {os.path.dirname(path)}, where every user may rename it (no sticky bit)"
    if fault:
        raise _unsafe(f"folder {path}: {fault}; not used. Remove it, or set TWOPROC_RUNTIME to a folder of your own")
    return path


def _fault(found: os.stat_result, is_kind: Callable[[int], bool], kind: str, is_replaced: bool = False) -> str | None:
    """Why something found on the disk is not ours alone; None if it is.

    is_replaced: a new file will take its place, so that its mode does not matter.
    """
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not is_kind(found.st_mode):
        return f"is not {kind}"
    if sys.platform == "win32":
        return None
    if found.st_uid != os.geteuid():
        return f"belongs to another user (uid {found.st_uid}, we are {os.geteuid()})"
    if found.st_mode & 0o077 and not is_replaced:
        return f"is open to other users (mode {stat.S_IMODE(found.st_mode):04o})"
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        return "has another name as well (a hard link)"
    return None


def _reason(error: OSError) -> str:
    # ELOOP, and EMLINK on FreeBSD, are what O_NOFOLLOW answers to a link.
    return "is a symbolic link" if error.errno in (errno.ELOOP, errno.EMLINK) else error.strerror or str(error)


# -- making, writing, reading and finding connection files

# Names to say over the phone. A number makes them unique: otter-3.
ANIMALS = (
    "ant bat bear bee bison boar camel carp cat cobra crab crane crow deer dove duck eagle eel elk emu finch fox "
    "frog gecko goat goose gull hare hawk hen heron ibex ibis jay kite koala lark lion llama lynx mole moose moth "
    "mouse newt okapi oryx otter owl panda pike pony puma quail raven robin seal shark sheep shrew sloth snail "
    "stork swan tapir tiger toad trout viper vole whale wolf wren yak zebra"
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
        prefix = os.path.join(kernels_folder(), secrets.token_hex(4)) if transport == "ipc" else ""
    else:
        folder = kernels_folder()
        if name is None:
            name = _reserve_name(folder)
        elif not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or not name[0].isalnum():
            raise ConnectionFileError(f"kernel name {_shown(name)}: use letters, digits, '-', '_' and '.'")
        else:
            reserve(os.path.join(folder, f"{name}.json"))
        path = os.path.join(folder, f"{name}.json")
        prefix = os.path.join(folder, name)
    key = secrets.token_hex(32).encode()
    if transport == "tcp":
        return path, ConnectionInfo("tcp", "127.0.0.1", 0, 0, 0, 0, 0, key)
    info = ConnectionInfo("ipc", prefix, 1, 2, 3, 4, 5, key)
    if _ipc_excess(info):
        short = private_folder(f"/tmp/twoproc-{os.geteuid()}")
        info = info._replace(ip=os.path.join(short, secrets.token_hex(4)))
    return path, info


def _reserve_name(folder: str) -> str:
    """A name that nobody has: its lock file is made here, and the maker of a file has it alone."""
    # 1..99 first, because short names are the purpose; wider when a machine is that busy.
    for attempt in range(1000):
        name = f"{secrets.choice(ANIMALS)}-{1 + secrets.randbelow(99 if attempt < 100 else 9999)}"
        path = os.path.join(folder, f"{name}.json")
        if os.path.lexists(path):
            continue
        try:
            os.close(_create_private(lock_path(path)))
        except FileExistsError:
            continue
        except OSError as error:
            raise _unsafe(f"{lock_path(path)}: {error.strerror}; no kernel can start") from error
        return name
    raise ConnectionFileError(f"no free kernel name found in {folder}; remove what is left there", NAME_IN_USE)


def write_connection_file(path: str, info: ConnectionInfo) -> None:
    """Write atomically, 0600 under any umask. What is in the way and not our own plain file: exit code 5."""
    members: dict[str, Any] = dict(info.extra)
    members.update({name: value for name, value in info._asdict().items() if name != "extra" and value is not None})
    for name in ("key", "curve_publickey", "curve_secretkey"):
        if name in members:
            members[name] = members[name].decode()
    path = os.path.abspath(path)
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        fault = _fault(found, stat.S_ISREG, "a regular file", is_replaced=True)
        if fault:
            raise _unsafe(f"connection file {path}: what stands there {fault}; remove it")
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(_create_private(temporary), "w", encoding="utf-8") as file:
            if sys.platform != "win32" and os.fstat(file.fileno()).st_mode & 0o077:
                raise _unsafe(f"connection file {path}: this file system keeps no permissions; put it elsewhere")
            json.dump(members, file, indent=2)
        os.replace(temporary, path)
    except OSError as error:
        raise _unsafe(f"connection file {path}: {error.strerror}; not written") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _create_private(path: str) -> int:
    """A descriptor of a new file, 0600 from the start; FileExistsError if anything has that name."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _O_SAFE, 0o600)
    if sys.platform != "win32":
        os.fchmod(fd, 0o600)  # a umask such as 0777 may have taken our own bits as well
    return fd


# O_NONBLOCK: opening a fifo that somebody placed must not wait for its other end.
_O_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def read_connection_file(path: str, *, as_kernel: bool = False) -> ConnectionInfo:
    """Read and check a connection file.

    as_kernel: a port may be 0, "the kernel chooses": tcp ports stay 0, ipc numbers are chosen here.
    Exit code 5 if another user could read or could have written the file, 2 if its content is wrong.
    """
    path = os.path.abspath(path)
    return parse_connection(_read_private(path), path, as_kernel=as_kernel)


def _read_private(path: str) -> bytes:
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _O_SAFE)) as file:
            fault = _fault(os.fstat(file.fileno()), stat.S_ISREG, "a regular file")
            if fault is None:
                return file.read(FILE_LIMIT + 1)
    except FileNotFoundError as error:
        raise ConnectionFileError(f"connection file {path}: no such file; has its kernel ended?") from error
    except OSError as error:
        raise _unsafe(f"connection file {path}: {_reason(error)}; not used") from error
    raise _unsafe(f"connection file {path}: {fault}; not used, because whoever reads it can run code as you. "
                  f"Start the kernel anew with a file of mode 0600")


def parse_connection(text: bytes | str, path: str, *, as_kernel: bool = False) -> ConnectionInfo:
    """Check the JSON text of a connection file; `path` is for the messages."""

    def malformed(what: str) -> ConnectionFileError:
        return ConnectionFileError(f"connection file {path}: {what}")

    if len(text) > FILE_LIMIT:
        raise malformed(f"more than {FILE_LIMIT} bytes; was it written by another program?")
    if not text.strip():
        raise malformed("is empty; is its kernel still starting?")
    try:
        members = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, an endless number
        raise malformed(f"is not JSON ({error}); was it written by another program?") from error
    if not isinstance(members, dict):
        raise malformed(f"holds {_shown(members)}, expected a JSON object")

    def take(name: str, default: Any = None) -> Any:
        value = members.pop(name, default)
        if value is None:
            raise malformed(f"no {name!r}; was it written by another program? start the kernel again")
        return value

    def text_of(name: str, default: str | None = None) -> str:
        value = take(name, default)
        with contextlib.suppress(AttributeError, UnicodeEncodeError):  # no string, or half a surrogate pair in it
            value.encode()
            return value
        # The value of a key is the one thing that no message shows.
        raise malformed(f"{name} is {'not text' if 'key' in name else _shown(value)}, expected a string")

    transport = text_of("transport", "tcp").lower()  # the oldest files have none, and mean tcp
    if transport not in TRANSPORTS:
        raise malformed(f"transport is {_shown(transport)}, expected one of {', '.join(TRANSPORTS)}")
    ip = text_of("ip")
    # tcp: what could not stand between // and : of an endpoint. ipc: what cannot be a path.
    if not ip or "\0" in ip or (transport == "tcp" and (not ip.isprintable() or any(c in ip for c in "/ ;@"))):
        raise malformed(f"ip is {_shown(ip)}, expected {'an address' if transport == 'tcp' else 'a path'}")
    ports: dict[str, Any] = {}
    for channel in CHANNELS:
        name = f"{channel}_port"
        port = take(name)
        if not isinstance(port, int) or isinstance(port, bool) or not (0 if as_kernel else 1) <= port <= 65535:
            raise malformed(f"{name} is {_shown(port)}, expected a number from {0 if as_kernel else 1} to 65535")
        twin = next((other for other, number in ports.items() if number == port != 0), None)
        if twin:
            raise malformed(f"{name} is {port}, as {twin} is; each channel needs its own")
        ports[name] = port
    scheme = text_of("signature_scheme", "hmac-sha256")
    # The shake family has no length of its own, so it makes no signatures.
    if scheme not in {f"hmac-{name}" for name in hashlib.algorithms_guaranteed if not name.startswith("shake")}:
        raise malformed(f"signature_scheme is {_shown(scheme)}, expected hmac-sha256 or another hash of hashlib")
    key = text_of("key").encode()
    curve: dict[str, Any] = {"curve_publickey": None, "curve_secretkey": None}
    for name in curve:
        if members.get(name) is not None:
            curve[name] = text_of(name).encode()
            if len(curve[name]) != 40 or not Z85.issuperset(curve[name]):
                raise malformed(f"{name} is not a key: expected 40 characters of Z85")
        members.pop(name, None)
    if as_kernel and (curve["curve_publickey"] is None) != (curve["curve_secretkey"] is None):
        raise malformed("curve_publickey and curve_secretkey: only one is there, a kernel needs both")
    if members.get("kernel_name", "") is None:
        del members["kernel_name"]
    kernel_name = text_of("kernel_name", "")
    fields: dict[str, Any] = {"transport": transport, "ip": ip, "key": key, "signature_scheme": scheme}
    info = ConnectionInfo(**fields, **ports, **curve, kernel_name=kernel_name, extra=MappingProxyType(members))
    if transport == "ipc":
        info = _number_ipc(info)
        excess = _ipc_excess(info)
        if excess:
            raise malformed(f"ip makes a socket path {excess} bytes too long (at most {IPC_PATH_LIMIT}): {_shown(ip)}")
    return info


def _number_ipc(info: ConnectionInfo) -> ConnectionInfo:
    """Give the channels without a number one that is free, as Jupyter does."""
    taken = {info.port(channel) for channel in CHANNELS}
    free = (n for n in range(1, 65536) if n not in taken and not os.path.lexists(f"{info.ip}-{n}"))
    chosen: dict[str, Any] = {f"{c}_port": next(free) for c in CHANNELS if info.port(c) == 0}
    return info._replace(**chosen)


def _ipc_excess(info: ConnectionInfo) -> int:
    return max(0, max(len(os.fsencode(path)) for path in info.ipc_paths()) - IPC_PATH_LIMIT)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"a nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


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
    return sorted(filter(is_claimed, _connection_files(kernels_folder())), key=_mtime_ns, reverse=True)


def kernel_name_of(path: str) -> str:
    """otter-3 for .../kernels/otter-3.json, and for the kernel-otter-3.json of Jupyter's folder."""
    return os.path.basename(path).removesuffix(".json").removeprefix("kernel-")


def jupyter_runtime_folder() -> str:
    """Where Jupyter keeps its connection files; not made, and not checked, by us."""
    environ, home = os.environ, os.path.expanduser("~")
    if environ.get("JUPYTER_RUNTIME_DIR"):
        return environ["JUPYTER_RUNTIME_DIR"]
    if sys.platform == "darwin":
        data = os.path.join(home, "Library", "Jupyter")
    elif sys.platform == "win32":
        data = os.path.join(environ.get("APPDATA") or home, "jupyter")
    else:
        data = os.path.join(environ.get("XDG_DATA_HOME") or os.path.join(home, ".local", "share"), "jupyter")
    return os.path.join(environ.get("JUPYTER_DATA_DIR") or data, "runtime")


def publish_to_jupyter(path: str, info: ConnectionInfo) -> str:
    """Copy the file to where `jupyter console --existing` looks; the copy's path."""
    copy = _published_path(path)
    folder = os.path.dirname(copy)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise _unsafe(f"folder {folder}: {error.strerror}; nothing published") from error
    write_connection_file(copy, info)
    return copy


def _published_path(path: str) -> str:
    return os.path.join(os.path.abspath(jupyter_runtime_folder()), f"kernel-{kernel_name_of(path)}.json")


def _connection_files(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        entries = sorted(entry for entry in os.listdir(folder) if entry.endswith(".json") and entry[0] != ".")
        return [os.path.join(folder, entry) for entry in entries]
    return []


def _mtime_ns(path: str) -> int:
    try:
        return os.lstat(path).st_mtime_ns
    except OSError:  # it ended while we looked
        return 0


# -- who holds a connection file

class Claim:
    """The right to one connection file, held by one living kernel.

    An exclusive flock on <connection file>.lock. The operating system drops it however the process
    ends, so nobody has to guess from a process number, which may by now belong to another program.
    Rejected: fcntl's POSIX locks, which vanish as soon as anybody in the process opens and closes the
    file. A forked child closes its copy at once, else it would hold the name after the kernel's death.

    note: empty, or why the claim is weaker than it should be (a file system without locks).
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.note = ""
        self._fd, self.note = _lock(self.path)
        self._forget = in_forked_child(self._close) if self._fd >= 0 else None
        if self._fd >= 0:
            _note_holder(self._fd)

    def release(self) -> None:
        """Unlink the lock file and let go. Connection file and sockets: `remove_files`, before this."""
        if self._forget:
            self._forget()
        if self._fd >= 0:
            _unlock(self.path, self._fd)
            self._fd = -1

    def fileno(self) -> int:
        """The descriptor that holds the lock, to pass on to a kernel that knows nothing of claims; or -1."""
        return self._fd

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)  # close, not unlock: the lock is shared with the parent, the descriptor is not

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
        fd = os.open(lock_path(os.path.abspath(path)), os.O_RDONLY | _O_SAFE)
    except OSError:
        return False
    try:
        if _fault(os.fstat(fd), stat.S_ISREG, "a regular file"):
            return False
        # Shared, so that two who look do not see each other.
        return not _try_lock(fd, shared=True)
    except OSError:
        return True
    finally:
        os.close(fd)


def _lock(path: str) -> tuple[int, str]:
    """(descriptor, note); the descriptor is -1 where there can be no lock file at all."""
    lock = lock_path(path)
    # Somebody may hold the lock for an instant only: is_claimed() looking, remove_stale() tidying up.
    patience = time.monotonic() + 0.3
    while True:
        try:
            fd = _open_lock(lock)
        except OSError as error:
            # A file that a manager mounted read-only: nobody can take its name, nobody can remove it.
            if error.errno in (errno.EROFS, errno.EACCES) and os.path.exists(path) and not os.path.lexists(lock):
                return -1, f"{os.path.dirname(path)} cannot be written: nothing says that {path} is in use"
            raise _unsafe(f"{lock}: {_reason(error)}; the name cannot be claimed") from error
        note, keep = "", False
        try:
            try:
                locked = _try_lock(fd)
            except OSError as error:
                locked, note = True, f"{lock}: this file system has no locks ({error.strerror}); mind second kernels"
            # The name may have been unlinked, or made anew, between our open and our lock: then we
            # hold the lock of a file that nobody else will ever find.
            if locked and _is_same_file(fd, lock):
                keep = True
                return fd, note
            if not locked and time.monotonic() > patience:
                raise _in_use(path)
        finally:
            if not keep:
                os.close(fd)
        if not locked:
            time.sleep(0.005)  # nothing tells when a lock is let go, and blocking in flock() has no limit


def _open_lock(lock: str) -> int:
    """Open or create the lock file; OSError, or exit code 5 if it is not our own plain file."""
    while True:
        with contextlib.suppress(FileExistsError):
            return _create_private(lock)
        with contextlib.suppress(FileNotFoundError):  # its holder ended between the two
            fd = os.open(lock, os.O_RDWR | _O_SAFE)
            break
    found = os.fstat(fd)
    fault = _fault(found, stat.S_ISREG, "a regular file")
    if fault:
        os.close(fd)
        raise _unsafe(f"{lock}: what stands there {fault}; not used, remove it")
    return fd


def _try_lock(fd: int, shared: bool = False) -> bool:
    """OSError if the file system has no locks."""
    try:
        if sys.platform == "win32":
            # Locks are mandatory there, and the content must stay readable: lock a byte far behind it.
            os.lseek(fd, 1 << 30, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def _unlock(path: str, fd: int) -> None:
    """Unlink while the lock is held, so that nobody can have taken it in between."""
    lock = lock_path(path)
    if sys.platform == "win32":  # where an open file cannot be unlinked
        os.close(fd)
    with contextlib.suppress(OSError):
        if sys.platform == "win32" or _is_same_file(fd, lock):
            os.unlink(lock)
    if sys.platform != "win32":
        os.close(fd)


def _is_same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except OSError:
        return False


def _note_holder(fd: int) -> None:
    # For people, and for the message of who comes second. Nobody decides anything by it.
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, json.dumps({"pid": os.getpid()}).encode() + b"\n")


def holder_pid(path: str) -> int | None:
    """The process that the lock file names; to be shown, not to be trusted."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        fd = os.open(lock_path(path), os.O_RDONLY | _O_SAFE)
        with os.fdopen(fd, "rb") as file:
            return int(json.loads(file.read(1000))["pid"])
    return None


def _in_use(path: str) -> ConnectionFileError:
    pid = holder_pid(path)
    by = f"by the kernel with pid {pid}" if pid else "by a kernel that is starting or ending"
    return ConnectionFileError(f"kernel {kernel_name_of(path)}: the name is in use {by} ({path}); "
                               f"join that one, or choose another name", NAME_IN_USE)


# -- tidying up

def remove_files(path: str, info: ConnectionInfo) -> None:
    """Remove a connection file, its sockets and its published copy; for who holds the Claim."""
    remove_sockets(info)
    for candidate in (path, _published_path(path)):
        # Only if it still is the file of this kernel: a later one may have taken the path.
        with contextlib.suppress(OSError, ConnectionFileError):
            if read_connection_file(candidate, as_kernel=True).key == info.key:
                os.unlink(candidate)


def remove_sockets(info: ConnectionInfo) -> None:
    for path in info.ipc_paths():
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)


def remove_stale(folder: str | None = None) -> list[str]:
    """Remove what dead kernels left in `folder` (default: ours); the names of the kernels removed.

    Only what has a lock file, so that it was ours, and only when nobody holds that lock. Where the file
    system has no locks nothing is removed.
    """
    folder = os.path.abspath(folder or kernels_folder())
    removed = []
    with contextlib.suppress(FileNotFoundError):
        for entry in sorted(os.listdir(folder)):
            path = os.path.join(folder, entry)
            with contextlib.suppress(ConnectionFileError, OSError):
                if entry.endswith(".json.lock"):
                    path = path.removesuffix(".lock")
                    if _remove_if_stale(path):
                        removed.append(kernel_name_of(path))
                elif (entry.endswith(".tmp") or _is_lone_log(path) or is_dead_socket(path)) and not _is_fresh(path):
                    os.unlink(path)
    return removed


def _remove_if_stale(path: str) -> bool:
    if _is_fresh(lock_path(path)) and os.lstat(lock_path(path)).st_size == 0:
        return False  # reserved: no kernel has written its number yet
    if is_claimed(path):
        return False
    fd, note = _lock(path)
    if note:
        if fd >= 0:
            os.close(fd)
        return False
    try:
        with contextlib.suppress(ConnectionFileError):  # malformed or gone: its sockets are swept by and by
            remove_files(path, read_connection_file(path, as_kernel=True))
        for left in (path, log_path(path)):
            with contextlib.suppress(OSError):
                os.unlink(left)
    finally:
        _unlock(path, fd)
    return True


def _is_lone_log(path: str) -> bool:
    """Whether it is the log of a kernel that ended properly, but after its launcher."""
    kernel = f"{path.removesuffix('.log')}.json"
    return path.endswith(".log") and not os.path.lexists(kernel) and not os.path.lexists(lock_path(kernel))


def is_dead_socket(path: str) -> bool:
    """Whether it is a socket file with nobody behind it, as SIGKILL leaves them."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)  # a full backlog must not hold us up; it says that somebody is there
        return sock.connect_ex(path) == errno.ECONNREFUSED


def _is_fresh(path: str) -> bool:
    with contextlib.suppress(OSError):
        return abs(time.time() - os.lstat(path).st_mtime) < FRESH
    return False


# -- what a forked child must let go

# Written by any thread that registers or un-registers; dict operations are atomic. Read in the child,
# where only the forking thread is left. A KeyboardInterrupt in between leaves an entry too many, never
# a torn one.
_at_fork: dict[object, Callable[[], None]] = {}
_is_fork_watched = False


def in_forked_child(function: Callable[[], None]) -> Callable[[], None]:
    """Call `function` in every child that is forked from now on; returns what un-registers it.

    For what a child must not keep: locks, logs, sockets. The one hook of the package, registered when
    it is first needed (a registration cannot be undone, and an import has no effects).
    """
    global _is_fork_watched
    if not _is_fork_watched and hasattr(os, "register_at_fork"):
        _is_fork_watched = True
        os.register_at_fork(after_in_child=_run_in_forked_child)
    token = object()
    _at_fork[token] = function

    def forget() -> None:
        _at_fork.pop(token, None)

    return forget


def _run_in_forked_child() -> None:
    functions = list(_at_fork.values())
    _at_fork.clear()  # a child that becomes a kernel of its own starts afresh
    for function in functions:
        # One that fails must not keep the others from letting go, and a fork is no place to report it.
        with contextlib.suppress(Exception):
            function()


# -- who could reach the sockets

def check_listening(info: ConnectionInfo, *, is_managed: bool = False) -> list[str]:
    """Refuse to listen where strangers could get in; returns the warnings to log, if any.

    is_managed: the file was written by a Jupyter manager, which we obey as far as it is safe.
    Called by the kernel before it binds. There is no switch to turn this off.
    """
    is_local = info.transport == "ipc" or is_loopback(info.ip)
    has_curve = info.curve_publickey is not None and info.curve_secretkey is not None
    if not is_local and not has_curve:
        raise _unsafe(f"ip {_shown(info.ip)} can be reached from other machines, and the connection has no CURVE keys: "
                      f"code and output would travel in clear. Use ip 127.0.0.1, or transport_encryption = required")
    if info.key:
        return []
    if not is_managed or not is_local:
        raise _unsafe("the key is empty: messages would not be signed, anybody who connects could run code; use a key")
    return ["the manager gave an empty key: messages are not signed, whoever can connect can run code"]


def is_loopback(ip: str) -> bool:
    """Whether an address is reached from this machine only. What we cannot tell is not."""
    if not ip or ip == "*":
        return False
    bare = ip[1:-1] if ip.startswith("[") and ip.endswith("]") else ip
    if _is_loopback_address(bare):
        return True
    if _address(bare) is not None:
        return False
    # A name. ZeroMQ would take one for a network interface first, and only then look it up.
    with contextlib.suppress(OSError, AttributeError):
        if bare in (name for _, name in socket.if_nameindex()):
            return False
    try:
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(_is_loopback_address(str(entry[4][0])) for entry in found)


def _is_loopback_address(text: str) -> bool:
    address = _address(text)
    # ::ffff:127.0.0.1 counts by its IPv4 part on every version of Python.
    return bool(address) and (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _address(text: str) -> Any:
    import ipaddress  # here, because a kernel on ipc need not wait for it

    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
