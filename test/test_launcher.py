# Distributed under the terms of the BSD 3-Clause License.
"""The launcher: real kernel processes, ours and (where installed) Jupyter's, started, interrupted, ended."""
import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import unittest
from unittest import mock

from twoproc import connection
from twoproc.client import KernelDied, connect
from twoproc.launcher import (KernelProcess, LaunchError, find_kernelspec, install_kernelspec, kernelspec_folders,
                              launch, list_kernelspecs)

from . import support

HAS_IPYKERNEL = importlib.util.find_spec("ipykernel") is not None
HAS_BASH_KERNEL = importlib.util.find_spec("bash_kernel") is not None
IPYKERNEL = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]


class LauncherCase(unittest.TestCase):
    """Each test in a home of its own; kernels that a test leaves are killed."""

    def setUp(self):
        self.home = support.Home(self)
        patch = mock.patch.dict(os.environ, self.home.env, clear=True)
        patch.start()
        self.addCleanup(patch.stop)

    def launch(self, *arguments, **options):
        options.setdefault("cwd", self.home.work)
        process = launch(*arguments, **options)
        self.addCleanup(process.shutdown)
        self.addCleanup(process.kill)       # runs first
        return process

    def connect(self, process):
        client = connect(process)
        self.addCleanup(client.close)
        return client

    def value(self, client, expression):
        reply = client.execute("", user_expressions={"value": expression}, timeout=support.DEADLINE)
        return reply.content["user_expressions"]["value"]["data"]["text/plain"]

    def files(self):
        """What lies in the runtime folders, ours and Jupyter's."""
        return sorted(name for _, _, names in os.walk(self.home.run) for name in names)


