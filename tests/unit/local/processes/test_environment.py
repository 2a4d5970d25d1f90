import pytest

from poise.local.processes.environment import child_environment


@pytest.mark.parametrize(
    "name",
    ["RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "GLOO_SOCKET_IFNAME", "VLLM_PORT", "PYTHONINSPECT"],
)
def test_variables_of_other_programs_are_not_inherited(name):
    assert name not in child_environment({name: "1", "PATH": "/bin"})


@pytest.mark.parametrize(
    "name", ["PATH", "HF_HOME", "CUDA_VISIBLE_DEVICES", "POISE_LEARNER_SEED", "OMP_NUM_THREADS", "TMPDIR"]
)
def test_other_variables_are_inherited(name):
    assert child_environment({name: "1"})[name] == "1"


def test_child_processes_use_utf_8():
    assert child_environment({"LC_ALL": "C", "PYTHONUTF8": "0"})["PYTHONUTF8"] == "1"
