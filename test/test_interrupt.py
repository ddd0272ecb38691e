# Distributed under the terms of the BSD 3-Clause License.
"""Ctrl-C reaches every kind of code, and every way to end a kernel ends it properly.

Each cell of CELLS would run for a minute or for ever. It is interrupted while it does, by an
interrupt_request and by SIGINT to the process group (what a terminal sends), and must have ended within a
second (of several rounds: half of them), as KeyboardInterrupt; the next cell then runs as if nothing had been.
"""
import contextlib
import importlib
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
import unittest
from unittest import mock

from . import support

SECONDS = 1.0       # from the interrupt to the reply
AT_MOST = support.at_most(SECONDS)

# What is to be interrupted; each prints "now" when it is about to wait, or runs where it cannot.
CELLS = {
    "a loop": "print('now')\nwhile True: pass",
    "time.sleep": "import time\nprint('now')\ntime.sleep(60)",
    "await asyncio.sleep": "import asyncio\nprint('now')\nawait asyncio.sleep(60)",
    "time.sleep inside an awaited coroutine": """
import time
async def block():
    print('now')
    time.sleep(60)
await block()""",
    "gather of such": """
import asyncio, time
async def block():
    print('now')
    time.sleep(60)
await asyncio.gather(block(), block(), block())""",
    "gather of sleeps": "import asyncio\nprint('now')\nawait asyncio.gather(*(asyncio.sleep(60) for _ in range(5)))",
    "asyncio.run": "import asyncio\nprint('now')\nasyncio.run(asyncio.sleep(60))",
    "subprocess.run": "import subprocess\nprint('now')\nsubprocess.run(['sleep', '60'])",
    "os.system": "import os\nprint('now')\nos.system('sleep 60')",
    "queue.get": "import queue\nprint('now')\nqueue.Queue().get()",
    "queue.SimpleQueue": "import queue\nprint('now')\nqueue.SimpleQueue().get()",
    "lock.acquire": "import threading\nlock = threading.Lock(); lock.acquire()\nprint('now')\nlock.acquire()",
    "thread.join": """
import threading, time
print('now')
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
threading.enumerate()[-1].join()""",
    "select": "import select, os\nr, w = os.pipe()\nprint('now')\nselect.select([r], [], [])",
    "a shell line": "print('now')\n!sleep 60",
    "a shell line whose output is kept": "print('now')\nlines = !sleep 60",
    "printing": "print('now')\nwhile True: print('x' * 100)",
    "a list comprehension": "print('now')\n[i for i in iter(int, 1)]",
}
# os.system waits in C with SIGINT ignored until its child, which the interrupt reaches too, has ended.
RETURNS_NORMALLY = {"os.system", "a shell line"}


class InterruptCase(support.KernelCase):
    def by_message(self):
        self.assertEqual(self.client.request("control", "interrupt_request").content["status"], "ok")

    def by_signal(self):
        self.kernel.signal(signal.SIGINT)

    def interrupt_round(self, name, interrupt):
        client = self.client
        before = self.sleeps()
        msg_id = client.send_execute(CELLS[name])
        client.wait_text(msg_id, "now")
        if name in ("subprocess.run", "os.system", "a shell line", "a shell line whose output is kept"):
            # The child must run: between fork and exec there is nothing yet to interrupt.
            support.wait_until(lambda: self.sleeps() - before, what="the child")
        started = time.monotonic()
        interrupt()
        reply = client.reply(msg_id)
        seconds = time.monotonic() - started
        self.assertLess(seconds, AT_MOST)
        if name not in RETURNS_NORMALLY:
            self.assertEqual(reply.content["status"], "error")
            # CancelledError: asyncio's Runner sets its count of interrupts to 0 a moment after it could have counted.
            expected = ("KeyboardInterrupt", "CancelledError") if name == "asyncio.run" else ("KeyboardInterrupt",)
            self.assertIn(reply.content["ename"], expected)
        client.output(msg_id)
        self.check_next_cell(reply.content["execution_count"])
        return seconds

    def sleeps(self):
        """The `sleep` programs that run in the kernel's process group and below. One of the cell before may still
        be among them: killed, and its parent does not wait for ever for it to end."""
        listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,pgid=,comm="], capture_output=True, text=True).stdout
        return {pid for pid, ppid, pgid, comm in (line.split(None, 3) for line in listing.splitlines())
                if str(self.kernel.pid) in (ppid, pgid) and comm == "sleep"}

    def check_next_cell(self, count):
        """The next cell runs normally, one number on, and no task of the interrupted one is left."""
        result = self.client.execute("import asyncio, time; time.sleep(0.01); await asyncio.sleep(0.01); "
                                     "len(asyncio.all_tasks()) == 1")
        self.assertEqual(result.status, "ok")
        self.assertEqual(result.value, "True")
        self.assertEqual(result.reply.content["execution_count"], count + 1)


