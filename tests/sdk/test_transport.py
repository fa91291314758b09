"""What goes over a socket and what comes back, from servers that mean well and from those that do not."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time as real_time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpcore
import httpx
import httpx2
import numpy as np
import pytest

import inferway
from inferway import Inferway, RetryPolicy, Timeout
from inferway._errors import ConfigurationError
from inferway._transport import (
    PooledTransport,
    TimeLeft,
    environment_proxy,
    httpx_timeouts,
    pieces,
    split_base_url,
    tls_context,
    translated,
)
from scripted import KEY, Answer, ScriptedServer, Seen, Side, as_json, as_outputs, plan

ONCE = RetryPolicy(attempts=1)
IN_TIME_S = 5.0
"""How long a call with a limit of a fraction of a second may take on a machine that is busy with other things."""


# --- base URLs and proxies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted", "host"),
    [
        ("http://h", "http://h", "h"),
        (" http://h:80/ ", "http://h:80", "h"),
        ("https://h:8443/a/b/", "https://h:8443/a/b", "h:8443"),
        ("http://[::1]:8080", "http://[::1]:8080", "[::1]:8080"),
        ("http://bücher.example", "http://bücher.example", "xn--bcher-kva.example"),
    ],
)
def test_a_base_url_has_one_form(given: str, wanted: str, host: str) -> None:
    assert split_base_url(given) == (wanted, host)


@pytest.mark.parametrize(
    "wrong",
    ["", "h", "h:8080", "ftp://h", "http://", "http://user:secret@h", "http://h?a=b", "http://h#f", "http://h:port"],
)
def test_a_base_url_that_is_none_is_refused_without_telling_secrets(wrong: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        split_base_url(wrong)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "url", "wanted"),
    [
        ({}, "http://h", None),
        ({"http_proxy": "http://p:1"}, "http://h", "http://p:1"),
        ({"http_proxy": "p:1"}, "http://h", "http://p:1"),
        ({"http_proxy": "http://p:1"}, "https://h", None),
        ({"all_proxy": "http://p:1"}, "https://h", "http://p:1"),
        ({"all_proxy": "http://p:1", "no_proxy": "h"}, "https://h", None),
    ],
)
def test_the_environment_names_the_proxy(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], url: str, wanted: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment_proxy(url) == wanted


async def test_a_proxy_of_the_environment_is_used(
    side: Side, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://user:word@127.0.0.1:{server.port}")
    server.otherwise = lambda _: as_json({"models": ["through a proxy"]})
    client = side.client("http://gateway.invalid", api_key=KEY)
    assert await side(lambda: client.models.list()) == ["through a proxy"]
    seen = server.seen[0]
    assert seen.path == "http://gateway.invalid/v2/models"
    assert seen.headers["proxy-authorization"] == "Basic dXNlcjp3b3Jk"
    assert seen.headers["host"] == "gateway.invalid"


def test_a_proxy_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://p:1")
    with pytest.raises(ConfigurationError, match="socks5"):
        PooledTransport("http://h", 1)


def test_plain_http_reads_no_certificates_and_trusts_nobody() -> None:
    context = tls_context("http://h")
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.cert_store_stats()["x509_ca"] == 0
    assert tls_context("https://h").cert_store_stats()["x509_ca"] > 0


# --- time --------------------------------------------------------------------------------------------------------


def test_what_is_left_is_a_number_that_knows_what_is_left() -> None:
    now = [100.0]
    limit = TimeLeft(5.0, 105.0, lambda: now[0], 5.0)
    assert limit == 5.0
    assert limit.left() == 5.0
    now[0] = 103.0
    assert limit.left() == 2.0
    now[0] = 200.0
    assert limit.left() == 0.001, "0 would mean not to wait at all"
    assert TimeLeft(1.0, 105.0, lambda: 100.0, 1.0).left() == 1.0
    assert pickle.loads(pickle.dumps(limit)) == 5.0, "a number to everybody else"


def test_the_parts_of_a_limit_never_exceed_the_whole() -> None:
    made = plan(timeout=Timeout(total=10, connect=5, read=2))
    assert httpx_timeouts(made, 10.0) == {"connect": 5, "read": 2, "write": 2, "pool": 10.0}
    assert httpx_timeouts(made, 1.0) == {"connect": 1.0, "read": 1.0, "write": 1.0, "pool": 1.0}
    free = plan(timeout=Timeout(total=None, connect=5, read=None))
    assert httpx_timeouts(free, None) == {"connect": 5, "read": None, "write": None, "pool": None}


def drip_head() -> Answer:
    return Answer(raw=None, drip=b"x", headers={"Content-Length": "1000000"})


def slow_header_server() -> tuple[str, Callable[[], None]]:
    """A server that sends one byte of a header now and then, for ever."""
    listening = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def run() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not stop.wait(0.01):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    thread = threading.Thread(target=run)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()
        listening.close()

    return f"http://127.0.0.1:{listening.getsockname()[1]}", end


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(hang=True), id="silence"),
        pytest.param(drip_head(), id="a body that never ends"),
    ],
)
async def test_no_server_holds_a_caller_beyond_the_time_granted(
    side: Side, server: ScriptedServer, answer: Answer
) -> None:
    server.script = [answer]
    client = side.client(server.url)
    started = real_time.monotonic()
    with pytest.raises(inferway.APITimeoutError, match=r"in time \(timeout: total 0.3 s, connect 5 s\)") as caught:
        await side(lambda: client.models.list(timeout=0.3))
    assert 0.25 < real_time.monotonic() - started < IN_TIME_S
    assert caught.value.sent
    assert caught.value.elapsed is not None
    assert caught.value.elapsed >= 0.29


async def test_a_header_that_never_ends_holds_nobody(side: Side) -> None:
    url, end = slow_header_server()
    try:
        client = side.client(url)
        started = real_time.monotonic()
        with pytest.raises(inferway.APITimeoutError):
            await side(lambda: client.models.list(timeout=0.3))
        assert real_time.monotonic() - started < IN_TIME_S
    finally:
        end()


async def test_silence_has_a_limit_of_its_own(side: Side, server: ScriptedServer) -> None:
    server.script = [Answer(hang=True)]
    client = side.client(server.url, retry=None)
    with pytest.raises(inferway.APITimeoutError):
        await side(lambda: client.models.list(timeout=Timeout(total=None, read=0.2)))


async def test_a_connection_that_is_not_accepted_times_out(side: Side) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(full.getsockname())
            client = side.client(f"http://127.0.0.1:{full.getsockname()[1]}", retry=None)
            with pytest.raises(inferway.APITimeoutError, match="could not connect") as caught:
                await side(lambda: client.models.list(timeout=Timeout(total=30, connect=0.2)))
            assert caught.value.sent is False
        finally:
            for one in waiting:
                one.close()


async def test_waiting_for_a_connection_counts_too(side: Side, server: ScriptedServer) -> None:
    server.script = [Answer(hang=True)]
    client = side.client(server.url, max_connections=1, retry=None)
    if side.kind == "async":
        first = asyncio.create_task(client.models.list(timeout=30))
        await asyncio.to_thread(server.hanging.wait, 10)
        with pytest.raises(inferway.APITimeoutError):
            await client.models.list(timeout=0.2)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        return
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.models.list, timeout=2)
        assert server.hanging.wait(10)
        with pytest.raises(inferway.APITimeoutError, match="became free") as caught:
            client.models.list(timeout=0.2)
        assert caught.value.sent is False
        with pytest.raises(inferway.APITimeoutError):
            running.result()


# --- hostile answers ---------------------------------------------------------------------------------------------


async def test_a_redirect_never_carries_the_key_along(side: Side, server: ScriptedServer) -> None:
    elsewhere = ScriptedServer()
    try:
        client = side.client(server.url, api_key=KEY)
        for status in (301, 302, 303, 307, 308):
            server.script = [Answer(status, headers={"Location": f"{elsewhere.url}/v2/models"})]
            with pytest.raises(inferway.APIStatusError, match="redirect") as caught:
                await side(lambda: client.models.list())
            assert caught.value.status_code == status
        assert elsewhere.seen == []
        assert elsewhere.connections == 0
    finally:
        elsewhere.stop()


HUGE = "999999999999999999999999"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(body=b"x" * 5000), id="a long body"),
        pytest.param(Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n"), id="a long announcement"),
        pytest.param(
            Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n"
                   + b"400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n"),
            id="chunks without an end in sight",
        ),
        pytest.param(drip_head(), id="an announcement and drops"),
    ],
)  # fmt: skip
async def test_a_body_beyond_the_limit_is_refused(side: Side, server: ScriptedServer, answer: Answer) -> None:
    server.script = [answer]
    client = side.client(server.url, max_response_bytes=1500)
    with pytest.raises(inferway.APIResponseValidationError, match="longer than max_response_bytes, 1500"):
        await side(lambda: client.models.list())
    server.script = [as_json({"models": []})]
    assert await side(lambda: client.models.list()) == [], "the connection with the rest of it is not used again"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(raw=b""), id="nothing"),
        pytest.param(Answer(raw=b"\x00\x01\x02\r\n\r\n"), id="garbage"),
        pytest.param(Answer(raw=b"HTTP/9.9 200 OK\r\n\r\n"), id="another protocol"),
        pytest.param(Answer(raw=b"HTTP/1.1 2x0 OK\r\n\r\n"), id="no status"),
        pytest.param(Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: nine\r\n\r\n123456789"), id="no length"),
        pytest.param(Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"), id="half a body"),
        pytest.param(Answer(raw=f"HTTP/1.1 200 OK\r\nContent-Length: {HUGE}\r\n\r\n".encode()), id="a huge length"),
        pytest.param(
            Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), id="no chunk"
        ),
        pytest.param(
            Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhal"), id="half a chunk"
        ),
        pytest.param(Answer(raw=b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000 + b"\r\n\r\n"), id="a long header"),
        pytest.param(Answer(raw=b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n"), id="no header"),
    ],
)  # fmt: skip
async def test_an_answer_that_is_no_http_is_a_typed_error(side: Side, server: ScriptedServer, answer: Answer) -> None:
    server.otherwise = lambda _: answer
    client = side.client(server.url, api_key=KEY, retry=ONCE, timeout=20)
    with pytest.raises((inferway.APIConnectionError, inferway.APIResponseValidationError)) as caught:
        await side(lambda: client.models.list())
    error = caught.value
    assert not isinstance(error, inferway.APITimeoutError)
    assert KEY not in repr(error) + str(error.__cause__)
    assert error.__cause__ is not None or isinstance(error, inferway.APIResponseValidationError)
    assert error.request_id


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=b"[" * 100_000),
        Answer(body=b'{"a":' * 100_000),
        Answer(body=b'{"model_name":"m","outputs":[]'),
        Answer(body=b"null"),
        Answer(body=b"<html>"),
        Answer(body=b"\xff\xfe"),
        Answer(body=b"1" * 10_000),
        Answer(body=b'{"outputs":{}}'),
        Answer(body=b'{"outputs":[{"name":"y","datatype":"FP32","shape":[2],"data":[1]}]}'),
        Answer(body=b"{}", headers={"Inference-Header-Content-Length": "-1"}),
        Answer(body=b"{}", headers={"Inference-Header-Content-Length": "3"}),
        Answer(body=b"{}", headers={"Inference-Header-Content-Length": "x"}),
        Answer(body=b"{}", headers={"Inference-Header-Content-Length": HUGE}),
        Answer(body=b"{}", headers={"Inference-Header-Content-Length": "1"}),
        Answer(body=b"x", headers={"Content-Encoding": "gzip"}),
        as_outputs(("y", "FP32", [3], b"\x00" * 8)),
        as_outputs(("y", "FP32", [2**40], b"\x00" * 8)),
    ],
)
async def test_an_inference_response_that_lies_is_a_typed_error(
    side: Side, server: ScriptedServer, answer: Answer
) -> None:
    server.serve_simple()
    client = side.client(server.url)
    handle = client.model("simple")
    await side(lambda: handle.signature())
    server.otherwise = lambda _: answer
    with pytest.raises(inferway.APIResponseValidationError) as caught:
        await side(lambda: handle.infer([1, 2]))
    assert caught.value.attempts == 1
    assert len(caught.value.body) <= 1024


# --- bodies ------------------------------------------------------------------------------------------------------


async def test_a_large_tensor_goes_both_ways_without_being_joined(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url)
    array = np.random.default_rng(1).random((300_000, 2), np.float32)
    for _ in range(2):
        result = await side(lambda: client.infer("simple", {"x": array}))
        assert np.array_equal(result["y"], array)
        result["y"][0, 0] = 5.0
    seen = server.seen[-1]
    assert int(seen.headers["content-length"]) == len(seen.body)


async def test_a_large_body_is_sent_again_whole(side: Side, server: ScriptedServer) -> None:
    server.serve_simple()
    client = side.client(server.url, retry=RetryPolicy(base_delay_s=0))
    array = np.ones((300_000, 2), np.float32)
    await side(lambda: client.model("simple").signature())
    server.script = [Answer(503), Answer(raw=b"")]
    result = await side(lambda: client.infer("simple", {"x": array}))
    assert result.attempts == 3
    assert len({seen.body for seen in server.seen[1:]}) == 1


def test_pieces_cover_every_byte_once() -> None:
    data = bytes(range(256)) * 9000
    views = list(pieces((b"head", memoryview(data), b"")))
    assert b"".join(views) == b"head" + data
    assert max(len(view) for view in views) == 1024 * 1024


async def test_a_compressed_answer_is_understood(side: Side, server: ScriptedServer) -> None:
    import gzip

    server.script = [Answer(body=gzip.compress(b'{"models":["m"]}'), headers={"Content-Encoding": "gzip"})]
    client = side.client(server.url)
    assert await side(lambda: client.models.list()) == ["m"]


async def test_connections_are_kept(side: Side, server: ScriptedServer) -> None:
    server.otherwise = lambda _: as_json({"models": []})
    client = side.client(server.url)
    for _ in range(5):
        await side(lambda: client.models.list())
    assert server.connections == 1


# --- TLS ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a key and a certificate for 127.0.0.1 that only this run knows."""
    openssl = shutil.which("openssl")
    if openssl is None:
        words = "the openssl command is not installed"
        if os.environ.get("INFERWAY_REQUIRE_SERVICES") == "1":
            pytest.fail(words)
        pytest.skip(words)
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "both.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=inferway test", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [*command, "-keyout", str(folder / "key"), "-out", str(folder / "cert")], check=True, capture_output=True
    )
    made.write_text((folder / "key").read_text() + (folder / "cert").read_text())
    return made


