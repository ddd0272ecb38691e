# Distributed under the terms of the BSD 3-Clause License.
"""Run cells in a process of their own, and show what they print, what they are worth, how they fail.

`launch` starts a kernel that ends with this program, `connect` returns when the kernel has answered.
`execute` waits until the cell is done; meanwhile it calls `show`, here in this thread, for each message
that the kernel publishes about it.  A failing cell is no exception of ours: the reply says how it ended.

    python examples/run_a_cell.py
"""
import twoproc


def show(message):
    content = message.content
    if message.msg_type == "stream":
        print(content["text"], end="")
    elif message.msg_type == "execute_result":
        print("Out[%d]: %s" % (content["execution_count"], content["data"]["text/plain"]))
    elif message.msg_type == "error":
        print("%s: %s" % (content["ename"], content["evalue"]))


with twoproc.launch() as process, twoproc.connect(process) as kernel:
    for code in ("print('hello from another process')",
                 "x = 6 * 7; x",
                 "print('x is still', x)",
                 "1 / 0"):
        reply = kernel.execute(code, on_output=show, timeout=30)
        print("--", reply.content["status"])
