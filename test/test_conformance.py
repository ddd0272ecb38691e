# Distributed under the terms of the BSD 3-Clause License.
"""The rest of the Jupyter world drives this kernel, and this client and frontend drive other kernels.

Stock software in both directions, installed as its users install it: kernelspecs below a prefix of their
own, found through JUPYTER_PATH. Each part is skipped with a reason where its other half is not installed.
"""
import contextlib
import asyncio
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import zmq

from . import support

IS_INSTALLED = {name: importlib.util.find_spec(name) is not None
                for name in ("jupyter_client", "jupyter_kernel_test", "nbclient", "ipykernel", "bash_kernel")}
TIMEOUT = 30
PNG = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def needs(*names):
    missing = [name for name in names if not IS_INSTALLED[name]]
    return unittest.skipIf(missing, f"not installed: {', '.join(missing)}")


class InstalledCase(unittest.TestCase):
    """A folder with the kernelspecs of twoproc, ipykernel and bash_kernel, and an environment that finds them."""
    SPECS = ("twoproc",)

    @classmethod
    def setUpClass(cls):
        cls.home = support.Home(cls)
        prefix = os.path.join(cls.home.path, "prefix")
        cls.home.env["JUPYTER_PATH"] = os.path.join(prefix, "share", "jupyter")
        # On a busy machine jedi's first look takes longer than a completion may, and the matches are compared.
        cls.home.env["TWOPROC_KERNEL_COMPLETION_SECONDS"] = "60"
        commands = {
            "twoproc": ("-m", "twoproc.kernel", "--install-kernelspec", "--prefix", prefix),
            "ipykernel": ("-m", "ipykernel", "install", "--prefix", prefix, "--name", "ipykernel"),
            "bash_kernel": ("-m", "bash_kernel.install", "--prefix", prefix),
        }
        for name in cls.SPECS:
            subprocess.run([sys.executable, *commands[name]], env=cls.home.env, cwd=cls.home.work, check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
        # jupyter_client reads the environment of its own process, which is this one.
        environment = mock.patch.dict(os.environ, cls.home.env)
        environment.start()
        cls.addClassCleanup(environment.stop)
        super().setUpClass()


if IS_INSTALLED["jupyter_kernel_test"]:
    import jupyter_kernel_test

    @needs("jupyter_client")
    class KernelTests(InstalledCase, jupyter_kernel_test.KernelTests):
        """jupyter_kernel_test, with every capability it knows."""
        kernel_name = "twoproc"
        language_name = "python"
        file_extension = ".py"
        code_hello_world = "print('hello, world')"
        code_stderr = "import sys; print('test', file=sys.stderr)"
        completion_samples = [{"text": "zi", "matches": {"zip"}}, {"text": "import thread", "matches": {"threading"}},
                              {"text": "prin", "matches": {"print"}}]
        complete_code_samples = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n"]
        incomplete_code_samples = ["print('''hello", "def f(x):\n  x*2", "for i in range(3):"]
        invalid_code_samples = ["import = 7q", "x y z"]
        code_page_something = "zip?"
        code_generate_error = "raise ValueError"
        code_execute_result = [{"code": "1+2+3", "result": "6"},
                               {"code": "[n*n for n in range(1, 4)]", "result": "[1, 4, 9]"}]
        code_display_data = [
            {"code": "from IPython.display import *; display(HTML('<b>test</b>'))", "mime": "text/html"},
            {"code": "from IPython.display import *; display(Math('1/2'))", "mime": "text/latex"},
            {"code": f"import base64; from IPython.display import *; display(Image(base64.b64decode('{PNG}')))",
             "mime": "image/png"}]
        code_history_pattern = "1?2*"
        supported_history_operations = ("tail", "range", "search")
        code_inspect_sample = "zip"
        code_clear_output = "from IPython.display import clear_output; clear_output()"

    class KernelTestsWithCurve(KernelTests):
        """The same where the manager wants encryption: each side shows the key pair of the connection file."""

        @classmethod
        def setUpClass(cls):
            def start(kernel_name):
                from jupyter_client.manager import KernelManager
                if not KernelManager.has_trait(KernelManager(), "transport_encryption"):
                    raise unittest.SkipTest("this jupyter_client has no transport_encryption")
                manager = KernelManager(kernel_name=kernel_name, transport_encryption="required")
                manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                client = manager.client()
                client.start_channels()
                client.wait_for_ready(timeout=TIMEOUT)
                return manager, client
            with mock.patch.object(jupyter_kernel_test, "start_new_kernel", start):
                super().setUpClass()

        def test_nothing_of_it_travels_in_clear(self):
            self.assertEqual(self.kc.shell_channel.socket.mechanism, zmq.CURVE)
            info = self.km.get_connection_info()
            plain = {name: value for name, value in info.items() if not name.startswith("curve")}
            client = support.Client({**plain, "key": plain["key"].decode()}, options=((zmq.SNDTIMEO, 500),))
            self.addCleanup(client.close)
            with contextlib.suppress(zmq.Again):        # ZeroMQ may have given up the connection already
                client.send("shell", "kernel_info_request")
            self.assertTrue(client.is_silent("shell", 0.5), "a client without the keys was answered")

    @needs("jupyter_client")
    class IopubWelcome(InstalledCase, jupyter_kernel_test.IopubWelcomeTests):
        kernel_name = "twoproc"
        support_iopub_welcome = True

else:
    class KernelTests(unittest.TestCase):
        @unittest.skip("not installed: jupyter_kernel_test")
        def test_every_capability(self):
            pass


TRANSPORTS = {
    "tcp": {"transport": "tcp"},
    "ipc": {"transport": "ipc"},
    "tcp with CURVE": {"transport": "tcp", "transport_encryption": "required"},
    "ipc with CURVE": {"transport": "ipc", "transport_encryption": "required"},
}


@needs("jupyter_client")
class StockClients(InstalledCase):
    """KernelManager and its two clients: start, run, ask, interrupt, restart, shut down."""

    def manager(self, class_name, options):
        from jupyter_client import manager
        if options["transport"] == "ipc":       # else it puts its sockets into the current directory
            folder = tempfile.mkdtemp(prefix="tp-")
            self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
            options = {**options, "ip": os.path.join(folder, "kernel")}
        return getattr(manager, class_name)(kernel_name="twoproc", **options)

    def test_the_kernelspec_says_what_is_true(self):
        from jupyter_client.kernelspec import KernelSpecManager
        spec = KernelSpecManager().get_kernel_spec("twoproc")
        self.assertEqual(spec.language, "python")
        self.assertEqual(spec.interrupt_mode, "message")
        self.assertEqual(spec.metadata["supported_encryption"], ["curve"])
        self.assertFalse(spec.metadata.get("debugger"))

    def test_the_blocking_client_does_everything(self):
        for name, options in TRANSPORTS.items():
            with self.subTest(name):
                self.drive_blocking(self.manager("KernelManager", options))

    def drive_blocking(self, manager):
        manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(manager.shutdown_kernel, now=True)
        client = manager.client()
        client.start_channels()
        self.addCleanup(client.stop_channels)
        client.wait_for_ready(timeout=TIMEOUT)
        self.assertEqual(self.run_cell(client, "print(6 * 7)"), ("ok", "42\n"))
        answers = iter(["Ada"])
        self.assertEqual(self.run_cell(client, "print('hello', input('name? '))", allow_stdin=True,
                                       stdin_hook=lambda question: client.input(next(answers))), ("ok", "hello Ada\n"))
        self.assertIn("print", client.complete("prin", reply=True, timeout=TIMEOUT)["content"]["matches"])
        self.assertTrue(client.inspect("zip", reply=True, timeout=TIMEOUT)["content"]["found"])
        msg_id = client.is_complete("if 1:")
        self.assertEqual(self.shell_reply(client, msg_id)["content"]["status"], "incomplete")
        self.assertTrue(client.history(hist_access_type="tail", n=1, reply=True, timeout=TIMEOUT)["content"]["history"])
        self.assertEqual(client.comm_info(reply=True, timeout=TIMEOUT)["content"]["comms"], {})
        self.assertTrue(client.is_alive())

        msg_id = client.execute("import time; print('now'); time.sleep(60)")
        self.wait_for(client.get_iopub_msg, lambda message: "now" in message["content"].get("text", ""))
        manager.interrupt_kernel()
        self.assertEqual(self.shell_reply(client, msg_id)["content"]["ename"], "KeyboardInterrupt")

        client.execute("x = 5", reply=True, timeout=TIMEOUT)
        manager.restart_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client.wait_for_ready(timeout=TIMEOUT)
        self.assertEqual(self.run_cell(client, "print('x' in dir())"), ("ok", "False\n"))

        manager.shutdown_kernel()
        self.assertFalse(manager.is_alive())

    def run_cell(self, client, code, **options):
        text = []

        def output(message):
            if message["msg_type"] == "stream":
                text.append(message["content"]["text"])
        reply = client.execute_interactive(code, output_hook=output, timeout=TIMEOUT, **options)
        return reply["content"]["status"], "".join(text)

    def shell_reply(self, client, msg_id):
        return self.wait_for(client.get_shell_msg, lambda message: message["parent_header"].get("msg_id") == msg_id)

    def wait_for(self, get, is_wanted):
        while True:
            message = get(timeout=TIMEOUT)
            if is_wanted(message):
                return message

    def test_the_asynchronous_client_does_everything(self):
        for name, options in TRANSPORTS.items():
            with self.subTest(name):
                drive = self.drive_async(self.manager("AsyncKernelManager", options))
                asyncio.run(asyncio.wait_for(drive, 4 * TIMEOUT))

    async def drive_async(self, manager):
        await manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = manager.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=TIMEOUT)
            reply = await client.execute("6 * 7", reply=True, timeout=TIMEOUT)
            self.assertEqual(reply["content"]["status"], "ok")
            msg_id = client.execute("import time; time.sleep(60)")
            while (await client.get_iopub_msg(timeout=TIMEOUT))["parent_header"].get("msg_id") != msg_id:
                pass
            while (await client.get_iopub_msg(timeout=TIMEOUT))["msg_type"] != "execute_input":
                pass
            await manager.interrupt_kernel()
            while (reply := await client.get_shell_msg(timeout=TIMEOUT))["parent_header"]["msg_id"] != msg_id:
                pass
            self.assertEqual(reply["content"]["ename"], "KeyboardInterrupt")
            await manager.restart_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            await client.wait_for_ready(timeout=TIMEOUT)
            reply = await client.execute("1 + 1", reply=True, timeout=TIMEOUT)
            self.assertEqual(reply["content"]["execution_count"], 1)
        finally:
            client.stop_channels()
            await manager.shutdown_kernel()
        self.assertFalse(await manager.is_alive())

    def test_nothing_is_left_in_the_runtime_folder(self):
        before = set(os.listdir(self.home.run))
        self.drive_blocking(self.manager("KernelManager", {"transport": "ipc"}))
        self.assertEqual(set(os.listdir(self.home.run)) - before, set())

    def test_jupyter_run_runs_a_script(self):
        script = os.path.join(self.home.work, "script.py")
        with open(script, "w") as file:
            file.write("import sys\nprint('from', type(get_ipython().kernel).__module__)\n"
                       "print('problem', file=sys.stderr)\n")
        process = support.Process(self, [sys.executable, "-m", "jupyter_client.runapp", "--kernel=twoproc", script],
                                  home=self.home)
        self.assertEqual(process.wait(2 * TIMEOUT), 0, process.log())
        self.assertIn("from twoproc.", process.output())
        self.assertIn("problem", process.log())

    @needs("nbclient")
    def test_nbclient_executes_a_notebook(self):
        import nbclient
        import nbformat
        cells = ["import asyncio\nx = await asyncio.sleep(0.01, 20)", "print('x is', x)\nx + 1", "1 / 0",
                 "from IPython.display import HTML\nHTML('<b>x</b>')"]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
        manager = self.manager("AsyncKernelManager", {"transport": "ipc"})
        nbclient.NotebookClient(notebook, km=manager, timeout=TIMEOUT, allow_errors=True).execute()
        outputs = [cell["outputs"] for cell in notebook["cells"]]
        self.assertEqual(outputs[0], [])
        self.assertEqual(outputs[1][0]["text"], "x is 20\n")
        self.assertEqual(outputs[1][1]["data"]["text/plain"], "21")
        self.assertEqual(outputs[2][0]["ename"], "ZeroDivisionError")
        self.assertEqual(outputs[3][0]["data"]["text/html"], "<b>x</b>")
        self.assertEqual([cell["execution_count"] for cell in notebook["cells"]], [1, 2, 3, 4])


