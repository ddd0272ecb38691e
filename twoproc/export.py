# Distributed under the terms of the BSD 3-Clause License.
"""The cells of a logged session in other forms: a notebook, a script, its definitions alone.

Called by recovery.py, which knows which cell, if any, was running when the kernel died (`killer`) and what is
to be said about that (`death`).  Text in, text out: nothing here reads a log, writes a file or runs a cell.

A script is Python that can always be compiled: magics stand in it as calls, so that IPython can run it, and what
is no Python (a typing error, `await` at the top level) as a comment.
"""
from __future__ import annotations

import ast
import itertools
import json
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .crashlog import LoggedCell


def cell_name(cell: LoggedCell) -> str:
    return "In [%s]" % cell.ec


def private_words(cell: LoggedCell) -> str:
    """What is known of a cell that was not kept."""
    return "private, %d characters, hash %s" % (cell.length, re.sub(r"\W", "", cell.hash or "unknown"))


# -- a notebook ------------------------------------------------------------------------------------

def notebook(cells: list[LoggedCell], killer: LoggedCell | None, death: str, session: str, python: str) -> str:
    """The session as a notebook of format 4.5, with its outputs; what killed it is tagged `killed-kernel`."""
    made: list[dict] = []
    for number, (cell, outputs) in enumerate(zip(cells, notebook_outputs(cells)), 1):
        common: dict[str, Any] = {"id": "cell-%d" % number, "metadata": {}}
        if cell is killer:
            common["metadata"]["tags"] = ["killed-kernel"]
            outputs.append({"output_type": "error", "ename": "KernelDied", "evalue": death,
                            "traceback": ["KernelDied: the kernel " + death]})
        if cell.code is None:
            source = "%s: %s" % (cell_name(cell), private_words(cell))
            made.append({"cell_type": "markdown", "source": source, **common})
        else:
            made.append({"cell_type": "code", "source": cell.code, **common,
                         "execution_count": cell.ec, "outputs": outputs})
    content = {"nbformat": 4, "nbformat_minor": 5, "cells": made, "metadata": {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python", "file_extension": ".py", "version": python},
        "twoproc": {"session": session}}}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def notebook_outputs(cells: list[LoggedCell]) -> list[list[dict]]:
    """For each cell its outputs as they stand in a notebook: text joined, displays updated, the cleared gone."""
    displays: dict[str, list[dict]] = {}
    result = []
    for cell in cells:
        shown: list[dict] = []
        is_clearing = False
        for entry in cell.outputs:
            kind, content = entry["type"], entry["content"]
            output = output_of(kind, content)
            transient = content.get("transient")
            display_id = str(transient.get("display_id") or "") if isinstance(transient, dict) else ""
            if kind == "update_display_data" and output is not None:
                for earlier in displays.get(display_id, ()):
                    earlier.update(data=output["data"], metadata=output["metadata"])
            elif kind == "clear_output" and content.get("wait"):
                is_clearing = True
            elif kind == "clear_output":
                shown, is_clearing = [], False
            elif output is not None:
                if is_clearing:
                    shown, is_clearing = [], False
                shown.append(output)
                if display_id:
                    displays.setdefault(display_id, []).append(output)
        result.append(list(_joined(shown)))
    return result


def _joined(outputs: list[dict]) -> Iterator[dict]:
    """The same with neighbours of one stream made one; all at once, there may be many."""
    for name, group in itertools.groupby(outputs, key=lambda output: output.get("name")):
        if name is None:        # no stream
            yield from group
        else:
            yield {"output_type": "stream", "name": name, "text": "".join(output["text"] for output in group)}


