# Distributed under the terms of the BSD 3-Clause License.
"""IPython around a cell: one Interpreter around one InteractiveShell.

kernel.py makes an Interpreter in the main thread, hands it two functions, `publish` (any thread) and `ask`
(main thread), and calls one method per request; it gets reply contents back.  No socket is known here, so
the tests hand in functions that append to a list.

Reading order:
1. Interpreter: one method per request.  execute and the comm handlers belong to the main thread; complete,
   inspect, history and is_complete may be called by a helper thread while a cell runs.  Its second half is
   about awaiting: the one asyncio loop of the main thread, run only while a cell awaits or the kernel is idle.
2. Parents, as libraries know them.
3. ZMQInteractiveShell and what hangs on it: IPython with its output going to `publish`, its input coming
   from `ask`.  Libraries look for that class name and for "IPKernelApp" in its config.
4. Configuration, and IPython's own start.

User code runs with as little of ours around it as we could manage: sys.displayhook, sys.excepthook,
builtins.input and sys.breakpointhook are set once, before the first cell, so that a user's replacement stays.
"""
from __future__ import annotations

import builtins
import contextlib
import contextvars
import getpass
import io
import json
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

from IPython.core import page
from IPython.core.application import ENV_CONFIG_DIRS, SYSTEM_CONFIG_DIRS, ProfileDir
from IPython.core.autocall import ZMQExitAutocall
from IPython.core.compilerop import CachingCompiler
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.error import StdinNotImplementedError, UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.shellapp import InteractiveShellApp
from IPython.paths import get_ipython_dir
from traitlets import Any as AnyTrait, Instance, Type, Unicode, default
from traitlets.config import Application, Config

from .comms import CommManager
from .completion import complete_live_object
from .crashlog import is_private
from .history import History
from .session import Message

__all__ = ["Interpreter", "StdinNotImplementedError", "ZMQInteractiveShell"]

# How long tasks that a cancelled cell left may take to end; then they are left alone.
CANCEL_SECONDS = 1.0


# -- 1. One method per request ---------------------------------------------------------------------

