# Distributed under the terms of the BSD 3-Clause License.
"""The interpreter without a kernel: shell.Interpreter in a process of its own, driven over a pipe.

IPython's shell is one per process and changes builtins, sys and the environment, so no test makes one here.
`drive`, at the end, is the other side: it calls one method per line of JSON and tells what was published.
"""
import json
import os
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import unittest

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEADLINE = 60.0


def can_import(*names):
    from importlib.util import find_spec
    return all(find_spec(name) for name in names)


class Outcome:
    """What a call gave: the reply, and what was published, asked and written to descriptors meanwhile."""

    def __init__(self, found):
        self.reply = found["reply"]
        self.published = found["published"]         # [msg_type, content, metadata, buffers, parent msg_id]
        self.asked = found["asked"]
        self.written = found["written"]

    def of(self, msg_type):
        return [content for kind, content, *_ in self.published if kind == msg_type]

    @property
    def text(self):
        return "".join(content["text"] for content in self.of("stream"))

    @property
    def value(self):
        results = self.of("execute_result")
        return results[-1]["data"]["text/plain"] if results else None

    @property
    def error(self):
        return self.reply.get("ename")


class Driven:
    """The process that has the interpreter."""

    def __init__(self, home, profile=None, environment=(), **options):
        self.home = home
        self.profile = profile or os.path.join(home, "profile")
        known = {name: value for name, value in os.environ.items()
                 if name not in ("MPLBACKEND", "IPYKERNEL_CELL_NAME", "PYTHONBREAKPOINT", "PYTHONSTARTUP")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from test import test_shell; test_shell.drive()",
             json.dumps({"profile_dir": self.profile, **options})],
            cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env={**known, "IPYTHONDIR": os.path.join(home, "ipython"), "HOME": home, **dict(environment)})
        try:
            self.ready = self._read()
        except BaseException:
            self.kill()
            raise

    def _read(self):
        until, line = time.monotonic() + DEADLINE, b""
        while not line.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], max(0, until - time.monotonic()))[0]:
                raise AssertionError("no answer within %d s" % DEADLINE)
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                raise AssertionError("the process ended with %s" % self.process.wait())
            line += more
        return json.loads(line)

    def call(self, name, *arguments, answers=(), **options):
        self.process.stdin.write(json.dumps(
            {"call": name, "arguments": arguments, "answers": answers, **options}).encode() + b"\n")
        self.process.stdin.flush()
        return Outcome(self._read())

    def execute(self, code, silent=False, store_history=True, user_expressions=None, **options):
        return self.call("execute", code, silent, store_history, user_expressions or {}, **options)

    def end(self):
        """Let the process end as a kernel does, exit functions and all; what it still wrote."""
        self.process.stdin.close()
        rest = self.process.stdout.read().decode()
        self.process.stdout.close()
        self.process.wait(DEADLINE)
        return rest

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE)
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:
                pass


def make_home(case):
    home = tempfile.mkdtemp(prefix="twoproc-shell-")
    (case.addClassCleanup if isinstance(case, type) else case.addCleanup)(shutil.rmtree, home, True)
    return home


def start(case, home=None, **options):
    driven = Driven(home or make_home(case), **options)
    (case.addClassCleanup if isinstance(case, type) else case.addCleanup)(driven.kill)
    return driven


class ShellCase(unittest.TestCase):
    """One interpreter for all tests of a class."""

    options: dict = {}

    @classmethod
    def setUpClass(cls):
        cls.shell = start(cls, **cls.options)

    def run_cell(self, code, **options):
        return self.shell.execute(code, **options)

    def assertRuns(self, code, value=None, **options):
        outcome = self.run_cell(code, **options)
        self.assertEqual(outcome.reply["status"], "ok", outcome.reply)
        if value is not None:
            self.assertEqual(outcome.value, value)
        return outcome


