# Distributed under the terms of the BSD 3-Clause License.
"""session.py: frames to Message and back, the checks of a request, and the rule that nothing is obeyed twice.

The property tests draw from `random`. Each prints its seed when it fails; SEED=n in the environment
repeats that run.
"""
import hashlib
import json
import os
import random
import string
import tracemalloc
import unittest
from datetime import datetime, timedelta, timezone
from unittest import mock

from twoproc import session
from twoproc.session import BadMessage, MalformedMessage, MessageError, ReplayGuard, Session, SignatureError

from .support import DELIMITER, sign

KEY = b"0123456789abcdef"
SEED = int(os.environ.get("SEED") or random.randrange(10**9))
NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)

ODD_TEXTS = ("", "x", "\ud800", "\0", "é☃𝄞", "<IDS|MSG>", "a" * 300, "1.0", "5.5", "4.0", "999.9",
             "9999-12-31T23:59:59", "0001-01-01T00:00:00", "2026-01-01T12:00:00.123Z", "Z", "-" * 40)
ODD_BYTES = (b"", b"{}", b"[]", b"null", b"1", b'"x"', b"{", b"\xff\xfe", b'{"a":NaN}', b"[" * 100_000,
             b'{"a":' * 5000, b'{"a":' + b"9" * 5000 + b"}", b'{"a":1,"a":2}', b"true", b"-Infinity", DELIMITER)


class Dice(random.Random):
    """Draws JSON values and frames."""

    def text(self):
        if self.random() < 0.3:
            return self.choice(ODD_TEXTS)
        return "".join(self.choices(string.printable + "äß€", k=self.randrange(12)))

    def number(self):
        return self.choice([0, 1, -1, 2**31, -2**63, 10**30, 0.5, -1e300, self.randrange(1000)])

    def value(self, depth=0):
        kind = self.randrange(8 if depth < 4 else 5)
        if kind < 2:
            return self.text()
        if kind == 2:
            return self.number()
        if kind < 5:
            return self.choice([None, True, False])
        if kind == 5:
            return [self.value(depth + 1) for _ in range(self.randrange(4))]
        return self.object(depth)

    def object(self, depth=0):
        return {self.text(): self.value(depth + 1) for _ in range(self.randrange(5))}

    def part(self):
        """One of the four JSON frames, more often wrong than right."""
        if self.random() < 0.3:
            return self.choice(ODD_BYTES)
        data = bytearray(json.dumps(self.value()).encode())
        for _ in range(self.randrange(3)):
            if data:
                data[self.randrange(len(data))] = self.randrange(256)
        return bytes(data)

    def header(self):
        header = {"msg_id": self.text() or "1", "session": "s", "username": "u", "date": NOON.isoformat(),
                  "msg_type": self.choice(list(session.MESSAGES)), "version": "5.5"}
        for _ in range(self.randrange(3)):
            name = self.choice([*header, "subshell_id", "extra"])
            if self.random() < 0.3:
                header.pop(name, None)
            else:
                header[name] = self.value()
        return json.dumps(header).encode()


class PropertyCase(unittest.TestCase):
    def setUp(self):
        self.dice = Dice(SEED)

    def run(self, result=None):
        before = result and len(result.failures) + len(result.errors)
        super().run(result)
        if result and len(result.failures) + len(result.errors) > before:
            print(f"{self.id()}: repeat with SEED={SEED}", flush=True)
        return result


