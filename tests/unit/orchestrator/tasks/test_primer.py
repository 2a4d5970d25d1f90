"""Wording and answers of the elementary skills."""

from __future__ import annotations

import random
import re

import pytest

from poise.orchestrator.tasks import primer

OPERATIONS = {
    "copy": (r"Repeat this word: (\w+)", lambda w: w),
    "capitals": (r"Write this word in capital letters: (\w+)", str.upper),
    "first_letter": (r'What is the first letter of the word "(\w+)"\?', lambda w: w[0]),
    "last_letter": (r'What is the last letter of the word "(\w+)"\?', lambda w: w[-1]),
    "next_number": (r"What number comes after (\d+)\?", lambda n: str(int(n) + 1)),
    "larger": (r"Which number is larger, (\d+) or (\d+)\?", lambda a, b: str(max(int(a), int(b)))),
    "smaller": (r"Which number is smaller, (\d+) or (\d+)\?", lambda a, b: str(min(int(a), int(b)))),
    "greater": (r"Is (\d+) greater than (\d+)\? Answer yes or no\.", lambda a, b: ["no", "yes"][int(a) > int(b)]),
    "odd_or_even": (r"Is (\d+) odd or even\?", lambda n: ["even", "odd"][int(n) % 2]),
    "first_word": (r"What is the first word in this list: (\w+), (\w+), (\w+)\?", lambda a, b, c: a),
    "last_word": (r"What is the last word in this list: (\w+), (\w+), (\w+)\?", lambda a, b, c: c),
    "subtract": (r"What is (\d+) - (\d+)\?", lambda a, b: str(int(a) - int(b))),
}


def draws(skill, num=50, one_shot=True):
    source = random.Random(3)
    return [primer.draw((skill,), one_shot, "primer", source) for _ in range(num)]


def test_there_are_twelve_skills():
    assert set(primer.SKILLS) == set(OPERATIONS)


@pytest.mark.parametrize("skill", OPERATIONS)
def test_questions_have_the_measured_wording(skill):
    pattern, operation = OPERATIONS[skill]
    for problem in draws(skill):
        match = re.fullmatch(pattern, problem.prompt[-1]["content"])
        assert match, problem.prompt[-1]
        assert problem.answer == operation(*match.groups())
        assert (problem.domain, problem.verifier, problem.metadata) == ("primer", "exact", {"skill": skill})


@pytest.mark.parametrize("skill", OPERATIONS)
def test_the_solved_example_is_never_the_question(skill):
    pattern, operation = OPERATIONS[skill]
    problems = draws(skill, 400)
    for problem in problems:
        assert [message["role"] for message in problem.prompt] == ["system", "user", "assistant", "user"]
        assert problem.prompt[0]["content"] == "Answer."
        assert problem.prompt[1] == problems[0].prompt[1]
        assert problem.prompt[1] != problem.prompt[3]
    example = re.fullmatch(pattern, problems[0].prompt[1]["content"])
    assert example is not None
    assert problems[0].prompt[2]["content"] == operation(*example.groups())


def test_without_an_example_the_prompt_is_the_question():
    assert [message["role"] for message in draws("copy", 1, one_shot=False)[0].prompt] == ["system", "user"]


def test_skills_are_drawn_in_equal_shares():
    source = random.Random(0)
    skills = [primer.draw(("copy", "larger"), True, "primer", source).metadata["skill"] for _ in range(400)]
    assert 150 < skills.count("copy") < 250
