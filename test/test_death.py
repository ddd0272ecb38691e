# Distributed under the terms of the BSD 3-Clause License.
"""What a user is told when a kernel dies, and what each answer does: keys in, screen out (vt.py)."""
import glob
import json
import os
import re
import signal
import subprocess
import sys
import time
import unittest

from . import support, vt
from .test_frontend_terminal import CTRL_C, CTRL_D, ENTER, FRONTEND, TerminalCase

QUESTION = "[r]ecover  [n]ew session  [s]how  [e]xport .ipynb  [q]uit ?"
JOINED_QUESTION = "[n]ew session  [s]how  [e]xport .ipynb  [q]uit ?"
SEGFAULT = "\x1b[200~import ctypes\ndef solve(a):\n    ctypes.string_at(a)\n\nsolve(0)\x1b[201~\r"


class DeathCase(TerminalCase):
    """Each test has a home, and so a state folder, of its own."""

    @classmethod
    def setUpClass(cls):
        pass

    def setUp(self):
        self.home = support.Home(self)
        support._cleanup(self, vt.end_kernels, self.home)

    @property
    def sessions(self):
        return os.path.join(self.home.env["XDG_STATE_HOME"], "twoproc", "sessions")

    def logs(self):
        return sorted(glob.glob(os.path.join(self.sessions, "*.log")))

    def crashlog(self, *arguments):
        done = subprocess.run([sys.executable, "-m", "twoproc.crashlog", *arguments], cwd=self.home.work,
                              env=self.home.env, capture_output=True, text=True, timeout=support.DEADLINE)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def crashed(self, *arguments, **options):
        """A terminal with two cells done and one that was its kernel's end, at the question."""
        terminal = self.open("--name", "mortal", *arguments, **options)
        terminal.run("first_value = 41", 1)
        terminal.run("print('seen', first_value + 1)", 2)
        terminal.send(SEGFAULT)
        terminal.wait("[q]uit ?")
        return terminal

    def text(self, terminal):
        return "\n".join(terminal.screen.lines())


class TheNews(DeathCase):

    def test_the_signal_the_cell_its_line_and_what_is_saved_are_named_within_a_second(self):
        terminal = self.open()
        terminal.run("first_value = 41", 1)
        begin = time.monotonic()
        terminal.send(SEGFAULT)
        terminal.wait(QUESTION)
        self.assertLess(time.monotonic() - begin, support.at_most(1))       # on an idle machine a third of that
        text = self.text(terminal)
        self.assertRegex(text, r"The kernel died in In \[2\]: SIGSEGV at line 3 of the cell, in solve  "
                               r"\(\d\d:\d\d:\d\d, pid \d+\)")
        self.assertRegex(text, r"saved: 2 inputs")
        self.assertNotIn("Traceback", terminal.raw)

    def test_kill_minus_nine_from_outside_is_said_to_be_that(self):
        terminal = self.open("--name", "mortal")
        terminal.run("x = 1", 1)
        os.kill(vt.kernel_pids(self.home)[0], signal.SIGKILL)
        begin = time.monotonic()
        terminal.wait("SIGKILL")
        self.assertLess(time.monotonic() - begin, support.at_most(1))
        terminal.wait(QUESTION)
        self.assertIn("after In [1]", self.text(terminal))
        self.assertIn("kill -9 or out of memory", self.text(terminal))

    def test_a_cell_that_ends_the_process_is_named(self):
        terminal = self.open()
        terminal.send("import os; os._exit(3)\r")
        terminal.wait(QUESTION)
        self.assertRegex(self.text(terminal), r"In \[1\].*status 3")

    def test_the_users_own_kill_is_not_said_to_come_from_outside(self):
        with open(os.path.join(self.home.work, "stub.py"), "w") as file:
            file.write("import time\ndef stubborn():\n    print('on')\n    while True:\n        try:\n"
                       "            time.sleep(20)\n        except KeyboardInterrupt:\n            print('no')\n")
        terminal = self.open()
        terminal.run("import stub", 1)
        terminal.send("stub.stubborn()\r")
        terminal.wait(lambda lines: "on" in lines)
        self.insist(terminal)
        terminal.send("k")
        terminal.wait("The kernel was ended in In [2]: SIGKILL from its launcher")
        terminal.wait(QUESTION)

    def test_the_cell_is_in_the_log_with_the_signal(self):
        terminal = self.crashed()
        terminal.send("q")
        self.assertEqual(terminal.wait_end(), 70)
        with open(self.logs()[0]) as file:
            records = [json.loads(line) for line in file]
        exits = [record for record in records if record["k"] == "exit"]
        self.assertEqual([record.get("signal") for record in exits], ["SIGSEGV"])