class RoundTrip(PropertyCase):
    def test_what_is_written_is_read(self):
        ours, theirs = Session(KEY), Session(KEY, replay_memory=1000)
        for _ in range(500):
            content, metadata = self.dice.object(), self.dice.object()
            buffers = [self.dice.randbytes(self.dice.randrange(20)) for _ in range(self.dice.randrange(3))]
            identities = [self.dice.randbytes(5) for _ in range(self.dice.randrange(3))]
            parent = ours.header("execute_request")
            frames = ours.serialize("comm_msg", content, parent, metadata, buffers)
            message = theirs.deserialize(identities + frames)
            self.assertEqual(message.content, content)
            self.assertEqual(message.metadata, metadata)
            self.assertEqual(message.parent_header, json.loads(parent))
            self.assertEqual(message.buffers, buffers)
            self.assertEqual(message.identities, identities)
            self.assertEqual(message.header_bytes, frames[2])
            self.assertEqual(message.msg_type, "comm_msg")
            self.assertEqual(message.header["session"], ours.session)

    def test_frames_hold_a_signature_as_the_specification_computes_it(self):
        for key in (KEY, b""):
            frames = Session(key).serialize("status", {"execution_state": "busy"})
            self.assertEqual(frames[0], DELIMITER)
            self.assertEqual(frames[1], sign(key, frames[2:6]))

    def test_a_large_message_has_the_same_signature_as_a_joined_one(self):
        frames = Session(KEY).serialize("stream", {"name": "stdout", "text": "x" * 200_000})
        self.assertEqual(frames[1], sign(KEY, frames[2:6]))

    def test_message_ids_are_never_used_twice(self):
        ours = Session(KEY)
        ids = {json.loads(ours.header("status"))["msg_id"] for _ in range(1000)}
        self.assertEqual(len(ids), 1000)

    def test_a_percent_or_quote_in_the_user_name_survives(self):
        for name in ('100%', '%s%d', 'a"b', "ö", "\ud800"):
            self.assertEqual(json.loads(Session(KEY, username=name).header("status"))["username"], name)

    def test_what_json_does_not_know_is_written_readably(self):
        cases = [({"a": float("nan")}, {"a": "nan"}), ({"a": [float("-inf")]}, {"a": ["-inf"]}),
                 ({"a": b"\0\1"}, {"a": "AAE="}), ({"a": {1}}, {"a": [1]}), ({"a": NOON}, {"a": NOON.isoformat()}),
                 ({"a": "\ud800"}, {"a": "\ud800"}), ({1: 2}, {"1": 2})]
        for value, expected in cases:
            self.assertEqual(json.loads(session.encode(value)), expected)
        with self.assertRaises(TypeError):
            session.encode({"a": object()})
        circle = {}
        circle["a"] = circle
        with self.assertRaises((ValueError, RecursionError)):
            session.encode(circle)


class Buffers(unittest.TestCase):
    """The signature does not cover buffers; between twoproc's own it covers their digests in metadata."""

    BUFFERS = [b"one", b"", b"x" * 100_000]

    def setUp(self):
        self.receiver = Session(KEY, replay_memory=100)
        self.frames = self.sealed({"a": 1}, self.BUFFERS)

    @staticmethod
    def sealed(metadata, buffers):
        return Session(KEY).serialize("comm_msg", {}, metadata=session.seal(metadata, buffers) or b"{}",
                                      buffers=buffers)

    def test_that_are_those_of_the_sender_arrive(self):
        message = self.receiver.deserialize(self.frames)
        self.assertEqual(message.buffers, self.BUFFERS)
        self.assertEqual(message.metadata["twoproc_buffers"],
                         [hashlib.sha256(buffer).hexdigest() for buffer in self.BUFFERS])
        self.assertEqual(message.metadata["a"], 1)

    def test_that_were_changed_added_taken_away_or_reordered_are_refused(self):
        frames = self.frames
        for name, wrong in {"changed": [*frames[:6], b"0ne", *frames[7:]], "added": [*frames, b""],
                            "the last taken away": frames[:-1], "all taken away": frames[:6],
                            "reordered": [*frames[:6], frames[7], frames[6], frames[8]],
                            "joined": [*frames[:6], frames[6] + frames[8]]}.items():
            with self.subTest(name), self.assertRaises(BadMessage) as caught:
                Session(KEY, replay_memory=100).deserialize(wrong)
            self.assertEqual((caught.exception.message.buffers, caught.exception.message.content), (wrong[6:], {}))

    def test_of_a_sender_who_says_nothing_of_them_arrive(self):
        frames = Session(KEY).serialize("comm_msg", {}, buffers=self.BUFFERS)
        self.assertEqual(self.receiver.deserialize(frames).buffers, self.BUFFERS)

    def test_metadata_that_came_with_other_buffers_may_be_passed_on(self):
        received = self.receiver.deserialize(self.frames).metadata
        for buffers in ([], [b"other"]):
            message = self.receiver.deserialize(self.sealed(received, buffers))
            self.assertEqual((message.buffers, message.metadata["a"]), (buffers, 1))
            self.assertEqual("twoproc_buffers" in message.metadata, bool(buffers))

    def test_nothing_is_written_where_there_are_none(self):
        self.assertIsNone(session.seal(None, []))
        self.assertEqual(session.seal({"a": 1}, ()), {"a": 1})

    def test_a_list_of_them_that_is_none_is_refused(self):
        for value in (None, 5, "x", [5], {}, [["x"]], [None]):
            frames = Session(KEY).serialize("comm_msg", {}, metadata={"twoproc_buffers": value})
            with self.subTest(value=value), self.assertRaises(BadMessage):
                self.receiver.deserialize(frames)

    def test_memoryviews_of_any_shape_have_the_digest_of_their_bytes(self):
        view = memoryview(bytes(range(24))).cast("B", [2, 3, 4])
        metadata = session.seal(None, [view, bytearray(b"x")])
        self.assertEqual(metadata, session.seal(None, [bytes(range(24)), b"x"]))


