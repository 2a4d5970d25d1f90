"""Reads Dockerfiles, and executes them without Docker, in a chroot over this machine's own file system.

Executed are COPY from the build context, RUN with its mounts from other stages, WORKDIR, ENV, ARG and USER. Base images
are not pulled: an overlay of this machine takes their place. Its Python has the packages of the tests' own virtual
environment and, except for the official Python images, the marker of PEP 668.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_BASE = Path(sys.base_prefix)
_STDLIB = _BASE / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
_SITE = Path(sys.prefix) / "lib" / _STDLIB.name / "site-packages"
_MARKER = "[externally-managed]\nError=This Python is managed by the distribution.\n"


@dataclass
class Stage:
    """One FROM, and what follows it."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Return instruction and argument of each step, lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def stages(dockerfile: Path) -> list[Stage]:
    """Return the stages in order; one without a name is named after its place."""
    found: list[Stage] = []
    for instruction, argument in instructions(dockerfile):
        if instruction == "FROM":
            base, _, name = argument.partition(" AS ")
            found.append(Stage(base, name or str(len(found))))
        else:
            found[-1].steps.append((instruction, argument))
    return found


def can_build() -> bool:
    """Whether this process may mount overlays and change roots, as a builder of images must."""
    probe = "mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w /mnt/r && mount -t overlay overlay -o " + (
        "lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w /mnt/r && chroot /mnt/r true"
    )
    return subprocess.run(["unshare", "--mount", "sh", "-c", probe], capture_output=True, check=False).returncode == 0


def build(dockerfile: Path, context: Path, *, then: str = "true", user: str = "") -> subprocess.CompletedProcess[str]:
    """Execute a Dockerfile, and in its last stage the shell command `then`, as `user` or the image's own.

    Nothing outside a private mount namespace changes. Standard output and error are returned together.
    """
    script = "\n".join(_script(stages(dockerfile), context, then, user))
    command = ["unshare", "--mount", "sh", "-euc", script]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def _script(found: list[Stage], context: Path, then: str, user: str) -> Iterator[str]:
    yield "T=/mnt; mount -t tmpfs none $T"
    yield f"mkdir $T/python && mount --bind {shlex.quote(str(_BASE))} $T/python"
    yield f"mkdir $T/site && mount --bind {shlex.quote(str(_SITE))} $T/site"
    yield f"mkdir $T/context && mount --bind {shlex.quote(str(context))} $T/context"
    for stage in found:
        yield from _base_image(stage)
        yield from _steps(stage)
    last = found[-1]
    yield _in_chroot(last, then, user=user or _value(last, "USER") or "0:0", workdir="/")


def _base_image(stage: Stage) -> Iterator[str]:
    """An overlay of /, with a Python at /usr/local that has the tests' packages and may be externally managed."""
    root = f"$T/{stage.name}"
    yield f"mkdir $T/{stage.name}.u $T/{stage.name}.w {root}"
    yield f"mount -t overlay overlay -o lowerdir=/,upperdir=$T/{stage.name}.u,workdir=$T/{stage.name}.w {root}"
    for name, lower in (("usr/local", "$T/python"), ("opt/site", "$T/site")):
        part = f"$T/{stage.name}.{name.replace('/', '-')}"
        yield f"mkdir -p {part}.u {part}.w {root}/{name}"
        yield f"mount -t overlay overlay -o lowerdir={lower},upperdir={part}.u,workdir={part}.w {root}/{name}"
    yield f"mount --rbind /dev {root}/dev; mount -t proc none {root}/proc; mount -t tmpfs none {root}/tmp"
    stdlib = f"{root}/usr/local/lib/{_STDLIB.name}"
    yield f"mount -t tmpfs none {stdlib}/site-packages; echo /opt/site > {stdlib}/site-packages/base-image.pth"
    if not stage.base.startswith("python:"):
        yield f"printf %s {shlex.quote(_MARKER)} > {stdlib}/EXTERNALLY-MANAGED"


def _steps(stage: Stage) -> Iterator[str]:
    root, workdir, user = f"$T/{stage.name}", "/", "0:0"
    for instruction, argument in stage.steps:
        match instruction:
            case "WORKDIR":
                workdir = argument
                yield f"mkdir -p {root}{workdir}"
            case "USER":
                user = argument
            case "COPY":
                *sources, target = argument.split()
                target = target if target.startswith("/") else f"{workdir}/{target}"
                for source in sources:
                    # The contents of a folder are copied, not the folder.
                    is_folder = f"[ -d $T/context/{source} ]"
                    copied = f"mkdir -p {root}{target} && cp -r $T/context/{source}/. {root}{target}"
                    yield f"if {is_folder}; then {copied}; else cp $T/context/{source} {root}{target}; fi"
            case "RUN":
                mounts = re.findall(r"--mount=from=(\S+?),source=(\S+?),target=(\S+)", argument)
                for other, source, target in mounts:
                    yield f"mkdir -p {root}{target} && mount --bind $T/{other}{source} {root}{target}"
                yield _in_chroot(stage, re.sub(r"--mount=\S+\s+", "", argument), user=user, workdir=workdir)
                for _, _, target in mounts:
                    yield f"umount {root}{target}"


def _in_chroot(stage: Stage, command: str, *, user: str, workdir: str) -> str:
    variables = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp"}
    variables["LD_LIBRARY_PATH"] = "/usr/local/lib"  # of a Python that was linked to another place
    # Nothing is fetched: what the lock names is what the tests' own environment has.
    variables |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    for instruction, argument in stage.steps:
        if instruction in ("ENV", "ARG"):
            name, _, value = argument.partition("=")
            variables[name] = value.strip('"')
    given = " ".join(shlex.quote(f"{name}={value}") for name, value in variables.items())
    inner = shlex.quote(f"cd {workdir}\n{command}")
    return f"chroot --userspec={user} $T/{stage.name} env -i {given} /bin/sh -ec {inner}"


def _value(stage: Stage, wanted: str) -> str:
    values = [argument for instruction, argument in stage.steps if instruction == wanted]
    return values[-1] if values else ""
