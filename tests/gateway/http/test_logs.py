"""Logs: their form, no keys in them, no floods."""

from __future__ import annotations

import io
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferway_gateway.core.keys import ANONYMOUS
from inferway_gateway.http.logs import (
    ACCESS_LOGGER,
    KEY,
    JsonFormatter,
    RateLimit,
    TextFormatter,
    access_log,
    announce,
    configure_logging,
    redact,
)
from inferway_gateway.server.policy import EdgeLimits
from raw_edge import echo, running

SECRET = "0123456789abcdefghijABCDEFGHIJ0123456789abcdefghi"
PRESENTED = f"ifw_live_abcdefABCDEF_{SECRET}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def configure() -> Iterator[Callable[..., io.StringIO]]:
    """``configure_logging`` into a stream; the suite's own set-up is put back in the end."""
    names = ("", "inferway", "uvicorn")
    levels = {name: logging.getLogger(name).level for name in names}
    root = logging.getLogger()
    handlers = root.handlers[:]
    for handler in handlers:
        root.removeHandler(handler)

    def start(style: Any = "auto", level: str = "info", stream: io.StringIO | None = None) -> io.StringIO:
        stream = stream or io.StringIO()
        configure_logging(style, level, stream)
        return stream

    yield start
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def entries(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_the_example_is_a_key() -> None:
    assert KEY.fullmatch(PRESENTED)


def test_a_record_is_one_line_of_json(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("json")
    logging.getLogger("inferway.http").warning(
        "several\nlines of %s", "text", extra={"request_id": "r-1", "size": 3, "odd": {1: object}}
    )
    (entry,) = entries(stream)
    assert entry["level"] == "warning"
    assert entry["logger"] == "inferway.http"
    assert entry["message"] == "several\nlines of text"
    assert entry["request_id"] == "r-1"
    assert entry["size"] == 3
    assert entry["time"].endswith("+00:00")


def test_errors_come_with_their_traceback(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("json")
    try:
        raise ValueError("some defect")
    except ValueError:
        logging.getLogger("inferway.http").exception("it failed", stack_info=True)
    (entry,) = entries(stream)
    assert "Traceback" in entry["error"]
    assert "some defect" in entry["error"]
    assert "test_logs" in entry["stack"]


@pytest.mark.parametrize("odd", ["\ud800", 2**70, float("nan"), b"\xff", {"a": {2**70}}, [1, object()]])
def test_nothing_odd_loses_a_record(configure: Callable[..., io.StringIO], odd: Any) -> None:
    stream = configure("json")
    logging.getLogger("inferway").warning("odd: %s", odd, extra={"odd": odd})
    (entry,) = entries(stream)
    assert "odd" in entry["message"]


def test_auto_is_text_on_a_terminal_and_json_elsewhere(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("auto", stream=Terminal())
    logging.getLogger("inferway").warning("hello", extra={"request_id": "r-1", "nothing": None})
    line = stream.getvalue()
    assert "\x1b[33mwarning" in line
    assert "inferway: hello request_id=r-1\n" in line
    assert len(entries_after(configure("auto"), "hello")) == 1


def entries_after(stream: io.StringIO, message: str) -> list[dict[str, Any]]:
    logging.getLogger("inferway").warning(message)
    return entries(stream)


def test_text_without_a_terminal_has_no_colours_and_shows_tracebacks(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("text")
    try:
        raise ValueError("some defect")
    except ValueError:
        logging.getLogger("inferway").exception("it failed", stack_info=True)
    assert "\x1b" not in stream.getvalue()
    assert "ValueError: some defect" in stream.getvalue()
    assert "Stack" in stream.getvalue()


def test_a_caller_cannot_write_into_somebodys_terminal(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("text")
    logging.getLogger("inferway").warning("got %s", "a\x1b[2J\nfake line\r\x9b", extra={"path": "\x1b]0;x\x07"})
    assert stream.getvalue().count("\n") == 1
    assert not {"\x1b", "\r", "\x9b", "\x07"} & set(stream.getvalue())


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", ["debug", "info", "warning"]), ("info", ["info", "warning"]), ("warning", ["warning"]), ("error", [])],
)
def test_the_level_is_kept(configure: Callable[..., io.StringIO], level: str, shown: list[str]) -> None:
    stream = configure("json", level)
    logger = logging.getLogger("inferway.x")
    logger.debug("debug")
    logger.info("info")
    logger.warning("warning")
    logging.getLogger("other").debug("never")
    assert [entry["message"] for entry in entries(stream)] == shown


def test_warnings_are_logged_and_configuring_twice_writes_once(configure: Callable[..., io.StringIO]) -> None:
    configure("json")
    stream = configure("json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", UserWarning, stacklevel=1)
    assert len(entries(stream)) == 1
    assert "careful" in entries(stream)[0]["message"]


def test_what_others_wait_for_is_written_at_every_level(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("json", "error")
    announce("it listens")
    assert [(entry["message"], entry["level"]) for entry in entries(stream)] == [("it listens", "info")]
    stream = configure("text", "error")
    logging.getLogger().addHandler(logging.NullHandler())
    announce("it listens")
    assert stream.getvalue() == "it listens\n"


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter(colours=False), TextFormatter(colours=True)])
@pytest.mark.parametrize("where", ["message", "argument", "mapping", "extra", "nested", "exception", "cause", "repr"])
def test_no_key_leaves_whatever_it_hides_in(formatter: logging.Formatter, where: str) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger("x")
    logger.addHandler(handler)
    if where == "message":
        logger.warning("got " + PRESENTED)
    elif where == "argument":
        logger.warning("got %r and %s", PRESENTED.encode(), [PRESENTED])
    elif where == "mapping":
        logger.warning("got %(key)s", {"key": PRESENTED})
    elif where == "extra":
        logger.warning("got", extra={"authorization": f"Bearer {PRESENTED}"})
    elif where == "nested":
        logger.warning("got", extra={"headers": {"authorization": [f"Bearer {PRESENTED}"]}})
    elif where == "repr":
        logger.warning("got", extra={"odd": type("Odd", (), {"__repr__": lambda self: PRESENTED})()})
    else:
        try:
            try:
                raise KeyError(PRESENTED)
            except KeyError as error:
                if where == "cause":
                    raise RuntimeError("outer") from error
                raise
        except Exception:
            logger.exception("failed")
    assert SECRET not in stream.getvalue()
    assert "ifw_live_abcdefABCDEF_[redacted]" in stream.getvalue() or where == "repr"


@given(st.text(), st.sampled_from(["live", "test", "adm"]), st.text())
def test_a_key_between_any_words_is_redacted(before: str, kind: str, after: str) -> None:
    text = redact(f"{before}ifw_{kind}_abcdefABCDEF_{SECRET}{after}")
    assert SECRET not in text
    assert "[redacted]" in text


@pytest.mark.parametrize("cut", [6, 20, 48])
def test_part_of_a_secret_is_redacted_too(cut: int) -> None:
    assert redact(PRESENTED[: 22 + cut] + "…") == "ifw_live_abcdefABCDEF_[redacted]…"


@pytest.mark.parametrize(
    "text", ["", "nothing here", "ifw_live_abcdefABCDEF", "ifw_live_abcdefABCDEF is its id", "ifw_"]
)
def test_what_is_public_stays(text: str) -> None:
    assert redact(text) == text


def test_keys_in_refused_requests_do_not_reach_the_log(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("json", "debug")
    key = PRESENTED.encode()
    with running(echo, EdgeLimits(header_bytes=2000)) as edge:
        for head in (
            b"GET /" + key + b" HTTP/1.1\r\nHost: a b\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: " + key + b"?\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " + key + b"\r\nAuthorization: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " + key + b"\0\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: " + key + b"\r\nX: " + b"x" * 3000 + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nX-Request-Id: " + key + b"\r\n\r\nzz\r\n",
        ):
            with edge.client() as client:
                client.send(head)
                assert client.read().status in (400, 431)
    assert SECRET not in stream.getvalue()
    assert len([entry for entry in entries(stream) if entry["logger"] == "inferway.edge"]) == 6


# --- floods ----------------------------------------------------------------------------------------------------------


def record(name: str, message: str = "refused") -> logging.LogRecord:
    return logging.LogRecord(name, logging.INFO, "", 0, message, (), None)


def test_noisy_loggers_are_limited_and_say_what_was_left_out() -> None:
    now = 0.0
    limit = RateLimit(("inferway.edge",), 10_000, lambda: now)
    passed = [limit.filter(record("inferway.edge")) for _ in range(100)]
    assert 20 <= sum(passed) <= 40
    assert passed == sorted(passed, reverse=True)
    assert all(limit.filter(record("inferway.http")) for _ in range(100))
    now = 61.0
    first = record("inferway.edge")
    assert limit.filter(first)
    assert first.__dict__["dropped_before"] == passed.count(False)
    second = record("inferway.edge")
    assert limit.filter(second)
    assert "dropped_before" not in second.__dict__


def test_a_flood_of_refused_requests_stays_below_a_mebibyte_a_minute(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("json")
    log = access_log()
    edge = logging.getLogger("inferway.edge")
    scope = {"method": "POST", "path": "/v2/models/m/infer", "request_id": b"r" * 36, "client": ("192.0.2.1", 1)}
    for _ in range(10_000):
        edge.info("refused a request with %d: %s", 431, "expected at most 100 headers", extra={"request_id": "r" * 24})
        log(scope, "/v2/models/{model}/infer", 401, 120, 0.0001)
    assert 100_000 < len(stream.getvalue()) <= 1024 * 1024


# --- the access log --------------------------------------------------------------------------------------------------


def test_an_answer_is_one_record(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("json")
    scope = {
        "method": "POST",
        "path": "/v2/models/m/infer",
        "request_id": b"r-1",
        "principal": ANONYMOUS,
        "client": ("192.0.2.1", 4711),
    }
    access_log()(scope, "/v2/models/{model}/infer", 200, 123, 0.0012345)
    (entry,) = entries(stream)
    del entry["time"]
    assert entry == {
        "level": "info",
        "logger": ACCESS_LOGGER,
        "message": "POST /v2/models/{model}/infer 200",
        "request_id": "r-1",
        "method": "POST",
        "route": "/v2/models/{model}/infer",
        "status": 200,
        "duration_ms": 1.234,
        "bytes": 123,
        "key_id": ANONYMOUS.key_id,
        "model": "m",
        "client": "192.0.2.1",
    }


def test_an_answer_without_route_principal_or_model_is_a_record_too(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("json")
    access_log()({"method": "GET", "path": "/nowhere"}, None, 404, 9, 0.0)
    (entry,) = entries(stream)
    assert entry["message"] == "GET - 404"
    assert entry["route"] is entry["key_id"] is entry["model"] is entry["client"] is entry["request_id"] is None


def test_the_models_name_is_the_routers_and_no_longer_than_a_name_can_be(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("json")
    scope = {"method": "GET", "path": "/v2/models/x/ready", "path_params": {"model": "m" * 5000}, "request_id": "r"}
    access_log()(scope, "/v2/models/{model}/ready", 200, 1, 0.0)
    assert entries(stream)[0]["model"] == "m" * 128


def test_successes_are_sampled_evenly_and_errors_are_all_there(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("json")
    log = access_log(sample=0.1)
    scope = {"method": "GET", "path": "/v2", "request_id": b"r"}
    for i in range(1000):
        log(scope, "/v2", 200, i, 0.0)
    for i in range(7):
        log(scope, "/v2", 500, i, 0.0)
    found = entries(stream)
    sizes = [entry["bytes"] for entry in found if entry["status"] == 200]
    assert 99 <= len(sizes) <= 100
    assert all(9 <= b - a <= 11 for a, b in itertools.pairwise(sizes))
    assert sum(entry["status"] == 500 for entry in found) == 7


def test_a_sample_of_nothing_writes_no_successes(configure: Callable[..., io.StringIO]) -> None:
    stream = configure("json")
    access_log(sample=0)({"method": "GET", "path": "/v2"}, "/v2", 200, 1, 0.0)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("sample", [-0.1, 1.1])
def test_a_sample_has_to_be_a_share(sample: float) -> None:
    with pytest.raises(ValueError, match="sample"):
        access_log(sample=sample)


def test_what_a_library_keeps_on_every_record_for_itself_is_not_written() -> None:
    record = logging.LogRecord("inferway", logging.INFO, "", 0, "hello", (), None)
    record.__dict__ |= {"_ray_timestamp_ns": 1, "request_id": "r-1"}
    written = json.loads(JsonFormatter().format(record))
    assert written["request_id"] == "r-1"
    assert "_ray_timestamp_ns" not in written
