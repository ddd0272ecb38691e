# Distributed under the terms of the BSD 3-Clause License.
"""What the tests share: kernel processes, a client of its own, and waits that end.

Nothing here imports twoproc. The client speaks the wire protocol with pyzmq, hmac and json alone, so
that a mistake made twice, in the kernel and in our client, is still seen; and it can say what an honest
client never would: any frames, any signature, any identity.

    class Arithmetic(support.KernelCase):          # one kernel for the class, in a folder of its own
        def test_a_sum_is_answered(self):
            result = self.client.execute("1 + 1")
            self.assertEqual(result.value, "2")

    kernel = support.start_kernel(self, "--transport", "tcp")   # or one for a single test
    client = kernel.client()                                     # as many as a test needs

Everything is ended with the test (or class) that asked for it: processes with their whole group,
sockets, folders. Every wait has a deadline and fails with what it waited for.

TWOPROC_TEST_KERNEL names another kernel to run the tests against, for example
`python -m ipykernel_launcher -f {connection_file}`: that is how a test shows that it can fail.
"""
import collections
import hashlib
import hmac
import inspect
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid
from datetime import datetime, timezone

import zmq

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DELIMITER = b"<IDS|MSG>"
CHANNELS = ("shell", "control", "stdin", "iopub", "hb")
DEADLINE = 20           # seconds; generous, for a machine that is busy with other things
KERNEL = os.environ.get("TWOPROC_TEST_KERNEL",
                        f"{shlex.quote(sys.executable)} -m twoproc.kernel -f {{connection_file}}")
IS_OURS = "twoproc" in KERNEL
IS_SOAK = bool(os.environ.get("TWOPROC_TEST_SOAK"))     # set by `python -m soak`

_pause = threading.Event()      # never set: waiting for it is how wait_until rests between two looks


class DeadlineError(AssertionError):
    """Something did not happen in time."""


def wait_until(predicate, deadline=DEADLINE, what=None, pause=0.005):
    """Look until predicate() is true and return what it said. For files, processes and other things
    that cannot wake us; what a socket or a process can tell is waited for there."""
    end = time.monotonic() + deadline
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > end:
            said = what() if callable(what) else what or source_of(predicate)
            raise DeadlineError(f"not within {deadline} s: {said}")
        _pause.wait(pause)


def source_of(function):
    """As it is written: what a failure says of a condition that has no other name."""
    try:
        return inspect.getsource(function).strip()
    except (OSError, TypeError):
        return repr(function)


def rounds(suite, soak):
    """How many: a few in the suite, all of them in the long campaigns of soak/."""
    return soak if IS_SOAK else suite


def at_most(seconds):
    """How long something may take that is promised within `seconds`: so long in the campaigns of soak/, which have
    a machine to themselves; five times that in the suite, whose machine may be slow, and busy with other things."""
    return rounds(5 * seconds, seconds)


# -- folders and processes

class Home:
    """A temporary world for a process: HOME, IPython's and Jupyter's folders, runtime folder, and an
    import path with the package alone in it (the repository's own folder would put our `test` in
    front of Python's)."""

    def __init__(self, case):
        self.path = tempfile.mkdtemp(prefix="tp-")      # short: a socket's path has 107 bytes
        _cleanup(case, shutil.rmtree, self.path, ignore_errors=True)
        for name in ("work", "run", "import"):
            os.mkdir(os.path.join(self.path, name), 0o700)
        self.work = os.path.join(self.path, "work")     # the processes' current folder
        self.run = os.path.join(self.path, "run")
        os.symlink(os.path.join(ROOT, "twoproc"), os.path.join(self.path, "import", "twoproc"))
        self.env = {name: value for name, value in os.environ.items()
                    if not name.startswith(("TWOPROC_", "JPY_", "JUPYTER_", "IPYKERNEL_", "XDG_"))
                    and name not in ("MPLBACKEND", "PYTHONSTARTUP", "PYTHONPATH")}
        self.env.update(
            HOME=self.path,
            IPYTHONDIR=os.path.join(self.path, "ipython"),
            JUPYTER_RUNTIME_DIR=self.run,
            JUPYTER_DATA_DIR=os.path.join(self.path, "jupyter"),
            JUPYTER_CONFIG_DIR=os.path.join(self.path, "jupyter-config"),
            JUPYTER_PLATFORM_DIRS="1",
            TWOPROC_RUNTIME=self.run,
            XDG_RUNTIME_DIR=self.run,
            XDG_CONFIG_HOME=os.path.join(self.path, "config"),
            XDG_DATA_HOME=os.path.join(self.path, "data"),
            XDG_STATE_HOME=os.path.join(self.path, "state"),
            # Where jedi keeps what it parsed: without it, each first completion takes seconds.
            XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
            PYTHONPATH=os.path.join(self.path, "import"),
            PYTHONDONTWRITEBYTECODE="1",
        )


