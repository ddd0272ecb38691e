# Distributed under the terms of the BSD 3-Clause License.
"""Authorised keys, the rights of each message, limits and the access log: all rules of access.py, without a socket."""
import json
import multiprocessing
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from datetime import date
from unittest import mock

from twoproc import access
from twoproc.access import NEEDS, RIGHTS, Access, AccessLog, AuthorizedKeys, Buckets, KeyLineError, parse_line
from twoproc.connection import fingerprint, hex_of, z85_of
from twoproc.session import MESSAGES

from . import support, test_docs

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534
ALICE, BOB, CAROL, OWN = "a1" * 32, "b0" * 32, "ca" * 32, "0f" * 32
UID = os.geteuid() if hasattr(os, "geteuid") else 0
HERE = f"localhost:{UID}:1:4711"


class Case(unittest.TestCase):
    """A folder, a file authorized_keys in it, a clock and a calendar that the test moves."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="tp-")
        self.addCleanup(folder.cleanup)
        self.folder = os.path.realpath(folder.name)
        self.file = self.path("authorized_keys")
        self.now, self.today = 1000.0, date(2026, 6, 15)
        self.keys = AuthorizedKeys(self.file, lambda: self.now, lambda: self.today)

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def put(self, *lines, mode=0o600):
        """Replace the file as editors do: another one takes its name."""
        text = "".join(line + "\n" for line in lines)
        with open(self.path("new"), "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(text)
        os.chmod(self.path("new"), mode)
        os.replace(self.path("new"), self.file)

    def look(self):
        """Who is authorised a second later, by name, and the lines of the log."""
        self.now += access.LOOK_SECONDS
        with _Logged() as logged:
            current = self.keys.current()
        return {key.name: key.rights for key in current.values()}, logged

    def access(self, *lines, **options):
        if lines:
            self.put(*lines)
        options = {"own_key": OWN, "own_key_from_anywhere": False, "log": AccessLog(None),
                   "clock": lambda: self.now, **options}
        return Access(self.keys, **options)


class _Logged(list):
    """The lines that access.py says to the kernel's log in this block."""

    def __enter__(self):
        self._patch = mock.patch.object(access.logger, "warning", lambda text, *args: self.append(text % args))
        self._patch.start()
        return self

    def __exit__(self, *exc_info):
        self._patch.stop()


