"""Calls to requests, replies to results, failures to errors: without a server."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import inferway
from inferway import Clock
from inferway._core import (
    Call,
    HeaderMap,
    Reply,
    decoded,
    excerpt,
    json_call,
    load_json,
    model_path,
    overridden,
    path_of,
    retry_after,
)
from inferway._errors import APIStatusError, ConfigurationError, MalformedAnswer
from inferway_contract import names
from scripted import KEY, FakeClock, plan

# --- paths -------------------------------------------------------------------------------------------------------


def test_a_model_has_its_path_with_and_without_version() -> None:
    assert model_path("m", None) == "/v2/models/m"
    assert model_path("m", 3, "infer") == "/v2/models/m/versions/3/infer"
    assert model_path("m", "12", "ready") == "/v2/models/m/versions/12/ready"


@given(st.text(min_size=1))
def test_no_name_can_leave_its_place_in_the_path(name: str) -> None:
    try:
        path = path_of("v2", "models", name, "infer")
    except UnicodeEncodeError:
        assert any("\ud800" <= character <= "\udfff" for character in name)
        return
    assert re.fullmatch(r"/v2/models/[A-Za-z0-9_.~%@-]+/infer", path)


@pytest.mark.parametrize(
    ("model", "version"), [("", None), (None, None), (5, None), ("m", "v1"), ("m", -1), ("m", True)]
)
def test_what_is_no_model_or_version_is_refused(model: Any, version: Any) -> None:
    with pytest.raises(ConfigurationError):
        model_path(model, version)


# --- headers -----------------------------------------------------------------------------------------------------


def test_a_call_carries_its_key_its_ids_and_its_time() -> None:
    call: Call[Any] = Call("POST", "/p", lambda reply: reply, b"body", (("Content-Length", "4"),))
    made = plan(call)
    headers = dict(made.headers(9.9985))
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Host"] == "gateway"
    assert headers["Content-Length"] == "4"
    assert headers["Inferway-Timeout-Ms"] == "9999"
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", headers["X-Request-Id"])
    assert headers["Idempotency-Key"]
    assert "Inferway-Attempt" not in headers, "the first attempt is the usual one"


def test_later_attempts_keep_their_ids_and_count() -> None:
    made = plan(Call("POST", "/p", lambda reply: reply))
    first = dict(made.headers(10))
    made.attempt = 2
    second = dict(made.headers(0.0001))
    assert second["Inferway-Attempt"] == "2"
    assert second["Inferway-Timeout-Ms"] == "1", "never 0, which would be no time at all"
    for name in ("X-Request-Id", "Idempotency-Key"):
        assert first[name] == second[name]


def test_reading_has_no_idempotency_key_and_no_limit_no_time() -> None:
    made = plan(options={"timeout": None})
    assert made.left() is None
    headers = dict(made.headers(made.left()))
    assert "Idempotency-Key" not in headers
    assert "Inferway-Timeout-Ms" not in headers


def test_the_time_that_is_told_stays_within_the_contract() -> None:
    assert dict(plan().headers(1e12))["Inferway-Timeout-Ms"] == str(names.MAX_TIMEOUT_MS)


def test_a_caller_may_name_the_ids() -> None:
    made = plan(Call("POST", "/p", lambda reply: reply), {"request_id": "order-7:a", "idempotency_key": "once, please"})
    headers = dict(made.headers(1))
    assert (headers["X-Request-Id"], headers["Idempotency-Key"]) == ("order-7:a", "once, please")


@pytest.mark.parametrize(
    "options",
    [
        {"request_id": "a b"},
        {"request_id": ""},
        {"request_id": "x" * 129},
        {"idempotency_key": ""},
        {"idempotency_key": "x" * 256},
        {"idempotency_key": "a\r\nX: b"},
        {"headers": {"X-A": "a\nb"}},
        {"headers": {"X A": "a"}},
        {"headers": {"X-A": 5}},
        {"timeout": -1},
    ],
)
def test_an_option_that_cannot_be_sent_is_refused(options: Any) -> None:
    call: Call[Any] = Call("POST", "/p", lambda reply: reply)
    with pytest.raises(ValueError):
        plan(call, options).headers(1)


def test_an_unknown_option_is_an_unknown_argument() -> None:
    options: Any = {"timout": 5}
    with pytest.raises(TypeError, match="timout"):
        plan(options=options)


def test_a_callers_header_replaces_ours_whatever_its_case() -> None:
    headers = dict(
        plan(options={"headers": {"user-agent": "me"}}, default_headers={"AUTHORIZATION": "Basic x"}).headers(1)
    )
    assert headers["user-agent"] == "me"
    assert "User-Agent" not in headers
    assert headers["AUTHORIZATION"] == "Basic x"
    assert "Authorization" not in headers


def test_a_key_that_is_asked_for_each_time_goes_into_the_header() -> None:
    made = plan(api_key=lambda: "unused")
    assert dict(made.headers(1, "  fresh-key\n"))["Authorization"] == "Bearer fresh-key"


@pytest.mark.parametrize("key", ["", "  ", "a b", "a\nb", "schlüssel", 5])
def test_a_key_that_cannot_stand_in_a_header_is_refused_without_being_told(key: Any) -> None:
    made = plan(api_key=lambda: key)
    with pytest.raises(ConfigurationError) as caught:
        made.headers(1, key)
    assert "schl" not in str(caught.value)


def test_overriding_nothing_gives_the_same_list() -> None:
    headers = [("A", "1")]
    assert overridden(headers, None) is headers


def test_ids_of_calls_differ_also_in_a_forked_child() -> None:
    ids = {plan().request_id for _ in range(1000)}
    assert len(ids) == 1000
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover - the child
        os.write(write, plan().request_id.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    child = os.read(read, 200).decode()
    os.close(read)
    os.close(write)
    assert child[:20] != plan().request_id[:20]


# --- replies -----------------------------------------------------------------------------------------------------


def test_headers_of_an_answer_are_found_in_any_case() -> None:
    headers = HeaderMap([(b"X-A", b"1"), (b"x-a", b"2"), (b"B", b"\xe9")])
    assert headers["X-a"] == "1, 2"
    assert headers["b"] == "é"
    assert list(headers) == ["x-a", "b"]
    assert len(headers) == 2
    assert "X-A" in repr(headers).upper()


def test_a_reply_knows_the_id_that_was_sent_where_the_answer_has_none() -> None:
    reply = plan(options={"request_id": "mine"}).accept(Reply(200, []))
    assert reply.request_id == "mine"
    assert plan().accept(Reply(200, [(b"X-Request-Id", b"theirs")])).request_id == "theirs"


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b'{"error":"expected x","code":"invalid_tensor"}', "expected x", "invalid_tensor"),
        (b'{"type":"urn:inferway:error:conflict","title":"T","detail":"D","code":"conflict"}', "D", "conflict"),
        (b'{"title":"T"}', "T", None),
        (b'{"error":{"message":"M","code":"c"}}', "M", "c"),
        (b'{"error":{"code":6}}', 'GET /v2 was answered with status 400: {"error":{"code":6}}', None),
        (b"plain words\nmore", "GET /v2 was answered with status 400: plain words", None),
        (b"<html>x</html>", "GET /v2 was answered with status 400", None),
        (b"[1]", "GET /v2 was answered with status 400: [1]", None),
        (b"", "GET /v2 was answered with status 400", None),
        (b"\xff\xfe", "GET /v2 was answered with status 400: \ufffd\ufffd", None),
    ],
)
def test_an_error_says_what_the_answer_says(body: bytes, message: str, code: str | None) -> None:
    with pytest.raises(APIStatusError) as caught:
        plan().accept(Reply(400, [(b"X-Request-Id", b"r")], body))
    assert (caught.value.message, caught.value.code, caught.value.request_id) == (message, code, "r")


@pytest.mark.parametrize(
    ("status", "code", "hint", "retryable"),
    [
        (503, "queue_full", None, True),
        (503, "queue_full", b"false", False),
        (500, "internal", None, False),
        (500, "internal", b"true", True),
        (500, "internal", b"maybe", False),
        (504, "deadline_exceeded", None, False),
        (504, None, None, True),
        (502, None, None, True),
        (429, None, None, True),
        (408, None, None, True),
        (409, None, None, False),
        (500, None, None, False),
        (429, "from_the_future", None, True),
    ],
)
def test_the_answer_then_the_contract_then_the_policy_say_what_may_be_tried_again(
    status: int, code: str | None, hint: bytes | None, retryable: bool
) -> None:
    body = b"{}" if code is None else b'{"error":"e","code":"%s"}' % code.encode()
    with pytest.raises(APIStatusError) as caught:
        plan().accept(Reply(status, [] if hint is None else [(b"X-Should-Retry", hint)], body))
    assert caught.value.retryable is retryable


def test_a_redirect_is_an_error_that_says_why() -> None:
    with pytest.raises(APIStatusError, match="redirect, which the SDK does not follow"):
        plan().accept(Reply(302, [(b"Location", b"http://elsewhere")]))


def test_no_error_ever_holds_the_key() -> None:
    echo = b'{"error":"bad key %s","code":"unauthenticated"}' % KEY.encode()
    with pytest.raises(inferway.AuthenticationError) as caught:
        plan(api_key=KEY).accept(Reply(401, [], echo))
    assert KEY not in str(caught.value) + repr(caught.value)
    assert "***" in str(caught.value)
    other = "ifw_live_abcdefghijkl_" + "x" * 49
    assert other not in plan().hide(f"somebody else's {other}")
    assert plan(api_key="k").hide("unknown") == "unknown", "a short key is found within ordinary words"


def test_a_status_that_the_call_understands_is_no_error() -> None:
    call = json_call("GET", "/p", lambda reply: reply.status_code, statuses=frozenset({503}))
    made = plan(call)
    assert made.result(made.accept(Reply(503, []))) == 503


def test_an_answer_that_breaks_the_contract_is_a_typed_error() -> None:
    made = plan(json_call("GET", "/p", lambda reply: load_json(reply.body)))
    with pytest.raises(inferway.APIResponseValidationError, match="expected JSON") as caught:
        made.result(made.accept(Reply(200, [], b"<html>")))
    error = caught.value
    assert (error.status_code, error.body, error.attempts) == (200, "<html>", 1)


# --- bodies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "pack"), [(b"gzip", gzip.compress), (b"X-GZIP", gzip.compress), (b"deflate", zlib.compress)]
)
def test_a_content_encoding_is_undone(encoding: bytes, pack: Any) -> None:
    made = plan()
    assert made.accept(Reply(200, [(b"Content-Encoding", encoding)], pack(b"hello"))).body == b"hello"
    assert made.accept(Reply(200, [(b"Content-Encoding", b"identity")], b"hello")).body == b"hello"


@pytest.mark.parametrize(
    ("body", "encoding", "match"),
    [
        (gzip.compress(b"x" * 10_000, mtime=0), b"gzip", "longer than max_response_bytes"),
        (gzip.compress(b"hello", mtime=0)[:-9], b"gzip", "ends too early"),
        (b"hello", b"gzip", "cannot be undone"),
        (b"hello", b"br", "not asked for"),
    ],
)
def test_a_content_encoding_that_lies_or_explodes_is_refused(body: bytes, encoding: bytes, match: str) -> None:
    with pytest.raises(inferway.APIResponseValidationError, match=match):
        plan().accept(Reply(200, [(b"Content-Encoding", encoding)], body))
    with pytest.raises(MalformedAnswer, match=match):
        decoded(body, encoding, 1000)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"\xff", "expected JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"1" * 5000, "expected JSON"),
    ],
)
def test_json_from_a_hostile_server_is_refused(data: bytes, match: str) -> None:
    with pytest.raises(MalformedAnswer, match=match):
        load_json(data)


def test_json_that_is_too_long_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferway._core.JSON_LIMIT_BYTES", 4)
    with pytest.raises(MalformedAnswer, match="5 bytes of JSON"):
        load_json(b"[1,2]")


def test_an_excerpt_is_the_first_kilobyte() -> None:
    assert len(excerpt(b"x" * 5000)) == 1024


# --- Retry-After -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, None),
        (b"5", 5.0),
        (b" 0.5 ", 0.5),
        (b"0", 0.0),
        (b"-1", None),
        (b"nan", None),
        (b"inf", None),
        (b"soon", None),
        (b"", None),
        (b"9" * 400, None),
        (b"Sun, 99 Foo 2026 00:00:00 GMT", None),
    ],
)
def test_retry_after_is_seconds(value: bytes | None, wanted: float | None) -> None:
    assert retry_after(value, FakeClock().clock()) == wanted


def test_retry_after_is_a_date() -> None:
    time = FakeClock()
    date = format_datetime(datetime.fromtimestamp(time.wall + 30, UTC), usegmt=True).encode()
    past = format_datetime(datetime.fromtimestamp(time.wall - 30, UTC), usegmt=True).encode()
    assert retry_after(date, time.clock()) == 30
    assert retry_after(past, time.clock()) is None
    assert retry_after(past, Clock()) is None
