# Distributed under the terms of the BSD 3-Clause License.
"""The same client drives any Jupyter kernel, named as its kernelspec is.

`launch("python3")` reads the kernelspec, writes a connection file and starts the command, as Jupyter does.
The kernels of others differ in what they answer and how they are interrupted; `interrupt` does what the
kernelspec asks for, a message or a signal.

    python examples/other_kernels.py            the kernelspecs there are
    python examples/other_kernels.py python3 "1 + 1"
    python examples/other_kernels.py bash "echo $0"
"""
import sys

import twoproc
from twoproc.launcher import list_kernelspecs


def show(message):
    if message.msg_type == "stream":
        print(message.content["text"], end="")
    elif message.msg_type == "execute_result":
        print(message.content["data"]["text/plain"])


if len(sys.argv) < 3:
    for name, spec in sorted(list_kernelspecs().items()):
        print("%-12s %s, interrupted by %s" % (name, spec.display_name, spec.interrupt_mode))
else:
    with twoproc.launch(sys.argv[1]) as process, twoproc.connect(process) as kernel:
        info = kernel.kernel_info_reply.content
        print(info["implementation"], "speaks protocol", info["protocol_version"])
        kernel.execute(sys.argv[2], on_output=show, timeout=60)
