"""`poise models`: models that can be created here, and whether a model can be trained."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from poise.cli.options import checked, fail, load_options, log_to_terminal, run_options


class _ModelsGroup(click.Group):
    """Accepts `poise models NAME` as short for `poise models make NAME`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-"):
            args = ["make", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_ModelsGroup, invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """List, create or check models.

    \b
    poise models                       list the models that can be created here
    poise models tiny                  create one in the cache, and print its folder
    poise models check my/model        compare engine, learner and adapters with the model's own forward pass
    """
    if ctx.invoked_subcommand is not None:
        return
    from poise.local.models.catalog import KNOWN_MODELS, is_ready
    from poise.runtime.files.cache import cache_dir

    for known, about in KNOWN_MODELS.items():
        state = "ready" if is_ready(known) else f"takes about {about.seconds} s"
        click.echo(f"{known:24} {about.about} ({state})")
    click.echo(f"cache: {cache_dir()}")


@models.command()
@click.argument("name")
def make(name: str) -> None:
    """Create a model in the cache, and print its folder."""
    from poise.local.models.catalog import KNOWN_MODELS, make_model

    if name not in KNOWN_MODELS:
        fail(f"model {name!r} is unknown; known: {', '.join(KNOWN_MODELS)}. `poise models check` accepts any folder")
    log_to_terminal()
    click.echo(checked(lambda: make_model(name)))


@models.command()
@run_options
@click.argument("folder", required=False)
@click.option(
    "--engine", type=click.Choice(["torch", "vllm"]), help="Engine to check besides `torch`. Default: the run's."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(
    path: Path | None,
    preset: str | None,
    overrides: tuple[str, ...],
    folder: str | None,
    engine: str | None,
    as_json: bool,
) -> None:
    """Compare engine, learner and LoRA adapters with the model's own forward pass, in nats per token.

    FOLDER is a Hugging Face folder, a name of `poise models`, or org/name on the hub. With -c or --preset, the settings
    of that run apply, such as `dtype` and `lora`, and FOLDER is optional.

    \b
    poise models check my/model                     transformers engine, learner, adapters
    poise models check my/model --engine vllm       vLLM as well
    poise models check -c run.yaml                  the run's model, engine and settings

    Each row shows the largest and the mean difference of the log-probabilities of the same tokens. In float32, rounding
    causes about 1e-5. A larger difference means that the engine or the learner omits a part of the model.

    The learner runs this check when it loads a model, and `train.max_mismatch_kl` limits the difference of engine and
    learner in the first step.

    Exit status: 1 if the model cannot be trained, 2 if it does not exist.
    """
    from poise.local.models.check import check_model

    if path is None and preset is None and overrides:
        fail("--set changes the settings of a run. Set -c FILE or --preset NAME too")
    run = None if path is None and preset is None else load_options(path, preset, overrides)
    log_to_terminal()
    sys.exit(checked(lambda: check_model(folder, run, engine, as_json)))
