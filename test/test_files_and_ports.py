# Distributed under the terms of the BSD 3-Clause License.
"""Files, folders and ports that are not as they should be, met by whole processes: kernel and frontend.

What each function makes of them is test_connection's and test_config's; here it is what a user sees, which is one
line and an exit status, and what is left behind, which is nothing.
"""
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import unittest

from twoproc import connection

from . import support, vt
from .lab import Lab

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534
KERNEL = [sys.executable, "-m", "twoproc.kernel"]
FRONTEND = [sys.executable, "-m", "twoproc.frontend"]
GOOD = {"shell_port": 50001, "iopub_port": 50002, "stdin_port": 50003, "control_port": 50004, "hb_port": 50005,
        "ip": "127.0.0.1", "key": "a-b", "transport": "tcp", "signature_scheme": "hmac-sha256"}


class PlacesCase(unittest.TestCase):

    def setUp(self):
        self.home = support.Home(self)
        self.addCleanup(vt.end_kernels, self.home)
        self.kernels = os.path.join(self.home.run, "kernels")

    def path(self, *parts):
        return os.path.join(self.home.path, *parts)

    def put(self, path, text="", mode=0o600):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(path, "w") as file:
            file.write(text)
        os.chmod(path, mode)
        return path

    def run_it(self, argv, env=None, **options):
        return subprocess.run(argv, env={**self.home.env, **(env or {})}, cwd=self.home.work, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=support.DEADLINE, **options)

    def refused(self, status, argv, *words, **options):
        """It ends with this status and one line on stderr in which the words are."""
        done = self.run_it(argv, **options)
        self.assertEqual((done.returncode, done.stdout), (status, ""), f"{argv}: {done.stderr}")
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)

    def left(self):
        """What lies in the folder of connection files, but for names that are reserved for a while."""
        if not os.path.isdir(self.kernels):
            return []
        return sorted(name for name in os.listdir(self.kernels)
                      if not name.endswith(".lock") or os.lstat(os.path.join(self.kernels, name)).st_size)


class ConnectionFiles(PlacesCase):

    def both(self, path):
        """The two commands that read a connection file."""
        return (KERNEL + ["-f", path], FRONTEND + ["--existing", path, "-c", "1"])

    def test_one_that_others_could_read_or_write_is_refused_with_5(self):
        path = self.path("kernel.json")
        for mode in (0o644, 0o666, 0o620):
            self.put(path, json.dumps(GOOD), mode)
            for argv in self.both(path):
                self.refused(5, argv, path, f"{mode:04o}")
        if IS_ROOT:
            os.chmod(path, 0o600)
            os.chown(path, NOBODY, NOBODY)
            for argv in self.both(path):
                self.refused(5, argv, path, f"uid {NOBODY}")

    def test_one_that_is_malformed_is_refused_with_2(self):
        path = self.path("kernel.json")
        for text in ("", "otter", "[1, 2]", "\0", "[" * 100_000):
            self.put(path, text)
            for argv in self.both(path):
                self.refused(2, argv, path)
        for name, value in (("shell_port", -1), ("hb_port", 99999), ("control_port", "x"), ("transport", "udp"),
                            ("signature_scheme", "rot13"), ("key", None)):
            self.put(path, json.dumps({**GOOD, name: value}))
            for argv in self.both(path):
                self.refused(2, argv, path, name)
        self.put(path, json.dumps({**GOOD, "iopub_port": 0}))     # for a kernel: any
        self.refused(2, self.both(path)[1], path, "iopub_port")

    def test_a_name_in_use_is_refused_with_3_and_the_process_named(self):
        first = support.Process(self, KERNEL + ["--name", "lab"], home=self.home)
        path = os.path.join(self.kernels, "lab.json")
        support.wait_until(lambda: os.path.exists(path), what="connection file")
        before = self.left()
        for argv in (KERNEL + ["--name", "lab"], KERNEL + ["-f", path], FRONTEND + ["--name", "lab", "-c", "1"]):
            self.refused(3, argv, f"pid {first.pid}")
        self.assertEqual(self.left(), before)
        self.assertEqual(self.run_it(FRONTEND + ["--existing", "lab", "-c", "6 * 7"]).stdout, "42\n")


