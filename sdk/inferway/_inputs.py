"""What people hold (arrays, data frames, tensors, images, lists, text) to the arrays that a model takes.

Nothing is imported to find out what an object is: an object of pandas, polars, torch or PIL can only be there when its
module is in ``sys.modules`` already. Three rules decide everything:

1. *Names.* A mapping names its inputs. A data frame names them by its columns where the columns are inputs, else it is
   the one 2-D input of the model. Rows as a list of mappings are turned into columns. Anything else is the model's only
   (or only required) input.
2. *Shapes.* An array is taken as it is where its shape fits. Missing axes of length one are added where that can mean
   only one thing: a single row without its batch axis, one value per row for ``[-1, 1]``, a scalar. Nothing is
   transposed, resized, broadcast or flattened, except that an image is laid out as the model's channel axis wants it.
3. *Datatypes.* Values are cast as `_tensors.cast_to` says: never to a different number, a wrapped one or an infinity.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

import numpy as np

from ._errors import ConfigurationError, InvalidInputError
from ._signature import ModelMetadata, TensorSpec
from ._tensors import Array, cast_to, datatype_of, quoted_names, shape_text

Prepared: TypeAlias = list[tuple[TensorSpec, Array]]

_CHANNEL_MODES: Final = {1: "L", 3: "RGB", 4: "RGBA"}
_LOSSLESS_MODES: Final = {("1", "L"), ("1", "RGB"), ("1", "RGBA"), ("L", "RGB"), ("L", "RGBA"), ("RGB", "RGBA"),
                          ("P", "RGB"), ("P", "RGBA")}  # fmt: skip


def fit(model: ModelMetadata, inputs: object) -> Prepared:
    """Hold a caller's inputs against a model's signature.

    Args:
        model: the signature. One without inputs, from a server that does not tell them, lets every name pass; arrays
            then keep their own dtype and shape.
        inputs: any of the kinds that this module's docstring names.
    Returns:
        Each given input's spec with a C-contiguous array of its wire dtype and of a shape that fits.
    Raises:
        InvalidInputError: a name is unknown or missing, or a shape, datatype or value does not fit. The message says
            what was expected and what came.
    """
    named = cast(Mapping[object, object], inputs) if type(inputs) is dict else _name_inputs(model, inputs)
    by_name = model.by_name
    prepared: Prepared = []
    for name, value in named.items():
        spec = by_name.get(name)  # type: ignore[call-overload]  # a key that is no text is simply not there
        if spec is None:
            if by_name or type(name) is not str:
                raise InvalidInputError(
                    f"'{name}' is no input of {model.name}, expected {quoted_names(model.by_name)}", tensor=str(name)
                )
            prepared.append(_unchecked(name, value))
        elif (
            type(value) is np.ndarray
            and (value.dtype is spec.carrier or value.dtype == spec.carrier)
            and spec.datatype != "BYTES"
            and _fits(value.shape, spec.shape)
            and value.flags.c_contiguous
        ):
            prepared.append((spec, value))
        else:
            prepared.append((spec, to_array(value, spec)))
    if len(prepared) < len(model.inputs):
        missing = [name for name in model.required if name not in named]
        if missing:
            raise InvalidInputError(
                f"{model.name} expects the inputs {quoted_names(model.by_name)}, missing {quoted_names(missing)}",
                tensor=missing[0],
            )
    return prepared


def to_array(value: object, spec: TensorSpec) -> Array:
    """One value as the array of one input, see `fit`."""
    where = f"input '{spec.name}'"
    try:
        array = _shaped(_as_array(value, spec, where), spec, where)
        return cast_to(array, spec.datatype, where)
    except InvalidInputError as error:
        error.tensor = spec.name
        raise


def _unchecked(name: str, value: object) -> tuple[TensorSpec, Array]:
    where = f"input '{name}'"
    array = _as_array(value, None, where)
    datatype = datatype_of(array)
    return TensorSpec(name, datatype, array.shape), cast_to(array, datatype, where)


# --- names -------------------------------------------------------------------------------------------------------


def _name_inputs(model: ModelMetadata, inputs: object) -> Mapping[object, object]:
    anything: Any = inputs
    if isinstance(inputs, Mapping):
        return dict(cast(Mapping[object, object], inputs))
    if _is_frame(inputs):
        frame: Any = inputs
        columns = [str(column) for column in frame.columns]
        if all(column in model.by_name for column in columns) and all(name in columns for name in model.required):
            return {str(column): frame[column] for column in frame.columns}
        only = _only_input(model)
        if only is None:
            raise InvalidInputError(
                f"{model.name} expects the inputs {quoted_names(model.by_name)}, got a data frame with the columns "
                f"{quoted_names(columns)}"
            )
        return {only: inputs}
    if isinstance(inputs, list):
        rows = cast(list[object], inputs)
        if rows and isinstance(rows[0], Mapping):
            return _columns(rows)
    only = _only_input(model)
    if only is None:
        raise InvalidInputError(
            f"{model.name} takes {len(model.inputs)} inputs: expected a mapping of {quoted_names(model.by_name)} to "
            f"values, got {type(anything).__name__}"
        )
    return {only: anything}


def _only_input(model: ModelMetadata) -> str | None:
    if len(model.required) == 1:
        return model.required[0]
    return model.inputs[0].name if len(model.inputs) == 1 else None


def _columns(rows: list[object]) -> Mapping[object, object]:
    first = cast(Mapping[object, object], rows[0])
    columns: dict[object, list[object]] = {name: [] for name in first}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or row.keys() != columns.keys():
            raise InvalidInputError(
                f"row {index} has other names than row 0, expected {quoted_names(list(map(str, first)))}"
            )
        for name, value in cast(Mapping[object, object], row).items():
            columns[name].append(value)
    return cast(Mapping[object, object], columns)


# --- kinds of objects --------------------------------------------------------------------------------------------


def _is_a(value: object, module: str, *names: str) -> bool:
    """Whether a value is of a class of a module that may not be installed; the module is never imported here."""
    loaded = sys.modules.get(module)
    if loaded is None:
        return False
    classes = (getattr(loaded, name, None) for name in names)
    return any(isinstance(found, type) and isinstance(value, found) for found in classes)


def _is_frame(value: object) -> bool:
    return _is_a(value, "pandas", "DataFrame") or _is_a(value, "polars", "DataFrame")


def _is_foreign(value: object) -> bool:
    """Whether a list's element is an array of some library, so that the list is a stack of them."""
    return isinstance(value, np.ndarray) or _is_a(value, "torch", "Tensor") or _is_image(value) or _is_series(value)