class ArbitraryFrames(PropertyCase):
    """Whatever comes in, a Message or one of session's own errors comes out."""

    def check(self, receiver, frames):
        try:
            message = receiver.deserialize(frames)
        except BadMessage as error:
            message = error.message
            self.assertIsInstance(message.content, dict)
            self.assertIsInstance(message.msg_type, str)
        except MessageError as error:
            self.assertNotIn("\n", str(error))
            return
        self.assertTrue(0 < len(message.msg_id) <= 256)
        for channel in ("shell", "control", "stdin"):
            try:
                self.assertIsInstance(session.check_request(message, channel), dict)
            except BadMessage as error:
                self.assertNotIn("\n", str(error))
                self.assertLess(len(str(error)), 1000)

    def test_random_frames(self):
        receivers = [Session(KEY, replay_memory=100), Session(KEY), Session(b"", replay_memory=100)]
        for _ in range(2000):
            frames = [self.dice.choice([DELIMITER, self.dice.part(), self.dice.randbytes(self.dice.randrange(40))])
                      for _ in range(self.dice.randrange(10))]
            self.check(self.dice.choice(receivers), frames)

    def test_random_frames_with_a_right_signature(self):
        receivers = [Session(KEY, replay_memory=100), Session(KEY)]
        for _ in range(3000):
            parts = [self.dice.header() if self.dice.random() < 0.8 else self.dice.part(),
                     *(self.dice.choice([b"{}", self.dice.part()]) for _ in range(3))]
            self.check(self.dice.choice(receivers), [b"id", DELIMITER, sign(KEY, parts), *parts])

    def test_requests_with_fields_of_any_type(self):
        receiver = Session(KEY)
        for _ in range(3000):
            msg_type = self.dice.choice([name for name, kind in session.MESSAGES.items() if kind.fields is not None])
            fields = session.MESSAGES[msg_type].fields
            content = {name: self.dice.value() for name in fields if self.dice.random() < 0.8}
            parts = [json.dumps({"msg_id": "1", "msg_type": msg_type, "session": "s"}).encode(), b"{}", b"{}",
                     json.dumps(content).encode()]
            self.check(receiver, [DELIMITER, sign(KEY, parts), *parts])

    def test_dates_of_any_form(self):
        receiver = Session(KEY, replay_memory=50)
        for number in range(2000):
            date = self.dice.choice([self.dice.value(), self.dice.choice(ODD_TEXTS),
                                     NOON.isoformat()[:self.dice.randrange(32)],
                                     "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"])
            parts = [json.dumps({"msg_id": str(number), "msg_type": "status", "session": "s", "date": date}).encode(),
                     b"{}", b"{}", b"{}"]
            self.check(receiver, [DELIMITER, sign(KEY, parts), *parts])