class Ports(unittest.TestCase):
    """Five ports in a row, for a kernel that listens: all of them, or none."""

    def setUp(self):
        self.lab = Lab(self, {"alice": "run"}, start=False)
        self.base = self.free_ports(20)

    def free_ports(self, count):
        """The first of so many in a row that nobody has now."""
        for base in random.sample(range(31_000, 32_700, 20), 50):
            try:
                for port in range(base, base + count):
                    socket.create_server(("127.0.0.1", port)).close()
                return base
            except OSError:
                continue
        self.fail("no free ports")

    def is_listening(self, port):
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    def start(self, *arguments):
        return support.Kernel(self, "--set", f"network.port_base={self.base}", *arguments, home=self.lab.home)

    def test_each_of_them_taken_ends_it_with_4_naming_port_and_channel_and_leaves_nothing(self):
        for offset, channel in enumerate(connection.CHANNELS):
            with self.subTest(channel), socket.create_server(("127.0.0.1", self.base + offset)):
                kernel = self.start("--listen", f"127.0.0.1:{self.base}")
                self.assertEqual(kernel.wait(), 4, kernel.log())
                self.assertEqual(len(kernel.log().splitlines()), 1, kernel.log())
                self.assertIn(f"port {self.base + offset} ({channel})", kernel.log())
                self.assertFalse(os.path.exists(kernel.connection_file))
                run = [name for _, _, names in os.walk(self.lab.home.run) for name in names]
                self.assertEqual(run, [])

    def test_each_of_them_taken_makes_it_take_the_next_five_and_hold_none_of_the_first(self):
        for offset, channel in enumerate(connection.CHANNELS):
            with self.subTest(channel), socket.create_server(("127.0.0.1", self.base + offset)):
                kernel = self.start("--listen", "127.0.0.1", "--set", "network.port_slots=2")
                kernel.wait_file()
                self.assertEqual(kernel.info["twoproc_listen"], f"tcp://127.0.0.1:{self.base + 10}")
                support.wait_until(kernel.log, what="the address that it says")
                self.assertIn(f"tcp://127.0.0.1:{self.base + 10}", kernel.log())
                ports = [port for port in range(self.base, self.base + 20) if self.is_listening(port)]
                self.assertEqual(ports, [self.base + offset, *range(self.base + 10, self.base + 15)])
                kernel.end()

    def test_with_every_slot_taken_it_ends_with_4(self):
        with socket.create_server(("127.0.0.1", self.base + 4)), socket.create_server(("127.0.0.1", self.base + 10)):
            kernel = self.start("--listen", "127.0.0.1", "--set", "network.port_slots=2")
            self.assertEqual(kernel.wait(), 4, kernel.log())
            self.assertIn(f"port {self.base + 10} (shell)", kernel.log())

    def test_two_that_listen_take_two_slots(self):
        kernels = [self.start("--listen", "127.0.0.1") for _ in range(2)]
        for kernel in kernels:
            kernel.wait_file()
        self.assertEqual({kernel.info["twoproc_listen"] for kernel in kernels},
                         {f"tcp://127.0.0.1:{self.base + port}" for port in (0, 10)})

    def test_without_listen_there_is_no_port_at_all(self):
        kernel = support.start_kernel(self, home=self.lab.home)
        kernel.client(self)
        inodes = {os.readlink(f"/proc/{kernel.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{kernel.pid}/fd")}
        for table in ("tcp", "tcp6", "udp", "udp6"):
            with open(f"/proc/{kernel.pid}/net/{table}") as file:
                ours = [line for line in file.readlines()[1:] if f"socket:[{line.split()[9]}]" in inodes]
            self.assertEqual(ours, [])

    def test_each_port_of_a_connection_file_taken_ends_it_with_4(self):
        """What a Jupyter manager chose a moment ago, and another program has by now."""
        ports = {f"{channel}_port": self.base + at for at, channel in enumerate(connection.CHANNELS)}
        for offset, channel in enumerate(connection.CHANNELS):
            with self.subTest(channel), socket.create_server(("127.0.0.1", self.base + offset)):
                kernel = support.Kernel(self, connection={**GOOD, **ports})
                self.assertEqual(kernel.wait(), 4, kernel.log())
                self.assertEqual(len(kernel.log().splitlines()), 1, kernel.log())
                self.assertIn(f":{self.base + offset}: cannot listen for {channel}", kernel.log())
                self.assertEqual(os.listdir(kernel.home.run), [os.path.basename(kernel.connection_file)])


