# Distributed under the terms of the BSD 3-Clause License.
"""The terminal, as a user sees it: keys in, screen out (vt.py).  Names are what a person at it would say."""
import json
import os
import signal
import stat
import sys
import termios
import textwrap
import time
import unittest

from . import support, vt

try:
    import prompt_toolkit  # noqa: F401
except ImportError:
    raise unittest.SkipTest("prompt_toolkit is not installed")

FRONTEND = [sys.executable, "-m", "twoproc.frontend"]
NO_LOG = ("--set", "recovery.log=no")
CTRL_C, CTRL_D, CTRL_R, ENTER, ESCAPE = "\x03", "\x04", "\x12", "\r", "\x1b"


class TerminalCase(unittest.TestCase):
    """A home and a helper module for the class; `start` opens a terminal for one test."""

    @classmethod
    def setUpClass(cls):
        cls.home = support.Home(cls)
        support._cleanup(cls, vt.end_kernels, cls.home)
        with open(os.path.join(cls.home.work, "helper.py"), "w") as file:
            file.write(textwrap.dedent(HELPER))

    def start(self, *arguments, case=None, user="alice", columns=110, rows=40, **env):
        return vt.Terminal(case or self, [*FRONTEND, *arguments], self.home, {"USER": user, **env}, columns, rows)

    def open(self, *arguments, **options):
        """A terminal at its first prompt, with the helper's names there."""
        terminal = self.start("--quiet", *arguments, **options)
        terminal.prompt(1)
        return terminal

    def files_of(self, name):
        """What lies in the runtime folders of a kernel so called."""
        return [os.path.join(folder, file) for folder, _, files in os.walk(self.home.run)
                for file in files if file.startswith(name)]

    def insist(self, terminal, is_on=lambda lines: True):
        """Ctrl-C, and again where the cell said "no" and is_on, until the terminal offers what can be done.

        The second must come within two seconds, and the "no" is shown after one: on a busy machine that is too little.
        """
        for is_last in (False, False, True):
            said = terminal.screen.lines().count("no")
            terminal.send(CTRL_C)
            terminal.wait(lambda lines, said=said: lines.count("no") > said and is_on(lines))
            terminal.send(CTRL_C)
            try:
                return terminal.wait("It does not stop. [w]ait [d]etach [r]estart [k]ill:",
                                     support.DEADLINE if is_last else 5)
            except support.DeadlineError:
                if is_last:
                    raise


HELPER = """
    import os, sys, time
    def stubborn(seconds=20):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                while time.monotonic() < end:
                    time.sleep(0.01)
            except KeyboardInterrupt:
                print("no")
    def asking():
        while True:
            try:
                input("again? ")
            except BaseException:
                print("no")
    def spin():     # not one long sleep: each turn looks for signals
        print("spinning")
        while True:
            time.sleep(0.01)
    def progress():
        for i in range(101):
            sys.stdout.write("\\r%d%%" % i)
            sys.stdout.flush()
        print()
    def wait_file(path):
        while not os.path.exists(path):
            time.sleep(0.01)
    def count_until(path):
        number = 0
        while not os.path.exists(path):
            number += 1
            print(number, flush=True)
            time.sleep(0.04)
        print("last")
    def later(seconds, text):
        import threading
        threading.Timer(seconds, print, [text]).start()
    def broken_images():
        import base64
        from IPython.display import Image, display
        png = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAA"
                               "AABJRU5ErkJggg==")
        display(Image(png), Image(png[:30]), Image(b"", format="png"))
"""


class OneTerminal(TerminalCase):
    """Tests that share a terminal and its kernel; each finds an empty prompt and leaves one."""

    terminal = None

    def setUp(self):
        if self.terminal is None:       # the first test, or the one before failed
            self.start_shared()
        self.terminal.send("\x0c")      # clear the screen
        self.terminal.wait(lambda lines: len(lines) == 1)
        self.number = self.ready()

    def start_shared(self):
        editor = os.path.join(self.home.path, "adding-editor")
        with open(editor, "w") as file:
            file.write("#!/bin/sh\nfor file; do :; done\necho 'edited = 4' >> \"$file\"\n")
        os.chmod(editor, 0o700)
        terminal = self.start("--quiet", case=type(self), EDITOR=editor, VISUAL=editor)
        terminal.prompt(1)
        terminal.send("from helper import *\r")
        terminal.prompt(2)
        type(self).terminal = terminal

    def tearDown(self):
        try:
            self.ready(3)
        except AssertionError:
            type(self).terminal = None

    def ready(self, deadline=support.DEADLINE):
        """The number of the prompt that is up, and nothing typed."""
        lines = self.terminal.wait(lambda lines: lines[-1].startswith("In [") and lines[-1].endswith("]:"), deadline)
        return int(lines[-1][4:-2])

    def run_cell(self, code, deadline=support.DEADLINE):
        """Type it, wait for the next prompt; what stands between the two.  self.number: its number."""
        self.number = self.ready()
        self.terminal.send(code + "\r")
        lines = self.terminal.prompt(self.number + 1, deadline)
        begin = max((at for at, line in enumerate(lines) if line.startswith(f"In [{self.number}]:")), default=-1)
        return [line for line in lines[begin + 1:-1] if line]


