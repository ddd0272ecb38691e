# Distributed under the terms of the BSD 3-Clause License.
"""Kernels on other machines: how one is reached, and what becomes of requests when the link is cut.

Wire stands between client and kernel: a TCP proxy of five ports that a test cuts, holds and mends.
"""
import contextlib
import errno
import functools
import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
from unittest import mock

import zmq

from twoproc import client as client_module
from twoproc import clientchannels, link, remote, replies
from twoproc.client import Client, ConnectionLost, KernelDied, NotReady, connect
from twoproc.connection import CHANNELS, ConnectionFileError, fingerprint, hex_of, read_connection_file, z85_of
from twoproc.session import BadMessage, Message

from . import support
from .lab import Lab


class Wire:
    """Five ports that lead to those of `info`; `self.info` is the same kernel by way of them.

    cut: every connection is closed, or those of one channel only.  While it is cut, new ones are taken and left
    alone, as by a network that swallows packets; or refused.  hold: connections stay, and nothing comes through, or
    nothing of one channel.  mend ends both.
    """

    def __init__(self, case, info, in_a_row=False, **extra):
        """in_a_row: the five ports, shell first, as a kernel that listens has them."""
        self._ports = {}
        self._listeners, self._threads, self._pairs, self._parked = [], [], [], []
        self._lock = threading.Lock()
        self.held = set()           # channels of which something was held
        self._open = {channel: threading.Event() for channel in CHANNELS}
        self._release()
        self._is_cut = self._is_closed = False
        while len(self._ports) < len(CHANNELS):
            # Below those that test_files_and_ports looks for.
            first = random.randrange(30_500, 31_000, 5) if in_a_row else 0
            self._drop([self._listeners])
            self._listeners.clear()
            with contextlib.suppress(OSError):      # taken: the next five
                for at, channel in enumerate(CHANNELS):
                    self._listen(first and first + at, info.port(channel), channel)
        self.info = info._replace(ip="127.0.0.1", extra={**info.extra, "twoproc_remote": True, **extra},
                                  **{channel + "_port": port for channel, (port, _) in self._ports.items()})
        case.addCleanup(self.close)

    def _listen(self, port, target, channel):
        listener = socket.create_server(("127.0.0.1", port), reuse_port=False)
        self._ports[channel] = listener.getsockname()[1], target
        self._listeners.append(listener)
        self._start(self._accept, listener, target, channel)

    def _start(self, function, *arguments):
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()

    def _accept(self, listener, target, channel):
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                with self._lock:
                    if self._is_cut or not self._open[channel].is_set():
                        self._parked.append((near, target, channel))
                    else:
                        self._join(near, target, channel)

    def _join(self, near, target, channel):
        try:
            far = socket.create_connection(("127.0.0.1", target))
        except OSError:
            near.close()
            return
        self._pairs.append((near, far, channel))
        self._start(self._pump, near, far, channel)
        self._start(self._pump, far, near, channel)

    def _pump(self, source, sink, channel):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self._open[channel].is_set():
                    self.held.add(channel)
                self._open[channel].wait()
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _drop(self, pairs):
        for sock in (sock for pair in pairs for sock in pair if isinstance(sock, socket.socket)):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def cut(self, refuse=False, only=None):
        with self._lock:
            self._is_cut = True
            pairs = [pair for pair in self._pairs if only in (None, pair[2])]
            self._pairs = [pair for pair in self._pairs if pair not in pairs]
        self._drop(pairs)
        self._release()
        if refuse:
            listeners, self._listeners = self._listeners, []
            self._drop([listeners])

    def hold(self, *channels):
        for channel in channels or CHANNELS:
            self._open[channel].clear()

    def delay(self, channel):
        """What is held comes when the event is set that is returned, though other connections come through."""
        is_open, self._open[channel] = self._open[channel], threading.Event()
        return is_open

    def _release(self):
        for is_open in self._open.values():
            is_open.set()

    def mend(self, target=None):
        """target: the connection of another kernel, which is there now."""
        with self._lock:
            self._is_cut = False
            parked, self._parked = self._parked, []
            self._release()
            for near, port, channel in parked:
                if target is not None:
                    near.close()
                else:
                    self._join(near, port, channel)
        if not self._listeners or target is not None:
            listeners, self._listeners = self._listeners, []
            self._drop([listeners])
            for channel, (port, old) in self._ports.items():
                self._listen(port, old if target is None else target.port(channel), channel)

    def close(self):
        self._is_closed = True
        self.cut(refuse=True)
        self._drop(self._parked)


class WireCase(unittest.TestCase):
    """A kernel by tcp, a wire to it, and our client at the other end; self.near is a raw client beside the kernel."""

    def setUp(self):
        self.kernel = support.start_kernel(self, "--transport", "tcp")
        self.wire = Wire(self, read_connection_file(self.kernel.connection_file))
        self.near = self.kernel.client()
        self.states, self.state_came = [], threading.Condition()
        self.ours = Client(self.wire.info)
        self.addCleanup(self.ours.close)
        self.ours.watch(self.note)
        self.ours.wait_ready(support.DEADLINE)

    def note(self, state):
        with self.state_came:
            self.states.append(state)
            self.state_came.notify_all()

    def wait_state(self, state, count=1):
        with self.state_came:
            if not self.state_came.wait_for(lambda: self.states.count(state) >= count, support.DEADLINE):
                raise support.DeadlineError(f"no {state!r}: {self.states}")

    def cut(self, **options):
        count = self.states.count("lost")
        self.wire.cut(**options)
        self.wait_state("lost", count + 1)

    def mend(self):
        count = self.states.count("back")
        self.wire.mend()
        self.wait_state("back", count + 1)

    def wait_running(self):
        self.near.take("iopub", lambda message: message.msg_type == "execute_input")

    def path(self, name):
        return os.path.join(self.kernel.home.path, name)

    def waiting(self, name):
        """Code that waits until the test says `go(name)`."""
        return f"import os, time\nwhile not os.path.exists({self.path(name)!r}): time.sleep(0.01)\n"

    def go(self, name):
        with open(self.path(name), "w"):
            pass

    def execute(self, code, **options):
        """(text of its output, its reply)"""
        seen = []
        reply = self.ours.execute(code, on_output=seen.append, timeout=support.DEADLINE, **options)
        return "".join(m.content["text"] for m in seen if m.msg_type == "stream"), reply