class TheAnswers(DeathCase):

    def test_recover_goes_on_at_the_same_place_and_runs_nothing(self):
        terminal = self.crashed()
        terminal.send("r")
        terminal.prompt(1)
        self.assertIn("In [3] was not run again; %recover replay runs In [1]-In [2] again", self.text(terminal))
        terminal.type("up")
        terminal.wait("...: solve(0)")
        terminal.send(CTRL_C)
        terminal.prompt(1)
        terminal.send("first_value\r")
        terminal.wait("NameError")
        terminal.prompt(2)
        terminal.send("%recover replay\r")
        terminal.wait("[y/N]")
        terminal.send("y\r")
        terminal.prompt(3)
        self.assertEqual(self.text(terminal).count("seen 42"), 2)       # then and now

    def test_recover_is_what_enter_means(self):
        terminal = self.crashed()
        terminal.send(ENTER)
        terminal.wait("In [3] was not run again")
        terminal.prompt(1)

    def test_a_new_session_leaves_the_log_where_it_is(self):
        terminal = self.crashed()
        terminal.send("n")
        terminal.wait("now at kernel")
        terminal.run("1+1", 1)
        self.assertEqual(len(self.logs()), 2)
        self.assertIn("died", self.crashlog("--list"))

    def test_showing_and_exporting_ask_again(self):
        terminal = self.crashed()
        terminal.send("s")
        lines = terminal.wait(lambda lines: "\n".join(lines).count("[q]uit ?") == 2)
        self.assertTrue(any("print('seen', first_value + 1)" in line for line in lines[-12:]), lines)
        terminal.send("e")
        terminal.wait(lambda lines: "\n".join(lines).count("[q]uit ?") == 3)
        path = re.search(r"exported to (\S+\.ipynb)", "".join(terminal.screen.lines()))[1]
        self.assertEqual(path, os.path.join(os.path.realpath(self.home.work), os.path.basename(path)))
        self.assertRegex(path, r"/session-\S+\.ipynb$")
        with open(path) as file:
            notebook = json.load(file)
        self.assertEqual("".join(notebook["cells"][0]["source"]), "first_value = 41")
        terminal.send("q")
        self.assertEqual(terminal.wait_end(), 70)

    def test_quitting_and_the_end_of_input_are_status_70_and_keep_the_log(self):
        for key in ("q", CTRL_D):
            with self.subTest(key=key):
                terminal = self.crashed()
                terminal.send(key)
                self.assertEqual(terminal.wait_end(), 70)
        self.assertEqual(len(self.logs()), 2)

    def test_other_keys_and_ctrl_c_answer_nothing(self):
        terminal = self.crashed()
        terminal.send("x" + CTRL_C)
        terminal.wait(lambda lines: "\n".join(lines).count(QUESTION) == 2)
        terminal.send("r")
        terminal.prompt(1)

    def test_a_crash_soon_after_a_recovery_is_said_and_not_recovered_by_enter(self):
        terminal = self.crashed()
        terminal.send("r")
        terminal.prompt(1)
        terminal.send("import os; os.abort()\r")
        lines = terminal.wait("[n]ew session  [s]how  [e]xport .ipynb  [r]ecover again  [q]uit ?")
        self.assertIn("SIGABRT", "\n".join(lines))
        self.assertTrue(any("recover" in line and " s " in line for line in lines), lines)
        terminal.send(ENTER)
        terminal.wait(lambda lines: "\n".join(lines).count("[r]ecover again") == 2)
        terminal.send("n")
        terminal.wait("now at kernel")
        terminal.run("1", 1)


class WhatIsTyped(DeathCase):

    def test_a_half_typed_line_is_kept_and_no_answer(self):
        terminal = self.open("--name", "mortal")
        terminal.run("x = 1", 1)
        terminal.send("half typed")
        terminal.wait("In [2]: half typed")
        os.kill(vt.kernel_pids(self.home)[0], signal.SIGKILL)
        terminal.wait("The kernel died")
        terminal.send(" on")
        terminal.wait(lambda lines: any(line == "In [2]: half typed on" for line in lines))
        terminal.send(ENTER)
        terminal.wait(QUESTION)
        terminal.send("r")
        terminal.wait(lambda lines: lines[-1] == "In [1]: half typed on")

    def test_what_was_typed_while_the_cell_ran_is_kept_and_no_answer(self):
        marker = os.path.join(self.home.work, "go")
        terminal = self.open("--name", "mortal")
        terminal.send("import os, time\r")
        terminal.prompt(2)
        terminal.send(f"print('on'); [time.sleep(0.01) for _ in iter(lambda: os.path.exists({marker!r}), True)]; "
                      "os.abort()\r")
        terminal.wait(lambda lines: "on" in lines)
        terminal.send("quick = 'nqr'\r")
        terminal.wait("quick = 'nqr'")      # echoed by the terminal itself
        open(marker, "w").close()
        terminal.wait(QUESTION)
        terminal.send("r")
        terminal.wait(lambda lines: lines[-1] == "In [1]: quick = 'nqr'")


