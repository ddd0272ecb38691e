# Distributed under the terms of the BSD 3-Clause License.
"""The command line without a terminal: pipes, -c, scripts, line mode; and the text of what a kernel sends."""
import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import unittest

from twoproc.cells import check_complete, split_cells
from twoproc.painter import Painter
from twoproc.screen import (EscapeFilter, Lines, Tail, image_in, image_protocol, last_state, rows_below, text_of,
                            text_of_html, without_escapes)
from twoproc.session import Message

from . import support, vt

FRONTEND = [sys.executable, "-m", "twoproc.frontend"]


class PlainCase(unittest.TestCase):
    """One home, that is one set of folders, for the class."""

    @classmethod
    def setUpClass(cls):
        cls.home = support.Home(cls)
        support._cleanup(cls, vt.end_kernels, cls.home)

    def run_it(self, *arguments, input="", env=None, **options):
        options.setdefault("stdout", subprocess.PIPE)
        return subprocess.run([*FRONTEND, *arguments], input=input, stderr=subprocess.PIPE, text=True,
                              cwd=self.home.work, env={**self.home.env, **(env or {})},
                              timeout=support.DEADLINE, **options)

    def write(self, name, text):
        path = os.path.join(self.home.work, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(textwrap.dedent(text))
        return path

    def assert_no_kernel(self):
        folder = os.path.join(self.home.run, "kernels")
        self.assertEqual([name for name in os.listdir(folder) if name.endswith(".json")], [])

    def assert_result(self, result, status, stdout=None, stderr=None):
        self.assertEqual(result.returncode, status, result.stdout + result.stderr)
        if stdout is not None:
            self.assertEqual(result.stdout, stdout)
        if stderr is not None:
            self.assertEqual(result.stderr, stderr)


class OnAPipe(PlainCase):

    def test_a_value_is_echoed_alone(self):
        self.assert_result(self.run_it(input="1+1\n"), 0, "2\n", "")

    def test_every_statement_with_a_value_echoes_it(self):
        code = "import os\nx = 3\nx\nfor i in range(2):\n    print(i)\n\n'a' * 2\nx + 1;\nNone\n"
        self.assert_result(self.run_it(input=code), 0, "3\n0\n1\n'aa'\n", "")

    def test_an_error_goes_to_stderr_without_escapes_and_stops(self):
        result = self.run_it(input="1/0\nprint(5)\n")
        self.assert_result(result, 1, "")
        self.assertIn("ZeroDivisionError: division by zero", result.stderr)
        self.assertNotIn("\x1b", result.stderr)

    def test_a_syntax_error_runs_nothing(self):
        result = self.run_it(input="print(1)\nx = = 2\n")
        self.assert_result(result, 1, "")
        self.assertIn("SyntaxError", result.stderr)

    def test_lines_of_ipython_run_among_those_of_python(self):
        result = self.run_it(input="x = 2\n!echo shell\n%pprint\nfiles = !echo a b\nfiles[0]\n")
        self.assert_result(result, 0)
        self.assertEqual(result.stdout.splitlines()[0], "shell")
        self.assertEqual(result.stdout.splitlines()[-1], "'a b'")

    def test_top_level_await_works(self):
        code = "import asyncio\nawait asyncio.sleep(0)\nasync def f():\n    return 7\n\nawait f()\n"
        self.assert_result(self.run_it(input=code), 0, "7\n", "")

    def test_input_finds_the_end(self):
        result = self.run_it(input="x = input()\nprint(x)\n")
        self.assert_result(result, 1, "")
        self.assertIn("EOFError", result.stderr)

    def test_nothing_at_all_is_success(self):
        self.assert_result(self.run_it(input=""), 0, "", "")
        self.assert_no_kernel()

    def test_code_may_say_in_which_encoding_it_is(self):
        code = "# coding: latin-1\nprint(ord('\xff'))\n"
        self.assert_result(self.run_it(input=code, encoding="latin-1"), 0, "255\n", "")

    def test_what_is_no_text_is_one_line_and_status_2(self):
        result = self.run_it(input="print('\xff')\n", encoding="latin-1")
        self.assert_result(result, 2, "")
        self.assertRegex(result.stderr, r"^twoproc: cannot read standard input: .*\n$")
        result = self.run_it("-i", input="len('\xff')\n", encoding="latin-1")
        self.assert_result(result, 0, "1\n", "")

    def test_a_lone_surrogate_is_written_as_an_escape(self):
        self.assert_result(self.run_it(input="print('a\\ud800b')\n"), 0, "a\\ud800b\n", "")

    def test_escapes_of_the_users_own_code_pass_through(self):
        self.assert_result(self.run_it(input="print('\\x1b[31mred\\x1b[0m')\n"), 0, "\x1b[31mred\x1b[0m\n", "")


class WithTheInteractiveFlag(PlainCase):

    def test_input_reads_the_lines_after_the_statement(self):
        code = "x = input('? ')\nhello\nprint(x)\nfor i in range(2):\n    print(i)\n\nx * 2\n"
        self.assert_result(self.run_it("-i", input=code), 0, "? hello\n0\n1\n'hellohello'\n", "")

    def test_an_error_stops(self):
        self.assert_result(self.run_it("-i", input="1/0\nprint(5)\n"), 1, "")


class Code(PlainCase):

    def test_output_and_the_last_value_are_written(self):
        self.assert_result(self.run_it("-c", "print(6*7)\n43"), 0, "42\n43\n", "")

    def test_an_error_is_status_1(self):
        result = self.run_it("-c", "1/0")
        self.assert_result(result, 1, "")
        self.assertNotIn("\x1b", result.stderr)

    def test_system_exit_is_the_status(self):
        for code, status in (("raise SystemExit(3)", 3), ("raise SystemExit", 0), ("import sys; sys.exit(None)", 0),
                             ("import sys; sys.exit(256 + 5)", 5), ("import sys; sys.exit(False)", 0),
                             ("import sys; sys.exit(True)", 1), ("exit(3)\nprint('after')", 3), ("quit()", 0)):
            with self.subTest(code=code):
                self.assert_result(self.run_it("-c", code), status, "", "")

    def test_system_exit_with_a_text_shows_it(self):
        self.assert_result(self.run_it("-c", "raise SystemExit('bye')"), 1, "", "bye\n")

    def test_exit_in_a_program_from_a_pipe_ends_it(self):
        self.assert_result(self.run_it(input="print(1)\nexit(4)\nprint(2)\n"), 4, "1\n", "")

    def test_what_follows_is_in_argv(self):
        self.assert_result(self.run_it("-c", "import sys; print(sys.argv)", "a", "--b", "-c"), 0,
                           "['-c', 'a', '--b', '-c']\n", "")

    def test_input_reads_stdin(self):
        self.assert_result(self.run_it("-c", "print(input('? ') + input())", input="a\nb\n"), 0, "? ab\n", "")

    def test_every_message_is_a_line_of_json(self):
        result = self.run_it("--json", "-c", "print(1)\n2")
        self.assert_result(result, 0, stderr="")
        messages = [json.loads(line) for line in result.stdout.splitlines()]
        self.assertEqual([message["header"]["msg_type"] for message in messages],
                         ["status", "execute_input", "stream", "execute_result", "status"])
        self.assertEqual(messages[3]["content"]["data"], {"text/plain": "2"})

    def test_a_keyboard_interrupt_of_ours_reaches_the_code(self):
        process = support.Process(self, [*FRONTEND, "-c", "import time\nprint('on', flush=True)\ntime.sleep(60)"],
                                  home=self.home)
        support.wait_until(lambda: "on" in process.output())
        os.kill(process.pid, signal.SIGINT)
        self.assertEqual(process.wait(), 130)
        self.assertIn("KeyboardInterrupt", process.log())
        self.assert_no_kernel()


class Scripts(PlainCase):

    def test_a_script_sees_itself_as_main(self):
        path = self.write("main.py", """\
            import os, sys
            import neighbour
            1 + 1
            print(sys.argv[1:], __name__, os.path.basename(__file__), neighbour.x)
            import __main__
            print(__main__.os is os)
            sys.exit(3)
            """)
        self.write("neighbour.py", "x = 5\n")
        result = self.run_it(path, "a", "--b", "-c", "d")
        self.assert_result(result, 3, "['a', '--b', '-c', 'd'] __main__ main.py 5\nTrue\n", "")

    def test_an_error_names_the_file_and_the_line(self):
        path = self.write("wrong.py", "x = 1\ny = x / 0\n")
        result = self.run_it(path)
        self.assert_result(result, 1, "")
        self.assertRegex(result.stderr, r"wrong\.py")
        self.assertIn("y = x / 0", result.stderr)
        self.assertIn("ZeroDivisionError", result.stderr)

    def test_a_missing_script_is_one_line_and_status_2(self):
        result = self.run_it("nowhere.py")
        self.assert_result(result, 2, "", "twoproc: cannot read nowhere.py: No such file or directory\n")

    def test_input_reads_stdin(self):
        path = self.write("ask.py", "print(input('? '))\n")
        self.assert_result(self.run_it(path, input="hello\n"), 0, "? hello\n", "")


class Ends(PlainCase):
    SPIN = "import os\nprint(os.getpid(), flush=True)\nwhile True: pass"

    def test_a_kernel_killed_in_mid_script_is_status_70(self):
        result = self.run_it(input="print(1, flush=True)\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"
                                   "print(2)\n")
        self.assert_result(result, 70, "1\n")
        self.assertRegex(result.stderr, r"\Atwoproc: kernel died in In \[2\]: SIGKILL")
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)

    def test_a_reader_that_leaves_ends_us_quietly(self):
        process = subprocess.Popen([*FRONTEND, "-c", "for i in range(10**6): print(i)"], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, cwd=self.home.work, env=self.home.env)
        self.addCleanup(process.stderr.close)
        self.assertEqual(process.stdout.readline(), b"0\n")
        process.stdout.close()
        self.assertEqual(process.wait(support.DEADLINE), 141)
        self.assertEqual(process.stderr.read(), b"")
        self.assert_no_kernel()

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full on this system")
    def test_a_full_disk_is_one_line(self):
        with open("/dev/full", "w") as full:
            result = self.run_it("-c", "print(1)", stdout=full)
        self.assertEqual(result.returncode, 1)
        self.assertEqual(result.stderr, "twoproc: cannot write the output: No space left on device\n")
        self.assert_no_kernel()

    def test_sigterm_ends_our_kernel_too(self):
        process = support.Process(self, [*FRONTEND, "-c", self.SPIN], home=self.home)
        pid = int(support.wait_until(lambda: process.output().strip()))
        os.kill(process.pid, signal.SIGTERM)
        self.assertEqual(process.wait(), 128 + signal.SIGTERM)
        self.assertRaises(ProcessLookupError, os.kill, pid, 0)
        self.assert_no_kernel()
        self.assertNotIn("Traceback", process.log())

    def test_a_kernel_dies_with_us_when_we_are_killed(self):
        process = support.Process(self, [*FRONTEND, "-c", self.SPIN], home=self.home)
        pid = int(support.wait_until(lambda: process.output().strip()))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

        def is_gone():
            try:
                with open(f"/proc/{pid}/stat") as file:
                    return file.read().rpartition(")")[2].split()[0] == "Z"     # an orphan that nobody waits for
            except FileNotFoundError:
                return True
        support.wait_until(is_gone, support.at_most(3), "the kernel's end")


