# Distributed under the terms of the BSD 3-Clause License.
"""The session log by itself: no kernel, only SessionLog, its files, and who reads them.

Faults are made where they come from: a system call that fails, a descriptor that is closed, a process that is
killed.  What the pages for frontends must hold is said by a model that simply keeps everything (`Model`).
"""
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock
from zlib import crc32

from twoproc import connection, crashlog, death, sessionlog
from twoproc.crashlog import LockedError, LoggedSession, StateError
from twoproc.sessionlog import SessionLog

from . import support
from .support import DEADLINE, rounds, wait_until

CONN = "/run/otter-1.json"
IS_ROOT = os.geteuid() == 0


def header(number, msg_type="execute_request", session="s1", **members):
    return json.dumps({"msg_id": f"m{number}", "session": session, "username": "ada", "msg_type": msg_type,
                       "date": f"2026-01-01T00:00:{number % 60:02d}.{number:06d}+00:00", **members}).encode()


def stream(text):
    return json.dumps({"name": "stdout", "text": text}).encode()


class Case(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="tp-")
        self.addCleanup(folder.cleanup)
        self.home = os.path.realpath(folder.name)
        patch = mock.patch.dict(os.environ, TWOPROC_STATE=os.path.join(self.home, "state"), HOME=self.home)
        patch.start()
        self.addCleanup(patch.stop)
        self.folder = os.path.join(self.home, "state", "sessions")
        self.warnings = []

    def log(self, conn=CONN, is_opened=True, **limits):
        log = SessionLog(conn, crashlog.Limits(**limits), self.warnings.append)
        self.addCleanup(self.end_log, log)
        if is_opened:
            log.open("9.0")
        return log

    @staticmethod
    def end_log(log):
        log.close("test")
        if log.fault is not None:
            log.fault.close()

    def cell(self, log, number, *texts, seq=None, code="pass", ends=True):
        """One cell that prints some texts; the number of its last message."""
        seq = log._seq if seq is None else seq
        log.begin(header(number), f"m{number}", code, number)
        for text in texts:
            seq += 1
            log.published("stream", seq, stream(text), header(number))
        if ends:
            log.end(header(number), True, 0.5, seq + 1)
        return seq

    def read(self, log_or_id):
        return LoggedSession(self.folder, getattr(log_or_id, "id", log_or_id))

    def process(self, code, *args):
        """A Python process with `code`; ended with the test.  It says what it has to say on its output."""
        preamble = "import os, sys, json\nfrom twoproc import crashlog\nfrom twoproc.crashlog import *\n" \
            "from twoproc.sessionlog import SessionLog\n" \
            "def say(text):\n    os.write(1, (text + '\\n').encode())\n" \
            f"def header(n):\n    return json.dumps({{'msg_id': 'm%d' % n, 'msg_type': 'execute_request', " \
            f"'session': 's1', 'date': '2026-01-01'}}).encode()\nCONN = {CONN!r}\n"
        child = subprocess.Popen(
            [sys.executable, "-c", preamble + code, *args], cwd=self.home, text=True, stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": support.ROOT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(self.end, child)
        return child

    def end(self, child):
        if child.poll() is None:
            child.kill()
        for file in (child.stdin, child.stdout, child.stderr):
            file.close()
        child.wait(DEADLINE)

    def line(self, child):
        """The next line that a child says."""
        text = child.stdout.readline()
        if not text:
            self.fail(child.communicate(timeout=DEADLINE)[1])
        return text.strip()

    def kill(self, child, number=signal.SIGKILL):
        child.send_signal(number)
        child.wait(DEADLINE)


LIVES = "log = SessionLog(CONN)\nlog.open('9')\nsay(log.id)\nsys.stdin.read()\n"


# -- what is in a log, and what is not

class Records(Case):

    def test_every_record_reads_back_as_it_was_written(self):
        log = self.log()
        odd = "a = '\ud800 \0 \u2028 \x1b é 中 \U0001f600'\r\nb"
        log.begin(header(1), "m1", odd, 7, "cell-1", "<ipython-input-7-")
        log.published("stream", 3, stream("text"), header(1))
        log.published("display_data", 4, b'{"data":{"text/plain":"x"}}', header(1), b'{"isolated":true}')
        log.asked(header(1), "pass\ud800word? ", True)
        log.end(header(1), False, 0.0123, 9)
        log.note("fault", text="x\ny")
        session = self.read(log)
        kinds = [record["k"] for record in session.records()]
        self.assertEqual(kinds, ["open", "begin", "out", "out", "stdin", "end", "note"])
        opened, begin, out, display, stdin, end, note = session.records()
        self.assertEqual((opened["v"], opened["pid"], opened["conn"], opened["prev"]), (1, os.getpid(), CONN, ""))
        self.assertEqual((begin["code"], begin["ec"], begin["cell"], begin["hdr"]),
                         (odd, 7, "cell-1", json.loads(header(1))))
        self.assertEqual((begin["seq"], out["seq"], stdin["seq"], end["seq"]), (1, 3, 5, 9))
        self.assertEqual((out["of"], out["type"], out["content"]), ("m1", "stream", {"name": "stdout", "text": "text"}))
        self.assertEqual(display["metadata"], {"isolated": True})
        self.assertEqual((stdin["prompt"], stdin["password"]), ("pass\ud800word? ", True))
        self.assertEqual((end["ok"], end["ms"]), (False, 12.3))
        self.assertEqual((note["what"], note["text"]), ("fault", "x\ny"))
        self.assertEqual([record["n"] for record in session.records()], list(range(1, 8)))
        cell, = session.cells()
        self.assertEqual((cell.code, cell.ec, cell.cell_id, cell.file, cell.ok, cell.ms, cell.is_ended, cell.cut),
                         (odd, 7, "cell-1", "<ipython-input-7-", False, 12.3, True, 0))
        self.assertEqual(cell.outputs[1], {"type": "display_data", "content": {"data": {"text/plain": "x"}},
                                           "metadata": {"isolated": True}})
        self.assertEqual((session.damaged, session.lost, session.killer), (0, 0, None))

    def test_a_line_is_ascii_json_and_the_checksum_of_what_is_before_it(self):
        log = self.log()
        self.cell(log, 1, "é\n\u2028")
        with open(os.path.join(self.folder, log.id + ".log"), "rb") as file:
            lines = file.read().split(b"\n")
        self.assertEqual(lines.pop(), b"")
        for line in lines:
            self.assertTrue(line.isascii())
            crc = json.loads(line)["crc"]
            member = b',"crc":"%s"' % crc.encode()
            self.assertEqual(line[-len(member) - 1:], member + b"}")
            self.assertEqual(crc, "%08x" % crc32(line.replace(member, b"")))

    def test_files_are_closed_to_others_under_any_umask(self):
        for umask in (0, 0o777):
            before = os.umask(umask)
            try:
                log = self.log(per_cell=10)
                self.cell(log, 1, "much more than ten bytes")
            finally:
                os.umask(before)
            self.assertEqual(os.stat(self.folder).st_mode & 0o7777, 0o700)
            for suffix in (".log", ".lock", ".fault", ".bulk"):
                self.assertEqual(os.stat(os.path.join(self.folder, log.id + suffix)).st_mode & 0o7777, 0o600, suffix)

    def test_a_header_as_other_clients_write_it_stays_on_its_line(self):
        log = self.log()
        for number, raw in enumerate(['{"msg_id": "m1",\n "username": "é"}'.encode(), b'{"msg_id":"\xff"}']):
            log.begin(raw, f"m{number}", "pass", number)
        session = self.read(log)
        self.assertEqual([cell.header for cell in session.cells()], [{"msg_id": "m1", "username": "é"}, {}])
        self.assertEqual(session.damaged, 0)

    def test_a_msg_id_may_be_any_text(self):
        log = self.log()
        for seq, name in enumerate(['"', "\\", '\\"', "\n", "é", 'a","seq":99,"of":"b', "\ud800"], 1):
            raw = json.dumps({"msg_id": name, "msg_type": "execute_request"}).encode()
            log.begin(raw, name, "pass", seq)
            log.published("stream", seq, stream(name), raw)
            self.assertEqual(list(log.between(seq, seq, 1000).parents), [] if seq > 0 and b'"k":"begin"' in
                             log.between(seq, seq, 1000).records[0] else [name])
        session = self.read(log)
        self.assertEqual([cell.of for cell in session.cells()], [cell.outputs[0]["content"]["text"]
                                                                 for cell in session.cells()])
        self.assertEqual(len(session.cells()), 7)

    def test_output_is_recorded_for_cells_and_for_nobody_but_not_for_silent_requests(self):
        log = self.log()
        self.cell(log, 1, "mine")
        log.published("stream", 10, stream("of a thread, after the end"), header(1))
        log.published("stream", 11, stream("of nobody"), b"{}")
        log.published("stream", 12, stream("of a widget"), header(2, "comm_msg"))
        log.published("stream", 13, stream("of a silent cell"), header(3))
        for msg_type in ("status", "execute_input", "comm_msg", "iopub_welcome"):
            log.published(msg_type, 14, b"{}", header(1))
        log.asked(header(3), "?", False)
        log.end(header(3), True, 0, 15)
        session = self.read(log)
        outs = [(record.get("of"), record["content"]["text"]) for record in session.records() if record["k"] == "out"]
        self.assertEqual(outs, [("m1", "mine"), ("m1", "of a thread, after the end"), (None, "of nobody"),
                                (None, "of a widget")])
        self.assertEqual([record["k"] for record in session.records()].count("end"), 1)
        self.assertEqual(len(session.cells()[0].outputs), 2)

    def test_a_private_cell_is_a_hash_and_a_length(self):
        log = self.log()
        log.begin_private(header(1), "m1", "%%private\nsecret-code", 1)
        log.published("stream", 1, stream("secret-output"), header(1))
        log.asked(header(1), "secret-prompt", False)
        log.end(header(1), True, 0, 2)
        with open(os.path.join(self.folder, log.id + ".log"), "rb") as file:
            self.assertNotIn(b"secret", file.read())
        cell, = self.read(log).cells()
        self.assertEqual((cell.code, cell.length, cell.outputs, cell.is_ended), (None, 21, [], True))
        again = self.log()
        again.begin_private(header(1), "m1", "%%private\nsecret-code", 1)
        hashes = {self.read(name).records()[1]["hash"] for name in (log, again)}
        self.assertEqual(len(hashes), 2)        # a key of its own for each session: nobody can try codes

    def test_what_asks_to_be_private(self):
        for code in ("%%private", "%%private\nx", "  \n%%private\n", "%%private \n"):
            self.assertTrue(crashlog.is_private(code), code)
        for code in ("%%privately", "x\n%%private", "%private", ""):
            self.assertFalse(crashlog.is_private(code), code)

    def test_the_order_is_that_of_the_numbers_whatever_the_clock_says(self):
        log = self.log()
        times = iter([2e9, 5.0, 1e9, 4e9] * 10)
        with mock.patch.object(crashlog.time, "time", lambda: next(times)):
            for number in range(1, 6):
                self.cell(log, number, "x")
        self.assertEqual([cell.ec for cell in self.read(log).cells()], [1, 2, 3, 4, 5])

    def test_two_kernels_of_one_second_have_two_sessions(self):
        with mock.patch.object(crashlog.time, "strftime", lambda *args: "20260101T000000"):
            logs = [self.log("/run/%d.json" % number) for number in range(5)]
        self.assertEqual(len({log.id for log in logs}), 5)
        self.assertEqual(len(crashlog.sessions()), 5)

    def test_a_cell_within_which_another_was_run_is_the_one_that_runs(self):
        log = self.log()
        self.cell(log, 1)
        log.begin(header(2), "m2", "%recover replay", 2)
        log.begin(header(3), "m3", "again", 2)
        self.assertEqual(self.read(log).killer.code, "again")
        log.end(header(3), True, 0, 1)
        self.assertEqual(self.read(log).killer.code, "%recover replay")
        log.end(header(2), True, 0, 1)
        self.assertIsNone(self.read(log).killer)

    def test_a_thousand_cells_are_known_and_no_more(self):
        log = self.log()
        for number in range(crashlog.CELLS + 5):
            self.cell(log, number)
        self.assertEqual((len(log._cells), len(log._parents)), (crashlog.CELLS, crashlog.CELLS))
        log.published("stream", 1, stream("forgotten"), header(0))
        log.published("stream", 2, stream("known"), header(5))
        outs = [record["of"] for record in self.read(log).records() if record["k"] == "out"]
        self.assertEqual(outs, ["m5"])

    def test_clients_that_use_the_same_msg_id_are_forgotten_as_others_are(self):
        log = self.log()
        for number in range(2):
            log.begin(header(number), "1", "pass", number)
        for number in range(2, crashlog.CELLS + 5):
            self.cell(log, number)
        self.assertEqual(len(log._cells), crashlog.CELLS)


# -- a file that was damaged

class Damage(Case):

    def written(self):
        log = self.log()
        for number in range(1, 5):
            self.cell(log, number, "text %d" % number, "é\u2028", code="x = %d" % number)
        log.begin(header(5), "m5", "1/0", 5)
        with open(os.path.join(self.folder, log.id + ".log"), "rb") as file:
            return log, file.read()

    def copy(self, data):
        """A session without a lock, with this log."""
        name = "20260101T000000-1-abcdef"
        fd = os.open(os.path.join(self.folder, name + ".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
        return self.read(name)

    def read_all(self, session):
        """Everything that a reader can ask; none of it raises."""
        session.state(), session.closed, session.is_restarted, session.fault_text(), session.killer
        session.marks(), session.outline(), session.damaged, session.lost, session.cells()
        return session.records()

    def test_every_truncation_reads_as_a_prefix(self):
        log, data = self.written()
        whole = self.read(log).records()
        for size in range(len(data) + 1):
            session = self.copy(data[:size])
            records = session.records()
            self.assertEqual(records, whole[:data[:size].count(b"\n")])
            self.assertEqual((session.damaged, session.lost), (0, 0))
            if records != whole[:data[:size - 1].count(b"\n")]:
                begun = [record["ec"] for record in records if record["k"] == "begin"]
                ended = sum(record["k"] == "end" for record in records)
                killer = session.killer
                self.assertEqual(killer.ec if killer else None, begun[-1] if len(begun) > ended else None)

    def test_no_flipped_bit_is_read_as_valid(self):
        log, data = self.written()
        whole = {json.dumps(record) for record in self.read(log).records()}
        lines = data.split(b"\n")[:-1]
        chosen = random.Random(1)
        flips = [(at, bit) for at in range(len(data)) for bit in range(8)]
        for at, bit in chosen.sample(flips, min(len(flips), rounds(3000, 100_000))):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            read = [record for record in map(crashlog.parse, bytes(changed).split(b"\n")[:-1]) if record]
            self.assertTrue(all(json.dumps(record) in whole for record in read), (at, bit))
            # A newline that is none any more takes two lines with it, or the last.
            self.assertIn(len(lines) - len(read), (1, 2))

    @unittest.skipUnless(support.IS_SOAK, "a long campaign")
    def test_no_flipped_bit_of_a_hundred_thousand_is_read_as_valid(self):
        log, data = self.written()
        lines, chosen = data.split(b"\n")[:-1], random.Random(2)
        for _ in range(100_000):
            line = bytearray(chosen.choice(lines))
            for _ in range(chosen.choice((1, 1, 1, 2, 3, 20))):
                line[chosen.randrange(len(line))] ^= 1 << chosen.randrange(8)
            if bytes(line) not in lines:
                self.assertIsNone(crashlog.parse(bytes(line)))

    def test_a_reader_sees_the_rest_and_counts_what_is_damaged_and_lost(self):
        log, data = self.written()
        lines = data.split(b"\n")
        lines[3] = lines[3][:20] + b"#" + lines[3][21:]
        del lines[7:9]
        session = self.copy(b"\n".join(lines))
        self.assertEqual((session.damaged, session.lost), (1, 3))
        self.assertEqual(len(session.records()), len(lines) - 2)

    def test_many_cuts_are_counted_in_a_moment(self):
        session = self.read(self.log())
        cuts = [(number, b"cut", b"", crashlog.seal(
            b'{"n":%d,"k":"cut","t":1,"first":%d,"last":%d,"records":8,"bytes":8' % (
                number, number - 8, number - 1))[:-1]) for number in range(10, 100_000, 10)]
        began = time.monotonic()
        with mock.patch.object(LoggedSession, "_entries", lambda session: cuts):
            self.assertEqual(session.lost, len(cuts))
            self.assertEqual(session.cells(), [])
        self.assertLess(time.monotonic() - began, 5)

    def test_no_bytes_at_all_make_a_reader_raise(self):
        chosen = random.Random(3)
        _, data = self.written()
        lines = data.split(b"\n")[:-1]
        bad = [b"[]", b"{}", b"null", b'{"n":1}', b'{"n":"x","k":"open","t":1}', b'{"n":1,"k":[],"t":1}', b"[" * 99_999,
               b'{"n":1,"k":"open","t":1e999}', b'{"n":9,"k":"end","t":1,"of":[]}', b'{"n":9,"k":"begin","hdr":[]}',
               b'{"n":-5,"k":"cut","t":1,"first":5,"last":-5,"records":-1,"bytes":0}', b'{"n":' + b"9" * 5000 + b"}",
               b'{"n":999999999999999,"k":"note","t":1,"what":"far"}', b'{"n":2,"k":"open","t":1,"marks":{"a":[]}}',
               b'{"n":3,"k":"open","t":1,"pid":1,"conn":"","prev":"","marks":{"a":[1]}}',
               b'{"n":4,"k":"cut","t":1,"first":-100000000000000000000,"last":1000000000000000000,"records":0,"bytes":0}',
               b'{"n":5,"k":"begin","t":1,"seq":1,"of":"a","ec":true,"code":5,"cell":[],"file":{},"hdr":{"session":[]}}',
               b'{"n":6,"k":"out","t":1,"seq":1,"of":"a","type":"stream","content":{},"metadata":[]}', b"\xff\x00"]
        sealed = [crashlog.seal(line[:-1])[:-1] for line in bad if line.endswith(b"}")]
        for _ in range(rounds(150, 3000)):
            picked = [chosen.choice(bad + sealed + lines) for _ in range(chosen.randrange(12))]
            if chosen.random() < 0.3:
                picked.append(chosen.randbytes(chosen.randrange(300)))
            chosen.shuffle(picked)
            self.read_all(self.copy(b"\n".join(picked)))

    def test_a_file_that_is_not_ours_alone_is_not_read(self):
        log, data = self.written()
        session = self.copy(data)
        os.chmod(session.path(".log"), 0o644)
        self.assertEqual(self.read_all(session), [])
        os.unlink(session.path(".log"))
        os.symlink(os.path.join(self.folder, log.id + ".log"), session.path(".log"))
        self.assertEqual(self.read_all(self.read(session)), [])


# -- more output than is kept

class MuchOutput(Case):

    def test_the_first_and_the_newest_half_of_a_cell_are_in_the_log(self):
        log = self.log(per_cell=2000)
        texts = ["line %d" % number for number in range(100)]
        self.cell(log, 1, *texts)
        session = self.read(log)
        self.assertEqual([output["content"]["text"] for output in session.cells()[0].outputs], texts)
        self.assertEqual((session.lost, session.damaged, session.cells()[0].cut), (0, 0, 0))
        os.unlink(session.path(".bulk"))
        session = self.read(log)
        cell, = session.cells()
        kept = [output["content"]["text"] for output in cell.outputs]
        cut, = [record for record in session.outline() if record["k"] == "cut"]
        self.assertEqual(len(kept) + cut["records"], 100)
        self.assertEqual((cell.cut, session.lost, cell.is_ended), (cut["records"], 0, True))
        at = next(index for index in range(100) if kept[index] != texts[index])
        self.assertEqual(kept, texts[:at] + texts[at - len(kept):])
        self.assertTrue(3 < at < 20 and 3 < len(kept) - at < 20, (at, len(kept)))

    def test_a_little_more_than_half_is_cut_nowhere(self):
        log = self.log(per_cell=2000)
        self.cell(log, 1, *["line %d" % number for number in range(9)])
        session = self.read(log)
        self.assertTrue(os.path.exists(session.path(".bulk")))
        os.unlink(session.path(".bulk"))
        session = self.read(log)
        self.assertEqual((len(session.cells()[0].outputs), session.lost), (9, 0))
        self.assertNotIn("cut", [record["k"] for record in session.outline()])

    def test_a_ring_that_turned_says_what_is_gone(self):
        log = self.log(per_cell=1000, backlog=3000)
        self.cell(log, 1, *["line %d" % number for number in range(200)], ends=False)
        session = self.read(log)
        for suffix in (".bulk", ".bulk.1"):
            self.assertLess(os.stat(session.path(suffix)).st_size, 3200)
        cell, = session.cells()
        self.assertEqual((session.lost, session.damaged), (0, 0))
        self.assertEqual(len(cell.outputs) + cell.cut, 200)
        self.assertEqual(cell.outputs[-1]["content"]["text"], "line 199")
        self.assertEqual(session.killer.ec, 1)

    def test_a_full_log_takes_inputs_only(self):
        log = self.log(log=3000)
        for number in range(1, 40):
            self.cell(log, number, "text " * 20, code="x = %d" % number)
        session = self.read(log)
        self.assertEqual([cell.code for cell in session.cells()], ["x = %d" % number for number in range(1, 40)])
        self.assertTrue(all(cell.is_ended and len(cell.outputs) == 1 for cell in session.cells()))
        with open(session.path(".log"), "rb") as file:
            self.assertLess(file.read().count(b'"k":"out"'), 10)
        os.unlink(session.path(".bulk"))
        session = self.read(log)
        self.assertEqual((session.lost, sum(cell.cut + len(cell.outputs) for cell in session.cells())), (0, 39))

    def test_what_is_kept_in_memory_does_not_grow(self):
        log = self.log(per_cell=2000, backlog=20_000)
        with mock.patch.object(sessionlog, "SPAN", 200), mock.patch.object(sessionlog, "SPANS", 50):
            for number in range(300):
                self.cell(log, number, *["text"] * 30)
                self.assertLessEqual(len(log._spans), 50)
        self.assertTrue(all(not cell.tail for cell in log._cells.values()))
        self.assertTrue(log.between(1, 5, 10_000).cut)
        self.assertFalse(log.between(log._seq - 5, log._seq, 10_000).cut)


# -- pages for frontends

class Model:
    """What a page must hold: everything that was written is kept in a list, and looked through."""

    def __init__(self, log):
        self.log, self.records, self.seq, self.number = log, [], 0, 0

    def do(self, chosen):
        log, kind = self.log, chosen.random()
        if kind < 0.2 or not self.number:
            self.number += 1
            log.begin(header(self.number), f"m{self.number}", "x" * chosen.randrange(200), self.number)
            self.records.append(("begin", self.seq + 1, f"m{self.number}"))
        elif kind < 0.3:
            log.end(header(self.number), True, 0, self.seq + 1)
            self.records.append(("end", self.seq + 1, f"m{self.number}"))
        else:
            self.seq += 1
            if kind < 0.4:
                log.published("status", self.seq, b"{}", header(self.number))
                return
            of = max(1, self.number - (chosen.random() < 0.1))
            text = "%d " % self.seq + "y" * chosen.choice((0, 10, 300, 3000))
            log.published("stream", self.seq, stream(text), header(of))
            self.records.append(("out", self.seq, f"m{of}", text))

    def between(self, first, last):
        return [record for record in self.records if first <= record[1] <= last]

    @staticmethod
    def seen(lines):
        seen = []
        for record in map(crashlog.parse, lines):
            text = (record["content"]["text"],) if record["k"] == "out" else ()
            seen.append((record["k"], record["seq"], record["of"], *text))
        return seen


class Pages(Case):

    def random_log(self, chosen, **limits):
        patches = [mock.patch.object(sessionlog, "SPAN", chosen.choice((100, 1000, 65536)))]
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)
        model = Model(self.log(**limits))
        for _ in range(chosen.randrange(300)):
            model.do(chosen)
        return model

    def assert_subsequence(self, part, whole):
        rest = iter(whole)
        self.assertTrue(all(item in rest for item in part), (part, whole))

    def pages(self, log, first, last, max_bytes):
        """All records from page to page; whether something is missing."""
        lines, cut, at = [], False, first
        while at is not None:
            page = log.between(at, last, max_bytes)
            self.assertTrue(page.records or page.next_seq is None)
            self.assertTrue(page.next_seq is None or page.next_seq > at)
            numbers = [json.loads(line)["seq"] for line in page.records]
            if len(set(numbers)) > 1:       # what has the same number comes together
                fits = page.records[:numbers.index(numbers[-1]) + 1]
                self.assertLessEqual(sum(map(len, fits)), max_bytes)
            begun = {json.loads(line)["of"] for line in page.records if json.loads(line)["k"] == "begin"}
            self.assertEqual(set(page.parents), {json.loads(line)["of"] for line in page.records} - begun)
            for of, raw in page.parents.items():
                self.assertEqual(json.loads(raw)["msg_id"], of)
            lines += page.records
            cut, at = cut or page.cut, page.next_seq
        return lines, cut

    def test_pages_hold_what_was_published_between_two_numbers(self):
        for seed in range(rounds(40, 300)):
            chosen = random.Random(seed)
            with self.subTest(seed=seed):
                model = self.random_log(chosen, per_cell=chosen.choice((100, 5000, 1 << 20)))
                for _ in range(5):
                    first = chosen.randrange(model.seq + 3)
                    last = chosen.randrange(first, model.seq + 5)
                    lines, cut = self.pages(model.log, first, last, chosen.choice((1, 500, 5000, 1 << 20)))
                    self.assertFalse(cut)
                    self.assertEqual(Model.seen(lines), model.between(first, last))

    def test_what_a_turned_ring_no_longer_holds_is_said_to_be_cut(self):
        for seed in range(rounds(40, 300)):
            chosen = random.Random(seed)
            with self.subTest(seed=seed):
                model = self.random_log(chosen, per_cell=chosen.choice((100, 5000)),
                                        backlog=chosen.choice((2000, 9000)))
                session = self.read(model.log)
                self.assertEqual((session.damaged, session.lost), (0, 0))
                kept = {record["n"] for record in session.records()}
                for _ in range(5):
                    first = chosen.randrange(model.seq + 3)
                    last = chosen.randrange(first, model.seq + 5)
                    lines, cut = self.pages(model.log, first, last, chosen.choice((500, 1 << 20)))
                    wanted, seen = model.between(first, last), Model.seen(lines)
                    there = [record["n"] for record in session.records() if record["k"] in ("begin", "out", "end")
                             and first <= record["seq"] <= last]
                    # All that a reader of the files would find, in order, and the truth about the rest.
                    self.assertEqual([json.loads(line)["n"] for line in lines], there)
                    self.assertLessEqual(set(there), kept)
                    self.assert_subsequence(seen, wanted)
                    self.assertTrue(cut or seen == wanted)

    def test_what_could_not_be_recorded_is_said_to_be_missing(self):
        log = self.log()
        self.cell(log, 1, *"abc", ends=False)
        with mock.patch.object(crashlog.os, "write", side_effect=OSError(errno.ENOSPC, "full")):
            for seq in (4, 5, 6):
                log.published("stream", seq, stream("lost"), header(1))
        for seq in (7, 8):
            log.published("stream", seq, stream("kept"), header(1))
        self.assertEqual([log.between(*numbers, 1 << 20).cut for numbers in ((1, 3), (1, 8), (5, 5), (7, 8))],
                         [False, True, True, False])
        self.assertTrue(log.recent(1, 1 << 20).cut)
        self.assertEqual(self.read(log).lost, 3)
        os.chmod(self.folder, 0o777)
        log = self.log()
        log.published("stream", 1, stream("never"), b"{}")
        self.assertTrue(log.between(1, 1, 1 << 20).cut)

    def test_recent_holds_the_last_cells_and_the_newest_of_their_output(self):
        for seed in range(rounds(40, 300)):
            chosen = random.Random(seed)
            with self.subTest(seed=seed):
                model = self.random_log(chosen, per_cell=chosen.choice((100, 5000, 1 << 20)))
                for cells in (0, 1, 3, None):
                    budget = chosen.choice((500, 5000, 1 << 20))
                    page = model.log.recent(cells, budget)
                    self.assertIsNone(page.next_seq)
                    begins = [index for index, record in enumerate(model.records) if record[0] == "begin"]
                    begins = begins if cells is None else begins[max(0, len(begins) - cells):]
                    wanted = model.records[begins[0]:] if begins and cells != 0 else []
                    seen = Model.seen(page.records)
                    if not page.cut:
                        self.assertEqual(seen, wanted)
                    else:
                        outputs = [record for record in page.records if b'"k":"out"' in record[:40]]
                        alone = len(outputs[0]) if len(outputs) == 1 else 0     # one there is, however large
                        self.assertLessEqual(sum(map(len, page.records)) - alone, budget + 700)
                        self.assert_subsequence(seen, wanted)
                        newest = [record for record in seen if record[0] != "begin"]
                        others = [record for record in wanted if record[0] != "begin"]
                        self.assertEqual(others[len(others) - len(newest):], newest)

    def test_recent_shows_the_newest_message_of_a_flood_though_it_is_larger_than_the_page(self):
        log = self.log()
        log.begin(header(1), "a_1", "flood()", 1, None)
        for seq in range(1, 4):
            log.published("stream", seq, stream("x" * 70_000), header(1))
        log.published("stream", 4, stream("x" * 600_000), header(1))
        self.assertEqual(Model.seen(log.recent(1, 65_536).records), [("begin", 1, "a_1")])
        log.published("stream", 5, stream("y" * 70_000), header(1))
        self.assertIn("y" * 70_000, str(Model.seen(log.recent(1, 65_536).records)))
        self.assertTrue(log.recent(1, 65_536).cut)

    def test_a_cell_of_forty_megabytes_is_refilled_in_full(self):
        log = self.log()
        log.begin(header(1), "m1", "print", 1)
        text = "x" * 65_000
        for seq in range(1, 641):
            log.published("stream", seq, stream("%d %s" % (seq, text)), header(1))
        seen, at, pages = [], 1, 0
        while at is not None:
            page = log.between(at, 640, 1 << 20)
            self.assertFalse(page.cut)
            seen += [json.loads(line)["content"]["text"] for line in page.records if b'"k":"out"' in line[:40]]
            at, pages = page.next_seq, pages + 1
        self.assertTrue(all(said == "%d %s" % (seq, text) for seq, said in enumerate(seen, 1)))
        self.assertEqual(len(seen), 640)
        self.assertLess(pages, 45)

    def test_what_is_read_for_a_page_does_not_grow_with_the_log(self):
        def read(cells):
            log = self.log()
            for number in range(cells):
                self.cell(log, number, "some text", "and more")
            with mock.patch.object(crashlog.os, "pread", side_effect=os.pread) as pread:
                log.recent(10, 1 << 20)
                log.between(log._seq - 10, log._seq, 1 << 20)
            return sum(call.args[1] for call in pread.call_args_list)

        self.assertLess(read(3000), read(50) + 3 * sessionlog.SPAN)

    def test_damage_under_a_living_log_is_skipped(self):
        log = self.log()
        self.cell(log, 1, "one", "two", "three")
        with open(os.path.join(self.folder, log.id + ".log"), "r+b") as file:
            file.seek(file.read().index(b'"two"'))
            file.write(b'"XXX"')
        self.assertEqual([record[-1] for record in Model.seen(log.between(1, 9, 9999).records) if record[0] == "out"],
                         ["one", "three"])
        os.truncate(file.name, 0)
        self.assertEqual(log.between(1, 9, 9999).records, [])


# -- faults

@contextlib.contextmanager
def everywhere(failing):
    """The module `os` replaced where files are written."""
    with contextlib.ExitStack() as stack:
        for module in (crashlog, sessionlog, connection):
            stack.enter_context(mock.patch.object(module, "os", failing))
        yield


class FailingOS:
    """The module os, whose n-th call of those that can fail does."""

    CAN_FAIL = {"open", "write", "ftruncate", "fsync", "fdatasync", "rename", "mkdir", "makedirs", "unlink", "fstat",
                "lstat", "stat", "close", "pread", "listdir", "fchmod", "chmod", "fdopen", "dup2", "getcwd"}

    def __init__(self, at, number):
        self.left, self.number, self.failed = at, number, None

    def __getattr__(self, name):
        real = getattr(os, name)
        return self.wrap(name, real) if name in self.CAN_FAIL else real

    def wrap(self, name, real):
        if "sync" in name:
            def real(fd): pass          # the disk is not what is tested
        def call(*args, **options):
            self.left -= 1
            if self.left != 0:
                return real(*args, **options)
            self.failed = name
            if name == "close":         # closes, and reports an error all the same
                real(*args, **options)
            if name == "write" and len(args[1]) > 10 and self.number == errno.ENOSPC:
                return real(args[0], args[1][:-5])      # no room for the last of it
            raise OSError(self.number, os.strerror(self.number))
        return call


class Faults(Case):

    def run_cells(self, log):
        for number in range(1, 5):
            self.cell(log, number, "some text", "more text", "and more", code="x = %d" % number)
        log.note("nothing")
        log.asked(header(4), "?", False)

    def test_whichever_call_fails_cells_run_on_and_the_log_goes_on(self):
        for number in (errno.ENOSPC, errno.EIO):
            at, names = 0, set()
            while True:
                at += 1
                failing = FailingOS(at, number)
                self.warnings.clear()
                with everywhere(failing):
                    log = SessionLog(CONN, crashlog.Limits(per_cell=300, backlog=700, fsync="always"),
                                     self.warnings.append)
                    log.open("9")
                    self.run_cells(log)
                self.cell(log, 7, "after")
                is_over = failing.failed is None
                names.add(failing.failed)
                with self.subTest(number=errno.errorcode[number], at=at, failed=failing.failed):
                    self.assertLessEqual(len(self.warnings), 1)
                    self.assertTrue(log.is_on)
                    session = self.read(log)
                    self.assertEqual(session.state(), "alive")
                    self.assertEqual(session.opened["ipython"], "9")
                    self.assertEqual(session.damaged, 0)
                    self.assertLessEqual(session.lost, 3)
                    last = session.cells()[-1]
                    self.assertEqual((last.ec, last.is_ended), (7, True))
                    noted = [record for record in session.outline() if record.get("what") == "resumed"]
                    self.assertEqual(len(noted), len(self.warnings))
                self.end_log(log)
                self.assertEqual(os.listdir(self.folder), [])
                if is_over:
                    break
            self.assertLessEqual({"open", "write", "rename", "mkdir", "fstat", "lstat"}, names)
        self.assertGreater(at, 40)

    def test_whichever_call_fails_at_the_end_it_ends_and_was_closed(self):
        at = 0
        while True:
            at += 1
            log = self.log(per_cell=300)
            self.run_cells(log)
            failing = FailingOS(at, errno.EIO)
            with everywhere(failing):
                log.close("shutdown")
            with self.subTest(at=at, failed=failing.failed):
                self.assertNotEqual(self.read(log).state(), "alive")
                if os.path.exists(os.path.join(self.folder, log.id + ".log")) and failing.failed != "write":
                    self.assertEqual(self.read(log).state(), "closed")
            if failing.failed is None:
                break
        self.assertGreater(at, 5)

    def test_a_disk_that_stays_full_and_has_room_again(self):
        log = self.log()
        self.cell(log, 1, "before")
        real = os.write
        failures = []

        def full(fd, data):
            failures.append(1)
            if len(failures) % 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, data[:len(data) // 2])

        with mock.patch.object(crashlog.os, "write", full):
            for number in range(2, 50):
                self.cell(log, number, "during")
            self.assertFalse(log.is_on)
        self.cell(log, 50, "after")
        self.assertTrue(log.is_on)
        session = self.read(log)
        self.assertEqual([cell.ec for cell in session.cells()], [1, 50])
        self.assertEqual((session.damaged, session.lost, len(self.warnings)), (0, 48 * 3, 1))
        self.assertIn("No space left on device", self.warnings[0])
        note, = [record for record in session.outline() if record["k"] == "note"]
        self.assertEqual((note["what"], note["lost"]), ("resumed", 48 * 3))

    def test_a_line_that_cannot_be_taken_back_is_damaged_alone(self):
        log = self.log()
        self.cell(log, 1, "before")
        real, is_full = os.write, [True]

        def half(fd, data):
            return real(fd, data[:len(data) // 2]) if is_full.pop() else real(fd, data)

        def no(fd, size):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with mock.patch.object(crashlog.os, "ftruncate", no):
            with mock.patch.object(crashlog.os, "write", half):
                log.note("torn")
            log.note("not even tried")
        self.cell(log, 2, "after")
        session = self.read(log)
        self.assertEqual((session.damaged, session.lost, [cell.ec for cell in session.cells()]), (0, 2, [1, 2]))

    def test_a_file_limit_inside_a_record_then_room_again(self):
        child = self.process(
            "import resource, signal\n"
            "warnings = []\n"
            "log = SessionLog(CONN, Limits(), warnings.append)\n"
            "log.open('9')\n"
            "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
            "for n in range(1, 40):\n"
            "    if n == 10:\n"
            "        size = os.stat(os.path.join(log.folder, log.id + '.log')).st_size\n"
            "        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1500, hard))\n"
            "    if n == 30: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))\n"
            "    log.begin(header(n), 'm%d' % n, 'x = %d' % n, n)\n"
            "    log.published('stream', n, json.dumps({'name': 'stdout', 'text': 'y' * 77}).encode(), header(n))\n"
            "    log.end(header(n), True, 0.1, n)\n"
            "say(json.dumps([log.id, warnings]))\nsys.stdin.read()\n")
        name, warnings = json.loads(self.line(child))
        session = self.read(name)
        cells = [cell.ec for cell in session.cells()]
        self.assertEqual((session.damaged, len(warnings)), (0, 1))
        self.assertEqual(cells[:9] + cells[-10:], [*range(1, 10), *range(30, 40)])
        self.assertIn(len(cells), range(20, 25))
        note, = [record for record in session.outline() if record.get("what") == "resumed"]
        self.assertEqual(note["lost"], session.lost)
        self.assertGreater(session.lost, 40)

    def refused(self, says):
        """The one warning of a log that cannot be, and its exit code for who asks for the folder."""
        self.warnings.clear()
        log = self.log()
        self.assertFalse(log.is_on)
        self.cell(log, 1, "text")
        log.note("x")
        self.assertEqual(log.recent(5, 1000), sessionlog.Page([], {}, None, False))
        self.assertIsNone(log.fault)
        self.assertEqual(len(self.warnings), 1)
        self.assertIn(says, self.warnings[0])
        with self.assertRaises(StateError) as caught:
            crashlog.sessions()
        self.assertEqual(caught.exception.exit_code, 5)
        return log

    def test_an_unsafe_folder_is_not_used_until_it_is_mended(self):
        for unsafe in (self.folder, os.path.dirname(self.folder)):
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            os.chmod(os.path.dirname(self.folder), 0o700)
            os.chmod(unsafe, 0o777)
            log = self.refused("is open to other users")
            os.chmod(unsafe, 0o700)
            self.cell(log, 2, "text")
            session = self.read(log)
            self.assertEqual([record["k"] for record in session.records()], ["open", "begin", "note", "out", "end"])
            self.assertEqual((session.opened["conn"], session.state()), (CONN, "alive"))
            log.close("test")

    def test_a_link_in_place_of_the_folder_is_not_followed(self):
        os.mkdir(os.path.join(self.home, "elsewhere"), 0o700)
        os.symlink(os.path.join(self.home, "elsewhere"), os.path.join(self.home, "state"))
        self.refused("is a symbolic link")
        self.assertEqual(os.listdir(os.path.join(self.home, "elsewhere")), [])

    def test_a_link_in_place_of_the_log_is_not_followed(self):
        os.makedirs(self.folder, mode=0o700)
        os.chmod(os.path.dirname(self.folder), 0o700)
        canary = os.path.join(self.home, "canary")
        with open(canary, "w") as file:
            file.write("untouched")
        with mock.patch.object(crashlog.os, "urandom", lambda size: b"x" * size), \
                mock.patch.object(crashlog.time, "strftime", lambda *args: "20260101T000000"):
            name = "20260101T000000-%d-787878" % os.getpid()
            os.symlink(canary, os.path.join(self.folder, name + ".log"))
            log = self.log()
        self.cell(log, 1, "text")
        self.assertFalse(log.is_on)
        self.assertEqual(len(self.warnings), 1)
        with open(canary) as file:
            self.assertEqual(file.read(), "untouched")

    def test_a_read_only_folder(self):
        os.makedirs(self.folder, mode=0o700)
        os.chmod(os.path.dirname(self.folder), 0o700)
        if IS_ROOT:         # who may write everywhere: so be somebody else
            for path in (self.home, os.path.dirname(self.folder), self.folder):
                os.chown(path, 65534, 65534)
            os.seteuid(65534)
            self.addCleanup(os.seteuid, 0)
        os.chmod(self.folder, 0o500)
        log = self.log()
        self.cell(log, 1, "x")
        self.assertFalse(log.is_on)
        self.assertEqual(len(self.warnings), 1)
        os.chmod(self.folder, 0o700)
        self.cell(log, 2, "x")
        self.assertEqual([cell.ec for cell in self.read(log).cells()], [2])
        log.close("test")

    @unittest.skipUnless(IS_ROOT, "needs a folder of another user")
    def test_a_folder_of_another_user(self):
        os.makedirs(self.folder, mode=0o700)
        os.chmod(os.path.dirname(self.folder), 0o700)
        os.chown(self.folder, 65534, 65534)
        self.refused("belongs to another user")

    def test_where_the_folder_is(self):
        with mock.patch.dict(os.environ, TWOPROC_STATE="relative"):
            self.refused("give the whole path")
        with mock.patch.dict(os.environ, TWOPROC_STATE="", XDG_STATE_HOME=os.path.join(self.home, "xdg")):
            self.assertEqual(crashlog.state_folder(), os.path.join(self.home, "xdg", "twoproc"))
        with mock.patch.dict(os.environ, TWOPROC_STATE="", XDG_STATE_HOME="relative"):
            self.assertEqual(crashlog.state_folder(), os.path.join(self.home, ".local", "state", "twoproc"))
        with mock.patch.dict(os.environ, TWOPROC_STATE="", XDG_STATE_HOME=""):
            with mock.patch.object(crashlog.os.path, "expanduser", lambda path: path):      # HOME unset, no such user
                self.refused("no home folder is known")
        with mock.patch.dict(os.environ, TWOPROC_STATE="/dev/null/state"):
            self.refused("TWOPROC_STATE")
        with mock.patch.dict(os.environ, TWOPROC_STATE="/proc/twoproc/state"):
            self.refused("TWOPROC_STATE")

    def test_one_warning_a_minute_however_often_it_fails(self):
        log, now = self.log(), [1000.0]
        with mock.patch.object(crashlog.time, "monotonic", lambda: now[0]):
            for _ in range(5):
                with mock.patch.object(crashlog.os, "write", side_effect=OSError(errno.ENOSPC, "full")):
                    self.cell(log, 1, "x")
                self.cell(log, 2, "x")
            self.assertEqual(len(self.warnings), 1)
            now[0] += 61
            with mock.patch.object(crashlog.os, "write", side_effect=OSError(errno.ENOSPC, "full")):
                self.cell(log, 3, "x")
            self.assertEqual(len(self.warnings), 2)

    def test_a_warning_that_raises_and_one_that_is_logged_itself(self):
        log = self.log()
        for warn in (lambda text: 1 / 0, lambda text: log.note("warned")):
            log._warn, log._warned_at = warn, -1e9
            with mock.patch.object(crashlog.os, "write", side_effect=OSError(errno.EIO, "x")):
                self.cell(log, 1, "x")
            self.cell(log, 2, "x")
            self.assertTrue(log.is_on)

    def test_a_cell_that_closes_our_descriptors_or_puts_its_own_there(self):
        for does_replace in (False, True):
            log = self.log(per_cell=100)
            self.cell(log, 1, "text" * 30)
            numbers = [log._lock_file.fd, log._log.fd, log._bulk.fd]
            mine = os.path.join(self.home, "mine")
            for number in numbers:
                if does_replace:
                    fd = os.open(mine, os.O_RDWR | os.O_CREAT, 0o600)
                    os.dup2(fd, number)
                    os.close(fd)
                else:
                    os.close(number)
            self.cell(log, 2, "text" * 30)
            self.cell(log, 3, "text" * 30)
            session = self.read(log)
            self.assertEqual(([cell.ec for cell in session.cells()], session.state()), ([1, 2, 3], "alive"))
            self.assertEqual((session.lost, session.damaged), (0, 0))
            if does_replace:
                self.assertEqual(os.stat(mine).st_size, 0)
                for number in numbers:
                    os.close(number)        # still open: it is the cell's to close
            log.close("test")
            self.assertEqual(self.warnings, [])

    def test_a_folder_removed_under_a_running_session_is_made_again(self):
        log = self.log(per_cell=100)
        self.cell(log, 1, "text" * 30)
        shutil.rmtree(os.path.dirname(self.folder))
        self.cell(log, 2, "text" * 30)
        session = self.read(log)
        self.assertEqual((session.state(), session.opened["conn"], [cell.ec for cell in session.cells()]),
                         ("alive", CONN, [2]))
        self.assertEqual(log.recent(5, 10_000).records[0], log.recent(1, 10_000).records[0])

    def test_a_cell_that_changes_the_environment_does_not_move_the_log(self):
        log = self.log()
        with mock.patch.dict(os.environ, TWOPROC_STATE=os.path.join(self.home, "elsewhere"), HOME="/"):
            os.unlink(os.path.join(self.folder, log.id + ".log"))
            self.cell(log, 1, "x")
        self.assertEqual(self.read(log).cells()[0].ec, 1)
        self.assertFalse(os.path.exists(os.path.join(self.home, "elsewhere")))

    def test_nothing_is_written_after_the_end(self):
        log = self.log()
        log.close("shutdown")
        self.cell(log, 1, "x")
        log.note("x")
        log.close("again")
        self.assertEqual((os.listdir(self.folder), log.is_on), ([], False))


class Sync(Case):

    def test_a_thread_syncs_once_a_second_and_sleeps_when_there_is_nothing(self):
        log = self.log()
        synced, threads = threading.Semaphore(0), []

        def own_thread(name, target):
            threads.append(threading.Thread(target=target, name=name))
            threads[-1].start()

        with mock.patch.object(sessionlog._File, "sync", lambda file: synced.release()), \
                mock.patch.object(sessionlog, "SYNC_SECONDS", 0.05):
            log.start_sync(own_thread)
            for number in range(3):
                self.cell(log, number, "x")
            self.assertTrue(synced.acquire(timeout=DEADLINE))
            wait_until(lambda: not log._is_dirty)
            self.assertTrue(log._wake.empty() and threads[0].is_alive())
            log.close("test")
            threads[0].join(DEADLINE)
        self.assertEqual([thread.name for thread in threads], ["twoproc-log"])
        self.assertFalse(threads[0].is_alive())

    def test_a_file_system_that_cannot_sync_is_no_trouble(self):
        for number in (errno.EINVAL, errno.ENOSYS):
            log = self.log(fsync="always")
            with mock.patch.object(crashlog.os, "fdatasync", side_effect=OSError(number, "cannot"), create=True):
                self.cell(log, 1, "x")
            self.assertEqual((log.is_on, self.warnings), (True, []))
            self.assertEqual([record["k"] for record in self.read(log).records()], ["open", "begin", "out", "end"])

    def test_never_and_always(self):
        for fsync, expected in (("never", 0), ("always", 4)):
            log = self.log(fsync=fsync)
            log.start_sync(lambda name, target: target())       # has nothing to wait for
            with mock.patch.object(sessionlog._File, "sync") as sync:
                self.cell(log, 1, "x", "y")
            self.assertEqual(sync.call_count, expected)

    def test_a_sync_that_fails_is_one_warning(self):
        log = self.log()
        with mock.patch.object(crashlog.os, "fdatasync", side_effect=OSError(errno.EIO, "broken disk"), create=True), \
                mock.patch.object(sessionlog, "SYNC_SECONDS", 0.01):
            log.start_sync(lambda name, target: threading.Thread(target=target, daemon=True).start())
            log.note("x")
            wait_until(lambda: self.warnings)
        self.cell(log, 1, "x")
        self.assertTrue(log.is_on)
        self.assertEqual((len(self.warnings), self.read(log).lost), (1, 0))


# -- alive, closed, died

class Lock(Case):

    def states(self):
        return [session.state() for session in crashlog.sessions()]

    def test_alive_then_died_then_gone(self):
        child = self.process(LIVES)
        session = self.read(self.line(child))
        self.assertEqual(session.state(), "alive")
        with self.assertRaises(LockedError) as caught, session.take():
            self.fail("a living session was taken")
        self.assertIn("pid %d" % child.pid, str(caught.exception))
        with self.assertRaises(LockedError):
            session.drop()
        self.kill(child)
        self.assertEqual(session.state(), "died")
        session.drop()
        self.assertEqual(os.listdir(self.folder), [])

    def test_a_proper_end_leaves_nothing(self):
        child = self.process(LIVES + "log.close('shutdown')\nsay('closed')\n")
        session = self.read(self.line(child))
        child.stdin.close()
        self.assertEqual(self.line(child), "closed")
        self.assertEqual((session.state(), os.listdir(self.folder)), ("closed", []))

    def test_a_stopped_kernel_is_alive(self):
        child = self.process(LIVES)
        session = self.read(self.line(child))
        child.send_signal(signal.SIGSTOP)
        wait_until(lambda: crashlog.started_ticks(child.pid))
        self.assertEqual(session.state(), "alive")

    def test_children_of_the_kernel_do_not_keep_it_alive(self):
        starts = {
            "fork": "if os.fork() == 0:\n    log.close_in_child()\n    child()\n",
            "at fork": "os.register_at_fork(after_in_child=log.close_in_child)\nif os.fork() == 0: child()\n",
            "subprocess": "import subprocess; subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], "
                          "close_fds=False, stdout=subprocess.DEVNULL)\n",
        }
        for name, start in starts.items():
            with self.subTest(child=name):
                child = self.process("log = SessionLog(CONN)\nlog.open('9')\n"
                                     "def child():\n    os.close(1); os.close(2); sys.stdin.read(); os._exit(0)\n"
                                     + start + "say(log.id)\nimport time\ntime.sleep(1000)\n")
                session = self.read(self.line(child))
                self.assertEqual(session.state(), "alive")
                self.kill(child)
                wait_until(lambda session=session: session.state() == "died", what="the lock to be let go")
                child.stdin.close()
                session.drop()

    def test_a_forked_child_writes_nothing_and_its_crash_is_its_own(self):
        child = self.process(
            "import faulthandler\nlog = SessionLog(CONN)\nlog.open('9')\nfaulthandler.enable(log.fault)\n"
            "pid = os.fork()\n"
            "if pid == 0:\n    log.close_in_child()\n    log.note('x'); log.begin(header(1), 'm1', 'x', 1)\n"
            "    faulthandler._sigsegv()\n"
            "os.waitpid(pid, 0)\nsay(log.id)\nsys.stdin.read()\n")
        session = self.read(self.line(child))
        self.assertEqual([record["k"] for record in session.records()], ["open"])
        self.assertEqual(session.fault_text(), "")

    def test_a_fatal_signal_leaves_its_line_beside_the_log(self):
        child = self.process("import faulthandler\nlog = SessionLog(CONN)\nlog.open('9')\n"
                             "faulthandler.enable(log.fault)\nsay(log.id)\nfaulthandler._sigsegv()\n")
        session = self.read(self.line(child))
        child.wait(DEADLINE)
        self.assertIn("Segmentation fault", session.fault_text())

    def dead(self, **holder):
        """A session that died, its lock file changed; None removes a member."""
        child = self.process(LIVES)
        session = self.read(self.line(child))
        self.kill(child)
        with open(session.path(".lock")) as file:
            found = {**json.load(file), **holder}
        with open(session.path(".lock"), "w") as file:
            json.dump({name: value for name, value in found.items() if value is not None}, file)
        return session

    def test_a_process_number_given_out_again_does_not_make_it_live(self):
        self.assertEqual(self.dead(pid=os.getpid(), started=crashlog.started_ticks(os.getpid())).state(), "died")

    def test_a_machine_that_was_started_again(self):
        self.assertEqual(self.dead(boot="another").state(), "died")

    def test_another_machine_is_unknown_and_taken_only_on_purpose(self):
        session = self.dead(boot="another", host="elsewhere")
        self.assertEqual(session.state(), "unknown")
        with self.assertRaises(LockedError), session.take():
            self.fail("taken without a question")
        crashlog.prune(crashlog.Limits(keep_crashed=0, keep_days=0))
        self.assertTrue(os.path.exists(session.path(".log")))
        with session.take(anyway=True):
            pass

    def test_a_lock_file_that_lost_its_content_with_the_power(self):
        session = self.dead()
        os.truncate(session.path(".lock"), 0)
        self.assertEqual((session.state(), session.opened["conn"]), ("died", CONN))
        os.truncate(session.path(".log"), 0)
        self.assertEqual(self.read(session).state(), "died")

    def test_a_lock_file_with_anything_in_it_does_not_stop_the_next_kernel(self):
        session = self.dead()
        os.truncate(session.path(".log"), 0)
        for content in ("[]", "[" * 99, '{"pid": 1, "conn": "%s", "prev": [], "marks": 5, "host": {}}' % CONN, ""):
            with open(session.path(".lock"), "w") as file:
                file.write(content)
            log = self.log()
            self.assertTrue(log.is_on)
            self.assertEqual(self.read(log).opened["conn"], CONN)
            log.close("test")
        self.assertEqual(self.warnings, [])

    def test_a_lock_file_that_is_not_ours_is_unknown(self):
        session = self.dead()
        os.chmod(session.path(".lock"), 0o666)
        self.assertEqual(session.state(), "unknown")

    def test_a_file_system_without_locks_is_judged_by_the_process(self):
        no_locks = mock.patch.object(connection.fcntl, "flock", side_effect=OSError(errno.ENOLCK, "No locks available"))
        no_locks.start()
        self.addCleanup(no_locks.stop)
        preamble = "import errno\nfrom twoproc import connection\n" \
            "def flock(*args): raise OSError(errno.ENOLCK, 'x')\nconnection.fcntl.flock = flock\n"
        child = self.process(preamble + LIVES)
        session = self.read(self.line(child))
        with open(session.path(".lock")) as file:
            self.assertEqual(json.load(file)["locking"], "none")
        self.assertEqual(session.state(), "alive")
        child.send_signal(signal.SIGSTOP)
        self.assertEqual(session.state(), "alive")
        self.kill(child)
        self.assertEqual(session.state(), "died")
        living = {"pid": os.getpid(), "started": crashlog.started_ticks(os.getpid())}
        for changes, expected in (({}, "died"), (living, "alive"), ({**living, "started": "1"}, "died"),
                                  ({"boot": "another", **living}, "died"), ({"host": "elsewhere", **living}, "unknown"),
                                  ({"boot": "", **living}, "unknown"), ({"pid": "x"}, "died"), ({"pid": -1}, "died")):
            with self.subTest(changes=changes):
                with open(session.path(".lock")) as file:
                    holder = {"pid": child.pid, **json.load(file)}
                with open(session.path(".lock"), "w") as file:
                    json.dump({**holder, **changes}, file)
                found = session.state()
                with open(session.path(".lock"), "w") as file:
                    json.dump(holder, file)
                self.assertEqual(found, expected)

    def test_killed_between_its_close_record_and_its_end_it_was_closed(self):
        child = self.process(LIVES + "log._record(b'close', b',\"why\":\"shutdown\",\"restart\":false')\n"
                             "say('x')\nimport time\ntime.sleep(100)\n")
        session = self.read(self.line(child))
        child.stdin.close()
        self.line(child)
        self.assertEqual(session.state(), "alive")
        self.kill(child)
        self.assertEqual((session.state(), session.closed["why"]), ("closed", "shutdown"))

    def test_two_who_look_do_not_see_each_other(self):
        session = self.dead()
        fd = os.open(session.path(".lock"), os.O_RDONLY)
        self.addCleanup(os.close, fd)
        self.assertTrue(connection.try_lock(fd, shared=True))
        self.assertEqual(session.state(), "died")

    def test_a_recovery_ends_although_a_child_of_it_lives(self):
        session = self.dead()
        with session.take():
            reading, writing = os.pipe()
            child = os.fork()
            if not child:
                os.close(writing)
                os.read(reading, 1)
                os._exit(0)
            os.close(reading)
        try:
            with self.read(session).take():
                pass
        finally:
            os.close(writing)
            os.waitpid(child, 0)

    def test_a_kernel_that_dies_while_it_recovers_leaves_no_lock_with_its_children(self):
        session = self.dead()
        child = self.process("with LoggedSession(%r, %r).take():\n"
                             "    reading, writing = os.pipe()\n"
                             "    if os.fork() == 0:\n"
                             "        os.close(1); os.close(2); os.write(writing, b'x')\n"
                             "        sys.stdin.read(); os._exit(0)\n"
                             "    os.read(reading, 1)\n"
                             "    say('taken')\n"
                             "    os.kill(os.getpid(), 9)\n" % (session.folder, session.id))
        self.assertEqual(self.line(child), "taken")
        child.wait(DEADLINE)
        with session.take():
            session.append("recovered", by="me", how="replay")

    def test_a_session_that_is_being_recovered_still_died(self):
        session = self.dead()
        with session.take():
            self.assertEqual(self.read(session.id).state(), "died")
            with self.assertRaises(LockedError), self.read(session.id).take():
                self.fail("taken twice")
            with self.assertRaises(LockedError):
                self.read(session.id).drop()
            crashlog.prune(crashlog.Limits(keep_crashed=0))
            self.assertTrue(os.path.exists(session.path(".log")))
            with session.take():        # its own, again
                session.append("recovered", by="me", how="history")
        self.assertEqual(session.records()[-1]["k"], "recovered")


class Races(Case):

    def test_of_two_recoverers_one_wins(self):
        code = ("for line in sys.stdin:\n"
                "    session = LoggedSession(*line.split())\n"
                "    try:\n"
                "        with session.take():\n"
                "            session.append('recovered', by=str(os.getpid()), how='history')\n"
                "            session.drop()\n"
                "            say('won')\n"
                "    except LockedError: say('lost')\n")
        racers = [self.process(code) for _ in range(2)]
        log = self.log()
        self.cell(log, 1, "x")
        with open(os.path.join(self.folder, log.id + ".log"), "rb") as file:
            data = file.read()
        for number in range(rounds(20, 200)):
            name = "20260101T%06d-1-abcdef" % number
            for suffix, content in ((".lock", b"{}"), (".log", data)):
                fd = os.open(os.path.join(self.folder, name + suffix), os.O_WRONLY | os.O_CREAT, 0o600)
                os.write(fd, content)
                os.close(fd)
            for racer in racers:
                racer.stdin.write("%s %s\n" % (self.folder, name))
                racer.stdin.flush()
            self.assertEqual(sorted(self.line(racer) for racer in racers), ["lost", "won"])
            self.assertEqual(crashlog.sessions()[0].id, log.id)

    def test_who_looks_while_a_session_ends_never_sees_it_dead(self):
        child = self.process("for line in sys.stdin:\n    log = SessionLog(CONN)\n    log.open('9')\n    say(log.id)\n"
                             "    log.close('shutdown')\n")
        for _ in range(rounds(50, 500)):
            child.stdin.write("\n")
            child.stdin.flush()
            session = self.read(self.line(child))
            seen = []
            while not seen or seen[-1] == "alive":
                seen.append(session.state())
            self.assertEqual(seen[-1], "closed")
            try:
                with session.take():
                    self.assertEqual(session.state(), "closed")
            except LockedError:
                pass

    def test_who_looks_while_a_session_begins_never_sees_it_dead(self):
        child = self.process("sys.stdin.readline()\nfor _ in range(%d):\n    SessionLog(CONN).close('x')\nsay('done')\n"
                             % rounds(100, 2000))
        os.makedirs(self.folder, 0o700)
        os.chmod(os.path.dirname(self.folder), 0o700)
        child.stdin.write("\n")
        child.stdin.flush()
        done = threading.Thread(target=self.line, args=[child])
        done.start()
        while done.is_alive():
            for session in crashlog.sessions():
                self.assertIn(session.state(), ("alive", "closed"))
        done.join()

    def test_no_acknowledged_record_is_lost_by_a_kill_at_any_moment(self):
        code = ("log = SessionLog(CONN, Limits(per_cell=2000, backlog=20000))\nlog.open('9')\nsay(log.id)\nseq = 0\n"
                "for n in range(1, 10**9):\n"
                "    log.begin(header(n), 'm%d' % n, 'x = %d' % n, n); say('b %d' % n)\n"
                "    for m in range(n % 40):\n"
                "        seq += 1\n"
                "        log.published('stream', seq, b'{\"name\":\"stdout\",\"text\":\"%d\"}' % seq, header(n))\n"
                "        say('o %d' % seq)\n"
                "    log.end(header(n), True, 0.1, seq); say('e %d' % n)\n")
        chosen = random.Random(4)
        for _ in range(rounds(20, 1000)):
            child = self.process(code)
            session = self.read(self.line(child))
            timer = threading.Timer(chosen.random() * 0.02, child.kill)
            timer.start()
            said = child.stdout.read().split("\n")
            timer.join()
            child.wait(DEADLINE)
            if said.pop():
                self.fail("a line was torn")       # a pipe takes a short line as a whole
            self.assertEqual((session.state(), session.damaged), ("died", 0))
            records = session.records()
            begun = {record["ec"] for record in records if record["k"] == "begin"}
            ended = {record["of"] for record in records if record["k"] == "end"}
            out = {record["seq"] for record in records if record["k"] == "out"}
            cut = [(record["first"], record["last"]) for record in records if record["k"] == "cut"]
            by_n = {record["n"] for record in records}
            for line in said:
                kind, number = line.split()
                number = int(number)
                if kind == "b":
                    self.assertIn(number, begun)
                elif kind == "e":
                    self.assertIn("m%d" % number, ended)
                elif number not in out:
                    self.assertTrue(cut)            # gone with the ring, and said to be
            self.assertEqual(session.lost, 0)
            self.assertGreaterEqual(len(by_n), len(begun))
            running = max(begun, default=0)
            running = 0 if "m%d" % running in ended else running
            self.assertEqual(session.killer.ec if session.killer else 0, running)
            session.drop()


# -- the folder

class Folder(Case):

    def crashed(self, number=1, conn=CONN, code=""):
        """A session of a process that was killed after one cell."""
        child = self.process(f"log = SessionLog({conn!r})\nlog.open('9')\nlog.begin(header({number}), 'm', 'x', 1)\n"
                             f"{code}\nsay(log.id)\nos.kill(os.getpid(), 9)\n")
        name = self.line(child)
        child.communicate(timeout=DEADLINE)
        return self.read(name), child.pid

    def test_a_kernel_finds_the_dead_one_that_it_replaces(self):
        session, _ = self.crashed()
        self.crashed(conn="/run/other.json")
        log = self.log()
        self.assertEqual(log.prev.id, session.id)
        opened = self.read(log).opened
        self.assertEqual((opened["prev"], opened["marks"]), (session.id, {"s1": "2026-01-01"}))
        self.assertIsNone(self.log("/run/third.json").prev)

    def test_a_restart_hands_over_files_and_marks_until_the_next_has_ended_properly(self):
        first = self.log()
        self.cell(first, 1, "x")
        first.close("restart", keep=True)
        self.assertEqual((self.read(first).state(), self.read(first).is_restarted), ("closed", True))
        crashlog.prune()
        second = self.log()
        self.assertEqual(second.prev.id, first.id)
        self.assertEqual(second.prev.cells()[0].code, "pass")
        second.begin(header(9, session="s2"), "m9", "pass", 1)
        second.close("restart", keep=True)
        third = self.log()
        self.assertEqual(third.prev.id, second.id)
        self.assertEqual(sorted(third.prev.marks()), ["s1", "s2"])
        self.assertEqual([session.id for session in crashlog.sessions()], sorted([third.id, second.id], reverse=True))
        third.close("shutdown")
        self.assertEqual(os.listdir(self.folder), [])

    def test_a_clock_set_back_does_not_make_an_older_session_the_one_replaced(self):
        with mock.patch.object(crashlog.time, "strftime", lambda *args: "20270101T000000"):
            first = self.log()
        first.close("restart", keep=True)
        with mock.patch.object(crashlog.LoggedSession, "drop"):
            second = self.log()
            second.close("restart", keep=True)
        self.assertEqual(self.log().prev.id, second.id)

    def test_marks_are_the_newest_date_of_each_client_session(self):
        log = self.log()
        for number, session in ((5, "a"), (3, "a"), (4, "b")):
            log.begin(header(number, session=session), f"m{number}", "x", 1)
        marks = self.read(log).marks()
        self.assertEqual({name: json.loads(header(number))["date"] for name, number in (("a", 5), ("b", 4))}, marks)

    def test_the_exit_is_noted_in_the_dead_session_of_that_process(self):
        session, pid = self.crashed()
        self.crashed()
        self.assertFalse(crashlog.note_exit(CONN, 1, -9))
        self.assertFalse(crashlog.note_exit("/run/no.json", pid, -9))
        self.assertTrue(crashlog.note_exit(CONN, pid, -signal.SIGSEGV))
        record = session.records()[-1]
        self.assertEqual((record["k"], record["status"], record["signal"], session.lost), ("exit", -11, "SIGSEGV", 0))
        self.assertEqual(session.state(), "died")
        log = self.log("/run/living.json")
        self.assertFalse(crashlog.note_exit("/run/living.json", os.getpid(), 0))
        self.assertEqual(self.read(log).outline()[-1]["k"], "open")

    def test_who_looks_before_the_exit_is_noted_hears_of_it_all_the_same(self):
        session, pid = self.crashed()
        with mock.patch("time.sleep", side_effect=lambda seconds: crashlog.note_exit(CONN, pid, -9)):
            dead = death.obituary(CONN, None)
        self.assertIn("SIGKILL", dead.death.text)

    def test_the_exit_is_noted_without_reading_the_backlog(self):
        session, pid = self.crashed(code="for seq in range(1, 50):\n    log.published('stream', seq, b'{\"name\":"
                                         "\"stdout\",\"text\":\"%b\"}' % (b'x' * 200_000), header(1))")
        self.assertGreater(os.path.getsize(session.path(".bulk")), 9_000_000)
        read, sizes = LoggedSession._read, []

        def spy(*args):
            content = read(*args)
            sizes.append(len(content))
            return content
        with mock.patch.object(LoggedSession, "_read", spy):
            self.assertTrue(crashlog.note_exit(CONN, pid, -9))
        self.assertLess(sum(sizes), 2_000_000)
        self.assertEqual((session.records()[-1]["k"], session.lost), ("exit", 0))

    def test_a_record_appended_replaces_what_was_torn(self):
        session, _ = self.crashed()
        before = len(session.records())
        with open(session.path(".log"), "ab") as file:
            file.write(b'{"n":99,"k":"beg')
        with session.take():
            session.append("exit", status=3, signal="")
        self.assertEqual((len(session.records()), session.damaged, session.lost), (before + 1, 0, 0))

    def test_prune_keeps_the_newest_and_never_touches_the_living(self):
        dead = [self.crashed(conn="/run/%d.json" % number)[0] for number in range(4)]
        living = self.log("/run/living.json")
        kept = self.log("/run/kept.json", keep_closed=1)
        kept.close("shutdown")
        order = sorted(session.id for session in dead)
        heir = self.log(self.read(order[0]).opened["conn"])     # its %recover works on the oldest
        crashlog.prune(crashlog.Limits(keep_crashed=2, keep_closed=1))
        left = {session.id for session in crashlog.sessions()}
        self.assertEqual(left, {order[0], *order[-2:], living.id, kept.id, heir.id})
        heir.close("shutdown")
        crashlog.prune(crashlog.Limits(keep_crashed=2))
        self.assertNotIn(kept.id, {session.id for session in crashlog.sessions()})
        os.utime(os.path.join(self.folder, order[-1] + ".log"), (1, 1))
        crashlog.prune(crashlog.Limits(keep_days=1))
        self.assertEqual({session.id for session in crashlog.sessions()}, {order[-2], living.id})

    def test_a_session_elsewhere_is_removed_after_a_month_without_a_record(self):
        session, _ = self.crashed()
        living = self.log("/run/living.json")
        with open(session.path(".lock"), "w") as file:
            json.dump({"pid": 1, "host": "elsewhere", "boot": "another", "conn": CONN, "locking": "flock"}, file)
        for days, keep_days, is_kept in ((29, 0, True), (40, 50, True), (40, 30, False)):
            for name in (session, living):
                os.utime(os.path.join(self.folder, name.id + ".log"), (time.time() - days * 86400,) * 2)
            self.assertEqual(session.state(), "unknown")
            crashlog.prune(crashlog.Limits(keep_crashed=0, keep_days=keep_days))
            self.assertEqual({found.id for found in crashlog.sessions()}, {session.id, living.id} if is_kept
                             else {living.id})

    def test_what_has_no_log_is_swept_after_a_minute(self):
        session, _ = self.crashed()
        os.unlink(session.path(".log"))
        living = self.log()
        with open(os.path.join(self.folder, "README"), "w"):
            pass
        crashlog.prune()
        self.assertTrue(os.path.exists(session.path(".lock")))
        for suffix in (".lock", ".fault"):
            os.utime(session.path(suffix), (1, 1))
        crashlog.prune()
        left = sorted(name for name in os.listdir(self.folder) if not name.startswith(living.id))
        self.assertEqual(left, ["README"])

    def test_find_by_name_beginning_file_and_kernel(self):
        first, _ = self.crashed(conn="/run/otter-1.json")
        second, _ = self.crashed(conn="/run/kernel-owl-2.json")
        for name, expected in ((first.id, first), (second.id[:-2], second), ("/run/otter-1.json", first),
                               ("otter-1", first), ("owl-2", second), (None, max(first, second, key=lambda s: s.id))):
            self.assertEqual(crashlog.find(name).id, expected.id)
        for name, says in (("no-such", "no such session"), ("2", "several"), ("", "several")):
            with self.assertRaises(StateError) as caught:
                crashlog.find(name)
            self.assertIn(says, str(caught.exception))
            self.assertEqual(caught.exception.exit_code, 2)

    def main(self, *argv):
        done = subprocess.run([sys.executable, "-m", "twoproc.crashlog", *argv], cwd=support.ROOT, text=True,
                              capture_output=True, stdin=subprocess.DEVNULL, timeout=DEADLINE)
        return done.returncode, done.stdout + done.stderr

    def test_the_command_line_lists_shows_and_drops(self):
        session, _ = self.crashed()
        log = self.log("/run/living.json")
        status, text = self.main()
        self.assertEqual((status, len(text.splitlines())), (0, 2))
        self.assertEqual(self.main("--list"), (status, text))
        self.assertRegex(text, session.id + r".*1 (cell|input)")
        status, text = self.main("--show", session.id)
        self.assertEqual(status, 0, text)
        self.assertEqual(self.main("--drop", session.id), (0, ""))
        for argv, expected, says in ((["--drop", log.id], 3, "is running"), (["--drop", "none"], 2, "no such session"),
                                     (["--into", "x"], 2, "only with --replay"), (["--export", "x"], 2, "")):
            status, text = self.main(*argv)
            self.assertEqual(status, expected, text)
            self.assertIn(says, text)
            self.assertNotIn("Traceback", text)
        os.chmod(self.folder, 0o777)
        self.assertEqual(self.main("--list")[0], 5)


class Cost(Case):

    def test_a_trivial_cell_costs_far_less_than_it_did_to_ask(self):
        log = self.log()
        headers = [header(number) for number in range(2000)]
        content, best = stream("hello world\n"), []
        for turn in range(5):
            started = time.perf_counter()
            for number in range(turn * 400, turn * 400 + 400):
                parent = headers[number]
                log.begin(parent, "m%d" % number, "print('hello world')", number, None, "<ipython-input-1-")
                log.published("stream", number, content, parent, b"{}")
                log.end(parent, True, 0.001, number)
            best.append((time.perf_counter() - started) / 400)
        self.assertLess(min(best), support.at_most(200e-6))     # 20 to 60 us, quiet; bench measures, this guards

    def test_the_outline_of_a_long_log_does_not_parse_its_output(self):
        log = self.log(per_cell=1 << 30)
        log.begin(header(1), "m1", "x", 1)
        for seq in range(1, 300):
            log.published("stream", seq, stream("x" * 60_000), header(1))
        session, parsed = self.read(log), []
        real = json.loads
        with mock.patch.object(crashlog.json, "loads", lambda text: (parsed.append(len(text)), real(text))[1]):
            self.assertEqual([record["k"] for record in session.outline()], ["open", "begin"])
            self.assertEqual((session.damaged, session.lost), (0, 0))
        self.assertLess(sum(parsed), 10_000)


if __name__ == "__main__":
    unittest.main()
