"""Keys of problems."""

from __future__ import annotations

from poise.orchestrator.tasks.problem import Problem

CHAT = [{"role": "user", "content": "2+2?"}]


def problem(prompt=CHAT, answer="4", **others) -> Problem:
    return Problem(**{"domain": "sums", "prompt": prompt, "answer": answer, "verifier": "exact"} | others)


def test_key_is_the_same_on_every_machine():
    assert problem("2+2?").key == "3472ec40ac0bb1eff9a11f6a2bf8b9ac0bc9412fa0d3db82f13b81a3b7b80b04"


def test_the_key_separates_prompts_and_answers():
    keys = {problem().key, problem(answer="5").key, problem("2+2?").key, problem([*CHAT, *CHAT]).key}
    assert len(keys) == 4


def test_the_key_depends_on_prompt_and_answer():
    same = problem([{"content": "2+2?", "role": "user"}], domain="other", verifier="numeric", metadata={"a": 1})
    assert same.key == problem().key


def test_prompt_key_excludes_the_answer():
    assert problem(answer="5").prompt_key == problem().prompt_key
    assert problem("2+3?").prompt_key != problem("2+2?").prompt_key


def test_a_number_has_the_key_of_its_text():
    assert problem(answer=4).key == problem(answer="4").key
