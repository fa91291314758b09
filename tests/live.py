"""A real gateway in a process of its own, for tests that speak to it over a socket."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0


@dataclass
class LiveGateway:
    """A running gateway and the means to call it.

    Attributes:
        url: where it listens, without a slash at the end.
        repository: its model directory.
        state_dir: its database and pepper.
        admin_key: a key with the scope ``admin``.
        log: lines that it has written so far.
    """

    url: str
    repository: Path
    state_dir: Path
    admin_key: str
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def make_key(self, *scopes: str, models: Sequence[str] = ("*",), name: str = "test") -> str:
        """A new key, made over HTTP."""
        body = {"name": name, "scopes": list(scopes), "models": list(models)}
        status, answer, _ = self.call("POST", "/api/v1/keys", body)
        assert status == 201, answer
        return str(answer["key"])

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = "",
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """One request with the standard library alone: status, parsed JSON (or text), headers.

        Args:
            body: bytes as they are, anything else as JSON.
            key: the admin key where it is empty, none where it is None.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method, headers=dict(headers or {}))
        if key is not None:
            request.add_header("Authorization", f"Bearer {key or self.admin_key}")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, raw, got = response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            with error:
                status, raw, got = error.code, error.read(), error.headers
        try:
            return status, json.loads(raw), got
        except ValueError:
            return status, raw.decode(errors="replace"), got

    def wait_until_ready(self) -> None:
        end = time.monotonic() + START_LIMIT_S
        while self.call("GET", "/v2/health/ready", key=None)[0] != 200:
            assert time.monotonic() < end, "not ready in time:\n" + "".join(self.log)
            time.sleep(0.02)


def make_key(state_dir: Path, *scopes: str, name: str = "admin") -> str:
    """A key, made on the command line as an operator makes the first one."""
    command = [sys.executable, "-m", "inferway_gateway", "keys", "create", "--name", name, "--scopes", *scopes]
    done = subprocess.run([*command, "--state-dir", str(state_dir)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def run_gateway(
    repository: Path,
    state_dir: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    wait: bool = True,
) -> Iterator[LiveGateway]:
    """Start ``inferway serve`` on a free port and stop it in the end.

    Args:
        options: further arguments of the command line.
        environment: added to the process's own.
        wait: until every model is ready.
    """
    key = make_key(state_dir, "admin")
    command = [sys.executable, "-m", "inferway_gateway", "serve", str(repository), "--port", "0"]
    command += ["--state-dir", str(state_dir), *options]
    settings = {"INFERWAY_DRAIN_DELAY_S": "0", "INFERWAY_DRAIN_TIMEOUT_S": "5", **(environment or {})}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **settings})
    log: list[str] = []
    listening = threading.Event()

    def follow() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line)
            if "Inferway listens on" in line:
                listening.set()
        listening.set()

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    try:
        assert listening.wait(START_LIMIT_S), "did not start:\n" + "".join(log)
        found = re.search(r"Inferway listens on (http://[\w.:\[\]]+)", "".join(log))
        assert found is not None, "did not start:\n" + "".join(log)
        gateway = LiveGateway(found[1], repository, state_dir, key, process, log)
        if wait:
            gateway.wait_until_ready()
        yield gateway
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            reader.join(STOP_LIMIT_S)
            assert process.stderr is not None
            process.stderr.close()
