# Distributed under the terms of the BSD 3-Clause License.
"""Keys at the command line: `python -m twoproc.keys new | authorize | list | revoke | show | fingerprint | forget`.

Four files, whose places are settings (`[auth]`).  A pair is one file, of a kernel's machine (host_key) or of a user
(id_key): the secret half stays in it, the public half is printed, to be handed over.  authorized_keys says whose
keys our kernels let in (access.py reads it), known_kernels which kernels we trust (remote.py asks).

Whoever changes one of the last two holds a lock, reads the file, and puts another one in its place: two who do so at
once lose nothing, and a kernel that reads meanwhile sees one or the other.  No secret key is ever printed, put
into an error message, or taken from the command line, where other users of the machine could read it.

Every failure is a ConnectionFileError: one line, and the exit code; 2 wrong usage or nothing found, 5 a file that is
missing or not safe, 6 a kernel whose key is not the one that is known.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from typing import NamedTuple

from . import config
from .access import RIGHTS, Key, KeyLineError, parse_keys, parse_line, read_trusted
from .connection import (
    ConnectionFileError, fingerprint, leave_current_folder, make_folders, open_or_make, open_private, try_lock)
from .session import user_name

COMMAND = f"python -m {__package__}.keys"
LOCK_SECONDS = 10.0         # to change a file takes milliseconds; who holds its lock longer has been stopped


# -- pairs of keys

class KeyPair(NamedTuple):
    public: str             # 64 hexadecimal digits each
    secret: str
    name: str

    def __repr__(self) -> str:
        return f"<KeyPair {self.name} {fingerprint(self.public)}>"     # this may end up in a traceback


def load_pair(path: str) -> KeyPair:
    """Read a key file; FileNotFoundError if there is none, exit code 5 if it is malformed or open to others."""
    with os.fdopen(open_private(path, os.O_RDONLY), "rb") as file:
        text = file.read(4096).decode("utf-8", "replace")
    found = dict(re.findall(r"(?m)^(name|public|secret) (\S+)\s*$", text))
    if not all(re.fullmatch("[0-9a-f]{64}", found.get(half, "")) for half in ("public", "secret")):
        raise ConnectionFileError(f"{path}: is no key file; move it away, and make one: {COMMAND} new", 5)
    return KeyPair(found["public"], found["secret"], found.get("name", ""))


def new_pair(path: str, name: str) -> KeyPair:
    """Make a pair and its file, which must not exist yet."""
    from .clientchannels import curve_keypair       # here: ZeroMQ takes 30 ms, and only this needs it

    pair = KeyPair(*curve_keypair(), name)
    text = f"# A key pair of twoproc. Who has the secret can do what you can: leave it on this machine.\n" \
           f"name {pair.name}\npublic {pair.public}\nsecret {pair.secret}\n"
    try:
        make_folders(os.path.dirname(path))
        fd = open_private(path, os.O_WRONLY | os.O_CREAT)
        try:
            _write_out(fd, text)
        except OSError:
            os.unlink(path)
            raise
    except FileExistsError as error:
        raise ConnectionFileError(f"{path}: there is a key already, and others may trust it; see it by "
                                  f"`{COMMAND} show`, or move it away first", 5) from error
    except OSError as error:
        raise ConnectionFileError(f"{path}: {error.strerror}; no key was made", 5) from error
    return pair


def _write_out(fd: int, text: str) -> None:
    with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)


# -- changing a file that others read

def edit(path: str, change: Callable[[str], str]) -> None:
    """Replace the text of a trusted file by change(text); alone, and whole or not at all. Missing counts as empty."""
    temporary = f"{path}.{os.urandom(8).hex()}.tmp"
    try:
        make_folders(os.path.dirname(path))
        with _locked(f"{path}.lock"):
            try:
                before = read_trusted(path)
            except FileNotFoundError:
                before = ""
            after = change(before)
            if after != before:
                _write_out(open_private(temporary, os.O_WRONLY | os.O_CREAT), after)
                os.replace(temporary, path)
    except OSError as error:
        raise ConnectionFileError(f"{path}: {error.strerror}; not changed", 5) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """A lock file beside the one that is replaced; it stays, so that everybody locks the same one."""
    fd = open_or_make(path, os.O_RDWR)
    try:
        end = time.monotonic() + LOCK_SECONDS
        while try_lock(fd) is False:
            if time.monotonic() > end:
                raise ConnectionFileError(f"{path}: another program has held this lock for {LOCK_SECONDS:.0f} s; "
                                          f"end it and try again", 5)
            time.sleep(0.005)       # nothing tells when a lock is let go, and to block in flock() has no limit
        yield
    finally:
        os.close(fd)


def add_line(text: str, line: str) -> str:
    return text + "\n" * (text != "" and not text.endswith("\n")) + line + "\n"


# -- authorized_keys

def authorize(path: str, key: Key) -> None:
    """Let the owner of `key` in; exit code 2 if it is there already."""
    def change(text: str) -> str:
        for number, _, known in _lines(text):
            if known and known.key == key.key:
                raise ConnectionFileError(f"{path}, line {number}: this key is there already, as {known.name} with the "
                                          f"right {known.rights!r}; revoke it first")
        return add_line(text, str(key))
    edit(path, change)


def revoke(path: str, who: str) -> list[Key]:
    """Take out the lines with this name, key or fingerprint; those keys. Exit code 2 if there are none."""
    gone: list[Key] = []

    def change(text: str) -> str:
        kept = []
        for _, line, key in _lines(text):
            if key and (who.lower() == key.key or who in (
                    key.name, fingerprint(key.key), fingerprint(key.key).partition(":")[2])):
                gone.append(key)
            else:
                kept.append(line)
        if not gone:
            names = ", ".join(sorted({key.name for _, _, key in _lines(text) if key})[:10]) or "nobody"
            raise ConnectionFileError(f"{path}: no key of {who[:80]!a}; there are keys of: {names}")
        return "\n".join(kept)
    edit(path, change)
    return gone


def _lines(text: str) -> Iterator[tuple[int, str, Key | None]]:
    for number, line in enumerate(text.split("\n"), 1):
        key = None
        with contextlib.suppress(KeyLineError):
            key = parse_line(line, number)
        yield number, line, key


# -- known_kernels

class KnownKernel(NamedTuple):
    address: str            # host:port
    key: str
    name: str
    line: int


def known(path: str) -> list[KnownKernel]:
    """The kernels that this user trusts; a line that cannot be read is not passed over, it may be what counts."""
    try:
        return _known(path, read_trusted(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConnectionFileError(f"{path}: {error.strerror}", 5) from error


def _known(path: str, text: str) -> list[KnownKernel]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 3 or not re.fullmatch(r"\S+:\d+", words[0]) or not re.fullmatch("[0-9a-f]{64}", words[1]):
            raise ConnectionFileError(f"{path}, line {number}: expected host:port, a key of 64 hexadecimal digits, a "
                                      f"name; mend or remove the line", 5)
        found.append(KnownKernel(words[0], words[1], words[2], number))
    return found


def remember(path: str, address: str, key: str, name: str) -> None:
    """Trust the kernel at host:port from now on; exit code 6 if another key is known for it."""
    line = f"{address} {key} {name}"
    if not name.isprintable() or line.partition("#")[0].split(" ") != [address, key, name] or "" in (address, name):
        raise ConnectionFileError(f"{line[:200]!a} cannot be remembered; the name has to be one word")

    def change(text: str) -> str:
        for entry in _known(path, text):
            if entry.address == address and entry.key != key:
                raise ConnectionFileError(
                    f"the kernel at {address} has the key {fingerprint(key)}, known is {fingerprint(entry.key)} "
                    f"({path}, line {entry.line}). Either it has a new key, or somebody else answers. Ask its owner; "
                    f"then: {COMMAND} forget {address}", 6)
            if entry.address == address:
                return text
        return add_line(text, line)
    edit(path, change)


def forget(path: str, who: str) -> list[KnownKernel]:
    """Take out the kernels with this host, host:port or name; those. Exit code 2 if there are none."""
    gone: list[KnownKernel] = []

    def change(text: str) -> str:
        entries = _known(path, text)
        gone.extend(entry for entry in entries
                    if who in (entry.address, entry.name, entry.address.rpartition(":")[0].strip("[]")))
        if not gone:
            there = ", ".join(entry.address for entry in entries[:10]) or "none"
            raise ConnectionFileError(f"{path}: no kernel {who[:80]!a} is known; there are: {there}")
        lines, numbers = text.split("\n"), {entry.line for entry in gone}
        return "\n".join(line for number, line in enumerate(lines, 1) if number not in numbers)
    edit(path, change)
    return gone


# -- the command

def words_of(key: str) -> str:
    """The first 64 bits of the fingerprint as four words to say: a consonant and a vowel in turn, 16 bits a word.

    Source: D. S. Wilkerson, "A Proposal for Proquints: Identifiers that are Readable, Spellable, and Pronounceable".
    """
    digest = hashlib.sha256(bytes.fromhex(key)).digest()
    numbers = [int.from_bytes(digest[at:at + 2], "big") for at in (0, 2, 4, 6)]
    return "-".join("".join(letters[number >> shift & len(letters) - 1] for letters, shift in
                            (("bdfghjklmnprstvz", 12), ("aiou", 10), ("bdfghjklmnprstvz", 6), ("aiou", 4),
                             ("bdfghjklmnprstvz", 0))) for number in numbers)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(
        "Keys for kernels that are reached from other machines: docs/security.md, \"Keys and rights\"."))
    config.add_arguments(parser)
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name: str, function: Callable, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=function)
        return made

    new = command("new", run_new, "make a key pair, and print the line to hand over")
    new.add_argument("--host", action="store_true", help="the pair of this machine's listening kernels; else yours")
    new.add_argument("--name", help="what the other side shall call it; by default user@machine")
    add = command("authorize", run_authorize, "let somebody in: the line that their `new` has printed")
    add.add_argument("line", nargs="+", metavar="LINE", help='"run 5d20... alice"')
    for right in RIGHTS:
        add.add_argument(f"--{right}", dest="right", action="store_const", const=right, help=f"the right {right!r}")
    add.add_argument("--from", dest="sources", metavar="NETWORK,...", help="only from there: 10.0.0.0/8,fd00::/8")
    add.add_argument("--expires", metavar="DATE", help="the last day: 2027-01-31")
    command("list", run_list, "who may come")
    command("revoke", run_revoke, "withdraw access").add_argument("who", help="a name, a key or a fingerprint")
    show = command("show", run_show, "print again what `new` has printed")
    show.add_argument("--host", metavar="HOST", help="only our kernels' address, with this name of the machine")
    of = command("fingerprint", run_fingerprint, "what to compare over the phone")
    of.add_argument("key", nargs="?", help="a key, a line with one, or a key file; by default ours")
    command("forget", run_forget, "trust a kernel no longer").add_argument("who", help="its host, host:port or name")
    return parser


def run_new(chosen: argparse.Namespace, settings: config.Settings) -> None:
    name = chosen.name
    if name is None:
        name = f"{user_name()}@{socket.gethostname()}"[:64]
    if _key_of(f"run {'0' * 64} {name}", "--name").name != name:     # what the other side could not read helps nobody
        raise ConnectionFileError(f"--name {name!a}: expected one word without '#'")
    if chosen.host:
        print(_address(new_pair(settings["auth.host_key"], name), settings, socket.gethostname()))
    else:
        print(_line(new_pair(settings["auth.client_key"], name)))


def _address(pair: KeyPair, settings: config.Settings, host: str) -> str:
    return f"twoproc://{f'[{host}]' if ':' in host else host}:{settings['network.port_base']}/{pair.public}"


def _line(pair: KeyPair) -> str:
    return f"run {pair.public} {pair.name}"


def _key_of(line: str, what: str) -> Key:
    try:
        key = parse_line(line)
    except KeyLineError as error:
        raise ConnectionFileError(f"{what}: {error}") from error
    if key is None:
        raise ConnectionFileError(f"{what}: there is nothing in it; expected a line like: run 5d20... alice")
    return key


def run_authorize(chosen: argparse.Namespace, settings: config.Settings) -> None:
    line = " ".join(chosen.line)
    if chosen.sources:
        line += f" from={chosen.sources}"
    if chosen.expires:
        line += f" expires={chosen.expires}"
    if chosen.right and line.split()[0] not in RIGHTS:
        line = f"{chosen.right} {line}"
    key = _key_of(line, "authorize")
    key = key._replace(rights=chosen.right or key.rights)
    if key.expires and key.expires < date.today():
        raise ConnectionFileError(f"authorize: {key.expires} is over; give a later day")
    authorize(settings["auth.authorized_keys"], key)
    print(f"{key.name} has the right {key.rights!r} now. The fingerprint is")
    print(f"{fingerprint(key.key)}  {words_of(key.key)}")


def run_list(chosen: argparse.Namespace, settings: config.Settings) -> None:
    path = settings["auth.authorized_keys"]
    try:
        keys, faults = parse_keys(read_trusted(path))
    except FileNotFoundError:
        keys, faults = [], []
    rows = [(key.rights, key.name, fingerprint(key.key), ",".join(map(str, key.sources)) or "anywhere",
             f"{key.expires}{' (EXPIRED)' * (key.expires < date.today())}" if key.expires else "never") for key in keys]
    rows.insert(0, ("right", "name", "fingerprint", "from", "expires"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows if keys else []:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
    if not keys:
        print(f"nobody may come: {path} has no keys")
    for fault in faults:
        print(f"{path}, {fault}; ignored", file=sys.stderr)


def run_revoke(chosen: argparse.Namespace, settings: config.Settings) -> None:
    for key in revoke(settings["auth.authorized_keys"], chosen.who):
        print(f"withdrawn: {key.rights} {key.name} {fingerprint(key.key)}")


def run_show(chosen: argparse.Namespace, settings: config.Settings) -> None:
    found = _our_pairs(settings)
    if chosen.host and "host_key" not in found:
        raise ConnectionFileError(f"{settings['auth.host_key']}: there is no key; make one: {COMMAND} new --host", 5)
    if "host_key" in found:
        print(_address(found["host_key"], settings, chosen.host or socket.gethostname()))
    if "client_key" in found and not chosen.host:
        print(_line(found["client_key"]))


def _our_pairs(settings: config.Settings) -> dict[str, KeyPair]:
    found = {}
    for name in ("host_key", "client_key"):
        with contextlib.suppress(FileNotFoundError):
            found[name] = load_pair(settings[f"auth.{name}"])
    if not found:
        raise ConnectionFileError(f"there is no key yet; make one: {COMMAND} new, or for a machine whose kernels shall "
                                  f"be reached from others: {COMMAND} new --host", 5)
    return found


def run_fingerprint(chosen: argparse.Namespace, settings: config.Settings) -> None:
    if chosen.key is None:
        shown = [(pair.public, pair.name) for pair in _our_pairs(settings).values()]
    elif found := re.search(r"(?:^|[\s/])([0-9a-fA-F]{64})(?:\s|$)", chosen.key):
        shown = [(found[1].lower(), "")]
    else:
        try:
            shown = [load_pair(os.path.abspath(chosen.key))[::2]]
        except FileNotFoundError as error:
            raise ConnectionFileError(f"{chosen.key[:80]!a}: is neither a key of 64 hexadecimal digits nor a key "
                                      f"file") from error
    for key, name in shown:
        print(f"{fingerprint(key)}  {words_of(key)}  {name}".rstrip())


def run_forget(chosen: argparse.Namespace, settings: config.Settings) -> None:
    for entry in forget(settings["auth.known_kernels"], chosen.who):
        print(f"forgotten: {entry.address} {entry.name} {fingerprint(entry.key)}")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    chosen = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        settings = config.load(chosen)
        if chosen.show_config:
            print(settings.show())
        elif chosen.command is None:
            parser.error("what? new, authorize, list, revoke, show, fingerprint or forget")
        else:
            chosen.command(chosen, settings)
        sys.stdout.flush()
    except OSError as error:        # of the output, by `| head` for one; the interpreter shall not find out once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 128 + 13
        print(f"twoproc.keys: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except (ConnectionFileError, config.ConfigError) as error:
        print(f"twoproc.keys: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    leave_current_folder()
    sys.exit(main())