class Folders(PlacesCase):
    COMMANDS = (KERNEL, FRONTEND + ["-c", "1"], FRONTEND + ["--existing"], FRONTEND + ["--list"])

    def test_a_runtime_folder_that_is_not_ours_alone_is_refused_with_5(self):
        run = self.path("elsewhere")
        real = self.path("real")
        os.mkdir(real, 0o700)
        kinds = [("open to other users", lambda: (os.mkdir(run), os.chmod(run, 0o777))),
                 ("symbolic link", lambda: os.symlink(real, run)),
                 ("not a folder", lambda: self.put(run))]
        if IS_ROOT:
            kinds.append((f"uid {NOBODY}", lambda: (os.mkdir(run, 0o700), os.chown(run, NOBODY, NOBODY))))
        for says, make in kinds:
            make()
            before = os.lstat(run)
            for argv in self.COMMANDS:
                with self.subTest(says=says, argv=argv[2:]):
                    self.refused(5, argv, run, says, env={"TWOPROC_RUNTIME": run})
            self.assertEqual(os.lstat(run).st_mode, before.st_mode)
            shutil.rmtree(run) if stat.S_ISDIR(before.st_mode) else os.unlink(run)
        self.assertEqual(os.listdir(real), [])

    def test_a_connection_file_in_a_folder_that_is_none_says_so_with_2(self):
        for folder in (self.path("nowhere"), self.put(self.path("file"))):
            self.refused(2, KERNEL + ["-f", os.path.join(folder, "x.json")], f"{folder}: no such folder", "make it")

    def test_a_runtime_folder_whose_name_is_too_long_for_sockets_says_so(self):
        run = self.path("d" * 100)
        for argv in self.COMMANDS[:2]:
            self.refused(2, argv, "bytes too long", "TWOPROC_RUNTIME", env={"TWOPROC_RUNTIME": run})
        done = self.run_it(FRONTEND + ["--set", "kernel.transport=tcp", "-c", "1"], env={"TWOPROC_RUNTIME": run})
        self.assertEqual((done.returncode, done.stdout), (0, "1\n"), done.stderr)

    def test_a_disk_that_is_full_or_read_only_is_one_line_and_5(self):
        """A disk of the test's own, in a mount namespace of its own."""
        os.mkdir(self.path("disk"), 0o700)
        full = "dd if=/dev/zero of=$0/fill bs=1k 2>/dev/null; "
        for says, how in (("No space left", full), ("Read-only", "mount -o remount,ro,mode=700 disk $0 && ")):
            for argv in self.COMMANDS[:2]:
                script = "mount -t tmpfs -o size=64k,mode=700 disk $0 || exit 99; mkdir -m 700 $0/kernels; " + how
                command = ["unshare", "--mount", "sh", "-c", script + ' "$@"', self.path("disk"), *argv]
                with self.subTest(says=says, argv=argv[2:]):
                    env = {"TWOPROC_RUNTIME": self.path("disk")}
                    try:
                        done = self.run_it(command, env=env)
                    except FileNotFoundError:
                        self.skipTest("no unshare on this system")
                    if done.returncode == 99 or "unshare" in done.stderr:
                        self.skipTest("a disk of its own takes rights that this user has not: " + done.stderr.strip())
                    self.assertEqual((done.returncode, done.stdout), (5, ""), done.stderr)
                    self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
                    if argv is KERNEL:          # a kernel's words go to a log on that disk
                        self.assertIn(says, done.stderr)