class EveryKindOfCode(InterruptCase):
    def interrupted_each(self, interrupt):
        took = []
        for round_number in range(support.rounds(2, 200)):
            for name in CELLS:
                try:        # no subTest: what comes after a cell that was not interrupted means nothing
                    took.append(self.interrupt_round(name, interrupt))
                except AssertionError as error:
                    raise AssertionError(f"{name}, round {round_number}: {error}") from error
        self.assertLess(statistics.median(took), SECONDS)

    def test_ends_by_an_interrupt_request(self):
        self.interrupted_each(self.by_message)

    def test_ends_by_ctrl_c_in_the_terminal(self):
        self.interrupted_each(self.by_signal)

    def test_a_waiting_input_ends_and_the_next_question_is_answered(self):
        for interrupt in [self.by_message, self.by_signal] * support.rounds(2, 200):
            msg_id = self.client.send_execute("input('? ')", allow_stdin=True)
            late = self.client.take("stdin", what="input_request")
            started = time.monotonic()
            interrupt()
            result = self.client.result(msg_id)
            self.assertLess(time.monotonic() - started, AT_MOST)
            self.assertEqual(result.reply.content["ename"], "KeyboardInterrupt")
            self.client.answer(late, "too late")
            self.assertEqual(self.client.execute("input('? ')", answers=["right"]).value, "'right'")

    def test_no_task_of_an_interrupted_cell_goes_on(self):
        self.client.execute("ticks = []")
        msg_id = self.client.send_execute("""
import asyncio
async def tick():
    while True:
        ticks.append(1)
        await asyncio.sleep(0.01)
task = asyncio.ensure_future(tick())
print('now')
await asyncio.gather(task, asyncio.sleep(60))""")
        self.client.wait_text(msg_id, "now")
        self.by_message()
        self.assertEqual(self.client.result(msg_id).reply.content["ename"], "KeyboardInterrupt")
        more = self.client.execute("before = len(ticks); await asyncio.sleep(0.1); len(ticks) - before").value
        self.assertEqual(more, "0")

    def test_the_cleaning_up_of_an_interrupted_cell_is_done(self):
        self.client.execute("cleaned = []")
        for wait in ("time.sleep(60)", "await asyncio.sleep(60)"):
            msg_id = self.client.send_execute("import asyncio, time\ntry:\n    print('now')\n    " + wait +
                                              "\nfinally:\n    cleaned.append(1)")
            self.client.wait_text(msg_id, "now")
            self.by_message()
            self.client.result(msg_id)
        self.assertEqual(self.client.execute("len(cleaned)").value, "2")


