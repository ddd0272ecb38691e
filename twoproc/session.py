# Distributed under the terms of the BSD 3-Clause License.
"""Messages as frames: what may be said between kernel and client, and how it is written and signed.

A message is four JSON objects and some buffers.  On the wire it is routing identities, the delimiter
<IDS|MSG>, a signature, header, parent header, metadata, content, buffers.  The kernel, every client and
the tests share this one description.  Three stories, in reading order:

1. MESSAGES, the table of all message types: channel, reply, and the fields a request may carry.
2. Session: a Message to frames (`serialize`), frames to a Message (`deserialize`), nothing trusted before
   the signature is right.
3. ReplayGuard: a signed message is accepted once, however long somebody keeps a copy of it.

Nothing here opens a socket or starts a thread.  `serialize` may be called from any thread; `deserialize`
belongs to the one thread that reads the sockets.  Read channels.py next.

Source: Jupyter messaging specification 5.5, "The Wire Protocol" and the sections named after each message.
"""
from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import json
import math
import numbers
import os
import uuid
from collections import deque
from datetime import date, datetime, timezone
from typing import Any, Collection, Iterable, NamedTuple

PROTOCOL_VERSION = "5.5"
DELIMITER = b"<IDS|MSG>"
REQUIRED = object()
MAX_HEADER = 65_536         # bytes of a header, and of the parent header that repeats it
MAX_QUESTION = 4 << 20      # bytes of metadata and content, but for those that bring what is the user's:
MAX_MSG_IDS = 10_000        # that are asked about at once; a kernel remembers fewer
LARGE = {"execute_request", "comm_open", "comm_msg", "comm_close", "input_reply"}
UTC = timezone.utc


# -- 1. What may be said ---------------------------------------------------------------------------

class Field(NamedTuple):
    """One member of a request's content: its type, its default (REQUIRED: none), the values it may have."""
    kind: type
    default: Any = REQUIRED
    choices: tuple = ()


class MessageType(NamedTuple):
    channels: tuple[str, ...]
    reply: str | None = None
    fields: dict[str, Field] | None = None     # None: whatever a peer puts there


_CODE = {"code": Field(str)}
_CODE_AND_CURSOR = {**_CODE, "cursor_pos": Field(int)}
_COMM = {"comm_id": Field(str), "data": Field(dict, {})}

