"""Files of verifier cases, and the rewards of the cases stored with the tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from poise.cli import main
from poise.orchestrator.rewards import verifiers
from poise.orchestrator.rewards.cases import CaseError, read_cases

CASES = Path(__file__).with_name("cases")
GOOD = '{"verifier": "numeric", "answer": 0.5, "response": "1/2", "reward": 1}'


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cases.jsonl"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of verifiers into the working folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "my_checks.py"


def verify(*arguments):
    return CliRunner().invoke(main, ["verify", *map(str, arguments)], prog_name="poise")


@pytest.mark.parametrize("verifier", ["numeric", "exact", "regex"])
def test_responses_get_the_expected_rewards(verifier):
    wrong = []
    for number, case in read_cases(CASES / f"{verifier}.jsonl").items():
        score = getattr(verifiers, verifier)(case.response, case.answer)
        if score != case.expected:
            wrong.append(f"{number}: {case.answer!r} and {case.response!r} earn {score}: {score.reason}")
    assert wrong == []


def test_single_case_prints_reward_and_reason():
    done = verify("--verifier", "numeric", "--answer", "0.5", "--response", "<think>2?</think>1/2")
    assert done.exit_code == 0
    assert done.output == "reward 1: the response gives 1/2, the answer is 1/2\n"


def test_single_case_as_json_is_an_object_with_reward():
    done = verify("--verifier", "exact", "--answer", "yes", "--response", "no", "--json")
    assert done.exit_code == 0
    assert json.loads(done.output) == {
        "reward": 0.0,
        "reason": "the final answer is 'no', the correct answer is 'yes'",
        "failed": False,
    }


def test_cases_are_compared_with_expected_rewards(file):
    file.write_text(f"{GOOD}\n\n{GOOD.replace('1/2', '2')}\n")
    done = verify("--file", file)
    assert done.exit_code == 1
    assert done.output.splitlines() == [
        f"{file}:1: reward 1: the response gives 1/2, the answer is 1/2",
        f"{file}:3: reward 0, expected 1: the response gives 2, the answer is 1/2",
        "2 cases: 1 with an unexpected reward, 0 not verified",
    ]


def test_file_as_json_has_an_object_for_each_case(file):
    file.write_text(f"{GOOD}\n{GOOD}\n")
    done = verify("--file", file, "--json")
    assert done.exit_code == 0
    assert [json.loads(line)["line"] for line in done.output.splitlines()] == [1, 2]


def test_own_function_gets_typed_answer_and_finish_reason(module, file):
    module.write_text("def score(response, answer, finish_reason): return finish_reason == 'length' and answer == 7")
    case = {"verifier": "my_checks:score", "answer": 7, "response": "", "finish_reason": "length", "reward": 1}
    file.write_text(json.dumps(case))
    assert verify("--file", file).exit_code == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('no such thing')", "KeyError: 'no such thing'"),
        ("return 2", "returned 2.0; must return a number in [0, 1]"),
        ("import os; os._exit(3)", "its process exited with status 3"),
        ("return len(bytearray(2**40))", "exceeded verifier.max_memory_bytes"),
    ],
)
def test_failing_function_gets_reward_0_with_status_1(module, body, reason):
    module.write_text(f"def score(response, answer): {body}")
    done = verify("--verifier", "my_checks:score", "--answer", "a", "--response", "r", "--json")
    assert done.exit_code == 1
    shown = json.loads(done.stdout.splitlines()[-1])
    assert (shown["reward"], shown["failed"]) == (0, True)
    assert reason in shown["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "set --verifier, --answer and --response, or --file FILE"),
        (["--verifier", "exact", "--answer", "a"], "set --verifier, --answer and --response"),
        (["--file", "a", "--answer", "b"], "--file cannot be combined with --verifier"),
        (["--verifier", "exakt", "--answer", "a", "--response", "b"], "did you mean 'exact'?"),
        (
            ["--verifier", "regex", "--answer", "(", "--response", "b"],
            "answer: is not a valid regular expression: missing )",
        ),
        (["--verifier", "numeric", "--answer", "Paris", "--response", "b"], "'Paris' is not a mathematical expression"),
        (["--file", "missing.jsonl"], "missing.jsonl: is not readable: No such file"),
    ],
)
def test_invalid_cases_are_rejected(arguments, message):
    done = verify(*arguments)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "is a list; must be an object"),
        ("{", "is not JSON"),
        ('{"verifier": "exact", "answer": "a"}', "response: missing"),
        (GOOD.replace("reward", "rewad"), "rewad: unknown; known: verifier, answer"),
        (GOOD.replace('"1/2"', "2"), "response: is a number; must be text"),
        (GOOD.replace("0.5", "null"), "answer: is null; must be text or a number"),
        (GOOD.replace('"reward": 1', '"reward": 2'), "reward: is 2; must be a number from 0 to 1"),
        (GOOD.replace("numeric", "numerics"), "verifier: 'numerics': unknown; did you mean 'numeric'?"),
        (GOOD.replace("numeric", "regex").replace("0.5", '"["'), "answer: is not a valid regular expression"),
        (GOOD[:-1] + ', "finish_reason": "eos"}', "finish_reason: is 'eos'; must be one of stop, length, abort"),
    ],
)
def test_wrong_line_is_named_by_file_and_number(file, line, message):
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(CaseError) as caught:
        read_cases(file)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert message in str(caught.value)


def test_many_wrong_lines_are_cut_at_five_and_counted(file):
    file.write_text("{}\n" * 9)
    with pytest.raises(CaseError) as caught:
        read_cases(file)
    assert len(str(caught.value).splitlines()) == 6
    assert str(caught.value).endswith("4 more lines are invalid")
