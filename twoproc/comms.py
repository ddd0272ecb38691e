# Distributed under the terms of the BSD 3-Clause License.
"""Comms: what widgets talk through.

Libraries reach them by the small `comm` package.  It says what a comm is and leaves open where its messages go:
here, to `publish`.  Errors of callbacks, which the package logs, go to the caller here, who shows them to the user.
Where the package is not installed no library opens comms, and a frontend that opens one is told that nobody is here.

Called by shell.py in the main thread; any thread may send.
"""
from __future__ import annotations

from collections.abc import Callable

try:
    import comm
    from comm.base_comm import BaseComm, CommManager as BaseManager
except ImportError:
    comm, BaseComm, BaseManager = None, object, object


class Comm(BaseComm):
    """One end of a comm; comm.create_comm makes these."""

    def __init__(self, *args, manager: CommManager, **keys):
        self._manager = manager
        super().__init__(*args, **keys)

    def publish_msg(self, msg_type, data=None, metadata=None, buffers=None, **fields) -> None:
        content = {"data": {} if data is None else data, "comm_id": self.comm_id, **fields}
        self._manager.publish(msg_type, content, metadata=metadata or {}, buffers=list(buffers or ()))


class CommManager(BaseManager):
    """All open comms, and the targets that a frontend may open one to; comm.get_comm_manager gives it."""

    def __init__(self, publish: Callable):
        super().__init__()
        self.publish = publish
        self.comms: dict[str, Comm] = {}
        self.targets: dict[str, Callable] = {}
        if comm is not None:
            comm.create_comm = lambda *args, **keys: Comm(*args, manager=self, **keys)
            comm.get_comm_manager = lambda: self

    # -- messages from a frontend; stream and ident are part of the package's interface, and unused

    def comm_open(self, stream, ident, msg) -> None:
        content = msg["content"]
        target = self.targets.get(content["target_name"])
        if target is None:
            self.publish("comm_close", {"comm_id": content["comm_id"], "data": {}})
            return
        opened = Comm(target_name=content["target_name"], comm_id=content["comm_id"], primary=False, manager=self)
        self.register_comm(opened)
        try:
            target(opened, msg)
        except BaseException:
            opened.close()
            raise

    def comm_msg(self, stream, ident, msg) -> None:
        found = self.comms.get(msg["content"]["comm_id"])
        if found is not None:
            found.handle_msg(msg)

    def comm_close(self, stream, ident, msg) -> None:
        found = self.comms.pop(msg["content"]["comm_id"], None)
        if found is not None:
            found._closed = True
            found.handle_close(msg)