class Starting(LauncherCase):

    def test_a_kernel_of_ours_is_ready_to_connect_when_launch_returns(self):
        process = self.launch()
        info = connection.read_connection_file(process.connection_file)
        self.assertEqual(info.extra["twoproc_pid"], process.pid)
        self.assertEqual(info.transport, "ipc")
        self.assertEqual(self.value(connect_later(self, process), "6 * 7"), "42")

    def test_it_has_a_session_of_its_own_nothing_to_read_and_a_private_log(self):
        process = self.launch()
        self.assertEqual(os.getsid(process.pid), process.pid)
        self.assertNotEqual(os.getsid(process.pid), os.getsid(0))
        self.assertEqual(os.readlink(f"/proc/{process.pid}/fd/0") if os.path.isdir("/proc/self/fd") else "/dev/null",
                         "/dev/null")
        self.assertEqual(stat.S_IMODE(os.stat(process.log_file).st_mode), 0o600)
        self.assertEqual(os.path.dirname(process.log_file), os.path.dirname(process.connection_file))

    def test_name_folder_environment_transport_and_arguments_arrive(self):
        process = self.launch(name="mine", transport="tcp", env={"COLOUR": "blue"}, cwd=self.home.path)
        self.assertEqual(os.path.basename(process.connection_file), "mine.json")
        self.assertEqual(connection.read_connection_file(process.connection_file).transport, "tcp")
        client = self.connect(process)
        self.assertEqual(self.value(client, "__import__('os').environ['COLOUR']"), "'blue'")
        self.assertEqual(self.value(client, "__import__('os').getcwd()"), repr(self.home.path))

    def test_a_name_in_use_is_refused_and_the_first_kernel_unharmed(self):
        process = self.launch(name="taken")
        with self.assertRaises(connection.ConnectionFileError) as caught:
            launch(name="taken")
        self.assertEqual(caught.exception.exit_code, 3)
        self.assertEqual(self.value(self.connect(process), "1"), "1")

    def test_a_kernel_that_does_not_start_says_why_with_status_and_last_lines(self):
        with self.assertRaises(LaunchError) as caught:
            launch(arguments=["--transport", "pigeon"])
        self.assertRegex(str(caught.exception), r"did not start: exit status 2\n(.*\n)*.*pigeon")
        self.assertEqual(caught.exception.exit_code, 2)
        self.assertEqual(self.files(), [])

    def test_a_kernel_that_writes_no_file_is_given_up_in_time(self):
        process = KernelProcess(cwd=self.home.work)
        process.spec = process.spec._replace(argv=(sys.executable, "-c", "import time; time.sleep(60)"))
        with self.assertRaisesRegex(LaunchError, "no connection file within 0.2 s"):
            process.start(0.2)
        self.assertFalse(process.is_alive)

    def test_ctrl_c_while_it_starts_leaves_no_kernel_and_no_file(self):
        process = KernelProcess(keep=True)
        self.addCleanup(process.kill)
        answers = [KeyboardInterrupt, connection.ConnectionFileError("gone"), connection.ConnectionFileError("gone")]
        with mock.patch("twoproc.connection.read_connection_file", side_effect=answers):
            with self.assertRaises(KeyboardInterrupt):
                process.start()
        self.assertEqual((process.is_alive, process.cause()), (False, "SIGKILL from its launcher"))
        self.assertEqual(self.files(), [])

    def test_a_command_that_cannot_be_started_leaves_no_file_and_may_be_tried_again(self):
        process = KernelProcess(argv=[sys.executable, "\0"])
        for _ in range(2):
            with self.assertRaises(LaunchError):
                process.start()
        self.assertEqual((process.is_alive, self.files()), (False, []))

    def test_a_command_that_does_not_exist_is_named(self):
        with self.assertRaisesRegex(LaunchError, "cannot start /no/such/program: No such file"):
            launch(argv=["/no/such/program", "{connection_file}"])
        self.assertEqual(self.files(), [])

    def test_the_package_is_found_by_a_child_that_has_it_on_no_path(self):
        # As a vendored copy would be: only this process knows where it lies.
        with mock.patch.dict(os.environ):
            del os.environ["PYTHONPATH"]
            process = self.launch()
            client = self.connect(process)
            self.assertEqual(self.value(client, "'PYTHONPATH' in __import__('os').environ"), "False")

    def test_a_kernel_that_shall_not_outlive_us_dies_with_us(self):
        for keep in (False, True):
            with self.subTest(keep=keep):
                code = (f"import os, sys\nfrom twoproc.launcher import launch\np = launch(keep={keep})\n"
                        "print(p.pid, p.connection_file, flush=True)\nos.kill(os.getpid(), 9)")
                done = subprocess.run([sys.executable, "-c", code], cwd=self.home.work, stdout=subprocess.PIPE,
                                      text=True, timeout=support.DEADLINE)
                pid, path = done.stdout.split()
                pid = int(pid)
                if keep:
                    with connect(path, support.DEADLINE) as client:
                        self.assertEqual(self.value(client, "1"), "1")
                        client.shutdown()
                support.wait_until(lambda pid=pid: not is_running(pid), what=f"the end of process {pid}")

    def test_eight_kernels_at_once_all_work(self):
        results = []

        def one():
            with launch(cwd=self.home.work) as process, connect(process) as client:
                try:
                    results.append(self.value(client, "2"))
                except KernelDied as error:
                    results.append(f"{error}: {process.last_words(50)}")
        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual(results, ["2"] * 8)
        self.assertEqual(self.files(), [])


