"""`poise queue`: labels in the queue, and dead letters."""

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
    """Inspect the queue of labels.

    A label that the probe cannot learn becomes a dead letter.

    \b
    poise queue status -c run.yaml              count waiting labels and dead letters
    poise queue list -c run.yaml                list dead letters with their reasons
    poise queue replay -c run.yaml ID...        queue dead letters again, after correcting the cause; --all for all
    poise queue discard -c run.yaml ID...       delete dead letters

    For a value service elsewhere, use --admin http://host:8052 and --token-file instead of a run.
    """


def _queue_options(command: Callable[..., Any]) -> Callable[..., Any]:
    admin = click.option("--admin", metavar="URL", help="Admin app of a value service, instead of a run.")
    token = click.option(
        "--token-file", type=click.Path(path_type=Path, dir_okay=False), help="File with its bearer token."
    )
    return run_options(admin(token(command)))


_letters_argument = click.argument("ids", nargs=-1)
_all_option = click.option("--all", "everything", is_flag=True, help="All dead letters, oldest first.")


@queue.command(name="status")
@_queue_options
def queue_status(**where: Any) -> None:
    """Count waiting labels, and dead letters so far."""
    pending, dead = checked(_queue_admin(**where).depth)
    click.echo(f"{pending} groups waiting; {dead} dead letters so far")


@queue.command(name="list")
@_queue_options
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Maximum number of letters.")
def queue_list(limit: int, **where: Any) -> None:
    """List dead letters, newest first: id, group, size, reason."""
    from poise.local.queue import letter_line

    letters = checked(lambda: _queue_admin(**where).letters(limit))
    click.echo("\n".join(map(letter_line, letters)) or "no dead letters")


@queue.command(name="replay")
@_queue_options
@_letters_argument
@_all_option
def queue_replay(ids: tuple[str, ...], everything: bool, **where: Any) -> None:
    """Queue dead letters again unchanged: all of the named ones, or none.

    A label that has been learnt is not learnt again. One that still cannot be learnt becomes a dead letter again.
    """
    admin = _queue_admin(**where)
    wanted = checked(lambda: _wanted_letters(admin, ids, everything))
    click.echo(f"{checked(lambda: admin.replay(wanted)) if wanted else 0} queued again")


@queue.command(name="discard")
@_queue_options
@_letters_argument
@_all_option
def queue_discard(ids: tuple[str, ...], everything: bool, **where: Any) -> None:
    """Delete dead letters permanently."""
    admin = _queue_admin(**where)
    wanted = checked(lambda: _wanted_letters(admin, ids, everything))
    click.echo(f"{checked(lambda: admin.discard(wanted)) if wanted else 0} deleted")


def _wanted_letters(admin: QueueAdmin, ids: tuple[str, ...], everything: bool) -> list[str]:
    if bool(ids) == everything:
        fail("name ids from `poise queue list`, or set --all")
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
            fail("--token-file requires --admin. For a run, omit it: its settings name the token")
        run = load_options(path, preset, overrides)
        return QueueAdmin(f"http://{run.admin_address('value')}", checked(run.value.auth.read_token))
    if path is not None or preset is not None or overrides:
        fail("set either --admin or a run (-c, --preset, --set), not both")
    url = checked(lambda: admin_url(admin))
    token = checked(lambda: open_token_file(token_file, "--token-file"))
    return QueueAdmin(url, None if token is None else token.current)