class OtherKernels(PlainCase):

    def test_code_runs_in_a_kernel_that_is_there_already(self):
        kernel = support.start_kernel(self, home=self.home)
        path = kernel.connection_file
        self.assert_result(self.run_it("--existing", path, "-c", "shared = 5"), 0, "", "")
        self.assert_result(self.run_it("--existing", path, input="shared\nexit\n"), 0, "5\n", "")
        self.assertTrue(kernel.is_alive)

    def test_a_kernel_is_kept_when_that_is_asked_for(self):
        self.assert_result(self.run_it("--keep", "--name", "kept", "-c", "kept = 6"), 0, "", "")
        self.assertRegex(self.run_it("--list").stdout, r"(?m)^kept +pid \d+ +since ")
        self.assert_result(self.run_it("--existing", "kept", "-c", "kept"), 0, "6\n", "")
        vt.end_kernels(self.home)
        support.wait_until(lambda: self.run_it("--list").stdout == "", what="an empty list")

    def test_an_unknown_name_is_status_2_and_says_which_there_are(self):
        result = self.run_it("--existing", "no-such")
        self.assert_result(result, 2, "")
        self.assertIn("no-such", result.stderr)
        self.assertEqual(len(result.stderr.splitlines()), 1)

    def test_options_that_say_which_kernel_and_do_not_go_together_are_status_2(self):
        kernel = support.start_kernel(self, home=self.home)
        for words in (("--existing", kernel.connection_file, "--kernel", "python3"),
                      ("--existing", kernel.connection_file, "--name", "z"), ("--connect", "lab", "--name", "z"),
                      ("--connect", "lab", "--kernel", "python3"), ("--ssh", "lab", "--existing", "--name", "z")):
            with self.subTest(words=words):
                result = self.run_it(*words, "-c", "1")
                self.assert_result(result, 2, "")
                self.assertIn("give one", result.stderr)
                self.assertEqual(len(result.stderr.splitlines()), 1)

    def test_the_usage_is_a_command_that_works(self):
        for name in ("frontend", "kernel", "crashlog", "keys", "relay"):
            done = subprocess.run([sys.executable, "-m", f"twoproc.{name}", "--help"], env=self.home.env,
                                  cwd=self.home.work, capture_output=True, text=True, timeout=support.DEADLINE)
            self.assertRegex(done.stdout, rf"\Ausage: python -m twoproc\.{name} ")

    def test_an_unknown_kernelspec_is_status_2(self):
        result = self.run_it("--kernel", "no-such", "-c", "1")
        self.assert_result(result, 2, "")
        self.assertIn("no-such", result.stderr)

    def test_ipykernel_is_driven(self):
        try:
            import ipykernel  # noqa: F401
        except ImportError:
            self.skipTest("ipykernel (extra: test) is not installed")
        result = self.run_it("--kernel", "python3", "-c", "import sys\nprint(1)\nsys.exit(4)")
        self.assert_result(result, 4, "1\n", "")

    def test_a_kernel_that_is_not_python_is_driven(self):
        try:
            import bash_kernel  # noqa: F401
        except ImportError:
            self.skipTest("bash_kernel (extra: test) is not installed")
        folder = os.path.join(self.home.env["JUPYTER_DATA_DIR"], "kernels", "bash")
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "kernel.json"), "w") as file:
            json.dump({"argv": [sys.executable, "-m", "bash_kernel", "-f", "{connection_file}"],
                       "display_name": "Bash", "language": "bash"}, file)
        self.assert_result(self.run_it("--kernel", "bash", input="x=5\nif true; then\n  echo $x\nfi\n"), 0, "5\n", "")


