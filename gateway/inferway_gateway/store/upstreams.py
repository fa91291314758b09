"""The operator's file of upstreams: servers elsewhere that model versions of kind "remote" may be on.

    [[upstreams]]
    name = "triton-a"
    protocol = "oip"
    endpoints = [{ url = "https://a.example:8000", weight = 2 }, { url = "https://b.example:8000" }]
    secret = { env = "TRITON_A_TOKEN" }

The file is strict: a member it does not know is an error. It never holds a secret, only where one is.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from ..core.upstream import EndpointSpec, Secret, UpstreamSpec
from .state import StateError

MAX_FILE_BYTES: Final = 1 << 20
MAX_SECRET_BYTES: Final = 64 * 1024
HEALTH_PATHS: Final = {"oip": "/v2/health/live", "openai": "/models"}
_HEADER: Final = r"^[A-Za-z0-9-]{1,64}$"


class UpstreamsError(StateError):
    """The file of upstreams, or a secret that it names, is not what it should be; fit for the operator."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class EndpointOptions(_Strict):
    """One of ``endpoints``."""

    url: str
    weight: PositiveFloat = 1.0

    @field_validator("url")
    @classmethod
    def _is_a_base(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
        except ValueError:
            wrong = True
        if wrong or not value.isascii() or not value.isprintable() or " " in value:
            raise ValueError("expected http://HOST or https://HOST, with a port and a path where they are needed")
        if parts.username is not None or parts.password is not None or "?" in value or "#" in value:
            raise ValueError("expected a URL without user, query and fragment; a secret is named by 'secret'")
        return value.rstrip("/")


class SecretSource(_Strict):
    """Where the secret is: in a variable of the environment, or alone in a file that only its owner may read."""

    env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    file: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.env is None) == (self.file is None):
            raise ValueError("expected one of 'env' and 'file'")
        return self


class UpstreamOptions(_Strict):
    """One of ``[[upstreams]]``; ``core.upstream.UpstreamSpec`` says what each member is for.

    Attributes:
        insecure_secret: send the secret over plain HTTP, also to other machines.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    protocol: Literal["oip", "openai"]
    endpoints: Annotated[tuple[EndpointOptions, ...], Field(strict=False, min_length=1, max_length=64)]
    secret: SecretSource | None = None
    secret_header: Annotated[str, Field(pattern=_HEADER)] = "Authorization"  # noqa: S105  # where it goes
    secret_scheme: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{0,32}$")] = "Bearer"  # noqa: S105
    insecure_secret: bool = False
    models: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = ("*",)
    ca_file: str | None = None
    timeout_s: PositiveFloat = 30.0
    connect_timeout_s: PositiveFloat = 2.0
    pool_size: PositiveInt = 100
    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    retry_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    retry_floor_per_s: Annotated[float, Field(ge=0, le=1000)] = 0.0
    breaker_failures: PositiveInt = 5
    breaker_open_s: PositiveFloat = 1.0
    breaker_max_open_s: PositiveFloat = 30.0
    max_retry_after_s: NonNegativeFloat = 30.0
    max_response_bytes: PositiveInt = 128 * 1024 * 1024
    max_in_flight: PositiveInt = 64
    max_queued: Annotated[int, Field(ge=0)] = 1024
    health_path: Annotated[str, Field(pattern=r"^(/[!-~]*)?$")] | None = None
    health_interval_s: PositiveFloat = 5.0
    health_timeout_s: PositiveFloat = 2.0
    binary: bool | None = None

    @model_validator(mode="after")
    def _keeps_its_secret(self) -> Self:
        if self.secret is not None and not self.insecure_secret:
            for endpoint in self.endpoints:
                parts = urlsplit(endpoint.url)
                if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
                    raise ValueError(
                        f"the secret would go to {parts.hostname} in the open: expected https, "
                        "or insecure_secret = true"
                    )
        return self


class UpstreamsFile(_Strict):
    """The whole file."""

    upstreams: Annotated[tuple[UpstreamOptions, ...], Field(strict=False, max_length=256)] = ()

    @field_validator("upstreams")
    @classmethod
    def _names_differ(cls, value: tuple[UpstreamOptions, ...]) -> tuple[UpstreamOptions, ...]:
        names = [upstream.name for upstream in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expected each name once, '{twice[0]}' is there twice")
        return value


def read_upstreams(path: Path, variable: Callable[[str], str | None]) -> tuple[UpstreamSpec, ...]:
    """Read the file, and the secrets that it names.

    Args:
        path: relative paths in the file are taken from its directory.
        variable: gives the value of a variable of the environment.
    Raises:
        UpstreamsError: the file cannot be read, is not TOML, or has an unknown or wrong member; a secret is missing, or
            its file may be read by others; a file of certificates cannot be used.
    """
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UpstreamsError(f"cannot read the file of upstreams {path}: {error.strerror}") from error
    if len(text) > MAX_FILE_BYTES:
        raise UpstreamsError(f"the file of upstreams {path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        found = UpstreamsFile.model_validate(tomllib.loads(text.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UpstreamsError(f"the file of upstreams is not TOML: {error}") from None
    except ValidationError as error:
        raise UpstreamsError(f"the file of upstreams: {'; '.join(map(_explain, error.errors()))}") from None
    return tuple(_spec(options, path.parent, variable) for options in found.upstreams)


def _spec(options: UpstreamOptions, folder: Path, variable: Callable[[str], str | None]) -> UpstreamSpec:
    values: dict[str, Any] = {
        name: getattr(options, name)
        for name in UpstreamOptions.model_fields
        if name not in ("endpoints", "secret", "insecure_secret", "health_path", "ca_file")
    }
    health = options.health_path
    ca_file = None if options.ca_file is None else str(folder / options.ca_file)
    try:
        ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise UpstreamsError(
            f"cannot use the file of certificates of upstream '{options.name}': {error.strerror or error}"
        ) from error
    return UpstreamSpec(
        **values,
        endpoints=tuple(EndpointSpec(e.url, _label(e.url), e.weight) for e in options.endpoints),
        secret=None if options.secret is None else _secret(options.name, options.secret, folder, variable),
        health_path=HEALTH_PATHS[options.protocol] if health is None else health,
        ca_file=ca_file,
    )


def _secret(name: str, source: SecretSource, folder: Path, variable: Callable[[str], str | None]) -> Secret:
    whose = f"the secret of upstream '{name}'"
    if source.env is not None:
        value = variable(source.env) or ""
        if not value:
            raise UpstreamsError(f"{whose}: expected it in the variable {source.env}, which is not set")
    else:
        value = _read_secret(whose, folder / (source.file or ""))
    value = value.strip()
    if not value or not value.isascii() or not value.isprintable():
        raise UpstreamsError(f"{whose}: expected printable ASCII")
    return Secret(value)


def _read_secret(whose: str, path: Path) -> str:
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UpstreamsError(f"{whose}: expected a regular file")
            if status.st_mode & 0o077:
                raise UpstreamsError(
                    f"{whose}: others may use its file, expected mode 0600, got {stat.S_IMODE(status.st_mode):04o}"
                )
            raw = stream.read(MAX_SECRET_BYTES)
        return raw.decode()
    except OSError as error:
        raise UpstreamsError(f"{whose}: cannot read its file: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UpstreamsError(f"{whose}: expected printable ASCII") from None


def _label(url: str) -> str:
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}{parts.path}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _explain(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where} is not known"
    return f"{where}: {detail['msg'].removeprefix('Value error, ')}"
