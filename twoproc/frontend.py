# Distributed under the terms of the BSD 3-Clause License.
"""The command line: `python -m twoproc.frontend`, on a terminal, on a pipe, with a script.

main() reads the options, starts a kernel or finds one, and chooses once between two paths that share nothing:

    terminal.py   when both ends are a terminal that can move its cursor
    Plain, here   for all else: pipes, -c, scripts, files, Emacs, CI.  Standard library alone, no escapes but
                  what the user's own code prints; values as bare text, errors on stderr, an exit status

The kernel process is started first and everything else is imported while it boots.  On the plain path it
belongs to us and ends with us, however we end; on a terminal it outlives a lost connection, and how it is
left is said there.  No traceback of ours reaches a user: an error of ours is one line and an exit code.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import __version__, config, connection, launcher
from .start import Start, banner

if TYPE_CHECKING:
    from .client import Client, KernelDied
    from .session import Message

DIED = 70
NOT_ALLOWED = 5     # the key that we show is good for less
BROKEN_PIPE = 128 + 13
# A second Ctrl-C within this time ends us, whatever the kernel does.
INSISTING_SECONDS = 2.0


def main(argv: list[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:      # the shell has closed the descriptor
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    sys.stdout.reconfigure(errors="backslashreplace")       # lone surrogates; a locale that is not UTF-8
    sys.stdin.reconfigure(errors="replace")
    try:
        settings = config.load(arguments)
        if arguments.show_config:
            print(settings.show())
            return 0
        if arguments.connect is not None and (arguments.existing, arguments.ssh, arguments.kernel) != (None,) * 3:
            raise config.ConfigError("--connect with --existing, --ssh or --kernel: each says which kernel; give one")
        if arguments.ssh is not None and arguments.kernel is not None:
            raise config.ConfigError("--ssh with --kernel: a kernel that is started there is one of ours")
        if arguments.existing is not None and arguments.kernel is not None:
            raise config.ConfigError("--existing with --kernel: one joins a kernel, the other starts one; give one")
        if arguments.name is not None and (arguments.existing, arguments.connect) != (None, None):
            raise config.ConfigError("--name with --existing or --connect: it names a kernel that is started; give one")
        if arguments.list:
            from .discovery import look
            columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            for kernel in look():
                print(json.dumps(kernel.members()) if arguments.json else kernel.line()[:columns])
            return 0
        return run(arguments, settings)
    except BrokenPipeError:
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return 130
    except (config.ConfigError, connection.ConnectionFileError, launcher.LaunchError, OSError) as error:
        return fail(str(error), getattr(error, "exit_code", 1))
    except Exception as error:      # ours; the user's session must not end in a page of our source
        import tempfile
        import traceback
        with tempfile.NamedTemporaryFile("w", prefix="twoproc-error-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        return fail(f"internal error: {type(error).__name__}: {error}; the details are in {file.name}", 1)
    finally:
        _close_stdout()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.frontend", description="IPython's command line in two processes.",
        epilog="Without a script, -c or a pipe: a prompt. There, :help lists the commands to the frontend itself.")
    parser.add_argument("--version", action="version", version=f"twoproc {__version__}")
    parser.add_argument("-c", dest="code", metavar="CODE", nargs=argparse.REMAINDER,
                        help="run this code, with what follows it in sys.argv")
    parser.add_argument("-i", dest="interactive", action="store_true",
                        help="on a terminal: a prompt after the script or -c; on a pipe: run statement by statement, "
                             "and let input() read the lines after it")
    parser.add_argument("--existing", metavar="NAME|FILE", nargs="?", const="",
                        help="join a running kernel: the newest of yours, or this one")
    parser.add_argument("--connect", metavar="ADDRESS|NAME",
                        help="a kernel on another machine that listens: twoproc://HOST:PORT/KEY, afterwards its name")
    parser.add_argument("--ssh", metavar="[USER@]HOST[:PORT]",
                        help="a kernel of yours on that machine: the newest, one that is started there if none runs, "
                             "or with --existing this one")
    parser.add_argument("--list", action="store_true", help="list your running kernels; with --json as lines of JSON")
    parser.add_argument("--kernel", metavar="NAME", help="start this Jupyter kernel instead of our own")
    parser.add_argument("--name", help="what to call the kernel that is started")
    parser.add_argument("--keep", action="store_true", help="leave the kernel running at the end")
    parser.add_argument("--plain", "--simple", action="store_true",
                        help="no colours and no moving cursor, also on a terminal")
    parser.add_argument("--quiet", action="store_true", help="no banner")
    parser.add_argument("--json", action="store_true",
                        help="write every iopub message of the code that is run as one line of JSON")
    config.add_arguments(parser)
    parser.add_argument("script", nargs="?", help="a file to run")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def run(arguments: argparse.Namespace, settings: config.Settings) -> int:
    source = read_code(arguments)
    has_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    is_batch = (source is not None or not sys.stdin.isatty()) and not (arguments.interactive and has_terminal)
    is_plain = is_batch or arguments.plain or arguments.json or not has_terminal or (
        os.environ.get("TERM", "dumb") in ("dumb", "unknown", "emacs"))
    # IPYKERNEL_CELL_NAME: the script's own name in tracebacks.
    env = {"IPYKERNEL_CELL_NAME": source.path} if source is not None and source.path else None
    start = Start(arguments, settings, keep=arguments.keep or not is_plain, env=env)
    if is_plain:
        try:
            return Plain(start, arguments, settings).run(source, is_batch)
        finally:
            start.close()
    try:
        from .terminal import Terminal
    except ImportError as error:
        start.end()     # not started for a terminal that cannot be
        start.close()
        return fail(f"{error}; the terminal needs prompt_toolkit, which comes with IPython: use --plain", 1)

    def new_start(existing: str | None) -> Start:
        return Start(argparse.Namespace(**{**vars(arguments), "existing": existing, "name": None, "connect": None}),
                     settings, keep=True)
    terminal = Terminal(start, settings, new_start=new_start, keep=arguments.keep, is_quiet=arguments.quiet,
                        source=source)
    try:
        return terminal.run()
    finally:
        terminal.start.close()


def read_code(arguments: argparse.Namespace) -> Source | None:
    """What -c or the script holds; None if the user, or a pipe, is still to say it."""
    if arguments.code is not None:
        if not arguments.code:
            raise config.ConfigError("-c: expected some code after it")
        return Source(arguments.code[0], ["-c", *arguments.code[1:]])
    if arguments.script is None:
        return None
    try:
        with open(arguments.script, "rb") as file:
            code = decode(arguments.script, file.read())
    except OSError as error:
        raise config.ConfigError(f"cannot read {arguments.script}: {error.strerror or error}")
    return Source(code, [arguments.script, *arguments.args], os.path.abspath(arguments.script))


def decode(name: str, source: bytes) -> str:
    from importlib.util import decode_source    # knows a source file's own declaration of its encoding
    try:
        return decode_source(source)
    except (UnicodeDecodeError, SyntaxError) as error:
        raise config.ConfigError(f"cannot read {name}: {error}")


class Source:
    """Code that was given on the command line; path: of a script."""

    def __init__(self, code: str, argv: list[str], path: str | None = None):
        self.code, self.argv, self.path = code, argv, path

    def prelude(self) -> str:
        """Python that makes a kernel look to this code as the interpreter does to a script."""
        lines = ["import sys", f"sys.argv[:] = {self.argv!r}"]
        if self.path is not None:
            lines += [f"sys.path.insert(0, {os.path.dirname(self.path)!r})", f"__file__ = {self.path!r}"]
        return "\n".join([*lines, "del sys"])


def fail(text: str, exit_code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"twoproc: {text}", file=sys.stderr)
    return exit_code


def _close_stdout() -> None:
    """Let nobody find out once more, as the interpreter ends, that nobody reads."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -- without a terminal ----------------------------------------------------------------------------

