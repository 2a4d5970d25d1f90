import subprocess
import sys


def test_transformers_loads_neither_scipy_nor_scikit_learn() -> None:
    code = (
        "import sys; from poise.runtime.cli.lean_imports import hide_unused_packages; hide_unused_packages();"
        "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained;"
        "print([name for name in ('scipy', 'sklearn') if sys.modules[name] is not None])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
