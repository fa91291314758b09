"""``tokenizer.json``, the file of the ``tokenizers`` library, as something that runs inside the gateway.

It may come from whoever may deploy, so it is looked at before the library sees it. What a hostile one could do:

- Make text grow: a normalizer that replaces one letter by a page, or doubles it thirty times, fills the memory with one
  request, and the library ends the process when there is none left. The growth of all steps together is bounded, and so
  is what a precompiled table of characters may put in the place of one.
- Take for ever: nested repetitions in a regular expression (``(a+)+b``), or words of unbounded length, which WordPiece
  reads in quadratic time. Repeated groups, more than three open repetitions in one branch, and words beyond 1,000
  characters are refused. What is left costs the model's own thread and nobody else's.
- Be huge: bytes, vocabulary, merges, added tokens and the steps of each stage are bounded. Reading a file holds the
  interpreter's lock, and with it every request, for as long as that takes: this is why the bounds are not wider.
- Pad or cut on its own, or put thousands of tokens around each text: the parts that do that are not taken over, and the
  special tokens around a text are learnt once and put there by us.
- Break the library: it is Rust and panics where it is wrong. A panic is an error like any other here.

Only what was checked reaches the library: it gets the document as we read it, written anew. There is no way from a
tokenizer to a file or a socket; ids outside of the graph's vocabulary end in an error of the graph.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import orjson

from ...core.encoding import Template
from ...core.errors import ModelExecutionError

MAX_BYTES: Final = 64 * 1024 * 1024
MAX_VOCABULARY: Final = 300_000
"""The largest in use have some 262,000. The library reads a file without giving the interpreter's lock back: so many
tokens were measured to hold everything else up for 0.4 to 0.8 s, once, when the version is loaded (23 November
2026, two busy processors)."""
MAX_TOKEN_CHARACTERS: Final = 1_000
MAX_ADDED_TOKENS: Final = 100_000
MAX_STEPS: Final = 32
MAX_GROWTH: Final = 16
MAX_PATTERN_CHARACTERS: Final = 2_000
_MAX_OPEN_REPETITIONS: Final = 3
_MAX_MAPPED_BYTES: Final = 64
"""In the place of one character; the longest of Unicode's own (U+FDFA) is 33."""
_MAX_SPECIAL: Final = 64

_MODELS: Final = frozenset({"WordPiece", "BPE", "Unigram", "WordLevel"})
_NORMALIZERS: Final = frozenset(
    {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Replace",
     "Sequence", "Strip", "StripAccents", "ByteLevel"}
)  # fmt: skip
_PRE_TOKENIZERS: Final = frozenset(
    {"BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Sequence", "Split",
     "UnicodeScripts", "Whitespace", "WhitespaceSplit"}
)  # fmt: skip
_POST_PROCESSORS: Final = frozenset(
    {"BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"}
)
_PROBES: Final = ("a", "the", "0", "hello", "。")

MISSING: Final = "this gateway lacks the library 'tokenizers': pip install 'inferway[language]'"


class TokenizerError(Exception):
    """The file is no tokenizer that the gateway takes; the message says why, without a path."""


