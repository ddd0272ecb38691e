# Distributed under the terms of the BSD 3-Clause License.
"""What was said while a client was away, or too slow, reaches it all the same: once, in order.

LoggingKernel is a kernel of a few lines that loses what a test tells it to lose, and keeps a log that says what
a test tells it to say.  The last two classes ask real kernels, and real processes that stop reading.
"""
import hashlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import unittest
from unittest import mock

from twoproc import client as client_module, replay
from twoproc.client import Client, KernelDied, NotReady, connect
from twoproc.replay import InOrder, read_log
from twoproc.session import Message

from . import support
from .test_client import FakeKernel, text_of


class LoggingKernel(FakeKernel):
    """It numbers what it publishes, and answers twoproc_log_request from `records`, a few at a time.

    on_log(fake): called before each answer.  page: records in an answer.  kept_from: older numbers are not kept.
    """
    kernel_info = {"supported_features": ["twoproc log"]}

    def __init__(self, case, on_request=None, on_log=lambda fake: None, page=3, **options):
        self.on_log, self.page, self.kept_from, self.log_name = on_log, page, 0, "S"
        self.seq, self.records, self.questions = 0, [], []
        self.session = "fake"
        super().__init__(case, on_request, **options)

    def publish(self, msg_type, content, parent=None, is_lost=False, record=None, seq=None, **others):
        """record: members of its record in the log, {} for one as usual, None: not in the log."""
        if seq is None:
            seq = self.seq = self.seq + 1
        if record is not None:
            self.note(**{"k": "out", "seq": seq, "of": (parent or {}).get("msg_id"), "type": msg_type,
                         "content": content, **record})
        if not is_lost:
            super().publish(msg_type, content, parent, metadata={"twoproc_seq": seq}, session=self.session, **others)

    def note(self, **members):
        self.records.append({"n": len(self.records) + 1, "t": 1800000000.5, **members})

    def begin(self, message, is_lost=False, code="code"):
        self.note(k="begin", seq=self.seq + 1, of=message.header["msg_id"], ec=7, code=code, hdr=message.header)
        self.publish("status", {"execution_state": "busy"}, message.header, is_lost)
        self.publish("execute_input", {"code": code, "execution_count": 7}, message.header, is_lost)

    def say(self, message, text, is_lost=False):
        self.publish("stream", {"name": "stdout", "text": text}, message.header, is_lost, record={})

    def end(self, message, is_lost=False):
        self.note(k="end", seq=self.seq + 1, of=message.header["msg_id"], ok=True, ms=1)
        self.publish("status", {"execution_state": "idle"}, message.header, is_lost)

    def serve_until(self, event):
        """Answer control, and nothing else, until the event is set."""
        while not event.is_set() and not self.is_ending.is_set():
            if self.sockets["control"].poll(20):
                self.take("control", self.sockets["control"].recv_multipart())

    def answer_log(self, message):
        content = message.content
        self.questions.append((content["from_seq"], content["to_seq"]) if "from_seq" in content else content["cells"])
        self.on_log(self)
        self.publish("status", {"execution_state": "busy"}, message.header)
        records, next_seq, cut = self.records, None, False
        if "from_seq" in content:
            wanted = [record for record in records if content["from_seq"] <= record["seq"] <= content["to_seq"]]
            records = [record for record in wanted if record["seq"] >= self.kept_from]
            cut = len(records) < len(wanted)
            if len(records) > self.page:
                next_seq = records[self.page]["seq"]
                records = [record for record in records if record["seq"] < next_seq]
        begun = {record["of"] for record in records if record["k"] == "begin"}
        parents = {record["of"]: record["hdr"] for record in self.records
                   if record["k"] == "begin" and record["of"] not in begun}
        self.reply(message, "twoproc_log_reply", {
            "status": "ok", "session": self.log_name, "seq": self.seq, "records": records, "parents": parents,
            "next_seq": next_seq, "cut": cut}, "control")
        self.publish("status", {"execution_state": "idle"}, message.header)


def scripted(script):
    """An on_request: cells run `script(fake, message)`, the log is answered, and nothing else."""
    def on_request(fake, channel, message):
        if message.msg_type == "twoproc_log_request":
            fake.answer_log(message)
        elif message.msg_type == "execute_request":
            script(fake, message)
            fake.reply(message, "execute_reply", {"status": "ok"})
    return on_request