class WhatElseAnInterruptDoes(InterruptCase):
    def test_an_idle_kernel_is_not_disturbed(self):
        for interrupt in [self.by_message, self.by_signal] * 20:
            interrupt()
            self.assertEqual(self.client.execute("1+1").value, "2")

    def test_interrupts_in_quick_succession_while_cells_come_and_go(self):
        for _ in range(support.rounds(200, 5000)):
            msg_id = self.client.send_execute("sum(range(1000))")
            self.client.send("control", "interrupt_request")
            self.assertIn(self.client.result(msg_id).status, ("ok", "error"))
            self.client.inbox["control"].clear()
        self.client.drain()
        self.assert_serves()

    def test_one_that_comes_before_the_code_has_begun_is_not_lost(self):
        """Everybody is told that the cell runs a moment before it does, and may answer at once."""
        took = []
        for interrupt in [self.by_message, self.by_signal] * support.rounds(30, 1000):
            msg_id = self.client.send_execute("import time; time.sleep(60)")
            running = self.client.wait_running(msg_id)
            started = time.monotonic()
            interrupt()
            result = self.client.result(msg_id)
            took.append(time.monotonic() - started)
            self.assertLess(took[-1], AT_MOST)
            self.assertEqual(result.reply.content["ename"], "KeyboardInterrupt")
            self.assertEqual(result.reply.content["execution_count"], running.content["execution_count"])
        self.assertLess(statistics.median(took), SECONDS)

    def test_one_that_strikes_in_a_callback_before_the_cell_ends_the_cell(self):
        for event in ("pre_execute", "pre_run_cell"):
            with self.subTest(event):
                self.client.execute(f"""
def wait(*info):
    get_ipython().events.unregister({event!r}, wait)
    print('now')
    import time; time.sleep(60)
get_ipython().events.register({event!r}, wait)""")
                msg_id = self.client.send_execute("print('the ' + 'cell')")
                self.client.wait_text(msg_id, "now")
                self.client.request("control", "interrupt_request")
                result = self.client.result(msg_id)
                self.assertEqual(result.reply.content["ename"], "KeyboardInterrupt")
                self.assertNotIn("the cell", result.text())

    def test_one_that_strikes_in_a_callback_after_the_cell_is_an_error_of_the_cell(self):
        msg_id = self.client.send_execute("""
def wait():
    get_ipython().events.unregister('post_execute', wait)
    print('now')
    import time; time.sleep(60)
get_ipython().events.register('post_execute', wait)""")
        self.client.wait_text(msg_id, "now")
        self.client.request("control", "interrupt_request")
        self.assertEqual(self.client.result(msg_id).reply.content["ename"], "KeyboardInterrupt")

    def test_nothing_runs_after_a_script_that_it_ended(self):
        with open(os.path.join(self.kernel.home.work, "waits.py"), "w") as file:
            file.write("import time\nprint('now')\ntime.sleep(60)")
        for code in ("%run waits.py\nprint('the rest')", "get_ipython().run_cell('%run waits.py')\nprint('the rest')"):
            msg_id = self.client.send_execute(code)
            self.client.wait_text(msg_id, "now")
            self.client.request("control", "interrupt_request")
            result = self.client.result(msg_id)
            self.assertEqual((result.reply.content["ename"], result.text()), ("KeyboardInterrupt", ""))

    def test_it_answers_a_question_of_ipython_with_no(self):
        msg_id = self.client.send_execute("kept = 1\n%reset", allow_stdin=True)
        self.client.take("stdin", what="input_request")
        self.client.request("control", "interrupt_request")
        self.assertEqual(self.client.result(msg_id).text(), "\r\nNothing done.\n")
        self.assertEqual(self.client.execute("kept").value, "1")

    def test_a_callback_that_fails_is_told_and_the_cell_runs(self):
        self.client.execute("""
def fail():
    get_ipython().events.unregister('pre_execute', fail)
    1 / 0
get_ipython().events.register('pre_execute', fail)""")
        result = self.client.execute("print('the cell')")
        self.assertEqual(result.status, "ok")
        self.assertIn("(for pre_execute)", result.text())
        self.assertTrue(result.text().endswith("the cell\n"))

    def test_one_that_a_finalizer_swallows_ends_the_cell_all_the_same(self):
        """Python ignores what is raised there; and the garbage collector calls finalizers anywhere."""
        for interrupt in (self.by_message, self.by_signal):
            msg_id = self.client.send_execute("""
import time
class Object:
    def __del__(self):
        print('now')
        time.sleep(60)
Object()
while True: pass""")
            self.client.wait_text(msg_id, "now")
            started = time.monotonic()
            interrupt()
            self.assertEqual(self.client.result(msg_id).reply.content["ename"], "KeyboardInterrupt")
            self.assertLess(time.monotonic() - started, AT_MOST)

    def test_another_client_may_interrupt(self):
        other = self.kernel.client(self)
        msg_id = self.client.send_execute(CELLS["time.sleep"])
        self.client.wait_text(msg_id, "now")
        other.request("control", "interrupt_request")
        self.assertEqual(self.client.result(msg_id).reply.content["ename"], "KeyboardInterrupt")

    def test_code_that_catches_it_goes_on_and_a_second_one_ends_it(self):
        msg_id = self.client.send_execute("""
import time
try:
    print('now')
    time.sleep(60)
except KeyboardInterrupt:
    print('caught')
    time.sleep(60)""")
        self.client.wait_text(msg_id, "now")
        self.by_message()
        self.client.wait_text(msg_id, "caught")
        self.by_signal()
        self.assertEqual(self.client.result(msg_id).reply.content["ename"], "KeyboardInterrupt")

    def test_a_handler_of_the_users_own_is_called_and_kept(self):
        self.client.execute("import signal, time; seen = []\n"
                            "old = signal.signal(signal.SIGINT, lambda *args: seen.append(args[0]))")
        msg_id = self.client.send_execute("print('now')\nend = time.monotonic() + 20\n"
                                          "while not seen and time.monotonic() < end: time.sleep(0.01)")
        self.client.wait_text(msg_id, "now")
        self.by_signal()
        self.assertEqual(self.client.result(msg_id).status, "ok")
        self.assertEqual(self.client.execute("signal.signal(signal.SIGINT, old); len(seen)").value, "1")
        self.interrupt_round("time.sleep", self.by_message)

    def test_an_import_lock_that_an_interrupt_left_behind_is_given_back(self):
        self.client.execute("import _imp; _imp.acquire_lock(); raise KeyboardInterrupt")
        result = self.client.execute("import threading\n"
                                     "thread = threading.Thread(target=lambda: __import__('wave'))\n"
                                     "thread.start(); thread.join(10); thread.is_alive()")
        self.assertEqual(result.value, "False")

    def test_it_works_in_a_kernel_that_was_started_with_sigint_ignored(self):
        # As a shell starts a command with & in a script, and as nohup does.
        pid_path = os.path.join(support.Home(self).path, "pid")
        command = f"sh -c '{shlex.quote(sys.executable)} -m twoproc.kernel -f {{connection_file}} & " \
                  f"echo $! > {pid_path}; wait'"
        if not support.IS_OURS:
            command = f"sh -c '{support.KERNEL} & echo $! > {pid_path}; wait'"
        self.kernel = support.start_kernel(self, command=command, env={"JPY_PARENT_PID": ""})
        def pid_of_kernel():        # the shell may write it after its kernel has begun to serve
            with contextlib.suppress(FileNotFoundError), open(pid_path) as file:
                return file.read().strip()
        pid = int(support.wait_until(pid_of_kernel, what="the kernel's pid"))
        self.client = self.kernel.client(self)
        for interrupt in (self.by_message, lambda: os.kill(pid, signal.SIGINT)):
            self.interrupt_round("time.sleep", interrupt)
            self.interrupt_round("a loop", interrupt)


