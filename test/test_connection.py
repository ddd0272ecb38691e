# Distributed under the terms of the BSD 3-Clause License.
"""Connection files: Jupyter's format both ways, hostile folders and files, and who holds a name."""
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

from twoproc import connection
from twoproc.connection import Claim, ConnectionFileError, ConnectionInfo

from . import support

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534
PUBLIC, SECRET = b"p" * 40, b"s" * 40

GOOD = {
    "shell_port": 50001, "iopub_port": 50002, "stdin_port": 50003, "control_port": 50004, "hb_port": 50005,
    "ip": "127.0.0.1", "key": "a-b", "transport": "tcp", "signature_scheme": "hmac-sha256", "kernel_name": "python3",
}


class Case(unittest.TestCase):
    """A runtime folder, a Jupyter folder and a home of its own for each test."""

    def setUp(self):
        home = tempfile.TemporaryDirectory(prefix="tp-")
        self.addCleanup(home.cleanup)
        self.home = os.path.realpath(home.name)
        self.runtime = os.path.join(self.home, "run")
        self.jupyter = os.path.join(self.home, "jupyter")
        environ = {"TWOPROC_RUNTIME": self.runtime, "JUPYTER_RUNTIME_DIR": self.jupyter, "HOME": self.home}
        patch = mock.patch.dict(os.environ, environ)
        patch.start()
        self.addCleanup(patch.stop)

    def path(self, *parts):
        return os.path.join(self.home, *parts)

    def put(self, text, name="kernel.json", mode=0o600):
        path = self.path(name)
        with open(path, "w" if isinstance(text, str) else "wb") as file:
            file.write(text)
        os.chmod(path, mode)
        return path

    def refused(self, exit_code, function, *args, says="", **options):
        """The message of the refusal, which is one line and has the exit code."""
        with self.assertRaises(ConnectionFileError) as caught:
            function(*args, **options)
        message = str(caught.exception)
        self.assertEqual(caught.exception.exit_code, exit_code, message)
        self.assertNotIn("\n", message)
        self.assertIn(says, message)
        return message

    def process(self, code, *args, **options):
        """A Python process with `code`; ended with the test."""
        preamble = "import os, sys\nfrom twoproc.connection import *\n"
        environ = {**os.environ, "PYTHONPATH": support.ROOT}
        child = subprocess.Popen(
            [sys.executable, "-c", preamble + code, *args], cwd=self.home, env=environ, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        self.addCleanup(self.end, child)
        return child

    def end(self, child):
        child.kill()
        child.communicate(timeout=support.DEADLINE)

    def mode(self, path):
        return stat.S_IMODE(os.lstat(path).st_mode)


class FormatOfJupyter(Case):
    def test_what_jupyter_client_writes_is_read(self):
        connect = jupyter_connect()
        for transport, ip in (("tcp", "127.0.0.1"), ("ipc", self.path("k-ipc"))):
            path, written = connect.write_connection_file(
                self.path(transport + ".json"), transport=transport, ip=ip, key=b"k-1", kernel_name="python3",
                curve_publickey=PUBLIC, curve_secretkey=SECRET)
            info = connection.read_connection_file(path)
            self.assertEqual([info.port(c) for c in connection.CHANNELS],
                             [written[c + "_port"] for c in connection.CHANNELS])
            self.assertEqual((info.transport, info.ip, info.key, info.kernel_name), (transport, ip, b"k-1", "python3"))
            self.assertEqual((info.curve_publickey, info.curve_secretkey), (PUBLIC, SECRET))

    def test_what_we_write_is_read_by_jupyter_client_with_the_same_addresses(self):
        connect = jupyter_connect()
        for transport in ("tcp", "ipc"):
            path, info = connection.new_connection(transport)
            if transport == "tcp":
                info = info._replace(shell_port=5, iopub_port=6, stdin_port=7, control_port=8, hb_port=9)
            info = info._replace(curve_publickey=PUBLIC, curve_secretkey=SECRET)
            connection.write_connection_file(path, info)
            theirs = connect.ConnectionFileMixin(connection_file=path)
            theirs.load_connection_file()
            self.assertEqual([theirs._make_url(c) for c in connection.CHANNELS],
                             [info.url(c) for c in connection.CHANNELS])
            self.assertEqual(theirs.session.key, info.key)
            self.assertEqual((theirs.curve_publickey, theirs.curve_secretkey), (PUBLIC, SECRET))

    def test_unknown_members_and_a_key_beyond_ascii_are_kept_and_written_back(self):
        members = {**GOOD, "key": "ключ", "jupyter_session": "/a/b.ipynb", "twoproc_pid": 7}
        info = connection.read_connection_file(self.put(json.dumps(members)))
        self.assertEqual(info.key, "ключ".encode())
        connection.write_connection_file(self.path("copy.json"), info)
        with open(self.path("copy.json")) as file:
            self.assertEqual(json.load(file), members)
        self.assertEqual(connection.read_connection_file(self.path("copy.json")), info)

    def test_an_ipv6_address_stands_in_brackets(self):
        info = connection.read_connection_file(self.put(json.dumps({**GOOD, "ip": "::1"})))
        self.assertEqual(info.url("hb"), "tcp://[::1]:50005")

    def test_neither_key_is_shown_where_the_connection_is_printed(self):
        info = connection.new_connection()[1]._replace(curve_secretkey=SECRET)
        self.assertNotIn(info.key.decode(), f"{info} {info!r} {(info,)}")
        self.assertNotIn(SECRET.decode(), f"{info} {info!r}")


def jupyter_connect():
    try:
        from jupyter_client import connect
    except ImportError:
        raise unittest.SkipTest("jupyter_client is not installed") from None
    return connect


class MalformedFiles(Case):
    def refuse(self, text, says="", **options):
        path = self.put(text)
        message = self.refused(2, connection.read_connection_file, path, says=says, **options)
        self.assertIn(path, message)
        self.assertLess(len(message), 400)
        return message

    def test_a_file_that_is_no_json_object_is_refused_in_one_line(self):
        for text in ("", " \n", "otter", "[]", "[1, 2]", "null", "5", '"x"', b"\xff\xfe\x00", b"\x80", "{", '{"a": 1',
                     "[" * 100_000, "[" * 900 + "]" * 900, '{"hb_port": ' + "9" * 5000 + "}", " " * (2 << 20)):
            with self.subTest(text=text[:20]):
                self.refuse(text)

    def test_a_bad_member_is_named_with_its_value(self):
        for name, value, shown in [
            *((f"{channel}_port", value, shown) for channel in connection.CHANNELS for value, shown in
              ((0, "0"), (-1, "-1"), (99999, "99999"), ("x", "'x'"), (True, "True"), (5555.0, "5555.0"), ([], "[]"))),
            ("transport", "udp", "'udp'"), ("transport", 5, "5"), ("signature_scheme", "rot13", "'rot13'"),
            ("signature_scheme", "hmac-shake_128", "'hmac-shake_128'"), ("signature_scheme", {}, "{}"),
            ("ip", "", "''"), ("ip", 7, "7"), ("ip", "a b", "'a b'"), ("ip", "1.2.3.4/x", "'1.2.3.4/x'"),
            ("kernel_name", 3, "3"), ("ip", "\ud800", "'\\ud800'"), ("hb_port", 50001, "50001 as another is"),
            *(("curve_publickey", value, "is not a key")
              for value in ("short", "#" * 40, "p" * 41, "p" * 39 + "\"", "é" * 20)),
        ]:
            with self.subTest(name=name, value=value):
                message = self.refuse(json.dumps({**GOOD, name: value}), says=name)
                self.assertIn(shown, message)

    def test_a_missing_member_is_named(self):
        for name in ("ip", "key", "shell_port", "iopub_port", "stdin_port", "control_port", "hb_port"):
            for members in ({k: v for k, v in GOOD.items() if k != name}, {**GOOD, name: None}):
                with self.subTest(name=name):
                    self.refuse(json.dumps(members), says=f"no {name!r}")

    def test_the_value_of_a_key_is_never_shown(self):
        for name in ("key", "curve_publickey", "curve_secretkey"):
            for value in (["hush-hush"], "hush-hush\ud800", {"a": "hush-hush"}):
                self.assertNotIn("hush", self.refuse(json.dumps({**GOOD, "curve_secretkey": "hush" * 9, name: value})))

    def test_a_kernel_needs_both_curve_keys(self):
        members = json.dumps({**GOOD, "curve_publickey": PUBLIC.decode()})
        self.refuse(members, says="curve_secretkey", as_kernel=True)
        self.assertEqual(connection.read_connection_file(self.put(members)).curve_publickey, PUBLIC)

    def test_a_kernel_may_be_given_port_0_and_a_client_not(self):
        members = json.dumps({**GOOD, "shell_port": 0, "hb_port": 0})
        info = connection.read_connection_file(self.put(members), as_kernel=True)
        self.assertEqual((info.shell_port, info.hb_port, info.iopub_port), (0, 0, 50002))
        self.refuse(members, says="shell_port is 0")

    def test_an_ipc_port_0_becomes_a_number_that_is_free(self):
        ports = {f"{channel}_port": 0 for channel in connection.CHANNELS}
        self.put("", "k-2")
        members = {**GOOD, **ports, "transport": "ipc", "ip": self.path("k"), "stdin_port": 3}
        info = connection.read_connection_file(self.put(json.dumps(members)), as_kernel=True)
        self.assertEqual([info.port(c) for c in connection.CHANNELS], [1, 4, 3, 5, 6])

    def test_an_ipc_path_beyond_the_limit_of_the_system_is_refused_with_the_number(self):
        members = {**GOOD, "transport": "ipc", "ip": "/" + "x" * connection.IPC_PATH_LIMIT}
        self.refuse(json.dumps(members), says="7 bytes too long")

    def test_a_file_that_does_not_exist_says_so(self):
        self.refused(2, connection.read_connection_file, self.path("none.json"), says="no such file")


class UnsafeFiles(Case):
    def refuse(self, path, says):
        message = self.refused(5, connection.read_connection_file, path, says=says)
        self.assertIn(path, message)

    def test_a_file_that_others_can_read_or_write_is_refused(self):
        for mode in (0o644, 0o666, 0o640, 0o620, 0o602, 0o777):
            self.refuse(self.put(json.dumps(GOOD), mode=mode), f"mode {mode:04o}")

    @unittest.skipUnless(IS_ROOT, "only root can give a file away")
    def test_a_file_of_another_user_is_refused(self):
        path = self.put(json.dumps(GOOD))
        os.chown(path, NOBODY, NOBODY)
        self.refuse(path, f"uid {NOBODY}")

    def test_what_is_no_file_is_refused_without_waiting_and_a_link_even_to_a_good_one(self):
        os.symlink(self.put(json.dumps(GOOD)), self.path("link"))
        os.mkfifo(self.path("fifo"), 0o600)
        os.mkdir(self.path("folder"), 0o700)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.path("socket"))
            for name, says in (("link", "is a symbolic link"), ("fifo", "not a regular file"),
                               ("folder", "not a regular file"), ("socket", "")):
                self.refuse(self.path(name), says)

    def test_a_file_without_its_right_to_be_read_is_refused(self):
        if IS_ROOT:
            self.skipTest("root reads everything")
        self.refuse(self.put(json.dumps(GOOD), mode=0), "Permission denied")


