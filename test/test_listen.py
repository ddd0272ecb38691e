# Distributed under the terms of the BSD 3-Clause License.
"""A kernel that listens for other machines: who gets in, who may what, and what strangers can do (nothing)."""
import contextlib
import os
import socket
import subprocess
import sys
import time
import unittest
from unittest import mock

import zmq

from . import support
from .lab import Lab
from twoproc import channels, connection


def is_refused(sock, frames=(b"twoproc_hello",)):
    """Nobody answers, however long we ask: for the time a guest needs for an answer, ten times over."""
    sock.sndtimeo = sock.rcvtimeo = 1000
    try:
        sock.send_multipart(list(frames))
        sock.recv_multipart()
    except zmq.Again:
        return True
    return False


def wait_noted(lab, reason, begin=0):
    """Until it stands in the access log, from that line on."""
    support.wait_until(lambda: any(reason in note.get("reason", "") for note in lab.access_log()[begin:]),
                       what=lambda: f"{reason} in {lab.access_log()[begin:]}")


class Refusals(unittest.TestCase):
    """`--listen` where strangers could come in: exit 5, and the commands to run; nothing is left behind."""

    def start(self, *arguments, home=None):
        kernel = support.Kernel(self, *arguments, home=home)
        status = kernel.wait()
        return kernel, status

    def check_refused(self, kernel, status, *words):
        self.assertEqual(status, 5, kernel.log())
        for word in words:
            self.assertIn(word, kernel.log())
        self.assertEqual(len(kernel.log().splitlines()), 1, kernel.log())
        self.assertFalse(os.path.exists(kernel.connection_file))

    def test_without_any_key_it_names_both_commands_to_run(self):
        for host in ("0.0.0.0", "*", "::", "localhost", "::ffff:127.0.0.1", "127.0.0.1"):
            with self.subTest(host):
                self.check_refused(*self.start("--listen", host), "keys new --host", "keys authorize")

    def test_with_a_host_key_and_nobody_authorised(self):
        lab = Lab(self, start=False)
        os.unlink(lab.authorized_keys)
        for content in (None, "", "# nobody yet\n", "run nonsense alice\n", lab.line("old", "run expires=2020-01-01")):
            with self.subTest(content):
                if content is not None:
                    with open(lab.authorized_keys, "w") as file:
                        file.write(content)
                    os.chmod(lab.authorized_keys, 0o600)
                kernel = support.Kernel(self, *lab.arguments, home=lab.home)
                self.assertEqual(kernel.wait(), 5, kernel.log())
                self.assertIn("keys authorize", kernel.log())
                self.assertNotIn("--host", kernel.log())
                if not content:         # else there is one more, about what is in that file
                    self.assertEqual(len(kernel.log().splitlines()), 1, kernel.log())
                    self.assertEqual(kernel.log().count(lab.authorized_keys), 1, kernel.log())

    def test_with_somebody_authorised_and_no_host_key(self):
        lab = Lab(self, start=False)
        lab.authorize({"alice": "run"})
        host_key = os.path.join(lab.folder, "host_key")
        os.unlink(host_key)
        kernel = support.Kernel(self, *lab.arguments, home=lab.home)
        self.check_refused(kernel, kernel.wait(), host_key, "keys new --host")
        self.assertNotIn("keys authorize", kernel.log())

    def test_keys_that_others_can_write_count_as_none(self):
        lab = Lab(self, start=False)
        lab.authorize({"alice": "run"}, mode=0o666)
        kernel = support.Kernel(self, *lab.arguments, home=lab.home)
        self.assertEqual(kernel.wait(), 5, kernel.log())
        self.assertIn("others can write it", kernel.log())

    def test_an_address_that_is_none_of_ours_or_none_at_all(self):
        lab = Lab(self, {"alice": "run"}, start=False)
        for listen, status in (("192.0.2.1", 4), ("127.0.0.1:port", 2), ("127.0.0.1:65534", 2), ("127.0.0.1:0", 2),
                               ("no.such.host.invalid", 2)):
            with self.subTest(listen):
                kernel = support.Kernel(self, "--listen", listen, home=lab.home)
                self.assertEqual(kernel.wait(), status, kernel.log())
                self.assertEqual(len(kernel.log().splitlines()), 1, kernel.log())

    def test_a_jupyter_managers_kernel_listens_nowhere_else_and_starts(self):
        manager = {"transport": "tcp", "ip": "127.0.0.1", "key": "k" * 32, "signature_scheme": "hmac-sha256",
                   **{f"{channel}_port": 0 for channel in support.CHANNELS}}
        kernel = support.start_kernel(self, connection=manager, env={"TWOPROC_NETWORK_LISTEN": "0.0.0.0"})
        self.assertEqual(kernel.client(self).execute("1+1").value, "2")
        self.assertNotIn("twoproc_listen", kernel.info)
        asked = support.Kernel(self, "--listen", "0.0.0.0", connection=manager)
        self.assertEqual(asked.wait(), 2, asked.log())

    def test_not_with_a_zeromq_that_has_known_holes(self):
        for version, has_curve in (((4, 3, 2), True), ((4, 3, 5), False)):
            with mock.patch.object(channels.zmq, "zmq_version_info", return_value=version), \
                    mock.patch.object(channels.zmq, "has", return_value=has_curve), \
                    self.assertRaises(connection.ConnectionFileError) as caught:
                channels.check_curve()
            self.assertEqual(caught.exception.exit_code, 5)


