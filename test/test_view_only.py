# Distributed under the terms of the BSD 3-Clause License.
"""A terminal at a kernel on another machine: with a key that may less than all, and with a link that is cut."""
import os
import subprocess
import sys
import unittest

from . import support, vt
from .lab import Lab
from .test_remote import Wire
from twoproc import connection

try:
    import prompt_toolkit  # noqa: F401
except ImportError:
    raise unittest.SkipTest("prompt_toolkit is not installed")

CTRL_C, CTRL_D = "\x03", "\x04"


class RightsCase(unittest.TestCase):
    """alice, of this machine, has all rights; the others come by the network, each with a key of one right."""

    users = {"viewer": "view", "typist": "input", "runner": "run"}

    @classmethod
    def setUpClass(cls):
        cls.lab = Lab(cls, start=False)
        cls.homes = {}
        for name in cls.users:
            home = cls.homes[name] = support.Home(cls)
            line = subprocess.run([sys.executable, "-m", "twoproc.keys", "new", "--name", name], env=home.env,
                                  cwd=home.work, check=True, capture_output=True, text=True).stdout
            cls.lab.pairs[name] = connection.z85_of(line.split()[1]), None
        cls.lab.authorize(cls.users)
        cls.lab.start()
        for home in cls.homes.values():
            cls.know(home, "lab", cls.lab.port)

    @classmethod
    def know(cls, home, name, port):
        """A line of known_kernels, as there would be after a first time."""
        with open(os.path.join(home.path, "config", "twoproc", "known_kernels"), "a") as file:
            file.write(f"127.0.0.1:{port} {connection.hex_of(cls.lab.host_key)} {name}\n")
        os.chmod(file.name, 0o600)

    def setUp(self):
        self.alice = self.lab.kernel.client(self)

    def argv(self, *arguments, to="lab"):
        return [sys.executable, "-m", "twoproc.frontend", "--connect", to, *arguments]

    def open(self, name, to="lab"):
        """The terminal of that user, at its first prompt."""
        terminal = vt.Terminal(self, self.argv("--quiet", to=to), self.homes[name], {"USER": name}, 130, 40)
        wanted = f"In [{self.count()}]:" if name == "runner" else f"[{self.users[name]}]:"
        terminal.wait(lambda lines: lines[-1] == wanted)
        return terminal

    def ask(self, expression):
        """Its value, of which the others hear nothing."""
        reply = self.alice.execute("", silent=True, user_expressions={"asked": expression}).reply
        return eval(reply.content["user_expressions"]["asked"]["data"]["text/plain"])

    def count(self):
        return self.ask("get_ipython().execution_count")

    def is_there(self, name):
        return self.ask(f"{name!r} in globals()")


