"""Exports, which the learner also checks at its start so that they succeed at the end of the run."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.support.architectures import make_architecture

from poise.errors import BackendDown, InvalidRequest, PoiseError
from poise.learner.config import LearnerConfig, LoraSettings
from poise.learner.core import LearnerCore
from poise.learner.distributed.process_group import World
from poise.learner.models.policy import Policy
from poise.learner.storage.checkpoint import StateError
from poise.runtime.cli.exit_status import FAILED, WRONG_SETTINGS, exit_status
from poise.runtime.models.checkpoint_digest import EXPORT_MARK
from poise.runtime.models.generation_config import load_generation_config

Configure = Callable[..., LearnerConfig]


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture
def recovered(config: Configure) -> Iterator[Callable[..., LearnerCore]]:
    """Start learners that are closed at the end."""
    cores: list[LearnerCore] = []

    def start(**changes: Any) -> LearnerCore:
        cores.append(LearnerCore(config(**changes)))
        cores[-1].recover()
        return cores[-1]

    yield start
    for core in cores:
        core.close()


INVALID: list[tuple[Any, set[str]]] = [
    ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, {"temperature", "top_p"}),
    ({"temperature": 0.0}, {"temperature"}),
    ({"top_k": 20, "eos_token_id": 3}, {"top_k"}),
    ({"do_sample": False, "min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1}, {"min_p", "typical_p"}),
    ({"num_beams": 1, "early_stopping": True, "length_penalty": 2.0}, {"early_stopping", "length_penalty"}),
    ({"num_return_sequences": 4}, {"num_return_sequences"}),
    ({"max_new_tokens": 0}, {"max_new_tokens"}),
    ({"max_new_tokens": "many"}, {"max_new_tokens"}),
    ({"pad_token_id": -1}, {"pad_token_id"}),
    ({"output_scores": True}, {"output_scores"}),
    ({"use_cache": False, "cache_implementation": "static"}, {"cache_implementation"}),
    ({"cache_implementation": "nonsense"}, {"cache_implementation"}),
    ({"watermarking_config": {"seeding_scheme": "x"}}, {"watermarking_config"}),
    ({"compile_config": {"a": 1}}, {"compile_config"}),
    ({"eos_token_id": "</s>"}, {"eos_token_id"}),
    ({"eos_token_id": [2, "3"], "bos_token_id": 1.5, "pad_token_id": True}, {"eos_token_id", "bos_token_id"}),
    ({"self": 3, "validate": 5}, {"self", "validate"}),
]


@pytest.mark.parametrize(("settings", "left_out"), INVALID)
def test_unsavable_generation_settings_are_repaired(
    own_model: Path, recovered: Any, caplog: pytest.LogCaptureFixture, settings: Any, left_out: set[str]
) -> None:
    (own_model / "generation_config.json").write_text(json.dumps(settings))
    export = recovered(model=str(own_model)).export("model")

    saved = json.loads((Path(export.path) / "generation_config.json").read_text())
    assert not left_out & saved.keys()
    assert {name: value for name, value in settings.items() if name not in left_out and name in saved}.items() <= (
        saved.items()
    )
    transformers.AutoModelForCausalLM.from_pretrained(export.path)
    assert "generation_config.json" in caplog.text
    assert all(name in caplog.text for name in left_out)


@pytest.mark.parametrize("text", ["{not json", "[]", "", "null", "\x00\xff", "[" * 100_000])
def test_unreadable_generation_settings_are_left_out(
    own_model: Path, recovered: Any, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (own_model / "generation_config.json").write_text(text)
    recovered(model=str(own_model)).export("model")
    assert "generation_config.json of model" in caplog.text
    assert "cannot be read and is ignored" in caplog.text


def test_a_message_of_left_out_settings_is_short(own_model: Path) -> None:
    settings = dict.fromkeys(("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), "x" * 999)
    (own_model / "generation_config.json").write_text(json.dumps(settings))
    _, repairs = load_generation_config(str(own_model), transformers.GenerationConfig)
    assert "and 1 more" in repairs
    assert len(repairs) < 1000


def test_generation_settings_in_config_json_are_repaired(own_model: Path, recovered: Any) -> None:
    path = own_model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.7, "top_p": 0.5}))
    (own_model / "generation_config.json").unlink()
    recovered(model=str(own_model)).export("model")


@pytest.mark.parametrize("settings", [{"do_sample": True, "temperature": 0.6, "top_k": 20}, {"max_length": 99}])
def test_valid_generation_settings_are_exported_unchanged(
    own_model: Path, recovered: Any, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    (own_model / "generation_config.json").write_text(json.dumps(settings))
    export = recovered(model=str(own_model)).export("model")
    saved = json.loads((Path(export.path) / "generation_config.json").read_text())
    assert settings.items() <= saved.items()
    assert "generation_config" not in caplog.text


def test_unreachable_hub_model_has_no_generation_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_generation_config("nobody/no-such-model", transformers.GenerationConfig) == (None, "")


def spoil_tokenizer(model: Path, export_dir: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def spoil_folder(model: Path, export_dir: Path) -> None:
    export_dir.parent.mkdir(parents=True, exist_ok=True)
    export_dir.write_text("a file")


def spoil_mount(model: Path, export_dir: Path) -> None:
    export_dir.symlink_to("/proc/1/no-such-mount")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (spoil_tokenizer, "cannot be exported: .*tokenizer"),
        (spoil_folder, "export_dir .*exports: .*(File exists|Not a directory)"),
        (spoil_mount, "export_dir .*exports: "),
    ],
)
def test_impossible_export_fails_the_start(
    own_model: Path, tmp_path: Path, config: Configure, spoil: Callable[[Path, Path], None], why: str
) -> None:
    export_dir = tmp_path / "exports"
    spoil(own_model, export_dir)
    core = LearnerCore(config(model=str(own_model), export_dir=export_dir))
    with pytest.raises(BackendDown, match=f"(?s){why}") as raised:
        core.recover()
    core.close()
    assert exit_status(raised.value) == (WRONG_SETTINGS if spoil is spoil_tokenizer else FAILED)


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.ENOSPC, "No space left on device.*Free some space"),
        (errno.EACCES, "Permission denied.*Restore the permission"),
        (errno.EROFS, "Read-only file system.*Mount it writable"),
    ],
)
@pytest.mark.parametrize("written", ["checkpoint.safetensors.torch.save_file", "journal.check_writable"])
def test_unwritable_state_dir_fails_the_start(
    config: Configure, monkeypatch: pytest.MonkeyPatch, written: str, number: int, why: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, __import__("os").strerror(number), "/state/x")

    monkeypatch.setattr(f"poise.learner.storage.{written}", refuse)
    core = LearnerCore(config())
    with pytest.raises(StateError, match=f"state_dir .* cannot be written: {why}"):
        core.recover()
    core.close()


def test_missing_disk_space_fails_the_start(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poise.learner.storage.capacity.free_bytes", lambda _: 2.1e6)
    core = LearnerCore(config())
    with pytest.raises(StateError, match=r"export_dir .* has 0.00 GB free, but .* for an export and the other files"):
        core.recover()
    core.close()


def test_resumed_run_starts_despite_missing_disk_space(
    config: Configure, recovered: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = recovered()
    core.checkpoint()
    core.close()
    monkeypatch.setattr("poise.learner.storage.capacity.free_bytes", lambda _: 0)
    recovered()
    assert "GB are needed for a checkpoint" in caplog.text


def test_export_check_leaves_nothing_and_finds_a_taken_name(recovered: Any, tmp_path: Path) -> None:
    core = recovered(export_dir=tmp_path / "exports")
    assert core.check_export("model").path == str(tmp_path / "exports" / "model")
    assert not (tmp_path / "exports").exists()

    (tmp_path / "exports" / "model").mkdir(parents=True)
    with pytest.raises(InvalidRequest, match=f"already exists and is not an export .it has no {EXPORT_MARK}"):
        core.check_export("model")


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_export_does_not_need_the_models_folder(own_model: Path, recovered: Any, lora: LoraSettings | None) -> None:
    core = recovered(model=str(own_model), lora=lora)
    shutil.rmtree(own_model)
    export = core.export("model")
    transformers.AutoModelForCausalLM.from_pretrained(export.path)
    transformers.AutoTokenizer.from_pretrained(export.path)


def test_an_export_of_adapters_holds_the_merged_model(model: Path, config: Configure, tmp_path: Path) -> None:
    policy = Policy(config(lora=LoraSettings(rank=2)), World(torch.device("cpu")))
    with torch.no_grad():
        for _, parameter in policy.trained():
            parameter.add_(0.1)
    policy.save(str(tmp_path / "out"))
    saved = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    weights = policy.weights()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name].detach(), torch.from_numpy(each.array)) for name, each in weights.items())


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "minimax"])
def test_an_export_of_adapters_holds_the_models_buffers(name: str, config: Configure, tmp_path: Path) -> None:
    folder = make_architecture(tmp_path / "model", name)
    state = load_file(folder / "model.safetensors")
    save_file({key: tensor + 0.5 for key, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    lora = LoraSettings(rank=2, target_modules=["o_proj"] if name != "minimax" else ["q_proj"])
    policy = Policy(config(model=str(folder), lora=lora), World(torch.device("cpu")))
    policy.save(str(tmp_path / "out"))
    exported, own = (load_file(each / "model.safetensors") for each in (tmp_path / "out", folder))
    assert exported.keys() == own.keys()
    assert all(torch.equal(exported[key], tensor) for key, tensor in own.items())


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), BackendDown, "version 0 cannot be exported to export_dir"),
        (OSError(errno.EACCES, "Permission denied"), BackendDown, "Permission denied. Restore the permission"),
        (ValueError("a defect in saving"), PoiseError, "version 0 cannot be exported: ValueError: a defect in saving"),
    ],
)
def test_failed_export_has_a_reason_and_leaves_nothing(
    recovered: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[PoiseError],
    said: str,
) -> None:
    core = recovered(export_dir=tmp_path / "exports")

    def fail(policy: Policy, folder: str) -> None:
        Path(folder).mkdir()
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Policy, "save", fail)
        with pytest.raises(kind, match=said):
            core.export("model")
    assert not list((tmp_path / "exports").iterdir())
    assert not core.failure
    core.export("model")


def test_losing_a_rank_during_an_export_fails_the_learner(recovered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core = recovered()

    def fail(policy: Policy, folder: str) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Policy, "save", fail)
    monkeypatch.setattr("poise.learner.training.trainer.Trainer.has_other_ranks", True)
    with pytest.raises(BackendDown, match="another rank was lost: Connection closed") as raised:
        core.export("model")
    assert "All ranks of the learner restart and resume" in raised.value.remedy
    assert core.failure


def test_omitted_generation_settings_are_logged(own_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (own_model / "generation_config.json").write_text('{"eos_token_id": [2, 3], "top_k": 7}')
    config, repairs = load_generation_config(str(own_model), transformers.GenerationConfig)
    assert config is not None
    assert config.eos_token_id == [2, 3]
    assert repairs.endswith("which exports omit: top_k 7. Training does not use them. Correct the file to keep them")