class Writing(Case):
    def test_files_and_folders_are_private_under_any_umask(self):
        for umask in (0o000, 0o022, 0o277, 0o777):
            before = os.umask(umask)
            try:
                with mock.patch.dict(os.environ, TWOPROC_RUNTIME=self.path(f"run-{umask:o}")):
                    path, info = connection.new_connection()
                    with Claim(path):
                        connection.write_connection_file(path, info)
                        modes = [self.mode(p) for p in (path, connection.lock_path(path))]
                        folders = [self.mode(connection.runtime_folder()), self.mode(connection.kernels_folder())]
            finally:
                os.umask(before)
            self.assertEqual((modes, folders), ([0o600, 0o600], [0o700, 0o700]), f"umask {umask:o}")

    def test_a_reader_sees_the_old_file_or_the_new_one_and_nothing_else(self):
        path, info = connection.new_connection()
        connection.write_connection_file(path, info._replace(kernel_name="old" * 1000))
        child = self.process("""
path = sys.argv[1]
info = read_connection_file(path)
while sys.stdin.readable() and os.path.exists(path):
    write_connection_file(path, info._replace(kernel_name=("new", "old")[info.kernel_name[:3] == "new"] * 1000))
    info = read_connection_file(path)
""", path)
        seen = set()
        end = time.monotonic() + support.DEADLINE
        while len(seen) < 2 and time.monotonic() < end:
            seen.add(connection.read_connection_file(path).kernel_name)
        self.assertEqual(seen, {"old" * 1000, "new" * 1000})
        self.end(child)

    def test_a_link_or_a_second_name_in_the_way_is_left_alone(self):
        victim = self.put("precious", "victim")
        path = self.path("kernel.json")
        info = connection.new_connection()[1]
        for place in (os.symlink, os.link):
            place(victim, path)
            self.refused(5, connection.write_connection_file, path, info, says="link")
            os.unlink(path)
        os.symlink(self.path("nothing"), path)
        self.refused(5, connection.write_connection_file, path, info, says="symbolic link")
        self.assertEqual(sorted(os.listdir(self.home)), ["kernel.json", "run", "victim"])
        with open(victim) as file:
            self.assertEqual(file.read(), "precious")

    def test_a_fifo_a_folder_and_an_open_file_in_the_way_are_left_alone(self):
        info = connection.new_connection()[1]
        os.mkfifo(self.path("fifo.json"))
        os.mkdir(self.path("folder.json"))
        self.put("{}", "open.json", mode=0o666)
        for name, says in (("fifo", "not a regular file"), ("folder", "not a regular file"), ("open", "mode 0666")):
            self.refused(5, connection.write_connection_file, self.path(f"{name}.json"), info, says=says)
        self.assertTrue(stat.S_ISFIFO(os.lstat(self.path("fifo.json")).st_mode))

    @unittest.skipUnless(IS_ROOT, "only root can give a file away")
    def test_a_file_of_another_user_in_the_way_is_left_alone(self):
        path = self.put("theirs")
        os.chown(path, NOBODY, NOBODY)
        self.refused(5, connection.write_connection_file, path, connection.new_connection()[1], says=f"uid {NOBODY}")
        with open(path) as file:
            self.assertEqual(file.read(), "theirs")

    def test_a_disk_that_is_full_leaves_one_line_and_no_file(self):
        path, info = connection.new_connection()
        with mock.patch("os.replace", side_effect=OSError(28, "No space left on device")):
            self.refused(5, connection.write_connection_file, path, info, says="No space left on device")
        self.assertEqual(os.listdir(connection.kernels_folder()), [os.path.basename(path) + ".lock"])

    def test_a_folder_that_is_missing_is_named(self):
        info = connection.new_connection()[1]
        self.refused(5, connection.write_connection_file, self.path("no", "k.json"), info, says="No such file")


