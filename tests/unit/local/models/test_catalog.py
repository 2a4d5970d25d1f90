"""Models that are created once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from poise.local.models import catalog as models
from poise.local.models.catalog import KnownModel, is_ready, locate_model, make_model
from poise.runtime.config.settings import ConfigError
from poise.runtime.files.cache import cache_dir


class Maker:
    """Makes a folder in two steps, and can be made to fail between them."""

    def __init__(self) -> None:
        self.num_made = 0
        self.failure: Exception | None = None

    def __call__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").touch()
        if self.failure is not None:
            raise self.failure
        (folder / "model.safetensors").touch()
        self.num_made += 1


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    maker = Maker()
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "KNOWN_MODELS", {"toy": KnownModel("a toy", 1, maker)})
    return maker


def test_known_model_is_created_once(maker: Maker, tmp_path: Path) -> None:
    assert not is_ready("toy")
    assert locate_model("toy") == tmp_path / "cache" / "toy"
    assert maker.num_made == 0
    assert make_model("toy") == make_model("toy") == tmp_path / "cache" / "toy"
    assert is_ready("toy")
    assert maker.num_made == 1


def test_concurrent_processes_create_a_model_once(maker: Maker) -> None:
    together = threading.Barrier(4)

    def make() -> None:
        together.wait()
        make_model("toy")

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert maker.num_made == 1


def test_failed_creation_leaves_nothing_and_can_be_retried(maker: Maker) -> None:
    maker.failure = RuntimeError("broke off")
    with pytest.raises(RuntimeError):
        make_model("toy")
    assert not is_ready("toy")
    assert [path.name for path in cache_dir().iterdir()] == ["toy.lock"]
    maker.failure = None
    make_model("toy")
    assert is_ready("toy")


def test_partial_model_of_a_killed_process_is_not_used(maker: Maker) -> None:
    writing = cache_dir() / "toy.writing"
    writing.mkdir(parents=True)
    (writing / "config.json").touch()
    assert not is_ready("toy")
    make_model("toy")
    assert not writing.exists()
    assert (cache_dir() / "toy" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            ImportError("No module named 'gguf'"),
            r"toy cannot be created here: No module named 'gguf'. Run `make setup`",
        ),
        (OSError(28, "No space left on device"), r"toy cannot be created in .*cache: .*No space left.*\$POISE_CACHE"),
    ],
)
def test_failed_creation_is_reported_with_its_reason(maker: Maker, failure: Exception, message: str) -> None:
    maker.failure = failure
    with pytest.raises(ConfigError, match=message):
        make_model("toy")


def test_folder_is_used_and_a_missing_one_rejected(maker: Maker, tmp_path: Path) -> None:
    assert make_model(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match=r"folder \./nowhere does not exist. Known names: toy"):
        make_model("./nowhere")


def test_other_names_are_hub_names(maker: Maker) -> None:
    assert make_model("org/model") == "org/model"


def test_environment_sets_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("POISE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/poise")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "poise"
    monkeypatch.setenv("POISE_CACHE", "/named")
    assert cache_dir() == Path("/named")