class Interpreter:
    """IPython as the kernel sees it.  Made once per process: InteractiveShell is a singleton.

    publish(msg_type, content, metadata=None, buffers=(), parent=None): called from any thread.
    ask(prompt, password) -> str: called by input() and getpass() in the main thread; raises EOFError,
    KeyboardInterrupt, or StdinNotImplementedError when the client allowed no input.
    profile_dir: a folder as given to --profile-dir, made if missing; None: IPython's default profile.

    sys.stdout, sys.stderr and sys.stdin must be the kernel's own before: input() asks the frontend only as
    long as sys.stdin is the object found here.
    """

    def __init__(self, publish: Callable, ask: Callable[[str, bool], str], profile_dir: str | None = None):
        self.publish, self.ask = publish, ask
        self.stdin = sys.stdin
        self.connection_file = ""                     # kernel.py sets it, %connect_info shows it
        self.recover: Callable[[str], None] = print   # kernel.py's: the magic %recover
        self.inputhook: Callable | None = None        # %gui sets it: runs a toolkit's event loop until input is ready
        self.parent: contextvars.ContextVar = contextvars.ContextVar("twoproc parent")
        self._latest_parent: Message | None = None    # written by main only; threads without one of their own read it
        self._loop: Any = None
        self.on_await: Callable[[], Any] = lambda: None         # kernel.py's: called when a cell begins to await
        self._awaiting: Any = None                    # the loop while a cell awaits on it; written by main only
        self.interruption: BaseException | None = None          # what a cell that awaits is being cancelled for
        self.completing = threading.local()           # .now: IPython gives what fails there to sys.excepthook
        self.comm_manager = CommManager(publish)
        os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        self.is_ending = False                        # set by kernel.py before it interrupts the last cell
        # Whatever goes wrong until the first cell is told with it: before no frontend may be listening.
        self.is_starting, complaints = True, io.StringIO()
        with contextlib.redirect_stderr(complaints):
            app = IPKernelApp(profile_dir=find_profile(profile_dir))
            self.shell = app.make_shell(self)
            self._install()
            app.run_files()
        self.is_starting, self._startup_report = False, complaints.getvalue()

    def _install(self) -> None:
        """What user code reaches through builtins and sys, set once so that a user's replacement stays."""
        plain_input, plain_getpass = builtins.input, getpass.getpass
        # the names and signatures are those of the functions replaced: inspect.signature must agree

        def input(prompt="", /):
            """Read a line from the frontend that sent the running cell."""
            return self.ask(str(prompt), False) if sys.stdin is self.stdin else plain_input(prompt)

        def ask_password(prompt="Password: ", stream=None, **options):
            """Read a line from the frontend that sent the running cell, without showing what is typed."""
            return self.ask(str(prompt), True) if sys.stdin is self.stdin else plain_getpass(prompt, stream, **options)

        builtins.input, getpass.getpass = input, ask_password
        sys.displayhook = self.shell.displayhook
        sys.excepthook = self.shell.excepthook
        sys.breakpointhook = self._breakpoint

    def _breakpoint(self, *args, **keys):
        """breakpoint() in a cell: IPython's debugger, unless PYTHONBREAKPOINT names another."""
        if os.environ.get("PYTHONBREAKPOINT"):
            return sys.__breakpointhook__(*args, **keys)
        self.shell.debugger_cls().set_trace(sys._getframe().f_back)

    @property
    def execution_count(self) -> int:
        return self.shell.execution_count

    # -- whose output is it

    def set_parent(self, message: Message | None) -> None:
        """From now on output belongs to this request: in main, and in threads that have no parent of their own."""
        self.parent.set(message)
        self._latest_parent = message

    def current_parent(self) -> Message | None:
        """The request that output of the calling thread or task belongs to.

        A task keeps the parent of the cell that made it; a thread follows the latest cell unless pinned.
        """
        return self.parent.get(None) or self._latest_parent

    # -- execute

    def execute(self, code: str, silent: bool, store_history: bool, user_expressions: dict | None,
                cell_id: str | None = None, run: Callable = lambda function: function()) -> dict:
        """Run a cell; the whole content of execute_reply.

        run(function) calls its argument; it is the caller's frame around user code, where interrupts are let in.
        """
        shell = self.shell
        if self._startup_report and not silent:
            report, self._startup_report = self._startup_report, ""
            self.publish("stream", {"name": "stderr", "text": report})
        self._offer_loop(code)
        reply: dict = {"status": "ok", "user_expressions": {}}
        count = shell.execution_count
        try:
            result = run(lambda: shell.run_request(code, store_history=store_history, silent=silent, cell_id=cell_id))
            error = result.error_before_exec or result.error_in_exec
            if error is not None or shell.is_display_broken or shell.is_interrupted:
                reply.update(shell.last_error or describe(error), status="error")
            elif user_expressions:
                reply["user_expressions"] = run(lambda: shell.user_expressions(user_expressions))
        except BaseException as error:
            # User code, or an interrupt between its frame and ours: told like any error of a cell.
            shell._showtraceback(type(error), error, describe(error)["traceback"])
            reply.update(describe(error), status="error")
        if store_history and reply["status"] == "error" and shell.execution_count == count:
            shell.execution_count += 1      # interrupted before IPython counted it; its number was published
        reply["execution_count"] = shell.execution_count - 1
        reply["payload"] = shell.payload_manager.read_payload()
        if reply["payload"]:
            shell.payload_manager.clear_payload()
        return reply

    def run_within(self, code: str) -> bool:
        """Run this within the running cell, as %rerun does; whether it ended without an error."""
        return bool(self.shell.run_cell(code, store_history=False).success)

    # -- asked while a cell may be running, from a helper thread

    def complete(self, code: str, cursor_pos: int) -> dict:
        """The content of complete_reply."""
        from IPython.core.completer import provisionalcompleter, rectify_completions
        completions: list = []
        # The user's objects answer here (__dir__, __getattr__): whatever they raise is no completion.
        self.completing.now = True
        try:
            with contextlib.suppress(Exception), provisionalcompleter():
                completions = list(rectify_completions(code, self.shell.Completer.completions(code, cursor_pos)))
        finally:
            self.completing.now = False
        start, end = (completions[0].start, completions[0].end) if completions else (cursor_pos, cursor_pos)
        return {"status": "ok", "matches": [found.text for found in completions],
                "cursor_start": start, "cursor_end": end, "metadata": {"_jupyter_types_experimental": [
                    {"start": found.start, "end": found.end, "text": found.text, "type": found.type,
                     "signature": found.signature} for found in completions]}}

    def inspect(self, code: str, cursor_pos: int, detail_level: int = 0) -> dict:
        """The content of inspect_reply."""
        from IPython.utils.tokenutil import token_at_cursor
        try:
            data = self.shell.object_inspect_mime(token_at_cursor(code, cursor_pos), detail_level=detail_level)
        except Exception:                           # KeyError: not found; others come from the user's objects
            return {"status": "ok", "found": False, "data": {}, "metadata": {}}
        if not self.shell.enable_html_pager:
            data.pop("text/html", None)
        return {"status": "ok", "found": True, "data": data, "metadata": {}}

    def is_complete(self, code: str) -> dict:
        """The content of is_complete_reply."""
        try:
            status, indent = self.shell.check_complete(code)
        except Exception:                           # an input transformation of the user's
            return {"status": "unknown"}
        return {"status": status, "indent": indent} if status == "incomplete" else {"status": status}

    def history(self, content: dict) -> dict:
        """The content of history_reply; content: that of the request, as checked by session.check_request."""
        return {"status": "ok", "history": self.shell.history_manager.answer(content)}

    def has_unwritten_history(self) -> bool:
        return self.shell.history_manager.has_unwritten()

    def write_history(self) -> None:
        """Write the inputs of finished cells to history.sqlite; called when the kernel has been idle for a while."""
        self.shell.history_manager.writeout_cache()

    # -- comms

    def comm_info(self, target_name: str | None) -> dict:
        """The content of comm_info_reply."""
        return {"status": "ok", "comms": {comm_id: {"target_name": comm.target_name}
                                          for comm_id, comm in list(self.comm_manager.comms.items())
                                          if target_name in (None, comm.target_name)}}

    def handle_comm(self, message: Message) -> None:
        """comm_open, comm_msg or comm_close; what it publishes belongs to it, in this thread only."""
        token = self.parent.set(message)
        try:
            getattr(self.comm_manager, message.msg_type)(None, message.identities, as_dict(message))
        except (Exception, SystemExit):             # user code behind a widget: shown like a cell's error
            self.shell.showtraceback()
        finally:
            self.parent.reset(token)

    comm_open = comm_msg = comm_close = handle_comm

    # -- awaiting

    @property
    def loop(self):
        """The asyncio loop of the main thread, made when first needed."""
        if self._loop is None or self._loop.is_closed():
            import asyncio
            from IPython.core import async_helpers
            # What asyncio.get_event_loop() made for user code is as good as one of ours.
            self._loop = current_loop() or asyncio.new_event_loop()
            async_helpers._asyncio_event_loop = self._loop      # %%script and others ask IPython for it
        return self._loop

    def has_pending_tasks(self) -> bool:
        """Whether running `loop` while the kernel is idle may move something on."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return False
        # Timers and servers are no tasks; where a loop has other insides than asyncio's own, tasks must do.
        handles = [*getattr(loop, "_ready", ()), *getattr(loop, "_scheduled", ())]
        selector = getattr(loop, "_selector", None)
        return bool(not all(handle.cancelled() for handle in handles)
                    or selector is not None and len(selector.get_map()) > 1         # 1: the loop's own wake-up
                    or sys.modules["asyncio"].all_tasks(loop))

    def wait_for(self, mailbox: Any) -> None:
        """Let tasks and windows of the user go on until there is something in the mailbox, or a little longer.

        mailbox: len() and fileno(), as channels.Mailbox.  To be called while inputhook or has_pending_tasks() ask
        for it.  With a hook, tasks go on only where the toolkit lets us in between (it polls, or has no window).
        """
        hook = self.inputhook
        if hook is None:
            self._run_loop(mailbox, 1.0 if self.has_unwritten_history() else None)
            if not mailbox:
                self.write_history()
            return
        try:
            hook(HookContext(mailbox, self.has_pending_tasks))
        except Exception:                            # the toolkit's, or a callback of the user's in it
            self.inputhook = None
            self.shell.showtraceback()
        if not mailbox:
            # The hook has no window to wait with, or left for tasks.  20 times a second we look whether that has
            # changed.
            self._run_loop(mailbox, 0.05)

    def _run_loop(self, mailbox: Any, seconds: float | None) -> None:
        loop = self.loop
        timer = None if seconds is None else loop.call_later(seconds, loop.stop)
        loop.add_reader(mailbox.fileno(), loop.stop)
        try:
            if not mailbox:
                loop.run_forever()
        finally:
            loop.remove_reader(mailbox.fileno())
            if timer is not None:
                timer.cancel()

    def call_in_running_loop(self, function: Callable[[], None]) -> None:
        """If a cell awaits, have main call this soon, between two steps of its tasks; otherwise do nothing.

        Called from any thread.
        """
        loop = self._awaiting
        if loop is not None:
            with contextlib.suppress(RuntimeError):      # closed meanwhile
                loop.call_soon_threadsafe(function)

    def _offer_loop(self, code: str) -> None:
        """Let asyncio.get_event_loop() find our loop, unless the cell has nothing to do with asyncio.

        Not at start: importing asyncio costs 30 ms.  Not if user code has set a loop of its own.
        asyncio.run() leaves none behind, so this is looked at before each cell.
        """
        if ("asyncio" in sys.modules or "asyncio" in code) and (self._loop is None or current_loop() is None):
            import asyncio
            asyncio.set_event_loop(self.loop)

    def run_coroutine(self, coroutine) -> Any:
        """Run a cell that awaits, on `loop`; what it leaves pending stays pending unless the cell was interrupted."""
        import asyncio
        loop = self.loop
        before = asyncio.all_tasks(loop)
        context = contextvars.copy_context()

        async def cell():
            nonlocal context
            try:
                return await coroutine
            finally:
                context = contextvars.copy_context()

        task = loop.create_task(cell())
        try:
            self._awaiting = loop
            loop.call_soon(self.on_await)       # what came before anybody could call_in_running_loop
            result = loop.run_until_complete(task)
            self._awaiting = None
            if isinstance(getattr(result, "error_in_exec", None), KeyboardInterrupt):
                self._cancel(asyncio.all_tasks(loop) - before)
        except BaseException as error:
            # Born in the selector or in a step of a task that the cell had made; the cell itself still waits.
            self._awaiting, self.interruption = None, error
            try:
                self._cancel(asyncio.all_tasks(loop) - before)
            finally:
                self.interruption = None
            if not task.done() or task.cancelled() or task.exception():
                raise
            result = task.result()
        finally:
            # A task works on a copy of the context; what the cell has set is to last, as without await.
            for variable, value in context.items():
                if variable.get(context) is not value:
                    variable.set(value)
        return result

    def _cancel(self, tasks: set) -> None:
        """Cancel these and let them finish; a task that will not is left behind after CANCEL_SECONDS."""
        import asyncio
        for task in tasks:
            task.cancel()
        if tasks:
            done, _ = self.loop.run_until_complete(asyncio.wait(tasks, timeout=CANCEL_SECONDS))
            for task in done:
                task.cancelled() or task.exception()          # looked at: asyncio would complain about it later

    # -- the end

    def close(self) -> None:
        """Write out the history for good.  The user's namespace stays until IPython's own atexit function,
        registered before any of the user's, so that their exit functions still find their variables."""
        self.shell.history_manager.end_session()