class InTheWay(PlacesCase):
    """Something stands where a file of ours goes: it is left as it is, what a link leads to is not touched."""

    def test_at_each_of_our_places(self):
        victim = self.put(self.path("victim"), "precious")
        kinds = {"link": lambda path: os.symlink(victim, path), "loose link": lambda path: os.symlink(
            self.path("none"), path), "hard link": lambda path: os.link(victim, path), "fifo": os.mkfifo}
        os.mkdir(self.kernels, 0o700)
        for name, argv in (("lab.json", KERNEL), ("lab.json.lock", KERNEL), ("lab-1", KERNEL), ("lab-5", KERNEL),
                           ("lab.json", FRONTEND), ("lab.log", FRONTEND)):
            for kind, make in kinds.items():
                with self.subTest(name=name, kind=kind, argv=argv[2:]):
                    path = os.path.join(self.kernels, name)
                    make(path)
                    before = os.lstat(path)
                    code = ["-c", "1"] if argv is FRONTEND else []
                    done = self.run_it(argv + ["--name", "lab", *code])
                    self.assertEqual((done.returncode, done.stdout), (5, ""), done.stderr)
                    self.assertIn(name, done.stderr)
                    self.assertNotIn("Traceback", done.stderr)
                    if name == "lab.log" and not os.path.lexists(path):
                        continue                # the launcher has tidied up: it removes the name, not what it leads to
                    after = os.lstat(path)
                    self.assertEqual((after.st_ino, after.st_mode), (before.st_ino, before.st_mode))
                    os.unlink(path)
                    self.assertEqual(self.left(), [])
                    lock = os.path.join(self.kernels, "lab.json.lock")
                    if os.path.lexists(lock):
                        os.unlink(lock)
        with open(victim) as file:
            self.assertEqual(file.read(), "precious")
        self.assertFalse(os.path.lexists(self.path("none")))


class Stale(PlacesCase):

    def test_what_sigkill_left_goes_with_the_next_list_also_if_its_process_number_lives_again(self):
        dead = support.Process(self, KERNEL + ["--name", "dead"], home=self.home)
        alive = support.Process(self, KERNEL + ["--name", "alive"], home=self.home)
        for name in ("dead", "alive"):
            support.wait_until(lambda name=name: os.path.exists(os.path.join(self.kernels, name + ".json")),
                               what="connection file")
        dead.signal(signal.SIGKILL)
        dead.wait()
        other = support.Process(self, ["sleep", "60"], home=self.home)
        self.assertIn("dead.json", self.left())
        # As if the system had given the kernel's number to another program.
        self.put(os.path.join(self.kernels, "dead.json.lock"), f"{other.pid}\n")
        with open(os.path.join(self.kernels, "dead.json"), "r+") as file:
            text = file.read().replace(str(dead.pid), str(other.pid))
            file.seek(0)
            file.write(text)
        listed = self.run_it(FRONTEND + ["--list"])
        self.assertEqual([line.split()[0] for line in listed.stdout.splitlines()], ["alive"], listed.stderr)
        self.assertEqual([name for name in self.left() if name.startswith("dead")], [])
        self.assertTrue(alive.is_alive and other.is_alive)
        self.assertEqual(self.run_it(FRONTEND + ["--existing", "alive", "-c", "6 * 7"]).stdout, "42\n")


class Configuration(PlacesCase):

    def test_a_mistake_is_one_line_and_2(self):
        path = os.path.join(self.home.env["XDG_CONFIG_HOME"], "twoproc", "twoproc.ini")
        for text, mode, words in (("[kernel]\ntransprot = tcp\n", 0o600, ("line 2", "kernel.transport")),
                                  ("[limits]\nmax_frames = many\n", 0o600, ("line 2", "'many'")),
                                  ("[kernel]\n", 0o664, ("0664", "chmod go-w"))):
            self.put(path, text, mode)
            for argv in (KERNEL, FRONTEND + ["-c", "1"], FRONTEND + ["--list"]):
                self.refused(2, argv, path, *words)
        self.assertEqual(self.left(), [])