class WhenTheTimeToEndIsOver(unittest.TestCase):
    """twoproc-io looks at the time, and a thread is to end the kernel; main, or that thread, may be anywhere."""

    def setUp(self):
        self.module = importlib.import_module("twoproc.kernel")
        self.kernel = kernel = object.__new__(self.module.Kernel)
        kernel._helpers, kernel.capture, kernel.tidy = mock.Mock(), mock.Mock(), mock.Mock()
        kernel._helpers.expire.return_value = None
        kernel.capture.has_grown.return_value = kernel.capture.has_writers.return_value = False
        kernel.running = kernel._leave_at = kernel._exit_at = None
        kernel._cells = kernel._parent_pid = kernel._orphan_timeout = 0
        kernel._finishing, kernel.ending, kernel.exit_status, kernel.log = threading.Lock(), "SIGHUP", 129, None
        kernel._end_at = time.monotonic() - 1
        self.started = []
        for name, replacement in (("own_thread", lambda name, target: self.started.append(target)),
                                  ("logger.warning", mock.Mock()),
                                  ("os._exit", mock.Mock(side_effect=AssertionError("left without exit functions")))):
            patch = mock.patch("twoproc.kernel." + name, replacement)
            patch.start()
            self.addCleanup(patch.stop)

    def test_the_thread_may_take_its_time_to_begin(self):
        self.assertGreater(self.kernel.on_tick(), 1)
        self.assertEqual(self.started, [self.kernel.finish])

    def test_main_may_finish_just_then_and_has_its_time(self):
        self.module.logger.warning.side_effect = lambda *text: self.kernel._finishing.acquire()
        self.assertGreater(self.kernel.on_tick(), 1)
        self.assertGreater(self.kernel.on_tick(), 1)

    def test_an_exit_function_that_hangs_is_left(self):
        self.kernel._finishing.acquire()
        self.kernel._exit_at = time.monotonic() - 1
        with self.assertRaisesRegex(AssertionError, "left without"):
            self.kernel.on_tick()
        self.kernel.tidy.assert_called_once()

    def test_who_has_finished_has_as_long_as_it_takes_to_send_what_waits(self):
        """A reader that does not read keeps twoproc-io until its limit, a moment after that of the exit functions."""
        def stop():
            with mock.patch("twoproc.kernel.time.monotonic", return_value=time.monotonic() + 2.5):
                self.assertGreater(self.kernel.on_tick(), 0)
        self.kernel.channels, self.kernel.interpreter = mock.Mock(stop=mock.Mock(side_effect=stop)), None
        with mock.patch("twoproc.kernel.own_thread"), mock.patch("twoproc.kernel.atexit._run_exitfuncs"), \
                self.assertRaisesRegex(AssertionError, "left without"):
            self.kernel.finish()
        self.module.logger.warning.assert_not_called()

    def test_a_restart_that_comes_while_it_ends_changes_nothing(self):
        self.kernel.channels, self.kernel.interpreter = mock.Mock(), None
        self.kernel.shutdown_request("control", mock.Mock(content={"restart": True}))
        self.kernel.log = mock.Mock()
        self.kernel.is_abandoned = False
        self.kernel._put_away()
        self.kernel.log.close.assert_called_once_with("SIGHUP", keep=False)