class RuntimeFolder(Case):
    def test_its_place_is_chosen_by_variable_then_session_then_user(self):
        self.assertEqual(connection.runtime_folder(), self.runtime)
        session, temporary = self.path("session"), self.path("tmp")
        os.mkdir(session, 0o700)
        os.mkdir(temporary, 0o700)
        with mock.patch.dict(os.environ, TWOPROC_RUNTIME="", XDG_RUNTIME_DIR=session, TMPDIR=temporary):
            self.assertEqual(connection.runtime_folder(), os.path.join(session, "twoproc"))
            os.environ["XDG_RUNTIME_DIR"] = self.path("missing")
            self.assertEqual(connection.runtime_folder(), os.path.join(temporary, f"twoproc-{os.geteuid()}"))
            os.environ["XDG_RUNTIME_DIR"] = "session"    # relative: the specification says to ignore it
            self.assertEqual(connection.runtime_folder(), os.path.join(temporary, f"twoproc-{os.geteuid()}"))

    @unittest.skipUnless(IS_ROOT, "only root can give a folder away")
    def test_the_session_folder_of_another_user_is_passed_over(self):
        os.mkdir(self.path("session"), 0o700)
        os.chown(self.path("session"), NOBODY, NOBODY)
        with mock.patch.dict(os.environ, TWOPROC_RUNTIME="", XDG_RUNTIME_DIR=self.path("session"), TMPDIR=self.home):
            self.assertEqual(connection.runtime_folder(), self.path(f"twoproc-{os.geteuid()}"))

    def test_a_relative_variable_is_refused(self):
        with mock.patch.dict(os.environ, TWOPROC_RUNTIME="run"):
            self.refused(2, connection.runtime_folder, says="whole path")

    def test_an_open_folder_is_refused_and_not_repaired(self):
        os.mkdir(self.runtime)
        for mode in (0o777, 0o755, 0o750, 0o701):
            os.chmod(self.runtime, mode)
            self.refused(5, connection.runtime_folder, says=f"mode {mode:04o}")
            self.assertEqual(self.mode(self.runtime), mode)
        os.chmod(self.runtime, 0o1700)      # as Jupyter leaves its folders
        self.assertEqual(connection.runtime_folder(), self.runtime)

    def test_a_link_a_file_and_a_fifo_are_refused(self):
        os.mkdir(self.path("real"), 0o700)
        for make, says in ((lambda p: os.symlink(self.path("real"), p), "symbolic link"),
                           (lambda p: os.symlink(self.path("nothing"), p), "symbolic link"),
                           (lambda p: os.close(os.open(p, os.O_CREAT, 0o600)), "not a folder"),
                           (lambda p: os.mkfifo(p, 0o600), "not a folder")):
            make(self.runtime)
            self.refused(5, connection.runtime_folder, says=says)
            os.unlink(self.runtime)
        self.assertEqual(os.listdir(self.path("real")), [])

    @unittest.skipUnless(IS_ROOT, "only root can give a folder away")
    def test_a_folder_of_another_user_is_refused(self):
        os.mkdir(self.runtime, 0o700)
        os.chown(self.runtime, NOBODY, NOBODY)
        self.refused(5, connection.runtime_folder, says=f"uid {NOBODY}")

    def test_the_folder_of_the_kernels_inside_is_looked_at_too(self):
        os.mkdir(self.runtime, 0o700)
        os.symlink(self.home, os.path.join(self.runtime, "kernels"))
        self.refused(5, connection.new_connection, says="symbolic link")

    def test_a_folder_that_everybody_may_rename_is_refused(self):
        os.chmod(self.home, 0o777)
        self.refused(5, connection.runtime_folder, says="sticky bit")
        os.chmod(self.home, 0o1777)
        self.assertEqual(connection.runtime_folder(), self.runtime)

    def test_a_folder_that_cannot_be_made_says_why(self):
        with mock.patch.dict(os.environ, TWOPROC_RUNTIME="/proc/twoproc" if sys.platform == "linux" else "/no/such"):
            self.refused(5, connection.runtime_folder, says="TWOPROC_RUNTIME")


