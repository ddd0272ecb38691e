# Distributed under the terms of the BSD 3-Clause License.
"""A kernel that listens for other machines, on loopback, and the keys of its users.

    lab = Lab(self, {"alice": "run", "bob": "view"})    # each a right, and what else a line of the file may have
    alice = lab.client("alice")                         # a support.Client by CURVE, that knows no connection file
    lab.authorize({"alice": "run"})                     # bob's line is gone

Port bases are far from the standard one, and a slot that is taken makes the kernel go on to the next: tests that run
side by side do not meet.
"""
import json
import os
import random
import subprocess
import sys

import zmq

from . import support
from twoproc import connection


class Lab:
    def __init__(self, case, users=None, *arguments, start=True, host="127.0.0.1", home=None, command=None):
        self.case, self.host = case, host
        self.home = home or support.Home(case)
        self.folder = os.path.join(self.home.path, "config", "twoproc")
        os.makedirs(self.folder, 0o700, exist_ok=True)
        self.authorized_keys = os.path.join(self.folder, "authorized_keys")
        subprocess.run([sys.executable, "-m", "twoproc.keys", "new", "--host"], env=self.home.env, check=True,
                       stdout=subprocess.DEVNULL, cwd=self.home.work)
        self.pairs = {}
        self.authorize(users or {})
        base = random.randrange(21_000, 30_000, 10)
        self.arguments = ("--listen", host, "--set", f"network.port_base={base}", "--set", "network.port_slots=50",
                          *arguments)
        self.kernel = None
        if start:
            self.start(command)

    def start(self, command=None):
        self.kernel = support.start_kernel(self.case, *self.arguments, home=self.home, command=command)
        return self.kernel

    def pair(self, name):
        """(public, secret) in Z85; made when first asked for."""
        return self.pairs.setdefault(name, zmq.curve_keypair())

    def line(self, name, rights):
        right, *rest = rights.split()
        return " ".join([right, connection.hex_of(self.pair(name)[0]), name, *rest])

    def authorize(self, users, mode=0o600):
        """Write authorized_keys anew, at once and whole."""
        temporary = self.authorized_keys + ".new"
        with open(temporary, "w") as file:
            file.writelines(self.line(name, rights) + "\n" for name, rights in users.items())
        os.chmod(temporary, mode)
        os.replace(temporary, self.authorized_keys)

    @property
    def port(self):
        """The first of the five, shell's."""
        return int(self.kernel.info["twoproc_listen"].rpartition(":")[2])

    @property
    def host_key(self):
        """The public key of the kernel, in Z85."""
        return self.kernel.info["curve_publickey"].encode()

    def socket(self, kind, channel, pair, server_key=None, **options):
        """A socket of one channel, by CURVE with this pair, or in plain with None."""
        socket = zmq.Context.instance().socket(kind)
        support._cleanup(self.case, socket.close, 0)
        socket.linger, socket.sndtimeo, socket.rcvtimeo = 0, 5000, 5000
        for name, value in options.items():
            setattr(socket, name, value)
        if pair is not None:
            socket.curve_serverkey = server_key or self.host_key
            socket.curve_publickey, socket.curve_secretkey = pair
        if kind == zmq.SUB:
            socket.subscribe(b"")
        socket.connect(f"tcp://127.0.0.1:{self.port + connection.CHANNELS.index(channel)}")
        return socket

    def hello(self, name):
        """What the kernel tells this user, who has no connection file."""
        control = self.socket(zmq.DEALER, "control", self.pair(name))
        control.send(b"twoproc_hello")
        return json.loads(control.recv_multipart()[1])

    def client(self, name, case=None, ready=True, **options):
        """A client that comes as this user."""
        public, secret = self.pair(name)
        info = {"transport": "tcp", "ip": "127.0.0.1", "key": self.hello(name)["key"], "curve_publickey":
                self.host_key.decode(), "client_publickey": public.decode(), "client_secretkey": secret.decode(),
                **{f"{channel}_port": self.port + at for at, channel in enumerate(connection.CHANNELS)}}
        client = support.Client(info, kernel=self.kernel, **options)
        support._cleanup(case or self.case, client.close)
        if ready:
            client.wait_ready()
        return client

    def access_log(self):
        path = os.path.join(self.home.path, "state", "twoproc", "access.log")
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