class Options(PlainCase):

    def test_a_wrong_setting_is_one_line_and_status_2(self):
        result = self.run_it("--set", "frontend.colour=off", "-c", "1")
        self.assert_result(result, 2, "")
        self.assertIn("the nearest is frontend.colors", result.stderr)
        self.assertEqual(len(result.stderr.splitlines()), 1)

    def test_settings_are_shown(self):
        result = self.run_it("--set", "frontend.colors=off", "--show-config")
        self.assertRegex(result.stdout, r"(?m)^frontend\.colors = off +\(--set frontend\.colors\)$")

    def test_settings_reach_the_kernel_that_is_started(self):
        code = ("import glob, json, os\npath, = glob.glob(os.environ['TWOPROC_RUNTIME'] + '/kernels/*.json')\n"
                "print(json.load(open(path))['transport'])")
        self.assert_result(self.run_it("--set", "kernel.transport=tcp", "-c", code), 0, "tcp\n", "")

    def test_version_and_help_are_answered_at_once(self):
        for option, wanted in (("--version", "twoproc "), ("--help", "--existing")):
            with self.subTest(option=option):
                self.assertIn(wanted, self.run_it(option).stdout)


class LineMode(PlainCase):
    """A terminal that cannot move its cursor, or may not."""

    def start(self, *arguments, argv=None, **env):
        terminal = vt.Terminal(self, argv or [*FRONTEND, *arguments], self.home, env)
        return terminal

    def test_a_dumb_terminal_has_prompts_and_no_escapes(self):
        terminal = self.start(TERM="dumb")
        terminal.wait("In [1]:")
        terminal.send("1+1\n")
        terminal.wait("Out[1]: 2")
        terminal.send("def f(x):\n")
        terminal.wait("   ...:")
        terminal.send("    return x\n\n")
        terminal.prompt(3)
        terminal.send("print('\\x1b[31mred')\n1/0\n")
        terminal.wait("ZeroDivisionError: division by zero")
        terminal.prompt(5)
        terminal.send("x = input('n? ')\n")
        terminal.wait("n? ")
        terminal.send("bob\nx\n")
        terminal.wait("Out[6]: 'bob'")
        terminal.send("exit\n")
        self.assertEqual(terminal.wait_end(), 0)
        self.assertNotIn("\x1b", terminal.raw)
        self.assert_no_kernel()

    def test_ctrl_c_interrupts_and_end_of_input_leaves(self):
        terminal = self.start("--plain", "--quiet")
        terminal.wait("In [1]:")
        terminal.send("print('on'); import time; time.sleep(60)\n")
        terminal.wait(lambda lines: "on" in lines)
        terminal.send("\x03")
        terminal.wait(lambda lines: lines[-1] == "In [2]:")
        terminal.send("\x03")
        terminal.wait(lambda lines: lines[-2:] == ["KeyboardInterrupt", "In [2]:"])
        terminal.send("\x04")
        self.assertEqual(terminal.wait_end(), 0)
        self.assertNotIn("\x1b", terminal.raw)

    def test_results_go_to_a_file_and_prompts_to_the_terminal(self):
        path = os.path.join(self.home.work, "results")
        command = " ".join([*FRONTEND, ">", path])
        terminal = self.start(argv=["/bin/sh", "-c", command])
        terminal.wait("In [1]:")
        terminal.send("1+1\n")
        terminal.prompt(2)
        terminal.send("print(6)\n")
        terminal.prompt(3)
        terminal.send("\x04")
        self.assertEqual(terminal.wait_end(), 0)
        with open(path) as file:
            self.assertEqual(file.read(), "2\n6\n")