class NewConnections(Case):
    def test_a_name_is_an_animal_and_a_number(self):
        path, info = connection.new_connection()
        self.assertRegex(connection.kernel_name_of(path), r"^[a-z]+-[0-9]+$")
        self.assertEqual(info.url("shell"), f"ipc://{path[:-5]}-1")
        self.assertRegex(info.key, rb"^[0-9a-f]{64}$")
        self.assertFalse(os.path.exists(path), "the kernel writes it, after it has bound")

    def test_fifty_processes_at_once_get_fifty_names_and_files(self):
        code = """
sys.stdin.readline()
path, info = new_connection()
claim = Claim(path)
write_connection_file(path, info)
print(path, flush=True)
sys.stdin.readline()
remove_files(path, info)
claim.release()
"""
        # A small zoo, so that without the reservation the names would collide.
        code = "from twoproc import connection; connection.ANIMALS = ['ant']\n" + code
        children = [self.process(code) for _ in range(50)]
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        paths = {child.stdout.readline().strip() for child in children}
        self.assertEqual(len(paths - {""}), 50, [c.stderr.read() for c in children if c.poll()][:1])
        self.assertEqual(set(connection.alive_kernels()), paths)
        self.assertEqual(len({connection.read_connection_file(path).key for path in paths}), 50)
        for child in children:
            self.assertEqual(child.communicate("\n", timeout=support.DEADLINE)[1], "")
        self.assertEqual(os.listdir(connection.kernels_folder()), [])

    def test_a_name_cannot_lead_out_of_the_folder(self):
        for name in ("", "..", ".", "../x", "a/b", "/etc/x", ".hidden", "-x", "a\nb", "a b", "a\0b"):
            with self.subTest(name=name):
                self.refused(2, connection.new_connection, name=name, says="kernel name")
        self.assertEqual(os.path.basename(connection.new_connection(name="lab_2.b-c")[0]), "lab_2.b-c.json")

    def test_tcp_listens_on_this_machine_on_ports_to_be_chosen(self):
        self.refused(2, connection.new_connection, "udp", says="'udp'")
        info = connection.new_connection("tcp")[1]
        self.assertEqual([info.url(c) for c in connection.CHANNELS], ["tcp://127.0.0.1:0"] * 5)

    def test_sockets_of_a_file_elsewhere_are_in_the_private_folder(self):
        path, info = connection.new_connection(path=self.path("given.json"))
        self.assertEqual(path, self.path("given.json"))
        self.assertEqual(os.path.dirname(info.ip), connection.kernels_folder())

    def test_a_folder_with_a_name_too_long_for_sockets_is_refused_with_the_number(self):
        deep = self.path("d" * 90)
        os.mkdir(deep, 0o700)
        with mock.patch.dict(os.environ, TWOPROC_RUNTIME=os.path.join(deep, "run")):
            self.refused(2, connection.new_connection, says="bytes too long")
            connection.new_connection("tcp")


