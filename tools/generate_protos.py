"""Generate clients/poise_proto from protos/, or with --check fail if it is out of date.

protoc writes `from poise.v1 import x`, which would collide with the package `poise`. That prefix is rewritten to
`poise_proto.v1`.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
TARGET = ROOT / "clients" / "poise_proto"


def generate(target: Path) -> None:
    """Write the package `poise_proto` to `target`."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "grpc_tools.protoc",
                f"--proto_path={PROTOS}",
                f"--python_out={scratch}",
                f"--grpc_python_out={scratch}",
                f"--mypy_out={scratch}",
                f"--mypy_grpc_out={scratch}",
                *sources,
            ],
            check=True,
            # The plugins are beside this interpreter, whether or not its environment is active.
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"},
        )
        out = target / "v1"
        out.mkdir(parents=True, exist_ok=True)
        for old in out.iterdir():
            if old.is_file():
                old.unlink()
        for made in sorted((Path(scratch) / "poise" / "v1").iterdir()):
            text = made.read_text()
            text = re.sub(r"\bfrom poise\.v1\b", "from poise_proto.v1", text)
            text = re.sub(r"\bimport poise\.v1\b", "import poise_proto.v1", text)
            (out / made.name).write_text(re.sub(r"(?<![/\w.'\"])poise\.v1\.(\w+_pb2)", r"poise_proto.v1.\1", text))
    for package in (target, out):
        (package / "__init__.py").write_text('"""Generated from protos/; never edited."""\n')
    (target / "py.typed").touch()


def differences(left: Path, right: Path) -> list[str]:
    """Return the names of generated files that differ or are missing on one side."""
    pattern = "*.py*"
    names = {str(path.relative_to(root)) for root in (left, right) for path in root.rglob(pattern)}
    names = {name for name in names if "__pycache__" not in name}
    return sorted(
        name
        for name in names
        if not (left / name).exists()
        or not (right / name).exists()
        or not filecmp.cmp(left / name, right / name, shallow=False)
    )


def main() -> int:
    """Generate, or check; return 1 if the committed code is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the committed code differs")
    if not parser.parse_args().check:
        generate(TARGET)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        stale = differences(TARGET, Path(scratch))
    for name in stale:
        print(f"out of date: clients/poise_proto/{name}", file=sys.stderr)
    if stale:
        print("run `make protos` and commit the result", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