class Cells(ShellCase):
    def test_a_value_is_published_under_the_request_that_asked(self):
        outcome = self.assertRuns("20 + 22", parent="request-7")
        (kind, content, _, _, parent), = outcome.published
        self.assertEqual((kind, content["data"], parent), ("execute_result", {"text/plain": "42"}, "request-7"))
        self.assertEqual(content["execution_count"], outcome.reply["execution_count"])

    def test_a_semicolon_hides_the_value_of_this_cell_only(self):
        self.assertEqual(self.assertRuns("1;").published, [])
        self.assertRuns("2", "2", store_history=False)

    def test_silent_shows_no_value_and_counts_nothing(self):
        before = self.assertRuns("0").reply["execution_count"]
        self.assertEqual(self.assertRuns("5", silent=True).published, [])
        self.assertRuns("6", store_history=False)
        self.assertEqual(self.assertRuns("0").reply["execution_count"], before + 1)

    def test_user_expressions_fail_one_by_one(self):
        reply = self.assertRuns("v = 3", user_expressions={"good": "v + 1", "bad": "1/0"}).reply
        self.assertEqual(reply["user_expressions"]["good"]["data"]["text/plain"], "4")
        self.assertEqual(reply["user_expressions"]["bad"]["ename"], "ZeroDivisionError")

    def test_an_error_is_published_and_replied_with_the_same_traceback(self):
        outcome = self.run_cell("def f(): return 1/0\nf()")
        error, = outcome.of("error")
        self.assertEqual({name: outcome.reply[name] for name in error}, error)
        self.assertEqual((error["ename"], error["evalue"]), ("ZeroDivisionError", "division by zero"))
        self.assertTrue(all(isinstance(line, str) for line in error["traceback"]))
        self.assertNotIn("twoproc", "".join(error["traceback"]))
        self.assertNotIn("hidden", "".join(error["traceback"]))

    def test_a_syntax_error_is_an_error(self):
        outcome = self.run_cell("def f(:")
        self.assertEqual((outcome.error, len(outcome.of("error"))), ("SyntaxError", 1))

    def test_an_unknown_magic_is_an_error(self):
        outcome = self.run_cell("%nosuchmagic")
        self.assertEqual((outcome.error, len(outcome.of("error"))), ("UsageError", 1))

    @unittest.skipIf(sys.version_info < (3, 11), "exception groups came with Python 3.11")
    def test_an_exception_group_is_one_error_and_no_other_output(self):
        outcome = self.run_cell("raise ExceptionGroup('many', [ValueError(1), KeyError(2)])")
        self.assertEqual((outcome.error, [kind for kind, *_ in outcome.published]), ("ExceptionGroup", ["error"]))
        self.assertIn("KeyError: 2", "".join(outcome.reply["traceback"]))

    def test_an_exception_whose_text_fails_is_still_told(self):
        outcome = self.run_cell("class Odd(Exception):\n    def __str__(self): raise RuntimeError()\nraise Odd()")
        self.assertEqual(outcome.error, "Odd")
        self.assertRuns("1", "1")

    def test_an_exception_that_led_to_itself_is_told(self):
        outcome = self.run_cell("first, second = ValueError(1), KeyError(2)\n"
                                "first.__context__, second.__context__ = second, first\nraise first")
        self.assertEqual([error["ename"] for error in outcome.of("error")], ["ValueError"])
        self.assertIn("KeyError: 2", "".join(outcome.reply["traceback"]))

    def test_an_exception_at_the_end_of_a_thousand_is_told(self):
        outcome = self.run_cell("error = first = ValueError(1)\nfor i in range(2000):\n"
                                "    error.__context__ = error = KeyError(i)\nraise first")
        self.assertEqual([error["ename"] for error in outcome.of("error")], ["ValueError"])

    def test_an_exception_whose_text_ends_the_program_is_told(self):
        outcome = self.run_cell("class Odd(Exception):\n    def __str__(self): raise SystemExit\nraise Odd()")
        self.assertEqual([outcome.error, *(error["ename"] for error in outcome.of("error"))], ["Odd", "Odd"])

    def test_a_value_whose_repr_fails_is_an_error(self):
        outcome = self.run_cell("class R:\n    def __repr__(self): return 1/0\nR()")
        self.assertEqual((outcome.reply["status"], outcome.error), ("error", "ZeroDivisionError"))

    def test_ctrl_c_in_a_repr_is_forgotten_in_the_next_cell(self):
        self.assertEqual(self.run_cell("class R:\n    def __repr__(self): raise KeyboardInterrupt\nR()").error,
                         "KeyboardInterrupt")
        self.assertRuns("try: 1/0\nexcept Exception: get_ipython().showtraceback()")

    def test_a_repr_may_show_values_itself(self):
        outcome = self.assertRuns("import sys\nclass R:\n    def __repr__(self):\n        sys.displayhook(5)\n"
                                  "        return 'R'\nR()", "R")
        self.assertEqual([result["data"]["text/plain"] for result in outcome.of("execute_result")], ["5", "R"])

    def test_system_exit_is_reported_and_the_next_cell_runs(self):
        self.assertEqual(self.run_cell("import sys; sys.exit(3)").error, "SystemExit")
        self.assertRuns("1", "1")

    def test_exit_asks_the_frontend_to_leave(self):
        for code, keep in (("exit", False), ("quit", False), ("exit()", False), ("exit(keep_kernel=True)", True)):
            payload, = self.assertRuns(code).reply["payload"]
            self.assertEqual(payload, {"source": "ask_exit", "keepkernel": keep}, code)
        self.assertEqual(self.assertRuns("1").reply["payload"], [])

    def test_payloads_tell_the_frontend_what_to_open(self):
        path = os.path.join(self.shell.home, "some.py")
        with open(path, "w") as file:
            file.write("x = 1\n")
        page, = self.assertRuns("%less " + path).reply["payload"]
        self.assertEqual((page["source"], page["start"]), ("page", 0))
        help_page, = self.assertRuns("len?").reply["payload"]
        self.assertIn("len(obj", strip([help_page["data"]["text/plain"]]))
        load, = self.assertRuns("%load " + path).reply["payload"]
        self.assertEqual((load["source"], load["replace"], "x = 1" in load["text"]), ("set_next_input", True, True))
        edit, = self.assertRuns("%edit " + path).reply["payload"]
        self.assertEqual((edit["source"], edit["filename"]), ("edit_magic", path))
        following, = self.assertRuns("get_ipython().set_next_input('abc')").reply["payload"]
        self.assertEqual(following, {"source": "set_next_input", "text": "abc", "replace": False})

    def test_displays_are_published_updated_and_cleared(self):
        outcome = self.assertRuns(
            "from IPython.display import display, clear_output\n"
            "handle = display(1, display_id='one'); handle.update(2); clear_output(wait=True)")
        first, = outcome.of("display_data")
        second, = outcome.of("update_display_data")
        self.assertEqual((first["data"]["text/plain"], first["transient"]), ("1", {"display_id": "one"}))
        self.assertEqual((second["data"]["text/plain"], second["transient"]), ("2", {"display_id": "one"}))
        self.assertEqual(outcome.of("clear_output"), [{"wait": True}])

    def test_magics_that_people_use_every_day_work(self):
        os_folder = self.shell.home
        self.assertRuns(f"%%writefile {os_folder}/w.py\nq = 11")
        self.assertRuns(f"%run {os_folder}/w.py\nq", "11")
        self.assertIn("q", self.assertRuns("%who").text)
        self.assertIn("loop", self.assertRuns("%timeit -n1 -r1 pass").text)
        self.assertIn("hello", self.assertRuns("%%bash\necho hello").text)
        self.assertIn("asyncio", self.assertRuns("%autoawait").text)
        self.assertRuns("get_ipython().getoutput('echo a; echo b')", "['a', 'b']")
        self.assertRuns("%gui asyncio")
        self.assertIn("1", self.assertRuns("%%capture seen\nprint(1)").text or "1")
        self.assertRuns("seen.stdout", repr("1\n"))

    def test_a_command_writes_to_the_descriptors_and_reads_nothing(self):
        outcome = self.assertRuns("!echo out; echo err >&2; cat; exit 3")
        self.assertEqual(sorted(outcome.written.split()), ["err", "out"])
        self.assertRuns("_exit_code", "3")

    def test_connect_info_tells_the_file_and_keeps_the_key(self):
        path = os.path.join(self.shell.home, "kernel-1.json")
        with open(path, "w") as file:
            json.dump({"transport": "ipc", "key": "top secret"}, file)
        self.assertRuns("get_ipython().interpreter.connection_file = %r" % path)
        text = self.assertRuns("%connect_info").text
        self.assertIn("--existing " + path, text)
        self.assertNotIn("top secret", text)

    def test_the_cell_can_be_named_by_the_environment(self):
        self.assertRuns("import os; os.environ['IPYKERNEL_CELL_NAME'] = '/tmp/my_script.py'")
        self.addCleanup(self.run_cell, "del os.environ['IPYKERNEL_CELL_NAME']")
        self.assertRuns("(lambda: 0).__code__.co_filename", "'/tmp/my_script.py'")

    def test_libraries_take_us_for_a_notebook_kernel(self):
        self.assertRuns("get_ipython().__class__.__name__, 'IPKernelApp' in get_ipython().config",
                        "('ZMQInteractiveShell', True)")
        self.assertRuns("import os; os.environ['MPLBACKEND']", "'module://matplotlib_inline.backend_inline'")
        self.assertRuns("get_ipython().kernel.get_parent()['header']['msg_id']", "'request-9'", parent="request-9")