class WhenTheInterpreterIsThere(unittest.TestCase):
    def test_a_completion_that_was_sent_long_before_is_not_yet_overdue(self):
        """twoproc-io may look at any moment, and the clock starts now."""
        module = importlib.import_module("twoproc.kernel")
        self.now, looks = 0.0, []
        kernel = mock.Mock(running=None)
        helpers = module.Helpers(kernel, 1.0)
        message = mock.Mock(msg_type="is_complete_request")

        def monotonic():
            if not looks:
                looks.append(self.now)
                helpers.expire(self.now)
            return self.now
        with mock.patch("twoproc.kernel.time.monotonic", lambda: self.now):
            helpers.submit(message)
        self.now = 60.0
        with mock.patch("twoproc.kernel.time.monotonic", monotonic), mock.patch("twoproc.kernel.own_thread"):
            helpers.start()
        self.assertEqual(looks, [60.0])
        kernel.reply.assert_not_called()
        self.assertGreater(helpers.expire(self.now), 0)
        kernel.channels.call.assert_called()        # else twoproc-io sleeps on, though a helper hang


class WhenAnAnswerIsLate(unittest.TestCase):
    def test_the_question_that_was_asked_meanwhile_stays_open(self):
        """twoproc-io finds that it answers the question there is, main is interrupted and asks another."""
        module = importlib.import_module("twoproc.kernel")
        kernel = object.__new__(module.Kernel)
        cell = mock.Mock(identities=[b"client"])
        first, second = (module.Question(cell, b'{"msg_id":"%d"}' % number, {}, queue.SimpleQueue())
                         for number in (1, 2))

        def route(asks):
            kernel._asking = second
            return asks.identities
        kernel._replies, kernel._asking = mock.Mock(route=route), first
        kernel.input_reply(mock.Mock(msg_type="input_reply", content={"value": "to the first"}, parent_header={},
                                     identities=[b"client"]))
        self.assertIs(kernel._asking, second)
        self.assertTrue(second.answers.empty())


