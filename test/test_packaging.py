# Distributed under the terms of the BSD 3-Clause License.
"""The package as it travels: copied, built, installed with the oldest requirements; and the commands of the
repository, which must say the truth about what they did."""
import ast
import glob
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest
import zipfile

from . import support

LICENCE_LINE = "# Distributed under the terms of the BSD 3-Clause License."
INSTALL_SECONDS = 300       # pip, some forty packages, a slow line; or venv, which unpacks pip, on a slow machine


def run(*argv, deadline=INSTALL_SECONDS, **options):
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=deadline, **options)


def folder_for(case):
    path = tempfile.mkdtemp(prefix="tp-")
    case.addCleanup(shutil.rmtree, path, ignore_errors=True)
    return path


def copy_of_the_tree(case):
    """The repository without what git ignores, so that nothing is built inside it."""
    path = os.path.join(folder_for(case), "a copy")     # a space: nothing may mind one
    unwanted = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(support.ROOT, path, ignore=unwanted)
    return path


def requirements():
    """install_requires, as setup.py has it."""
    with open(os.path.join(support.ROOT, "setup.py"), encoding="utf-8") as file:
        for node in ast.parse(file.read()).body:
            if isinstance(node, ast.Assign) and node.targets[0].id == "REQUIRES":
                return ast.literal_eval(node.value)
    raise LookupError("REQUIRES in setup.py")


class CopiedFolder(unittest.TestCase):

    def test_runs_a_cell_under_another_name(self):
        home = support.Home(self)
        place = os.path.join(home.path, "import")
        os.unlink(os.path.join(place, "twoproc"))
        shutil.copytree(os.path.join(support.ROOT, "twoproc"), os.path.join(place, "vendored"),
                        ignore=shutil.ignore_patterns("__pycache__"))
        look = "' '.join(sorted({m.split('.')[0] for m in __import__('sys').modules} & {'twoproc', 'vendored'}))"
        script = (f"import vendored\n"
                  f"with vendored.launch() as kernel, vendored.connect(kernel.connection_file) as client:\n"
                  f"    seen = []\n"
                  f"    reply = client.execute({look!r}, on_output=seen.append, timeout={support.DEADLINE})\n"
                  f"    assert reply.content['status'] == 'ok', reply\n"
                  f"    print(*[m.content['data']['text/plain'] for m in seen if m.msg_type == 'execute_result'])\n"
                  f"    print({look})\n")
        process = support.Process(self, [sys.executable, "-c", script], home=home)
        self.assertEqual(process.wait(60), 0, process.log())
        self.assertEqual(process.output().splitlines(), ["'vendored'", "vendored"])


class OldestRequirements(unittest.TestCase):

    def test_run_a_cell_and_the_frontend(self):
        bounds = [requirement.replace(">=", "==") for requirement in requirements()]
        self.assertEqual([re.fullmatch(r"(ipython|pyzmq)==[\d.]+", bound) is not None for bound in bounds],
                         [True, True])
        home = support.Home(self)
        python = self.environment(home, bounds)
        kernel = support.start_kernel(
            self, home=home, command=f"'{python}' -m twoproc.kernel -f {{connection_file}}")
        client = kernel.client()
        versions = client.execute("import IPython, zmq; print(IPython.__version__, zmq.__version__)").text().split()
        for bound, version in zip(bounds, versions):
            self.assertRegex(version, "^" + re.escape(bound.partition("==")[2]))
        self.assertEqual(client.execute("await __import__('asyncio').sleep(0, 6) * 7").value, "42")
        self.assertEqual(client.execute("1/0").status, "error")
        # Again while it is empty: the first completion of a fresh home may take longer than the kernel waits for it.
        support.wait_until(lambda: "import" in client.request(
            "shell", "complete_request", {"code": "impor", "cursor_pos": 5}).content["matches"], what="import")
        frontend = support.Process(self, [python, "-m", "twoproc.frontend", "-c", "print(6 * 7)"], home=home)
        self.assertEqual(frontend.wait(60), 0, frontend.log())
        self.assertEqual(frontend.output(), "42\n")

    def environment(self, home, bounds):
        """The Python of a fresh environment with exactly these; skips where pip cannot get them."""
        place = os.path.join(home.path, "venv")
        python = os.path.join(place, "bin", "python")
        done = run(sys.executable, "-m", "venv", place)
        self.assertEqual(done.returncode, 0, done.stdout)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]

        def fetch(requirement):
            return run(*pip, "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", place, requirement)

        if fetch("pyzmq").returncode:
            self.skipTest("pip reaches no package index")
        for bound in bounds:
            if fetch(bound).returncode:
                self.skipTest(f"{bound} was not made for Python {sys.version_info[0]}.{sys.version_info[1]}: "
                              "pip takes a newer one here")
        for _ in range(3):      # an index that was there may be out of reach for a moment
            done = run(*pip, "install", "-q", "--only-binary", ":all:", *bounds)
            if not done.returncode:
                break
        self.assertEqual(done.returncode, 0, done.stdout)
        return python