class LoadedTokenizer:
    """``TextTokenizer`` of ``core/encoding.py`` over the library's.

    Args:
        content: of ``tokenizer.json``.
    Raises:
        TokenizerError: it is refused, or the library is missing.
    """

    def __init__(self, content: bytes) -> None:
        try:
            from tokenizers import Tokenizer  # not a cycle: an optional library, missed only where it is needed
        except ImportError:
            raise TokenizerError(MISSING) from None
        document = checked_document(content)
        try:
            self._tokenizer = Tokenizer.from_str(orjson.dumps(document).decode())
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            self.vocabulary: Final = _vocabulary(document)
            self.single, self.pair = self._templates()
        except TokenizerError:
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise TokenizerError(f"tokenizer.json cannot be used: {str(error)[:200]}") from None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        # Of the library's ways to encode, only those for several texts give the interpreter's lock back.
        try:
            return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ModelExecutionError("the model's tokenizer failed on a text of this request") from None

    def _templates(self) -> tuple[Template, Template | None]:
        """What stands around a text, and around two: found by looking where two short ones end up."""
        known: list[tuple[str, list[int]]] = []
        for probe in _PROBES:
            with suppress(ModelExecutionError):  # a tokenizer need not know every text
                known += [(probe, ids) for ids in self.encode([probe]) if ids]
        if not known:
            raise TokenizerError("tokenizer.json gives no tokens for any text that was tried")
        first, ids = known[0]
        whole = self._encodings([first], special=True)[0]
        at = _find(whole.ids, ids)
        if at is None:
            raise TokenizerError("tokenizer.json changes the tokens of a text when it puts special ones around them")
        end = at + len(ids)
        kinds = [_uniform(whole.type_ids[part]) for part in (slice(at), slice(at, end), slice(end, None))]
        if None in kinds or at + len(whole.ids) - end > _MAX_SPECIAL:
            raise TokenizerError("tokenizer.json puts special tokens around a text in a way that is not supported")
        before, own, after = (kind or 0 for kind in kinds)
        single = Template(tuple(whole.ids[:at]), (), tuple(whole.ids[end:]), (before, own, 0, 0, after))
        second, other = known[-1]
        return single, self._pair((first, second), ids, other)

    def _pair(self, texts: tuple[str, str], first: list[int], second: list[int]) -> Template | None:
        whole = self._encodings([texts], special=True)[0]
        at = _find(whole.ids, first)
        if at is None:
            return None
        middle = at + len(first)
        found = _find(whole.ids[middle:], second)
        if found is None:
            return None
        start, end = middle + found, middle + found + len(second)
        places = (slice(at), slice(at, middle), slice(middle, start), slice(start, end), slice(end, None))
        kinds = [_uniform(whole.type_ids[place]) for place in places]
        if None in kinds or len(whole.ids) - len(first) - len(second) > _MAX_SPECIAL:
            return None
        a, b, c, d, e = (kind or 0 for kind in kinds)
        return Template(tuple(whole.ids[:at]), tuple(whole.ids[middle:start]), tuple(whole.ids[end:]), (a, b, c, d, e))

    def _encodings(self, texts: Sequence[Any], *, special: bool) -> list[Any]:
        found: list[Any] = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
        return found


class MarkingTokenizer:
    """The tokenizer of a language model, in which names of special tokens become those tokens where that is wanted.

    Args:
        content: of ``tokenizer.json``, as it is: what its parts may cost is not looked at.
    Raises:
        TokenizerError: it cannot be used, or the library is missing.
    """

    def __init__(self, content: bytes) -> None:
        try:
            from tokenizers import Tokenizer  # not a cycle: an optional library, missed only where it is needed
        except ImportError:
            raise TokenizerError("language models need the package tokenizers: install 'inferway[language]'") from None
        try:
            text = content.decode()
            self._marking, self._plain = Tokenizer.from_str(text), Tokenizer.from_str(text)
            for tokenizer in (self._marking, self._plain):
                tokenizer.no_truncation()
                tokenizer.no_padding()
            self._plain.encode_special_tokens = True
            self.begin: Final[tuple[int, ...]] = _beginning(self._marking)
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise TokenizerError(f"tokenizer.json cannot be used: {str(error)[:300]}") from None

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Token ids of each text, without those that belong in front or at the end. Blocks.

        Raises:
            ModelExecutionError: the library fails on a text.
        """
        tokenizer = self._marking if special else self._plain
        # Of the library's ways to encode, only those for several texts give the interpreter's lock back.
        try:
            return [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ModelExecutionError("the model's tokenizer failed on a text of this request") from None


def _beginning(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts in front of a text."""
    bare, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return tuple(whole[: max(len(whole) - len(bare), 0)]) if whole[len(whole) - len(bare) :] == bare else ()


def load_tokenizer(path: Path) -> LoadedTokenizer:
    """Read, check and open ``tokenizer.json``. Blocks. Raises ``TokenizerError``."""
    return LoadedTokenizer(read_limited(path, MAX_BYTES))