class ReadLog(unittest.TestCase):
    """Records to messages, by one function and without a socket."""
    HEADER = {"msg_id": "a_1", "session": "a", "username": "alice", "msg_type": "execute_request",
              "date": "2026-01-01T00:00:00Z", "version": "5.5"}

    def read(self, records, first=None, last=None, **content):
        kernel = {"msg_id": "k_1", "session": "k", "username": "kernel", "msg_type": "twoproc_log_reply"}
        content = {"status": "ok", "session": "S", "seq": 1000, "parents": {}, "next_seq": None, "cut": False,
                   "records": records, **content}
        return read_log(Message(kernel, {}, {}, content, [], [], b""), first, last)

    def out(self, number, text="x\n", **members):
        return {"n": number, "k": "out", "t": 0, "seq": number, "of": "a_1", "type": "stream",
                "content": {"name": "stdout", "text": text}, **members}

    def test_a_cell_becomes_the_messages_that_it_was(self):
        page = self.read([
            {"n": 1, "k": "open", "t": 0, "pid": 1},
            {"n": 2, "k": "begin", "t": 1800000000.5, "seq": 10, "of": "a_1", "ec": 3, "code": "f()",
             "hdr": self.HEADER},
            self.out(12, metadata={"isolated": True}),
            {"n": 13, "k": "stdin", "t": 0, "seq": 13, "of": "a_1", "prompt": "? ", "password": False},
            {"n": 14, "k": "note", "t": 0, "what": "resumed"},
            {"n": 15, "k": "cut", "t": 0, "of": "a_1", "first": 1, "last": 2, "records": 1, "bytes": 1},
            {"n": 16, "k": "end", "t": 0, "seq": 15, "of": "a_1", "ok": True, "ms": 1}])
        self.assertEqual([message.msg_type for message in page.messages], ["execute_input", "stream", "status"])
        self.assertEqual([message.content for message in page.messages],
                         [{"code": "f()", "execution_count": 3}, {"name": "stdout", "text": "x\n"},
                          {"execution_state": "idle"}])
        for message in page.messages:
            self.assertEqual(message.parent_header, self.HEADER)
            self.assertEqual((message.header["session"], message.header["username"]), ("k", "kernel"))
            self.assertEqual(json.loads(message.header_bytes), message.header)
        self.assertEqual(page.messages[0].header["date"], "2027-01-15T08:00:00.500000+00:00")
        self.assertEqual(page.messages[1].metadata, {"isolated": True, "twoproc_seq": 12})
        self.assertEqual(len({message.msg_id for message in page.messages}), 3)
        self.assertEqual((page.session, page.seq, page.next_seq, page.cut), ("S", 1000, None, False))

    def test_parents_come_from_the_page_where_the_cell_began_before_it(self):
        page = self.read([self.out(5), self.out(6, of="b_1"), self.out(7, of=None)], parents={"a_1": self.HEADER})
        self.assertEqual([message.parent_header for message in page.messages], [self.HEADER, {}, {}])

    def test_a_private_cell_has_no_input_and_its_end(self):
        page = self.read([{"n": 1, "k": "begin", "t": 0, "seq": 1, "of": "a_1", "ec": 1, "hash": "00", "length": 9,
                           "hdr": self.HEADER}, {"n": 2, "k": "end", "t": 0, "seq": 2, "of": "a_1", "ok": True}])
        self.assertEqual([message.msg_type for message in page.messages], ["status"])
        self.assertEqual(page.messages[0].parent_header, self.HEADER)

    def test_what_is_recorded_and_not_yet_published_is_left_for_live(self):
        self.assertEqual(len(self.read([self.out(5), self.out(6)], seq=5).messages), 1)

    def test_what_is_cut_is_marked_where_the_numbers_jump(self):
        def kinds(records, **options):
            messages = self.read(records, cut=True, **options).messages
            return ["gap %d" % message.content["messages"] if message.msg_type == "twoproc_gap"
                    else message.metadata["twoproc_seq"] for message in messages]
        outs = [self.out(number) for number in (3, 4, 6, 60, 61)]
        self.assertEqual(kinds(outs, first=3, last=62), [3, 4, 6, "gap 53", 60, 61])
        self.assertEqual(kinds(outs, first=3, last=200), [3, 4, 6, 60, 61, "gap 139"])
        self.assertEqual(kinds(outs, first=3, last=200, next_seq=63), [3, 4, 6, "gap 53", 60, 61])
        self.assertEqual(kinds([], first=3, last=5), ["gap 3"])

    def test_of_the_last_cells_all_inputs_are_there_and_output_is_missing_behind_them(self):
        begin = {"n": 1, "k": "begin", "t": 0, "seq": 1, "of": "a_1", "ec": 3, "code": "f()", "hdr": self.HEADER}
        for records, kinds in (([begin, begin, self.out(500), self.out(900)], "input input gap stream stream"),
                               ([begin], "input gap"), ([], "gap")):
            messages = self.read(records, cut=True).messages
            self.assertEqual([message.msg_type.split("_")[-1] for message in messages], kinds.split())

    def test_a_gap_belongs_to_the_cell_whose_output_is_missing(self):
        for options, place, reason in (({"first": 3}, 1, "it is no longer kept"), ({}, 0, "too much to show it all")):
            page = self.read([self.out(3), self.out(90)], parents={"a_1": self.HEADER}, cut=True, **options)
            self.assertEqual(page.messages[place].parent_header, self.HEADER)
            self.assertEqual(page.messages[place].content["reason"], reason)

    def test_nothing_that_a_reply_holds_makes_it_raise(self):
        odd = [None, 7, "x", [], {}, [[]], {"k": "out"}, float("nan"), 1e300, -1, True]
        for value in odd:
            for name in ("records", "parents", "seq", "session", "next_seq", "cut"):
                self.read(**{"records": [self.out(1)], name: value})
            self.read(odd)
            for record in (self.out(1), {"n": 1, "k": "begin", "t": 0, "seq": 1, "of": "a_1", "ec": 1, "code": "1",
                                         "hdr": self.HEADER}, {"n": 1, "k": "end", "t": 0, "seq": 1, "of": "a_1"}):
                for name in [*record, "metadata"]:
                    self.read([{**record, name: value}], cut=True)


