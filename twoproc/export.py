# Distributed under the terms of the BSD 3-Clause License.
"""The cells of a logged session in other forms: a notebook, a script, its definitions alone.

Called by recovery.py, which knows which cell, if any, was running when the kernel died (`killer`) and what is
to be said about that (`death`).  Text in, text out: nothing here reads a log, writes a file or runs a cell.

A script is Python that can always be compiled: whatever is not (magics, a typing error, `await` at the top
level) stands in it as a comment.  What IPython itself can run again are .ipy and .ipynb files.
"""
from __future__ import annotations

import ast
import itertools
import json
import math
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
    taken: set[str] = set()
    for number, (cell, outputs) in enumerate(zip(cells, notebook_outputs(cells)), 1):
        metadata: dict[str, Any] = {}
        if cell is killer:
            metadata["tags"] = ["killed-kernel"]
            outputs.append({"output_type": "error", "ename": "KernelDied", "evalue": death,
                            "traceback": ["KernelDied: the kernel " + death]})
        name = cell.cell_id or ""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or name in taken:
            name = "cell-%d" % number
            while name in taken:
                name += "-"
        taken.add(name)
        if cell.code is None:
            made.append({"cell_type": "markdown", "id": name, "metadata": metadata,
                         "source": ["%s: %s" % (cell_name(cell), private_words(cell))]})
        else:
            made.append({"cell_type": "code", "id": name, "metadata": metadata, "source": cell.code.splitlines(True),
                         "execution_count": cell.ec, "outputs": outputs})
    content = {"nbformat": 4, "nbformat_minor": 5, "cells": made, "metadata": {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python", "file_extension": ".py", "version": python},
        "twoproc": {"session": session}}}
    return json.dumps(_plain(content), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


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


def _plain(value: Any) -> Any:
    """The same without what strict readers of JSON refuse: lone surrogates, NaN and infinities."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- Python ----------------------------------------------------------------------------------------

_LINE_END = re.compile("\r\n|\r|\n")
# %magic, !command, ?help, help?, and `files = !ls`; asked only about lines that are no Python.
_MAGIC = re.compile(r"[ \t]*(?!pass  #)(?:[%!?]|[\w., ]+=[ \t]*[!%](?!=)|.*\w\?{1,2}[ \t]*$)")
_RUNS_PYTHON = re.compile(r"\s*%%(time|capture)\b")


def script(cells: list[LoggedCell], killer: LoggedCell | None, death: str, head: list[str],
           is_ipython: bool = False) -> str:
    """The inputs as a script; head: lines about it, made comments.

    is_ipython: for `ipython file.ipy`, magics stay.  The cell that was running at the death, and calls of
    %recover, are comments in both.
    """
    futures: dict[str, None] = {}
    parts = []
    for cell in cells:
        mark = cell_name(cell)
        if cell is killer:
            mark += ": the kernel " + death
        elif cell.is_ended and not cell.ok:
            mark += ": ended with an error"
        if cell.code is None:
            body = commented(private_words(cell))
        elif cell is killer or calls_recover(cell.code):
            body = commented(cell.code)
        else:
            found = _as_python(cell.code, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT if is_ipython else 0)
            if is_ipython and (cell.ok or found is not None):
                body = _with_calls(cell.code)
            else:
                body = commented(cell.code) if found is None else _without_futures(found, futures)
        parts.append("%s\n%s\n" % (commented(mark), body))
    # First of all the encoding: no comment further down can then be taken for a declaration of another.
    top = ["# -*- coding: utf-8 -*-", *map(commented, head)]
    if futures:
        top.append("from __future__ import " + ", ".join(futures))
    return "\n\n".join(["\n".join(top) + "\n", *parts])


def calls_recover(code: str) -> bool:
    """Whether the cell uses the magic %recover, which would mean another session when run again."""
    return re.search(r"^[ \t]*%recover\b", code, re.M) is not None


def commented(text: str) -> str:
    return "\n".join("# " + re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: "\\x%02x" % ord(found[0]), line)
                     for line in _LINE_END.split(text))


def _as_python(code: str, flags: int = 0) -> str | None:
    """The cell with the lines that only IPython understands made comments; None if it is no Python even so."""
    lines = _LINE_END.split(code)
    if code.lstrip().startswith("%%"):
        if not _RUNS_PYTHON.match(code):
            return None
        at = next(number for number, line in enumerate(lines) if line.strip())
        lines[at] = commented(lines[at])
    while True:
        text = "\n".join(lines)
        try:
            _compile(text, flags)
            return text
        except SyntaxError as error:
            at = (error.lineno or 0) - 1
            if not 0 <= at < len(lines) or not _MAGIC.match(lines[at]):
                return None
            while True:     # `pass`, because it may be all there is in a block
                more = lines[at].endswith("\\") and at + 1 < len(lines)
                indent = lines[at][:len(lines[at]) - len(lines[at].lstrip())]
                lines[at] = indent + "pass  " + commented(lines[at][len(indent):])
                if not more:
                    break
                lines[at + 1] = indent + lines[at + 1].lstrip()
                at += 1
        except (ValueError, OverflowError, RecursionError, MemoryError):
            return None


def _compile(text: str, flags: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compile(text, "<cell>", "exec", flags, True)


def _without_futures(text: str, futures: dict[str, None]) -> str:
    """`from __future__` must stand before all else in a file: it is noted there and becomes a comment here."""
    lines = text.split("\n")
    for node in ast.parse(text).body if "__future__" in text else ():
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            futures.update(dict.fromkeys(alias.name for alias in node.names))
            for at in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[at] = commented(lines[at])
    return "\n".join(lines)


def _with_calls(code: str) -> str:
    """A %%magic stands at the beginning of a cell only, which a whole .ipy file is; elsewhere it is a call."""
    if not code.lstrip().startswith("%%"):
        return code
    first, _, body = code.lstrip().partition("\n")
    name, _, line = first[2:].partition(" ")
    return "get_ipython().run_cell_magic(%r, %r, %r)" % (name, line, body)


def definitions_of(cells: list[LoggedCell]) -> str:
    """Imports, functions and classes of these cells as code, in their order; of those redefined, the last.

    An earlier one stays where something in between names it: a class whose base was defined again after it.
    """
    found: list[tuple[str, str, ast.stmt]] = []         # name or "", source, node
    futures: dict[str, None] = {}
    for cell in cells:
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        text = None if cell.code is None else _as_python(cell.code, flags)
        if text is None:
            continue
        lines = text.split("\n")
        for node in _compile(text, flags | ast.PyCF_ONLY_AST).body:
            source = ast.get_source_segment(text, node) or ""
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                futures[source] = None
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if node.decorator_list:
                    source = "\n".join(lines[node.decorator_list[0].lineno - 1:node.end_lineno])
                found.append((node.name, source, node))
            elif _is_import(node):
                found = [entry for entry in found if entry[1] != source] + [("", source, node)]
    kept: list[str] = []
    needed: set[str] = set()
    later: set[str] = set()
    for name, source, node in reversed(found):
        if not name or name not in later or name in needed:
            kept.append(source + ("\n" if name else ""))
            needed.discard(name)
            needed |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        later.add(name)
    return "\n".join([*futures, *reversed(kept)]).strip("\n") + "\n" if kept or futures else ""


def _is_import(node: ast.stmt) -> bool:
    """An import, or the usual ways to have one under conditions."""
    if isinstance(node, ast.Try):
        rest = [statement for handler in node.handlers for statement in handler.body] + node.orelse + node.finalbody
        return all(map(_is_import, node.body)) and all(
            _is_import(other) or isinstance(other, ast.Pass) or isinstance(other, ast.Assign)
            and isinstance(other.value, ast.Constant) for other in rest)
    return isinstance(node, (ast.Import, ast.ImportFrom))


