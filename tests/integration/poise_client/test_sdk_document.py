"""Runs the snippets of docs/sdk.md, from top to bottom, as one program."""

import asyncio
import os
import re
import sys
from pathlib import Path

DOCUMENT = Path(__file__).parents[3] / "docs" / "sdk.md"


async def test_the_snippets_of_the_sdk_document_run(target, tmp_path, generation_service, learner_service):
    program = "\n".join(
        re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    )
    (tmp_path / "ca.pem").touch()
    (tmp_path / "program.py").write_text(re.sub(r"localhost:5005\d", target, program), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "program.py"),
        cwd=tmp_path,
        env={**os.environ, "POISE_TOKEN": "t0ken", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, problems = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, problems.decode()) == (0, "")
    assert "weights['w'] is an array of float64 with dtype 'float32'" in output.decode()
    assert "1 of 2 prompts" in output.decode()
    header, *rollouts = next(request for request in learner_service.requests if isinstance(request, list))
    assert header.header.num_rollouts == len(rollouts) == 4