class Cut(WireCase):

    def test_a_loop_goes_on_while_the_link_is_cut_and_every_line_comes_once(self):
        lines, seen_50 = [], threading.Event()

        def show(message):
            if message.msg_type == "stream":
                lines.append(message.content["text"])
                if "50\n" in "".join(lines):
                    seen_50.set()
        pending = self.ours.execute_nowait(
            f"import os, time\nfor i in range(1, 201):\n    print(i, flush=True)\n    if i == 50:\n"
            f"        while not os.path.exists({self.path('go')!r}): time.sleep(0.01)\n'end'")
        end = time.monotonic() + support.DEADLINE
        while not seen_50.is_set() and time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                pending.wait(0.05, on_output=show)
        self.cut()
        self.assertTrue(self.ours.is_lost)
        self.assertTrue(self.ours.is_alive)
        self.go("go")
        self.near.execute("1")          # after it: the loop is over, and its reply went nowhere
        self.assertFalse(pending.is_done)
        self.mend()
        reply = pending.wait(support.DEADLINE, on_output=show)
        self.assertEqual(reply.content["status"], "ok")
        self.assertEqual("".join(lines).split(), [str(i) for i in range(1, 201)])
        self.assertEqual((self.ours.missed, self.states), (0, ["lost", "back"]))
        self.assertEqual(self.execute("print(i)")[0], "200\n")

    def test_a_cell_that_runs_on_replies_to_the_connection_that_is_there_then(self):
        pending = self.ours.execute_nowait(self.waiting("go") + "print('done')")
        self.wait_running()
        self.cut()
        self.mend()
        self.cut()
        self.mend()
        self.go("go")
        seen = []
        self.assertEqual(pending.wait(support.DEADLINE, on_output=seen.append).content["status"], "ok")
        self.assertEqual("".join(m.content["text"] for m in seen if m.msg_type == "stream"), "done\n")

    def test_a_question_asked_before_the_cut_is_answered_after_it(self):
        asked = []

        def answer(prompt, password):
            asked.append(prompt)
            self.cut()
            self.mend()
            return "alice"
        text, reply = self.execute("print('hello', input('name? '))", on_input=answer)
        self.assertEqual((text, reply.content["status"], asked), ("hello alice\n", "ok", ["name? "]))

    def test_an_answer_given_while_the_link_is_cut_is_waited_for(self):
        asked = []

        def answer(prompt, password):
            asked.append(prompt)
            self.cut()
            threading.Thread(target=self.wire.mend).start()
            return "bob"
        text, _ = self.execute("print('hello', input('name? '))", on_input=answer)
        self.assertEqual((text, asked), ("hello bob\n", ["name? "]))

    def test_an_answer_that_is_lost_on_the_way_is_asked_for_again(self):
        asked, answered = [], threading.Event()
        send = self.ours._channels.send

        def answer(prompt, password):
            asked.append(prompt)
            if len(asked) == 1:
                self.wire.hold()
            return f"take {len(asked)}"

        def send_and_tell(channel, *message):
            send(channel, *message)
            if channel == "stdin":
                self.ours._channels.call(answered.set)      # behind it: it is in the wire

        def cut_and_mend():
            answered.wait(support.DEADLINE)
            self.cut()
            self.mend()
        threading.Thread(target=cut_and_mend).start()
        with mock.patch.object(self.ours._channels, "send", send_and_tell):
            text, _ = self.execute("print(input('name? '))", on_input=answer)
        self.assertEqual((text, asked), ("take 2\n", ["name? "] * 2))

    def test_a_question_asked_while_the_link_is_cut_comes_when_it_is_back(self):
        pending = self.ours.execute_nowait(self.waiting("go") + "print(input('name? '))", allow_stdin=True)
        self.wait_running()
        self.cut()
        self.go("go")
        self.near.request("control", "kernel_info_request")
        self.mend()
        seen = []
        pending.wait(support.DEADLINE, on_output=seen.append, on_input=lambda prompt, password: prompt * 2)
        self.assertEqual("".join(m.content["text"] for m in seen if m.msg_type == "stream"), "name? name? \n")

    def test_what_is_sent_while_the_link_is_cut_runs_once_and_in_order(self):
        self.execute("seen = []")
        self.cut()
        pending = [self.ours.execute_nowait(f"seen.append({i})") for i in range(5)]
        dropped = self.ours.execute_nowait("seen.append('dropped')")
        dropped.cancel()
        with self.assertRaises(TimeoutError):
            pending[0].wait(0.1)
        self.mend()
        for request in pending:
            self.assertEqual(request.wait(support.DEADLINE).content["status"], "ok")
        self.assertEqual(self.execute("print(seen)")[0], "[0, 1, 2, 3, 4]\n")

    def test_a_cell_that_was_lost_on_the_way_surely_did_not_run(self):
        self.execute("ran = False")
        self.wire.hold()
        pending = self.ours.execute_nowait("ran = True")
        question = self.ours.submit("history_request", {"hist_access_type": "tail", "n": 1})
        self.ours._channels.call(self.wire.cut)         # behind them: they are in the wire
        self.wait_state("lost")
        self.mend()
        with self.assertRaisesRegex(ConnectionLost, "certain that it did not run"):
            pending.wait(support.DEADLINE)
        with self.assertRaisesRegex(ConnectionError, "ask again"):
            question.wait(support.DEADLINE)
        self.assertEqual(self.execute("print(ran)")[0], "False\n")

    def test_a_cell_that_surely_did_not_run_does_not_run_should_it_come_later(self):
        """The system goes on to send what an old connection still had, when the network is back."""
        self.execute("ran = False")
        self.wire.hold("shell")
        pending = self.ours.execute_nowait("ran = True")
        support.wait_until(lambda: "shell" in self.wire.held)
        is_late = self.wire.delay("shell")
        self.wire.cut(only="control")
        self.wait_state("lost")
        self.mend()
        with self.assertRaisesRegex(ConnectionLost, "certain that it did not run"):
            pending.wait(support.DEADLINE)
        is_late.set()
        self.near.take("iopub", lambda message: message.parent_header.get("msg_id") == pending.msg_id
                       and message.content.get("execution_state") == "idle")
        self.assertEqual(self.execute("print(ran)")[0], "False\n")

    def test_a_link_that_is_held_for_a_moment_is_not_lost(self):
        pending = self.ours.execute_nowait("print(1)")
        self.wire.hold()
        with self.assertRaises(TimeoutError):
            self.ours.kernel_info(0.5)
        self.wire.mend()
        pending.wait(support.DEADLINE)
        self.assertEqual(self.states, [])

    def test_what_was_said_while_only_the_output_was_cut_comes_when_that_is_back(self):
        heard = []
        self.ours.listen(heard.append)
        self.wire.hold("iopub")
        self.near.execute("print('said')")
        self.wire.cut(only="iopub")
        self.wire.mend()
        support.wait_until(lambda: "said\n" in [message.content.get("text") for message in heard])
        self.assertEqual((self.ours.missed, self.states), (0, []))

    def test_a_link_that_comes_back_as_the_client_closes_is_let_go(self):
        shown, is_back, ask = [], threading.Event(), link.Link._ask

        def close_first(ours):
            self.ours._is_closed = True         # as `close` begins, on another thread
            is_back.set()
            ask(ours)
        with mock.patch("sys.excepthook", lambda *error: shown.append(error)), \
                mock.patch.object(link.Link, "_ask", close_first):
            self.cut()
            self.wire.mend()
            self.assertTrue(is_back.wait(support.DEADLINE))
            self.ours.close()
        self.assertEqual(shown, [])

    def test_a_look_for_a_machine_whose_name_nobody_knows_now_harms_nothing(self):
        self.cut()
        self.ours.info = self.ours.info._replace(ip="no-such-host.invalid")     # its name is asked for by a network
        with mock.patch.object(link, "LOOK_SECONDS", 0.01):
            self.ours._link._look_at = 0.0
            support.wait_until(lambda: self.ours._link._look_at, what="a look")
        self.mend()
        self.assertEqual(self.execute("print(1)")[0], "1\n")

    def test_a_link_that_is_silent_is_noticed(self):
        with mock.patch.dict("twoproc.clientchannels._REMOTE_OPTIONS", {75: 200, 77: 500}):     # HEARTBEAT_IVL, TIMEOUT
            ours = Client(self.wire.info)
            self.addCleanup(ours.close)
            ours.watch(self.note)
            ours.wait_ready(support.DEADLINE)
        # On a busy machine it may have been silent for so long before.
        support.wait_until(lambda: not ours.is_lost, what="a link")
        self.wire.hold()
        support.wait_until(lambda: ours.is_lost, what="the loss to be noticed")
        self.wait_state("lost")

    def test_a_reply_that_is_no_longer_kept_is_told(self):
        pending = self.ours.execute_nowait(self.waiting("go"))
        self.wait_running()
        self.cut()
        self.go("go")
        ids = [self.near.send_execute("pass", silent=True) for _ in range(201)]
        self.near.reply(ids[-1], deadline=60)
        self.mend()
        with self.assertRaisesRegex(ConnectionLost, "no longer keeps"):
            pending.wait(support.DEADLINE)

    def test_another_client_of_this_name_gets_nothing_of_it(self):
        """msg_ids stand on iopub; what they are asked by is another session's."""
        msg_id = self.ours.execute_nowait("'secret'").wait(support.DEADLINE).parent_header["msg_id"]
        result = self.near.request("shell", "twoproc_resume_request", {"msg_ids": [msg_id, 5, None]})
        self.assertEqual(result.content["unknown"], [msg_id, 5, None])
        self.assertFalse(self.near.inbox["shell"])

    def test_a_kernel_of_another_make_says_that_it_does_not_know(self):
        pending = self.ours.execute_nowait(self.waiting("go"))
        self.wait_running()
        with mock.patch.object(Client, "resumes", False):
            self.cut()
            self.mend()
        with self.assertRaisesRegex(ConnectionLost, "it may have run"):
            pending.wait(support.DEADLINE)
        self.go("go")
        self.assertEqual(self.execute("print(1)")[0], "1\n")


