# Distributed under the terms of the BSD 3-Clause License.
"""The kernel's standard streams: what stands in place of sys.stdin, sys.stdout, sys.stderr and descriptors 0, 1, 2.

    OutStream            sys.stdout and sys.stderr: text goes to the outbox, by way of one function
    InStream             sys.stdin: a line is asked of the frontend
    DescriptorCapture    what C code, os.system and child processes write to descriptors 1 and 2

The capture is an unlinked file opened for appending, never a pipe: nobody empties a pipe while C code holds the
interpreter lock, so a writer of more than 64 kB would wait for ever.  A file takes everything, and whoever
sends the output reads it from there.  Order against Python's own text is kept by asking for a reading in the
same FIFO that the text goes through; see OutStream.write.
"""
from __future__ import annotations

import codecs
import contextlib
import io
import os
import time
from typing import Callable, Iterator

# After fork, output goes to the descriptors (the capture of the parent), a line at a time.
_forked = False


class OutStream(io.TextIOBase):
    """A text stream whose text is handed to `write(text)`; any thread may print.

    before_write, if given, is called ahead of text when at least a millisecond has passed since it last was:
    the chance to put what a child process wrote in the meantime where it belongs, at a price that a loop of
    prints does not notice.
    """

    mode = "w"
    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, name: str, descriptor: int, write: Callable[[str], None],
                 before_write: Callable[[], None] | None = None):
        self.name = "<%s>" % name
        self._descriptor, self._write, self._before_write = descriptor, write, before_write
        self._checked = 0.0
        self._line = ""             # in a forked child: what waits for the end of its line
        self._bytes: _Bytes | None = None

    @property
    def buffer(self) -> io.BufferedIOBase:
        """For programs that write bytes; they are decoded as UTF-8."""
        if self._bytes is None:
            self._bytes = _Bytes(self)
        return self._bytes

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError("write() argument must be str, not %s" % type(text).__name__)
        if _forked:
            self._write_in_child(text)
        elif text:
            if self._before_write is not None:
                now = time.monotonic()
                if now - self._checked > 0.001:
                    self._checked = now
                    self._before_write()
            self._write(text)
        return len(text)

    def _write_in_child(self, text: str) -> None:
        self._line += text
        if "\n" in text:
            whole, _, self._line = self._line.rpartition("\n")
            self._to_descriptor(whole + "\n")

    def _to_descriptor(self, text: str) -> None:
        data = memoryview(text.encode("utf-8", self.errors))
        while data:
            data = data[os.write(self._descriptor, data):]

    def flush(self) -> None:
        if _forked and self._line:
            line, self._line = self._line, ""
            self._to_descriptor(line)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """The real descriptor, whose output is captured: subprocess.run(..., stdout=sys.stdout) works."""
        return self._descriptor

    def isatty(self) -> bool:
        return False

    def reconfigure(self, **options: object) -> None:
        """Accepted and ignored: there is one encoding on the wire, and no buffer."""

    def close(self) -> None:
        """A cell that closes sys.stdout would silence all later ones; flush instead."""
        self.flush()


class _Bytes(io.BufferedIOBase):
    """OutStream.buffer: bytes in, whole characters out, at once."""

    def __init__(self, stream: OutStream):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, data) -> int:       # type: ignore[no-untyped-def]
        with memoryview(data) as view:
            self._stream.write(self._decoder.decode(view.tobytes()))
            return view.nbytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self.flush()


class InStream(io.TextIOBase):
    """sys.stdin of the kernel: `ask(prompt, password)` gives a line; EOFError from it is the end of the file."""

    name = "<stdin>"
    mode = "r"
    encoding = "utf-8"
    errors = "strict"

    def __init__(self, ask: Callable[[str, bool], str]):
        self._ask = ask
        self._rest = ""

    def readable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return 0

    def readline(self, size: int | None = -1) -> str:   # type: ignore[override]
        if not self._rest:
            try:
                self._rest = self._ask("", False) + "\n"
            except EOFError:
                return ""
        end = len(self._rest) if size is None or size < 0 else size
        line, self._rest = self._rest[:end], self._rest[end:]
        return line

    def read(self, size: int | None = -1) -> str:
        if size is None or size < 0:
            return "".join(iter(self.readline, ""))
        return self.readline(size)

    def close(self) -> None:
        """A cell that closes sys.stdin would end input() for all later ones."""


