# Distributed under the terms of the BSD 3-Clause License.
"""Who may do what: the authorised keys, the rights of each message, and the log of who came.

A kernel that listens for other machines knows its users by their CURVE keys.  `authorized_keys` has a line for
each, with one of four rights; `Access` answers the two questions of the kernel: may this connection be made
(`admit`, on the thread twoproc-admission), and may its owner say this (`check`, for each message, on twoproc-io).
The file is looked at again and again, so a line that is taken away ends what its owner could do.

Whoever is on this machine as the user who runs the kernel is `""`: all rights, no limit.  It could read every
key and file of ours anyway.

No ZeroMQ here, and no thread: what keeps strangers out is plain text in, yes or no out.  keys.py edits the file.
"""
from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import date, datetime, timezone
from typing import Any, NamedTuple

from .connection import O_SAFE, ConnectionFileError, fingerprint, is_same_file, open_private, private_folder, try_lock

logger = logging.getLogger(__name__)

# Each may what those before it may.
RIGHTS = ("view", "input", "run", "admin")

# What a message needs; docs/security.md has the same table.  What is not here needs "run".
NEEDS = {
    "kernel_info_request": "view",
    "connect_request": "view",
    "comm_info_request": "view",
    "history_request": "view",
    "twoproc_log_request": "view",
    "twoproc_status_request": "view",
    "twoproc_resume_request": "view",
    "complete_request": "input",
    "inspect_request": "input",
    "is_complete_request": "input",
    "execute_request": "run",
    "comm_open": "run",
    "comm_msg": "run",
    "comm_close": "run",
    "input_reply": "run",
    "interrupt_request": "run",
    "shutdown_request": "admin",
}

LOOK_SECONDS = 1.0          # so old may be what a message is judged by
LOOK_SECONDS_ADMIT = 0.1    # and a connection: who was just authorised shall not be told to wait
ANSWER_SIZE = 4096          # bytes of an answer that count as another request
FILE_LIMIT = 1 << 20        # a line has about 100 bytes
# Of the access log, what strangers can cause, and who may only look; all else:
LINES_PER_SECOND = {"refuse": 5, "rights": 5, "limit": 5}
LINES_PER_SECOND_ELSE = 100

# What is no fault of the file: whoever opens all our descriptors must not thereby shut everybody else out.
TRANSIENT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)


class Refused(Exception):
    """The connection is not to be made; the reason, for the log alone."""


class NotAllowed(Exception):
    """The right to this message is missing; one line for its sender."""


class RateLimited(Exception):
    """Too many requests; one line for their sender."""


# -- the file authorized_keys

class KeyLineError(ValueError):
    """What is wrong with a line, with what value, and what to do."""


class Key(NamedTuple):
    """One line: `run 5d20...(64 hexadecimal digits) alice from=10.0.0.0/8,fd00::/8 expires=2027-01-31`."""
    rights: str
    key: str
    name: str
    sources: tuple = ()             # networks it may come from; none: any
    expires: date | None = None     # the last day on which it is good
    line: int = 0

    def is_from(self, address: str) -> bool:
        if not self.sources:
            return True
        import ipaddress        # here and below: 1 ms that the start of a kernel on ipc does not pay
        try:
            source: Any = ipaddress.ip_address(address.strip("[]").partition("%")[0])
        except ValueError:
            return False
        # ::ffff:10.0.0.1 is how a socket for both protocols sees 10.0.0.1.
        forms = (source, getattr(source, "ipv4_mapped", None))
        return any(form in network for form in forms if form for network in self.sources)

    def __str__(self) -> str:
        words = [self.rights, self.key, self.name]
        words += ["from=" + ",".join(map(str, self.sources))] * bool(self.sources)
        return " ".join(words + [f"expires={self.expires}"] * (self.expires is not None))


