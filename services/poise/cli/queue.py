"""`poise queue`: the labels on their way to the probe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poise.cli.options import checked, fail, load_options, run_options

if TYPE_CHECKING:
    from poise.local.queue import QueueAdmin


@click.group()
def queue() -> None:
    """The labels on their way to the probe: how many wait, and which were refused as poison.

    \b
    poise queue status -c run.yaml              how many wait
    poise queue list -c run.yaml                what was refused, and why
    poise queue replay -c run.yaml ID...        queue it again, once the reason is gone; --all for all
    poise queue discard -c run.yaml ID...       delete it for good

    Instead of a run, --admin http://host:8052 names the admin app of a value service, and --token-file its token.
    """


def _queue_options(command: Callable[..., Any]) -> Callable[..., Any]:
    admin = click.option("--admin", metavar="URL", help="Admin app of a value service, in place of a run.")
    token = click.option(
        "--token-file", type=click.Path(path_type=Path, dir_okay=False), help="File with its bearer token."
    )
    return run_options(admin(token(command)))


_letters_argument = click.argument("ids", nargs=-1)
_all_option = click.option("--all", "everything", is_flag=True, help="All that are kept, oldest first.")


@queue.command(name="status")
@_queue_options
def queue_status(**where: Any) -> None:
    """Tell how many labels wait, and how many were ever refused."""
    pending, dead = checked(_queue_admin(**where).depth)
    click.echo(f"{pending} groups published and not yet learnt; {dead} ever refused")


@queue.command(name="list")
@_queue_options
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Most letters shown.")
def queue_list(limit: int, **where: Any) -> None:
    """List what was refused, newest first: id, group, size, reason."""
    from poise.local.queue import letter_line

    letters = checked(lambda: _queue_admin(**where).letters(limit))
    click.echo("\n".join(map(letter_line, letters)) or "nothing was refused")


@queue.command(name="replay")
@_queue_options
@_letters_argument
@_all_option
def queue_replay(ids: tuple[str, ...], everything: bool, **where: Any) -> None:
    """Queue refused labels again as they were: all of the named ones, or none.

    A label that was learnt meanwhile is not learnt twice; one that is still poison is refused again.
    """
    admin = _queue_admin(**where)
    wanted = checked(lambda: _wanted_letters(admin, ids, everything))
    click.echo(f"{checked(lambda: admin.replay(wanted)) if wanted else 0} queued again")


@queue.command(name="discard")
@_queue_options
@_letters_argument
@_all_option
def queue_discard(ids: tuple[str, ...], everything: bool, **where: Any) -> None:
    """Delete refused labels for good."""
    admin = _queue_admin(**where)
    wanted = checked(lambda: _wanted_letters(admin, ids, everything))
    click.echo(f"{checked(lambda: admin.discard(wanted)) if wanted else 0} deleted")


def _wanted_letters(admin: QueueAdmin, ids: tuple[str, ...], everything: bool) -> list[str]:
    if bool(ids) == everything:
        fail("name the ids of `poise queue list`, or give --all")
    return admin.all_ids() if everything else list(ids)


def _queue_admin(
    path: Path | None,
    preset: str | None,
    overrides: tuple[str, ...],
    admin: str | None,
    token_file: Path | None,
) -> QueueAdmin:
    from poise.local.queue import QueueAdmin, admin_url
    from poise.runtime.config.settings import open_token_file

    if admin is None:
        if token_file is not None:
            fail("--token-file goes with --admin; a run's own token is known")
        run = load_options(path, preset, overrides)
        return QueueAdmin(f"http://{run.admin_address('value')}", checked(run.value.auth.read_token))
    if path is not None or preset is not None or overrides:
        fail("give either --admin or a run (-c, --preset, --set), not both")
    url = checked(lambda: admin_url(admin))
    token = checked(lambda: open_token_file(token_file, "--token-file"))
    return QueueAdmin(url, None if token is None else token.current)
