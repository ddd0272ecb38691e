# Distributed under the terms of the BSD 3-Clause License.
"""Many clients of one kernel: those that come and go, those that come while it is busy, those that fail,
and those that do not read what they are sent."""
import json
import os
import sys
import time
import unittest

import zmq

from twoproc.client import connect

from . import support

BUSY = "import time\nprint('now')\nwhile not go: time.sleep(0.002)"
MB = 1 << 20


class ComingAndGoing(support.KernelCase):
    def visit(self, number):
        """A client's life: it attaches, does a little, and leaves without a word."""
        client = self.kernel.client(self)
        if number % 4 == 0:
            client.execute("visits = 1", silent=True)
        if number % 5 == 0:
            client.send("shell", "kernel_info_request")       # leaves before the answer
        client.close()
        self.client.drain()     # who stays and does not read is another test's subject

    def test_two_hundred_leave_nothing_behind(self):
        # What the first ones cause to be made (the history file open, caches filled) is not growth.
        for number in range(50):
            self.visit(number)
        self.client.request("shell", "history_request", {"hist_access_type": "tail", "n": 1})
        self.settle()
        threads, descriptors, memory = self.state()
        count = support.rounds(200, 2400)
        for number in range(count):
            self.visit(number)
        self.settle()
        support.wait_until(lambda: self.kernel.descriptors() <= descriptors,
                           what="the descriptors of those who left to be closed")
        support.wait_until(lambda: self.kernel.threads() == threads, what=lambda: f"{threads} threads again, of "
                           f"{self.kernel.threads()}")
        grown = self.kernel.memory() - memory
        if support.IS_SOAK:
            print(f"{count} clients came and went: {grown // 1024} kB more")
        # 2 MB for the 2400 of the long campaign, most of it the memory of replayed messages. A kernel that does
        # not let ZeroMQ forget its dead peers takes 15 kB for each: 3 MB for 200.
        self.assertLess(grown, 2 * MB)
        self.assert_serves()

    def settle(self):
        self.client.drain()
        self.client.execute("import gc; gc.collect()", silent=True)

    def state(self):
        return self.kernel.threads(), self.kernel.descriptors(), self.kernel.memory()

    def test_fifty_at_once_each_get_their_own_answers_and_everybodys_output(self):
        clients = [self.kernel.client(self) for _ in range(50)]
        sent = [client.send_execute(f"{number} * 2") for number, client in enumerate(clients)]
        for number, client in enumerate(clients):
            self.assertEqual(client.reply(sent[number]).content["status"], "ok")
            seen = {}
            while len(seen) < 50:
                message = client.take("iopub", lambda message: message.msg_type == "execute_result")
                seen[message.parent_id] = message.content["data"]["text/plain"]
            self.assertEqual([seen[msg_id] for msg_id in sent], [str(2 * other) for other in range(50)])


class TheSameOrder(support.KernelCase):

    def test_five_frontends_that_all_run_cells_at_once_see_all_inputs_in_one_order(self):
        turns = support.rounds(40, 200)
        seen = [[] for _ in range(5)]
        clients = [connect(self.kernel.connection_file) for _ in seen]
        for client, inputs in zip(clients, seen):
            self.addCleanup(client.close)
            client.listen(lambda message, inputs=inputs: message.msg_type == "execute_input" and inputs.append(
                (message.content["execution_count"], message.content["code"])))
        sent = [client.execute_nowait(f"({number}, {turn})") for turn in range(turns)
                for number, client in enumerate(clients)]
        for pending in sent:
            self.assertEqual(pending.wait(3 * support.DEADLINE).content["status"], "ok")
        for inputs in seen:
            support.wait_until(lambda inputs=inputs: len(inputs) >= 5 * turns, what="the inputs of all")
        self.assertEqual([count for count, _ in seen[0]], list(range(1, 5 * turns + 1)))
        self.assertTrue(all(inputs == seen[0] for inputs in seen))
        for number in range(5):
            mine = [code for _, code in seen[0] if code.startswith(f"({number},")]
            self.assertEqual(mine, [f"({number}, {turn})" for turn in range(turns)])


