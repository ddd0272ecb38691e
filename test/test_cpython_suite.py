# Distributed under the terms of the BSD 3-Clause License.
"""CPython's own tests, run in a cell, do what they do in plain `python`: test for test.

They are the broadest sample there is of code that starts loops, threads and children, replaces the standard
streams and sets signal handlers. The same few lines run in a cell and under `python -c`; the names of the
tests and their outcomes are compared. The kernel runs in a folder of its own: this repository has a package
called `test`, too.
"""
import importlib.util
import json
import os
import subprocess
import sys
import unittest

from . import support

# Loads and runs tests by name, writes {name: outcome} to a file. Output of the tests themselves is theirs.
RUN = """
import io, json, unittest

class Outcomes(unittest.TextTestResult):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.outcomes = {}
    def addSuccess(self, test):
        self.outcomes.setdefault(test.id(), "ok")
    def addError(self, test, error):
        self.outcomes[test.id()] = "error " + error[0].__name__
        super().addError(test, error)
    def addFailure(self, test, error):
        self.outcomes[test.id()] = "failure"
        super().addFailure(test, error)
    def addSkip(self, test, reason):
        self.outcomes[test.id()] = "skipped: " + reason
    def addExpectedFailure(self, test, error):
        self.outcomes[test.id()] = "expected failure"
    def addUnexpectedSuccess(self, test):
        self.outcomes[test.id()] = "unexpected success"
    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error is not None:
            self.outcomes[test.id()] = "failure"

def run(names, path):
    suite = unittest.defaultTestLoader.loadTestsFromNames(names)
    report = io.StringIO()
    result = unittest.TextTestRunner(report, resultclass=Outcomes).run(suite)
    with open(path, "w") as file:
        json.dump([result.outcomes, report.getvalue()], file)
"""

# Names for the suite, whole modules for the long campaigns.
MODULES = {
    "json": (["test.test_json"], ["test.test_json"]),
    "heapq": (["test.test_heapq"], ["test.test_heapq"]),
    "asyncio": (["test.test_asyncio.test_runners"],
                [f"test.test_asyncio.test_{name}" for name in ("runners", "tasks", "subprocess")]),
    "threading": (["test.test_threading.ThreadTests",
                   "test.test_threading.LocalTests", "test.test_threading.InterruptMainTests",
                   "test.test_threading.EventTests", "test.test_threading.ConditionTests",
                   "test.test_threading.TimerTests"], ["test.test_threading"]),
    "subprocess": (["test.test_subprocess.POSIXProcessTestCase", "test.test_subprocess.RunFuncTestCase",
                    "test.test_subprocess.MiscTests"], ["test.test_subprocess"]),
}


def has_cpythons_tests(name):
    """In a fresh interpreter in another folder: here, `test` is ours."""
    return subprocess.run([sys.executable, "-c", f"import {name}"], cwd="/", stderr=subprocess.DEVNULL,
                          env={**os.environ, "PYTHONPATH": ""}).returncode == 0


@unittest.skipUnless(has_cpythons_tests("test.test_json"), "this interpreter came without its own tests")
class InACell(unittest.TestCase):
    maxDiff = 4000
    DEADLINE = support.rounds(120, 900)

    def start_in_python(self, names):
        """Start the tests in plain python; the function returned waits for their outcomes."""
        home = support.Home(self)
        path = os.path.join(home.path, "outcomes.json")
        code = RUN + f"\nrun({names!r}, {path!r})"
        process = support.Process(self, [sys.executable, "-c", code], home=home)

        def outcomes():
            process.wait(self.DEADLINE)
            return self.read(path, process.log)
        return outcomes

    def outcomes_in_a_cell(self, names, command=None):
        kernel = support.start_kernel(self, command=command)
        client = kernel.client()
        path = os.path.join(kernel.home.path, "outcomes.json")
        client.execute(RUN, silent=True)
        self.result = client.execute(f"run({names!r}, {path!r})", deadline=self.DEADLINE)
        outcomes = self.read(path, lambda: f"{self.result}\n{kernel.log()}")
        self.assertEqual(client.execute("1+1").value, "2")      # and the kernel is none the worse
        return outcomes

    def read(self, path, what):
        if not os.path.exists(path):
            self.fail(f"the tests did not come to their end: {what()}")
        with open(path) as file:
            outcomes, self.report = json.load(file)
        self.assertGreater(len(outcomes), 0, self.report)
        return outcomes

    def same(self, name):
        names = support.rounds(*MODULES[name])
        different, count = self.differences(names)
        if different:
            # Some of them wait for time, and a busy machine may take it: once more, those alone.
            different, _ = self.differences(sorted(different))
        self.assertEqual(different, {}, "(in python, in a cell)\n" + self.report[-6000:])
        if support.IS_SOAK:
            print(f"{', '.join(names)}: {count} tests, the same in a cell")

    def differences(self, names):
        plain = self.start_in_python(names)     # both at once: they wait for time more than they compute
        in_a_cell, report = self.outcomes_in_a_cell(names), self.report
        plain = plain()
        self.report = report
        return {test: (plain.get(test), in_a_cell.get(test)) for test in {*plain, *in_a_cell}
                if plain.get(test) != in_a_cell.get(test)}, len(plain)

    def test_json(self):
        self.same("json")

    def test_heapq(self):
        self.same("heapq")

    def test_asyncio_runners(self):
        self.same("asyncio")

    def test_threading(self):
        self.same("threading")

    def test_subprocess(self):
        self.same("subprocess")

    @unittest.skipUnless(importlib.util.find_spec("ipykernel"), "ipykernel is not installed")
    def test_a_kernel_with_a_loop_under_the_users_code_fails_those_of_asyncio(self):
        """Shows that these tests can fail, and why the main thread here belongs to the user's code."""
        outcomes = self.outcomes_in_a_cell(["test.test_asyncio.test_runners"],
                                           f"{sys.executable} -m ipykernel_launcher -f {{connection_file}}")
        failed = [name for name, outcome in outcomes.items() if outcome.startswith(("error", "failure"))]
        self.assertGreater(len(failed), len(outcomes) / 2)
        self.assertIn("cannot be called from a running event loop", self.report)


if __name__ == "__main__":
    unittest.main()
