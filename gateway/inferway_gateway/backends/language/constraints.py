"""Answers that have to be sentences of a language: JSON, a regular expression, a Lark grammar, or one of some choices.

A grammar is a program that a caller sends, so its size is bounded before it is looked at, and the work that it may
cause at each token is bounded by llguidance, in units that are about the same time on every machine.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...core.errors import UnsupportedOperationError
from ...core.generation import Constraint, ConstraintKind, GenerationParameterError

MAX_TEXT_BYTES: Final = 64 * 1024
MAX_CHOICES: Final = 1000
PARAMS: Final[dict[ConstraintKind, str]] = {
    "json_object": "response_format",
    "json_schema": "response_format",
    "regex": "guided_regex",
    "lark": "guided_grammar",
    "choice": "guided_choice",
}
"""What a caller calls it."""
_MAX_LOOKS: Final = 10_000
_JSON: Final = {"whitespace_pattern": r"[\x20\x0A\x09]{0,16}"}
"""White space without end is JSON too, and a model that is not allowed what it wants to say likes to write it."""
_DEPTH: Final = 64
"""Of a schema: deeper ones take a recursive compiler's stack."""


class Grammars:
    """Compiles constraints for one tokenizer. Safe to use from any thread.

    Args:
        tokenizer: the content of ``tokenizer.json``.
        ends: tokens that end an answer.
        size: of the model's logits.
    """

    def __init__(self, tokenizer: str, ends: Sequence[int], size: int) -> None:
        self._text = tokenizer
        self._ends = list(ends)
        self._size = size
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._limits: Any = None

    def prepare(self) -> None:
        """Read the tokenizer. Holds the interpreter's lock for 0.2 s with 49,152 tokens and 0.9 s with 250,000, and so
        everything else in the process: it is done when a model is loaded, not when the first caller asks for JSON."""
        with suppress(UnsupportedOperationError), self._lock:
            self._read()

    def _read(self) -> None:
        """Raises ``UnsupportedOperationError``."""
        if self._tokenizer is not None:
            return
        library = _library()
        try:
            self._tokenizer = library.LLTokenizer(self._text, n_vocab=self._size, eos_token=self._ends)
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise UnsupportedOperationError(
                f"the model's tokenizer cannot hold answers to a grammar: {_first_line(error)}"
            ) from None
        # About half of what the library allows by itself: 10 ms of building a lexer, 7 ms a token.
        self._limits = library.LLParserLimits(
            initial_lexer_fuel=500_000,
            step_lexer_fuel=100_000,
            step_max_items=20_000,
            max_lexer_states=20_000,
            max_grammar_size=100_000,
            verbose_errors=False,
        )

    def compile(self, constraint: Constraint) -> Matcher:
        """Takes some milliseconds after ``prepare``.

        Raises:
            GenerationParameterError: it cannot be read, is too large, or no answer can meet it.
            UnsupportedOperationError: no grammar can be used with this model, or in this gateway.
        """
        param = PARAMS[constraint.kind]
        if len(constraint.text.encode()) > MAX_TEXT_BYTES:
            raise GenerationParameterError(f"a grammar may have at most {MAX_TEXT_BYTES} bytes", param)
        library = _library()
        with self._lock:
            self._read()
        try:
            grammar = _grammar(constraint)
        except GenerationParameterError as error:
            raise GenerationParameterError(error.message, param) from None
        except (ValueError, TypeError, RecursionError) as error:
            raise GenerationParameterError(f"the grammar cannot be read: {_first_line(error)}", param) from None
        matcher = library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GenerationParameterError(f"the grammar cannot be used: {_first_line(matcher.get_error())}", param)
        found = Matcher(matcher, self._size, self._ends, param)
        if not found.possible():
            raise GenerationParameterError("no answer can meet the grammar", param)
        return found


def _library() -> Any:
    """llguidance, which a gateway may lack: it is imported when it is first needed."""
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise UnsupportedOperationError(
            "this gateway cannot hold answers to a grammar: it lacks the package llguidance"
        ) from None