class InterruptedMagics(unittest.TestCase):
    def test_a_magic_whose_loading_was_interrupted_is_loaded_at_its_next_use(self):
        shell = start(self)
        shell.execute("import importlib\nimported = importlib.import_module\ndef stop(*names):\n"
                      "    importlib.import_module = imported\n    raise KeyboardInterrupt\n"
                      "importlib.import_module = stop\n%timeit -n1 -r1 pass")
        self.assertIn("loop", shell.execute("%timeit -n1 -r1 pass").text)


class AsInPython(ShellCase):
    """What user code puts into sys stays there and does what it does in python."""

    def test_a_displayhook_of_the_user_stays_and_gets_the_values(self):
        self.assertRuns("import sys; mine = []; sys.displayhook = mine.append")
        outcome = self.assertRuns("41")
        self.assertEqual(outcome.published, [])
        self.assertRuns("sys.displayhook = get_ipython().displayhook")
        self.assertRuns("mine", "[41]")

    def test_an_excepthook_of_the_user_stays_and_gets_the_errors(self):
        self.assertRuns("import sys; caught = []; sys.excepthook = lambda *found: caught.append(found)")
        outcome = self.run_cell("1/0")
        self.assertEqual((outcome.error, outcome.published), ("ZeroDivisionError", []))
        self.assertRuns("sys.excepthook = get_ipython().excepthook")
        self.assertRuns("[found[0].__name__ for found in caught], caught[0][2].tb_frame.f_code.co_name",
                        "(['ZeroDivisionError'], '<module>')")

    def test_an_excepthook_that_fails_does_not_hide_the_error(self):
        self.assertRuns("import sys; sys.excepthook = lambda *found: nosuchname")
        outcome = self.run_cell("1/0")
        self.assertEqual([error["ename"] for error in outcome.of("error")], ["ZeroDivisionError"])
        self.assertIn("Error in sys.excepthook", outcome.text)
        self.assertRuns("sys.excepthook = get_ipython().excepthook")

    def test_input_and_getpass_ask_the_frontend(self):
        outcome = self.assertRuns("import getpass; input('name? '), getpass.getpass('secret: ')",
                                  "('ann', 'xyz')", answers=["ann", "xyz"])
        self.assertEqual(outcome.asked, [["name? ", False], ["secret: ", True]])

    def test_input_reads_from_a_stdin_of_the_user(self):
        outcome = self.assertRuns("import io, sys; own, sys.stdin = sys.stdin, io.StringIO('line\\n')\n"
                                  "found = input()\nsys.stdin = own\nfound", "'line'")
        self.assertEqual(outcome.asked, [])

    def test_end_of_file_and_forbidden_input_are_errors_of_the_cell(self):
        self.assertEqual(self.run_cell("input()", answers=["<EOF>"]).error, "EOFError")
        self.assertEqual(self.run_cell("input()", answers=["<FORBIDDEN>"]).error, "StdinNotImplementedError")

    def test_breakpoint_stops_and_asks(self):
        outcome = self.assertRuns("y = 6\nbreakpoint()\nz = y", answers=["p y * 7", "c"])
        self.assertEqual(len(outcome.asked), 2)
        self.assertIn("42", outcome.text)

    def test_breakpoint_at_the_end_of_a_cell_stops_in_the_cell(self):
        outcome = self.assertRuns("here = 5\nbreakpoint()", answers=["p here * 9", "n", "n", "n", "n"])
        self.assertIn("45", outcome.text)
        self.assertNotIn("displayhook", outcome.text)
        self.assertRuns("import sys; sys.gettrace() is None", "True")

    def test_who_steps_goes_from_statement_to_statement_of_the_cell(self):
        outcome = self.assertRuns("breakpoint()\nfirst = 1\nsecond = 2",
                                  answers=["n", "n", "n", "p first + 41", "n", "c"])
        self.assertIn("42", outcome.text)
        self.assertNotIn("twoproc", outcome.text)

    def test_a_debugger_that_was_told_to_continue_leaves_ctrl_c_alone(self):
        for stop in ("breakpoint()", "import pdb; pdb.set_trace()"):
            self.assertRuns(stop + "\nx = 1", answers=["c"])
            self.assertRuns("import signal; signal.getsignal(signal.SIGINT) is signal.default_int_handler", "True")

    def test_debug_inspects_the_last_error(self):
        self.run_cell("def divide(a): return 1/a\ndivide(0)")
        outcome = self.assertRuns("%debug", answers=["p a + 77", "q"])
        self.assertIn("77", outcome.text)

    def test_the_namespace_is_main(self):
        self.assertRuns("import sys; word = 1; sys.modules['__main__'].word, __name__", "(1, '__main__')")