def _is_image(value: object) -> bool:
    return _is_a(value, "PIL.Image", "Image")


def _is_series(value: object) -> bool:
    return _is_a(value, "pandas", "Series", "Index") or _is_a(value, "polars", "Series")


def _as_array(value: object, spec: TensorSpec | None, where: str) -> Array:
    anything: Any = value
    if isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(anything):
            raise InvalidInputError(f"{where} has masked elements; fill them first")
        return np.asarray(anything)
    if isinstance(value, str | bytes | bytearray | memoryview):
        # An object array, because numpy's own text dtypes drop NUL characters at the end.
        scalar: Array = np.empty((), object)
        scalar[()] = anything if isinstance(value, str) else bytes(anything)
        return scalar
    if isinstance(value, list | tuple):
        return _of_sequence(cast(Sequence[object], value), spec, where)
    if isinstance(value, bool | int | float | complex | np.generic):
        return np.asarray(anything)
    if _is_image(value):
        return _of_image(value, spec, where)
    if _is_a(value, "torch", "Tensor"):
        return _of_torch(value, spec)
    if _is_frame(value) or _is_series(value):
        return _of_frame(value, where)
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        return np.asarray(anything)
    if hasattr(value, "__dlpack__"):
        return np.from_dlpack(anything)
    wanted = f"{spec.datatype} {shape_text(spec.shape)}" if spec is not None else "an array"
    raise InvalidInputError(
        f"{where} expects {wanted}, got {type(value).__name__}, which is no array of any known kind"
    )


def _of_sequence(value: Sequence[object], spec: TensorSpec | None, where: str) -> Array:
    if not value:
        return np.empty(0, object if spec is not None and spec.datatype == "BYTES" else np.float64)
    try:
        if _is_foreign(value[0]):
            return np.stack([_as_array(item, _row_of(spec), where) for item in value])
        probe = value
        while isinstance(probe, list | tuple) and probe:
            probe = cast(Sequence[object], probe[0])
        if isinstance(probe, str | bytes):
            return np.array(value, dtype=object)
        if _is_foreign(probe):
            return np.stack([_as_array(item, None, where) for item in value])
        found = np.array(value)
        if found.dtype.kind == "f" and spec is not None and spec.datatype == "UINT64":
            # numpy has no integer for 0 and 2**64 - 1 in one list and takes floating point, which has neither.
            numbers = np.array(value, dtype=object)
            if all(isinstance(number, int | np.integer) for number in numbers.flat):
                return numbers.astype(np.uint64)
        return found
    except InvalidInputError:
        raise
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidInputError(f"{where} got nested values of unequal length or kind, which make no array") from error


def _row_of(spec: TensorSpec | None) -> TensorSpec | None:
    """The spec of one item of a stack: the same without its first axis."""
    if spec is None or not spec.shape:
        return None
    return TensorSpec(spec.name, spec.datatype, spec.shape[1:])


def _of_frame(value: Any, where: str) -> Array:
    """pandas and polars. A polars null has no numpy form except as another value, so it is refused."""
    if _is_a(value, "polars", "DataFrame", "Series"):
        nulls = value.null_count()
        if (nulls if isinstance(nulls, int) else sum(nulls.row(0))) > 0:
            raise InvalidInputError(f"{where} has nulls; fill or drop them first")
    array = np.asarray(value.to_numpy())
    if array.dtype.kind == "O" and array.size and isinstance(array.flat[0], np.ndarray | list):
        return np.stack([np.asarray(item) for item in array])
    return array


