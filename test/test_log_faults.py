# Distributed under the terms of the BSD 3-Clause License.
"""What happens to the session log of a real kernel when its files, its disk or its process are mistreated.

Whatever it is: cells run on, an interrupt still ends them, at most one warning says that nothing is recorded, no
screen shows a line of our code, and the log goes on as soon as it can.  The same faults, call by call and without
a kernel, are test_crashlog.py's.
"""
import glob
import os
import random
import subprocess
import threading
import time
import unittest
from unittest import mock

from twoproc import crashlog, recovery
from twoproc.sessionlog import SessionLog

from . import support
from .support import wait_until
from .test_session_log import Logged

# Where the log's files are open in the kernel, for cells that are up to no good.
MINE = ("import os\ndef mine():\n    for fd in map(int, os.listdir('/proc/self/fd')):\n        try:\n"
        "            if '/sessions/' in os.readlink('/proc/self/fd/%d' % fd): yield fd\n"
        "        except OSError: pass\n")

# What cells may do: name: (code, code that mends it).
MISCHIEF = {
    "closes the files": (MINE + "for fd in list(mine()): os.close(fd)", ""),
    "puts a file of its own under their numbers": (
        MINE + "own = open('own', 'w+b')\nfor fd in list(mine()): os.dup2(own.fileno(), fd)", "own.close()"),
    "removes the folder": ("import os, shutil; shutil.rmtree(os.environ['TWOPROC_STATE'])", ""),
    "moves the folder": ("import os; os.rename(os.environ['TWOPROC_STATE'], os.environ['TWOPROC_STATE'] + '.old')", ""),
    "puts a link in place of the folder": (
        "import os, shutil; state = os.environ['TWOPROC_STATE']\nshutil.rmtree(state); os.symlink('/tmp', state)",
        "os.unlink(state)"),
    "puts a file in place of the folder": (
        "import os, shutil; state = os.environ['TWOPROC_STATE']\nshutil.rmtree(state); open(state, 'w').close()",
        "os.unlink(state)"),
    "puts a link in place of the log": (
        "import glob, os\nfor log in glob.glob(os.environ['TWOPROC_STATE'] + '/sessions/*.log'):\n"
        "    os.unlink(log); os.symlink('/dev/full', log)", "os.unlink(log)"),
    "puts a pipe in place of the log": (
        "import glob, os\nfor log in glob.glob(os.environ['TWOPROC_STATE'] + '/sessions/*.log'):\n"
        "    os.unlink(log); os.mkfifo(log)", "os.unlink(log)"),
    "opens the folder to everybody and takes the log away": (
        "import glob, os\nfor log in glob.glob(os.environ['TWOPROC_STATE'] + '/sessions/*.log'): os.unlink(log)\n"
        "os.chmod(os.path.dirname(log), 0o777)", "os.chmod(os.path.dirname(log), 0o700)"),
    "empties the log": (
        "import glob, os\nfor log in glob.glob(os.environ['TWOPROC_STATE'] + '/sessions/*.log'): os.truncate(log, 0)",
        ""),
    "allows files of one byte": (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))"),
    "uses all descriptors": (
        "import os, resource; limits = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, limits[0]), limits[1]))\nused = []\ntry:\n"
        "    while True: used.append(os.open('/dev/null', os.O_RDONLY))\nexcept OSError: pass",
        "for fd in used: os.close(fd)\nresource.setrlimit(resource.RLIMIT_NOFILE, limits)"),
    "uses all descriptors and takes the log away": (
        "import os, resource, shutil; limits = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "shutil.rmtree(os.environ['TWOPROC_STATE'])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, limits[0]), limits[1]))\nused = []\ntry:\n"
        "    while True: used.append(os.open('/dev/null', os.O_RDONLY))\nexcept OSError: pass",
        "for fd in used: os.close(fd)\nresource.setrlimit(resource.RLIMIT_NOFILE, limits)"),
    "goes to a folder and removes it": (
        "import os; before = os.getcwd(); os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')", "os.chdir(before)"),
    "gives away all permissions of new files": (
        "import os, shutil; before = os.umask(0); shutil.rmtree(os.environ['TWOPROC_STATE'])", "os.umask(before);"),
    "takes all permissions of new files": (
        "import os, shutil; before = os.umask(0o777); shutil.rmtree(os.environ['TWOPROC_STATE'])",
        "os.umask(before);"),
    "sets the clock back": ("import time; clock = time.time; time.time = lambda: 86400.0", "time.time = clock"),
    "breaks the clock": ("import time; clock = time.time; time.time = lambda: 'noon'", "time.time = clock"),
    "replaces os.write": (
        "import os; write = os.write\ndef full(fd, data): raise OSError(28, 'no space for a test')\nos.write = full",
        "os.write = write"),
    "replaces json.dumps": (
        "import json; dumps = json.dumps; json.dumps = lambda *a, **k: 1 / 0", "json.dumps = dumps"),
    "sets no home": ("import os; home = os.environ.pop('HOME')", "os.environ['HOME'] = home"),
    "takes the settings and the folder away": (
        "import os, shutil; state = os.environ.pop('TWOPROC_STATE'); shutil.rmtree(state)\n"
        "home = os.environ['HOME']; os.environ['HOME'] = '/proc/nowhere'; xdg = os.environ.pop('XDG_STATE_HOME')",
        "os.environ.update(TWOPROC_STATE=state, HOME=home, XDG_STATE_HOME=xdg)"),
    "forks in threads while others print": (
        "import os, threading\ndef fork():\n    for _ in range(5):\n        pid = os.fork()\n"
        "        if not pid: os._exit(0)\n        os.waitpid(pid, 0)\n        print('forked')\n"
        "threads = [threading.Thread(target=fork) for _ in range(8)]\n[thread.start() for thread in threads]\n"
        "print('x' * 100_000)\n[thread.join() for thread in threads]", "del threads"),
    "leaves children that print": (
        "import os, time\nchildren = []\nfor _ in range(4):\n    pid = os.fork()\n    if not pid:\n"
        "        print('child'); time.sleep(60); os._exit(0)\n    children.append(pid)",
        "for pid in children: os.kill(pid, 9), os.waitpid(pid, 0)"),
}