class NobodyReads(PlacesCase):

    def test_what_a_command_prints_it_ends_quietly_with_141(self):
        kernel = support.Process(self, KERNEL + ["--name", "lab"], home=self.home)
        support.wait_until(lambda: os.path.exists(os.path.join(self.kernels, "lab.json")), what="connection file")
        for name, *arguments in (("kernel", "--show-config"), ("kernel", "--print-connection"),
                                 ("kernel", "--install-kernelspec"), ("frontend", "--show-config"),
                                 ("frontend", "--list"), ("relay", "--show-config"), ("keys", "--show-config"),
                                 ("keys", "new"), ("crashlog", "--list")):
            with self.subTest(name=name, arguments=arguments):
                reading, writing = os.pipe()
                os.close(reading)
                done = subprocess.run([sys.executable, "-m", f"twoproc.{name}", *arguments], env=self.home.env,
                                      cwd=self.home.work, stdin=subprocess.DEVNULL, stdout=writing,
                                      stderr=subprocess.PIPE, timeout=support.DEADLINE)
                os.close(writing)
                self.assertEqual((done.returncode, done.stderr), (141, b""))
        self.assertTrue(kernel.is_alive)


class InTheForeground(PlacesCase):

    def test_a_kernel_on_a_terminal_says_how_it_is_joined_and_ended(self):
        terminal = vt.Terminal(self, KERNEL + ["--name", "lab"], self.home, columns=150)
        says, = terminal.wait("kernel lab is ready")
        self.assertIn("-m twoproc.frontend --existing lab", says)
        terminal.send("\x03")           # is for cells, which is what it says
        self.assertEqual(self.run_it(FRONTEND + ["--existing", "lab", "-c", "6 * 7"]).stdout, "42\n")
        self.assertIn("Ctrl-C", says)
        self.run_it(says[says.index("kill "):].split()[:2])
        self.assertEqual(terminal.wait_end(), 128 + signal.SIGTERM)
        self.assertEqual(self.left(), [])


