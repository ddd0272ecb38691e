# Distributed under the terms of the BSD 3-Clause License.
"""What cells, their threads, C code and child processes write: all of it arrives, in order, when it is written.

One kernel is shared by the tests that only print; what a stream does by itself is tried without any kernel.
"""
import io
import itertools
import os
import subprocess
import sys
import tempfile
import time
import unittest

from twoproc.streams import DescriptorCapture, InStream, OutStream

from . import support
from .support import DEADLINE, KernelCase, wait_until


class OutStreamTests(unittest.TestCase):
    def setUp(self):
        self.texts = []
        self.stream = OutStream("stdout", 1, self.texts.append)

    def test_text_is_handed_on_at_once_and_unchanged(self):
        print("a", end="", file=self.stream)
        self.stream.writelines(["b\r", "c\n"])
        self.assertEqual("".join(self.texts), "ab\rc\n")

    def test_only_text_can_be_written(self):
        self.assertRaises(TypeError, self.stream.write, b"bytes")
        self.assertEqual(self.stream.write("four"), 4)

    def test_bytes_are_decoded_where_a_character_is_whole(self):
        for byte in "aé€😀".encode():
            self.assertEqual(self.stream.buffer.write(bytes([byte])), 1)
        self.assertEqual("".join(self.texts), "aé€😀")
        self.assertEqual(self.texts[0], "a")        # not kept until more comes

    def test_it_looks_like_a_text_file(self):
        self.assertIsInstance(self.stream, io.TextIOBase)
        self.assertIsInstance(self.stream.buffer, io.BufferedIOBase)
        self.assertEqual((self.stream.encoding, self.stream.fileno(), self.stream.isatty(), self.stream.writable()),
                         ("utf-8", 1, False, True))
        self.assertRaises(io.UnsupportedOperation, self.stream.read)

    def test_closing_it_does_not_silence_it(self):
        self.stream.close()
        self.stream.buffer.close()
        print("still here", file=self.stream)
        self.assertEqual("".join(self.texts), "still here\n")

    def test_it_may_be_wrapped(self):
        wrapped = io.TextIOWrapper(self.stream.buffer, "utf-8", write_through=True)
        wrapped.write("ü")
        self.assertEqual("".join(self.texts), "ü")
        wrapped.detach()


class InStreamTests(unittest.TestCase):
    def stream(self, *lines):
        lines = list(lines)

        def ask(prompt, password):
            if not lines:
                raise EOFError
            return lines.pop(0)
        return InStream(ask)

    def test_a_line_is_asked_for_when_one_is_read(self):
        stream = self.stream("one", "two")
        self.assertEqual(stream.readline(), "one\n")
        self.assertEqual(stream.read(2), "tw")
        self.assertEqual(stream.readline(), "o\n")
        self.assertEqual(stream.readline(), "")

    def test_reading_all_and_iterating_end_with_the_end_of_the_file(self):
        self.assertEqual(self.stream("one", "two").read(), "one\ntwo\n")
        self.assertEqual(list(self.stream("one", "", "two")), ["one\n", "\n", "two\n"])


class CaptureTests(unittest.TestCase):
    """DescriptorCapture reads files; here they are files of the test."""

    def setUp(self):
        self.capture = DescriptorCapture()
        for name in ("stdout", "stderr"):
            descriptor, path = tempfile.mkstemp()
            self.addCleanup(os.close, descriptor)
            self.capture._files[name] = descriptor
            file = open(path, "ab", buffering=0)
            self.addCleanup(file.close)
            os.unlink(path)
            setattr(self, name, file)

    def read(self):
        return list(self.capture.read(self.capture.mark()))

    def test_what_was_written_is_read_once(self):
        self.stdout.write(b"out")
        self.stderr.write(b"err")
        self.assertTrue(self.capture.has_grown())
        self.assertEqual(self.read(), [("stdout", "out"), ("stderr", "err")])
        self.assertFalse(self.capture.has_grown())
        self.assertEqual(self.read(), [])

    def test_a_character_cut_by_the_border_of_a_reading_is_whole(self):
        self.capture.CHUNK = 5
        text = "aé€😀" * 10
        self.stdout.write(text.encode())
        found = []
        while self.capture.has_grown():
            found += [piece for _, piece in self.read()]
        self.assertEqual("".join(found), text)

    def test_bytes_that_are_no_utf8_are_shown_as_replacements(self):
        self.stdout.write(b"a\xff\xfeb")
        self.assertEqual(self.read(), [("stdout", "a\ufffd\ufffdb")])

    def test_another_thread_may_look_while_it_starts(self):
        code = """
import sys, threading
from twoproc.streams import DescriptorCapture
sys.setswitchinterval(1e-6)
captures, faults = [DescriptorCapture() for _ in range(200)], []
def look():
    for capture in captures:
        try:
            while len(capture._files) < 2:
                capture.has_grown()
        except Exception as error:
            faults.append(error)
looking = threading.Thread(target=look)
looking.start()
for capture in captures:
    capture.start()
    capture.stop()
looking.join()
sys.exit(str(faults[:1]) if faults else 0)"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=support.DEADLINE)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_where_there_is_no_fcntl_a_process_goes_on_without_it(self):
        code = """