class Refill(unittest.TestCase):
    """A number that jumps is a gap, and the log fills it."""

    def run_cell(self, script, on_log=lambda fake: None, page=3, **options):
        """What a cell's on_output had, and what a listener had."""
        self.fake = LoggingKernel(self, scripted(script), on_log, page)
        with connect(self.fake.info) as self.ours:
            seen, heard = [], []
            self.ours.listen(heard.append)
            self.reply = self.ours.execute("", on_output=seen.append, timeout=support.DEADLINE, **options)
            # A status that was provoked lest the idle be lost may still be on its way.
            support.wait_until(lambda: not self.ours._table, what="an empty table")
            self.assertFalse(self.ours._order.is_filling)
        return seen, heard

    def assert_lines(self, messages, lines):
        self.assertEqual(text_of(messages), "".join("%d\n" % number for number in lines))

    def test_what_was_lost_comes_in_its_place_page_by_page(self):
        def script(fake, message):
            fake.begin(message)
            for number in range(30):
                fake.say(message, "%d\n" % number, is_lost=number % 10 >= 2)
            fake.end(message)
        seen, heard = self.run_cell(script)
        self.assert_lines(seen, range(30))
        self.assert_lines([message for message in heard if message.parent_header == seen[0].parent_header], range(30))
        self.assertEqual([message.msg_type for message in seen],
                         ["status", "execute_input", *["stream"] * 30, "status"])
        self.assertEqual(self.ours.missed, 0)
        self.assertGreater(len(self.fake.questions), 9)

    def test_a_cell_whose_idle_was_lost_ends(self):
        def script(fake, message):
            fake.begin(message)
            fake.say(message, "0\n")
            fake.say(message, "1\n", is_lost=True)
            fake.end(message, is_lost=True)
            fake.publish("status", {"execution_state": "busy"}, {"msg_id": "x"})     # by which it is seen
        # By the log, and not because nothing came any more.
        with mock.patch.object(client_module, "IDLE_PATIENCE", 2 * support.DEADLINE):
            seen, _ = self.run_cell(script)
        self.assert_lines(seen, range(2))
        self.assertEqual(seen[-1].content, {"execution_state": "idle"})

    def test_a_cell_whose_idle_was_lost_and_behind_which_nothing_came_ends(self):
        def script(fake, message):
            fake.begin(message)
            fake.say(message, "0\n", is_lost=True)
            fake.end(message, is_lost=True)
        took = []       # the best of three: this process may be paused once
        while not took or min(took) >= client_module.IDLE_PATIENCE - 1 and len(took) < 3:
            start = time.monotonic()
            seen, _ = self.run_cell(script)
            took.append(time.monotonic() - start)
            self.assert_lines(seen, range(1))
        self.assertLess(min(took), client_module.IDLE_PATIENCE - 1)

    def test_a_cell_that_was_lost_whole_is_there(self):
        other = Message({"msg_id": "b_1", "session": "b", "username": "bob", "msg_type": "execute_request"}, {}, {},
                        {}, [], [], b"")

        def script(fake, message):
            fake.begin(other, is_lost=True, code="bob's")
            fake.say(other, "0\n", is_lost=True)
            fake.end(other, is_lost=True)
            fake.begin(message)
            fake.end(message)
        _, heard = self.run_cell(script)
        bobs = [message for message in heard if message.parent_header.get("username") == "bob"]
        self.assertEqual([message.msg_type for message in bobs], ["execute_input", "stream", "status"])
        self.assertEqual(bobs[0].content, {"code": "bob's", "execution_count": 7})

    def test_numbers_that_the_log_does_not_have_are_passed_over(self):
        def script(fake, message):
            fake.begin(message)
            for _ in range(5):
                fake.publish("status", {"execution_state": "busy"}, {"msg_id": "x"}, is_lost=True)
            fake.publish("comm_msg", {"comm_id": "x", "data": {}}, message.header, is_lost=True)
            fake.say(message, "0\n")
            fake.end(message)
        seen, _ = self.run_cell(script)
        self.assert_lines(seen, range(1))
        self.assertEqual(self.ours.missed, 0)
        self.assertNotIn("twoproc_gap", [message.msg_type for message in seen])

    def test_what_is_no_longer_kept_is_told_in_its_place(self):
        def script(fake, message):
            fake.begin(message)
            for number in range(30):
                fake.say(message, "%d\n" % number, is_lost=5 <= number < 25)
            fake.kept_from = fake.seq - 9
            fake.end(message)
        seen, heard = self.run_cell(script, page=100)
        self.assert_lines(seen, [*range(5), *range(20, 30)])
        gap = seen.index(next(message for message in seen if message.msg_type == "twoproc_gap"))
        self.assertEqual((seen[gap - 1].content["text"], seen[gap + 1].content["text"]), ("4\n", "20\n"))
        self.assertEqual(seen[gap].content["reason"], "it is no longer kept")
        self.assertGreaterEqual(self.ours.missed, 15)
        self.assertIn(seen[gap], heard)

    def lossy(self, fake, message):
        fake.begin(message)
        fake.say(message, "0\n")
        fake.say(message, "1\n", is_lost=True)
        fake.say(message, "2\n")
        fake.end(message)

    def assert_missed(self, seen, reason):
        self.assert_lines(seen, [0, 2])
        self.assertEqual([message.content for message in seen if message.msg_type == "twoproc_gap"],
                         [{"messages": 1, "reason": reason}])
        self.assertEqual(self.ours.missed, 1)

    def test_without_a_log_it_goes_on_at_once(self):
        with mock.patch.object(LoggingKernel, "kernel_info", {}):
            seen, _ = self.run_cell(self.lossy)
        self.assert_missed(seen, "the kernel keeps no log")
        self.assertEqual(self.fake.questions, [])

    def test_a_log_that_is_off_is_no_log(self):
        def script(fake, message):
            fake.log_name = ""
            self.lossy(fake, message)
        seen, _ = self.run_cell(script)
        self.assert_missed(seen, "the kernel keeps no log")

    def test_a_log_that_does_not_answer_holds_nobody_up_for_ever(self):
        with mock.patch.object(LoggingKernel, "answer_log", lambda fake, message: None), \
                mock.patch.object(replay, "REFILL_SECONDS", 0.2):
            seen, _ = self.run_cell(self.lossy)
        self.assert_missed(seen, "the kernel's log did not answer")

    def test_a_repeated_idle_is_dropped_unless_it_is_news(self):
        def script(fake, message):
            fake.publish("status", {"execution_state": "idle"}, {"msg_id": "known"}, seq=None)
            known = fake.seq
            fake.publish("status", {"execution_state": "idle"}, {"msg_id": "unknown"}, is_lost=True)
            fake.begin(message)
            for _ in range(2):
                fake.publish("status", {"execution_state": "idle"}, {"msg_id": "known"}, seq=known)
                fake.publish("status", {"execution_state": "idle"}, {"msg_id": "unknown"}, seq=known + 1)
            fake.end(message)
        _, heard = self.run_cell(script)
        self.assertEqual([message.parent_header["msg_id"] for message in heard
                          if message.parent_header.get("msg_id") in ("known", "unknown")], ["known", "unknown"])

    def test_who_just_came_takes_no_repeated_idle_for_the_newest_message(self):
        delivered = []
        client = mock.Mock(keeps_log=False, _dying=None, died=None, _is_closed=False,
                           _deliver=lambda channel, message: delivered.append(message))
        order = InOrder(client)

        def take(number, state):
            order.take("iopub", Message({"session": "kernel", "msg_type": "status"}, {"msg_id": str(number)},
                                        {"twoproc_seq": number}, {"execution_state": state}, [], [], b"{}"))
        for number, state in ((50, "idle"), (52, "idle"), (54, "idle"), (100, "busy"), (101, "idle"), (52, "idle")):
            take(number, state)
        self.assertEqual(order.missed, 0)
        self.assertEqual([message.metadata["twoproc_seq"] for message in delivered], [50, 52, 54, 100, 101])
        take(104, "idle")
        self.assertEqual(order.missed, 2)

    def test_a_question_is_asked_behind_the_output_that_was_lost(self):
        events = []

        def script(fake, message):
            fake.begin(message)
            for number in range(5):
                fake.say(message, "%d\n" % number, is_lost=number < 4)
            fake.reply(message, "input_request", {"prompt": "? ", "password": False}, "stdin")
            fake.serve_until(answered)
            fake.end(message)

        def answer(prompt, password):
            events.append("asked")
            answered.set()
            return ""

        answered = threading.Event()
        fake = LoggingKernel(self, scripted(script))
        with connect(fake.info) as ours:
            ours.execute("", on_input=answer, timeout=support.DEADLINE, on_output=lambda message: message.msg_type
                         == "stream" and events.append(message.content["text"].strip()))
        self.assertEqual(events, ["0", "1", "2", "3", "4", "asked"])

    def test_pages_wait_for_a_reader_who_cannot_follow(self):
        def script(fake, message):
            fake.begin(message)
            for number in range(300):
                fake.say(message, "%03d%s\n" % (number, "x" * 10_000), is_lost=number > 0)
            fake.end(message)
        self.fake = LoggingKernel(self, scripted(script), page=10)
        with mock.patch.object(client_module, "UNREAD_CHARS", 500_000), connect(self.fake.info) as ours:
            pending = ours.execute_nowait("")
            support.wait_until(lambda: ours._is_paused, what="a full inbox")
            self.assertLess(len(self.fake.questions), 10)
            self.assertLess(pending._unread_chars(), 700_000)
            seen = []
            pending.wait(support.DEADLINE, on_output=seen.append)
        self.assertEqual([line[:3] for line in text_of(seen).splitlines()], ["%03d" % n for n in range(300)])

    def test_a_wait_for_the_idle_is_not_over_while_others_print(self):
        def script(fake, message):
            fake.reply(message, "execute_reply", {"status": "ok"})      # overtakes the output
            end = time.monotonic() + 1
            while time.monotonic() < end:
                fake.say(Message({"msg_id": "b_1"}, {}, {}, {}, [], [], b""), "bob's")
                fake.is_ending.wait(0.05)
            self.lossy(fake, message)
        with mock.patch.object(client_module, "IDLE_PATIENCE", 0.3):
            seen, _ = self.run_cell(script)
        self.assert_lines(seen, range(3))

    def test_a_wait_for_the_idle_is_not_over_while_a_gap_is_filled(self):
        go_on = threading.Event()
        self.addCleanup(go_on.set)

        def script(fake, message):
            fake.reply(message, "execute_reply", {"status": "ok"})      # overtakes the output
            fake.begin(message)
            fake.say(message, "0\n", is_lost=True)
            fake.end(message)
        with mock.patch.object(client_module, "IDLE_PATIENCE", 0.1):
            fake = LoggingKernel(self, scripted(script), lambda fake: go_on.wait(support.DEADLINE))
            with connect(fake.info) as ours:
                pending, seen = ours.execute_nowait(""), []
                support.wait_until(lambda: fake.questions)
                with self.assertRaises(TimeoutError):
                    pending.wait(0.5, on_output=seen.append)
                go_on.set()
                pending.wait(support.DEADLINE, on_output=seen.append)
        self.assert_lines(seen, range(1))

    def test_a_kernel_that_dies_meanwhile_had_its_last_words(self):
        def script(fake, message):
            self.lossy(fake, message)
        seen = []
        fake = LoggingKernel(self, scripted(script), lambda fake: fake.is_ending.set())
        with mock.patch.object(LoggingKernel, "reply", lambda *arguments: None), Client(fake.info) as ours:
            ours.kernel_info_reply = mock.Mock(content=LoggingKernel.kernel_info)
            support.wait_until(lambda: ours._was_connected)
            heard = []
            ours.listen(heard.append)
            support.wait_until(lambda: self.probe(ours, heard), what="the subscription")
            start = time.monotonic()
            with self.assertRaises(KernelDied):
                ours.execute("", on_output=seen.append, timeout=support.DEADLINE)
            self.assertLess(time.monotonic() - start, support.at_most(1))
        self.assert_lines(seen, [0, 2])
        self.assertEqual(seen[3].content["reason"], "the kernel is gone")

    def probe(self, ours, heard):
        ours.submit("kernel_info_request")
        return heard

    def test_a_successor_is_followed_from_its_first_word(self):
        other = Message({"msg_id": "b_1", "session": "b", "username": "bob", "msg_type": "execute_request"}, {}, {},
                        {}, [], [], b"")

        def script(fake, message):
            fake.session, fake.seq, fake.records[:] = "fake again", 0, []
            fake.begin(other, is_lost=True)
            fake.say(other, "first\n", is_lost=True)
            fake.begin(message)
            fake.say(message, "0\n")
            fake.end(message)
        _, heard = self.run_cell(script)
        self.assertEqual(text_of(heard), "first\n0\n")
        self.assertEqual(self.ours.missed, 0)

    def test_while_a_successor_is_waited_for_the_log_is_not_forgotten(self):
        with connect(LoggingKernel(self).info) as ours:
            with mock.patch.object(FakeKernel, "take", lambda *arguments: None), self.assertRaises(NotReady):
                ours.wait_ready(0.2)
            self.assertTrue(ours.keeps_log)

    def test_whatever_is_lost_each_line_is_there_once(self):
        """Random losses, among them inputs and idles, random pages, repeated idles, others' messages in between."""
        chance = random.Random(support.rounds(7, None))

        def script(fake, message):
            fake.records.clear()
            loss = chance.choice([0.0, 0.1, 0.5, 0.9])
            fake.page = chance.randrange(1, 9)

            def is_lost():
                return chance.random() < loss
            fake.begin(message, is_lost())
            for number in range(chance.randrange(30)):
                fake.say(message, "%d\n" % number, is_lost())
                if chance.random() < 0.3:
                    fake.publish("status", {"execution_state": "busy"}, {"msg_id": "x"}, is_lost())
            fake.say(message, "last\n", is_lost())
            fake.end(message, is_lost())
            if chance.random() < 0.5:
                fake.publish("status", {"execution_state": "idle"}, message.header, seq=fake.seq)
            fake.publish("status", {"execution_state": "busy"}, {"msg_id": "x"})
        fake = LoggingKernel(self, scripted(script))
        with connect(fake.info) as ours:
            heard = []
            ours.listen(heard.append)
            for _ in range(support.rounds(100, 5000)):
                heard.clear()
                seen = []
                reply = ours.execute("", on_output=seen.append, timeout=support.DEADLINE)
                lines = text_of(seen).splitlines()
                self.assertEqual(lines, [*map(str, range(len(lines) - 1)), "last"])
                said = [message for message in heard if message.parent_header.get("msg_id")
                        == reply.parent_header["msg_id"]]
                self.assertEqual(text_of(said), text_of(seen))
                for messages in (seen, said):
                    kinds = [message.content.get("execution_state") or message.msg_type for message in messages]
                    self.assertEqual((kinds.count("execute_input"), kinds.count("idle"), kinds[-1]), (1, 1, "idle"))
            self.assertEqual(ours.missed, 0)