class Remembered(unittest.TestCase):
    """What a kernel remembers of cells, without one."""

    def setUp(self):
        self.replies = replies.Replies()

    def cell(self, number, session="s", user="", identity=b"old"):
        header = {"msg_id": f"{session}_{number}", "session": session}
        return Message(header, {}, {}, {}, [], [identity], b"{}", user)

    def note(self, *cells, reply=None):
        for cell in cells:
            self.replies.note_request(cell)
            if reply is not None:
                self.replies.note_reply(cell, reply)

    def resume(self, *numbers, **asker):
        """(unknown, forgotten, replies) of these cells."""
        asker = self.cell("asks", identity=b"new", **asker)
        unknown, forgotten, ended = self.replies.resume(
            asker, [f"{asker.header['session']}_{number}" for number in numbers])
        return ([msg_id.rpartition("_")[2] for msg_id in unknown], [msg_id.rpartition("_")[2] for msg_id in forgotten],
                [cell.reply for cell in ended])

    def test_replies_go_to_who_asks_with_the_session_and_the_key_of_the_cell(self):
        cell = self.cell(1, user="a" * 64)
        self.note(cell)
        for asker in ({"user": "b" * 64}, {"user": ""}, {"session": "t", "user": "a" * 64}):
            self.assertEqual(self.resume(1, **asker), (["1"], [], []))
            self.assertEqual(self.replies.route(cell), [b"old"])
        self.assertEqual(self.resume(1, user="a" * 64), ([], [], []))
        self.assertEqual(self.replies.route(cell), [b"new"])

    def test_another_cell_with_this_msg_id_takes_nothing_over(self):
        cell = self.cell(1, user="a" * 64)
        self.note(cell, self.cell(1, user="b" * 64, identity=b"thief"))
        self.assertEqual(self.replies.route(cell), [b"old"])

    def test_a_cell_said_to_be_unknown_comes_by_the_connection_that_was_told_so_or_not_at_all(self):
        self.assertEqual(self.resume(1, 2, "x" * 300), (["1", "2", "x" * 300], [], []))
        self.note(self.cell(1, identity=b"new"), self.cell(1, session="t"))
        with self.assertRaisesRegex(BadMessage, "did not run"):
            self.note(self.cell(2))
        self.assertEqual(self.resume(1, 2), (["2"], [], []))

    def test_large_replies_push_out_the_oldest(self):
        self.note(*map(self.cell, range(5)), reply=b"x" * (1 << 20))
        self.assertEqual(self.resume(0, 4, 5), (["5"], ["0"], [b"x" * (1 << 20)]))

    def test_of_many_cells_it_stays_certain_which_never_came(self):
        self.note(*map(self.cell, range(replies.MAX_CELLS + 10)))
        self.assertEqual(self.resume(3, replies.MAX_CELLS + 10), ([str(replies.MAX_CELLS + 10)], ["3"], []))
        self.assertEqual(self.resume(1, session="another"), (["1"], [], []))
        self.assertEqual(self.resume("x"), ([], ["x"], []))

    def test_of_many_sessions_nothing_is_certain_that_is_not_remembered(self):
        for number in range(2 * replies.MAX_CELLS + 1):
            self.note(self.cell(1, session=f"s{number}"))
        self.assertEqual(self.resume(1, session="s0"), ([], ["1"], []))