class Guests(unittest.TestCase):
    """A lab with alice, who may run, bob, who may look, and carol, who may type."""

    @classmethod
    def setUpClass(cls):
        cls.lab = Lab(cls, {"alice": "run", "bob": "view", "carol": "input", "root": "admin",
                            "far": "run from=192.0.2.0/24,2001:db8::/32", "near": "run from=127.0.0.0/8,192.0.2.1/32"})
        cls.kernel = cls.lab.kernel

    def test_each_is_told_its_name_and_rights_and_no_more(self):
        for name, rights in (("alice", "run"), ("bob", "view"), ("carol", "input"), ("root", "admin")):
            answer = self.lab.hello(name)
            self.assertEqual((answer["user"], answer["rights"]), (name, rights))
            self.assertEqual(set(answer), {"key", "signature_scheme", "kernel_name", "user", "rights", "session"})

    def test_a_right_allows_its_requests_and_refuses_the_others(self):
        code = {"code": "1", "cursor_pos": 1}
        needed = [("shell", "kernel_info_request", {}, "view"), ("control", "kernel_info_request", {}, "view"),
                  ("shell", "history_request", {"hist_access_type": "tail", "n": 1}, "view"),
                  ("control", "twoproc_log_request", {"cells": 1}, "view"),
                  ("shell", "complete_request", code, "input"), ("shell", "inspect_request", code, "input"),
                  ("shell", "is_complete_request", {"code": "1"}, "input"),
                  ("shell", "execute_request", {"code": "1"}, "run"), ("control", "interrupt_request", {}, "run")]
        order = ["view", "input", "run", "admin"]
        for name, rights in (("bob", "view"), ("carol", "input"), ("alice", "run"), ("root", "admin")):
            client = self.lab.client(name, self)
            for channel, kind, content, right in needed:
                with self.subTest(f"{rights}: {kind} on {channel}"):
                    result = client.result(client.send(channel, kind, content), channel)
                    allowed = order.index(rights) >= order.index(right)
                    self.assertEqual(result.status != "error", allowed, result)
                    if not allowed:
                        self.assertEqual(result.reply.content["ename"], "NotAllowed")

    def test_nobody_but_admin_ends_or_restarts_it(self):
        for name in ("bob", "carol", "alice"):
            client = self.lab.client(name, self)
            for channel in ("control", "shell"):
                result = client.result(client.send(channel, "shutdown_request", {"restart": False}), channel)
                self.assertEqual(result.reply.content.get("ename"), "NotAllowed")
        self.assertTrue(self.kernel.is_alive)

    def test_who_may_look_sees_code_and_output_of_others(self):
        bob, alice = self.lab.client("bob", self), self.lab.client("alice", self)
        alice.execute("print('for everybody')")
        seen = bob.take("iopub", lambda message: message.msg_type == "stream")
        self.assertEqual(seen.content["text"], "for everybody\n")

    def test_who_may_look_cannot_answer_for_who_was_asked(self):
        alice, bob = self.lab.client("alice", self), self.lab.client("bob", self)
        msg_id = alice.send_execute("input('? ')", allow_stdin=True)
        question = alice.take("stdin")
        bob.answer(question, "bob's")
        bob.result(bob.send("control", "kernel_info_request"), "control")
        alice.answer(question, "alice's")
        self.assertEqual(alice.result(msg_id).value, repr("alice's"))

    def test_who_may_look_cannot_have_another_asked_once_more(self):
        alice, bob = self.lab.client("alice", self), self.lab.client("bob", self)
        msg_id = alice.send_execute("input('? ')", allow_stdin=True)
        question = alice.take("stdin")
        bob.result(bob.send("shell", "twoproc_resume_request", {"msg_ids": [msg_id]}))
        self.assertTrue(alice.is_silent("stdin", 0.2))
        alice.answer(question, "once")
        self.assertEqual(alice.result(msg_id).value, repr("once"))

    def test_the_identity_of_another_key_gives_neither_replies_nor_questions(self):
        alice = self.lab.client("alice", self)
        thief = self.lab.client("root", self, ready=False, identity=alice.identity)
        for channel in ("shell", "stdin", "control"):
            thief.send(channel, "kernel_info_request")
        msg_id = alice.send_execute("input('? ')", allow_stdin=True)
        question = alice.take("stdin")
        alice.answer(question, "mine")
        self.assertEqual(alice.result(msg_id).value, repr("mine"))
        thief.collect()
        self.assertEqual([list(thief.inbox[channel]) for channel in ("shell", "stdin", "control")], [[], [], []])

    def test_a_key_may_be_bound_to_networks(self):
        self.assertEqual(self.lab.hello("near")["rights"], "run")
        self.assertTrue(is_refused(self.lab.socket(zmq.DEALER, "control", self.lab.pair("far"))))

    def test_strangers_are_refused_and_noted_with_fingerprint_and_address(self):
        stranger = zmq.curve_keypair()
        for channel in ("control", "shell", "stdin", "hb"):
            with self.subTest(channel):
                self.assertTrue(is_refused(self.lab.socket(zmq.DEALER, channel, stranger), (b"", b"ping")))
        reader = self.lab.socket(zmq.SUB, "iopub", stranger, rcvtimeo=1000)
        self.lab.client("alice", self).execute("print('not for strangers')")
        with self.assertRaises(zmq.Again):
            reader.recv()
        notes = [note for note in self.lab.access_log() if note["event"] == "refuse"]
        self.assertIn((connection.fingerprint(connection.hex_of(stranger[0])), "127.0.0.1"),
                      [(note.get("key"), note.get("address")) for note in notes])

    def test_the_kernels_own_key_is_a_strangers_key_from_elsewhere(self):
        own = tuple(self.kernel.info[name].encode() for name in ("curve_publickey", "curve_secretkey"))
        self.assertTrue(is_refused(self.lab.socket(zmq.DEALER, "control", own)))

    def test_a_client_in_plain_or_with_another_server_key_meets_silence_and_one_note(self):
        before = len(self.lab.access_log())
        self.assertTrue(is_refused(self.lab.socket(zmq.DEALER, "control", None)))
        wrong = zmq.curve_keypair()[0]
        self.assertTrue(is_refused(self.lab.socket(zmq.DEALER, "control", self.lab.pair("alice"), wrong)))
        wait_noted(self.lab, "no encrypted handshake", before)
        notes = self.lab.access_log()[before:]
        self.assertEqual({note["event"] for note in notes} - {"refuse", "limit", "listen"}, set(), notes)

    def test_garbage_and_half_handshakes_on_every_port_leave_it_answering(self):
        alice = self.lab.client("alice", self)
        open_ones = []
        for at in range(len(connection.CHANNELS)):
            for junk in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(4096), b"\xff" + bytes(8) + b"\x7f\x03\x00",
                         b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15) + bytes(32) + b"\x04\xc8\x05HELLO", b""):
                peer = socket.create_connection(("127.0.0.1", self.lab.port + at))
                self.addCleanup(peer.close)
                peer.sendall(junk)
                open_ones.append(peer)
        self.assertEqual(alice.execute("6*7").value, "42")
        self.assertEqual(self.lab.hello("bob")["rights"], "view")

    def test_local_clients_join_by_the_connection_file_and_may_all(self):
        client = self.kernel.client(self)
        self.assertEqual(self.kernel.info["transport"], "ipc")
        self.assertEqual(client.execute("1+1").value, "2")

    def test_the_host_key_is_shown_to_no_guest(self):
        secret = self.kernel.info["curve_secretkey"]
        for text in (self.kernel.log(), repr(self.lab.access_log()), repr(self.lab.hello("alice"))):
            self.assertNotIn(secret, text)
            self.assertNotIn(connection.hex_of(secret.encode()), text)


