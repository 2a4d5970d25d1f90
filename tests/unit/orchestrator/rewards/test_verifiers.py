"""Rewards of the built-in verifiers and of user-defined ones."""

from __future__ import annotations

import sys

import pytest

from poise.orchestrator.rewards.final_answer import final_answer, last_box
from poise.orchestrator.rewards.verifiers import (
    check_answer,
    exact,
    load_verifier,
    numeric,
    regex,
    reward_function,
    valid_reward,
)
from poise.orchestrator.tasks.problem import Problem


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of verifiers and return its name."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])

    def write(text, name):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (" Paris\n", "Paris"),
        ("<think>Rome? <answer>Rome</answer></think> Paris ", "Paris"),
        ("<think>Rome?</think>Paris", "Paris"),
        ("Rome?</think>Paris", "Paris"),
        ("<answer>Rome</answer> or <answer>\nParis </answer>.", "Paris"),
        ("<think>Rome?</think><answer>Par", "Par"),
        ("<think>Rome?</think><answer>Paris</answ", "Paris"),
        ("<think>Rome? <answer>Rome</answer>", ""),
        ("Rome <think>or", ""),
        ("<answer>Paris</answer> <think>or", "Paris"),
        ("", ""),
    ],
)
def test_final_answer_excludes_thoughts(response, said):
    assert final_answer(response) == said


def test_a_thought_may_start_in_the_prompt():
    opened = reward_function(Problem("d", "2+2? <think>\n", "4", "numeric"))
    assert opened("that is 4") == 0
    assert opened("hm</think>4") == 1


@pytest.mark.parametrize(
    ("box", "said"),
    [
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{5", "5"),
        ("5", None),
    ],
)
def test_last_box_is_found_with_its_braces(box, said):
    assert last_box(box) == said


@pytest.mark.parametrize("response", ["Paris", " paris.\n", '"PARIS"!', "'Paris'", "<think>Rome</think>\nParis."])
def test_exact_ignores_case_spaces_quotes_and_stops(response):
    assert exact(response, "Paris") == 1
    assert exact(response, " paris. ") == 1


@pytest.mark.parametrize("response", ["", "Pari", "Paris, France", "It is Paris", "Par is", "Paris\nRome"])
def test_exact_rejects_other_differences(response):
    assert exact(response, "Paris") == 0


def test_regex_is_searched_for():
    assert regex("the colour is grey", r"\bgr[ae]y\b") == 1
    assert regex("the colour is greyish", r"\bgr[ae]y\b") == 0
    assert regex("ab", "^b") == 0


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("72", "48+24 makes\n#### 72"),
        ("He sold 48/2=24.\n#### 1,234", "It is 1234"),
        ("5", "First 3, then 4.\n#### 5\nQ: another one?"),
        ("18", "9 * 2 = <<9*2=18>>18 a day.\n#### 18"),
        (r"\frac{1}{2}", r"so \boxed{0.5}"),
        ("1/2", r"$\frac12$"),
        ("2/3", r"not \boxed{1} but \boxed{\frac{2}{3}}"),
        ("-3.5", "The answer is -3.5."),
        ("$18", "18 dollars"),
        ("1000", "$1,000"),
        ("12", "<think>13</think>It is 12.0"),
        ("x+1", "$1+x$"),
    ],
)
def test_numeric_accepts_equal_values_in_any_notation(answer, response):
    assert numeric(response, answer) == 1


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("72", "73"),
        ("72", "-72"),
        ("72", ""),
        ("72", "no idea"),
        ("1", r"not \boxed{1} but \boxed{\frac{2}{3}}"),
        ("4", "4 then\n#### 5"),
        ("13", "<think>13</think>12"),
        ("1/3", "0.333"),
    ],
)
def test_numeric_rejects_other_values(answer, response):
    assert numeric(response, answer) == 0


def test_a_non_numeric_answer_is_an_error():
    with pytest.raises(ValueError, match="'#### ' is not a mathematical expression"):
        numeric("1", "#### ")


def problem(verifier, **others) -> Problem:
    return Problem("d", "p", "a", verifier, **others)


def test_functions_are_called_with_response_and_answer(module):
    name = module("def score(response, answer):\n    return 0.5 if (response, answer) == ('r', 'a') else 0", "plain")
    assert reward_function(problem(f"{name}:score"))("r") == 0.5


