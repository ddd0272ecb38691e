# Distributed under the terms of the BSD 3-Clause License.
"""The long campaigns: `make soak`, or `python -m soak [name ...]`.

A campaign is a test of the suite, run with the numbers that take too long for every day (`support.rounds`
in the tests says both). So there is one text of each, the suite runs all of it, and what breaks here can be
tried there. They run one after another: some of them measure.

    python -m soak --list           what there is, and about how long it takes
    python -m soak fuzz growth      some of them
    SEED=1234 python -m soak fuzz   the run that failed, again
"""
import argparse
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# name: (minutes on two cores, what it shows, tests)
CAMPAIGNS = {
    "interrupt": (60, "every kind of code interrupted 200 times, by message and by signal, without a miss",
                  ["test_interrupt.EveryKindOfCode", "test_interrupt.WhatElseAnInterruptDoes"]),
    "growth": (5, "10,000 cells: latency, threads, descriptors and memory as at the beginning",
               ["test_growth"]),
    "clients": (2, "2400 clients that come and go leave nothing behind",
                ["test_many_clients.ComingAndGoing"]),
    "errors": (2, "200 rounds: an error cancels its own client's queue and nobody else's",
               ["test_many_clients.Errors"]),
    "kernels": (5, "fifty kernels at once, ten times",
                ["test_many_clients.ManyKernels"]),
    "cpython": (3, "whole modules of CPython's tests in a cell, test for test as in python",
                ["test_cpython_suite"]),
    "log": (10, "the session log: 100,000 bit flips, races for the lock, writers killed, a model of its pages",
            ["test_crashlog"]),
    "deaths": (8, "a thousand deaths of ten kinds: the cell is named, and its line",
               ["test_session_log.Deaths.test_each_kind"]),
    "kills": (30, "1900 kernels killed at any moment: nothing that anybody saw is lost",
              ["test_session_log.Deaths.test_killed_at_a_random_moment_nothing_that_was_acknowledged_is_lost",
               "test_log_faults.KilledAtAnyMoment"]),
    "readers": (6, "readers that stop, read a byte a second, are cut off, come late or come back: each word once",
                ["test_replay", "test_channels.MuchOutputTests"]),
    "replay": (3, "a captured message after 10^6 junk messages, and after the memory rolled over",
               ["test_messages_faults.Replays", "test_messages_faults.ReplaysWithAShortMemory"]),
    "flood": (3, "junk without a key for 10 s on each socket, and as much with one",
              ["test_messages_faults.Floods", "test_messages_faults.FloodOfAGuest"]),
    "hosts": (4, "two hosts, and a cable that is unplugged for a minute",
              ["test_two_hosts"]),
    "fuzz": (11, "valid messages, mutated, for ten minutes on every socket",
             ["test_messages_faults.Fuzz"]),
    "ssh": (5, "a real sshd on loopback: attach, cut, come back, refused, another host key",
            ["test_ssh"]),
}


def main():
    parser = argparse.ArgumentParser(prog="python -m soak", description="Run the long campaigns.")
    parser.add_argument("names", nargs="*", metavar="name", help="campaigns; all of them without any")
    parser.add_argument("--list", action="store_true", help="print what there is")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in CAMPAIGNS]
    if unknown:
        parser.error(f"no campaign {unknown[0]!r}; there are {', '.join(CAMPAIGNS)}")
    if arguments.list:
        for name, (minutes, what, _) in CAMPAIGNS.items():
            print(f"{name:10} about {minutes:3} min  {what}")
        return 0
    failed = []
    for name in arguments.names or CAMPAIGNS:
        _, what, tests = CAMPAIGNS[name]
        print(f"-- {name}: {what}", flush=True)
        started = time.monotonic()
        status = subprocess.run([sys.executable, "-X", "faulthandler", "-m", "unittest",
                                 *(f"test.{test}" for test in tests)], cwd=ROOT,
                                env={**os.environ, "TWOPROC_TEST_SOAK": "1"}).returncode
        print(f"-- {name}: {'FAILED' if status else 'passed'} in {time.monotonic() - started:.0f} s\n", flush=True)
        if status:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