class HookContext:
    """What prompt_toolkit would give an input hook: a descriptor, and whether there is input."""

    def __init__(self, mailbox: Any, has_more: Callable[[], bool]):
        self._mailbox, self._has_more = mailbox, has_more
        self.fileno = mailbox.fileno

    def input_is_ready(self) -> bool:
        return bool(self._mailbox) or self._has_more()


def describe(error: BaseException) -> dict:
    """The error fields of a reply, for an exception that IPython has not formatted."""
    name = type(error).__name__
    try:
        # unittest.main() ends with a bool, and its text would not tell a status from a message.
        text = str(int(error.code) if isinstance(error, SystemExit) and isinstance(error.code, bool) else error)
    except BaseException as reason:                           # a __str__ of the user's
        text = "<str() of the %s raised %s>" % (name, type(reason).__name__)
    return {"ename": name, "evalue": text, "traceback": ["%s: %s" % (name, text) if text else name]}


def current_loop():
    """The loop that asyncio.get_event_loop() would give without making one, or None."""
    events = sys.modules.get("asyncio.events")
    if events is None:
        return None
    # asyncio has no question for this: get_event_loop() makes a loop (3.10 to 3.13) or warns about it.
    policy = getattr(events, "_get_event_loop_policy", None) or events.get_event_loop_policy
    loop = getattr(getattr(policy(), "_local", None), "_loop", None)
    return None if loop is None or loop.is_closed() else loop


