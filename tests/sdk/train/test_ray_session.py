"""Ray: found or started, with a token, and with room or an error."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from inferway import ConfigurationError, InsufficientResourcesError
from inferway.train.ray_session import connect, reserve

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]
pytest.importorskip("ray")

STARTED = """
import json, os, subprocess, sys
from pathlib import Path
from inferway.train.ray_session import connect
import ray

told = {}
with connect(cpus=3, object_store_bytes=100_000_000) as session:
    told["session"] = [session.started, session.nodes]
    told["cpus"] = ray.cluster_resources()["CPU"]
    told["mode"] = os.environ["RAY_AUTH_MODE"]
    token = os.environ["RAY_AUTH_TOKEN"]
    told["usage"] = os.environ["RAY_USAGE_STATS_ENABLED"]
    told["dashboard"] = ray._private.worker.global_worker.node.address_info.get("webui_url")
    with connect() as inner:
        told["inner"] = [inner.started, inner.nodes]
    told["still"] = ray.is_initialized()

    @ray.remote
    def in_a_task():
        return os.environ["RAY_AUTH_TOKEN"] == token

    told["task"] = ray.get(in_a_task.remote())
    address = ray.get_runtime_context().gcs_address
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    call = f"from inferway.train.ray_session import connect\\nwith connect({address!r}) as s: print(s.started)"
    for name, given in (("without", {}), ("right", {"RAY_AUTH_TOKEN": token})):
        done = subprocess.run([sys.executable, "-c", call], env={**bare, **given}, capture_output=True, text=True)
        told[name] = [done.returncode, done.stdout.strip(), done.stderr.strip().splitlines()[-1:]]
told["after"] = [ray.is_initialized(), sorted(name for name in os.environ if name.startswith("RAY_"))]
told["file"] = (Path.home() / ".ray" / "auth_token").exists()
Path(sys.argv[1]).write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process told that had nothing of Ray before, with a home folder of its own."""
    folder = tmp_path_factory.mktemp("home")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STARTED, str(folder / "told")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "told").read_text())
    return found


def test_without_an_address_a_ray_is_started_for_the_block(told: dict[str, Any]) -> None:
    assert told["session"] == [True, 1]
    assert told["cpus"] == 3
    assert told["after"][0] is False


def test_what_is_connected_already_is_used_and_left_running(told: dict[str, Any]) -> None:
    assert told["inner"] == [False, 1]
    assert told["still"] is True


def test_it_wants_its_token_which_is_written_nowhere(told: dict[str, Any]) -> None:
    assert told["mode"] == "token"
    assert told["task"] is True
    assert told["file"] is False
    assert not [name for name in told["after"][1] if "AUTH" in name or "USAGE" in name]
    code, out, error = told["without"]
    assert (code, out) == (1, "")
    assert "ConfigurationError: no Ray could be reached" in error[0]
    # The token alone is enough: Ray itself would not look at it without being told to.
    assert told["right"][:2] == [0, "False"]


def test_it_tells_nobody_of_its_use_and_has_no_dashboard(told: dict[str, Any]) -> None:
    assert told["usage"] == "0"
    assert not told["dashboard"]


def test_what_there_is_is_reserved_and_given_back(local_ray: None) -> None:
    import ray

    with connect() as session, reserve([{"CPU": 3}, {"CPU": 2}], timeout_s=30) as group:
        assert not session.started
        assert group.bundle_specs == [{"CPU": 3}, {"CPU": 2}]
        limit = time.monotonic() + 10
        while ray.available_resources().get("CPU", 0) > 3:
            assert time.monotonic() < limit
    while ray.available_resources().get("CPU", 0) < 8:
        assert time.monotonic() < limit


def test_what_is_not_there_is_an_error_in_time(local_ray: None) -> None:
    with (
        pytest.raises(
            InsufficientResourcesError, match="2 CPU and 1 GPU in 2 parts of up to 1 CPU and 1 GPU"
        ) as caught,
        reserve([{"CPU": 1}, {"CPU": 1, "GPU": 1}], timeout_s=0.2),
    ):
        pass
    assert "GPU: 0, 0 of them free" in str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.wanted == {"CPU": 2.0, "GPU": 1.0}
    assert caught.value.available == {"CPU": 8.0, "GPU": 0.0}


def test_room_that_somebody_else_has_is_not_there(local_ray: None) -> None:
    with (
        reserve([{"CPU": 6}], timeout_s=30),
        pytest.raises(InsufficientResourcesError, match="8, 2 of them free"),
        reserve([{"CPU": 1}] * 3, timeout_s=0.2),
    ):
        pass


NO_RAY = """
import sys
sys.modules["ray"] = None
from inferway.train.ray_session import connect
with connect():
    pass
"""


def test_without_ray_it_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", NO_RAY], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().endswith(
        "Training over several processes needs ray, which is not installed: pip install 'inferway[ray]'"
    )


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_where_nobody_is_it_says_so_at_once(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code = f"from inferway.train.ray_session import connect\nwith connect('{scheme}127.0.0.1:{port}'): pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    said = f"{ConfigurationError.__name__}: no Ray could be reached at '{scheme}127.0.0.1:{port}': [Errno 111]"
    assert said in done.stderr


NOT_STARTED = """
import os, ray

def init(*arguments, **options):
    raise Exception("The current node timed out during startup.")  # as Ray does, where a machine is too busy

ray.init = init
from inferway import TrainingError
from inferway.train.ray_session import connect

before = dict(os.environ)
try:
    with connect(cpus=1):
        pass
except TrainingError as error:
    print(error)
print(dict(os.environ) == before)
"""


def test_where_ray_does_not_start_it_says_what_to_do() -> None:
    done = subprocess.run([sys.executable, "-c", NOT_STARTED], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "Ray did not start on this machine: The current node timed out during startup. Where processors or memory are "
        "taken by others, wait for them, or use a Ray that runs already, with address='auto'",
        "True",
    ], done.stderr