@pytest.mark.parametrize(
    ("taker", "signature"),
    [
        ("keyword", "response, answer, *, problem"),
        ("optional", "response, answer, problem=None"),
        ("anything", "response, answer, **others"),
    ],
)
def test_functions_get_problem_if_they_take_it(module, taker, signature):
    name = module(
        f"def score({signature}):\n"
        "    problem = locals().get('problem') or others['problem']\n"
        "    return problem.metadata['level'] / 4",
        f"takes_{taker}",
    )
    assert reward_function(problem(f"{name}:score", metadata={"level": 3}))("r") == 0.75


def test_functions_get_finish_reason_if_they_take_it(module):
    name = module("def score(response, answer, finish_reason=None):\n    return finish_reason == 'length'", "ends")
    score = reward_function(problem(f"{name}:score"))
    assert (score("r", "length"), score("r", "stop"), score("r")) == (1, 0, 0)


@pytest.mark.parametrize(
    ("verifier", "answer", "said"),
    [
        ("regex", "(b", "is not a valid regular expression: missing )"),
        ("regex", "[a-", "is not a valid regular expression: unterminated character set"),
        ("regex", "a{2,1}", "is not a valid regular expression: min repeat greater than max"),
        ("regex", "a{99999999999}", "is not a valid regular expression"),
        ("numeric", "Paris", "is not a mathematical expression; use another verifier, such as exact"),
        ("numeric", "no solution", "is not a mathematical expression"),
        ("numeric", "#### ", "is not a mathematical expression"),
        ("exact", " ", "is empty"),
    ],
)
def test_an_unusable_answer_is_rejected(verifier, answer, said):
    with pytest.raises(ValueError) as caught:
        check_answer(verifier, answer)
    assert said in str(caught.value)


@pytest.mark.parametrize("answer", [5, 1e-5, "x+1", "sqrt(x)", "5 km", r"\text{none}", "2xy", "e^x", "inf", "[0, 1)"])
def test_numeric_accepts_answers_with_a_value(answer):
    check_answer("numeric", answer)


def test_modules_in_the_working_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside_me.py").write_text("def score(response, answer):\n    return True")
    assert load_verifier("beside_me:score")("r", "a") is True


@pytest.mark.parametrize(
    ("verifier", "said"),
    [
        ("exakt", "'exakt': unknown; did you mean 'exact'?"),
        ("something", "unknown; use exact, numeric, regex or package.module:function"),
        ("nowhere.at.all:check", "module nowhere.at.all cannot be imported: ModuleNotFoundError"),
        ("broken_on_import:check", "module broken_on_import cannot be imported: ZeroDivisionError"),
        ("a_script:check", "module a_script cannot be imported: SystemExit(0)"),
        ("odd_ones:scor", "module odd_ones has no scor; did you mean 'score'?"),
        ("odd_ones:NUMBER", "is a int; must be a function"),
        ("odd_ones:later", "is asynchronous; must be a plain function"),
        ("odd_ones:one", "cannot be called as function(response, answer): too many positional"),
        ("odd_ones:four", "cannot be called as function(response, answer): missing a required argument: 'extra'"),
    ],
)
def test_invalid_functions_are_rejected(module, verifier, said):
    module("1 / 0", "broken_on_import")
    module("import sys\nsys.exit(0)", "a_script")
    module(
        "NUMBER = 3\ndef score(r, a): ...\nasync def later(r, a): ...\ndef one(r): ...\ndef four(r, a, *, extra): ...",
        "odd_ones",
    )
    with pytest.raises(ValueError) as caught:
        load_verifier(verifier)
    assert said in str(caught.value)


@pytest.mark.parametrize(("reward", "float_"), [(True, 1.0), (False, 0.0), (0.25, 0.25), (1, 1.0)])
def test_rewards_in_range_are_accepted(reward, float_):
    value = valid_reward(reward)
    assert (type(value), value) == (float, float_)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 1.01, -0.01, "0.5", None, [1.0]])
def test_invalid_rewards_are_rejected(reward):
    with pytest.raises(ValueError, match="must return a number in"):
        valid_reward(reward)