class Matcher:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: Any, size: int, ends: Collection[int], param: str) -> None:
        self._param = param
        self._matcher = matcher
        self._numpy = importlib.import_module("llguidance.numpy")
        self._mask = self._numpy.allocate_token_bitmask(1, size)
        self._size = size
        self._ends = ends

    def possible(self) -> bool:
        """Whether any token may come next. Also what finds out that the first step takes too much work."""
        self._numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        return not self._matcher.is_error() and bool(self._mask.any())

    def apply(self, row: NDArray[np.float32]) -> None:
        """Take out of ``row`` what must not come next.

        Raises:
            GenerationParameterError: the grammar takes too much work.
        """
        self._numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        if self._matcher.is_error():
            raise self._gave_up()
        self._numpy.apply_token_bitmask_inplace(row[None], self._mask)

    def accept(self, token: int) -> bool:
        """Take the next token in; True where the sentence is at its end."""
        if token in self._ends:
            return True
        if not self._matcher.consume_token(token):
            raise self._gave_up()
        return bool(self._matcher.is_stopped())

    def _gave_up(self) -> GenerationParameterError:
        return GenerationParameterError(
            f"the grammar cannot be followed any further: {_first_line(self._matcher.get_error())}", self._param
        )


def _grammar(constraint: Constraint) -> str:
    matcher = _library().LLMatcher
    kind, text = constraint.kind, constraint.text
    if kind == "json_object":
        return str(matcher.grammar_from_json_schema('{"type":"object"}', overrides=_JSON))
    if kind == "json_schema":
        schema = json.loads(text)
        if not isinstance(schema, dict | bool):
            raise GenerationParameterError("expected a JSON schema: an object")
        if _depth(schema) > _DEPTH:
            raise GenerationParameterError(f"a JSON schema may be at most {_DEPTH} levels deep")
        if not _has_end(schema, schema, (), [_MAX_LOOKS]):
            raise GenerationParameterError("the JSON schema asks for a value without end: it requires itself")
        return str(matcher.grammar_from_json_schema(text, overrides=_JSON))
    if kind == "regex":
        return str(matcher.grammar_from_regex(text))
    if kind == "lark":
        return str(matcher.grammar_from_lark(text))
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise GenerationParameterError("expected a list of choices, each a text")
    if len(choices) > MAX_CHOICES:
        raise GenerationParameterError(f"expected at most {MAX_CHOICES} choices, got {len(choices)}")
    return str(matcher.grammar_from_lark("start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in choices)))


def _has_end(schema: Any, root: Any, inside: tuple[str, ...], looks: list[int]) -> bool:
    """Whether a finite value can meet the schema, as far as its references are concerned: one that needs itself has
    none. What is not understood is taken for finite; the compiler knows better."""
    looks[0] -= 1
    if looks[0] < 0:
        raise GenerationParameterError("the JSON schema refers to itself in too many ways")
    if not isinstance(schema, dict):
        return True

    def ends(inner: Any) -> bool:
        return _has_end(inner, root, inside, looks)

    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in inside:
            return False
        if not _has_end(_resolve(root, reference), root, (*inside, reference), looks):
            return False
    properties, required = schema.get("properties"), schema.get("required")
    if not (isinstance(properties, dict) and isinstance(required, list)):
        properties, required = {}, []
    kind = schema.get("type")
    needed = [properties.get(name) for name in required if isinstance(name, str)]
    if kind in (None, "object") and not all(ends(one) for one in needed):
        return False
    least = schema.get("minItems", 0)
    if kind in (None, "array") and isinstance(least, int) and least > 0 and not ends(schema.get("items")):
        return False
    every, some = schema.get("allOf"), [schema.get("anyOf"), schema.get("oneOf")]
    if isinstance(every, list) and not all(ends(one) for one in every):
        return False
    return all(any(ends(one) for one in choice) for choice in some if isinstance(choice, list) and choice)


def _resolve(root: Any, reference: str) -> Any:
    """What a reference inside of the schema means; None for others, which the compiler refuses."""
    if not reference.startswith("#"):
        return None
    found = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(name)
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return depth


def _first_line(text: object) -> str:
    return str(text).strip().partition("\n")[0][:300]