class OtherKernels(InstalledCase):
    """Our client and our frontend in front of kernels that are not ours."""

    OTHERS = {      # kernel: (cell, its output, a cell that fails, a cell that can be interrupted)
        # A loop: an interrupt between a print and a sleep is one that ipykernel may see only after the sleep.
        "ipykernel": ("print(6 * 7)", "42\n", "1 / 0", "print('now', flush=True)\nwhile True: pass"),
        # One process says `now` and sleeps: between two commands of its own bash forgets a Ctrl-C (31 of 300 with
        # nothing but a terminal before it), and its kernel passes on the first one of a cell only.
        "bash": ("echo $((6 * 7))", "42\n", "false", "sh -c 'echo now; exec sleep 60'"),
    }
    SPECS = tuple(name for name in ("ipykernel", "bash_kernel") if IS_INSTALLED[name])

    def kernels(self):
        for name, spec in (("ipykernel", "ipykernel"), ("bash", "bash_kernel")):
            if spec in self.SPECS:
                yield name, *self.OTHERS[name]
        if len(self.SPECS) < 2:
            self.skipTest("ipykernel or bash_kernel is not installed")

    def test_our_client_drives_them(self):
        from twoproc import launcher
        for name, *cells in self.kernels():
            with self.subTest(name):
                process = launcher.launch(name)
                self.addCleanup(process.kill)
                self.drive(process, *cells)
                process.shutdown()
                self.assertFalse(process.is_alive)

    def drive(self, process, cell, output, failing, long):
        from twoproc import client
        text = []

        def note(message):
            text.append(message.content.get("text", ""))
            if "now" in text[-1]:
                kernel.interrupt()
        with client.connect(process, timeout=TIMEOUT) as kernel:
            reply = kernel.execute(cell, timeout=TIMEOUT, on_output=note)
            self.assertEqual(reply.content["status"], "ok")
            self.assertEqual("".join(text), output)
            self.assertEqual(kernel.execute(failing, timeout=TIMEOUT).content["status"], "error")
            self.assertTrue(kernel.kernel_info(timeout=TIMEOUT).content["language_info"]["name"])
            status = kernel.execute(long, timeout=TIMEOUT, on_output=note).content["status"]
            self.assertIn(status, ("error", "abort", "aborted"))
            self.assertEqual(kernel.execute(cell, timeout=TIMEOUT).content["status"], "ok")

    def test_our_frontend_drives_them(self):
        for name, cell, output, failing, _ in self.kernels():
            with self.subTest(name):
                process = self.frontend(name, cell)
                self.assertEqual(process.wait(2 * TIMEOUT), 0, process.log())
                self.assertEqual(process.output(), output)
                self.assertNotEqual(self.frontend(name, failing).wait(2 * TIMEOUT), 0)

    def frontend(self, kernel, code):
        return support.Process(self, [sys.executable, "-m", "twoproc.frontend", "--kernel", kernel, "-c", code],
                               home=self.home)

    def test_our_frontend_lists_them_in_its_error(self):
        process = self.frontend("nothing-like-it", "1")
        self.assertNotEqual(process.wait(2 * TIMEOUT), 0)
        self.assertIn("bash", process.log())
        self.assertNotIn("Traceback", process.log())


