# Distributed under the terms of the BSD 3-Clause License.
"""What can be set: one table, and the places a value may come from.

Later places win: the table's default, /etc/twoproc.ini, the user's twoproc.ini, the file named by
--config or TWOPROC_CONFIG, TWOPROC_<SECTION>_<KEY> in the environment, --set section.key=value and the
options with a name of their own. Never the current directory: what lies there may be anybody's.

A name that is not in the table, or a value that does not fit, ends the program with one line and exit
code 2: a setting that is silently ignored is worse than none. Kernel and frontend call add_arguments()
and load() as they start, in their main threads; a Settings object never changes afterwards.
docs/configuration.md says the same to users, and a test compares its tables with SETTINGS.
"""

from __future__ import annotations

import argparse
import math
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """One line of the table. `default` is text, as it would stand in a file.

    kind: "yes | no" gives a bool, other words between bars a str that is one of them, "seconds" a float,
    "count" an int of 1 or more, "word" a str that is neither empty nor has spaces.
    """

    section: str
    key: str
    kind: str
    default: str
    meaning: str

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"

    @property
    def variable(self) -> str:
        return f"TWOPROC_{self.section}_{self.key}".upper()


SETTINGS = (
    Setting("kernel", "transport", "ipc | tcp", "ipc",
            "how clients reach a kernel that we start: sockets in a private folder, or ports of this machine"),
    Setting("kernel", "publish_jupyter", "yes | no", "no",
            "copy the connection file to where `jupyter console --existing` looks"),
    Setting("kernel", "orphan_timeout", "seconds", "86400",
            "how long a kernel that a frontend started stays without any client; 0 for ever"),
    Setting("kernel", "completion_seconds", "seconds", "1.0",
            "after this a completion or inspection asked for while a cell runs is answered empty"),
    Setting("limits", "max_frame_mb", "count", "64",
            "the largest frame that is read; a larger one costs its sender the connection"),
    Setting("limits", "max_frames", "count", "64",
            "the most frames in a message"),
    Setting("limits", "max_message_mb", "count", "128",
            "the largest message, its buffers included"),
    Setting("limits", "stream_chunk_kb", "count", "64",
            "the most text in one stream message"),
    Setting("limits", "iopub_queue", "count", "500",
            "messages that wait for one slow reader"),
    Setting("limits", "slow_reader_seconds", "seconds", "5",
            "how long output waits for a slow reader before that reader loses messages"),
    Setting("limits", "replay_memory", "count", "65536",
            "signatures remembered, so that no message is executed twice"),
    Setting("limits", "outbox_mb", "count", "16",
            "output that waits to be sent before a cell that prints has to wait"),
    Setting("frontend", "editing", "emacs | vi", "emacs",
            "the keys of the prompt"),
    Setting("frontend", "colors", "auto | dark | light | off", "auto",
            "colours for this background; `off` also with NO_COLOR in the environment"),
    Setting("frontend", "images", "auto | off", "auto",
            "show images where the terminal can; else their text and file"),
    Setting("frontend", "other_output", "all | inputs | off", "all",
            "what to show of other frontends of the same kernel"),
    Setting("frontend", "command_prefix", "word", ":",
            "what a command to the frontend itself begins with"),
    Setting("frontend", "confirm_exit", "yes | no", "yes",
            "ask before Ctrl-D ends a kernel"),
    Setting("frontend", "raw_escapes", "yes | no", "no",
            "pass all escape sequences in output to the terminal, not colours and links alone"),
    Setting("frontend", "history_lines", "count", "20000",
            "earlier inputs offered at the prompt"),
    Setting("frontend", "is_complete_seconds", "seconds", "0.3",
            "how long Enter waits for the kernel to say whether the input is complete"),
    Setting("frontend", "complete_seconds", "seconds", "0.3",
            "how long Tab waits for the kernel's completions"),
)  # fmt: skip

