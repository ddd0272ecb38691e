# Distributed under the terms of the BSD 3-Clause License.
"""Many threads share one client, and each gets the answers to its own questions.

A kernel runs one cell at a time, so the cells of eight threads stand in one queue; but each `execute` returns
the reply of its own request, and `on_output` is called in the thread that asked.  Questions about the
interpreter do not stand in that queue: `complete` is answered while a cell of another thread sleeps.

    python examples/many_threads.py
"""
import threading
from concurrent.futures import ThreadPoolExecutor

import twoproc

with twoproc.launch() as process, twoproc.connect(process) as kernel:

    def square(number):
        said = []
        kernel.execute("print(%d ** 2)" % number, timeout=30,
                       on_output=lambda message: said.append((message, threading.current_thread())))
        assert all(thread is threading.current_thread() for _, thread in said)
        return "".join(message.content["text"] for message, _ in said if message.msg_type == "stream")

    with ThreadPoolExecutor(8) as pool:
        print("squares:", *[text.strip() for text in pool.map(square, range(20))])

    has_begun = threading.Event()
    cell = kernel.execute_nowait("import os, time; print('sleeping'); time.sleep(2)", on_message=lambda message:
                                 message.msg_type == "stream" and has_begun.set())
    has_begun.wait(30)
    matches = kernel.complete("os.getcw").content["matches"]
    print("while that sleeps:", *matches, "| the cell is done:", cell.is_done)
    print("then:", cell.wait(30).content["status"])