class Ending(LauncherCase):

    def test_a_shutdown_leaves_nothing_behind(self):
        process = self.launch()
        threads = threading.active_count()
        self.assertEqual(process.shutdown(support.DEADLINE), "shut down")
        self.assertEqual((process.returncode, process.is_alive, process.wait(0)), (0, False, 0))
        self.assertEqual(self.files(), [])
        support.wait_until(lambda: threading.active_count() < threads, what="the end of our thread")
        with self.assertRaises(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)     # no zombie

    def test_a_busy_kernel_ends_as_well_and_its_children_with_it(self):
        process = self.launch()
        client = self.connect(process)
        begun = threading.Event()
        pids = []

        def look(message):
            if message.msg_type == "stream":
                pids.extend(map(int, message.content["text"].split()))
                begun.set()
        client.listen(look)
        client.execute_nowait(
            "import subprocess, time\n"
            "child = subprocess.Popen(['sh', '-c', 'trap \"\" INT TERM; sleep 1000 & wait; sleep 1000'])\n"
            "spared = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
            "print(f'{child.pid} {spared.pid}', flush=True)\ntime.sleep(1000)")       # in one piece
        self.assertTrue(begun.wait(support.DEADLINE))
        self.addCleanup(os.kill, pids[1], signal.SIGKILL)
        start = time.monotonic()
        self.assertEqual(process.shutdown(support.DEADLINE), "shut down")
        self.assertLess(time.monotonic() - start, support.at_most(3))
        support.wait_until(lambda: not is_running(pids[0]), what="the end of the child")
        self.assertTrue(is_running(pids[1]))

    def test_a_kernel_that_does_not_listen_is_told_by_signals(self):
        process = self.launch()
        process._signal(signal.SIGSTOP)
        self.addCleanup(process._signal, signal.SIGCONT)
        with mock.patch("twoproc.launcher.TERM_SECONDS", 0.2):
            self.assertEqual(process.shutdown(0.2), "SIGKILL from its launcher")
        self.assertEqual(self.files(), [])

    def test_the_cause_of_an_end_has_a_name(self):
        for code, cause in (("__import__('os')._exit(3)", "exit status 3"),
                            ("__import__('os').kill(__import__('os').getpid(), 11)", "SIGSEGV"),
                            ("__import__('os').abort()", "SIGABRT"),
                            ("__import__('os').kill(__import__('os').getpid(), 9)",
                             "SIGKILL from outside (kill -9 or out of memory)")):
            with self.subTest(cause=cause):
                process = self.launch()
                heard = []
                process.on_death(heard.append)
                with connect(process) as client:
                    with self.assertRaises(KernelDied) as caught:
                        client.execute(code, timeout=support.DEADLINE)
                    self.assertEqual(caught.exception.cause, cause)
                process.wait(support.DEADLINE)
                self.assertEqual((process.cause(), heard), (cause, [cause]))
                late = []
                process.on_death(late.append)
                self.assertEqual(late, [cause])

    def test_a_crashed_kernel_keeps_its_log_until_it_is_restarted_or_given_up(self):
        process = self.launch()
        with connect(process) as client, self.assertRaises(KernelDied):
            client.execute("import os, faulthandler\nos.write(2, b'')\nos.kill(os.getpid(), 11)", timeout=20)
        process.wait(support.DEADLINE)
        self.assertTrue(os.path.exists(process.log_file))
        process.shutdown()
        self.assertEqual(self.files(), [])

    def test_ending_a_kernel_long_dead_spares_a_group_that_has_its_number_by_now(self):
        process = self.launch()
        process.kill()
        other = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        self.addCleanup(other.wait)
        self.addCleanup(other.kill)
        with mock.patch.object(process.process, "pid", other.pid):
            process.shutdown()
        other.send_signal(signal.SIGINT)        # what would have ended it before is told apart from this
        self.assertEqual(other.wait(support.DEADLINE), -signal.SIGINT)

    def test_last_words_are_the_end_of_the_log(self):
        process = self.launch(argv=[sys.executable, "-c", "print('one'); print('two'); raise SystemExit(4)"])
        self.assertEqual(process.wait(support.DEADLINE), 4)
        self.assertEqual(process.last_words(1), ["two"])

    def test_kill_ends_it_at_once(self):
        process = self.launch()
        process.kill()
        self.assertEqual(process.cause(), "SIGKILL from its launcher")

    def test_interrupting_and_ending_need_no_client_of_the_caller(self):
        process = self.launch()
        client = self.connect(process)
        pending = client.execute_nowait("import time\nprint(1, flush=True)\ntime.sleep(60)")
        begun = threading.Event()
        client.listen(lambda message: message.msg_type == "stream" and begun.set())
        begun.wait(1)
        support.wait_until(lambda: pending._inbox and pending._inbox[-1][1].msg_type == "stream")
        process.interrupt()
        self.assertEqual(pending.wait(support.DEADLINE).content["ename"], "KeyboardInterrupt")


    @unittest.skipUnless(hasattr(signal, "pthread_sigmask"), "needs signal masks")
    def test_a_kernel_started_by_a_thread_that_blocks_sigint_can_be_interrupted(self):
        started = []

        def start():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            started.append(self.launch())
            started.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        thread = threading.Thread(target=start)
        thread.start()
        thread.join(support.DEADLINE)
        client = self.connect(started[0])
        self.assertIn(signal.SIGINT, started[1])
        pending = client.execute_nowait("import time\nprint(1, flush=True)\ntime.sleep(60)")
        support.wait_until(lambda: pending._inbox and pending._inbox[-1][1].msg_type == "stream")
        client.interrupt()
        self.assertEqual(pending.wait(support.DEADLINE).content["ename"], "KeyboardInterrupt")