# -- 2. Parents as libraries know them: dicts ------------------------------------------------------

def as_dict(message: Message | None) -> dict:
    """A request as get_parent() gives it."""
    if message is None:
        return {}
    return {"header": message.header, "parent_header": message.parent_header, "metadata": message.metadata,
            "content": message.content, "buffers": [memoryview(buffer) for buffer in message.buffers],
            "msg_id": message.header.get("msg_id", ""), "msg_type": message.header.get("msg_type", "")}


def as_message(parent: dict) -> Message | None:
    """What a library hands to set_parent: what get_parent gave it, or a dict of its own."""
    header = parent.get("header")
    return header and Message(header, parent.get("parent_header", {}), parent.get("metadata", {}),
                              parent.get("content", {}), [], [], json.dumps(header, default=str).encode())


class Kernel:
    """get_ipython().kernel: what libraries use of it, and nothing else."""

    def __init__(self, shell: ZMQInteractiveShell):
        self.shell, self.comm_manager, self.log = shell, shell.interpreter.comm_manager, shell.log

    def get_parent(self, channel: str | None = None) -> dict:
        return self.shell.get_parent()

    def set_parent(self, ident: Any, parent: dict, channel: str = "shell") -> None:
        self.shell.set_parent(parent)

    _parent_header = property(get_parent)

    @property
    def _parent_ident(self) -> dict:
        message = self.shell.interpreter.current_parent()
        return {"shell": message.identities if message else [], "control": []}


# -- 3. IPython's shell ----------------------------------------------------------------------------

def flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):        # whatever the user has put there
            stream.flush()


class ResultHook(DisplayHook):
    """sys.displayhook: the value of a cell's last expression becomes execute_result."""

    is_formatting = False

    def quiet(self) -> bool:
        """Whether the last token of the cell is a semicolon."""
        # IPython looks at the last cell that was stored, which is another one without store_history.
        if ";" not in self.shell.cell:
            return False
        import tokenize
        with contextlib.suppress(tokenize.TokenError, SyntaxError):     # magics are no tokens
            tokens = tokenize.generate_tokens(io.StringIO(self.shell.cell).readline)
            words = [found.string for found in tokens if found.string.strip() and found.type != tokenize.COMMENT]
            return words[-1:] == [";"]
        return False

    def write_output_prompt(self) -> None:
        pass

    def compute_format_data(self, result):
        self.is_formatting = True
        try:
            return super().compute_format_data(result)
        finally:
            self.is_formatting = False

    def write_format_data(self, format_dict, md_dict=None) -> None:
        flush_streams()
        self.shell.publish("execute_result", {
            "execution_count": self.prompt_count, "data": format_dict, "metadata": md_dict or {}})

    def finish_displayhook(self) -> None:
        pass