class Death(WireCase):

    def test_a_kernel_restarted_while_the_link_was_cut_is_told_as_dead_and_its_successor_as_alive(self):
        pending = self.ours.execute_nowait(self.waiting("never"))
        self.wait_running()
        self.cut()
        held = self.ours.execute_nowait("print('for the old one')")
        old = read_connection_file(self.kernel.connection_file)
        self.kernel.end()
        self.assertEqual(self.states, ["lost"])
        members = {**self.kernel.info}
        os.unlink(self.kernel.connection_file)
        successor = support.start_kernel(self, connection={
            name: value for name, value in members.items() if not name.startswith("twoproc")}, home=self.kernel.home)
        self.assertEqual(read_connection_file(successor.connection_file).key, old.key)
        self.wire.mend()
        for request in (pending, held):
            with self.assertRaisesRegex(KernelDied, "restarted while the connection was lost"):
                request.wait(support.DEADLINE)
        self.wait_state("alive")
        self.ours.wait_ready(support.DEADLINE)
        self.assertEqual(self.states, ["lost", "died", "alive"])
        self.assertEqual(self.execute("print(1)")[0], "1\n")

    def test_another_kernel_in_its_place_is_told_as_its_death(self):
        pending = self.ours.execute_nowait(self.waiting("never"))
        self.wait_running()
        self.cut()
        self.kernel.end()
        other = support.start_kernel(self, "--transport", "tcp")
        self.wire.mend(read_connection_file(other.connection_file))
        with self.assertRaisesRegex(KernelDied, "another kernel answers"):
            pending.wait(support.DEADLINE)
        self.wait_state("died")
        self.assertEqual(self.states, ["lost", "died"])

    def test_a_kernel_is_dead_where_its_machine_refuses_for_a_while(self):
        pending = self.ours.execute_nowait(self.waiting("never"))
        with mock.patch.multiple(link, GONE_SECONDS=0.3, LOOK_SECONDS=0.1):
            self.cut(refuse=True)
            with self.assertRaisesRegex(KernelDied, "nothing listens at .* any more"):
                pending.wait(support.DEADLINE)
        self.wait_state("died")
        self.assertEqual(self.states, ["lost", "died"])

    def test_a_kernel_that_is_shut_down_is_dead_at_once(self):
        # Longer than usual it may take, on a busy machine, until its goodbye has come by all connections.
        with mock.patch.object(clientchannels, "GOODBYE_SECONDS", support.DEADLINE):
            self.ours.shutdown()
            self.wait_state("died")
        self.assertRegex(self.ours.died.cause, "shut down by")
        self.assertEqual(self.states, ["died"])

    def test_its_goodbye_may_come_later_than_the_end_of_another_connection(self):
        with mock.patch.object(clientchannels, "GOODBYE_SECONDS", support.DEADLINE):
            self.wire.hold("iopub")
            self.near.send("control", "shutdown_request", {"restart": False})
            support.wait_until(lambda: self.ours._channels._cut_until, what="the end of another connection")
            self.wire.mend()
            self.wait_state("died")
        self.assertRegex(self.ours.died.cause, "shut down by")
        self.assertEqual(self.states, ["died"])

    def test_whoever_knows_can_tell_of_the_death(self):
        self.cut()
        self.ours.tell_death("its machine was switched off")
        self.wait_state("died")
        with self.assertRaisesRegex(KernelDied, "switched off"):
            self.ours.execute("1")