class WhenNobodyIsThereToBeAsked(unittest.TestCase):
    def test_the_question_is_sent_again_once_and_no_other(self):
        """It waits in the outbox behind a reader that does not read, and twoproc-io looks again and again."""
        module = importlib.import_module("twoproc.kernel")
        kernel = module.Kernel(mock.Mock(unasked=b'{"msg_id":"1"}'))
        kernel.running = cell = mock.Mock(identities=[b"client"])
        for number, times in (("2", 0), ("1", 1)):
            kernel._asking = module.Question(cell, b'{"msg_id":"%s"}' % number.encode(), {}, queue.SimpleQueue())
            for _ in range(3):
                kernel.on_tick()
            self.assertEqual(kernel.channels.send.call_count, times)


class WhenTheCellIsNudged(unittest.TestCase):
    """The look of main's that a blocked call would otherwise put off; main's clock and the signals are ours here."""

    def setUp(self):
        kernel_module = importlib.import_module("twoproc.kernel")
        self.kernel = object.__new__(kernel_module.Kernel)
        self.kernel.running, self.kernel._nudges, self.kernel._nudge_at = "cell 1", (None, 0), 0.0
        self.kernel._main_clock, self.kernel._main_used = 0, None
        self.used, self.now, self.nudges = 0.0, 0.0, 0
        for name, replacement in (
                ("time.clock_gettime", lambda clock: self.used), ("signal.pthread_kill", self.nudge),
                ("signal.getsignal", lambda number: kernel_module.look_for_signals)):
            patch = mock.patch("twoproc.kernel." + name, replacement)
            patch.start()
            self.addCleanup(patch.stop)

    def nudge(self, thread, number):
        self.nudges += 1
        self.used += 0.001          # main looks

    def look(self, times=1):
        """As often as twoproc-io would; returns the nudges that came of it."""
        before = self.nudges
        for _ in range(times):
            self.now += 0.2
            self.kernel._nudge_if_blocked(self.now)
        return self.nudges - before

    def test_twice_and_not_for_ever(self):
        self.assertEqual(self.look(20), 2)

    def test_not_while_it_computes(self):
        for _ in range(20):
            self.used += 0.01
            self.assertEqual(self.look(), 0)

    def test_again_when_it_went_on(self):
        self.look(20)
        self.used += 0.01
        self.assertEqual(self.look(20), 2)

    def test_also_when_the_cell_before_was_nudged_last(self):
        """That one ended by its nudge, and what main did since is taken for the look alone."""
        while not self.look():
            pass
        self.kernel.running = "cell 2"
        self.used += 0.01
        self.assertEqual(self.look(20), 2)