class TheGate(unittest.TestCase):
    """What of a kernel's text may reach a terminal."""

    def test_plain_text_and_colours_pass(self):
        text = "a\tb\r\n\x08\x1b[31mred\x1b[0m \x1b[38;5;12mx\x1b[m\x1b[1A\x1b[2K\x1b[J"
        self.assertEqual(EscapeFilter().feed(text), text)

    def test_links_pass_to_known_places_only(self):
        link = "\x1b]8;;https://example.org/\x1b\\text\x1b]8;;\x1b\\"
        self.assertEqual(EscapeFilter().feed(link), link)
        self.assertEqual(EscapeFilter().feed("\x1b]8;;javascript:x\x07text\x1b]8;;\x07"), "text\x1b]8;;\x07")

    def test_what_makes_a_terminal_do_something_is_dropped(self):
        for dangerous in ("\x1b]52;c;eA==\x07", "\x1b]0;title\x07", "\x1b]2;title\x1b\\", "\x1bP1$r\x1b\\", "\x1b[c",
                          "\x1b[6n", "\x1b[?1049h", "\x1b[2;5r", "\x1b[500A", "\x1b[3J", "\x1bc", "\x1b(0", "\x07",
                          "\x9b6n", "\x00", "\x7f", "\x1b_Gi=1\x1b\\", "\x1b^x\x1b\\", "\x1b[5;5H", "\x0e",
                          "\x1b[8;1;1t"):
            with self.subTest(dangerous=dangerous):
                shown = EscapeFilter().feed(f"a{dangerous}b")
                self.assertNotRegex(shown, "[\x00-\x08\x0b-\x1f\x7f-\x9f]")
                self.assertEqual((shown[0], shown[-1]), ("a", "b"))

    def test_a_cut_anywhere_changes_nothing(self):
        text = ("a\x1b[31mred\x1b[0m\x1b]52;c;eA==\x07b\x1b]8;;http://x/\x1b\\link\x1b]8;;\x1b\\c"
                "\x1bPq\x1b\\d\x1b[2Ae\x1b[?25hf")
        whole = EscapeFilter().feed(text)
        for at in range(len(text)):
            gate = EscapeFilter()
            self.assertEqual(gate.feed(text[:at]) + gate.feed(text[at:]), whole, at)

    def test_arbitrary_text_never_leaves_a_control_behind(self):
        random_source = random.Random(7)
        pieces = ["\x1b", "[", "]", "8;;", "52;", "m", "31", ";", "\x07", "\\", "P", "x", "\n", "A", "99", "?", "\x9b",
                  "\r"]
        allowed = re.compile("\x1b\\[[0-9;:]*m|\x1b\\[[0-9]{0,2}[ABCDGK]|\x1b\\[[0-2]?J|"
                             "\x1b\\]8;[^\x07\x1b]*(\x07|\x1b\\\\)")
        for _ in range(2000):
            gate = EscapeFilter()
            shown = "".join(gate.feed("".join(random_source.choices(pieces, k=8))) for _ in range(4))
            self.assertNotRegex(allowed.sub("", shown), "[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]")

    def test_an_unfinished_escape_does_not_grow(self):
        gate = EscapeFilter()
        self.assertEqual(gate.feed("\x1b]52;c;"), "")
        for _ in range(100):
            self.assertEqual(gate.feed("A" * 10_000), "")
        self.assertEqual(gate.feed("\x07after"), "after")
        gate = EscapeFilter()
        for _ in range(100):
            gate.feed("\x1b[" + "1;" * 5_000)
        self.assertLess(len(gate._pending), 5_000)

    def test_without_colours_nothing_is_left(self):
        self.assertEqual(without_escapes("\x1b[31mred\x1b[0m\x1b[A\x1b]8;;http://x/\x07y"), "redy")