class Refusals(unittest.TestCase):
    """What deserialize says to each fault: the class of the error decides between silence and an answer."""

    def setUp(self):
        self.receiver = Session(KEY, replay_memory=100)
        self.good = Session(KEY).serialize("execute_request", {"code": "1"})

    def signed(self, *parts):
        parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in parts]
        return [DELIMITER, sign(KEY, parts), *parts]

    def header(self, **members):
        header = {"msg_id": "1", "msg_type": "execute_request", "session": "s", "version": "5.5",
                  "date": NOON.isoformat(), **members}
        return {name: value for name, value in header.items() if value is not ...}

    def test_wrong_signatures(self):
        good = self.good[1]
        for signature in (b"", b"0" * 64, good[:-1], good + b"0", good.upper(), b"\xff" * 64, b"\xe9", b" " + good[1:],
                          sign(b"other", self.good[2:6]), sign(b"", self.good[2:6]), DELIMITER):
            with self.assertRaises(SignatureError):
                self.receiver.deserialize([DELIMITER, signature, *self.good[2:]])
        self.assertEqual(self.receiver.deserialize(self.good).content, {"code": "1"})

    def test_every_signed_frame_is_covered_by_the_signature(self):
        for place in range(2, 6):
            frames = list(self.good)
            frames[place] = frames[place][:-1] + b" }"
            with self.assertRaises(SignatureError):
                self.receiver.deserialize(frames)

    def test_frames_without_a_message(self):
        for frames in ([], [b""], [DELIMITER], [b"a", b"b"], self.good[:5], self.good[1:], [b"x"] * 4 + self.good,
                       [b"x"] * 100_000, [DELIMITER] + [b""] * 100):
            with self.assertRaises(MessageError):
                self.receiver.deserialize(frames)

    def test_sizes_have_limits(self):
        receiver = Session(KEY, replay_memory=100, max_frames=8, max_message=1000)
        with self.assertRaises(MalformedMessage):
            receiver.deserialize([b"id", *self.good, b"", b""])
        with self.assertRaises(MalformedMessage):
            receiver.deserialize([*self.good, b"x" * 1000])
        receiver.deserialize([b"id", *self.good, b""])

    def test_a_question_is_shorter_than_code_may_be_and_so_is_all_of_who_may_not_run_any(self):
        content = json.dumps({"code": "x" * (5 << 20)}).encode()
        for msg_type, may_run, is_read in (("execute_request", True, True), ("execute_request", False, False),
                                           ("complete_request", True, False), ("comm_msg", True, True)):
            with self.subTest(msg_type, may_run=may_run):
                for parts in ((self.header(msg_type=msg_type), {}, {}, content),
                              (self.header(msg_type=msg_type), {}, content, {})):
                    receiver = Session(KEY, replay_memory=100)
                    if is_read:
                        receiver.deserialize(self.signed(*parts), may_run)
                    else:
                        with self.assertRaises(BadMessage) as caught:
                            receiver.deserialize(self.signed(*parts), may_run)
                        self.assertIn("expected at most 4194304", str(caught.exception))
        reply = self.signed(self.header(msg_type="history_reply"), {}, {}, content)
        self.assertEqual(len(Session(KEY).deserialize(reply).content["code"]), 5 << 20)     # to a client

    def test_headers_that_nobody_could_be_answered_about(self):
        for header in (b"{", b"\xff", [], None, 5, "x", self.header(msg_id=...), self.header(msg_id=5),
                       self.header(msg_id=""), self.header(msg_id="x" * 2**20), self.header(msg_id="x" * 257),
                       b"[" * 200_000, b'{"msg_id":' + b"9" * 5000 + b"}"):
            with self.assertRaises(MalformedMessage):
                self.receiver.deserialize(self.signed(header, {}, {}, {}))

    def test_faults_behind_a_usable_msg_id_name_the_request(self):
        cases = [(self.header(msg_type=[]), {}), (self.header(msg_type=...), {}), (self.header(session=...), {}),
                 (self.header(session=7), {}), (self.header(session="x" * 300), {}), (self.header(version="4.0"), {}),
                 (self.header(version="999.1"), {}), (self.header(version=5.5), {}),
                 *((self.header(), content) for content in ([], None, 5, "x", b"{", b"\xff", b'{"a":NaN}',
                                                            b"[" * 200_000, b'{"a":' + b"9" * 5000 + b"}"))]
        for header, content in cases:
            for parts in ((header, {}, {}, content), (header, {}, content, {}), (header, content, {}, {})):
                receiver = Session(KEY, replay_memory=100)
                with self.assertRaises(BadMessage) as caught:
                    receiver.deserialize(self.signed(*parts))
                self.assertEqual(caught.exception.message.msg_id, "1")
                self.assertEqual(caught.exception.message.header_bytes, json.dumps(header).encode())

    def test_a_missing_version_or_date_is_served(self):
        for members in ({"version": ...}, {"date": ...}, {"date": "yesterday"}, {"date": 5}):
            header = self.header(**members)
            receiver = Session(KEY, replay_memory=100)
            self.assertEqual(receiver.deserialize(self.signed(header, {}, {}, {})).msg_id, "1")

    def test_a_client_reads_what_a_kernel_writes_carelessly(self):
        self.assertEqual(Session(KEY).deserialize(self.signed(self.header(), {}, {}, b'{"a":Infinity}')).content,
                         {"a": float("inf")})

    def test_without_a_key_nothing_is_signed_and_all_is_read(self):
        receiver = Session(b"", replay_memory=100)
        frames = Session(b"").serialize("kernel_info_request", {})
        self.assertEqual(frames[1], b"")
        for _ in range(2):
            self.assertEqual(receiver.deserialize(frames).msg_type, "kernel_info_request")