MESSAGES: dict[str, MessageType] = {
    # requests on shell, each answered by its reply
    "execute_request": MessageType(("shell",), "execute_reply", {
        **_CODE, "silent": Field(bool, False), "store_history": Field(bool, True),
        "user_expressions": Field(dict, {}), "allow_stdin": Field(bool, True), "stop_on_error": Field(bool, True)}),
    "complete_request": MessageType(("shell",), "complete_reply", _CODE_AND_CURSOR),
    "inspect_request": MessageType(("shell",), "inspect_reply", {
        **_CODE_AND_CURSOR, "detail_level": Field(int, 0, (0, 1))}),
    "is_complete_request": MessageType(("shell",), "is_complete_reply", _CODE),
    "history_request": MessageType(("shell",), "history_reply", {
        "hist_access_type": Field(str, REQUIRED, ("range", "tail", "search")),
        "output": Field(bool, False), "raw": Field(bool, True), "session": Field(int, 0), "start": Field(int, 1),
        "stop": Field(int, None), "n": Field(int, None), "pattern": Field(str, "*"), "unique": Field(bool, False)}),
    "comm_info_request": MessageType(("shell",), "comm_info_reply", {"target_name": Field(str, None)}),
    "connect_request": MessageType(("shell", "control"), "connect_reply", {}),
    "kernel_info_request": MessageType(("shell", "control"), "kernel_info_reply", {}),
    # requests on control; shutdown also on shell, where clients older than protocol 5.4 send it
    "interrupt_request": MessageType(("control",), "interrupt_reply", {}),
    "shutdown_request": MessageType(("control", "shell"), "shutdown_reply", {"restart": Field(bool, False)}),
    # ours: what the session log holds, the last cells or a range of numbers; see docs/protocol.md
    "twoproc_log_request": MessageType(("control",), "twoproc_log_reply", {
        "cells": Field(int, None), "from_seq": Field(int, None), "to_seq": Field(int, None),
        "max_bytes": Field(int, 1 << 20)}),
    # ours: what `--list` says of a kernel; answered without busy and idle
    "twoproc_status_request": MessageType(("control",), "twoproc_status_reply", {}),
    # ours: what became of my cells?  By a client whose connection was cut
    "twoproc_resume_request": MessageType(("shell",), "twoproc_resume_reply", {"msg_ids": Field(list)}),
    # comms: no reply, either direction
    "comm_open": MessageType(("shell", "iopub"), None, {**_COMM, "target_name": Field(str)}),
    "comm_msg": MessageType(("shell", "iopub"), None, _COMM),
    "comm_close": MessageType(("shell", "iopub"), None, _COMM),
    # the kernel asks, the client that sent the cell answers
    "input_request": MessageType(("stdin",), "input_reply"),
    "input_reply": MessageType(("stdin",), None, {"value": Field(str)}),
    # replies
    "execute_reply": MessageType(("shell",)),
    "complete_reply": MessageType(("shell",)),
    "inspect_reply": MessageType(("shell",)),
    "is_complete_reply": MessageType(("shell",)),
    "history_reply": MessageType(("shell",)),
    "comm_info_reply": MessageType(("shell",)),
    "connect_reply": MessageType(("shell", "control")),
    "kernel_info_reply": MessageType(("shell", "control")),
    "interrupt_reply": MessageType(("control",)),
    "shutdown_reply": MessageType(("control", "shell", "iopub")),
    "twoproc_log_reply": MessageType(("control",)),
    "twoproc_resume_reply": MessageType(("shell",)),
    "twoproc_status_reply": MessageType(("control",)),
    # published by the kernel to everybody
    "status": MessageType(("iopub",)),
    "execute_input": MessageType(("iopub",)),
    "stream": MessageType(("iopub",)),
    "display_data": MessageType(("iopub",)),
    "update_display_data": MessageType(("iopub",)),
    "execute_result": MessageType(("iopub",)),
    "error": MessageType(("iopub",)),
    "clear_output": MessageType(("iopub",)),
    "iopub_welcome": MessageType(("iopub",)),
}


class Message(NamedTuple):
    """One verified message.  `header_bytes` is the header as it came: a reply's parent_header, unchanged."""
    header: dict
    parent_header: dict
    metadata: dict
    content: dict
    buffers: list[bytes]
    identities: list[bytes]
    header_bytes: bytes
    user: str = ""          # the sender's key, 64 hexadecimal digits; empty: somebody of this machine, who may all

    @property
    def msg_type(self) -> str:
        return self.header["msg_type"]

    @property
    def msg_id(self) -> str:
        return self.header["msg_id"]


class MessageError(Exception):
    """Something a peer can get wrong; str() is one line for the log."""


class MalformedMessage(MessageError):
    """Frames that hold no message, or one nobody could be answered about.  The answer is silence."""


class SignatureError(MessageError):
    """The signature is wrong, or this very message was accepted before.  The answer is silence."""


class BadMessage(MessageError):
    """Signed, with a usable header, but wrong: the sender gets an error reply with this text.

    message: the Message, its content {} where that could not be read.  name: what the reply calls this error.
    """

    def __init__(self, text: str, message: Message, name: str = "BadMessage"):
        super().__init__(text)
        self.message, self.name = message, name