class Plain:
    """Cells from a pipe, a script, -c or a plain prompt; results as text."""

    def __init__(self, start: Start, arguments: argparse.Namespace, settings: config.Settings):
        self.start, self.arguments, self.settings = start, arguments, settings
        self.client: Client = None      # type: ignore[assignment]
        self.is_python = True
        self.has_prompt = False
        self.shows_values = True
        self.next_input = ""
        self.count = 1
        self._is_leaving = False        # SystemExit was raised: what IPython says about that is not for us
        self._keeps = False             # exit(keep_kernel=True)
        self._is_told = False           # the error was published; its reply holds it once more
        self._is_mid_line = False
        from . import screen        # while the kernel boots
        self.screen = screen
        # A plain terminal: no escapes at all, but carriage returns and tabs.
        self._gate = (screen.NoFilter() if settings["frontend.raw_escapes"]
                      else screen.EscapeFilter(colors=False, moves=False))

    def run(self, source: Source | None, is_batch: bool) -> int:
        from .client import Client, KernelDied      # while the kernel boots
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            signal.signal(number, self._terminate)
        try:
            with Client(self.start.wait()) as self.client:
                self.start.attend(self.client, self._say)
                info = self.client.wait_ready().content
                self.is_python = (info.get("language_info") or {}).get("name", "python") == "python"
                return self._run(source, is_batch)
        except KernelDied as died:
            return fail(self._cause(died), DIED)
        except ConnectionError:
            raise       # NotReady and ConnectionLost say what happened, and nobody reads after a BrokenPipeError
        except OSError as error:
            return fail(f"cannot write the output: {error.strerror or error}", 1)
        finally:
            self._end_kernel()

    def _say(self, line: str) -> None:
        """A line about the connection, from any thread: not of the kernel's output."""
        with contextlib.suppress(OSError):
            print(f"twoproc: {line}", file=sys.stderr)

    def _terminate(self, number: int, frame: Any) -> None:
        """SIGTERM or SIGHUP is born in main, so that every `finally` on the way out is done."""
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    def _end_kernel(self) -> None:
        if self.start.process is None or self.arguments.keep or self._keeps:
            return
        # Whoever presses Ctrl-C now wants us to be quick, not to leave a kernel behind.
        with contextlib.suppress(launcher.LaunchError, OSError, connection.ConnectionFileError):
            while True:
                try:
                    return self.start.end()
                except KeyboardInterrupt:
                    self.start.process.kill()

    def _cause(self, died: KernelDied) -> str:
        """By the log, if there is one, that knows more than how the process ended; and its last words."""
        from . import death
        dead = death.obituary(self.start.connection_file, self.client)
        cause = dead.line() if dead is not None and (dead.death.cell or dead.death.line) else str(died)
        return "\n  ".join([cause, *(self.start.process.last_words() if self.start.process is not None else [])])

    def _run(self, source: Source | None, is_batch: bool) -> int:
        if source is not None:
            return self._run_source(source)
        if not is_batch or self.arguments.interactive:
            return self._run_lines(has_prompt=not is_batch)
        text = decode("standard input", sys.stdin.buffer.read())
        if self.is_python:
            from .cells import split_cells
            self._let_exit_end_the_code()
            cells = split_cells(text)
        else:
            cells = [text] if text.strip() else []
        # What follows the code on the pipe was read with it: input() finds the end.
        return self._run_all(cells, self._end_of_input)

    def _run_source(self, source: Source) -> int:
        if self.is_python:
            self.client.execute(source.prelude(), silent=True)
            self._let_exit_end_the_code()
        self.shows_values = source.path is None
        status = self._run_all([source.code], self._ask)
        if self.arguments.interactive and not self._is_leaving:
            self.shows_values = True
            return self._run_lines(has_prompt=sys.stdin.isatty())
        return status

    def _let_exit_end_the_code(self) -> None:
        """In a program exit(3) is a status; at a prompt IPython's asks what is to become of the kernel."""
        if self.start.process is not None and not self.arguments.interactive:
            self.client.execute("import sys; exit = quit = sys.exit; del sys", silent=True)

    def _run_all(self, cells: list[str], on_input: Callable[[str, bool], str]) -> int:
        for cell in cells:
            status = self.run_cell(cell, on_input)
            if status is not None:
                return status
        return 0

    # -- line by line

    def _run_lines(self, has_prompt: bool) -> int:
        """Prompts as IPython's, without moving the cursor; or none, for programs that talk to us."""
        self.has_prompt = has_prompt
        if has_prompt and not self.arguments.quiet:
            for line in banner(self.start):
                self._prompt(line + "\n")
        while True:
            try:
                text = self._read_cell()
            except KeyboardInterrupt:
                self._prompt("\nKeyboardInterrupt\n")
                continue
            except EOFError:
                self._prompt("\n")
                return 0
            if not text.strip():
                continue
            outcome = self.run_cell(text, self._ask)
            if self._is_leaving or outcome is not None and not has_prompt:
                return outcome or 0
            if has_prompt:
                self._fresh_line()

    def _read_cell(self) -> str:
        from .cells import check_complete
        if self.next_input:
            self._prompt(f"next input:\n{self.next_input}\n")
            self.next_input = ""
        head = f"In [{self.count}]: "
        lines = [self._read_line(head)]
        while self.is_python and check_complete("\n".join(lines))[0] == "incomplete":
            try:
                lines.append(self._read_line("...: ".rjust(len(head))))
            except EOFError:
                break       # what there is, is run; the kernel says what is missing
        return "\n".join(lines)

    def _read_line(self, prompt: str) -> str:
        self._prompt(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _prompt(self, text: str) -> None:
        if self.has_prompt:
            self._write(sys.stdout if sys.stdout.isatty() else sys.stderr, text)

    # -- one cell

    def run_cell(self, code: str, on_input: Callable[[str, bool], str]) -> int | None:
        """Run a cell to its end; the exit status if it is a reason to stop, else None."""
        pending = self.client.execute_nowait(
            # What is stored is also logged, and the log says again what was printed while the link was cut.
            code, store_history=self.shows_values or self.client.info.is_remote, allow_stdin=True)
        self._is_told = False
        interrupted_at = 0.0
        while True:
            try:
                reply = pending.wait(on_output=self.show, on_input=on_input)
                break
            except KeyboardInterrupt:
                now = time.monotonic()
                if now - interrupted_at < INSISTING_SECONDS:
                    raise
                interrupted_at = now
                self.client.interrupt_nowait()
        content = reply.content
        if type(content.get("execution_count")) is int:
            self.count = content["execution_count"] + 1
        for part in content.get("payload") or []:
            self._handle_payload(part)
        if content.get("status") == "ok":
            return 0 if self._is_leaving else None
        return self._status_of(content)

    def _status_of(self, content: dict) -> int | None:
        """The exit status that an interpreter would end with."""
        if content.get("ename") == "SystemExit":
            value = str(content.get("evalue", ""))
            if self.has_prompt:
                return None
            self._is_leaving = True
            if value in ("", "None"):
                return 0
            if value.lstrip("-").isdigit():
                return int(value) & 0xFF
            self._write(sys.stderr, value + "\n")
            return 1
        if not self._is_told and content.get("ename") == "NotAllowed":
            return fail(f"not allowed: {self.screen.without_escapes(str(content.get('evalue')))}", NOT_ALLOWED)
        if not self._is_told and content.get("status") == "error":
            self._write(sys.stderr, self._traceback(content))
        return 130 if content.get("ename") == "KeyboardInterrupt" else 1

    def _handle_payload(self, part: Any) -> None:
        source = part.get("source") if isinstance(part, dict) else None
        if source == "page":
            self._write(sys.stdout, self.screen.without_escapes(
                self.screen.text_of(part.get("data") or {"text/plain": str(part.get("text", ""))})).rstrip("\n") + "\n")
        elif source == "set_next_input":
            self.next_input = str(part.get("text", ""))
        elif source in ("edit", "edit_magic"):
            self._write(sys.stderr, f"edit {part.get('filename')} yourself: this is not a terminal\n")
        elif source == "ask_exit":
            self._is_leaving, self._keeps = True, bool(part.get("keepkernel"))

    def _ask(self, prompt: str, password: bool) -> str:
        """A line of our stdin for the cell's input(); the prompt goes where python's would."""
        if password and sys.stdin.isatty():
            import getpass
            return getpass.getpass(prompt, sys.stderr)
        if not self.has_prompt:
            self._write(sys.stdout, prompt)
        return self._read_line(prompt)

    def _end_of_input(self, prompt: str, password: bool) -> str:
        raise EOFError

    # -- output

    def show(self, message: Message) -> None:
        if self.arguments.json:
            self._write(sys.stdout, json.dumps({
                "header": message.header, "parent_header": message.parent_header, "metadata": message.metadata,
                "content": message.content,
                "buffers": [base64.b64encode(buffer).decode("ascii") for buffer in message.buffers]}) + "\n")
            return
        handle = getattr(self, "show_" + message.msg_type, None)
        if handle is not None:
            handle(message.content)

    def show_stream(self, content: dict) -> None:
        name, text = content.get("name"), str(content.get("text", ""))
        if not (self._is_leaving and name == "stderr"):
            self._write(sys.stderr if name == "stderr" else sys.stdout, text)

    def show_execute_result(self, content: dict) -> None:
        if self.shows_values:
            head = f"Out[{content.get('execution_count')}]: " if self.has_prompt and sys.stdout.isatty() else ""
            text = self._text_of(content)
            self._fresh_line()
            self._write(sys.stdout, head + ("\n" if head and "\n" in text else "") + text + "\n")

    def show_display_data(self, content: dict) -> None:
        self._write(sys.stdout, self._text_of(content) + "\n")

    show_update_display_data = show_display_data

    def show_error(self, content: dict) -> None:
        self._is_told = True
        if content.get("ename") == "SystemExit" and not self.has_prompt:
            self._is_leaving = True
            return
        self._write(sys.stderr, self._traceback(content))

    def _traceback(self, content: dict) -> str:
        return self.screen.without_escapes(self.screen.traceback_of(content)).rstrip("\n") + "\n"

    def _text_of(self, content: dict) -> str:
        data = content.get("data")
        return self.screen.text_of(data if isinstance(data, dict) else {}).rstrip("\n")

    def _fresh_line(self) -> None:
        if self._is_mid_line and sys.stdout.isatty():
            self._write(sys.stdout, "\n")

    def _write(self, stream: Any, text: str) -> None:
        """Everything that is shown goes through here, at once: whoever reads the other end is waiting."""
        if stream.isatty():
            text = self._gate.feed(text)
            if text:
                self._is_mid_line = not text.endswith("\n")
        stream.write(text)
        stream.flush()


if __name__ == "__main__":
    connection.leave_current_folder()
    sys.exit(main())
