# Distributed under the terms of the BSD 3-Clause License.
"""The documentation held against the code: tables, names, numbers, links, commands.

What is said twice drifts apart, so whatever the documents repeat from the code is compared here.  A table is
found by its heading, and compared line by line with what the code would write; a failure shows the line that
is missing.
"""
import argparse
import ast
import glob
import os
import re
import shlex
import subprocess
import sys
import unittest
from urllib.parse import urlsplit

from twoproc import crashlog, frontend, kernel, keys, launcher, recovery, relay, sessionlog
from twoproc.session import MESSAGES, REQUIRED

from . import support, test_imports

PACKAGE = os.path.join(support.ROOT, "twoproc")
DOCUMENTS = sorted(os.path.relpath(path, support.ROOT) for folder in ("", "docs", "examples", "bench")
                   for path in glob.glob(os.path.join(support.ROOT, folder, "*.md")))


def read(name):
    with open(os.path.join(support.ROOT, name), encoding="utf-8") as file:
        return file.read()


def section(name, heading):
    """The text of a document from a heading to the next one of the same or a higher level."""
    text = read(name)
    found = re.search(r"^(#+) %s$" % re.escape(heading), text, re.M)
    if not found:
        raise AssertionError(f"{name} has no heading {heading!r}")
    rest = text[found.end():]
    end = re.search(r"^#{1,%d} " % len(found[1]), rest, re.M)
    return rest[:end.start()] if end else rest


