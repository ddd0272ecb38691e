# Distributed under the terms of the BSD 3-Clause License.
"""Who is there: `python -m twoproc.frontend --list`, with kernels that live, hang, hide and have died."""
import glob
import importlib.util
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import unittest

from twoproc import connection

from . import support, vt
from .lab import Lab

try:
    import jupyter_client
except ImportError:
    jupyter_client = None

NO_LOG = ("--set", "recovery.log=no")
SPIN_IN_C = "sum(range(10**12))"      # one call, and no other thread of the kernel runs meanwhile


class Listing(unittest.TestCase):
    """A home without kernels, whose Jupyter folder is another one than ours."""

    def setUp(self):
        self.home = support.Home(self)
        self.jupyter = os.path.join(self.home.path, "jupyter-run")
        os.mkdir(self.jupyter, 0o700)
        self.home.env["JUPYTER_RUNTIME_DIR"] = self.jupyter

    def kernel(self, name, *arguments, cwd=None):
        """A kernel of that name, as `python -m twoproc.kernel --name` starts it."""
        kernel = support.Kernel(self, "--name", name, *NO_LOG, *arguments, home=self.home, cwd=cwd,
                                command=f"{sys.executable} -m twoproc.kernel")
        kernel.connection_file = os.path.join(self.home.run, "kernels", name + ".json")
        kernel.wait_file()
        return kernel

    def list(self, *arguments, status=0):
        done = subprocess.run([sys.executable, "-m", "twoproc.frontend", "--list", *arguments], env=self.home.env,
                              cwd=self.home.work, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=support.DEADLINE)
        self.assertEqual((done.returncode, done.stderr), (status, ""))
        return done.stdout

    def found(self):
        """What a program is told: name -> members."""
        return {kernel["name"]: kernel for kernel in map(json.loads, self.list("--json").splitlines())}

    def wait_found(self, predicate):
        """Look until it is so; for what the kernel is told a moment later, as that a client has gone."""
        return support.wait_until(lambda: (found := self.found()) and predicate(found) and found,
                                  what=lambda: f"what was looked for: {self.found()}")

    def wait_awake(self):
        """Look until all have answered: a kernel has a second for it, and this machine may be busy for longer."""
        return self.wait_found(lambda found: all(kernel["execution_state"] != "silent" for kernel in found.values()))

    def wait_listed(self, pattern):
        support.wait_until(lambda: re.search(pattern, self.list()), what=lambda: f"{pattern} in\n{self.list()}")