class Publisher(DisplayPublisher):
    """What display(), update_display() and clear_output() end in."""

    def publish(self, data, metadata=None, source=None, *, transient=None, update=False, **others) -> None:
        self._validate_data(data, metadata)
        flush_streams()
        self.shell.publish("update_display_data" if update else "display_data",
                           {"data": data, "metadata": metadata or {}, "transient": transient or {}})

    def clear_output(self, wait: bool = False) -> None:
        flush_streams()
        self.shell.publish("clear_output", {"wait": bool(wait)})


class CellCompiler(CachingCompiler):
    """Names the cells in tracebacks; a client that runs one script gives the name (IPYKERNEL_CELL_NAME)."""

    def get_code_name(self, raw_code, transformed_code, number):
        return os.environ.get("IPYKERNEL_CELL_NAME") or super().get_code_name(raw_code, transformed_code, number)

    def cache(self, *arguments, **options):
        name = super().cache(*arguments, **options)
        if name == os.environ.get("IPYKERNEL_CELL_NAME"):
            self._filename_map.pop(name, None)      # shown as a file, which it is, and not as In[n]
        return name


class MainLoopRunner:
    """What %autoawait calls "asyncio": cells that await run on the main thread's loop."""

    def __call__(self, coroutine):
        return ZMQInteractiveShell.instance().interpreter.run_coroutine(coroutine)

    def __str__(self):
        return "asyncio"


main_loop_runner = MainLoopRunner()


