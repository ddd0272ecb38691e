# Distributed under the terms of the BSD 3-Clause License.
"""What became of the cells that clients sent, for a client whose connection was cut and that comes back.

Such a client has a new routing identity, and does not know which of its requests and replies were lost on the way.
It asks with twoproc_resume_request; what is remembered here decides what it hears (docs/protocol.md), and where
replies and questions to it go from now on.

No thread: twoproc-io notes and looks up, main and it note replies, by single operations on a dict or under a lock.
"""
from __future__ import annotations

import re
import sys
import threading
from collections import deque
from typing import Any

from .session import BadMessage, Message

MAX_CELLS = 2000                # remembered; of these
MAX_REPLIES = 200               # with their reply, together at most
MAX_BYTES = 4 << 20


class Cell:
    """One cell: who sent it, where its replies go, and its reply once it has ended."""

    def __init__(self, message: Message):
        self.header_bytes = message.header_bytes
        self.identities = message.identities
        self.is_done = False
        self.reply: bytes | None = None         # the content; None: not yet, or no longer kept


def _name(message: Message, msg_id: str) -> tuple:
    """A msg_id stands on iopub for all to see: it names a cell only together with the key and session it came from."""
    return message.user, message.header.get("session"), msg_id


def _number(msg_id: Any) -> int:
    """Clients number their messages, behind a `_`: what is newer than what was forgotten was not forgotten."""
    digits = str(msg_id).rpartition("_")[2]
    return int(digits) if re.fullmatch("[0-9]{1,15}", digits) else sys.maxsize


class Replies:
    """The latest cells."""

    def __init__(self) -> None:
        self._cells: dict[tuple, Cell] = {}
        self._forgotten: dict[tuple, int] = {}      # user and session -> number of the newest cell that is not here now
        self._is_whole = True           # that much is known of all sessions
        self._unknown: dict[tuple, list[bytes]] = {}    # cells that never came -> the identities of who was told so
        self._kept: deque[Cell] = deque()       # with a reply, oldest first
        self._kept_bytes = 0
        self._keeping = threading.Lock()        # main and twoproc-io both reply

    # -- run by twoproc-io
    def note_request(self, message: Message) -> None:
        """Raises BadMessage for one that was said to be unknown: the network still had it, of a connection before."""
        if self._unknown.pop(_name(message, message.msg_id), message.identities) != message.identities:
            raise BadMessage("execute_request: it comes behind the word that it did not run, and does not", message)
        self._cells[_name(message, message.msg_id)] = Cell(message)
        if len(self._cells) > MAX_CELLS:
            user, session, msg_id = oldest = next(iter(self._cells))
            del self._cells[oldest]
            self._forgotten[user, session] = max(_number(msg_id), self._forgotten.pop((user, session), 0))
            if len(self._forgotten) > MAX_CELLS:
                del self._forgotten[next(iter(self._forgotten))]
                self._is_whole = False

    def resume(self, asker: Message, msg_ids: list) -> tuple[list[str], list[str], list[Cell]]:
        """Send to this client from now on what its cells have to say.

        Returns the msg_ids that surely were never here, those that may have been and of which there is no reply, and
        the cells with a reply.
        """
        unknown: list[str] = []
        forgotten: list[str] = []
        ended: list[Cell] = []
        newest = self._forgotten.get((asker.user, asker.header.get("session")), -1 if self._is_whole else sys.maxsize)
        for msg_id in msg_ids:
            cell = self._cells.get(_name(asker, str(msg_id)))
            if cell is None:
                (unknown if newest < 0 or newest < _number(msg_id) < sys.maxsize else forgotten).append(msg_id)
                if type(msg_id) is str and len(msg_id) <= 256:      # no cell's is longer
                    self._unknown[_name(asker, msg_id)] = asker.identities
                if len(self._unknown) > MAX_CELLS:
                    del self._unknown[next(iter(self._unknown))]
                continue
            cell.identities = asker.identities      # first: what main sends after this look goes there
            if cell.reply is not None:
                ended.append(cell)
            elif cell.is_done:
                forgotten.append(msg_id)
        return unknown, forgotten, ended

    # -- run by any thread
    def note_reply(self, message: Message, content: bytes) -> None:
        """Before it is sent: see `resume`."""
        cell = self._cells.get(_name(message, message.msg_id))
        if cell is None or cell.is_done:
            return
        cell.reply, cell.is_done = content, True
        with self._keeping:
            self._kept.append(cell)
            self._kept_bytes += len(content)
            while len(self._kept) > MAX_REPLIES or self._kept_bytes > MAX_BYTES:
                oldest = self._kept.popleft()
                self._kept_bytes -= len(oldest.reply or b"")
                oldest.reply = None

    def route(self, message: Message) -> list[bytes]:
        """The identities of the client that sent this cell, as they are now."""
        cell = self._cells.get(_name(message, message.msg_id))
        return message.identities if cell is None else cell.identities