class WhoIsThere(Listing):

    def test_a_file_of_jupyters_with_an_address_that_is_none_hides_nobody(self):
        self.kernel("lab")
        members = {channel + "_port": number for number, channel in enumerate(support.CHANNELS, 5001)}
        with open(os.path.join(self.jupyter, "kernel-odd.json"), "w") as file:
            json.dump({"transport": "tcp", "ip": "_none", "key": "k", "signature_scheme": "hmac-sha256", **members},
                      file)
        os.chmod(file.name, 0o600)
        self.assertEqual(list(self.wait_awake()), ["lab"])

    def test_each_kernel_is_a_line_that_says_who_where_and_what(self):
        folder = os.path.join(self.home.work, "pro ject")
        os.mkdir(folder)
        before = time.time()
        lab, other = self.kernel("lab", cwd=folder), self.kernel("otter-3")
        client = lab.client()
        client.execute("first = 1")
        client.execute("'the\\nlast'\nof = 2")
        members = self.wait_awake()
        self.assertEqual(set(members), {"lab", "otter-3"})
        known = members["lab"]
        self.assertEqual((known["pid"], known["cwd"], known["execution_state"], known["clients"], known["last_input"],
                          known["execution_count"], known["kind"], known["heartbeat"], known["listen"]),
                         (lab.pid, folder, "idle", 1, "'the\\nlast'...", 3, "twoproc", True, ""))
        self.assertTrue(before - 1 < known["started"] < time.time(), known)
        self.assertEqual((members["otter-3"]["pid"], members["otter-3"]["last_input"]), (other.pid, ""))
        self.wait_listed(r"(?m)^lab +pid %d +since \d{4}-\d\d-\d\d \d\d:\d\d  idle   1 client  "
                         r"~/\w+/pro ject  last: 'the\\nlast'\.\.\.$" % lab.pid)

    def test_a_cell_that_runs_is_busy_and_its_code_the_last_input(self):
        kernel = self.kernel("lab")
        client = kernel.client()
        client.wait_running(client.send_execute("import time; time.sleep(60)"))
        known = self.wait_awake()["lab"]
        self.assertEqual((known["execution_state"], known["last_input"], known["execution_count"]),
                         ("busy", "import time; time.sleep(60)", 2))

    def test_nothing_of_private_silent_and_unstored_cells_is_shown(self):
        client = self.kernel("lab").client()
        client.execute("shown = 1")
        client.execute("%%private\nhidden = 1")
        client.execute("hidden = 2", silent=True)
        client.execute("hidden = 3", store_history=False)
        self.assertEqual(self.wait_awake()["lab"]["last_input"], "shown = 1")

    def test_a_terminal_obeys_nothing_of_it(self):
        folder = os.path.join(self.home.work, "a\x1b]0;TITLE\x07b\rc\nd\u202e")
        os.mkdir(folder)
        kernel = self.kernel("lab", cwd=folder)
        kernel.client().execute("x = '\x1b]52;c;eA==\x07\x9b2J' #" + 100 * "y")
        text = support.wait_until(lambda: "silent" not in (text := self.list()) and text)
        self.assertEqual(text.count("\n"), 1)
        self.assertTrue(text[:-1].isprintable(), text)
        self.assertIn("/a ]0;TITLE b c d ", text)
        self.assertLess(len(text), 300)

    def test_a_look_is_no_visit(self):
        """To the other clients of a kernel nobody came: else a terminal would leave it alone instead of ending it."""
        client = self.kernel("lab").client()
        client.drain()
        self.assertEqual(self.wait_awake()["lab"]["clients"], 1)
        self.assertEqual(client.execute("1").types, ["status", "execute_input", "execute_result", "status"])
        self.assertEqual([message.msg_type for message in client.inbox["iopub"]], [])

    def test_messages_that_are_signed_with_another_key_are_counted(self):
        kernel = self.kernel("lab")
        self.wait_awake()
        self.assertNotIn("refused", self.list())
        stranger = kernel.client(ready=False, key=b"guessed")
        for _ in range(3):
            stranger.send_execute("1")
        self.wait_found(lambda found: found["lab"]["refused"] == 3)
        self.wait_listed("  refused 3 messages")

    def test_the_terminal_lists_them_too_and_marks_its_own(self):
        self.kernel("lab")
        terminal = vt.Terminal(self, [sys.executable, "-m", "twoproc.frontend", "--quiet", "--existing", "lab"],
                               self.home, {"USER": "alice"}, 110, 30)
        terminal.prompt(1)
        terminal.send(":kernels\r")
        terminal.wait(lambda lines: any(
            line.startswith("lab ") and "(this one)  idle   1 client  ~/work" in line for line in lines))

    def test_one_that_listens_is_listed_with_its_address_also_when_it_is_silent(self):
        lab = self.kernel("lab", *Lab(self, {"alice": "run"}, start=False, home=self.home).arguments)
        address = lab.info["twoproc_listen"]
        self.assertEqual(self.wait_awake()["lab"]["listen"], address)
        self.assertIn(f"  listens at {address}", self.list())
        lab.signal(signal.SIGSTOP)
        self.addCleanup(lab.signal, signal.SIGCONT)
        self.wait_listed(rf"silent .*  listens at {address}\n$")

    def test_no_kernel_is_no_line(self):
        self.assertEqual(self.list(), "")
        self.assertEqual(self.list("--json"), "")


