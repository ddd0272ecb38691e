# Distributed under the terms of the BSD 3-Clause License.
"""The whole suite, module by module in processes of their own, a few at a time: `python -m test`.

    python -m test                          every test/test_*.py
    python -m test test_session             some of them
    python -m test test_session.Signature   a class or a test, named as unittest names it

A module in a process of its own cannot leave anything to the next one, and two at a time keep two cores
busy while kernels start. Inside, it is unittest; `python -m unittest` runs the same tests in one process.
The last line is the sum of what unittest counted: `N passed, N failed, N skipped`.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
MODULE_SECONDS = 900        # a module that takes longer hangs: its tests have deadlines of their own


def main():
    parser = argparse.ArgumentParser(prog="python -m test", description="Run the test suite.")
    parser.add_argument("names", nargs="*", help="test_<module>[.<Class>[.<test>]]; all modules without any")
    # Four at most: more kernels at once than cores, and the tests measure the machine.
    parser.add_argument("-j", "--jobs", type=int, default=max(2, min(4, os.cpu_count() or 2)))
    parser.add_argument("--result", help=argparse.SUPPRESS)     # we are one of the processes
    arguments = parser.parse_args()
    if arguments.result:
        return run_here(arguments.names, arguments.result)

    # Started in the background or by nohup we inherit that these are ignored, and so would every process of
    # every test; what they do is what is tested.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    # The longest files first, as the likely longest runs: nobody waits for one of them alone at the end.
    modules = sorted((name for name in os.listdir(HERE) if name.startswith("test_") and name.endswith(".py")),
                     key=lambda name: -os.path.getsize(os.path.join(HERE, name)))
    names = arguments.names or [name[:-3] for name in modules]
    started = time.monotonic()
    failed, total = [], {"passed": 0, "failed": 0, "skipped": []}
    screen = threading.Lock()

    def run(name):
        counts, text, seconds = run_apart(name)
        with screen:        # one module's lines together
            print(f"{name:32} {len(counts['failed']):3} failed {counts['passed']:4} passed "
                  f"{len(counts['skipped']):3} skipped  {seconds:6.1f} s", flush=True)
            if counts["failed"]:
                print(text, flush=True)
            failed.extend(f"{name}: {test}" for test in counts["failed"])
            total["passed"] += counts["passed"]
            total["skipped"] += [f"{test}: {reason}" for test, reason in counts["skipped"]]

    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            list(pool.map(run, names))
        except KeyboardInterrupt:       # the terminal told the processes as well; those still to come are not wanted
            pool.shutdown(cancel_futures=True)
            return 130
    for heading, lines in (("skipped", total["skipped"]), ("failed", failed)):
        if lines:
            print(f"\n{heading}:", *sorted(lines), sep="\n  ")
    print(f"\n{len(names)} modules in {time.monotonic() - started:.0f} s")
    print(f"{total['passed']} passed, {len(failed)} failed, {len(total['skipped'])} skipped")
    return 1 if failed or not total["passed"] else 0


def run_apart(name):
    """One module in its own process: what it counted, what it wrote, how long it took."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="twoproc-test-") as folder:
        path = os.path.join(folder, "result")
        with open(os.path.join(folder, "output"), "w+b") as output:
            process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "test", "--result", path, name],
                cwd=os.path.dirname(HERE), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            try:
                status = process.wait(MODULE_SECONDS)
                ending = f"ended with status {status}"
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)     # faulthandler then writes where it hung
                process.wait()
                ending = f"killed after {MODULE_SECONDS} s"
            output.seek(0)
            text = output.read().decode(errors="replace")
        try:
            with open(path) as file:
                counts = json.load(file)
        except (OSError, ValueError):
            counts = {"passed": 0, "failed": [f"the module did not come to its end: {ending}"], "skipped": []}
    return counts, text, time.monotonic() - started


# -- inside such a process

class Result(unittest.TextTestResult):
    """Counts tests, not events: a test whose three subtests fail is one failed test."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1

    def addExpectedFailure(self, test, error):
        super().addExpectedFailure(test, error)
        self.passed += 1

    def counts(self):
        failed = [getattr(test, "test_case", test) for test, _ in self.failures + self.errors]
        names = dict.fromkeys(test.id() for test in failed + self.unexpectedSuccesses)
        skipped = [(test.id(), reason) for test, reason in self.skipped]
        return {"passed": self.passed, "failed": list(names), "skipped": skipped}


def run_here(names, path):
    suite = unittest.defaultTestLoader.loadTestsFromNames([f"test.{name}" for name in names])
    result = unittest.TextTestRunner(verbosity=2, resultclass=Result).run(suite)
    with open(path + ".part", "w") as file:
        json.dump(result.counts(), file)
    os.replace(path + ".part", path)
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
