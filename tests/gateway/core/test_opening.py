"""What a version is expected to need of the memory before it is loaded."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from inferway_gateway.core.catalog import FileRef, Footprint, VersionRecord
from inferway_gateway.core.opening import LOAD_RATIO, WORKER_BYTES, VersionOpener

MIB = 1 << 20
GIB = 1 << 30
RECORD = VersionRecord(
    model="m",
    version=1,
    kind="onnx",
    digest="0" * 64,
    files=(FileRef("model.onnx", "1" * 64, 1000), FileRef("weights.bin", "2" * 64, GIB)),
    config={},
    isolation="worker",
    labels={},
    metadata={},
    pinned=False,
    footprint=None,
    created_at=datetime(2026, 11, 23, tzinfo=UTC),
    created_by="k",
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, int((1000 + 2 * GIB) * LOAD_RATIO) + WORKER_BYTES, id="files-what-expands-and-the-load"),
        pytest.param({"isolation": "inprocess"}, int((1000 + 2 * GIB) * LOAD_RATIO), id="no-process-of-its-own"),
        pytest.param({"footprint": Footprint(3 * GIB, 4 * GIB)}, 4 * GIB, id="measured"),
        pytest.param(
            {"footprint": Footprint(GIB, GIB)}, int((1000 + GIB) * LOAD_RATIO), id="measured-below-what-loading-takes"
        ),
        pytest.param({"kind": "remote"}, 0, id="elsewhere"),
        pytest.param(
            {"files": (FileRef("model.onnx", "1" * 64, 1000), FileRef("tokenizer.json", "3" * 64, MIB))},
            int((1000 + MIB + GIB) * LOAD_RATIO) + WORKER_BYTES + 128 * MIB,
            id="processes-of-its-tokenizer",
        ),
    ],
)
async def test_a_version_needs_what_its_load_takes(tmp_path: Path, changes: dict[str, object], expected: int) -> None:
    async def place(_: VersionRecord) -> Path:
        return tmp_path

    def weigh(_: VersionRecord, folder: Path) -> int:
        assert folder == tmp_path
        return GIB  # as if all of the weights were float16

    record = replace(RECORD, **changes)  # type: ignore[arg-type]  # members of the record
    async with VersionOpener(place, lambda *_: pytest.fail("it was read"), {}, {}, weigh=weigh) as opener:
        assert await opener.estimate(record) == expected