class Mistreated(Logged):

    def setUp(self):
        super().setUp()
        self.told = 0           # warnings seen
        os.mkdir(os.path.join(self.home.path, "state"), 0o700)
        self.home.env["TWOPROC_STATE"] = self.state

    def run_cell(self, client, code, **options):
        """Its result; whatever is said about the log is counted, and must not be a traceback of ours."""
        result = client.execute(code, **options)
        self.told += result.text("stderr").count("the session log cannot be written")
        for text in (result.text("stderr"), *map(repr, result.of_type("error"))):
            self.assertNotIn("twoproc/", text)
        return result

    def assert_interrupted(self, client):
        msg_id = client.send_execute("print('sleeping')\nimport time; time.sleep(60)")
        client.wait_text(msg_id, "sleeping")
        began = time.monotonic()
        client.request("control", "interrupt_request")
        result = client.result(msg_id)
        self.assertEqual(result.reply.content["ename"], "KeyboardInterrupt")
        self.assertLess(time.monotonic() - began, support.at_most(1))
        self.told += result.text("stderr").count("the session log cannot be written")

    def assert_logged(self, client, text):
        """Cells are run until one of them is in the log, with its output and its end; it does not take long."""
        code = f"print({text!r})"

        def is_logged():
            self.assertEqual(self.run_cell(client, code).text(), text + "\n")
            there = crashlog.sessions()
            cells = there[0].cells() if there else []
            return cells and (cells[-1].code, cells[-1].is_ended) == (code, True) and \
                [output["content"].get("text") for output in cells[-1].outputs] == [text + "\n"]
        wait_until(is_logged, support.at_most(5), f"{text!r} in the log")


