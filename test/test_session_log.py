# Distributed under the terms of the BSD 3-Clause License.
"""The session log of real kernels: what is in it and what is not, whatever ends the kernel.

The unit tests of the format and of the lock are test_crashlog.py's; here kernels run cells, and die.
"""
import glob
import json
import os
import random
import re
import resource
import signal
import sys
import threading
import unittest
import zlib

from twoproc import crashlog, recovery

from . import support
from .support import DEADLINE, KernelCase, wait_until

# How a cell can end the process: code, the signal that ends it (None: exit status 3), the line (or lines) that do it.
DEATHS = {
    "SIGKILL": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", signal.SIGKILL, None),
    "SIGSEGV": ("import ctypes\nx = 1\nctypes.string_at(0)", signal.SIGSEGV, 3),
    "SIGABRT": ("import os\n\n\nos.abort()", signal.SIGABRT, 4),
    "SIGFPE": ("import os, signal\nos.kill(os.getpid(), signal.SIGFPE)", signal.SIGFPE, 2),
    "SIGBUS": ("import mmap, tempfile\nfile = tempfile.TemporaryFile()\nfile.truncate(4096)\n"
               "pages = mmap.mmap(file.fileno(), 4096)\nfile.truncate(0)\nx = pages[0]", signal.SIGBUS, 6),
    "SIGILL": ("import os, signal\nos.kill(os.getpid(), signal.SIGILL)", signal.SIGILL, 2),
    # Python tells this one's lines on stderr itself, and then they are gone with the process.
    "Py_FatalError": ("import ctypes\nctypes.pythonapi.Py_FatalError(b'for a test')", signal.SIGABRT, None),
    "os._exit": ("import os\nos._exit(3)", None, None),
    "C stack overflow": ("import faulthandler\nfaulthandler._stack_overflow()", signal.SIGSEGV, 2),
    "with the GIL held": ("import ctypes\nctypes.PyDLL(None).usleep(20_000)\nctypes.PyDLL(None).strlen(None)",
                          signal.SIGSEGV, 3),
}
if sys.version_info < (3, 12):      # from then on there is a limit to calls through C
    DEATHS["endless calls through C"] = (
        "import ctypes\n@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)\ndef deeper(n):\n"
        "    return deeper(n + 1)\nimport sys; sys.setrecursionlimit(10 ** 9)\ndeeper(0)",
        signal.SIGSEGV, (2, 4))     # 2, where the function begins, if it strikes before its first line


class Logged(unittest.TestCase):
    """Kernels in one home, and their logs."""

    def setUp(self):
        self.home = support.Home(self)
        self.addCleanup(os.environ.pop, "TWOPROC_STATE", None)
        self.state = os.environ["TWOPROC_STATE"] = os.path.join(self.home.path, "state", "twoproc")

    def start(self, *arguments, **options):
        kernel = support.start_kernel(self, *arguments, home=self.home, **options)
        return kernel, kernel.client(self)

    def session(self):
        """The newest session in the state folder."""
        return crashlog.sessions()[0]

    def files(self):
        return sorted(os.listdir(os.path.join(self.state, "sessions")))

    def text(self):
        """Everything that is in the state folder, as bytes."""
        found = b""
        for path in glob.glob(os.path.join(self.state, "**"), recursive=True):
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    found += file.read()
        return found