class Ending(unittest.TestCase):
    """Every ordinary end: exit functions run, the connection file goes, the status says what it was."""

    BUSY = {"idle": "1", "in a sleep": "import time; time.sleep(60)", "in a loop": "while True: pass",
            "in an await": "import asyncio; await asyncio.sleep(60)"}

    def start(self, **options):
        self.kernel = support.start_kernel(self, **options)
        self.client = self.kernel.client(self)
        self.mark = os.path.join(self.kernel.home.path, "atexit-ran")
        self.client.execute(f"import atexit; atexit.register(lambda: open({self.mark!r}, 'w').close())")

    def run_cell(self, code):
        msg_id = self.client.send_execute(code)
        self.client.wait_running(msg_id)
        if code == "1":
            self.client.result(msg_id)
        return msg_id

    def check_ended(self, status, seconds=2.0):
        started = time.monotonic()
        self.assertIn(self.kernel.wait(), status)
        self.assertLess(time.monotonic() - started, support.at_most(seconds))
        self.assertTrue(os.path.exists(self.mark), "atexit functions did not run\n" + self.kernel.log())
        self.assertFalse(os.path.exists(self.kernel.connection_file), "the connection file is still there")
        left = [name for name in os.listdir(self.kernel.home.run) if "kernel-" in name]
        self.assertEqual(left, [])

    def test_sigterm_and_sighup_end_it_as_a_shutdown_does(self):
        for number in (signal.SIGTERM, signal.SIGHUP):
            for name, code in self.BUSY.items():
                with self.subTest(f"{number.name} {name}"):
                    self.start()
                    self.run_cell(code)
                    os.kill(self.kernel.pid, number)
                    self.check_ended((128 + number, -number))

    def test_a_shutdown_request_ends_it_within_two_seconds(self):
        for name, code in self.BUSY.items():
            with self.subTest(name):
                self.start()
                self.run_cell(code)
                reply = self.client.request("control", "shutdown_request", {"restart": False},
                                            deadline=support.at_most(1))
                self.assertEqual(reply.content, {"status": "ok", "restart": False})
                self.check_ended((0,))

    def test_code_that_refuses_to_end_is_left_within_two_seconds(self):
        self.start()
        self.run_cell("while True:\n    try:\n        while True: pass\n    except BaseException: pass")
        self.client.request("control", "shutdown_request", {"restart": False})
        self.check_ended((0,), 3)

    def test_a_history_that_is_never_written_costs_no_exit_function(self):
        self.start()
        self.client.execute("import threading\ndef wait_for_the_disk(): threading.Event().wait()\n"
                            "get_ipython().history_manager.end_session = wait_for_the_disk")
        self.client.request("control", "shutdown_request", {"restart": False})
        self.check_ended((0,), 4)
        self.assertIn("wait_for_the_disk", self.kernel.log())       # what it was that did not end is said

    def test_a_shutdown_request_on_shell_is_obeyed_as_well(self):
        self.start()
        self.client.request("shell", "shutdown_request", {"restart": False})
        self.check_ended((0,))

    def test_a_restart_leaves_the_connection_file_for_the_next_one(self):
        self.start()
        reply = self.client.request("control", "shutdown_request", {"restart": True})
        self.assertTrue(reply.content["restart"])
        self.assertEqual(self.kernel.wait(), 0)
        self.assertTrue(os.path.exists(self.kernel.connection_file))

    def test_a_cell_that_is_running_is_said_to_be_over(self):
        self.start()
        msg_id = self.run_cell("import time; time.sleep(60)")
        self.client.send("control", "shutdown_request", {"restart": False})
        self.assertEqual(self.client.output(msg_id)[-1].content, {"execution_state": "idle"})
        self.check_ended((0,))

    def test_it_ends_with_its_parent(self):
        for name, code in (("idle", "1"), ("busy", "import time; time.sleep(60)")):
            with self.subTest(name):
                parent = support.Process(self, ["sleep", "60"])
                self.start(env={"JPY_PARENT_PID": str(parent.pid)})
                self.run_cell(code)
                parent.end()
                self.check_ended((0, 1), 3)

    def test_threads_of_the_user_do_not_keep_it(self):
        self.start()
        self.client.execute("import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()")
        self.client.request("control", "shutdown_request", {"restart": False})
        self.check_ended((0,))


if __name__ == "__main__":
    unittest.main()