class ZMQInteractiveShell(InteractiveShell):
    """IPython with a frontend elsewhere.

    The name is an interface: libraries compare it to tell a notebook kernel from a terminal.
    """

    interpreter = AnyTrait()
    kernel = AnyTrait()
    display_trap = AnyTrait()
    displayhook_class = Type(ResultHook)
    display_pub_class = Type(Publisher)
    compiler_class = Type(CellCompiler)
    exiter = Instance(ZMQExitAutocall)
    loop_runner_map = {**InteractiveShell.loop_runner_map, "asyncio": (main_loop_runner, True)}
    keepkernel_on_exit = None
    cell = ""                               # the source of the running cell
    last_error: dict | None = None          # the latest `error` content of the running cell
    stepping: Callable | None = None        # the trace function of a debugger between two statements of a cell
    is_display_broken = False               # an error was shown while a result was being formatted
    is_interrupted = False                  # a KeyboardInterrupt was shown, maybe not by us; see run_code

    @default("kernel")
    def _default_kernel(self):
        return Kernel(self)

    @default("exiter")
    def _default_exiter(self):
        return ZMQExitAutocall(self)

    @default("loop_runner")
    def _default_loop_runner(self):
        return main_loop_runner

    @property
    def publish(self) -> Callable:
        return self.interpreter.publish

    # -- IPython's set-up, step by step as it calls them

    def init_environment(self) -> None:
        # A pager would wait for keys that nobody can send.
        os.environ["PAGER"] = os.environ["GIT_PAGER"] = "cat"

    def init_virtualenv(self) -> None:
        pass                                # a kernel runs in the environment that it was installed in

    def init_history(self) -> None:
        self.history_manager = History(shell=self, parent=self)
        self.configurables.append(self.history_manager)

    def init_hooks(self) -> None:
        super().init_hooks()
        self.input_transformers_cleanup.append(without_mark)
        self.set_hook("show_in_pager", page.as_hook(self.page), 99)

    def init_displayhook(self) -> None:
        super().init_displayhook()
        # IPython's puts the displayhook in place for each cell and takes it away after.  Ours was set once: a
        # hook that the user sets stays, as it does in python.
        self.display_trap = contextlib.nullcontext()

    def init_completer(self) -> None:
        super().init_completer()
        analyse = self.Completer._jedi_matches

        def matches(cursor_column, cursor_line, text):
            found = complete_live_object(self.Completer, text, cursor_line, cursor_column)
            return analyse(cursor_column, cursor_line, text) if found is None else iter(found)

        self.Completer._jedi_matches = matches

    def init_magics(self) -> None:
        super().init_magics()
        self.register_magics(KernelMagics)

    # -- a cell

    def run_request(self, code: str, **options) -> Any:
        """run_cell, and no debugger that outlives its cell."""
        self.cell, self.last_error, self.is_display_broken, self.is_interrupted = code, None, False, False
        try:
            return self.run_cell(code, **options)
        finally:
            self.stepping = None
            # IPython 9.18 takes magics for loaded, %run and %timeit among them, whose loading Ctrl-C has ended.
            getattr(self.magics_manager, "_loaded_lazy", set()).clear()
            if "bdb" in sys.modules:
                handler = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
                if isinstance(handler, sys.modules["bdb"].Bdb):         # pdb's `continue` takes Ctrl-C for itself
                    signal.signal(signal.SIGINT, signal.default_int_handler)
            flush_streams()                 # the user may have put there what collects

    def pause_debugger(self) -> None:
        """After a statement: who steps through the cell stops at the next one, not in what lies between."""
        bdb = sys.modules.get("bdb")
        self.stepping = None
        if bdb is not None and isinstance(getattr(sys.gettrace(), "__self__", None), bdb.Bdb):
            self.stepping = sys.gettrace()
            sys.settrace(None)

    @property
    def debugger_cls(self) -> type:
        """IPython's debugger, which does not stop in IPython or in us."""
        from IPython.core.debugger import InterruptiblePdb

        class Debugger(InterruptiblePdb):
            def __init__(self, *args, **options):
                options.setdefault("skip", ["IPython", "IPython.*", "traitlets", "traitlets.*", __package__ + ".*"])
                options.setdefault("nosigint", True)
                super().__init__(*args, **options)

        return Debugger

    @contextlib.contextmanager
    def _tee(self, channel):
        # IPython 9 keeps a copy of all that a cell prints, for %notebook, by replacing sys.stdout.write:
        # memory without bound, and an error where sys.stdout has no settable attributes.
        yield

    async def run_code(self, code_obj, result=None, *, async_=False):
        """Run one statement of a cell; True if it raised.

        Differs from IPython's in that sys.excepthook is left alone: a hook that the user sets stays set, and is
        called with what a cell raises, as python's prompt does.  And in that Ctrl-C ends the cell also where IPython
        shows it and would go on: in a callback before the cell (one of IPython's own runs before each), in %run.
        """
        __tracebackhide__ = "__ipython_bottom__"       # frames above this one are not the user's
        if self.is_interrupted:
            if result is not None:
                result.error_in_exec = KeyboardInterrupt()
            return True
        try:
            try:
                if self.stepping is not None:
                    sys.settrace(self.stepping)
                if async_:
                    await eval(code_obj, self.user_global_ns, self.user_ns)
                else:
                    exec(code_obj, self.user_global_ns, self.user_ns)
            finally:
                if sys.gettrace() is not None:
                    self.pause_debugger()
            return False
        except BaseException as error:
            interruption = self.interpreter.interruption
            if interruption is not None and type(error).__name__ == "CancelledError":
                # We cancelled the cell because of this; told at the line that was waiting.
                error = interruption.with_traceback(error.__traceback__)
            if error.__traceback__ is not None:
                error.__traceback__ = without_own_end(error, error.__traceback__.tb_next)      # this frame is ours
            if result is not None:
                result.error_in_exec = error
            self._show_error(error)
            return True

    def _show_error(self, error: BaseException) -> None:
        found = type(error), error, error.__traceback__
        if isinstance(error, SystemExit):
            self.showtraceback(found, exception_only=True)
            print("To end the kernel, use exit or quit.", file=sys.stderr)
        elif type(error).__name__ == "BdbQuit":
            pass                                       # the user left the debugger
        elif isinstance(error, self.custom_exceptions):
            self.CustomTB(*found)
        elif sys.excepthook != self.excepthook:
            try:
                sys.excepthook(*found)
            except BaseException:
                print("Error in sys.excepthook:", file=sys.stderr)
                traceback.print_exc()
                self.showtraceback(found, tb_offset=0, running_compiled_code=True)
        else:
            self.showtraceback(found, tb_offset=0, running_compiled_code=True)

    def showtraceback(self, exc_tuple=None, filename=None, tb_offset=None, exception_only=False,
                      running_compiled_code=False):
        """Publish an error.  Where IPython prints instead of calling _showtraceback, we publish all the same."""
        try:
            etype, value, tb = self._get_exc_info(exc_tuple)
        except ValueError:
            return super().showtraceback(exc_tuple, filename, tb_offset, exception_only, running_compiled_code)
        self.last_error = None
        self.is_interrupted = self.is_interrupted or isinstance(value, KeyboardInterrupt)
        try:
            # At the end, Python's form: IPython's takes 0.1 s the first time, and on a slow machine all that there is.
            if (is_beyond_ipython(value) or self.interpreter.is_ending) and not exception_only:
                self._showtraceback(etype, value, traceback.format_exception(etype, value, tb))
            else:
                super().showtraceback((etype, value, tb), filename, tb_offset, exception_only, running_compiled_code)
        except BaseException:
            pass                            # Ctrl-C in between, a __str__ of the user's; the short form below must do
        # Libraries replace _showtraceback, to show errors themselves.
        is_ours = getattr(self._showtraceback, "__func__", None) is ZMQInteractiveShell._showtraceback
        if self.last_error is None and is_ours:
            self._showtraceback(etype, value, describe(value)["traceback"])

    def _showtraceback(self, etype, evalue, stb):
        flush_streams()
        self.last_error = {**describe(evalue), "ename": etype.__name__, "traceback": [str(line) for line in stb]}
        if self.interpreter.is_starting:
            print("\n".join(self.last_error["traceback"]), file=sys.stderr)
            return
        self.is_display_broken = self.displayhook.is_formatting or self.is_display_broken
        self.publish("error", dict(self.last_error))

    def excepthook(self, etype, value, tb) -> None:
        """sys.excepthook: for toolkits that hand the errors of callbacks to it."""
        if not getattr(self.interpreter.completing, "now", False):
            self.showtraceback((etype, value, tb), tb_offset=0)

    def show_usage_error(self, exc) -> None:
        self._showtraceback(UsageError, exc, ["UsageError: %s" % exc])

    def _format_exception_for_storage(self, exception, filename=None, running_compiled_code=False):
        # IPython 9 would format the traceback again for this, which is most of the time a failing cell takes.
        return self.last_error or describe(exception)

    # -- what goes to the frontend beside output

    def page(self, strg, start=0, screen_lines=0, pager_cmd=None) -> None:
        self.payload_manager.write_payload({
            "source": "page", "data": strg if isinstance(strg, dict) else {"text/plain": strg}, "start": max(0, start)})

    def set_next_input(self, s, replace=False) -> None:
        self.payload_manager.write_payload({"source": "set_next_input", "text": s, "replace": replace})

    def ask_exit(self) -> None:
        self.payload_manager.write_payload({"source": "ask_exit", "keepkernel": bool(self.keepkernel_on_exit)})

    # -- !command, %gui

    def system(self, cmd) -> None:
        """Run a shell command.  Its output reaches the frontend through descriptors 1 and 2 while it runs."""
        self._run_command(cmd)

    system_piped = system_raw = system

    def getoutput(self, cmd, split=True, depth=0):
        """What a shell command says, errors included.  IPython's takes Ctrl-C for the end of the command alone."""
        from subprocess import PIPE, STDOUT
        from IPython.utils.text import LSString, SList
        if cmd.rstrip().endswith("&"):
            raise OSError("Background processes not supported.")
        text = self._run_command(cmd, depth, stdout=PIPE, stderr=STDOUT).decode("utf-8", "replace")
        return SList(text.splitlines()) if split else LSString(text)

    def _run_command(self, cmd, depth=0, **options) -> Any:
        """Its standard input is empty, because nobody could type it."""
        import subprocess
        cmd = self.var_expand(cmd, depth=depth + 2)
        flush_streams()
        shell = os.environ.get("SHELL")
        done = subprocess.run(cmd, shell=True, stdin=subprocess.DEVNULL, **options,
                              executable=shell if os.name == "posix" and shell and os.path.exists(shell) else None)
        # As in IPython: a status in the shell's manner, 128 and the signal, becomes minus the signal.
        code = done.returncode if done.returncode <= 128 else 128 - done.returncode
        self.user_ns["_exit_code"] = code
        if getattr(self, "system_raise_on_error", False) and code:
            raise subprocess.CalledProcessError(code, cmd)
        return done.stdout

    def ask_yes_no(self, prompt, default=None, interrupt="n"):
        return super().ask_yes_no(prompt, default, interrupt)       # else IPython answers Ctrl-C by asking again

    def enable_gui(self, gui=None) -> None:
        """%gui: an event loop of a toolkit to run while the kernel is idle; kernel.py calls it."""
        if gui in (None, "", "inline", "none", "agg", "asyncio"):
            self.active_eventloop, self.interpreter.inputhook = None, None
            return
        from IPython.terminal.pt_inputhooks import UnknownBackend, get_inputhook_name_and_func
        try:
            self.active_eventloop, self.interpreter.inputhook = get_inputhook_name_and_func(gui)
        except (UnknownBackend, ImportError) as error:
            raise UsageError(str(error)) from error

    # -- parents, under the names that libraries use

    def get_parent(self) -> dict:
        return as_dict(self.interpreter.current_parent())

    parent_header = property(get_parent)

    def set_parent(self, parent: dict) -> None:
        self.interpreter.set_parent(as_message(parent))

    def set_thread_parent(self, parent: dict) -> contextvars.Token:
        """Pin the output of the calling thread to this request; the result undoes it with reset_thread_parent."""
        return self.interpreter.parent.set(as_message(parent))

    def reset_thread_parent(self, token: contextvars.Token) -> None:
        self.interpreter.parent.reset(token)