class TextForAScreen(unittest.TestCase):

    def test_a_bundle_is_shown_by_its_plain_text(self):
        self.assertEqual(text_of({"text/plain": "[1]", "text/html": "<b>1</b>"}), "[1]")

    def test_a_nameless_object_is_shown_by_its_other_forms(self):
        nameless = "<IPython.core.display.HTML object>"
        self.assertEqual(text_of({"text/plain": nameless, "text/html": "<p>a <b>b</b></p><p>c</p>"}), "a b\nc")
        self.assertEqual(text_of({"text/plain": nameless, "text/markdown": "# t"}), "# t")
        self.assertEqual(text_of({"text/plain": nameless, "text/latex": "$x$"}), "$x$")
        self.assertEqual(text_of({"text/plain": nameless}), nameless)
        self.assertEqual(text_of({"application/json": {"a": 1}}), '{\n "a": 1\n}')
        self.assertEqual(text_of({}), "")

    def test_html_loses_its_scripts_and_keeps_its_lines(self):
        self.assertEqual(text_of_html("<script>x</script><table><tr><th>a<th>b<tr><td>1<td>2</table>"),
                         "a       b\n1       2")
        self.assertEqual(text_of_html("a<br>b<ul><li>c</ul><pre>d\n e</pre>"), "a\nb\n- c\nd\n e")

    def test_rows_are_counted_as_a_terminal_counts(self):
        for text, rows in (("", 0), ("a", 0), ("a\n", 1), ("a\nb", 1), ("x" * 80, 0), ("x" * 81, 1),
                           ("x" * 81 + "\n", 2),
                           ("日" * 41 + "\n", 2), ("\x1b[31m" + "x" * 80 + "\x1b[0m\n", 1), ("abc\rd\n", 1),
                           ("x" * 81 + "\r" + "x" * 81, 2), ("x" * 79 + "\t\tx", 0)):
            with self.subTest(text=text):
                self.assertEqual(rows_below(text, 80), rows)
        self.assertEqual(rows_below("日" * 7, 7), 2)        # each row has room for three, and a half
        self.assertIsNone(rows_below("a\x1b[2Ab", 80))

    def test_a_line_that_overwrites_itself_is_its_last_state(self):
        self.assertEqual(last_state("1%\r2%\r"), "2%")
        lines = Lines()
        self.assertEqual(lines.feed("a\nprog 1"), ["a"])
        self.assertEqual(lines.feed("\rprog 2"), [])
        self.assertEqual(lines.feed("\rprog 3\r\nnext"), ["prog 3"])
        self.assertEqual(lines.flush(), ["next"])

    def test_a_tail_counts_what_it_does_not_keep(self):
        tail = Tail(2)
        tail.feed("1\n2\n3\n")
        tail.feed("4")
        self.assertEqual(tail.take(), (2, "3\n4"))

    def test_images_that_are_broken_are_seen_to_be(self):
        png = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAA"
                               "AABJRU5ErkJggg==")
        encode = lambda content: {"image/png": base64.b64encode(content).decode()}
        self.assertEqual(image_in(encode(png)), ("image/png", png))
        for broken in (encode(png[:30]), encode(b""), {"image/png": "?"}, {"image/png": None}, {"image/png": 5}):
            with self.subTest(broken=broken):
                self.assertEqual(image_in(broken), ("image/png", None))
        self.assertIsNone(image_in({"text/plain": "x"}))

    def test_image_protocols_are_used_where_the_terminal_says_so(self):
        self.assertEqual(image_protocol({"TERM": "xterm-kitty"}), "kitty")
        self.assertEqual(image_protocol({"TERM_PROGRAM": "iTerm.app"}), "iterm2")
        self.assertIsNone(image_protocol({"TERM": "xterm-kitty", "TMUX": "x"}))
        self.assertIsNone(image_protocol({"TERM": "xterm-256color"}))