class Addresses(unittest.TestCase):
    KEY = "0123456789abcdef" * 4

    def test_an_address_is_a_host_a_port_and_a_key(self):
        for text, expected in {
                f"twoproc://lab:20565/{self.KEY}": ("lab", 20565),
                f"twoproc://Lab.Example.ORG/{self.KEY.upper()}": ("lab.example.org", 20555),
                f" twoproc://10.0.0.7:1/{self.KEY}/\n": ("10.0.0.7", 1),
                f"twoproc://[fd00::7]:20555/{self.KEY}": ("fd00::7", 20555),
                f"twoproc://[fe80::1%eth0]/{self.KEY}": ("fe80::1%eth0", 20555)}.items():
            with self.subTest(text=text):
                self.assertEqual(remote.parse(text), (*expected, self.KEY))

    def test_it_is_shown_as_it_was_given(self):
        for host in ("lab", "10.0.0.7", "[fd00::7]"):
            self.assertEqual(str(remote.parse(f"twoproc://{host}:20555/{self.KEY}")), f"{host}:20555")

    def test_what_is_wrong_with_an_address_is_named(self):
        for text, fault in {
                f"twoproc://lab:20555/{self.KEY[:-1]}": "63 characters",
                f"twoproc://lab:20555/{self.KEY[:-1]}g": "64 hexadecimal",
                "twoproc://lab:20555": "no key", "twoproc://lab:20555/": "no key", "twoproc://lab": "no key",
                f"twoproc:///{self.KEY}": "no host", f"twoproc://:20555/{self.KEY}": "no host",
                f"twoproc://lab:/{self.KEY}": "port missing", f"twoproc://lab:0/{self.KEY}": "port 0",
                f"twoproc://lab:65532/{self.KEY}": "port 65532", f"twoproc://lab:99999/{self.KEY}": "port 99999",
                f"twoproc://lab:http/{self.KEY}": "port http", f"twoproc://lab:20555:1/{self.KEY}": "not understood",
                f"twoproc://me@lab/{self.KEY}": "no host can be called", f"twoproc://a b/{self.KEY}": "no host can be",
                f"twoproc://a\x1b[2Jb/{self.KEY}": "no host can be|brackets",
                f"twoproc://fd00::7/{self.KEY}": "brackets", f"twoproc://[fd00::7/{self.KEY}": "brackets",
                f"twoproc://[lab]:1/{self.KEY}": "no IPv6 address", "twoproc://": "no host"}.items():
            with self.subTest(text=text), self.assertRaisesRegex(ConnectionFileError, fault) as caught:
                remote.parse(text)
            self.assertEqual(caught.exception.exit_code, 2)