class Restarting(LauncherCase):

    def test_a_restart_keeps_file_key_and_ports_and_everybody_returns(self):
        for transport in ("ipc", "tcp"):
            with self.subTest(transport=transport):
                process = self.launch(transport=transport)
                client = self.connect(process)
                before, old = connection.read_connection_file(process.connection_file), process.pid
                with connect(process.connection_file, support.DEADLINE) as other:
                    events = []
                    other.watch(events.append)
                    client.execute("x = 1")
                    process.restart()
                    after = connection.read_connection_file(process.connection_file)
                    self.assertNotEqual(process.pid, old)
                    self.assertEqual(before._replace(extra={}), after._replace(extra={}))
                    client.wait_ready()
                    self.assertEqual(client.execute("x", timeout=support.DEADLINE).content["ename"], "NameError")
                    support.wait_until(lambda events=events: events == ["died", "alive"], what=events)
                    other.wait_ready(support.DEADLINE)
                    self.assertEqual(self.value(other, "2"), "2")

    def test_requests_under_way_hear_that_it_was_restarted(self):
        process = self.launch()
        client = self.connect(process)
        pending = client.execute_nowait("import time\nwhile True:\n  try: time.sleep(60)\n  except BaseException: pass")
        process.restart()
        with self.assertRaisesRegex(KernelDied, "restarted|from its launcher"):
            pending.wait(support.DEADLINE)
        client.wait_ready()
        self.assertEqual(self.value(client, "1"), "1")

    def test_a_crashed_kernel_is_restarted_ten_times(self):
        process = self.launch()
        client = self.connect(process)
        for _ in range(10):
            with self.assertRaises(KernelDied):
                client.execute("import os; os._exit(1)", timeout=support.DEADLINE)
            process.restart()
            client.wait_ready(support.DEADLINE)
        self.assertEqual(self.value(client, "1"), "1")


