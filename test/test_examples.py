# Distributed under the terms of the BSD 3-Clause License.
"""The programs in examples/, run as a reader would run them, and what they print."""
import os
import re
import subprocess
import sys
import unittest

from . import support

FOLDER = os.path.join(support.ROOT, "examples")


def files():
    return sorted(name for name in os.listdir(FOLDER) if name.endswith(".py"))


def text_of(name):
    with open(os.path.join(FOLDER, name), encoding="utf-8") as file:
        return file.read()


class Examples(unittest.TestCase):

    def run_example(self, name, *arguments, home=None, env=None):
        """Run one; its output.  It must end well, and say nothing on stderr."""
        process = support.Process(self, [sys.executable, os.path.join(FOLDER, name), *arguments], home=home, env=env)
        status = process.wait(3 * support.DEADLINE)
        output = process.output()
        self.assertEqual((status, process.log()[len(output):]), (0, ""), process.log())
        return output

    def assert_prints(self, name, *expected):
        """Three times if need be: it has half a second, or two, for what takes this machine longer when it is busy."""
        for _ in range(3):
            lines = self.run_example(name).splitlines()
            if lines == [*expected]:
                return
        self.assertEqual(lines, [*expected])

    def test_run_a_cell(self):
        self.assertEqual(self.run_example("run_a_cell.py").splitlines(), [
            "hello from another process", "-- ok", "Out[2]: 42", "-- ok", "x is still 42", "-- ok",
            "ZeroDivisionError: division by zero", "-- error"])

    def test_many_threads(self):
        self.assert_prints(
            "many_threads.py", "squares: " + " ".join(str(number ** 2) for number in range(20)),
            "while that sleeps: getcwd getcwdb | the cell is done: False", "then: ok")

    def test_watch_a_kernel(self):
        self.assertEqual(self.run_example("watch_a_kernel.py").splitlines(), [
            "ada runs In [1]", *[f"ada's cell prints: step {n}" for n in range(3)], "bob interrupts",
            "ada's cell ends: KeyboardInterrupt", "ada's reply: KeyboardInterrupt"])

    def test_interrupt_and_timeout(self):
        self.assert_prints(
            "interrupt_and_timeout.py", "timeout: no reply to execute_request within 0.5 s",
            "the kernel is alive: True and busy", "the cell ended with KeyboardInterrupt", "x is still 42",
            "kernel died: exit status 3")

    def test_answer_input(self):
        self.assertEqual(self.run_example("answer_input.py").splitlines(), [
            "asked for 'name? '", "hello Ada", "asked for 'password? ', without echo", "6 characters",
            "asked for 'anything else? '", "EOFError", "StdinNotImplementedError"])

    def test_other_kernels(self):
        listed = self.run_example("other_kernels.py")
        self.assertRegex(listed, r"(?m)^python3 +Python 3 \(ipykernel\), interrupted by signal$")
        # PYDEVD_...: ipykernel loads debugpy, which complains on stderr where modules are frozen.
        self.assertEqual(self.run_example("other_kernels.py", "python3", "6 * 7",
                                          env={"PYDEVD_DISABLE_FILE_VALIDATION": "1"}).splitlines()[-1], "42")

    def test_read_a_dead_session(self):
        lines = self.run_example("read_a_dead_session.py").splitlines()
        self.assertEqual(lines[:3], ["kernel died: SIGSEGV", "the session died, in In [3]",
                                     "by SIGSEGV at line 2 of the cell, in ctypes.string_at"])
        self.assertEqual(lines[3:], [
            "In [1]: 'answer = 6 * 7' ok", "In [2]: \"print('the answer is', answer)\" ok",
            "    stream the answer is 42", "In [3]: 'import ctypes\\nctypes.string_at(0)' not ended",
            "in a new kernel: 42"])

    def test_follow_from_the_past(self):
        self.assertEqual(self.run_example("follow_from_the_past.py").splitlines(), [
            "past: an earlier cell and 1 ...", "live: more than four ...", "each number once: True"])

    def test_raw_client(self):
        kernel = support.start_kernel(self)
        lines = self.run_example("raw_client.py", kernel.connection_file, "6 * 7", home=kernel.home).splitlines()
        self.assertEqual([line.split()[0] for line in lines],
                         ["status", "execute_input", "execute_result", "status", "execute_reply"])
        self.assertIn("{'text/plain': '42'}", lines[2])

    def test_the_raw_client_reaches_a_kernel_on_tcp(self):
        kernel = support.start_kernel(self, "--transport", "tcp")
        output = self.run_example("raw_client.py", kernel.connection_file, "print('hello')", home=kernel.home)
        self.assertIn("stream {'name': 'stdout', 'text': 'hello\\n'}", output)


class TheFolder(unittest.TestCase):

    def test_every_example_is_run_by_a_test(self):
        with open(__file__, encoding="utf-8") as file:
            tests = file.read()
        for name in files():
            with self.subTest(name=name):
                self.assertRegex(tests, rf'(run_example|assert_prints)\(\s*"{name}"')

    def test_every_example_has_its_line_in_the_index(self):
        index = text_of("README.md")
        self.assertEqual(sorted(re.findall(r"^\| \[(\w+\.py)\]\(\1\) ", index, re.M)), files())

    def test_an_example_is_short_and_opens_with_its_story(self):
        for name in files():
            with self.subTest(name=name):
                lines = text_of(name).splitlines()
                self.assertLess(len(lines), 40)
                self.assertTrue(lines[0].startswith("# Distributed under"))
                self.assertTrue(lines[1].startswith('"""'))
                self.assertIn(f"    python examples/{name}", text_of(name))

    def test_one_that_needs_arguments_says_which(self):
        done = subprocess.run([sys.executable, os.path.join(FOLDER, "raw_client.py")], capture_output=True, text=True,
                              timeout=support.DEADLINE)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertEqual(done.stderr, "usage: python examples/raw_client.py CONNECTION-FILE CODE\n")

    def test_the_raw_client_needs_nothing_of_ours(self):
        self.assertNotIn("import twoproc", text_of("raw_client.py"))


if __name__ == "__main__":
    unittest.main()