class Process:
    """A child in its own process group, its output in files, ended with the test that started it."""

    def __init__(self, case, argv, home=None, env=None, cwd=None, stdin=subprocess.DEVNULL):
        self.home = home or Home(case)
        self.argv = argv
        number = uuid.uuid4().hex[:6]
        self.out_path = os.path.join(self.home.path, f"out-{number}")
        self.err_path = os.path.join(self.home.path, f"err-{number}")
        with open(self.out_path, "wb") as out, open(self.err_path, "wb") as err:
            self.popen = subprocess.Popen(
                argv, cwd=cwd or self.home.work, env={**self.home.env, **(env or {})},
                stdin=stdin, stdout=out, stderr=err, start_new_session=True)
        self.pid = self.popen.pid
        _cleanup(case, self.end)

    @property
    def is_alive(self):
        return self.popen.poll() is None

    def signal(self, number):
        """To the whole group, as a terminal does; SIGSTOP has stopped every thread when this returns."""
        os.killpg(self.pid, number)
        if number == signal.SIGSTOP:
            wait_until(lambda: os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG), what="the stop")

    def wait(self, deadline=DEADLINE):
        """The exit status (negative: the signal)."""
        try:
            return self.popen.wait(deadline)
        except subprocess.TimeoutExpired:
            raise DeadlineError(f"still running after {deadline} s: {self.argv}\n{self.log()}") from None

    def output(self):
        with open(self.out_path, encoding="utf-8", errors="replace") as file:
            return file.read()

    def log(self):
        """What the process itself wrote: standard output and error, in this order."""
        with open(self.err_path, encoding="utf-8", errors="replace") as file:
            return self.output() + file.read()

    def end(self):
        # The group is ours as long as its leader has not been waited for, or has members left.
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        if self.popen.stdin:
            self.popen.stdin.close()
        self.popen.wait()

    # -- /proc

    def threads(self):
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self, field="VmRSS"):
        """Bytes; also VmHWM, the peak."""
        with open(f"/proc/{self.pid}/status") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
        raise LookupError(field)