def read_limited(path: Path, limit: int) -> bytes:
    """A file's content. Raises ``TokenizerError``: it cannot be read, or is longer."""
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise TokenizerError(f"{path.name} cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise TokenizerError(f"{path.name} is longer than {limit} bytes")
    return content


def checked_document(content: bytes) -> dict[str, Any]:
    """The document, without the parts that we do ourselves or do not need.

    Raises:
        TokenizerError: names the rule that it breaks.
    """
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise TokenizerError(f"tokenizer.json is not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise TokenizerError("tokenizer.json has no 'model'")
    document = {**document, "padding": None, "truncation": None, "decoder": None}
    _check_model(document["model"])
    growth = 1.0
    for step in _steps(document.get("normalizer"), "normalizers", _NORMALIZERS, "normalizer"):
        growth *= _check_step(step)
        if growth > MAX_GROWTH:
            raise TokenizerError(f"the normalizers may make a text more than {MAX_GROWTH} times as long")
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers", _PRE_TOKENIZERS, "pre-tokenizer"):
        _check_step(step)
    for step in _steps(document.get("post_processor"), "processors", _POST_PROCESSORS, "post-processor"):
        for members in (step.get("single") or (), step.get("pair") or (), step.get("special_tokens") or ()):
            if len(members) > _MAX_SPECIAL:
                raise TokenizerError(f"a template has more than {_MAX_SPECIAL} parts")
        for token in (step.get("special_tokens") or {}).values():
            if len(token.get("ids") or ()) > _MAX_SPECIAL:
                raise TokenizerError(f"a special token of a template has more than {_MAX_SPECIAL} ids")
    added = document.get("added_tokens") or []
    if len(added) > MAX_ADDED_TOKENS:
        raise TokenizerError(f"more than {MAX_ADDED_TOKENS} added tokens")
    for token in added:
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str) or not 0 < len(text) <= MAX_TOKEN_CHARACTERS:
            raise TokenizerError(f"an added token is not of 1 to {MAX_TOKEN_CHARACTERS} characters")
    return document


def _check_model(model: Mapping[str, Any]) -> None:
    kind = model.get("type")
    if kind not in _MODELS:
        raise TokenizerError(f"expected a model of type {', '.join(sorted(_MODELS))}, got {str(kind)[:40]!r}")
    vocabulary = model.get("vocab")
    tokens = list(vocabulary) if isinstance(vocabulary, dict) else [_first(entry) for entry in vocabulary or ()]
    if not tokens or len(tokens) > MAX_VOCABULARY:
        raise TokenizerError(f"expected a vocabulary of 1 to {MAX_VOCABULARY} tokens, got {len(tokens)}")
    if max(len(str(token)) for token in tokens) > MAX_TOKEN_CHARACTERS:
        raise TokenizerError(f"a token has more than {MAX_TOKEN_CHARACTERS} characters")
    if len(model.get("merges") or ()) > 2 * MAX_VOCABULARY:
        raise TokenizerError(f"more than {2 * MAX_VOCABULARY} merges")
    longest = model.get("max_input_chars_per_word", 0)
    if not isinstance(longest, int) or longest > MAX_TOKEN_CHARACTERS:
        raise TokenizerError(f"max_input_chars_per_word is more than {MAX_TOKEN_CHARACTERS}")
    if model.get("dropout"):
        raise TokenizerError("dropout makes tokens a matter of chance, expected none")


def _first(entry: Any) -> Any:
    return entry[0] if isinstance(entry, list) and entry else ""


def _steps(
    part: Any, members: str, known: frozenset[str], what: str, budget: list[int] | None = None
) -> Iterator[Mapping[str, Any]]:
    """The steps of one stage, sequences taken apart."""
    budget = [MAX_STEPS] if budget is None else budget
    if part is None:
        return
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in known:
        raise TokenizerError(f"{what} {str(kind)[:40]!r} is not known, expected one of {', '.join(sorted(known))}")
    budget[0] -= 1
    if budget[0] < 0:
        raise TokenizerError(f"more than {MAX_STEPS} steps in the {what}")
    if kind != "Sequence":
        yield part
        return
    for inner in part.get(members) or ():
        yield from _steps(inner, members, known, what, budget)


def _check_step(step: Mapping[str, Any]) -> float:
    """Hold one step against the limits; how many times longer it may make a text."""
    kind = step["type"]
    pattern = step.get("pattern")
    matched = 1
    if isinstance(pattern, str):
        pattern = {"String": pattern}
    if isinstance(pattern, dict):
        regex, text = pattern.get("Regex"), pattern.get("String")
        if regex is not None:
            check_pattern(regex)
        elif not isinstance(text, str) or not 0 < len(text) <= MAX_TOKEN_CHARACTERS:
            raise TokenizerError(f"the pattern of {kind} is not of 1 to {MAX_TOKEN_CHARACTERS} characters")
        else:
            matched = len(text)
    if kind == "Replace":
        return max(1.0, len(str(step.get("content", ""))) / matched)
    if kind == "Prepend" and len(str(step.get("prepend", ""))) > _MAX_SPECIAL:
        raise TokenizerError(f"Prepend puts more than {_MAX_SPECIAL} characters before a text")
    if kind == "Precompiled":
        _check_table(step.get("precompiled_charsmap"))
    return 1.0


def _check_table(encoded: Any) -> None:
    """A table of SentencePiece: the length of its trie, the trie, and what stands for each character, ended by 0."""
    try:
        table = base64.b64decode(encoded or "", validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise TokenizerError("the table of a Precompiled normalizer is not base64") from None
    if not table:
        return
    start = 4 + int.from_bytes(table[:4], "little")
    if len(table) < start or max(map(len, table[start:].split(b"\0"))) > _MAX_MAPPED_BYTES:
        raise TokenizerError(f"the table of a Precompiled normalizer maps to more than {_MAX_MAPPED_BYTES} bytes")


_ATOM: Final = re.compile(
    r"""(?P<escape>\\[pPxu]\{[^}]*\}|\\.)
    |(?P<set>\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\])
    |(?P<open>\(\?[a-z-]*:|\(\?<?[=!]|\(\?>|\()
    |(?P<close>\))
    |(?P<branch>\|)
    |(?P<repeat>[*+?]|\{\d*,?\d*\})
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


def check_pattern(pattern: Any) -> None:
    """Refuse a regular expression whose matching may take more than a polynomial of the third degree.

    A group may be repeated at most once or not at all, so that repetitions do not nest, and one branch has at most
    three of them without an upper bound. The patterns of the well-known tokenizers are like that.

    Raises:
        TokenizerError
    """
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_CHARACTERS:
        raise TokenizerError(f"a regular expression is longer than {MAX_PATTERN_CHARACTERS} characters")
    before = ""
    open_ = [[0, 0]]  # for each open group: the most repetitions of its branches so far, and those of this branch
    for found in _ATOM.finditer(pattern):
        kind, text = str(found.lastgroup), found[0]
        if kind == "open":
            open_.append([0, 0])
        elif kind == "close":
            inner = open_.pop() if len(open_) > 1 else [0, 0]
            open_[-1][1] += max(inner)
        elif kind == "branch":
            open_[-1] = [max(open_[-1]), 0]
        elif kind == "repeat" and before:
            unbounded = text in "*+" or text.endswith(",}")
            if before == "close" and text != "?":
                raise TokenizerError("a regular expression repeats a group, expected repetitions of single characters")
            if before == "repeat" and unbounded and text != "+":
                raise TokenizerError("a regular expression repeats a repetition")
            open_[-1][1] += unbounded and before != "repeat"
        elif kind == "escape" and text[1:2].isdigit():
            raise TokenizerError("a regular expression refers back to a group")
        if open_[-1][1] > _MAX_OPEN_REPETITIONS:
            raise TokenizerError(
                f"a regular expression has more than {_MAX_OPEN_REPETITIONS} open repetitions in one branch"
            )
        before = kind


def _vocabulary(document: Mapping[str, Any]) -> int:
    vocabulary = document["model"]["vocab"]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token.get("id", 0) for token in document.get("added_tokens") or ()]
    highest = max(i for i in ids if isinstance(i, int))
    if not 0 <= highest < 2**31 - 1:
        raise TokenizerError("a token's id is out of range")
    return int(highest) + 1


def _find(ids: Sequence[int], part: Sequence[int]) -> int | None:
    for at in range(len(ids) - len(part) + 1):
        if list(ids[at : at + len(part)]) == list(part):
            return at
    return None


def _uniform(kinds: Sequence[int]) -> int | None:
    """The one number that all of them are; 0 where there is none of them; None where they differ."""
    return (kinds[0] if kinds else 0) if len(set(kinds)) <= 1 else None
