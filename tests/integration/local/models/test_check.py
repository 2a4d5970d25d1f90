"""`poise models check` on small models of many kinds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.support.architectures import make_architecture

from poise.cli import main


def check(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["models", "check", *map(str, arguments)])


def facts(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    result = check(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_architecture(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("name", ["bloom", "gemma2", "gpt2", "gpt_oss", "granite", "llama4_text", "opt", "qwen3_moe"])
def test_trainable_model_has_status_0(name, tmp_path):
    status, found = facts(make_architecture(tmp_path, name))
    needed = {part["part"]: part for part in found["parts"] if part["needed"]}
    assert (status, found["trainable"], found["problem"]) == (0, True, "")
    assert list(needed) == ["engine torch", "learner"]
    assert all(part["largest_nats"] < 1e-3 for part in needed.values())
    assert all(part["mean_nats"] <= part["largest_nats"] for part in needed.values())


def test_table_shows_how_the_learner_computes(tmp_path):
    result = check(make_architecture(tmp_path, "granite"))
    assert result.exit_code == 0
    assert "packed rows and the model's own head" in result.stdout
    assert result.stdout.splitlines()[-1] == "the model can be trained"


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_untrainable_model_has_status_1_and_a_reason(name, tmp_path):
    status, found = facts(make_architecture(tmp_path, name))
    assert (status, found["trainable"]) == (1, False)
    assert {part["part"]: part["ok"] for part in found["parts"]} == {
        "engine torch": False,
        "learner": False,
        "adapters": False,
    }
    assert "cannot be trained" in found["parts"][1]["detail"]
    assert found["problem"]


def test_configured_adapters_are_required(tmp_path):
    folder = make_architecture(tmp_path / "model", "mamba")
    (tmp_path / "run.yaml").write_text(
        f"model: {folder}\nengine: torch\nlora: {{rank: 4}}\ntrain: {{tasks: [{{kind: digits}}]}}\n"
    )
    status, found = facts("-c", tmp_path / "run.yaml")
    assert (status, found["trainable"]) == (1, False)
    assert "cannot take these adapters" in found["problem"]
    status, found = facts("-c", tmp_path / "run.yaml", "--set", "lora.target_modules=[in_proj]")
    assert (status, found["problem"]) == (0, "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_settings_of_a_run_apply(dtype, llama, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"model: {llama}\nengine: torch\ndtype: {dtype}\ntrain: {{tasks: [{{kind: digits}}]}}\n"
    )
    status, found = facts("-c", tmp_path / "run.yaml")
    learner = next(part for part in found["parts"] if part["part"] == "learner")
    assert (status, learner["dtype"]) == (0, dtype)
    assert (learner["allowed_largest_nats"] is None) == (dtype == "bfloat16")


def test_damaged_engine_is_detected(llama, monkeypatch):
    from poise.generation.engines.transformers.forward import TorchForward

    whole = TorchForward.__call__
    monkeypatch.setattr(TorchForward, "__call__", lambda *arguments: whole(*arguments) / 1.1)
    status, found = facts(llama)
    assert (status, found["trainable"]) == (1, False)
    assert found["problem"].startswith("engine torch: log-probabilities differ by up to ")
    assert [part["ok"] for part in found["parts"]] == [False, True, True]


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def test_failing_export_is_detected(llama, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    remove_tokenizer(folder)
    _, found = facts(folder)
    learner = next(part for part in found["parts"] if part["part"] == "learner")
    assert not learner["ok"]
    assert learner["detail"].startswith("its export fails: ")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def name_an_unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 100)


@pytest.mark.parametrize(
    ("damage", "status", "message"),
    [
        (remove_tokenizer, 1, "tokenizer"),
        (remove_weights, 2, "is not a Hugging Face model"),
        (name_an_unknown_architecture, 1, "nonesuch"),
        (damage_weights, 1, "cannot be loaded"),
    ],
)
def test_damaged_folder_is_one_message(damage, status, message, llama, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(llama, folder)
    damage(folder)
    result = check(folder)
    assert result.exit_code == status
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a model"),
        (["/nowhere"], "FOLDER: /nowhere does not exist"),
        (["tiny", "--set", "dtype=bfloat16"], "Set -c FILE or --preset NAME"),
        (["tiny", "--engine", "fast"], "'fast' is not one of"),
    ],
)
def test_mistake_has_status_2(arguments, message):
    result = check(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_help_explains_the_check():
    result = check("--help")
    for words in ("--engine vllm", "-c run.yaml", "nats", "Exit status: 1 if the model cannot be trained"):
        assert words in result.output
