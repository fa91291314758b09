"""Logs: one JSON object a line, or text for a terminal; never a key; never a flood.

A record goes through the handler's filters in this order: ``RateLimit`` drops what comes too fast from loggers that
callers can make talk, then the formatter writes it and takes every API key out of the finished line. Redaction works on
the text that leaves, not on the record: so it covers messages, arguments, extra fields, tracebacks and whatever other
libraries log, and a logger that is switched off costs nothing.

The formatters are ours because the usual library for JSON logs would be one more dependency for the forty lines below,
and takes three times as long for a record.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

import orjson

ACCESS_LOGGER: Final = "inferway.access"
KEY: Final = re.compile(r"\bifw_(live|test|adm)_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}\b")
"""An API key in running text."""
_SECRET: Final = re.compile(r"(ifw_(?:live|test|adm)_[0-9A-Za-z]{12})_[0-9A-Za-z]{6,}")
"""What begins like a key: finds those cut off, or run together with other text, which ``KEY`` does not."""
REDACTED: Final = "[redacted]"

NOISY: Final = ("inferway.edge", "inferway.refused")
"""Loggers that anybody who can connect can make talk, and that are therefore limited."""
NOISE_BYTES_PER_MINUTE: Final = 512 * 1024
"""What they may write together; with the access log's own limit this keeps a flood of refused requests below 1 MiB a
minute."""

_STANDARD: Final = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}
_REFUSALS: Final = frozenset({400, 401, 403, 404, 405, 408, 413, 431})
_COLOURS: Final = {"DEBUG": "2", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u2028\u2029]")

Scope = Mapping[str, Any]
AccessLog = Callable[[Scope, str | None, int, int, float], None]


def redact(text: str) -> str:
    """``text`` without the secrets of API keys. The public part of a key stays, for an operator to find it."""
    if "ifw_" not in text:
        return text
    return _SECRET.sub(rf"\1_{REDACTED}", text)


def _extra(record: logging.LogRecord) -> dict[str, object]:
    """A record's extra fields, without those that a library keeps on every record for itself, as Ray does."""
    return {n: value for n, value in record.__dict__.items() if n not in _STANDARD and not n.startswith("_")}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (RFC 3339, UTC), level, logger, message, the record's extra fields, error."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= _extra(record)
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        try:
            line = orjson.dumps(entry, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
        except (TypeError, ValueError):
            # A lone surrogate or a number beyond 64 bits: rare, and no reason to lose the record.
            line = orjson.dumps({name: ascii(value) for name, value in entry.items()}).decode()
        return redact(line)


class TextFormatter(logging.Formatter):
    """A record for a person: local time, level, logger, message, extra fields as ``name=value``; traceback below."""

    def __init__(self, *, colours: bool) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower():<7}"
        if self._colours:
            level = f"\x1b[{_COLOURS.get(record.levelname, '0')}m{level}\x1b[0m"
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        # A caller must not be able to write lines or colours of its own into somebody's terminal.
        message = _printable(record.getMessage())
        extra = "".join(
            f" {name}={_printable(str(value))}" for name, value in _extra(record).items() if value is not None
        )
        line = f"{moment}.{int(record.msecs):03d} {level} {record.name}: {message}{extra}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        if record.stack_info:
            line += "\n" + record.stack_info
        return redact(line)


