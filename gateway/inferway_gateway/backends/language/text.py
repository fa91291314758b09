"""From tokens to text, piece by piece: no half characters, and nothing of a stop string.

A token is a run of bytes, and a character of UTF-8 may be spread over several. So each token's bytes are known from a
table, and an incremental decoder keeps back the beginning of a character until the rest comes. Text that may yet
become a stop string is kept back too: the longest end of what there is that some stop string begins with.
"""

from __future__ import annotations

import codecs
import re
from array import array
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final, Self

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_MARK: Final = "\u2581"


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with.

    Source: GPT-2's ``bytes_to_unicode``: printable Latin-1 stands for itself, the rest follows from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}


class Vocabulary:
    """The bytes of each token.

    Args:
        data: of each token; empty for special ones.
        names: of special tokens, those that are no text, such as ``<|im_end|>``.
    """

    def __init__(self, data: list[bytes], names: Mapping[int, str]) -> None:
        self.bytes: Final = data
        self.names: Final = names
        self.special: Final = frozenset(names)

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any], size: int) -> Self:
        """Take it from ``tokenizer.json``.

        Args:
            tokenizer: its members.
            size: of the model's logits; ids above the tokenizer's are tokens without text.
        Raises:
            KeyError, TypeError, AttributeError, ValueError, IndexError: it has the wrong shape.
        """
        words = tokenizer["model"]["vocab"]
        pairs = words.items() if isinstance(words, Mapping) else ((word[0], i) for i, word in enumerate(words))
        letters = _byte_letters() if _is_byte_level(tokenizer.get("decoder")) else None
        data = [b""] * size
        for word, token in pairs:
            if token < size:
                data[token] = _bytes_of(word, letters)
        names = {}
        for added in tokenizer.get("added_tokens") or ():
            token = added["id"]
            if token < size:
                data[token] = b"" if added.get("special") else added["content"].encode()
                if added.get("special"):
                    names[token] = added["content"]
        return cls(data, names)

    def packed(self) -> bytes:
        """The bytes of all tokens, their lengths in front: little-endian numbers of 32 bits."""
        return array("i", map(len, self.bytes)).tobytes() + b"".join(self.bytes)

    @classmethod
    def unpacked(cls, raw: bytes, size: int, names: Mapping[int, str]) -> Self:
        """From what ``packed`` gave, somewhere else. Raises ``ValueError`` where it is nothing of the kind."""
        lengths = array("i")
        lengths.frombytes(raw[: 4 * size])
        ends = list(accumulate(lengths, initial=4 * size))
        if len(lengths) != size or min(lengths) < 0 or ends[-1] != len(raw) or not all(0 <= t < size for t in names):
            raise ValueError("no packed vocabulary")
        return cls([raw[start:end] for start, end in pairwise(ends)], names)

    @property
    def size(self) -> int:
        return len(self.bytes)

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.bytes[token] for token in tokens).decode("utf-8", "replace")

    def name(self, token: int) -> tuple[str, bytes]:
        """A token as a list of alternatives shows it: special ones by their names."""
        raw = self.bytes[token]
        if token in self.special:
            raw = self.names[token].encode()
        return raw.decode("utf-8", "replace"), raw


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, Mapping):
        return False
    return decoder.get("type") == "ByteLevel" or any(_is_byte_level(one) for one in decoder.get("decoders") or ())


def _bytes_of(word: str, letters: Mapping[str, int] | None) -> bytes:
    if letters is not None:
        try:
            return bytes([letters[letter] for letter in word])
        except KeyError:
            return word.encode()
    found = _BYTE_TOKEN.fullmatch(word)
    if found is not None:
        return bytes([int(found[1], 16)])
    return word.replace(_WORD_MARK, " ").encode("utf-8", "replace")


class Writer:
    """Makes the text of one answer out of its tokens.

    Args:
        stops: strings at which the answer ends.
    Attributes:
        stopped: a stop string came: there is no more text.
    """

    __slots__ = ("_decoder", "_held", "_longest", "_stops", "_vocabulary", "stopped")

    def __init__(self, vocabulary: Vocabulary, stops: Collection[str]) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now that ``token`` came; whole characters."""
        text = self._decoder.decode(self._vocabulary.bytes[token])
        return self._filter(text) if self._stops else text

    def finish(self) -> str:
        """What was kept back, now that no more tokens come."""
        if self.stopped:
            return ""
        text = self._decoder.decode(b"", True)
        if self._stops:
            text = self._filter(text)
            if not self.stopped:
                text, self._held = text + self._held, ""
        return text

    def _filter(self, text: str) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        if not held:
            return ""
        ends = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return held[: min(ends)]
        keep = 0
        for length in range(min(self._longest - 1, len(held)), 0, -1):
            tail = held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                keep = length
                break
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]
