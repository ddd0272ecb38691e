# Distributed under the terms of the BSD 3-Clause License.
"""No secret is where it has no business: in a command line, an environment, a log, a history, a traceback.

One home in which everything happens that could tell one, then a search through all that is left there, and through
what the system shows of the processes meanwhile.  The search is shown to find what is not secret in the same places.
"""
import json
import os
import subprocess
import sys
import unittest

import zmq

from twoproc import connection

from . import support, vt
from .lab import Lab

KERNEL = [sys.executable, "-m", "twoproc.kernel"]
FRONTEND = [sys.executable, "-m", "twoproc.frontend"]
# Where secrets are by design; test_files_and_ports shows that these are private.
KEEPERS = ("lab.json", "host_key", "id_key")

FAULT = """import gc
kernel = [found for found in gc.get_objects() if type(found).__name__ == 'Kernel' and hasattr(found, 'channels')][0]
kernel.channels._drain = lambda: 1 / 0"""


class Secrets(unittest.TestCase):

    def setUp(self):
        self.lab = Lab(self, {"alice": "run"}, start=False)
        self.home = self.lab.home
        self.addCleanup(vt.end_kernels, self.home)
        self.secrets = {}       # what it is: bytes
        self.seen = {}          # where: bytes; of processes, which are gone later

    def run_it(self, argv, text=""):
        return subprocess.run(argv, env=self.home.env, cwd=self.home.work, input=text, text=True, capture_output=True,
                              timeout=support.DEADLINE)

    def secret(self, what, value):
        """One to be looked for; a key in both of its spellings.  Answers are found in quotes and escapes as well."""
        self.secrets[what] = value.encode() if isinstance(value, str) else value
        return value

    def secret_key(self, what, z85):
        self.secret(what + ", Z85", z85)
        self.secret(what + ", hex", connection.hex_of(z85.encode() if isinstance(z85, str) else z85))

    def note_connection(self, info):
        self.secret("HMAC key " + info["key"][:4], info["key"])
        if info.get("curve_secretkey"):
            self.secret_key("the kernel's secret key", info["curve_secretkey"])

    def note_processes(self):
        """Command line and environment of all processes of this home, and what ps shows of all."""
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as environ, open(f"/proc/{pid}/cmdline", "rb") as cmdline:
                    found = cmdline.read() + b"\0\0" + environ.read()
            except OSError:
                continue
            if self.home.path.encode() in found:
                self.seen[f"process {pid}"] = found
        try:
            self.seen["ps"] = subprocess.run(["ps", "axeww"], capture_output=True, timeout=support.DEADLINE).stdout
        except FileNotFoundError:
            pass

    def note_files(self):
        for folder, _, names in os.walk(self.home.path):
            for name in names:
                path = os.path.join(folder, name)
                if name not in KEEPERS and path not in self.connection_files and os.path.isfile(path):
                    with open(path, "rb") as file:
                        self.seen[os.path.relpath(path, self.home.path)] = file.read()

    def places(self, wanted):
        return sorted(place for place, content in self.seen.items() if wanted in content)

    def ask(self, client, answer):
        """A cell that asks for a password and for a line, and one that fails."""
        client.execute("import getpass\nn = len(getpass.getpass('the word? '))",
                       answers=[self.secret(f"what was typed for {answer}", f"{answer} says sesame")])
        client.execute("n = len(input('a line? '))",
                       answers=[self.secret(f"line for {answer}", f"{answer} types a line")])
        client.execute("print('a mark of a cell')\n1 / 0")
        self.assertEqual(client.execute("%connect_info").status, "ok")

    def test_none_is_in_what_processes_show_and_leave(self):
        # A kernel of a frontend's own, asked on a terminal; then it dies.
        terminal = vt.Terminal(self, [*FRONTEND, "--name", "lab"], self.home, {"USER": "alice"})
        terminal.prompt(1)
        path = os.path.join(self.home.run, "kernels", "lab.json")
        support.wait_until(lambda: os.path.exists(path), what="the terminal's kernel")
        with open(path) as file:
            self.note_connection(json.load(file))
        terminal.send("import getpass; n = len(getpass.getpass('the word? '))\r")
        terminal.wait(lambda lines: lines[-1].startswith("the word?"))
        terminal.send(self.secret("what was typed on the terminal", "typed blindly") + "\r")
        terminal.prompt(2)
        # One on the ports of this machine; strangers try it, and a fault of its own ends it.
        local = support.start_kernel(self, "--transport", "tcp", home=self.home)
        self.note_connection(local.info)
        client = local.client(self)
        self.ask(client, "the first")
        for channel in ("shell", "control", "stdin"):
            client.send_frames(channel, client.frames(client.header("execute_request"), {"code": "1"}, key=b"wrong"))
            client.send_frames(channel, client.frames(client.header("execute_request"), [client.info["iopub_port"]]))
        # One that other machines reach: a guest, a stranger, and the frontend of a user.
        listening = self.lab.start()
        self.connection_files = {local.connection_file, listening.connection_file}
        self.note_connection(listening.info)
        self.secret_key("alice's secret key", self.lab.pair("alice")[1])
        guest = self.lab.client("alice")
        self.ask(guest, "the guest")
        stranger = self.lab.socket(zmq.DEALER, "control", zmq.curve_keypair())
        stranger.send(b"twoproc_hello")
        made = self.run_it([sys.executable, "-m", "twoproc.keys", "new", "--name", "carol"])
        self.run_it([sys.executable, "-m", "twoproc.keys", "authorize", made.stdout.strip().splitlines()[-1], "--run"])
        with open(os.path.join(self.lab.folder, "id_key")) as file:
            secret = next(line.split()[1] for line in file if line.startswith("secret "))
        self.secret("carol's secret key, hex", secret)
        self.secret("carol's secret key, Z85", connection.z85_of(secret))
        address = f"twoproc://127.0.0.1:{self.lab.port}/{connection.hex_of(self.lab.host_key)}"
        answer = self.secret("what was typed far away", "far far away")
        code = "n = len(input('far? ')); print(n, 'a mark from afar')"
        remote = self.run_it([*FRONTEND, "--connect", address, "-c", code], answer + "\n")
        self.assertEqual(remote.stdout, f"far? {len(answer)} a mark from afar\n", remote.stderr)
        for command in ("show", "list", "fingerprint"):
            self.seen[command] = self.run_it([sys.executable, "-m", "twoproc.keys", command]).stdout.encode()
        # A connection file that is malformed in its keys, and one that is none.
        key = local.info["key"]
        for wrong in ({**local.info, "curve_secretkey": secret, "hb_port": 0}, {**local.info, "key": [key]}):
            path = os.path.join(self.home.run, "wrong.json")
            with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
                json.dump(wrong, file)
            for argv in (KERNEL + ["-f", path], FRONTEND + ["--existing", path, "-c", "1"]):
                done = self.run_it(argv)
                self.seen[f"refusal {len(self.seen)}"] = (done.stdout + done.stderr).encode()
            os.unlink(path)
        self.note_processes()
        # And the ends: by a fault of ours with a traceback, by a signal, by a death that a terminal tells of.
        client.send_execute(FAULT)
        self.assertEqual(local.wait(), 70, local.log())
        guest.send_execute("import ctypes; ctypes.string_at(0)")
        listening.wait()
        terminal.send("import os; os._exit(3)\r")
        terminal.wait("died")
        self.seen["the terminal"] = "\n".join(terminal.screen.all_lines()).encode()
        self.note_files()
        # What is not secret is found where it belongs, by the same search.
        alice = connection.hex_of(self.lab.pair("alice")[0]).encode()
        for mark, where in ((b"a mark of a cell", ".log"), (b"a mark from afar", ".log"), (b"the word?", ".log"),
                            (b"the word?", "the terminal"), (b"the word?", "twoproc/history"),
                            (b"import getpass", "history.sqlite"), (b"ZeroDivisionError", "err-"),
                            (b'"accept"', "access.log"), (b'"refuse"', "access.log"), (b"alice", "access.log"),
                            (b"twoproc.kernel", "process"), (alice, "authorized_keys")):
            found = self.places(mark)
            self.assertTrue(any(where in place for place in found), f"{mark} in {where}: {found}")
        self.assertGreaterEqual(len([place for place in self.seen if place.startswith("process")]), 4)
        self.assertGreater(len(self.secrets), 12)
        for what, secret in self.secrets.items():
            self.assertEqual(self.places(secret), [], what)


if __name__ == "__main__":
    unittest.main()
