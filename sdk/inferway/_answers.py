"""Answers of the control routes as the contract's pydantic models. Imports pydantic, so it is imported at first use.

A client may be older than its gateway. Members that it does not know are kept by the contract's `Answer` models; here
their closed sets (an error code, a scope, a state), patterns and bounds are lifted as well, so that a new value passes
as what it is. What stays is what code relies on: required members are there, and a text is a text.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, create_model
from pydantic_core import PydanticUndefined

from inferway_contract import models

from ._errors import MalformedAnswer

M = TypeVar("M", bound=BaseModel)


@cache
def lenient(model: type[M]) -> type[M]:
    """A subclass of a contract model without its closed sets, patterns and bounds."""
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        default = {} if info.default is PydanticUndefined else {"default": info.default}
        fields[name] = (_loose(info.annotation), Field(repr=info.repr, **default))
    return create_model(model.__name__, __base__=model, __module__=model.__module__, **fields)


def _loose(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        found: Any = lenient(annotation)
        return found
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _loose(arguments[0])
    if origin is Literal:
        kinds: set[Any] = {type(argument) for argument in arguments}
        return kinds.pop() if len(kinds) == 1 else Any
    if origin in (Union, types.UnionType):
        return Union[tuple(_loose(argument) for argument in arguments)]  # noqa: UP007 - built from a list
    if origin is not None and arguments:
        generic: Any = origin
        return generic[tuple(_loose(argument) for argument in arguments)]
    return cast(Any, annotation)


@cache
def _adapter(name: str, many: bool) -> TypeAdapter[Any]:
    model = lenient(cast(type[BaseModel], getattr(models, name)))
    return TypeAdapter(list[model] if many else model)  # type: ignore[valid-type]  # a class made at run time


def read_as(name: str, value: object, *, many: bool = False) -> Any:
    """Decoded JSON as the contract's model of that name, or as a list of them.

    Raises:
        MalformedAnswer: a required member is missing or has the wrong type; the message names it and holds no value.
    """
    try:
        return _adapter(name, many).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise MalformedAnswer(f"{place} is not as the contract's {name} has it: {first['msg']}") from None