class Starting(TerminalCase):

    def test_the_prompt_is_there_at_once_and_nothing_warns(self):
        terminal = self.start()
        lines = terminal.prompt(1, support.at_most(3))
        self.assertEqual(len(lines), 4, lines)
        self.assertRegex(lines[0], r"^twoproc \S+, Python \S+; kernel \w+-\d+; :help lists the commands$")
        self.assertRegex(lines[1], r"^a second terminal joins with: python\S* -m twoproc\.frontend --existing \w+-\d+$")
        self.assertEqual(terminal.run("1+1", 1)[-3:], ["Out[1]: 2", "", "In [2]:"])
        self.assertNotIn("warning", terminal.raw.lower())

    def test_what_is_typed_before_the_kernel_is_ready_runs_once(self):
        terminal = self.start("--quiet")
        terminal.send("print('ear' + 'ly')\r")
        terminal.prompt(2)
        self.assertEqual([line for line in terminal.screen.all_lines() if line == "early"], ["early"])

    def test_ctrl_c_gives_the_input_back_while_the_kernel_does_not_come(self):
        kernel = support.start_kernel(self, home=self.home)
        os.kill(kernel.pid, signal.SIGSTOP)
        terminal = self.start("--quiet", "--existing", kernel.connection_file)
        terminal.prompt(1)
        terminal.send("6*7\r")
        # The prompt has given the keyboard back: Ctrl-C is a signal again.
        terminal.wait(lambda lines: termios.tcgetattr(terminal.fd)[3] & termios.ISIG)
        terminal.send(CTRL_C)
        terminal.wait(lambda lines: lines.count("In [1]: 6*7") == 2)
        os.kill(kernel.pid, signal.SIGCONT)
        terminal.send(ENTER)
        terminal.wait("Out[1]: 42")

    def test_a_restart_waits_for_the_kernel(self):
        terminal = self.start("--quiet")
        terminal.send(":restart\r")
        terminal.wait("[y]es [n]o:")
        terminal.send("y")
        terminal.wait(lambda lines: lines[-1] == "In [1]:" and lines[-2] == "")
        self.assertEqual(terminal.run("1", 1)[-3:], ["Out[1]: 1", "", "In [2]:"])
        self.assertNotIn("died", terminal.raw)

    def test_a_kernel_that_cannot_start_is_one_line(self):
        terminal = self.start("--kernel", "no-such")
        self.assertEqual(terminal.wait_end(), 2)
        self.assertRegex(terminal.screen.lines()[0], r"^twoproc: no kernel named 'no-such'")

    def test_a_script_can_be_followed_by_a_prompt(self):
        path = os.path.join(self.home.work, "first.py")
        with open(path, "w") as file:
            file.write("import sys\nx = sys.argv[1]\nprint('ran', __file__.rpartition('/')[2])\n")
        terminal = self.start("--quiet", "-i", path, "word")
        terminal.wait("ran first.py")
        terminal.prompt(2)
        self.assertIn("Out[2]: 'word'", terminal.run("x", 2))


class Typing(OneTerminal):

    def test_a_block_is_continued_indented_and_ended_by_an_empty_line(self):
        terminal = self.terminal
        terminal.send("def f(x):\r")
        # The cursor comes to its place a moment after the line is drawn.
        lines = terminal.wait(lambda lines: any("   ...:" in line for line in lines)
                              and terminal.screen.x == len(f"In [{self.number}]: ") + 4)
        terminal.send("return x + 1\r")
        terminal.send("\r")
        terminal.prompt(self.number + 1)
        self.assertEqual(self.run_cell("f(41)"), [f"Out[{self.number}]: 42"])
        self.assertIn("...:", lines[-1])

    def test_an_open_bracket_or_string_is_continued(self):
        for begin, end in (("[1,", "2]"), ("'''a", "b'''")):
            with self.subTest(begin=begin):
                self.terminal.send(begin + "\r")
                self.terminal.wait(lambda lines: lines[-1].strip() == "...:")
                self.terminal.send(end + "\r")
                self.terminal.prompt(self.number + 1)
                self.number += 1

    def test_a_paste_is_one_cell(self):
        text = "class A:\n    # a comment\n\n    x = 1\n\n    def f(self):\n        return 2\n\nA().f()"
        self.terminal.send(f"\x1b[200~{text}\x1b[201~")
        self.terminal.wait("A().f()")
        self.terminal.send("\r")
        self.assertIn(f"Out[{self.number}]: 2", self.terminal.prompt(self.number + 1))

    def test_tab_offers_names_with_their_types(self):
        self.run_cell("import os")
        self.terminal.send("os.pa")
        lines = self.terminal.complete(lambda lines: all(
            any(line.split()[:1] == [name] for line in lines) for name in ("path", "pathconf", "pathsep", "pardir")))
        self.assertTrue(any(line.split() == ["path", "module"] for line in lines), lines)
        self.terminal.send(ESCAPE)
        self.terminal.wait_gone("pathconf")
        self.terminal.send(CTRL_C)

    def test_tab_in_the_indentation_indents(self):
        self.terminal.send("if 1:\r\tprint('deep')")
        self.terminal.wait("        print('deep')")
        self.terminal.send(CTRL_C)

    def test_ctrl_c_throws_the_line_away_and_never_leaves(self):
        for _ in range(20):
            self.terminal.send("x = ")
            self.terminal.wait(lambda lines: lines[-1].endswith("x ="))
            self.terminal.send(CTRL_C)
            self.ready()
        self.terminal.send(CTRL_C * 20)
        self.assertEqual(self.run_cell("'still here'"), [f"Out[{self.number}]: 'still here'"])

    def test_earlier_input_comes_back(self):
        self.run_cell("alpha_one = 1")
        self.run_cell("beta_two = 2")
        self.terminal.send("al")
        self.terminal.wait(lambda lines: lines[-1].endswith("]: alpha_one = 1"))     # the grey suggestion
        self.terminal.type("right", ENTER)
        self.terminal.prompt(self.number + 2)
        self.terminal.type("up")
        self.terminal.wait(lambda lines: lines[-1].endswith("]: alpha_one = 1"))
        self.terminal.send(CTRL_C)
        self.ready()
        self.terminal.send(CTRL_R + "bet")
        self.terminal.wait(lambda lines:
                           lines[-1] == "I-search backward: bet" and f"In [{self.number + 2}]: beta_two = 2" in lines)
        self.terminal.send(ENTER)
        self.terminal.send(CTRL_C)

    def test_wide_characters_keep_their_places_and_a_resize_keeps_the_text(self):
        self.assertEqual(self.run_cell('"日本語🎉" * 2'), [f"Out[{self.number}]: '日本語🎉日本語🎉'"])
        self.terminal.send("x = 'half a line of text'")
        self.terminal.wait("half a line of text'")
        self.terminal.resize(60, 40)
        self.terminal.send(" + ''")
        self.terminal.wait("x = 'half a line of text' + ''")
        self.terminal.resize(110, 40)
        self.terminal.send(CTRL_C)

    def test_unknown_commands_name_the_known_ones(self):
        self.terminal.send(":nonsense\r")
        self.terminal.wait(":nonsense: no such command; there are :help, :interrupt,")
        self.terminal.send(":help\r")
        self.terminal.wait(":connect NAME")