def without_mark(lines: list[str]) -> list[str]:
    """An input transformation: `%%private` is for the session log; to IPython it is an empty line, or, before
    another cell magic, none."""
    if not lines or not is_private(lines[0]):
        return lines
    return lines[1:] if lines[1:] and lines[1].startswith("%%") else ["\n", *lines[1:]]


def without_own_end(error: BaseException, tb: types.TracebackType | None) -> types.TracebackType | None:
    """What Ctrl-C or the end of input ends within print() or input() ends, for the user, at the line with that call."""
    if not isinstance(error, (KeyboardInterrupt, EOFError, StdinNotImplementedError)):
        return tb
    folder = os.path.dirname(__file__) + os.sep
    last, at = None, tb
    while at is not None:
        if not at.tb_frame.f_code.co_filename.startswith(folder):
            last = at
        at = at.tb_next
    if last is not None:
        last.tb_next = None
    return tb


def is_beyond_ipython(error: BaseException | None) -> bool:
    """Whether IPython cannot format it: it or what led to it is an exception group, or it led to itself."""
    group = getattr(builtins, "BaseExceptionGroup", ())
    seen: set[int] = set()
    while error is not None and not isinstance(error, group) and id(error) not in seen:
        seen.add(id(error))
        error = error.__context__
    return error is not None