def check_request(message: Message, channel: str) -> dict:
    """The content of a request with every default filled in; raises BadMessage for a wrong or missing field.

    Fields that the specification does not name are kept: newer clients send more than we know.
    """
    kind = MESSAGES.get(message.msg_type)
    if kind is None or kind.fields is None:
        raise BadMessage("unknown message type %r" % message.msg_type[:60], message)
    if channel not in kind.channels:
        raise BadMessage("%s belongs on %s, not on %s" % (message.msg_type, kind.channels[0], channel), message)
    content = dict(message.content)
    for name, field in kind.fields.items():
        value: Any = content.get(name)
        if value is None:
            if field.default is REQUIRED:
                raise BadMessage("%s: content has no %r" % (message.msg_type, name), message)
            content[name] = {} if field.default == {} else field.default     # handlers may write into theirs
        elif type(value) is not field.kind or (field.choices and value not in field.choices):
            wanted = " or ".join(map(repr, field.choices)) or "a value of type " + field.kind.__name__
            raise BadMessage("%s: %s is %.60r, expected %s" % (message.msg_type, name, value, wanted), message)
        elif isinstance(value, int) and abs(value) >= 1 << 63:      # SQLite, and C behind many a function, ends there
            raise BadMessage("%s: %s has more than 64 bits" % (message.msg_type, name), message)
    cursor: Any = content.get("cursor_pos")
    if "cursor_pos" in kind.fields and not 0 <= cursor <= len(content["code"]):
        raise BadMessage("%s: cursor_pos is %d, expected 0 to %d, the length of the code"
                         % (message.msg_type, cursor, len(content["code"])), message)
    if message.msg_type == "history_request":
        _check_not_negative(message, content, "n", "stop")
    if message.msg_type == "twoproc_log_request":
        _check_not_negative(message, content, "cells", "from_seq", "to_seq", "max_bytes")
    if message.msg_type == "twoproc_resume_request" and len(content["msg_ids"]) > MAX_MSG_IDS:
        raise BadMessage("%s: %d msg_ids, expected at most %d"
                         % (message.msg_type, len(content["msg_ids"]), MAX_MSG_IDS), message)
    if message.header.get("subshell_id") is not None:
        raise BadMessage("no subshell %.60r: this kernel has none" % (message.header["subshell_id"],), message)
    return content


def _check_not_negative(message: Message, content: dict, *names: str) -> None:
    for name in names:
        if content[name] is not None and content[name] < 0:
            raise BadMessage("%s: %s is %d, expected 0 or more" % (message.msg_type, name, content[name]), message)


# -- 2. How it is written --------------------------------------------------------------------------

def _json_default(value: Any) -> Any:
    """What display and comm data may hold beside JSON's own types, as the peers write it."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError("%r of type %s cannot be written as JSON" % (value, type(value).__name__))


def _without_nan(value: Any) -> Any:
    """A copy in which NaN and the infinities, which JSON does not have, are their own names."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and (not math.isfinite(value)):
        return repr(value)
    return value


# ASCII only: a lone surrogate in somebody's output travels as an escape instead of failing to encode.
_write = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=_json_default).encode


def encode(value: dict) -> bytes:
    """One JSON object as bytes.  Raises TypeError for what JSON cannot hold, ValueError for a circular object."""
    try:
        return _write(value).encode("ascii")
    except ValueError:
        return _write(_without_nan(json.loads(json.dumps(value, default=_json_default)))).encode("ascii")


def _refuse_constant(name: str) -> None:
    raise ValueError("%s is not JSON" % name)


def seal(metadata: dict | None, buffers: Iterable) -> dict | None:
    """Metadata with the SHA-256 of each buffer: the signature covers metadata, and buffers it does not.

    Who knows nothing of it ignores it.  A list that came with another message, and was passed on, is left out.
    """
    digests = [hashlib.sha256(buffer).hexdigest() for buffer in buffers]
    if digests:
        return {**(metadata or {}), "twoproc_buffers": digests}
    if metadata and "twoproc_buffers" in metadata:
        return {name: value for name, value in metadata.items() if name != "twoproc_buffers"}
    return metadata