def is_stopped(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


class Reaching(unittest.TestCase):
    """A kernel that listens on loopback, and a user with a key and a home elsewhere."""

    @classmethod
    def setUpClass(cls):
        cls.lab = Lab(cls, {"alice": "run", "bob": "view"})
        cls.port = cls.lab.port

    def setUp(self):
        self.folder = support.Home(self).path
        self.settings = {"auth.known_kernels": os.path.join(self.folder, "known_kernels"),
                         "auth.client_key": os.path.join(self.folder, "id_key"), "network.port_base": 20555}
        self.be("alice")

    def be(self, name):
        public, secret = map(hex_of, self.lab.pair(name))
        with open(os.open(self.settings["auth.client_key"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f"name {name}\npublic {public}\nsecret {secret}\n")

    def know(self, *lines):
        with open(os.open(self.settings["auth.known_kernels"], os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.writelines(line + "\n" for line in lines)

    @property
    def known(self):
        with contextlib.suppress(FileNotFoundError), open(self.settings["auth.known_kernels"]) as file:
            return file.read().splitlines()
        return []

    def address(self, port=None, key=None):
        return f"twoproc://127.0.0.1:{port or self.port}/{key or hex_of(self.lab.host_key)}"

    def reach(self, target=None):
        return remote.reach(target or self.address(), self.settings)

    def refusal(self, reason, exit_code, target=None):
        """What reach says; it must say it in time, and remember nothing."""
        for _ in range(3):
            before, start = self.known, time.monotonic()
            with self.assertRaises((NotReady, ConnectionFileError)) as caught:
                self.reach(target)
            self.assertLess(time.monotonic() - start, support.at_most(5))
            # What is paused for longer than a knock waits is rightly called overloaded: then once more.
            if reason == "busy" or "overloaded" not in str(caught.exception):
                break
        self.assertEqual((getattr(caught.exception, "reason", None), caught.exception.exit_code), (reason, exit_code))
        self.assertEqual(self.known, before)
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)

    # -- it works

    def test_by_its_address_and_then_by_its_name(self):
        first = self.reach()
        self.assertEqual(self.known, [f"127.0.0.1:{self.port} {hex_of(self.lab.host_key)} 127.0.0.1"])
        for target in ("127.0.0.1", f"127.0.0.1:{self.port}", self.address()):
            self.assertEqual(self.reach(target), first)
        self.assertEqual(len(self.known), 1)
        self.assertEqual((first.key.decode(), first.kernel_name), (
            self.lab.kernel.info["key"], os.path.basename(self.lab.kernel.connection_file)[len("kernel-"):-5]))
        with connect(first) as ours:
            self.assertEqual((ours.rights, ours.user, ours.address), ("run", "alice", f"127.0.0.1:{self.port}"))
            self.assertEqual(ours.execute("6 * 7", timeout=support.DEADLINE).content["status"], "ok")

    def test_a_name_is_that_of_the_line(self):
        self.know("# mine", f"127.0.0.1:{self.port} {hex_of(self.lab.host_key)} lab")
        self.assertEqual(self.reach("lab").extra["twoproc_name"], "lab")
        self.assertEqual(self.reach().extra["twoproc_name"], "lab")

    def test_a_host_by_its_name_and_by_ipv6_finds_the_address_that_listens(self):
        self.assertEqual(self.reach(self.address().replace("127.0.0.1", "localhost")).ip, "127.0.0.1")

    def test_an_address_of_a_kind_that_this_machine_does_not_speak_is_passed_over(self):
        make, places = socket.socket, socket.getaddrinfo("127.0.0.1", 20557, type=socket.SOCK_STREAM)
        other = (socket.AF_INET6, *places[0][1:4], ("::1", 20557, 0, 0))

        def speak(family=socket.AF_INET, *others, **options):
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            return make(family, *others, **options)
        with mock.patch.object(socket, "getaddrinfo", lambda host, port, **options: [
                other, (*places[0][:4], ("127.0.0.1", port))]), mock.patch.object(remote.socket, "socket", speak):
            self.assertEqual(remote._look_up(remote.Address("lab", self.port, ""), time.monotonic() + 5), "127.0.0.1")

    def test_a_kernel_that_listens_by_ipv6_alone(self):
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            self.skipTest(f"no IPv6 on this machine: {error}")
        lab = Lab(self, {"alice": "run"}, host="::1")
        lab.pairs["alice"] = self.lab.pair("alice")
        lab.authorize({"alice": "run"})
        address = f"twoproc://[::1]:{lab.port}/{hex_of(lab.host_key)}"
        info = support.wait_until(lambda: self.try_reach(address))
        self.assertEqual(self.reach(f"[::1]:{lab.port}"), info)
        with connect(info) as ours:
            self.assertEqual(ours.execute("1", timeout=support.DEADLINE).content["status"], "ok")

    def test_a_key_with_less_rights_knows_so_and_is_answered(self):
        self.be("bob")
        with connect(self.reach()) as ours:
            self.assertEqual(ours.rights, "view")
            reply = ours.execute("1", timeout=support.DEADLINE).content
            self.assertEqual((reply["status"], reply["ename"]), ("error", "NotAllowed"))
            self.assertEqual(ours.complete("o", timeout=support.DEADLINE).content["ename"], "NotAllowed")

    def test_too_many_requests_are_answered_and_not_waited_for(self):
        lab = Lab(self, {"alice": "run"}, "--set", "limits.requests_per_second=2")
        lab.pairs["alice"] = self.lab.pair("alice")
        lab.authorize({"alice": "run"})
        info = support.wait_until(functools.partial(self.try_reach, self.address(lab.port, hex_of(lab.host_key))))
        with connect(info) as ours:
            start = time.monotonic()
            pending = [ours.execute_nowait("1") for _ in range(20)]
            names = [request.wait(support.DEADLINE).content.get("ename") for request in pending]
            self.assertIn("RateLimited", names)
            self.assertLess(time.monotonic() - start, client_module.IDLE_PATIENCE)

    def try_reach(self, target):
        with contextlib.suppress(NotReady):
            return self.reach(target)

    def restore(self):
        self.lab.authorize({"alice": "run", "bob": "view"})
        support.wait_until(lambda: self.try_reach(self.address()))

    # -- it does not

    def test_a_name_that_is_not_known(self):
        self.know(f"10.0.0.7:20555 {'ab' * 32} attic")
        text = self.refusal(None, 6, "lab")
        self.assertRegex(text, "'lab' is not known; known are: attic.*twoproc.keys show")

    def test_a_name_of_several_kernels(self):
        self.know(*(f"lab:{port} {'ab' * 32} lab-{port}" for port in (20555, 20565)))
        self.assertRegex(self.refusal(None, 2, "lab"), "lab:20555, lab:20565")

    def test_a_key_that_has_changed_is_told_with_both_and_nothing_is_sent(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1] - CHANNELS.index("control")
            self.know("", f"127.0.0.1:{port} {'ab' * 32} lab")
            text = self.refusal(None, 6, self.address(port))
            listener.setblocking(False)
            self.assertRaises(BlockingIOError, listener.accept)
        self.assertIn(fingerprint("ab" * 32), text)
        self.assertIn(fingerprint(hex_of(self.lab.host_key)), text)
        self.assertIn(self.settings["auth.known_kernels"] + ", line 2", text)

    def test_a_user_without_a_key(self):
        os.unlink(self.settings["auth.client_key"])
        self.assertRegex(self.refusal(None, 5), "python -m twoproc.keys new$")

    def test_a_key_that_is_not_authorised(self):
        self.be("mallory")
        text = self.refusal("unauthorised", 5)
        self.assertIn("authorize \"run %s mallory\"" % hex_of(self.lab.pair("mallory")[0]), text)

    def test_a_kernel_with_another_key(self):
        other = hex_of(self.lab.pair("other")[0])
        self.assertRegex(self.refusal("key", 6, self.address(key=other)), "not have the key")

    def test_a_port_where_nothing_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.assertRegex(self.refusal("refused", 2, self.address(port - 3)),
                         f"nothing listens at .*port {port} .control")

    def test_a_host_that_does_not_exist(self):
        self.assertRegex(self.refusal("refused", 2, self.address().replace("127.0.0.1", "no-such-host.invalid")),
                         "no machine is called no-such-host.invalid")

    def test_a_port_that_does_not_answer(self):
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(8):              # beyond its backlog packets are dropped, as by a firewall
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            port = listener.getsockname()[1]
            self.assertRegex(self.refusal("blocked", 2, self.address(port - 3)), "firewall")

    def test_a_kernel_that_is_stopped(self):
        lab = Lab(self, {"alice": "run"})
        lab.kernel.signal(signal.SIGSTOP)
        support.wait_until(lambda: is_stopped(lab.kernel.pid))
        self.assertRegex(self.refusal("busy", 2, self.address(lab.port, hex_of(lab.host_key))), "stopped")

    def test_a_kernel_that_has_as_many_connections_as_it_takes(self):
        lab = Lab(self, {"alice": "run"}, "--set", "network.max_connections=1")
        lab.pairs["alice"] = self.lab.pair("alice")
        lab.authorize({"alice": "run"})
        address = self.address(lab.port, hex_of(lab.host_key))
        with connect(support.wait_until(lambda: self.try_reach(address))):
            for _ in range(3):
                self.assertRegex(self.refusal("busy", 2, address), "as many as it takes")

    def test_something_else_that_listens(self):
        for what, reason, text in ((b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4, "busy", "or no kernel"),
                                   (b"", "busy", "or no kernel"), (None, "refused", "not a Jupyter kernel")):
            with self.subTest(says=what), socket.create_server(("127.0.0.1", 0)) as listener:
                def answer(sock, what=what):
                    with sock, contextlib.suppress(OSError):
                        sock.sendall(b"220 mail\r\n" * 9 if what is None else what)
                        while what is None and sock.recv(64):       # what a mail server would wait for
                            pass

                def serve(listener=listener, answer=answer):
                    with contextlib.suppress(OSError):
                        while True:
                            answer(listener.accept()[0])
                threading.Thread(target=serve, daemon=True).start()
                port = listener.getsockname()[1]
                self.assertRegex(self.refusal(reason, 2, self.address(port - 3)), text)

    def test_a_kernel_without_encryption(self):
        kernel = support.start_kernel(self, "--transport", "tcp")
        text = self.refusal("encryption", 2, self.address(kernel.info["control_port"] - 3))
        self.assertIn("without encryption", text)

    def test_a_plain_client_at_a_kernel_with_encryption(self):
        start = time.monotonic()
        info = self.reach()._replace(curve_publickey=None, client_publickey=None, client_secretkey=None)
        with self.assertRaises(NotReady) as caught:
            connect(info)
        self.assertEqual(caught.exception.reason, "encryption")
        self.assertLess(time.monotonic() - start, support.at_most(5))

    def test_a_hello_that_is_not_understood(self):
        for answer in (None, b"hello", b"[]", b"{}", b'{"key": 5, "signature_scheme": "hmac-sha256"}', b"[" * 50_000,
                       *(b'{"key": "x", "signature_scheme": "%s"}' % scheme
                         for scheme in (b"none", b"sha256", b"hmac-shake_128"))):
            with self.subTest(answer=answer and answer[:20]):
                router = zmq.Context.instance().socket(zmq.ROUTER)
                self.addCleanup(router.close, 0)
                router.curve_server, (router.curve_publickey, router.curve_secretkey) = True, self.lab.pair("fake")
                port = router.bind_to_random_port("tcp://127.0.0.1")

                def serve(router=router, answer=answer):
                    with contextlib.suppress(zmq.ZMQError):
                        identity, word = router.recv_multipart()
                        if answer is not None:
                            router.send_multipart([identity, word, answer])
                threading.Thread(target=serve, daemon=True).start()
                reason, code = ("unauthorised", 5) if answer == b"{}" else ("hello", 2)
                self.refusal(reason, code, self.address(port - 3, hex_of(self.lab.pair("fake")[0])))

    def test_a_kernel_says_nothing_that_a_terminal_obeys(self):
        said = {"key": "x", "signature_scheme": "hmac-sha256", "user": "\x1b[2Jal\nice", "rights": "vi\x07ew",
                "more": 1, "kernel_name": 5}
        info = remote._understand(json.dumps(said).encode(), self.reach(), remote.parse(self.address()))
        self.assertEqual((info.extra["twoproc_user"], info.extra["twoproc_rights"], info.kernel_name),
                         ("[2Jalice", "view", "5"))
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"\x1b]0;title\x07".ljust(20, b"\0") + bytes(32)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def serve():
                with contextlib.suppress(OSError):
                    while True:
                        # Who only looks whether somebody listens may cut us off with the greeting unread.
                        with listener.accept()[0] as sock, contextlib.suppress(ConnectionError):
                            sock.sendall(greeting)
                            sock.recv(64)
            threading.Thread(target=serve, daemon=True).start()
            text = self.refusal("encryption", 2, self.address(listener.getsockname()[1] - 3))
        self.assertTrue(text.isprintable(), text)

    def test_a_key_that_is_withdrawn_while_the_link_is_cut(self):
        info = self.reach()
        wire = Wire(self, info)
        states = queue.SimpleQueue()
        with connect(wire.info) as ours:
            ours.watch(states.put)
            wire.cut()
            self.assertEqual(states.get(timeout=support.DEADLINE), "lost")
            pending = ours.execute_nowait("1")
            self.lab.authorize({"bob": "view"})
            try:
                support.wait_until(lambda: self.try_reach(self.address()) is None)
                wire.mend()
                with self.assertRaisesRegex(ConnectionLost, "does not let in your key"):
                    pending.wait(support.DEADLINE)
            finally:
                self.restore()
            self.assertEqual(states.get(timeout=support.DEADLINE), "refused")
            self.assertEqual(states.get(timeout=support.DEADLINE), "back")
            self.assertEqual(ours.execute("1", timeout=support.DEADLINE).content["status"], "ok")

    def test_a_key_that_is_withdrawn_while_nobody_asks_anything_is_told_and_comes_back_with_its_new_right(self):
        states = queue.SimpleQueue()
        with connect(self.reach()) as ours:
            ours.watch(states.put)
            try:
                self.lab.authorize({"bob": "view"})
                self.assertEqual(states.get(timeout=support.at_most(3)), "refused")
                self.lab.authorize({"alice": "input", "bob": "view"})
                self.assertEqual(states.get(timeout=support.DEADLINE), "back")
                self.assertEqual(ours.rights, "input")
                self.assertEqual(ours.is_complete("1").content["status"], "complete")
            finally:
                self.restore()


class CommandLine(unittest.TestCase):
    """`python -m twoproc.frontend --connect`."""

    @classmethod
    def setUpClass(cls):
        cls.lab = Lab(cls, {"owner": "admin"})
        cls.guest = support.Home(cls)
        made = cls.twoproc("keys", "new", "--name", "alice")
        assert made.returncode == 0, made.stderr
        cls.lab.pairs["alice"] = z85_of(made.stdout.split()[1]), b""
        cls.lab.authorize({"alice": "run"})
        cls.address = f"twoproc://127.0.0.1:{cls.lab.port}/{hex_of(cls.lab.host_key)}"

    def setUp(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.guest.path, "config", "twoproc", "known_kernels"))

    @classmethod
    def twoproc(cls, room, *words, text=""):
        return subprocess.run([sys.executable, "-m", "twoproc." + room, *words], env=cls.guest.env, cwd=cls.guest.work,
                              capture_output=True, text=True, input=text, timeout=60)

    def run_frontend(self, *words, text=""):
        done = self.twoproc("frontend", *words, text=text)
        return done.returncode, done.stdout, done.stderr

    def test_code_scripts_and_pipes_run_there_and_a_name_is_enough_the_second_time(self):
        self.assertEqual(self.run_frontend("--connect", self.address, "-c", "print(6 * 7)"), (0, "42\n", ""))
        self.assertEqual(self.run_frontend("--connect", "127.0.0.1", text="x = 5\nx * 2\n"), (0, "10\n", ""))
        path = os.path.join(self.guest.work, "script.py")
        with open(path, "w") as file:
            file.write("import sys\nprint(sys.argv[1:], x)\nsys.exit(3)\n")
        self.assertEqual(self.run_frontend("--connect", "127.0.0.1", path, "one"), (3, "['one'] 5\n", ""))
        self.assertTrue(self.lab.kernel.is_alive)

    def test_a_failure_is_one_line_and_an_exit_code_and_no_question(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        for words, code, line in (
                (["--connect", "twoproc://lab"], 2, "no key behind the port"),
                (["--connect", self.address, "--existing", "x"], 2, "give one"),
                (["--connect", f"twoproc://127.0.0.1:{port}/{'ab' * 32}"], 2, "nothing listens"),
                (["--connect", "nowhere"], 6, "not known")):
            with self.subTest(words=words):
                status, out, err = self.run_frontend(*words, "-c", "1")
                self.assertEqual((status, out, len(err.splitlines())), (code, "", 1), err)
                self.assertIn(line, err)

    def test_a_script_survives_a_cut_link_and_shows_every_line_once(self):
        info = read_connection_file(self.lab.kernel.connection_file)._replace(
            transport="tcp", ip="127.0.0.1", **{f"{channel}_port": self.lab.port + at
                                                for at, channel in enumerate(CHANNELS)})
        wire = Wire(self, info, in_a_row=True)
        go = os.path.join(self.guest.work, "go")
        path = os.path.join(self.guest.work, "long.py")
        with open(path, "w") as file:
            file.write(f"import os, time\nfor i in range(1, 201):\n    print(i)\n    if i == 50:\n"
                       f"        while not os.path.exists({go!r}): time.sleep(0.01)\n")
        process = support.Process(self, [
            sys.executable, "-m", "twoproc.frontend", "--connect",
            f"twoproc://127.0.0.1:{wire.info.shell_port}/{hex_of(self.lab.host_key)}", path], home=self.guest)
        support.wait_until(lambda: "50\n" in process.output(), what=process.log)
        wire.cut()
        support.wait_until(lambda: "lost; trying again" in process.log())
        with open(go, "w"):
            pass
        wire.mend()
        self.assertEqual(process.wait(60), 0, process.log())
        self.assertEqual(process.output().split(), [str(i) for i in range(1, 201)])
        self.assertRegex(process.log(), "is lost; trying again\n.* is there again\n")


if __name__ == "__main__":
    unittest.main()