import sys
sys.modules["fcntl"] = None
from twoproc.streams import DescriptorCapture
capture = DescriptorCapture()
print("told", file=capture.start())
print("printed", capture.has_grown())"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=support.DEADLINE)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "printed False\n", "told\n"))

    def test_shrinking_gives_back_the_space_of_what_was_read_and_only_that(self):
        self.stdout.write(b"x" * 1000)
        self.capture.shrink()
        self.assertEqual(os.fstat(self.stdout.fileno()).st_size, 1000)
        self.read()
        self.capture.shrink()
        self.assertEqual(os.fstat(self.stdout.fileno()).st_size, 0)
        self.stdout.write(b"more")
        self.assertEqual(self.read(), [("stdout", "more")])

    def test_what_is_written_after_the_mark_is_left_for_later(self):
        self.stdout.write(b"before")
        mark = self.capture.mark()
        self.stdout.write(b"after")
        self.assertEqual(list(self.capture.read(mark)), [("stdout", "before")])
        self.assertEqual(self.read(), [("stdout", "after")])

    def test_a_file_that_somebody_empties_is_read_from_its_new_beginning(self):
        self.stdout.write(b"long before")
        self.read()
        os.truncate(self.stdout.fileno(), 0)
        self.stdout.write(b"now")
        self.assertTrue(self.capture.has_grown())
        self.assertEqual(self.read(), [("stdout", "now")])

    def test_a_program_far_ahead_of_the_readers_loses_text_and_says_how_much(self):
        self.capture.BACKLOG = 1000
        self.stdout.write(b"x" * 1001)
        (_, text), = self.read()
        self.assertIn("1001 bytes left out", text)
        self.assertEqual(os.fstat(self.stdout.fileno()).st_size, 0)
        self.stdout.write(b"next")
        self.assertEqual(self.read(), [("stdout", "next")])


