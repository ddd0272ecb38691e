# Distributed under the terms of the BSD 3-Clause License.
"""Two hosts and a cable: a listening kernel on one, its users on the other, an eavesdropper between them.

All of it is real but the distance: network namespaces, the commands of the documents, our own client, the relay.
"""
import argparse
import contextlib
import os
import re
import shlex
import sys
import time
import unittest
from unittest import mock

from . import support
from .hosts import Hosts, why_not

CUT = support.rounds(3, 60)     # seconds without the cable
TIMEOUT = 30


class TwoHosts(unittest.TestCase):
    """A kernel that listens on one host; alice, who may run, and bob, who may look, on the other."""

    @classmethod
    def setUpClass(cls):
        if why_not():
            raise unittest.SkipTest(why_not())
        cls.hosts = Hosts(cls)
        cls.server, cls.guests = cls.hosts.server, cls.hosts.client
        cls.server.python("twoproc.keys", "new", "--host")
        cls.homes, cls.lines = {}, {}
        for name, right in (("alice", "run"), ("bob", "view")):
            cls.homes[name] = support.Home(cls)
            cls.lines[name] = cls.public_line(cls.guests.python("twoproc.keys", "new", "--name", name,
                                                                home=cls.homes[name]))
            cls.server.python("twoproc.keys", "authorize", cls.lines[name], "--" + right)
        cls.kernel = cls.start_kernel("--listen", cls.server.address)
        printed = cls.server.python("twoproc.keys", "show", "--host", cls.server.address)
        cls.address = re.search(r"twoproc://\S+", printed)[0]

    @staticmethod
    def public_line(text):
        return re.search(r"run [0-9a-f]{64} \S+", text)[0]

    @classmethod
    def start_kernel(cls, *arguments):
        command = " ".join([*cls.server.prefix, sys.executable, "-m twoproc.kernel -f {connection_file}"])
        kernel = support.Kernel(cls, *arguments, command=command, home=cls.server.home)
        kernel.wait_file()
        return kernel

    def reach(self, name, target=None):
        from twoproc import config, remote
        with mock.patch.dict(os.environ, self.homes[name].env):
            settings = config.load(argparse.Namespace(config=None, set=[]))
        return remote.reach(target or self.address, settings)

    def connect(self, name):
        from twoproc.client import connect
        with self.guests.inside():
            client = connect(self.reach(name), username=name)
        self.addCleanup(client.close)
        return client

    def run_cell(self, client, code, **options):
        """(reply's content, what it printed)"""
        text = []
        reply = client.execute(code, timeout=options.pop("timeout", TIMEOUT), on_output=lambda message: text.append(
            message.content.get("text", "")), **options)
        return reply.content, "".join(text)


class Users(TwoHosts):

    def test_each_may_what_was_given(self):
        alice, bob = self.connect("alice"), self.connect("bob")
        seen = []
        bob.listen(lambda message: seen.append(message.content.get("text", "")))
        reply, text = self.run_cell(alice, "print('hello', input('name? '))", on_input=lambda prompt, password: "Ada")
        self.assertEqual((reply["status"], text), ("ok", "hello Ada\n"))
        support.wait_until(lambda: "hello Ada\n" in "".join(seen), what="alice's output at bob's")
        reply, _ = self.run_cell(bob, "print('mine')")
        self.assertEqual((reply["status"], reply["ename"]), ("error", "NotAllowed"))

    def test_by_name_once_it_is_known(self):
        self.connect("alice").close()
        name = self.server.address
        with self.guests.inside():
            self.assertEqual(self.reach("alice", name).key, self.reach("alice").key)

    def test_a_cable_that_is_unplugged_for_a_while_costs_no_line(self):
        alice, bob = self.connect("alice"), self.connect("bob")
        lines = int(50 * (CUT + 2))
        code = f"import time\nfor n in range({lines}): print(n); time.sleep(0.02)"
        seen = []
        bob.listen(lambda message: seen.append(message.content.get("text", "")))
        pending, text = alice.execute_nowait(code), []
        support.wait_until(lambda: "".join(seen).count("\n") > 10, what="the first lines")
        self.hosts.unplug()
        time.sleep(CUT)         # what is tested is that time passes
        self.hosts.plug_in()
        reply = pending.wait(2 * TIMEOUT + CUT, on_output=lambda message: text.append(message.content.get("text", "")))
        expected = "".join(f"{n}\n" for n in range(lines))
        self.assertEqual((reply.content["status"], "".join(text)), ("ok", expected))
        support.wait_until(lambda: "".join(seen) == expected, TIMEOUT, "all lines at bob's")
        self.assertEqual((alice.missed, bob.missed), (0, 0))
        self.assertEqual(self.run_cell(alice, "print(1)")[1], "1\n")

    def test_a_machine_that_is_not_there_is_said_so_within_five_seconds(self):
        from twoproc.client import NotReady
        address = self.address.replace(self.server.address, "192.0.2.77")
        began = time.monotonic()
        with self.guests.inside(), self.assertRaises(NotReady) as caught:
            self.reach("alice", address)
        self.assertLess(time.monotonic() - began, support.at_most(5))
        self.assertEqual(caught.exception.reason, "blocked")