class WhileBusy(support.KernelCase):
    def setUp(self):
        super().setUp()
        self.client.execute("go = False; import threading")
        self.cell = self.client.send_execute(BUSY)
        self.client.wait_text(self.cell, "now")

    def tearDown(self):
        self.client.request("control", "interrupt_request")
        self.client.reply(self.cell)

    REQUESTS = [
        ("shell", "kernel_info_request", {}), ("control", "kernel_info_request", {}),
        ("shell", "is_complete_request", {"code": "if 1:"}),
        ("shell", "history_request", {"hist_access_type": "tail", "n": 3}),
        ("shell", "connect_request", {}), ("shell", "comm_info_request", {}),
        ("shell", "complete_request", {"code": "threading.enum", "cursor_pos": 14}),
        ("shell", "inspect_request", {"code": "threading", "cursor_pos": 4}),
    ]

    def test_questions_are_answered_while_a_cell_runs(self):
        for channel, msg_type, content in self.REQUESTS:
            with self.subTest(msg_type, channel=channel):
                result = self.client.result(self.client.send(channel, msg_type, content), channel, support.at_most(1))
                self.assertIn(result.status, ("ok", "incomplete"))
        self.assertFalse(self.client.inbox["shell"], "the cell has not ended")

    def test_the_answers_are_those_of_an_idle_kernel(self):
        is_complete = self.client.request("shell", "is_complete_request", {"code": "if 1:"}, support.at_most(1))
        self.assertEqual(is_complete.content["status"], "incomplete")

        def matches():
            complete = self.client.request("shell", "complete_request", {"code": "threading.enum", "cursor_pos": 14})
            return " ".join(complete.content["matches"])
        # The first one may be answered empty: it imports what it needs.
        self.assertIn("enumerate", support.wait_until(matches, 60, "matches"))

    def test_they_are_answered_while_a_cell_computes_without_a_pause(self):
        self.client.request("control", "interrupt_request")
        self.client.result(self.cell)
        self.cell = self.client.send_execute("print('now')\nwhile True: pass")
        self.client.wait_text(self.cell, "now")
        self.test_questions_are_answered_while_a_cell_runs()

    def test_a_second_client_attaches_within_a_second(self):
        started = time.monotonic()
        self.kernel.client(self)
        self.assertLess(time.monotonic() - started, support.at_most(1))

    def test_the_running_cell_is_busy_again_after_such_an_answer(self):
        # A client that shows the latest status as the kernel's would otherwise call it idle.
        other = self.kernel.client(self)
        other.request("shell", "kernel_info_request")
        message = other.take("iopub", lambda message: message.parent_id == self.cell, what="busy of the running cell")
        self.assertEqual(message.content, {"execution_state": "busy"})

    def test_the_heart_beats(self):
        self.client.sockets["hb"].send(b"ping")
        self.assertEqual(self.client.take("hb", deadline=support.at_most(1)), [b"ping"])


class Errors(support.KernelCase):
    """One client's error cancels what that client had sent before it could know, and nothing else."""

    def results(self, client, ids):
        replies = {}
        for _ in ids:
            reply = client.take("shell", lambda message: message.parent_id in ids)
            replies[reply.parent_id] = reply.content["status"]
        for msg_id in ids:
            self.assertEqual(client.output(msg_id)[-1].content, {"execution_state": "idle"})
        return [replies[msg_id] for msg_id in ids]

    def test_its_own_queue_is_aborted_in_order_and_anothers_runs(self):
        other = self.kernel.client(self)
        for number in range(support.rounds(20, 200)):
            path = os.path.join(self.kernel.home.work, f"go-{number}")
            self.client.execute("import os, time; log = []", silent=True)
            failing = self.client.send_execute(f"while not os.path.exists({path!r}): time.sleep(0.001)\n1/0")
            self.client.wait_running(failing)
            mine = [self.client.send_execute("log.append('A')") for _ in range(3)]
            others = [other.send_execute("log.append('B')") for _ in range(3)]
            for client in (self.client, other):     # this answer says that what was sent before it is there
                client.result(client.send("shell", "kernel_info_request"))
            with open(path, "w"):
                pass
            self.assertEqual(self.results(self.client, [failing, *mine]), ["error"] + ["aborted"] * 3)
            self.assertEqual(self.results(other, others), ["ok"] * 3)
            # What is sent after the error was seen always runs.
            self.assertEqual(self.client.execute("''.join(log)").value, "'BBB'")

    def test_back_to_back_sends_are_aborted_until_the_error_was_seen(self):
        for round_number in range(support.rounds(20, 200)):
            failing = self.client.send_execute("1/0")
            behind = [self.client.send_execute("1") for _ in range(round_number % 7)]
            statuses = self.results(self.client, [failing, *behind])
            self.assertEqual(statuses[0], "error")
            # Some may have come after the reply was sent: those run. None runs before one that is aborted.
            self.assertEqual(statuses[1:], sorted(statuses[1:]), "aborted first, then ok")
            self.assertEqual(self.client.execute("1+1").value, "2")

    def test_a_long_queue_is_aborted_whole(self):
        failing = self.client.send_execute("input()\n1/0", allow_stdin=True)
        question = self.client.take("stdin", what="input_request")
        behind = [self.client.send_execute("1") for _ in range(support.rounds(100, 1000))]
        self.client.result(self.client.send("shell", "kernel_info_request"))
        self.client.answer(question, "")
        self.assertEqual(self.results(self.client, [failing, *behind]), ["error"] + ["aborted"] * len(behind))

    def test_stop_on_error_false_keeps_the_queue(self):
        failing = self.client.send_execute("import time; time.sleep(0.05); 1/0", stop_on_error=False)
        behind = [self.client.send_execute("1") for _ in range(3)]
        self.assertEqual(self.results(self.client, [failing, *behind]), ["error"] + ["ok"] * 3)

    def test_questions_in_the_queue_are_answered(self):
        failing = self.client.send_execute("import time; time.sleep(0.05); 1/0")
        questions = [self.client.send("shell", "kernel_info_request"),
                     self.client.send("shell", "is_complete_request", {"code": "1"})]
        self.assertEqual(self.client.result(failing).status, "error")
        for msg_id in questions:
            self.assertNotEqual(self.client.result(msg_id).status, "aborted")

    def test_an_interrupt_aborts_the_queue_as_an_error_does(self):
        other = self.kernel.client(self)
        failing = self.client.send_execute("import time; print('now'); time.sleep(60)")
        self.client.wait_text(failing, "now")
        mine = [self.client.send_execute("1") for _ in range(3)]
        others = [other.send_execute("1") for _ in range(3)]
        other.request("shell", "kernel_info_request")       # read after them
        self.client.request("shell", "kernel_info_request")
        other.request("control", "interrupt_request")
        self.assertEqual(self.results(self.client, [failing, *mine]), ["error"] + ["aborted"] * 3)
        self.assertEqual(self.results(other, others), ["ok"] * 3)


