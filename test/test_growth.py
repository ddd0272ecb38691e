# Distributed under the terms of the BSD 3-Clause License.
"""A long session costs what a short one does: no thread, no descriptor, and no time is added by a cell."""
import os
import statistics
import time
import unittest

from . import support

# One of each kind, in turn: what a session does again and again.
CELLS = [
    "x = 1", "x + 1", "print('line')", "import os; os.getpid()", "1 / 0",
    "import threading; t = threading.Thread(target=print, args=('t',)); t.start(); t.join()",
    "from IPython.display import display, HTML; display(HTML('<b>x</b>'))",
    "import asyncio; await asyncio.sleep(0)", "import os; os.write(1, b'raw\\n')", "def f(n):\n    return n\nf(3)",
]
# A child costs a hundred times as much as the others: seldomer, so that it does not hide them.
CHILD = "import subprocess; subprocess.run(['true']).returncode"


class Growth(support.KernelCase):
    def run_cell(self, number):
        code = CHILD if number % 100 == 99 else CELLS[number % len(CELLS)]
        started = time.perf_counter()
        result = self.client.execute(code)
        seconds = time.perf_counter() - started
        self.assertEqual(result.status, "error" if code == "1 / 0" else "ok", result)
        return seconds

    def test_a_long_session_adds_no_threads_and_no_descriptors(self):
        for number in range(100):
            self.run_cell(number)
        self.client.request("shell", "history_request", {"hist_access_type": "tail", "n": 1})   # its file is open now
        threads, descriptors, memory = self.kernel.threads(), self.kernel.descriptors(), self.kernel.memory()
        count = support.rounds(1000, 10_000)
        seconds = [self.run_cell(number) for number in range(count)]
        support.wait_until(lambda: self.kernel.descriptors() <= descriptors, what="descriptors to be closed")
        # One that was joined is there for a moment longer.
        support.wait_until(lambda: self.kernel.threads() == threads, what=lambda: f"{threads} threads again, of "
                           f"{self.kernel.threads()}")
        grown = self.kernel.memory() - memory
        # In, Out and the history of IPython itself: about a kilobyte a cell.
        self.assertLess(grown, (4 << 20) + 3072 * count)
        self.assertEqual(self.client.execute("1 + 1").value, "2")
        if support.IS_SOAK:
            first, last = seconds[:count // 10], seconds[-count // 10:]
            drift = statistics.median(last) / statistics.median(first)
            print(f"{count} cells: median {1000 * statistics.median(first):.2f} ms in the first tenth, "
                  f"{1000 * statistics.median(last):.2f} ms in the last (x{drift:.2f}); {grown >> 10} kB more")
            self.assertLess(drift, 1.3)

    def test_much_output_leaves_no_memory_behind(self):
        code = "for i in range(20_000): print('x' * 100)"
        self.client.execute(code)
        before = self.kernel.memory()
        for _ in range(support.rounds(5, 100)):
            self.assertEqual(len(self.client.execute(code, deadline=60).text()), 20_000 * 101)
        self.assertLess(self.kernel.memory() - before, 20 << 20)

    def test_idle_it_does_nothing(self):
        self.client.execute("1")
        # History is written a second after the last cell; then nothing is left to do.
        self.settle()
        switches = []       # the best of three: a process that is stopped and goes on has each thread look once
        while not switches or min(switches) > 2 and len(switches) < 3:
            before = self.switches()
            self.client.is_silent("iopub", support.rounds(2, 60))
            switches.append(self.switches() - before)
        self.assertLessEqual(min(switches), 2, switches)

    def settle(self):
        def is_still():
            before = self.switches()
            self.client.is_silent("iopub", 2)
            return self.switches() == before
        support.wait_until(is_still, 60, "an idle kernel to be still")

    def switches(self):
        """How often any thread of the kernel was woken, so far."""
        total = 0
        for task in os.listdir(f"/proc/{self.kernel.pid}/task"):
            with open(f"/proc/{self.kernel.pid}/task/{task}/status") as file:
                total += sum(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt_switches"))
        return total


if __name__ == "__main__":
    unittest.main()
