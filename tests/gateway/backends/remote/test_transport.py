from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from inferway_gateway.backends.remote import RemoteBackend
from inferway_gateway.core.errors import ModelLoadError
from inferway_gateway.core.stats import ModelStats
from inferway_gateway.core.upstream import EndpointSpec, RemoteSpec, Secret, UpstreamSpec
from scripted import ScriptedServer

from .conftest import answer_simply, request


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a key and a certificate for 127.0.0.1 that only this run knows."""
    openssl = shutil.which("openssl")
    if openssl is None:
        words = "the openssl command is not installed"
        if os.environ.get("INFERWAY_REQUIRE_SERVICES") == "1":
            pytest.fail(words)
        pytest.skip(words)
    made = tmp_path_factory.mktemp("tls") / "both.pem"
    key, chain = made.with_name("key"), made.with_name("chain")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=inferway test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key),
         "-out", str(chain)],
        check=True, capture_output=True,
    )  # fmt: skip
    made.write_text(key.read_text() + chain.read_text())
    return made


@pytest.fixture
def secure(certificate: Path) -> Iterator[ScriptedServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    made = ScriptedServer(context)
    made.otherwise = answer_simply
    yield made
    made.stop()


def upstream(url: str, ca_file: Path | None = None) -> UpstreamSpec:
    endpoints = (EndpointSpec(url, "it"),)
    return UpstreamSpec(
        "up", "oip", endpoints, secret=Secret("hush"), ca_file=None if ca_file is None else str(ca_file)
    )


async def test_a_certificate_that_the_operator_names_is_trusted(secure: ScriptedServer, certificate: Path) -> None:
    async with RemoteBackend([upstream(secure.url, certificate)]) as backend:
        executor = await backend.open("mine", 1, RemoteSpec("up", "simple"), ModelStats())
        assert (await executor.infer(request())).outputs[0].shape == (1, 2)
        assert await executor.close()


async def test_any_other_certificate_ends_the_call_before_the_secret_is_sent(secure: ScriptedServer) -> None:
    async with RemoteBackend([upstream(secure.url)]) as backend:
        with pytest.raises(ModelLoadError, match="its certificate is not trusted"):
            await backend.open("mine", 1, RemoteSpec("up", "simple"), ModelStats())
    assert not secure.seen


async def test_a_name_that_is_not_the_certificates_ends_the_call(secure: ScriptedServer, certificate: Path) -> None:
    url = secure.url.replace("127.0.0.1", "localhost")
    async with RemoteBackend([upstream(url, certificate)]) as backend:
        with pytest.raises(ModelLoadError, match="its certificate is not trusted"):
            await backend.open("mine", 1, RemoteSpec("up", "simple"), ModelStats())
    assert not secure.seen


async def test_a_file_without_certificates_is_told(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(OSError, match="file of certificates of upstream 'up'"):
        async with RemoteBackend([upstream("https://127.0.0.1:1", tmp_path / "ca.pem")]):
            pass


async def test_requests_share_the_connections_of_the_pool(secure: ScriptedServer, certificate: Path) -> None:
    spec = replace(upstream(secure.url, certificate), pool_size=4)
    async with RemoteBackend([spec]) as backend:
        executor = await backend.open("mine", 1, RemoteSpec("up", "simple"), ModelStats())
        await asyncio.gather(*(executor.infer(request()) for _ in range(60)))
        assert await executor.close()
    assert secure.connections <= 4