class Editing(TerminalCase):

    def test_vi_shows_its_mode(self):
        terminal = self.start("--quiet", "--set", "frontend.editing=vi")
        terminal.wait("[ins] In [1]:")
        terminal.send("1+1" + ESCAPE)
        terminal.wait("[nav] In [1]: 1+1")
        terminal.send(ENTER)
        terminal.wait("Out[1]: 2")

    def test_the_editor_gets_the_input(self):
        editor = os.path.join(self.home.path, "editor")
        with open(editor, "w") as file:
            file.write("#!/bin/sh\nprintf '6*' > \"$1.new\"; cat \"$1\" >> \"$1.new\"; mv \"$1.new\" \"$1\"\n")
        os.chmod(editor, 0o700)
        terminal = self.open(EDITOR=editor, VISUAL=editor)
        terminal.send("7")
        terminal.wait("In [1]: 7")
        terminal.send("\x18\x05")
        terminal.wait("In [1]: 6*7")
        terminal.send(ENTER)
        terminal.wait("Out[1]: 42")

    def test_no_color_is_honoured(self):
        terminal = self.open(NO_COLOR="1")
        terminal.send("1/0\r")
        terminal.wait("ZeroDivisionError: division by zero")
        self.assertNotRegex(terminal.raw, "\x1b\\[[0-9;]*3[0-9][;m]")

    def test_history_lasts_in_a_file_of_the_users_own(self):
        first = self.open()
        first.run("kept_value = 12", 1)
        first.send("import getpass; p = getpass.getpass()\r")
        first.wait("Password:")
        first.send("secret-word\r")
        first.prompt(3)
        first.send("exit\r")
        self.assertEqual(first.wait_end(), 0)
        self.assertNotIn("secret-word", first.raw)
        path = os.path.join(self.home.env["XDG_STATE_HOME"], "twoproc", "history")
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        with open(path) as file:
            text = file.read()
        self.assertIn("kept_value = 12", text)
        self.assertNotIn("secret-word", text)
        second = self.open()
        second.send("kept")
        second.wait("kept_value = 12")
        second.type("up")
        second.wait(lambda lines: lines[-1] == "In [1]: kept_value = 12")


