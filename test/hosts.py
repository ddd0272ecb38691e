# Distributed under the terms of the BSD 3-Clause License.
"""Two hosts on one machine: network namespaces with a cable between them that can be unplugged.

    hosts = Hosts(self)                             # skips the test where the system does not permit it
    hosts.server.run("ip", "address")               # a program there, to its end
    hosts.client.start(self, "python", ...)         # one that goes on: a support.Process
    with hosts.client.inside():                     # this thread is there; what it starts, and its sockets, stay there
        ...
    hosts.unplug(); hosts.plug_in()
    with hosts.server.listening("eth0") as heard:   # every byte that passes that interface

Namespaces are held by processes that end with us, however we end; nothing is left behind.
"""
import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import threading
import unittest

from . import support

ADDRESSES = {"server": "192.0.2.1", "client": "192.0.2.2"}     # a network that is reserved for documentation
NEEDED = ("ip", "unshare", "nsenter")
CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3


class Hosts:
    def __init__(self, case):
        self.server, self.client = Host(case, "server"), Host(case, "client")
        self.server.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns",
                        str(self.client.pid))
        for host in (self.server, self.client):
            host.run("ip", "address", "add", host.address + "/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            host.run("ip", "link", "set", "lo", "up")

    def unplug(self):
        self.client.run("ip", "link", "set", "eth0", "down")

    def plug_in(self):
        self.client.run("ip", "link", "set", "eth0", "up")


class Host:
    """A network namespace, and a home for the programs that run in it."""

    def __init__(self, case, name):
        self.address = ADDRESSES[name]
        self.home = support.Home(case)
        # It ends when its standard input does, at the latest with us.
        holder = support.Process(case, ["unshare", "--net", "sh", "-c", "echo ready; exec cat"], home=self.home,
                                 stdin=subprocess.PIPE)
        support.wait_until(lambda: holder.output() == "ready\n" or not holder.is_alive, what="a network namespace")
        if not holder.is_alive:
            raise unittest.SkipTest("network namespaces are not permitted here: " + holder.log().strip())
        self.pid = holder.pid
        self.prefix = ["nsenter", f"--net=/proc/{self.pid}/ns/net"]

    def run(self, *argv, home=None, **options):
        """Run a program there to its end; what it wrote to standard output."""
        done = subprocess.run([*self.prefix, *argv], env=(home or self.home).env, cwd=(home or self.home).work,
                              capture_output=True, text=True, timeout=support.DEADLINE, **options)
        if done.returncode:
            raise AssertionError(f"{argv}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def python(self, *argv, **options):
        return self.run(sys.executable, "-m", *argv, **options)

    def start(self, case, *argv, home=None, **options):
        return support.Process(case, [*self.prefix, *argv], home=home or self.home, **options)

    @contextlib.contextmanager
    def inside(self):
        """This thread is on that host; a socket stays where it was made, and a thread where it was started."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as here, open(f"/proc/{self.pid}/ns/net") as there:
            if libc.setns(there.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            try:
                yield
            finally:
                if libc.setns(here.fileno(), CLONE_NEWNET):
                    os._exit(70)        # all other tests would run on the wrong host

    @contextlib.contextmanager
    def listening(self, interface):
        """What an eavesdropper hears: a bytearray to which every packet on that interface is appended."""
        with self.inside():
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        tap.bind((interface, 0))
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        tap.settimeout(0.1)
        heard, is_over = bytearray(), threading.Event()

        def listen():
            while True:
                try:
                    heard.extend(tap.recv(1 << 17))
                except TimeoutError:
                    if is_over.is_set():        # nothing was left to hear
                        return
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield heard
        finally:
            is_over.set()
            thread.join()
            tap.close()


def why_not():
    """Why there can be no two hosts here; "" if there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux'"
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing:
        return "not installed: " + ", ".join(missing)
    return "" if os.geteuid() == 0 else "network namespaces need root here"
