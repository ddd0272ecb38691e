# Distributed under the terms of the BSD 3-Clause License.
"""A second client watches what everybody does with a kernel, and may interrupt it.

All output goes to all clients.  The parent header of a message says who caused it: `username` is a name to
show, `session` tells two people of the same name apart.  A listener is called by the client's own thread, so
it must not wait; a queue takes what it hears to whoever has time.

    python examples/watch_a_kernel.py
"""
import queue

import twoproc

with twoproc.launch() as process, \
        twoproc.connect(process, username="ada") as ada, \
        twoproc.connect(process.connection_file, username="bob") as bob:
    heard = queue.Queue()
    bob.listen(heard.put)
    cell = ada.execute_nowait("for n in range(3): print('step', n)\nwhile True: pass")
    while True:
        message = heard.get(timeout=30)
        who = message.parent_header.get("username")
        if message.msg_type == "execute_input":
            print("%s runs In [%d]" % (who, message.content["execution_count"]))
        elif message.msg_type == "stream":
            for line in message.content["text"].splitlines():
                print("%s's cell prints: %s" % (who, line))
            if "step 2" in message.content["text"]:
                print("bob interrupts")
                bob.interrupt()
        elif message.msg_type == "error":
            print("%s's cell ends: %s" % (who, message.content["ename"]))
            break
    print("ada's reply:", cell.wait(30).content["ename"])