class OneLine(unittest.TestCase):
    def test_a_line_has_right_key_and_name_and_what_limits_it(self):
        key = parse_line(f"run {ALICE} alice@lab from=10.0.0.0/8,fd00::/8,192.0.2.7 expires=2026-12-31\r\n", 7)
        self.assertEqual((key.rights, key.key, key.name, key.line), ("run", ALICE, "alice@lab", 7))
        self.assertEqual([str(source) for source in key.sources], ["10.0.0.0/8", "fd00::/8", "192.0.2.7/32"])
        self.assertEqual(key.expires, date(2026, 12, 31))

    def test_what_is_written_is_read_as_the_same(self):
        for text in (f"view {ALICE} a", f"admin {BOB} b from=::1/128 expires=2030-02-28", f"run {BOB} b from=::/8"):
            self.assertEqual(str(parse_line(text)), text)
            self.assertEqual(parse_line(str(parse_line(text))), parse_line(text))

    def test_upper_case_digits_are_the_same_key_and_white_space_does_not_count(self):
        self.assertEqual(parse_line(f"\t view \t {ALICE.upper()}  a  "), parse_line(f"view {ALICE} a"))

    def test_comments_and_empty_lines_have_no_key(self):
        for text in ("", "  ", "\t", "\r", "#", f"# run {ALICE} alice", f"   #run {ALICE} alice"):
            self.assertIsNone(parse_line(text))
        self.assertEqual(parse_line(f"run {ALICE} alice # her laptop").name, "alice")

    def test_a_name_may_have_odd_characters_but_none_that_a_terminal_obeys(self):
        for name in ("Zoë", "张伟", "o'neil;$(ls)", "a\\b", "..", "<b>", "%s{x}", "😀", "x" * 64):
            self.assertEqual(parse_line(f"run {ALICE} {name}").name, name)
        for name in ("", "x" * 65, "\x1b[31m", "a\x07", "a\u202eb", "\udc80", "from=10.0.0.1", "a=b", "\x7f"):
            with self.subTest(name=name), self.assertRaisesRegex(KeyLineError, "name"):
                parse_line(f"run {ALICE} {name}")

    def test_a_wrong_line_is_refused_with_its_number_value_and_remedy(self):
        for text, says in (
            ("alice", "'alice' is no right"), (f"all {ALICE} alice", "'all' is no right; .* view, input, run, admin"),
            (f"Run {ALICE} alice", "'Run' is no right"), (f"run,view {ALICE} a", "no right"),
            ("run", "64 hexadecimal"), (f"run {ALICE[1:]} a", "64 hexadecimal"), (f"run {ALICE}0 a", "64 hexadecimal"),
            (f"run {'g' * 64} a", "64 hexadecimal"), (f"run {z85_of(ALICE).decode()} a", "64 "),
            (f"run {ALICE}", "name"),
            (f"run {ALICE} a from=", "'from=': expected networks"), (f"run {ALICE} a from=lab", "'from=lab'"),
            (f"run {ALICE} a from=10.0.0.1/8", "from=10.0.0.1/8"), (f"run {ALICE} a from=10.0.0.0/8,", "networks"),
            (f"run {ALICE} a from=10.0.0.0/33", "networks"), (f"run {ALICE} a from=10.0.0.0/8 from=::1", "twice"),
            (f"run {ALICE} a expires=tomorrow", "a date like"), (f"run {ALICE} a expires=2026-13-01", "2026-13-01"),
            (f"run {ALICE} a expires=20261231", "a date like"), (f"run {ALICE} a expires=2026-02-30", "a date like"),
            (f"run {ALICE} a alice", "'alice' is not known here"), (f"run {ALICE} a admin", "'admin' is not known"),
        ):
            with self.subTest(text=text), self.assertRaisesRegex(KeyLineError, f"^line 3: .*{says}"):
                parse_line(text, 3)

    def test_what_stands_where_a_key_should_is_never_shown(self):
        for text in (f"run {z85_of(ALICE).decode()} a", "run hush-hush a", f"run {ALICE}hush a"):
            with self.assertRaises(KeyLineError) as caught:
                parse_line(text, 1)
            self.assertNotIn(text.split()[1][:8], str(caught.exception))

    def test_any_text_is_a_key_or_none_or_a_key_line_error(self):
        try:
            from hypothesis import given, settings, strategies
        except ImportError:
            self.skipTest("hypothesis is not installed")
        words = strategies.sampled_from([*RIGHTS, ALICE, BOB, "from=", "expires=", "from=::/0", "\udcff", "\0", "="])

        @settings(deadline=None)        # one text has 0.2 s otherwise, and a busy machine may take longer
        @given(strategies.lists(words | strategies.text(max_size=8)))
        def check(parts):
            for text in (" ".join(parts), f"run {ALICE} " + " ".join(parts)):
                try:
                    key = parse_line(text)
                except KeyLineError as error:
                    self.assertTrue(str(error).isprintable())
                else:
                    self.assertIn(key and key.rights, (None, *RIGHTS))
        check()


class WhereFrom(unittest.TestCase):
    def test_a_key_is_good_only_from_its_networks(self):
        key = parse_line(f"run {ALICE} a from=10.0.0.0/8,192.0.2.7,fd00::/8")
        for address, expected in (
            ("10.1.2.3", True), ("11.1.2.3", False), ("192.0.2.7", True), ("192.0.2.8", False), ("fd12::1", True),
            ("fe80::1%eth0", False), ("::1", False), ("::ffff:10.9.9.9", True), ("::ffff:11.9.9.9", False),
            ("[fd00::5]", True), ("fd00::5%3", True), ("", False), ("lab", False), ("10.1", False),
        ):
            with self.subTest(address=address):
                self.assertIs(key.is_from(address), expected)

    def test_a_network_may_be_written_as_mapped_too(self):
        key = parse_line(f"run {ALICE} a from=::ffff:10.0.0.0/104")
        self.assertTrue(key.is_from("::ffff:10.3.3.3"))
        self.assertFalse(key.is_from("::ffff:11.3.3.3"))

    def test_without_from_every_address_is_good(self):
        key = parse_line(f"run {ALICE} a")
        for address in ("10.1.2.3", "::1", "what libzmq may say"):
            self.assertTrue(key.is_from(address))


