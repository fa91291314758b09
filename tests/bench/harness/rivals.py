"""The other servers: how each is started, in every configuration that the benchmark tries.

Each rival lives in a virtual environment of its own, which `setup_rivals.py` builds. The configurations are those that
a person who knows the server would try for a tiny model on a small machine; what the benchmark does not need and the
rival lets one switch off (access log, metrics, telemetry) is off, in the rival's favour.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from harness import addsub
from harness.load import Job
from harness.paths import RIVAL_VENVS, RIVALS
from harness.processes import Command

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True, slots=True)
class Variant:
    """One configuration of one server: how it starts and what is sent to it."""

    command: Command
    job: Job


def installed(name: str) -> bool:
    """The environment is complete: its set-up writes this file last."""
    return (RIVAL_VENVS / name / ".complete").exists()


def echo(folder: Path, reply: bytes) -> Variant:
    """uvicorn at its fastest: uvloop, httptools, no access log or lifespan. It answers with the gateway's own bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reply").write_bytes(reply)
    return Variant(uvicorn_echo("echo:app", {"REPLY": str(folder / "reply")}), addsub.job("/echo"))


def uvicorn_echo(app: str, env: dict[str, str] | None = None) -> Command:
    argv = [sys.executable, "-m", "uvicorn", app, "--host", "127.0.0.1", "--port", "{port}", "--loop", "uvloop"]
    argv += ["--http", "httptools", "--no-access-log", "--lifespan", "off", "--log-level", "warning"]
    return Command(argv, cwd=RIVALS, env=env or {}, note="uvicorn, uvloop, httptools, no access log")


