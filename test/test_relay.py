# Distributed under the terms of the BSD 3-Clause License.
"""Clients of this machine at a kernel that only the relay reaches: stock ones and ours, several at once.

The kernel is one on loopback tcp, and the relay is the real program but for how it finds the kernel: what test_listen
and test_two_hosts show of keys and addresses is not shown again.  Between the two is a cable that a test can cut.
"""
import json
import os
import selectors
import signal
import socket
import sys
import threading
import unittest
from unittest import mock

import zmq

from . import support, test_conformance
from .test_conformance import needs

TIMEOUT = 30
START = ("import sys, types; from twoproc import connection, relay\n"
         "sys.modules['twoproc.remote'] = types.SimpleNamespace(reach=lambda target, settings: "
         "connection.read_connection_file(target)._replace(extra={'twoproc_remote': True}))\n"
         "sys.exit(relay.main())")


class Relay(support.Kernel):
    """The process of a relay in front of a kernel; for its clients it is a kernel."""

    def __init__(self, case, kernel, *arguments, through=None, **options):
        """through: a Cable instead of the kernel's own address."""
        home = support.Home(case)
        info = {**kernel.info, **(through.ports if through else {})}
        info.pop("twoproc_pid", None)
        path = os.path.join(home.path, "far.json")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            json.dump(info, file)
        self.case, self.kernel = case, kernel
        self.connection_file = os.path.join(home.run, "kernels", "near.json")
        argv = [sys.executable, "-c", START, path, "--name", "near", *arguments]
        support.Process.__init__(self, case, argv, home=home, **options)


def start_relay(case, kernel, *arguments, **options):
    relay = Relay(case, kernel, *arguments, **options)
    relay.wait_file()
    return relay


class Cable:
    """Five forwarded tcp ports, all of which can be cut for a while: then nothing passes and nobody is told."""

    def __init__(self, case, kernel, ip="127.0.0.1"):
        self.ports, self._targets = {"ip": ip}, {}
        self._selector = selectors.DefaultSelector()
        self._is_cut = self._is_ended = False
        self._lock = threading.Lock()
        for channel in support.CHANNELS:
            listener = socket.create_server((ip, 0), family=socket.AF_INET6 if ":" in ip else socket.AF_INET)
            listener.settimeout(support.DEADLINE)
            self.ports[channel + "_port"] = listener.getsockname()[1]
            self._selector.register(listener, selectors.EVENT_READ, kernel.info[channel + "_port"])
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        support._cleanup(case, self.end)

    def _run(self):
        while not self._is_ended:
            for key, _ in self._selector.select(0.02):
                if isinstance(key.data, int):
                    here, _ = key.fileobj.accept()
                    there = socket.create_connection(("127.0.0.1", key.data))
                    self._pair(here, there)
                elif not self._is_cut:
                    self._pass(key.fileobj, key.data)

    def _pair(self, here, there):
        with self._lock:
            for one, other in ((here, there), (there, here)):
                self._selector.register(one, selectors.EVENT_READ, other)

    def _pass(self, source, target):
        try:
            data = source.recv(65536)
            target.settimeout(support.DEADLINE)
            target.sendall(data)
        except OSError:
            data = b""
        if not data:
            self._close(source, target)

    def _close(self, *pair):
        with self._lock:
            for one in pair:
                if one.fileno() >= 0:
                    self._selector.unregister(one)
                    one.close()

    def cut(self):
        self._is_cut = True

    def mend(self):
        self._is_cut = False

    def lose(self):
        """While it is cut: what is on its way never arrives, and the connections are gone."""
        for key in list(self._selector.get_map().values()):
            if not isinstance(key.data, int):
                self._close(key.fileobj)

    def end(self):
        self._is_ended = True
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()


