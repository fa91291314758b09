"""API keys: their text, what they open, and how a presented one is checked without asking the database.

A key reads ``ifw_<live|test|adm>_<id: 12>_<secret: 43><checksum: 6>``, all base 62. The id is public and is the only
part that is ever logged. The secret has 256 bits, so no slow hash is needed: at rest there is
``HMAC-SHA256(pepper, whole key)``, and the pepper is kept outside the database. The checksum is a CRC-32 that finds
typing errors, and refuses junk before anything is looked up; it protects nothing.

Life of a check, from cheap to dear:

1. ``authenticate_cached``: one dictionary look-up by the public id and one keyed BLAKE2b of the presented key, compared
   in constant time with the one taken when the key was last verified. (HMAC-SHA256 there would do as well and takes
   1.27 µs instead of 0.43 µs a request, Python 3.11, November 2026. The BLAKE2b key lives and dies with the process.)
2. ``authenticate``, known id: the HMAC of the record. An unknown id takes the same steps against a digest that nothing
   has, so that wrong id, wrong secret and nearly right secret take the same time.
3. ``authenticate``, id not seen lately: one read of the store, shared by all who wait for the same id.

A record is trusted for ``ttl_s`` from the moment its read *started*: that bounds how long a key that was revoked in
another process goes on working. Keys in use are read again ahead of that, all in one query, so a busy key never waits
for the database, and survives ``grace_s`` of a database that does not answer. In this process a revocation acts at
once: ``forget`` drops the record, and the result of a read that had started before with it.

Open doubt: the first use of an id costs a read that the second does not, so timing tells whether an id was seen
lately. Ids are public names; nothing is lost.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import fnmatch
import hashlib
import hmac
import logging
import math
import re
import secrets
import string
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Final, Literal, NoReturn, Protocol, Self, TypeAlias, TypeVar

from .errors import InvalidParameterError, KeyNotFoundError, StoreUnavailableError, UnauthenticatedError

_log = logging.getLogger("inferway.keys")
_T = TypeVar("_T")

Environment: TypeAlias = Literal["live", "test", "adm"]
SCOPES: Final = frozenset({"infer", "read", "deploy", "admin"})
ADMIN_LIFETIME_S: Final = 90 * 86_400.0
"""Life of a key with the scope ``admin`` where its maker says nothing; other keys then have no end."""
MAX_LIFETIME_S: Final = 10 * 365 * 86_400.0
DEFAULT_OVERLAP_S: Final = 86_400.0
MAX_OVERLAP_S: Final = 30 * 86_400.0

_ALPHABET: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ID_LENGTH: Final = 12
_SECRET_LENGTH: Final = 43  # 43 * log2(62) = 256.03 bits
_CHECKSUM_LENGTH: Final = 6
_TAIL: Final = _SECRET_LENGTH + _CHECKSUM_LENGTH
_MAX_LENGTH: Final = len("ifw_live_") + _ID_LENGTH + 1 + _TAIL
_FORMAT: Final = re.compile(rb"ifw_(?:live|test|adm)_([0-9A-Za-z]{12})_[0-9A-Za-z]{49}")
_ID: Final = re.compile(r"[0-9A-Za-z]{12}")
_IN_TEXT: Final = re.compile(r"(ifw_(?:live|test|adm)_[0-9A-Za-z]{12}_)[0-9A-Za-z]+")
_PEPPER_BYTES: Final = 32
_PEPPER_CHECK: Final = b"inferway pepper check"
NO_SUCH_KEY: Final = "expected the id of an API key, got one that no key has"
_REFUSED: Final = "expected a valid API key, as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"


@dataclass(frozen=True, slots=True)
class Clock:
    """The two clocks of this module. Lengths are measured on ``monotonic``; expiry is a moment on ``wall`` (Unix)."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time

    def now(self) -> datetime:
        """The wall clock's moment, in UTC."""
        return datetime.fromtimestamp(self.wall(), UTC)


# --- the text of a key -----------------------------------------------------------------------------------------------


