"""reasoning-gym tasks by name."""

from __future__ import annotations

import json
import random

import pytest

from poise.orchestrator.rewards.verifiers import reward_function
from poise.orchestrator.tasks.config import GymTask
from poise.orchestrator.tasks.gym import drawer
from poise.orchestrator.tasks.problem import TaskError


def draw(seed=0, **settings):
    return drawer(GymTask(**{"name": "spell_backward", "size": 50} | settings))(random.Random(seed))


def test_gym_problems_equal_those_of_the_package():
    problem = draw(options={"min_word_len": 6, "max_word_len": 6})
    [message] = problem.prompt
    assert message["role"] == "user"
    assert message["content"].endswith(problem.answer[::-1])
    assert len(problem.answer) == 6
    assert (problem.domain, problem.verifier) == ("spell_backward", "gym")


def test_system_message_and_domain_are_used():
    problem = draw(system="Spell.", domain="spelling")
    assert problem.prompt[0] == {"role": "system", "content": "Spell."}
    assert problem.domain == "spelling"


def test_equal_seeds_give_the_same_problem():
    assert draw(5).key == draw(5).key
    assert draw(5).key != draw(6).key


# rearc scores by comparing tuples, word_ladder makes its problems in advance, rubiks_cube has no one right answer
@pytest.mark.parametrize("name", ["spell_backward", "rearc", "word_ladder", "leg_counting"])
def test_correct_answers_score_1_after_json_encoding(name):
    problem = draw(name=name)
    travelled = type(problem)(**json.loads(json.dumps({f: getattr(problem, f) for f in problem.__slots__})))
    score = reward_function(travelled)
    assert score(problem.answer) == 1
    assert score(f"<think>hm</think>So: <answer>{problem.answer}</answer>") == 1
    assert score("no idea") < 0.2


def test_tasks_with_several_answers_are_scored():
    problem = draw(name="rubiks_cube")
    assert problem.answer == ""
    assert 0 <= reward_function(problem)("U R U'") < 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "spell_backwards"}, "'spell_backwards': unknown; did you mean spell_backward?"),
        ({"name": "qqqqq"}, "unknown; known: ab, "),
        ({"options": {"min_len": 3}}, "options {'min_len': 3} are invalid: "),
        ({"options": {"min_word_len": 9, "max_word_len": 3}}, "are invalid: max_word_len must be >= min_word_len"),
        ({"options": {"seed": 3}}, "seed is not allowed here"),
    ],
)
def test_wrong_names_and_options_are_reported(settings, said):
    with pytest.raises(TaskError) as caught:
        draw(**settings)
    assert said in str(caught.value)