class PrintingTests(KernelCase):
    """Order, batches, and when text is seen."""

    def streams(self, result):
        return [(content["name"], content["text"]) for content in result.of_type("stream")]

    def joined(self, result):
        """The same with neighbours as one: a line may leave in the middle of its print(), which writes it in pieces."""
        return [(name, "".join(text for _, text in texts))
                for name, texts in itertools.groupby(self.streams(result), lambda stream: stream[0])]

    def test_everything_a_cell_says_arrives_in_the_order_of_the_program(self):
        result = self.client.execute(
            "import sys\n"
            "from IPython.display import display, clear_output\n"
            "print('one')\n"
            "display('two')\n"
            "print('three', file=sys.stderr)\n"
            "clear_output(wait=True)\n"
            "print('four')\n"
            "_ = sys.displayhook('five')\n"
            "print('six', end='')\n"
            "1 / 0")
        self.assertEqual([(message.msg_type, message.content.get("text") or message.content.get("execution_state")
                           or message.content.get("ename") or message.content.get("data", {}).get("text/plain"))
                          for message in result.messages if message.msg_type != "execute_input"],
                         [("status", "busy"), ("stream", "one\n"), ("display_data", "'two'"), ("stream", "three\n"),
                          ("clear_output", None), ("stream", "four\n"), ("execute_result", "'five'"),
                          ("stream", "six"), ("error", "ZeroDivisionError"), ("status", "idle")])

    def test_stdout_and_stderr_in_turn_keep_their_order(self):
        result = self.client.execute(
            "for i in range(500):\n    print('out', i)\n    print('err', i, file=sys.stderr)"
            .join(["import sys\n", ""]))
        self.assertEqual(self.joined(result),
                         [(name, f"{name[3:]} {i}\n") for i in range(500) for name in ("stdout", "stderr")])

    def test_a_hundred_thousand_lines_arrive_complete_in_few_messages(self):
        result = self.client.execute("for i in range(100_000): print(i)")
        self.assertEqual(result.text(), "".join(f"{i}\n" for i in range(100_000)))
        streams = self.streams(result)
        self.assertLess(len(streams), 1000)
        self.assertLessEqual(max(len(text) for _, text in streams), 65_536)

    def test_a_text_of_many_megabytes_arrives_complete_in_chunks(self):
        result = self.client.execute("print('0123456789' * 2_000_000)")
        self.assertEqual(len(result.text()), 20_000_001)
        self.assertLessEqual(max(len(text) for _, text in self.streams(result)), 65_536)

    def wait_seen(self, code, *texts):
        """Each text is seen although the cell waits for us to say, by a file, that it was."""
        path = os.path.join(self.kernel.home.path, "seen")
        msg_id = self.client.send_execute(
            f"import os, time\ndef wait(path={path!r}, end=time.monotonic() + {DEADLINE}):\n"
            "    while not os.path.exists(path) and time.monotonic() < end: time.sleep(0.005)\n"
            f"    print('seen' if os.path.exists(path) else 'not seen')\n{code}\nwait()")
        began = time.monotonic()
        for text in texts:
            self.client.wait_text(msg_id, text, support.at_most(2))
        took = time.monotonic() - began
        with open(path, "w"):
            pass
        self.assertIn("seen\n", self.client.result(msg_id).text().splitlines(keepends=True)[-1:])
        os.unlink(path)
        return took

    def test_a_line_is_seen_while_the_cell_goes_on(self):
        self.wait_seen("print('first')", "first\n")

    def test_text_without_an_end_of_line_is_seen_while_the_cell_goes_on(self):
        # Not with its first words: those leave with the cell's busy.
        took = [self.wait_seen("time.sleep(0.1); print('half', end='')", "half") for _ in range(3)]
        self.assertLess(min(took), support.at_most(0.5))

    def test_progress_over_one_line_is_seen_while_the_cell_goes_on(self):
        self.wait_seen("print('10 %', end='\\r')", "10 %\r")

    def test_one_byte_to_the_buffer_is_seen_while_the_cell_goes_on(self):
        self.wait_seen("import sys; _ = sys.stdout.buffer.write(b'!')", "!")

    def test_what_a_child_writes_is_seen_while_the_cell_goes_on(self):
        self.wait_seen("os.system('echo from a child')", "from a child\n")

    def test_a_thread_is_heard_at_once_after_its_cell_has_ended(self):
        """Nobody asks the kernel anything in between."""
        msg_id = self.client.send_execute(
            "import threading\ndef later():\n    go.wait(20)\n    print('later', end='')\n"
            "go = threading.Event()\nthreading.Thread(target=later).start()\nthreading.Timer(0.3, go.set).start()")
        self.client.result(msg_id)
        self.client.wait_text(msg_id, "later")

    def test_the_last_words_of_a_thread_that_prints_as_its_cell_ends_are_heard(self):
        for _ in range(20):
            msg_id = self.client.send_execute(
                "import sys, threading, time\n"
                "def write():\n"
                "    for i in range(200): sys.stdout.write('.')\n"
                "    sys.stdout.write('!')\n"
                "t = threading.Thread(target=write); t.start()")
            self.client.reply(msg_id)
            self.client.wait_text(msg_id, "!")

    def test_odd_text_arrives_readable(self):
        result = self.client.execute("print('a\\ud800b', '\\0', '😀')")
        self.assertEqual((result.status, result.text()), ("ok", "a\ud800b \0 😀\n"))