def rows(name, heading):
    """The lines of all tables below a heading, as lists of cells, without head and rule."""
    table, is_body = [], False
    for line in section(name, heading).splitlines():
        if not line.startswith("|"):
            is_body = False
        elif re.fullmatch(r"[|:\- ]+", line):
            is_body = True
        elif is_body:
            table.append([cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return table


def code_blocks(text):
    """The indented and fenced lines of a document that are commands or code."""
    lines, is_fenced, was_blank = [], False, True
    for line in text.splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    ") and was_blank:
            lines.append(line.strip())
            continue
        was_blank = not line.strip()
    return lines


def describe_field(name, field):
    values = " or ".join(repr(choice).replace("'", '"') for choice in field.choices) or field.kind.__name__
    default = "" if field.default is REQUIRED else " = " + {True: "true", False: "false", None: "null"}.get(
        field.default if isinstance(field.default, (bool, type(None))) else "", repr(field.default).replace("'", '"'))
    return f"`{name}`: {values}{default}"


class MessageTable(unittest.TestCase):

    def test_every_message_type_has_its_line_and_no_other_has_one(self):
        expected = []
        for msg_type, kind in MESSAGES.items():
            fields = "; ".join(describe_field(*item) for item in (kind.fields or {}).items())
            expected.append([f"`{msg_type}`", ", ".join(kind.channels), f"`{kind.reply}`" if kind.reply else "",
                             fields or ("none" if kind.fields == {} else "")])
        self.assertEqual(rows("docs/protocol.md", "All messages"), expected)

    def test_every_request_is_answered_by_the_thread_that_the_document_names(self):
        def thread(msg_type):
            if msg_type in kernel.Kernel.AT_ONCE or msg_type in ("input_reply", "twoproc_status_request"):
                return "twoproc-io"
            return "twoproc-helper" if msg_type in kernel.Kernel.BY_HELPER else "main"
        expected = {f"`{msg_type}`": thread(msg_type) for msg_type, kind in MESSAGES.items() if kind.fields is not None}
        self.assertEqual({row[0]: row[1] for row in rows("docs/protocol.md", "Who answers")}, expected)


class Rooms(unittest.TestCase):

    def test_every_file_has_its_line_with_what_it_imports(self):
        expected = {}
        for room in test_imports.rooms():
            expected[f"`{room}.py`"] = (sorted(test_imports.ours(room) - {"__init__"}),
                                        sorted(test_imports.others(room)))
        found = {row[0]: (sorted(row[2].replace(",", " ").split()), sorted(row[3].replace(",", " ").split()))
                 for row in rows("docs/design.md", "The rooms")}
        self.assertEqual(sorted(found), sorted(expected))
        for file in expected:
            with self.subTest(file=file):
                self.assertEqual(found[file], expected[file], "imports of ours, imports of others")

    def test_the_reading_order_of_the_readme_names_every_room(self):
        named = re.findall(r"twoproc/(\w+)\.py\)", section("README.md", "Reading order"))
        self.assertEqual(sorted(named), sorted(set(test_imports.rooms()) - {"__init__"}))

    def test_the_number_of_lines_is_that_of_the_tree(self):
        lines = sum(read(os.path.relpath(path, support.ROOT)).count("\n")
                    for path in glob.glob(os.path.join(PACKAGE, "*.py")))
        said = int(re.search(r"\*\*([\d,]+) lines\*\*", read("README.md"))[1].replace(",", ""))
        # Said in hundreds, rounded up or down: exact to the line it would be wrong with every commit.
        self.assertLessEqual(abs(said - lines), 100, f"README says {said}, wc -l twoproc/*.py says {lines}")

    def test_the_threads_in_the_documents_are_those_in_the_code(self):
        pattern = r"\btwoproc-(?:io|heartbeat|helper|log|end|client|launcher|start|connect)\b"
        named = {name for room in test_imports.rooms() for name in re.findall(
            r'(?:own_thread\(|name=)"(twoproc-[a-z]+)"', read(f"twoproc/{room}.py"))}
        first = [row[0] for row in rows("docs/design.md", "Threads")]
        table = set(re.findall(r"`(twoproc-[a-z]+)`", " ".join(first)))
        self.assertEqual(table, named)
        for name in DOCUMENTS:
            with self.subTest(document=name):
                self.assertLessEqual(set(re.findall(pattern, read(name))), named)


class Names(unittest.TestCase):

    def test_every_function_that_the_tour_names_exists(self):
        named = re.findall(r"`(\w+)\.py:([\w.]+)`", read("docs/tour.md"))
        self.assertGreater(len(named), 20)
        for room, name in sorted(set(named)):
            with self.subTest(name=f"{room}.py:{name}"):
                self.assertIn(name, definitions(room))

    def test_every_test_that_a_document_names_exists(self):
        for document in DOCUMENTS:
            for module, rest in re.findall(r"`(test_\w+)((?:\.\w+)*)`", read(document)):
                with self.subTest(document=document, test=module + rest):
                    self.assertTrue(os.path.exists(os.path.join(support.ROOT, "test", module + ".py")))
                    if rest:
                        self.assertIn(rest[1:], definitions_of(f"test/{module}.py"))

    def test_every_row_of_the_comparison_names_the_test_that_shows_it(self):
        table = rows("README.md", "Beside the others")
        self.assertGreater(len(table), 5)
        for row in table:
            with self.subTest(row=row[0]):
                self.assertRegex(row[-1], r"^`test_\w+\.\w+(\.\w+)?`")

    def test_every_exit_status_has_its_line(self):
        said = [row[0] for row in rows("docs/configuration.md", "Exit codes")]
        self.assertLessEqual({"2", "3", "4", "5", "70"}, set(said))
        listed = {row[0] for row in rows("README.md", "Exit statuses")}
        self.assertLessEqual(set(said), listed)
        self.assertIn(str(frontend.DIED), listed)
        self.assertIn("130", listed)


def definitions_of(path):
    """Dotted names of all functions, methods and classes of a file, and of the attributes of classes."""
    found = set()

    def walk(nodes, prefix):
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    walk(node.body, prefix + node.name + ".")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        found.add(prefix + target.id)
    walk(ast.parse(read(path)).body, "")
    return found


def definitions(room):
    return definitions_of(f"twoproc/{room}.py")


class TheSessionLog(unittest.TestCase):
    """docs/crashlog.md: each line that it shows is one that a kernel wrote."""

    DOCUMENT = "docs/crashlog.md"

    def setUp(self):
        text = section(self.DOCUMENT, "Records")
        blocks = re.findall(r"```json\n(.*?)```", text, re.S)
        self.whole = blocks[0].splitlines()
        self.lines = "".join(blocks).splitlines()
        self.members = {row[0]: set(re.findall(r"`(\w+)`", row[2].partition("of a `%%private` cell")[0]))
                        for row in rows(self.DOCUMENT, "Records")}
        self.private = {"seq", "of", "ec", "hdr", "hash", "length"}

    def read_log(self, content):
        """A session whose log has this content."""
        home = support.Home(self)
        with open(os.open(os.path.join(home.path, "S.log"), os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(content)
        return crashlog.LoggedSession(home.path, "S")

    def test_every_example_line_is_a_record_with_the_right_checksum(self):
        self.assertGreater(len(self.lines), 15)
        for line in self.lines:
            with self.subTest(line=line):
                self.assertIsNotNone(crashlog.parse(line.encode("ascii")))

    def test_every_kind_has_its_line_and_an_example_and_all_that_a_reader_relies_on(self):
        self.assertEqual(list(self.members), list(crashlog.KINDS))
        records = [crashlog.parse(line.encode("ascii")) for line in self.lines]
        self.assertEqual({record["k"] for record in records}, set(crashlog.KINDS))
        for kind, needed in crashlog.KINDS.items():
            with self.subTest(kind=kind):
                self.assertLessEqual(set(needed), self.members[kind])

    def check_members(self, records):
        for record in records:
            kind, found = record["k"], set(record) - {"n", "k", "t", "crc"}
            with self.subTest(record=record):
                self.assertLessEqual(found, self.private if "hash" in found else self.members[kind])
                if kind == "begin":
                    self.assertEqual(found, self.private if "hash" in found else self.members[kind])

    def test_the_examples_have_the_members_of_their_line(self):
        self.check_members(crashlog.parse(line.encode("ascii")) for line in self.lines)

    def test_what_is_written_has_the_members_of_its_line(self):
        home = support.Home(self)
        before = os.environ.get("TWOPROC_STATE")
        self.addCleanup(lambda: os.environ.pop("TWOPROC_STATE") if before is None else
                        os.environ.update(TWOPROC_STATE=before))
        os.environ["TWOPROC_STATE"] = os.path.join(home.path, "state")
        log = sessionlog.SessionLog("/a/kernel.json", crashlog.Limits(per_cell=1000, keep_closed=1))
        self.addCleanup(log.fault.close)
        log.open("9.0")
        header = b'{"msg_id":"a","session":"s","date":"2026-01-01T00:00:00Z","msg_type":"execute_request"}'
        log.begin(header, "a", "1", 1)
        log.asked(header, "name? ", False)
        for number, kind in enumerate(crashlog.OUTPUTS * 3, 1):
            log.published(kind, number, b'{"x":"%b"}' % (b"y" * 100), header, b'{"m":1}')
        log.published("stream", 30, b'{"name":"stdout","text":"of no cell"}', b"{}")
        log.end(header, True, 1.0, 31)
        log.begin_private(header, "a", "%%private", 2)
        log.note("fault", text="Traceback")
        log.close("restart", keep=True)
        records = self.session_of(log).records()
        self.assertEqual({record["k"] for record in records}, set(crashlog.KINDS) - {"exit", "recovered"})
        self.check_members(records)

    @staticmethod
    def session_of(log):
        return crashlog.LoggedSession(log.folder, log.id)

    def test_the_first_example_is_read_as_the_document_says(self):
        session = self.read_log("".join(line + "\n" for line in self.whole))
        self.assertEqual((session.damaged, session.lost), (0, 0))
        self.assertEqual([cell.code is None for cell in session.cells()], [False, False, True, False])
        self.assertEqual((session.killer.ec, session.killer.code), (4, "import ctypes\nctypes.string_at(0)"))
        self.assertEqual(session.records()[-1]["how"], "replay")

    def test_the_example_of_a_cut_is_explained(self):
        lines = [line for line in self.lines if '"k":"cut"' in line]
        cut = crashlog.parse(lines[0].encode("ascii"))
        of = '"of":"%s"' % cut["of"]
        session = self.read_log(self.whole[0] + "\n" + "".join(line + "\n" for line in self.lines if of in line))
        self.assertEqual(session.lost, 0)
        (cell,) = session.cells()
        self.assertEqual((cell.cut, len(cell.outputs), cell.is_ended), (cut["records"], 4, True))
        self.assertEqual((cut["first"], cut["last"]), (5, 9))

    def test_the_torn_file_is_read_as_the_document_says(self):
        """One damaged, one lost, a result without what was printed before, no end."""
        torn = re.search(r"```text\n(.*?)\n```", section(self.DOCUMENT, "What a reader makes of it"), re.S)[1]
        session = self.read_log("\n".join([*self.whole[:2], torn]))
        self.assertEqual((session.damaged, session.lost), (1, 1))
        (cell,) = session.cells()
        self.assertEqual([output["type"] for output in cell.outputs], ["execute_result"])
        self.assertFalse(cell.is_ended)
        self.assertEqual(session.killer.ec, 1)

    def test_every_guarantee_names_the_test_that_shows_it(self):
        table = rows(self.DOCUMENT, "What is kept through which fault") + [
            row for row in rows(self.DOCUMENT, "Alive or not") if len(row) == 3]
        self.assertGreater(len(table), 20)
        for row in table:
            with self.subTest(row=row[0]):
                self.assertRegex(row[-1], r"^`test_\w+\.\w+\.\w+`$")

    def test_every_verb_of_the_magic_has_its_line(self):
        verbs = re.findall(r"^%recover ?(\w*)", recovery.USAGE, re.M)
        said = re.findall(r"^\| `%recover ?(\w*)", section(self.DOCUMENT, "After a death"), re.M)
        self.assertEqual(said, [*verbs, "help"])


class LinksAndCommands(unittest.TestCase):

    def test_links_between_documents_resolve(self):
        for document in DOCUMENTS:
            text = read(document)
            for target in re.findall(r"\]\(([^)\s]+)\)", text):
                with self.subTest(document=document, target=target):
                    parts = urlsplit(target)
                    if parts.scheme:
                        continue
                    path = document
                    if parts.path:
                        path = os.path.normpath(os.path.join(os.path.dirname(document), parts.path))
                    self.assertTrue(os.path.exists(os.path.join(support.ROOT, path)), "no such file")
                    if parts.fragment:
                        self.assertIn(parts.fragment, anchors(read(path)))

    def test_every_document_is_reached_from_the_readme(self):
        reached, todo = set(), ["README.md"]
        while todo:
            document = todo.pop()
            if document in reached or not document.endswith(".md"):
                continue
            reached.add(document)
            for target in re.findall(r"\]\(([^)\s#]+)", read(document)):
                if not urlsplit(target).scheme:
                    todo.append(os.path.normpath(os.path.join(os.path.dirname(document), target)))
        self.assertEqual(sorted(reached), DOCUMENTS)

    def test_commands_have_the_options_that_the_programs_have(self):
        parsers = {"twoproc.kernel": kernel.parser(), "twoproc.frontend": frontend.make_parser(),
                   "twoproc.crashlog": crashlog.make_parser(), "twoproc.keys": keys.make_parser(),
                   "twoproc.relay": relay.make_parser()}
        seen = set()
        for document in DOCUMENTS:
            for line in code_blocks(read(document)):
                found = re.search(r"(?<!=)\bpython\S* -m (twoproc\.\w+)\s*([^|;&#]*)", line)
                if not found:
                    continue
                with self.subTest(document=document, command=line):
                    module, words = found[1], shlex.split(found[2].strip())
                    self.assertIn(module, parsers)
                    seen.add(module)
                    options = [word.partition("=")[0] for word in words if word.startswith("--")]
                    self.assertLessEqual(set(options), all_options(parsers[module]))    # not shortened
                    try:
                        parsers[module].parse_args(words)
                    except SystemExit as end:
                        self.assertEqual(end.code, 0, "not understood")
        self.assertEqual(seen, set(parsers))

    def test_help_shows_every_option_that_the_documents_name(self):
        for module in ("kernel", "frontend", "crashlog", "relay"):
            shown = subprocess.run([sys.executable, "-m", f"twoproc.{module}", "--help"], cwd=support.ROOT, text=True,
                                   capture_output=True, timeout=support.DEADLINE).stdout
            for option in set(re.findall(rf"twoproc\.{module}\b[^\n`]*?(--[a-z-]+)", "".join(map(read, DOCUMENTS)))):
                with self.subTest(module=module, option=option):
                    if option not in ("--help", "--version"):
                        self.assertIn(option, shown)

    def test_make_targets_exist(self):
        targets = set(re.findall(r"^(\w+):", read("Makefile"), re.M))
        for document in DOCUMENTS:
            for target in re.findall(r"(?:`|^ +|^)make ([a-z]+)\b", read(document), re.M):
                with self.subTest(document=document, target=target):
                    self.assertIn(target, targets)

    def test_no_document_names_a_place_on_the_machine_it_was_written_on(self):
        here = [support.ROOT, sys.prefix]
        for document in DOCUMENTS:
            with self.subTest(document=document):
                text = read(document)
                self.assertEqual([place for place in here if len(place) > 5 and place in text], [])
                self.assertEqual(re.findall(r"/(?:work|root|opt|mnt)/\S*", text), [])

    def test_the_api_that_the_readme_shows_is_there(self):
        blocks = re.findall(r"```python\n(.*?)```", read("README.md"), re.S)
        self.assertTrue(blocks)
        for block in blocks:
            process = support.Process(self, [sys.executable, "-c", block])
            with self.subTest(block=block):
                self.assertEqual(process.wait(), 0, process.log())

    def test_the_kernelspec_line_names_the_kernel_that_is_installed(self):
        self.assertEqual(launcher._own_spec().name, "twoproc")
        self.assertIn("jupyter console --kernel twoproc", read("README.md"))


def all_options(parser):
    """Of a program and its commands."""
    commands = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return set(parser._option_string_actions).union(*(all_options(one) for some in commands for one in some))


def anchors(text):
    """What GitHub makes of the headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, re.M)}


if __name__ == "__main__":
    unittest.main()