class OtherKernels(LauncherCase):

    def write_spec(self, name, **members):
        folder = os.path.join(self.home.env["JUPYTER_DATA_DIR"], "kernels", name)
        os.makedirs(folder)
        with open(os.path.join(folder, "kernel.json"), "w") as file:
            json.dump({"argv": IPYKERNEL, "display_name": name, "language": "python", **members}, file)
        return folder

    @unittest.skipUnless(HAS_IPYKERNEL, "needs ipykernel")
    def test_ipykernel_runs_is_interrupted_by_signal_restarts_and_ends(self):
        self.write_spec("ipy", env={"GREETING": "hello ${NAME}"})
        with mock.patch.dict(os.environ, NAME="you"):
            process = self.launch("ipy")
        self.assertEqual(process.interrupt_mode, "signal")
        client = self.connect(process)
        self.assertEqual(self.value(client, "__import__('os').environ['GREETING']"), "'hello you'")
        self.assertEqual(connection.find_connection_file("ipy"), process.connection_file)
        pending = client.execute_nowait("import time\nprint(1, flush=True)\ntime.sleep(60)")
        support.wait_until(lambda: pending._inbox and pending._inbox[-1][1].msg_type == "stream")
        self.assertIsNone(client.interrupt())
        self.assertEqual(pending.wait(support.DEADLINE).content["ename"], "KeyboardInterrupt")
        ports = connection.read_connection_file(process.connection_file)
        process.restart()
        client.wait_ready()
        self.assertEqual(self.value(client, "40 + 2"), "42")
        self.assertEqual(connection.read_connection_file(process.connection_file), ports)
        with connect(process.connection_file, support.DEADLINE) as other, self.assertRaises(KernelDied):
            other.execute("import os; os._exit(5)", timeout=support.DEADLINE)
        process.wait(support.DEADLINE)
        self.assertEqual(process.cause(), "exit status 5")
        process.shutdown()
        self.assertEqual(self.files(), [])

    @unittest.skipUnless(HAS_IPYKERNEL, "needs ipykernel")
    def test_ipykernel_answers_over_ipc_and_asks_its_questions(self):
        process = self.launch(argv=IPYKERNEL, transport="ipc")
        client = self.connect(process)
        reply = client.execute("x = input('? ')", on_input=lambda prompt, password: prompt + "!", timeout=20)
        self.assertEqual(reply.content["status"], "ok")
        self.assertEqual(self.value(client, "x"), "'? !'")

    @unittest.skipUnless(HAS_BASH_KERNEL, "needs bash_kernel")
    def test_a_kernel_that_is_not_python(self):
        self.write_spec("bash", argv=[sys.executable, "-m", "bash_kernel", "-f", "{connection_file}"], language="bash")
        process = self.launch("bash")
        client = self.connect(process)
        seen = []
        client.execute("echo $((6*7))", on_output=seen.append, timeout=support.DEADLINE)
        self.assertEqual("".join(m.content["text"] for m in seen if m.msg_type == "stream").strip(), "42")
        # Interrupted when the program runs: a Ctrl-C that comes before, bash forgets.
        pending = client.execute_nowait("sh -c 'echo on; exec sleep 60'")
        support.wait_until(lambda: pending._inbox and pending._inbox[-1][1].msg_type == "stream")
        client.interrupt()
        self.assertNotEqual(pending.wait(support.DEADLINE).content["status"], "ok")
        seen.clear()
        client.execute("echo again", on_output=seen.append, timeout=support.DEADLINE)
        self.assertIn("again", "".join(m.content["text"] for m in seen if m.msg_type == "stream"))

    def test_a_kernel_that_dies_at_once_is_reported_with_its_status(self):
        process = self.launch(argv=[sys.executable, "-c", "raise SystemExit(9)", "{connection_file}"])
        with self.assertRaisesRegex(KernelDied, "exit status 9"):
            connect(process, support.DEADLINE)

    def test_known_words_in_braces_are_replaced_and_others_kept(self):
        out = os.path.join(self.home.work, "out")
        code = f"import json, sys; json.dump(sys.argv[1:], open({out!r}, 'w'))"
        folder = self.write_spec("odd", argv=["python", "-c", code, "{connection_file}", "{resource_dir}", "{prefix}",
                                              "{other}", "{}"])
        process = self.launch("odd")
        process.wait(support.DEADLINE)
        with open(out) as file:
            self.assertEqual(json.load(file), [process.connection_file, folder, sys.prefix, "{other}", "{}"])