@magics_class
class KernelMagics(Magics):
    """Magics that a kernel does otherwise than a terminal."""

    @line_magic
    def edit(self, parameter_s="", last_call=None):
        """Open an editor in the frontend.

        %edit [-n LINE] [-p] [-r] [TARGET]

        TARGET is a file, a variable, an object whose definition is wanted, or input numbers as in %macro.
        The frontend is asked to open the file; it is not run afterwards, because we cannot see the editor end.
        """
        from IPython.core.magics.code import CodeMagics, MacroToEdit
        options, args = self.parse_options(parameter_s, "prn:")
        try:
            filename, line, _ = CodeMagics._find_edit_target(self.shell, args, options, last_call or ["", ""])
        except MacroToEdit:
            print("A macro cannot be edited from here.", file=sys.stderr)
            return
        if filename is None:
            return
        self.shell.payload_manager.write_payload({
            "source": "edit_magic", "filename": os.path.abspath(filename),
            "line_number": int(options.get("n") or line or 0)})

    @line_magic
    def less(self, arg_s):
        """Show a file in the frontend's pager."""
        with open(os.path.expanduser(arg_s), encoding="utf-8", errors="replace") as file:
            page.page(file.read())

    more = line_magic("more")(less)

    @line_magic
    def recover(self, arg_s):
        """What to do with the session before this one, if the kernel died: `%recover help` tells."""
        self.shell.interpreter.recover(arg_s)

    @line_magic
    def man(self, arg_s):
        """Show a manual page in the frontend's pager."""
        page.page(self.shell.getoutput("man %s | col -b" % arg_s, split=False))

    @line_magic
    def clear(self, arg_s):
        """Clear what the cell has shown."""
        self.shell.display_pub.clear_output()

    @line_magic
    def connect_info(self, arg_s):
        """Show how another frontend attaches to this kernel."""
        path = self.shell.interpreter.connection_file
        with open(path, encoding="utf-8") as file:
            members = json.load(file)
        # Without what lets in: what a cell prints is seen by all clients, and saved in logs and notebooks.
        for name in {"key", "curve_secretkey"} & set(members):
            members[name] = "(in the file)"
        print(json.dumps(members, indent=2))
        print("The connection file is %s." % path)
        print("Attach another frontend, on this machine and as the same user, with one of\n"
              "    python -m %s.frontend --existing %s\n"
              "    jupyter console --existing %s" % (__package__, path, path))


# -- 4. Configuration, and IPython's own start -----------------------------------------------------

class IPKernelApp(InteractiveShellApp, Application):
    """IPython's start from the user's files.

    Named so that both sections that configuration files may have for it, InteractiveShellApp and IPKernelApp, apply.
    """

    name = Unicode("twoproc").tag(config=True)
    profile_dir = AnyTrait()
    ipython_dir = property(lambda self: get_ipython_dir())

    def make_shell(self, interpreter: Interpreter) -> ZMQInteractiveShell:
        """The shell, with the user's configuration; without it if IPython refuses that."""
        for name in ("ipython_config", "ipython_kernel_config"):
            try:
                self.load_config_file(name, path=[self.profile_dir.location, *ENV_CONFIG_DIRS, *SYSTEM_CONFIG_DIRS])
            except SystemExit:                       # of the user's code; load_config_file tells the other errors
                traceback.print_exc()
        for config in (self.config, Config()):
            # tqdm and others take us for a notebook only if this section exists.
            config.IPKernelApp.name = "twoproc"
            try:
                self.shell = ZMQInteractiveShell.instance(
                    interpreter=interpreter, config=config, profile_dir=self.profile_dir)
                break
            except Exception:
                traceback.print_exc()
                print("IPython could not be set up with this configuration and starts without it.", file=sys.stderr)
                ZMQInteractiveShell.clear_instance()
        return self.shell

    def run_files(self) -> None:
        """sys.path, extensions, exec_lines, startup files."""
        try:
            self.init_path()
            self.init_gui_pylab()
            self.init_extensions()
            self.init_code()
        except (Exception, SystemExit):              # user code: a kernel starts in spite of it
            traceback.print_exc()


def find_profile(folder: str | None) -> ProfileDir:
    """The profile to use; a fresh one in a temporary folder if none can be made where it belongs."""
    umask = os.umask(0o077)                          # what IPython makes is for us alone; no cell runs yet
    try:
        if folder is None:
            return ProfileDir.create_profile_dir_by_name(get_ipython_dir(), "default")
        return ProfileDir(location=os.path.abspath(folder))
    except Exception as error:
        import tempfile
        print("IPython profile %s: %s; using an empty one" % (folder or "default", error), file=sys.stderr)
        return ProfileDir(location=tempfile.mkdtemp(prefix="twoproc-profile-"))
    finally:
        os.umask(umask)