class DescriptorCapture:
    """Descriptors 1 and 2 of the process as two unlinked files, and 0 as /dev/null, from `start` to `stop`.

    Belongs to one thread, the one that calls `read` and `shrink`; `has_grown` may be called by any.
    """

    CHUNK = 1 << 20
    BACKLOG = 64 << 20     # what a program may be ahead of us; one that never stops would fill the disk

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._offsets = {"stdout": 0, "stderr": 0}
        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in self._offsets}
        self._saved: dict[int, int] = {}
        self._children = 0, 0, 0    # as last seen by has_writers
        self._has_orphans = False
        self._look_again_at = 0.0

    def start(self) -> io.TextIOBase:
        """Redirect; returns the stderr there was, for the process's own log."""
        try:
            import fcntl
        except ImportError:     # Windows, where a kernel runs without this capture
            return os.fdopen(os.dup(2), "w", errors="backslashreplace", buffering=1)
        import tempfile         # 2 ms, and here the sockets are bound already
        for descriptor in (0, 1, 2):
            try:
                self._saved[descriptor] = os.dup(descriptor)
            except OSError:
                self._saved[descriptor] = os.open(os.devnull, os.O_RDWR)    # it was started with it closed
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        if null != 0:
            os.close(null)
        files = {}
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            file, path = tempfile.mkstemp(prefix="twoproc-")
            os.unlink(path)
            # Two processes that write at their own offsets would overwrite each other.
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
            files[name] = file
            os.dup2(file, descriptor)
        self._files = files         # at once: twoproc-io may be looking through it
        return os.fdopen(os.dup(self._saved[2]), "w", errors="backslashreplace", buffering=1)

    def stop(self) -> None:
        for descriptor, saved in self._saved.items():
            os.dup2(saved, descriptor)
            os.close(saved)
        self._saved.clear()

    def has_grown(self) -> bool:
        return any(os.fstat(file).st_size != self._offsets[name] for name, file in self._files.items())

    def mark(self) -> dict[str, int]:
        """Where the files end now; for `read`."""
        return {name: os.fstat(file).st_size for name, file in self._files.items()}

    def read(self, mark: dict[str, int]) -> Iterator[tuple[str, str]]:
        """(stream name, text) of what was written before `mark`, at most CHUNK bytes a stream; then again.

        No further: whatever was written since may belong behind something that Python has said since.
        """
        for name, file in self._files.items():
            size = os.fstat(file).st_size
            if size < self._offsets[name]:
                self._offsets[name] = 0         # `echo > /dev/stderr` opens the file anew, and empties it
            elif size - self._offsets[name] > self.BACKLOG:
                os.ftruncate(file, 0)
                yield name, "\n[%d bytes left out: written faster than they could be sent]\n" % (
                    size - self._offsets[name])
                self._offsets[name] = 0
            data = os.pread(file, max(0, min(self.CHUNK, mark[name] - self._offsets[name])), self._offsets[name])
            if data:
                self._offsets[name] += len(data)
                text = self._decoders[name].decode(data)
                if text:
                    yield name, text

    def has_writers(self, cells: int) -> bool:
        """May another process still write: a child, or one that a child left behind (`!program &`)?

        cells: a count of the cells that have run, each of which may have started one.
        The second is looked for among all processes, 5 us each: when children came or went since the last time,
        and as long as there was one, once a second.
        """
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            children = 0, 0, _waited_children()
        except (AttributeError, OSError):
            return True         # a system that cannot tell: then look for output from time to time
        else:
            if ended is None:
                return True     # there are children, and all are alive
            children = ended.si_pid, cells, _waited_children()      # one was not waited for; are there others?
        now = time.monotonic()
        if children != self._children or self._has_orphans and now > self._look_again_at:
            self._children, self._look_again_at = children, now + 1.0
            self._has_orphans = any(map(self._is_held_by, _other_processes()))
        return self._has_orphans

    def _is_held_by(self, process: str) -> bool:
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):      # it ended, or is another user's
                found = os.stat("/proc/%s/fd/%d" % (process, descriptor))
                if any(os.path.samestat(found, os.fstat(file)) for file in self._files.values()):
                    return True
        return False

    def shrink(self) -> None:
        """Give the disk space back; only when no cell runs and not has_writers(), so that nobody writes now."""
        for name, file in self._files.items():
            if self._offsets[name] and os.fstat(file).st_size == self._offsets[name]:
                os.ftruncate(file, 0)
                self._offsets[name] = 0


def _waited_children() -> int:
    """A number that grows with each child process that was waited for."""
    import resource             # not on Windows, which has no waitid either
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt


def _other_processes() -> list[str]:
    try:
        return [name for name in os.listdir("/proc") if name.isdigit() and name != str(os.getpid())]
    except OSError:
        return []               # macOS: what such a process writes is seen with the next request


def set_forked() -> None:
    """Called in a child of fork."""
    global _forked
    _forked = True