class HostileFolder(PlacesCase):
    """A folder that somebody filled for whoever starts a kernel in it."""
    MODULES = ("twoproc", "zmq", "IPython", "json", "argparse", "queue", "prompt_toolkit", "sitecustomize",
               "ipython_config", "ipython_kernel_config", "traitlets", "encodings", "sqlite3")

    def setUp(self):
        super().setUp()
        self.marker = self.path("was-run")
        for module in self.MODULES:
            self.put(os.path.join(self.home.work, module + ".py"),
                     f"import os\nos.close(os.open({self.marker!r}, os.O_CREAT | os.O_WRONLY))\nraise SystemExit(77)\n")
        for name in ("twoproc.ini", ".twoproc.ini", "twoproc/twoproc.ini", ".config/twoproc/twoproc.ini"):
            self.put(os.path.join(self.home.work, name), "[kernel]\nhostile = yes\n")
        for name in ("authorized_keys", "known_kernels", "host_key", "id_key"):
            self.put(os.path.join(self.home.work, name), "hostile\n")
        for name in ("lab.json", "kernels/lab.json", "kernel-lab.json"):
            self.put(os.path.join(self.home.work, name), json.dumps(GOOD))
        # The package comes from a folder on the path, as an installed one does; no setting names the folder.
        self.files = [os.path.join(folder, name) for folder, _, names in os.walk(self.home.work) for name in names]

    def not_read(self):
        """The access times of all files, or () where the file system does not keep them."""
        for path in self.files:
            os.utime(path, (1, 1_000_000_000))          # older than the last change: the next read is noted
        if self.files:
            probe = self.put(self.path("probe"))
            os.utime(probe, (1, 1_000_000_000))
            with open(probe) as file:
                file.read()
            if os.stat(probe).st_atime == 1:
                return ()
        return [path for path in self.files if os.stat(path).st_atime == 1]

    SAFELY = [sys.executable, "-c", "import sys; sys.path.pop(0); from twoproc.frontend import main; sys.exit(main())"]

    def test_a_frontend_that_python_starts_safely_and_its_kernel_read_nothing_of_it(self):
        untouched = self.not_read()
        done = self.run_it(self.SAFELY + ["-c", "import sys; print(6 * 7, '' in sys.path)"])
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "42 True\n", ""))
        self.assertFalse(os.path.exists(self.marker))
        self.assertEqual([path for path in untouched if os.stat(path).st_atime != 1], [])
        self.refused(2, self.SAFELY + ["--existing", "lab", "-c", "1"], "no such kernel")

    def test_python_itself_reads_it_for_dash_m(self):
        """So the trap works; docs/security.md says what to do."""
        self.assertEqual(self.run_it(FRONTEND + ["-c", "6 * 7"]).returncode, 77)
        self.assertTrue(os.path.exists(self.marker))

    @unittest.skipIf(sys.version_info < (3, 11), "python -P is new in 3.11")
    def test_dash_p_is_a_safe_start(self):
        done = self.run_it([sys.executable, "-P", "-m", "twoproc.frontend", "-c", "6 * 7"])
        self.assertEqual(done.stdout, "42\n", done.stderr)
        self.assertEqual(self.run_it(FRONTEND + ["-c", "6 * 7"], env={"PYTHONSAFEPATH": "1"}).stdout, "42\n")
        self.assertFalse(os.path.exists(self.marker))

    def test_the_kernelspec_starts_a_kernel_that_reads_nothing_of_it(self):
        spec = self.run_it([sys.executable, "-c", "import sys; sys.path.pop(0)\nfrom twoproc.launcher import *\n"
                            f"print(install_kernelspec(prefix={self.path('prefix')!r}))"])
        with open(os.path.join(spec.stdout.strip(), "kernel.json")) as file:
            command = json.load(file)["argv"]
        kernel = support.Kernel(self, home=self.home, command="true")
        kernel = support.Process(self, [word.replace("{connection_file}", kernel.connection_file) for word in command],
                                 home=self.home)
        path = kernel.argv[-1]
        support.wait_until(lambda: os.path.exists(path) or not kernel.is_alive, what="connection file")
        done = self.run_it(self.SAFELY + ["--existing", path, "-c", "6 * 7"])
        self.assertEqual((done.stdout, done.stderr), ("42\n", ""), kernel.log())
        self.assertFalse(os.path.exists(self.marker))

    def test_modules_of_the_folder_are_there_for_the_cells(self):
        self.put(os.path.join(self.home.work, "mine.py"), "x = 5\n")
        done = self.run_it(self.SAFELY + ["-c", "import mine, json; print(mine.x, json.__name__)"])
        self.assertEqual((done.stdout, done.stderr), ("5 json\n", ""))
        self.assertFalse(os.path.exists(self.marker))

    def test_after_its_start_a_program_run_by_dash_m_imports_nothing_from_it(self):
        for module in self.MODULES:
            if module not in ("zmq", "IPython", "sqlite3", "prompt_toolkit", "traitlets"):
                os.unlink(os.path.join(self.home.work, module + ".py"))
        shutil.rmtree(os.path.join(self.home.work, "twoproc"))
        done = self.run_it(FRONTEND + ["-c", "6 * 7"])
        self.assertEqual((done.stdout, done.stderr), ("42\n", ""))
        self.assertFalse(os.path.exists(self.marker))