class ByACell(Mistreated):

    def test_whatever_a_cell_does_to_the_log(self):
        began = time.monotonic()
        kernel, client = self.start()
        self.run_cell(client, "import os; work = os.getcwd()")
        for name, (code, mending) in MISCHIEF.items():
            with self.subTest(name):
                if not kernel.is_alive:
                    kernel, client = self.start()
                self.assertEqual(self.run_cell(client, code).status, "ok")
                self.assertEqual(self.run_cell(client, f"print('during')\n{name!r}").value, repr(name))
                self.run_cell(client, "print('y' * 300_000)")       # beyond the first half: into S.bulk
                self.assert_interrupted(client)
                self.assertEqual(self.run_cell(client, mending or "pass").status, "ok")
                self.assert_logged(client, "after: a cell " + name)
                session = self.session()
                self.assertEqual((session.state(), session.damaged), ("alive", 0))
                for path in glob.glob(os.path.join(self.state, "sessions", "*")):
                    self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        self.assertLessEqual(self.told, 1 + (time.monotonic() - began) // 60)       # one a minute
        self.assertNotIn("Traceback", kernel.log())
        killer = "import os; os._exit(3)"
        client.send_execute(killer)
        kernel.wait()
        self.assertEqual((self.session().state(), self.session().killer.code), ("died", killer))

    def test_the_warning_is_one_and_the_note_says_what_is_missing(self):
        for name in ("puts a link in place of the folder", "allows files of one byte", "replaces os.write"):
            with self.subTest(name):
                code, mending = MISCHIEF[name]
                self.told = 0
                kernel, client = self.start()
                self.run_cell(client, code)
                for number in range(5):
                    self.assertEqual(self.run_cell(client, f"print({number})\n{number}").value, str(number))
                self.assertEqual(self.told, 1)
                # The kernel's own log may be on the disk that is full.
                self.assertEqual(kernel.log().count("the session log cannot be written"), "one byte" not in name)
                self.run_cell(client, mending)
                self.assert_logged(client, "after")
                notes = [record for record in self.session().records() if record["k"] == "note"]
                self.assertEqual([note["what"] for note in notes], ["resumed"])
                self.assertGreaterEqual(notes[0]["lost"], 13)
                client.request("control", "shutdown_request")
                kernel.wait()
                self.assertEqual(self.files(), [])

    def test_a_cell_that_becomes_another_user(self):
        if os.geteuid():
            self.skipTest("only root can")
        kernel, client = self.start()
        self.run_cell(client, "import os; os.setuid(65534)")
        self.assert_logged(client, "as nobody")
        self.assert_interrupted(client)
        self.assertEqual((self.told, self.session().state()), (0, "alive"))

    def test_a_cell_that_closes_every_descriptor_is_named(self):
        """ZeroMQ gives up then, in this kernel as in any other."""
        kernel, client = self.start()
        code = "import os; os.closerange(0, 4096)\nimport time; time.sleep(60)"
        client.send_execute(code)
        kernel.wait()
        self.assertEqual((self.session().state(), self.session().killer.code), ("died", code))
        self.assertTrue(recovery.describe(self.session()))

    def test_one_that_closes_every_descriptor_in_a_child_harms_nobody(self):
        kernel, client = self.start()
        self.run_cell(client, "import os\npid = os.fork()\nif not pid:\n    os.setsid(); os.closerange(0, 4096)\n"
                              "    import time; time.sleep(60); os._exit(0)")
        self.assert_logged(client, "a daemon was made")
        self.run_cell(client, "os.kill(pid, 9); os.waitpid(pid, 0)")


class WithoutAPlace(Mistreated):
    """From the start on there is nowhere to write."""

    def test_the_kernel_starts_serves_and_ends(self):
        blocked = os.path.join(self.home.path, "blocked")
        with open(blocked, "w"):
            pass
        for name, env in {
            "no home": {"TWOPROC_STATE": "", "XDG_STATE_HOME": "", "HOME": "/proc/nowhere"},
            "a relative folder": {"TWOPROC_STATE": "here"},
            "below a file": {"TWOPROC_STATE": os.path.join(blocked, "twoproc")},
            "a file": {"TWOPROC_STATE": blocked},
            "a device": {"TWOPROC_STATE": "/dev/null"},
        }.items():
            with self.subTest(name):
                kernel, client = self.start(env=env)
                self.assertEqual(self.run_cell(client, "1 + 1").value, "2")
                self.assert_interrupted(client)
                self.assertIn("recover", self.run_cell(client, "%recover").text() + "recover")
                self.assertEqual(kernel.log().count("the session log cannot be written"), 1)
                self.assertNotIn("Traceback", kernel.log())
                client.request("control", "shutdown_request")
                self.assertEqual(kernel.wait(), 0)

    def test_a_read_only_folder(self):
        for how in ("chattr", "mode"):
            with self.subTest(how):
                folder = os.path.join(self.state, "sessions")
                os.makedirs(folder, 0o700, exist_ok=True)
                if how == "mode":
                    if not os.geteuid():
                        continue        # root may write anywhere
                    os.chmod(folder, 0o500)
                    self.addCleanup(os.chmod, folder, 0o700)
                elif subprocess.run(["chattr", "+i", folder], stderr=subprocess.DEVNULL).returncode:
                    continue
                else:
                    self.addCleanup(subprocess.run, ["chattr", "-i", folder])
                kernel, client = self.start()
                self.assertEqual(self.run_cell(client, "1 + 1").value, "2")
                self.assertEqual(kernel.log().count("the session log cannot be written"), 1)
                self.doCleanups()


class OnASmallDisk(Mistreated):
    """A file system of its own for the state folder, which fills up."""

    def setUp(self):
        super().setUp()
        os.mkdir(self.state, 0o700)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", self.state],
                          stderr=subprocess.DEVNULL).returncode:
            self.skipTest("this user cannot mount one")
        self.addCleanup(subprocess.run, ["umount", "--lazy", self.state])

    def test_it_fills_up_and_has_room_again(self):
        kernel, client = self.start()
        self.assert_logged(client, "before")
        for size in (60_000, 200_000):      # within the log; into S.bulk
            hog = os.path.join(self.state, "hog")
            self.run_cell(client, f"hog = open({hog!r}, 'wb', 0)\ntry:\n    while True: hog.write(bytes(512))\n"
                                  "except OSError: pass")
            for number in range(5):
                self.assertEqual(self.run_cell(client, f"print('z' * {size})\n{number}").value, str(number))
            self.assert_interrupted(client)
            self.run_cell(client, "import os; hog.close(); os.unlink(hog.name)")
            self.assert_logged(client, f"after {size}")
        self.assertEqual(self.told, 1)
        session = self.session()
        self.assertEqual(session.damaged, 0)
        notes = [record for record in session.records() if record["k"] == "note"]
        self.assertTrue(notes and all(note["what"] == "resumed" and note["lost"] for note in notes), notes)
        kernel.popen.kill()
        kernel.wait()
        self.assertEqual((session.state(), session.killer), ("died", None))


