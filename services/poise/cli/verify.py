"""`poise verify`: the reward of a response, and the reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from poise.cli.options import checked, fail


@click.command()
@click.option("--verifier", metavar="NAME", help="exact, numeric, regex, or your package.module:function.")
@click.option("--answer", metavar="TEXT", help="The expected answer; for regex, the pattern.")
@click.option("--response", metavar="TEXT", help="The model's response, with thoughts and tags.")
@click.option(
    "--finish-reason",
    type=click.Choice(["stop", "length", "abort"]),
    help="Why the response ended, for verifiers with this parameter.",
)
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="JSON lines of cases, instead of the options above.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with reward and reason for each case.")
def verify(
    verifier: str | None,
    answer: str | None,
    response: str | None,
    finish_reason: Any,
    path: Path | None,
    as_json: bool,
) -> None:
    """Show the reward of a response and the reason. Use it to test a verifier before training.

    \b
    poise verify --verifier numeric --answer 0.5 --response 'The answer is 1/2.'
    poise verify --verifier regex --answer '\\bgr[ae]y\\b' --response '<think>blue?</think>grey'
    poise verify --verifier my_checks:score --answer yes --response no --finish-reason length
    poise verify --file cases.jsonl

    A line of FILE is {"verifier": "numeric", "answer": 0.5, "response": "1/2", "reward": 1}. The expected reward and
    "finish_reason" are optional. An answer keeps its JSON type; --answer is text.

    \b
    exact    the final answer is the text, ignoring case and surrounding punctuation
    numeric  the final answer has the value: 1e-5, 10**-5, 1,234, 50%, 5 km, \\frac{1}{2}, sqrt(2), [0, 1), x+1
    regex    the pattern is found in the final answer

    The final answer is the response without <think>...</think>, or the content of its last <answer>; for numeric, the
    last \\boxed{} in it. A function gets the whole response: function(response, answer), with problem= and
    finish_reason= if it has these parameters. It runs in a process with limits of time and memory.

    Exit status: 1 if a reward differs from the expected one or a verifier failed, 2 if a case cannot be used.
    """
    from poise.orchestrator.rewards.cases import Case, CaseError, read_cases, run_cases
    from poise.orchestrator.rewards.config import VerifierConfig

    single = (verifier, answer, response)
    if path is None and None in single:
        fail("set --verifier, --answer and --response, or --file FILE")
    if path is not None and (*single, finish_reason) != (None,) * 4:
        fail("--file cannot be combined with --verifier, --answer, --response or --finish-reason")
    try:
        cases = read_cases(path) if path else {0: Case(str(verifier), str(answer), str(response), finish_reason)}
    except CaseError as error:
        fail(str(error))
    except ValueError as error:
        fail(f"--{error}")
    outcomes = checked(lambda: run_cases(list(cases.values()), VerifierConfig()))
    for (line, case), outcome in zip(cases.items(), outcomes, strict=True):
        if as_json:
            where: dict[str, Any] = {"line": line} if path else {}
            expected = {} if case.expected is None else {"expected": case.expected}
            shown = {**where, "reward": outcome.reward, "reason": outcome.reason, "failed": outcome.failed, **expected}
            click.echo(json.dumps(shown))
        else:
            prefix = f"{path}:{line}: " if path else ""
            wanted = "" if outcome.as_expected else f", expected {case.expected:g}"
            click.echo(
                f"{prefix}reward {outcome.reward:g}{wanted}: {outcome.reason or 'the verifier returns no reason'}"
            )
    num_wrong = sum(not outcome.as_expected for outcome in outcomes)
    num_failed = sum(outcome.failed for outcome in outcomes)
    if path and not as_json:
        click.echo(f"{len(outcomes)} cases: {num_wrong} with an unexpected reward, {num_failed} not verified")
    sys.exit(1 if num_wrong or num_failed else 0)
