# Distributed under the terms of the BSD 3-Clause License.
"""IPython in two processes: a kernel that runs the code, and whoever talks to it.

    import twoproc
    with twoproc.launch() as kernel, twoproc.connect(kernel.connection_file) as client:
        client.execute("1 + 1", on_output=print)

Importing this package does nothing and loads nothing; each public name loads its room when it is
first asked for, so that who wants only the client never pays for the terminal.
"""

from importlib import import_module

__version__ = "0.1.0"

# Public name: the room it lives in.
_ROOMS = {
    "connect": "client",
    "Client": "client",
    "KernelDied": "client",
    "launch": "launcher",
    "KernelProcess": "launcher",
}


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("." + _ROOMS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
