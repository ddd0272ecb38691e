# Distributed under the terms of the BSD 3-Clause License.
"""The kernel's channels: who is woken, what leaves in which order, and what a reader that stops can do to others.

The first half drives KernelChannels inside the test, with bounds so small that a few messages reach them;
the second half is a kernel process and clients of the tests' own.
"""
import logging
import os
import queue
import random
import socket
import sys
import threading
import time
import unittest
from unittest import mock

import zmq

from twoproc import channels as rooms
from twoproc.channels import KernelChannels, Limits, SlowReaders
from twoproc.mailbox import Mailbox
from twoproc.connection import ConnectionInfo

from . import support
from .support import DEADLINE, Process, wait_until


def in_thread(case, function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    case.addCleanup(thread.join, DEADLINE)
    return thread


class MailboxTests(unittest.TestCase):
    def setUp(self):
        self.mailbox = Mailbox()
        self.addCleanup(self.mailbox.close)

    def is_readable(self, seconds=0.0):
        return bool(zmq.zmq_poll([(self.mailbox.fileno(), zmq.POLLIN)], int(seconds * 1000)))

    def test_items_come_out_in_the_order_they_went_in(self):
        for number in range(5):
            self.mailbox.put(number)
        self.assertEqual([self.mailbox.get(0) for _ in range(5)], [0, 1, 2, 3, 4])

    def test_an_empty_mailbox_raises_empty_at_its_time_limit(self):
        began = time.monotonic()
        self.assertRaises(queue.Empty, self.mailbox.get, 0.05)
        self.assertGreaterEqual(time.monotonic() - began, 0.05)
        self.assertRaises(queue.Empty, self.mailbox.get, 0)
        self.assertRaises(queue.Empty, self.mailbox.pop)

    def test_a_waiting_reader_is_woken_by_an_item(self):
        found = queue.SimpleQueue()
        in_thread(self, lambda: found.put(self.mailbox.get(DEADLINE)))
        self.mailbox.put("here")
        self.assertEqual(found.get(timeout=DEADLINE), "here")

    def test_an_item_without_a_ring_waits_for_the_next_ring(self):
        self.mailbox.append("quiet")
        self.assertFalse(self.is_readable())
        self.mailbox.put("loud")
        self.assertTrue(self.is_readable())
        self.assertEqual([self.mailbox.pop(), self.mailbox.pop()], ["quiet", "loud"])

    def test_the_bell_holds_one_byte_however_much_is_put(self):
        for number in range(100_000):       # a byte for each would fill the socket and stop the writer
            self.mailbox.put(number)
        self.mailbox.silence()
        self.assertFalse(self.is_readable())
        self.mailbox.put("again")
        self.assertTrue(self.is_readable())

    def test_a_reader_with_more_than_1024_descriptors_waits_too(self):
        resource = __import__("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < 1200:
            self.skipTest("this user may not open 1,200 files")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in [os.dup(0) for _ in range(1050)]:
            self.addCleanup(os.close, descriptor)
        mailbox = Mailbox()
        self.addCleanup(mailbox.close)
        self.assertGreater(mailbox.fileno(), 1024)
        self.assertRaises(queue.Empty, mailbox.get, 0.01)

    def test_put_back_goes_in_front_and_take_leaves_the_others_in_order(self):
        for number in range(6):
            self.mailbox.put(number)
        first = [self.mailbox.pop(), self.mailbox.pop()]
        self.mailbox.put_back(first)
        self.assertEqual(list(self.mailbox.take(lambda number: number % 2)), [1, 3, 5])
        self.assertEqual([self.mailbox.pop() for _ in range(len(self.mailbox))], [0, 2, 4])

    def test_a_take_that_is_broken_off_leaves_all_that_it_has_not_given(self):
        def is_wanted(number):
            if number == 3:
                raise KeyboardInterrupt
            return number % 2
        for number in range(6):
            self.mailbox.put(number)
        self.assertRaises(KeyboardInterrupt, list, self.mailbox.take(is_wanted))
        self.assertEqual([self.mailbox.pop() for _ in range(len(self.mailbox))], [0, 2, 3, 4, 5])

    def test_no_wake_up_is_lost_with_many_writers(self):
        """The reader waits without any limit of its own: one lost ring and it never returns."""
        writers, each = 8, 3_000
        seen = []
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        self.addCleanup(sys.setswitchinterval, interval)

        def read():
            while len(seen) < writers * each:
                seen.append(self.mailbox.get())

        def write(name):
            for number in range(each):
                self.mailbox.put((name, number))
        reader = in_thread(self, read)
        for name in range(writers):
            in_thread(self, lambda name=name: write(name))
        reader.join(DEADLINE)
        lost = reader.is_alive()
        self.mailbox.put((None, 0))         # let a reader that is stuck go, whatever was found
        self.assertFalse(lost, f"stuck after {len(seen)} of {writers * each}")
        for name in range(writers):
            self.assertEqual([number for writer, number in seen if writer == name], list(range(each)))

    def test_ctrl_c_during_put_never_leaves_it_deaf(self):
        """Thousands of SIGINTs strike a writer; after each the next item still rings."""
        process = Process(self, [sys.executable, "-c", CTRL_C_DURING_PUT])
        self.assertEqual(process.wait(60), 0, process.log())
        strikes = int(process.output())
        self.assertGreater(strikes, 1000)


CTRL_C_DURING_PUT = """
import os, select, signal, sys, threading, time
from twoproc.mailbox import Mailbox
mailbox = Mailbox()
is_struck = False           # no Event: Ctrl-C inside one leaves its lock taken

def strike():
    while True:
        if is_struck:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.0001)

def undisturbed(how):
    while True:
        try:
            return signal.pthread_sigmask(how, {signal.SIGINT})
        except KeyboardInterrupt:
            pass

signal.signal(signal.SIGINT, signal.default_int_handler)
undisturbed(signal.SIG_BLOCK)
threading.Thread(target=strike, daemon=True).start()
sys.setswitchinterval(1e-5)
for strikes in range(3000):
    try:
        is_struck = True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while True:
            # What a reader does, in the order that a writer sees; then this put must ring.
            mailbox._items.clear()
            mailbox._rung = False
            select.select([mailbox], [], [], 0)[0] and mailbox._reader.recv(16)
            mailbox.put(None)
    except KeyboardInterrupt:
        pass
    undisturbed(signal.SIG_BLOCK)
    is_struck = False
    mailbox.put(None)
    if not select.select([mailbox], [], [], 0)[0]:
        sys.exit("deaf after %d strikes" % strikes)
print(strikes, flush=True)
os._exit(0)
"""


class SlowReadersTests(unittest.TestCase):
    """When somebody has held up everybody for long enough; the time is the tests' own."""

    def setUp(self):
        self.now = 100.0
        self.patience = SlowReaders(5.0, clock=lambda: self.now)

    def hold_up(self, seconds):
        """A reader is full for so long; true if it is given up."""
        self.patience.is_over()
        self.now += seconds
        is_over = self.patience.is_over()
        self.patience.sent()
        return is_over

    def flow(self, seconds):
        self.now += seconds
        self.patience.sent()

    def test_a_reader_that_has_stopped_is_given_up_after_the_bound(self):
        self.assertFalse(self.hold_up(4.9))
        self.assertTrue(self.hold_up(0.2))

    def test_waits_add_up_while_little_is_sent_between_them(self):
        for _ in range(4):
            self.assertFalse(self.hold_up(1.2))
            self.flow(0.01)
        self.assertTrue(self.hold_up(1.2))

    def test_a_reader_that_costs_less_than_half_of_the_time_is_never_given_up(self):
        for _ in range(1000):
            self.assertFalse(self.hold_up(1.0))
            self.flow(1.0)

    def test_time_without_waiting_is_not_saved_for_later(self):
        self.flow(1000)
        self.assertTrue(self.hold_up(5.1))


class ChannelsCase(unittest.TestCase):
    """A KernelChannels of the test's own, and clients made by hand."""
    limits = Limits()

    def setUp(self):
        logger, quiet = logging.getLogger("twoproc.channels"), logging.NullHandler()
        logger.addHandler(quiet)
        self.addCleanup(logger.removeHandler, quiet)
        self.home = support.Home(self)
        info = ConnectionInfo("ipc", os.path.join(self.home.run, "k"), 1, 2, 3, 4, 5, b"key")
        self.channels = KernelChannels(info, self.limits)
        self.channels.start()
        self.addCleanup(self.channels.outbox.close)
        self.addCleanup(self.channels.requests.close)
        self.addCleanup(self.channels.stop, 0.1)

    def client(self, options=()):
        info, before = self.channels.info, self.channels.subscribers
        client = support.Client({"transport": "ipc", "ip": info.ip, "key": "key", "iopub_port": info.iopub_port},
                                channels=("iopub",), options=options)
        self.addCleanup(client.close)
        wait_until(lambda: self.channels.subscribers > before, what="subscription")
        return client

    def stuck(self):
        """A client whose iopub holds a handful of messages and is not read."""
        return self.client([(zmq.RCVHWM, 1), (zmq.RCVBUF, 4096)])

    def output(self, client, count=None, until=None, deadline=DEADLINE):
        """Contents from iopub, in order: so many, or up to the one of this msg_type."""
        found = []
        while (len(found) < count if count else not (found and found[-1][0] == until)):
            message = client.take("iopub", deadline=deadline, what=f"message after {len(found)}: {found[-3:]}")
            found.append((message.msg_type, message.content))
        return found


class OutboxTests(ChannelsCase):
    limits = Limits(stream_chunk=1000)

    def hold(self):
        """Keep twoproc-io busy until the result is called, so that what is put meanwhile is there at once."""
        event = threading.Event()
        self.addCleanup(event.set)
        self.channels.call(lambda: event.wait(DEADLINE) and None)
        return event.set

    def test_neighbours_of_one_stream_leave_as_one_message(self):
        client = self.client()
        release = self.hold()
        for number in range(200):
            self.channels.write("stdout", "%d\n" % number, b"{}")
        release()
        self.assertEqual(self.output(client, 1),
                         [("stream", {"name": "stdout", "text": "".join("%d\n" % n for n in range(200))})])

    def test_other_name_parent_or_message_between_keeps_texts_apart_and_in_order(self):
        client = self.client()
        release = self.hold()
        write, send = self.channels.write, self.channels.send
        for name, text, parent in (("stdout", "a", b"{}"), ("stderr", "b", b"{}"), ("stdout", "c", b"{}"),
                                   ("stdout", "d", b'{"msg_id":"1"}')):
            write(name, text, parent)
        send("iopub", "display_data", {"data": {}})
        write("stdout", "e", b'{"msg_id":"1"}')
        send("iopub", "status", {})
        release()
        found = self.output(client, until="status")
        self.assertEqual([content.get("text", kind) for kind, content in found],
                         ["a", "b", "c", "d", "display_data", "e", "status"])

    def test_what_another_thread_puts_in_front_meanwhile_is_neither_lost_nor_takes_a_texts_place(self):
        write_first = self.channels.write_first

        class Parent(bytes):
            """The other thread strikes while it is looked at whether the texts are neighbours."""
            def __ne__(self, other):
                if first := warning.pop():
                    write_first("stderr", first, b"{}")
                return bytes(self) != other
        warning, client, release = [None] * 9 + ["warning"], self.client(), self.hold()
        for text in "abc":
            self.channels.write("stdout", text, Parent(b"{}"))
        self.channels.send("iopub", "status", {})
        release()
        texts = [content["text"] for _, content in self.output(client, until="status")[:-1]]
        self.assertEqual((texts.count("warning"), "".join(texts).replace("warning", "")), (1, "abc"))

    def test_a_long_text_leaves_in_chunks_and_whole(self):
        client = self.client()
        text = "".join(random.choices("abcdefgh\n", k=12_345))
        self.channels.write("stdout", text, b"{}")
        self.channels.write("stdout", "end", b"{}")
        self.channels.send("iopub", "status", {})
        texts = [content["text"] for kind, content in self.output(client, until="status")[:-1]]
        self.assertEqual("".join(texts), text + "end")
        self.assertLessEqual(max(map(len, texts)), 1000)

    def test_what_a_call_returns_stands_at_its_place_in_the_queue(self):
        client = self.client()
        release = self.hold()
        self.channels.send("iopub", "before", {})
        self.channels.call(lambda: [rooms.Text("stdout", "child", b"{}")])
        self.channels.send("iopub", "after", {})
        release()
        self.assertEqual([kind for kind, _ in self.output(client, 3)], ["before", "stream", "after"])

    def test_sequence_numbers_have_no_gap(self):
        client = self.client()
        for number in range(50):
            self.channels.send("iopub", "display_data", {"number": number}, metadata={"mine": number})
        messages = [client.take("iopub") for _ in range(50)]
        numbers = [message.metadata["twoproc_seq"] for message in messages]
        self.assertEqual(numbers, list(range(numbers[0], numbers[0] + 50)))
        self.assertEqual([message.metadata["mine"] for message in messages], list(range(50)))

    def test_content_metadata_and_buffers_may_be_changed_after_they_were_sent(self):
        client = self.client()
        release = self.hold()
        content, metadata, buffer = {"value": 1}, {"value": 1}, bytearray(b"1")
        self.channels.send("iopub", "comm_msg", content, metadata=metadata, buffers=[buffer])
        content["value"] = metadata["value"] = 2
        buffer[:] = b"2"
        release()
        message = client.take("iopub")
        self.assertEqual((message.content["value"], message.metadata["value"], message.buffers), (1, 1, [b"1"]))

    def test_what_cannot_be_sent_is_the_senders_error(self):
        client = self.client()
        for wrong in ({"content": {"a": object()}}, {"content": {}, "metadata": {"a": object()}},
                      {"content": {}, "buffers": ["text"]}, {"content": {}, "buffers": [None]}):
            with self.assertRaises(TypeError):
                self.channels.send("iopub", "display_data", **wrong)
        self.channels.send("iopub", "status", {})
        self.assertEqual(self.output(client, 1), [("status", {})])

    def test_text_larger_than_the_outbox_is_taken_in_an_idle_kernel(self):
        client = self.client()
        self.channels.limits = self.channels.limits._replace(outbox=5000, stream_chunk=100_000)
        writer = in_thread(self, lambda: self.channels.write("stdout", "x" * 50_000, b"{}"))
        writer.join(DEADLINE)
        self.assertFalse(writer.is_alive())
        self.assertEqual(len(self.output(client, 1)[0][1]["text"]), 50_000)


class FullReaderTests(ChannelsCase):
    """slow_reader_seconds is so long that nobody is given up here."""
    limits = Limits(iopub_queue=5, slow_reader_seconds=1000, outbox=20_000, stream_chunk=1000)

    def fill(self):
        """Messages of 1 kB until a reader is full and one is held back; returns how many were sent."""
        for number in range(10_000):
            self.channels.send("iopub", "display_data", {"number": number, "text": "x" * 5000})
            if self.channels._head is not None:
                return number + 1
        self.fail("nobody is full after 10,000 messages")

    def test_a_full_outbox_makes_the_writer_wait_and_a_reader_lets_it_go_on(self):
        client = self.stuck()
        written = []

        def write():
            for number in range(2000):
                self.channels.write("stdout", "x" * 999 + "\n", b"{}")
                written.append(number)
        in_thread(self, write)
        held = wait_until(lambda: self.channels._head and len(written), what="full reader")
        wait_until(lambda: self.channels._put_bytes - self.channels._sent_bytes > 20_000, what="full outbox")
        self.assertLess(held, 2000)
        text = 0
        while text < 2_000_000:
            text += len(client.take("iopub").content["text"])
        self.assertEqual(text, 2_000_000)

    def test_a_subscriber_that_comes_meanwhile_costs_nobody_a_message(self):
        stuck = self.stuck()
        self.fill()
        other = self.client()
        self.channels.send("iopub", "status", {})
        found = self.output(stuck, until="status")
        numbers = [content["number"] for kind, content in found if kind == "display_data"]
        self.assertEqual(numbers, list(range(len(numbers))))
        self.assertEqual(self.output(other, until="status")[-1][0], "status")

    def test_control_is_heard_while_a_reader_is_full(self):
        self.stuck()
        heard = threading.Event()
        self.channels.on_message = lambda channel, message: heard.set()
        info = self.channels.info
        client = support.Client({"transport": "ipc", "ip": info.ip, "key": "key", "control_port": info.control_port},
                                channels=("control",))
        self.addCleanup(client.close)
        self.fill()
        client.send("control", "kernel_info_request")
        self.assertTrue(heard.wait(DEADLINE))

    def test_stopping_ends_although_a_reader_is_full(self):
        self.stuck()
        self.fill()
        began = time.monotonic()
        self.channels.stop(0.2)
        self.assertLess(time.monotonic() - began, 5)
        self.channels._thread.join(DEADLINE)
        self.assertFalse(self.channels._thread.is_alive())


class GivenUpReaderTests(ChannelsCase):
    limits = Limits(iopub_queue=20, slow_reader_seconds=1, stream_chunk=1000)
    idle = b'{"execution_state":"idle"}'

    def flood(self, count=400):
        for number in range(count):
            self.channels.send("iopub", "display_data", {"number": number, "text": "x" * 5000})
        self.channels.send("iopub", "status", self.idle, b'{"msg_id":"the cell"}')

    def idles(self, client):
        return client.take("iopub", lambda message: message.parent_id == "the cell"
                           and message.content.get("execution_state") == "idle", what="idle of the cell")

    def test_the_others_get_everything_and_are_held_up_no_longer_than_the_bound(self):
        self.stuck()
        reader = self.client()
        began = time.monotonic()
        self.flood()
        numbers = []
        while (message := reader.take("iopub")).msg_type != "status":
            numbers.append(message.content["number"])
        self.assertEqual(numbers, list(range(400)))
        self.assertLess(time.monotonic() - began, 1 + 5)

    @mock.patch.object(rooms, "REPEAT_SECONDS", 600)
    def test_a_reader_that_goes_on_gets_the_idle_that_it_had_lost(self):
        stuck, reader = self.stuck(), self.client()
        self.flood()
        self.idles(reader)
        # As long as it does not read, it is not repeated at each look: it would be lost again.
        reader.drain()
        self.assertTrue(reader.is_silent("iopub", 4 * rooms.SETTLE_SECONDS))
        self.idles(stuck)
        # And from then on it loses nothing again.
        wait_until(lambda: not self.channels._is_losing, what="the reader to have caught up")
        self.channels.send("iopub", "comm_msg", {"text": "later"})
        self.assertEqual(stuck.take("iopub", lambda message: message.msg_type == "comm_msg").content["text"], "later")

    @mock.patch.object(rooms, "REPEAT_SECONDS", 600)
    def test_more_idles_than_its_queue_has_room_for_are_repeated_too(self):
        stuck, reader = self.stuck(), self.client()
        self.flood()
        for number in range(100):
            self.channels.send("iopub", "status", self.idle, b'{"msg_id":"%d"}' % number)
        last = lambda message: message.parent_id == "99"
        reader.take("iopub", last)
        # The reader is given all it can take at once, more than once: it stops in between.
        stuck.take("iopub", last, what="the last idle")
        wait_until(lambda: not self.channels._is_losing, what="the reader to have caught up")

    def test_one_that_stays_stuck_does_not_keep_the_idle_from_another(self):
        never, stuck, reader = self.stuck(), self.stuck(), self.client()
        self.flood()
        self.idles(reader)
        self.idles(stuck)
        self.assertTrue(self.channels._is_losing)       # the other one's are still owed
        self.idles(never)

    def test_the_running_cell_is_said_to_be_busy_after_a_repeated_idle(self):
        stuck, reader = self.stuck(), self.client()
        self.flood()
        self.idles(reader)
        self.channels.busy_parent = b'{"msg_id":"the next"}'
        self.idles(stuck)
        stuck.take("iopub", lambda message: message.parent_id == "the next"
                   and message.content == {"execution_state": "busy"}, what="busy of the next cell")

    def test_it_is_logged_once(self):
        self.stuck()
        with self.assertLogs("twoproc.channels", "WARNING") as log:
            self.flood()
            wait_until(lambda: self.channels._is_losing and not self.channels.outbox, what="a reader given up")
        self.assertEqual(len(log.records), 1)


class SlowReaderProcessTests(unittest.TestCase):
    """A kernel, a cell that prints 60 MB, and subscribers that read it, or not."""

    LINES, LINE = 60, "x" * 999_999
    SECONDS = 3         # more than this process may be paused for: its own client would be given up
    arguments: tuple = ()

    def setUp(self):
        self.kernel = support.start_kernel(self, "--set", f"limits.slow_reader_seconds={self.SECONDS}", *self.arguments)
        # Never slow itself: ZeroMQ's own thread reads for it, however busy the machine is with Python.
        self.client = self.kernel.client(self, options=[(zmq.RCVHWM, 0)])
        self.code = f"for i in range({self.LINES}): print('x' * {len(self.LINE)})"

    def subscribe(self, options=()):
        client = support.Client(self.kernel.info, options=options)
        self.addCleanup(client.close)
        client.wait_ready()
        return client

    def printed(self, client, msg_id, deadline=DEADLINE, rest=None):
        """Characters of the cell's output seen by client up to its idle; rest(): called after each message."""
        size = 0
        while True:
            message = client.take("iopub", lambda message: message.parent_id == msg_id, deadline, f"idle after {size}")
            if message.content.get("execution_state") == "idle":
                return size
            size += len(message.content.get("text", ""))
            if rest is not None:
                rest()

    def test_one_that_stops_costs_the_others_nothing_and_gets_the_idle_when_it_goes_on(self):
        stopped = self.subscribe([(zmq.RCVHWM, 1), (zmq.RCVBUF, 4096)])
        before = self.kernel.memory()
        began = time.monotonic()
        msg_id = self.client.send_execute(self.code)
        control = self.subscribe()
        control.sockets["iopub"].close(0)
        del control.sockets["iopub"]
        control.poller = zmq.Poller()
        control.poller.register(control.sockets["control"], zmq.POLLIN)
        seen = queue.SimpleQueue()

        def ask():
            for _ in range(11):
                asked = time.monotonic()
                control.request("control", "kernel_info_request")
                seen.put(time.monotonic() - asked)
        asker = in_thread(self, ask)
        size = self.printed(self.client, msg_id)
        took = time.monotonic() - began
        asker.join(DEADLINE)
        took_control = sorted(seen.get(timeout=1) for _ in range(11))
        self.assertEqual(size, self.LINES * (len(self.LINE) + 1))
        self.assertLess(took, self.SECONDS + support.at_most(5))
        self.assertLess(took_control[5], support.at_most(0.1), took_control)        # the median
        # 32 MB for the reader's queue, 16 MB for the outbox, and what Python keeps of both.
        self.assertLess(self.kernel.memory("VmHWM") - before, 120 << 20)
        self.printed(stopped, msg_id)

    def test_one_that_is_only_slow_loses_nothing(self):
        slow = self.subscribe([(zmq.RCVHWM, 1), (zmq.RCVBUF, 4096)])
        pause = threading.Event()
        lines = 12

        def read_half():
            pause.wait(0.001)
        msg_id = self.client.send_execute(f"for i in range({lines}): print('x' * {len(self.LINE)})")
        self.assertEqual(self.printed(slow, msg_id, rest=read_half), lines * (len(self.LINE) + 1))

    def test_many_messages_of_displays_with_a_stopped_one_reach_the_others_in_order(self):
        self.subscribe([(zmq.RCVHWM, 1), (zmq.RCVBUF, 4096)])
        msg_id = self.client.send_execute(
            "from IPython.display import display\nfor i in range(1500): display({'n': i, 't': 'x' * 2000})")
        numbers = []
        while True:
            message = self.client.take("iopub", lambda message: message.parent_id == msg_id)
            if message.content.get("execution_state") == "idle":
                break
            if message.msg_type == "display_data":
                numbers.append(int(message.content["data"]["text/plain"].split(":")[1].split(",")[0]))
        self.assertEqual(numbers, list(range(1500)))


class TcpSlowReaderProcessTests(SlowReaderProcessTests):
    arguments = ("--transport", "tcp")


class MuchOutputTests(unittest.TestCase):
    """200 MB printed, with readers that cannot take it, by either transport."""
    SECONDS = support.rounds(3, 2)              # more than this process may be paused for
    SIZE = support.rounds(60, 200)              # MB
    CODE = f"for i in range({10 * SIZE}): print('x' * 99_999)"

    def start(self, *arguments):
        self.kernel = support.start_kernel(self, "--set", f"limits.slow_reader_seconds={self.SECONDS}", *arguments)
        # Never slow itself: ZeroMQ's own thread reads for it, however busy the machine is with Python.
        self.client = self.kernel.client(self, options=[(zmq.RCVHWM, 0)])

    def print_all(self):
        """(seconds, the most memory in that time) of the cell, whose output has come whole."""
        peak, over = [self.kernel.memory()], threading.Event()

        def watch():
            while not over.wait(0.02):
                peak.append(self.kernel.memory())
        watcher = in_thread(self, watch)
        began = time.monotonic()
        result = self.client.result(self.client.send_execute(self.CODE), deadline=60)
        taken = time.monotonic() - began
        over.set()
        watcher.join(DEADLINE)
        self.assertEqual(len(result.text()), self.SIZE * 1_000_000)
        return taken, max(peak)

    def test_one_that_never_reads_costs_less_than_60_mb_and_its_time_once(self):
        for transport in ("ipc", "tcp"):
            with self.subTest(transport):
                self.start("--transport", transport)
                alone, _ = self.print_all()
                stuck = self.kernel.client(self, options=[(zmq.RCVHWM, 1), (zmq.RCVBUF, 4096)])
                before = self.kernel.memory()
                taken, peak = self.print_all()
                self.assertLess(taken, 2 * alone + support.at_most(self.SECONDS + 0.5))
                self.assertLess(peak - before, 60 << 20)
                self.assertEqual(self.client.execute("6 * 7").value, "42")
                stuck.close()
                self.kernel.end()

    def test_one_that_reads_a_byte_a_second_is_one_that_never_reads(self):
        """No ZeroMQ at its end, whose own thread would read ahead: a socket that says what a SUB says."""
        self.start("--transport", "tcp")
        before = self.kernel.memory()
        info = self.kernel.info
        with socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.settimeout(DEADLINE)
            peer.connect(("127.0.0.1", info["iopub_port"]))
            # ZMTP 3.0, each step answered before the next: greeting, READY of a SUB, a subscription (ZeroMQ RFC 23).
            peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(32))
            self.assertEqual(receive(peer, 64)[12:16], b"NULL")
            ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x03SUB"
            peer.sendall(bytes([4, len(ready)]) + ready)
            self.assertEqual(receive(peer, 8)[3:], b"READY")
            peer.sendall(b"\x00\x01\x01")
            over = threading.Event()
            read = []

            def trickle():
                while not over.wait(1):
                    read.append(peer.recv(1))
            # It is a subscriber when it is welcomed.
            welcome = b""
            while b"iopub_welcome" not in welcome:
                welcome += receive(peer, 1)
            trickler = in_thread(self, trickle)
            try:
                taken, peak = self.print_all()
            finally:
                over.set()
            self.assertLess(taken, support.at_most(self.SECONDS + 5))
            self.assertLess(peak - before, 100 << 20)
            trickler.join(DEADLINE)
            self.assertTrue(all(read))          # nobody has cut it off
            self.assertEqual(self.client.execute("6 * 7").value, "42")


def receive(peer, size):
    """So many bytes; MSG_WAITALL does not wait for all where the socket has a timeout."""
    data = b""
    while len(data) < size:
        part = peer.recv(size - len(data))
        if not part:
            raise AssertionError("cut off after %r" % data)
        data += part
    return data


class OwnFaultTests(unittest.TestCase):
    def test_a_fault_of_ours_on_twoproc_io_ends_the_kernel_and_says_so_in_its_log(self):
        kernel = support.start_kernel(self)
        client = kernel.client(self)
        client.send("shell", "execute_request", {
            "code": "import gc\n"
                    "channels = [o for o in gc.get_objects() if type(o).__name__ == 'KernelChannels'][0]\n"
                    "channels._drain = None"})
        self.assertEqual(kernel.wait(), 70)
        self.assertIn("fault of twoproc's own", kernel.log())

    def test_one_in_main_does_so_too_though_threads_of_the_user_go_on(self):
        kernel = support.start_kernel(self)
        client = kernel.client(self)
        client.send("shell", "execute_request", {
            "code": "import threading\nthreading.Thread(target=threading.Event().wait).start()\n"
                    "get_ipython().interpreter.has_pending_tasks = None"})
        self.assertEqual(kernel.wait(), 70)
        self.assertIn("fault of twoproc's own", kernel.log())
        self.assertIn("'NoneType' object is not callable", kernel.log())
        self.assertFalse(os.path.exists(kernel.connection_file))


if __name__ == "__main__":
    unittest.main()
