"""Models whose weights are larger than anything that is held in memory on their way: sent, loaded, served, shared.

Once with 300 MiB, which is more than a body or a part of one may have, and once with a billion parameters, 4.06 GB, as
``make_models.py --only big-1b`` makes them. That takes a minute or two, 10 GB of memory for its two versions, and as
much disk: it is left out where there is less, or with ``INFERWAY_TEST_LARGE=0``, and done in any case with 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from inferway import Inferway
from inferway_gateway.backends.footprint import MemoryWatch, memory_of_machine
from inferway_gateway.backends.worker.process import read_status
from live import LiveGateway, run_gateway
from models import F32, node, value

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
BIG = ROOT / ".cache" / "inferway-models" / "big-1b"
LARGE = os.environ.get("INFERWAY_TEST_LARGE", "")
ROOM_BYTES = 12 << 30
"""Of memory: both versions in memory at once, and those who send them. Of disk: the model, its blob, and some."""


def no_room() -> str:
    """Why there is no place for the large model here; nothing where there is."""
    if LARGE in ("0", "1"):
        return "" if LARGE == "1" else "INFERWAY_TEST_LARGE=0"
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
    memory = min(available, memory_of_machine())
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    if memory >= ROOM_BYTES and disk >= ROOM_BYTES:
        return ""
    return f"expected {ROOM_BYTES >> 30} GiB of memory and of disk, there are {memory >> 30} and {disk >> 30}"


NO_ROOM = no_room()


def layered(folder: Path, layers: int, width: int, mark: str) -> tuple[Path, int]:
    """``layers`` identities in external data, each ``[width, width]``: the model, and the bytes of its weights."""
    nbytes = width * width * 4
    tensors = []
    for index in range(layers):
        tensor = TensorProto(name=f"w{index}", dims=[width, width], data_type=F32, data_location=TensorProto.EXTERNAL)
        for key, said in (("location", "weights.bin"), ("offset", str(index * nbytes)), ("length", str(nbytes))):
            tensor.external_data.add(key=key, value=said)
        tensors.append(tensor)
    names = ["x", *(f"h{index}" for index in range(1, layers)), "y"]
    nodes = [node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(layers)]
    ends = [value(name, F32, ["batch", width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    proto.producer_version = mark
    folder.mkdir()
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder / "model.onnx", layers * nbytes


def processes(gateway: LiveGateway) -> Iterator[int]:
    """The gateway's own processes: itself and all that came from it."""
    found = [gateway.process.pid]
    while found:
        pid = found.pop()
        yield pid
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue


class Peaks:
    """The most memory that each process of the gateway was seen to have: ``pid -> bytes``."""

    def __init__(self, gateway: LiveGateway) -> None:
        self._gateway = gateway
        self._stop = threading.Event()
        self._seen: dict[int, int] = {}
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        # The kernel keeps the peak itself. Proportional sizes are not asked for: adding up the pages of four gigabytes
        # holds the process's memory map, and made this test twice as long.
        while not self._stop.wait(0.02):
            for pid in processes(self._gateway):
                self._seen[pid] = max(self._seen.get(pid, 0), read_status(pid).get("VmHWM", 0))

    @property
    def gateway(self) -> int:
        return self._seen[self._gateway.process.pid]

    @property
    def workers(self) -> list[int]:
        """Largest first; the fork server is among them."""
        return sorted((peak for pid, peak in self._seen.items() if pid != self._gateway.process.pid), reverse=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def gateway_of(tmp_path: Path) -> Iterator[tuple[LiveGateway, Inferway]]:
    (tmp_path / "models").mkdir()
    with (
        run_gateway(tmp_path / "models", tmp_path / "state") as gateway,
        Inferway(base_url=gateway.url, api_key=gateway.make_key("deploy", "infer", "read")) as client,
    ):
        yield gateway, client


@pytest.mark.slow
def test_weights_beyond_every_buffer_are_deployed_served_and_shared_by_the_next_version(tmp_path: Path) -> None:
    width = 4096
    first, nbytes = layered(tmp_path / "first", 5, width, "1")
    data = tmp_path / "first" / "weights.bin"
    with data.open("wb") as stream:
        for _ in range(5):
            stream.write(np.eye(width, dtype=np.float32).tobytes())
    second, _ = layered(tmp_path / "second", 5, width, "2")
    (tmp_path / "second" / "weights.bin").hardlink_to(data)
    with gateway_of(tmp_path) as (gateway, client):
        with MemoryWatch(gateway.process.pid) as watch:
            before = watch.read().resident
        with Peaks(gateway) as peaks:
            client.models.deploy(first, name="large", timeout=300)
            rows = np.arange(2 * width, dtype=np.float32).reshape(2, width)
            answer = client.infer("large", {"x": rows})
            assert np.array_equal(answer["y"], rows)
            client.models.deploy(second, name="large", timeout=300)
            assert np.array_equal(client.infer("large", {"x": rows})["y"], rows)
        # What a worker is without a model, and the arena of its largest batch, come on top of the weights.
        base = 160 * MIB
        assert 0.9 * nbytes < peaks.workers[0] < 1.15 * nbytes + base
        assert peaks.gateway < before + 64 * MIB
        _check_sharing(tmp_path / "state", nbytes)


@pytest.fixture
def billion(tmp_path: Path) -> Iterator[Path]:
    """A folder with the large model, and a second one beside it that differs in the graph's file only."""
    kept = tmp_path / "made"
    try:
        first = BIG
        if not (BIG / "model.onnx.data").is_file():
            make = ROOT / "examples" / "models" / "make_models.py"
            command: list[str | Path] = [sys.executable, make, kept, "--only", "big-1b", "--no-check"]
            subprocess.run(command, check=True, timeout=300, stdin=subprocess.DEVNULL, capture_output=True)
            first = kept / "big-1b"
        second = tmp_path / "second"
        second.mkdir()
        proto = onnx.load(first / "model.onnx", load_external_data=False)
        proto.producer_version = "2"
        (second / "model.onnx").write_bytes(proto.SerializeToString())
        try:
            (second / "model.onnx.data").hardlink_to(first / "model.onnx.data")
        except OSError:  # on another file system
            shutil.copyfile(first / "model.onnx.data", second / "model.onnx.data")
        yield first
    finally:  # what pytest keeps of the last runs must not be twelve gigabytes
        for folder in (kept, tmp_path / "second", tmp_path / "state"):
            shutil.rmtree(folder, ignore_errors=True)


def worked_out(folder: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the layers give, without any runtime: ReLU and tanh in turn."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    for index, tensor in enumerate(graph.initializer):
        said = {entry.key: entry.value for entry in tensor.external_data}
        weights = np.memmap(
            folder / said["location"], np.float32, "r", int(said.get("offset", 0)), (tensor.dims[0], tensor.dims[1])
        )
        x = np.tanh(x @ weights) if index % 2 else np.maximum(x @ weights, 0)
    return x


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.skipif(bool(NO_ROOM), reason=NO_ROOM or "there is room")
def test_a_billion_parameters_are_deployed_served_and_shared_by_the_next_version(tmp_path: Path, billion: Path) -> None:
    proto = onnx.load(billion / "model.onnx", load_external_data=False)
    parameters = sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer)
    nbytes = 4 * parameters
    assert parameters >= 1e9
    assert (billion / "model.onnx.data").stat().st_size >= nbytes > 2 << 30
    with gateway_of(tmp_path) as (gateway, client):
        with MemoryWatch(gateway.process.pid) as watch:
            before = watch.read().resident
        with Peaks(gateway) as peaks:
            client.models.deploy(billion / "model.onnx", name="large", timeout=900)
            rows = np.ones((1, 5632), np.float32)
            name = proto.graph.output[0].name
            expected = client.infer("large", {"x": rows}, timeout=60)[name]
            assert np.allclose(expected, worked_out(billion, rows), rtol=1e-3, atol=1e-4)
            client.models.deploy(tmp_path / "second" / "model.onnx", name="large", timeout=900)
            assert np.array_equal(client.infer("large", {"x": rows}, timeout=60)[name], expected)
        print(f"peak of a worker: {peaks.workers[0] / nbytes:.3f} of {nbytes} bytes of weights")
        print(f"the gateway grew by {(peaks.gateway - before) / MIB:.1f} MiB")
        assert peaks.workers[0] < 1.15 * nbytes
        assert peaks.gateway < before + 64 * MIB
        _check_sharing(tmp_path / "state", nbytes)


def _check_sharing(state: Path, nbytes: int) -> None:
    """Both versions' weights are one file on disk, and so one set of pages."""
    large = [path.stat() for path in state.rglob("*") if path.is_file() and path.stat().st_size >= nbytes]
    assert len(large) >= 3  # the blob, and a name of it in each version's folder
    assert len({status.st_ino for status in large}) == 1
