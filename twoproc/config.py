# Distributed under the terms of the BSD 3-Clause License.
"""What can be set: one table, and the places a value may come from.

Later places win: the table's default, /etc/twoproc.ini, the user's twoproc.ini, the file named by
--config or TWOPROC_CONFIG, TWOPROC_<SECTION>_<KEY> in the environment, --set section.key=value and the
options with a name of their own. Never the current directory: what lies there may be anybody's.

A name that is not in the table, or a value that does not fit, ends the program with one line and exit
code 2: a setting that is silently ignored is worse than none. Kernel and frontend call add_arguments()
and load() as they start, in their main threads; nobody changes a Settings object afterwards.
docs/configuration.md says the same to users, and a test compares its tables with SETTINGS.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """One line of the table. `default` is text, as it would stand in a file.

    kind: "yes | no" gives a bool, other words between bars a str that is one of them, "seconds" a float,
    "count" an int of 1 or more, "number" one of 0 or more, "word" a str that is neither empty nor has spaces,
    "text" any str, "path" the whole path of a file; %config% in it is the folder of the user's twoproc.ini.
    """

    section: str
    key: str
    kind: str
    default: str
    meaning: str

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"


SETTINGS = (
    Setting("kernel", "transport", "ipc | tcp", "ipc",
            "how clients reach a kernel that we start: sockets in a private folder, or ports of this machine"),
    Setting("kernel", "publish_jupyter", "yes | no", "no", "let `jupyter console --existing` find the kernel"),
    Setting("kernel", "orphan_timeout", "seconds", "86400",
            "how long a kernel that a frontend started stays without any client; 0 for ever"),
    Setting("kernel", "completion_seconds", "seconds", "1.0",
            "after this a completion or inspection asked for while a cell runs is answered empty"),
    Setting("network", "listen", "text", "",
            "an address for other machines, HOST or HOST:PORT, or empty; only with authorised keys"),
    Setting("network", "port_base", "count", "20555", "the first of the five ports: shell, iopub, stdin, control, hb"),
    Setting("network", "port_slots", "count", "10", "where a port is taken, so many times ten ports on are tried"),
    Setting("network", "handshake_seconds", "seconds", "5", "how long a connection may take to say who it is"),
    Setting("network", "max_connections", "count", "64", "clients from other machines at a time"),
    Setting("network", "ssh_python", "text", "python3", "the command that is Python on the far side of --ssh"),
    Setting("auth", "authorized_keys", "path", "%config%/authorized_keys", "whose keys a listening kernel lets in"),
    Setting("auth", "known_kernels", "path", "%config%/known_kernels", "the kernels this user trusts, and their keys"),
    Setting("auth", "host_key", "path", "%config%/host_key", "the key that our listening kernels show"),
    Setting("auth", "client_key", "path", "%config%/id_key", "the key that we show to kernels on other machines"),
    Setting("limits", "requests_per_second", "count", "200", "requests of one key; twice as many in a burst"),
    Setting("limits", "max_frame_mb", "count", "64", "the largest frame; a larger one costs its sender the connection"),
    Setting("limits", "max_frames", "count", "64", "the most frames in a message"),
    Setting("limits", "max_message_mb", "count", "128", "the largest message, its buffers included"),
    Setting("limits", "stream_chunk_kb", "count", "64", "the most text in one stream message"),
    Setting("limits", "iopub_queue", "count", "500", "messages that wait for one slow reader"),
    Setting("limits", "slow_reader_seconds", "seconds", "5",
            "how long output waits for a slow reader before that reader loses messages"),
    Setting("limits", "replay_memory", "count", "65536", "signatures remembered, so that no message is executed twice"),
    Setting("limits", "outbox_mb", "count", "16", "output that waits to be sent before a cell that prints has to wait"),
    Setting("recovery", "log", "yes | no", "yes", "keep a log of inputs and outputs while a kernel lives"),
    Setting("recovery", "fsync", "never | interval | always", "interval",
            "when the log must be on the disk itself: a second later at most, or before a cell runs"),
    Setting("recovery", "max_output_per_cell_kb", "count", "256",
            "output of one cell that the log keeps: its first and its last half"),
    Setting("recovery", "max_log_mb", "count", "64", "when the log is so long, outputs are no longer added to it"),
    Setting("recovery", "backlog_mb", "count", "64",
            "further output kept while the kernel lives, for readers that could not follow; twice this on disk"),
    Setting("recovery", "keep_crashed", "number", "20", "logs of kernels that died, kept at most"),
    Setting("recovery", "keep_days", "number", "30", "and for how many days"),
    Setting("recovery", "keep_closed", "number", "0", "logs of kernels that were closed properly, kept at most"),
    Setting("recovery", "notice", "yes | no", "yes",
            "a kernel restarted after a crash says so in the output of its first cell"),
    Setting("log", "access_log", "yes | no", "yes", "note who comes, goes and is refused, on a listening kernel"),
    Setting("log", "access_log_mb", "count", "5", "its size, before the file is renamed and begun anew"),
    Setting("frontend", "editing", "emacs | vi", "emacs", "the keys of the prompt"),
    Setting("frontend", "colors", "auto | dark | light | off", "auto",
            "colours for this background; `off` also with NO_COLOR in the environment"),
    Setting("frontend", "images", "auto | off", "auto", "show images where the terminal can; else their text and file"),
    Setting("frontend", "other_output", "all | inputs | off", "all", "what to show of a kernel's other frontends"),
    Setting("frontend", "catch_up", "number", "20", "how many earlier cells to show when joining a kernel"),
    Setting("frontend", "command_prefix", "word", ":", "what a command to the frontend itself begins with"),
    Setting("frontend", "confirm_exit", "yes | no", "yes", "ask before Ctrl-D ends a kernel"),
    Setting("frontend", "raw_escapes", "yes | no", "no",
            "pass all escape sequences in output to the terminal, not colours and links alone"),
    Setting("frontend", "history_lines", "count", "20000", "earlier inputs offered at the prompt"),
    Setting("frontend", "is_complete_seconds", "seconds", "0.3",
            "how long Enter waits for the kernel to say whether the input is complete"),
    Setting("frontend", "complete_seconds", "seconds", "0.3", "how long Tab waits for the kernel's completions"),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}
SECTIONS = list(dict.fromkeys(setting.section for setting in SETTINGS))

# Far above all use, and far below where a count of megabytes or milliseconds stops fitting into C.
MAXIMUM = 1_000_000_000

EXPECTED = {
    "seconds": "a number of seconds, 0 or more",
    "count": "a whole number, 1 or more",
    "number": "a whole number, 0 or more",
    "word": "some characters without a space",
    "path": "a whole path; %config% stands for the folder of your twoproc.ini",
}


class ConfigError(Exception):
    """Where, what, and what was expected, in one line. The program ends with exit_code."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class Settings(dict[str, Any]):
    """All settings by name, `settings["kernel.transport"]`, each with its origin."""

    def __init__(self) -> None:
        super().__init__()
        self._origins: dict[str, str] = {}

    def origin(self, name: str) -> str:
        return self._origins[name]

    def put(self, name: str, text: str, origin: str) -> None:
        if name not in BY_NAME:
            raise _unknown(name, list(BY_NAME), origin)
        self[name], self._origins[name] = _parse(BY_NAME[name], text, origin), origin

    def show(self) -> str:
        """What --show-config prints: every value, as it would stand in a file, and where it comes from."""
        words = {True: "yes", False: "no"}
        lines = [f"{name} = {words[value] if isinstance(value, bool) else value}" for name, value in self.items()]
        width = max(map(len, lines))
        return "\n".join(f"{line:<{width}}  ({self.origin(name)})" for line, name in zip(lines, self))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings")
    group.add_argument("--config", metavar="FILE", help="read this file too, after the usual ones")
    group.add_argument("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="set one value")
    group.add_argument("--show-config", action="store_true", help="print every setting and its origin, and exit")


def load(arguments: argparse.Namespace | None = None,
         named: Mapping[str, tuple[str, str | None]] | None = None) -> Settings:
    """Collect the settings; raises ConfigError.

    arguments: what a parser with add_arguments() made. named: options with a name of their own, as
    {"--transport": ("kernel.transport", value)}; the value None means not given.
    """
    settings = Settings()
    for setting in SETTINGS:
        settings.put(setting.name, setting.default, "built in")
    chosen = arguments.config if arguments else None
    if chosen is None:
        chosen = os.environ.get("TWOPROC_CONFIG")
        if chosen and not os.path.isabs(chosen):
            raise ConfigError(f"TWOPROC_CONFIG = {chosen}: give the whole path; the current directory is not searched")
    for path in (SYSTEM_FILE, user_file(), chosen):
        if path and (path == chosen or os.path.exists(path)):
            for name, text, origin in _read(os.path.abspath(path)):
                settings.put(name, text, origin)
    for variable, text in sorted(os.environ.items()):
        # TWOPROC_RUNTIME and others that are no settings have no section's name in front. An empty variable
        # counts as unset, as for most programs.
        match = re.fullmatch(f"TWOPROC_({'|'.join(SECTIONS).upper()})_(.+)", variable)
        if match and text:
            settings.put(f"{match[1]}.{match[2]}".lower(), text, variable)
    for item in arguments.set if arguments else ():
        name, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: expected section.key=value")
        settings.put(name.strip(), text, f"--set {name.strip()}")
    for option, (name, value) in (named or {}).items():
        if value is not None:
            settings.put(name, value, option)
    return settings


SYSTEM_FILE = None if sys.platform == "win32" else "/etc/twoproc.ini"


def user_file() -> str:
    """$XDG_CONFIG_HOME/twoproc/twoproc.ini, on Windows below %APPDATA%; it need not exist."""
    base = os.environ.get("APPDATA" if sys.platform == "win32" else "XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):  # the base directory specification: a relative one is to be ignored
        base = os.path.expanduser("~/.config")
    return os.path.join(base, "twoproc", "twoproc.ini")


def _read(path: str) -> Iterator[tuple[str, str, str]]:
    """(section.key, value, file and line) of one INI file."""
    import configparser     # 3 ms that a start without any file does not pay

    try:
        # Links are followed: many keep their dot files in a repository. What counts is the file at the end.
        # O_NONBLOCK, because a fifo must not hold us up.
        at_once = getattr(os, "O_NONBLOCK", 0)
        with open(path, encoding="utf-8-sig", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
            _refuse_unsafe(path, os.fstat(file.fileno()))
            lines = file.readlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; the configuration cannot be read") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    # configparser keeps no lines, but it reads one after the other and asks for each key how it is spelt.
    number, numbers = 0, []

    def counted() -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(lines, 1):
            section = line[1:].partition("]")[0]
            if line.startswith("[") and section not in SECTIONS:
                raise _unknown(f"[{section}]", [f"[{known}]" for known in SECTIONS], f"{path}, line {number}")
            yield line

    def spell(key: str) -> str:
        numbers.append(number)
        return key.lower()

    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), inline_comment_prefixes=(";",),
                                       default_section="", empty_lines_in_values=False)
    parser.optionxform = spell  # type: ignore[assignment, method-assign]
    try:
        parser.read_file(counted(), path)
    except configparser.Error as error:
        raise ConfigError(f"{path}, line {number}: {error}") from error
    at = iter(numbers)
    for section in parser.sections():
        for key, value in parser[section].items():
            yield f"{section}.{key}", value, f"{path}, line {next(at)}"


def _refuse_unsafe(path: str, found: os.stat_result) -> None:
    """Who can write our configuration can, in the end, run code as us. root can anyway."""
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: is not a regular file; not read")
    if sys.platform != "win32" and found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{path}: belongs to another user (uid {found.st_uid}); not read")
    if sys.platform != "win32" and found.st_mode & 0o022:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(f"{path}: others can write it (mode {mode:04o}); not read. Run: chmod go-w {path}")


def _unknown(name: str, known: list[str], origin: str) -> ConfigError:
    import difflib

    # The same key in another section, else what looks alike.
    near = [other for other in known if other.endswith("." + name.rpartition(".")[2])]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return ConfigError(f"{origin}: there is no {name}; the nearest is {near[0]}")


def _parse(setting: Setting, text: str, origin: str) -> Any:
    """The value that `text` stands for, of the setting's kind."""
    text, kind = text.strip(), setting.kind
    if kind == "yes | no":
        if text.lower() in ("yes", "true", "on", "1", "no", "false", "off", "0"):
            return text.lower() in ("yes", "true", "on", "1")
    elif " | " in kind:
        if text.lower() in kind.split(" | "):
            return text.lower()
    elif kind == "text":
        return text
    elif kind == "path":
        path = os.path.expanduser(text.replace("%config%", os.path.dirname(user_file())))
        if os.path.isabs(path):
            return path
    elif kind == "word":
        if text and not any(map(str.isspace, text)):
            return text
    else:
        try:
            number = float(text) if kind == "seconds" else int(text)
        except ValueError:
            number = math.nan
        if (1 if kind == "count" else 0) <= number <= MAXIMUM:  # false for nan
            return number
    raise ConfigError(f"{origin}: {setting.name} is {text[:60]!r}, expected {EXPECTED.get(kind, kind)}")