class HangingAndDead(Listing):

    def test_one_that_is_stopped_is_silent_and_nothing_of_it_is_removed(self):
        lab, well = self.kernel("lab"), self.kernel("well")
        lab.signal(signal.SIGSTOP)
        self.addCleanup(lab.signal, signal.SIGCONT)
        files = sorted(os.listdir(os.path.join(self.home.run, "kernels")))
        known = self.wait_found(lambda found: found["lab"]["execution_state"] == "silent"    # signals take time
                                and found["well"]["execution_state"] == "idle")
        self.assertEqual((known["lab"]["heartbeat"], known["lab"]["pid"]), (False, lab.pid))
        self.assertTrue(known["well"]["heartbeat"])
        self.assertRegex(self.list(), r"(?m)^lab +pid %d .* silent \(stopped\)$" % lab.pid)
        self.assertEqual(sorted(os.listdir(os.path.join(self.home.run, "kernels"))), files)
        lab.signal(signal.SIGCONT)
        self.wait_found(lambda found: found["lab"]["execution_state"] == "idle")
        self.assertTrue(well.is_alive)

    def test_one_that_computes_in_c_is_silent_too(self):
        self.kernel("lab").client().send_execute(SPIN_IN_C)        # it may not even get to say that it runs this
        found = self.wait_found(lambda found: found["lab"]["execution_state"] == "silent" and found)
        self.assertTrue(found["lab"]["heartbeat"])      # in C as well, and for newcomers

    def test_thirty_of_which_some_hang_are_answered_in_a_second_and_a_half(self):
        kernels = [self.kernel(f"k-{number}") for number in range(support.rounds(6, 30))]
        for kernel in kernels[::3]:
            kernel.signal(signal.SIGSTOP)
            self.addCleanup(kernel.signal, signal.SIGCONT)
        code = ("import time; from twoproc import discovery; begin = time.monotonic()\n"
                "found = [kernel.members()['execution_state'] for kernel in discovery.look()]\n"
                "print(time.monotonic() - begin, len(found), found.count('silent'))")
        expected = len(kernels), len(kernels[::3])

        def look():
            seconds, *counts = subprocess.run([sys.executable, "-c", code], env=self.home.env, capture_output=True,
                                              text=True, timeout=support.DEADLINE, check=True).stdout.split()
            return float(seconds), tuple(map(int, counts))
        # On a busy machine one that is well may take longer than its second, too.
        looks = [look()]
        while looks[-1][1] != expected and len(looks) < 3:
            looks.append(look())
        self.assertEqual(looks[-1][1], expected, looks)
        self.assertLess(min(seconds for seconds, _ in looks), support.at_most(1.5))

    def test_what_a_killed_kernel_left_is_gone_after_a_look(self):
        kernel = self.kernel("lab", "--set", "kernel.publish_jupyter=yes")
        copy = os.path.join(self.jupyter, "kernel-lab.json")
        support.wait_until(lambda: os.path.exists(copy))
        os.kill(kernel.pid, signal.SIGKILL)
        kernel.wait()
        self.assertTrue(os.path.exists(copy))
        self.assertEqual(self.list(), "")
        self.assertEqual(os.listdir(os.path.join(self.home.run, "kernels")), [])
        self.assertFalse(os.path.exists(copy))

    def test_a_copy_whose_original_went_with_the_runtime_folder_is_removed_too(self):
        """As at a logout, which empties the runtime folder but not Jupyter's."""
        kernel = self.kernel("lab", "--set", "kernel.publish_jupyter=yes")
        copy = os.path.join(self.jupyter, "kernel-lab.json")
        support.wait_until(lambda: os.path.exists(copy))
        os.kill(kernel.pid, signal.SIGKILL)
        kernel.wait()
        for path in glob.glob(os.path.join(self.home.run, "kernels", "*")):
            os.unlink(path)
        with open(copy) as file:
            members = json.load(file)
        elsewhere = os.path.join(self.jupyter, "kernel-far.json")       # the same folder, mounted by another machine
        with open(os.open(elsewhere, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            json.dump({**members, "twoproc_host": "not-" + members["twoproc_host"]}, file)
        self.assertEqual(self.list(), "")
        self.assertEqual(os.listdir(self.jupyter), ["kernel-far.json"])

    def test_a_process_number_that_is_somebody_elses_now_does_not_make_a_kernel_alive(self):
        kernel = self.kernel("lab")
        os.kill(kernel.pid, signal.SIGKILL)
        kernel.wait()
        path = connection.lock_path(kernel.connection_file)
        with open(path, "w") as file:
            file.write(f"{os.getpid()}\n")
        self.assertEqual(self.list(), "")
        self.assertFalse(os.path.exists(path))


class Names(Listing):

    def join(self, *arguments):
        return subprocess.run([sys.executable, "-m", "twoproc.frontend", *arguments, "-c", "1"], env=self.home.env,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=support.DEADLINE)

    def test_the_beginning_of_a_name_is_enough_and_two_of_them_are_named(self):
        self.kernel("lab-one"), self.kernel("lab-two"), self.kernel("otter-3")
        self.assertEqual(self.join("--existing", "ott").stdout, "1\n")
        for name, said in (("lab", "several begin so; there are: lab-one, lab-two"),
                           ("cat", "no such kernel is running; there are: lab-one, lab-two, otter-3")):
            with self.subTest(name=name):
                done = self.join("--existing", name)
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertIn(said, done.stderr)

    def test_a_name_that_is_taken_is_status_3_with_the_process_that_has_it(self):
        kernel = self.kernel("lab")
        for command in ("kernel", "frontend"):
            with self.subTest(command=command):
                done = subprocess.run([sys.executable, "-m", f"twoproc.{command}", "--name", "lab"], env=self.home.env,
                                      stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                      timeout=support.DEADLINE)
                self.assertEqual(done.returncode, 3)
                self.assertIn(f"the name is in use by the kernel with pid {kernel.pid}", done.stderr)
                self.assertEqual(done.stderr.count("\n"), 1)


@unittest.skipIf(jupyter_client is None, "jupyter_client is not installed")
class Jupyter(Listing):

    def test_a_published_kernel_is_found_and_used_by_jupyters_own_client(self):
        kernel = self.kernel("lab", "--set", "kernel.publish_jupyter=yes")
        copy = os.path.join(self.jupyter, "kernel-lab.json")
        support.wait_until(lambda: os.path.exists(copy))
        self.assertEqual(stat.S_IMODE(os.stat(copy).st_mode), 0o600)
        self.assertEqual(jupyter_client.find_connection_file(path=[self.jupyter]), copy)
        client = jupyter_client.BlockingKernelClient(connection_file=copy)
        client.load_connection_file()
        client.start_channels()
        self.addCleanup(client.stop_channels)
        client.wait_for_ready(timeout=support.DEADLINE)
        reply = client.execute_interactive("shared = 5", timeout=support.DEADLINE)
        self.assertEqual(reply["content"]["status"], "ok")
        known = self.wait_awake()
        self.assertEqual(list(known), ["lab"])              # once, not as a copy again
        self.assertEqual(known["lab"]["clients"], 1)
        kernel.client().request("control", "shutdown_request", {"restart": False})
        kernel.wait()
        self.assertEqual(os.listdir(self.jupyter), [])

    def test_a_published_kernel_is_what_jupyters_console_joins(self):
        if importlib.util.find_spec("jupyter_console") is None:
            self.skipTest("jupyter_console is not installed")
        self.kernel("lab", "--set", "kernel.publish_jupyter=yes").client().execute("shared = 5")
        console = vt.Terminal(self, [sys.executable, "-m", "jupyter_console", "--existing"], self.home)
        console.wait(lambda lines: lines[-1].startswith("In ["))
        console.send("shared * 7\r")
        console.wait(lambda lines: any(line.startswith("Out[") and line.endswith(": 35") for line in lines))
        self.assertEqual(self.wait_awake()["lab"]["last_input"], "shared * 7")

    def test_kernels_of_others_are_listed_while_their_heart_beats(self):
        path = os.path.join(self.jupyter, "kernel-theirs.json")
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", path]
        if support.Process(self, [sys.executable, "-c", "import ipykernel"], self.home).wait():
            self.skipTest("ipykernel is not installed")
        theirs = support.Process(self, argv, self.home)
        known = self.wait_found(lambda found: "theirs" in found)["theirs"]
        self.assertEqual((known["kind"], known["execution_state"], known["heartbeat"]), ("jupyter", "unknown", True))
        self.wait_listed(r"^theirs +pid \? .*  of Jupyter: ")
        os.kill(theirs.pid, signal.SIGKILL)
        theirs.wait()
        self.assertEqual(self.list(), "")
        self.assertTrue(os.path.exists(path))       # not ours to remove

    def test_one_of_ours_that_a_manager_started_is_asked_as_ours(self):
        manager = jupyter_client.KernelManager(kernel_name="", transport="tcp", connection_file=os.path.join(
            self.jupyter, "kernel-managed.json"))
        manager.write_connection_file()
        kernel = support.Process(self, [sys.executable, "-m", "twoproc.kernel", "-f", manager.connection_file],
                                 self.home)
        # It answers the heartbeat before it says who it is, while it starts.
        known = self.wait_found(lambda found: found.get("managed", {}).get("kind") == "twoproc")["managed"]
        self.assertEqual((known["pid"], known["cwd"]), (kernel.pid, self.home.work))


if __name__ == "__main__":
    unittest.main()