class SlowReaders(support.KernelCase):
    """A subscriber that stops reading holds up the others for a stated time at most, then it loses; and even
    it learns in the end which cells are over."""
    LINES = 4000
    # Flushed one by one and 3 kB long, so that nothing is joined and the socket's buffers do not hide it.
    FLOOD = f"for i in range({LINES}):\n    print(i, 'x' * 3000, flush=True)\n    display(i)"

    def setUp(self):
        super().setUp()
        # A reader that is never slow: on a busy machine Python takes messages more slowly than the kernel makes them,
        # ZeroMQ's own thread does not.
        self.client.close()
        self.client = self.kernel.client(self, options=((zmq.RCVHWM, 0),))

    def stuck(self, **options):
        """A client that reads nothing from now on, with as little room in between as zmq and the system give."""
        return self.kernel.client(self, options=((zmq.RCVHWM, 1), (zmq.RCVBUF, 4096)), **options)

    def test_the_others_get_everything_and_the_stuck_one_its_idle(self):
        stuck = self.stuck()
        started = time.monotonic()
        msg_id = self.client.send_execute(self.FLOOD)
        result = self.client.result(msg_id, deadline=60)
        seconds = time.monotonic() - started
        lines = [line.split()[0] for line in result.text().splitlines()]
        self.assertEqual(lines, [str(number) for number in range(self.LINES)])
        displays = [content["data"]["text/plain"] for content in result.of_type("display_data")]
        self.assertEqual(displays, lines)
        self.assertLess(seconds, support.at_most(12))
        # Control is not held up, and a cell after it is as quick as ever.
        self.client.request("control", "kernel_info_request", deadline=support.at_most(1))
        self.assertEqual(self.client.execute("1+1", deadline=support.at_most(3)).value, "2")
        # It reads again: with gaps, but the idle of the cell is among what it gets, and all that comes after.
        idle = stuck.take("iopub", lambda message: message.parent_id == msg_id
                          and message.content.get("execution_state") == "idle", what="idle of the flood")
        self.assertTrue(idle)
        support.wait_until(lambda: self.sees_output(stuck), what="the late reader to see output again")

    def sees_output(self, client):
        result = client.execute("print('hello')")
        return result.text() == "hello\n"

    def test_memory_stays_bounded(self):
        self.client.execute("print('x' * 200_000)")
        before = self.kernel.memory()
        stuck = self.stuck()
        msg_id = self.client.send_execute("for i in range(600): print('x' * 100_000, flush=True)")
        self.assertEqual(len(self.client.result(msg_id, deadline=60).text()), 600 * 100_001)
        self.assertLess(self.kernel.memory("VmHWM") - before, 100 * MB)
        stuck.close()

    def test_one_that_is_stopped_and_killed_is_forgotten(self):
        code = ("import sys, time, zmq\n"
                "s = zmq.Context().socket(zmq.SUB); s.rcvhwm = 1; s.subscribe(b''); s.connect(sys.argv[1])\n"
                "print(s.recv_multipart()[0], flush=True)\n"
                "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
        process = support.Process(self, [sys.executable, "-c", code, self.client.url("iopub")], home=self.kernel.home)
        support.wait_until(lambda: self.client.execute("1") and is_stopped(process.pid), what="the stopped reader")
        msg_id = self.client.send_execute(self.FLOOD)
        self.client.wait_running(msg_id)
        process.end()
        result = self.client.result(msg_id, deadline=60)
        self.assertEqual(len(result.of_type("display_data")), self.LINES)
        self.assert_serves()


def is_stopped(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


class ManyKernels(unittest.TestCase):
    def test_fifty_started_at_once_all_work(self):
        """Each with an address of its own, none half bound, none over another's."""
        # tcp for the long campaign: 250 ports at once would take those that jupyter_client, which chooses ports
        # before it uses them, has just chosen in a test beside this one.
        for transport in support.rounds(["ipc"], ["tcp", "ipc"] * 5):
            home = support.Home(self)
            arguments = ("--transport", transport) if support.IS_OURS else ()
            kernels = [support.Kernel(self, *arguments, home=home) for _ in range(50)]
            for kernel in kernels:
                kernel.wait_file(300)
            addresses = [(kernel.info["ip"], kernel.info[f"{channel}_port"])
                         for kernel in kernels for channel in support.CHANNELS]
            self.assertEqual(len(set(addresses)), 5 * len(kernels))
            for number, kernel in enumerate(kernels):
                client = kernel.client(self, ready=False)
                client.wait_ready(300)
                self.assertEqual(client.execute(f"{number} + 1", deadline=60).value, str(number + 1))
                client.close()
            for kernel in kernels:
                kernel.end()


class SocketsAndThreads(unittest.TestCase):
    """Each socket is touched by one thread only; handed over at most once, before that thread's first call."""

    # A sitecustomize: every call of a zmq.Socket method in the kernel is recorded with its thread.
    RECORDER = '''
import atexit, collections, json, os, threading
calls = collections.defaultdict(list)       # socket: (thread, method), each pair once, in order

def record():
    import zmq
    def wrap(name, function):
        def method(self, *args, **options):
            entry = (threading.current_thread().name, name)
            seen = calls[id(self)]
            if entry not in seen:
                seen.append(entry)
            return function(self, *args, **options)
        return method
    for name in ("send", "recv", "send_multipart", "recv_multipart", "setsockopt", "getsockopt", "set", "get", "bind",
                 "connect", "close", "unbind", "disconnect", "poll"):
        setattr(zmq.Socket, name, wrap(name, getattr(zmq.Socket, name)))
    proxy = zmq.proxy
    def recorded(frontend, backend, *others):
        calls[id(frontend)].append((threading.current_thread().name, "proxy"))
        return proxy(frontend, backend, *others)
    zmq.proxy = recorded

record()
os.environ["RECORDED"] = "1"
def write():
    with open(os.environ["RECORD_TO"], "w") as file:
        json.dump(list(calls.values()), file)
atexit.register(write)
'''

    def test_each_socket_is_used_by_one_thread(self):
        home = support.Home(self)
        with open(os.path.join(home.path, "import", "sitecustomize.py"), "w") as file:
            file.write(self.RECORDER)
        path = os.path.join(home.path, "calls.json")
        kernel = support.start_kernel(self, home=home, env={"RECORD_TO": path})
        client = kernel.client()
        client.execute("import threading, os")
        # Output from everywhere, input, completion while busy, a child, an interrupt, an error, a flood.
        client.execute("threads = [threading.Thread(target=print, args=(n,)) for n in range(5)]\n"
                       "for t in threads: t.start()\nfor t in threads: t.join()\nos.system('echo child')")
        client.execute("input('? ')", answers=["x"])
        client.execute("1/0")
        client.execute("for i in range(2000): display(i)")
        msg_id = client.send_execute("import time; print('now'); time.sleep(60)")
        client.wait_text(msg_id, "now")
        client.request("shell", "complete_request", {"code": "os.pa", "cursor_pos": 5})
        client.sockets["hb"].send(b"ping")
        client.take("hb")
        client.request("control", "interrupt_request")
        client.result(msg_id)
        client.request("control", "shutdown_request", {"restart": False})
        self.assertEqual(kernel.wait(), 0)
        with open(path) as file:
            sockets = [calls for calls in json.load(file) if any(method != "close" for _, method in calls)]
        self.assertGreaterEqual(len(sockets), 5)
        for calls in sockets:
            threads = [thread for thread, _ in calls]
            # In order: at most MainThread (made, bound), then one other, and never back.
            changes = [thread for place, thread in enumerate(threads) if place == 0 or threads[place - 1] != thread]
            self.assertLessEqual(len(changes), 2, calls)
            if len(changes) == 2:
                self.assertEqual(changes[0], "MainThread", calls)
                made = {method for thread, method in calls if thread == "MainThread"}
                self.assertLessEqual(made, {"setsockopt", "getsockopt", "set", "get", "bind"}, calls)


if __name__ == "__main__":
    unittest.main()
