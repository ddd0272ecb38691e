# Distributed under the terms of the BSD 3-Clause License.
"""A program answers the questions that a cell asks with input() and getpass().

The kernel asks the client that sent the cell, and only that one.  `on_input(prompt, password)` is called in
the thread that waits for the cell; what it returns is what input() returns there.  EOFError raised here is
EOFError there; without `on_input` nothing can be asked, and input() raises at once.

    python examples/answer_input.py
"""
import twoproc

answers = {"name? ": "Ada", "password? ": "secret"}


def answer(prompt, password):
    print("asked for %r%s" % (prompt, ", without echo" if password else ""))
    if prompt not in answers:
        raise EOFError
    return answers[prompt]


def show(message):
    if message.msg_type == "stream":
        print(message.content["text"], end="")


with twoproc.launch() as process, twoproc.connect(process) as kernel:
    kernel.execute("print('hello', input('name? '))", on_input=answer, on_output=show, timeout=30)
    kernel.execute("import getpass; print(len(getpass.getpass('password? ')), 'characters')",
                   on_input=answer, on_output=show, timeout=30)
    for on_input in (answer, None):
        reply = kernel.execute("input('anything else? ')", on_input=on_input, timeout=30)
        print(reply.content["ename"])