class Changes(unittest.TestCase):
    """authorized_keys is read anew while the kernel runs."""

    def test_a_key_that_is_added_works_at_once(self):
        lab = Lab(self, {"alice": "run"})
        self.assertTrue(is_refused(lab.socket(zmq.DEALER, "control", lab.pair("dave"))))
        lab.authorize({"alice": "run", "dave": "run"})
        dave = support.wait_until(lambda: lab.hello("dave"), what="dave's key counts")
        self.assertEqual(dave["rights"], "run")

    def test_a_right_that_is_lowered_counts_for_the_next_request(self):
        lab = Lab(self, {"alice": "run"})
        alice = lab.client("alice")
        lab.authorize({"alice": "view"})
        support.wait_until(lambda: alice.result(alice.send_execute("1")).status == "error", support.at_most(2),
                           "the right to run is gone")

    def test_a_withdrawn_key_loses_requests_and_output_within_two_seconds_and_others_lose_nothing(self):
        lab = Lab(self, {"alice": "run", "bob": "run"})
        alice, bob = lab.client("alice"), lab.client("bob")
        cell = alice.send_execute("import time, itertools\nfor n in itertools.count():\n    print(n); time.sleep(.01)")
        bob.take("iopub", lambda message: message.msg_type == "stream")
        lab.authorize({"alice": "run"})
        withdrawn_at = time.monotonic()
        heard_at = withdrawn_at
        while time.monotonic() - heard_at < 1.0:         # until a second of silence, while alice's cell prints on
            bob.collect(0.1)
            if bob.inbox["iopub"]:
                bob.inbox["iopub"].clear()
                heard_at = time.monotonic()
        self.assertLess(heard_at - withdrawn_at, support.at_most(2))
        msg_id = bob.send("control", "kernel_info_request")
        reply = bob.take("control", lambda message: message.parent_id == msg_id)
        self.assertIn("withdrawn", reply.content["evalue"])
        alice.take("iopub", lambda message: message.msg_type == "stream"
                   and message.metadata["twoproc_seq"] > 0)      # she reads again
        alice.send("control", "interrupt_request")
        self.assertEqual(alice.take("shell", lambda message: message.parent_id == cell).content["status"], "error")
        # What she missed in between is in the log, with its numbers.
        page = alice.result(alice.send("control", "twoproc_log_request", {"from_seq": 1}), "control").reply.content
        seqs = [record["seq"] for record in page["records"] if "seq" in record]
        self.assertEqual(seqs, sorted(set(seqs)))

    def test_cells_that_wait_when_their_key_is_withdrawn_do_not_run(self):
        lab = Lab(self, {"bob": "run", "carol": "view"})
        bob, alice = lab.client("bob"), lab.kernel.client(self)
        flag = os.path.join(lab.home.path, "go on")
        first = bob.send_execute(f"import os, time\nwhile not os.path.exists({flag!r}): time.sleep(0.01)")
        second = bob.send_execute("sneaked_in = 1")
        bob.wait_running(first)
        lab.authorize({"carol": "view"})
        support.wait_until(lambda: bob.request("control", "kernel_info_request").content["status"] == "error",
                           what="the key is withdrawn")
        open(flag, "w").close()
        self.assertEqual(bob.reply(second).content["status"], "aborted")
        self.assertEqual(alice.execute("'sneaked_in' in globals()").value, "False")

    def test_a_file_that_becomes_unsafe_lets_nobody_in_and_says_so_once(self):
        lab = Lab(self, {"alice": "run"})
        os.chmod(lab.authorized_keys, 0o666)
        # No answer in time may also be a machine that is busy.
        support.wait_until(lambda: is_refused(lab.socket(zmq.DEALER, "control", lab.pair("alice")))
                           and "others can write it" in lab.kernel.log(), what="refused, and said")
        self.assertEqual(lab.kernel.log().count("others can write it"), 1, lab.kernel.log())