def checksum(unchecked: bytes) -> bytes:
    """The last six characters of a key: CRC-32 of all bytes before them, base 62, zero-padded."""
    value = zlib.crc32(unchecked)
    digits = bytearray(_CHECKSUM_LENGTH)
    for place in range(_CHECKSUM_LENGTH - 1, -1, -1):
        value, digit = divmod(value, 62)
        digits[place] = ord(_ALPHABET[digit])
    return bytes(digits)


def public_id(presented: str | bytes) -> str | None:
    """The id in a text that has a key's form and checksum; None for anything else. Looks nothing up, never raises."""
    match = _FORMAT.fullmatch(raw := _ascii(presented))
    if match is None or raw[-_CHECKSUM_LENGTH:] != checksum(raw[:-_CHECKSUM_LENGTH]):
        return None
    return match[1].decode("ascii")


def redact(text: str) -> str:
    """The text with the secret of every key in it replaced by ``***``, whole or cut short, checksum right or wrong."""
    return _IN_TEXT.sub(r"\1***", text)


def _ascii(presented: str | bytes) -> bytes:
    # A character outside ASCII becomes '?', which no key has.
    return presented.encode("ascii", "replace") if isinstance(presented, str) else bytes(presented)


class ApiKey:
    """A whole key. Shows only its public part unless asked with ``reveal``, and cannot be pickled."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        if public_id(text) is None:
            raise ValueError("expected an API key with a right checksum")
        self._text = text

    @classmethod
    def generate(cls, environment: Environment) -> ApiKey:
        """A new key from the system's source of randomness."""
        body = f"ifw_{environment}_{_random(_ID_LENGTH)}_{_random(_SECRET_LENGTH)}"
        return cls(body + checksum(body.encode("ascii")).decode("ascii"))

    @property
    def id(self) -> str:
        return self._text[-_TAIL - 1 - _ID_LENGTH : -_TAIL - 1]

    def reveal(self) -> str:
        """The key itself, for the one time it is shown to whoever made it."""
        return self._text

    def __repr__(self) -> str:
        return redact(self._text)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an API key cannot be pickled")


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


# --- peppers ---------------------------------------------------------------------------------------------------------


class Peppers:
    """The secrets that the stored digests are keyed with, by version. New keys get the highest version.

    An old version is kept until the last key made with it is rotated or revoked.
    """

    __slots__ = ("_versions", "current")

    def __init__(self, versions: Mapping[int, bytes]) -> None:
        """
        Args:
            versions: version number, 1 or higher, to at least 32 bytes.
        Raises:
            ValueError: there is none, or one is too short. The message holds no part of any.
        """
        if not versions:
            raise ValueError("expected at least one pepper, got none")
        for version, pepper in versions.items():
            if version < 1:
                raise ValueError(f"expected pepper versions from 1 on, got {version}")
            if len(pepper) < _PEPPER_BYTES:
                raise ValueError(f"expected a pepper of at least {_PEPPER_BYTES} bytes, got {len(pepper)}")
        self._versions = dict(versions)
        self.current = max(versions)

    @classmethod
    def generate(cls) -> Peppers:
        return cls({1: secrets.token_bytes(_PEPPER_BYTES)})

    @classmethod
    def parse(cls, text: str) -> Peppers:
        """Read ``PEPPER`` (version 1) or ``1:PEPPER,2:PEPPER``, each in hex or base64 (either alphabet).

        A pepper of hexadecimal digits only is taken as hex.

        Raises:
            ValueError: as for the constructor, or the text has another form. The message holds no part of it.
        """
        versions: dict[int, bytes] = {}
        for part in text.strip().split(","):
            number, colon, encoded = part.strip().rpartition(":")
            version = _version(number) if colon else 1
            if version in versions:
                raise ValueError(f"expected each pepper version once, got {version} twice")
            versions[version] = _decoded(encoded)
        return cls(versions)

    def format(self) -> str:
        """The text that ``parse`` reads. Secret."""
        return ",".join(f"{version}:{pepper.hex()}" for version, pepper in sorted(self._versions.items()))

    def digest(self, version: int, key: bytes) -> bytes | None:
        """HMAC-SHA256 of a whole key; None where the version is not here."""
        pepper = self._versions.get(version)
        return None if pepper is None else hmac.digest(pepper, key, "sha256")

    def checks(self) -> dict[int, bytes]:
        """By version, a value to store beside the keys that tells whether a later pepper is the same one."""
        return {
            version: hmac.digest(pepper, _PEPPER_CHECK, "sha256") for version, pepper in sorted(self._versions.items())
        }

    def __repr__(self) -> str:
        return f"Peppers(versions={sorted(self._versions)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("peppers cannot be pickled")