# Far above all use, and far below where a count of megabytes or milliseconds stops fitting into C.
MAXIMUM = 1_000_000_000

EXPECTED = {
    "seconds": "a number of seconds, 0 or more",
    "count": "a whole number, 1 or more",
    "word": "some characters without a space",
}


class ConfigError(Exception):
    """Where, what, and what was expected, in one line. The program ends with exit_code."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class Settings(Mapping):
    """All settings by name, `settings["kernel.transport"]`, each with its origin."""

    def __init__(self, values: dict[str, Any], origins: dict[str, str]) -> None:
        self._values, self._origins = values, origins

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def origin(self, name: str) -> str:
        return self._origins[name]

    def show(self) -> str:
        """What --show-config prints: every value, as it would stand in a file, and where it comes from."""
        lines = [f"{name} = {_written(value)}" for name, value in self.items()]
        width = max(map(len, lines))
        return "\n".join(f"{line:<{width}}  ({self.origin(name)})" for line, name in zip(lines, self))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings")
    group.add_argument("--config", metavar="FILE", help="read this file too, after the usual ones")
    group.add_argument("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="set one value")
    group.add_argument("--show-config", action="store_true", help="print every setting and its origin, and exit")


def load(
    arguments: argparse.Namespace | None = None,
    named: Mapping[str, tuple[str, str | None]] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Collect the settings; raises ConfigError.

    arguments: what a parser with add_arguments() made. named: options with a name of their own, as
    {"--transport": ("kernel.transport", value)}; the value None means not given.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def put(name: str, text: str, where: str, folder: str = "") -> None:
        setting = _setting(name, where)
        text = text.replace("%config%", folder or os.path.dirname(user_file(environ)))
        values[name], origins[name] = _parse(setting, text, where), where

    for setting in SETTINGS:
        put(setting.name, setting.default, "built in")
    chosen = arguments.config if arguments else None
    if chosen is None and environ.get("TWOPROC_CONFIG"):
        chosen = environ["TWOPROC_CONFIG"]
        if not os.path.isabs(chosen):
            raise ConfigError(f"TWOPROC_CONFIG = {chosen}: give the whole path; the current directory is not searched")
    for path, is_required in ((SYSTEM_FILE, False), (user_file(environ), False), (chosen, True)):
        if path:
            path = os.path.abspath(path)
            for name, text, line in _read(path, is_required):
                put(name, text, f"{path}, line {line}", os.path.dirname(path))
    sections = {setting.section for setting in SETTINGS}
    variables = {setting.variable: setting.name for setting in SETTINGS}
    for variable, text in sorted(environ.items()):
        section, _, key = variable.removeprefix("TWOPROC_").partition("_")
        # An empty variable counts as unset, as for most programs. TWOPROC_RUNTIME and others that are no
        # settings have no section's name in front.
        if variable.startswith("TWOPROC_") and section.lower() in sections and key and text:
            put(variables.get(variable) or f"{section}.{key}".lower(), text, variable)
    for item in arguments.set if arguments else ():
        name, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: expected section.key=value")
        put(name.strip(), text.strip(), f"--set {name.strip()}")
    for option, (name, value) in (named or {}).items():
        if value is not None:
            put(name, value, option)
    return Settings(values, origins)


SYSTEM_FILE = None if sys.platform == "win32" else "/etc/twoproc.ini"


def user_file(environ: Mapping[str, str]) -> str:
    """$XDG_CONFIG_HOME/twoproc/twoproc.ini, on Windows below %APPDATA%; it need not exist."""
    base = environ.get("APPDATA" if sys.platform == "win32" else "XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):  # the base directory specification: a relative one is to be ignored
        base = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".config")
    return os.path.join(base, "twoproc", "twoproc.ini")


def _read(path: str, is_required: bool) -> Iterator[tuple[str, str, int]]:
    """(section.key, value, line) of one INI file."""
    try:
        # Links are followed: many keep their dot files in a repository. What counts is the file at the end.
        # O_NONBLOCK, because a fifo must not hold us up.
        at_once = getattr(os, "O_NONBLOCK", 0)
        with open(path, encoding="utf-8-sig", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
            _refuse_unsafe(path, os.fstat(file.fileno()))
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        if is_required:
            raise ConfigError(f"{path}: no such configuration file") from None
        return
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; the configuration cannot be read") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    import configparser  # here, because a kernel that starts without any file need not wait for it

    # The default section's name cannot occur, so that [DEFAULT] is a section like others: unknown.
    parser = configparser.RawConfigParser(delimiters=("=",), inline_comment_prefixes=(";",), default_section="\n")
    try:
        parser.read_string(text, path)
    except configparser.ParsingError as error:  # also a line before the first [section]
        line = getattr(error, "lineno", None) or error.errors[0][0]
        raise ConfigError(f"{path}, line {line}: expected [section] or key = value") from error
    except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
        twice = getattr(error, "option", None) or f"[{error.section}]"
        raise ConfigError(f"{path}, line {error.lineno}: {twice} stands there for the second time") from error
    for section in parser.sections():
        if section not in {setting.section for setting in SETTINGS}:
            near = _nearest(section, [setting.section for setting in SETTINGS])
            raise ConfigError(
                f"{path}, line {_line_of(text, section)}: no section [{section}] is known; the nearest is [{near}]"
            )
        for key, value in parser.items(section):
            yield f"{section}.{key}", value, _line_of(text, section, key)


def _refuse_unsafe(path: str, found: os.stat_result) -> None:
    """Who can write our configuration can, in the end, run code as us. root can anyway."""
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: is not a regular file; the configuration cannot be read")
    if sys.platform == "win32":
        return
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{path}: belongs to another user (uid {found.st_uid}); not read")
    if found.st_mode & 0o022:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(f"{path}: others can write it (mode {mode:04o}); not read. Run: chmod go-w {path}")


def _line_of(text: str, section: str, key: str | None = None) -> int:
    """configparser does not tell the lines of what it found, so look again."""
    current = None
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line.startswith("[") and "]" in line:
            current = line[1 : line.rindex("]")]
            if key is None and current == section:
                return number
        elif current == section and key and line.partition("=")[0].strip().lower() == key:
            return number
    return 1


def _setting(name: str, where: str) -> Setting:
    for setting in SETTINGS:
        if setting.name == name:
            return setting
    section, _, key = name.partition(".")
    # The same key in another section, else what looks alike in this one, else anywhere.
    elsewhere = [setting.name for setting in SETTINGS if setting.key == key]
    here = [setting.name for setting in SETTINGS if setting.section == section]
    near = elsewhere[0] if elsewhere else _nearest(name, here or [setting.name for setting in SETTINGS])
    raise ConfigError(f"{where}: no setting {name} is known; the nearest is {near}")


def _nearest(word: str, known: list[str]) -> str:
    import difflib

    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]


def _parse(setting: Setting, text: str, where: str) -> Any:
    """The value that `text` stands for, of the setting's kind."""
    text = text.strip()
    kind = setting.kind
    if " | " in kind:
        words = kind.split(" | ")
        word = text.lower()
        if kind == "yes | no":
            word = {"true": "yes", "on": "yes", "1": "yes", "false": "no", "off": "no", "0": "no"}.get(word, word)
        if word in words:
            return word == "yes" if kind == "yes | no" else word
    elif kind == "word":
        if text and not any(map(str.isspace, text)):
            return text
    else:
        try:
            number = int(text) if kind == "count" else float(text)
        except ValueError:
            number = math.nan
        if (1 if kind == "count" else 0) <= number <= MAXIMUM:  # false for nan
            return number
    raise ConfigError(f"{where}: {setting.name} is {text[:60]!r}, expected {EXPECTED.get(kind, kind)}")


def _written(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