class Requests(unittest.TestCase):
    """check_request: defaults filled in, wrong fields refused with their name."""

    def check(self, msg_type, content, channel=None, **header):
        message = session.Message({"msg_type": msg_type, "msg_id": "1", **header}, {}, {}, content, [], [], b"")
        return session.check_request(message, channel or session.MESSAGES[msg_type].channels[0])

    def test_defaults_are_filled_in(self):
        self.assertEqual(self.check("execute_request", {"code": "1"}), {
            "code": "1", "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": True,
            "stop_on_error": True})
        self.assertEqual(self.check("shutdown_request", {}), {"restart": False})

    def test_a_default_is_a_new_object_each_time(self):
        first = self.check("comm_msg", {"comm_id": "1"})
        first["data"]["x"] = 1
        self.assertEqual(self.check("comm_msg", {"comm_id": "1"})["data"], {})

    def test_unknown_fields_are_kept(self):
        self.assertEqual(self.check("kernel_info_request", {"new": 1}), {"new": 1})

    def test_wrong_fields_are_named(self):
        cases = [("execute_request", {}, "code"), ("execute_request", {"code": 5}, "code"),
                 ("execute_request", {"code": "", "user_expressions": []}, "user_expressions"),
                 ("execute_request", {"code": "", "store_history": "x"}, "store_history"),
                 ("complete_request", {"code": "a"}, "cursor_pos"),
                 ("complete_request", {"code": "a", "cursor_pos": -5}, "cursor_pos"),
                 ("complete_request", {"code": "a", "cursor_pos": 10**9}, "cursor_pos"),
                 ("complete_request", {"code": "a", "cursor_pos": "x"}, "cursor_pos"),
                 ("complete_request", {"code": "a", "cursor_pos": True}, "cursor_pos"),
                 ("inspect_request", {"code": "a", "cursor_pos": 1, "detail_level": "x"}, "detail_level"),
                 ("inspect_request", {"code": "a", "cursor_pos": 1, "detail_level": 2}, "detail_level"),
                 ("history_request", {"hist_access_type": "bogus"}, "hist_access_type"),
                 ("history_request", {}, "hist_access_type"),
                 ("history_request", {"hist_access_type": "tail", "n": -1}, "n"),
                 ("history_request", {"hist_access_type": "tail", "n": 1 << 63}, "n"),
                 ("is_complete_request", {"code": None}, "code"), ("comm_open", {"comm_id": "1"}, "target_name"),
                 ("comm_msg", {"data": {}}, "comm_id"), ("input_reply", {}, "value"),
                 ("input_reply", {"value": 5}, "value")]
        for msg_type, content, name in cases:
            with self.subTest(msg_type=msg_type, content=content), self.assertRaises(BadMessage) as caught:
                self.check(msg_type, content)
            self.assertIn(name, str(caught.exception))

    def test_so_many_cells_are_asked_about_at_once_and_no_more(self):
        self.check("twoproc_resume_request", {"msg_ids": ["1"] * session.MAX_MSG_IDS})
        with self.assertRaises(BadMessage):
            self.check("twoproc_resume_request", {"msg_ids": ["1"] * (session.MAX_MSG_IDS + 1)})

    def test_a_request_on_another_channel_is_refused(self):
        for msg_type, channel in (("execute_request", "control"), ("interrupt_request", "shell"),
                                  ("input_reply", "shell"), ("comm_open", "stdin")):
            with self.assertRaises(BadMessage):
                self.check(msg_type, {}, channel)

    def test_messages_that_are_no_requests_are_refused(self):
        for msg_type in ("execute_reply", "status", "input_request", "bogus", ""):
            with self.assertRaises(BadMessage):
                self.check(msg_type, {}, "shell")

    def test_the_cursor_may_stand_at_both_ends_and_counts_characters(self):
        for cursor in (0, 2):
            self.assertEqual(self.check("complete_request", {"code": "a𝄞", "cursor_pos": cursor})["cursor_pos"], cursor)


