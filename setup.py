# Distributed under the terms of the BSD 3-Clause License.
"""Packaging of twoproc: one package of plain Python, two requirements."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def read(name):
    path = HERE / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


# Lower bounds: the oldest versions that test/test_packaging.py installs and runs a cell with.
REQUIRES = ["ipython>=8.5", "pyzmq>=24.0.1"]

TEST = [
    "bash_kernel",           # a kernel that is not Python
    "comm",
    "ipykernel",             # the kernel that our client and frontend drive besides our own
    "ipywidgets",
    "jupyter_client>=8.9",   # 8.9: the CURVE fields of the connection file
    "jupyter_kernel_test",
    "matplotlib",
    "nbclient",
    "nbformat",
    "pexpect",               # the terminal
    "setuptools>=70.1",      # builds the archives that the packaging test looks into
    "trio",                  # %autoawait trio
]
BENCH = ["ipykernel"]
DEV = [*TEST, "mypy", "ruff"]

setup(
    name="twoproc",
    version=re.search(r'__version__ = "(.+)"', read("twoproc/__init__.py")).group(1),
    description="IPython's command line in two processes over ZeroMQ: a kernel, a client, a frontend",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    author="twoproc developers",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    packages=["twoproc"],
    install_requires=REQUIRES,
    extras_require={"test": TEST, "bench": BENCH, "dev": DEV},
    classifiers=[
        "Framework :: IPython",
        "Framework :: Jupyter",
        "Intended Audience :: Developers",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: System :: Shells",
    ],
)
