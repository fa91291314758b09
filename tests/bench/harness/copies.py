"""How many times a server copies a tensor: bytes that went through memcpy and memmove, counted from outside."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from harness.paths import CACHE
from harness.processes import BenchError

SOURCE = Path(__file__).with_name("copies.c")


@dataclass(frozen=True, slots=True)
class CopyCounter:
    """Counts in one process (and its children) that is started with ``env``."""

    library: Path
    file: Path

    @property
    def env(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.library), "COPIES_FILE": str(self.file)}

    def copied_bytes(self) -> int:
        """Since the process started, in calls of 4 KiB and more."""
        (total,) = struct.unpack("=Q", self.file.read_bytes()[:8])
        return int(total)


def copy_counter(name: str) -> CopyCounter | None:
    """None where there is no C compiler: then copies are not counted, which the benchmark says."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    folder = CACHE / "bench-copies"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "copies.so"
    # -fno-builtin: the compiler would otherwise turn the loop inside memcpy into a call of memcpy.
    command = [compiler, "-O2", "-fno-builtin", "-fno-tree-loop-distribute-patterns", "-fPIC", "-shared"]
    done = subprocess.run(
        [*command, "-o", str(library), str(SOURCE), "-ldl"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"copies.c does not compile: {done.stderr}")
    file = folder / name
    file.write_bytes(bytes(8))
    return CopyCounter(library, file)
