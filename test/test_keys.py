# Distributed under the terms of the BSD 3-Clause License.
"""`python -m twoproc.keys`: pairs, authorised keys and known kernels, changed by real processes, several at once."""
import glob
import hashlib
import os
import re
import stat
import sys
import tempfile
import unittest
from datetime import date, timedelta
from unittest import mock

import zmq

from twoproc import access, keys
from twoproc.connection import ConnectionFileError, fingerprint, try_lock, z85_of

from . import support

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
ALICE, BOB, CAROL = "a1" * 32, "b0" * 32, "ca" * 32


class Commands(unittest.TestCase):
    """A home of its own for each test; what a command said is looked through for secrets."""

    def setUp(self):
        self.home = support.Home(self)
        self.folder = os.path.join(self.home.path, "config", "twoproc")
        self.authorized = os.path.join(self.folder, "authorized_keys")

    def path(self, name):
        return os.path.join(self.folder, name)

    def start(self, *arguments, prefix=()):
        return support.Process(self, [*prefix, sys.executable, "-m", "twoproc.keys", *arguments], home=self.home)

    def keys(self, *arguments, status=0, says="", **options):
        """What the command printed; its refusal, if it has a status, is one line."""
        process = self.start(*arguments, **options)
        found, log = process.wait(), process.log()
        self.assertEqual(found, status, log)
        self.assertNotIn("Traceback", log)
        for name in ("host_key", "id_key"):
            if os.path.isfile(self.path(name)):
                self.assertNotIn(self.secret(name), log)
        if not status:
            return process.output()
        message = log.removeprefix(process.output())
        self.assertEqual(process.output(), "")
        self.assertRegex(message, r"\Atwoproc\.keys: .*\n\Z")
        self.assertIn(says, message)
        return message

    def secret(self, name):
        return re.search("secret (.*)", self.read(self.path(name)))[1]

    def read(self, path):
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()

    def put(self, text, name="authorized_keys", mode=0o600):
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        with open(self.path(name), "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(self.path(name), mode)
        return self.path(name)

    def mode(self, path):
        return stat.S_IMODE(os.lstat(path).st_mode)


class MakingAPair(Commands):
    def test_new_prints_the_line_to_hand_over_and_keeps_a_pair_that_curve_accepts(self):
        line = self.keys("new", "--name", "alice")
        self.assertRegex(line, r"\Arun [0-9a-f]{64} alice\n\Z")
        pair = keys.load_pair(self.path("id_key"))
        self.assertEqual((pair.public, pair.name), (line.split()[1], "alice"))
        self.assertEqual(zmq.curve_public(z85_of(pair.secret)), z85_of(pair.public))
        self.assertNotIn(pair.secret, repr(pair) + str(pair))
        self.assertEqual(self.keys("show"), line)

    def test_new_host_prints_the_address_with_the_port_that_is_set(self):
        address = self.keys("--set", "network.port_base=30000", "new", "--host")
        public = keys.load_pair(self.path("host_key")).public
        self.assertRegex(address, rf"\Atwoproc://\S+:30000/{public}\n\Z")
        self.assertEqual(self.keys("show", "--host", "lab"), f"twoproc://lab:20555/{public}\n")
        self.assertEqual(self.keys("show", "--host", "fd00::7"), f"twoproc://[fd00::7]:20555/{public}\n")

    def test_files_and_folders_are_private_under_any_umask(self):
        prefix = (sys.executable, "-c", "import os, sys; os.umask(0); os.execvp(sys.argv[1], sys.argv[1:])")
        self.keys("new", prefix=prefix)
        self.keys("new", "--host", prefix=prefix)
        self.keys("authorize", f"run {ALICE} alice", prefix=prefix)
        for name in os.listdir(self.folder):
            self.assertEqual(self.mode(self.path(name)), 0o600, name)
        self.assertEqual({self.mode(self.folder), self.mode(os.path.dirname(self.folder))}, {0o700})

    def test_a_key_that_is_there_is_never_overwritten(self):
        self.keys("new", "--name", "alice")
        before = self.read(self.path("id_key"))
        self.keys("new", "--name", "bob", status=5, says="there is a key already")
        os.unlink(self.path("id_key"))
        os.symlink(self.path("elsewhere"), self.path("id_key"))
        self.keys("new", status=5, says="there is a key already")
        self.assertEqual(os.listdir(self.folder), ["id_key"])
        self.put(before, "id_key") if not os.path.islink(self.path("id_key")) else None

    def test_of_two_at_once_one_makes_the_key(self):
        started = [self.start("new", "--name", name) for name in ("alice", "bob")]
        self.assertEqual(sorted(process.wait() for process in started), [0, 5])
        winner = next(process for process in started if process.wait() == 0)
        pair = keys.load_pair(self.path("id_key"))
        self.assertEqual(winner.output(), f"run {pair.public} {pair.name}\n")

    def test_a_name_that_the_other_side_could_not_read_is_refused(self):
        for name in ("", "a b", "a#b", "x" * 65, "\x1b[1m", "a from=::1"):
            self.keys("new", "--name", name, status=2, says="--name")
        self.assertFalse(os.path.exists(self.folder))

    def test_without_a_key_the_commands_say_how_to_make_one(self):
        self.keys("show", status=5, says="keys new")
        self.keys("fingerprint", status=5, says="keys new")
        self.keys("show", "--host", "lab", status=5, says="keys new --host")

    def test_a_key_file_that_is_no_key_file_or_open_to_others_is_not_used(self):
        good = f"name a\npublic {ALICE}\nsecret {BOB}\n"
        for text, mode, says in ((good, 0o640, "mode 0640"), (good, 0o604, "mode 0604"), ("", 0o600, "no key file"),
                                 (good.replace("secret b", "secret B"), 0o600, "no key file"),
                                 (f"public {ALICE}\n", 0o600, "no key file"), ("\0" * 5000, 0o600, "no key file")):
            with self.subTest(says=says), self.assertRaises(ConnectionFileError) as caught:
                keys.load_pair(self.put(text, "id_key", mode))
            self.assertIn(says, str(caught.exception))
            self.assertEqual(caught.exception.exit_code, 5)
            self.assertNotIn(BOB[:8], str(caught.exception))
        self.put(good, "id_key", 0o644)
        self.keys("show", status=5, says="mode 0644")
        self.assertEqual(keys.load_pair(self.put(good, "id_key")), (ALICE, BOB, "a"))
        with self.assertRaises(FileNotFoundError):
            keys.load_pair(self.path("none"))

    def test_a_disk_that_is_full_leaves_no_half_a_key(self):
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
            with self.assertRaisesRegex(ConnectionFileError, "No space left on device; no key was made"):
                keys.new_pair(self.path("id_key"), "alice")
        self.assertEqual(os.listdir(self.folder), [])


class Authorizing(Commands):
    def current(self):
        current = access.AuthorizedKeys(self.authorized).current().values()
        return {key.name: str(key).partition(" ")[0] for key in current}

    def test_the_line_that_new_printed_lets_its_owner_in_and_revoke_ends_it(self):
        line = self.keys("new", "--name", "alice").strip()
        said = self.keys("authorize", line)
        self.assertIn("alice has the right 'run'", said)
        self.assertIn(self.keys("fingerprint").split()[0], said)
        self.assertEqual(self.current(), {"alice": "run"})
        self.assertIn("withdrawn: run alice", self.keys("revoke", "alice"))
        self.assertEqual(self.current(), {})
        self.keys("revoke", "alice", status=2, says="no key of 'alice'; there are keys of: nobody")

    def test_what_the_owner_grants_counts_and_not_what_the_line_asks_for(self):
        self.keys("authorize", "--view", f"admin {ALICE} alice")
        self.keys("authorize", BOB, "bob", "--input", "--from", "10.0.0.0/8,::1", "--expires", "2199-12-31")
        self.assertEqual(self.read(self.authorized), f"view {ALICE} alice\n"
                         f"input {BOB} bob from=10.0.0.0/8,::1/128 expires=2199-12-31\n")

    def test_a_line_that_is_wrong_is_refused_and_nothing_is_written(self):
        for arguments, says in (
            ([f"{ALICE} alice"], "is no right"), (["run", "alice"], "64 hexadecimal digits"),
            ([f"run {ALICE}"], "name"),
            ([""], "nothing in it"), (["#"], "nothing in it"), ([f"twoproc://lab:20555/{ALICE}"], "is no right"),
            ([f"run {ALICE} a", "--from", "lab"], "networks like"), ([f"run {ALICE} a", "--expires", "soon"], "a date"),
            ([f"run {ALICE} a", "--expires", str(date.today() - timedelta(1))], "is over"),
            ([f"run {ALICE} a\nadmin {BOB} b"], "is not known here"),
        ):
            with self.subTest(arguments=arguments):
                self.keys("authorize", *arguments, status=2, says=says)
        self.assertFalse(os.path.exists(self.authorized))

    def test_a_key_that_is_there_is_refused_with_its_line(self):
        self.put(f"# mine\nview {ALICE.upper()} alice expires=2001-01-01\n")
        self.keys("authorize", f"run {ALICE} other", status=2, says="line 2: this key is there already, as alice")

    def test_everything_else_in_the_file_stays_as_it_is(self):
        text = f"# keys\r\nrun {ALICE} alice # laptop\r\n\r\nnonsense é\n  view {BOB} bob"
        self.put(text)
        self.keys("authorize", f"run {CAROL} carol")
        self.assertEqual(self.read(self.authorized), f"{text}\nrun {CAROL} carol\n")
        self.keys("revoke", "carol")
        self.assertEqual(self.read(self.authorized), f"{text}\n")
        self.keys("revoke", "alice")
        self.assertEqual(self.read(self.authorized), f"# keys\r\n\r\nnonsense é\n  view {BOB} bob\n")

    def test_a_key_is_revoked_by_name_key_or_fingerprint(self):
        for who in (ALICE, ALICE.upper(), fingerprint(ALICE), fingerprint(ALICE)[7:]):
            self.put(f"run {ALICE} alice\nrun {BOB} bob\n")
            with self.subTest(who=who):
                self.assertEqual([key.name for key in keys.revoke(self.authorized, who)], ["alice"])
                self.assertEqual(self.current(), {"bob": "run"})
        self.put(f"run {ALICE} eve\nrun {BOB} bob\nview {CAROL} eve\n")
        self.assertEqual(self.keys("revoke", "eve").count("withdrawn:"), 2)
        self.assertEqual(self.current(), {"bob": "run"})

    def test_both_lines_of_a_key_that_stands_there_twice_are_revoked(self):
        self.put(f"run {ALICE} alice\nview {ALICE} again\n")
        self.assertEqual(len(keys.revoke(self.authorized, ALICE)), 2)
        self.assertEqual(self.read(self.authorized), "")

    def test_many_at_once_lose_nothing(self):
        """Eight processes add a key each while two take one away."""
        self.put("".join(f"run {digit * 64} old-{digit}\n" for digit in "01"))
        started = [self.start("authorize", f"run {digit * 64} new-{digit}") for digit in "23456789"]
        started += [self.start("revoke", f"old-{digit}") for digit in "01"]
        for process in started:
            self.assertEqual(process.wait(), 0, process.log())
        self.assertEqual(self.current(), {f"new-{digit}": "run" for digit in "23456789"})
        self.assertEqual(sorted(os.listdir(self.folder)), ["authorized_keys", "authorized_keys.lock"])

    def test_a_process_that_is_killed_meanwhile_leaves_the_old_file_and_no_lock(self):
        self.put(f"run {ALICE} alice\n")
        code = ("import os, sys; from twoproc import keys; os.replace = lambda *a: (print('here', flush=True), "
                "sys.stdin.read()); keys.revoke(sys.argv[1], 'alice')")
        process = support.Process(self, [sys.executable, "-c", code, self.authorized], home=self.home)
        support.wait_until(lambda: "here" in process.output() or not process.is_alive, what="the child renames")
        process.end()
        self.assertEqual(self.current(), {"alice": "run"})
        self.keys("authorize", f"run {BOB} bob")
        self.assertEqual(self.current(), {"alice": "run", "bob": "run"})

    def test_who_holds_the_lock_for_too_long_is_named_and_the_file_stays(self):
        self.put(f"run {ALICE} alice\n")
        fd = os.open(self.put("", "authorized_keys.lock"), os.O_RDWR)
        self.addCleanup(os.close, fd)
        self.assertTrue(try_lock(fd))
        with mock.patch.object(keys, "LOCK_SECONDS", 0.05):
            with self.assertRaisesRegex(ConnectionFileError, "authorized_keys.lock: another program has held"):
                keys.revoke(self.authorized, "alice")
        self.assertEqual(self.current(), {"alice": "run"})

    def test_a_disk_that_is_full_leaves_the_old_file(self):
        self.put(f"run {ALICE} alice\n")
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
            with self.assertRaisesRegex(ConnectionFileError, "No space left on device; not changed"):
                keys.revoke(self.authorized, "alice")
        self.assertEqual(self.current(), {"alice": "run"})
        self.assertEqual(glob.glob(self.path("*.tmp")), [])

    def test_a_file_that_is_not_safe_is_neither_used_nor_changed(self):
        line = f"run {ALICE} alice\n"
        self.put(line, mode=0o664)
        for command in (["authorize", f"run {BOB} bob"], ["revoke", "alice"], ["list"]):
            self.keys(*command, status=5, says="others can write it (mode 0664); run: chmod go-w")
        os.rename(self.authorized, self.path("real"))
        os.chmod(self.path("real"), 0o600)
        os.symlink("real", self.authorized)
        self.keys("authorize", f"run {BOB} bob", status=5, says="is a symbolic link")
        os.unlink(self.authorized)
        os.symlink("real", self.path("authorized_keys.lock.link"))
        os.replace(self.path("authorized_keys.lock.link"), self.path("authorized_keys.lock"))
        self.keys("authorize", f"run {BOB} bob", status=5, says="is a symbolic link")
        self.assertEqual(self.read(self.path("real")), line)

    def test_list_shows_who_may_come_and_marks_who_no_longer_may(self):
        self.assertIn("nobody may come", self.keys("list"))
        self.put(f"run {ALICE} alice from=10.0.0.0/8,::1\nnonsense\nview {BOB} bob expires=2001-01-01\n"
                 f"admin {CAROL} 张伟 expires=2199-01-01\n")
        process = self.start("list")
        self.assertEqual(process.wait(), 0)
        lines = [re.split("  +", line) for line in process.output().splitlines()]
        self.assertEqual(lines, [
            ["right", "name", "fingerprint", "from", "expires"],
            ["run", "alice", fingerprint(ALICE), "10.0.0.0/8,::1/128", "never"],
            ["view", "bob", fingerprint(BOB), "anywhere", "2001-01-01 (EXPIRED)"],
            ["admin", "张伟", fingerprint(CAROL), "anywhere", "2199-01-01"]])
        self.assertRegex(process.log(), r"authorized_keys, line 2: 'nonsense' is no right.*; ignored\n\Z")

    def test_a_setting_that_is_wrong_is_a_wrong_usage(self):
        self.keys("--set", "auth.authorized_keys=relative", "list", status=2, says="auth.authorized_keys")
        elsewhere = os.path.join(self.home.path, "elsewhere", "deep", "keys")
        self.keys("--set", f"auth.authorized_keys={elsewhere}", "authorize", f"run {ALICE} alice")
        self.assertEqual(self.read(elsewhere), f"run {ALICE} alice\n")

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_an_output_that_cannot_be_written_is_told_in_one_line(self):
        self.keys("list", status=1, says="No space left", prefix=("sh", "-c", 'exec "$@" >/dev/full', "sh"))

    def test_what_lies_in_the_current_folder_is_not_used(self):
        for name in ("authorized_keys", "id_key", "host_key", "twoproc.ini"):
            with open(os.path.join(self.home.work, name), "w") as file:
                file.write("[auth]\nnonsense = 1\n")
        self.assertIn("nobody may come", self.keys("list"))
        self.keys("show", status=5)


class Fingerprints(Commands):
    def test_a_fingerprint_is_the_same_from_a_key_a_line_an_address_and_a_file(self):
        line = self.keys("new", "--name", "alice").strip()
        public = line.split()[1]
        expected = f"{fingerprint(public)}  {keys.words_of(public)}"
        for what in (public, public.upper(), line, f"twoproc://lab:20555/{public}"):
            self.assertEqual(self.keys("fingerprint", what), expected + "\n")
        for what in ((), (self.path("id_key"),)):
            self.assertEqual(self.keys("fingerprint", *what), expected + "  alice\n")
        self.keys("fingerprint", "nonsense", status=2, says="'nonsense'")

    def test_the_words_are_64_bits_of_the_hash_that_can_be_said(self):
        seen = set()
        for number in range(200):
            key = number.to_bytes(32, "big").hex()
            words = keys.words_of(key)
            self.assertRegex(words, r"\A([bdfghjklmnprstvz][aiou]){2}[bdfghjklmnprstvz](-([bdfghjklmnprstvz][aiou]){2}"
                                    r"[bdfghjklmnprstvz]){3}\Z")
            seen.add(words)
        self.assertEqual(len(seen), 200)
        # As the proposal spells 127.0.0.1 and 63.84.220.193.
        for digest, said in (((127, 0, 0, 1), "lusab-babad"), ((63, 84, 220, 193), "gutih-tugad")):
            with mock.patch.object(hashlib, "sha256") as sha256:
                sha256.return_value.digest.return_value = bytes(digest) * 8
                self.assertEqual(keys.words_of(ALICE)[:11], said)


class KnownKernels(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="tp-")
        self.addCleanup(folder.cleanup)
        self.file = os.path.join(folder.name, "deep", "known_kernels")

    def refused(self, exit_code, says, function, *arguments):
        with self.assertRaises(ConnectionFileError) as caught:
            function(self.file, *arguments)
        self.assertEqual(caught.exception.exit_code, exit_code)
        self.assertRegex(str(caught.exception), says)

    def test_a_kernel_is_remembered_once_and_forgotten_by_host_address_or_name(self):
        self.assertEqual(keys.known(self.file), [])
        for who in ("lab", "lab:20555", "[fd00::1]:20555", "fd00::1", "mine"):
            keys.remember(self.file, "lab:20555", ALICE, "work")
            keys.remember(self.file, "lab:20555", ALICE, "again")
            keys.remember(self.file, "[fd00::1]:20555", BOB, "mine")
            self.assertEqual(keys.known(self.file)[-1][1:3], (BOB, "mine"))
            self.assertEqual(len(keys.known(self.file)), 2)
            self.assertEqual(len(keys.forget(self.file, who)), 1)
            self.assertEqual(len(keys.known(self.file)), 1)
            keys.forget(self.file, "mine" if "lab" in who else "work")
        self.refused(2, "no kernel 'lab' is known; there are: none", keys.forget, "lab")
        self.assertEqual(stat.S_IMODE(os.stat(self.file).st_mode), 0o600)

    def test_another_key_is_refused_with_both_fingerprints_the_line_and_the_command(self):
        keys.remember(self.file, "other:1", BOB, "other")
        keys.remember(self.file, "lab:20555", ALICE, "lab")
        both = ".*".join(re.escape(fingerprint(key)) for key in (BOB, ALICE))
        self.refused(6, f"{both}.*line 2.*keys forget lab:20555",
                     keys.remember, "lab:20555", BOB, "lab")
        self.assertEqual([entry.key for entry in keys.known(self.file)], [BOB, ALICE])

    def test_no_name_can_add_a_line_of_its_own(self):
        for name in ("", "a b", f"x\nbank:1 {BOB} y", "a#b", "\x1b[1m", "a\u2028b"):
            self.refused(2, "cannot be remembered", keys.remember, "lab:20555", ALICE, name)
        self.assertFalse(os.path.exists(self.file))

    def test_a_line_that_cannot_be_read_is_not_passed_over(self):
        os.mkdir(os.path.dirname(self.file))
        for line in (f"lab {ALICE} lab", "lab:20555 key lab", f"lab:20555 {ALICE}", "x"):
            with open(self.file, "w") as file:
                file.write(f"# known\n\n{line}\n")
            self.refused(5, "line 3: expected host:port", keys.known)
            self.refused(5, "line 3: expected host:port", keys.remember, "a:1", BOB, "a")
        os.chmod(self.file, 0o666)
        self.refused(5, "mode 0666", keys.known)

    def test_the_command_forgets_too(self):
        home = support.Home(self)
        path = os.path.join(home.path, "config", "twoproc", "known_kernels")
        keys.remember(path, "lab:20555", ALICE, "lab")
        process = support.Process(self, [sys.executable, "-m", "twoproc.keys", "forget", "lab"], home=home)
        self.assertEqual(process.wait(), 0, process.log())
        self.assertIn(f"forgotten: lab:20555 lab {fingerprint(ALICE)}", process.output())
        self.assertEqual(keys.known(path), [])


if __name__ == "__main__":
    unittest.main()
