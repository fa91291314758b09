#!/usr/bin/env python3
"""Build the real ONNX models that the demo, the tests and the benchmarks use.

Every weight comes from an installed package (see requirements.txt) or from a seeded random generator: nothing is
downloaded at run time, neither torch nor transformers is needed, and the same bytes come out every time.

    python make_models.py                      # the default sets, 400 MB, about ten seconds on two cores
    python make_models.py --only minilm,digits
    python make_models.py --all                # every set but the big ones, 1.2 GB
    python make_models.py --check              # run what is there against its golden values
    python make_models.py OUT                  # somewhere else than .cache/inferway-models

A set that is there is kept until one of the recipes changes (--force rebuilds it), so OUT is a cache between runs.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from recipes import big, digits, faults, minilm, packaged, resnet50, smollm2

ROOM: Final = Path(__file__).resolve().parent
DEFAULT_OUT: Final = Path(os.environ.get("INFERWAY_MODELS_DIR", ROOM.parents[1] / ".cache" / "inferway-models"))


@dataclass(frozen=True, slots=True)
class ModelSet:
    """A folder of models that are made together.

    Attributes:
        make: writes into an empty folder; what it returns goes into the manifest.
        check: raises when what is in the folder does not do what it did when the recipe was written.
        by_default: made when no set is named.
        large: over 2 GB, made only when named.
    """

    about: str
    make: Callable[[Path], dict[str, Any]]
    check: Callable[[Path], None]
    by_default: bool = False
    large: bool = False


SETS: Final = {
    "digits": ModelSet(
        "scikit-learn digits classifiers: logistic regression, MLP, random forest",
        digits.make,
        digits.check,
        by_default=True,
    ),
    "minilm": ModelSet(
        "all-MiniLM-L6-v2 sentence embeddings, float32, with tokenizer.json",
        minilm.make,
        partial(minilm.check, tolerance=1e-3),
        by_default=True,
    ),
    "minilm-int8": ModelSet(
        "the same, dynamic int8 per channel: a row's result depends on its batch mates",
        minilm.make_int8,
        partial(minilm.check, tolerance=0.06),
        by_default=True,
    ),
    "minilm-w8": ModelSet(
        "the same, 8-bit block weights: rows are independent",
        minilm.make_w8,
        partial(minilm.check, tolerance=0.02),
        by_default=True,
    ),
    "smollm2": ModelSet(
        "SmolLM2-135M-Instruct, int4, lossless from Q4_1",
        smollm2.make,
        partial(smollm2.check, expected=smollm2.ANSWER),
        by_default=True,
    ),
    "smollm2-rtn": ModelSet(
        "the same, plain symmetric int4: smaller, faster, visibly worse text",
        partial(smollm2.make, kind="rtn"),
        partial(smollm2.check, expected=None),
    ),
    "smollm2-fp32": ModelSet(
        "the same, float32: batched and single runs give identical tokens",
        partial(smollm2.make, kind="fp32"),
        partial(smollm2.check, expected=smollm2.ANSWER),
    ),
    "smollm2-lora": ModelSet(
        "the int4 model with LoRA inputs, and two example adapters",
        partial(smollm2.make, lora=True),
        partial(smollm2.check, expected=smollm2.ANSWER),
    ),
    "tiny-llm": ModelSet(
        "the same graph and tokenizer, random weights, 2 layers: unit tests",
        partial(smollm2.make, weights=smollm2.TinyWeights),
        partial(smollm2.check, expected=None),
        by_default=True,
    ),
    "resnet50": ModelSet(
        "the shape of ResNet-50, seeded random weights", resnet50.make, resnet50.check, by_default=True
    ),
    "faults": ModelSet(
        "trivial, slow, never-ending, very large output, and corrupt models",
        faults.make,
        faults.check,
        by_default=True,
    ),
    "packaged": ModelSet("ONNX files that magika, silero-vad and rapidocr ship", packaged.make, packaged.check),
    "big-1b": ModelSet("1.015 billion float32 parameters in 4.06 GB of external data", big.make, big.check, large=True),
    "big-1b-fp16": ModelSet("the same in float16, 2.03 GB", partial(big.make, dtype=np.float16), big.check, large=True),
}


def recipes_digest() -> str:
    """Changes whenever what this script makes may change."""
    digest = hashlib.sha256()
    for file in (*sorted((ROOM / "recipes").glob("*.py")), ROOM / "requirements.txt"):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def files_of(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Let one process at a time make models in a folder; the lock goes with the process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def build(name: str, out: Path, manifest: dict[str, Any], recipes: str) -> None:
    """Make a set in a folder of its own and put it in place whole."""
    target, scratch = out / name, out / f".{name}.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    entry = {**SETS[name].make(scratch), "recipes": recipes}
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    entry["files"] = {str(file.relative_to(target)): describe(file) for file in files_of(target)}
    manifest[name] = entry
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))


def chosen_sets(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    if args.only:
        names: list[str] = args.only.split(",")
        if unknown := set(names) - set(SETS):
            parser.error(f"unknown set: {', '.join(sorted(unknown))}; known: {', '.join(SETS)}")
        return names
    if args.check:
        return [name for name in SETS if (args.out / name).is_dir()]
    return [name for name, entry in SETS.items() if entry.by_default or (args.all and not entry.large)]


def main() -> int:
    sets = "\n".join(f"  {name:13}{'*' if entry.by_default else ' '} {entry.about}" for name, entry in SETS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nsets (default ones marked *):\n{sets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, nargs="?", default=DEFAULT_OUT)
    parser.add_argument("--only", help="comma-separated set names")
    parser.add_argument("--all", action="store_true", help="every set but big-1b and big-1b-fp16")
    parser.add_argument("--force", action="store_true", help="rebuild sets that are already there")
    parser.add_argument("--check", action="store_true", help="only check what is there")
    parser.add_argument("--no-check", action="store_true", help="only build")
    parser.add_argument("--quiet", action="store_true", help="say nothing of sets that are kept")
    args = parser.parse_args()
    names = chosen_sets(args, parser)
    recipes = recipes_digest()
    with locked(args.out):
        path = args.out / "manifest.json"
        manifest = json.loads(path.read_text()) if path.exists() else {}
        for name in names:
            target, started = args.out / name, time.perf_counter()
            kept = target.is_dir() and manifest.get(name, {}).get("recipes") == recipes and not args.force
            if kept and args.quiet and not args.check:
                continue
            print(f"  {name:13}", end=" ", flush=True)
            if not kept and not args.check:
                build(name, args.out, manifest, recipes)
            made = time.perf_counter()
            # What was checked when it was made is not checked again each time it is kept.
            if args.check or not (kept or args.no_check):
                SETS[name].check(target)
            checked = time.perf_counter()
            size_mb = sum(file.stat().st_size for file in files_of(target)) / 1e6
            word = "there" if kept or args.check else f"made in {made - started:4.1f} s"
            word += f", checked in {checked - made:4.1f} s" if checked - made > 1e-3 else ""
            print(f"{size_mb:7.1f} MB  {word}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