class DescriptorTests(KernelCase):
    """What did not come through sys.stdout."""

    def text(self, code, deadline=DEADLINE):
        result = self.client.execute(code, deadline=deadline)
        self.assertEqual(result.status, "ok", result)
        return result.text()

    def test_children_and_prints_keep_their_order(self):
        code = ("import os, subprocess, sys, time\n"
                "for i in range(5):\n"
                "    print('python', i)\n"
                "    time.sleep(0.002)\n"
                "    os.system('echo system')\n"
                "    print('python again')\n"
                "    time.sleep(0.002)\n"
                "    subprocess.run(['echo', 'subprocess'])\n"
                "    time.sleep(0.002)\n")
        self.assertEqual(self.text(code), "".join(f"python {i}\nsystem\npython again\nsubprocess\n" for i in range(5)))

    def test_children_and_what_follows_keep_their_order(self):
        for code, last in (("os.system('echo child')", "execute_result"),
                           ("os.write(1, b'child\\n'); 5", "execute_result"),
                           ("subprocess.run(['echo', 'child']); display(3)", "display_data"),
                           ("os.system('echo child'); 1 / 0", "error")):
            for _ in range(5):
                with self.subTest(code):
                    result = self.client.execute("import os, subprocess; " + code)
                    self.assertEqual([kind for kind in result.types if kind in ("stream", last)], ["stream", last])

    def test_c_code_and_prints_keep_their_order(self):
        code = ("import ctypes, time\n"
                "libc = ctypes.CDLL(None)\n"
                "for i in range(5):\n"
                "    print('python', i)\n"
                "    libc.printf(b'c\\n'); libc.fflush(None)\n"
                "    time.sleep(0.002)\n")
        self.assertEqual(self.text(code), "".join(f"python {i}\nc\n" for i in range(5)))

    def test_stderr_of_a_child_is_stderr(self):
        result = self.client.execute("!echo wrong >&2")
        self.assertEqual((result.text(), result.text("stderr")), ("", "wrong\n"))

    def test_ten_megabytes_from_c_that_holds_the_interpreter_lock_arrive(self):
        self.assertEqual(len(self.text("import ctypes\nbuffer = b'y' * 9_999_999 + b'\\n'\n"
                                       "_ = ctypes.PyDLL(None).write(1, buffer, len(buffer))")), 10_000_000)

    def test_ten_megabytes_from_a_child_arrive(self):
        text = self.text("import subprocess, sys\n"
                         "_ = subprocess.run([sys.executable, '-c', 'for i in range(1_000_000): print(\"%09d\" % i)'])")
        self.assertEqual(text, "".join("%09d\n" % i for i in range(1_000_000)))

    def test_characters_of_a_child_cut_by_a_reading_are_whole(self):
        self.assertEqual(self.text("import subprocess, sys\n"
                                   "_ = subprocess.run([sys.executable, '-c', '''if 1:\n"
                                   "    import os, time\n"
                                   "    for byte in \"aé€😀\".encode() * 3:\n"
                                   "        os.write(1, bytes([byte])); time.sleep(0.01)\n"
                                   "'''])"), "aé€😀" * 3)

    def test_a_child_that_lives_on_is_heard_while_the_kernel_is_idle(self):
        for number, code in enumerate((     # one of its own, and one that its shell left behind
                "import subprocess; p = subprocess.Popen('until [ -e %s ]; do sleep 0.1; done; echo late', shell=True)",
                "!(until [ -e %s ]; do sleep 0.1; done; echo late) &")):
            with self.subTest(code):
                path = os.path.join(self.kernel.home.path, f"go-{number}")
                msg_id = self.client.send_execute(code % path)
                self.assertNotIn("late\n", self.client.result(msg_id).text())
                with open(path, "w"):
                    pass
                self.client.take("iopub", lambda message: message.content.get("text") == "late\n")

    def test_a_child_that_opens_its_output_anew_is_heard(self):
        result = self.client.execute(
            "import os, time\nos.system('echo a long line before; sleep 0.1')\nos.system('echo anew > /dev/stderr')\n"
            "os.system('sleep 0.1; echo anew > /dev/stdout'); os.system('sleep 0.1; echo after');")
        self.assertEqual((result.text(), result.text("stderr")), ("a long line before\nanew\nafter\n", "anew\n"))

    def test_the_files_are_empty_while_the_kernel_is_idle(self):
        self.text("!echo something; echo else >&2")
        wait_until(lambda: [os.stat(f"/proc/{self.kernel.pid}/fd/{n}").st_size for n in (1, 2)] == [0, 0],
                   what="empty files")

    def test_the_files_have_no_name_and_lose_no_line_to_a_second_writer(self):
        for descriptor in (1, 2):
            self.assertIn("(deleted)", os.readlink(f"/proc/{self.kernel.pid}/fd/{descriptor}"))
        text = self.text("import subprocess\n"
                         "ps = [subprocess.Popen('for i in 1 2 3 4 5 6 7 8 9; do echo x; done', shell=True)"
                         " for _ in range(8)]\nfor p in ps: p.wait();")
        self.assertEqual(text, "x\n" * 72)

    def test_a_child_that_reads_finds_the_end_of_the_file(self):
        began = time.monotonic()
        self.assertEqual(self.text("!read x; echo got\nimport subprocess; _ = subprocess.run('cat')"), "got\n")
        self.assertLess(time.monotonic() - began, support.at_most(3))

    def test_sys_stdout_may_be_given_to_a_child(self):
        result = self.client.execute("import subprocess, sys\n"
                                     "_ = subprocess.run('echo out; echo err >&2', shell=True, stdin=sys.stdin,"
                                     " stdout=sys.stdout, stderr=sys.stderr)\nprint(sys.stdout.fileno())")
        self.assertEqual((result.text(), result.text("stderr")), ("out\n1\n", "err\n"))

    def test_faulthandler_writes_to_the_cell(self):
        result = self.client.execute("import faulthandler\nfaulthandler.enable()\nfaulthandler.dump_traceback()\n"
                                     "faulthandler.disable()")
        self.assertEqual(result.status, "ok")
        self.assertIn("most recent call first", result.text("stderr"))

    def test_a_program_that_never_stops_writing_is_interrupted(self):
        control = self.kernel.client(self, channels=("control",), ready=False)
        msg_id = self.client.send_execute("import subprocess; subprocess.run('yes')")
        self.client.wait_text(msg_id, "y\ny\n")
        control.request("control", "interrupt_request", deadline=support.at_most(2))
        self.assertEqual(self.client.result(msg_id).status, "error")