class CatchUp(unittest.TestCase):
    """A listener that begins with the past."""

    def listener(self):
        self.events = []
        return lambda message, is_past: self.events.append((is_past, message))

    def texts(self, is_past):
        return text_of([message for was_past, message in self.events if was_past is is_past])

    def test_the_past_comes_first_and_live_goes_on_where_it_ends(self):
        live = []

        def script(fake, message):
            fake.begin(message)
            for number in range(10):
                fake.say(message, "%d\n" % number)
            if live:
                fake.end(message)
            live.append(message)

        def on_log(fake):       # published while the page is made: in it, and live as well
            if isinstance(fake.questions[-1], int):
                for number in range(10, 15):
                    fake.say(live[0], "%d\n" % number)
        fake = LoggingKernel(self, scripted(script), on_log)
        with connect(fake.info) as bob, connect(fake.info) as ours:
            pending = bob.execute_nowait("")
            support.wait_until(lambda: pending.reply)
            ours.catch_up(self.listener(), cells=5)
            self.assertEqual(self.texts(True), "".join("%d\n" % n for n in range(15)))
            self.assertEqual([message.msg_type for _, message in self.events[:2]], ["execute_input", "stream"])
            self.assertEqual(self.events[0][1].parent_header["session"], bob.session)
            ours.execute("")
        self.assertEqual(self.texts(True) + self.texts(False), "".join("%d\n" % n for n in [*range(15), *range(10)]))
        self.assertEqual(fake.questions, [5])
        self.assertEqual([was_past for was_past, _ in self.events], sorted([w for w, _ in self.events], reverse=True))

    def test_a_cell_that_is_in_the_log_and_not_yet_published_begins_once(self):
        def on_log(fake):
            fake.note(k="begin", seq=1, of="b_1", ec=1, code="early", hdr={"msg_id": "b_1", "session": "b"})

        def script(fake, message):
            fake.publish("execute_input", {"code": "early", "execution_count": 1}, {"msg_id": "b_1", "session": "b"})
            fake.begin(message)
            fake.end(message)
        with connect(LoggingKernel(self, scripted(script), on_log).info) as ours:
            ours.catch_up(self.listener())
            ours.execute("", timeout=support.DEADLINE)
        self.assertEqual([message.content["code"] for _, message in self.events
                          if message.msg_type == "execute_input"], ["early", "code"])

    def test_before_the_client_is_ready_it_waits_with_it(self):
        fake = LoggingKernel(self, scripted(lambda fake, message: fake.say(message, "live\n")))
        fake.note(k="out", seq=0, of=None, type="stream", content={"name": "stdout", "text": "past\n"})
        with Client(fake.info) as ours:
            ours.catch_up(self.listener())
            self.assertEqual(fake.questions, [])
            ours.wait_ready()
            self.assertEqual(self.texts(True), "past\n")
            with mock.patch.object(client_module, "IDLE_PATIENCE", 0.1):
                ours.execute("", timeout=support.DEADLINE)
            support.wait_until(lambda: self.texts(False), what="what is live")
            self.assertEqual(self.texts(False), "live\n")

    def test_without_a_log_everything_is_live(self):
        with mock.patch.object(LoggingKernel, "kernel_info", {}):
            fake = LoggingKernel(self, scripted(lambda fake, message: fake.say(message, "live\n")))
            with Client(fake.info) as ours:
                ours.catch_up(self.listener())
                ours.wait_ready()
                self.assertTrue(self.events)        # what made it ready
                self.assertEqual(ours.log().messages, [])
                with mock.patch.object(client_module, "IDLE_PATIENCE", 0.1):
                    ours.execute("", timeout=support.DEADLINE)
                support.wait_until(lambda: self.texts(False), what="what is live")
        self.assertEqual((self.texts(True), self.texts(False)), ("", "live\n"))
        self.assertEqual(fake.questions, [])

    def test_a_log_that_does_not_answer_is_not_waited_for_longer_than_allowed(self):
        with mock.patch.object(LoggingKernel, "answer_log", lambda fake, message: None):
            fake = LoggingKernel(self, scripted(self.cell))
            with connect(fake.info) as ours:
                start = time.monotonic()
                ours.catch_up(self.listener(), timeout=0.2)
                self.assertLess(time.monotonic() - start, support.at_most(1))
                ours.execute("", timeout=support.DEADLINE)
        self.assertEqual(self.texts(False), "live\n")

    def cell(self, fake, message):
        fake.begin(message)
        fake.say(message, "live\n")
        fake.end(message)

    def test_no_cells_are_no_past(self):
        fake = LoggingKernel(self, scripted(self.cell))
        with connect(fake.info) as ours:
            ours.execute("", timeout=support.DEADLINE)
            stop = ours.catch_up(self.listener(), cells=0)
            ours.execute("", timeout=support.DEADLINE)
            stop()
            ours.execute("", timeout=support.DEADLINE)
        self.assertEqual((self.texts(True), self.texts(False)), ("", "live\n"))
        self.assertEqual(fake.questions, [])

    def test_who_caught_up_is_told_of_what_is_lost_from_then_on(self):
        def script(fake, message):
            fake.begin(message)
            fake.say(message, "0\n")
            fake.say(message, "1\n", is_lost=True)
            fake.kept_from = fake.seq + 1
            fake.say(message, "2\n")
            fake.end(message)
        with connect(LoggingKernel(self, scripted(script)).info) as ours:
            ours.catch_up(self.listener())
            ours.execute("", timeout=support.DEADLINE)
        self.assertEqual([message.content.get("text", message.content.get("reason")) for was_past, message
                          in self.events if message.msg_type in ("stream", "twoproc_gap") and not was_past],
                         ["0\n", "it is no longer kept", "2\n"])

    def test_a_log_that_cannot_be_written_hides_nothing_of_what_is_live(self):
        """Not even what came while it was asked."""
        fake = LoggingKernel(self, scripted(self.cell))
        fake.log_name, fake.on_log = "", lambda fake: fake.publish(
            "stream", {"name": "stdout", "text": "early\n"}, {"msg_id": "x"})
        with connect(fake.info) as ours:
            ours.catch_up(self.listener())
            ours.execute("", timeout=support.DEADLINE)
        self.assertEqual(self.texts(False), "early\nlive\n")