class Running(OneTerminal):

    def test_ctrl_c_interrupts_and_variables_stay(self):
        self.run_cell("kept = 7")
        number = self.ready()
        self.terminal.send("spin()\r")
        self.terminal.wait("spinning")
        self.terminal.send(CTRL_C)
        lines = self.terminal.prompt(number + 1, support.at_most(2))
        self.assertEqual(sum(line.startswith("KeyboardInterrupt  ") for line in lines), 1)
        self.assertEqual(self.run_cell("kept"), [f"Out[{self.number}]: 7"])

    def test_input_and_getpass(self):
        self.terminal.send("name = input('name? ')\r")
        self.terminal.wait(lambda lines: lines[-1] == "name?")
        self.terminal.send("bob\r")
        self.terminal.prompt(self.number + 1)
        self.terminal.send("import getpass; word = getpass.getpass()\r")
        self.terminal.wait(lambda lines: lines[-1] == "Password:")
        begin = len(self.terminal.raw)
        self.terminal.send("se-cret\r")
        self.terminal.prompt(self.number + 2)
        self.assertNotIn("se-cret", self.terminal.raw[begin:])
        self.assertEqual(self.run_cell("name, word"), [f"Out[{self.number}]: ('bob', 'se-cret')"])

    def test_a_question_follows_the_text_in_front_of_it(self):
        self.terminal.send("print('so', end=' '); x = input('what? ')\r")
        self.terminal.wait(lambda lines: lines[-1] == "so what?")
        self.terminal.send("that\r")
        self.assertIn("so what? that", self.terminal.prompt(self.number + 1))

    def test_tabs_and_returns_in_a_question_do_what_they_do_in_a_line(self):
        self.terminal.send(r"print('x\ty', end=''); x = input('\tz\nold\rwhat? ')" + "\r")
        self.terminal.wait(lambda lines: lines[-2:] == ["x       y       z", "what?"])
        self.terminal.send(ENTER)
        self.terminal.prompt(self.number + 1)

    def test_a_pasted_line_is_one_answer(self):
        self.terminal.send("x = [input(f'{i}? ') for i in range(3)]\r")
        self.terminal.wait(lambda lines: lines[-1] == "0?")
        self.terminal.send("\x1b[200~one\ntwo\nthree\x1b[201~")
        self.terminal.wait(lambda lines: lines[-1] == "2? three")
        self.terminal.send(ENTER)
        self.terminal.prompt(self.number + 1)
        self.assertEqual(self.run_cell("x"), [f"Out[{self.number}]: ['one', 'two', 'three']"])

    def test_a_question_is_ended_by_ctrl_d_and_ctrl_c(self):
        for key, name in ((CTRL_D, "EOFError"), (CTRL_C, "KeyboardInterrupt")):
            self.terminal.send("x = input('n? ')\r")
            self.terminal.wait(lambda lines: lines[-1] == "n?")
            self.terminal.send(key)
            self.number += 1
            lines = self.terminal.prompt(self.number)
            self.assertTrue(any(line.startswith(name) for line in lines), lines)

    def test_the_debugger_works_after_an_error_and_at_a_breakpoint(self):
        self.run_cell("1/0")
        self.terminal.send("%debug\r")
        self.terminal.wait(lambda lines: lines[-1] == "ipdb>")
        self.terminal.send("p 40+2\r")
        self.terminal.wait(lambda lines: "42" in lines and lines[-1] == "ipdb>")
        self.terminal.send("q\r")
        self.number = self.ready_after("ipdb> q")
        self.terminal.send("breakpoint()\r")
        self.terminal.wait(lambda lines: lines[-1].lower().endswith("db>") or lines[-1] == "(Pdb)")
        self.terminal.send("p 50+5\r")
        self.terminal.wait(lambda lines: "55" in lines)
        self.terminal.send("c\r")
        self.ready_after(" c")

    def ready_after(self, text):
        self.terminal.wait(lambda lines: any(line.endswith(text) for line in lines) and lines[-1].endswith("]:"))
        return self.ready()

    def test_code_can_write_the_next_input(self):
        self.terminal.send("get_ipython().set_next_input('next_one = 1')\r")
        self.terminal.wait(f"In [{self.number + 1}]: next_one = 1")
        self.terminal.send(CTRL_C)

    def test_a_file_can_be_loaded_and_one_edited(self):
        with open(os.path.join(self.home.work, "loaded.py"), "w") as file:
            file.write("loaded = 3\n")
        self.terminal.send("%load loaded.py\r")
        self.terminal.wait("   ...: loaded = 3")
        self.terminal.send(CTRL_C)
        self.ready()
        self.terminal.send("%edit loaded.py\r")        # the editor of these tests adds a line
        self.terminal.wait("   ...: edited = 4")
        self.terminal.send(CTRL_C)

    def test_ctrl_d_is_no_way_out_of_a_running_cell(self):
        self.terminal.send("spin()\r")
        self.terminal.wait("spinning")
        self.terminal.send(CTRL_D)
        self.terminal.send(CTRL_C)
        self.terminal.prompt(self.number + 1)

    def test_a_progress_bar_is_one_line(self):
        self.assertEqual(self.run_cell("progress()"), ["100%"])

    def test_a_display_is_updated_in_place_or_marked(self):
        self.assertEqual(self.run_cell("h = display(11, display_id=True); h.update(22)"), ["22"])
        self.assertEqual(self.run_cell("h = display(11, display_id=True); print('x'); h.update(22)"),
                         ["11", "x", "22 (updated)"])

    def test_clear_output_leaves_the_last_step(self):
        self.run_cell("from IPython.display import clear_output")
        number = self.ready()
        code = "for i in range(4): clear_output(wait=True); print('step', i); print('more')"
        self.terminal.send(code + "\r")
        lines = self.terminal.prompt(number + 1)
        self.assertEqual([line for line in lines if line.startswith(("step", "more"))], ["step 3", "more"])

    def test_many_lines_all_come(self):
        self.terminal.send("for i in range(30000): print(i)\r")
        lines = self.terminal.prompt(self.number + 1, support.at_most(6))
        self.assertEqual(lines[-3:], ["29999", "", f"In [{self.number + 1}]:"])
        shown = [line for line in self.terminal.screen.all_lines() if line.isdigit()]
        self.assertEqual(shown[-30000:], [str(i) for i in range(30000)])

    def test_ctrl_c_stops_a_flood_at_once(self):
        self.terminal.send("for i in range(10**7): print(i)\r")
        self.terminal.wait(lambda lines: lines[-1].isdigit() and int(lines[-1]) > 1000)
        self.terminal.send(CTRL_C)
        self.terminal.prompt(self.number + 1, support.at_most(3))
        self.terminal.send("print('after' * 2)\r")
        lines = self.terminal.prompt(self.number + 2)
        self.assertEqual(lines[-3:], ["afterafter", "", f"In [{self.number + 2}]:"])

    def test_one_enormous_line_is_cut(self):
        lines = self.run_cell("print('x' * 50_000_000)", 60)
        self.assertEqual(lines[-1], "(output cut at 1 MB; 48,951,424 characters not shown)")
        with open(f"/proc/{self.terminal.pid}/status") as file:
            memory = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
        self.assertLess(memory, 300_000)

    def test_output_of_the_system_comes_once(self):
        self.assertEqual(self.run_cell("import os; _ = os.system('echo once')"), ["once"])
        self.assertEqual(self.run_cell("!echo twice"), ["twice"])

    def test_broken_images_are_a_line_each(self):
        lines = self.run_cell("broken_images()")
        self.assertRegex(lines[0], r"^\(image/png, 1x1, 70 bytes: .*/1\.png\)$")
        self.assertEqual(lines[1:], ["(broken image/png)", "(broken image/png)"])

    def test_output_cannot_talk_to_the_terminal(self):
        lines = self.run_cell(r"print('\x1b]52;c;eA==\x07\x1b]0;TITLE\x07\x1b[6nok \x1b[31mred\x1b[0m')")
        self.assertEqual(lines, ["ok red"])
        self.assertEqual((self.terminal.screen.title, self.terminal.screen.unknown), ("", []))
        self.assertIn("\x1b[31mred", self.terminal.raw)

    def test_a_thread_prints_above_the_half_typed_line(self):
        self.run_cell("later(0.3, 'LATE')")
        self.terminal.send("half ty")
        lines = self.terminal.wait(lambda lines: "LATE" in lines and lines[-1].endswith("]: half ty"))
        self.assertLess(lines.index("LATE"), len(lines) - 1)
        self.terminal.send(CTRL_C)

    def test_system_exit_is_survived(self):
        self.run_cell("raise SystemExit(4)")
        self.assertEqual(self.run_cell("1"), [f"Out[{self.number}]: 1"])

    def test_long_help_goes_through_the_pager(self):
        self.terminal.send("import argparse\r")
        self.terminal.prompt(self.number + 1)
        self.terminal.send("argparse??\r")
        self.terminal.wait(lambda lines: lines[-1].startswith((":", "(END)", "--More--")))
        self.terminal.send("q")
        self.terminal.prompt(self.number + 2)


class Insisting(TerminalCase):

    def test_a_second_ctrl_c_offers_what_can_be_done(self):
        terminal = self.open()
        terminal.run("from helper import *", 1)
        terminal.send("print('on'); stubborn()\r")
        terminal.wait(lambda lines: "on" in lines)
        self.insist(terminal)
        terminal.send("d")
        self.assertEqual(terminal.wait_end(), 0)
        self.assertIn("it lives on; join it again with: ", "\n".join(terminal.screen.lines()))

    def test_a_cell_that_asks_again_and_again_does_not_hold_its_user(self):
        terminal = self.open()
        terminal.run("from helper import *", 1)
        terminal.send("asking()\r")
        terminal.wait(lambda lines: lines[-1] == "again?")
        self.insist(terminal, lambda lines: lines[-1] == "again?")
        terminal.send("w")
        terminal.wait(lambda lines: lines[-1] == "again?")
        terminal.send("\x1c")
        self.assertEqual(terminal.wait_end(), 0)

    def test_a_cell_that_does_not_stop_is_ended_by_a_restart(self):
        terminal = self.open()
        terminal.run("from helper import *", 1)
        terminal.send("print('on'); stubborn()\r")
        terminal.wait(lambda lines: "on" in lines)
        self.insist(terminal)
        terminal.send("r")
        terminal.prompt(1)
        self.assertIn("Out[1]: 2", terminal.run("1+1", 1))

    def test_a_stopped_kernel_does_not_stop_the_prompt(self):
        terminal = self.open("--name", "stopped")
        terminal.run("1", 1)
        pid = vt.kernel_pids(self.home)[-1]
        with open(os.path.join(self.home.run, "kernels", "stopped.json")) as file:
            pid = json.load(file)["twoproc_pid"]
        os.kill(pid, signal.SIGSTOP)
        self.addCleanup(os.kill, pid, signal.SIGCONT)
        begin = time.monotonic()
        terminal.send("x = 1 +\\\r")
        terminal.wait("...:")
        terminal.send("2\r")
        self.assertLess(time.monotonic() - begin, support.at_most(3))
        os.kill(pid, signal.SIGCONT)
        terminal.prompt(3)
        self.assertIn("Out[3]: 3", terminal.run("x", 3))
        self.assertNotIn("arning", terminal.raw)