def _of_torch(value: Any, spec: TensorSpec | None) -> Array:
    torch = sys.modules["torch"]
    tensor = value.to_dense() if value.layout is not torch.strided else value
    if tensor.dtype is torch.bfloat16:
        # numpy has no bfloat16: its bits for a model that takes them, else float32, which holds them exactly.
        if spec is not None and spec.datatype == "BF16":
            return np.asarray(tensor.view(torch.int16).numpy(force=True)).view(np.uint16)
        tensor = tensor.float()
    return np.asarray(tensor.numpy(force=True))


def _of_image(value: Any, spec: TensorSpec | None, where: str) -> Array:
    """An image as ``(H, W)`` or ``(H, W, C)``, or ``(C, H, W)`` where the model's channel axis comes first.

    Samples keep their values (0 to 255 for 8 bits): scaling is the model's business or the caller's.
    """
    shape = spec.shape if spec is not None else ()
    channels, first = _channel_axis(shape, (value.height, value.width))
    image = value
    if channels is not None and image.mode not in ("I", "F", "I;16"):
        mode = _CHANNEL_MODES.get(channels, "L")
        transparent = image.mode == "P" and "transparency" in image.info and mode != "RGBA"
        if image.mode != mode:
            if (image.mode, mode) not in _LOSSLESS_MODES or transparent:
                raise InvalidInputError(
                    f"{where} expects an image of mode {mode}, got {image.mode}; convert it yourself, for example with "
                    f"image.convert({mode!r})"
                )
            image = image.convert(mode)
    array = np.asarray(image)
    if array.ndim == 2 and channels:
        array = array[..., None]
    return np.moveaxis(array, -1, 0) if first and array.ndim == 3 else array


def _channel_axis(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[int | None, bool]:
    """How many channels a model wants, and whether their axis comes before height and width.

    Three may be a number of channels and a height: the layout that fits the image's size is taken, else the last axis.
    No channels for a matrix, None where the model leaves it open.
    """
    if len(shape) < 3:
        return (0 if len(shape) == 2 else None), False
    last = shape[-1] in _CHANNEL_MODES
    first = shape[-3] in _CHANNEL_MODES
    if first and (not last or (_fits(size, shape[-2:]) and not _fits(size, shape[-3:-1]))):
        return shape[-3], True
    return (shape[-1] if last else None), False


def as_column(value: object, where: str) -> list[Any]:
    """Many values as a list: an array, a column or a frame of one column of pandas or polars, or any iterable.

    Raises:
        InvalidInputError: there is more than one column, or nulls.
    """
    if _is_frame(value) or _is_series(value):
        value = _of_frame(value, where)
    if isinstance(value, np.ndarray):
        array = cast(Array, value)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim > 1:
            raise InvalidInputError(f"{where} expects one column, got shape {shape_text(array.shape)}")
        return cast(list[Any], np.atleast_1d(array).tolist())
    return list(cast(Iterable[Any], value))


# --- shapes ------------------------------------------------------------------------------------------------------


def _fits(got: tuple[int, ...], want: tuple[int, ...]) -> bool:
    if len(got) != len(want):
        return False
    for have, wanted in zip(got, want, strict=True):  # noqa: SIM110 - three times faster than any() over a generator
        if have != wanted and wanted != -1:
            return False
    return True


def _shaped(array: Array, spec: TensorSpec, where: str) -> Array:
    got, want = array.shape, spec.shape
    if _fits(got, want):
        return array
    if len(got) + 1 == len(want):
        if want[0] in (-1, 1) and _fits(got, want[1:]):
            return array[None]
        if want[-1] == 1 and _fits(got, want[:-1]):
            return array[..., None]
    if not got and all(dim in (-1, 1) for dim in want):
        return array.reshape((1,) * len(want))
    # [] is float64 (0,) wherever it stands for an empty batch.
    if got == (0,) and want and want[0] == -1:
        return array.reshape((0, *(0 if dim == -1 else dim for dim in want[1:])))
    raise InvalidInputError(f"{where} expects shape {shape_text(want)}, {spec.datatype}, got shape {shape_text(got)}")


# --- many inputs -------------------------------------------------------------------------------------------------


def items_of(items: object, batch_size: int | None) -> Iterator[Any]:
    """The inputs of many calls: the items of an iterable, or the slices of one array, frame, column or tensor.

    Raises:
        ConfigurationError: ``items`` is no iterable of inputs, or ``batch_size`` does not go with it.
    """
    whole: Any = items
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ConfigurationError(f"batch_size expects a whole number of at least 1, got {batch_size!r}")
    if (_is_foreign(items) and not _is_image(items)) or _is_frame(items):
        # pandas slices by position only through iloc.
        rows: Any = whole.iloc if _is_a(whole, "pandas", "DataFrame", "Series") else whole
        step = batch_size or 1
        return (rows[start : start + step] for start in range(0, len(whole), step))
    if batch_size is not None:
        raise ConfigurationError("batch_size is for items that are one array, data frame, column or tensor")
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise ConfigurationError(f"items expects an iterable of inputs, got {type(whole).__name__}")
    return iter(whole)
