# Distributed under the terms of the BSD 3-Clause License.
"""Comms: what widgets talk through."""
from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from typing import Any


class Comm:
    """One end of a comm, with the methods and arguments that the comm package gives its comms."""

    def __init__(self, target_name="comm", data=None, metadata=None, buffers=None, comm_id=None, primary=True,
                 target_module=None, topic=None, *, manager, _open_data=None, _close_data=None, **others):
        self.target_name, self.target_module, self.topic = target_name, target_module, topic
        self.comm_id = comm_id or uuid.uuid4().hex
        self.primary = primary
        self._manager = manager
        self._open_data, self._close_data = _open_data or {}, _close_data or {}
        self._msg_callback: Callable | None = None
        self._close_callback: Callable | None = None
        self._closed = primary
        if primary:
            self.open(data, metadata, buffers)

    def publish_msg(self, msg_type, data=None, metadata=None, buffers=None, **fields) -> None:
        content = {"data": {} if data is None else data, "comm_id": self.comm_id, **fields}
        self._manager.interpreter.publish(msg_type, content, metadata=metadata or {}, buffers=list(buffers or ()))

    def open(self, data=None, metadata=None, buffers=None) -> None:
        self._manager.register_comm(self)
        try:
            self.publish_msg("comm_open", self._open_data if data is None else data, metadata, buffers,
                             target_name=self.target_name, target_module=self.target_module)
        except BaseException:
            self._manager.unregister_comm(self)
            raise
        self._closed = False

    def send(self, data=None, metadata=None, buffers=None) -> None:
        self.publish_msg("comm_msg", data, metadata, buffers)

    def close(self, data=None, metadata=None, buffers=None, deleting=False) -> None:
        if self._closed:
            return
        self._closed = True
        self.publish_msg("comm_close", self._close_data if data is None else data, metadata, buffers)
        self._manager.comms.pop(self.comm_id, None)

    def __del__(self):
        with contextlib.suppress(Exception):        # at the end of the interpreter anything may be gone
            self.close(deleting=True)

    def on_msg(self, callback) -> None:
        self._msg_callback = callback

    def on_close(self, callback) -> None:
        self._close_callback = callback

    def handle_msg(self, msg) -> None:
        if self._msg_callback is not None:
            # A callback is a small cell: figures it drew are shown by who listens to these events.
            events = self._manager.interpreter.shell.events
            events.trigger("pre_execute")
            self._msg_callback(msg)
            events.trigger("post_execute")

    def handle_close(self, msg) -> None:
        if self._close_callback is not None:
            self._close_callback(msg)


class CommManager:
    """All open comms, and the targets that a frontend may open one to."""

    def __init__(self, interpreter: Any):
        self.interpreter = interpreter
        self.comms: dict[str, Comm] = {}
        self.targets: dict[str, Callable] = {}

    def register_target(self, target_name, f) -> None:
        """f(comm, msg) is called when a frontend opens a comm to this target; or the dotted name of such a function."""
        if isinstance(f, str):
            from importlib import import_module
            module, _, name = f.rpartition(".")
            f = getattr(import_module(module), name) if module else import_module(name)
        self.targets[target_name] = f

    def unregister_target(self, target_name, f=None) -> Callable:
        return self.targets.pop(target_name)

    def register_comm(self, comm) -> str:
        self.comms[comm.comm_id] = comm
        return comm.comm_id

    def unregister_comm(self, comm) -> None:
        self.comms.pop(comm.comm_id)

    def get_comm(self, comm_id):
        return self.comms.get(comm_id)

    # -- messages from a frontend; errors of callbacks go to the caller

    def comm_open(self, stream, ident, msg) -> None:
        content = msg["content"]
        target = self.targets.get(content["target_name"])
        comm = Comm(content["target_name"], comm_id=content["comm_id"], primary=False, manager=self)
        self.register_comm(comm)
        try:
            if target is not None:
                target(comm, msg)
        except BaseException:
            comm.close()
            raise
        if target is None:
            comm.close()                            # tells the other side that nobody is here

    def comm_msg(self, stream, ident, msg) -> None:
        comm = self.comms.get(msg["content"]["comm_id"])
        if comm is not None:
            comm.handle_msg(msg)

    def comm_close(self, stream, ident, msg) -> None:
        comm = self.comms.pop(msg["content"]["comm_id"], None)
        if comm is not None:
            comm._closed = True
            comm.handle_close(msg)