class Claims(Case):
    def test_a_second_claim_names_the_process_that_has_the_first(self):
        path, _ = connection.new_connection(name="lab")
        child = self.process("claim = Claim(sys.argv[1]); print(flush=True); sys.stdin.read()", path)
        child.stdout.readline()
        for try_it in (lambda: Claim(path), lambda: connection.new_connection(name="lab")):
            self.refused(3, try_it, says=f"pid {child.pid}")
        self.assertTrue(connection.is_claimed(path))
        child.communicate("", timeout=support.DEADLINE)
        self.assertFalse(connection.is_claimed(path))
        Claim(path).release()
        self.assertEqual(connection.new_connection(name="lab")[0], path)

    def test_two_claims_exclude_each_other_within_a_process_too(self):
        path, _ = connection.new_connection()
        with Claim(path):
            self.refused(3, Claim, path, says=f"pid {os.getpid()}")
        self.assertFalse(os.path.exists(connection.lock_path(path)))

    def test_a_claim_ends_with_sigkill_though_a_forked_child_lives_on(self):
        path, _ = connection.new_connection()
        child = self.process("""
claim = Claim(sys.argv[1])
os.register_at_fork(after_in_child=claim.close)
if os.fork() == 0:
    print("forked", flush=True)
    sys.stdin.read()            # until the test ends, long after the parent
    os._exit(0)
sys.stdin.read()
""", path)
        self.assertEqual(child.stdout.readline(), "forked\n")
        self.assertTrue(connection.is_claimed(path))
        os.kill(child.pid, signal.SIGKILL)
        child.wait(support.DEADLINE)
        self.assertFalse(connection.is_claimed(path))

    def test_a_forked_child_that_ends_does_not_end_the_claim(self):
        path, _ = connection.new_connection()
        with Claim(path) as claim:
            pid = os.fork()
            if pid == 0:
                claim.close()
                claim.release()
                os._exit(0)
            os.waitpid(pid, 0)
            self.assertTrue(connection.is_claimed(path))

    def test_a_program_started_by_the_kernel_does_not_keep_the_claim(self):
        path, _ = connection.new_connection()
        claim = Claim(path)
        child = self.process("sys.stdin.read()", close_fds=False)
        claim.release()
        self.assertIsNone(child.poll())
        Claim(path).release()

    def test_a_lock_unlinked_between_open_and_lock_is_not_mistaken_for_ours(self):
        path, _ = connection.new_connection()
        lock = connection.lock_path(path)
        real, rounds = connection.try_lock, []

        def meanwhile_it_ends(fd, *args, **options):
            if not rounds:
                os.unlink(lock)     # its old holder, releasing
            rounds.append(fd)
            return real(fd, *args, **options)

        with mock.patch.object(connection, "try_lock", meanwhile_it_ends):
            claim = Claim(path)
        self.assertEqual(len(rounds), 2)
        self.refused(3, Claim, path, says="in use")
        claim.release()

    def test_what_was_placed_at_the_lock_is_not_touched(self):
        victim = self.put("precious", "victim")
        path = self.path("k.json")
        lock = connection.lock_path(path)
        for place in (lambda: os.symlink(victim, lock), lambda: os.symlink(self.path("none"), lock),
                      lambda: os.link(victim, lock), lambda: os.mkfifo(lock, 0o600), lambda: os.mkdir(lock, 0o700),
                      lambda: os.close(os.open(lock, os.O_CREAT, 0o644))):
            place()
            before = os.lstat(lock)
            self.refused(5, Claim, path, says=lock)
            self.assertFalse(connection.is_claimed(path))
            self.assertEqual(os.lstat(lock), before)
            (os.rmdir if stat.S_ISDIR(before.st_mode) else os.unlink)(lock)
        with open(victim) as file:
            self.assertEqual(file.read(), "precious")
        self.assertFalse(os.path.exists(self.path("none")))

    def test_a_file_system_without_locks_gives_a_note_and_no_refusal(self):
        path, _ = connection.new_connection()
        with mock.patch("fcntl.flock", side_effect=OSError(95, "Operation not supported")):
            with Claim(path) as claim:
                self.assertIn("no locks", claim.note)
                self.assertTrue(connection.is_claimed(path), "unknown counts as alive")
                connection.write_connection_file(path, connection.new_connection()[1])
                connection.remove_stale()
                self.assertTrue(os.path.exists(path))

    def test_many_who_look_do_not_keep_a_kernel_from_its_name(self):
        path, _ = connection.new_connection()
        code = "print(flush=True)\nwhile os.path.exists(sys.argv[2]): is_claimed(sys.argv[1])"
        children = [self.process(code, path, self.home) for _ in range(2)]
        for child in children:
            child.stdout.readline()
        for _ in range(100):
            Claim(path).release()


