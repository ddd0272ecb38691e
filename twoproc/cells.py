# Distributed under the terms of the BSD 3-Clause License.
"""Python text and the cells it makes: is this a whole one, and where does a file of them divide?

The kernel knows best whether a cell is complete, and the terminal asks it.  What is here answers when the
kernel does not (it is starting, stopped, or of those that never answer), and for the plain path, which reads
from pipes.  Standard library alone: IPython's own syntax is recognised by its first characters and hidden
from Python's parser, not understood.
"""
from __future__ import annotations

import ast
import codeop
import re
import warnings

# %magic, !command, ?help, help?; and `files = !ls`.
_IPYTHON_LINE = re.compile(r"^([ \t]*)(?:[%!?].*|(?!.*#).*\w\?{1,2}[ \t]*)$", re.M)
_IPYTHON_ASSIGNMENT = re.compile(r"^([ \t]*[\w., ]+=[ \t]*)[!%](?!=).*$", re.M)
_PARSE = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
# What compile() raises for text that is not a program: the last two for one nested too deeply.
_UNPARSABLE = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)
_LEAVING = re.compile(r"[ \t]*(return|raise|pass|break|continue)\b")


def check_complete(source: str) -> tuple[str, str]:
    """("complete" | "incomplete" | "invalid", indentation of the next line), like an is_complete_reply."""
    if source.lstrip().startswith("%%"):        # there may be empty lines in it; two in a row end it, as in IPython
        return ("complete" if source.endswith("\n\n") else "incomplete"), ""
    lines = source.split("\n")
    compiler = codeop.CommandCompiler()
    compiler.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for text in dict.fromkeys((source, _as_python(source))):
            try:
                code = compiler(text, "<cell>", "exec")
            except _UNPARSABLE:
                continue
            # As at Python's own prompt, an empty line ends a block; before it there may be more of it.
            if code is None or len(lines) > 1 and lines[-1].strip() and _ends_in_block(text):
                return "incomplete", _next_indent(lines)
            return "complete", ""
    return "invalid", ""


def _ends_in_block(source: str) -> bool:
    tree = compile(source, "<cell>", "exec", _PARSE, True)
    return bool(tree.body) and hasattr(tree.body[-1], "body")


def _next_indent(lines: list[str]) -> str:
    last = next((line for line in reversed(lines) if line.strip()), "")
    indent = last[:len(last) - len(last.lstrip())]
    if last.partition("#")[0].rstrip().endswith(":"):
        return indent + "    "
    return indent[:-4] if _LEAVING.match(last) else indent


def split_cells(source: str) -> list[str]:
    """Divide a whole file so that every expression statement at its top level ends a cell and shows its value.

    Statements without a value stay together with the next that has one: a cell costs a round trip.
    Text that Python cannot parse is one cell, and the kernel says what is wrong with it: nothing runs.
    """
    if source.lstrip().startswith("%%"):
        return [source]
    for text in dict.fromkeys((source, _as_python(source))):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = compile(text, "<stdin>", "exec", _PARSE, True)
            break
        except _UNPARSABLE:
            continue
    else:
        return [source] if source.strip() else []
    lines = re.split("\r\n|\r|\n", source)
    cells, begin = [], 0
    for node, following in zip(tree.body, [*tree.body[1:], None]):
        end = len(lines) if following is None else _first_line(following) - 1
        if following is None or isinstance(node, ast.Expr) and end >= (node.end_lineno or end):
            cell = "\n".join(lines[begin:end])
            if cell.strip():
                cells.append(cell)
            begin = end
    return cells


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])


def _as_python(source: str) -> str:
    """The same lines with IPython's own syntax replaced by expressions that Python can parse."""
    return _IPYTHON_ASSIGNMENT.sub(r"\g<1>0", _IPYTHON_LINE.sub(r"\g<1>0", source))