class TheFile(Case):
    def test_a_line_added_changed_or_taken_away_counts_a_second_later(self):
        self.put(f"run {ALICE} alice")
        self.assertEqual(self.look(), ({"alice": "run"}, []))
        self.put(f"view {ALICE} alice", f"admin {BOB} bob")
        self.now += 0.9
        self.assertEqual(self.keys.current()[ALICE].rights, "run")
        self.now += 0.1
        self.assertEqual(self.keys.current()[ALICE].rights, "view")
        self.put(f"admin {BOB} bob")
        self.assertEqual(self.look(), ({"bob": "admin"}, []))

    def test_a_change_that_its_times_and_size_do_not_tell_is_seen(self):
        self.put(f"run {ALICE} alice")
        before = os.stat(self.file)
        self.look()
        with open(self.file, "r+") as file:
            file.write(f"run {BOB} alice")
        os.utime(self.file, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.look()
        self.assertEqual(list(self.keys.current()), [BOB])

    def test_bad_lines_are_named_once_for_each_change_and_the_others_count(self):
        self.put("# keys", f"run {ALICE} alice\r", "", "nonsense", f"run {BOB}", f"view {CAROL} carol\r")
        names, logged = self.look()
        self.assertEqual(names, {"alice": "run", "carol": "view"})
        self.assertEqual(len(logged), 2)
        self.assertRegex(logged[0], f"^{self.file}, line 4: 'nonsense' is no right.*; ignored$")
        self.assertRegex(logged[1], "line 5: '' is no name")
        self.assertEqual(self.look()[1], [])
        self.put(f"run {ALICE} alice", "nonsense")
        self.assertEqual(len(self.look()[1]), 1)

    def test_a_thousand_bad_lines_are_eleven_in_the_log(self):
        self.put(*(["nonsense"] * 1000), f"run {ALICE} alice")
        names, logged = self.look()
        self.assertEqual((names, len(logged)), ({"alice": "run"}, 11))
        self.assertIn("990 more", logged[-1])

    def test_a_key_that_stands_there_twice_counts_for_nothing(self):
        self.put(f"view {ALICE} alice", f"run {BOB} bob", f"admin {ALICE.upper()} root")
        names, logged = self.look()
        self.assertEqual((names, len(logged)), ({"bob": "run"}, 1))
        self.assertIn("lines 1, 3: the same key", logged[0])
        self.assertNotIn(ALICE, logged[0])

    def test_a_byte_order_mark_and_bytes_that_are_no_text_spoil_no_other_line(self):
        self.put(f"\ufeffrun {ALICE} alice", "# \udcff\udcfe", f"run {BOB} b\udcffb", f"view {CAROL} ca\u2028rol\x0b")
        names, logged = self.look()
        self.assertEqual(names, {"alice": "run"})
        self.assertRegex("\n".join(logged), r"line 3: .*\n.*line 4: ")

    def test_a_key_is_good_through_its_last_day(self):
        self.put(f"run {ALICE} alice expires=2026-06-15")
        self.assertEqual(self.look()[0], {"alice": "run"})
        self.today = date(2026, 6, 16)
        self.assertEqual(self.look(), ({}, []))
        self.assertEqual(self.keys.expired[ALICE].name, "alice")

    def test_an_unsafe_file_lets_nobody_in_and_one_line_says_why(self):
        good = f"run {ALICE} alice"
        self.put(good)
        self.assertEqual(self.look()[0], {"alice": "run"})
        for mode in (0o620, 0o602, 0o666):
            os.chmod(self.file, mode)
            self.unsafe(f"mode {mode:04o}.*chmod go-w")
        os.chmod(self.file, 0o644)
        self.assertEqual(self.look(), ({"alice": "run"}, []))
        os.rename(self.file, self.path("real"))
        self.unsafe("no such file")
        os.symlink(self.path("real"), self.file)
        self.unsafe("symbolic link")
        os.unlink(self.file)
        os.mkfifo(self.file)
        self.unsafe("not a regular file")
        os.unlink(self.file)
        self.unsafe("no such file")
        os.mkdir(self.file)
        self.unsafe("not a regular file")
        os.rmdir(self.file)
        with open(self.file, "wb") as file:
            file.truncate(access.FILE_LIMIT + 1)
        self.unsafe("expected at most")
        self.put(good)
        self.assertEqual(self.look()[0], {"alice": "run"})

    def unsafe(self, says):
        names, logged = self.look()
        self.assertEqual((names, len(logged)), ({}, 1), logged)
        self.assertRegex(logged[0], f"^{self.file}: .*{says}.*nobody is let in")
        self.assertEqual(self.look(), ({}, []))

    @unittest.skipUnless(IS_ROOT, "only root can give a file away")
    def test_a_file_of_another_user_lets_nobody_in(self):
        self.put(f"run {ALICE} alice")
        os.chown(self.file, NOBODY, NOBODY)
        self.unsafe(f"uid {NOBODY}")

    @unittest.skipIf(IS_ROOT, "root reads everything")
    def test_a_file_that_cannot_be_read_lets_nobody_in(self):
        self.put(f"run {ALICE} alice", mode=0)
        self.unsafe("Permission denied")

    def test_an_error_of_the_disk_lets_nobody_in(self):
        self.put(f"run {ALICE} alice")
        with mock.patch("os.read", side_effect=PermissionError(13, "Permission denied")):
            self.unsafe("Permission denied")

    def test_when_no_descriptor_is_left_those_who_were_known_stay(self):
        self.put(f"run {ALICE} alice")
        self.look()
        with mock.patch("os.open", side_effect=OSError(24, "Too many open files")):
            self.assertEqual(self.look(), ({"alice": "run"}, []))

    def test_replacing_the_file_never_shows_half_of_it(self):
        """Another process puts one file or the other in place, as fast as it can, while we look."""
        self.put(f"run {ALICE} alice", *[f"# {'x' * 80}"] * 200)
        child = subprocess.Popen([sys.executable, "-c", """
import os, sys
path, *keys = sys.argv[1:]
while True:
    for key in keys:
        with open(path + ".new", "w") as file:
            file.write("# %s\\n" % ("x" * 80) * 200 + "run %s k\\n" % key)
        os.replace(path + ".new", path)
""", self.file, ALICE, BOB])
        self.addCleanup(lambda: (child.kill(), child.wait()))
        seen, end = set(), time.monotonic() + support.DEADLINE
        while len(seen) < 2 and time.monotonic() < end:
            names, logged = self.look()
            self.assertEqual((len(names), logged), (1, []))
            seen |= set(self.keys.current())
        self.assertEqual(seen, {ALICE, BOB})


class WhoIsLetIn(Case):
    def admit(self, gate, mechanism, address, key=None):
        try:
            return gate.admit(mechanism, address, [] if key is None else [bytes.fromhex(key)])
        except access.Refused as refusal:
            return str(refusal)

    def test_who_is_on_this_machine_as_the_same_user_may_everything(self):
        gate = self.access()
        self.assertEqual(self.admit(gate, b"NULL", HERE), "")
        self.assertEqual(self.admit(gate, b"NULL", "localhost:0:0:1"), "")
        self.assertEqual(self.admit(gate, b"NULL", "localhost"), "")      # a system that does not say who it is
        self.assertEqual(self.admit(gate, b"CURVE", HERE, OWN), "")
        self.assertEqual((gate.rights(""), gate.name("")), ("admin", "local"))

    def test_another_user_of_this_machine_is_refused_with_any_key(self):
        gate = self.access(f"admin {ALICE} alice")
        other = f"localhost:{NOBODY}:{NOBODY}:77"
        for mechanism, key in ((b"NULL", None), (b"CURVE", OWN), (b"CURVE", ALICE)):
            self.assertIn(f"uid {NOBODY}", self.admit(gate, mechanism, other, key))

    def test_an_authorised_key_is_the_user_from_anywhere(self):
        gate = self.access(f"view {ALICE} alice")
        for address in (HERE, "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1", "127.0.0.1"):
            self.assertEqual(self.admit(gate, b"CURVE", address, ALICE), ALICE)
        self.assertEqual((gate.rights(ALICE), gate.name(ALICE)), ("view", "alice"))

    def test_a_key_that_is_not_there_or_expired_or_from_elsewhere_is_refused(self):
        gate = self.access(f"run {BOB} bob expires=2026-06-14", f"run {CAROL} carol from=10.0.0.0/8")
        self.assertEqual(self.admit(gate, b"CURVE", "10.0.0.1", ALICE), "not an authorised key")
        self.assertEqual(self.admit(gate, b"CURVE", "10.0.0.1", BOB), "the key of bob expired on 2026-06-14")
        self.assertEqual(self.admit(gate, b"CURVE", "10.0.0.1", CAROL), CAROL)
        self.assertIn("carol may not come from this address", self.admit(gate, b"CURVE", "11.0.0.1", CAROL))
        self.assertEqual(self.admit(gate, b"CURVE", "::ffff:10.0.0.1", CAROL), CAROL)

    def test_who_was_just_authorised_is_let_in(self):
        gate = self.access(f"run {BOB} bob")
        self.assertEqual(self.admit(gate, b"CURVE", "10.0.0.1", ALICE), "not an authorised key")
        self.put(f"run {ALICE} alice")
        self.now += access.LOOK_SECONDS_ADMIT
        self.assertEqual(self.admit(gate, b"CURVE", "10.0.0.1", ALICE), ALICE)

    def test_the_kernels_own_key_is_good_on_this_machine_and_over_tcp_only_where_a_manager_wants_it(self):
        self.assertIn("own key", self.admit(self.access(f"admin {OWN} me"), b"CURVE", "127.0.0.1", OWN))
        self.assertEqual(self.admit(self.access(own_key_from_anywhere=True), b"CURVE", "127.0.0.1", OWN), "")

    def test_other_mechanisms_and_odd_credentials_are_refused(self):
        gate = self.access(f"run {ALICE} alice")
        for mechanism, credentials in (
                (b"PLAIN", [b"user", b"password"]), (b"GSSAPI", [b"x"]), (b"", []), (b"CURVE", []), (b"CURVE", [b""]),
                (b"CURVE", [b"short"]), (b"CURVE", [b"x" * 33])):
            with self.subTest(mechanism=mechanism), self.assertRaises(access.Refused):
                gate.admit(mechanism, "10.0.0.1", credentials)

    def test_without_a_file_no_key_is_good_but_the_kernels_own(self):
        gate = Access(None, OWN, True, AccessLog(None))
        self.assertEqual(self.admit(gate, b"CURVE", "127.0.0.1", OWN), "")
        self.assertEqual(self.admit(gate, b"CURVE", "127.0.0.1", ALICE), "not an authorised key")
        with self.assertRaises(access.NotAllowed):
            gate.check(ALICE, "kernel_info_request")


class Rights(Case):
    def test_each_right_allows_just_its_messages(self):
        """Every right with every message type that exists, and with one that does not."""
        for at, rights in enumerate(RIGHTS):
            gate = self.access(f"{rights} {ALICE} alice", requests_per_second=1000)
            self.now += 5
            for msg_type in [*MESSAGES, "twoproc_unheard_of"]:
                with self.subTest(rights=rights, msg_type=msg_type):
                    needed = NEEDS.get(msg_type, "run")
                    if at >= RIGHTS.index(needed):
                        gate.check(ALICE, msg_type)
                    else:
                        with self.assertRaisesRegex(access.NotAllowed, f"needs the right '{needed}', .* '{rights}'"):
                            gate.check(ALICE, msg_type)
                    gate.check("", msg_type)

    def test_every_message_that_a_client_may_send_has_its_line(self):
        sent = {msg_type for msg_type, kind in MESSAGES.items() if kind.fields is not None}
        self.assertEqual(sorted(sent - set(NEEDS)), [])

    def test_the_documentation_has_the_same_table(self):
        said = {}
        for right, messages, _ in test_docs.rows("docs/security.md", "Rights"):
            said.update(dict.fromkeys(re.findall(r"`(\w+)`", messages), right.strip("`")))
        self.assertEqual(said, NEEDS)

    def test_rights_taken_away_count_for_the_next_message_a_second_later(self):
        gate = self.access(f"admin {ALICE} alice")
        gate.check(ALICE, "shutdown_request")
        self.put(f"view {ALICE} alice")
        self.now += access.LOOK_SECONDS
        with self.assertRaises(access.NotAllowed):
            gate.check(ALICE, "execute_request")
        self.assertEqual(gate.withdrawn([ALICE, ""]), set())
        self.put(f"# view {ALICE} alice")
        self.now += access.LOOK_SECONDS
        with self.assertRaisesRegex(access.NotAllowed, "withdrawn"):
            gate.check(ALICE, "kernel_info_request")
        self.assertEqual((gate.rights(ALICE), gate.name(ALICE)), ("", ""))

    def test_withdrawn_are_those_who_are_gone_expired_or_in_a_file_that_is_not_safe(self):
        gate = self.access(f"view {ALICE} alice", f"view {BOB} bob expires=2026-06-15", f"view {CAROL} carol")
        users = ["", ALICE, BOB, CAROL]
        self.assertEqual(gate.withdrawn(users), set())
        self.put(f"view {BOB} bob expires=2026-06-15", f"view {CAROL} carol")
        self.today, self.now = date(2026, 6, 16), self.now + 1
        self.assertEqual(gate.withdrawn(users), {ALICE, BOB})
        os.chmod(self.file, 0o666)
        self.now += 1
        with _Logged():
            self.assertEqual(gate.withdrawn(users), {ALICE, BOB, CAROL})


class Limits(Case):
    def test_a_bucket_holds_two_seconds_and_fills_again(self):
        now = 0.0
        bucket = Buckets(10, lambda: now)
        self.assertEqual([bucket.take("a") for _ in range(25)], [True] * 20 + [False] * 5)
        self.assertTrue(bucket.take("b"))
        now = 0.5
        self.assertEqual([bucket.take("a") for _ in range(7)], [True] * 5 + [False] * 2)
        now = 1000.0
        self.assertEqual(sum(bucket.take("a") for _ in range(50)), 20)

    def test_two_threads_have_no_more_together_than_one(self):
        class Rate(float):
            def __rmul__(self, other):
                time.sleep(0)           # the other thread's turn, within take
                return other * float(self)

        bucket, given = Buckets(Rate(10), lambda: 0.0), []
        threads = [threading.Thread(target=lambda: given.extend([bucket.take("a") for _ in range(30)]))
                   for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual((len(given), sum(given)), (60, 20))

    def test_a_key_that_asks_too_much_is_told_and_no_other_key(self):
        gate = self.access(f"run {ALICE} alice", f"run {BOB} bob", requests_per_second=10)
        for _ in range(20):
            gate.check(ALICE, "execute_request")
        with self.assertRaisesRegex(access.RateLimited, "requests_per_second"):
            gate.check(ALICE, "execute_request")
        gate.check(BOB, "execute_request")
        gate.check(ALICE, "interrupt_request")      # so that it can be ended
        for _ in range(1000):
            gate.check("", "execute_request")

    def test_what_is_not_allowed_counts_too(self):
        gate = self.access(f"view {ALICE} alice", requests_per_second=10)
        refused = []
        for _ in range(25):
            with self.assertRaises((access.NotAllowed, access.RateLimited)) as caught:
                gate.check(ALICE, "execute_request")
            refused.append(type(caught.exception))
        self.assertEqual(refused, [access.NotAllowed] * 20 + [access.RateLimited] * 5)


def write_many(path, name, count, max_bytes):
    log = AccessLog(path, max_bytes)
    for number in range(count):
        log._second = 0      # each line in a second of its own: none is left out
        log.note("execute", name=name, number=number)


class TheAccessLog(Case):
    def log(self, max_bytes=1 << 20, path=None):
        return AccessLog(path or self.path("state", "access.log"), max_bytes, lambda: self.now)

    def lines(self, *names):
        found = []
        for name in names or ("access.log",):
            with open(self.path("state", name)) as file:
                found += [json.loads(line) for line in file]
        return found

    def test_a_line_has_time_event_and_what_is_known(self):
        self.log().note("accept", name="alice", address="10.0.0.1", reason="", port=None, count=3)
        self.assertEqual(self.lines(), [{"time": "1970-01-01T00:16:40.000+00:00", "event": "accept", "name": "alice",
                                         "address": "10.0.0.1", "count": 3}])

    def test_it_is_private_under_any_umask(self):
        for umask in (0o000, 0o022, 0o777):
            before = os.umask(umask)
            try:
                path = self.path(f"state-{umask:o}", "access.log")
                log = self.log(100, path)
                for _ in range(3):
                    self.now += 1
                    log.note("listen", address="x" * 50)
            finally:
                os.umask(before)
            for name, mode in ((path, 0o600), (path + ".1", 0o600), (os.path.dirname(path), 0o700)):
                self.assertEqual(stat.S_IMODE(os.stat(name).st_mode), mode, name)

    def test_no_whole_key_is_ever_in_it(self):
        gate = self.access(f"run {ALICE} alice", log=self.log())
        gate.admit(b"CURVE", "10.0.0.1", [bytes.fromhex(ALICE)])
        with self.assertRaises(access.Refused):
            gate.admit(b"CURVE", "10.0.0.2", [bytes.fromhex(BOB)])
        gate.log.note("bad", reason=f"key {CAROL.upper()}?", what=[OWN])
        with open(self.path("state", "access.log")) as file:
            text = file.read()
        for key in (ALICE, BOB, CAROL, OWN):
            self.assertNotIn(key, text.lower())
            self.assertIn(fingerprint(key), text)
        self.assertEqual([line.get("name") for line in self.lines()], ["alice", None, None])

    def test_refusals_of_rights_and_of_too_many_requests_are_noted(self):
        gate = self.access(f"view {ALICE} alice", log=self.log(), requests_per_second=1)
        for _ in range(4):
            with self.assertRaises((access.NotAllowed, access.RateLimited)):
                gate.check(ALICE, "execute_request")
        found = [(line["event"], line["name"], line.get("msg_type"), line.get("needs")) for line in self.lines()]
        self.assertEqual(found, [("rights", "alice", "execute_request", "run"), ("limit", "alice", None, None)])

    def test_strangers_cannot_fill_it_and_their_number_is_told(self):
        log = self.log()
        for number in range(1000):
            log.note("refuse", address=f"10.0.{number >> 8}.{number & 255}")
            log.note("accept", name="alice")        # the same five times: five sockets
        self.now += 1
        log.note("accept", name="alice")
        events = [line["event"] for line in self.lines()]
        self.assertEqual(sorted(events), ["accept"] * 2 + ["limit"] + ["refuse"] * 5)
        self.assertEqual([line["lines"] for line in self.lines() if line["event"] == "limit"], [995])

    def test_neither_can_who_may_only_look_by_what_he_may_not(self):
        gate = self.access(f"view {ALICE} alice", log=self.log(), requests_per_second=1000)
        for number in range(1000):
            with self.assertRaises(access.NotAllowed):
                gate.check(ALICE, f"nonsense_{number}")
        self.assertLess(len(self.lines()), 20)

    def test_it_is_renamed_when_it_is_full_and_never_longer(self):
        log = self.log(1000)
        for number in range(200):
            self.now += 1
            log.note("execute", number=number)
            self.assertLessEqual(os.path.getsize(log.path), 1000)
        numbers = [line["number"] for line in self.lines("access.log.1", "access.log")]
        self.assertEqual(numbers, list(range(numbers[0], 200)))
        self.assertGreater(len(numbers), 12)
        self.assertEqual(sorted(os.listdir(self.path("state"))), ["access.log", "access.log.1"])

    def test_two_processes_lose_no_line_while_it_is_renamed(self):
        path = self.path("state", "access.log")
        context = multiprocessing.get_context("spawn")
        children = [context.Process(target=write_many, args=(path, name, 300, 30_000)) for name in "ab"]
        for child in children:
            child.start()
        for child in children:
            child.join(support.DEADLINE)
            self.assertEqual(child.exitcode, 0)
        found = self.lines("access.log.1", "access.log")     # 60 kB: renamed once, perhaps twice
        for name in "ab":
            numbers = [line["number"] for line in found if line["name"] == name]
            self.assertEqual(numbers, sorted(set(numbers)))
            self.assertEqual(numbers, list(range(numbers[0], 300)))
        self.assertGreater(len(found), 250)

    def test_a_line_goes_on_when_who_should_rename_it_is_stuck(self):
        log = self.log(1000)
        log.note("listen", address="x" * 900)
        fd = os.open(log.path, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        self.assertTrue(access.try_lock(fd))
        for number in range(100):
            self.now += 1
            log.note("execute", number=number)
        self.assertLess(os.path.getsize(log.path), 2200)
        self.assertGreater(len(self.lines()), 2)

    def test_a_full_disk_is_told_once_and_what_follows_is_whole_again(self):
        """A limit on the size of files, as a real disk would do it: the line that no longer fits is cut."""
        code = """
import resource, signal, sys
from twoproc.access import AccessLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
now = 0
log = AccessLog(sys.argv[1], clock=lambda: now)
resource.setrlimit(resource.RLIMIT_FSIZE, (480, resource.RLIM_INFINITY))
for now in range(1, 20):
    log.note("execute", number=now)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
now = 21
log.note("execute", number=now)
"""
        path = self.path("state", "access.log")
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, cwd=support.ROOT,
                              timeout=support.DEADLINE)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (0, 1), done.stderr)
        self.assertIn("the access log is not written", done.stderr)
        with open(path) as file:
            lines = file.read().splitlines()
        whole = [json.loads(line)["number"] for line in lines if line.endswith("}")]
        self.assertEqual(whole, [*range(1, whole[-2] + 1), 21])
        self.assertEqual(len(lines) - len(whole), 1)

    def test_what_is_in_its_way_is_left_alone_and_no_error_comes_through(self):
        os.mkdir(self.path("state"), 0o700)
        victim = self.path("victim")
        with open(victim, "w") as file:
            file.write("precious")
        path = self.path("state", "access.log")
        for place in (lambda: os.symlink(victim, path), lambda: os.mkfifo(path), lambda: os.link(victim, path)):
            place()
            log = self.log()
            with _Logged() as logged:
                for _ in range(3):
                    self.now += 1
                    log.note("listen")
            self.assertEqual(len(logged), 1, logged)
            os.unlink(path)
        os.chmod(self.path("state"), 0o777)
        with _Logged() as logged:
            self.log().note("listen")
        self.assertEqual(len(logged), 1)
        with open(victim) as file:
            self.assertEqual(file.read(), "precious")
        self.assertEqual(os.listdir(self.path("state")), [])

    def test_without_a_path_nothing_is_written(self):
        AccessLog(None).note("listen")


class KeysAsText(unittest.TestCase):
    def test_hexadecimal_and_z85_are_turned_into_each_other_as_zeromq_does(self):
        from zmq.utils import z85
        for raw in (bytes(32), b"\xff" * 32, *(os.urandom(32) for _ in range(50))):
            self.assertEqual(z85_of(raw.hex()), z85.encode(raw))
            self.assertEqual(hex_of(z85.encode(raw)), raw.hex())

    def test_what_is_no_key_is_refused(self):
        for text in (b"", b"x" * 39, b"x" * 41, b"#" * 40, b"x" * 39 + b"~", b"x" * 39 + b"\xff"):
            with self.assertRaises(ValueError):
                hex_of(text)

    def test_a_fingerprint_is_that_of_ssh_keygen(self):
        self.assertEqual(fingerprint("00" * 32), "SHA256:Zmh6rfhivXdsj8GLjp+OIAiXFIVu4jOzkCpZHQ1fKSU")


if __name__ == "__main__":
    unittest.main()