def output_of(kind: str, content: dict) -> dict | None:
    """The output that a message makes, as a notebook has it; None for clear_output and what is no output."""
    if kind == "stream":
        return {"output_type": kind, "name": str(content.get("name") or "stdout"), "text": str(content.get("text", ""))}
    if kind == "error":
        lines = content.get("traceback")
        return {"output_type": kind, "ename": str(content.get("ename", "")), "evalue": str(content.get("evalue", "")),
                "traceback": list(map(str, lines)) if isinstance(lines, list) else []}
    if kind not in ("display_data", "execute_result", "update_display_data"):
        return None
    metadata, count = content.get("metadata"), content.get("execution_count")
    output: dict[str, Any] = {"output_type": "display_data", "data": _bundle(content.get("data")),
                              "metadata": metadata if isinstance(metadata, dict) else {}}
    if kind == "execute_result":
        output["output_type"] = kind
        output["execution_count"] = count if type(count) is int else None
    return output


def _bundle(data: Any) -> dict:
    """A MIME bundle as the notebook format wants it: text, but for JSON."""
    return {kind: value if isinstance(value, str) or re.fullmatch(r"application/(.*\+)?json", kind)
            or isinstance(value, list) and all(isinstance(line, str) for line in value) else json.dumps(value)
            for kind, value in (data.items() if isinstance(data, dict) else ())}


# -- Python ----------------------------------------------------------------------------------------

_LINE_END = re.compile("\r\n|\r|\n")
_NOT_IN_A_FILE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def script(cells: list[LoggedCell], killer: LoggedCell | None, death: str, head: list[str]) -> str:
    """The inputs as a script; head: lines about it, made comments.

    The cell that was running at the death, and calls of %recover, are comments.
    """
    parts = list(map(_commented, head))
    for cell in cells:
        mark = cell_name(cell)
        if cell is killer:
            mark += ": the kernel " + death
        elif cell.is_ended and not cell.ok:
            mark += ": ended with an error"
        text = None if cell.code is None or cell is killer or calls_recover(cell.code) else _as_python(cell.code)
        if text is None:
            text = _commented(private_words(cell) if cell.code is None else cell.code)
        parts.append("\n\n%s\n%s" % (_commented(mark), text))
    # First of all the encoding: no comment further down can then be taken for a declaration of another.
    return "# -*- coding: utf-8 -*-\n" + _futures_first("\n".join(parts) + "\n")


def definitions_of(cells: list[LoggedCell], killer: LoggedCell | None) -> str:
    """Imports, functions and classes as code, in their order; not of the cell that was running at the death."""
    kept = []
    for cell in cells:
        text = "" if cell is killer else _as_python(cell.code or "", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT) or ""
        for node in _compile(text, ast.PyCF_ONLY_AST).body:
            tried = node.body if isinstance(node, ast.Try) else [node]      # an import with something in its place
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or all(
                    isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in tried):
                for decorator in getattr(node, "decorator_list", [])[:1]:
                    node.lineno, node.col_offset = decorator.lineno, 0
                kept.append((ast.get_source_segment(text, node) or "") + "\n")
    return _futures_first("\n".join(kept))


def calls_recover(code: str) -> bool:
    """Whether the cell uses the magic %recover, which would mean another session when run again."""
    return re.search(r"^[ \t]*%recover\b", code, re.M) is not None


def _commented(text: str) -> str:
    return "\n".join("# " + _NOT_IN_A_FILE.sub(lambda found: "\\u%04x" % ord(found[0]), line)
                     for line in _LINE_END.split(text))


def _as_python(code: str, flags: int = 0) -> str | None:
    """The cell as IPython understands it, magics made calls; None if it is no Python even so."""
    from IPython.core.inputtransformer2 import TransformerManager       # takes half a second: not for a notebook
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = TransformerManager().transform_cell(code)
        _compile(text, flags)
        return text
    except (SyntaxError, ValueError, OverflowError, RuntimeError, MemoryError):
        return None


def _compile(text: str, flags: int) -> Any:
    with warnings.catch_warnings():         # about what is in the cells, and was said when they ran
        warnings.simplefilter("ignore")
        return compile(text, "<cell>", "exec", flags, True)


def _futures_first(text: str) -> str:
    """`from __future__ import` must stand before all else: it is moved there, and leaves a comment."""
    lines, futures = _LINE_END.split(text), []
    for node in _compile(text, ast.PyCF_ONLY_AST).body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            futures.append(ast.unparse(node))
            for at in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[at] = _commented(lines[at])
    return "\n".join(futures + lines)