class Revoked(TwoHosts):

    def test_a_reader_is_cut_within_two_seconds_and_the_others_miss_nothing(self):
        alice, bob = self.connect("alice"), self.connect("bob")
        heard_at = [0.0]

        def hear(message):
            heard_at[0] = time.monotonic()
        bob.listen(hear)
        pending, text = alice.execute_nowait("import time\nfor n in range(500): print(n); time.sleep(0.02)"), []
        support.wait_until(lambda: heard_at[0], what="alice's output at bob's")
        self.server.python("twoproc.keys", "revoke", "bob")
        revoked_at = time.monotonic()
        reply = pending.wait(2 * TIMEOUT, on_output=lambda message: text.append(message.content.get("text", "")))
        self.assertLess(heard_at[0] - revoked_at, support.at_most(2))
        self.assertEqual((reply.content["status"], "".join(text)), ("ok", "".join(f"{n}\n" for n in range(500))))
        self.assertEqual(alice.missed, 0)
        from twoproc.client import NotReady
        with self.guests.inside(), self.assertRaises(NotReady) as caught:
            self.reach("bob")
        self.assertEqual(caught.exception.reason, "unauthorised")
        self.server.python("twoproc.keys", "authorize", self.lines["bob"], "--view")

        def is_let_in():
            with self.guests.inside(), contextlib.suppress(NotReady):
                return self.reach("bob")
        support.wait_until(is_let_in, what="bob is let in again")


class Eavesdropper(TwoHosts):
    CODE = "word = 'gnissorc-eht-ta'; print(word[::-1])  # said-in-code"
    OUTPUT = b"at-the-crossing"

    def test_on_the_cable_there_is_neither_code_nor_output_nor_a_key(self):
        with self.server.listening("eth0") as heard:
            alice = self.connect("alice")
            reply, text = self.run_cell(alice, f"{self.CODE} {alice.info.key.decode()}")
            self.assertEqual((reply["status"], text.encode()), ("ok", self.OUTPUT + b"\n"))
            alice.close()
        self.assertGreater(len(heard), 5000)
        secret = alice.info.client_secretkey
        from twoproc.connection import hex_of
        for word in (b"said-in-code", self.OUTPUT, alice.info.key, secret, hex_of(secret).encode(),
                     bytes.fromhex(hex_of(secret)), b"execute_request", b"alice"):
            self.assertNotIn(word, heard)

    def test_without_encryption_the_same_ears_hear_it_all(self):
        from twoproc.client import connect
        kernel = self.start_kernel("--transport", "tcp")
        with self.server.listening("lo") as heard, self.server.inside(), \
                connect(kernel.connection_file) as client:
            self.run_cell(client, f"{self.CODE} {client.info.key.decode()}")
        for word in (b"said-in-code", self.OUTPUT, kernel.info["key"].encode(), b"execute_request"):
            self.assertIn(word, heard)