class KernelSpecs(LauncherCase):

    write_spec = OtherKernels.write_spec

    def test_specs_are_found_where_jupyter_finds_them(self):
        self.assertEqual(kernelspec_folders()[-2:], ["/usr/local/share/jupyter/kernels", "/usr/share/jupyter/kernels"])
        self.write_spec("mine", interrupt_mode="message")
        extra = os.path.join(self.home.path, "extra")
        os.makedirs(os.path.join(extra, "kernels", "Other"))
        with open(os.path.join(extra, "kernels", "Other", "kernel.json"), "w") as file:
            json.dump({"argv": ["x"]}, file)
        with mock.patch.dict(os.environ, JUPYTER_PATH=extra):
            self.assertLessEqual({"mine", "other"}, set(list_kernelspecs()))
            self.assertEqual(find_kernelspec("OTHER").argv, ("x",))
        self.assertEqual(find_kernelspec("mine").interrupt_mode, "message")

    @unittest.skipUnless(importlib.util.find_spec("jupyter_client"), "needs jupyter_client")
    def test_the_list_is_jupyter_clients(self):
        self.write_spec("mine")
        code = ("import json; from jupyter_client.kernelspec import KernelSpecManager as Manager\n"
                "print(json.dumps(Manager().find_kernel_specs()))")
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True,
                              timeout=support.DEADLINE)
        ours = {name: spec.resource_dir for name, spec in list_kernelspecs().items()}
        theirs = json.loads(done.stdout)
        self.assertEqual(ours, {name: folder for name, folder in theirs.items() if name in ours})
        self.assertLessEqual(set(theirs) - set(ours), {"python3"})      # which ipykernel offers without a file

    def test_a_broken_spec_is_passed_over(self):
        for name, text in (("a", "{"), ("b", "[]"), ("c", '{"argv": []}'), ("d", '{"argv": [1]}'), ("e", "\udcff")):
            folder = self.write_spec(name)
            with open(os.path.join(folder, "kernel.json"), "w", errors="surrogateescape") as file:
                file.write(text)
        self.write_spec("good")
        self.assertEqual(set("abcde") & set(list_kernelspecs()), set())
        self.assertIn("good", list_kernelspecs())

    def test_an_unknown_name_lists_those_there_are(self):
        self.write_spec("good")
        with self.assertRaisesRegex(LaunchError, "no kernel named 'bad'; there are: .*good") as caught:
            launch("bad")
        self.assertEqual(caught.exception.exit_code, 2)

    def test_installing_writes_what_jupyter_reads(self):
        folder = install_kernelspec(prefix=self.home.path, name="Tp")
        self.assertEqual(folder, os.path.join(self.home.path, "share", "jupyter", "kernels", "tp"))
        with open(os.path.join(folder, "kernel.json")) as file:
            spec = json.load(file)
            code = spec["argv"].pop(2)      # what it is good for: test_files_and_ports.HostileFolder
            self.assertIn("from twoproc.kernel import main", code)
            self.assertEqual(spec, {
                "argv": [sys.executable, "-c", "-f", "{connection_file}"],
                "display_name": "Python 3 (twoproc)", "language": "python", "interrupt_mode": "message",
                "metadata": {"supported_encryption": ["curve"], "debugger": False},
                "kernel_protocol_version": "5.5", "env": {}})
        self.assertEqual(os.listdir(folder), ["kernel.json"])
        user = install_kernelspec(user=True)
        self.assertEqual(find_kernelspec("twoproc").resource_dir, user)
        self.assertEqual(self.value(self.connect(self.launch("twoproc")), "3"), "3")
        with self.assertRaises(ValueError):
            install_kernelspec("no/slash")


def connect_later(case, process):
    """By the connection file, as another program would."""
    client = connect(process.connection_file, support.DEADLINE)
    case.addCleanup(client.close)
    return client


def is_running(pid):
    """Neither gone nor a zombie that nobody fetches (a container's init may not)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    unittest.main()
