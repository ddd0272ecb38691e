# Distributed under the terms of the BSD 3-Clause License.
"""A time limit ends the waiting, an interrupt ends the cell; the variables survive both.

TimeoutError says that the answer did not come in time: the cell goes on in the kernel.  `execute_nowait`
gives the request as an object, so that one can go on waiting for it, or interrupt and then wait.

    python examples/interrupt_and_timeout.py
"""
import twoproc

with twoproc.launch() as process, twoproc.connect(process) as kernel:
    kernel.execute("x = 42", timeout=30)

    cell = kernel.execute_nowait("import time\nwhile True: time.sleep(60)")
    try:
        cell.wait(timeout=0.5)
    except TimeoutError as error:
        print("timeout:", error)
    print("the kernel is alive:", kernel.is_alive, "and", kernel.execution_state)

    kernel.interrupt()
    reply = cell.wait(timeout=10)
    print("the cell ended with", reply.content["ename"])

    reply = kernel.execute("", user_expressions={"x": "x"}, timeout=30)
    print("x is still", reply.content["user_expressions"]["x"]["data"]["text/plain"])

    try:
        kernel.execute("import os; os._exit(3)", timeout=30)
    except twoproc.KernelDied as died:
        print(died)