class Several(TerminalCase):
    """alice has the kernel, bob joins."""

    def setUp(self):
        self.name = "shared-" + self._testMethodName[-20:].replace("_", "")
        self.alice = self.open("--name", self.name)
        self.alice.send("from helper import *; import time\r")
        self.alice.prompt(2)
        self.bob = self.start("--quiet", "--existing", self.name, user="bob")
        self.bob.prompt(2)

    def test_the_other_is_seen_by_name_above_an_unbroken_line(self):
        self.alice.send("half a li")
        self.alice.wait("In [2]: half a li")
        self.bob.send("for i in range(3): print('tick', i, flush=True); time.sleep(0.05)\r")
        lines = self.alice.wait(lambda lines: lines[-1] == "In [3]: half a li" and "bob | tick 2" in lines)
        begin = lines.index("bob In [2]: for i in range(3): print('tick', i, flush=True); time.sleep(0.05)")
        self.assertEqual(lines[begin + 1:], ["bob | tick 0", "bob | tick 1", "bob | tick 2", "In [3]: half a li"])
        self.alice.send("ne = 5\r")
        self.alice.wait("SyntaxError")

    def test_results_and_errors_of_the_other_have_his_name(self):
        self.bob.run("1+1", 2)
        self.alice.wait("bob | Out[2]: 2")
        self.bob.run("1/0", 3)
        self.alice.wait("bob | ZeroDivisionError: division by zero")
        self.alice.prompt(4)
        self.assertIn("Out[4]: 8", self.alice.run("8", 4))
        self.bob.wait("alice | Out[4]: 8")

    def test_half_lines_of_the_other_are_shown_whole(self):
        self.alice.send("typing")
        self.alice.wait("In [2]: typing")
        self.bob.send("print('no end', end='')\r")
        self.alice.wait("bob | no end")
        self.bob.prompt(3)
        self.bob.send("progress()\r")
        self.alice.wait("bob | 100%")
        lines = self.alice.wait(lambda lines: lines[-1] == "In [4]: typing")
        self.assertFalse([line for line in lines if "typing" in line][:-1])

    def test_a_completion_that_does_not_come_holds_no_key(self):
        alice = self.open("--name", "deaf", "--set", "frontend.complete_seconds=60")
        pid = int(alice.run("from helper import *; os.getpid()", 1)[-3].partition("Out[1]: ")[2])
        bob = self.start("--quiet", "--existing", "deaf", user="bob")
        bob.prompt(2)
        bob.send("spin()\r")
        alice.wait("bob In [2]: spin()")
        os.kill(pid, signal.SIGSTOP)        # it would answer beside the cell
        self.addCleanup(os.kill, pid, signal.SIGCONT)
        alice.send("os.pa")
        alice.wait("In [3]: os.pa")
        alice.send("\t" + CTRL_C)
        alice.wait(lambda lines: "In [3]:" in lines)
        alice.send("os.pa\t\r")
        alice.wait("queued (1 before: bob In [2])")

    def test_my_cell_waits_for_the_others_and_says_so(self):
        path = os.path.join(self.home.work, "alice-has-seen")
        self.bob.send(f"wait_file({path!r}); print('bob is done')\r")
        self.alice.wait("bob In [2]: wait_file")
        self.alice.send("'mine'\r")
        self.alice.wait("queued (1 before: bob In [2])")
        with open(path, "w"):
            pass
        lines = self.alice.wait("Out[3]: 'mine'")
        self.assertLess(lines.index("bob | bob is done"), lines.index("Out[3]: 'mine'"))

    def test_ctrl_c_at_a_cell_that_waits_is_not_for_the_others(self):
        self.bob.send("spin()\r")
        self.alice.wait(lambda lines: "bob In [2]: spin()" in lines and lines[-1].startswith(" busy"))
        self.alice.send("print('mi' + 'ne')\r")
        self.alice.wait("queued (1 before")
        self.alice.send(CTRL_C)
        self.alice.wait("bob In [2] runs before yours. [w]ait [d]etach [i]nterrupt it:")
        self.assertNotIn("KeyboardInterrupt", self.bob.raw)
        self.alice.send("i")
        self.bob.wait("KeyboardInterrupt")
        self.alice.wait(lambda lines: "mine" in lines and lines[-1] == "In [4]:")

    def test_only_who_was_asked_answers(self):
        self.bob.send("x = input('who? ')\r")
        self.bob.wait(lambda lines: lines[-1] == "who?")
        self.alice.wait("bob In [2]: x = input('who? ')")
        self.alice.send("not me")
        self.alice.wait("not me")
        self.bob.send("bob\r")
        self.bob.prompt(3)
        self.assertIn("Out[3]: 'bob'", self.bob.run("x", 3))

    def test_a_question_is_taken_away_when_somebody_interrupts(self):
        self.bob.send("x = input('who? ')\r")
        self.bob.wait(lambda lines: lines[-1] == "who?")
        self.alice.wait("bob In [2]:")
        self.alice.send(":interrupt\r")
        self.bob.wait("KeyboardInterrupt")
        self.bob.prompt(3)
        self.assertIn("Out[3]: 1", self.bob.run("1", 3))

    def test_anybody_may_interrupt(self):
        self.bob.send("while True: time.sleep(0.01)\r")
        self.alice.wait("bob In [2]:")
        self.alice.send(":interrupt\r")
        self.alice.wait("interrupted")
        self.bob.wait("KeyboardInterrupt")
        self.bob.prompt(3)

    def test_ctrl_c_of_who_did_not_start_the_kernel_ends_the_cell(self):
        self.bob.send("while True: time.sleep(0.01)\r")
        self.alice.wait("bob In [2]:")
        self.bob.send(CTRL_C)
        self.bob.wait("KeyboardInterrupt")
        self.bob.prompt(3)

    def test_who_attached_leaves_the_kernel_alone(self):
        for leaving in ("exit\r", CTRL_D):
            self.bob.send(leaving)
            self.assertEqual(self.bob.wait_end(), 0)
            self.assertIn(f"left kernel {self.name}, it lives on", "\n".join(self.bob.screen.lines()))
            self.bob = self.start("--quiet", "--existing", self.name, user="bob")
            self.bob.prompt(2)
        self.assertIn("Out[2]: 5", self.alice.run("5", 2))

    def test_who_started_it_leaves_it_to_the_others(self):
        self.alice.send("exit\r")
        self.assertEqual(self.alice.wait_end(), 0)
        self.assertIn(f"left kernel {self.name}, it lives on for bob;", "\n".join(self.alice.screen.lines()))
        self.assertIn("Out[2]: 5", self.bob.run("5", 2))

    def test_a_shutdown_asks_and_is_told_to_the_others(self):
        self.alice.run("1", 2)
        self.bob.prompt(3)
        self.bob.send(":shutdown\r")
        self.bob.wait(f"End kernel {self.name}, also for alice? [y]es [n]o:")
        self.bob.send("y")
        self.assertEqual(self.bob.wait_end(), 0)
        self.alice.wait(f"kernel {self.name} shut down by bob", support.at_most(3))
        self.alice.wait("[r]estart [n]ew kernel [q]uit:")
        self.alice.send("r")
        self.alice.prompt(1)
        self.assertIn("Out[1]: 3", self.alice.run("3", 1))