class Session:
    """One side of a conversation: its name, its key, and both directions of the wire format.

    key: the connection file's; empty bytes switch signing off.  signature_scheme: "hmac-" and a hashlib name.
    replay_memory: digests remembered by the kernel's side; 0, a client's choice, accepts repetition and the
    NaN that some kernels write.
    max_frames, max_message: frames and bytes of one message, identities and buffers included.
    """

    def __init__(self, key: bytes, signature_scheme: str = "hmac-sha256", *, username: str | None = None,
                 replay_memory: int = 0, max_frames: int = 64, max_message: int = 128 << 20):
        self.key = key
        self.session = uuid.uuid4().hex
        self.username = username or user_name()
        self._digest = signature_scheme.partition("-")[2]
        self._digest_length = 2 * hashlib.new(self._digest).digest_size
        # Without a key anybody may write anything, again too; there is nothing to guard.
        self._guard = ReplayGuard(replay_memory) if replay_memory and key else None
        self._guards: dict[str, ReplayGuard] = {}       # of those who come with a key of their own
        self._is_kernel = bool(replay_memory)
        self._read = json.JSONDecoder(parse_constant=_refuse_constant if replay_memory else None).decode
        self._max_frames, self._max_message = max_frames, max_message
        self._count = itertools.count(1)
        # The latest parent header, as bytes and decoded: a client's neighbours on iopub mostly have the same.
        self._parent: tuple[bytes, dict] = b"{}", {}
        # The parts of a header that never change are written once: a header then costs one format operation.
        self._head = '{"msg_id":"%s_%%d","session":"%s","username":%s,"date":"%%s","msg_type":"%%s","version":"%s"}' % (
            self.session, self.session, _write(self.username).replace("%", "%%"), PROTOCOL_VERSION)

    def header(self, msg_type: str) -> bytes:
        return (self._head % (next(self._count), datetime.now(UTC).isoformat(), msg_type)).encode("ascii")

    def sign(self, frames: list) -> bytes:
        if not self.key:
            return b""
        if len(frames[-1]) < 100_000:
            return hmac.digest(self.key, b"".join(frames), self._digest).hex().encode("ascii")
        signature = hmac.new(self.key, digestmod=self._digest)     # joining megabytes would copy them
        for frame in frames:
            signature.update(frame)
        return signature.hexdigest().encode("ascii")

    def serialize(self, msg_type: str, content: dict | bytes, parent: bytes = b"{}", metadata: dict | bytes = b"{}",
                  buffers: Iterable = (), header: bytes | None = None) -> list:
        """The frames of one message from the delimiter on; the caller puts identities or a topic before them.

        content, metadata: an object, or one already encoded.  parent: the header_bytes of the message answered.
        """
        frames = [header or self.header(msg_type), parent,
                  metadata if isinstance(metadata, bytes) else encode(metadata),
                  content if isinstance(content, bytes) else encode(content)]
        return [DELIMITER, self.sign(frames), *frames, *buffers]

    def deserialize(self, frames: list[bytes], may_run: bool = True, user: str = "") -> Message:
        """Verify and decode one message; frames as received, routing identities or topic first.

        may_run: the sender may have code run, and messages of his as large as that needs.
        user: his key. What he says, in whose name and of what date, shuts nobody out but himself.
        Raises SignatureError, MalformedMessage (both: stay silent) or BadMessage (answer with an error).
        Cheap checks come first, and nothing is parsed or remembered before the signature is right.
        """
        if len(frames) > self._max_frames:
            raise MalformedMessage("%d frames, expected at most %d" % (len(frames), self._max_frames))
        size = sum(map(len, frames))
        if size > self._max_message:
            raise MalformedMessage("%d bytes, expected at most %d" % (size, self._max_message))
        try:
            at = frames.index(DELIMITER, 0, 4)
        except ValueError:
            raise MalformedMessage("no %s within the first 4 frames" % DELIMITER.decode()) from None
        signed = frames[at + 2:at + 6]
        if len(signed) < 4:
            raise MalformedMessage("%d frames after the delimiter, expected 5 or more" % (len(frames) - at - 1))
        guard = self._guard
        if user and guard is not None:
            guard = self._guards.get(user) or self._guards.setdefault(user, ReplayGuard(guard.size))
        if self.key:
            self._verify(frames[at + 1], signed, guard)
        return self._decode(signed, frames[at + 6:], frames[:at], LARGE if may_run else (), guard)

    def _verify(self, signature: bytes, signed: list[bytes], guard: ReplayGuard | None) -> None:
        if len(signature) != self._digest_length or signature.translate(None, b"0123456789abcdef"):
            raise SignatureError("no signature" if not signature else
                                 "the signature is not %d lower-case hexadecimal digits" % self._digest_length)
        if not hmac.compare_digest(self.sign(signed), signature):
            raise SignatureError("wrong signature: the sender has another key")
        if guard is not None and guard.has(signature):
            raise SignatureError("this message was received before")

    def _decode(self, signed: list[bytes], buffers: list[bytes], identities: list[bytes],
                large: Collection[str], guard: ReplayGuard | None) -> Message:
        header_bytes = signed[0]
        # First: as objects 60 MB are more than 1 GB. And busy and idle repeat it to everybody, whoever sent it.
        limit = MAX_HEADER if large else MAX_HEADER >> 4
        if len(header_bytes) > limit:
            raise MalformedMessage("the header has %d bytes, expected at most %d" % (len(header_bytes), limit))
        header = self._object(header_bytes, "header")
        msg_id, msg_type, session = header.get("msg_id"), header.get("msg_type"), header.get("session")
        if type(msg_id) is not str or not 0 < len(msg_id) <= 256:
            raise MalformedMessage("the header has no msg_id of 1 to 256 characters")
        if guard is not None and not guard.accept(session, header.get("date")):
            raise SignatureError("older than what is remembered of session %.60r" % (session,))
        message = Message(header, {}, {}, {}, buffers, identities, header_bytes)
        has_session = type(session) is str and len(session) <= 256
        if not has_session:
            header["session"] = ""      # who answers may look it up in a dict, where a list is an error
        if type(msg_type) is not str or len(msg_type) > 256:
            header["msg_type"] = ""
            raise BadMessage("the header's msg_type is %.60r, expected a string" % (msg_type,), message)
        if not has_session:
            raise BadMessage("the header's session is %.60r, expected a string" % (session,), message)
        version = header.get("version", PROTOCOL_VERSION)
        if type(version) is not str or version.partition(".")[0] != PROTOCOL_VERSION.partition(".")[0]:
            raise BadMessage("protocol version %.60r, expected %s" % (version, PROTOCOL_VERSION), message)
        if self._is_kernel and msg_type not in large and len(signed[2]) + len(signed[3]) > MAX_QUESTION:
            # As objects 60 MB of [[],[],[] would be 1.3 GB, and a key that may only look can send them.
            raise BadMessage("%s: metadata and content have %d bytes, expected at most %d"
                             % (msg_type, len(signed[2]) + len(signed[3]), MAX_QUESTION), message)
        try:
            if signed[1] != self._parent[0]:
                if len(signed[1]) > MAX_HEADER:     # it is kept, and repeated in what answers it
                    raise MalformedMessage("parent_header has %d bytes, expected at most %d"
                                           % (len(signed[1]), MAX_HEADER))
                self._parent = signed[1], self._object(signed[1], "parent_header")
            metadata = {} if signed[2] == b"{}" else self._object(signed[2], "metadata")
            content = {} if signed[3] == b"{}" else self._object(signed[3], "content")
        except MalformedMessage as error:
            raise BadMessage("%s: %s" % (msg_type, error), message) from None
        if "twoproc_buffers" in metadata and seal({}, buffers) != {"twoproc_buffers": metadata["twoproc_buffers"]}:
            raise BadMessage("%s: its %d buffers are not those that metadata.twoproc_buffers was written for"
                             % (msg_type, len(buffers)), message)
        return Message(header, dict(self._parent[1]), metadata, content, buffers, identities, header_bytes)

    def _object(self, frame: bytes, name: str) -> dict:
        try:
            value = self._read(str(frame, "utf-8"))
        except RecursionError:
            raise MalformedMessage("%s is nested too deeply" % name) from None
        except ValueError as error:     # bad UTF-8, not JSON, NaN, an integer of thousands of digits
            raise MalformedMessage("%s is not JSON (%s)" % (name, str(error)[:80])) from None
        if type(value) is not dict:
            raise MalformedMessage("%s is %.60r, expected an object" % (name, value))
        return value