class RateLimit(logging.Filter):
    """Lets the records of some loggers through up to so many bytes a minute, and says how many it has dropped.

    Args:
        names: of the loggers.
        bytes_per_minute: for all of them together; records of others always pass.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        names: tuple[str, ...] = NOISY,
        bytes_per_minute: int = NOISE_BYTES_PER_MINUTE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._names = names
        self._limit = bytes_per_minute
        self._clock = clock
        self._window_end = clock() + 60
        self._left = bytes_per_minute
        self._dropped = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(self._names):
            return True
        now = self._clock()
        if now >= self._window_end:
            self._window_end = now + 60
            self._left = self._limit
            if self._dropped:
                record.dropped_before = self._dropped
                self._dropped = 0
        # The line's length is not known yet; names, times and ids take some 300 bytes beside the message.
        size = 300 + len(record.getMessage())
        if size > self._left:
            self._dropped += 1
            return False
        self._left -= size
        return True


def configure_logging(
    style: Literal["auto", "json", "text"] = "auto", level: str = "info", stream: TextIO | None = None
) -> None:
    """Send all records of the process to one stream.

    Args:
        style: auto: text where the stream is a terminal, else JSON.
        level: the least severe level that is written: debug, info, warning, error. Other libraries' debug records are
            never written.
        stream: by default standard error.
    """
    stream = stream or sys.stderr
    terminal = stream.isatty()
    handler = logging.StreamHandler(stream)
    text = style == "text" or (style == "auto" and terminal)
    handler.setFormatter(TextFormatter(colours=terminal) if text else JsonFormatter())
    handler.addFilter(RateLimit())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    chosen = level.upper()
    root.setLevel("INFO" if chosen == "DEBUG" else chosen)
    logging.getLogger("inferway").setLevel(chosen)
    # Its start and end are told by our own server, in fewer words.
    logging.getLogger("uvicorn").setLevel("WARNING" if chosen in ("DEBUG", "INFO") else chosen)
    # Alembic tells of its own set-up at each start; a migration that changes something is told by the store.
    logging.getLogger("alembic").setLevel("WARNING")
    logging.captureWarnings(True)


def announce(message: str) -> None:
    """Write one record whatever the level: what a program that started this one waits for. Plain text in a text log."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            if isinstance(handler.formatter, JsonFormatter):
                handler.handle(logging.LogRecord("inferway.server", logging.INFO, __file__, 0, message, None, None))
            else:
                handler.stream.write(message + "\n")
                handler.flush()


def access_log(
    *,
    sample: float = 1.0,
    bytes_per_minute: int = NOISE_BYTES_PER_MINUTE,
    clock: Callable[[], float] = time.monotonic,
) -> AccessLog:
    """What the application calls with each answer, where it is to be logged.

    Args:
        sample: the share of successful answers that is written, evenly spread; errors are all written.
        bytes_per_minute: for refused requests (400, 401, 403, 404, 405, 408, 413, 431); beyond it they are counted and
            left out.
    Raises:
        ValueError: ``sample`` is not in [0, 1].
    """
    if not 0 <= sample <= 1:
        raise ValueError(f"expected sample in [0, 1], got {sample}")
    logger = logging.getLogger(ACCESS_LOGGER)
    refusals = RateLimit((ACCESS_LOGGER,), bytes_per_minute, clock)
    owed = 0.0

    def log(scope: Scope, route: str | None, status: int, size: int, seconds: float) -> None:
        nonlocal owed
        if status < 400:
            owed += sample
            if owed < 1:
                return
            owed -= 1
        principal = scope.get("principal")
        client = scope.get("client")
        path_params = scope.get("path_params") or {}
        record = logger.makeRecord(
            logger.name,
            logging.INFO,
            __file__,
            0,
            "%s %s %d",
            (scope["method"], route or "-", status),
            None,
            "access",
            {
                "request_id": _text(scope.get("request_id")),
                "method": scope["method"],
                "route": route,
                "status": status,
                "duration_ms": round(seconds * 1000, 3),
                "bytes": size,
                "key_id": getattr(principal, "key_id", None),
                "model": (path_params.get("model") or _model(scope["path"]) or "")[:128] or None,
                "client": client[0] if client else None,
            },
        )
        if status in _REFUSALS and not refusals.filter(record):
            return
        logger.handle(record)

    return log


def _model(path: str) -> str | None:
    """The model in the path of an inference request, which does not go through the router."""
    if not path.startswith("/v2/models/"):
        return None
    return path[11:].partition("/")[0] or None


def _text(value: object) -> str | None:
    if value is None:
        return None
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _printable(text: str) -> str:
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text).replace("\n", "\\n")