class Joining(TerminalCase):
    """Who comes late sees what was; who comes in the middle of a cell, all of it, once."""

    def join(self, name, *arguments, **env):
        return self.start("--quiet", "--existing", name, *arguments, user="bob", **env)

    def test_the_last_cells_are_shown_by_name_between_two_rules(self):
        alice = self.open("--name", "past")
        for number in range(1, 5):
            alice.run(f"print('said', {number}); {number} * 11", number)
        bob = self.join("past", "--set", "frontend.catch_up=2")
        self.assertEqual(bob.prompt(5), [
            "-- earlier --",
            "alice In [3]: print('said', 3); 3 * 11", "alice | said 3", "alice | Out[3]: 33",
            "alice In [4]: print('said', 4); 4 * 11", "alice | said 4", "alice | Out[4]: 44",
            "-- now --", "", "In [5]:"])
        self.assertEqual(self.join("past", "--set", "frontend.catch_up=0").prompt(5), ["", "In [5]:"])

    def test_a_cell_that_runs_is_seen_from_its_first_line_to_its_last_each_once(self):
        alice = self.open("--name", "running")
        alice.run("from helper import *", 1)
        path = os.path.join(self.home.work, "bob-has-seen")
        alice.send(f"count_until({path!r})\r")
        alice.wait(lambda lines: "20" in lines)
        alice.send("\x1c")
        self.assertEqual(alice.wait_end(), 0)
        bob = self.join("running")
        bob.wait(lambda lines: lines[-1].startswith("alice | "))
        seen = int(bob.screen.all_lines()[-1][len("alice | "):])
        bob.wait(lambda lines: f"alice | {seen + 20}" in bob.screen.all_lines())
        with open(path, "w"):
            pass
        bob.wait(lambda lines: "alice | last" in lines)
        bob.prompt(3)
        shown = bob.screen.all_lines()
        said = [line for line in shown if line.startswith("alice | ")]
        self.assertEqual(said, [*(f"alice | {i}" for i in range(1, len(said))), "alice | last"])
        self.assertLess(shown.index("-- now --"), shown.index("alice | 1"))
        self.assertEqual(bob.run("'on'", 3)[-3:], ["Out[3]: 'on'", "", "In [4]:"])

    def test_a_terminal_that_was_stopped_shows_all_that_it_missed(self):
        alice = self.open("--name", "missed", "--set", "limits.iopub_queue=50", "--set",
                          "limits.slow_reader_seconds=0.1")
        alice.run("pass", 1)            # the kernel is there
        bob = self.join("missed")
        bob.prompt(2)
        os.kill(bob.pid, signal.SIGSTOP)
        alice.run("for i in range(3000): display(i)", 2)
        os.kill(bob.pid, signal.SIGCONT)
        bob.wait(lambda lines: "alice | 2999" in lines or any("missed:" in line for line in lines))
        self.assertEqual([line for line in bob.screen.all_lines() if line.startswith("alice | ")],
                         [f"alice | {i}" for i in range(3000)])

    def test_a_cell_magic_runs_at_its_second_empty_line(self):
        terminal = self.open()
        terminal.send("%%bash\recho one\r\recho two\r\r\r")
        terminal.prompt(2)
        self.assertEqual([line for line in terminal.screen.lines() if line in ("one", "two")], ["one", "two"])

    def test_what_others_typed_comes_back_and_what_is_private_does_not(self):
        alice = self.open("--name", "typed")
        alice.run("before_he_came = 1", 1)
        alice.send("%%private\rprivate_word = 1\r\r\r")
        alice.prompt(3)
        bob = self.join("typed", XDG_STATE_HOME=os.path.join(self.home.path, "bobs"))
        bob.prompt(3)
        self.assertNotIn("private_word", bob.raw)
        alice.run("while_he_was = 1", 3)
        bob.prompt(4)
        for begin, end in (("bef", "before_he_came = 1"), ("whi", "while_he_was = 1")):
            bob.send(begin)
            bob.type("up")
            bob.wait(lambda lines, end=end: lines[-1] == f"In [4]: {end}")
            bob.send(CTRL_C)
            bob.prompt(4)
        bob.send("priv")        # nothing that the other tests of this class have left in a history
        bob.type("up")
        bob.send("x")
        bob.wait(lambda lines: lines[-1].startswith("In [4]: privx"))
        with open(os.path.join(self.home.env["XDG_STATE_HOME"], "twoproc", "history")) as file:
            text = file.read()
        self.assertIn("before_he_came", text)
        self.assertNotIn("private_word", text)

    def test_the_log_can_be_shown_found_and_saved(self):
        terminal = self.open("--name", "asked")
        terminal.run("print('one')", 1)
        terminal.run("print('two')", 2)
        terminal.send(":last 1\r")
        lines = terminal.wait(lambda lines: "alice | two" in lines)
        self.assertNotIn("alice | one", lines)
        terminal.send(":last\r")
        terminal.wait("how many?")
        terminal.send(":log\r")
        terminal.wait(lambda lines: "/twoproc/sessions/" in "".join(lines))
        for name in ("saved.py", "saved.ipynb"):
            terminal.send(f":save {name}\r")
            terminal.wait(lambda lines, name=name: f"/{name}" in "".join(lines).partition("saved to ")[2])
            with open(os.path.join(self.home.work, name)) as file:
                self.assertIn("print('two')", file.read())
        terminal.send(":save saved.py\r")
        terminal.wait("exists already")
        terminal.send(":save other.doc\r")
        terminal.wait("other.doc: the name must end in")
        terminal.prompt(3)

    def test_a_kernel_without_a_log_says_so(self):
        terminal = self.open(*NO_LOG)
        terminal.run("1", 1)
        for count, command in enumerate((":last 1", ":log", ":save x.py"), 1):
            terminal.send(command + "\r")
            terminal.wait(lambda lines, count=count: "\n".join(lines).count("keeps no log") == count)
            terminal.prompt(2)


