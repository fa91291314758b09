"""Every setting of the gateway, with unit, default and reason. The only reader of the environment.

Each field is set by an argument of the command line or by ``INFERWAY_<FIELD>`` in the environment; the argument wins.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def default_state_dir() -> Path:
    """``$XDG_STATE_HOME/inferway``, by default below ``~/.local/state``."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "inferway"


def environment_variable(name: str) -> str | None:
    """A variable that an operator's file names, such as the one that holds an upstream's secret."""
    return os.environ.get(name)


class Settings(BaseSettings):
    """The gateway's settings, frozen and validated before anything opens."""

    model_config = SettingsConfigDict(
        env_prefix="INFERWAY_",
        frozen=True,
        extra="forbid",
        env_ignore_empty=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,  # a gateway that drains for ever is not what anybody means
    )

    model_dir: Path | None = None
    """The model repository: one directory a model, in the layout ``NAME/VERSION/model.onnx``. Without one the gateway
    serves what is deployed to it."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs at least one API key, or ``insecure``."""
    port: int = Field(default=8080, ge=0, le=65535)
    """TCP port to listen on; 0 takes a free one."""
    workers: int = Field(default=1, ge=1, le=256)
    """Processes that listen. 1: the gateway does so itself. More share the port, check keys and read and write bodies,
    each on a processor of its own, while one process more holds the models, which all of them batch together on."""
    server_name: str = Field(default="inferway", min_length=1, max_length=128)
    """What the server's metadata gives as its name."""
    auth: bool = True
    """Ask for an API key on every route but live and ready."""
    insecure: bool = False
    """Allow to listen beyond loopback without keys. Said again in the log at each start."""

    state_dir: Path = Field(default_factory=default_state_dir)
    """Directory of the SQLite database and the pepper file, mode 0700."""
    database_url: SecretStr | None = None
    """SQLAlchemy URL of the database; by default the SQLite file ``inferway.db`` in ``state_dir``."""
    key_pepper: SecretStr | None = None
    """Secret, at least 32 bytes in hex or base64, that the hashes of keys are made with; by default the file ``pepper``
    in ``state_dir``, made at first use. Several gateways on one database need the same one."""
    key_cache_ttl_s: PositiveFloat = 4.0
    """Seconds for which a checked key is trusted without asking the database again, which is how long a revoked key may
    go on working in another process. Keys in use are read again after a quarter of it, so that they never wait; below
    2.5 they may, while a database hangs."""

    requests_per_minute: int = Field(default=0, ge=0)
    """Inference requests, over every protocol, that each key may make in a minute, and a sixth of them at once; 0: as
    many as it likes. Every gateway counts for itself; of ``workers``, each counts ``/infer`` against an equal share."""

    upstreams: Path | None = None
    """TOML file of the servers elsewhere that model versions may be on, see docs/remote-models.md."""

    model_control: Literal["none", "explicit", "poll"] = "none"
    """none: load all models at start; explicit: load and unload on request only; poll: follow the directory."""
    load_models: Annotated[tuple[str, ...], NoDecode] = ()
    """With ``model_control=explicit``: models to load at start."""
    poll_interval_s: PositiveFloat = 5.0
    """Seconds between two looks at the directory with ``model_control=poll``."""
    strict_readiness: bool = True
    """Ready means that every model of the repository is ready, as the protocol has it; else that the server is."""
    trial_budget_s: float = Field(default=1.0, ge=0)
    """Seconds that each model's load may take for trying ONNX Runtime options and keeping the fastest; 0: no trial."""
    measure_budget_s: PositiveFloat = 0.5
    """Seconds that each model's load may take for measuring what runs of different sizes cost."""

    isolation: Literal["worker", "inprocess"] = "worker"
    """Where deployed models run unless their deployment says it: each in a process of its own, or in the gateway's."""
    worker_load_timeout_s: PositiveFloat = 300.0
    """Seconds that a worker process may take to open its model, trying options and warming up included."""
    worker_load_memory_bytes: PositiveInt | None = None
    """Address space of a worker while it opens its model; by default 2 GiB and six times the model's files. Warm, it
    may have twice its peak and 512 MiB more than it has."""
    worker_answer_limit_bytes: PositiveInt = 256 * 1024 * 1024
    """Bytes that the outputs of one run in a worker may have."""
    worker_breaker_failures: int = Field(default=3, ge=0)
    """Requests that killed their worker although they were alone in it, crashes while nothing ran, and starts that
    failed, within a minute, after which a version is held back for 5 seconds and more; 0: it never is."""
    worker_respawns_per_minute: PositiveInt = 60
    """How often the workers of one version are started again in a minute, whatever ends them."""
    allow_inprocess: bool = False
    """Let whoever may deploy ask for the gateway's own process. A model there that crashes takes the gateway along."""
    memory_budget_bytes: PositiveInt | None = None
    """What deployed models may hold of the memory together; by default four fifths of what the machine, or the control
    group that the gateway runs in, has."""
    load_wait_s: PositiveFloat = 30.0
    """Seconds that a request waits for a deployed model that has to be loaded for it. The load goes on after that."""
    parallel_deployments: PositiveInt = 2
    """Deployments that go on at once, of different models. Those of one model go one after the other."""

    deployments_per_key: PositiveInt = 32
    """Deployments that one key may have going on or waiting at a time. What is free goes to the key with the fewest."""
    deployment_timeout_s: PositiveFloat = 1800.0
    """Seconds that a deployment may take once it is its turn."""

    extensions_models: Annotated[tuple[str, ...], NoDecode] = ()
    """Patterns (``ocr-*``) of names of deployed models that may use the operators of onnxruntime-extensions, which are
    native code of the package that is installed beside the gateway."""

    approve_templates: Annotated[tuple[str, ...], NoDecode] = ()
    """Patterns of names of deployed models whose own chat templates may be rendered. A template is a program that the
    gateway runs, in a sandbox; those of models of the folder are approved."""

    providers: Annotated[tuple[str, ...], NoDecode] = ("CPUExecutionProvider",)
    """ONNX Runtime execution providers in order of preference."""
    cpus: PositiveInt | None = None
    """Runner threads; by default as many as the processors this process may use."""
    inline_threshold_s: float = Field(default=100e-6, ge=0)
    """Runs measured shorter than this happen on the event loop, for a hop to a thread costs as much. 0: none does."""
    run_timeout_s: PositiveFloat = 30.0
    """Seconds after which a run is ended."""
    run_timeout_limit_s: PositiveFloat = 600.0
    """The most seconds that a deployed model's own configuration may ask for in place of ``run_timeout_s``; where it
    asks for more it is given so many."""

    body_limit_bytes: PositiveInt = 128 * 1024 * 1024
    """The largest body, before and after decompression."""
    json_limit_bytes: PositiveInt = 8 * 1024 * 1024
    """The largest JSON body, and JSON part of a binary one. Larger tensors travel as binary data."""
    header_limit_bytes: PositiveInt = 16 * 1024
    """The most bytes of a request's line and headers."""
    header_limit_count: PositiveInt = 100
    """The most headers of a request."""
    header_timeout_s: PositiveFloat = 10.0
    """Seconds from the first byte of a request to the end of its headers."""
    body_timeout_s: PositiveFloat = 30.0
    """Seconds for a body to arrive, to which come those that its size takes at ``body_min_rate``."""
    body_min_rate: PositiveInt = 64 * 1024
    """Bytes per second that a slow body must at least arrive with."""
    max_connections: PositiveInt = 4096
    """Open connections; beyond it the oldest one with an incomplete request is closed."""
    keep_alive_s: PositiveFloat = 75.0
    """Seconds for which an idle connection stays open."""
    drain_delay_s: float = Field(default=1.0, ge=0)
    """Seconds for which a gateway that was told to stop goes on accepting, while it already says not ready."""
    drain_timeout_s: PositiveFloat = 30.0
    """Seconds that requests in flight have to end after that."""

    blob_store: str | None = None
    """URL of an object store for the files of deployed models, such as ``s3://bucket/prefix``; by default they are in
    ``state_dir``. Credentials, region and endpoint are taken from the usual variables (``AWS_ACCESS_KEY_ID``,
    ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, and ``AWS_ALLOW_HTTP`` for one without TLS).
    Needs ``inferway[gateway,s3]``. No two databases may share a prefix."""
    blob_cache_bytes: PositiveInt = 32 * 1024**3
    """Bytes that local copies of an object store's files may take, besides those of versions that are in use."""
    upload_limit_bytes: PositiveInt = 16 * 1024**3
    """The largest file of a deployed model. Files are uploaded in streams, so ``body_limit_bytes`` does not hold for
    them."""
    storage_limit_bytes: PositiveInt | None = None
    """The most bytes that the files of deployed models may take together; by default what the disk has room for."""
    storage_limit_per_key_bytes: PositiveInt | None = None
    """The same for the files that one key has uploaded."""
    blob_grace_s: PositiveFloat = 3600.0
    """Seconds for which a file that no model version has is kept, for a deployment that is about to begin."""

    history_s: float = Field(default=365 * 86_400.0, gt=0, le=100 * 365 * 86_400.0)
    """Seconds for which events, and deployments that have ended, are kept; by default a year. What is deployed, by
    whom, and where aliases point is kept anyway."""
    history_per_model: PositiveInt = 10_000
    """The most events, and the most ended deployments, that are kept of one model, whatever their age."""

    log_format: Literal["auto", "json", "text"] = "auto"
    """auto: text on a terminal, JSON elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe record that is written."""
    access_log: bool = False
    """Write a record for each request. The metrics count them all anyway, at a small part of its cost."""

    @field_validator("load_models", "extensions_models", "approve_templates", "providers", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("state_dir")
    @classmethod
    def _can_be_in_a_url(cls, value: Path) -> Path:
        # SQLAlchemy ends the file's name there, and there is no way of escaping it.
        if "?" in str(value):
            raise ValueError("expected a directory without '?' in its path")
        return value

    def database(self) -> str:
        """The database URL, with its password where it has one."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.state_dir / 'inferway.db'}"

    @property
    def loopback(self) -> bool:
        """Whether ``host`` is reached from this machine alone."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