# -- 3. Once only ----------------------------------------------------------------------------------

class ReplayGuard:
    """Remembers the signatures of accepted messages, so that a captured one is not obeyed again.

    Two rules make it tight with bounded memory.  Only verified signatures enter, so a stranger's junk cannot
    push anything out.  And when one falls out, its date becomes the low-water mark of its session: what that
    session dated at or before the mark is refused from then on.  Dates are compared within one session only,
    that is by one clock, so a client whose clock is wrong is served like any other.

    Memory: `size` entries of about 250 bytes, and the marks of at most 10,000 sessions; when those overflow,
    the oldest marks merge into one that holds for every session not known by name.  Sessions are known by their
    hash, which costs the same however long a peer makes the name; two that had the same would share a mark.
    """

    SESSIONS = 10_000

    def __init__(self, size: int):
        self.size = size
        self._seen: set[bytes] = set()
        self._order: deque[tuple[bytes, int, float]] = deque()      # (digest, session, date), oldest first
        self._marks: dict[int, float] = {}      # session -> the newest date forgotten
        self._merged: float | None = None
        self._candidate = b""

    def has(self, signature: bytes) -> bool:
        """Was this verified signature accepted before?  Remembers it as the one `accept` decides about next."""
        self._candidate = bytes.fromhex(signature[:32].decode("ascii"))     # 128 bits of a MAC are plenty
        return self._candidate in self._seen

    def accept(self, name: Any, date: Any) -> bool:
        """False when the message is not newer than what was forgotten of its session; else it is remembered."""
        session = hash(name) if type(name) is str else 0
        when = timestamp(date)
        mark = self._marks.get(session, self._merged)
        if mark is not None and when <= mark:
            return False
        self._seen.add(self._candidate)
        self._order.append((self._candidate, session, when))
        if len(self._order) > self.size:
            self._forget()
        return True

    def _forget(self) -> None:
        digest, session, when = self._order.popleft()
        self._seen.discard(digest)
        # A session whose mark was merged goes on from there: what it says next may be dated earlier, or not at all.
        mark = self._marks.pop(session, self._merged)
        self._marks[session] = when if mark is None else max(when, mark)
        if len(self._marks) > self.SESSIONS:
            oldest = self._marks.pop(next(iter(self._marks)))
            self._merged = oldest if self._merged is None else max(self._merged, oldest)


def user_name() -> str:
    """Who we are, as others see us."""
    try:
        if name := os.environ.get("USER") or os.environ.get("USERNAME"):
            return name
        import getpass      # and termios with it
        return getpass.getuser()
    except (OSError, KeyError, ImportError):        # a number without a name, as in some containers
        return "user"


def timestamp(date: Any) -> float:
    """Seconds since the epoch, or minus infinity for what is not a date: older than any mark."""
    try:
        return datetime.fromisoformat(date.replace("Z", "+00:00")).timestamp()
    except (AttributeError, TypeError, ValueError, OverflowError):
        return -math.inf