class WhatIsInTheLog(Logged):

    def test_input_output_result_and_error_are_there_in_order(self):
        kernel, client = self.start()
        client.execute("x = 20\nprint('said', x)\nx + 1")
        client.execute("1 / 0")
        first, second = self.session().cells()
        self.assertEqual((first.ec, first.code, first.is_ended, first.ok),
                         (1, "x = 20\nprint('said', x)\nx + 1", True, True))
        self.assertEqual([output["type"] for output in first.outputs], ["stream", "execute_result"])
        self.assertEqual(first.outputs[0]["content"], {"name": "stdout", "text": "said 20\n"})
        self.assertEqual(first.outputs[1]["content"]["data"]["text/plain"], "21")
        self.assertEqual((second.is_ended, second.ok, second.outputs[0]["content"]["ename"]),
                         (True, False, "ZeroDivisionError"))
        self.assertEqual(first.header["session"], client.session)

    def test_the_input_is_there_before_the_cell_runs(self):
        kernel, client = self.start()
        path = os.path.join(self.state, "sessions", "*.log")
        result = client.execute(f"import glob\nopen(glob.glob({path!r})[0]).read().count('a mark of its own')")
        self.assertEqual(result.value, "1")

    def test_output_is_there_before_anybody_sees_it(self):
        kernel, client = self.start()
        msg_id = client.send_execute("print('seen')\nimport time; time.sleep(60)")
        client.wait_text(msg_id, "seen")
        self.assertIn(b"seen", self.text())

    def test_lines_are_json_with_a_checksum_and_private_to_their_owner(self):
        kernel, client = self.start()
        client.execute("print('\\udc80\\u2028\\x00é')")
        path = os.path.join(self.state, "sessions", self.session().id + ".log")
        with open(path, "rb") as file:
            lines = file.read().splitlines()
        self.assertEqual([json.loads(line)["k"] for line in lines], ["open", "begin", "out", "end"])
        for line in lines:
            at = line.rindex(b',"crc":"')
            self.assertEqual(line[at:], b',"crc":"%08x"}' % zlib.crc32(line[:at] + b"}"))
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        self.assertEqual(os.stat(os.path.dirname(path)).st_mode & 0o777, 0o700)

    def test_silent_cells_and_those_without_history_are_not(self):
        kernel, client = self.start()
        client.execute("print('a secret of silence')", silent=True)
        client.execute("print('a secret without history')", store_history=False)
        client.execute("print('told')")
        self.assertNotIn(b"a secret", self.text())
        self.assertEqual([cell.code for cell in self.session().cells()], ["print('told')"])

    def test_private_cells_are_hash_and_length(self):
        kernel, client = self.start()
        result = client.execute("%%private\ntoken = 'sesame'\nprint('open', token)\ntoken")
        self.assertEqual((result.text(), result.value), ("open sesame\n", "'sesame'"))
        error = client.execute("%%private\nx = 1\nraise ValueError(token)").reply.content
        self.assertIn("----> 3", re.sub("\x1b.*?m", "", "\n".join(error["traceback"])))    # lines count as typed
        client.execute("token is not None")
        first, second, third = self.session().cells()
        self.assertEqual((first.code, second.code, third.code), (None, None, "token is not None"))
        kernel.popen.kill()
        kernel.wait()
        self.assertNotIn(b"sesame", self.text())
        for path in glob.glob(os.path.join(self.home.path, "ipython", "**"), recursive=True):
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    self.assertNotIn(b"sesame", file.read(), path)

    def test_a_private_cell_may_be_a_cell_magic(self):
        kernel, client = self.start()
        self.assertEqual(client.execute("%%private\n%%bash\necho $((6 * 7))").text(), "42\n")
        self.assertEqual(client.execute("%%private\n%%capture found\nprint('inside')").status, "ok")
        self.assertEqual(client.execute("found.stdout.upper()").value, "'INSIDE\\n'")
        self.assertNotIn(b"inside", self.text())

    def test_what_a_private_cell_returned_is_not_in_the_history(self):
        kernel, client = self.start()
        client.execute("get_ipython().history_manager.db_log_output = True")
        self.assertEqual(client.execute("%%private\n'hid' + 'den'").value, "'hidden'")
        self.assertEqual(client.execute("'sho' + 'wn'").value, "'shown'")
        client.request("control", "shutdown_request")
        kernel.wait()
        (path,) = glob.glob(os.path.join(self.home.path, "ipython", "**", "history.sqlite"), recursive=True)
        with open(path, "rb") as file:
            content = file.read()
        self.assertIn(b"'shown'", content)
        self.assertNotIn(b"hidden", content)

    def test_what_is_typed_into_input_and_getpass_is_not(self):
        kernel, client = self.start()
        client.execute("import getpass\nn = len(getpass.getpass('word? '))", answers=["open sesame"])
        client.execute("n = len(input('name? '))", answers=["Ali Baba"])
        self.assertNotIn(b"sesame", self.text())
        self.assertNotIn(b"Ali Baba", self.text())
        asked = [(record["prompt"], record["password"]) for record in self.session().records()
                 if record["k"] == "stdin"]
        self.assertEqual(asked, [("word? ", True), ("name? ", False)])

    def test_a_signal_handler_that_prints_much_while_a_record_is_written(self):
        kernel, client = self.start()
        client.execute('''import os, threading
def write(fd, data, write=os.write):
    if b'"k":"begin"' in data[:40] and threading.current_thread() is threading.main_thread():
        for _ in range(20):
            print("x" * (1 << 20))
    return write(fd, data)
os.write = write''')
        result = client.execute("os.write = write.__defaults__[0]; 'on'")
        self.assertEqual(result.value, "'on'")
        self.assertEqual(self.session().cells()[-1].ok, True)

    def test_a_background_thread_goes_on_under_its_cell(self):
        kernel, client = self.start()
        msg_id = client.send_execute("import threading\nevent = threading.Event()\n"
                                     "thread = threading.Thread(target=lambda: (event.wait(), print('later')))\n"
                                     "get_ipython().kernel.get_parent() and thread.start()")
        client.result(msg_id)
        client.execute("event.set(); thread.join()")
        self.assertEqual(sum(b'"later' in line for line in self.text().splitlines()), 1)

    def test_a_log_that_is_not_wanted_is_not_made(self):
        kernel, client = self.start("--set", "recovery.log=no")
        self.assertEqual(client.execute("1 + 1").value, "2")
        self.assertFalse(os.path.exists(os.path.join(self.state, "sessions")))
        self.assertNotIn("twoproc log", client.request("shell", "kernel_info_request").content["supported_features"])
        self.assertEqual(client.request("control", "twoproc_log_request", {"cells": 5}).content["records"], [])

    def test_much_output_keeps_its_beginning_and_its_end(self):
        kernel, client = self.start("--set", "recovery.max_output_per_cell_kb=64")
        client.execute("for number in range(100_000): print('line', number)", deadline=3 * DEADLINE)
        client.execute("'after'")
        cell = self.session().cells()[0]
        text = "".join(output["content"].get("text", "") for output in cell.outputs)
        kernel.popen.kill()
        kernel.wait()
        self.assertTrue(text.startswith("line 0\nline 1\n"))
        self.assertTrue(text.endswith("line 99999\n"))
        log = os.path.getsize(os.path.join(self.state, "sessions", self.session().id + ".log"))
        self.assertLess(log, 300_000)

    def test_a_forked_child_leaves_it_alone(self):
        kernel, client = self.start()
        client.execute("import os\npid = os.fork()\nif not pid: print('child'); os._exit(0)\nos.waitpid(pid, 0)[1]")
        client.execute("import subprocess; subprocess.run(['true']).returncode")
        session = self.session()
        self.assertEqual([record["k"] for record in session.records()].count("begin"), 2)
        self.assertEqual((session.damaged, session.lost, session.state()), (0, 0, "alive"))