def parse_line(text: str, number: int = 0) -> Key | None:
    """The key of one line, None for a line without one; raises KeyLineError. `#` begins a comment."""

    def fault(what: str) -> KeyLineError:
        return KeyLineError(f"line {number}: {what}" if number else what)

    words = text.partition("#")[0].split()
    if not words:
        return None
    if words[0] not in RIGHTS:
        raise fault(f"{words[0][:20]!r} is no right; a line begins with one of {', '.join(RIGHTS)}")
    # The value is not shown: it may be a secret key, pasted in the wrong place.
    if len(words) < 2 or not re.fullmatch(r"[0-9a-fA-F]{64}", words[1]):
        raise fault("the second word is no key of 64 hexadecimal digits; take the line that "
                    "`python -m twoproc.keys show` prints for its owner")
    name = words[2] if len(words) > 2 else ""
    if not 0 < len(name) <= 64 or "=" in name or not name.isprintable():
        raise fault(f"{name[:20]!a} is no name; the third word is one, of up to 64 characters, without '='")
    options: dict[str, Any] = {}
    for word in words[3:]:
        option, _, value = word.partition("=")
        try:
            if option == "from" and "sources" not in options:
                import ipaddress
                options["sources"] = tuple(map(ipaddress.ip_network, value.split(",")))
            elif option == "expires" and "expires" not in options:
                options["expires"] = date(*map(int, re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)", value).groups()))
            else:
                raise fault(f"{word[:20]!a} is not known here, or is there twice; there are from= and expires=")
        except (ValueError, AttributeError) as error:
            if isinstance(error, KeyLineError):
                raise
            wanted = "a date like 2027-01-31" if option == "expires" else "networks like 10.0.0.0/8,fd00::/8"
            raise fault(f"{word[:60]!a}: expected {wanted}") from None
    return Key(words[0], words[1].lower(), name, **options, line=number)


def parse_keys(text: str) -> tuple[list[Key], list[str]]:
    """The keys of a file, and what is wrong with its other lines.

    A key that stands there twice is good for nothing: nobody can know which line was meant, and the wrong guess
    would give more than was wanted.
    """
    keys: dict[str, Key] = {}
    lines: dict[str, list[int]] = {}
    faults = []
    for number, line in enumerate(text.split("\n"), 1):    # splitlines() knows more line ends than editors do
        try:
            key = parse_line(line, number)
        except KeyLineError as error:
            faults.append(str(error))
            continue
        if key:
            keys[key.key] = key
            lines.setdefault(key.key, []).append(number)
    for twice in [key for key in lines if len(lines[key]) > 1]:
        faults.append(f"lines {', '.join(map(str, lines[twice]))}: the same key, {fingerprint(twice)}; "
                      f"none of them counts, leave one")
        del keys[twice]
    return list(keys.values()), faults


def read_trusted(path: str) -> str:
    """The text of a file that says whom we trust: ours, or root's, and nobody else's to write.

    Raises FileNotFoundError, OSError for what is TRANSIENT, ConnectionFileError (exit code 5) for all else.
    """
    fault, content = "", b""
    try:
        fd = os.open(path, os.O_RDONLY | O_SAFE)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                fault = "is not a regular file"
            elif sys.platform != "win32" and found.st_uid not in (os.geteuid(), 0):
                fault = f"belongs to another user (uid {found.st_uid})"
            elif sys.platform != "win32" and found.st_mode & 0o022:
                fault = f"others can write it (mode {stat.S_IMODE(found.st_mode):04o}); run: chmod go-w {path}"
            elif found.st_size > FILE_LIMIT:
                fault = f"has {found.st_size} bytes, expected at most {FILE_LIMIT}"
            else:
                content = b"".join(iter(lambda: os.read(fd, 1 << 16), b""))
        finally:
            os.close(fd)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno in TRANSIENT:
            raise
        fault = "is a symbolic link" if error.errno in (errno.ELOOP, errno.EMLINK) else str(error.strerror)
    if fault:
        raise ConnectionFileError(f"{path}: not used: {fault}", 5)
    # What is not UTF-8 becomes unprintable: in a comment it harms nobody, in a name it spoils that line alone.
    return content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


class AuthorizedKeys:
    """The authorised keys as the file has them now, or had them a second ago; asked by any thread.

    The file is read each time, 20 us, and parsed when it has changed. Its times would not tell two changes
    within one tick of the clock apart, and the second may be the one that takes a right away.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic, today: Callable[[], date] = date.today):
        self.path = path
        self.expired: dict[str, Key] = {}       # those whose last day is over
        self._clock, self._today = clock, today
        self._lock = threading.Lock()           # for twoproc-io and twoproc-admission, who both may find it old
        self._looked_at = clock()
        self._seen: tuple[str, str] | None = None
        self._keys: list[Key] = []
        self._current: dict[str, Key] = {}

    def current(self, max_age: float = LOOK_SECONDS) -> dict[str, Key]:
        """By key, what is good today; not to be changed by the caller."""
        with self._lock:
            now = self._clock()
            if self._seen is None or now - self._looked_at >= max_age:
                self._looked_at = now
                self._look()
            return self._current

    def _look(self) -> None:
        text = fault = ""
        try:
            text = read_trusted(self.path)
        except FileNotFoundError:
            fault = f"{self.path}: no such file"
        except ConnectionFileError as error:
            fault = str(error)
        except OSError:
            return      # TRANSIENT: what we know stays true until we can look again
        if (text, fault) != self._seen:
            self._seen = text, fault
            self._keys, faults = parse_keys(text)
            if fault:
                logger.warning("%s; nobody is let in by key", fault)
            for line in faults[:10]:
                logger.warning("%s, %s; ignored", self.path, line)
            if faults[10:]:
                logger.warning("%s: %d more such lines", self.path, len(faults) - 10)
        today = self._today()
        self.expired = {key.key: key for key in self._keys if key.expires and key.expires < today}
        self._current = {key.key: key for key in self._keys if key.key not in self.expired}


# -- the access log

class AccessLog:
    """Who came and what was refused: JSON lines that several kernels write to one file; None: to no file.

    note() may be called by any thread, never raises, and never writes a whole key: what looks like one leaves as
    its fingerprint.  What strangers can cause is cut to a few lines a second, so that they cannot push out the
    rest; a `limit` line counts what was left out.  A line that repeats one of the same second, as the five
    sockets of one client cause them, is not written again.
    """

    def __init__(self, path: str | None, max_bytes: int = 5 << 20, clock: Callable[[], float] = time.time):
        self.path, self._max_bytes, self._clock = path or "", max_bytes, clock
        self._lock = threading.Lock()           # protects what follows, and keeps lines of one second together
        self._second = 0
        self._written: dict[str, set[str]] = {}     # this second's lines by event
        self._left_out: dict[str, int] = {}
        self._complaint = ""                    # what the kernel's log was told last
        self._is_torn = False                   # the last line has no end: the disk was full

    def note(self, event: str, **fields: Any) -> None:
        if not self.path:
            return
        with self._lock:
            now = self._clock()
            if int(now) != self._second:
                self._second, self._written = int(now), {}
                left_out, self._left_out = self._left_out, {}
                for what, lines in left_out.items():
                    self._write(now, {"event": "limit", "of": what, "lines": lines})
            known = {name: _without_keys(value) for name, value in fields.items() if value not in (None, "")}
            line, lines_now = json.dumps(known, sort_keys=True), self._written.setdefault(event, set())
            if line in lines_now:
                return
            if len(lines_now) >= LINES_PER_SECOND.get(event, LINES_PER_SECOND_ELSE):
                self._left_out[event] = self._left_out.get(event, 0) + 1
                return
            lines_now.add(line)
            self._write(now, {"event": event, **known})

    def _write(self, now: float, record: dict) -> None:
        time_text = datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="milliseconds")
        line = (json.dumps({"time": time_text, **record}) + "\n").encode("ascii")
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, fd := self._open())
                # Who renames it has its lock. Nobody waits: a line more in a file that is being renamed is no loss.
                if os.fstat(fd).st_size + len(line) > self._max_bytes and try_lock(fd):
                    if is_same_file(fd, self.path):
                        os.replace(self.path, f"{self.path}.1")
                    stack.callback(os.close, fd := self._open())
                if os.fstat(fd).st_size < 2 * self._max_bytes:      # else whoever should rename it is stuck
                    line = b"\n" * self._is_torn + line
                    self._is_torn = os.write(fd, line) < len(line)
        except (OSError, ConnectionFileError) as error:     # a full disk ends no connection
            if str(error) != self._complaint:
                self._complaint = str(error)
                logger.warning("the access log is not written: %s", error)

    def _open(self) -> int:
        for _ in range(10):         # two kernels may find that it is missing
            with contextlib.suppress(FileNotFoundError):
                return open_private(self.path, os.O_WRONLY | os.O_APPEND)
            private_folder(os.path.dirname(self.path), "XDG_STATE_HOME")
            with contextlib.suppress(FileExistsError):
                return open_private(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        raise OSError(errno.EBUSY, f"{self.path} comes and goes")


def _without_keys(value: Any) -> Any:
    if isinstance(value, (int, float)):
        return value
    return re.sub(r"[0-9a-fA-F]{64}", lambda found: fingerprint(found[0]), str(value)[:500])


# -- the two questions

class Buckets:
    """So many requests a second for each, twice as many after a pause."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic):
        self._rate, self._clock = per_second, clock
        self._state: dict[Any, tuple[float, float]] = {}    # who -> (requests left, when that was)
        self._lock = threading.Lock()           # requests are counted by twoproc-io, long answers by who made them

    def take(self, who: Any, cost: float = 1, least: float = 1) -> bool:
        """least: so many must be left; the rest of the cost is owed."""
        with self._lock:
            now = self._clock()
            left, since = self._state.get(who, (2 * self._rate, now))
            left = min(2 * self._rate, left + (now - since) * self._rate)
            self._state[who] = left - cost * (left >= least), now
            return left >= least


class Access:
    """What the kernel asks.  A user is the key shown, 64 hexadecimal digits, or "": who may everything.

    own_key: the public key of the kernel itself. Stock Jupyter clients, and ours on this machine, show the pair
    from the connection file: who can read that file is the user who runs the kernel.
    own_key_from_anywhere: also over tcp; for a connection file that a Jupyter manager made.
    """

    def __init__(self, keys: AuthorizedKeys | None, own_key: str | None, own_key_from_anywhere: bool, log: AccessLog,
                 requests_per_second: float = 200, clock: Callable[[], float] = time.monotonic):
        self.keys, self.own_key, self.own_key_from_anywhere, self.log = keys, own_key, own_key_from_anywhere, log
        self._buckets = Buckets(requests_per_second, clock)

    # -- called by twoproc-admission
    def admit(self, mechanism: bytes, address: str, credentials: list[bytes]) -> str:
        """The user that a new connection belongs to; raises Refused. Both are in the access log then.

        The three parts of a ZAP request.  Over ipc libzmq says localhost:UID:GID:PID where the system tells, over
        tcp the number of the other side.  Source: ZeroMQ RFC 27.
        """
        key = credentials[0].hex() if mechanism == b"CURVE" and credentials else ""
        try:
            user = self._user(mechanism, address, key)
        except Refused as error:
            self.log.note("refuse", address=address, key=key, reason=str(error))
            raise
        self.note("accept", user, address=address)
        return user

    def _user(self, mechanism: bytes, address: str, key: str) -> str:
        host, *peer = address.split(":") if address.startswith("localhost") else (address,)
        is_ipc = host == "localhost"
        if is_ipc and peer and sys.platform != "win32" and peer[0] not in (str(os.geteuid()), "0"):
            raise Refused(f"another user of this machine (uid {peer[0][:20]})")
        if mechanism == b"NULL":
            return ""           # over tcp the signature of each message decides
        if mechanism != b"CURVE" or len(key) != 64:
            raise Refused(f"mechanism {mechanism[:20]!r} without a key")
        if key == self.own_key:
            if is_ipc or self.own_key_from_anywhere:
                return ""
            raise Refused("the kernel's own key, from elsewhere")
        known = self.keys.current(LOOK_SECONDS_ADMIT).get(key) if self.keys else None
        if known is None:
            old = self.keys.expired.get(key) if self.keys else None
            raise Refused(f"the key of {old.name} expired on {old.expires}" if old else "not an authorised key")
        if not known.is_from("127.0.0.1" if is_ipc else address):
            raise Refused(f"the key of {known.name} may not come from this address")
        return key

    # -- called by twoproc-io
    def check(self, user: str, msg_type: str) -> None:
        """Raises NotAllowed or RateLimited, for the sender to read."""
        if not user:
            return
        known = self.keys.current().get(user) if self.keys else None
        needed = NEEDS.get(msg_type, "run")
        # Interrupt and shutdown are counted apart: a program that asks too much is what they are to end.
        if not self._buckets.take((user, msg_type in ("interrupt_request", "shutdown_request"))):
            self.note("limit", user)
            raise RateLimited("too many requests with this key (limits.requests_per_second); ask again later")
        if known is None or RIGHTS.index(known.rights) < RIGHTS.index(needed):
            self.note("rights", user, msg_type=msg_type[:60], needs=needed)
            raise NotAllowed(f"{msg_type[:60]} needs the right {needed!r}, this key has "
                             f"{known.rights!r}" if known else "this key was withdrawn, or has expired")

    def rights(self, user: str) -> str:
        """One of RIGHTS; empty for a key that is no longer good."""
        known = self._known(user)
        return known.rights if known else "" if user else "admin"

    def name(self, user: str) -> str:
        known = self._known(user)
        return known.name if known else "" if user else "local"

    def withdrawn(self, users: Iterable[str]) -> set[str]:
        """Those of them whose key is no longer good; their connections are to be cut."""
        return {user for user in users if user and self._known(user) is None}

    # -- called by any thread
    def charge(self, user: str, size: int) -> None:
        """An answer of so many bytes counts as one request for each ANSWER_SIZE: RateLimited once it is too much.

        Not what a cell replies. Who asks for all there is and reads none of it has it wait in our memory.
        """
        if user and size >= ANSWER_SIZE and not self._buckets.take((user, False), size // ANSWER_SIZE, least=0):
            self.note("limit", user)
            raise RateLimited("too many long answers to this key (limits.requests_per_second); ask again later")

    def note(self, event: str, user: str = "", **fields: Any) -> None:
        """A line of the access log about somebody."""
        self.log.note(event, name=self.name(user), key=user, **fields)

    def _known(self, user: str) -> Key | None:
        return self.keys.current().get(user) if self.keys and user else None