class ReplacedStreamsTests(KernelCase):
    """User code that puts something else in the place of a stream, a hook or a handler gets it, as in python."""

    def run_cells(self, *cells):
        """Each cell in turn must be fine; returns the last result."""
        for code in cells:
            result = self.client.execute(code)
            self.assertEqual(result.status, "ok", result)
        return result

    def test_stdout_replaced_in_one_cell_is_so_in_the_next_until_restored(self):
        self.run_cells("import io, sys\nold, sys.stdout = sys.stdout, io.StringIO()")
        self.assertEqual(self.run_cells("print('into the buffer')").text(), "")
        self.assertEqual(self.run_cells("new, sys.stdout = sys.stdout, old\nprint('back:', new.getvalue())").text(),
                         "back: into the buffer\n\n")

    def test_stderr_replaced_is_restored(self):
        self.run_cells("import io, sys\nold, sys.stderr = sys.stderr, io.StringIO()")
        self.assertEqual(self.run_cells("print('hidden', file=sys.stderr)").text("stderr"), "")
        self.assertEqual(self.run_cells("sys.stderr = old\nprint('shown', file=sys.stderr)").text("stderr"), "shown\n")

    def test_redirect_stdout_catches_what_python_prints(self):
        self.assertEqual(self.run_cells("import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as f:\n"
                                        "    print('caught')\nprint(repr(f.getvalue()))").text(), "'caught\\n'\n")

    def test_a_stdout_without_any_method_but_write_does_not_harm_the_session(self):
        self.run_cells("import sys\nclass Out:\n    def write(self, text): seen.append(text)\nseen = []\n"
                       "old, sys.stdout = sys.stdout, Out()")
        self.assertEqual(self.client.execute("1 + 1").value, "2")
        self.assertEqual(self.client.execute("1 / 0").status, "error")
        self.assertEqual(self.run_cells("print('x')\nsys.stdout = old\nprint(seen)").text(), "['x', '\\n']\n")

    def test_a_stdout_that_collects_is_emptied_as_the_cell_ends(self):
        self.run_cells("import io, sys\nold = sys.stdout\nsys.stdout = io.TextIOWrapper(old.buffer)")
        self.assertEqual(self.run_cells("print('collected')").text(), "collected\n")
        self.run_cells("sys.stdout = old")

    def test_stdin_replaced_is_read_by_input_without_asking(self):
        self.run_cells("import io, sys\nold, sys.stdin = sys.stdin, io.StringIO('typed\\nsecond\\n')")
        self.assertEqual(self.run_cells("print(input())").text().splitlines()[-1], "typed")
        self.assertEqual(self.run_cells("print(sys.stdin.readline(), end='')\nsys.stdin = old").text(), "second\n")
        self.assertEqual(self.client.execute("print(input('? '))", answers=["asked"]).text(), "asked\n")

    def test_displayhook_replaced_is_called_in_the_next_cell_too(self):
        self.run_cells("import sys\nold = sys.displayhook\nsys.displayhook = lambda value: print('shown:', value)")
        result = self.run_cells("41 + 1")
        self.assertEqual((result.text(), result.value), ("shown: 42\n", None))
        self.run_cells("sys.displayhook = old")
        self.assertEqual(self.run_cells("41 + 1").value, "42")

    def test_excepthook_replaced_is_called_with_what_a_cell_raises(self):
        self.run_cells("import sys\nold = sys.excepthook\n"
                       "sys.excepthook = lambda kind, *_: print('hook:', kind.__name__)")
        result = self.client.execute("1 / 0")
        self.assertEqual((result.status, result.text()), ("error", "hook: ZeroDivisionError\n"))
        self.run_cells("sys.excepthook = old")
        self.assertEqual(self.client.execute("1 / 0").types[-2], "error")

    def test_a_handler_for_sigint_is_kept_and_called(self):
        self.run_cells("import signal, time\nold = signal.signal(signal.SIGINT, lambda *_: hits.append(1))\nhits = []")
        msg_id = self.client.send_execute("print('ready')\nwhile not hits: time.sleep(0.01)\nprint('my own')")
        self.client.wait_text(msg_id, "ready")
        self.client.request("control", "interrupt_request")
        result = self.client.result(msg_id)
        self.assertEqual((result.status, result.text()), ("ok", "my own\n"))
        self.run_cells("assert signal.signal(signal.SIGINT, old) is not signal.default_int_handler")
        msg_id = self.client.send_execute("print('ready')\nwhile True: time.sleep(0.01)")
        self.client.wait_text(msg_id, "ready")
        self.client.request("control", "interrupt_request")
        self.assertEqual(self.client.result(msg_id).reply.content["ename"], "KeyboardInterrupt")