class ThroughTheRelay(TwoHosts):
    """On the guests' host, where a stock client finds a connection file."""

    def start_relay(self, name, *arguments):
        home = self.homes[name]
        relay = self.guests.start(self, sys.executable, "-m", "twoproc.relay", self.address, "--name", name, *arguments,
                                  home=home)
        support.wait_until(lambda: relay.output().endswith("\n") or not relay.is_alive, what="the relay")
        self.assertTrue(relay.is_alive, relay.log())
        return relay, relay.output().strip()

    def stock_client(self, path):
        try:
            from jupyter_client import BlockingKernelClient
        except ImportError:
            self.skipTest("not installed: jupyter_client")
        client = BlockingKernelClient(connection_file=path)
        client.load_connection_file()
        client.start_channels()
        self.addCleanup(client.stop_channels)
        client.wait_for_ready(timeout=TIMEOUT)
        return client

    def test_a_stock_client_works_with_the_rights_of_its_user(self):
        for name, status in (("alice", "ok"), ("bob", "error")):
            with self.subTest(name):
                relay, path = self.start_relay(name)
                reply = self.stock_client(path).execute("1 + 1", reply=True, timeout=TIMEOUT)["content"]
                self.assertEqual(reply["status"], status, reply)

    def test_a_cable_that_is_unplugged_for_a_while_costs_a_stock_client_nothing(self):
        relay, path = self.start_relay("alice")
        client = self.stock_client(path)
        msg_id = client.execute("import time\nfor n in range(100): print(n); time.sleep(0.02)")
        self.hosts.unplug()
        support.wait_until(lambda: "the link is lost" in relay.log(), what="what the user is told")
        later = client.execute("1 + 1")
        if support.IS_SOAK:
            time.sleep(CUT)
        self.hosts.plug_in()
        replies, text, idle = {}, "", False
        while len(replies) < 2:
            reply = client.get_shell_msg(timeout=TIMEOUT)
            replies[reply["parent_header"]["msg_id"]] = reply["content"]["status"]
        self.assertEqual(replies, {msg_id: "ok", later: "ok"})
        while not idle:
            message = client.get_iopub_msg(timeout=TIMEOUT)
            text += message["content"].get("text", "")
            idle = message["parent_header"].get("msg_id") == later and message["content"].get(
                "execution_state") == "idle"
        self.assertEqual(text, "".join(f"{n}\n" for n in range(100)), relay.log())

    def test_when_the_key_is_revoked_it_says_so_and_ends(self):
        relay, path = self.start_relay("bob")
        self.server.python("twoproc.keys", "revoke", "bob")
        with contextlib.ExitStack() as stack:
            stack.callback(self.server.python, "twoproc.keys", "authorize", self.lines["bob"], "--view")
            self.assertEqual(relay.wait(), 6, relay.log())
        self.assertIn("does not let your key in", relay.log())
        self.assertFalse(os.path.exists(path))


class TheDocument(unittest.TestCase):
    """docs/remote.md: its commands for a local network and the relay, in their order, on two hosts."""

    def test_the_commands_do_what_they_say(self):
        if why_not():
            self.skipTest(why_not())
        hosts = Hosts(self)
        with open(os.path.join(support.ROOT, "docs", "remote.md"), encoding="utf-8") as file:
            text = file.read()
        commands = [(host, words) for part in ("In a local network", "Jupyter's own clients")
                    for host, words in re.findall(r"^    (server|laptop)\$ python -m (twoproc.*)$",
                                                  text.split(f"## {part}\n")[1].split("\n## ")[0], re.M)]
        commands.sort(key=lambda command: "revoke" in command[1])       # at the end, and not before the relay
        line, address, done = "", "", []
        for host, words in commands:
            words = words.replace("run 5d20... alice", line)
            words = re.sub(r"twoproc://\S+", address, words) if address else words
            argv = [sys.executable, "-m", *shlex.split(words)]
            machine = hosts.server if host == "server" else hosts.client
            done.append(words.split()[0])
            if done[-1] in ("twoproc.kernel", "twoproc.relay"):
                self.start(machine, argv)
                continue
            printed = machine.run(*argv)
            line = line or "".join(re.findall(r"run [0-9a-f]{64} alice", printed))
            if "keys show" in words:
                address = re.search(r"twoproc://192\.0\.2\.1\S+", printed)[0]
            if " -c " in words:
                self.assertIn("42", printed)
        self.assertEqual((done.count("twoproc.frontend"), done.count("twoproc.relay")), (3, 1))

    def start(self, machine, argv):
        process = machine.start(self, *argv)
        path = os.path.join(machine.home.run, "kernels", argv[argv.index("--name") + 1] + ".json")
        support.wait_until(lambda: os.path.exists(path) or not process.is_alive, what=path)
        self.assertTrue(process.is_alive, process.log())


if __name__ == "__main__":
    unittest.main()
