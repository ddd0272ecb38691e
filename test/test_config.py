# Distributed under the terms of the BSD 3-Clause License.
"""Settings: precedence, refusals with their place, and the table held against the docs and the code."""
import argparse
import ast
import os
import re
import tempfile
import unittest
from unittest import mock

from twoproc import config
from twoproc.config import SETTINGS, ConfigError

from . import support

NOBODY = 65534


class Case(unittest.TestCase):
    """A world without configuration but that of the test."""

    def setUp(self):
        home = tempfile.TemporaryDirectory(prefix="tp-")
        self.addCleanup(home.cleanup)
        self.home = os.path.realpath(home.name)
        self.system = self.path("etc.ini")
        environ = {"HOME": self.home, "XDG_CONFIG_HOME": self.path("xdg")}
        for patch in (mock.patch.object(config, "SYSTEM_FILE", self.system),
                      mock.patch.dict(os.environ, environ, clear=True)):
            patch.start()
            self.addCleanup(patch.stop)
        self.user = self.path("xdg", "twoproc", "twoproc.ini")

    def path(self, *parts):
        return os.path.join(self.home, *parts)

    def put(self, path, text, mode=0o644):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w" if isinstance(text, str) else "wb") as file:
            file.write(text)
        os.chmod(path, mode)
        return path

    def load(self, *argv, named=None):
        parser = argparse.ArgumentParser()
        config.add_arguments(parser)
        return config.load(parser.parse_args(argv), named)

    def refused(self, *argv, says=()):
        with self.assertRaises(ConfigError) as caught:
            self.load(*argv)
        message = str(caught.exception)
        self.assertEqual(caught.exception.exit_code, 2)
        self.assertNotIn("\n", message)
        for part in (says,) if isinstance(says, str) else says:
            self.assertIn(part, message)
        return message


class WhereAValueComesFrom(Case):
    def test_each_place_wins_over_the_one_before(self):
        one, two = self.path("one.ini"), self.path("two.ini")

        def now():
            settings = self.load(*argv, named=named)
            return settings["limits.max_frames"], settings.origin("limits.max_frames")

        argv, named = [], {"--frames": ("limits.max_frames", None)}
        self.assertEqual(now(), (64, "built in"))
        self.put(self.system, "[limits]\nmax_frames = 1")
        self.assertEqual(now(), (1, f"{self.system}, line 2"))
        self.put(self.user, "\n\n[limits]\nmax_frames = 2")
        self.assertEqual(now(), (2, f"{self.user}, line 4"))
        os.environ["TWOPROC_CONFIG"] = self.put(one, "[limits]\nmax_frames = 3")
        self.assertEqual(now(), (3, f"{one}, line 2"))
        argv = ["--config", self.put(two, "[limits]\nmax_frames = 4")]
        self.assertEqual(now(), (4, f"{two}, line 2"))
        os.environ["TWOPROC_LIMITS_MAX_FRAMES"] = "5"
        self.assertEqual(now(), (5, "TWOPROC_LIMITS_MAX_FRAMES"))
        argv += ["--set", "limits.max_frames=6"]
        self.assertEqual(now(), (6, "--set limits.max_frames"))
        named = {"--frames": ("limits.max_frames", "7")}
        self.assertEqual(now(), (7, "--frames"))

    def test_without_any_file_the_table_holds(self):
        settings = config.load()
        self.assertEqual(list(settings), [setting.name for setting in SETTINGS])
        self.assertEqual({settings.origin(name) for name in settings}, {"built in"})
        self.assertIs(settings["kernel.publish_jupyter"], False)
        self.assertEqual(settings["kernel.transport"], "ipc")
        self.assertEqual(settings["kernel.completion_seconds"], 1.0)

    def test_the_current_directory_is_not_read(self):
        for name in ("twoproc.ini", ".twoproc.ini", "twoproc/twoproc.ini", "configparser.py", "xdg/twoproc.ini"):
            self.put(self.path("cwd", name), "[limits]\nmax_frames = 13\nraise SystemExit")
        before = os.getcwd()
        os.chdir(self.path("cwd"))
        self.addCleanup(os.chdir, before)
        for relative in ("", ".", "xdg"):
            os.environ["XDG_CONFIG_HOME"] = relative
            self.assertEqual(self.load()["limits.max_frames"], 64)
        os.environ["TWOPROC_CONFIG"] = "twoproc.ini"
        self.refused(says=("TWOPROC_CONFIG = twoproc.ini", "whole path"))

    def test_a_file_asked_for_must_exist(self):
        self.refused("--config", self.path("none.ini"), says=(self.path("none.ini"), "No such"))
        os.environ["TWOPROC_CONFIG"] = self.path("none.ini")
        self.refused(says="No such")

    def test_an_empty_variable_counts_as_not_set(self):
        os.environ.update(TWOPROC_KERNEL_TRANSPORT="", TWOPROC_CONFIG="")
        self.assertEqual(self.load().origin("kernel.transport"), "built in")

    def test_variables_that_are_no_settings_are_left_alone(self):
        names = "TWOPROC_RUNTIME TWOPROC_TEST_KERNEL TWOPROC_KERNELS_X TWOPROC_KERNEL TWOPROC_KERNEL_ TWOPROC_ TWOPROC"
        before = self.load()
        os.environ.update(dict.fromkeys(names.split(), "/x"))
        self.assertEqual(self.load(), before)

    def test_show_config_prints_each_value_as_a_file_takes_it_with_its_origin(self):
        settings = self.load("--set", "frontend.raw_escapes=on", "--set", "limits.max_frames=7")
        lines = settings.show().splitlines()
        self.assertEqual(len(lines), len(SETTINGS))
        for expected in (r"frontend\.raw_escapes = yes +\(--set frontend\.raw_escapes\)",
                         r"limits\.max_frames = 7 +\(--set limits.max_frames\)",
                         r"frontend\.confirm_exit = yes +\(built in\)"):
            self.assertEqual(len([line for line in lines if re.fullmatch(expected, line)]), 1, expected)
        again = self.load(*(f"--set={line.rpartition('  (')[0]}" for line in lines))
        self.assertEqual(again, settings)

    def test_nothing_in_a_value_is_replaced(self):
        self.put(self.user, "[frontend]\ncommand_prefix = %(transport)s=${x}%%~$HOME;#")
        self.assertEqual(self.load()["frontend.command_prefix"], "%(transport)s=${x}%%~$HOME;#")