class StaleFiles(Case):
    def kernel(self, name=None):
        """A process that holds a connection file with its five sockets; (process, path)."""
        child = self.process("""
import socket
path, info = new_connection(name=sys.argv[1] or None)
claim = Claim(path)
socks = [socket.socket(socket.AF_UNIX) for _ in CHANNELS]
for sock, place in zip(socks, info.ipc_paths()):
    sock.bind(place)
    sock.listen()
write_connection_file(path, info)
publish_to_jupyter(path, info)
open(log_path(path), "w").close()
print(path, flush=True)
sys.stdin.read()
""", name or "")
        return child, child.stdout.readline().strip()

    def kill(self, child):
        child.kill()
        child.wait(support.DEADLINE)

    def test_what_a_killed_kernel_left_is_removed_and_a_living_one_keeps_all(self):
        dead = self.kernel("dead")[0]
        self.kernel("living")
        before = {name for name in os.listdir(connection.kernels_folder()) if name.startswith("living")}
        self.assertEqual(len(before), 8)
        self.kill(dead)
        connection.remove_stale()
        self.assertEqual(set(os.listdir(connection.kernels_folder())), before)
        self.assertEqual(os.listdir(self.jupyter), ["kernel-living.json"])

    def test_a_process_number_that_lives_again_does_not_make_a_file_alive(self):
        child, path = self.kernel()
        self.kill(child)
        with open(connection.lock_path(path), "w") as file:
            file.write(f"{os.getpid()}\n")       # as if our number had been the kernel's
        self.assertEqual(connection.holder_pid(path), os.getpid())
        self.assertFalse(connection.is_claimed(path))
        connection.remove_stale()
        self.assertFalse(os.path.exists(path))

    def test_a_file_that_cannot_be_read_goes_too_and_its_sockets_once_they_are_old(self):
        child, path = self.kernel()
        self.kill(child)
        with open(path, "w") as file:
            file.write("not json")
        connection.remove_stale()
        left = os.listdir(connection.kernels_folder())
        self.assertEqual(len(left), 5)
        for name in left:
            os.utime(os.path.join(connection.kernels_folder(), name), (0, 0))
        connection.remove_stale()
        self.assertEqual(os.listdir(connection.kernels_folder()), [])

    def test_an_old_socket_with_somebody_behind_it_stays(self):
        place = os.path.join(connection.kernels_folder(), "a-1")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(place)
            sock.listen()
            os.utime(place, (0, 0))
            connection.remove_stale()
            self.assertTrue(os.path.exists(place))

    def test_a_name_just_reserved_is_left_for_its_kernel(self):
        child, path = self.kernel()
        self.refused(3, connection.reserve, path, says=f"pid {child.pid}")
        self.kill(child)
        connection.reserve(path)        # its kernel is started again
        new = connection.new_connection()[0]
        connection.remove_stale()
        for name in (path, connection.lock_path(path), connection.lock_path(new)):
            self.assertTrue(os.path.exists(name))
        for name in (path, new):
            os.utime(connection.lock_path(name), (0, 0))
        connection.remove_stale()
        self.assertEqual(os.listdir(connection.kernels_folder()), [])

    def test_the_log_of_a_kernel_that_has_gone_is_removed_and_the_log_of_one_that_is_there_stays(self):
        gone, there = (connection.log_path(path) for path in ("gone.json", self.kernel()[1]))
        gone = os.path.join(connection.kernels_folder(), gone)
        for log in (gone, there):
            with open(log, "w"):
                os.utime(log, (0, 0))
        connection.remove_stale()
        self.assertEqual((os.path.exists(gone), os.path.exists(there)), (False, True))

    def test_two_who_tidy_up_while_others_start_remove_nothing_that_lives(self):
        tidy = "print(flush=True)\nwhile os.path.exists(sys.argv[1]): remove_stale()"
        children = [self.process(tidy, self.home) for _ in range(2)]
        for child in children:
            child.stdout.readline()
        for _ in range(30):
            path, info = connection.new_connection(name="lab")
            with Claim(path):
                connection.write_connection_file(path, info)
                self.assertTrue(connection.is_claimed(path))
                self.assertEqual(connection.read_connection_file(path), info)
                connection.remove_files(path, info)
        for child in children:
            self.assertIsNone(child.poll(), "tidying up failed")

    def test_files_are_removed_only_while_they_are_those_of_this_kernel(self):
        path, info = connection.new_connection()
        connection.write_connection_file(path, info._replace(key=b"another"))
        connection.remove_files(path, info)
        self.assertTrue(os.path.exists(path))