class Floods(unittest.TestCase):
    def test_a_key_that_asks_too_often_is_told_so_and_others_are_served(self):
        lab = Lab(self, {"alice": "run", "bob": "run"}, "--set", "limits.requests_per_second=20")
        alice, bob = lab.client("alice"), lab.client("bob")
        waits = []      # the best of three: the machine may be paused once
        while not waits or min(waits) >= support.at_most(0.5) and len(waits) < 3:
            began = time.monotonic()
            sent = [alice.send("shell", "is_complete_request", {"code": "1"}) for _ in range(500)]
            started = time.monotonic()
            self.assertEqual(bob.result(bob.send("shell", "kernel_info_request")).status, "ok")
            waits.append(time.monotonic() - started)
            replies = [alice.reply(msg_id) for msg_id in sent]
            served = [reply for reply in replies if reply.content.get("ename") != "RateLimited"]
            # 40 there are at the beginning, 20 come each second.
            self.assertLess(len(served), 40 + 20 * (time.monotonic() - began) + 1)
            self.assertGreater(len(served), 0)
        self.assertLess(min(waits), support.at_most(0.5))

    def test_messages_of_unknown_types_are_limited_like_all_others(self):
        lab = Lab(self, {"alice": "run", "bob": "view"}, "--set", "limits.requests_per_second=5")
        alice, bob = lab.client("alice"), lab.client("bob")
        alice.execute("1")
        started = time.monotonic()
        for number in range(100):
            bob.send("shell", ("nonsense", "status", "execute_reply")[number % 3])
        bob.request("control", "shutdown_request")      # counted apart, and heard after those
        alice.request("control", "kernel_info_request")
        alice.collect(0.1)
        # Busy and idle of each that is not too many: 10 there are at the beginning, 5 come each second.
        self.assertLess(len([message for message in alice.inbox["iopub"] if message.msg_type == "status"]),
                        60 + 10 * (time.monotonic() - started))

    def test_pages_of_the_log_that_nobody_reads_cost_little_memory(self):
        lab = Lab(self, {"alice": "run", "bob": "view"})
        alice = lab.client("alice")
        for _ in range(10):
            alice.execute("print(('x' * 99 + '\\n') * 10_000)")
        bob = lab.client("bob", ready=False, channels=("control",), options=((zmq.RCVHWM, 1), (zmq.RCVBUF, 4096)))
        before = lab.kernel.memory()
        for _ in range(300):
            bob.send("control", "twoproc_log_request", {"from_seq": 0, "max_bytes": 1 << 30})
        bob.send("control", "interrupt_request")        # counted apart, noted, and heard after those
        support.wait_until(lambda: any(note["event"] == "rights" for note in lab.access_log()), what="the end")
        self.assertLess(lab.kernel.memory() - before, 60 << 20)

    def test_a_cell_can_be_interrupted_by_who_has_used_up_its_requests(self):
        lab = Lab(self, {"alice": "run"}, "--set", "limits.requests_per_second=5")
        alice = lab.client("alice")
        msg_id = alice.send_execute("while True: pass")
        alice.wait_running(msg_id)
        for _ in range(50):
            alice.send("shell", "kernel_info_request")
        alice.send("control", "interrupt_request")
        self.assertEqual(alice.result(msg_id).reply.content["ename"], "KeyboardInterrupt")

    def test_five_hundred_half_open_connections_leave_a_process_of_256_descriptors_its_share(self):
        lab = Lab(self, {"alice": "run"}, command="sh -c 'ulimit -Sn 256; exec \"$0\" \"$@\"' " + support.KERNEL)
        alice = lab.client("alice")
        before = lab.kernel.descriptors()
        for at in range(500):
            self.addCleanup(socket.create_connection(("127.0.0.1", lab.port + at % 5)).close)
        support.wait_until(lambda: lab.kernel.descriptors() < before + 5 * 64 + 10, support.at_most(2),
                           "cut to the limit")
        self.assertEqual(alice.execute("files = [open('/dev/null') for _ in range(200)]; len(files)").value, "200")
        alice.execute("del files")
        support.wait_until(lambda: lab.kernel.descriptors() <= before + 10, support.at_most(6), "all given back")
        self.assertEqual(lab.hello("alice")["rights"], "run")

    def test_clients_beyond_the_limit_are_cut_and_the_first_stay(self):
        lab = Lab(self, {"alice": "run"}, "--set", "network.max_connections=3")
        first = lab.client("alice")
        peers = [socket.create_connection(("127.0.0.1", lab.port)) for _ in range(20)]
        for peer in peers:
            self.addCleanup(peer.close)
        self.assertEqual(first.execute("1+1").value, "2")
        wait_noted(lab, "more than 3 connections")

    def test_long_answers_count_as_many_and_who_reads_none_has_few_of_them(self):
        # What takes longer than that is answered empty, and not long: a busy machine took more than one second.
        lab = Lab(self, {"alice": "run", "bob": "view"}, "--set", "kernel.completion_seconds=60")
        alice, bob = lab.client("alice"), lab.client("bob", ready=False, channels=("shell",))
        for _ in range(10):
            alice.execute("x = '" + "x" * 100_000 + "'")
        started = time.monotonic()
        sent = [bob.send("shell", "history_request", {"hist_access_type": "tail", "n": 1000}) for _ in range(100)]
        answers = [bob.reply(msg_id).content for msg_id in sent]
        seconds = time.monotonic() - started
        self.assertEqual((answers[0]["status"], len(answers[0]["history"])), ("ok", 10))
        # 244 requests each; 400 there are at the beginning, 200 come each second, and the last may be owed.
        given = [answer for answer in answers if answer["status"] == "ok"]
        self.assertLess(244 * (len(given) - 1), 400 + 200 * seconds)
        self.assertEqual({answer.get("ename") for answer in answers if answer not in given}, {"RateLimited"})
        reply = alice.request("shell", "history_request", {"hist_access_type": "tail", "n": 9})
        self.assertEqual(reply.content["status"], "ok")

    def test_who_subscribes_without_end_is_named_and_others_read_on(self):
        lab = Lab(self, {"alice": "run", "bob": "view"})
        alice = lab.kernel.client(self)
        bob = lab.socket(zmq.SUB, "iopub", lab.pair("bob"), sndhwm=0)
        for number in range(channels.MAX_SUBSCRIPTIONS + 10):
            bob.subscribe(b"%d" % number)
        support.wait_until(lambda: any(note["event"] == "limit" for note in lab.access_log()), what="the note")
        note = next(note for note in lab.access_log() if note["event"] == "limit")
        self.assertEqual((note["name"], note["channel"]), ("bob", "iopub"))
        self.assertEqual(alice.execute("1 + 1").value, "2")

    def test_readers_that_were_cut_when_a_key_was_withdrawn_are_not_counted_for_ever(self):
        guests = {f"guest{number}": "view" for number in range(5)}
        lab = Lab(self, guests, "--set", "network.max_connections=3")
        alice = lab.kernel.client(self)

        def wait_clients(wanted):
            support.wait_until(lambda: alice.request("control", "twoproc_status_request").content["clients"] == wanted,
                               what=f"{wanted} readers")
        for name in list(guests):
            lab.socket(zmq.SUB, "iopub", lab.pair(name))
            wait_clients(2)
            del guests[name]
            lab.authorize(guests)
            wait_clients(1)
            alice.execute("files = [*globals().get('files', ()), *(open('/dev/null') for _ in range(5))]")


