"""A large file goes up in constant memory, in the process of the SDK itself."""

from __future__ import annotations

import hashlib
import json
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import models

MIB = 1024 * 1024
SIZE = 512 * MIB
PROGRAM = """
import asyncio, json, resource, sys
import inferway
url, path, kind = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
async def main():
    async with inferway.AsyncInferway(url) as client:
        await client.models.deploy(path[:-5] + "-small.onnx", name="m", wait=False)
        before = peak()
        await client.models.deploy(path, name="m", wait=False)
        return peak() - before
def sync():
    with inferway.Inferway(url) as client:
        client.models.deploy(path[:-5] + "-small.onnx", name="m", wait=False)
        before = peak()
        client.models.deploy(path, name="m", wait=False)
        return peak() - before
print(asyncio.run(main()) if kind == "async" else sync())
"""


class Sink(socketserver.StreamRequestHandler):
    """A gateway that hashes what comes and keeps none of it."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            method, path, _ = line.decode().split(" ")
            headers: dict[str, str] = {}
            while (line := self.rfile.readline().strip()) != b"":
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            left, found = int(headers.get("content-length", "0")), hashlib.sha256()
            while left:
                piece = self.rfile.read(min(left, MIB))
                left -= len(piece)
                found.update(piece)
            self._answer(method, path, int(headers.get("content-length", "0")), found.hexdigest())

    def _answer(self, method: str, path: str, size: int, digest: str) -> None:
        status = 404
        body: dict[str, Any] = {"code": "blob_not_found", "detail": "no"}
        if method == "PUT":
            assert path.endswith(digest)
            status, body = 201, {"digest": digest, "size": size, "received": size, "complete": True}
        elif method == "POST":
            status, body = 202, {
                "id": "d1", "model": "m", "version": 1, "digest": "a" * 64, "state": "running", "step": None,
                "failed_step": None, "error": None, "reused": False, "alias": None, "created_by": "key",
                "created_at": "2026-11-23T12:00:00Z", "updated_at": "2026-11-23T12:00:00Z",
            }  # fmt: skip
        content = json.dumps(body).encode()
        self.wfile.write(f"HTTP/1.1 {status} S\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)


@pytest.fixture
def sink() -> Iterator[str]:
    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Sink) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_memory_is_flat_while_half_a_gibibyte_goes_up(tmp_path: Path, sink: str, kind: str) -> None:
    for name, size in (("large-small", MIB), ("large", SIZE)):
        model, _ = models.external_data(location=f"{name}.bin")
        (tmp_path / f"{name}.onnx").write_bytes(model)
        with (tmp_path / f"{name}.bin").open("wb") as weights:
            weights.truncate(size)
    command: list[Any] = [sys.executable, "-c", PROGRAM, sink, tmp_path / "large.onnx", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 8, "MiB more at the peak than for a file of 1 MiB"
