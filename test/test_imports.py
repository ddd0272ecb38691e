# Distributed under the terms of the BSD 3-Clause License.
"""Who may import whom: the table of rooms, held against the source; and importing does nothing.

A new room is a new line of ROOMS here and in docs/design.md.
"""
import ast
import json
import os
import subprocess
import sys
import unittest

from . import support

PACKAGE = os.path.join(support.ROOT, "twoproc")

# Room: (rooms of ours that it may import, packages of others that it may import; at the top or later).
ROOMS = {
    "__init__": ("", ""),
    # both sides
    "session": ("", ""),
    "connection": ("", ""),
    "config": ("", ""),
    "access": ("connection", ""),
    "keys": ("access clientchannels config connection session", ""),
    "mailbox": ("", "zmq"),
    "crashlog": ("connection recovery", ""),
    "sessionlog": ("connection crashlog", ""),
    "recovery": ("crashlog export screen connection client config launcher start", ""),
    "export": ("crashlog", "IPython"),
    "screen": ("", ""),
    # the kernel's process
    "streams": ("", ""),
    "shell": ("session history completion comms crashlog", "IPython traitlets"),
    "history": ("crashlog", "IPython traitlets"),
    "completion": ("", ""),
    "comms": ("", "comm"),
    "admission": ("access mailbox", "zmq"),
    "channels": ("session connection mailbox access admission", "zmq"),
    "replies": ("session", ""),
    "kernel": ("session channels mailbox access keys connection config crashlog recovery replies sessionlog shell"
               " streams start launcher", ""),
    # whoever talks to it
    "clientchannels": ("session connection mailbox", "zmq"),
    "client": ("session clientchannels connection replay link", ""),
    "replay": ("session client", ""),
    "link": ("session client", ""),
    "remote": ("clientchannels client config connection keys", ""),
    "launcher": ("connection client crashlog", ""),
    "relay": ("channels client clientchannels config connection remote replay session", "zmq"),
    "start": ("connection config launcher ssh remote client death", ""),
    "ssh": ("connection client", ""),
    "death": ("crashlog recovery connection client", ""),
    "cells": ("", ""),
    "painter": ("session screen", ""),
    "prompt": ("client crashlog cells access session", "prompt_toolkit pygments ipython_pygments_lexers"),
    "discovery": ("connection clientchannels", ""),
    "terminal": ("client launcher connection session screen painter prompt start death discovery", "prompt_toolkit"),
    "frontend": ("client launcher connection config session cells screen painter start terminal death discovery",
                 "IPython"),
}
KERNEL_SIDE = {"admission", "channels", "sessionlog", "shell", "history", "completion", "comms", "streams", "replies",
               "kernel"}
CLIENT_SIDE = {"clientchannels", "client", "replay", "link", "remote", "launcher", "start", "ssh", "death", "cells",
               "screen", "painter", "prompt", "discovery", "terminal", "frontend"}
# `kernel --install-kernelspec` and `--print-connection` are commands; a running kernel never loads the other side.
NEIGHBOURS = {("kernel", "launcher"), ("kernel", "start")}
HEAVY = ("zmq", "IPython", "prompt_toolkit", "traitlets", "jupyter_client", "ipykernel", "tornado")


def rooms():
    return sorted(name[:-3] for name in os.listdir(PACKAGE) if name.endswith(".py"))