class Leaving(TerminalCase):

    def test_ctrl_d_asks_what_to_do_with_ones_own_kernel(self):
        terminal = self.open("--name", "mine")
        terminal.send(CTRL_D)
        terminal.wait("End kernel mine too? [y]es [k]eep it [n]o, stay:")
        terminal.send("n")
        terminal.prompt(1)
        terminal.run("x = 9", 1)
        terminal.send(CTRL_D)
        terminal.wait("[n]o, stay:")
        terminal.send("k")
        self.assertEqual(terminal.wait_end(), 0)
        again = self.start("--quiet", "--existing", "mine")
        again.prompt(2)
        self.assertIn("Out[2]: 9", again.run("x", 2))

    def test_a_kernel_on_which_somebody_only_looks_is_left_to_him(self):
        for leaving in (CTRL_D, "exit\r"):
            with self.subTest(leaving=leaving):
                name = f"watched-{ord(leaving[0])}"
                terminal = self.open("--name", name)
                terminal.run("1", 1)            # the kernel is there
                with open(os.path.join(self.home.run, "kernels", name + ".json")) as file:
                    watcher = support.Client(json.load(file))       # and says nothing
                self.addCleanup(watcher.close)
                watcher.wait_ready()
                terminal.send(":who\r")
                terminal.wait(lambda lines: "2 clients attached, this terminal among them" in lines
                              and lines[-1] == "In [2]:")
                terminal.send(leaving)
                self.assertEqual(terminal.wait_end(), 0)
                self.assertIn(f"left kernel {name}, it lives on for ", "\n".join(terminal.screen.lines()))

    def test_a_kernel_that_everybody_else_has_left_is_ones_own_again(self):
        terminal = self.open("--name", "visited")
        file = os.path.join(self.home.run, "kernels", "visited.json")       # the prompt is there before its kernel
        support.wait_until(lambda: os.path.exists(file), what="the kernel")
        guest = self.start("--quiet", "--existing", "visited", user="bob")
        guest.prompt(1)
        guest.run("'was here'", 1)
        terminal.prompt(2)
        guest.send("exit\r")
        self.assertEqual(guest.wait_end(), 0)
        with open(file) as info:        # one that subscribes to nothing is not counted
            asker = support.Client(json.load(info), channels=("control",))
        self.addCleanup(asker.close)
        support.wait_until(lambda: asker.request("control", "twoproc_status_request").content["clients"] == 1,
                           what="the kernel to know that the guest has left")
        terminal.send(CTRL_D)
        terminal.wait("End kernel visited too? [y]es [k]eep it [n]o, stay:")
        terminal.send("y")
        self.assertEqual(terminal.wait_end(), 0)
        self.assertIn("kernel visited ended", terminal.screen.lines())

    def test_exit_ends_ones_own_kernel(self):
        terminal = self.open("--name", "ended")
        terminal.send("exit\r")
        self.assertEqual(terminal.wait_end(), 0)
        self.assertIn("kernel ended ended", terminal.screen.lines())
        self.assertFalse(os.path.exists(os.path.join(self.home.run, "kernels", "ended.json")))

    def test_ctrl_backslash_detaches_at_the_prompt_and_while_a_cell_runs(self):
        first = self.open("--name", "left")
        first.send("half typed\x1c")
        self.assertEqual(first.wait_end(), 0)
        self.assertNotIn("half typed", "\n".join(first.screen.lines()))
        second = self.start("--quiet", "--existing", "left")
        second.prompt(1)
        second.run("from helper import *", 1)
        second.send("spin()\r")
        second.wait("spinning")
        second.send("\x1c")
        self.assertEqual(second.wait_end(), 0)
        self.assertIn("left kernel left, it lives on", "\n".join(second.screen.lines()))

    def test_a_kernel_can_be_kept(self):
        for name, argument, leaving in (("kept-1", (), "exit(keep_kernel=True)\r"), ("kept-2", (), ":detach\r"),
                                        ("kept-3", ("--keep",), "exit\r")):
            with self.subTest(leaving=leaving):
                terminal = self.open("--name", name, *argument)
                terminal.run("1", 1)
                terminal.send(leaving)
                self.assertEqual(terminal.wait_end(), 0)
                self.assertTrue(os.path.exists(os.path.join(self.home.run, "kernels", name + ".json")))

    def test_a_kernel_outlives_its_killed_terminal(self):
        terminal = self.open("--name", "orphan")
        terminal.run("x = 31", 1)
        os.kill(terminal.pid, signal.SIGKILL)
        terminal.wait_end()
        again = self.start("--quiet", "--existing", "orphan")
        again.prompt(2)
        self.assertIn("Out[2]: 31", again.run("x", 2))

    def test_another_kernel_can_be_joined_from_the_prompt(self):
        first = self.open("--name", "first")
        first.run("x = 'first'", 1)
        second = self.open("--name", "second")
        second.send(":connect\r")
        second.wait(":connect: which one?")
        second.send(":connect first\r")
        second.wait("now at kernel first")
        second.prompt(2)
        self.assertIn("Out[2]: 'first'", second.run("x", 2))
        second.send(":restart\r")
        second.wait(":restart: only who started kernel first can restart it")