class AtTheTerminal(RightsCase):

    def test_a_viewer_sees_everybodys_inputs_and_outputs_as_they_come(self):
        terminal = self.open("viewer")
        msg_id = self.alice.send_execute("print('first'); word = input(); print(word)", allow_stdin=True)
        terminal.wait(lambda lines: "test | first" in lines and lines[-2:-1] != ["test | second"])
        self.assertTrue(any(line.endswith(": print('first'); word = input(); print(word)")
                            for line in terminal.screen.lines()))
        self.alice.answer(self.alice.take("stdin"), "second")
        self.alice.result(msg_id)
        terminal.wait(lambda lines: "test | second" in lines and lines[-1] == "[view]:")

    def test_a_name_that_a_terminal_would_obey_is_shown_without_what_it_obeys(self):
        terminal = self.open("viewer")
        header = self.alice.header("kernel_info_request", username="\x1b]0;mallory\x07\x1b[2J")
        self.alice.send_frames("control", self.alice.frames(header))
        self.alice.reply(header["msg_id"], "control")
        terminal.send(":who\r")
        terminal.wait(lambda lines: any(line.startswith("]0;mallory[2J ") for line in lines))
        self.assertNotIn("\x1b]0;mallory", terminal.raw)

    def test_a_viewers_enter_sends_nothing_and_says_by_what_it_may_not(self):
        terminal = self.open("viewer")
        before = self.count()
        terminal.send("sneaked_in = 1\r")
        said = "view only: kernel lab gives your key (viewer) the right 'view', and running code needs 'run'"
        terminal.wait(lambda lines: said in lines and lines[-1] == "[view]:")
        self.assertFalse(self.is_there("sneaked_in"))
        self.assertEqual(self.count(), before)
        self.assertNotIn("Traceback", terminal.raw)

    def test_a_viewers_tab_offers_nothing_and_harms_nothing(self):
        terminal = self.open("viewer")
        terminal.send("impo\t")
        terminal.wait("view only: no completion")
        terminal.send("rted\t = 2")
        terminal.wait("[view]: imported = 2")
        terminal.send(CTRL_C)

    def test_a_viewer_interrupts_and_ends_nothing(self):
        terminal = self.open("viewer")
        msg_id = self.alice.send_execute("import time; time.sleep(0.5); 'slept'")
        terminal.wait("time.sleep(0.5)")
        terminal.send(":interrupt\r")
        terminal.wait("and interrupting needs 'run'")
        terminal.send(":shutdown\r")
        terminal.wait("and ending the kernel needs 'admin'")
        self.assertEqual(self.alice.result(msg_id).value, "'slept'")

    def test_who_may_type_completes_and_does_not_run(self):
        terminal = self.open("typist")
        self.assertEqual(terminal.screen.lines()[-1], "[input]:")
        terminal.send("from string import asc")
        terminal.complete(lambda lines: any(line.split()[:1] == ["ascii_letters"] for line in lines))
        terminal.send("\x1b")
        terminal.wait_gone("ascii_letters")
        terminal.send(CTRL_C + "typed = 3\r")
        terminal.wait("not allowed: kernel lab gives your key (typist) the right 'input', and running code needs 'run'")
        self.assertFalse(self.is_there("typed"))

    def test_who_may_run_does_and_interrupts_but_does_not_end_the_kernel(self):
        terminal = self.open("runner")
        count = self.count()
        self.assertIn(f"Out[{count}]: 42", terminal.run("6 * 7", count))
        terminal.send("import time; print('on'); time.sleep(60)\r")
        terminal.wait(lambda lines: "on" in lines)
        terminal.send(CTRL_C)
        terminal.wait(lambda lines: any(line.startswith("KeyboardInterrupt") for line in lines)
                      and lines[-1] == f"In [{count + 2}]:")
        terminal.send(":shutdown\r")
        said = "not allowed: kernel lab gives your key (runner) the right 'run', and ending the kernel needs 'admin'"
        terminal.wait(lambda lines: said in lines and lines[-1] == f"In [{count + 2}]:")
        for leaving in (CTRL_D, "exit\r"):
            with self.subTest(leaving=leaving):
                terminal.send(leaving)
                self.assertEqual(terminal.wait_end(), 0)
                self.assertIn("left kernel lab, it lives on", "\n".join(terminal.screen.lines()))
                terminal = self.open("runner")
        self.assertTrue(self.lab.kernel.is_alive)

    def test_a_right_that_was_taken_away_is_the_kernels_answer_in_one_line(self):
        terminal = self.open("runner")
        self.lab.authorize({**self.users, "runner": "view"})
        self.addCleanup(self.lab.authorize, self.users)

        count, said = self.count(), "kernel lab: NotAllowed: execute_request needs the right 'run', this key has 'view'"
        while said not in terminal.screen.lines():      # until the kernel has read the file, which it does each second
            terminal.send(f"late = {count}\r")
            count += 1
            terminal.wait(lambda lines, prompt=f"In [{count}]:": said in lines or lines[-1] == prompt)
        terminal.wait(lambda lines: lines[-1] == "[view]:")
        self.assertNotIn("Traceback", terminal.raw)

    def test_a_right_that_was_given_meanwhile_needs_no_new_start(self):
        terminal = self.open("viewer")
        count = self.count()
        self.lab.authorize({**self.users, "viewer": "run"})
        self.addCleanup(self.lab.authorize, self.users)
        tries, done = 0, f"In [{count + 1}]:"
        while terminal.screen.lines()[-1] == "[view]:":
            terminal.send("given = 1\r")
            tries += 1
            terminal.wait(lambda lines, tries=tries: lines[-1] == done or lines[-1] == "[view]:" and tries == sum(
                line.startswith("view only: ") for line in terminal.screen.all_lines()))
        self.assertTrue(self.is_there("given"))

    def test_a_key_that_is_withdrawn_is_said_and_let_in_again_when_it_is_back(self):
        terminal = self.open("viewer")
        self.lab.authorize({"typist": "input", "runner": "run"})
        self.addCleanup(self.lab.authorize, self.users)
        terminal.wait("kernel lab does not let your key in any more")
        self.alice.execute("after = 'withdrawn'")
        self.lab.authorize(self.users)
        terminal.wait("there again")
        self.alice.execute("print('seen', 'again')")
        terminal.wait(lambda lines: "test | seen again" in lines and lines[-1] == "[view]:")