class WhenNobodyKeepsTheDoor(unittest.TestCase):
    def test_a_thread_that_ended_shuts_everybody_new_out(self):
        """ZAP_ENFORCE_DOMAIN: without it ZeroMQ lets everybody in who finds nobody to ask."""
        home = support.Home(self)
        script = ("import sys\nfrom twoproc import admission, kernel\n"
                  "admission.Admission._run = lambda self: self._zap.close(0)\n"
                  "sys.exit(kernel.main(sys.argv[1:]))\n")
        kernel = support.start_kernel(self, command=f"{sys.executable} -c '{script}' -f {{connection_file}}", home=home)
        client = kernel.client(self, ready=False)
        client.send("control", "kernel_info_request")
        client.collect(1.0)
        self.assertEqual(list(client.inbox["control"]), [])
        self.assertTrue(kernel.is_alive)


    def test_a_fault_of_ours_keeps_one_out_and_the_next_in(self):
        home = support.Home(self)
        script = ("import sys\nfrom twoproc import access, kernel\nadmit, calls = access.Access.admit, []\n"
                  "def fail_first(*arguments):\n    calls.append(1)\n"
                  "    return admit(*arguments) if calls[1:] else 1 / 0\n"
                  "access.Access.admit = fail_first\nsys.exit(kernel.main(sys.argv[1:]))\n")
        kernel = support.start_kernel(self, command=f"{sys.executable} -c '{script}' -f {{connection_file}}", home=home)
        first = kernel.client(self, ready=False, channels=("control",))
        support.wait_until(lambda: "ZeroDivisionError" in kernel.log(), what="the fault is logged")
        self.assertEqual(kernel.client(self).execute("1+1").value, "2")
        first.close()


@unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "only root can become another user")
class AnotherUserOfThisMachine(unittest.TestCase):
    SUB = ("import os, sys, zmq\nos.setgid(65534); os.setuid(65534)\n"
           "s = zmq.Context().socket(zmq.SUB); s.rcvtimeo = 3000; s.subscribe(b''); s.connect(sys.argv[1])\n"
           "try: print(len(s.recv_multipart()))\nexcept zmq.Again: print('nothing')\n")

    def test_reads_nothing_by_ipc_even_if_the_folder_is_open(self):
        kernel = support.start_kernel(self)
        home = kernel.home
        for channel in support.CHANNELS:
            path = f"{kernel.info['ip']}-{kernel.info[channel + '_port']}"
            os.chmod(path, 0o777)
            while path != home.path:
                path = os.path.dirname(path)
                os.chmod(path, 0o755)
        client = support.Client(kernel.info, kernel=kernel)
        self.addCleanup(client.close)
        url = f"ipc://{kernel.info['ip']}-{kernel.info['iopub_port']}"
        stranger = subprocess.Popen([sys.executable, "-c", self.SUB, url], stdout=subprocess.PIPE, text=True)
        client.wait_ready()
        client.execute("print('secret')")
        self.assertEqual(stranger.communicate()[0].strip(), "nothing")
        with open(os.path.join(home.path, "state", "twoproc", "access.log")) as file:
            self.assertIn("another user of this machine (uid 65534)", file.read())


class ConnectionFilesWithCurveKeys(unittest.TestCase):
    """As Jupyter's managers write them: the kernel lets in exactly the pair of the file."""

    def test_another_key_is_refused(self):
        public, secret = zmq.curve_keypair()
        kernel = support.start_kernel(self, connection={
            "transport": "tcp", "ip": "127.0.0.1", "key": "k" * 32, "signature_scheme": "hmac-sha256",
            "curve_publickey": public.decode(), "curve_secretkey": secret.decode(),
            **{f"{channel}_port": 0 for channel in support.CHANNELS}})
        self.assertEqual(kernel.client(self).execute("1+1").value, "2")
        other_public, other_secret = zmq.curve_keypair()
        stranger = support.Client({**kernel.info, "client_publickey": other_public.decode(),
                                   "client_secretkey": other_secret.decode()}, kernel=kernel,
                                  options=((zmq.SNDTIMEO, 500),))
        self.addCleanup(stranger.close)
        with contextlib.suppress(zmq.Again):        # it may have been given up already
            stranger.send("control", "kernel_info_request")
        stranger.collect(1.0)
        self.assertEqual([list(inbox) for inbox in stranger.inbox.values()], [[]] * 5)


if __name__ == "__main__":
    unittest.main()
