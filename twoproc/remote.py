# Distributed under the terms of the BSD 3-Clause License.
"""The way to a kernel on another machine: its address, whether its key is the right one, and what to say first.

    twoproc://lab:20555/9f3c...     what `python -m twoproc.keys show` prints over there: host, port, the kernel's key
    lab                             afterwards: it is in known_kernels

`reach` makes a ConnectionInfo of it, in this order.  The key in the address is compared with the one that is known;
nothing is sent to a kernel whose key has changed.  Then hello: on the control socket, by CURVE, with the user's own
key; the kernel answers with its key for signatures, so that no file has to be copied.  Then the kernel is remembered.

Nothing is ever asked: who gives an address with a key trusts that key, and who has none gets none from the network.
Every failure is one line: a ConnectionFileError where files or keys are wrong, with the exit code to end with, and
a NotReady where the other end is, with the cause.
"""
from __future__ import annotations

import json
import re
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from . import clientchannels, keys
from .client import CONNECT_SECONDS, NotReady, knock
from .connection import CHANNELS, SIGNATURE_SCHEMES, ConnectionFileError, ConnectionInfo, fingerprint, z85_of

if TYPE_CHECKING:
    from .config import Settings

SCHEME = "twoproc://"
UNKNOWN = 6             # the exit code where a kernel's key is not known, or not the one that is known
NO_KEY = 5              # and where ours is missing, or not authorised
HELLO_SECONDS = 5.0     # for all that `reach` does


class Address(NamedTuple):
    """host: without the brackets of IPv6.  port: of shell, the first of five.  key: 64 hexadecimal digits."""
    host: str
    port: int
    key: str

    def __str__(self) -> str:
        return "%s:%d" % ("[%s]" % self.host if ":" in self.host else self.host, self.port)


def parse(text: str, default_port: int = 20555) -> Address:
    """twoproc://HOST[:PORT]/KEY; an IPv6 host stands in brackets.  Raises ConnectionFileError, exit code 2."""
    def wrong(fault: str) -> ConnectionFileError:
        return ConnectionFileError("address %.100s: %s; expected twoproc://HOST:PORT/KEY, as `%s show` prints it on "
                                   "the kernel's machine" % (ascii(text), fault, keys.COMMAND))

    found = re.fullmatch(r"twoproc://(\[[^][/]*\]|[^][/:]*)(?::([^/:]*))?(?:/(.*))?", text.strip(), re.S)
    if found is None:
        raise wrong("not understood; does an IPv6 address stand in brackets?")
    host, port, key = found[1], found[2], (found[3] or "").strip("/").lower()
    if host.startswith("["):
        host = host[1:-1]
        try:
            socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        except OSError:
            raise wrong("%s is no IPv6 address" % host) from None
    if not re.fullmatch(r"[\w.:%-]+", host):
        raise wrong("no host" if not host else "no host can be called %s" % ascii(host))
    if port is not None and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) <= 65535 - len(CHANNELS) + 1):
        raise wrong("port %s, expected a number from 1 to 65531" % (port or "missing"))
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise wrong("no key behind the port" if not key else "the key has %d characters, expected 64 hexadecimal "
                    "digits" % len(key))
    return Address(host.lower(), int(port or default_port), key)


def find(target: str, settings: Settings) -> tuple[Address, str]:
    """The address that the user means, and its short name; exit code 6 where no key, or another key, is known."""
    path = settings["auth.known_kernels"]
    entries = keys.known(path)
    if target.startswith(SCHEME):
        address = parse(target, settings["network.port_base"])
        for entry in entries:
            if entry.address == str(address):
                if entry.key != address.key:
                    raise ConnectionFileError(
                        "the kernel at %s has the key %s by this address, known is %s (%s, line %d); nothing was sent. "
                        "Either it has a new key, or the address is wrong. Ask its owner; then: %s forget %s" % (
                            address, fingerprint(address.key), fingerprint(entry.key), path, entry.line, keys.COMMAND,
                            address), UNKNOWN)
                return address, entry.name
        names = {entry.name for entry in entries}
        return address, str(address) if address.host in names or ":" in address.host else address.host
    for is_meant in (lambda entry: entry.name == target, lambda entry: entry.address == target,
                     lambda entry: entry.address.rpartition(":")[0].strip("[]") == target):
        found = [entry for entry in entries if is_meant(entry)]
        if len({entry.address for entry in found}) > 1:
            raise ConnectionFileError("kernel %.60r: several are called so; give one of: %s" % (
                target, ", ".join(entry.address for entry in found)))
        if found:
            host, _, port = found[0].address.rpartition(":")
            return Address(host.strip("[]"), int(port), found[0].key), found[0].name
    there = ", ".join(entry.name for entry in entries[:10]) or "none"
    raise ConnectionFileError(
        "kernel %.60r is not known; known are: %s. For the first time give its whole address, which `%s show` prints "
        "on its machine" % (target, there, keys.COMMAND), UNKNOWN)