class Umask(PlacesCase):
    """With umask 000 everything that programs make is open to everybody, unless they take care."""

    def setUp(self):
        super().setUp()
        before = os.umask(0)
        self.addCleanup(os.umask, before)
        # No folder is there: not even those that a home usually has.
        for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "TWOPROC_RUNTIME",
                     "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            self.home.env.pop(name, None)
        self.home.env["TMPDIR"] = self.path("tmp")
        os.mkdir(self.path("tmp"), 0o700)
        self.ours = set()

    def modes(self):
        """{path: mode} of all that is open to others; what the test itself has made is left out."""
        found = {}
        for folder, folders, files in os.walk(self.home.path):
            for name in folders + files:
                path = os.path.join(folder, name)
                mode = os.lstat(path).st_mode
                relative = os.path.relpath(path, self.home.path)
                if stat.S_ISLNK(mode) or folder == self.home.path and relative.startswith(("out-", "err-", "import")):
                    continue
                self.ours.add(relative)
                # A text that IPython copies, into a folder that is private.
                if mode & 0o077 and not path.endswith("profile_default/startup/README"):
                    found[relative] = f"{stat.S_IMODE(mode):04o}"
        return found

    def test_all_that_kernel_frontend_log_and_crash_make_is_private(self):
        kernel = support.Process(self, [*KERNEL, "--name", "lab", "--set", "kernel.publish_jupyter=yes"],
                                 home=self.home)
        folder = self.path("tmp", f"twoproc-{os.geteuid()}", "kernels")
        support.wait_until(lambda: os.path.exists(os.path.join(folder, "lab.json")), what="connection file")
        modes = self.modes()
        self.assertEqual(modes, {})
        self.assertIn(os.path.relpath(os.path.join(folder, "lab-5"), self.home.path), self.ours)
        # History, an image that is saved, a cell that kills the kernel, and what tells of that.
        text = "from IPython.display import Image\nimport base64\nImage(base64.b64decode('%s'))\n" % PNG
        terminal = vt.Terminal(self, FRONTEND + ["--set", "frontend.images=off"], self.home, {"USER": "alice"})
        terminal.prompt(1)
        for number, line in enumerate(text.splitlines(), 2):
            terminal.send(line + "\r")
            terminal.prompt(number)
        terminal.send("import os; os._exit(3)\r")
        terminal.wait("died")
        terminal.send("r")
        self.run_it(FRONTEND + ["--existing", "lab", "-c", "print('x' * 1_000_000); 1 / 0"])
        with connection_to(os.path.join(folder, "lab.json"), self) as client:
            client.request("control", "shutdown_request")       # writes history.sqlite
        kernel.wait()
        self.run_it([sys.executable, "-m", "twoproc.crashlog", "--list"])
        self.run_it(KERNEL + ["--install-kernelspec"])
        modes = self.modes()
        for wanted in ("history.sqlite", "state/twoproc/history", ".fault", ".log", "1.png", "kernel.json"):
            self.assertTrue(any(path.endswith(wanted) for path in self.ours), f"{wanted}: {sorted(self.ours)}")
        # A kernelspec is for all programs to read.
        self.assertEqual({path: mode for path, mode in modes.items() if "/jupyter/kernels" not in path}, {})
        self.assertLessEqual(set(modes.values()), {"0644", "0755"}, modes)


    def test_all_that_keys_a_listening_kernel_and_its_guests_make_is_private(self):
        keys = [sys.executable, "-m", "twoproc.keys"]
        host = self.run_it(keys + ["new", "--host"])
        mine = self.run_it(keys + ["new", "--name", "alice"])
        authorize = ["authorize", mine.stdout.splitlines()[-1]]
        for command in (authorize, ["revoke", "alice"], authorize):         # made, then changed
            done = self.run_it(keys + command)
            self.assertEqual(done.returncode, 0, host.stderr + mine.stderr + done.stderr)
        base = random.randrange(21_000, 30_000, 10)
        kernel = support.Process(self, [
            *KERNEL, "--name", "lab", "--listen", "127.0.0.1", "--set", f"network.port_base={base}",
            "--set", "network.port_slots=50", "--set", "kernel.publish_jupyter=yes"], home=self.home)
        path = self.path("tmp", f"twoproc-{os.geteuid()}", "kernels", "lab.json")
        support.wait_until(lambda: os.path.exists(path) or not kernel.is_alive, what="connection file")
        with connection_to(path, self) as client:
            client.wait_ready()
            with open(path) as file:
                info = json.load(file)
            port = int(info["twoproc_listen"].rpartition(":")[2])
            address = f"twoproc://127.0.0.1:{port}/{connection.hex_of(info['curve_publickey'].encode())}"
            done = self.run_it(FRONTEND + ["--connect", address, "-c", "6 * 7"])
            self.assertEqual((done.stdout, done.stderr), ("42\n", ""))
            self.run_it(keys + ["revoke", "alice"])
            modes = self.modes()
            client.request("control", "shutdown_request")
        kernel.wait()
        self.assertEqual({**modes, **self.modes()}, {})
        for wanted in ("host_key", "id_key", "authorized_keys", "access.log", "kernel-lab.json"):
            self.assertTrue(any(path.endswith(wanted) for path in self.ours), f"{wanted}: {sorted(self.ours)}")


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


class connection_to:
    """A raw client of the kernel with this connection file."""

    def __init__(self, path, case):
        with open(path) as file:
            self.client = support.Client(json.load(file))

    def __enter__(self):
        return self.client

    def __exit__(self, *exc_info):
        self.client.close()


if __name__ == "__main__":
    unittest.main()