class CutOff(RightsCase):
    """The link of the one who may run is cut, and mended."""

    def setUp(self):
        super().setUp()
        info = connection.read_connection_file(self.lab.kernel.connection_file)
        self.wire = Wire(self, info._replace(transport="tcp", **{
            channel + "_port": self.lab.port + at for at, channel in enumerate(connection.CHANNELS)}), in_a_row=True)
        name = f"far-{self.wire.info.shell_port}"
        self.know(self.homes["runner"], name, self.wire.info.shell_port)
        self.terminal, self.name = self.open("runner", to=name), name
        self.number = self.count()

    def test_it_is_a_line_each_and_what_is_typed_is_neither_lost_nor_sent(self):
        terminal, prompt = self.terminal, f"In [{self.number}]: "
        terminal.send("kept = 7")
        terminal.wait(prompt + "kept = 7")
        self.wire.cut()
        lost, back = (f"the connection to kernel {self.name} is {how}" for how in ("lost; trying again", "there again"))
        terminal.wait(lambda lines: lost in lines and prompt + "kept = 7" in lines)
        terminal.wait("connection lost")        # in the toolbar
        terminal.send("0\r")
        terminal.wait(lambda lines: f"not sent: the connection to kernel {self.name} is lost" in lines
                      and (prompt + "kept = 70") in lines[-3:])
        self.wire.mend()
        terminal.wait(lambda lines: back in lines and lines[-1] == prompt + "kept = 70")
        self.assertFalse(self.is_there("kept"))
        terminal.send("\r")
        terminal.prompt(self.number + 1)
        self.assertEqual(self.ask("kept"), 70)
        self.assertEqual([terminal.raw.count(line) for line in (lost, back)], [1, 1])

    def test_a_cell_that_runs_meanwhile_shows_each_line_once(self):
        path = os.path.join(self.homes["runner"].work, "go")
        self.terminal.send("\x1b[200~import os, time\nfor i in range(1, 101):\n    print('line', i)\n"
                           f"    while i == 50 and not os.path.exists({path!r}): time.sleep(0.01)\x1b[201~\r\r")
        self.terminal.wait("line 50")
        self.wire.cut()
        self.terminal.wait("is lost; trying again")
        with open(path, "w"):
            pass
        self.wire.mend()
        self.terminal.prompt(self.number + 1)
        shown = [line for line in self.terminal.screen.all_lines() if line.startswith("line ")]
        self.assertEqual(shown, [f"line {i}" for i in range(1, 101)])

    def test_a_cell_that_is_cut_off_on_its_way_runs_once_or_is_there_to_be_sent_again(self):
        """Which of the two is a matter of a millisecond; never is it lost, and never in doubt."""
        self.wire.hold()
        begin = len(self.terminal.raw)
        self.terminal.send("late = 1\r")
        self.terminal.wait(lambda lines: "\x1b[?2004l" in self.terminal.raw[begin:])       # the prompt is done with it
        self.wire.cut()
        self.terminal.wait("is lost; trying again")
        self.wire.mend()
        again, done = f"In [{self.number}]: late = 1", f"In [{self.number + 1}]:"
        lines = self.terminal.wait(lambda lines: any(line.endswith(" is there again") for line in lines)
                                   and lines[-1] in (again, done))
        self.assertEqual(self.is_there("late"), lines[-1] == done)
        if lines[-1] == again:
            self.assertRegex("".join(lines), "it is certain that it did not run|not sent: ")


class WithoutATerminal(RightsCase):

    def run_it(self, name, *arguments, input=""):
        return subprocess.run(self.argv(*arguments), env=self.homes[name].env, cwd=self.homes[name].work, input=input,
                              capture_output=True, text=True, timeout=support.DEADLINE)

    def test_what_is_not_allowed_is_a_line_and_status_5(self):
        for arguments, code in ((("-c", "x = 1"), ""), ((), "x = 1\n"), (("-i",), "x = 1\n2\n")):
            with self.subTest(arguments=arguments):
                done = self.run_it("viewer", *arguments, input=code)
                self.assertEqual((done.returncode, done.stdout), (5, ""))
                self.assertEqual(done.stderr, "twoproc: not allowed: execute_request needs the right 'run', this key "
                                              "has 'view'\n")

    def test_what_is_allowed_runs(self):
        done = self.run_it("runner", "-c", "6 * 7")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "42\n", ""))


if __name__ == "__main__":
    unittest.main()