class Finding(Case):
    def start(self, name, age=0):
        path, info = connection.new_connection(name=name)
        claim = Claim(path)
        self.addCleanup(claim.release)
        connection.write_connection_file(path, info)
        os.utime(path, (1e9 - age, 1e9 - age))
        return path

    def test_without_a_name_the_newest_living_kernel_is_meant(self):
        self.start("old-1", age=10)
        newest = self.start("otter-3")
        dead, info = connection.new_connection(name="dead")
        connection.write_connection_file(dead, info)
        self.assertEqual(connection.find_connection_file(), newest)

    def test_without_a_kernel_it_says_so(self):
        self.refused(2, connection.find_connection_file, says="no kernel is running")

    def test_a_name_or_its_unique_beginning_is_enough(self):
        path, exact = self.start("otter-31"), self.start("otter-3")
        self.start("owl-1")
        for name, expected in (("otter-31", path), ("otter-3", exact), ("otter-31.json", path)):
            self.assertEqual(connection.find_connection_file(name), expected)
        message = self.refused(2, connection.find_connection_file, "ot", says="several begin so")
        self.assertTrue(message.endswith("otter-3, otter-31"), message)
        self.assertTrue(connection.find_connection_file("ow").endswith("owl-1.json"))

    def test_an_unknown_or_dead_name_is_answered_with_those_there_are(self):
        self.start("otter-3")
        dead, info = connection.new_connection(name="dead")
        connection.write_connection_file(dead, info)
        for name in ("yak", "dead"):
            self.refused(2, connection.find_connection_file, name, says="there are: otter-3")

    def test_kernels_of_jupyter_are_found_by_their_names(self):
        os.mkdir(self.jupyter)
        path = self.put(json.dumps(GOOD), "jupyter/kernel-4711.json")
        for name in ("kernel-4711.json", "kernel-4711", "4711", "47"):
            self.assertEqual(connection.find_connection_file(name), path)

    def test_a_published_copy_is_no_second_kernel(self):
        path = self.start("otter-3")
        connection.publish_to_jupyter(path, connection.read_connection_file(path))
        self.assertEqual(self.mode(os.path.join(self.jupyter, "kernel-otter-3.json")), 0o600)
        for name in ("ot", "otter-3", "kernel-otter-3.json"):
            self.assertEqual(connection.find_connection_file(name), path)

    def test_a_path_is_taken_as_it_is(self):
        path = self.put(json.dumps(GOOD))
        self.assertEqual(connection.find_connection_file(path), path)
        self.assertEqual(connection.find_connection_file("~/kernel.json"), path)
        self.refused(2, connection.find_connection_file, self.path("none.json"), says="no such file")

    def test_a_bare_name_is_not_looked_for_in_the_current_directory(self):
        os.mkdir(self.path("kernels"))
        for name in ("kernel-9.json", "kernels/kernel-9.json", "kernels/yak-1.json"):
            self.put(json.dumps(GOOD), name)
        before = os.getcwd()
        os.chdir(self.home)
        self.addCleanup(os.chdir, before)
        for name in ("kernel-9.json", "kernel-9", "9", "yak-1"):
            self.refused(2, connection.find_connection_file, name, says="no such kernel")


