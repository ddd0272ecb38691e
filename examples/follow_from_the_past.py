# Distributed under the terms of the BSD 3-Clause License.
"""Who joins late is told what was before, and then what is live: no gap, no duplicate.

`catch_up` is `listen` that begins with the past.  The kernel answers it from its session log, however long that
is; of the cell that runs, the past has the output so far.

    python examples/follow_from_the_past.py
"""
import queue

import twoproc

with twoproc.launch() as process, twoproc.connect(process, username="ada") as ada:
    ada.execute("print('an earlier cell')")
    counted = queue.Queue()
    ada.execute_nowait("import itertools, time\nfor n in itertools.count(1): print(n, flush=True); time.sleep(0.02)",
                       on_message=counted.put)
    while counted.get(timeout=30).msg_type != "stream":
        pass                # until it has begun to count

    with twoproc.connect(process.connection_file, username="bob") as bob:
        heard = queue.Queue()
        bob.catch_up(lambda message, is_past: heard.put((message, is_past)), cells=5)
        text, message = {True: "", False: ""}, None
        while message is None or message.msg_type != "error":
            message, is_past = heard.get(timeout=30)
            if message.msg_type == "stream":
                text[is_past] += message.content["text"]
                if not is_past and text[False].count("\n") >= 5:
                    bob.interrupt_nowait()
    past, live = text[True].splitlines(), text[False].splitlines()
    print("past:", past[0], "and", past[1], "...")
    print("live: %s ..." % ("more than four" if len(live) > 4 else live))
    print("each number once:", past[1:] + live == [str(n) for n in range(1, len(past) + len(live))])
