"""Clients in forked processes: rejected after a use of gRPC; the remedies in the error work."""

import asyncio
import sys
import textwrap

import pytest

PARENTS = {
    "live": "client = ValueClient(target); client.get_probe()",
    "closed": "client = ValueClient(target); client.get_probe(); client.close()",
    "async": """
        async def ask():
            async with AsyncValueClient(target) as one:
                await one.get_probe()
        client = ValueClient(target)
        asyncio.run(ask())
    """,
    "streaming": """
        prompts = [Prompt("a", "?"), Prompt("b", "?")]
        groups = GenerationClient(target).stream_trajectories("r", 0, prompts, num_rollouts=1)
        next(groups)
        client = ValueClient(target)
    """,
}

HEAD = """
import asyncio, multiprocessing, os, sys
from poise_client import *
from poise_client.types import Prompt

target = sys.argv[1]

def ask(answers=None):
    with ValueClient(target) as own:
        print("answer", own.get_probe().num_pending, flush=True)

if __name__ == "__main__":
"""


async def run(tmp_path, target, body):
    """Run a script to its end; return its exit status and what it printed."""
    script = tmp_path / "script.py"
    script.write_text(HEAD + textwrap.indent(textwrap.dedent(body), "    "))
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), target, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode, output.decode()


@pytest.mark.parametrize("parent", PARENTS)
async def test_every_use_in_a_forked_child_is_rejected(tmp_path, target, parent):
    body = textwrap.dedent(PARENTS[parent]) + textwrap.dedent("""
        child = os.fork()
        if not child:
            async def old_and_new():
                await AsyncValueClient(target).get_probe()
            for use in (client.get_probe, lambda: ValueClient(target), lambda: asyncio.run(old_and_new())):
                try:
                    use()
                except RuntimeError as error:
                    print(error, flush=True)
            client.close()
            os._exit(7)
        print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        os._exit(0)
    """)
    status, output = await run(tmp_path, target, body)
    assert status == 0, output
    assert output.count('multiprocessing.get_context("spawn") or "forkserver", or fork before the first call') == 3
    assert "child: 7" in output


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
async def test_spawn_and_forkserver_work_with_an_open_client(tmp_path, target, method):
    body = f"""
        ask()
        client = ValueClient(target)
        client.get_probe()
        child = multiprocessing.get_context("{method}").Process(target=ask)
        child.start()
        child.join()
        print("child:", child.exitcode)
        client.close()
    """
    status, output = await run(tmp_path, target, body)
    assert status == 0, output
    assert output.count("answer 4") == 2
    assert "child: 0" in output


async def test_both_processes_work_after_a_fork_before_calls(tmp_path, target):
    body = """
        client = ValueClient(target)
        child = os.fork()
        print("answer", client.get_probe().num_pending, flush=True)
        ask()
        client.close()
        if child:
            print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
    status, output = await run(tmp_path, target, body)
    assert status == 0, output
    assert output.count("answer 4") == 4
    assert "child: 0" in output


async def test_a_forked_pool_fails_with_the_remedy(tmp_path, target):
    body = """
        from concurrent.futures import ProcessPoolExecutor
        ask()
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
            for error in (pool.submit(ask).exception() for _ in range(3)):
                print(type(error).__name__, error)
    """
    status, output = await run(tmp_path, target, body)
    assert status == 0, output
    assert output.count('get_context("spawn")') == 3


async def test_children_forked_during_a_stream_exit_normally(tmp_path, target):
    body = """
        generation = GenerationClient(target)
        for step in range(20):
            prompts = [Prompt(str(i), "?") for i in range(8)]
            groups = generation.stream_trajectories("r", step, prompts, num_rollouts=1)
            next(groups)
            child = os.fork()
            if not child:
                os._exit(7)
            print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            groups.close()
        generation.close()
        print("environment:", os.environ.get("GRPC_ENABLE_FORK_SUPPORT"))
    """
    status, output = await run(tmp_path, target, body)
    assert status == 0, output
    assert output.count("child: 7") == 20, output
    assert "environment: None" in output
