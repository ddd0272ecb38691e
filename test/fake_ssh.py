# Distributed under the terms of the BSD 3-Clause License.
"""A program that is told apart from ssh by nobody who uses only what ssh.py does: test_ssh.py puts it on PATH.

The far side is this machine.  What is said on the command line must be what ssh understands; what else goes wrong is
in the file `behave` of the folder $FAKE_SSH:

    refused         the user's key is not let in
    changed         the host shows another key than the known one
    password        a question at the terminal, answered by anything
    down            nothing listens there
    chatty          a login script writes to standard output
    no-forwarding   the server's administrator allows none
    no-sockets      the forwards cannot be made on this side
"""
import getopt
import json
import os
import signal
import socket
import subprocess
import sys
import threading

FOLDER = os.environ["FAKE_SSH"]
FLAGS = "Taxo:MS:p:F:O:L:"


def behaves(what):
    with open(os.path.join(FOLDER, "behave")) as file:
        return file.read().strip() == what


def fail(text):
    sys.stderr.write(text + "\n")
    sys.exit(255)


def main():
    options, words = getopt.getopt(sys.argv[1:], FLAGS)
    values = dict(options)
    settings = dict(value.split("=", 1) for option, value in options if option == "-o")
    if values.get("-O") == "forward":
        order(values["-S"], [value for option, value in options if option == "-L"])
    log_in(words[0], settings)
    signal.signal(signal.SIGTERM, lambda *_: end(values["-S"], child))
    # In a session of its own, as behind sshd: only its pipes tell it of our end.
    child = subprocess.Popen(["sh", "-c", " ".join(words[1:])], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, start_new_session=True)
    listen(values["-S"])
    if behaves("chatty"):
        print("Welcome to lab.\nYou have mail.", flush=True)
    pumps = [start(pump, lambda source=source: os.read(source.fileno(), 1 << 16),
                   lambda data, target=target: os.write(target.fileno(), data), target.close)
             for source, target in ((sys.stdin, child.stdin), (child.stdout, sys.stdout), (child.stderr, sys.stderr))]
    status = child.wait()
    for thread in pumps[1:]:
        thread.join()
    os.unlink(values["-S"])
    os._exit(status)


def log_in(host, settings):
    if behaves("down"):
        fail(f"ssh: connect to host {host} port 22: Connection refused")
    if behaves("changed"):
        fail("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.")
    if behaves("password") and settings.get("BatchMode") != "yes":
        with open("/dev/tty", "r+b", buffering=0) as terminal:
            terminal.write(f"{host}'s password: ".encode())
            terminal.readline()
    elif behaves("refused") or behaves("password"):
        fail(f"{host}: Permission denied (publickey,password).")


def end(control, child):
    child.kill()
    os.unlink(control)
    os._exit(255)


def start(function, *arguments):
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def pump(take, give, close):
    try:
        while data := take():
            give(data)
    except OSError:
        pass
    try:
        close()
    except OSError:
        pass


def listen(control):
    """Take orders, as ssh -M does."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(control)
    os.chmod(control, 0o600)
    server.listen()

    def serve():
        while True:
            connection, _ = server.accept()
            for forward in json.loads(connection.makefile().readline()):
                here, _, there = forward.partition(":")
                near = socket.socket(socket.AF_UNIX)
                near.bind(here)
                os.chmod(here, 0o600)
                near.listen()
                start(accept, near, there)
            connection.close()
    start(serve)


def accept(near, there):
    while True:
        here, _ = near.accept()
        try:
            if behaves("no-forwarding"):
                raise OSError("administratively prohibited: open failed")
            if there.startswith("/"):
                far = socket.socket(socket.AF_UNIX)
                far.connect(there)
            else:
                host, _, port = there.rpartition(":")
                far = socket.create_connection((host, int(port)))
        except OSError as error:
            sys.stderr.write(f"channel 2: open failed: {error}\n")
            here.close()
            continue
        for source, target in ((here, far), (far, here)):
            start(pump, lambda source=source: source.recv(1 << 16), target.sendall,
                  lambda target=target: target.shutdown(socket.SHUT_RDWR))


def order(control, forwards):
    """ssh -O forward."""
    if behaves("no-sockets"):
        fail("mux_client_forward: forwarding request failed: unix_listener: cannot bind to path")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(control)
        sock.sendall(json.dumps(forwards).encode() + b"\n")
        sock.recv(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
