"""From run.yaml to the settings of each program."""

from __future__ import annotations

import os
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.tokens import write_token

from poise.local.addresses import renew_taken_ports, run_ports
from poise.local.run_file import LocalRun, load_run, preset_names, preset_path
from poise.runtime.config.settings import ConfigError

MINIMAL: dict[str, Any] = {"model": "org/model", "train": {"tasks": [{"kind": "digits"}]}}


def load(folder: Path, values: dict[str, Any] = MINIMAL, *overrides: str) -> LocalRun:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"run": {"name": "mine", "dir": str(folder / "run")}} | values))
    return load_run(path, overrides)


def test_programs_get_each_others_addresses(tmp_path: Path) -> None:
    run = load(tmp_path)
    ports = {name: getattr(run, name).grpc.port for name in ("generation", "value", "learner")}
    assert len({*ports.values()}) == 3
    assert run.learner.replicas == (f"127.0.0.1:{ports['generation']}",)
    assert run.train.endpoints.generation == run.learner.replicas
    assert run.train.endpoints.value == f"127.0.0.1:{ports['value']}" == run.grpc_address("value")
    assert run.value.queue.url.get_secret_value() == f"unix://{run.socket}"
    assert run.generation.wait_for_learner is True
    assert run.generation.model == run.learner.model == "org/model"
    assert (run.train.run_id, run.train.run_dir) == ("mine", run.dir)


def test_ports_are_chosen_once(tmp_path: Path) -> None:
    assert load(tmp_path).generation.grpc.port == load(tmp_path).generation.grpc.port


def test_concurrent_commands_choose_the_same_ports(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def choose(_: int) -> dict[str, int]:
        together.wait()
        return run_ports(tmp_path)

    with ThreadPoolExecutor(4) as threads:
        chosen = list(threads.map(choose, range(4)))
    assert all(ports == chosen[0] for ports in chosen)


def test_only_taken_ports_are_replaced(tmp_path: Path) -> None:
    before = run_ports(tmp_path)
    assert renew_taken_ports(tmp_path) is False
    assert run_ports(tmp_path) == before
    with socket.create_server(("127.0.0.1", before["value.grpc"])):
        assert renew_taken_ports(tmp_path) is True
        after = run_ports(tmp_path)
    assert [name for name in before if after[name] != before[name]] == ["value.grpc"]
    assert len({*after.values()}) == len(after)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"value.grpc": 1}'])
def test_damaged_ports_file_is_replaced(tmp_path: Path, content: str) -> None:
    before = run_ports(tmp_path)
    (tmp_path / "services" / "ports.json").write_text(content)
    again = run_ports(tmp_path)
    assert again.keys() == before.keys()
    assert again == run_ports(tmp_path)


def test_unwritable_shared_dir_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match=r"run\.dir: .*/run cannot be used"):
        load(tmp_path)


def test_command_line_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"tasks": [{"kind": "digits"}], "num_steps": 2, "prompts_per_step": 2, "samples_per_step": 2}
    monkeypatch.setenv("POISE_TRAIN_NUM_STEPS", "3")
    monkeypatch.setenv("POISE_TRAIN_PROMPTS_PER_STEP", "3")
    monkeypatch.setenv("POISE_GENERATION_GRPC__PORT", "40003")
    run = load(tmp_path, {"model": "m", "train": train}, "train.num_steps=4")
    assert (run.train.num_steps, run.train.prompts_per_step, run.train.samples_per_step) == (4, 3, 2)
    # A setting of one program from the environment reaches the others.
    assert run.learner.replicas == run.train.endpoints.generation == ("127.0.0.1:40003",)
    assert run.overrides["train"] == ["num_steps=4"]


def test_listener_on_all_addresses_is_reached_by_loopback(tmp_path: Path) -> None:
    run = load(tmp_path, MINIMAL | {"value": {"grpc": {"host": "0.0.0.0", "port": 50998}}})
    assert run.train.endpoints.value == "127.0.0.1:50998"


def test_empty_section_sets_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL | {"learner": None, "run": None}, f"run.dir={tmp_path}").learner.max_staleness == 0