class OnASlowDisk(Logged):
    def test_a_ring_that_turns_while_the_log_is_synced_is_no_trouble(self):
        warnings, print_more = [], iter(range(1, 100))
        log = SessionLog("kernel.json", crashlog.Limits(per_cell=100, backlog=1000), warnings.append)
        self.addCleanup(log.close, "test")
        self.addCleanup(log.fault.close)
        log.open("9")
        log.begin(b"{}", "cell", "pass", 1)
        while log._bulk is None:
            log.published("stream", next(print_more), b'{"text":"x"}', b"{}")
        bulk, synced = log._bulk, os.fdatasync

        def slow_sync(descriptor):
            while bulk.fd >= 0:
                log.published("stream", next(print_more), b'{"text":"x"}', b"{}")
            synced(descriptor)
        log._ending.set()
        log._wake.put(False)
        with mock.patch.object(os, "fdatasync", slow_sync):
            log._sync()
        self.assertEqual((warnings, log.is_on), ([], True))


class KilledAtAnyMoment(Logged):
    """Whatever it is about to do: what is there afterwards can be read, and what somebody has seen is there."""

    def kill_after(self, kernel, seconds):
        timer = threading.Timer(seconds, kernel.popen.kill)
        timer.start()
        kernel.wait()
        timer.join()

    def test_while_much_is_printed_and_the_ring_turns(self):
        chance = random.Random(2)
        turned = 0
        code = "for n in range(10 ** 9): print(n, 'x' * 300)"
        for _ in range(support.rounds(3, 300)):
            kernel, client = self.start("--set", "recovery.max_output_per_cell_kb=16", "--set", "recovery.backlog_mb=1")
            client.execute("print('before')")
            msg_id = client.send_execute(code)
            client.wait_running(msg_id)
            self.kill_after(kernel, chance.uniform(0.0, 0.5))
            for _ in range(50):
                client.collect(0.01)
            session = self.session()
            self.assertEqual((session.state(), session.damaged, session.lost), ("died", 0, 0))
            self.assertEqual(session.killer.code, code)
            records = session.records()
            there = {record["seq"]: record["content"] for record in records if record["k"] == "out"}
            cut = sum(record["records"] for record in records if record["k"] == "cut")
            seen = {message.metadata["twoproc_seq"]: message.content for message in client.inbox["iopub"]
                    if message.msg_type == "stream"}
            for seq in seen.keys() & there.keys():
                self.assertTrue(seen[seq] == there[seq], f"message {seq} is not what was seen")
            # What is missing has made room for what is newer.
            missing = seen.keys() - there.keys()
            self.assertLessEqual(len(missing), cut)
            self.assertTrue(not missing or max(missing) < max(there), f"message {max(missing, default=0)} is lost")
            turned += cut > 0
            session.drop()
            client.close()
        if support.IS_SOAK:
            self.assertGreater(turned, 30)

    def test_while_it_ends(self):
        """Closed, or died with everything: never a part of it."""
        chance = random.Random(3)
        found = {"closed": 0, "died": 0, "gone": 0}
        for number in range(support.rounds(4, 300)):
            kernel, client = self.start()
            client.execute("print('all')\nprint('of it')")
            client.send("control", "shutdown_request", {"restart": bool(number % 2)})
            self.kill_after(kernel, chance.uniform(0.0, 0.3))
            there = crashlog.sessions()
            state = there[0].state() if there else "gone"
            found[state] += 1
            if state == "died" or state == "closed" and there[0].is_restarted:
                (cell,) = there[0].cells()
                text = "".join(output["content"]["text"] for output in cell.outputs)
                self.assertEqual((text, cell.is_ended, there[0].killer), ("all\nof it\n", True, None))
                self.assertEqual((there[0].damaged, there[0].lost), (0, 0))
                there[0].drop()
            for path in glob.glob(os.path.join(self.state, "sessions", "*")):
                os.unlink(path)
            client.close()
        if support.IS_SOAK:
            self.assertGreater(min(found["died"], found["closed"] + found["gone"]), 10, found)

    def test_while_it_starts(self):
        """What is left is dead or nothing, and the next kernel starts as ever, with the same connection file too."""
        chance = random.Random(4)
        kernel = None
        for number in range(support.rounds(5, 300)):
            kernel = support.Kernel(self, successor_of=kernel) if kernel and number % 2 else \
                support.Kernel(self, home=self.home)
            self.kill_after(kernel, chance.uniform(0.0, 0.4))
            for session in crashlog.sessions() if os.path.isdir(self.state) else ():
                self.assertEqual((session.state(), session.killer, session.damaged), ("died", None, 0))
        again = support.Kernel(self, successor_of=kernel)
        again.wait_file()
        client = again.client(self)
        client.execute("'here'")
        self.assertEqual(self.session().state(), "alive")
        client.request("control", "shutdown_request")
        again.wait()


if __name__ == "__main__":
    unittest.main()
