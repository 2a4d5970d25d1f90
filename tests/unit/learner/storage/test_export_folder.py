"""What may be replaced by an export, and what stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from poise.errors import InvalidRequest
from poise.learner.storage.export_folder import write_export


def save(content: str) -> Callable[[str], None]:
    def write(folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "model").write_text(content)

    return write


def test_an_export_says_its_version_and_is_replaced_by_the_next(tmp_path: Path) -> None:
    for version in (1, 2):
        path = write_export(tmp_path / "exports", "mine", version, save(f"weights {version}"))
        assert path == (tmp_path / "exports" / "mine").resolve()
        assert (path / "model").read_text() == f"weights {version}"
        assert json.loads((path / "poise_export.json").read_text()) == {"policy_version": version}
    assert [file.name for file in (tmp_path / "exports").iterdir()] == ["mine"]


def a_folder(place: Path) -> None:
    place.mkdir()
    (place / "journal").write_text("of the run")


def a_file(place: Path) -> None:
    place.write_text("of the run")


def a_link_to_nothing(place: Path) -> None:
    place.symlink_to("nowhere")


@pytest.mark.parametrize("make", [a_folder, a_file, a_link_to_nothing])
def test_what_is_no_export_is_never_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "services")
    with pytest.raises(InvalidRequest, match=r"name: .*services is there already and is no export.*another name"):
        write_export(tmp_path, "services", 1, save("weights"))
    if make is a_link_to_nothing:
        assert (tmp_path / "services").is_symlink()
    else:
        kept = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
        assert kept == ["of the run"]
    assert [file.name for file in tmp_path.iterdir()] == ["services"]


def test_an_export_that_fails_midway_leaves_the_earlier_one(tmp_path: Path) -> None:
    write_export(tmp_path, "mine", 1, save("weights 1"))

    def fail(folder: str) -> None:
        save("half")(folder)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_export(tmp_path, "mine", 2, fail)
    assert (tmp_path / "mine" / "model").read_text() == "weights 1"
    write_export(tmp_path, "mine", 3, save("weights 3"))
    assert (tmp_path / "mine" / "model").read_text() == "weights 3"