class Awaiting(ShellCase):
    def setUp(self):
        self.run_cell("import asyncio, signal, threading, time, contextvars\n"
                      "def interrupt(delay=0.4):\n"
                      "    threading.Timer(delay, signal.pthread_kill, (threading.main_thread().ident,"
                      " signal.SIGINT)).start()")

    def assertInterrupted(self, code):
        began = time.monotonic()
        outcome = self.run_cell(code)
        self.assertEqual(outcome.error, "KeyboardInterrupt", outcome.reply)
        self.assertEqual([error["ename"] for error in outcome.of("error")], ["KeyboardInterrupt"])
        self.assertLess(time.monotonic() - began, 20)         # of sixty seconds
        self.assertRuns("len(asyncio.all_tasks(asyncio.get_event_loop()))", "0")
        return outcome

    def test_asyncio_run_works_in_a_cell(self):
        self.assertRuns("async def f(): return 8\nasyncio.run(f())", "8")
        self.assertRuns("await f()", "8")

    def test_a_cell_awaits_and_shows_its_value(self):
        self.assertRuns("await asyncio.sleep(0, 'done')", "'done'")

    def test_get_event_loop_gives_the_loop_that_cells_await_on(self):
        self.assertRuns("asyncio.run(asyncio.sleep(0))")
        self.assertRuns("here = asyncio.get_event_loop()\nasync def which(): return asyncio.get_running_loop()")
        self.assertRuns("await which() is here", "True")
        self.assertRuns("here.run_until_complete(which()) is here", "True")

    def test_context_variables_last_from_cell_to_cell(self):
        self.assertRuns("v = contextvars.ContextVar('v', default=0); v.set(1);")
        self.assertRuns("await asyncio.sleep(0); v.set(v.get() + 1);")
        self.assertRuns("v.get()", "2")

    def test_a_task_left_by_a_cell_goes_on_while_the_kernel_waits(self):
        self.assertRuns("async def later():\n    await asyncio.sleep(0.05); print('later'); finished.append(1)\n"
                        "finished = []; task = asyncio.get_event_loop().create_task(later());", parent="first")
        self.assertTrue(self.shell.call("has_pending_tasks").reply)
        outcome = self.shell.call("wait_until_text", "later", parent="second")
        self.assertEqual([parent for *_, parent in outcome.published], ["first"] * len(outcome.published))
        self.assertRuns("finished", "[1]")
        self.assertFalse(self.shell.call("has_pending_tasks").reply)

    def test_a_message_ends_the_waiting(self):
        self.assertRuns("task = asyncio.get_event_loop().create_task(asyncio.sleep(1000));")
        self.shell.call("wait_for_message")
        self.assertRuns("task.cancel();")
        self.assertRuns("await asyncio.sleep(0)")

    def test_a_timer_alone_is_pending(self):
        self.assertRuns("timer = asyncio.get_event_loop().call_later(1000, print);")
        self.assertTrue(self.shell.call("has_pending_tasks").reply)
        self.assertRuns("timer.cancel(); await asyncio.sleep(0)")

    def test_other_threads_may_call_into_a_cell_that_awaits(self):
        self.assertRuns("event = asyncio.Event()\n"
                        "hand_over = get_ipython().interpreter.call_in_running_loop\n"
                        "threading.Timer(0.05, hand_over, (event.set,)).start()\n"
                        "await asyncio.wait_for(event.wait(), 30)", "True")

    def test_interrupt_of_an_awaited_sleep(self):
        outcome = self.assertInterrupted("interrupt()\nawait asyncio.sleep(60)")
        self.assertIn("await asyncio.sleep(60)", strip(outcome.reply["traceback"]))
        self.assertNotIn("selectors", strip(outcome.reply["traceback"]))

    def test_interrupt_of_a_blocking_call_in_a_coroutine(self):
        self.assertInterrupted("async def f(): time.sleep(60)\ninterrupt()\nawait f()")

    def test_interrupt_of_gathered_coroutines(self):
        self.assertInterrupted("async def f(): time.sleep(60)\ninterrupt()\nawait asyncio.gather(f(), f(), f())")

    def test_interrupt_takes_along_the_tasks_that_the_cell_made_and_no_others(self):
        self.assertRuns("old = asyncio.get_event_loop().create_task(asyncio.sleep(1000));")
        outcome = self.run_cell("new = asyncio.create_task(asyncio.sleep(1000)); interrupt()\nawait asyncio.sleep(60)")
        self.assertEqual(outcome.error, "KeyboardInterrupt")
        self.assertRuns("new.cancelled(), old.done()", "(True, False)")
        self.assertRuns("old.cancel(); await asyncio.sleep(0)")

    def test_interrupt_of_asyncio_run(self):
        self.assertInterrupted("interrupt()\nasyncio.run(asyncio.sleep(60))")

    def test_interrupt_of_a_command(self):
        outcome = self.run_cell("interrupt()\n!sleep 60 | cat")
        self.assertEqual(outcome.error, "KeyboardInterrupt")

    @unittest.skipUnless(can_import("trio"), "trio is not installed")
    def test_trio_can_be_awaited(self):
        self.assertRuns("%autoawait trio")
        self.assertRuns("import trio; await trio.sleep(0); 5", "5")
        self.assertRuns("%autoawait asyncio")