def test_loading_creates_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    assert load(tmp_path, MINIMAL | {"model": "tiny"}).learner.model == str(tmp_path / "cache" / "tiny")
    assert not (tmp_path / "cache").exists()


def test_port_in_the_file_reaches_all_programs(tmp_path: Path) -> None:
    run = load(tmp_path, MINIMAL | {"generation": {"grpc": {"port": 50999}}})
    assert run.generation.grpc.port == 50999
    assert run.learner.replicas == run.train.endpoints.generation == ("127.0.0.1:50999",)


def test_sections_and_overrides_reach_their_programs(tmp_path: Path) -> None:
    values = MINIMAL | {"learner": {"optimizer": {"learning_rate": 0.5}}, "engine": "torch"}
    run = load(tmp_path, values, "learner.optimizer.weight_decay=0.25", "seed=7", "train.num_steps=3")
    assert (run.learner.optimizer.learning_rate, run.learner.optimizer.weight_decay) == (0.5, 0.25)
    assert (run.train.seed, run.learner.seed, run.train.num_steps) == (7, 7, 3)
    assert run.generation.engine == "torch"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (MINIMAL | {"lerner": {}}, "lerner: unknown; did you mean 'learner'"),
        (MINIMAL | {"value": {"probe": {"alhpa": 1}}}, "value.probe.alhpa: unknown; did you mean 'alpha'"),
        (MINIMAL | {"run": {"name": "a/b"}}, "run.name"),
        (MINIMAL | {"run": {"nmae": "a"}}, "run.nmae: unknown; did you mean 'name'"),
        (MINIMAL | {"learner": {"optimiser": {}}}, "learner.optimiser: unknown; it was renamed to 'optimizer'"),
        (
            MINIMAL | {"learner": {"loss": {"normaliser_tokens": 9}}},
            "learner.loss.normaliser_tokens: unknown; it was renamed to 'normalizer_tokens'",
        ),
        (MINIMAL | {"generation": {"grpc": 3}}, "generation.grpc: "),
        (MINIMAL | {"value": 3}, "value"),
        ({"model": "m"}, "train.tasks: required, but not set"),
        (MINIMAL | {"engine": "jax"}, "engine"),
        (MINIMAL | {"model": "./nowhere"}, "folder ./nowhere does not exist"),
        (MINIMAL | {"generation": {"auth": {"token": "secret"}}}, "auth.token: a secret must not be in a file"),
    ],
)
def test_wrong_setting_is_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.").replace("?", r"\?")) as caught:
        load(tmp_path, values)
    assert "secret" not in str(caught.value).replace("a secret", "")


def test_problems_of_all_programs_are_listed(tmp_path: Path) -> None:
    values = {"model": "m", "generation": {"max_num_seqs": 0}, "train": {"tasks": [{"kind": "digits"}], "num_steps": 0}}
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, values)
    assert "generation.max_num_seqs" in str(caught.value)
    assert "train.num_steps" in str(caught.value)


def test_socket_path_is_short_for_any_folder(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100) / ("y" * 100)
    deep.mkdir(parents=True)
    assert len(str(load(deep).socket)) < 100