def imports(room):
    """(level, dotted name, is at the top level) of every import in the file of this room; a name given to
    import_module or __import__ counts as one."""
    with open(os.path.join(PACKAGE, room + ".py"), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            if node.level and not node.module:
                for alias in node.names:
                    yield node.level, alias.name, id(node) in top
            else:
                yield node.level, node.module, id(node) in top
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield 0, node.args[0].value, False


def ours(room):
    return {name.split(".")[0] for level, name, _ in imports(room) if level} & set(rooms())


def others(room, top_only=False):
    return {name.split(".")[0] for level, name, is_top in imports(room)
            if not level and (is_top or not top_only)} - set(sys.stdlib_module_names)


def at_import(room):
    """The packages of others that importing this room loads."""
    near = {name.split(".")[0] for level, name, is_top in imports(room) if level and is_top} & set(rooms())
    return others(room, top_only=True).union(*map(at_import, near))


def run(*argv):
    """A Python in the repository's parent environment; what it wrote, as text."""
    done = subprocess.run([sys.executable, *argv], cwd=support.ROOT, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=support.DEADLINE)
    assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


class TheTableOfRooms(unittest.TestCase):

    def test_every_file_has_its_line(self):
        self.assertEqual(rooms(), sorted(ROOMS))

    def test_a_room_imports_only_the_rooms_of_its_line(self):
        for room in rooms():
            with self.subTest(room=room):
                self.assertLessEqual(ours(room), set(ROOMS[room][0].split()))

    def test_a_room_imports_only_the_packages_of_its_line(self):
        for room in rooms():
            with self.subTest(room=room):
                self.assertLessEqual(others(room), set(ROOMS[room][1].split()))

    def test_zmq_is_imported_where_sockets_are_owned_and_nowhere_else(self):
        self.assertEqual([room for room in rooms() if "zmq" in others(room)],
                         ["admission", "channels", "clientchannels", "mailbox", "relay"])

    def test_on_the_kernels_side_ipython_is_imported_in_two_files(self):
        self.assertEqual([room for room in sorted(KERNEL_SIDE) if "IPython" in others(room)], ["history", "shell"])

    def test_a_process_starts_without_ipython_and_prompt_toolkit(self):
        for room in ("kernel", "client", "launcher", "frontend"):
            with self.subTest(room=room):
                self.assertLessEqual(at_import(room), {"zmq"})

    def test_the_two_sides_do_not_import_each_other(self):
        for near, far in (KERNEL_SIDE, CLIENT_SIDE), (CLIENT_SIDE, KERNEL_SIDE):
            for room in near:
                with self.subTest(room=room):
                    self.assertLessEqual({(room, other) for other in ours(room) & far}, NEIGHBOURS)

    def test_imports_of_ours_are_relative(self):
        for room in rooms():
            with self.subTest(room=room):
                self.assertEqual([name for level, name, _ in imports(room)
                                  if not level and name.split(".")[0] in ("twoproc", *rooms())
                                  and name not in sys.stdlib_module_names], [])

    def test_a_running_kernel_holds_nothing_of_the_other_side(self):
        client = support.start_kernel(self).client()
        loaded = client.execute("import sys; print(*[name[8:] for name in sys.modules if name[:8] == 'twoproc.'])")
        self.assertEqual(set(loaded.text().split()) & CLIENT_SIDE, set())
        self.assertLessEqual(KERNEL_SIDE - {"kernel"}, set(loaded.text().split()))      # kernel is __main__ there


LOOK = """
import json, os, signal, sys, threading, importlib
def world():
    handlers = {str(n): repr(signal.getsignal(n)) for n in signal.valid_signals()}
    return {"threads": threading.active_count(), "environment": dict(os.environ), "signals": handlers,
            "descriptors": sorted(os.listdir("/dev/fd")), "hooks": [repr(h) for h in (
                sys.stdin, sys.stdout, sys.stderr, sys.excepthook, sys.displayhook, threading.excepthook)],
            "folder": os.getcwd(), "switch": sys.getswitchinterval(), "path": sys.path}
def look(name, heavy):
    before = world()
    importlib.import_module(name)
    after = world()
    changed = [what for what in before if before[what] != after[what]]
    return {"changed": changed, "loaded": [name for name in heavy if name in sys.modules]}
"""


class ImportingDoesNothing(unittest.TestCase):

    def look(self, name):
        """What importing this module changes in a fresh process, and the heavy packages it loads."""
        return json.loads(run("-c", f"{LOOK}\nprint(json.dumps(look({name!r}, {HEAVY!r})))"))

    def test_the_package_loads_no_room_and_changes_nothing(self):
        self.assertEqual(self.look("twoproc"), {"changed": [], "loaded": []})
        loaded = run("-c", "import sys, twoproc; print(*[m for m in sys.modules if m.startswith('twoproc.')])")
        self.assertEqual(loaded.split(), [])

    def test_no_module_has_effects(self):
        for room in rooms():
            with self.subTest(room=room):
                result = self.look(f"twoproc.{room}")
                self.assertEqual(result["changed"], [])
                if room not in ("shell", "history", "terminal"):       # their libraries bring others along
                    self.assertLessEqual(set(result["loaded"]), at_import(room))

    def test_every_public_name_is_there(self):
        import twoproc
        for name in twoproc._ROOMS:
            with self.subTest(name=name):
                self.assertIsNotNone(getattr(twoproc, name))
                self.assertIn(name, dir(twoproc))
        with self.assertRaises(AttributeError):
            _ = twoproc.no_such_name

    def test_the_frontend_answers_help_and_version_without_the_libraries(self):
        for option in ("--help", "--version"):
            with self.subTest(option=option):
                code = (f"import runpy, sys; sys.argv = ['frontend', {option!r}]\n"
                        "try: runpy.run_module('twoproc.frontend', run_name='__main__')\n"
                        "except SystemExit as end: assert not end.code, end.code\n"
                        f"print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])")
                self.assertEqual(run("-c", code).splitlines()[-1], "loaded:")
        import twoproc
        self.assertIn(twoproc.__version__, run("-m", "twoproc.frontend", "--version"))


if __name__ == "__main__":
    unittest.main()