class RelayCase(unittest.TestCase):
    relay_arguments = ()

    @classmethod
    def setUpClass(cls):
        # On a busy machine a first completion takes its time.
        cls.kernel = support.start_kernel(cls, "--transport", "tcp", env={"TWOPROC_KERNEL_COMPLETION_SECONDS": "60"})
        cls.relay = start_relay(cls, cls.kernel, *cls.relay_arguments)

    def setUp(self):
        self.client = self.relay.client(self)

    def our_client(self, relay=None):
        from twoproc.client import connect
        client = connect((relay or self.relay).connection_file)
        self.addCleanup(client.close)
        return client


class OneClient(RelayCase):

    def test_a_cell_has_its_output_and_its_reply(self):
        result = self.client.execute("print('out'); 6 * 7")
        self.assertEqual((result.status, result.text(), result.value), ("ok", "out\n", "42"))

    def test_input_is_asked_and_answered(self):
        result = self.client.execute("print('hello', input('name? '))", answers=["Ada"])
        self.assertEqual(result.text(), "hello Ada\n")

    def test_a_cell_is_interrupted(self):
        msg_id = self.client.send_execute("import time; time.sleep(60)")
        self.client.wait_running(msg_id)
        self.client.request("control", "interrupt_request")
        self.assertEqual(self.client.result(msg_id).reply.content["ename"], "KeyboardInterrupt")

    def test_the_heartbeat_is_the_kernels(self):
        for word in (b"one", b"two"):
            self.client.sockets["hb"].send(word)
            self.assertEqual(self.client.take("hb"), [word])
        self.kernel.signal(signal.SIGSTOP)
        self.addCleanup(self.kernel.signal, signal.SIGCONT)
        self.client.sockets["hb"].send(b"three")
        self.assertTrue(self.client.is_silent("hb", 0.5))
        self.kernel.signal(signal.SIGCONT)
        self.assertEqual(self.client.take("hb"), [b"three"])

    def test_megabytes_of_output_arrive_whole_and_in_order(self):
        code = "for n in range(100_000): print(n, '.' * 100)"
        expected = "".join(f"{n} {'.' * 100}\n" for n in range(100_000))
        self.assertEqual(self.client.execute(code, deadline=60).text(), expected)
        ours, text = self.our_client(), []
        ours.execute(code, timeout=60, on_output=lambda message: text.append(message.content.get("text", "")))
        self.assertEqual("".join(text), expected)
        self.assertEqual(ours.missed, 0)

    def test_buffers_pass(self):
        code = ("def handle(comm, message):\n"
                "    comm.on_msg(lambda message: comm.send({}, buffers=[bytes(message['buffers'][0]) * 2]))\n"
                "get_ipython().kernel.comm_manager.register_target('double', handle)")
        self.assertEqual(self.client.execute(code).status, "ok")
        self.client.send("shell", "comm_open", {"comm_id": "c", "target_name": "double", "data": {}})
        self.client.send("shell", "comm_msg", {"comm_id": "c", "data": {}}, buffers=[b"x" * 100_000])
        message = self.client.take("iopub", lambda message: message.msg_type == "comm_msg")
        self.assertEqual(message.buffers, [b"x" * 200_000])

    def test_whoever_subscribes_is_welcomed(self):
        context = zmq.Context.instance()
        for topic in (b"", b"stream"):
            with self.subTest(topic=topic), context.socket(zmq.SUB) as reader:
                reader.linger, reader.rcvtimeo = 0, TIMEOUT * 1000
                reader.subscribe(topic)
                reader.connect(self.client.url("iopub"))
                frames = reader.recv_multipart()
                while b"iopub_welcome" not in frames[3]:
                    frames = reader.recv_multipart()
                self.assertEqual(self.client.parse(frames).content, {"subscription": topic.decode()})

    def test_our_client_does_everything(self):
        client = self.our_client()
        self.assertTrue(client.keeps_log)
        self.assertIn("print", client.complete("prin").content["matches"])
        self.assertEqual(client.execute("input('? ')", on_input=lambda prompt, password: "yes").content["status"], "ok")
        text = []
        pending = client.execute_nowait("print('now\\n', end='')\nwhile True: pass")      # in one piece

        def interrupt(message):
            if "now" in message.content.get("text", ""):
                client.interrupt()
        self.assertEqual(pending.wait(TIMEOUT, on_output=interrupt).content["ename"], "KeyboardInterrupt")
        client.catch_up(lambda message, is_past: text.append(message.content.get("text")))
        self.assertIn("now\n", text)