@pytest.fixture
def secure(certificate: Path) -> Iterator[ScriptedServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    made = ScriptedServer(context)
    yield made
    made.stop()


async def test_https_works_with_a_certificate_that_is_known(
    side: Side, secure: ScriptedServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    secure.serve_simple()
    client = side.client(secure.url, api_key=KEY)
    big = np.ones((200_000, 2), np.float32)
    for inputs in ([1, 2], big):
        assert (await side(partial(client.infer, "simple", inputs)))["y"].shape[1] == 2
    assert secure.connections == 1
    secure.otherwise = lambda _: Answer(hang=True)
    with pytest.raises(inferway.APITimeoutError):
        await side(lambda: client.models.list(timeout=0.3))


async def test_a_certificate_that_nobody_knows_stops_everything(side: Side, secure: ScriptedServer) -> None:
    client = side.client(secure.url, api_key=KEY, retry=ONCE)
    with pytest.raises(inferway.APIConnectionError, match="could not connect") as caught:
        await side(lambda: client.models.list())
    assert caught.value.sent is False
    assert "ertificate" in str(caught.value)
    assert secure.seen == [], "the key was not sent"


# --- a caller's own client ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [httpx, httpx2], ids=["httpx", "httpx2"])
async def test_a_callers_own_client_is_used_whole(side: Side, server: ScriptedServer, family: Any) -> None:
    server.serve_simple()
    seen: list[str] = []
    make = family.Client if side.kind == "sync" else family.AsyncClient

    def hook(request: Any) -> None:
        seen.append(str(request.url))

    async def async_hook(request: Any) -> None:
        seen.append(str(request.url))

    own = make(
        headers={"X-Own": "yes"}, event_hooks={"request": [hook if side.kind == "sync" else async_hook]}, timeout=1e-9
    )
    client = side.client(server.url, api_key=KEY, http_client=own)
    result = await side(lambda: client.infer("simple", np.ones((200_000, 2), np.float32)))
    assert result["y"].shape == (200_000, 2)
    assert len(seen) == 2
    assert server.seen[0].headers["x-own"] == "yes"
    assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
    await side(lambda: client.close())
    assert own.is_closed


@pytest.mark.parametrize("family", [httpx, httpx2], ids=["httpx", "httpx2"])
async def test_errors_of_a_callers_own_client_become_ours(side: Side, server: ScriptedServer, family: Any) -> None:
    make = family.Client if side.kind == "sync" else family.AsyncClient
    client = side.client(server.url, http_client=make(), retry=ONCE)
    server.script = [Answer(raw=b""), Answer(hang=True), Answer(302, headers={"Location": "http://127.0.0.1:1"})]
    with pytest.raises(inferway.APIConnectionError):
        await side(lambda: client.models.list())
    with pytest.raises(inferway.APITimeoutError):
        await side(lambda: client.models.list(timeout=0.2))
    with pytest.raises(inferway.APIStatusError, match="redirect"):
        await side(lambda: client.models.list())
    await side(lambda: client.close())


async def test_an_answer_that_a_hook_has_read_is_read(side: Side, server: ScriptedServer) -> None:
    import gzip

    server.otherwise = lambda _: Answer(body=gzip.compress(b'{"models":["m"]}'), headers={"Content-Encoding": "gzip"})

    def read(response: httpx.Response) -> None:
        response.read()

    async def aread(response: httpx.Response) -> None:
        await response.aread()

    own: Any = (
        httpx.Client(event_hooks={"response": [read]})
        if side.kind == "sync"
        else httpx.AsyncClient(event_hooks={"response": [aread]})
    )
    client = side.client(server.url, http_client=own)
    assert await side(lambda: client.models.list()) == ["m"]


async def test_a_drip_through_a_callers_own_client_ends_in_time(side: Side, server: ScriptedServer) -> None:
    server.script = [drip_head()]
    own: Any = httpx.Client() if side.kind == "sync" else httpx.AsyncClient()
    client = side.client(server.url, http_client=own, retry=None)
    started = real_time.monotonic()
    with pytest.raises(inferway.APITimeoutError):
        await side(lambda: client.models.list(timeout=0.3))
    assert real_time.monotonic() - started < IN_TIME_S


def test_every_error_of_httpx_and_its_engine_is_ours() -> None:
    for family in (httpx, httpcore, httpx2):
        base = httpcore.NetworkError if family is httpcore else family.TransportError
        for name in dir(family):
            error = getattr(family, name)
            if not isinstance(error, type) or not issubclass(error, Exception):
                continue
            if issubclass(error, base) or name.endswith(("Timeout", "ProtocolError", "ProxyError")):
                found = translated(error("detail"), plan())
                assert isinstance(found, inferway.APIError), (family.__name__, name)
    assert translated(KeyError("x"), plan()) is None


# --- closing, threads and forks ----------------------------------------------------------------------------------


async def test_a_closed_client_says_so(side: Side, server: ScriptedServer) -> None:
    client = side.client(server.url)
    await side(lambda: client.close())
    await side(lambda: client.close())
    with pytest.raises(inferway.ClientClosedError):
        await side(lambda: client.models.list())
    with pytest.raises(inferway.ClientClosedError):
        await side(lambda: client.with_options(timeout=1).models.list())


def test_a_dropped_client_closes_its_connections_in_silence(server: ScriptedServer) -> None:
    server.otherwise = lambda _: as_json({"models": []})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client = Inferway(server.url)
        client.models.list()
        del client
        gc.collect()


def test_many_threads_share_a_client(server: ScriptedServer) -> None:
    server.serve_simple()
    with Inferway(server.url) as client, ThreadPoolExecutor(16) as pool:

        def call(number: int) -> float:
            return float(client.infer("simple", [number, number])["y"][0, 0])

        assert list(pool.map(call, range(64))) == list(range(64))
    assert server.connections <= 16


def test_a_forked_child_uses_connections_of_its_own(server: ScriptedServer) -> None:
    server.serve_simple()
    with Inferway(server.url) as client:
        client.infer("simple", [1, 2])
        assert server.connections == 1
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:  # pragma: no cover - the child
            try:
                answer = client.infer("simple", [3, 4])["y"].tolist()
                os.write(write, json.dumps(answer).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        child = json.loads(os.read(read, 1000))
        os.close(read)
        os.close(write)
        assert child == [[3, 4]]
        assert server.connections == 2, "the child made its own"
        assert client.infer("simple", [5, 6])["y"].tolist() == [[5, 6]]
        assert server.connections == 2, "the parent's connection is still good"


def test_a_program_ends_cleanly_without_closing_anything(server: ScriptedServer, tmp_path: Path) -> None:
    server.serve_simple()
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import asyncio
from inferway import AsyncInferway, Inferway
client = Inferway({server.url!r})
client.infer("simple", [1, 2])
waiting = AsyncInferway({server.url!r})
async def main():
    await waiting.infer("simple", [1, 2])
asyncio.run(main())
asyncio.run(main())
"""
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(program)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_request_sees_what_it_should(server: ScriptedServer) -> None:
    server.serve_simple()
    with Inferway(server.url + "/prefix/", api_key=KEY) as client:
        client.infer("simple", [1, 2])
    seen: Seen = server.seen[1]
    assert seen.path == "/prefix/v2/models/simple/infer"
    assert seen.headers["user-agent"] == f"inferway-python/{inferway.__version__}"
    assert seen.headers["content-type"] == "application/octet-stream"
    assert int(seen.headers["inference-header-content-length"]) % 16 == 0
    assert seen.json["parameters"] == {"binary_data_output": True}