class ASecondTerminal(DeathCase):

    def test_it_hears_the_same_and_goes_on_after_the_restart(self):
        alice = self.open("--name", "mortal")
        alice.run("first_value = 41", 1)
        bob = self.start("--quiet", "--existing", "mortal", user="bob")
        bob.prompt(2)
        bob.send("half typed")
        bob.wait(lambda lines: lines[-1] == "In [2]: half typed")
        alice.send(SEGFAULT)
        for terminal in (alice, bob):
            terminal.wait("The kernel died in In [2]: SIGSEGV at line 3 of the cell, in solve")
            terminal.wait("saved: 2 inputs")
        bob.send(ENTER)
        bob.wait(JOINED_QUESTION)
        bob.send("s")
        bob.wait(lambda lines: "\n".join(lines).count(JOINED_QUESTION) == 2)
        alice.wait(QUESTION)
        alice.send("r")
        alice.prompt(1)
        bob.wait("kernel mortal is back")
        bob.wait(lambda lines: lines[-1] == "In [1]: half typed")
        bob.send(CTRL_C)
        self.assertIn("Out[1]: 5", bob.run("5", 1))
        alice.wait("bob | Out[1]: 5")


    def test_it_is_told_the_signal_that_only_the_launcher_can_know(self):
        alice = self.open("--name", "mortal")
        alice.run("x = 1", 1)
        bob = self.start("--quiet", "--existing", "mortal", user="bob")
        bob.prompt(2)
        os.kill(vt.kernel_pids(self.home)[0], signal.SIGKILL)
        for terminal in (alice, bob):
            terminal.wait("after In [1]: SIGKILL: killed from outside (kill -9 or out of memory)")


class NextStart(DeathCase):

    def test_a_session_that_died_is_said_once_and_nothing_is_asked(self):
        terminal = self.crashed()
        terminal.send("q")
        terminal.wait_end()
        again = self.open()
        again.wait("did not close properly")
        again.prompt(1)
        self.assertRegex(self.text(again), r"1 session did not close properly \(\d{4}-\d\d-\d\d \d\d:\d\d, ~/work, "
                                           r"3 cells\): python\S* -m twoproc\.crashlog --list")
        again.run("1", 1)
        third = self.open()
        third.run("1", 1)
        third.run("2", 2)
        self.assertNotIn("did not close", third.raw)

    def test_one_that_was_recovered_is_not_said(self):
        terminal = self.crashed()
        terminal.send("r")
        terminal.prompt(1)
        terminal.send("exit\r")
        self.assertEqual(terminal.wait_end(), 0)
        again = self.open()
        again.run("1", 1)
        again.run("2", 2)
        self.assertNotIn("did not close", again.raw)
        self.assertIn("died", self.crashlog("--list"))

    def test_one_that_was_closed_leaves_nothing_to_say(self):
        terminal = self.open()
        terminal.run("x = 1", 1)
        terminal.send("exit\r")
        self.assertEqual(terminal.wait_end(), 0)
        self.assertEqual(self.logs(), [])


class WithoutATerminal(DeathCase):

    def run_plain(self, *arguments, text=""):
        return subprocess.run([*FRONTEND, *arguments], cwd=self.home.work, env=self.home.env, input=text,
                              capture_output=True, text=True, timeout=support.DEADLINE)

    def test_the_cause_the_line_and_where_to_look_are_on_stderr(self):
        code = "x = 1\nimport ctypes\nctypes.string_at(0)"
        for done in (self.run_plain("-c", code), self.run_plain(text=code)):
            self.assertEqual(done.returncode, 70)
            self.assertRegex(done.stderr, r"died in In \[\d\]: SIGSEGV at line \d")
            name = re.search(r"-m twoproc\.crashlog --show (\S+)", done.stderr)[1]
            self.assertIn("ctypes.string_at(0)", self.crashlog("--show", name))

    def test_a_crash_of_before_is_not_mentioned(self):
        self.run_plain("-c", "import os; os._exit(1)")
        done = self.run_plain("-c", "print(1)")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "1\n", ""))


if __name__ == "__main__":
    unittest.main()