def up_to(number):
    return "".join("%d\n" % n for n in range(1, number + 1))


class Visit:
    """A client that comes to a kernel, with what it had of one cell."""

    def __init__(self, case, kernel, msg_id):
        self.msg_id = msg_id
        self.past, self.live, self.idles = [], [], 0
        self.is_over = threading.Event()
        self.client = connect(kernel.connection_file, support.DEADLINE)
        case.addCleanup(self.client.close)
        self.client.catch_up(self.hear)

    def hear(self, message, is_past):
        if message.parent_header.get("msg_id") == self.msg_id:
            (self.past if is_past else self.live).append(message)
            if message.content.get("execution_state") == "idle":
                self.idles += 1
                self.is_over.set()

    def wait_live(self):
        support.wait_until(lambda: self.live or self.idles)

    @property
    def text(self):
        return text_of([*self.past, *self.live])


class Visitors(support.KernelCase):
    """Who comes while a cell runs, leaves and comes back, sees each line once."""

    def test_one_who_comes_back_sees_all_of_a_cell_that_prints_on(self):
        pause = support.rounds(0.01, 0.05)
        for number in range(support.rounds(2, 20)):
            gate = os.path.join(self.kernel.home.work, f"visited-{number}")
            msg_id = self.client.send_execute(
                f"import os, time\ni = 0\nwhile i < 100 or not os.path.exists({gate!r}):\n"
                f"    i += 1\n    print(f'{{i}}\\n', end='', flush=True)\n    time.sleep({pause})")
            self.client.wait_running(msg_id)
            visits = 0
            while True:
                visit = Visit(self, self.kernel, msg_id)
                visits += 1
                if visits % 2:
                    visit.wait_live()
                visit.client.close()
                self.client.collect()       # lest it be a reader that has stopped
                self.client.inbox["iopub"].clear()
                if visit.idles:
                    break
                lines = visit.text.count("\n")
                self.assertEqual(visit.text, up_to(lines))
                self.assertEqual([m.msg_type for m in [*visit.past, *visit.live]].count("execute_input"), 1)
                if visits == 3:
                    with open(gate, "w"):
                        pass
            self.assertGreater(visits, 3)
            self.client.reply(msg_id)
            self.assertEqual(visit.text, up_to(int(self.client.execute("i").value)))

    def test_one_who_comes_in_the_middle_sees_past_then_live_then_the_end(self):
        gate = os.path.join(self.kernel.home.work, "gate")
        msg_id = self.client.send_execute(
            "import os, time\nfor i in range(1, 101):\n    print(i, flush=True)\n"
            f"    while i == 40 and not os.path.exists({gate!r}): time.sleep(0.001)")
        self.client.wait_text(msg_id, "40\n")
        visit = Visit(self, self.kernel, msg_id)
        self.assertEqual(text_of(visit.past), up_to(40))
        self.assertEqual((visit.past[0].msg_type, visit.idles), ("execute_input", 0))
        with open(gate, "w"):
            pass
        self.assertTrue(visit.is_over.wait(support.DEADLINE))
        self.assertEqual(visit.text, up_to(100))
        self.assertNotIn("execute_input", [message.msg_type for message in visit.live])
        # And who comes afterwards sees it whole, as past.
        late = Visit(self, self.kernel, msg_id)
        self.assertEqual((text_of(late.past), late.idles, late.live), (up_to(100), 1, []))
        self.assertEqual(late.past[0].parent_header["username"], "test")

    def test_a_visitor_sees_results_displays_and_errors_as_they_were(self):
        msg_id = self.client.send_execute("from IPython.display import HTML\ndisplay(HTML('<b>'))\n1/0")
        live = [message for message in self.client.output(msg_id) if message.msg_type != "status"]
        self.client.reply(msg_id)
        past = Visit(self, self.kernel, msg_id).past
        self.assertEqual([(m.msg_type, m.content, m.parent_header) for m in past[:-1]],
                         [(m.msg_type, m.content, m.parent_header) for m in live])
        self.assertEqual(past[-1].content, {"execution_state": "idle"})

    def test_of_a_cell_that_printed_too_much_the_newest_is_shown_and_the_rest_is_said_to_be_missing(self):
        gate = os.path.join(self.kernel.home.work, "gate of much")
        msg_id = self.client.send_execute(
            "import os, time\nfor i in range(1, 100_001): print(i)\n"
            f"while not os.path.exists({gate!r}): time.sleep(0.001)\nprint(100_001)")
        self.client.wait_text(msg_id, "100000\n")
        visit = Visit(self, self.kernel, msg_id)
        with open(gate, "w"):
            pass
        self.assertTrue(visit.is_over.wait(support.DEADLINE))
        kinds = [message.msg_type for message in visit.past]
        self.assertEqual(kinds[:2], ["execute_input", "twoproc_gap"])
        self.assertEqual(visit.past[1].parent_header["msg_id"], msg_id)
        lines = visit.text.splitlines()[1:]     # the first may be half a line
        self.assertEqual(lines, [str(number) for number in range(int(lines[0]), 100_002)])
        self.assertLess(len(text_of(visit.past)), 140_000)

    def test_attaching_takes_no_longer_behind_a_long_log(self):
        def seconds():
            start = time.monotonic()
            Visit(self, self.kernel, "").client.close()
            return time.monotonic() - start
        short = min(seconds() for _ in range(3))
        for _ in range(3):
            self.client.execute(f"for i in range({support.rounds(50, 500)}): print('x' * 60_000); display(i)",
                                deadline=60)
        long = min(seconds() for _ in range(3))
        self.assertLess(long, short + 0.3)


