# Distributed under the terms of the BSD 3-Clause License.
"""A kernel dies of a cell; what it had done is read from its log, and run again without that cell.

The log is files: nobody has to be alive to read it.  `find` takes a session's name, a connection file, or the
name of a kernel.  Nothing is run again unless somebody says so.

    python examples/read_a_dead_session.py
"""
import twoproc
from twoproc import crashlog, recovery

with twoproc.launch() as process, twoproc.connect(process) as kernel:
    kernel.execute("answer = 6 * 7")
    kernel.execute("print('the answer is', answer)")
    try:
        kernel.execute("import ctypes\nctypes.string_at(0)", timeout=30)
    except twoproc.KernelDied as died:
        print(died)

session = crashlog.find(process.connection_file)
print("the session", session.state() + ", in", recovery.cell_name(session.killer))
print("by", recovery.cause(session).text)
for cell in session.cells():
    print("In [%d]: %r" % (cell.ec, cell.code), "ok" if cell.ok else "not ended")
    for output in cell.outputs:
        print("   ", output["type"], output["content"]["text"].rstrip())

with twoproc.launch() as process, twoproc.connect(process) as kernel:
    for cell in recovery.replay_cells(session)[0]:
        kernel.execute(cell.code, timeout=30, on_output=lambda message: None)
    kernel.execute("answer", on_output=lambda message: message.msg_type == "execute_result"
                   and print("in a new kernel:", message.content["data"]["text/plain"]))
session.drop()