def test_presets_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    for name in ("tiny", "smollm2-135m-instruct"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    assert preset_names() == ["smollm2", "tiny"]
    for name in preset_names():
        run = load_run(preset_path(name), [f"run.dir={tmp_path / name / 'run'}"])
        assert run.name == name


def test_unknown_preset_is_rejected() -> None:
    with pytest.raises(ConfigError, match="preset 'huge' is unknown; known: smollm2, tiny"):
        preset_path("huge")


def with_train(**values: Any) -> dict[str, Any]:
    return MINIMAL | {"train": MINIMAL["train"] | values}


def test_file_takes_precedence_over_the_algorithms_loss(tmp_path: Path) -> None:
    poise, grpo = load(tmp_path).learner, load(tmp_path, with_train(algorithm="grpo")).learner
    assert (poise.loss.aggregation, poise.loss.clip_high) == ("token_mean", 0.28)
    assert (grpo.loss.aggregation, grpo.loss.clip_high) == ("sequence_mean", 0.2)
    own = load(tmp_path, with_train(algorithm="grpo") | {"learner": {"loss": {"clip_high": 0.3}}}).learner
    assert (own.loss.aggregation, own.loss.clip_high) == ("sequence_mean", 0.3)
    dr_grpo = load(tmp_path, with_train(algorithm="dr_grpo", sampling={"max_tokens": 77}))
    assert (dr_grpo.learner.loss.aggregation, dr_grpo.learner.loss.normalizer_tokens) == ("constant", 77)
    assert load(tmp_path, MINIMAL, "train.algorithm=dr_grpo").trees["learner"]["loss"]["aggregation"] == "constant"


def test_value_service_gets_the_estimator_of_the_algorithm(tmp_path: Path) -> None:
    score = load(tmp_path, MINIMAL, "train.algorithm={kind: poise, estimator: score_prefix}")
    assert (score.value.estimator, score.train.group_size) == ("score_prefix", 1)
    assert score.trees["value"]["estimator"] == "score_prefix"
    assert load(tmp_path).value.estimator == "probe"
    twice = with_train(algorithm={"kind": "poise", "estimator": "auto"}) | {"value": {"estimator": "auto"}}
    assert load(tmp_path, twice).value.estimator == "auto"
    assert load(tmp_path, with_train(algorithm="none")).train.group_size == 1


@pytest.mark.parametrize(
    ("algorithm", "value", "message"),
    [
        ("poise", {"estimator": "auto"}, "train.algorithm.estimator is probe, but value.estimator .*is auto"),
        (
            {"kind": "poise", "estimator": "score_mean"},
            {"estimator_by_domain": {"digits": "probe"}},
            "value.estimator_by_domain.digits is probe, .*train.rollouts_per_prompt is 1",
        ),
    ],
)
def test_contradicting_estimators_are_rejected(tmp_path: Path, algorithm: Any, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, with_train(algorithm=algorithm) | {"value": value})
    elsewhere = {"endpoints": {"value": "gpu:50052"}, "algorithm": algorithm}
    load(tmp_path, with_train(**elsewhere) | {"value": value})  # the run checks it when it starts


def test_options_of_a_replaced_algorithm_are_dropped(tmp_path: Path) -> None:
    values = with_train(algorithm={"kind": "poise", "bootstrap": "batch_mean"})
    assert load(tmp_path, values, "train.algorithm=dapo").train.algorithm.kind == "dapo"
    dapo = load(tmp_path, values, "train.algorithm={kind: dapo, max_draws: 2}").train.algorithm
    assert dapo.model_dump()["max_draws"] == 2
    for same in ("train.algorithm.kind=poise", "train.algorithm=poise"):
        kept = load(tmp_path, values, same).train.algorithm
        assert kept.model_dump()["bootstrap"] == "batch_mean"


def test_drain_timeout_is_the_longest_of_all_services(tmp_path: Path) -> None:
    assert load(tmp_path).drain_timeout_s == 30
    assert load(tmp_path, MINIMAL | {"value": {"drain_timeout_s": 300}}).drain_timeout_s == 300


def secured(folder: Path, **tokens: str) -> dict[str, Any]:
    """Write a run.yaml whose services require these tokens, each from its own file."""
    values: dict[str, Any] = dict(MINIMAL)
    for name, token in tokens.items():
        write_token(folder / f"{name}.token", token)
        values[name] = {"auth": {"token_file": str(folder / f"{name}.token")}}
    return values


def test_callers_get_the_token_of_the_services(tmp_path: Path) -> None:
    run = load(tmp_path, secured(tmp_path, generation="sesame", value="sesame"))
    assert run.learner.replica_token_file == run.train.endpoints.token_file == tmp_path / "generation.token"
    run = load(tmp_path, secured(tmp_path, value="sesame"))  # the others want it, too
    assert {run.learner.replica_token_file, run.train.endpoints.token_file} == {tmp_path / "value.token"}
    assert run.generation.auth.token_file == run.learner.auth.token_file == tmp_path / "value.token"


def test_run_creates_a_private_token(tmp_path: Path) -> None:
    run = load(tmp_path)
    token = run.services_dir / "token"
    wanted = {run.generation.auth.token_file, run.value.auth.token_file, run.learner.auth.token_file}
    assert {*wanted, run.learner.replica_token_file, run.train.endpoints.token_file} == {token}
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(run.dir.stat().st_mode) == stat.S_IMODE(run.services_dir.stat().st_mode) == 0o700
    assert all(tree["auth"] == {"token_file": str(token)} for name, tree in run.trees.items() if name != "train")
    before = token.read_text()
    assert len(before.strip()) >= 32
    load(tmp_path)
    assert token.read_text() == before
    assert before.strip() not in str(run.overrides)


def test_token_of_the_run_is_not_sent_elsewhere(tmp_path: Path) -> None:
    elsewhere = {"generation": ["gpu-1:50051"], "value": "gpu-2:50052", "learner": "gpu-3:50053"}
    train = MINIMAL["train"] | {"endpoints": elsewhere}
    assert load(tmp_path, MINIMAL | {"train": train}).train.endpoints.token_file is None
    own = write_token(tmp_path / "own", "sesame")
    train = MINIMAL["train"] | {"endpoints": elsewhere | {"token_file": str(own)}}
    assert load(tmp_path, MINIMAL | {"train": train}).train.endpoints.token_file == own


def test_runs_have_different_tokens(tmp_path: Path) -> None:
    runs = [load(tmp_path, MINIMAL | {"run": {"dir": str(tmp_path / name)}}) for name in ("a", "b")]
    assert len({(run.services_dir / "token").read_text() for run in runs}) == 2


def test_open_service_gets_no_token(tmp_path: Path) -> None:
    run = load(tmp_path, MINIMAL | {"value": {"auth": {"allow_open_bind": True}}})
    assert run.value.auth.token_file is None
    assert run.learner.auth.token_file is not None


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o666, 0o622])
def test_token_readable_by_others_is_rejected(tmp_path: Path, mode: int) -> None:
    token = load(tmp_path).services_dir / "token"
    token.chmod(mode)
    if mode == 0o640 and os.getuid() == 0:
        return  # as Kubernetes mounts it
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}: other users can use the token. Run `chmod 600"):
        load(tmp_path)


def test_services_folder_is_made_private(tmp_path: Path) -> None:
    services = load(tmp_path).services_dir
    services.chmod(0o755)
    load(tmp_path)
    assert stat.S_IMODE(services.stat().st_mode) == 0o700


def test_different_tokens_are_rejected_with_a_remedy(tmp_path: Path) -> None:
    values = secured(tmp_path, generation="sesame", learner="rosebud")
    with pytest.raises(
        ConfigError, match=r"endpoints\.token_file: .*generation and value and learner have different tokens"
    ):
        load(tmp_path, values)
    by_hand = load(tmp_path, values, f"train.endpoints.token_file={tmp_path / 'learner.token'}")
    assert by_hand.train.endpoints.token_file == tmp_path / "learner.token"
    assert by_hand.learner.replica_token_file == tmp_path / "generation.token"


def test_token_only_in_the_environment_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_GENERATION_AUTH__TOKEN", "sesame")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "learner.replica_token_file",
        "train.endpoints.token_file",
    ]
    assert "generation got a token from the environment. Write it to a file and set" in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_callers_trust_the_common_certificate(tmp_path: Path) -> None:
    files = {"tls_cert_file": str(tmp_path / "crt"), "tls_key_file": str(tmp_path / "key")}
    secure = MINIMAL | {name: {"grpc": files} for name in ("generation", "value", "learner")}
    run = load(tmp_path, secure)
    assert run.learner.replica_ca_file == run.train.endpoints.ca_file == tmp_path / "crt"
    named = load(tmp_path, secure, "learner.replica_ca_file=a.pem", "train.endpoints.ca_file=b.pem")
    assert (named.learner.replica_ca_file, named.train.endpoints.ca_file) == (Path("a.pem"), Path("b.pem"))
    other = secure | {"value": {"grpc": files | {"tls_cert_file": str(tmp_path / "other")}}}
    with pytest.raises(ConfigError, match=r"endpoints\.ca_file: .*different certificates. Name a file"):
        load(tmp_path, other)
    with pytest.raises(
        ConfigError, match=r"endpoints\.ca_file: .*TLS is on for generation and learner and off for value"
    ):
        load(tmp_path, secure | {"value": {}})