class MistakesAreRefused(Case):
    def test_an_unknown_key_is_named_with_its_line_and_the_nearest(self):
        self.put(self.user, "[kernel]\n# a comment\ntransport = tcp\n\n[frontend]\n\nColours = dark\n")
        self.refused(says=f"{self.user}, line 7: there is no frontend.colours; the nearest is frontend.colors")

    def test_an_unknown_section_is_named_with_its_line_and_the_nearest(self):
        for text, line, name, near in (("[kernal]\nx = 1", 1, "kernal", "kernel"),
                                       ("\n[front]", 2, "front", "frontend"),
                                       ("[DEFAULT]\nx = 1", 1, "DEFAULT", "")):
            self.put(self.user, text)
            self.refused(says=f"{self.user}, line {line}: there is no [{name}]; the nearest is [{near}")

    def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(self):
        self.refused("--set", "kernel.colors=off", says="nearest is frontend.colors")

    def test_a_mistake_on_the_command_line_or_in_the_environment_is_named_too(self):
        self.refused("--set", "limits.max_frame=1", says=("--set limits.max_frame", "limits.max_frames"))
        for item in ("limits.max_frames", "max_frames", ""):
            self.refused("--set", item, says=("--set", "section.key=value"))
        self.refused("--set", "max_frames=3", says="nearest is limits.max_frames")
        os.environ["TWOPROC_LIMITS_MAX_FRAMEZ"] = "3"
        self.refused(says=("TWOPROC_LIMITS_MAX_FRAMEZ", "limits.max_framez", "limits.max_frames"))

    def test_a_value_that_does_not_fit_is_shown_with_what_is_expected(self):
        for name, value, expected in (
            ("kernel.transport", "udp", "ipc | tcp"), ("kernel.transport", "", "ipc | tcp"),
            ("kernel.publish_jupyter", "maybe", "yes | no"), ("kernel.publish_jupyter", "2", "yes | no"),
            ("limits.max_frames", "0", "1 or more"), ("limits.max_frames", "-3", "1 or more"),
            ("limits.max_frames", "1.5", "whole number"), ("limits.max_frames", "many", "whole number"),
            ("limits.max_frames", "9" * 30, "whole number"), ("limits.max_frames", "9" * 5000, "whole number"),
            ("kernel.completion_seconds", "nan", "seconds"), ("kernel.completion_seconds", "inf", "seconds"),
            ("kernel.completion_seconds", "-1", "seconds"), ("kernel.completion_seconds", "1,5", "seconds"),
            ("frontend.command_prefix", "", "without a space"), ("frontend.command_prefix", "a b", "without a space"),
        ):
            with self.subTest(name=name, value=value):
                self.put(self.user, f"[{name.split('.')[0]}]\n{name.split('.')[1]} = {value}\n")
                message = self.refused(says=(f"{self.user}, line 2", name, repr(value[:60]), expected))
                self.assertLess(len(message), 300)

    def test_words_are_taken_in_any_case_and_with_a_comment_behind(self):
        self.put(self.user, "[kernel]\nTransport = TCP ; why not\n[frontend]\n"
                 "confirm_exit = Off\ncommand_prefix = :#\n")
        settings = self.load()
        values = [settings[name] for name in ("kernel.transport", "frontend.confirm_exit", "frontend.command_prefix")]
        self.assertEqual(values, ["tcp", False, ":#"])

    def test_a_file_that_is_no_configuration_is_refused_with_its_line(self):
        for text, says in (("transport = tcp", "line 1"), ("[kernel]\ntransport", "line 2"), ("[kernel\n", "line 1"),
                           ("[kernel]\ntransport = ipc\n[limits]\n[kernel]\ntransport = tcp", "line 4"),
                           ("[kernel]\ntransport = ipc\n  x = y", "line 2"),
                           (b"[kernel]\n\xff", "not UTF-8"), (b"\0", "line 1")):
            with self.subTest(text=text):
                self.put(self.user, text)
                self.refused(says=(self.user, says))

    def test_a_byte_order_mark_and_other_line_ends_are_read(self):
        self.put(self.user, b"\xef\xbb\xbf[kernel]\r\ntransport = tcp\r\n")
        self.assertEqual(self.load()["kernel.transport"], "tcp")

    def test_a_file_that_others_can_write_is_refused_with_the_remedy(self):
        for mode in (0o664, 0o646, 0o666):
            for path in (self.user, self.system):
                self.put(path, "[kernel]\n", mode)
                self.refused(says=(path, f"{mode:04o}", "chmod go-w"))
                os.chmod(path, 0o644)

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "only root can give a file away")
    def test_a_file_of_another_user_is_refused(self):
        os.chown(self.put(self.user, "[kernel]\n"), NOBODY, NOBODY)
        self.refused(says=(self.user, f"uid {NOBODY}"))

    def test_a_fifo_or_a_folder_is_refused_without_waiting(self):
        os.makedirs(os.path.dirname(self.user))
        os.mkfifo(self.user)
        self.refused(says=self.user)
        os.unlink(self.user)
        os.mkdir(self.user)
        self.refused(says=self.user)