class HowASessionEnds(Logged):

    def test_a_proper_end_leaves_no_file(self):
        for how in ("shutdown_request", signal.SIGTERM, signal.SIGHUP):
            with self.subTest(how=how):
                kernel, client = self.start()
                client.execute("print('x')")
                self.assertEqual(self.session().state(), "alive")
                if how == "shutdown_request":
                    client.request("control", how)
                else:
                    kernel.signal(how)
                kernel.wait()
                self.assertEqual(self.files(), [])

    def test_properly_also_without_what_a_cell_deleted_from_builtins(self):
        for how in ("shutdown_request", signal.SIGTERM):
            with self.subTest(how=how):
                kernel, client = self.start()
                client.execute("import builtins\ndel builtins.print, builtins.OSError, builtins.range, builtins.repr")
                if how == "shutdown_request":
                    client.request("control", how)
                else:
                    os.kill(kernel.pid, how)
                self.assertEqual(kernel.wait(), 0 if how == "shutdown_request" else 128 + how)
                self.assertEqual((self.files(), kernel.log()), ([], ""))
                self.assertFalse(os.path.exists(kernel.connection_file))

    def test_an_exit_function_that_hangs_makes_no_crash_of_a_proper_end(self):
        kernel, client = self.start()
        client.execute("import atexit, time; atexit.register(time.sleep, 600)")
        client.request("control", "shutdown_request")
        self.assertEqual(kernel.wait(), 0)
        self.assertEqual(self.files(), [])

    def test_a_closed_session_is_kept_if_wanted(self):
        kernel, client = self.start("--set", "recovery.keep_closed=1")
        client.execute("1")
        client.request("control", "shutdown_request")
        kernel.wait()
        self.assertEqual(self.session().state(), "closed")
        self.assertEqual(self.session().records()[-1]["k"], "close")

    def test_a_kernel_that_nobody_is_left_to_end_keeps_it(self):
        """Its parent was killed, as a Jupyter server is that takes too much memory: that is no proper end."""
        parent = support.Process(self, ["sleep", "60"], home=self.home)
        kernel, client = self.start(env={"JPY_PARENT_PID": str(parent.pid)})
        client.execute("x = 'work of a day'")
        parent.popen.kill()
        kernel.wait()
        session = self.session()
        self.assertEqual((session.state(), session.cells()[0].code), ("died", "x = 'work of a day'"))
        self.assertIn("its parent, process %d, has ended" % parent.pid, str(recovery.cause(session)))
        self.assertEqual(kernel.popen.returncode, 0)

    def test_a_start_removes_what_is_too_old_and_leaves_what_is_alive(self):
        alive, _ = self.start()
        ids = [crashlog.sessions()[0].id]
        for _ in range(3):
            kernel, client = self.start()
            client.execute("1")
            ids.append(self.session().id)
            kernel.popen.kill()
            kernel.wait()
        kernel, client = self.start("--set", "recovery.keep_crashed=1")
        wait_until(lambda: {session.id for session in crashlog.sessions()}
                   == {ids[0], ids[-1], self.session().id}, DEADLINE, f"{ids}: {crashlog.sessions()}")

    def test_a_restart_keeps_it_until_the_successor_is_closed(self):
        kernel, client = self.start()
        client.execute("x = 'before'")
        client.request("control", "shutdown_request", {"restart": True})
        kernel.wait()
        again = support.Kernel(self, successor_of=kernel)
        again.wait_file()
        client = again.client(self)
        shown = client.execute("%recover show")
        self.assertIn("x = 'before'", shown.text())
        replayed = client.execute("%recover replay", answers=["y"])
        self.assertEqual(client.execute("x").value, "'before'", replayed)
        client.request("control", "shutdown_request")
        again.wait()
        self.assertEqual(self.files(), [])

    def test_a_stopped_kernel_is_alive(self):
        kernel, client = self.start()
        kernel.signal(signal.SIGSTOP)
        self.addCleanup(kernel.signal, signal.SIGCONT)
        self.assertEqual(self.session().state(), "alive")

    def test_a_child_that_survives_does_not_keep_a_dead_kernel_alive(self):
        kernel, client = self.start()
        pids = client.execute(
            "import multiprocessing, os, subprocess, time\n"
            "context = multiprocessing.get_context('fork')\n"
            "worker = context.Process(target=time.sleep, args=(60,)); worker.start()\n"
            "child = os.fork()\nif not child: time.sleep(60); os._exit(0)\n"
            "popen = subprocess.Popen(['sleep', '60'], close_fds=False)\n"
            "worker.pid, child, popen.pid").value
        for pid in eval(pids):
            self.addCleanup(os.kill, pid, signal.SIGKILL)
        kernel.popen.kill()
        kernel.wait()
        wait_until(lambda: self.session().state() == "died", 5, "lock released")


