"""Programs whose reader exits, each in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from poise.runtime.cli.broken_pipe import has_no_reader
from poise.runtime.cli.exit_status import OUTPUT_CLOSED

HEAD = "import sys; from poise.runtime.cli.console import OutputConsole; from poise.runtime.cli.broken_pipe import *\n"
PROGRAMS = {
    "print": "with exit_on_broken_pipe():\n    while True: print('line')",
    "buffered output": "with exit_on_broken_pipe():\n    print('line', end='')",
    "an exit": "with exit_on_broken_pipe():\n    print('line', end=''); sys.exit(0)",
    "a console": "with exit_on_broken_pipe():\n    while True: OutputConsole().print('line')",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_without_a_reader_exits_quietly(program):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", HEAD + PROGRAMS[program]], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (OUTPUT_CLOSED, "")


def test_full_disk_is_reported_without_a_traceback():
    program = HEAD + PROGRAMS["buffered output"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr == "poise: the output cannot be written: No space left on device\n"


def test_pipe_has_no_reader_after_closing(tmp_path):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe, (tmp_path / "file").open("w") as file:
        assert not has_no_reader(pipe)
        assert not has_no_reader(file)
        assert not has_no_reader(None)
        os.close(reader)
        assert has_no_reader(pipe)