class CellsOfAFile(unittest.TestCase):

    def test_a_value_ends_a_cell(self):
        self.assertEqual(split_cells("import os\nx = 1\nx\ndef f():\n    return 3\nf()\n"),
                         ["import os\nx = 1\nx", "def f():\n    return 3\nf()\n"])

    def test_decorators_stay_with_what_they_decorate(self):
        self.assertEqual(split_cells("1\n@f\n@g\ndef h(): pass\n2\n"), ["1", "@f\n@g\ndef h(): pass\n2\n"])

    def test_statements_of_one_line_stay_together(self):
        self.assertEqual(split_cells("a; b\nc\n"), ["a; b", "c\n"])

    def test_no_line_is_lost(self):
        source = "# first\n'''doc'''\n\nx = (1,\n 2)\nx; y = 3\nif x:\n    %time y\n!ls\n"
        source += "z = '''\n%not magic\n'''\nz\n# last\n"
        self.assertEqual("\n".join(split_cells(source)), source)

    def test_what_cannot_be_parsed_is_one_cell(self):
        self.assertEqual(split_cells("1\nx = (\n2\n"), ["1\nx = (\n2\n"])
        self.assertEqual(split_cells("%%bash\necho 1\n"), ["%%bash\necho 1\n"])
        self.assertEqual(split_cells("\n\n"), [])