def reach(target: str, settings: Settings, timeout: float = HELLO_SECONDS) -> ConnectionInfo:
    """What a Client connects to.  Raises ConnectionFileError or NotReady, within `timeout` seconds.

    `extra` of the result: twoproc_remote true, twoproc_address host:port, twoproc_name what it is called here,
    twoproc_rights and twoproc_user what the kernel says that we may do, and who we are, there.
    """
    deadline = time.monotonic() + timeout
    address, name = find(target, settings)
    path = settings["auth.client_key"]
    try:
        pair = keys.load_pair(path)
    except FileNotFoundError:
        raise ConnectionFileError("%s: you have no key yet to show to %s; make one: %s new" % (
            path, address, keys.COMMAND), NO_KEY) from None
    ports: dict[str, Any] = {channel + "_port": address.port + at for at, channel in enumerate(CHANNELS)}
    info = ConnectionInfo(
        "tcp", _look_up(address, deadline), **ports, key=b"", curve_publickey=z85_of(address.key),
        client_publickey=z85_of(pair.public), client_secretkey=z85_of(pair.secret),
        extra={"twoproc_remote": True, "twoproc_address": str(address), "twoproc_name": name})
    mechanism = knock(info, "control")
    if isinstance(mechanism, NotReady):
        raise _full(address) if _is_full(info) else mechanism
    answer, event = clientchannels.hello(info.url("control"), z85_of(address.key), (
        z85_of(pair.public), z85_of(pair.secret)), max(0.1, deadline - time.monotonic()))
    if answer is None:
        raise _full(address) if event == "rejected" and _is_full(info) else _why(address, event, mechanism, pair)
    info = _understand(answer, info, address)
    keys.remember(settings["auth.known_kernels"], str(address), address.key, name)
    return info


def _look_up(address: Address, deadline: float) -> str:
    """The address in numbers: of several, one that answers.  ZeroMQ would take the first of one family."""
    port = address.port + CHANNELS.index("control")
    where = "%s, port %d (control)" % (address.host, port)
    last: OSError | None = None
    try:
        for family, kind, number, _, place in socket.getaddrinfo(address.host, port, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, kind, number) as sock:
                    sock.settimeout(max(0.1, min(CONNECT_SECONDS, deadline - time.monotonic())))
                    sock.connect(place)
                    return sock.getpeername()[0]
            except OSError as error:
                last = error
    except (socket.gaierror, UnicodeError) as error:
        raise NotReady("refused", "no machine is called %s (%s)" % (
            address.host, getattr(error, "strerror", None) or error)) from None
    if isinstance(last, ConnectionRefusedError):
        raise NotReady("refused", "nothing listens at %s: is the kernel running, and was it started with "
                                  "--listen?" % where) from None
    raise NotReady("blocked", "no answer from %s (%s): the machine is off, or a firewall or the network between us "
                              "keeps that port shut" % (where, getattr(last, "strerror", None) or "timed out"))


def _is_full(info: ConnectionInfo) -> bool:
    """A kernel with as many connections as it takes cuts one more at once; others wait for what we have to say."""
    try:
        with socket.create_connection((info.ip, info.port("control")), 0.5) as sock:
            sock.settimeout(0.5)
            while sock.recv(64):
                pass
    except TimeoutError:
        return False
    except OSError as error:
        return not isinstance(error, ConnectionRefusedError)
    return True


def _full(address: Address) -> NotReady:
    return NotReady("busy", "what listens at %s cuts every connection at once: a kernel that has as many as it takes "
                            "(network.max_connections), or no kernel" % (address,))


def _why(address: Address, event: str, mechanism: str | None, pair: keys.KeyPair) -> NotReady:
    """Why nobody answered hello."""
    if event == "unauthorised":
        return NotReady("unauthorised", "the kernel at %s does not let in your key %s; have its owner run: %s "
                        "authorize \"run %s %s\"" % (address, fingerprint(pair.public), keys.COMMAND, pair.public,
                                                     pair.name), NO_KEY)
    if event == "connected":
        return NotReady("hello", "the kernel at %s let us in and did not answer: it is stopped, or no twoproc that "
                                 "listens" % (address,))
    if mechanism is None:
        return NotReady("busy", "something listens at %s and says nothing: the kernel's process is stopped, or its "
                                "machine is overloaded" % (address,))
    return NotReady("key", "the kernel at %s does not have the key %s of this address; ask for its address anew" % (
        address, fingerprint(address.key)), UNKNOWN)


def _understand(answer: bytes, info: ConnectionInfo, address: Address) -> ConnectionInfo:
    """The kernel's answer to hello.  It has proved its key, and is believed no more than it must be."""
    try:
        said: Any = json.loads(answer[:100_000])
        if said == {}:
            raise NotReady("unauthorised", "the kernel at %s does not let in your key any more" % (address,), NO_KEY)
        key, scheme = said["key"], said["signature_scheme"]
        if not key.isascii() or not key or scheme not in SIGNATURE_SCHEMES:
            raise ValueError
        rights, user, kernel_name = ("".join(filter(str.isprintable, str(said.get(name) or "")[:100]))
                                     for name in ("rights", "user", "kernel_name"))      # they are shown at a terminal
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise NotReady("hello", "the kernel at %s answers in words that this version does not understand: is it of "
                                "another version?" % (address,)) from None
    return info._replace(key=key.encode("ascii"), signature_scheme=scheme, kernel_name=kernel_name,
                         extra={**info.extra, "twoproc_rights": rights, "twoproc_user": user})