class Listening(Case):
    def info(self, **members):
        return ConnectionInfo("tcp", "127.0.0.1", 1, 2, 3, 4, 5, b"key")._replace(**members)

    def test_what_counts_as_this_machine(self):
        for ip in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "::ffff:127.0.0.1", "localhost"):
            self.assertTrue(connection.is_loopback(ip), ip)
        for ip in ("", "*", "0.0.0.0", "::", "[::]", "::ffff:0.0.0.0", "::ffff:10.0.0.1", "10.0.0.1", "fe80::1%lo",
                   "lo", socket.gethostname(), "a" * 300, "\ud800", "127.0.0.1.example.invalid"):
            self.assertFalse(connection.is_loopback(ip), ip)

    def test_an_address_for_strangers_needs_curve_keys(self):
        for ip in ("0.0.0.0", "*", "::", "192.0.2.7"):
            self.refused(5, connection.check_listening, self.info(ip=ip), says="CURVE")
            self.refused(5, connection.check_listening, self.info(ip=ip, curve_publickey=PUBLIC), says="CURVE")
            keys = self.info(ip=ip, curve_publickey=PUBLIC, curve_secretkey=SECRET)
            self.assertEqual(connection.check_listening(keys), [])
            self.refused(5, connection.check_listening, keys._replace(key=b""), says="key is empty")

    def test_this_machine_needs_none_and_an_empty_key_is_warned_of(self):
        for info in (self.info(), self.info(ip="::1"), self.info(transport="ipc", ip="/x")):
            self.assertEqual(connection.check_listening(info), [])
            self.assertEqual(len(connection.check_listening(info._replace(key=b""))), 1)


class Import(unittest.TestCase):
    def test_importing_neither_reads_nor_writes_nor_registers(self):
        code = ("import hashlib, ipaddress, json, os, secrets, socket\n"
                "os.register_at_fork = os.mkdir = os.open = os.getuid = socket.getaddrinfo = None\n"
                "import twoproc.connection")
        environ = {**os.environ, "PYTHONPATH": support.ROOT}
        done = subprocess.run([sys.executable, "-S", "-c", code], env=environ, capture_output=True, text=True,
                              timeout=support.DEADLINE)
        self.assertEqual((done.returncode, done.stderr), (0, ""))


if __name__ == "__main__":
    unittest.main()
