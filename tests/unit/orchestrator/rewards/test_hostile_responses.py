"""Reading a response takes time in proportion to its length, whatever it contains.

A quadratic regular expression takes most of a minute for 300,000 characters; the limit leaves any machine time for a
linear one.
"""

from __future__ import annotations

import pytest

from poise.orchestrator.rewards.config import VerifierConfig
from poise.orchestrator.rewards.pool import VerifierPool
from poise.orchestrator.tasks.problem import Problem

pytestmark = pytest.mark.slow

LENGTH = 300_000
LINEAR_S, NESTED_S = 20.0, 120.0
"""Limits of one response: of a long one, and of 1000 nested brackets, which take seconds of parsing."""
TAGS = ["<think>", "</think>", "<answer>", "<think></think><answer>", "<answer></answer", "<", " "]
NUMBERS = [
    *(r"\boxed{", r"\boxed", r"\frac{", r"\sqrt", r"\text{", r"\{", "\\", "#### ", "#", "the answer is ", "\n- ", "a"),
    *("1", "1,", ",234", "1.", "1_", "1 ", "1e", "2^", "1+", "±1", "2x", "$1", "½", "²", "１", "√", "-", "*", "**a"),
    *("(", "(1,", "[1,", "{", "|", "log(", "sin ", "5 m/", "(1,2)∪"),
]


async def verify_all(responses, verifier, answer, timeout_s):
    config = VerifierConfig(num_workers=1, timeout_s=timeout_s, max_response_chars=LENGTH)
    async with VerifierPool(config) as pool:
        verdicts = await pool.verify_all([Problem("d", "p", answer, verifier)] * len(responses), responses)
    return {response[:20]: verdict.error for response, verdict in zip(responses, verdicts, strict=True)}


@pytest.mark.parametrize(("verifier", "texts"), [("exact", TAGS), ("regex", TAGS), ("numeric", TAGS + NUMBERS)])
async def test_long_responses_are_read_in_linear_time(verifier, texts):
    responses = [text * (LENGTH // len(text)) for text in texts]
    errors = await verify_all(responses, verifier, "4", LINEAR_S)
    assert set(errors.values()) == {None}


@pytest.mark.parametrize("answer", ["4", "(1,2)", "x+1"])
async def test_malformed_boxes_are_read(answer):
    responses = [f"\\boxed{{{text * (1000 // len(text))}" for text in NUMBERS]
    errors = await verify_all(responses, "numeric", answer, NESTED_S)
    assert set(errors.values()) == {None}


@pytest.mark.parametrize(
    "response",
    ["9**9**9**9", "2000!*1999!*1998!", "1e999999999", "exp(exp(exp(exp(9))))", "9^" * 900 + "9", "sin(1e999999)"],
)
async def test_values_too_large_to_compute_are_wrong(response):
    async with VerifierPool(VerifierConfig(num_workers=1, timeout_s=120)) as pool:
        verdict = await pool.verify(Problem("d", "p", 4, "numeric"), f"\\boxed{{{response}}}")
    assert (verdict.reward, verdict.error) == (0, None)


async def test_a_backtracking_pattern_is_killed():
    async with VerifierPool(VerifierConfig(num_workers=1, timeout_s=1)) as pool:
        verdict = await pool.verify(Problem("d", "p", "(a+)+$", "regex"), "a" * 60 + "!")
    assert (verdict.reward, verdict.error) == (0, "did not finish within 1 s and was killed")
