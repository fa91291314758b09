"""Tokenizers of deployed models: somebody else's files, read and run in processes of their own.

What a tokenizer does to a text is what its file says, and no look at the file tells how long that takes or how much
memory: a regular expression with one repetition is quadratic in the text. In the gateway a text that never ends would
hold a thread for ever, and one that takes all memory ends the process. Here both end with their process, and with an
error of their own model.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from queue import Empty, LifoQueue
from typing import Any, Final, Literal

import numpy as np
import orjson

from ...core.catalog import Footprint
from ...core.encoding import Template
from ...core.errors import ModelExecutionError
from ..programs import START_LIMIT_S, Program
from .tokenizer import MAX_BYTES, TokenizerError

ENCODE_LIMIT_S: Final = 20.0
"""For the texts of one call. A million characters take a second or two."""
_PROCESSES: Final = 2
"""Short texts and long ones are encoded at the same time."""
_MODULE: Final = "inferway_gateway.backends.text.tokenizer_child"


class IsolatedTokenizer:
    """Implements ``TextTokenizer`` of ``core/encoding.py`` and ``Marking`` of ``language/generator.py``.

    Its processes end with it.

    Args:
        content: of ``tokenizer.json``.
        kind: of what ``encode`` gives: as ``LoadedTokenizer`` for encoders, or ``MarkingTokenizer`` for generators.
        size: of a generator's logits.
    Attributes:
        packed: a generator's vocabulary, as ``Vocabulary.unpacked`` takes it, and the names of its special tokens.
    Raises:
        TokenizerError: it is refused, or takes too long or too much memory to open.
    """

    def __init__(
        self,
        content: bytes,
        kind: Literal["encoder", "generator"] = "encoder",
        size: int = 0,
        *,
        limit_s: float = ENCODE_LIMIT_S,
    ) -> None:
        if len(content) > MAX_BYTES:
            raise TokenizerError(f"tokenizer.json is longer than {MAX_BYTES} bytes")
        self._limit_s = limit_s
        self._content = content
        self._kind = kind
        self._idle: LifoQueue[Program | None] = (
            LifoQueue()
        )  # the last one used first, so that a second starts if need be
        weakref.finalize(self, _end_all, self._idle)
        child, facts, packed = self._started(size)
        for _ in range(_PROCESSES - 1):
            self._idle.put(None)
        self._idle.put(child)
        self._footprint = _footprint(child)
        self.packed: Final = packed, {int(token): str(name) for token, name in facts.get("names", ())}
        self.begin: Final[tuple[int, ...]] = tuple(map(int, facts.get("begin", ())))
        self.vocabulary: Final[int] = int(facts.get("vocabulary", 0))
        self.single: Final = _template(facts.get("single")) or Template()
        self.pair: Final = _template(facts.get("pair"))

    def footprint(self) -> Footprint | None:
        """Of the process that runs, and at the most of all of them while each reads its file, as measured of the first;
        None where the system does not tell. Long texts take more for a moment, some 350 bytes a token."""
        return self._footprint

    def encode(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Blocks. Raises ``ModelExecutionError``."""
        message = orjson.dumps({"texts": list(texts), "special": special})
        child = self._idle.get()
        kept: Program | None = None
        try:
            if child is None:
                child, _, _ = self._started(0)
            head, _, raw = child.ask(message, limit_s=self._limit_s).partition(b"\0")
            kept = child
        except TimeoutError:
            raise ModelExecutionError(
                f"the model's tokenizer took longer than {self._limit_s:g} s for the texts of this request"
            ) from None
        except (OSError, EOFError, TokenizerError):
            raise ModelExecutionError("the process of the model's tokenizer ended at a text of this request") from None
        finally:
            if kept is None:
                _end(child)
            self._idle.put(kept)
        return _read(head, raw, len(texts))

    def _started(self, size: int) -> tuple[Program, Mapping[str, Any], bytes]:
        try:
            child = Program(_MODULE)
        except OSError:
            raise TokenizerError("the process of the tokenizer cannot be started") from None
        try:
            order = orjson.dumps({"kind": self._kind, "size": size})
            head, _, packed = child.ask(order, b"\0", self._content, limit_s=START_LIMIT_S).partition(b"\0")
            facts: dict[str, Any] = orjson.loads(head)
            if "error" in facts:
                raise TokenizerError(str(facts["error"])[:500])
        except TimeoutError:
            child.end()
            raise TokenizerError(f"tokenizer.json was not read within {START_LIMIT_S:g} s") from None
        except (OSError, EOFError, ValueError):
            child.end()
            raise TokenizerError("tokenizer.json cannot be used: the process that read it ended") from None
        except TokenizerError:
            child.end()
            raise
        return child, facts, packed


def _read(head: bytes, raw: bytes, texts: int) -> list[list[int]]:
    said = orjson.loads(head)
    if "error" in said:
        raise ModelExecutionError("the model's tokenizer failed on a text of this request")
    ids = np.frombuffer(raw, "<i4").tolist()
    ends = np.cumsum(said["lengths"], dtype=np.int64).tolist()
    if len(ends) != texts or (ends[-1] if ends else 0) != len(ids):
        raise ModelExecutionError("the process of the model's tokenizer gave no tokens for some text")
    return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _template(said: Mapping[str, Any] | None) -> Template | None:
    if said is None:
        return None
    before, between, after, types = (tuple(map(int, said[part])) for part in ("before", "between", "after", "types"))
    first, text, middle, other, last = types
    return Template(before, between, after, (first, text, middle, other, last))


def _footprint(child: Program) -> Footprint | None:
    use = child.memory()
    if use is None:
        return None
    return Footprint(use.proportional, _PROCESSES * (use.proportional + use.peak - use.resident))


def _end(child: Program | None) -> None:
    if child is not None:
        child.end()


def _end_all(idle: LifoQueue[Program | None]) -> None:
    with suppress(Empty):
        while True:
            _end(idle.get_nowait())