class Kernel(Process):
    """A kernel process and its connection file."""

    def __init__(self, case, *arguments, command=None, connection=None, successor_of=None, home=None, env=None,
                 **others):
        """arguments: appended to the command line; connection: members of a connection file to write
        before the start, as a Jupyter manager does, instead of letting the kernel write its own;
        successor_of: a Kernel that has ended, whose connection file is used again."""
        home = home or (successor_of.home if successor_of else Home(case))
        self.case = case
        self.connection_file = successor_of.connection_file if successor_of else \
            os.path.join(home.run, f"kernel-{uuid.uuid4().hex[:8]}.json")
        if connection is not None:
            with open(os.open(self.connection_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(connection, file)
        argv = [word.format(connection_file=self.connection_file) for word in shlex.split(command or KERNEL)]
        # The kernel ends with us, even if the test run is killed.
        env = {"JPY_PARENT_PID": str(os.getpid()), **(env or {})}
        super().__init__(case, argv + list(arguments), home=home, env=env, **others)

    @property
    def info(self):
        """The connection file, read anew."""
        with open(self.connection_file) as file:
            return json.load(file)

    def wait_file(self, deadline=DEADLINE):
        def is_written():
            if not self.is_alive:
                raise AssertionError(f"the kernel ended with {self.popen.returncode}:\n{self.log()}")
            try:
                return all(self.info.get(f"{channel}_port") for channel in CHANNELS)
            except (OSError, ValueError):
                return False
        wait_until(is_written, deadline, "connection file of a new kernel")

    def client(self, case=None, ready=True, **options):
        """A client of this kernel; ready: it has had an answer and sees iopub."""
        client = Client(self.info, kernel=self, **options)
        _cleanup(case or self.case, client.close)
        if ready:
            client.wait_ready()
        return client


def start_kernel(case, *arguments, **options):
    """A running kernel, ended with case (a TestCase, or a TestCase class in its setUpClass)."""
    kernel = Kernel(case, *arguments, **options)
    kernel.wait_file()
    return kernel


class KernelCase(unittest.TestCase):
    """Tests that share one kernel; a test that finds it dead has a new one."""
    kernel_arguments = ()

    @classmethod
    def setUpClass(cls):
        cls.kernel = start_kernel(cls, *cls.kernel_arguments)

    def setUp(self):
        if not self.kernel.is_alive:
            type(self).kernel = start_kernel(type(self), *self.kernel_arguments)
        self.client = self.kernel.client(self)

    def assert_serves(self, client=None, deadline=DEADLINE):
        """The kernel lives and answers kernel_info on shell and control, and a cell."""
        self.assertTrue(self.kernel.is_alive, self.kernel.log())
        client = client or self.client
        for channel in ("shell", "control"):
            result = client.result(client.send(channel, "kernel_info_request"), channel, deadline)
            self.assertEqual(result.status, "ok")
        self.assertEqual(client.execute("1+1", deadline=deadline).value, "2")


def _cleanup(case, function, *arguments, **options):
    add = case.addClassCleanup if isinstance(case, type) else case.addCleanup
    add(function, *arguments, **options)


# -- the client

class Message(collections.namedtuple("Message", "identities header parent_header metadata content buffers")):
    @property
    def msg_type(self):
        return self.header["msg_type"]

    @property
    def parent_id(self):
        return self.parent_header.get("msg_id")


class Result:
    """What one request brought: its reply, and its messages on iopub from busy to idle."""

    def __init__(self, reply, messages):
        self.reply = reply
        self.messages = messages

    @property
    def status(self):
        return self.reply.content["status"]

    @property
    def types(self):
        return [message.msg_type for message in self.messages]

    def of_type(self, msg_type):
        return [message.content for message in self.messages if message.msg_type == msg_type]

    def text(self, name="stdout"):
        return "".join(content["text"] for content in self.of_type("stream") if content["name"] == name)

    @property
    def value(self):
        """The text of the result, None without one."""
        results = self.of_type("execute_result")
        return results[-1]["data"]["text/plain"] if results else None

    def __repr__(self):
        return f"<Result {self.reply and self.reply.content} {[(m.msg_type, m.content) for m in self.messages]}>"


class Client:
    """A raw client. One thread only; a test with two clients in two threads makes each in its own."""

    def __init__(self, info, key=None, session=None, identity=None, channels=CHANNELS, options=(), kernel=None):
        """key, identity: other than the honest ones; options: (zmq option, value) for every socket;
        kernel: the process, so that nobody waits for the answer of a dead one."""
        self.info = info
        self.kernel = kernel
        self.key = info.get("key", "").encode() if key is None else key
        self.session = session or uuid.uuid4().hex
        self.identity = identity or self.session.encode()
        self.inbox = {channel: collections.deque() for channel in channels}
        self.sockets = {}
        self.poller = zmq.Poller()
        kinds = {"iopub": zmq.SUB, "hb": zmq.REQ}
        for channel in channels:
            socket = zmq.Context.instance().socket(kinds.get(channel, zmq.DEALER))
            socket.linger = 0
            socket.sndtimeo = 10_000        # a peer that never reads fails a test, it does not hang it
            socket.reconnect_ivl = 10       # ms; the kernel may not have bound yet
            if channel in ("shell", "control", "stdin"):
                socket.identity = self.identity
            if info.get("curve_publickey"):
                socket.curve_serverkey = info["curve_publickey"].encode()
                own = "client" if "client_secretkey" in info else "curve"
                socket.curve_publickey = info[own + "_publickey"].encode()
                socket.curve_secretkey = info[own + "_secretkey"].encode()
            for option, value in options:
                socket.setsockopt(option, value)
            if channel == "iopub":
                socket.subscribe(b"")
            socket.connect(self.url(channel))
            self.sockets[channel] = socket
            self.poller.register(socket, zmq.POLLIN)

    def url(self, channel):
        port = self.info[f"{channel}_port"]
        if self.info.get("transport", "tcp") == "ipc":
            return f"ipc://{self.info['ip']}-{port}"
        return f"tcp://{self.info['ip']}:{port}"

    def close(self):
        for socket in self.sockets.values():
            socket.close(0)
        self.sockets = {}

    # -- saying

    def header(self, msg_type, **members):
        return {"msg_id": uuid.uuid4().hex, "msg_type": msg_type, "session": self.session, "username": "test",
                "date": datetime.now(timezone.utc).isoformat(), "version": "5.5", **members}

    def frames(self, header, content=None, parent_header=None, metadata=None, buffers=(), key=None, signature=None):
        """A message as frames, from the delimiter on. Each part may be bytes, sent (and signed) as they
        are; key signs with another key, signature stands in place of the right one."""
        parts = [part if isinstance(part, bytes) else json.dumps({} if part is None else part).encode()
                 for part in (header, parent_header, metadata, {} if content is None else content)]
        if signature is None:
            signature = sign(self.key if key is None else key, parts)
        return [DELIMITER, signature, *parts, *buffers]

    def send_frames(self, channel, frames):
        self.sockets[channel].send_multipart(frames)

    def send(self, channel, msg_type, content=None, parent_header=None, metadata=None, buffers=()):
        """Send an honest message; returns its msg_id."""
        header = self.header(msg_type)
        self.send_frames(channel, self.frames(header, content, parent_header, metadata, buffers))
        return header["msg_id"]

    def send_execute(self, code, **members):
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {},
                   "allow_stdin": False, "stop_on_error": True, **members}
        return self.send("shell", "execute_request", content)

    def answer(self, question, value):
        """Answer an input_request."""
        return self.send("stdin", "input_reply", {"value": value, "status": "ok"}, parent_header=question.header)

    # -- hearing

    def collect(self, timeout=0):
        """Take in whatever arrives within timeout; returns as soon as something did, and whether it did."""
        arrived = self.poller.poll(timeout * 1000)
        for socket, _ in arrived:
            channel = next(name for name in self.sockets if self.sockets[name] is socket)
            for _ in range(500):        # a kernel that floods us must not keep us from our deadlines
                try:
                    frames = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                if channel == "hb":     # a REQ socket: one echo for each word
                    self.inbox[channel].append(frames)
                    break
                message = self.parse(frames)
                if message.header["msg_type"] != "iopub_welcome":       # it answers nobody's request
                    self.inbox[channel].append(message)
        return bool(arrived)

    def parse(self, frames):
        start = frames.index(DELIMITER)
        parts = frames[start + 2:start + 6]
        if self.key and frames[start + 1] != sign(self.key, parts):
            raise AssertionError(f"the kernel's signature is wrong: {frames}")
        return Message(frames[:start], *map(json.loads, parts), frames[start + 6:])

    def take(self, channel, is_wanted=lambda message: True, deadline=DEADLINE, what=None):
        """The first message of channel that is_wanted; the others stay for later."""
        end = time.monotonic() + deadline
        inbox = self.inbox[channel]
        seen = 0
        while True:
            for place in range(seen, len(inbox)):
                if is_wanted(inbox[place]):
                    message = inbox[place]
                    del inbox[place]
                    return message
            seen = len(inbox)
            left = end - time.monotonic()
            if left <= 0:
                raise DeadlineError(f"nothing on {channel} within {deadline} s: {self.missing(what)}")
            is_alive = self.kernel is None or self.kernel.is_alive
            # Anything at all that comes from a dead kernel gives the others time: no order holds between sockets.
            if not self.collect(min(left, 0.5)) and not is_alive:
                raise DeadlineError(f"the kernel ended with {self.kernel.popen.returncode} before "
                                    f"{self.missing(what)}:\n{self.kernel.log()}")

    def missing(self, what):
        """What is waited for in vain, and what there is instead."""
        there = {channel: [message.msg_type if channel != "hb" else message for message in inbox]
                 for channel, inbox in self.inbox.items() if inbox}
        return f"{what() if callable(what) else what or 'a message'}; there is: {there or 'nothing'}"

    def reply(self, msg_id, channel="shell", deadline=DEADLINE):
        return self.take(channel, lambda message: message.parent_id == msg_id, deadline, f"reply to {msg_id}")

    def request(self, channel, msg_type, content=None, deadline=DEADLINE):
        """Send and wait for the reply."""
        return self.reply(self.send(channel, msg_type, content), channel, deadline)

    def output(self, msg_id, deadline=DEADLINE):
        """The messages of this request on iopub, up to its idle."""
        messages = []
        end = time.monotonic() + deadline
        while not (messages and messages[-1].content.get("execution_state") == "idle"):
            messages.append(self.take("iopub", lambda message: message.parent_id == msg_id,
                                      max(0, end - time.monotonic()), lambda: f"idle of {msg_id} after {messages}"))
        return messages

    def result(self, msg_id, channel="shell", deadline=DEADLINE):
        return Result(self.reply(msg_id, channel, deadline), self.output(msg_id, deadline))

    def execute(self, code, deadline=DEADLINE, answers=(), **members):
        """Run a cell and wait for reply and idle; answers: what it is told when it asks."""
        msg_id = self.send_execute(code, **members, **({"allow_stdin": True} if answers else {}))
        for answer in answers:
            self.answer(self.take("stdin", deadline=deadline, what="input_request"), answer)
        return self.result(msg_id, deadline=deadline)

    def wait_running(self, msg_id, deadline=DEADLINE):
        """Until the kernel says that it runs this cell."""
        return self.take("iopub", lambda message: message.parent_id == msg_id and message.msg_type == "execute_input",
                         deadline, f"execute_input of {msg_id}")

    def wait_text(self, msg_id, text, deadline=DEADLINE):
        """Until this cell has printed text. It may come in pieces: print() writes the end of a line by itself."""
        said = ""

        def has_said(message):
            nonlocal said
            if message.parent_id == msg_id:
                said += message.content.get("text", "")
            return text in said
        return self.take("iopub", has_said, deadline, lambda: f"{text!r} from {msg_id} after {said[-1000:]!r}")

    def wait_stdin_read(self):
        """Until the kernel has read what was sent on stdin, where nothing is answered: it has when it complains
        about what is sent behind it."""
        if not IS_OURS:
            return self.is_silent("stdin", 2)
        complaint = "stdin: wrong signature"
        complaints = self.kernel.log().count(complaint)

        def complains():
            self.send_frames("stdin", self.frames(self.header("input_reply"), key=b"x"))
            return self.kernel.log().count(complaint) > complaints
        wait_until(complains, what=complaint, pause=0.1)

    def is_silent(self, channel, seconds):
        """Nothing comes on channel for so long."""
        end = time.monotonic() + seconds
        while not self.inbox[channel] and (left := end - time.monotonic()) > 0:
            self.collect(left)
        return not self.inbox[channel]

    def drain(self):
        """Forget what has arrived."""
        self.collect()
        for inbox in self.inbox.values():
            inbox.clear()

    def wait_ready(self, deadline=DEADLINE):
        """Until the kernel answers and its iopub reaches us. A subscription takes its time, and what is
        published before it is not seen: ask until an answer's idle is."""
        end = time.monotonic() + deadline
        patience = 0.01
        while True:
            msg_id = self.send("shell", "kernel_info_request")
            self.reply(msg_id, deadline=max(0, end - time.monotonic()))
            if "iopub" not in self.sockets:
                return
            try:
                self.output(msg_id, deadline=patience)
                return
            except DeadlineError:
                if time.monotonic() > end:
                    raise
                patience *= 2
            finally:
                self.inbox["iopub"].clear()


def sign(key, parts):
    if not key:
        return b""
    return hmac.new(key, b"".join(parts), hashlib.sha256).hexdigest().encode()