class RawConnectionFiles(unittest.TestCase):
    """Connection files as managers write them, spoken to without jupyter_client."""

    def connection(self, **members):
        return {"shell_port": 0, "iopub_port": 0, "stdin_port": 0, "control_port": 0, "hb_port": 0, "ip": "127.0.0.1",
                "key": "a0436f6c-1916", "transport": "tcp", "signature_scheme": "hmac-sha256", "kernel_name": "x",
                **members}

    def check(self, connection, **options):
        kernel = support.start_kernel(self, connection=connection, **options)
        client = kernel.client()
        self.assertEqual(client.execute("1+1").value, "2")
        client.sockets["hb"].send(b"ping")
        self.assertEqual(client.take("hb"), [b"ping"])
        return kernel

    def test_ports_of_zero_are_filled_in(self):
        kernel = self.check(self.connection())
        self.assertEqual(kernel.info["key"], "a0436f6c-1916")
        self.assertEqual(kernel.info["kernel_name"], "x")

    def test_curve_keys_are_used(self):
        public, secret = zmq.curve_keypair()
        kernel = self.check(self.connection(curve_publickey=public.decode(), curve_secretkey=secret.decode()))
        plain = {name: value for name, value in kernel.info.items() if not name.startswith("curve")}
        client = support.Client(plain)
        self.addCleanup(client.close)
        client.send("shell", "kernel_info_request")
        self.assertTrue(client.is_silent("shell", 0.5), "a client without the keys was answered")

    def test_ipc_with_a_path_of_the_managers(self):
        home = support.Home(self)
        path = os.path.join(home.run, "kernel-ipc")
        ports = {f"{channel}_port": number for number, channel in enumerate(support.CHANNELS, 1)}
        self.check(self.connection(transport="ipc", ip=path, **ports), home=home)

    def test_an_empty_key_on_this_machine_is_served_unsigned(self):
        kernel = self.check(self.connection(key=""))
        self.assertEqual(kernel.log().count("key"), 1, kernel.log())

    def test_another_hash_is_obeyed(self):
        with mock.patch.object(support, "sign", sign_sha512):
            self.check(self.connection(signature_scheme="hmac-sha512"))


def sign_sha512(key, parts):
    import hmac
    return hmac.new(key, b"".join(parts), "sha512").hexdigest().encode()


if __name__ == "__main__":
    unittest.main()
