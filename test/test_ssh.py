# Distributed under the terms of the BSD 3-Clause License.
"""A kernel on another machine through ssh: a fake one in the suite, a real sshd on loopback in `python -m soak ssh`."""
import contextlib
import getpass
import io
import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import unittest
from unittest import mock

from twoproc import config, connection, ssh, start

from . import lab, support, vt

FRONTEND = [sys.executable, "-m", "twoproc.frontend"]
KERNEL = [sys.executable, "-m", "twoproc.kernel"]
FAR = ("TWOPROC_", "XDG_", "JUPYTER_", "PYTHON")        # what the far side has of its own, and HOME
CTRL_C, CTRL_D = "\x03", "\x04"

WRAPPER = """#!{python}
import json, os, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps({{"pid": os.getpid(), "argv": sys.argv[1:]}}) + "\\n")
os.execv({command[0]!r}, {command!r} + sys.argv[1:])
"""


class Way:
    """Two homes, and an `ssh` between them that notes how it was called."""

    def __init__(self, case, command):
        self.near, self.far = support.Home(case), support.Home(case)
        support._cleanup(case, vt.end_kernels, self.far)
        self.calls_path = os.path.join(self.near.path, "calls")
        bin = os.path.join(self.near.path, "bin")
        os.mkdir(bin)
        path = os.path.join(bin, "ssh")
        with open(path, "w") as file:
            file.write(WRAPPER.format(python=sys.executable, calls=self.calls_path, command=command))
        os.chmod(path, 0o700)
        python = ["env", *(f"{name}={value}" for name, value in self.far.env.items()
                           if name == "HOME" or name.startswith(FAR)), sys.executable]
        self.near.env.update(PATH=bin + os.pathsep + self.near.env["PATH"],
                             TWOPROC_NETWORK_SSH_PYTHON=shlex.join(python))

    def calls(self):
        if not os.path.exists(self.calls_path):
            return []
        with open(self.calls_path) as file:
            return [json.loads(line) for line in file]

    def masters(self):
        """The process numbers of the ssh processes that hold a connection, or held one."""
        return [call["pid"] for call in self.calls() if "-M" in call["argv"]]

    def is_running(self):
        return any(is_running(pid) for pid in self.masters())


class FakeWay(Way):
    destination = "me@lab"

    def __init__(self, case):
        super().__init__(case, [sys.executable, os.path.join(support.ROOT, "test", "fake_ssh.py")])
        self.near.env["FAKE_SSH"] = self.near.path
        self.behave("")

    def behave(self, how):
        with open(os.path.join(self.near.path, "behave"), "w") as file:
            file.write(how)


