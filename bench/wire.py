# Distributed under the terms of the BSD 3-Clause License.
"""A kernel process seen from the outside, by the smallest client there can be.

Peer signs, sends, and matches answers by msg_id; it has one thread, checks nothing and keeps nothing, so that
its own cost is small and the same for every kernel. Subject is the process: started with its own home, looked
at through /proc, ended with its group. All times are in seconds.
"""
import hmac
import json
import os
import select
import signal
import socket
import subprocess
import time
import uuid

import zmq
import zmq.utils.z85

DELIMITER = b"<IDS|MSG>"
CHANNELS = {"shell": zmq.DEALER, "control": zmq.DEALER, "stdin": zmq.DEALER, "iopub": zmq.SUB}
now = time.perf_counter


class MissedError(Exception):
    """A kernel did not do what was to be measured; the text says what."""


class Answer:
    """What came back for one request; the times count from its sending."""

    def __init__(self):
        self.reply = self.reply_at = self.idle_at = self.output_at = None
        self.text = []          # of its streams
        self.outputs = 0        # messages on iopub that are neither a status nor the input

    @property
    def done_at(self):
        return max(self.reply_at, self.idle_at)


class Peer:
    def __init__(self, info):
        self.key = info["key"].encode()
        self.session = uuid.uuid4().hex
        self.sent = 0
        self.context = zmq.Context()
        self.sockets, self.poller = {}, zmq.Poller()
        for channel, kind in CHANNELS.items():
            link = self.context.socket(kind)
            link.linger = 0
            link.rcvhwm = 0             # we lose nothing: what is missing, the kernel lost
            link.reconnect_ivl = 5      # ms; zmq's own 100 would hide most of a quick start
            if "curve" in info:
                link.curve_serverkey, link.curve_publickey, link.curve_secretkey = info["curve"]
            if kind == zmq.SUB:
                link.subscribe(b"")
            else:
                link.identity = self.session.encode()
            separator = ":" if info["transport"] == "tcp" else "-"
            link.connect(f"{info['transport']}://{info['ip']}{separator}{info[channel + '_port']}")
            self.sockets[channel] = link
            self.poller.register(link, zmq.POLLIN)
        self.names = {link: channel for channel, link in self.sockets.items()}

    def close(self):
        for link in self.sockets.values():
            link.close()
        self.context.term()

    def send(self, msg_type, content=None, channel="shell"):
        self.sent += 1
        msg_id = f"{self.session}_{self.sent}"
        header = {"msg_id": msg_id, "session": self.session, "username": "bench", "msg_type": msg_type,
                  "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "version": "5.3"}
        parts = [json.dumps(header).encode(), b"{}", b"{}", json.dumps(content or {}).encode()]
        signature = hmac.digest(self.key, b"".join(parts), "sha256").hex().encode()
        self.sockets[channel].send_multipart([DELIMITER, signature, *parts])
        return msg_id.encode()

    def send_execute(self, code, history=False, silent=False):
        return self.send("execute_request", {"code": code, "silent": silent, "store_history": history,
                                             "user_expressions": {}, "allow_stdin": False, "stop_on_error": True})

    def listen(self, seconds):
        """(channel, msg_type, frames from the header on) of everything that comes; ends after so many seconds."""
        end = now() + seconds
        while (left := end - now()) > 0:
            for link, _ in self.poller.poll(left * 1000):
                frames = link.recv_multipart()
                frames = frames[frames.index(DELIMITER) + 2:]
                yield self.names[link], json.loads(frames[0])["msg_type"], frames

    def follow(self, msg_id, sent_at, seconds=30, idle=True):
        """Until the reply to this request and (idle) its last message on iopub are here."""
        answer = Answer()
        for channel, msg_type, frames in self.listen(seconds):
            if msg_id not in frames[1]:
                continue
            at = now() - sent_at
            if channel != "iopub":
                answer.reply, answer.reply_at = json.loads(frames[3]), at
            elif msg_type == "status":
                if b'"idle"' in frames[3]:
                    answer.idle_at = at
            elif msg_type != "execute_input":
                answer.outputs += 1
                answer.output_at = answer.output_at or at
                if msg_type == "stream":
                    answer.text.append(json.loads(frames[3])["text"])
            if answer.reply_at and (answer.idle_at or not idle):
                return answer
        raise MissedError(f"no {'idle' if answer.reply_at else 'reply'} within {seconds} s")

    def ask(self, msg_type, content=None, channel="shell", seconds=30, idle=False):
        sent_at = now()
        return self.follow(self.send(msg_type, content, channel), sent_at, seconds, idle)

    def execute(self, code, seconds=60, **options):
        sent_at = now()
        return self.follow(self.send_execute(code, **options), sent_at, seconds)

    def wait_ready(self):
        """Until a whole answer arrives, its idle included: then the subscription is in place."""
        for _ in range(100):
            try:
                return self.ask("kernel_info_request", seconds=0.3, idle=True)
            except MissedError:
                continue
        raise MissedError("not ready within 30 s")


class Subject:
    """One kernel of the comparison: a command, and now and then a process of it."""

    def __init__(self, name, argv, folder, transport="tcp"):
        self.name, self.argv, self.folder, self.transport = name, argv, folder, transport
        home = os.path.join(folder, "home-" + name)
        os.makedirs(home, exist_ok=True)
        # PYTHONDONTWRITEBYTECODE would have a kernel that is not installed compiled at every start.
        self.env = {name: value for name, value in os.environ.items()
                    if not name.startswith(("JUPYTER_", "JPY_", "XDG_", "TWOPROC_", "PYTHONDONTWRITEBYTECODE"))}
        self.env.update(HOME=home, IPYTHONDIR=os.path.join(home, "ipython"), JUPYTER_RUNTIME_DIR=home,
                        PYDEVD_DISABLE_FILE_VALIDATION="1")
        self.peer = self.process = None

    def connection(self):
        name = uuid.uuid4().hex[:8]
        if self.transport == "tcp":
            with_ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
            ip, ports = "127.0.0.1", [server.getsockname()[1] for server in with_ports]
            for server in with_ports:
                server.close()
        else:
            ip, ports = os.path.join(self.folder, name), range(1, 6)
        info = {"transport": self.transport, "ip": ip, "key": uuid.uuid4().hex, "signature_scheme": "hmac-sha256"}
        info.update(zip(["shell_port", "iopub_port", "stdin_port", "control_port", "hb_port"], ports))
        path = os.path.join(self.folder, f"kernel-{name}.json")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            json.dump(info, file)
        return info, [word.replace("{connection_file}", path) for word in self.argv]

    def spawn(self, before=lambda peer: None, prefix=()):
        """before: said by the client first, to be answered as soon as there is a kernel.
        prefix: a command that starts the kernel as its own child and prints the pid."""
        self.info, argv = self.connection()
        self.peer = Peer(self.info)
        before(self.peer)
        self.spawned_at = now()
        with open(os.path.join(self.folder, self.name + ".log"), "ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *argv], cwd=self.folder, env={**self.env, "JPY_PARENT_PID": str(os.getpid())},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if prefix else log, stderr=log,
                start_new_session=True)
        self.pid = int(self.process.stdout.readline()) if prefix else self.process.pid

    def start(self):
        self.spawn()
        self.peer.wait_ready()

    def stop(self):
        if self.peer:
            self.peer.close()
        if self.process:
            for pid in {self.pid, self.process.pid}:
                try:
                    os.killpg(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass
            if self.process.stdout:
                self.process.stdout.close()
            self.process.wait()
        self.peer = self.process = None

    def exited_in(self, seconds, action):
        """How long after the action the kernel ends; MissedError when it lives on."""
        pidfd = os.pidfd_open(self.pid)
        try:
            begin = now()
            action()
            if not select.select([pidfd], [], [], seconds)[0]:
                raise MissedError(f"still alive {seconds} s later")
            return now() - begin
        finally:
            os.close(pidfd)

    # -- /proc

    def memory(self):
        return self.status("VmRSS")[0] * 1024

    def threads(self):
        return self.status("Threads")[0]

    def status(self, field, task=""):
        with open(f"/proc/{self.pid}/{task}status") as file:
            return [int(line.split()[1]) for line in file if field in line]

    def switches(self):
        return sum(sum(self.status("ctxt_switches", f"task/{task}/"))
                   for task in os.listdir(f"/proc/{self.pid}/task"))

    def log_size(self):
        """Of the session log, if it is twoproc's: the largest one."""
        folder = os.path.join(self.env["HOME"], ".local", "state", "twoproc", "sessions")
        return max((os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)
                    if name.endswith(".log")), default=0)

    def log(self):
        with open(os.path.join(self.folder, self.name + ".log"), errors="replace") as file:
            return file.read()[-500:]


class Listener(Subject):
    """A kernel of twoproc that listens to other machines, and a client that comes as one of its users: by CURVE."""

    def start(self):
        folder = os.path.join(self.env["HOME"], ".config", "twoproc")
        if not os.path.exists(os.path.join(folder, "host_key")):        # from the round before
            subprocess.run([self.argv[0], "-m", "twoproc.keys", "new", "--host"], env=self.env, cwd=self.folder,
                           check=True, stdout=subprocess.DEVNULL)
        public, secret = zmq.curve_keypair()
        keys = os.path.join(folder, "authorized_keys")
        with open(os.open(keys, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f"run {zmq.utils.z85.decode(public).hex()} bench\n")
        path = os.path.join(self.folder, f"kernel-{uuid.uuid4().hex[:8]}.json")
        argv = [word.replace("{connection_file}", path) for word in self.argv]
        with open(os.path.join(self.folder, self.name + ".log"), "ab") as log:
            self.process = subprocess.Popen(
                [*argv, "--listen", "127.0.0.1", "--set", f"limits.requests_per_second={10**6}"], cwd=self.folder,
                env={**self.env, "JPY_PARENT_PID": str(os.getpid())}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)
        self.pid = self.process.pid
        while not os.path.exists(path):         # its own client says hello for the key; we may read the file
            if self.process.poll() is not None:
                raise MissedError(f"it does not listen: {self.log()}")
            time.sleep(0.01)
        with open(path) as file:
            info = json.load(file)
        first = int(info["twoproc_listen"].rpartition(":")[2])
        channels = ("shell", "iopub", "stdin", "control", "hb")
        self.info = {"transport": "tcp", "ip": "127.0.0.1", "key": info["key"],
                     "curve": (info["curve_publickey"].encode(), public, secret),
                     **{f"{channel}_port": first + at for at, channel in enumerate(channels)}}
        self.peer = Peer(self.info)
        self.peer.wait_ready()