class Deaths(Logged):
    """The cell that killed the kernel is named, and the line where the signal tells."""

    def die(self, name):
        code, number, line = DEATHS[name]
        kernel, client = self.start()
        client.execute("y = 1\nprint('fine')")
        client.send_execute(code)
        status = kernel.wait()
        self.assertEqual(status, 3 if number is None else -number, f"{name}: {kernel.log()}")
        session = self.session()
        self.assertEqual(session.state(), "died")
        self.assertEqual(session.killer.code, code, name)
        lines = line if isinstance(line, tuple) else (line,)
        self.assertIn(recovery.cause(session, status).line, lines, f"{name}: {session.fault_text()}")
        if line:        # also for who was not told how the process ended
            self.assertIn(recovery.cause(session).line, lines)
        self.assertEqual("".join(output["content"]["text"] for output in session.cells()[0].outputs), "fine\n")
        session.drop()
        client.close()

    def test_each_kind(self):
        for name in DEATHS:
            for _ in range(support.rounds(1, 92)):
                with self.subTest(name):
                    self.die(name)

    def test_a_fault_of_the_kernels_own_is_named_and_not_blamed_on_the_cell(self):
        for thread, code in (("twoproc-io", "kernel.channels._drain = None"), ("main", "kernel._next_request = None")):
            with self.subTest(thread=thread):
                kernel, client = self.start()
                client.send_execute("import gc\nkernel = [found for found in gc.get_objects()\n"
                                    "          if type(found).__name__ == 'Kernel' and hasattr(found, 'channels')][0]\n"
                                    + code)
                self.assertEqual(kernel.wait(), 70, kernel.log())
                text = recovery.cause(self.session()).text
                self.assertIn("of the kernel's own, not of the cell: TypeError", text)

    def test_killed_at_a_random_moment_nothing_that_was_acknowledged_is_lost(self):
        """Replies read before the kill: their cells are ended; output read: it is in the log."""
        chance = random.Random(1)
        for _ in range(support.rounds(5, 1000)):
            kernel, client = self.start()
            ids = [client.send_execute(f"print('said {number}')") for number in range(400)]
            timer = threading.Timer(chance.uniform(0.002, 0.12), kernel.popen.kill)
            client.wait_text(ids[0], "said 0")
            timer.start()
            kernel.wait()
            timer.join()
            for _ in range(50):
                client.collect(0.01)
            session = self.session()
            cells = {cell.header["msg_id"]: cell for cell in session.cells()}
            for message in client.inbox["shell"]:
                if message.msg_type == "execute_reply":
                    self.assertTrue(cells[message.parent_id].is_ended)
            for message in client.inbox["iopub"]:
                if message.msg_type == "stream":
                    self.assertIn(message.content["text"].split("\n")[0], repr(cells[message.parent_id].outputs))
            self.assertEqual((session.damaged, session.lost), (0, 0))
            session.drop()
            client.close()