class ForkTests(unittest.TestCase):
    """A child of a cell, made by fork: it is not a second kernel."""

    def setUp(self):
        self.kernel = support.start_kernel(self)
        self.client = self.kernel.client(self)

    def run_cell(self, code, deadline=DEADLINE):
        result = self.client.execute(code, deadline=deadline)
        self.assertEqual(result.status, "ok", result)
        return result

    def test_a_child_that_falls_out_of_its_cell_answers_nobody(self):
        result = self.run_cell("import os\npid = os.fork()\nif pid: print('parent')\nelse: print('child')")
        self.assertEqual([result.reply.content["execution_count"]], [1])
        wait = self.run_cell("print(os.waitpid(pid, 0)[1])")
        self.assertEqual(wait.text().splitlines()[-1], "0")
        pids = {int(self.run_cell("os.getpid()").value) for _ in range(5)}
        self.assertEqual(pids, {self.kernel.pid})
        self.client.collect()
        self.assertEqual([message.msg_type for message in self.client.inbox["shell"]], [])

    def test_a_child_of_a_task_between_two_cells_does_not_wait_for_the_next(self):
        msg_id = self.client.send_execute(
            "import asyncio, os, threading\nends, keeps = os.pipe()\ndef fork():\n    if os.fork():\n"
            "        os.close(keeps)\n"
            "        threading.Thread(target=lambda: print(os.read(ends, 1), 'ended')).start()\n"
            "_ = asyncio.get_event_loop().call_later(0.01, fork)")
        self.client.wait_text(msg_id, "ended")
        self.run_cell("os.wait()")

    def test_a_child_that_asks_finds_the_end_of_the_file(self):
        code = ("import os\npid = os.fork()\nif not pid:\n    try: {}\n    except EOFError: print('the end')\n"
                "    os._exit(0)\nos.waitpid(pid, 0)[1]")
        for question in ("input('? ')", "__import__('getpass').getpass()"):
            with self.subTest(question):
                result = self.client.result(self.client.send_execute(code.format(question), allow_stdin=True))
                self.assertEqual((result.text(), result.value), ("the end\n", "0"))

    def test_the_error_of_a_child_is_seen_and_its_status(self):
        result = self.run_cell("import os\npid = os.fork()\nif not pid: 1 / 0\nprint(os.waitstatus_to_exitcode("
                               "os.waitpid(pid, 0)[1]))")
        self.assertEqual(result.text(), "1\n")
        self.assertIn("ZeroDivisionError", result.text("stderr"))

    def test_prints_of_children_arrive_as_whole_lines(self):
        code = ("import os, sys\n"
                "pids = []\n"
                "for child in range(4):\n"
                "    pid = os.fork()\n"
                "    if not pid:\n"
                "        for i in range(200): print('child', child, 'line', i)\n"
                "        print('no end of line', end='')\n"
                "        sys.stdout.flush()\n"
                "        os._exit(0)\n"
                "    os.waitpid(pid, 0) if child % 2 else pids.append(pid)\n"
                "for pid in pids: os.waitpid(pid, 0)\n")
        text = self.run_cell(code).text().replace("no end of line", "")
        self.assertEqual(sorted(text.splitlines()), sorted(f"child {c} line {i}" for c in range(4) for i in range(200)))

    def test_a_child_holds_neither_address_nor_lock_when_the_kernel_is_killed(self):
        for transport in ("ipc", "tcp"):
            with self.subTest(transport):
                kernel = support.start_kernel(self, "--transport", transport)
                client = kernel.client(self)
                pid = int(client.execute("import os, time\npid = os.fork()\nif not pid:\n    os.setsid()\n"
                                         "    time.sleep(60)\n    os._exit(0)\npid").value)
                self.addCleanup(os.kill, pid, 9)
                kernel.popen.kill()
                kernel.wait()
                os.kill(pid, 0)         # it lives
                again = support.Process(self, kernel.argv, home=kernel.home)
                client = support.Client(kernel.info)
                self.addCleanup(client.close)
                client.wait_ready()
                self.assertEqual(client.execute("1 + 1").value, "2")
                self.assertTrue(again.is_alive, again.log())

    def test_a_pool_of_processes_prints_and_ends(self):
        with open(os.path.join(self.kernel.home.work, "work.py"), "w") as file:
            file.write("def square(n):\n    print('line of', n)\n    return n * n\n")
        for method in ("fork", "spawn"):
            with self.subTest(method):
                result = self.run_cell(
                    "import multiprocessing, sys\nsys.path.insert(0, '')\nimport work\n"
                    f"with multiprocessing.get_context('{method}').Pool(2) as pool:\n"
                    "    squares = pool.map(work.square, range(6))\nsquares", 40)
                self.assertEqual(result.value, "[0, 1, 4, 9, 16, 25]")
                self.assertEqual(sorted(result.text().splitlines()), [f"line of {n}" for n in range(6)])

    def test_a_child_is_ended_by_sigterm_and_the_cell_goes_on(self):
        """Also when it comes at once: a handler of the kernel's in the child would have interrupted the cell."""
        self.run_cell("import multiprocessing, time\nfork = multiprocessing.get_context('fork')\n"
                      "for _ in range(20):\n"
                      "    process = fork.Process(target=time.sleep, args=(60,))\n"
                      "    process.start(); process.terminate(); process.join(5)\n"
                      "    assert process.exitcode == -15, process.exitcode")


if __name__ == "__main__":
    unittest.main()