class Cable:
    """A connection that can be cut: what comes to `port` goes to `target`, a port of this machine."""

    def __init__(self, case, target):
        self.target, self.sockets = target, []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()
        case.addCleanup(self.cut)
        case.addCleanup(self.server.close)

    def accept(self):
        try:
            while True:
                here = self.server.accept()[0]
                there = socket.create_connection(("127.0.0.1", self.target))
                self.sockets += [here, there]
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=self.pump, args=(source, sink), daemon=True).start()
        except OSError:
            pass

    def pump(self, source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass

    def cut(self):
        for one in self.sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            one.close()
        self.sockets.clear()


class CutConnections(unittest.TestCase):

    def test_what_was_said_while_the_connection_was_cut_is_filled_in(self):
        kernel = support.start_kernel(self, "--transport", "tcp")
        cable = Cable(self, kernel.info["iopub_port"])
        info = client_module.connection.read_connection_file(kernel.connection_file)._replace(iopub_port=cable.port)
        with connect(info) as ours:
            seen, cuts = [], 0
            pending = ours.execute_nowait(
                f"import time\nfor i in range(1, {support.rounds(601, 6001)}): print(i, flush=True); time.sleep(0.002)")

            def look(message):
                nonlocal cuts
                seen.append(message)
                if message.msg_type == "stream" and text_of(seen).count("\n") > 100 * (cuts + 1):
                    cuts += 1
                    cable.cut()
            pending.wait(60, on_output=look)
            self.assertEqual(ours.missed, 0)
        self.assertGreater(cuts, 3)
        self.assertEqual(text_of(seen), up_to(support.rounds(600, 6000)))


class StoppedReaders(support.KernelCase):
    """A reader that stops loses nothing, and holds up the others no longer than limits.slow_reader_seconds."""
    SECONDS = support.rounds(0.3, 5)
    kernel_arguments = ("--set", f"limits.slow_reader_seconds={SECONDS}")
    STOPPED = support.rounds(2, 10)             # so long at least is the reader stopped
    LINES = support.rounds(2500, 13_400)        # 8 MB, 40 MB
    # A display behind each line, so that lines are not joined to few messages, which would find room on the way.
    FLOOD = f"for i in range({LINES}):\n    print('%06d' % i + 'x' * 2993, flush=True)\n    display(i)"
    TEXT = "".join("%06d%s\n" % (number, "x" * 2993) for number in range(LINES))

    READER = '''
import hashlib, json, sys, threading
from twoproc.client import connect
client, text, displays, idles, over = connect(sys.argv[1]), hashlib.sha256(), [], [], threading.Event()
gaps = []

def hear(message):
    if message.msg_type == "twoproc_gap":
        gaps.append(message.content)
    if message.parent_header.get("username") == "flooder":
        if message.msg_type == "stream":
            text.update(message.content["text"].encode())
        elif message.msg_type == "display_data":
            displays.append(int(message.content["data"]["text/plain"]))
        elif message.content.get("execution_state") == "idle":
            idles.append(message.parent_header["msg_id"])
        elif message.content.get("code") == "'over'":
            over.set()

client.listen(hear)
client.execute("'reading'", silent=True)
print("reading", flush=True)
over.wait()
print(json.dumps({"text": text.hexdigest(), "in_order": displays == list(range(len(displays))),
                  "displays": len(displays), "idles": idles, "missed": client.missed, "gaps": gaps}), flush=True)
'''

    def test_one_that_is_stopped_and_goes_on_has_every_byte_and_the_idle(self):
        reader = support.Process(self, [sys.executable, "-c", self.READER, self.kernel.connection_file],
                                 home=self.kernel.home)
        support.wait_until(lambda: "reading" in reader.output() or not reader.is_alive)
        other = connect(self.kernel.connection_file)
        self.addCleanup(other.close)
        times = [time.monotonic()]
        other.listen(lambda message: times.append(time.monotonic()))
        before = self.kernel.memory()
        reader.signal(signal.SIGSTOP)
        text = hashlib.sha256()
        with connect(self.kernel.connection_file, username="flooder") as ours:
            pending = ours.execute_nowait(self.FLOOD)
            pending.wait(120, on_output=lambda message: message.msg_type == "stream"
                         and text.update(message.content["text"].encode()))
            taken = time.monotonic() - times[0]
            self.assertEqual(text.digest(), hashlib.sha256(self.TEXT.encode()).digest())
            pauses = [after - before for before, after in zip(times, times[1:])]
            self.assertLess(max(pauses), self.SECONDS + support.at_most(2))
            ours.execute(f"import time; time.sleep({max(0, self.STOPPED - taken)})")
            self.assertLess(self.kernel.memory("VmHWM") - before, 100 << 20)
            reader.signal(signal.SIGCONT)
            ours.execute("'over'", timeout=60)
            support.wait_until(lambda: reader.output().count("\n") == 2 or not reader.is_alive, 120, reader.log)
        result = json.loads(reader.output().splitlines()[1])
        self.assertEqual(result["text"], text.hexdigest())
        self.assertEqual((result["in_order"], result["displays"], result["missed"]), (True, self.LINES, 0),
                         result["gaps"])
        self.assertEqual(result["idles"].count(pending.msg_id), 1)

    def test_a_frontend_that_is_stopped_in_its_own_print_loop_shows_every_line_and_ends(self):
        seconds, lines = support.rounds(2, 60), support.rounds(2500, 13_400)
        done = os.path.join(self.kernel.home.path, "printed")
        code = (f"import time\nprint('begun', flush=True)\nfor i in range({lines}):\n"
                f"    print('%06d' % i + 'x' * 2993, flush=True); time.sleep({seconds / lines})\n"
                f"open({done!r}, 'w').close()")
        argv = [sys.executable, "-m", "twoproc.frontend", *self.kernel_arguments, "-c", code]
        frontend = support.Process(self, argv, home=self.kernel.home)
        support.wait_until(lambda: frontend.output() or not frontend.is_alive, what="the first line")
        os.kill(frontend.pid, signal.SIGSTOP)       # its kernel goes on
        support.wait_until(lambda: os.path.exists(done), 10 * seconds + support.DEADLINE, "the end of the loop")
        os.kill(frontend.pid, signal.SIGCONT)
        self.assertEqual(frontend.wait(120), 0, frontend.log()[-1000:])
        shown = frontend.output().splitlines()
        self.assertEqual([line[:6] for line in shown], ["begun", *("%06d" % number for number in range(lines))])

    def test_one_that_does_not_take_its_own_output_has_every_byte(self):
        with mock.patch.object(client_module, "UNREAD_CHARS", 200_000), \
                connect(self.kernel.connection_file) as ours:
            pending = ours.execute_nowait(self.FLOOD)
            support.wait_until(lambda: pending.reply, 120, "the reply, which does not wait for the output")
            self.assertTrue(ours._is_paused)
            seen = []
            pending.wait(120, on_output=seen.append)
            self.assertEqual(ours.missed, 0)
        self.assertEqual(text_of(seen), self.TEXT)
        self.assertEqual([int(message.content["data"]["text/plain"]) for message in seen
                          if message.msg_type == "display_data"], list(range(self.LINES)))
        self.assertEqual(seen[-1].content, {"execution_state": "idle"})

    def test_one_who_comes_while_the_kernel_waits_for_it_waits_too(self):
        kernel = support.start_kernel(self, "--set", "limits.slow_reader_seconds=4.5")
        kernel.client(self)     # reads nothing from now on
        with connect(kernel.connection_file) as ours:
            lines = []
            stopped = threading.Event()
            ours.execute_nowait(self.FLOOD)
            ours.listen(lambda message: lines.append(message) or len(lines) == 1400 and stopped.set())
            self.assertTrue(stopped.wait(support.DEADLINE))
            # Longer than a busy machine is likely to be silent for another reason; and counted from the last word.
            support.wait_until(lambda: ours._heard_output_at < time.monotonic() - 1.5, what="the kernel to wait")
            start = ours._heard_output_at
            connect(kernel.connection_file).close()
            self.assertGreater(time.monotonic() - start, 4.1)

    def test_without_a_log_the_loss_is_told_and_the_cell_ends(self):
        kernel = support.start_kernel(self, *self.kernel_arguments, "--set", "recovery.log=no")
        with mock.patch.object(client_module, "UNREAD_CHARS", 200_000), connect(kernel.connection_file) as ours:
            self.assertFalse(ours.keeps_log)
            pending = ours.execute_nowait(self.FLOOD)
            support.wait_until(lambda: pending.reply, 120, "the reply")
            seen = []
            pending.wait(120, on_output=seen.append)
            self.assertGreater(ours.missed, 100)
        self.assertIn("the kernel keeps no log", [message.content.get("reason") for message in seen])
        self.assertLess(len(text_of(seen)), len(self.TEXT))


if __name__ == "__main__":
    unittest.main()