class WithoutADisk(Logged):
    """The log never stops a cell; it says so once, and goes on when it can."""

    def test_a_full_disk(self):
        kernel, client = self.start()
        limit = os.path.getsize(glob.glob(os.path.join(self.state, "sessions", "*.log"))[0]) + 1000
        client.execute("print('before')")
        resource.prlimit(kernel.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        results = [client.execute(f"print('x' * 400)\n{number}") for number in range(10)]
        self.assertEqual([result.value for result in results], [str(number) for number in range(10)])
        self.assertEqual(sum("session log" in result.text("stderr") for result in results), 1)
        resource.prlimit(kernel.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        client.execute("print('again')")
        session = self.session()
        self.assertEqual(session.cells()[-1].code, "print('again')")
        notes = [record for record in session.records() if record["k"] == "note"]
        self.assertEqual(notes[-1]["what"], "resumed")
        self.assertEqual(session.damaged, 0)

    def test_an_unsafe_folder(self):
        os.makedirs(os.path.join(self.state, "sessions"), mode=0o777)
        os.chmod(os.path.join(self.state, "sessions"), 0o777)
        kernel, client = self.start()
        client.execute("'a frontend of its own accord'", silent=True, store_history=False)
        results = [client.execute("1 + 1") for _ in range(3)]
        self.assertEqual([result.value for result in results], ["2", "2", "2"])
        self.assertEqual(["session log cannot be written" in result.text("stderr") for result in results],
                         [True, False, False])
        self.assertEqual(sum("session log" in line for line in kernel.log().splitlines()), 1)
        self.assertEqual(self.files(), [])

    def test_a_folder_that_was_mended_before_the_first_cell_is_no_news(self):
        os.makedirs(self.state)
        os.chmod(self.state, 0o777)
        kernel, client = self.start()
        os.chmod(self.state, 0o700)
        self.assertEqual(client.execute("print('logged')").text("stderr"), "")
        self.assertEqual(self.session().cells()[-1].code, "print('logged')")


class TheSuccessor(Logged):
    """A kernel on the connection file of one that died."""

    def succeed(self, *arguments, code="import os; os._exit(3)"):
        kernel, client = self.start()
        client.execute("x = 20")
        client.send_execute(code)
        kernel.wait()
        again = support.Kernel(self, *arguments, successor_of=kernel)
        again.wait_file()
        return client, again, again.client(self)

    def test_says_so_in_the_first_output_and_in_its_banner(self):
        _, _, client = self.succeed()
        result = client.execute("'first'")
        self.assertIn("died in In [2]", client.request("shell", "kernel_info_request").content["banner"])
        (shown,) = result.of_type("display_data")
        self.assertIn("In [2]", shown["data"]["text/plain"])
        self.assertIn("%recover", shown["data"]["text/html"])
        self.assertEqual(result.value, "'first'")
        self.assertEqual(client.execute("'second'").of_type("display_data"), [])

    def test_does_not_say_it_where_nobody_looks(self):
        _, _, client = self.succeed()
        self.assertEqual(client.execute("'of an extension'", store_history=False).of_type("display_data"), [])
        self.assertEqual(len(client.execute("'of the user'").of_type("display_data")), 1)

    def test_says_it_once_and_not_to_those_who_follow(self):
        _, kernel, client = self.succeed()
        self.assertEqual(len(client.execute("1").of_type("display_data")), 1)
        client.request("control", "shutdown_request")
        kernel.wait()
        again = support.Kernel(self, successor_of=kernel)
        again.wait_file()
        client = again.client(self)
        self.assertEqual(client.execute("1").of_type("display_data"), [])
        self.assertIn("died in In [2]", client.execute("%recover").text())

    def test_says_nothing_where_that_is_not_wanted(self):
        _, _, client = self.succeed("--set", "recovery.notice=no")
        self.assertEqual(client.execute("1").of_type("display_data"), [])

    def test_runs_the_cells_again_when_told_to_and_never_by_itself(self):
        _, _, client = self.succeed()
        self.assertEqual(client.execute("x").reply.content["ename"], "NameError")
        replayed = client.execute("%recover replay", answers=["y"])
        self.assertEqual(client.execute("x").value, "20", replayed)

    def test_replays_in_one_process_where_a_cell_forks(self):
        kernel, client = self.start()
        client.execute("import os\npid = os.fork()")
        client.execute("print('second')")
        client.send_execute("os._exit(3)")
        kernel.wait()
        again = support.Kernel(self, successor_of=kernel)
        again.wait_file()
        client = again.client(self)
        self.assertEqual(client.execute("%recover replay", answers=["y"]).text().count("\nsecond"), 1)
        self.assertEqual(client.execute("os.waitpid(pid, 0)[1]").value, "0")

    def test_that_dies_of_a_replayed_cell_names_that_cell(self):
        _, kernel, client = self.succeed()
        client.send_execute("%recover replay 2", allow_stdin=True)
        client.answer(client.take("stdin"), "y")
        kernel.wait()
        self.assertEqual(self.session().killer.code, "import os; os._exit(3)")

    def test_does_not_run_a_captured_message_of_the_time_before(self):
        """Twice the same bytes, on both sides of a restart."""
        kernel, client = self.start()
        path = os.path.join(self.home.path, "count")
        frames = client.frames(client.header("execute_request"), {"code": f"open({path!r}, 'a').write('x')"})
        client.send_frames("shell", frames)
        client.execute("1")
        for restart in range(2):
            if restart:
                client.request("control", "shutdown_request", {"restart": True})
            else:
                kernel.popen.kill()
            kernel.wait()
            kernel = support.Kernel(self, successor_of=kernel)
            kernel.wait_file()
            client = kernel.client(self)
            client.send_frames("shell", frames)
            client.execute("1")
        with open(path) as file:
            self.assertEqual(file.read(), "x")

    def test_serves_a_client_that_never_says_the_date(self):
        kernel, client = self.start()
        for _restart in range(2):
            header = client.header("execute_request", session="without", date="")
            client.send_frames("shell", client.frames(header, {"code": "'x'"}))
            self.assertEqual(client.result(header["msg_id"]).value, "'x'")
            client.request("control", "shutdown_request", {"restart": True})
            kernel.wait()
            kernel = support.Kernel(self, successor_of=kernel)
            kernel.wait_file()
            client = kernel.client(self)

    def test_runs_the_cells_again_also_without_a_log_of_its_own(self):
        _, _, client = self.succeed("--set", "recovery.log=no")
        replayed = client.execute("%recover replay", answers=["y"])
        self.assertEqual(client.execute("x").value, "20", replayed)

    def test_keeps_its_log_whole_when_ctrl_c_comes_as_a_replayed_cell_begins(self):
        _, kernel, client = self.succeed()
        client.execute('''import os, signal
def write(fd, data, write=os.write):
    written = write(fd, data)
    if b'"code":"x = 20"' in data:
        signal.raise_signal(signal.SIGINT)
    return written
os.write = write''')
        client.execute("%recover replay", answers=["y"])
        client.execute("'after'")
        page = client.request("control", "twoproc_log_request", {"cells": 9}).content
        codes = [record["code"] for record in page["records"] if record["k"] == "begin"]
        self.assertEqual(codes[1:], ["%recover replay", "x = 20", "'after'"])
        kernel.popen.kill()
        kernel.wait()
        self.assertIsNone(self.session().killer)


class TheLogOnTheWire(KernelCase):
    """twoproc_log_request, as docs/protocol.md says."""

    def ask(self, **content):
        return self.client.request("control", "twoproc_log_request", content).content

    def test_the_last_cells_with_their_output(self):
        self.client.execute("print('one')")
        msg_id = self.client.send_execute("print('two')")
        last = self.client.result(msg_id).messages[-1].metadata["twoproc_seq"]
        content = self.ask(cells=1)
        self.assertEqual([record["k"] for record in content["records"]], ["begin", "out", "end"])
        begin, out, end = content["records"]
        self.assertEqual((begin["code"], begin["hdr"]["msg_id"]), ("print('two')", msg_id))
        self.assertEqual((out["of"], out["type"], out["content"]["text"]), (msg_id, "stream", "two\n"))
        self.assertEqual(end["seq"], last)
        self.assertGreaterEqual(content["seq"], last)

    def test_a_range_of_numbers_in_pages(self):
        result = self.client.execute("for n in range(50): print('x' * 5000, flush=True)")
        numbers = [message.metadata["twoproc_seq"] for message in result.messages if message.msg_type == "stream"]
        records, at, pages = [], numbers[0], 0
        while at is not None:
            content = self.ask(from_seq=at, to_seq=numbers[-1], max_bytes=1)
            records, at, pages = records + content["records"], content["next_seq"], pages + 1
        self.assertEqual([record["seq"] for record in records if record["k"] == "out"], numbers)
        self.assertEqual(pages, len(numbers))
        (header,) = self.ask(from_seq=numbers[-1], to_seq=numbers[-1])["parents"].values()
        self.assertEqual(header["msg_type"], "execute_request")

    def test_while_a_cell_runs_and_of_that_cell(self):
        msg_id = self.client.send_execute("print('so far')\nimport time; time.sleep(60)")
        self.client.wait_text(msg_id, "so far")
        self.assertEqual([record["k"] for record in self.ask(cells=1)["records"]], ["begin", "out"])
        self.client.request("control", "interrupt_request")
        self.client.result(msg_id)

    def test_nonsense_is_answered(self):
        for content in ({"cells": -1}, {"from_seq": "x"}, {"max_bytes": -5}):
            self.assertEqual(self.ask(**content)["ename"], "BadMessage")
        self.assertEqual(self.ask(from_seq=10 ** 9)["records"], [])
        self.assertEqual(self.ask(cells=0)["records"], [])
        self.assertEqual(self.ask(from_seq=1, to_seq=0)["records"], [])