class TheTable(unittest.TestCase):
    def test_the_documentation_has_the_same_lines(self):
        with open(os.path.join(support.ROOT, "docs", "configuration.md"), encoding="utf-8") as file:
            text = file.read()
        documented = []
        for section, table in re.findall(r"^### \[(\w+)\]\n\n((?:\|.*\n)+)", text, re.M):
            for row in table.splitlines()[2:]:
                cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
                documented.append((section, *cells))
        self.assertEqual(documented, [tuple(setting) for setting in SETTINGS])

    def test_each_setting_is_read_somewhere(self):
        package = os.path.join(support.ROOT, "twoproc")
        read, asked = set(), set()
        for name in os.listdir(package):
            if name.endswith(".py") and name != "config.py":
                with open(os.path.join(package, name), encoding="utf-8") as file:
                    nodes = list(ast.walk(ast.parse(file.read())))
                read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
                asked |= {node.slice.value for node in nodes if isinstance(node, ast.Subscript)
                          and isinstance(node.slice, ast.Constant) and "settings" in ast.unparse(node.value)}
        known = {setting.name for setting in SETTINGS}
        self.assertEqual(sorted(known - read), [], "nobody reads these")
        self.assertEqual(sorted(asked - known), [], "these are read and are not in the table")

    def test_names_are_unique_and_can_be_told_from_other_variables(self):
        self.assertEqual(len({setting.name for setting in SETTINGS}), len(SETTINGS))
        for setting in SETTINGS:
            self.assertRegex(setting.name, r"^[a-z]+\.[a-z_]+$")


if __name__ == "__main__":
    unittest.main()