def _version(number: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", number):
        raise ValueError("expected a pepper's version as a whole number before the colon")
    return int(number)


def _decoded(encoded: str) -> bytes:
    try:
        if re.fullmatch(r"([0-9a-fA-F]{2})+", encoded):
            return bytes.fromhex(encoded)
        padded = encoded + "=" * (-len(encoded) % 4)
        return base64.b64decode(padded.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        # From None: the cause's message can quote the text.
        raise ValueError("expected a pepper in hex or base64") from None


# --- records and principals ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request acts for.

    Attributes:
        key_id: the key's public id; empty for ``ANONYMOUS``.
        name: what its maker called it.
        scopes: permissions; ``admin`` opens every route.
        models: shell patterns (``fnmatch``, case-sensitive) of the model names it may see.
        expires_at: Unix time from which it is refused; None: never.
        rotated_at: Unix time at which a successor was made; the caller should change over before ``expires_at``.
    """

    key_id: str
    name: str
    scopes: frozenset[str]
    models: tuple[str, ...]
    expires_at: float | None = None
    rotated_at: float | None = None
    _names: re.Pattern[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # None means every name, the common case, which then costs no matching.
        names = None if "*" in self.models else re.compile("|".join(map(fnmatch.translate, self.models)) or r"(?!)")
        object.__setattr__(self, "_names", names)

    def may(self, accepted: frozenset[str]) -> bool:
        """Whether a route that any of the accepted scopes opens is open; one that names none is open to every key."""
        return not accepted or "admin" in self.scopes or not accepted.isdisjoint(self.scopes)

    def sees(self, model: str) -> bool:
        """Whether the model exists for this principal."""
        return self._names is None or self._names.match(model) is not None


ANONYMOUS: Final = Principal(key_id="", name="anonymous", scopes=SCOPES, models=("*",))
"""Everybody, when the gateway runs without authentication."""
_NOBODY: Final = Principal(key_id="", name="nobody", scopes=frozenset(), models=())


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is stored of a key. All moments are aware, in UTC, with microseconds.

    ``digest`` is 32 bytes of HMAC-SHA256 under the pepper of ``pepper_version``. ``rotated_at`` and ``replaced_by`` (an
    id) are set together. ``created_by`` is the id of the key that asked for it, None for the command line.
    """

    id: str
    name: str
    environment: Environment
    scopes: frozenset[str]
    models: tuple[str, ...]
    digest: bytes = field(repr=False)
    pepper_version: int
    created_at: datetime
    created_by: str | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    rotated_at: datetime | None = None
    replaced_by: str | None = None
    last_used_at: datetime | None = None

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        """Whether the key opens anything at a moment. A rotated key is active until it expires."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"

    def principal(self) -> Principal:
        return Principal(
            key_id=self.id,
            name=self.name,
            scopes=self.scopes,
            models=self.models,
            expires_at=None if self.expires_at is None else self.expires_at.timestamp(),
            rotated_at=None if self.rotated_at is None else self.rotated_at.timestamp(),
        )


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: the only place that ever holds ``key``. ``replaced`` is the one it took over from."""

    record: KeyRecord
    key: ApiKey
    replaced: KeyRecord | None = None


class KeyReader(Protocol):
    """What checking keys needs of the store. Every method raises StoreUnavailableError after a bounded time."""

    async def fetch(self, key_ids: Sequence[str]) -> Mapping[str, KeyRecord]:
        """The records of those ids that exist."""
        ...

    async def touch(self, used: Mapping[str, datetime]) -> None:
        """Store when keys were last used. Unknown ids are ignored; a moment never goes back."""
        ...


class KeyStore(KeyReader, Protocol):
    """What managing keys needs besides. Each method is one transaction."""

    async def insert(self, record: KeyRecord, *, retry_token: bytes | None = None) -> None:
        """Add a record.

        Raises:
            ConflictError: a record was added with the same ``retry_token`` in the 24 hours before its ``created_at``.
                The message names that one.
        """
        ...

    async def page(self, limit: int, after: tuple[datetime, str] | None) -> list[KeyRecord]:
        """Up to ``limit`` records, newest first, from behind the one with that ``created_at`` and id."""
        ...

    async def revoke(self, key_id: str, now: datetime) -> KeyRecord:
        """Set ``revoked_at`` unless it is set, and give the record. Raises KeyNotFoundError."""
        ...

    async def rotate(self, key_id: str, successor: KeyRecord, expires_at: datetime) -> KeyRecord:
        """Add the successor and let the old key end at ``expires_at``, or earlier if it would have: both or neither.

        Gives the old key's record. The moment of it all is the successor's ``created_at``.

        Raises:
            KeyNotFoundError: there is no such key.
            ConflictError: it is revoked, expired, or was rotated before.
        """
        ...

    async def any_usable(self, now: datetime) -> bool:
        """Whether some key is neither revoked nor expired."""
        ...


# --- checking --------------------------------------------------------------------------------------------------------


class _Entry:
    """A record in memory and what was learnt since. Moments on the monotonic clock but ``expires_at``, ``*_used``."""

    __slots__ = (
        "due_at", "expires_at", "fingerprint", "lapses_at", "last_used", "principal", "read_at", "record", "saved_used",
    )  # fmt: skip

    def __init__(self) -> None:
        self.fingerprint = secrets.token_bytes(32)  # of no key, until one is verified
        self.last_used = self.saved_used = -math.inf
        self.expires_at = self.read_at = self.due_at = self.lapses_at = -math.inf
        self.record: KeyRecord | None = None
        self.principal = _NOBODY

    def take(self, record: KeyRecord, read_at: float, due_at: float, lapses_at: float) -> None:
        if self.record is None or self.record.digest != record.digest:
            self.fingerprint = secrets.token_bytes(32)
        self.record = record
        self.principal = record.principal()
        if record.revoked_at is not None:
            self.expires_at = -math.inf
        else:
            self.expires_at = math.inf if record.expires_at is None else record.expires_at.timestamp()
        self.read_at, self.due_at, self.lapses_at = read_at, due_at, lapses_at


class Authenticator:
    """Tells who a presented key stands for. Lives on one event loop; use as ``async with``.

    Inside the ``async with`` two tasks run that it owns: one reads keys in use again before they lapse, one writes when
    keys were last used, at most once in ``touch_s``. Leaving it ends both, waits for reads under way and writes what is
    left; that takes at most as long as the store's own limits.
    """

    def __init__(
        self,
        store: KeyReader,
        peppers: Peppers,
        clock: Clock | None = None,
        *,
        ttl_s: float = 4.0,
        grace_s: float = 300.0,
        retry_s: float = 1.0,
        touch_s: float = 60.0,
        capacity: int = 10_000,
        max_reads: int = 256,
    ) -> None:
        """
        Args:
            ttl_s: seconds from the start of its read for which a record is trusted, and an unknown id refused. Keys in
                use are read again from a quarter of it on.
            grace_s: seconds, likewise, for which a record is trusted while the store does not answer.
            retry_s: seconds after a failure of the store in which it is left alone.
            touch_s: seconds between two writes of when keys were last used.
            capacity: records kept, and unknown ids kept; beyond it the oldest goes.
            max_reads: ids that may wait for the store at one time; more are refused at once.
        """
        self._store, self._peppers = store, peppers
        clock = clock or Clock()
        self._monotonic, self._wall = clock.monotonic, clock.wall
        self._ttl_s, self._refresh_s, self._grace_s, self._retry_s, self._touch_s = (
            ttl_s, ttl_s / 4, grace_s, retry_s, touch_s,
        )  # fmt: skip
        self._capacity, self._max_reads = capacity, max_reads
        self._salt = secrets.token_bytes(32)
        self._nobody = _Entry()
        self._no_digest = secrets.token_bytes(32)
        # Keyed by the public id as bytes: the hot path has bytes, and the secret is nowhere in here.
        self._entries: dict[bytes, _Entry] = {}
        self._unknown: dict[bytes, float] = {}
        self._due: set[bytes] = set()
        self._flights: dict[bytes, asyncio.Task[None]] = {}
        self._reads: set[asyncio.Task[None]] = set()
        self._retry_at = -math.inf
        self._evicted_used: dict[str, float] = {}
        self._missed_peppers: set[int] = set()
        self._timers: list[asyncio.Task[NoReturn]] = []
        self.on_forget: Callable[[str], None] | None = None
        """Told of each key that is forgotten here, so that other processes of this gateway forget it too."""

    def authenticate_cached(self, presented: str | bytes) -> Principal | None:
        """The principal of a key that was verified lately; None when ``authenticate`` must be asked. No I/O.

        Call it on the loop. None says nothing about the key.
        """
        raw = presented if type(presented) is bytes else _ascii(presented)
        if len(raw) > _MAX_LENGTH:
            return None
        key_id = raw[-_TAIL - 1 - _ID_LENGTH : -_TAIL - 1]
        entry = self._entries.get(key_id, self._nobody)
        if not hmac.compare_digest(self._fingerprint(raw), entry.fingerprint):
            return None
        wall, now = self._wall(), self._monotonic()
        if now >= entry.lapses_at or wall >= entry.expires_at:
            return None
        entry.last_used = wall
        if now >= entry.due_at:
            self._due.add(key_id)
        return entry.principal

    async def authenticate(self, presented: str | bytes) -> Principal:
        """The principal of a key.

        Being cancelled leaves a read of the store running for others who wait for the same key.

        Raises:
            UnauthenticatedError: not a key, or none that is known, unexpired and unrevoked; one message for all.
            StoreUnavailableError: the store does not answer and the key was not verified lately.
        """
        raw = _ascii(presented)
        known_form = public_id(raw)
        if known_form is None:
            raise UnauthenticatedError(_REFUSED)
        key_id = known_form.encode("ascii")
        arrived = self._monotonic()
        while True:
            now = self._monotonic()
            entry = self._entries.get(key_id)
            # What was read after the request came is news enough, also where a read takes longer than the ttl.
            if entry is not None and (now < entry.lapses_at or entry.read_at >= arrived):
                return self._verified(entry, raw)
            read_at = self._unknown.get(key_id, -math.inf)
            if now < read_at + self._ttl_s or read_at >= arrived:
                return self._verified(self._nobody, raw)
            if now < self._retry_at:
                if entry is not None and now < entry.read_at + self._grace_s:
                    return self._verified(entry, raw)
                raise StoreUnavailableError(
                    "expected an answer of the key database, got none in time", retry_after_s=self._retry_s
                )
            flight = self._flights.get(key_id)
            if flight is None:
                if len(self._flights) >= self._max_reads:
                    raise StoreUnavailableError(
                        "expected fewer keys at one time that were not seen before", retry_after_s=self._retry_s
                    )
                flight = self._launch([key_id])
            await asyncio.shield(flight)

    def forget(self, key_id: str) -> None:
        """Let nothing that was read of the key before this moment count. Call it after changing the key."""
        raw = key_id.encode("ascii", "replace")
        self._flights.pop(raw, None)
        self._unknown.pop(raw, None)
        if self.on_forget is not None:
            self.on_forget(key_id)
        entry = self._entries.pop(raw, None)
        if entry is not None:
            self._keep_used(entry)

    async def refresh(self) -> None:
        """Read again, in one query for many, the keys in use whose record is no longer fresh."""
        if self._monotonic() < self._retry_at:
            return
        due, self._due = self._due, set()
        now = self._monotonic()
        stale = [key_id for key_id in due if key_id not in self._flights and self._is_due(key_id, now)]
        for start in range(0, len(stale), 500):
            await asyncio.shield(self._launch(stale[start : start + 500]))

    async def flush(self) -> None:
        """Write when keys were last used, where that is not written yet. What the store refuses is tried next time."""
        used = dict(self._evicted_used)
        fresh = [entry for entry in self._entries.values() if entry.last_used > entry.saved_used]
        saved = [(entry, entry.last_used) for entry in fresh]
        used.update((entry.principal.key_id, moment) for entry, moment in saved)
        items = [(key_id, datetime.fromtimestamp(moment, UTC)) for key_id, moment in used.items()]
        try:
            for start in range(0, len(items), 500):
                await self._store.touch(dict(items[start : start + 500]))
        except StoreUnavailableError:
            return
        for entry, moment in saved:
            entry.saved_used = moment
        for key_id, moment in used.items():
            if self._evicted_used.get(key_id, math.inf) <= moment:
                del self._evicted_used[key_id]

    async def __aenter__(self) -> Self:
        # Twice: a slow write must not hold up the reads that keep busy keys alive.
        self._timers = [
            asyncio.create_task(_every(self._ttl_s / 16, self.refresh), name="keys-refresh"),
            asyncio.create_task(_every(self._touch_s, self.flush), name="keys-last-used"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for timer in self._timers:
            timer.cancel()
        await asyncio.gather(*self._timers, *self._reads, return_exceptions=True)
        await self.flush()

    def _fingerprint(self, raw: bytes) -> bytes:
        return hashlib.blake2b(raw, key=self._salt, digest_size=32).digest()

    def _verified(self, entry: _Entry, raw: bytes) -> Principal:
        record = entry.record
        version, expected = (
            (self._peppers.current, self._no_digest) if record is None else (record.pepper_version, record.digest)
        )
        digest = self._peppers.digest(version, raw)
        if digest is None:
            # Not the caller's fault, and only the operator can help it; the caller is told nothing. Logged once for
            # each version: a caller may come as often as it likes, with no more than the key's id.
            if version not in self._missed_peppers:
                self._missed_peppers.add(version)
                _log.error(
                    "key %s was made with pepper version %d, which is not configured", entry.principal.key_id, version
                )
            raise UnauthenticatedError(_REFUSED)
        wall = self._wall()
        if not hmac.compare_digest(digest, expected) or wall >= entry.expires_at:
            raise UnauthenticatedError(_REFUSED)
        entry.fingerprint = self._fingerprint(raw)
        entry.last_used = wall
        return entry.principal

    def _is_due(self, key_id: bytes, now: float) -> bool:
        entry = self._entries.get(key_id)
        return entry is not None and now >= entry.due_at

    def _launch(self, key_ids: Sequence[bytes]) -> asyncio.Task[None]:
        flight = asyncio.create_task(self._read(key_ids), name="keys-read")
        self._flights.update(dict.fromkeys(key_ids, flight))
        self._reads.add(flight)
        flight.add_done_callback(self._reads.discard)
        return flight

    async def _read(self, key_ids: Sequence[bytes]) -> None:
        started = self._monotonic()
        own = asyncio.current_task()
        try:
            records = await self._store.fetch([key_id.decode("ascii") for key_id in key_ids])
        except StoreUnavailableError:
            now = self._monotonic()
            self._retry_at = now + self._retry_s
            for entry in filter(None, map(self._entries.get, key_ids)):
                # Busy keys stay on the hot path for another round of trying; others get their grace in authenticate.
                entry.lapses_at = max(entry.lapses_at, min(now + self._ttl_s, entry.read_at + self._grace_s))
        else:
            self._retry_at = -math.inf
            for key_id in key_ids:
                # Another flight or none: the key was changed since this read began, and its result may be older.
                if self._flights.get(key_id) is own:
                    self._put(key_id, records.get(key_id.decode("ascii")), started)
        finally:
            for key_id in key_ids:
                if self._flights.get(key_id) is own:
                    del self._flights[key_id]

    def _put(self, key_id: bytes, record: KeyRecord | None, read_at: float) -> None:
        if record is None:
            self._entries.pop(key_id, None)
            _make_room(self._unknown, self._capacity)
            self._unknown[key_id] = read_at
            return
        entry = self._entries.get(key_id)
        if entry is None:
            for evicted in _make_room(self._entries, self._capacity):
                self._keep_used(evicted)
            entry = self._entries[key_id] = _Entry()
        entry.take(record, read_at, read_at + self._refresh_s, read_at + self._ttl_s)

    def _keep_used(self, entry: _Entry) -> None:
        if entry.last_used > entry.saved_used:
            self._evicted_used[entry.principal.key_id] = entry.last_used


def _make_room(kept: dict[bytes, _T], capacity: int) -> list[_T]:
    """Take the oldest out until one more fits; a dictionary keeps the order of insertion."""
    return [kept.pop(next(iter(kept))) for _ in range(len(kept) - capacity + 1)]


async def _every(period_s: float, job: Callable[[], Awaitable[None]]) -> NoReturn:
    while True:
        await asyncio.sleep(period_s)
        try:
            await job()
        except Exception:
            # The next round may do better; ending here would leave every later round out, and nobody would be told.
            _log.exception("looking after the keys in memory failed")


# --- managing --------------------------------------------------------------------------------------------------------


class KeyService:
    """Makes, lists, revokes and rotates keys: the one place for it, behind the routes and the command line alike."""

    def __init__(
        self, store: KeyStore, peppers: Peppers, authenticator: Authenticator | None = None, clock: Clock | None = None
    ) -> None:
        """
        Args:
            authenticator: the one of this process, told of each change at once. None: others learn of changes from the
                store, within their ``ttl_s``.
        """
        self._store, self._peppers, self._authenticator = store, peppers, authenticator
        self._clock = clock or Clock()

    async def create(
        self,
        *,
        name: str,
        scopes: Iterable[str],
        models: Iterable[str] = ("*",),
        environment: Environment = "live",
        expires_in_s: float | Literal["never"] | None = None,
        created_by: str | None = None,
        idempotency_key: str | None = None,
    ) -> NewKey:
        """Make a key. Its text is in the answer and nowhere else: it cannot be had again.

        Args:
            environment: the word in the key's prefix; a key with the scope ``admin`` has ``adm`` there instead.
            expires_in_s: seconds from now; None: 90 days with the scope ``admin``, else never.
            created_by: id of the key that asks for it.
            idempotency_key: a word for this very request. A second one by the same ``created_by`` within 24 hours
                makes no second key; since the first one's text is gone, it is refused and names the first one's id.
        Raises:
            InvalidParameterError: an unknown scope or none, no model pattern, a life of no time or over ten years.
            ConflictError: see ``idempotency_key``.
            StoreUnavailableError
        """
        wanted = frozenset(scopes)
        if not wanted or not wanted <= SCOPES:
            raise InvalidParameterError(f"expected scopes out of {_listed(SCOPES)}, got {_listed(wanted) or 'none'}")
        if not (patterns := tuple(models)):
            raise InvalidParameterError("expected at least one pattern of model names, got none")
        if expires_in_s is None:
            expires_in_s = ADMIN_LIFETIME_S if "admin" in wanted else "never"
        made = self._mint(
            name=name,
            scopes=wanted,
            models=patterns,
            environment="adm" if "admin" in wanted else environment,
            lifetime=None if expires_in_s == "never" else _lifetime(expires_in_s),
            created_by=created_by,
        )
        token = None
        if idempotency_key is not None:
            token = hashlib.sha256(f"{created_by or ''}\0{idempotency_key}".encode()).digest()
        await self._store.insert(made.record, retry_token=token)
        _log.info("key %s created by %s", made.record.id, created_by or "the command line")
        return made

    async def get(self, key_id: str) -> KeyRecord:
        """The record of a key. Raises KeyNotFoundError and StoreUnavailableError."""
        record = (await self._store.fetch([_checked(key_id)])).get(key_id)
        if record is None:
            raise KeyNotFoundError(NO_SUCH_KEY)
        return record

    async def page(self, *, limit: int = 50, cursor: str | None = None) -> tuple[list[KeyRecord], str | None]:
        """Records, newest first, revoked and expired ones too; and the cursor of the next page, None after the last.

        Keys made while someone turns pages are on none of the later ones; none is left out or shown twice.

        Raises:
            InvalidParameterError: a cursor that no page gave.
            StoreUnavailableError
        """
        records = await self._store.page(limit + 1, None if cursor is None else _position(cursor))
        if len(records) <= limit:
            return records, None
        return records[:limit], _cursor(records[limit - 1])

    async def revoke(self, key_id: str, *, by: str | None = None) -> KeyRecord:
        """End a key now, for good. Doing it again changes nothing. Raises KeyNotFoundError, StoreUnavailableError."""
        try:
            record = await self._store.revoke(_checked(key_id), self._clock.now())
        finally:
            # Also after a failure: the store may have done it and only its answer was lost.
            self._forget(key_id)
        _log.info("key %s revoked by %s", key_id, by or "the command line")
        return record

    async def rotate(self, key_id: str, *, overlap_s: float = DEFAULT_OVERLAP_S, by: str | None = None) -> NewKey:
        """Make a successor with the same name, scopes, models and length of life; the old key ends after the overlap.

        The old key never ends later than it would have. A key is rotated once: a second try, a repeated request
        included, is refused and names the successor.

        Args:
            overlap_s: seconds for which both work, at most 30 days; 0 ends the old key at once.
        Raises:
            InvalidParameterError: an overlap outside its range.
            KeyNotFoundError
            ConflictError: the key is revoked, expired or was rotated before.
            StoreUnavailableError
        """
        if not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise InvalidParameterError(f"expected an overlap of 0 to {MAX_OVERLAP_S:.0f} seconds")
        old = await self.get(key_id)
        made = self._mint(
            name=old.name,
            scopes=old.scopes,
            models=old.models,
            environment=old.environment,
            lifetime=None if old.expires_at is None else old.expires_at - old.created_at,
            created_by=by,
        )
        end = made.record.created_at + timedelta(seconds=overlap_s)
        try:
            replaced = await self._store.rotate(key_id, made.record, end)
        finally:
            self._forget(key_id)
        _log.info("key %s rotated to %s by %s", key_id, made.record.id, by or "the command line")
        return replace(made, replaced=replaced)

    async def any_usable(self) -> bool:
        """Whether there is a key that opens anything. Raises StoreUnavailableError."""
        return await self._store.any_usable(self._clock.now())

    def _mint(
        self,
        *,
        name: str,
        scopes: frozenset[str],
        models: tuple[str, ...],
        environment: Environment,
        lifetime: timedelta | None,
        created_by: str | None,
    ) -> NewKey:
        key = ApiKey.generate(environment)
        version = self._peppers.current
        digest = self._peppers.digest(version, key.reveal().encode("ascii"))
        assert digest is not None  # the current version is always there
        now = self._clock.now()
        record = KeyRecord(
            id=key.id,
            name=name,
            environment=environment,
            scopes=scopes,
            models=models,
            digest=digest,
            pepper_version=version,
            created_at=now,
            created_by=created_by,
            expires_at=None if lifetime is None else now + lifetime,
        )
        return NewKey(record, key)

    def _forget(self, key_id: str) -> None:
        if self._authenticator is not None:
            self._authenticator.forget(key_id)


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))


def _checked(key_id: str) -> str:
    # Not every text can be sent to every database, and no text of another form is any key's id.
    if not _ID.fullmatch(key_id):
        raise KeyNotFoundError(NO_SUCH_KEY)
    return key_id


def _lifetime(seconds: float) -> timedelta:
    if not 0 < seconds <= MAX_LIFETIME_S:
        raise InvalidParameterError(f"expected a key's life of more than 0 and at most {MAX_LIFETIME_S:.0f} seconds")
    return timedelta(seconds=seconds)


def _cursor(record: KeyRecord) -> str:
    text = f"{record.created_at.isoformat()} {record.id}"
    return base64.urlsafe_b64encode(text.encode("ascii")).rstrip(b"=").decode("ascii")


def _position(cursor: str) -> tuple[datetime, str]:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
        moment, _, key_id = text.partition(" ")
        created_at = datetime.fromisoformat(moment)
    except ValueError:  # binascii.Error and UnicodeDecodeError are ValueErrors
        raise InvalidParameterError("expected a cursor that a page of keys gave, got another text") from None
    if created_at.utcoffset() != timedelta(0) or not _ID.fullmatch(key_id):
        raise InvalidParameterError("expected a cursor that a page of keys gave, got another text")
    return created_at, key_id