class IsItComplete(unittest.TestCase):

    def test_as_at_pythons_own_prompt(self):
        for source, status, indent in (
                ("1", "complete", ""), ("a = 1\nb = 2", "complete", ""), ("f(1,\n  2)", "complete", ""),
                ("def f(x):", "incomplete", "    "), ("def f(x):\n    return 1", "incomplete", ""),
                ("def f(x):\n    y = 1", "incomplete", "    "), ("def f(x):\n    y = 1\n", "complete", ""),
                ("if x:\n    pass\nelse:", "incomplete", "    "), ("x = (", "incomplete", ""),
                ("'''a", "incomplete", ""), ("x = 'a", "invalid", ""), ("x = = 2", "invalid", ""),
                ("%time f()", "complete", ""), ("!ls", "complete", ""), ("len?", "complete", ""),
                ("for i in x:\n    %time f()", "incomplete", "    "), ("%%bash\nls", "incomplete", ""),
                ("%%bash\nls\n", "incomplete", ""),
                ("%%bash\nls\n\n", "complete", ""), ("await f()", "complete", ""), ("a = 1\\", "incomplete", "")):
            with self.subTest(source=source):
                self.assertEqual(check_complete(source), (status, indent))


class ThePainter(unittest.TestCase):
    """Messages to text, without a terminal."""

    def setUp(self):
        self.painter = Painter(False, lambda: (80, 24))

    def say(self, msg_type, who=None, session="s", **content):
        message = Message({"msg_type": msg_type}, {"session": session, "msg_id": session}, {}, content, [], [], b"")
        self.painter.show([(message, who)])
        return self.painter.take()

    def stream(self, text, who=None, **more):
        return self.say("stream", who, name="stdout", text=text, **more)

    def test_our_cell_writes_as_it_likes(self):
        self.assertEqual(self.stream("1%\r2%"), "1%\r2%")
        self.assertEqual(self.say("execute_result", execution_count=1, data={"text/plain": "5"}), "\nOut[1]: 5\n")

    def test_beside_a_prompt_only_whole_lines_are_shown(self):
        self.painter.is_prompt_up = True
        self.assertEqual(self.stream("late"), "")
        self.assertEqual(self.stream(" text\nhalf"), "late text\n")
        self.painter.flush_old_lines()
        self.assertEqual(self.painter.take(), "")
        self.painter.flush_old_lines()
        self.assertEqual(self.painter.take(), "half\n")

    def test_others_have_their_name_in_front(self):
        self.assertEqual(self.say("execute_input", "bob", execution_count=3, code="a\nb"),
                         "bob In [3]: a\n       ...: b\n")
        self.assertEqual(self.stream("1\n2\n3", "bob"), "bob | 1\nbob | 2\n")
        self.assertEqual(self.say("execute_result", "bob", execution_count=3, data={"text/plain": "5"}),
                         "bob | 3\nbob | Out[3]: 5\n")

    def test_a_name_cannot_paint_the_screen(self):
        self.assertEqual(self.stream("x\n", "\x1b[2Jmallory\n" + "y" * 100), "[2Jmallory" + "y" * 22 + " | x\n")

    def test_others_cannot_move_the_cursor(self):
        self.assertEqual(self.stream("a\x1b[3A\x1b[Kb\n", "bob"), "bob | ab\x1b[0m\n".replace("\x1b[0m", ""))

    def test_other_output_can_be_left_out(self):
        self.painter.others = "inputs"
        self.assertEqual(self.stream("x\n", "bob"), "")
        self.assertIn("bob In [1]: x", self.say("execute_input", "bob", execution_count=1, code="x"))
        self.painter.others = "off"
        self.assertEqual(self.say("execute_input", "bob", execution_count=1, code="x"), "")

    def test_clear_output_redraws_in_place(self):
        self.painter.begin_cell()
        self.stream("step 1\nmore\n")
        self.assertEqual(self.say("clear_output", wait=True), "")
        self.assertEqual(self.stream("step 2\n"), "\r\x1b[2A\x1b[Jstep 2\n")

    def test_what_is_higher_than_the_screen_is_not_redrawn(self):
        self.painter.begin_cell()
        self.stream("x\n" * 30)
        self.say("clear_output", wait=True)
        self.assertEqual(self.stream("y\n"), "y\n")

    def test_a_display_is_updated_in_place_while_it_is_the_last_thing(self):
        self.painter.begin_cell()
        content = {"data": {"text/plain": "1"}, "transient": {"display_id": "d"}}
        self.assertEqual(self.say("display_data", **content), "1\n")
        content["data"] = {"text/plain": "2"}
        self.assertEqual(self.say("update_display_data", **content), "\r\x1b[1A\x1b[J2\n")
        self.stream("x\n")
        self.assertEqual(self.say("update_display_data", **content), "2 (updated)\n")

    def test_a_flood_loses_its_middle_and_says_so(self):
        text = self.stream("".join(f"{i}\n" for i in range(300_000)))
        self.assertLess(len(text), 10_000)
        self.assertTrue(text.startswith("0\n1\n") and text.endswith("299998\n299999\n"))
        self.assertRegex(text, r"\n\.\.\. [0-9,]+ lines not shown\n")

    def test_a_line_without_end_is_cut_with_a_note(self):
        shown = sum(len(self.stream("x" * 300_000)) for _ in range(10))
        self.assertEqual(shown, 1 << 20)
        self.painter.end_cell()
        self.assertIn("(output cut at 1 MB; %s characters not shown)" % format(3_000_000 - (1 << 20), ","),
                      self.painter.take())
        self.painter.begin_cell()
        self.assertEqual(self.stream("fresh\n"), "fresh\n")

    def test_after_ctrl_c_what_was_on_its_way_is_counted(self):
        self.painter.begin_cell()
        self.painter.is_muffled = True
        self.assertEqual(self.stream("".join(f"{i}\n" for i in range(1000))), "")
        text = self.say("error", ename="KeyboardInterrupt", evalue="", traceback=["KeyboardInterrupt"])
        self.assertEqual(text.splitlines()[0], "... 901 lines not shown")
        self.assertEqual(text.splitlines()[-2:], ["999", "KeyboardInterrupt"])

    def test_an_image_is_drawn_where_the_terminal_can(self):
        png = (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(4000) + b"IEND" + bytes(4))
        data = {"image/png": base64.b64encode(png).decode(), "text/plain": "<Figure>"}
        for protocol, begin in (("kitty", "\x1b_Ga=T,f=100,m=1;"), ("iterm2", "\x1b]1337;File=inline=1;size=4024:")):
            with self.subTest(protocol=protocol):
                self.painter.images = protocol
                self.assertTrue(self.say("display_data", data=data).startswith(begin))

    def test_messages_of_any_shape_are_survived(self):
        for msg_type in ("stream", "display_data", "execute_result", "error", "update_display_data", "execute_input",
                         "clear_output", "status", "comm_msg", "no_such"):
            for content in ({}, {"data": None}, {"data": {"text/plain": None}}, {"text": None}, {"traceback": 5},
                            {"transient": 5, "data": {}}, {"data": {"image/png": {}}}):
                for who in (None, "bob"):
                    with self.subTest(msg_type=msg_type, content=content, who=who):
                        self.say(msg_type, who, **content)


if __name__ == "__main__":
    unittest.main()