class Archives(unittest.TestCase):

    def setUp(self):
        self.tree = copy_of_the_tree(self)
        self.place = folder_for(self)

    def build(self, what):
        code = f"import setuptools.build_meta as backend; backend.build_{what}({self.place!r})"
        done = run(sys.executable, "-c", code, cwd=self.tree)
        self.assertEqual(done.returncode, 0, done.stdout)
        return glob.glob(os.path.join(self.place, "*"))[0]

    def test_a_wheel_holds_the_package_its_licence_and_nothing_else(self):
        with zipfile.ZipFile(self.build("wheel")) as wheel:
            names = wheel.namelist()
            metadata = wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode()
        rooms = [f"twoproc/{name}" for name in os.listdir(os.path.join(self.tree, "twoproc"))]
        self.assertEqual(sorted(name for name in names if ".dist-info/" not in name), sorted(rooms))
        self.assertTrue(any(name.endswith("LICENSE") for name in names), names)
        required = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.M)
        self.assertEqual(sorted(required), sorted(requirements()))
        self.assertIn("Requires-Python: >=3.10", metadata)

    def test_a_source_archive_holds_the_whole_repository(self):
        with tarfile.open(self.build("sdist")) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        wanted = {os.path.relpath(os.path.join(place, name), self.tree)
                  for place, _, files in os.walk(self.tree) for name in files if "egg-info" not in place}
        self.assertEqual(wanted - names - {".gitignore"}, set())


class Licence(unittest.TestCase):

    def test_every_file_survives_being_copied(self):
        for pattern in ("*.py", "twoproc/*.py", "test/*.py", "bench/*.py", "soak/*.py", "examples/*.py", ".ci/*"):
            for path in glob.glob(os.path.join(support.ROOT, pattern)):
                with self.subTest(path=path), open(path, encoding="utf-8") as file:
                    self.assertIn(LICENCE_LINE, file.read().splitlines()[:10])


class Commands(unittest.TestCase):
    """`make` and `.ci/run` in a copy of the tree, with pip offline and programs of ours in their way."""

    def setUp(self):
        self.tree = copy_of_the_tree(self)
        self.programs = folder_for(self)
        self.env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull,
                    "PATH": self.programs + os.pathsep + os.environ["PATH"]}
        for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON"):
            self.env.pop(name, None)

    def program(self, name, text):
        path = os.path.join(self.programs, name)
        with open(path, "w") as file:
            file.write("#!/bin/sh\n" + text)
        os.chmod(path, 0o755)
        return path

    def call(self, *argv):
        return run(*argv, cwd=self.tree, env=self.env)

    def test_a_python_that_is_too_old_is_refused_by_name(self):
        old = self.program("python-of-old", 'case "$*" in -V) echo Python 3.9.1;; *exit*) exit 1;; *) echo x;; esac')
        done = self.call("make", f"PYTHON={old}", "run")
        self.assertIn("is Python 3.9.1, twoproc needs 3.10 or newer", done.stdout)
        self.assertNotEqual(done.returncode, 0)
        self.assertFalse(os.path.exists(os.path.join(self.tree, ".venv")))

    def test_an_installation_that_failed_is_begun_anew(self):
        for _ in range(2):
            done = self.call("sh", ".ci/venv", "run", sys.executable)
            self.assertNotEqual(done.returncode, 0)
            self.assertTrue(os.path.exists(os.path.join(self.tree, ".venv", ".unfinished")), done.stdout)
        self.assertIn("making .venv anew: its installation did not end", done.stdout)

    def test_continuous_integration_adds_up_what_really_happened(self):
        suite = "echo '7 passed, 1 failed, 2 skipped'; exit 1"
        for check, test, closing, status in (
                ("true", "echo '7 passed, 0 failed, 2 skipped'", "7 passed, 0 failed, 2 skipped", 0),
                ("true", suite, "7 passed, 1 failed, 2 skipped", 1),
                ("exit 1", "echo '7 passed, 0 failed, 2 skipped'", "7 passed, 1 failed, 2 skipped", 1),
                ("true", "echo '7 passed, 0 failed, 2 skipped'; exit 3", "7 passed, 1 failed, 2 skipped", 1),
                ("true", "exit 2", "0 passed, 1 failed, 0 skipped", 1)):
            with self.subTest(check=check, test=test):
                self.program("make", f'case "$*" in check) {check};; test) {test};; *) exit 9;; esac\n')
                done = self.call(".ci/run")
                self.assertEqual(done.stdout.splitlines()[-1], closing)
                self.assertEqual(done.returncode, status, done.stdout)

    def test_the_suite_counts_tests_and_notices_a_module_that_dies(self):
        for path in glob.glob(os.path.join(self.tree, "test", "test_*.py")):
            os.unlink(path)
        for name, text in (("good", "def test_a(self): pass"), ("bad", """
    def test_a(self):
        for number in range(3):
            with self.subTest(number=number): self.fail()
    @unittest.skip('reason')
    def test_b(self): pass
    def test_c(self): pass"""), ("dead", "def test_a(self): import os; os._exit(0)")):
            with open(os.path.join(self.tree, "test", f"test_{name}.py"), "w") as file:
                file.write(f"import unittest\nclass Case(unittest.TestCase):\n    {text}\n")
        done = self.call(sys.executable, "-m", "test")
        self.assertEqual(done.stdout.splitlines()[-1], "2 passed, 2 failed, 1 skipped", done.stdout)
        self.assertEqual(done.returncode, 1)
        done = self.call(sys.executable, "-m", "test", "test_good")
        self.assertEqual(done.stdout.splitlines()[-1], "1 passed, 0 failed, 0 skipped", done.stdout)
        self.assertEqual(done.returncode, 0)


if __name__ == "__main__":
    unittest.main()