class OverTcp(RelayCase):
    relay_arguments = ("--transport", "tcp")

    def test_clients_that_need_it_have_loopback_tcp(self):
        self.assertEqual((self.relay.info["transport"], self.relay.info["ip"]), ("tcp", "127.0.0.1"))
        self.assertEqual(self.client.execute("1 + 1").value, "2")
        self.assertEqual(self.our_client().execute("1 + 1").content["status"], "ok")


    def test_what_a_stranger_sends_while_the_kernel_does_not_read_is_not_kept(self):
        """As any user of this machine may, without the key."""
        stranger = self.relay.client(self, ready=False, key=b"another key", channels=("stdin",),
                                     options=((zmq.SNDHWM, 1), (zmq.SNDTIMEO, 1000)))
        before = self.relay.memory()
        self.kernel.signal(signal.SIGSTOP)
        self.addCleanup(self.kernel.signal, signal.SIGCONT)
        with self.assertRaises(zmq.Again):
            for _ in range(2000):       # as many as 1000 here and 1000 in the relay may wait, if there is no bound
                stranger.send_frames("stdin", [bytes(1 << 20)])
        self.assertLess(self.relay.memory() - before, 100 << 20)


class TwoClients(RelayCase):

    def setUp(self):
        super().setUp()
        self.other = self.relay.client(self)

    def test_each_has_its_own_replies(self):
        ids = [(client, client.send_execute(str(n))) for n in range(20) for client in (self.client, self.other)]
        for n, (client, msg_id) in enumerate(ids):
            self.assertEqual(client.result(msg_id).value, str(n // 2))
        self.assertEqual([len(client.inbox["shell"]) for client in (self.client, self.other)], [0, 0])

    def test_a_question_goes_to_who_sent_the_cell_and_only_he_can_answer(self):
        msg_id = self.client.send_execute("print(input('? '))", allow_stdin=True)
        question = self.client.take("stdin")
        self.other.answer(question, "mine")
        self.assertTrue(self.other.is_silent("stdin", 0.2))
        self.other.request("control", "kernel_info_request")
        self.client.answer(question, "hers")
        self.assertEqual(self.client.result(msg_id).text(), "hers\n")

    def test_an_error_aborts_the_queue_of_its_own_client_alone(self):
        path = os.path.join(self.kernel.home.path, "go")
        first = self.client.send_execute(
            f"import os, time\nwhile not os.path.exists({path!r}): time.sleep(0.01)\n1 / 0")
        self.client.wait_running(first)
        mine = [self.client.send_execute(str(n)) for n in range(3)]
        others = [self.other.send_execute(str(n)) for n in range(3)]
        for client in (self.client, self.other):        # this answer says that what was sent before it is there
            client.request("shell", "kernel_info_request")
        with open(path, "w"):
            pass
        self.assertEqual(self.client.result(first).status, "error")
        self.assertEqual([self.client.result(msg_id).status for msg_id in mine], ["aborted"] * 3)
        self.assertEqual([self.other.result(msg_id).status for msg_id in others], ["ok"] * 3)

    def test_both_see_all_output(self):
        msg_id = self.client.send_execute("print('for all')")
        self.other.wait_text(msg_id, "for all")
        self.client.result(msg_id)

    def test_one_that_reads_no_output_costs_the_other_no_line_and_the_relay_little_memory(self):
        before = self.relay.memory()
        stuck = self.relay.client(self)
        stuck_id = stuck.send_execute("pass")
        stuck.result(stuck_id)
        code = "for n in range(2_000): print(str(n) + '.' * 60_000)"        # 120 MB; nobody reads for `stuck`
        msg_id = self.client.send_execute(code)
        lines = self.client.result(msg_id, deadline=120).text().split()
        self.assertEqual([line.rstrip(".") for line in lines], [str(n) for n in range(2_000)])
        # 500 messages of 64 kB, and the same once more in the buffers of the system and of the allocator.
        self.assertLess(self.relay.memory("VmHWM") - before, 100 << 20)
        # The idle that it has lost is said again when it has caught up.
        late = stuck.take("iopub", lambda message: message.parent_id == msg_id
                          and message.content.get("execution_state") == "idle", 60)
        self.assertEqual(late.msg_type, "status")


class ItsFiles(RelayCase):

    def test_the_connection_file_is_private_and_has_no_key_of_the_users(self):
        info = self.relay.info
        self.assertEqual(os.stat(self.relay.connection_file).st_mode & 0o777, 0o600)
        self.assertEqual(info["key"], self.kernel.info["key"])
        self.assertEqual([name for name in info if "curve" in name or "secret" in name], [])
        self.assertEqual(self.relay.output(), self.relay.connection_file + "\n")

    def test_a_name_in_use_is_refused(self):
        again = support.Process(self, [sys.executable, *self.relay.argv[1:]], home=self.relay.home)
        self.assertEqual(again.wait(), 3, again.log())
        self.assertIn(str(self.relay.pid), again.log())
        self.assertEqual(self.client.execute("1").status, "ok")

    def test_it_is_published_where_jupyter_looks_if_asked(self):
        relay = start_relay(self, self.kernel, "--set", "kernel.publish_jupyter=yes")
        path = os.path.join(relay.home.run, "kernel-near.json")
        support.wait_until(lambda: os.path.exists(path), what="the copy for Jupyter")
        with open(path) as file:
            self.assertLessEqual(relay.info.items(), json.load(file).items())
        relay.signal(signal.SIGTERM)
        relay.wait()
        self.assertFalse(os.path.exists(path))


class ItsEnd(unittest.TestCase):

    def setUp(self):
        self.kernel = support.start_kernel(self, "--transport", "tcp")
        self.relay = start_relay(self, self.kernel)
        self.client = self.relay.client(self)

    def left(self):
        return [name for name in os.listdir(os.path.dirname(self.relay.connection_file)) if "near" in name]

    def test_a_signal_ends_it_and_nothing_is_left(self):
        for number, status in ((signal.SIGINT, 0), (signal.SIGTERM, 143)):
            with self.subTest(number):
                relay = start_relay(self, self.kernel)
                os.kill(relay.pid, number)
                self.assertEqual(relay.wait(), status, relay.log())
                self.assertEqual(os.listdir(os.path.dirname(relay.connection_file)), [])
                self.assertNotIn("Traceback", relay.log())
        self.assertEqual(self.client.execute("1").status, "ok")

    def test_a_kernel_that_is_killed_is_told_in_one_line(self):
        self.kernel.signal(signal.SIGKILL)
        self.assertEqual(self.relay.wait(), 70)
        lines = self.relay.log().splitlines()[1:]
        self.assertEqual(len(lines), 1, lines)
        self.assertIn("the kernel is gone", lines[0])
        self.assertEqual(self.left(), [])

    def test_a_kernel_that_is_shut_down_replies_first(self):
        reply = self.client.request("control", "shutdown_request", {"restart": False})
        self.assertEqual(reply.content["status"], "ok")
        self.assertEqual(self.relay.wait(), 0, self.relay.log())
        self.assertIn("shut down by test", self.relay.log())
        self.assertEqual(self.left(), [])

    def test_our_client_hears_of_its_death(self):
        from twoproc.client import KernelDied, connect
        with connect(self.relay.connection_file) as client:
            pending = client.execute_nowait("import time; time.sleep(60)")
            self.relay.signal(signal.SIGKILL)
            self.assertRaises(KernelDied, pending.wait, TIMEOUT)


class TheLink(unittest.TestCase):

    def setUp(self):
        self.kernel = support.start_kernel(self, "--transport", "tcp")
        self.cable = Cable(self, self.kernel)
        self.relay = start_relay(self, self.kernel, through=self.cable)
        self.client = self.relay.client(self)

    def cut(self):
        self.cable.cut()
        support.wait_until(lambda: "the link is lost" in self.relay.log(), what="what the user is told")

    def test_cut_and_back_it_goes_on_for_any_client(self):
        msg_id = self.client.send_execute("import time; print('one'); time.sleep(1); print('two')")
        self.client.wait_running(msg_id)
        self.cut()
        self.client.sockets["hb"].send(b"?")
        self.assertTrue(self.client.is_silent("hb", 0.2))
        later = self.client.send_execute("2 + 2")
        self.cable.mend()
        result = self.client.result(msg_id)
        self.assertEqual((result.status, result.text()), ("ok", "one\ntwo\n"))
        self.assertEqual(self.client.result(later).value, "4")
        self.client.take("hb", what="the heartbeat")
        support.wait_until(lambda: "the link is back" in self.relay.log(), what="what the user is told")

    def test_a_question_that_was_on_its_way_is_asked_again(self):
        msg_id = self.client.send_execute("import time; time.sleep(1); input('? ')", allow_stdin=True)
        self.client.wait_running(msg_id)
        self.cut()
        self.cable.mend()
        self.client.answer(self.client.take("stdin", what="the question"), "yes")
        self.assertEqual(self.client.result(msg_id).value, "'yes'")

    def test_a_cell_that_was_lost_on_the_way_runs_before_the_one_that_was_sent_after_it(self):
        self.client.execute("order = []")
        self.cable.cut()        # the relay does not know it yet
        first = self.client.send_execute("order.append(1)")
        support.wait_until(lambda: "the link is lost" in self.relay.log(), what="what the user is told")
        second = self.client.send_execute("order.append(2)")
        self.cable.lose()
        self.cable.mend()
        for msg_id in (first, second):
            self.assertEqual(self.client.result(msg_id).status, "ok")
        self.assertEqual(self.client.execute("order").value, "[1, 2]")

    def test_a_cell_of_a_megabyte_has_its_reply_too(self):
        msg_id = self.client.send_execute("import time; time.sleep(1)  # " + "x" * (1 << 20))
        self.client.wait_running(msg_id)
        self.cut()
        self.cable.mend()
        self.assertEqual(self.client.result(msg_id).status, "ok")

    def test_of_a_cell_of_a_megabyte_that_was_lost_its_client_is_told(self):
        self.cable.cut()
        msg_id = self.client.send_execute("ran = True  # " + "x" * (1 << 20))
        support.wait_until(lambda: "the link is lost" in self.relay.log(), what="what the user is told")
        self.cable.lose()
        self.cable.mend()
        reply = self.client.result(msg_id).reply
        self.assertEqual(reply.content["ename"], "ConnectionLost")
        self.assertEqual(self.client.execute("'ran' in globals()").value, "False")

    def test_cut_while_a_local_reader_is_full_it_comes_back(self):
        self.relay.client(self, options=((zmq.RCVHWM, 1),))         # reads no more
        msg_id = self.client.send_execute("for n in range(1_500): print(str(n) + '.' * 60_000)")
        lines = []

        def is_quiet():
            self.client.collect(0.3)
            lines.extend(message.content["text"] for message in self.client.inbox["iopub"]
                         if message.msg_type == "stream")
            is_over = len(lines) > 100 and not self.client.inbox["iopub"]
            self.client.inbox["iopub"].clear()
            return is_over
        support.wait_until(is_quiet, what="the relay to wait for the reader")
        self.cable.cut()
        self.cable.lose()
        support.wait_until(lambda: "the link is lost" in self.relay.log(), what="what the user is told")
        self.cable.mend()
        self.assertEqual(self.client.result(msg_id, deadline=60).status, "ok")

    def test_what_has_no_signature_gets_none_from_the_relay(self):
        """Over loopback tcp any user of this machine may talk to it."""
        stranger = self.relay.client(self, ready=False, key=b"another key", channels=("shell",))
        self.client.send_execute("asked = []; import time; time.sleep(1)")
        for msg_type, content in (("execute_request", {"code": "asked.append('cell')"}),
                                  ("shutdown_request", {"restart": False})):
            stranger.send("shell", msg_type, content)
        self.cut()
        stranger.send_execute("asked.append('later')")
        self.cable.mend()
        support.wait_until(lambda: "the link is back" in self.relay.log(), what="what the user is told")
        self.assertEqual(self.client.execute("asked").value, "[]")

    def test_our_client_sees_the_output_of_the_time_between(self):
        from twoproc.client import connect
        with connect(self.relay.connection_file) as client:
            text = []
            pending = client.execute_nowait("import time\nfor n in range(10): print(n); time.sleep(0.2)")
            self.cut()
            self.cable.mend()
            reply = pending.wait(TIMEOUT, on_output=lambda message: text.append(message.content.get("text", "")))
            self.assertEqual((reply.content["status"], "".join(text)), ("ok", "".join(f"{n}\n" for n in range(10))))


class OverIPv6(unittest.TestCase):

    def test_a_kernel_is_reached(self):
        kernel = support.start_kernel(self, "--transport", "tcp")
        try:
            cable = Cable(self, kernel, "::1")
        except OSError as error:
            self.skipTest(str(error))
        client = start_relay(self, kernel, through=cable).client(self)
        self.assertEqual(client.execute("1 + 1").value, "2")


@needs("jupyter_client")
class StockClients(RelayCase):

    def test_the_blocking_client_does_everything(self):
        from jupyter_client import BlockingKernelClient
        client = BlockingKernelClient(connection_file=self.relay.connection_file)
        client.load_connection_file()
        client.start_channels()
        self.addCleanup(client.stop_channels)
        client.wait_for_ready(timeout=TIMEOUT)
        text = []

        def output(message):
            text.append(message["content"].get("text", ""))
        client.execute_interactive("print('hello', input('name? '))", allow_stdin=True, output_hook=output,
                                   stdin_hook=lambda question: client.input("Ada"), timeout=TIMEOUT)
        self.assertIn("hello Ada\n", "".join(text))
        self.assertTrue(client.is_alive())
        self.assertIn("print", client.complete("prin", reply=True, timeout=TIMEOUT)["content"]["matches"])

    def test_jupyterlabs_way_to_find_kernels_finds_it(self):
        """MultiKernelManager.external_connection_dir is what `jupyter lab` has for kernels it did not start."""
        from jupyter_client.multikernelmanager import MultiKernelManager
        # In the relay's own folder there are other files, too, on which jupyter_client 8.10 stumbles.
        relay = start_relay(self, self.kernel, "--set", "kernel.publish_jupyter=yes")
        support.wait_until(lambda: os.path.exists(os.path.join(relay.home.run, "kernel-near.json")), what="the copy")
        manager = MultiKernelManager(external_connection_dir=relay.home.run)
        (kernel_id,) = manager.list_kernel_ids()
        client = manager.get_kernel(kernel_id).client()
        client.start_channels()
        self.addCleanup(client.stop_channels)
        client.wait_for_ready(timeout=TIMEOUT)
        self.assertEqual(client.execute("1", reply=True, timeout=TIMEOUT)["content"]["status"], "ok")


if test_conformance.IS_INSTALLED["jupyter_kernel_test"]:
    class KernelTestsThroughTheRelay(test_conformance.KernelTests):
        """jupyter_kernel_test in full."""

        @classmethod
        def setUpClass(cls):
            def start(kernel_name):
                from jupyter_client import BlockingKernelClient
                kernel = support.start_kernel(cls, "--transport", "tcp",
                                              env={"TWOPROC_KERNEL_COMPLETION_SECONDS": "60"})
                client = BlockingKernelClient(connection_file=start_relay(cls, kernel).connection_file)
                client.load_connection_file()
                client.start_channels()
                client.wait_for_ready(timeout=TIMEOUT)
                return mock.Mock(), client
            with mock.patch("jupyter_kernel_test.start_new_kernel", start):
                super().setUpClass()


if __name__ == "__main__":
    unittest.main()