class DeathsWithoutALog(TerminalCase):
    """What the log adds is test_death.py's."""

    def test_the_cause_is_told_within_a_second_and_the_typed_text_kept(self):
        for kill, cause in (("os._exit(7)", "exit status 7"), ("os.kill(os.getpid(), 9)", "SIGKILL"),
                            ("os.kill(os.getpid(), 11)", "SIGSEGV")):
            with self.subTest(cause=cause):
                terminal = self.open(*NO_LOG)
                path = os.path.join(self.home.work, cause.replace(" ", "-"))
                terminal.run(f"import helper, os, threading; "
                             f"threading.Thread(target=lambda: helper.wait_file({path!r}) or {kill}).start()", 1)
                terminal.send("half typed")
                terminal.wait(lambda lines: lines[-1].startswith("In [2]: half typed"))        # and what is suggested
                with open(path, "w"):
                    pass
                terminal.wait(f" died: {cause}", support.at_most(1))
                terminal.send(" on")        # typing is not disturbed, and is no answer
                terminal.wait(lambda lines: lines[-1] == "In [2]: half typed on" or "no kernel" in lines[-1])
                terminal.send(ENTER)
                terminal.wait("[r]estart [n]ew kernel [q]uit:")
                terminal.send("r")
                terminal.wait(lambda lines: lines[-1] == "In [1]: half typed on")
                terminal.send(CTRL_C)
                terminal.run("5", 1)

    def test_the_running_cell_is_said_to_be_lost_and_quitting_is_status_70(self):
        terminal = self.open(*NO_LOG)
        terminal.send("import os; os._exit(3)\r")
        terminal.wait(" died: exit status 3 while running In [1], which is lost")
        terminal.wait("[q]uit:")
        terminal.send("q")
        self.assertEqual(terminal.wait_end(), 70)
        self.assertNotIn("Traceback", terminal.raw)

    def test_who_was_told_and_quits_leaves_nothing_but_the_session_log(self):
        terminal = self.open("--name", "dead-one")
        self.assertNotEqual(self.files_of("dead-one"), [])
        terminal.send("import os; os._exit(3)\r")
        terminal.wait("[q]uit ?")
        terminal.send("q")
        self.assertEqual(terminal.wait_end(), 70)
        self.assertEqual(self.files_of("dead-one"), [])
        logs = os.listdir(os.path.join(self.home.path, "state", "twoproc", "sessions"))
        self.assertIn(".log", {os.path.splitext(name)[1] for name in logs})

    def test_a_new_kernel_can_take_its_place(self):
        terminal = self.open("--name", "old-one", *NO_LOG)
        terminal.send("import os; os.abort()\r")
        terminal.wait(" died: SIGABRT")
        terminal.wait("[q]uit:")
        terminal.send("n")
        terminal.wait("now at kernel")
        self.assertIn("Out[1]: 2", terminal.run("1+1", 1))
        self.assertEqual(self.files_of("old-one"), [])

    def test_who_attached_is_told_too(self):
        kernel = support.start_kernel(self, *NO_LOG, home=self.home)
        terminal = self.start("--quiet", "--existing", kernel.connection_file)
        terminal.prompt(1)
        os.kill(kernel.pid, signal.SIGKILL)
        kernel.popen.wait()
        terminal.wait(" died: ", support.at_most(3))
        terminal.wait("[n]ew kernel [q]uit:")
        terminal.send("q")
        self.assertEqual(terminal.wait_end(), 70)


class OtherKernels(TerminalCase):

    def test_a_kernel_that_cannot_be_started_again_leaves_a_choice(self):
        folder = os.path.join(self.home.path, "jupyter", "kernels", "fragile")
        os.makedirs(folder)
        script = os.path.join(folder, "start")
        with open(script, "w") as file:
            file.write(f"#!/bin/sh\nexec {sys.executable} -m twoproc.kernel \"$@\"\n")
        os.chmod(script, 0o700)
        with open(os.path.join(folder, "kernel.json"), "w") as file:
            json.dump({"argv": [script, "-f", "{connection_file}"], "language": "python"}, file)
        terminal = self.open("--kernel", "fragile", JUPYTER_PATH=os.path.join(self.home.path, "jupyter"))
        terminal.run("1", 1)
        os.unlink(script)
        terminal.send(":restart\r")
        terminal.wait("[y]es [n]o:")
        terminal.send("y")
        terminal.wait("not restarted: cannot start ")
        for _ in range(2):
            terminal.wait(lambda lines: lines[-1] == "[n]ew kernel [q]uit:")
            terminal.send("n")
            terminal.wait(lambda lines: lines[-1] != "[n]ew kernel [q]uit:")
        terminal.wait(lambda lines: lines[-1] == "[n]ew kernel [q]uit:")
        terminal.send("q")
        self.assertNotEqual(terminal.wait_end(), 0)
        self.assertNotIn("internal error", terminal.raw)

    def test_ipykernel_is_driven(self):
        try:
            import ipykernel  # noqa: F401
        except ImportError:
            self.skipTest("ipykernel (extra: test) is not installed")
        terminal = self.open("--kernel", "python3")
        terminal.run("x = 20", 1)
        self.assertIn("Out[2]: 41", terminal.run("x * 2 + 1", 2))
        terminal.send("y = input('? ')\r")
        terminal.wait(lambda lines: lines[-1] == "?")
        terminal.send("word\r")
        terminal.prompt(4)
        terminal.send("exit\r")
        self.assertEqual(terminal.wait_end(), 0)
        self.assertEqual(self.files_of("kernel-python3-"), [])
        terminal = self.open("--kernel", "python3")
        terminal.send("import os; os._exit(4)\r")
        terminal.wait("[q]uit:")
        self.assertNotEqual(self.files_of("kernel-python3-"), [])
        terminal.send("q")
        self.assertEqual(terminal.wait_end(), 70)
        self.assertEqual(self.files_of("kernel-python3-"), [])


if __name__ == "__main__":
    unittest.main()
