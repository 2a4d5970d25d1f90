"""Exit without a traceback when the reader of the output has exited, as in `poise run | head`."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from collections.abc import Iterator
from typing import IO, Any

from poise.runtime.cli.exit_status import OUTPUT_CLOSED


class OutputClosed(Exception):
    """The reader of standard output has exited. Not an `OSError`, because callers treat those as disk errors."""


def has_no_reader(stream: IO[Any] | None) -> bool:
    """Whether a stream is a pipe or socket whose other end is closed."""
    try:
        descriptor = -1 if stream is None else stream.fileno()
    except (OSError, ValueError):  # a closed stream, or one without a file
        return False
    if descriptor < 0:
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_output() -> None:
    """Redirect standard output to /dev/null, so that the interpreter does not fail again when it exits."""
    with contextlib.suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


@contextlib.contextmanager
def exit_on_broken_pipe() -> Iterator[None]:
    """Exit with `OUTPUT_CLOSED` when standard output cannot be written because its reader has exited."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # None if the program was started without one
                sys.stdout.flush()
    except OutputClosed:
        sys.exit(OUTPUT_CLOSED)
    except OSError as error:
        if error.errno == errno.EPIPE and has_no_reader(sys.stdout):
            discard_output()
            sys.exit(OUTPUT_CLOSED)
        if error.errno == errno.ENOSPC and error.filename is None:  # such as /dev/full
            discard_output()
            sys.exit(f"poise: the output cannot be written: {error.strerror}")
        raise