def triton(folder: Path) -> dict[str, Variant]:
    """NVIDIA's server from the nvidia-pytriton wheel, its Python backend calling ONNX Runtime.

    The wheel has the server, the backend's library and one stub for each Python version, but no ONNX Runtime backend.
    The stub has to lie beside the library, and the server finds the wheel's other libraries by LD_LIBRARY_PATH.
    """
    site = RIVAL_VENVS / "triton" / "lib" / PYTHON / "site-packages"
    home = site / "pytriton" / "tritonserver"
    backends = folder / "backends"
    shutil.copytree(home / "backends", backends, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    stub = home / "python_backend_stubs" / PYTHON.removeprefix("python") / "triton_python_backend_stub"
    shutil.copy2(stub, backends / "python")
    found = {}
    for instances in (1, 2):
        for batching in ("off", "on"):
            for threads in (2, 8):
                repository = folder / f"repository-{instances}-{batching}"
                _triton_model(repository / "addsub", instances, batching == "on")
                argv = [str(home / "bin" / "tritonserver"), "--model-repository", str(repository)]
                argv += ["--backend-directory", str(backends), "--http-port", "{port}", "--http-address", "127.0.0.1"]
                argv += ["--allow-grpc", "false", "--allow-metrics", "false", "--http-thread-count", str(threads)]
                argv += ["--log-info", "false", "--log-warning", "false"]
                name = (
                    f"{instances} instance{'s' * (instances > 1)}, dynamic batching {batching}, {threads} HTTP threads"
                )
                # The stub embeds libpython and finds the environment's packages through the `python3` on the PATH.
                env = {
                    "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
                    "PATH": f"{RIVAL_VENVS / 'triton' / 'bin'}:{os.environ['PATH']}",
                }
                command = Command(
                    argv, folder, env, ready_path="/v2/health/ready", note=f"gRPC and metrics off, {name}"
                )
                found[name] = Variant(command, addsub.job("/v2/models/addsub/infer"))
    return found


def _triton_model(folder: Path, instances: int, batching: bool) -> None:
    (folder / "1").mkdir(parents=True, exist_ok=True)
    shutil.copy2(RIVALS / "triton" / "model.py", folder / "1")
    addsub.write_model(folder / "1" / "model.onnx")
    lines = ['name: "addsub"', 'backend: "python"', "max_batch_size: 64"]
    for kind, names in (("input", ("INPUT0", "INPUT1")), ("output", ("OUTPUT0", "OUTPUT1"))):
        lines += [f'{kind} {{ name: "{name}" data_type: TYPE_INT32 dims: [ 16 ] }}' for name in names]
    lines.append(f"instance_group {{ kind: KIND_CPU count: {instances} }}")
    if batching:
        lines.append("dynamic_batching { }")
        lines.append('parameters { key: "join" value: { string_value: "true" } }')
    (folder / "config.pbtxt").write_text("\n".join(lines) + "\n")


def mlserver(folder: Path) -> dict[str, Variant]:
    """MLServer with a runtime of ours, since it has none for ONNX. Its adaptive batching is tried as well."""
    model = addsub.write_model(folder / "addsub.onnx")
    found = {}
    for name, batching in (("no batching", None), ("adaptive batching 32 / 1 ms", (32, 0.001))):
        home = folder / ("batching" if batching else "plain")
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy2(RIVALS / "mlserver" / "addsub.py", home)
        settings: dict[str, object] = {
            "name": "addsub",
            "implementation": "addsub.AddSub",
            "parameters": {"uri": str(model)},
        }
        if batching:
            settings |= {"max_batch_size": batching[0], "max_batch_time": batching[1]}
        (home / "model-settings.json").write_text(json.dumps(settings))
        # parallel_workers 0 runs the model in the server's own process: the pool only adds pickling for a tiny model.
        (home / "settings.json").write_text(
            json.dumps({"debug": False, "parallel_workers": 0, "host": "127.0.0.1", "metrics_endpoint": None})
        )
        env = {
            "MLSERVER_HTTP_PORT": "{port}",
            "MLSERVER_GRPC_PORT": "{port1}",
            "MLSERVER_METRICS_PORT": "{port2}",
        }
        command = Command(
            [str(RIVAL_VENVS / "mlserver" / "bin" / "mlserver"), "start", str(home)],
            home,
            env,
            ready_path="/v2/models/addsub/ready",
            note=f"parallel_workers 0, metrics and debug off, uvloop, httptools, {name}",
        )
        found[name] = Variant(command, addsub.job("/v2/models/addsub/infer"))
    return found


def litserve(folder: Path) -> dict[str, Variant]:
    """LitServe has a web process and worker processes by design; one web process here, as for all."""
    model = addsub.write_model(folder / "addsub.onnx")
    found = {}
    for workers in (1, 2):
        for batch in (1, 32):
            for fast in (0, 1):
                queue = "ZMQ" if fast else "process"
                name = f"{workers} worker{'s' * (workers > 1)}, max_batch_size {batch}, {queue} queue"
                env = {"PORT": "{port}", "MODEL": str(model), "WORKERS": str(workers)}
                env |= {"MAX_BATCH_SIZE": str(batch), "FAST_QUEUE": str(fast)}
                command = Command(
                    [str(RIVAL_VENVS / "litserve" / "bin" / "python"), str(RIVALS / "litserve" / "addsub.py")],
                    folder,
                    env,
                    ready_path="/health",
                    note=f"uvloop, httptools, access log off, {name}",
                )
                found[name] = Variant(command, addsub.job("/predict"))
    return found


def bentoml(folder: Path) -> dict[str, Variant]:
    """One worker; plain JSON, declared arrays, and declared arrays with adaptive batching."""
    model = addsub.write_model(folder / "addsub.onnx")
    bodies = {"Plain": addsub.PROTOCOL_BODY, "Typed": addsub.TYPED_BODY, "Batched": addsub.PAIRS_BODY}
    found = {}
    for service, body in bodies.items():
        home = folder / service.lower()
        home.mkdir(parents=True, exist_ok=True)
        argv = [str(RIVAL_VENVS / "bentoml" / "bin" / "bentoml"), "serve", f"addsub:{service}"]
        argv += ["--host", "127.0.0.1", "--port", "{port}", "--working-dir", str(RIVALS / "bentoml")]
        env = {"MODEL": str(model), "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
        command = Command(
            argv,
            home,
            env,
            ready_path="/readyz",
            note=f"1 worker, access log and metrics off, uvloop, httptools, service {service}",
        )
        found[service] = Variant(command, addsub.job("/infer", body))
    return found


RIVAL_SERVERS = {"Triton": triton, "MLServer": mlserver, "LitServe": litserve, "BentoML": bentoml}