class RealWay(Way):
    """An sshd on a free port of loopback, with keys and a configuration of its own."""
    destination = f"{getpass.getuser()}@lab"

    def __init__(self, case):
        self.folder = folder = support.Home(case).path
        for name in ("host", "other", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", os.path.join(folder, name)],
                           check=True)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self._write("sshd_config", f"""
            Port {self.port}
            ListenAddress 127.0.0.1
            HostKey {folder}/host
            AuthorizedKeysFile {folder}/authorized
            UsePAM no
            StrictModes no
            PasswordAuthentication no
            PermitRootLogin prohibit-password
            PidFile {folder}/pid
        """)
        self._write("ssh_config", f"""
            Host lab
            HostName 127.0.0.1
            Port {self.port}
            IdentityFile {folder}/user
            IdentitiesOnly yes
            IdentityAgent none
            UserKnownHostsFile {folder}/known
            GlobalKnownHostsFile none
            # Of a user who has forwards, and connections that stay, for other purposes:
            LocalForward 127.0.0.1:1 127.0.0.1:1
            ControlMaster auto
            ControlPath {folder}/%C
            ControlPersist yes
        """)
        super().__init__(case, [shutil.which("ssh"), "-F", os.path.join(folder, "ssh_config")])
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)
        self.case, self.sshd = case, None
        self.behave("")

    def _write(self, name, text):
        with open(os.path.join(self.folder, name), "w") as file:
            file.write("\n".join(line.strip() for line in text.splitlines()) + "\n")
        os.chmod(file.name, 0o600)

    def _read(self, name):
        with open(os.path.join(self.folder, name)) as file:
            return file.read()

    def behave(self, how):
        self._write("authorized", "" if how == "refused" else self._read("user.pub"))
        self._write("known", f"[127.0.0.1]:{self.port} " + self._read("other.pub" if how == "changed" else "host.pub"))
        passphrase = "secret" if how == "password" else ""
        for before in ("", "secret"):
            subprocess.run(["ssh-keygen", "-q", "-p", "-P", before, "-N", passphrase, "-f",
                            os.path.join(self.folder, "user")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        forwarding = "no" if how == "no-forwarding" else "yes"
        self._write("sshd_config", self._read("sshd_config").partition("\nAllow")[0] + f"""
            AllowStreamLocalForwarding {forwarding}
            AllowTcpForwarding {forwarding}
        """)
        if self.sshd is not None:
            self.sshd.end()
            self.sshd = None
        if how != "down":
            self.sshd = support.Process(self.case, [shutil.which("sshd", path=SBIN), "-D", "-e", "-f",
                                                    os.path.join(self.folder, "sshd_config")])
            support.wait_until(self._listens, what="sshd")

    def _listens(self):
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0


SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def is_running(pid):
    """Not what is dead but not fetched: it is not ours to wait for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def parent_of(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


class SshCase(unittest.TestCase):
    """A way for each test; `start_far` a kernel at its other end."""
    make_way = FakeWay

    def setUp(self):
        self.way = self.make_way(self)

    def run_it(self, *words, destination=None, input="", **env):
        done = subprocess.run(
            [*FRONTEND, "--ssh", destination or self.way.destination, *words], input=input, capture_output=True,
            text=True, cwd=self.way.near.work, env={**self.way.near.env, **env}, timeout=support.DEADLINE)
        self.assertNotIn("Traceback", done.stderr)
        return done

    def assert_runs(self, code, output, *words, **options):
        done = self.run_it(*words, "-c", code, **options)
        self.assertEqual((done.stdout, done.returncode), (output, 0), done.stderr)
        return done

    def open(self, *words, number=1):
        terminal = vt.Terminal(self, [*FRONTEND, "--quiet", "--ssh", self.way.destination, *words], self.way.near)
        if number:
            terminal.prompt(number)
        return terminal

    def assert_says(self, terminal, text):
        """Wherever the screen breaks its line."""
        self.assertIn("".join(text.split()), "".join(terminal.show().replace("|", " ").split()))

    def start_far(self, *words):
        """A kernel of the far side's user; its connection file."""
        process = support.Process(self, [*KERNEL, *words], home=self.way.far)
        path = support.wait_until(lambda: next((path for path in self.files(self.way.far) if json_of(path).get(
            "twoproc_pid") == process.pid), None), what=process.log)
        return process, path

    def files(self, home):
        folder = os.path.join(home.run, "kernels")
        return [os.path.join(folder, name) for name in os.listdir(folder)
                if name.endswith(".json")] if os.path.isdir(folder) else []

    def assert_nothing_left(self):
        support.wait_until(lambda: not self.way.is_running(), what="end of ssh")
        self.assertEqual(os.listdir(os.path.join(self.way.near.run, "kernels")), [])


def json_of(path):
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


class Attaching(SshCase):

    def test_a_kernel_is_started_there_and_lives_on(self):
        self.assert_runs("x = 2 + 3", "")
        self.assert_nothing_left()
        self.assert_runs("print(x)", "5\n")
        self.assertEqual(len(self.files(self.way.far)), 1)

    def test_the_one_that_is_named_is_joined(self):
        self.start_far("--name", "otter")
        self.start_far("--name", "newer")
        self.assert_runs("x = 'otter'", "", "--existing", "otter")
        self.assert_runs("'x' in globals()", "False\n", "--existing")
        self.assert_runs("x", "'otter'\n", "--existing", "ott")

    def test_a_name_starts_one_of_that_name(self):
        self.start_far("--name", "otter")
        self.assert_runs("1", "1\n", "--name", "heron")
        self.assertEqual(sorted(map(os.path.basename, self.files(self.way.far))), ["heron.json", "otter.json"])
        done = self.run_it("--name", "otter", "-c", "1")
        self.assertEqual(done.returncode, 3, done.stderr)

    def test_a_kernel_on_tcp_ports_is_reached_through_sockets_of_ours_alone(self):
        self.start_far("--transport", "tcp")
        terminal = self.open("--existing")
        folder = os.path.join(self.way.near.run, "kernels")
        modes = {name[-1]: stat.S_IMODE(os.lstat(os.path.join(folder, name)).st_mode) for name in os.listdir(folder)}
        self.assertEqual(modes, dict.fromkeys("012345", 0o600))
        terminal.run("1+1", 1)
        self.assertIn("Out[1]: 2", terminal.show())

    def test_a_kernel_that_listens_to_others_too_is_reached_by_its_local_sockets(self):
        there = lab.Lab(self, {"bob": "view"}, home=self.way.far)
        self.assert_runs("x = 7; x", "7\n", "--existing", there.kernel.connection_file)
        self.assert_runs("x", "7\n", "--existing", there.kernel.connection_file)

    def test_without_a_kernel_to_join_the_far_side_says_so(self):
        for words in ("--existing",), ("--existing", "nobody"):
            done = self.run_it(*words, "-c", "1")
            self.assertEqual(done.returncode, 2)
            self.assertIn("no kernel is running" if len(words) == 1 else "no such kernel is running", done.stderr)
            self.assertEqual(len(done.stderr.splitlines()), 2, done.stderr)
        self.assert_nothing_left()

    def test_a_key_that_is_refused_ends_it_with_ssh_s_own_words(self):
        self.way.behave("refused")
        done = self.run_it("-c", "1")
        self.assertEqual(done.returncode, 2)
        self.assertIn("Permission denied (publickey", done.stderr)
        self.assertIn(f"ssh to {self.way.destination}: exit status 255", done.stderr)
        self.assert_nothing_left()

    def test_a_host_with_another_key_is_not_talked_to(self):
        self.way.behave("changed")
        done = self.run_it("-c", "1")
        self.assertEqual(done.returncode, 6)
        self.assertIn("REMOTE HOST IDENTIFICATION HAS CHANGED", done.stderr)

    def test_a_machine_that_does_not_answer(self):
        self.way.behave("down")
        done = self.run_it("-c", "1")
        self.assertEqual(done.returncode, 2)
        self.assertIn("Connection refused", done.stderr)

    def test_no_python_there(self):
        done = self.run_it("-c", "1", TWOPROC_NETWORK_SSH_PYTHON="no-such-python")
        self.assertEqual(done.returncode, 2)
        self.assertIn("no-such-python", done.stderr)
        self.assertIn("exit status 127", done.stderr)

    def test_forwarding_that_is_not_allowed_there(self):
        self.start_far()
        self.way.behave("no-forwarding")
        done = self.run_it("-c", "1")
        self.assertEqual(done.returncode, 2)
        self.assertRegex(done.stderr.splitlines()[-1], "sockets cannot be reached.*open failed")
        self.assert_nothing_left()

    def test_a_name_is_no_command_there(self):
        for name in ("x; touch pwned", "$(touch pwned)", "--config=pwned", "'\"; touch pwned; '"):
            with self.subTest(name=name):
                done = self.run_it("--existing=" + name, "-c", "1")
                self.assertEqual(done.returncode, 2)
                self.assertRegex(done.stderr, "no such kernel is running|no such file|no kernel named")
        for folder in (self.way.far.work, self.way.far.path, self.way.near.work, os.path.expanduser("~")):
            self.assertNotIn("pwned", os.listdir(folder))

    def test_no_key_is_in_an_argument_or_a_file_on_this_side(self):
        _, path = self.start_far()
        key = json_of(path)["key"]
        terminal = self.open()
        self.assertNotIn(key, json.dumps(self.way.calls()))
        for folder, _, names in os.walk(self.way.near.path):
            for name in names:
                path = os.path.join(folder, name)
                if stat.S_ISREG(os.lstat(path).st_mode):
                    with open(path, "rb") as file:
                        self.assertNotIn(key.encode(), file.read(), path)
        terminal.send(CTRL_D)
        self.assertEqual(terminal.wait_end(), 0)


class OnATerminal(SshCase):

    def test_a_question_of_ssh_is_asked_there_and_once(self):
        self.way.behave("password")
        terminal = self.open(number=0)
        terminal.wait(lambda lines: lines[-1].endswith(":"))
        terminal.send("secret\r")
        terminal.prompt(1)
        terminal.run("x = 6 * 7", 1)
        terminal.send("x\r")
        terminal.wait("Out[2]: 42")
        self.assertEqual(len(self.way.masters()), 1)

    def test_ctrl_c_at_a_question_of_ssh_ends_it(self):
        self.way.behave("password")
        terminal = self.open(number=0)
        terminal.wait(lambda lines: lines[-1].endswith(":"))
        terminal.send(CTRL_C)
        self.assertEqual(terminal.wait_end(), 130)
        self.assertIn("interrupted", terminal.show())
        self.assertNotIn("Traceback", terminal.show())
        self.assert_nothing_left()

    def test_the_way_to_join_names_the_machine(self):
        self.start_far("--name", "otter")
        terminal = vt.Terminal(self, [*FRONTEND, "--ssh", self.way.destination], self.way.near, columns=200)
        terminal.wait(f"twoproc.frontend --existing otter --ssh {self.way.destination}")
        terminal.prompt(1)
        terminal.send(CTRL_D)
        self.assertEqual(terminal.wait_end(), 0)
        self.assertIn("left kernel otter, it lives on", terminal.show())
        self.assert_nothing_left()

    def test_ctrl_c_in_a_cell_interrupts_the_cell_and_not_ssh(self):
        terminal = self.open()
        terminal.send("import time; print('on'); time.sleep(60)\r")
        terminal.wait(lambda lines: "on" in lines)
        terminal.send(CTRL_C)
        terminal.prompt(2)
        terminal.wait("KeyboardInterrupt")
        terminal.send("1+1\r")
        terminal.wait("Out[2]: 2")
        self.assertEqual(len(self.way.masters()), 1)
        self.assertNotIn("ssh to", terminal.show())

    def test_an_ssh_that_is_killed_is_started_again_and_the_session_goes_on(self):
        terminal = self.open()
        terminal.run("x = 5", 1)
        os.kill(self.way.masters()[-1], signal.SIGKILL)
        terminal.wait(f"ssh to {self.way.destination} ended: SIGKILL; the kernel lives on")
        terminal.wait(f"ssh to {self.way.destination} is there again")
        terminal.run("x + 1", 2)
        self.assertIn("Out[2]: 6", terminal.show())
        self.assertNotIn("died", terminal.show())
        self.assertIn("-oBatchMode=yes", [call["argv"] for call in self.way.calls() if "-M" in call["argv"]][-1])
        terminal.send(CTRL_D)
        self.assertEqual(terminal.wait_end(), 0)
        self.assert_nothing_left()

    def test_a_cell_that_runs_meanwhile_is_shown_to_its_end(self):
        terminal = self.open()
        flag = os.path.join(self.way.far.path, "flag")
        terminal.run("import os, time", 1)
        terminal.run(f"gone = lambda: not os.path.exists({flag!r})", 2)
        terminal.send("print('begun'); [time.sleep(0.01) for _ in iter(gone, False)]; print('en' + 'ded'); 7\r")
        terminal.wait(lambda lines: "begun" in lines)
        self.way.behave("down")
        os.kill(self.way.masters()[-1], signal.SIGKILL)
        terminal.wait("trying again")
        open(flag, "w").close()         # so it ends while nobody can hear it
        support.wait_until(lambda: len(self.way.masters()) > 1, what="another try")
        self.way.behave("")
        terminal.wait("is there again")
        terminal.wait(lambda lines: "ended" in lines and "Out[3]: 7" in lines)
        terminal.prompt(4)

    def test_it_may_be_killed_again_and_again(self):
        count = support.rounds(4, 30)
        flag = os.path.join(self.way.far.path, "flag")
        terminal = self.open()
        terminal.run(f"import os, time; flag = {flag!r}", 1)
        terminal.send("for i in iter(lambda: os.path.exists(flag), True): print(end='.'); time.sleep(0.01)\r\r")
        terminal.wait("...")
        for number in range(count):
            support.wait_until(lambda number=number: len(self.way.masters()) > number, what="another ssh")
            # Every other one when all is well, the others while they log in, or forward.
            if number % 2 == 0:
                told = number // 2
                terminal.wait(lambda lines, told=told: terminal.raw.count("is there again") >= told)
            else:
                support._pause.wait(number % 6 * 0.05)
            os.kill(self.way.masters()[-1], signal.SIGKILL)
        support.wait_until(lambda: len(self.way.masters()) > count, what="another ssh")
        terminal.wait("is there again")
        open(flag, "w").close()
        terminal.prompt(3)
        terminal.send("print('alive', 6 * 7)\r")
        terminal.wait("alive 42")
        support.wait_until(lambda: len(self.watchers()) == 1, what="end of the programs on the far side")

    def watchers(self):
        """The processes on the far side that ssh runs."""
        found = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    words = file.read().decode().split("\0")
                if "--watch" in words and f"--print-connection={self.files(self.way.far)[0]}" in words:
                    found.append(int(pid))
        return found

    def test_who_leaves_while_it_is_tried_need_not_wait(self):
        terminal = self.open()
        self.way.behave("down")
        os.kill(self.way.masters()[-1], signal.SIGKILL)
        terminal.wait("trying again")
        support.wait_until(lambda: len(self.way.masters()) > 2, what="another try")
        terminal.send(CTRL_D)
        terminal.wait_end(support.at_most(4))
        self.assert_nothing_left()

    def test_where_ssh_would_have_to_ask_it_says_what_to_do(self):
        terminal = self.open()
        self.way.behave("refused")
        os.kill(self.way.masters()[-1], signal.SIGKILL)
        terminal.wait("out of reach, but it lives on: ssh to")
        terminal.wait("[q]uit")
        self.assert_says(terminal, "Permission denied")
        self.assert_says(terminal, f"join it again with --ssh {self.way.destination} --existing")
        self.assertNotIn("died", terminal.show())
        terminal.send("q")
        terminal.wait_end()
        self.assertEqual(len(self.way.masters()), 2)        # tried once, not until the account is locked
        self.way.behave("")
        self.assertEqual(len(vt.kernel_pids(self.way.far)), 1)
        self.assertTrue(is_running(vt.kernel_pids(self.way.far)[0]))

    def test_the_death_of_the_kernel_is_told_with_its_cause_and_not_taken_for_that_of_ssh(self):
        terminal = self.open()
        terminal.send("import os, signal; os.kill(os.getpid(), signal.SIGKILL)\r")
        terminal.wait("died")
        terminal.wait("[q]uit")
        self.assertNotIn("ssh to", terminal.show())
        self.assertTrue(self.way.is_running())
        terminal.send("q")
        self.assertEqual(terminal.wait_end(), 70)
        self.assert_nothing_left()

    def test_a_kernel_that_is_gone_when_ssh_is_back_has_died(self):
        kernel, _ = self.start_far()
        terminal = self.open()
        self.way.behave("down")
        os.kill(self.way.masters()[-1], signal.SIGKILL)
        terminal.wait("trying again")
        kernel.signal(signal.SIGKILL)
        kernel.wait()
        self.way.behave("")
        terminal.wait("[q]uit")
        self.assert_says(terminal, "its kernel has ended")

    def test_a_kernel_that_is_started_again_there_is_back(self):
        path = os.path.join(self.way.far.run, "kernels", "otter.json")
        kernel, _ = self.start_far("-f", path)
        terminal = self.open()
        kernel.signal(signal.SIGKILL)
        terminal.wait("[q]uit")
        self.start_far("-f", path)
        terminal.wait("kernel otter is back")
        terminal.send("3 + 4\r")
        terminal.wait(": 7")
        kernel = vt.kernel_pids(self.way.far)[0]
        os.kill(kernel, signal.SIGKILL)         # its second end is told as well
        terminal.wait(lambda lines: "[q]uit" in lines[-1])

    def test_another_kernel_there_is_joined_from_the_prompt(self):
        self.start_far("--name", "otter")
        self.start_far("--name", "heron")
        terminal = self.open("--existing", "otter")
        terminal.send(":connect heron\r")
        terminal.wait("now at kernel heron")
        terminal.send("1+1\r")
        terminal.wait("Out[1]: 2")
        first, second = self.way.masters()
        support.wait_until(lambda: not is_running(first), what="end of the first ssh")
        self.assertTrue(is_running(second))
        terminal.send(":connect nobody\r")
        terminal.wait("no such kernel is running")
        terminal.wait(lambda lines: lines[-1].startswith("In ["))
        terminal.send("2+2\r")
        terminal.wait(": 4")

    def test_a_frontend_that_is_killed_takes_ssh_with_it(self):
        terminal = self.open()
        os.kill(terminal.pid, signal.SIGKILL)
        support.wait_until(lambda: not self.way.is_running(), what="end of ssh")
        self.assert_runs("1", "1\n")


class OnAPipe(SshCase):

    def start_code(self, code):
        process = subprocess.Popen([*FRONTEND, "--ssh", self.way.destination, "-c", code], text=True,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   cwd=self.way.near.work, env=self.way.near.env)
        self.addCleanup(process.wait, support.DEADLINE)
        self.addCleanup(process.kill)
        self.assertEqual(process.stdout.readline(), "begun\n")
        return process

    def test_code_goes_on_when_ssh_is_cut_under_it(self):
        flag = os.path.join(self.way.far.path, "flag")
        process = self.start_code(f"import os, time; print('begun'); [time.sleep(0.01) for _ in "
                                  f"iter(lambda: os.path.exists({flag!r}), True)]; print('ended')")
        os.kill(self.way.masters()[-1], signal.SIGKILL)
        support.wait_until(lambda: len(self.way.masters()) > 1, what="another ssh")
        open(flag, "w").close()
        text, errors = process.communicate(timeout=support.DEADLINE)
        self.assertEqual((text, process.returncode), ("ended\n", 0), errors)
        self.assertEqual([line.partition(": ")[2][:7] for line in errors.splitlines()], ["ssh to "] * 2, errors)

    def test_code_that_cannot_be_reached_any_more_ends_us_and_not_the_kernel(self):
        process = self.start_code("print('begun'); __import__('time').sleep(60)")
        self.way.behave("refused")
        os.kill(self.way.masters()[-1], signal.SIGKILL)
        text, errors = process.communicate(timeout=support.DEADLINE)
        self.assertEqual((text, process.returncode), ("", 70))
        self.assertIn("kernel out of reach, but it lives on", errors)
        self.assertTrue(is_running(vt.kernel_pids(self.way.far)[0]))


class TheFarSide(SshCase):
    """`python -m twoproc.kernel --print-connection`, without ssh."""

    def start_it(self, *words):
        process = subprocess.Popen([*KERNEL, "--print-connection", *words], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   cwd=self.way.far.work, env=self.way.far.env)
        self.addCleanup(process.wait, support.DEADLINE)
        for stream in process.stdin, process.stdout, process.stderr:
            self.addCleanup(stream.close)
        self.addCleanup(process.kill)
        return process

    def test_it_prints_the_file_of_the_newest_for_a_pipe(self):
        _, path = self.start_far("--name", "otter")
        process = self.start_it()
        text, errors = process.communicate(timeout=support.DEADLINE)
        self.assertEqual((process.returncode, errors), (0, ""))
        self.assertEqual(json.loads(text), {**json_of(path), "twoproc_file": path})
        self.assertEqual(text.count("\n"), 1)

    def test_without_a_kernel_it_is_one_line_and_exit_code_2(self):
        process = self.start_it()
        text, errors = process.communicate(timeout=support.DEADLINE)
        self.assertEqual((process.returncode, text, len(errors.splitlines())), (2, "", 1))

    def test_a_file_whose_kernel_was_killed_is_not_printed(self):
        kernel, path = self.start_far()
        kernel.signal(signal.SIGKILL)
        kernel.wait()
        process = self.start_it(path)
        text, errors = process.communicate(timeout=support.DEADLINE)
        self.assertEqual((process.returncode, text), (2, ""))
        self.assertIn("its kernel has ended", errors)

    def test_a_kernel_that_ends_before_its_file_is_read_is_one_line(self):
        with mock.patch.object(start, "_alive_file", return_value=os.path.join(self.way.far.run, "otter.json")), \
                contextlib.redirect_stdout(io.StringIO()), self.assertRaisesRegex(
                    connection.ConnectionFileError, "no such file; has its kernel ended"):
            start.print_connection("otter", False, None, False, config.load())

    def test_no_key_is_shown_on_a_terminal(self):
        _, path = self.start_far()
        terminal = vt.Terminal(self, [*KERNEL, "--print-connection"], self.way.far)
        self.assertEqual(terminal.wait_end(), 2)
        self.assertNotIn(json_of(path)["key"], terminal.raw)
        self.assertIn("to a pipe", terminal.show())

    def test_a_kernel_that_it_starts_outlives_it(self):
        process = self.start_it("--or-start", "--name", "otter")
        text, _ = process.communicate(timeout=support.DEADLINE)
        members = json.loads(text)
        self.assertTrue(is_running(members["twoproc_pid"]))
        self.assertEqual(os.getsid(members["twoproc_pid"]), members["twoproc_pid"])

    def test_a_kernel_that_would_be_lost_with_the_last_logout_is_said_to_be(self):
        for folder, has_systemd, lingers, is_told in (
                ("/run/user/7/twoproc", True, False, True), ("/run/user/7/twoproc", True, True, False),
                ("/run/user/7/twoproc", False, False, False), ("/tmp/twoproc-7", True, False, False)):
            with self.subTest(folder=folder, has_systemd=has_systemd, lingers=lingers), \
                    mock.patch.object(connection, "runtime_folder", return_value=folder), \
                    mock.patch("os.path.isdir", return_value=has_systemd), \
                    mock.patch("os.path.exists", return_value=lingers), \
                    contextlib.redirect_stderr(io.StringIO()) as said:
                start._warn_of_logout()
                self.assertEqual("enable-linger" in said.getvalue(), is_told)

    def test_watching_says_how_the_kernel_ended_each_time_and_ends_with_its_input(self):
        kernel, path = self.start_far("-f", os.path.join(self.way.far.run, "kernels", "otter.json"))
        process = self.start_it(path, "--watch")
        self.assertEqual(json.loads(process.stdout.readline())["twoproc_file"], path)
        kernel.signal(signal.SIGKILL)
        self.assertRegex(process.stdout.readline(), "^ended .*killed from outside")
        self.start_far("-f", path)
        # Seen again when its claim is; nothing here can tell when that was.
        os.kill(json_of(path)["twoproc_pid"], signal.SIGTERM)
        process.stdin.close()
        self.assertEqual(process.wait(support.DEADLINE), 0)


class Destinations(unittest.TestCase):

    def test_what_is_understood(self):
        for text, options, host in (
                ("lab", [], "lab"), ("me@lab", [], "me@lab"), ("me@lab:2222", ["-p", "2222"], "me@lab"),
                ("[::1]:22", ["-p", "22"], "::1"), ("me@[fe80::1%eth0]", [], "me@fe80::1%eth0"),
                ("DOMAIN\\me@lab", [], "DOMAIN\\me@lab"), ("a.b-c_d", [], "a.b-c_d")):
            with self.subTest(text=text):
                self.assertEqual(ssh.parse_destination(text), (options, host))

    def test_what_could_be_an_option_or_a_command_is_refused(self):
        for text in (
                "", "-oProxyCommand=sh", "-lroot@lab", "me@-oProxyCommand=sh", "[-oProxyCommand=sh]", "lab -p",
                "lab;sh", "lab|sh", "$(sh)@lab", "`sh`", "a'b@lab", "lab\n", "me@lab:0", "me@lab:65536", "me@lab:-1",
                "lab:", "me@", "@lab", "ssh://lab", "::1"):
            with self.subTest(text=text):
                with self.assertRaises(connection.ConnectionFileError):
                    ssh.parse_destination(text)


class Refused(SshCase):

    def test_an_option_instead_of_a_host_runs_no_ssh(self):
        for destination in ("-oProxyCommand=touch pwned", "me@-oProxyCommand=touch"):
            done = subprocess.run([*FRONTEND, "--ssh=" + destination, "-c", "1"], capture_output=True, text=True,
                                  cwd=self.way.near.work, env=self.way.near.env, timeout=support.DEADLINE)
            self.assertEqual(done.returncode, 2)
            self.assertEqual(len(done.stderr.splitlines()), 1)
        self.assertEqual((self.way.calls(), os.listdir(self.way.near.work)), ([], []))

    def test_the_host_and_the_command_come_after_the_options(self):
        self.assert_runs("1", "1\n", destination="me@lab:2222")
        login, forward = (call["argv"] for call in self.way.calls())
        self.assertEqual(login[login.index("-p"):][:4], ["-p", "2222", "--", "me@lab"])
        self.assertEqual(len(login), login.index("--") + 3)
        self.assertLessEqual({"-oServerAliveInterval=15", "-oExitOnForwardFailure=yes"}, set(login))
        self.assertEqual(forward[forward.index("-O") + 1], "forward")
        self.assertEqual(forward[-2:], ["--", "me@lab"])
        self.assertEqual(forward.count("-L"), 5)

    def test_no_ssh_on_this_machine(self):
        done = self.run_it("-c", "1", PATH=self.way.near.work)
        self.assertEqual(done.returncode, 2)
        self.assertIn("ssh", done.stderr)
        self.assertEqual(len(done.stderr.splitlines()), 1)

    def test_a_folder_whose_name_is_too_long_for_a_socket(self):
        folder = os.path.join(self.way.near.path, "x" * 70)
        done = self.run_it("-c", "1", TWOPROC_RUNTIME=folder)
        self.assertEqual((done.returncode, len(done.stderr.splitlines())), (5, 1), done.stderr)
        self.assertIn("set TWOPROC_RUNTIME", done.stderr)

    def test_sockets_that_cannot_be_made_on_this_side(self):
        self.way.behave("no-sockets")
        done = self.run_it("-c", "1")
        self.assertEqual(done.returncode, 2)
        self.assertIn("forwarding request failed", done.stderr)
        self.assert_nothing_left()

    def test_what_a_login_script_prints_is_passed_over(self):
        self.way.behave("chatty")
        self.assert_runs("1", "1\n")

    def test_another_s_kernel_is_not_started_through_it(self):
        done = self.run_it("--kernel", "bash", "-c", "1")
        self.assertEqual((done.returncode, len(done.stderr.splitlines())), (2, 1))


def why_no_sshd():
    if not support.IS_SOAK:
        return "a real sshd takes longer: python -m soak ssh"
    missing = [name for name in ("ssh", "ssh-keygen", "sshd") if shutil.which(name, path=SBIN) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


@unittest.skipIf(why_no_sshd(), why_no_sshd())
class AttachingThroughSshd(Attaching):
    make_way = RealWay


@unittest.skipIf(why_no_sshd(), why_no_sshd())
class OnAPipeThroughSshd(OnAPipe):
    make_way = RealWay


@unittest.skipIf(why_no_sshd(), why_no_sshd())
class OnATerminalThroughSshd(OnATerminal):
    make_way = RealWay

    def test_a_network_that_falls_silent_is_noticed(self):
        terminal = self.open()
        terminal.run("x = 5", 1)
        stopped = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc")))
                   if parent_of(pid) == self.way.sshd.pid]
        for pid in stopped:
            self.addCleanup(os.kill, pid, signal.SIGKILL)
            os.kill(pid, signal.SIGSTOP)
        terminal.wait("not responding", 60)         # three questions of ServerAliveInterval
        terminal.wait("is there again")
        terminal.run("x + 1", 2)
        self.assertIn("Out[2]: 6", terminal.show())


if __name__ == "__main__":
    unittest.main()
