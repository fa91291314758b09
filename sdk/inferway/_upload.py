"""One file on its way to the gateway: where it stands, what is sent next, what a failure means.

A file goes up in one request whose body is read from disk while it is sent, under the SHA-256 of its content. Where the
connection breaks, the gateway keeps what came; the next request asks how much that is and goes on from there. Retries
follow the client's `RetryPolicy` and its budget as those of any call do, with one difference: ``attempts`` counts
attempts in a row that brought nothing, because a long upload over a bad line that gets on is not failing.

Nothing here waits or sends; the two clients do that in `resources.deployments`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from ._budget import RetryBudget
from ._calls import blob_path, reader
from ._core import Call, Plan, Stream, json_call
from ._errors import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    ConfigurationError,
    DigestMismatchError,
    UploadConflictError,
)
from ._options import RetryEvent
from ._package import Source
from ._progress import DeployEvent

if TYPE_CHECKING:
    from inferway_contract.models import BlobStatus

STALL_S: Final = 60.0
"""A connection that takes nothing for this long is broken."""


class Hashing:
    """The SHA-256 of a source, piece by piece, so that whoever waits for it can do so in a thread and show how far it
    is."""

    def __init__(self, source: Source, report: Callable[[DeployEvent], object]) -> None:
        self._source = source
        self._report = report
        self._pieces: Iterator[Any] = source.pieces()
        self._sum = hashlib.sha256()
        self._done = 0
        self._piece: Any = None

    def step(self) -> bool:
        """Read and hash some of it, which takes a while; False when it is done."""
        for _ in range(8):
            piece = next(self._pieces, None)
            if piece is None:
                return False
            self._sum.update(piece)
            self._done += len(piece)
        return True

    def tell(self) -> None:
        """Report how far it is; apart from `step`, because that may run in another thread."""
        source = self._source
        self._report(DeployEvent("hashing", source.path, self._done, source.size))

    @property
    def digest(self) -> str:
        return self._sum.hexdigest()


class Transfer:
    """One upload.

    Attributes:
        offset: the gateway has the content up to here.
        done: the gateway has all of it.
    """

    def __init__(self, source: Source, digest: str, plan: Plan, budget: RetryBudget,
                 report: Callable[[DeployEvent], object]) -> None:  # fmt: skip
        """
        Args:
            plan: of any call with the options of the deployment; it has the policy, the clock and the deadline.
        """
        self.offset = 0
        self.done = False
        self._source = source
        self._digest = digest
        self._plan = plan
        self._budget = budget
        self._report = report
        self._failures = 0
        self._begun_at = 0
        self._fault: ConfigurationError | None = None

    def ask(self) -> Call[BlobStatus]:
        """How much of it the gateway has; `BlobNotFoundError` is nothing, see `learned`."""
        return json_call("GET", blob_path(self._digest), reader("BlobStatus"))

    def learned(self, status: BlobStatus | None) -> None:
        """Go on from where the gateway is. None where it has nothing."""
        self.done = status is not None and status.complete
        received = 0 if status is None else status.received
        self.offset = received if received <= self._source.size else 0

    def skipped(self) -> None:
        """Tell that nothing needs to be sent."""
        self._report(DeployEvent("skipped", self._source.path, self._source.size, self._source.size))

    def put(self) -> Call[BlobStatus]:
        """The request that sends the rest."""
        size = self._source.size
        self._begun_at = self.offset
        headers = [
            ("Content-Type", "application/octet-stream"),
            ("Content-Length", str(size - self.offset)),
            ("Upload-Length", str(size)),
        ]
        if self.offset:
            headers.append(("Upload-Offset", str(self.offset)))
        body = Stream(self._read, size - self.offset, self._sent, blocking=self._source.blocking, stall_s=STALL_S)
        self._told = self.offset
        return Call("PUT", blob_path(self._digest), reader("BlobStatus"), body, tuple(headers))

    def _read(self) -> Iterator[Any]:
        self._told = self._begun_at
        try:
            yield from self._source.pieces(self._begun_at)
        except ConfigurationError as error:
            # On its way through the transport it would turn into a connection that broke.
            self._fault = error
            raise

    def _sent(self, count: int) -> None:
        self._told += count
        self._report(DeployEvent("uploading", self._source.path, self._told, self._source.size))

    def answered(self, status: BlobStatus) -> None:
        """Take the answer to `put`.

        Raises:
            APIResponseValidationError: it is not all there although all of it was sent.
        """
        if not status.complete:
            raise APIResponseValidationError(
                f"all {self._source.size} bytes of {self._source.path} were sent, and the gateway has {status.received}"
            )
        if self._told < self._source.size or not self._source.size:
            self._sent(self._source.size - self._told)
        self.done = True

    def failed(self, error: APIError) -> float:
        """Seconds to wait before the next `ask`, after `put` failed. Raises where there is to be none."""
        from ._retry import delay_s, may_retry

        if self._fault is not None:
            raise self._fault from error
        if isinstance(error, DigestMismatchError):
            if self._begun_at == 0:
                error.add_note(f"{self._source.path} was changed while it was deployed, or damaged on its way")
                raise error
            # What an earlier upload left may be at fault; the gateway has thrown it away.
        elif isinstance(error, UploadConflictError):
            if error.received is None:
                raise error
        elif not may_retry(error, self._plan):
            raise error
        if self._failures + 1 >= self._plan.retry.attempts:
            error.add_note(f"the upload was given up after {self._failures + 1} attempts that brought nothing new; "
                           f"deploying again goes on from where it is")  # fmt: skip
            raise error
        self._failures += 1
        delay = delay_s(error, self._failures, self._plan)
        left = self._plan.left()
        if left is not None and delay >= left:
            raise error
        if not self._budget.withdraw():
            error.add_note("not tried again: the client's retry budget is spent, see RetryPolicy.budget_ratio")
            raise error
        return delay

    def resumed(self, error: APIError) -> None:
        """After `learned`: tell that it goes on; what the gateway got meanwhile forgives the failures before."""
        if self.offset > self._begun_at:
            self._failures = 0
        cut = isinstance(error, APIConnectionError)
        message = "the connection broke" if cut else error.message
        self._report(DeployEvent("retrying", self._source.path, self.offset, self._source.size, message=message))

    def event(self, error: APIError, delay: float) -> RetryEvent:
        """For the client's ``on_retry``."""
        return RetryEvent(error, self._failures, delay)