class Parents(ShellCase):
    def test_a_thread_follows_the_latest_cell_unless_pinned(self):
        self.assertRuns("import threading\nip = get_ipython(); gate = threading.Event(); gone = threading.Event()\n"
                        "def work(pin):\n"
                        "    if pin: ip.set_thread_parent(first)\n"
                        "    gate.wait(); print('pinned' if pin else 'free')\n"
                        "first = ip.get_parent()\n"
                        "threads = [threading.Thread(target=work, args=(pin,)) for pin in (0, 1)]\n"
                        "for t in threads: t.start()", parent="one")
        outcome = self.assertRuns("gate.set()\nfor t in threads: t.join()", parent="two")
        found = {content["text"].strip(): parent for _, content, _, _, parent in outcome.published
                 if content["text"].strip()}
        self.assertEqual(found, {"free": "two", "pinned": "one"})

    def test_set_parent_takes_what_get_parent_gave(self):
        self.assertRuns("import threading; kept = get_ipython().get_parent()", parent="one")
        outcome = self.assertRuns("get_ipython().set_parent(kept); print('x')", parent="two")
        self.assertEqual({parent for *_, parent in outcome.published}, {"one"})


class Asked(ShellCase):
    """complete, inspect, is_complete."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shell.execute("import os, collections\nclass Odd:\n    def __dir__(self): raise RuntimeError\nodd = Odd()\n"
                          "class Plain:\n    def method(self, a, b=2): 'Some text.'\nplain = Plain()")

    def complete(self, code, at=None):
        return self.shell.call("complete", code, len(code) if at is None else at).reply

    def test_completion_of_an_attribute(self):
        reply = self.complete("x = os.path.joi")
        self.assertEqual((reply["matches"], reply["cursor_start"], reply["cursor_end"]), (["join"], 12, 15))
        typed, = reply["metadata"]["_jupyter_types_experimental"]
        self.assertEqual((typed["type"], typed["signature"]), ("function", "(a, *p)"))

    def test_completion_of_a_method_shows_its_signature_without_self(self):
        typed, = self.complete("plain.me")["metadata"]["_jupyter_types_experimental"]
        self.assertEqual((typed["text"], typed["type"], typed["signature"]), ("method", "function", "(a, b=2)"))

    def test_the_short_way_and_jedi_agree(self):
        outcome = self.shell.call("compare_completions", [
            "os.pa", "os.", "os._", "plain.", "plain.__", "os.path.", "os.environ.", "collections.", "odd.",
            "x = os.sep.s",
            "if True:\n    os.pa", "os = 3\nos.pa", "def os(): pass\nos.pa", "from os import *\nos.pa", "'''\nos.pa",
            "os.nosuch.", "nosuch.", "Plain.", "lambda os: os.pa", "os.path.sep.up"])
        self.assertEqual(outcome.reply, [])

    def test_nothing_to_complete_is_an_empty_answer_at_the_cursor(self):
        reply = self.complete("nosuchname_at_all")
        self.assertEqual((reply["status"], reply["matches"], reply["cursor_start"], reply["cursor_end"]),
                         ("ok", [], 17, 17))

    def test_completion_publishes_nothing_whatever_the_objects_do(self):
        self.assertEqual(self.shell.call("complete", "odd.", 4).published, [])

    def test_inspect_finds_what_is_at_the_cursor(self):
        reply = self.shell.call("inspect", "plain.method(1)", 8, 0).reply
        self.assertTrue(reply["found"])
        self.assertIn("Some text.", reply["data"]["text/plain"])
        self.assertFalse(self.shell.call("inspect", "nosuchname", 3, 0).reply["found"])

    def test_is_complete_knows_the_states_of_a_cell(self):
        for code, expected in (("1 + 1", {"status": "complete"}),
                               ("for i in x:", {"status": "incomplete", "indent": "    "}),
                               ("a b", {"status": "invalid"}), ("%%bash\nls", {"status": "incomplete", "indent": ""})):
            self.assertEqual(self.shell.call("is_complete", code).reply, expected, code)


class HistoryIsKept(unittest.TestCase):
    def ask(self, shell, kind, **content):
        return shell.call("history", {
            "hist_access_type": kind, "output": False, "raw": True, "session": 0, "start": 1, "stop": None, "n": None,
            "pattern": "*", "unique": False, **content}).reply["history"]

    def test_tail_range_and_search_answer_before_and_after_writing(self):
        shell = start(self)
        for code in ("a = 1", "a + 1", "%who", "a = 1"):
            shell.execute(code)
        self.assertEqual([line[2] for line in self.ask(shell, "tail", n=2)], ["%who", "a = 1"])
        self.assertEqual([line[1:] for line in self.ask(shell, "range", start=1, stop=3)], [[1, "a = 1"], [2, "a + 1"]])
        self.assertEqual(self.ask(shell, "range", start=2, stop=3, output=True), [[0, 2, ["a + 1", "2"]]])
        self.assertEqual([line[2] for line in self.ask(shell, "search", pattern="a*", unique=True)], ["a + 1", "a = 1"])
        self.assertIn("run_line_magic", self.ask(shell, "tail", n=2, raw=False)[0][2])

    def test_what_is_not_to_be_stored_is_not(self):
        shell = start(self)
        shell.execute("kept = 1")
        shell.execute("dropped = 1", store_history=False)
        shell.execute("silent = 1", silent=True)
        self.assertEqual([line[2] for line in self.ask(shell, "tail", n=9)], ["kept = 1"])

    def test_a_cell_is_found_by_its_number_whatever_was_left_out_before(self):
        shell = start(self)
        shell.execute("def stop(lines):\n    if 'lost' in lines[0]: raise KeyboardInterrupt\n    return lines\n"
                      "get_ipython().input_transformers_cleanup.append(stop)")
        for code in ("lost", "exit", "'found'"):
            shell.execute(code)
        self.assertEqual(shell.execute("In[4]").value, repr("'found'"))
        self.assertEqual(self.ask(shell, "range", start=4, stop=5), [[0, 4, "'found'"]])

    def test_the_next_session_finds_the_last_one(self):
        home = make_home(self)
        first = start(self, home)
        first.execute("from_the_first = 1")
        self.assertTrue(first.call("has_unwritten_history").reply)
        first.end()
        second = start(self, home)
        second.execute("from_the_second = 2")
        self.assertEqual([line[2] for line in self.ask(second, "tail", n=5)],
                         ["from_the_first = 1", "from_the_second = 2"])
        self.assertEqual([line[2] for line in self.ask(second, "range", session=-1)], ["from_the_first = 1"])
        with sqlite3.connect(os.path.join(first.profile, "history.sqlite")) as db:
            self.assertEqual(db.execute("SELECT num_cmds, end IS NULL FROM sessions").fetchall(), [(1, 0), (None, 1)])
        db.close()

    def test_no_cell_touches_the_file(self):
        shell = start(self)
        shell.execute("1")
        self.assertFalse(os.path.exists(os.path.join(shell.profile, "history.sqlite")))
        shell.call("write_history")
        self.assertTrue(os.path.exists(os.path.join(shell.profile, "history.sqlite")))
        self.assertFalse(shell.call("has_unwritten_history").reply)

    def test_no_cell_waits_for_a_request_that_reads_the_file(self):
        shell = start(self)
        shell.execute("import threading\nis_held, is_over = threading.Event(), threading.Event()\n"
                      "def read():\n    with get_ipython().history_manager.db_lock:\n        is_held.set()\n"
                      "        is_over.wait()\nthreading.Thread(target=read).start()\nis_held.wait()")
        self.assertEqual(shell.execute("is_over.set()").reply["status"], "ok")

    def test_a_locked_file_is_written_later_and_left_where_it_is(self):
        home = make_home(self)
        start(self, home).execute("1")
        shell = start(self, home)
        path = os.path.join(shell.profile, "history.sqlite")
        shell.execute("first = 1")
        shell.call("write_history")
        holder = sqlite3.connect(path, isolation_level=None)
        self.addCleanup(holder.close)
        holder.execute("BEGIN EXCLUSIVE")
        shell.execute("second = 2")
        self.assertEqual(shell.call("write_history").text, "")
        self.assertEqual(shell.execute("3").value, "3")
        holder.execute("ROLLBACK")
        shell.end()
        self.assertEqual([source for source, in holder.execute("SELECT source_raw FROM history ORDER BY line")],
                         ["first = 1", "second = 2", "3"])

    def test_a_file_that_is_locked_when_first_needed_is_opened_later(self):
        home = make_home(self)
        first = start(self, home)
        first.execute("1")
        first.end()
        path = os.path.join(first.profile, "history.sqlite")
        holder = sqlite3.connect(path, isolation_level=None)
        self.addCleanup(holder.close)
        holder.execute("BEGIN EXCLUSIVE")
        shell = start(self, home)
        shell.execute("late = 1")
        self.assertEqual(self.ask(shell, "tail", n=5), [])
        self.assertEqual(shell.call("write_history").text, "")
        holder.execute("ROLLBACK")
        self.assertEqual([line[2] for line in self.ask(shell, "tail", n=5)], ["1", "late = 1"])

    def test_a_file_that_is_no_database_is_told_once_and_left_as_it_is(self):
        home = make_home(self)
        profile = os.path.join(home, "profile")
        os.makedirs(profile)
        path = os.path.join(profile, "history.sqlite")
        with open(path, "wb") as file:
            file.write(b"certainly not a database" * 100)
        shell = start(self, home)
        shell.execute("a = 1")
        self.assertIn("history.sqlite", shell.call("write_history").text)
        shell.execute("b = 2")
        self.assertEqual(shell.call("write_history").text, "")
        self.assertEqual([line[2] for line in self.ask(shell, "tail", n=5)], ["a = 1", "b = 2"])
        with open(path, "rb") as file:
            self.assertEqual(file.read(9), b"certainly")

    def test_a_folder_where_nothing_can_be_written_fails_no_session(self):
        home = make_home(self)
        profile = os.path.join(home, "profile")
        os.makedirs(os.path.join(profile, "history.sqlite"))       # a folder: unwritable for root, too
        shell = start(self, home)
        self.assertEqual(shell.execute("1").value, "1")
        self.assertIn("history.sqlite", shell.call("write_history").text)
        self.assertEqual([line[2] for line in self.ask(shell, "tail", n=5)], ["1"])

    def test_reset_starts_a_session_of_its_own(self):
        shell = start(self)
        shell.execute("before = 1")
        shell.execute("get_ipython().history_manager.reset()")
        shell.execute("get_ipython().execution_count = 1", store_history=False)
        shell.execute("after = 1")
        shell.call("write_history")
        self.assertEqual([line[2] for line in self.ask(shell, "tail", n=1)], ["after = 1"])


class Configuration(unittest.TestCase):
    def profile(self, files):
        home = make_home(self)
        for name, text in files.items():
            path = os.path.join(home, "profile", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(text)
        return home

    def test_configuration_extensions_and_startup_files_of_the_profile_apply(self):
        home = self.profile({
            "ipython_config.py": "c = get_config()\nc.InteractiveShell.ast_node_interactivity = 'all'\n"
                                 "c.InteractiveShellApp.exec_lines = ['from_line = 1']\n",
            "ipython_kernel_config.py": "c.IPKernelApp.exec_lines = ['from_kernel_line = 2']\n",
            "startup/00-first.py": "from_file = 3\n", "startup/01-second.ipy": "from_magic = %sx echo 4\n"})
        shell = start(self, home)
        outcome = shell.execute("from_kernel_line\nfrom_file\nfrom_magic")
        self.assertEqual([result["data"]["text/plain"] for result in outcome.of("execute_result")], ["2", "3", "['4']"])

    def test_broken_files_are_told_with_the_first_cell_and_stop_nothing(self):
        home = self.profile({
            "ipython_config.py": "raise RuntimeError('config is broken')\n",
            "startup/00-bad.py": "raise ValueError('startup is broken')\n", "startup/01-good.py": "good = 1\n"})
        shell = start(self, home)
        outcome = shell.execute("1")
        self.assertEqual((outcome.reply["status"], outcome.value), ("ok", "1"))
        self.assertEqual(outcome.published[0][1]["name"], "stderr")
        for text in ("config is broken", "startup is broken"):
            self.assertIn(text, outcome.text)
        self.assertEqual(shell.execute("2").text, "")

    def test_files_that_exit_stop_nothing(self):
        shell = start(self, self.profile({
            "ipython_config.py": "import sys; sys.exit(3)\n", "startup/00-exit.py": "import sys; sys.exit(4)\n",
            "ipython_kernel_config.json": '{"InteractiveShell": {"ast_node_interactivity": "all"}}'}))
        self.assertEqual(len(shell.execute("1\n2").of("execute_result")), 2)

    def test_a_setting_that_ipython_refuses_is_told_and_stops_nothing(self):
        shell = start(self, self.profile({"ipython_config.py": "c.InteractiveShell.cache_size = 'many'\n"}))
        outcome = shell.execute("1")
        self.assertEqual(outcome.value, "1")
        self.assertIn("cache_size", outcome.text)

    def test_an_unwritable_home_stops_nothing(self):
        home = make_home(self)
        with open(os.path.join(home, "file"), "w"):
            pass
        shell = start(self, home, profile=os.path.join(home, "file", "profile"))
        self.assertEqual(shell.execute("1").value, "1")

    def test_starting_imports_nothing_that_is_not_needed(self):
        home = make_home(self)
        found = subprocess.run(
            [sys.executable, "-c", "import sys\nfrom twoproc.shell import Interpreter\n"
             "shell = Interpreter(lambda *found, **more: None, None, profile_dir=sys.argv[1])\n"
             "shell.execute('1 + 1', False, True, {})\nimport IPython\n"
             "print(IPython.version_info[:2] >= (9, 10), *sys.modules)",
             os.path.join(home, "profile")], cwd=HERE, capture_output=True, text=True, timeout=DEADLINE).stdout.split()
        unwanted = {"zmq", "ipykernel", "jupyter_client", "tornado", "debugpy", "psutil"}
        if found[0] == "True":                                  # older ones import these themselves
            unwanted |= {"asyncio", "sqlite3", "pdb", "prompt_toolkit", "stack_data", "jedi"}
        self.assertEqual(unwanted & set(found), set())

    def test_exit_functions_of_the_user_find_their_variables(self):
        shell = start(self)
        shell.execute("import atexit; farewell = 'farewell from the cell'\n"
                      "atexit.register(lambda: open(%r, 'w').write(farewell));" % os.path.join(shell.home, "left"))
        shell.end()
        with open(os.path.join(shell.home, "left")) as file:
            self.assertEqual(file.read(), "farewell from the cell")


@unittest.skipUnless(can_import("comm"), "the comm package is not installed")
class Comms(ShellCase):
    def test_a_comm_of_the_kernel_talks_to_the_frontend(self):
        outcome = self.assertRuns(
            "import comm\nheard = []; c = comm.create_comm(target_name='t', data={'a': 1}, comm_id='c1')\n"
            "c.on_msg(heard.append); c.on_close(heard.append); c.send({'b': 2}, buffers=[b'xyz'])")
        (opened, content, *_), (sent, message, _, buffers, _) = outcome.published
        self.assertEqual((opened, content["target_name"], content["data"], content["comm_id"]),
                         ("comm_open", "t", {"a": 1}, "c1"))
        self.assertEqual((sent, message["data"], buffers), ("comm_msg", {"b": 2}, ["xyz"]))
        self.assertEqual(self.shell.call("comm_info", None).reply["comms"]["c1"], {"target_name": "t"})
        self.assertEqual(self.shell.call("comm_info", "other").reply["comms"], {})
        self.shell.call("comm_msg", content={"comm_id": "c1", "data": {"x": 5}})
        self.shell.call("comm_close", content={"comm_id": "c1", "data": {}})
        self.assertRuns("[m['msg_type'] for m in heard], heard[0]['content']['data']",
                        "(['comm_msg', 'comm_close'], {'x': 5})")
        self.assertNotIn("c1", self.shell.call("comm_info", None).reply["comms"])

    def test_a_frontend_opens_a_comm_to_a_target(self):
        self.assertRuns("import comm\n"
                        "comm.get_comm_manager().register_target('here', lambda c, m: c.send(m['content']['data']))")
        outcome = self.shell.call("comm_open", content={"comm_id": "c2", "target_name": "here", "data": {"q": 1}})
        self.assertEqual([(kind, content["data"]) for kind, content, *_ in outcome.published], [("comm_msg", {"q": 1})])

    def test_an_unknown_target_is_closed(self):
        outcome = self.shell.call("comm_open", content={"comm_id": "c3", "target_name": "nowhere", "data": {}})
        self.assertEqual([(kind, content["comm_id"]) for kind, content, *_ in outcome.published],
                         [("comm_close", "c3")])
        self.assertEqual(self.shell.call("comm_msg", content={"comm_id": "c3", "data": {}}).published, [])

    def test_a_callback_that_fails_is_shown_and_harms_nothing(self):
        self.assertRuns("import comm\nc = comm.create_comm(comm_id='c4'); c.on_msg(lambda m: 1/0)")
        outcome = self.shell.call("comm_msg", content={"comm_id": "c4", "data": {}}, parent="the-message")
        self.assertEqual([(content["ename"], parent) for _, content, _, _, parent in outcome.published],
                         [("ZeroDivisionError", "the-message")])
        self.assertRuns("1", "1")

    @unittest.skipUnless(can_import("ipywidgets"), "ipywidgets is not installed")
    def test_a_slider_opens_shows_and_follows_the_frontend(self):
        outcome = self.assertRuns("from ipywidgets import IntSlider\nseen = []\nslider = IntSlider(value=3)\n"
                                  "slider.observe(lambda change: (seen.append(change['new']), print('moved')),"
                                  " 'value')\nslider")
        self.assertIn("jupyter.widget", [content["target_name"] for content in outcome.of("comm_open")])
        view, = [result["data"]["application/vnd.jupyter.widget-view+json"] for result in outcome.of("execute_result")]
        moved = self.shell.call("comm_msg", content={"comm_id": view["model_id"], "data": {
            "method": "update", "state": {"value": 8}, "buffer_paths": []}}, parent="the-move")
        self.assertIn("moved", moved.text)
        self.assertEqual({parent for *_, parent in moved.published}, {"the-move"})
        self.assertRuns("slider.value, seen", "(8, [8])")

    @unittest.skipUnless(can_import("ipywidgets"), "ipywidgets is not installed")
    def test_an_output_widget_takes_what_is_printed_in_it(self):
        outcome = self.assertRuns("from ipywidgets import Output\nout = Output()\nwith out:\n    print('inside')",
                                  parent="cell-1")
        states = [content["data"]["state"] for content in outcome.of("comm_msg") if "state" in content["data"]]
        self.assertIn("cell-1", [state.get("msg_id") for state in states])


@unittest.skipUnless(can_import("matplotlib", "matplotlib_inline"), "matplotlib is not installed")
class Figures(ShellCase):
    def test_a_figure_is_shown_at_the_end_of_its_cell(self):
        outcome = self.assertRuns("import matplotlib.pyplot as plt\nplt.plot([1, 2]);")
        shown, = outcome.of("display_data")
        self.assertIn("image/png", shown["data"])
        self.assertRuns("%matplotlib inline")


def strip(lines):
    import re
    return re.sub("\x1b\\[[0-9;]*m", "", "\n".join(lines))


# -- the other side ------------------------------------------------------------------------------------

def drive():
    """Run in a process of its own: an Interpreter, one call for each line that comes in."""
    import io
    import socket
    import traceback
    complaints = os.fdopen(os.dup(2), "w")
    sys.excepthook = lambda *found: traceback.print_exception(*found, file=complaints)
    requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    descriptors = tempfile.TemporaryFile("w+b", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptors.fileno(), 1)
    os.dup2(descriptors.fileno(), 2)
    os.set_blocking(1, True)
    published, asked, answers = [], [], []

    class Stream(io.TextIOBase):
        def __init__(self, name):
            self.name = name

        def write(self, text):
            publish("stream", {"name": self.name, "text": text})
            return len(text)

    def plain(value):
        if isinstance(value, (bytes, memoryview)):
            return bytes(value).decode("latin-1")
        return repr(value)

    def publish(msg_type, content, metadata=None, buffers=(), parent=None):
        parent = parent or (interpreter and interpreter.current_parent())
        published.append([msg_type, json.loads(json.dumps(content, default=plain)), metadata, list(buffers),
                          parent and parent.msg_id])

    def ask(prompt, password):
        asked.append([prompt, password])
        answer = answers.pop(0)
        if answer == "<EOF>":
            raise EOFError
        if answer == "<FORBIDDEN>":
            raise shell.StdinNotImplementedError("no input here")
        return answer

    class Mailbox:
        def __init__(self):
            self.reader, self.writer = socket.socketpair()
            self.fileno, self.items = self.reader.fileno, []

        def __len__(self):
            return len(self.items)

        def put(self, item):
            self.items.append(item)
            self.writer.send(b"\0")

    import IPython

    from twoproc import shell
    from twoproc.session import Message

    interpreter = None
    sys.stdout, sys.stderr, sys.stdin = Stream("stdout"), Stream("stderr"), Stream("stdin")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interpreter = shell.Interpreter(publish, ask, **json.loads(sys.argv[-1]))

    def wait_until_text(text):
        mailbox = Mailbox()
        until = time.monotonic() + DEADLINE
        while not any(text in content.get("text", "") for _, content, *_ in published):
            if time.monotonic() > until or not interpreter.has_pending_tasks():
                raise AssertionError("%r was not printed" % text)
            timer = interpreter.loop.call_later(0.01, mailbox.put, None)
            interpreter.wait_for(mailbox)
            timer.cancel()
            mailbox = Mailbox()

    def wait_for_message():
        import threading
        mailbox = Mailbox()
        threading.Timer(0.05, mailbox.put, ("message",)).start()
        while not mailbox:
            interpreter.wait_for(mailbox)

    def compare_completions(codes):
        different, short_way = [], shell.complete_live_object
        for code in codes:
            found = []
            for way in (short_way, lambda *_: None):
                shell.complete_live_object = way
                reply = interpreter.complete(code, len(code))
                found.append((reply["matches"], reply["cursor_start"], reply["cursor_end"]))
            if found[0] != found[1]:
                different.append([code, *found])
        shell.complete_live_object = short_way
        return different

    more = {"wait_until_text": wait_until_text, "wait_for_message": wait_for_message,
            "compare_completions": compare_completions}

    def answer(reply):
        size = descriptors.seek(0, os.SEEK_END)
        descriptors.seek(0)
        written = descriptors.read(size).decode("utf-8", "replace")
        descriptors.truncate(0)
        descriptors.seek(0)
        replies.write(json.dumps({"reply": reply, "published": published, "asked": asked, "written": written},
                                 default=plain) + "\n")
        replies.flush()
        for found in (published, asked):
            found.clear()

    replies.write(json.dumps({"ipython": list(IPython.version_info[:2])}) + "\n")
    replies.flush()
    for number, line in enumerate(requests):
        request = json.loads(line)
        answers[:] = request["answers"]
        name, arguments = request["call"], request["arguments"]
        message = Message({"msg_id": request.get("parent", "request-%d" % number), "msg_type": name}, {}, {},
                          request.get("content", {}), [], [b"client"], b"{}")
        if name.startswith("comm_") and name != "comm_info":
            arguments = [message]
        else:
            interpreter.set_parent(message)
        method = more.get(name) or getattr(interpreter, name)
        try:
            answer(method(*arguments) if callable(method) else method)
        except BaseException:
            traceback.print_exc(file=complaints)
            raise
    interpreter.close()


if __name__ == "__main__":
    unittest.main()