class OnceOnly(PropertyCase):
    """The replay rule, end to end through Session."""

    def message(self, name, date, number=0, key=KEY):
        header = {"msg_id": f"{name}-{number}", "session": name, "msg_type": "execute_request",
                  "date": date if isinstance(date, str) else date.isoformat(), "version": "5.5"}
        parts = [json.dumps(header).encode(), b"{}", b"{}", b'{"code":"1"}']
        return [DELIMITER, sign(key, parts), *parts]

    @staticmethod
    def signed_header(header):
        parts = [json.dumps({"msg_type": "status", "date": NOON.isoformat(), **header}).encode(), b"{}", b"{}", b"{}"]
        return [DELIMITER, sign(KEY, parts), *parts]

    def is_accepted(self, receiver, frames):
        try:
            receiver.deserialize(frames)
        except SignatureError:
            return False
        return True

    def test_at_once(self):
        receiver = Session(KEY, replay_memory=100)
        frames = self.message("a", NOON)
        self.assertTrue(self.is_accepted(receiver, frames))
        self.assertFalse(self.is_accepted(receiver, frames))
        self.assertFalse(self.is_accepted(receiver, [b"other identity", *frames]))
        self.assertFalse(self.is_accepted(receiver, [*frames, b"another buffer"]))

    def test_after_junk_from_a_stranger(self):
        receiver = Session(KEY, replay_memory=100)
        frames = self.message("a", NOON)
        self.assertTrue(self.is_accepted(receiver, frames))
        for number in range(20_000):        # the full million is in soak/
            self.assertFalse(self.is_accepted(receiver, [DELIMITER, b"%064x" % number, *frames[2:]]))
        self.assertFalse(self.is_accepted(receiver, frames))
        self.assertTrue(self.is_accepted(receiver, self.message("a", NOON, 1)))

    def test_after_honest_traffic_rolled_the_memory_over(self):
        receiver = Session(KEY, replay_memory=50)
        kept = [self.message("a", NOON + timedelta(seconds=number), number) for number in range(300)]
        for frames in kept:
            self.assertTrue(self.is_accepted(receiver, frames))
        for frames in kept:
            self.assertFalse(self.is_accepted(receiver, frames))

    def test_a_message_that_waited_in_another_socket_is_still_accepted(self):
        # Shell and control are two sockets: what was dated first may be read second.
        receiver = Session(KEY, replay_memory=50)
        late = self.message("a", NOON, 1)
        for number in range(40):
            frames = self.message("a", NOON + timedelta(seconds=1 + number), 2 + number)
            self.assertTrue(self.is_accepted(receiver, frames))
        self.assertTrue(self.is_accepted(receiver, late))

    def test_clients_whose_clocks_are_a_day_off_are_served(self):
        receiver = Session(KEY, replay_memory=20)
        clocks = {"honest": timedelta(), "behind": -timedelta(days=1), "ahead": timedelta(days=1)}
        for number in range(200):
            for name, off in clocks.items():
                frames = self.message(name, NOON + off + timedelta(seconds=number), number)
                self.assertTrue(self.is_accepted(receiver, frames), (name, number))
                self.assertFalse(self.is_accepted(receiver, frames))

    def test_no_order_of_traffic_and_replays_is_obeyed_twice(self):
        for _ in range(20):
            size = self.dice.randrange(1, 12)
            receiver = Session(KEY, replay_memory=size)
            receiver._guard.SESSIONS = self.dice.randrange(1, 4)
            names = [f"s{number}" for number in range(self.dice.randrange(1, 6))]
            offsets = {name: timedelta(seconds=self.dice.randrange(-10**5, 10**5)) for name in names}
            accepted, refused = [], 0
            for number in range(300):
                if accepted and self.dice.random() < 0.4:
                    self.assertFalse(self.is_accepted(receiver, self.dice.choice(accepted)))
                    continue
                name = self.dice.choice(names)
                date = NOON + offsets[name] + timedelta(seconds=number)
                is_dated = self.dice.random() < 0.9
                frames = self.message(name, date if is_dated else self.dice.choice(["", "garbage"]), number)
                if self.is_accepted(receiver, frames):
                    accepted.append(frames)
                else:
                    refused += 1
                    # With a mark for every session, only undated messages may be refused.
                    if len(names) <= receiver._guard.SESSIONS:
                        self.assertNotIn(date.isoformat().encode(), frames[2])
            self.assertGreater(len(accepted), 0)

    def test_memory_is_bounded(self):
        guard = ReplayGuard(10)
        guard.SESSIONS = 5
        for number in range(1000):
            self.assertFalse(guard.has(sign(KEY, [b"%d" % number])))
            guard.accept(f"s{number}", (NOON + timedelta(seconds=number)).isoformat())
        self.assertLessEqual(len(guard._order), 10)
        self.assertLessEqual(len(guard._seen), 10)
        self.assertLessEqual(len(guard._marks), 5)

    def test_memory_is_bounded_however_long_a_peer_makes_its_names(self):
        receiver = Session(KEY, replay_memory=300)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        for number in range(1000):
            with self.assertRaises(BadMessage):     # for its session; its signature is remembered
                receiver.deserialize(self.signed_header({"msg_id": "1", "session": "%d" % number + "x" * 30_000}))
        self.assertLess(tracemalloc.get_traced_memory()[0] - before, 500_000)

    def test_who_has_a_key_shuts_nobody_out_but_himself(self):
        """By dates of the far future: in another's name, and in so many names that all others are forgotten."""
        with mock.patch.object(ReplayGuard, "SESSIONS", 5):
            receiver = Session(KEY, replay_memory=5)
            for number in range(50):
                date = NOON + timedelta(days=30_000, seconds=number)
                receiver.deserialize(self.message("victim" if number < 20 else f"x{number}", date, number),
                                     user="mallory")
        for name, user in (("victim", ""), ("victim", "alice"), ("new", ""), ("new", "alice")):
            receiver.deserialize(self.message(name, NOON, user), user=user)
            with self.assertRaises(SignatureError):
                receiver.deserialize(self.message(name, NOON, user), user=user)
        with self.assertRaises(SignatureError):
            receiver.deserialize(self.message("victim", NOON, 60), user="mallory")

    def test_a_long_header_is_not_even_parsed(self):
        header = b'{"msg_id":"1","session":"s","msg_type":"status","x":[' + b"[]," * 500_000 + b"0]}"
        parts = [header, b"{}", b"{}", b"{}"]
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        with self.assertRaises(MalformedMessage):
            Session(KEY).deserialize([DELIMITER, sign(KEY, parts), *parts])
        self.assertLess(tracemalloc.get_traced_memory()[1], 10_000_000)

    def test_who_may_not_run_code_has_others_hear_little_of_him(self):
        receiver = Session(KEY, replay_memory=10)
        for pad, may_run, is_good in ((60_000, True, True), (6000, False, False), (3000, False, True)):
            frames = self.signed_header({"msg_id": "1", "session": "s", "pad": "x" * pad})
            if is_good:
                receiver.deserialize(frames, may_run)
            else:
                with self.assertRaises(MalformedMessage):
                    receiver.deserialize(frames, may_run)

    def test_a_parent_header_is_as_long_as_a_header_at_most(self):
        header = json.dumps({"msg_id": "1", "session": "s", "msg_type": "status"}).encode()
        for size in (100, 200_000):
            parts = [header, b'{"x":"' + b"y" * size + b'"}', b"{}", b"{}"]
            frames = [DELIMITER, sign(KEY, parts), *parts]
            if size == 100:
                Session(KEY).deserialize(frames)
            else:
                with self.assertRaises(BadMessage) as caught:
                    Session(KEY).deserialize(frames)
                self.assertIn("parent_header has 200008 bytes", str(caught.exception))

    def test_a_malformed_message_is_not_remembered_as_accepted(self):
        receiver = Session(KEY, replay_memory=2)
        frames = self.message("a", NOON)
        self.assertTrue(self.is_accepted(receiver, frames))
        for _ in range(5):
            with self.assertRaises(MalformedMessage):
                receiver.deserialize([DELIMITER, sign(KEY, [b"x", b"{}", b"{}", b"{}"]), b"x", b"{}", b"{}", b"{}"])
        self.assertFalse(self.is_accepted(receiver, frames))
        self.assertTrue(self.is_accepted(receiver, self.message("a", NOON, 1)))


if __name__ == "__main__":
    unittest.main()
