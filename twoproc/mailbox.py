# Distributed under the terms of the BSD 3-Clause License.
"""How another thread speaks to a thread that waits in poll(): a Mailbox, a deque and a bell.

Both sides use it: everything that crosses to `twoproc-io` in a kernel, or to the `twoproc-client` of a client,
lies in one.  And `own_thread`, by which every thread of ours begins.
"""
from __future__ import annotations

import queue
import signal
import socket
import threading
import time
from collections import deque
from typing import Any, Callable, Iterable, Iterator

import zmq


def own_thread(name: str, target: Callable[[], None]) -> threading.Thread:
    """A daemon thread of ours: named, and deaf to SIGINT, so that Ctrl-C always lands in the main thread.

    A signal sent to the process goes to any thread that does not block it, and would then not wake the
    main thread out of a system call.
    """
    def run() -> None:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        target()
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


class Mailbox:
    """A queue whose reader may wait in poll(), select() or an event loop: `fileno` becomes readable.

    Any thread puts; one thread takes.  One byte on a socket pair rings the bell, at most one byte at a time.
    Lost wake-ups are excluded by order: the writer appends before it rings, and the reader silences the bell
    before it looks.  Ctrl-C cannot fall between `_rung = True` and the send: the interpreter looks for signals
    after calls and at jumps, and there is neither between the two.
    """

    def __init__(self) -> None:
        self._items: deque = deque()
        self.append = self._items.append    # put without a ring: found when the reader wakes for another reason
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._send = self._writer.send
        self._rung = False

    # -- called by any thread
    def put(self, item: Any) -> None:
        self._items.append(item)
        self.ring()

    def ring(self) -> None:
        """Wake the reader."""
        if not self._rung:
            send = self._send
            self._rung = True
            send(b"\0")

    def __len__(self) -> int:
        return len(self._items)

    # -- called by the reader only
    def fileno(self) -> int:
        return self._reader.fileno()

    def silence(self) -> None:
        """Take the bell's byte; to be called before looking for items, never after."""
        try:
            self._reader.recv(16)
        except BlockingIOError:
            pass
        self._rung = False

    def pop(self) -> Any:
        """The oldest item, without waiting; raises queue.Empty."""
        try:
            return self._items.popleft()
        except IndexError:
            raise queue.Empty from None

    def get(self, timeout: float | None = None) -> Any:
        """The oldest item; waits up to `timeout` seconds (None: for ever) and then raises queue.Empty."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._items:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise queue.Empty
            # poll(), not select(): a process with more than 1024 descriptors waits too.
            zmq.zmq_poll([(self._reader, zmq.POLLIN)], -1 if left is None else max(1, int(left * 1000)))
            self.silence()
        return self._items.popleft()

    def put_back(self, items: Iterable) -> None:
        """Put items in front of all others, in their order."""
        self._items.extendleft(reversed(list(items)))

    def take(self, is_wanted: Callable[[Any], bool]) -> Iterator:
        """The items that are wanted, in order, each removed as it is asked for: Ctrl-C may strike in between."""
        for item in list(self._items):
            if is_wanted(item):
                try:
                    self._items.remove(item)
                except ValueError:      # taken by whoever got the one before
                    continue
                yield item

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
