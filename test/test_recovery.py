# Distributed under the terms of the BSD 3-Clause License.
"""What is made of a dead session: its cause of death, its files, its cells run again.

Most logs here are written line by line, as docs/crashlog.md has the format, so that what is read is not also
what wrote it; the fault files are those of real processes wherever a process of this Python can make them.
"""
import ast
import contextlib
import html
import json
import os
import signal
import subprocess
import sys
import time
import unittest
import zlib
from unittest import mock

from twoproc import crashlog, death, export, recovery
from twoproc.crashlog import LoggedSession

from . import support, vt

HOSTILE = "\x1b]52;c;ZXZpbA==\x07\x1b]0;title\x07\x1b[2J\x9b31m<script>alert(1)</script>\r\x08"


def seal(record):
    line = json.dumps(record, separators=(",", ":"))
    return '%s,"crc":"%08x"}\n' % (line[:-1], zlib.crc32(line.encode("ascii")))


class LogCase(unittest.TestCase):
    """A state folder of its own, here and for the processes that a test starts; and logs written into it."""

    def setUp(self):
        self.home = support.Home(self)
        self.state = os.path.join(self.home.path, "state", "twoproc")
        self.home.env["TWOPROC_STATE"] = self.state
        changed = mock.patch.dict(os.environ, TWOPROC_STATE=self.state, HOME=self.home.path)
        changed.start()
        self.addCleanup(changed.stop)
        self.number = 0

    def write(self, *cells, status=None, fault="", lock=True, opened=(), more=(), age=60.0):
        """A session that ended `age` seconds ago; cells: dicts of `begin` and, in them, outs and the end."""
        self.number += 1
        name = "20261123T09%04d-4711-%06x" % (self.number, self.number)
        start = time.time() - age
        self.records = []

        def add(kind, **members):
            self.records.append({"n": len(self.records) + 1, "k": kind, "t": round(start, 3), **members})
        add("open", v=1, pid=4711, started="1", boot=crashlog.boot_id(), host=crashlog.host_name(), user="u",
            python="3.11.7", ipython="9", twoproc="0", cwd=self.home.work, argv=["x"], conn="/run/kernel-7.json",
            prev="", marks={})
        self.records[0].update(opened)
        for number, cell in enumerate(cells, 1):
            of, ec = "msg-%d" % number, cell.get("ec", number)
            begin = {"ec": ec, "hdr": {"msg_id": of, "session": "s", "date": "2026"}}
            begin.update({"hash": "00ff", "length": 23} if cell.get("private") else
                         {"code": cell["code"], "file": "<ipython-input-%d-" % ec, "cell": cell.get("cell")})
            add("begin", of=of, **begin)
            for kind, content in cell.get("outs", ()):
                add("out", seq=len(self.records), of=of, type=kind, content=content)
            if cell.get("ok", True) is not None:
                add("end", seq=len(self.records), of=of, ok=cell.get("ok", True), ms=1.0)
        if status is not None:
            add("exit", status=status, signal="")
        for kind, members in more:
            add(kind, **members)
        folder = crashlog.sessions_folder()
        self.path = os.path.join(folder, name)
        files = {".log": "".join(map(seal, self.records)), ".fault": fault}
        if lock:
            holder = {"pid": 4711, "host": crashlog.host_name(), "boot": crashlog.boot_id(),
                      "conn": "/run/kernel-7.json",
                      "locking": "flock"}
            files[".lock"] = json.dumps({**holder, **({} if lock is True else lock)})
        for suffix, text in files.items():
            with open(os.open(self.path + suffix, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
                file.write(text)
        return crashlog.find(name)

    def crash(self, *codes, **options):
        """Cells that ended, but for the last, in which the kernel died."""
        cells = [{"code": code} for code in codes]
        cells[-1]["ok"] = None
        return self.write(*cells, **options)

    def crashlog(self, *arguments, status=0, **options):
        """The command line, in a process."""
        done = subprocess.run([sys.executable, "-m", "twoproc.crashlog", *arguments], env=self.home.env,
                              cwd=self.home.work, capture_output=True, timeout=support.DEADLINE,
                              **{"stdin": subprocess.DEVNULL, **options})
        out, err = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
        self.assertEqual(done.returncode, status, out + err)
        self.assertNotIn("Traceback", out + err)
        return out + err


def stream(text, name="stdout"):
    return "stream", {"name": name, "text": text}


def display(data, display_id=None, kind="display_data", **members):
    return kind, {"data": data, "metadata": {}, "transient": {"display_id": display_id} if display_id else {},
                  **members}


# -- what killed it --------------------------------------------------------------------------------

FRAMES = """
  File "/usr/lib/python3/lib.py", line 90 in solve
  File "<ipython-input-2-0123456789ab>", line 3 in <module>
  File "/x/twoproc/kernel.py", line 1 in main
"""
SEGFAULT = ("Fatal Python error: Segmentation fault\n\nCurrent thread 0x00007f819a9fcb80 (most recent call first):"
            + FRAMES)
THREAD = """\
Fatal Python error: Segmentation fault

Current thread 0x00007f819a9fcb80 (most recent call first):
  File "<ipython-input-1-0123456789ab>", line 4 in work
  File "/usr/lib/python3/threading.py", line 953 in run
  File "/usr/lib/python3/threading.py", line 973 in _bootstrap

Thread 0x00007f819a9fcb81 (most recent call first):
  File "<ipython-input-2-0123456789ab>", line 1 in <module>
"""


class WhatKilledIt(LogCase):

    def text(self, status=None, fault="", **options):
        return recovery.cause(self.crash("a = 1", "lib.solve(a)", status=status, fault=fault, **options)).text

    def test_a_fatal_signal_with_its_line_and_its_function(self):
        for status in (None, -signal.SIGSEGV, 128 + signal.SIGSEGV):
            with self.subTest(status=status):
                death = recovery.cause(self.crash("a", "b", status=status, fault=SEGFAULT))
                self.assertEqual(str(death), "died in In [2]: SIGSEGV at line 3 of the cell, in lib.solve")
                self.assertEqual((death.line, death.cell.ec), (3, 2))

    def test_a_status_just_learned_goes_before_the_log(self):
        self.assertEqual(recovery.cause(self.crash("a"), status=-signal.SIGTERM).text, "SIGTERM")

    def test_kill_minus_nine_is_said_to_come_from_outside_only_with_that_status(self):
        self.assertEqual(self.text(-9), "SIGKILL: killed from outside (kill -9 or out of memory)")
        self.assertEqual(self.text(), "killed from outside or ended by os._exit: nothing else is known")

    def test_exit_in_a_cell_and_while_idle(self):
        self.assertEqual(self.text(3), "the cell ended the process itself, status 3")
        self.assertEqual(self.text(137), "the cell ended the process itself, status 137, "
                                         "which is how a shell tells of SIGKILL")
        death = recovery.cause(self.write({"code": "a"}, status=0))
        self.assertEqual(str(death),
                         "died while idle, after In [1]: something in it ended the process itself, status 0")

    def test_a_signal_without_a_fault_file(self):
        self.assertEqual(self.text(-signal.SIGABRT), "SIGABRT")
        self.assertEqual(self.text(-63), "signal 63")

    def test_a_fault_file_of_another_process_is_not_believed(self):
        self.assertEqual(self.text(-9, SEGFAULT), "SIGKILL: killed from outside (kill -9 or out of memory)")
        self.assertEqual(self.text(3, SEGFAULT), "the cell ended the process itself, status 3")

    def test_a_thread_that_dies_while_idle_is_named_with_the_cell_it_came_from(self):
        death = recovery.cause(self.write({"code": "start()"}, {"code": "b"}, fault=THREAD))
        self.assertEqual(str(death), "died while idle, after In [2]: SIGSEGV in a thread, at line 4 of In [1], in work")
        self.assertEqual((death.line, death.cell), (None, None))

    def test_a_thread_that_dies_while_another_cell_runs_does_not_blame_that(self):
        self.assertEqual(str(recovery.cause(self.crash("start()", "b", fault=THREAD))),
                         "died while In [2] was running: SIGSEGV in a thread, at line 4 of In [1], in work")

    def test_between_two_cells_of_a_replay_the_replay_was_running(self):
        session = self.write({"code": "%recover replay", "ok": None}, {"code": "a", "ec": 1}, status=3)
        self.assertEqual(str(recovery.cause(session)), "died in In [1]: the cell ended the process itself, status 3")
        recovery.export(session, os.path.join(self.home.work, "x.py"))
        with open(os.path.join(self.home.work, "x.py")) as file:
            self.assertIn("# In [1]: the kernel died in In [1]", file.read())

    def test_a_lost_end_makes_no_killer(self):
        session = self.write({"code": "a", "ok": None}, {"code": "b"}, status=3)
        self.assertEqual(recovery.cause(session).place, "while idle, after In [2]")
        self.assertEqual([cell.ec for cell in recovery.replay_cells(session)[0]], [1, 2])

    def test_before_the_first_cell(self):
        self.assertEqual(str(recovery.cause(self.write(status=-9)))[:37], "died while idle, before the first cel")

    def test_the_formats_of_several_pythons(self):
        newest = SEGFAULT.replace("cb80 (", "cb80 [python3 [x] y] (") + (
            "\nThread 0x00007f8199fc36c0 [Thread-1] (most recent call first):\n  File \"a.py\", line 1 in b\n\n"
            "Current thread's C stack trace (most recent call first):\n  Binary file \"python\", at _PyEval+0x1 [0x2]\n"
            "\nExtension modules: zmq.backend.cython._zmq, _cffi_backend (total: 2)\n")
        free = SEGFAULT.replace("Current", "<Cannot show all threads while the GIL is disabled>\nCurrent").replace(
            "first):\n", "first):\n  Garbage-collecting\n")
        for text in (newest, free, SEGFAULT + "  ...\n", "some words\n" + SEGFAULT):
            with self.subTest(text=text):
                self.assertEqual(self.text(fault=text), "SIGSEGV at line 3 of the cell, in lib.solve")
        for words, name in (("Aborted", "SIGABRT"), ("Floating point exception", "SIGFPE"), ("Bus error", "SIGBUS"),
                            ("Floating-point exception", "SIGFPE"), ("Illegal instruction", "SIGILL")):
            with self.subTest(words=words):
                self.assertEqual(self.text(fault="Fatal Python error: %s\n" % words)[:len(name)], name)
        self.assertEqual(self.text(fault=SEGFAULT.replace("Fatal Python error: Segmentation fault",
                                                          "Windows fatal exception: access violation")),
                         "access violation at line 3 of the cell, in lib.solve")
        self.assertEqual(self.text(-6, fault=SEGFAULT.replace("Segmentation fault", "Cannot recover.")),
                         "SIGABRT (Cannot recover.) at line 3 of the cell, in lib.solve")

    def test_a_thread_without_python_is_a_thread(self):
        text = SEGFAULT.replace("Current thread", "Thread")
        self.assertEqual(str(recovery.cause(self.crash("a", "b", fault=text))),
                         "died while In [2] was running: SIGSEGV in a thread")

    def test_a_dump_that_somebody_asked_for_is_no_death(self):
        self.assertEqual(self.text(fault=SEGFAULT.partition("\n\n")[2]),
                         "killed from outside or ended by os._exit: nothing else is known")

    def test_damaged_and_hostile_fault_files_are_read_as_far_as_they_go(self):
        for cut in range(0, len(SEGFAULT), 7):
            recovery.cause(self.crash("a", "b", fault=SEGFAULT[:cut]))
        for line in ("???", "9" * 30, "-1"):
            recovery.cause(self.crash("a", "b", fault=SEGFAULT.replace("line 3", "line " + line)))
        hostile = SEGFAULT.replace("lib", HOSTILE).replace("solve", HOSTILE)
        self.assertNotRegex(self.text(fault=hostile), "[\x00-\x1f\x9b]")

    def test_a_fault_of_the_kernels_own_is_not_blamed_on_the_cell(self):
        note = ("note", {"what": "fault", "text": "Traceback ...\nZeroDivisionError: x\n"})
        self.assertEqual(self.text(70, more=[note]),
                         "a fault of the kernel's own, not of the cell: ZeroDivisionError: x")


# Each dies at line 3 of its cell; the function around it is one of the cell's.
DEATHS = {
    "SIGSEGV": "ctypes.string_at(0)", "SIGABRT": "os.abort()", "SIGFPE": "os.kill(os.getpid(), signal.SIGFPE)",
    "SIGBUS": "m[0]", "SIGILL": "signal.raise_signal(signal.SIGILL)",
}
CELL = """\
import ctypes, faulthandler, mmap, os, signal, sys, tempfile
def die(m=None):
    %s
f = tempfile.TemporaryFile()
f.truncate(4096)
m = mmap.mmap(f.fileno(), 4096)
f.truncate(0)
%s"""


@unittest.skipUnless(os.name == "posix", "signals")
class FaultFilesOfThisPython(LogCase):

    def fault(self, code):
        """What faulthandler writes about a process of this Python that runs this as its second cell; its status."""
        program = "import faulthandler, sys; faulthandler.enable(open(sys.argv[1], 'w'))\n" \
                  "exec(compile(%r, '<ipython-input-2-0123456789ab>', 'exec'))" % code
        path = os.path.join(self.home.path, "fault")
        done = subprocess.run([sys.executable, "-c", program, path], timeout=support.DEADLINE, cwd=self.home.work,
                              stderr=subprocess.DEVNULL)
        with open(path) as file:
            return file.read(), done.returncode

    def test_every_fatal_signal_has_its_line(self):
        for name, statement in DEATHS.items():
            with self.subTest(signal=name):
                fault, status = self.fault(CELL % (statement, "die(m)"))
                for known in (None, status):
                    self.assertEqual(recovery.cause(self.crash("a", "b", fault=fault, status=known)).text,
                                     "%s at line 3 of the cell, in die" % name)

    def test_a_stack_overflow_of_c_has_its_line(self):
        fault, status = self.fault("import sys\nsys.setrecursionlimit(10**9)\n"
                                   "def f():\n    min([1], key=lambda x: f())\nf()")
        if not fault:
            self.skipTest("this Python ends otherwise: %s" % status)
        self.assertRegex(recovery.cause(self.crash("a", "b", fault=fault, status=status)).text,
                         "^SIGSEGV at line 4 of the cell, in f")

    def test_a_thread(self):
        fault, status = self.fault(CELL % ("ctypes.string_at(0)", "import threading\nt = threading.Thread(target=die)\n"
                                           "t.start()\nt.join()"))
        self.assertRegex(recovery.cause(self.crash("a", "b", fault=fault)).text,
                         r"^SIGSEGV in a thread( \(.*\))?, at line 3 of the cell, in die$")


# -- what is said ----------------------------------------------------------------------------------

class WhatIsSaid(LogCase):

    def test_three_lines_say_what_happened_what_is_saved_and_what_is_not(self):
        lines = recovery.describe(self.crash("a = 1", "lib.solve(a)", fault=SEGFAULT, status=-11, age=0))
        self.assertRegex(lines[0], r"^The kernel died in In \[2\]: SIGSEGV at line 3 of the cell, in lib\.solve  "
                                   r"\((\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d, pid 4711\)$")
        self.assertEqual(lines[1:], ["  saved: 2 inputs and what came out", "  not saved: variables"])

    def test_a_time_that_is_only_the_last_record_is_called_that(self):
        self.assertIn("(last record ", recovery.describe(self.crash("a"))[0])

    def test_what_is_missing_is_counted(self):
        session = self.write({"code": "a"}, {"private": True}, {"code": "b"})
        with open(session.path(".log"), "rb+") as file:
            lines = file.read().split(b"\n")
            lines[2] = lines[2].replace(b"true", b"tru3")
            del lines[3]
            file.seek(0)
            file.truncate()
            file.write(b"\n".join(lines))
        self.assertEqual(recovery.describe(crashlog.find(session.id))[1:], [
            "  saved: 2 inputs and what came out", "  not saved: variables, 1 damaged record, 2 lost records"])
        self.assertEqual(recovery.describe(self.write({"private": True}))[1:], [
            "  saved: 0 inputs", "  not saved: variables, 1 private cell"])

    def test_pieces_of_output_that_are_gone_are_counted_and_no_output_is_read(self):
        session = self.write({"code": "a", "outs": [stream("x")] * 3},
                             more=[("cut", {"of": "msg-1", "first": 3, "last": 4, "records": 2, "bytes": 9})])
        with open(session.path(".log"), "rb+") as file:
            lines = file.read().split(b"\n")
            file.seek(0)
            file.truncate()
            file.write(b"\n".join(lines[:2] + lines[4:]))
        with mock.patch.object(crashlog.LoggedSession, "cells", side_effect=AssertionError):
            self.assertEqual(recovery.describe(session)[2], "  not saved: variables, 2 pieces of output")

    def test_alive_closed_and_elsewhere_are_said(self):
        away = self.crash("a", lock={"host": "elsewhere", "boot": "other"}, opened={"host": "elsewhere"})
        self.assertIn("It ran on host elsewhere, and may still.", recovery.describe(away)[0])
        closed = self.write({"code": "a"}, lock=None, more=[("close", {"why": "shutdown_request", "restart": True})])
        self.assertRegex(recovery.describe(closed)[0], r"^The session was closed: shutdown_request  \(.*, pid 4711\)$")
        alive = self.crash("a")
        self.hold(alive)
        self.assertEqual(recovery.describe(alive)[0], "The kernel is running  (pid 4711)")
        self.assertEqual([line.split("  ")[1] for line in recovery.list_lines([away, closed, alive])],
                         ["unknown (host elsewhere)", "closed", "running (pid 4711)"])

    def hold(self, session):
        import fcntl
        file = self.enterContext_(open(session.path(".lock"), "rb+"))
        fcntl.flock(file, fcntl.LOCK_EX)

    def enterContext_(self, context):
        self.addCleanup(context.__exit__, None, None, None)
        return context.__enter__()

    def test_one_line_lists_a_session(self):
        session = self.crash("a = 1", "solve(a)\nmore()", status=3)
        line, = recovery.list_lines([session])
        self.assertRegex(line, r"^%s  died  (\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d  ~/work  2 cells  In \[2\]: solve\(a\)  "
                               r"the cell ended the process itself, status 3$" % session.id)

    def test_the_notice_is_three_lines_and_escaped_html(self):
        text, markup = recovery.notice(self.crash("a", "b", fault=SEGFAULT.replace("lib.py", "<b>.py")))
        self.assertEqual(len(text.split("\n")), 3)
        self.assertIn("%recover", text)
        self.assertIn("nothing was run again", text)
        self.assertEqual(markup.count("<br>"), 2)
        self.assertNotIn("<b>", recovery.notice(self.crash(
            "x", fault=SEGFAULT.replace("-2-", "-1-").replace("in <module>", "in <b>&"))) [1])
        self.assertIn(html.escape("In [2]"), markup)

    def test_show_has_the_cells_their_output_and_marks_the_line(self):
        session = self.write(
            {"code": "a = 1\na", "outs": [stream("one\rtwo\n"), stream("err\n", "stderr"),
                                         display({"text/plain": "1"}, kind="execute_result", execution_count=1)]},
            {"code": "x\ny\nlib.solve(a)", "ok": None}, fault=SEGFAULT)
        self.assertEqual(recovery.show(session)[4:], [
            "", "In [1]: a = 1", "   ...: a", "two", "err", "Out[1]: 1", "",
            "the kernel died in In [2]: SIGSEGV at line 3 of the cell, in lib.solve",
            "In [2]: x", "   ...: y", "   ...: lib.solve(a)    <---"])

    def test_nothing_that_a_terminal_obeys_leaves_here(self):
        session = self.write(
            {"code": "print(%s)" % HOSTILE, "outs": [
                stream(HOSTILE), stream("\x1b]52;c;", "stderr"), display({"text/html": HOSTILE, "text/plain": HOSTILE}),
                display({HOSTILE: {}}), ("error", {"ename": HOSTILE, "evalue": HOSTILE, "traceback": [HOSTILE]})]},
            {"private": True, "ok": None}, opened={"cwd": "/x/" + HOSTILE + "\ny", "host": HOSTILE})
        said = [*recovery.show(session), *recovery.list_lines([session]), *recovery.describe(session),
                *recovery.notice(session)[0].split("\n")]
        self.assertNotRegex("".join(said), "[\x00-\x08\x0b-\x1f\x7f-\x9f]")
        self.assertEqual([line for line in said if "\n" in line], [])
        out = self.crashlog("--show", session.id) + self.crashlog("--list")
        self.assertNotRegex(out, "[\x00-\x08\x0b-\x1f\x7f-\x9f]")

    def test_nor_in_the_news_or_in_a_refusal(self):
        session = self.crash("x", opened={"cwd": "/x/" + HOSTILE + "\ny", "host": HOSTILE, "boot": "b"},
                             lock={"host": HOSTILE, "boot": "b"})
        self.assertEqual(session.state(), "unknown")
        with self.assertRaises(crashlog.LockedError) as refused, session.take():
            pass
        with mock.patch.object(LoggedSession, "state", lambda session: "died"):
            news = death.news()
        self.assertIn("did not close properly", news)
        self.assertNotRegex(str(refused.exception) + news, "[\x00-\x1f\x7f-\x9f]")

    def test_a_pipe_in_place_of_the_list_of_what_was_told_stops_nobody(self):
        self.crash("x")
        os.mkfifo(os.path.join(self.state, "told"))
        said = [subprocess.run([sys.executable, "-c", "from twoproc import death; print(death.news())"],
                               env=self.home.env, capture_output=True, text=True, timeout=support.DEADLINE).stdout
                for _ in range(2)]
        self.assertRegex(said[0], "^1 session did not close")
        self.assertEqual(said[1], "\n")

    def test_records_of_the_wrong_shape_are_read_past(self):
        odd = [("display_data", {"data": [1], "metadata": 3, "transient": 4}), ("stream", {"text": None}),
               ("error", {"traceback": 3}), ("execute_result", {"data": {"text/plain": {"a": 1}}}),
               ("clear_output", {}), ("display_data", {"data": {"text/plain": ["a", 2]}}),
               ("update_display_data", {"transient": {"display_id": []}})]
        session = self.write({"code": "", "outs": odd, "cell": 7}, opened={"cwd": 3, "python": None, "host": []})
        recovery.show(session), recovery.list_lines([session]), recovery.describe(session)
        recovery.export(session, os.path.join(self.home.work, "odd.ipynb"))


# -- as a file -------------------------------------------------------------------------------------

def validate(text):
    try:
        import nbformat.sign
    except ImportError:
        return
    nbformat.validate(json.loads(text))
    # What Jupyter does when it opens one: sign it, which encodes every text in it.
    with contextlib.closing(nbformat.sign.MemorySignatureStore()) as store:
        notary = nbformat.sign.NotebookNotary(secret=b"x", store_factory=lambda: store)
        notary.compute_signature(nbformat.reads(text, 4))


class Notebooks(LogCase):

    def notebook(self, session):
        path = os.path.join(self.home.work, "%s.ipynb" % self.number)
        recovery.export(session, path)
        with open(path, encoding="utf-8") as file:
            text = file.read()
        validate(text)
        return json.loads(text)

    def outputs(self, *outs):
        return self.notebook(self.write({"code": "x", "outs": outs}))["cells"][0]["outputs"]

    def test_nbformat_is_here_to_validate_with(self):
        try:
            import nbformat         # noqa: F401
        except ImportError:
            self.skipTest("nbformat is not installed; the other tests here do not validate")

    def test_inputs_and_outputs_are_there_and_the_killer_is_tagged(self):
        found = self.notebook(self.write(
            {"code": "a\nb", "outs": [
                stream("x"), stream("y\n"), stream("z", "stderr"),
                display({"text/plain": "1"}, kind="execute_result", execution_count=1)]},
            {"code": "%matplotlib inline", "outs": [
                display({"image/png": "aGk=", "text/plain": "f"})]},
            {"code": "lib.solve()", "outs": [stream("last words")], "ok": None}, status=-9))
        self.assertEqual((found["nbformat"], found["nbformat_minor"]), (4, 5))
        first, second, killer = found["cells"]
        self.assertEqual("".join(first["source"]), "a\nb")
        self.assertEqual([(out["output_type"], out.get("text")) for out in first["outputs"]],
                         [("stream", "xy\n"), ("stream", "z"), ("execute_result", None)])
        self.assertEqual(second["outputs"][0]["data"]["image/png"], "aGk=")
        self.assertEqual(killer["metadata"]["tags"], ["killed-kernel"])
        self.assertEqual([out.get("ename") for out in killer["outputs"]], [None, "KernelDied"])
        self.assertEqual(len({cell["id"] for cell in found["cells"]}), 3)

    def test_an_update_changes_what_was_displayed_in_whichever_cell(self):
        found = self.notebook(self.write(
            {"code": "h", "outs": [display({"text/plain": "1"}, "d"), display({"text/plain": "other"}, "e")]},
            {"code": "u", "outs": [display({"text/plain": "2"}, "d", "update_display_data"),
                                   display({"text/plain": "nobody"}, "f", "update_display_data")]}))
        self.assertEqual([[out["data"]["text/plain"] for out in cell["outputs"]] for cell in found["cells"]],
                         [["2", "other"], []])

    def test_clear_output_clears_at_once_or_with_the_next(self):
        self.assertEqual([out["text"] for out in self.outputs(stream("a"), ("clear_output", {"wait": False}))], [])
        self.assertEqual([out["text"] for out in self.outputs(stream("a"), ("clear_output", {"wait": True}))], ["a"])
        self.assertEqual([out["text"] for out in self.outputs(
            stream("a"), ("clear_output", {"wait": True}), stream("b"), stream("c"))], ["bc"])

    def test_errors_keep_their_traceback(self):
        out, = self.outputs(("error", {"ename": "E", "evalue": "v", "traceback": ["\x1b[31mE\x1b[0m"]}))
        self.assertEqual(out, {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["\x1b[31mE\x1b[0m"]})

    def test_a_private_cell_is_a_note_with_hash_and_length(self):
        cell = self.notebook(self.write({"private": True}))["cells"][0]
        self.assertEqual((cell["cell_type"], "".join(cell["source"])),
                         ("markdown", "In [1]: private, 23 characters, hash 00ff"))

    def test_what_utf_8_cannot_hold_is_replaced(self):
        found = self.notebook(self.write({"code": "'\ud800' # \u2028\x00", "outs": [
            stream("\udfff"), display({"application/json": {"\ud801": 1}, "text/plain": {"not": "text"}})]}))
        self.assertEqual("".join(found["cells"][0]["source"]), "'?' # \u2028\x00")
        self.assertEqual(found["cells"][0]["outputs"][1]["data"]["application/json"], {"?": 1})

    def test_an_empty_session_is_an_empty_notebook(self):
        self.assertEqual(self.notebook(self.write())["cells"], [])


class Scripts(LogCase):

    def script(self, session):
        path = os.path.join(self.home.work, "%s.py" % self.number)
        recovery.export(session, path)
        with open(path, "rb") as file:
            data = file.read()
        compile(data, path, "exec")
        return data.decode("utf-8")

    def test_cells_have_their_marks_and_the_killer_is_a_comment(self):
        text = self.script(self.crash("a = 1\nb", "lib.solve(a)\nmore", fault=SEGFAULT))
        self.assertIn("\n# In [1]\na = 1\nb\n", text)
        self.assertIn("\n# In [2]: the kernel died in In [2]: SIGSEGV at line 3 of the cell, in lib.solve\n"
                      "# lib.solve(a)\n# more\n", text)

    def test_the_script_compiles_whatever_the_cells_are(self):
        codes = ["%matplotlib inline\nimport os", "files = !ls", "for x in y:\n    !echo {x}\n    %time f(x)",
                 "f?\n?f\nf??", "%%bash\nls", "%%time\nx = 1", "await f()", "def", "ls -l",
                 "!ls \\\n  -l\nz = 1", "'''\n%not magic\n'''",
                 "from __future__ import annotations\nq = 1", "return 1", "x = 1 # \u2028", "'\x00'", "'\ud800'",
                 "# -*- coding: cp037 -*-", "if x:\n  %a\nelse:\n  !b", "a = 1\r\nb = 2\rc = 3", "",
                 "\ufeffx = 1", "%recover replay", "x = (1,\n %time 2)", "!echo \"it's\"\ny = 1",
                 "((((" * 300, "\x0c", "    indented"]
        text = self.script(self.crash(*codes, "killer"))
        self.assertIn("get_ipython().run_line_magic('matplotlib', 'inline')\nimport os\n", text)
        self.assertIn("files = get_ipython().getoutput('ls')\n", text)
        self.assertIn("    get_ipython().run_line_magic('time', 'f(x)')\n", text)
        self.assertIn("get_ipython().run_cell_magic('bash', '', 'ls\\n')\n", text)
        self.assertIn("'''\n%not magic\n'''", text)
        self.assertIn("# %recover replay", text)
        self.assertIn("z = 1\n", text)
        self.assertNotIn("\n  -l", text)
        tree = ast.parse(text)
        self.assertEqual([node.names[0].name for node in tree.body if isinstance(node, ast.ImportFrom)],
                         ["annotations"])
        for code in codes:      # each on its own, so that none hides another
            with self.subTest(code=code):
                self.script(self.write({"code": code}))

    def test_the_script_runs(self):
        text = self.script(self.crash("a = 40", "def f(x):\n    return x + 2", "print(f(a))", "die()"))
        done = subprocess.run([sys.executable, "-"], input=text.encode(), capture_output=True, timeout=support.DEADLINE)
        self.assertEqual(done.stdout, b"42\n")


class Files(LogCase):

    def test_a_file_that_is_there_is_not_touched(self):
        session = self.crash("a")
        for target in (None, "elsewhere"):
            for name in ("x.py", "x.ipynb"):
                path = os.path.join(self.home.work, name)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                if target:
                    os.symlink(target, path)
                else:
                    open(path, "w").close()
                with self.assertRaisesRegex(crashlog.StateError, r"x\.(py|ipynb) exists already") as raised:
                    recovery.export(session, path)
                self.assertEqual(raised.exception.exit_code, 2)
        self.assertEqual(sorted(os.listdir(self.home.work)), ["x.ipynb", "x.py"])

    def test_a_folder_that_is_not_there_and_an_unknown_kind_are_one_line(self):
        session = self.crash("a")
        for name, words in (("no/x.py", "No such file"), ("x.txt", "must end in .ipynb or .py")):
            with self.assertRaisesRegex(crashlog.StateError, words):
                recovery.export(session, os.path.join(self.home.work, name))
        self.assertEqual(os.listdir(self.home.work), [])


class Definitions(LogCase):

    def code(self, *codes):
        cells = self.crash(*codes, "def killer(): pass").inputs()
        return export.definitions_of(cells, cells[-1])

    def test_imports_functions_and_classes_and_nothing_else(self):
        code = self.code("import os\nx = 1\nprint(x)", "@decorate\ndef f(a):  # kept\n    return a\n\nf(1)",
                         "class A:\n    y = 2", "%time\nfrom a import b as c; z = 3", "async def g(): pass\nawait g()",
                         "try:\n    import u\nexcept ImportError:\n    u = None")
        self.assertEqual(code, "import os\n\n@decorate\ndef f(a):  # kept\n    return a\n\nclass A:\n    y = 2\n\n"
                               "from a import b as c\n\nasync def g(): pass\n\n"
                               "try:\n    import u\nexcept ImportError:\n    u = None\n")
        ast.parse(code)

    def test_what_was_defined_again_is_as_it_was(self):
        names = {}
        exec(self.code("class A:\n    x = 1", "class B(A): pass", "class A:\n    x = 2"), names)
        self.assertEqual((names["A"].x, names["B"].x), (2, 1))

    def test_future_imports_come_first(self):
        compile(self.code("import a", "from __future__ import annotations\nimport b"), "x", "exec")

    def test_there_may_be_none(self):
        self.assertEqual(self.code("x = 1", "%%bash\ndef f(): pass", "def ("), "")


# -- run once more ---------------------------------------------------------------------------------

class Selections(LogCase):

    def numbers(self, selection=""):
        session = self.write({"code": "1"}, {"private": True}, {"code": "3"}, {"code": " %recover replay"},
                             {"code": "5"}, {"code": "6", "ok": None})
        return [cell.ec for cell in recovery.replay_cells(session, selection)[0]]

    def test_all_but_the_killer_private_cells_and_recover(self):
        self.assertEqual(self.numbers(), [1, 3, 5])

    def test_numbers_and_ranges(self):
        self.assertEqual(self.numbers("3-6,1"), [1, 3, 5])
        self.assertEqual(self.numbers(" 1 5 "), [1, 5])

    def test_the_killer_only_as_a_number_of_its_own(self):
        self.assertEqual(self.numbers("5,6"), [5, 6])
        self.assertEqual(self.numbers("6-6"), [6])

    def test_what_is_no_selection_is_one_line(self):
        for selection in "x", "3-", "9", "1,7-9", "6-3", "1" * 5000, "all":
            with self.subTest(selection=selection[:20]), self.assertRaisesRegex(
                    crashlog.StateError, "expected numbers of its cells"):
                self.numbers(selection)


RECOVERED = "recovered", {"by": "20261123T090002-4711-000002", "how": "replay"}     # by the second session of a test


class Magic(LogCase):
    """%recover, with functions in place of a kernel."""

    def setUp(self):
        super().setUp()
        self.said, self.ran, self.asked = [], [], []
        self.answers = ["y"] * 9
        self.log = mock.Mock(prev=None, id="heir", is_on=True)

    def recover(self, line, fails=()):
        def run(cell):
            self.ran.append(cell.code)
            return cell.code not in fails

        def ask(question):
            self.asked.append(question)
            if not self.answers:
                raise EOFError
            return self.answers.pop(0)
        self.said.clear()
        recovery.recover(line, self.log, run, self.said.append, ask)
        self.assertNotIn("Traceback", self.text)
        return self.text

    @property
    def text(self):
        return "\n".join(self.said)

    def test_alone_it_describes_the_session_before_this_one(self):
        self.crash("newest of all")
        self.log.prev = self.crash("a = 1", "b", status=3)
        self.crash("newer")
        self.assertIn("died in In [2]: the cell ended the process itself, status 3", self.recover(""))
        self.assertIn("%recover help", self.text)
        self.assertEqual(self.ran, [])

    def test_without_one_the_newest_that_died_and_here_first(self):
        with mock.patch("os.getcwd", return_value="/here"):
            self.assertIn("no earlier session", self.recover(""))
            self.crash("a", opened={"cwd": "/here"}, status=5)
            self.crash("b", status=6)
            self.assertIn("status 5", self.recover(""))
        self.assertIn("status 6", self.recover(""))

    def test_replay_shows_asks_runs_and_leaves_a_record(self):
        self.log.prev = session = self.crash("a = 1", "%recover replay", "b = 2", "die()")
        self.assertIn("left out: In [2] (%recover), In [4] (running when the kernel died)", self.recover("replay"))
        self.assertIn("In [1]: a = 1", self.said[0])
        self.assertIn("2 cells run again", self.text)
        self.assertEqual(self.ran, ["a = 1", "b = 2"])
        self.assertEqual(len(self.asked), 1)
        self.assertEqual([(record["by"], record["how"]) for record in session.outline() if record["k"] == "recovered"],
                         [("heir", "replay")])

    def test_no_answer_is_no(self):
        session = self.log.prev = self.crash("a", "b")
        for answers in (["n"], [""], []):
            self.answers = answers
            self.assertIn("nothing was run", self.recover("replay"))
        self.assertEqual(self.ran, [])
        self.assertEqual([record for record in session.outline() if record["k"] == "recovered"], [])

    def test_a_selection(self):
        self.log.prev = self.crash("1", "2", "3", "4")
        self.recover("replay 2-3, 4")
        self.assertEqual(self.ran, ["2", "3", "4"])

    def test_it_stops_at_the_first_error_that_is_new(self):
        self.log.prev = self.write({"code": "1", "ok": False}, {"code": "2"}, {"code": "3"}, {"code": "4"})
        self.assertIn("stopped at In [2]; not run: In [3], In [4]", self.recover("replay", fails=("1", "2")))
        self.assertEqual(self.ran, ["1", "2"])

    def test_a_death_right_after_a_recovery_is_said_before_the_question(self):
        first = self.crash("a", "b", more=[RECOVERED], age=20)
        second = self.crash("c", "d", age=10)
        for session in (first, second):
            self.assertTrue(recovery.died_again(session))
            self.log.prev = session
            self.asked.clear()
            self.answers = ["n"]
            self.assertIn("a kernel died within 30 s of recovering this", self.recover("replay"))
            self.assertIn("nothing was run", self.text)
            self.assertIn("within 30 s of a recovery", self.recover(""))
        self.assertEqual(self.ran, [])
        self.answers = ["y"]
        self.recover("replay")
        self.assertEqual(self.ran, ["c"])

    def test_a_death_long_after_a_recovery_does_not(self):
        first = self.crash("a", "b", more=[RECOVERED], age=100)
        self.assertFalse(recovery.died_again(first))
        self.assertFalse(recovery.died_again(self.crash("c", "d", age=10)))
        self.assertFalse(recovery.died_again(first))

    def test_a_session_that_somebody_else_recovers_or_that_lives_is_refused(self):
        session = self.log.prev = self.crash("a", "b")
        with crashlog.find(session.id).take():
            self.assertIn("recovered by somebody else", self.recover("replay"))
        import fcntl
        with open(session.path(".lock"), "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.assertIn("is running (pid 4711", self.recover("replay"))
            self.assertIn("is running (pid 4711", self.recover("drop"))
        self.assertEqual(self.ran, [])

    def test_of_a_session_elsewhere_it_is_said_that_it_may_run(self):
        self.log.prev = self.crash("a", "b", lock={"host": "elsewhere", "boot": "x"}, opened={"host": "elsewhere"})
        self.answers = ["n"]
        self.assertIn("may still be running, on host elsewhere", self.recover("replay"))
        self.assertEqual(self.ran, [])

    def test_definitions_are_shown_and_run(self):
        self.log.prev = self.crash("def f(): pass\nx = 1", "die()")
        self.assertIn("def f(): pass", self.recover("defs"))
        self.assertEqual(self.ran, ["def f(): pass\n"])
        self.log.prev = self.crash("x = 1")
        self.assertEqual(self.recover("defs"), "there are no definitions")

    def test_export_list_show_status_help(self):
        session = self.log.prev = self.crash("a = 1", "die()")
        path = os.path.join(self.home.work, "with space.py")
        self.assertIn(path, self.recover("export '%s'" % path))
        self.assertIn("exists already", self.recover("export '%s'" % path))
        self.assertTrue(os.path.exists(path))
        self.assertIn(session.id, self.recover("list"))
        self.assertIn("In [2]: die()", self.recover("show"))
        self.assertIn("replay", self.recover("help"))
        self.log.folder, self.log.id = session.folder, session.id
        self.assertIn(session.path(".log"), self.recover("status"))
        self.log.is_on = False
        self.assertIn("not logged", self.recover("status"))
        self.log = None
        self.assertIn("not logged", self.recover("status"))

    def test_drop_asks_and_deletes(self):
        session = self.log.prev = self.crash("a")
        self.answers = ["n", "y"]
        self.assertIn("nothing", self.recover("drop"))
        self.assertTrue(os.path.exists(session.path(".log")))
        self.recover("drop")
        self.assertFalse(os.path.exists(session.path(".log")))
        self.assertIn("no earlier session", self.recover(""))

    def test_another_session_by_its_name(self):
        other = self.crash("other", "x")
        self.log.prev = self.crash("a", "b")
        self.recover("replay 1 " + other.id)
        self.recover("show " + other.id[:15])
        self.assertIn("other", self.text)
        self.assertEqual(self.ran, ["other"])

    def test_wrong_usage_is_one_line(self):
        self.log.prev = self.crash("a", "b")
        for line in ("vars", "replay x", "export", "export a b", "show me", "list all", "show 20991231T0", "'",
                     "drop 1 2", "replay 20261123T0 20261123T1", "export x.txt"):
            with self.subTest(line=line):
                self.assertRegex(self.recover(line), r"^%recover: [^\n]+$")
        self.assertEqual((self.ran, self.asked), ([], []))

    def test_an_unsafe_folder_is_one_line(self):
        os.chmod(os.path.dirname(crashlog.sessions_folder()), 0o777)
        self.log.prev = None
        for line in ("", "list", "replay"):
            self.assertRegex(self.recover(line), r"^%recover: [^\n]+$")


class CommandLine(LogCase):

    def test_list_show_export_drop(self):
        session = self.crash("a = 1", "die()", status=-11)
        self.assertIn("SIGSEGV", self.crashlog())
        self.assertIn(session.id, self.crashlog("--list"))
        self.assertIn("In [2]: die()", self.crashlog("--show", session.id))
        for name in ("x.py", "x.ipynb"):
            self.crashlog("--export", session.id, name)
            self.assertIn("%s exists already" % name, self.crashlog("--export", session.id, name, status=2))
        self.assertEqual(sorted(os.listdir(self.home.work)), ["x.ipynb", "x.py"])
        self.crashlog("--drop", session.id)
        self.assertEqual(crashlog.sessions(), [])
        self.assertEqual(self.crashlog(), "there are no sessions\n")

    def test_an_unknown_session_names_those_there_are(self):
        session = self.crash("a")
        for option in ("--show", "--drop", "--replay", "--export"):
            more = ["x.py"] if option == "--export" else []
            self.assertIn(session.id, self.crashlog(option, "nobody", *more, status=2))

    def test_wrong_usage(self):
        session = self.crash("a", "b")
        self.crashlog("--show", status=2)
        self.crashlog("--list", "--drop", session.id, status=2)
        self.assertIn("must end in", self.crashlog("--export", session.id, "x.txt", status=2))
        self.assertIn("nobody", self.crashlog("--replay", session.id, "--into", "nobody", status=2,
                                              input=b"y\n", stdin=None))

    def test_a_terminal_that_is_not_utf_8_and_a_reader_that_leaves(self):
        session = self.write({"code": "'\u20ac \ud800'"})
        self.home.env["PYTHONIOENCODING"] = "ascii"
        self.assertIn("'\\u20ac \\ud800'", self.crashlog("--show", session.id))
        read, write = os.pipe()
        os.close(read)
        with open(write, "wb") as file:
            done = subprocess.run([sys.executable, "-m", "twoproc.crashlog", "--show", session.id], env=self.home.env,
                                  cwd=self.home.work, stdout=file, stderr=subprocess.PIPE, timeout=support.DEADLINE)
        self.assertNotIn(b"Traceback", done.stderr)
        self.assertNotIn(b"Exception", done.stderr)

    def test_replay_without_anybody_to_ask_runs_nothing(self):
        session = self.crash("a", "b")
        self.assertIn("nothing was run", self.crashlog("--replay", session.id, status=1))
        self.assertIn("nothing was run", self.crashlog("--replay", session.id, status=1, stdin=None, input=b"n\n"))
        self.assertIn("nothing was run", self.crashlog("--replay", self.crash("killer").id, status=1))


# -- with real kernels -----------------------------------------------------------------------------

class RealKernels(LogCase):

    def setUp(self):
        super().setUp()
        support._cleanup(self, vt.end_kernels, self.home)

    def died(self, *codes, **options):
        """A kernel that ran these and did not survive the last; its session."""
        kernel = support.start_kernel(self, home=self.home)
        client = kernel.client()
        for code in codes[:-1]:
            client.execute(code)
        client.send_execute(codes[-1])
        self.status = kernel.wait()
        return crashlog.sessions()[0]

    def cli(self, *arguments):
        """The command line with somebody who answers y, in the background."""
        process = support.Process(self, [sys.executable, "-m", "twoproc.crashlog", *arguments], home=self.home,
                                  stdin=subprocess.PIPE)
        process.popen.stdin.write(b"y\n" * 5)
        process.popen.stdin.flush()
        return process

    def test_a_thread_that_dies_while_the_kernel_is_idle(self):
        session = self.died("import ctypes, threading, os\ndef work():\n    gate.wait()\n    ctypes.string_at(0)",
                            "gate = threading.Event()\nthreading.Thread(target=work).start()",
                            "threading.Timer(0.2, gate.set).start()")
        for status in (None, self.status):
            self.assertRegex(str(recovery.cause(session, status)),
                             r"^died while idle, after In \[3\]: SIGSEGV in a thread( \(.*\))?, "
                             r"at line 4 of In \[1\], in work$")

    def test_a_childs_crash_is_not_the_kernels(self):
        session = self.died("import ctypes, os\nif not os.fork(): ctypes.string_at(0)\nos.wait()[1] & 127",
                            "os.kill(os.getpid(), 9)")
        self.assertIn("text/plain': '11'", str(session.cells()[0].outputs))
        self.assertIn("nothing else is known", recovery.cause(session).text)

    def test_the_notebook_of_a_real_session_validates(self):
        session = self.died(
            "from IPython.display import *\nprint(1); handle = display(HTML('<b>x</b>'), display_id=True)\n2",
            "handle.update(Latex('$y$'))", "print('gone'); clear_output(); print('there')", "1 / 0",
            "%%private\nx = 'secret'", "display({'application/json': {'a': [1]}}, raw=True)",
            "import os; os._exit(3)")
        path = os.path.join(self.home.work, "x.ipynb")
        recovery.export(session, path)
        with open(path, encoding="utf-8") as file:
            text = file.read()
        validate(text)
        cells = json.loads(text)["cells"]
        self.assertEqual([out["output_type"] for out in cells[0]["outputs"]],
                         ["stream", "display_data", "execute_result"])
        self.assertIn("text/latex", cells[0]["outputs"][1]["data"])
        self.assertEqual(cells[2]["outputs"][0]["text"], "there\n")
        self.assertEqual(cells[3]["outputs"][0]["ename"], "ZeroDivisionError")
        self.assertEqual(cells[4]["cell_type"], "markdown")
        self.assertEqual(cells[-1]["outputs"][-1]["ename"], "KernelDied")
        self.assertNotIn("secret", text)

    def test_an_exported_script_runs_in_ipython(self):
        session = self.died("%time x = 20", "%%capture captured\nprint(x)", "import os\nos._exit(3)")
        recovery.export(session, os.path.join(self.home.work, "x.py"))
        done = subprocess.run([sys.executable, "-m", "IPython", "--colors=NoColor", "-c",
                               "%run -i x.py\nprint('out', x, captured.stdout)"], env=self.home.env,
                              cwd=self.home.work, capture_output=True, text=True, timeout=support.DEADLINE)
        self.assertIn("out 20 20", done.stdout, done.stderr)

    def test_the_magic_in_the_next_kernel(self):
        first = support.start_kernel(self, home=self.home)
        client = first.client()
        client.execute("def twice(a): return 2 * a\nx = 20")
        client.send_execute("import os; os._exit(3)")
        first.wait()
        again = support.Kernel(self, successor_of=first)
        again.wait_file()
        client = again.client()
        self.assertIn("died in In [2]", client.execute("%recover").text())
        self.assertIn("twice", client.execute("%recover defs").text())
        self.assertEqual(client.execute("twice(4)").value, "8")
        self.assertIn("nothing was run", client.execute("%recover replay").text())      # nobody can answer
        self.assertIn("1 cell run again", client.execute("%recover replay", answers=["y"]).text())
        self.assertEqual(client.execute("twice(x)").value, "40")
        self.assertIn(".log", client.execute("%recover status").text())
        self.assertIn("x.ipynb written", client.execute("%recover export x.ipynb").text())
        self.assertTrue(os.path.exists(os.path.join(self.home.work, "x.ipynb")))
        self.assertRegex(client.execute("%recover nonsense").text(), r"^%recover: [^\n]+\n$")
        client.execute("%recover drop", answers=["y"])
        self.assertEqual(len(crashlog.sessions()), 1)

    def test_replay_into_a_running_kernel(self):
        session = self.died("x = 20\nx", "print(input('how? '))", "import os\nos._exit(3)")
        kernel = support.start_kernel(self, home=self.home)
        process = self.cli("--replay", session.id, "--into", kernel.connection_file)
        self.assertEqual(process.wait(), 0, process.log())
        self.assertIn("how? y", process.output())
        self.assertIn("Out[1]: 20", process.output())
        self.assertIn("2 cells run again", process.output())
        self.assertEqual(kernel.client().execute("x").value, "20")
        self.assertEqual([record["by"] for record in session.outline() if record["k"] == "recovered"],
                         [crashlog.sessions()[0].id])

    def test_replay_into_a_new_kernel_in_the_same_folder(self):
        session = self.died("import os\nprint('\x1b]0;title\x07in', os.path.basename(os.getcwd()))", "1 / 0", "y = 7",
                            "os._exit(3)")
        process = self.cli("--replay", session.id)
        self.assertEqual(process.wait(), 0, process.log())
        text = process.output()
        self.assertIn("in work\n", text)
        self.assertNotIn("\x1b", text)
        self.assertIn("ZeroDivisionError", text)         # not new: it failed then, too
        self.assertIn("3 cells run again", text)
        self.assertRegex(text, r"kernel \S+ is left running; join it with: .* -m twoproc\.frontend --existing \S+")
        self.assertEqual(len(vt.kernel_pids(self.home)), 1)

    def test_ctrl_c_stops_the_cell_and_the_replay(self):
        session = self.crash("import time", "print('begun', flush=True); time.sleep(60)", "z = 1", "die()")
        kernel = support.start_kernel(self, home=self.home)
        process = self.cli("--replay", session.id, "--into", kernel.connection_file)
        support.wait_until(lambda: "begun\n" in process.output(), what="the cell that waits")
        process.popen.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(), 130, process.log())
        self.assertIn("KeyboardInterrupt", process.output())
        self.assertIn("\ninterrupted\n", process.output())
        self.assertNotIn("z = 1\nz = 1", process.output())
        self.assertNotIn("Traceback (most recent call last)\n  File", process.log())
        self.assertEqual(kernel.client().execute("1").value, "1")

    def test_a_replay_that_kills_again_is_mentioned_the_next_time(self):
        session = self.crash("x = 1", "import os; os._exit(4)", "last")
        process = self.cli("--replay", session.id)
        self.assertEqual(process.wait(), 70, process.log())
        self.assertIn("kernel died", process.log())
        self.assertNotIn("within 30 s", process.output())
        process = self.cli("--replay", session.id)
        self.assertEqual(process.wait(), 70, process.log())
        self.assertIn("a kernel died within 30 s of recovering this", process.output())


if __name__ == "__main__":
    unittest.main()
