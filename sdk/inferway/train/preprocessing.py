"""scikit-learn transformers before a network: fitted once, applied to whatever it sees, and part of what is served.

Training and serving have to see the same values. So a table is brought into one form first, here and before a call:
numbers and truth values are FP32; in text, what is missing (None, NaN, NA, an empty text) is NaN for scikit-learn and
an empty text for the served graph, because tensors of text know no NaN. For the graph, a copy of the fitted transformer
is told so: ``missing_values`` of its imputers and the category "missing" of its encoders become the empty text. That
the two agree is not assumed but measured, on rows of the training data, whenever a model is exported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .._errors import (
    BuildError,
    ConfigurationError,
    ExportError,
    InvalidInputError,
    MissingExtraError,
    ModelNotBuiltError,
)
from ..build.example import is_frame, to_numpy
from ..build.model import OnnxModel
from .data import ONLY, cut

_PREFIX: Final = "preprocessing_"
_VERIFIED_ROWS: Final = 64
_CLOSE: Final = 1e-4


class Preprocessing:
    """A transformer, or a pipeline of them, before a model.

    Args:
        transformer: of scikit-learn, with ``fit`` and ``transform``. It is cloned: the given one stays as it is.
    Raises:
        ConfigurationError: it has neither.
        MissingExtraError: scikit-learn is not installed.
    """

    def __init__(self, transformer: Any) -> None:
        try:
            from sklearn.base import clone
        except ImportError as error:
            raise MissingExtraError("scikit-learn", "train", "preprocessing") from error
        if isinstance(transformer, type) or not hasattr(transformer, "fit") or not hasattr(transformer, "transform"):
            hint = "; give an object of it" if isinstance(transformer, type) else ""
            kind = transformer.__name__ if isinstance(transformer, type) else type(transformer).__name__
            raise ConfigurationError(
                f"preprocessing expects a transformer of scikit-learn, such as a ColumnTransformer or a "
                f"StandardScaler, got {kind}{hint}"
            )
        self.transformer: Any = clone(transformer)
        self.fitted = False
        self.columns: tuple[str, ...] = ()
        self._text: frozenset[str] = frozenset()
        self._width = 0
        self._session: Any = None

    def fit(self, x: object, y: object, *, as_served: bool = False) -> None:
        """Fit to the rows that are trained on; the second time nothing happens, for a network was trained on the first.

        Args:
            x: a data frame, or an array ``(rows, columns)`` of numbers.
            y: targets, for transformers that look at them.
            as_served: have `transform` give what the served graph will give, to the last bit, where there is such a
                graph. Trees ask for it: they part rows at values that are rows' own, so that a number rounded the
                other way in the graph would be another prediction.
        Raises:
            InvalidInputError: it is no table, or a column is of a type that a model cannot be given.
        """
        if self.fitted:
            return
        if is_frame(x):
            frame: Any = x
            self.columns = tuple(str(name) for name in frame.columns)
            if len(set(self.columns)) != len(self.columns):
                raise InvalidInputError("columns of a data frame need names of their own, and two have the same")
            self._text = frozenset(str(name) for name in frame.columns if _kind(frame[name], str(name)) == "text")
        table = self._table(x)
        self._width = table.shape[1]
        self.transformer.fit(table, None if y is None else np.asarray(y))
        self.fitted = True
        if as_served:
            self._session = self._served(x)

    def _served(self, x: Any) -> Any:
        """A session of the graph; None where there is none, or it computes something else, as exporting will tell."""
        from ..build.runtime import open_session, run

        try:
            session = open_session(self.graph(cut(x, slice(0, _VERIFIED_ROWS)))[0])
            (found,) = run(session, self.wire(x)).values()
        except BuildError:
            return None
        return session if np.allclose(found, self.transform(x), rtol=_CLOSE, atol=_CLOSE) else None

    def transform(self, x: object) -> NDArray[np.float32]:
        """Rows as the network takes them, ``(rows, features)``.

        Raises:
            ModelNotBuiltError: it was not fitted yet.
            InvalidInputError: other columns than those that it was fitted to, or values that it cannot take.
        """
        if not self.fitted:
            raise ModelNotBuiltError("the preprocessing was not fitted yet: call fit(x, y) first")
        table = self._table(x)
        try:
            made = self.transformer.transform(table)
        except (ValueError, TypeError) as error:
            raise InvalidInputError(f"the preprocessing cannot take these rows: {error}") from error
        if self._session is not None:
            from ..build.runtime import run

            (made,) = run(self._session, self.wire(x)).values()
        return _dense(made)

    def wire(self, x: object) -> Any:
        """Rows as the served graph takes them: input name to array ``(rows, 1)``, or one array.

        Raises:
            InvalidInputError: as of `transform`.
        """
        table = self._table(x)
        if not self.columns:
            return {ONLY: table}
        made: dict[str, NDArray[Any]] = {}
        for name in self.columns:
            values = table[name].to_numpy()
            if name in self._text:
                values = np.array(["" if value != value else value for value in values], object)
            made[name] = values[:, None]
        return made

    def graph(self, x: object) -> tuple[Any, str]:
        """The transformer as an ``onnx.ModelProto``, and the name of its output.

        Args:
            x: rows as an example.
        Raises:
            ExportError: a transformer has no form in ONNX.
        """
        import onnx

        from ..build.export import to_onnx

        served = self.serving()
        arrays = self.wire(x)
        if self.columns:
            import pandas

            # Exporting holds the graph against rows of its own, where an empty text would be None again. Whether
            # missing texts come through is seen when the whole graph is held against the model.
            example: Any = pandas.DataFrame({name: _present(array[:, 0]) for name, array in arrays.items()})
        else:
            example = arrays[ONLY]
        proto = to_onnx(served, example).proto
        kept = [value.name for value in proto.graph.input]
        made = onnx.compose.add_prefix(proto, _PREFIX, rename_inputs=False, rename_outputs=True)
        if list(self.columns or (ONLY,)) != kept:
            raise ExportError(f"the preprocessing's graph takes {kept}, expected {list(self.columns or (ONLY,))}")
        return made, str(made.graph.output[0].name)

    def serving(self) -> Any:
        """A copy of the fitted transformer that takes an empty text for one that is missing."""
        made = copy.deepcopy(self.transformer)
        for part in _parts(made):
            if type(part).__name__ == "SimpleImputer" and _holds_text(getattr(part, "statistics_", ())):
                part.missing_values = ""
            categories = getattr(part, "categories_", None)
            if isinstance(categories, list):
                part.categories_ = [_with_empty(values) for values in categories]
        return made

    def _table(self, x: object) -> Any:
        """The rows in the form that everything here stands on; a data frame where there are columns with names."""
        if self.columns or is_frame(x):
            if not is_frame(x):
                raise InvalidInputError(
                    f"expected a data frame with the columns {_some(self.columns)}, got {type(x).__name__}"
                )
            return self._frame(x)
        array = to_numpy(x, "x")
        if array.ndim != 2 or array.dtype.kind not in "biuf":
            raise InvalidInputError(
                f"preprocessing expects a data frame or an array (rows, columns) of numbers, got {array.dtype} of "
                f"{array.shape}"
            )
        if self._width and array.shape[1] != self._width:
            raise InvalidInputError(f"expected {self._width} columns, got {array.shape[1]}")
        return array.astype(np.float32)

    def _frame(self, x: Any) -> Any:
        import pandas

        given = {str(name): name for name in x.columns}
        missing = [name for name in self.columns if name not in given]
        if missing:
            raise InvalidInputError(f"the data frame has no column {_some(missing)}, expected {_some(self.columns)}")
        made: dict[str, Any] = {}
        for name in self.columns:
            column = x[given[name]]
            kind = _kind(column, name)
            if name in self._text:
                if kind != "text" and not column.isna().all():
                    raise InvalidInputError(f"the column '{name}' expects text, got {column.dtype}")
                made[name] = _texts(column)
            elif kind == "text" and not column.isna().all():
                raise InvalidInputError(f"the column '{name}' expects numbers, got text")
            else:
                made[name] = column.to_numpy(np.float32, na_value=np.nan)
        return pandas.DataFrame(made, index=x.index)


def composed(preprocessing: Preprocessing, network: OnnxModel, x: object, predict: Callable[[Any], Any]) -> OnnxModel:
    """One graph of preprocessing and network, which takes raw columns, held against both of them.

    Args:
        network: takes what `Preprocessing.transform` gives.
        x: raw rows to compare on; those with missing values among them matter most.
        predict: the network's own outputs for what `Preprocessing.transform` gives, by output name.
    Raises:
        ExportError: the two do not fit together, or a transformer has no form in ONNX.
        ExportMismatchError: the graph computes something else.
    """
    import onnx

    from ..build.graph import rename
    from ..build.runtime import open_session, run
    from ..build.verify import BATCH, Run, verify

    if len(network.inputs) != 1:
        raise ExportError(
            f"preprocessing makes one table, and the network takes {len(network.inputs)} inputs: expected one"
        )
    before, output = preprocessing.graph(x)
    after = onnx.compose.add_prefix(network.proto, "network_", rename_inputs=True, rename_outputs=True)
    entry = after.graph.input[0].name
    after, before = _aligned(after, before)
    outputs = [spec.name for spec in network.outputs]
    taken = sorted({value.name for value in before.graph.input} & set(outputs))
    if taken:
        raise ExportError(f"the column {taken[0]!r} has the name of an output of the network; rename the column")
    before = _cast(before, output, after.graph.input[0].type.tensor_type.elem_type)
    merged = onnx.compose.merge_models(before, after, io_map=[(before.graph.output[0].name, entry)])
    rename(merged, [f"network_{name}" for name in outputs], outputs)
    # Names of its parts, which scikit-learn's export draws: without them the same model is the same file.
    merged.graph.name, merged.graph.doc_string = "pipeline", ""
    for value in merged.graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    session = open_session(merged)
    runs = []
    chosen = _telling(x)
    for rows in dict.fromkeys((1, min(5, len(chosen)), len(chosen))):
        part = cut(x, chosen[:rows])
        inputs = {name: np.asarray(array) for name, array in preprocessing.wire(part).items()}
        runs.append(Run({BATCH: rows}, inputs, predict(preprocessing.transform(part))))
    scores = [value.name for value in merged.graph.output if value.name in ("probabilities", "scores")]
    ties = {"label": scores[0]} if scores else {}
    verification = verify(
        lambda inputs: run(session, inputs), runs, what="the preprocessing and the model behind it", ties=ties
    )
    last = runs[-1]
    return replace(
        network,
        proto=merged,
        columns=preprocessing.columns,
        verification=verification,
        examples=(({k: v[:8] for k, v in last.inputs.items()}, {k: v[:8] for k, v in last.outputs.items()}),),
    )


def _telling(x: Any) -> NDArray[np.int64]:
    """Rows to compare on: those with missing values first and then others, in turn, so that few rows have both."""
    missing = x.isna().to_numpy().any(axis=1) if is_frame(x) else np.isnan(np.asarray(x, float)).any(axis=1)
    order = np.argsort(~missing, kind="stable")
    half = min(int(missing.sum()), _VERIFIED_ROWS // 2)
    return np.concatenate([order[:half], order[int(missing.sum()) :]])[:_VERIFIED_ROWS]


def _aligned(after: Any, before: Any) -> tuple[Any, Any]:
    """Both with the same versions of the operators, the newer ones of the two.

    ONNX converts its own operators from version to version. Those of ``ai.onnx.ml`` only grew with the versions that
    scikit-learn is exported to, so that there a newer number does.
    """
    import onnx

    def versions(proto: Any) -> dict[str, int]:
        found: dict[str, int] = {}
        for entry in proto.opset_import:
            domain = "" if entry.domain == "ai.onnx" else entry.domain
            found[domain] = max(entry.version, found.get(domain, 0))
        return found

    newest = versions(after)
    for domain, version in versions(before).items():
        newest[domain] = max(version, newest.get(domain, 0))
    made = []
    for proto in (after, before):
        if versions(proto).get("", newest[""]) != newest[""]:
            proto = onnx.version_converter.convert_version(proto, newest[""])
        del proto.opset_import[:]
        for domain, version in newest.items():
            proto.opset_import.add(domain=domain, version=version)
        proto.ir_version = max(item.ir_version for item in (after, before))
        made.append(proto)
    return made[0], made[1]


def _cast(proto: Any, output: str, datatype: int) -> Any:
    """Give the network the type that it takes; scalers compute in FP32 and encoders may give INT64."""
    import onnx

    value = proto.graph.output[0]
    if value.type.tensor_type.elem_type != datatype:
        proto.graph.node.append(onnx.helper.make_node("Cast", [output], [f"{output}_cast"], to=datatype))
        value.name = f"{output}_cast"
        value.type.tensor_type.elem_type = datatype
    return proto


def _kind(column: Any, name: str) -> str:
    """``number`` or ``text``.

    Raises:
        InvalidInputError: a date, or objects of another kind.
    """
    dtype: Any = column.dtype
    if str(dtype) == "category":
        dtype = column.cat.categories.dtype
    if getattr(dtype, "kind", "O") in "biuf":
        return "number"
    present = column[column.notna()]
    if getattr(dtype, "kind", "O") != "M" and all(isinstance(value, str) for value in present):
        return "text"
    raise InvalidInputError(
        f"the column '{name}' is of type {dtype}: expected numbers, truth values or text; a date can be given as "
        f"numbers, such as its year and its day"
    )


def _texts(column: Any) -> NDArray[Any]:
    missing = column.isna().to_numpy()
    values = column.astype(object).to_numpy().copy()
    values[missing] = np.nan
    values[np.array([isinstance(value, str) and not value for value in values], bool)] = np.nan
    return np.asarray(values, object)


def _present(values: NDArray[Any]) -> NDArray[Any]:
    """A column with some text in the place of one that is empty."""
    if values.dtype.kind != "O":
        return values
    some = next((value for value in values if value), "text")
    return np.array([value or some for value in values], object)


def _dense(made: Any) -> NDArray[np.float32]:
    dense = made.toarray() if hasattr(made, "toarray") else made
    array = np.asarray(dense.to_numpy() if hasattr(dense, "to_numpy") else dense)
    if array.dtype.kind not in "biuf" or array.ndim != 2:
        raise InvalidInputError(
            f"the preprocessing gives {array.dtype} of {array.shape}, and a network takes numbers (rows, features): "
            f"encode columns of text, such as with OneHotEncoder"
        )
    return np.ascontiguousarray(array, np.float32)


def _parts(transformer: Any) -> list[Any]:
    """A transformer and all that are in it."""
    inner = [part for _, part in getattr(transformer, "steps", None) or ()]
    for entries in ("transformers_", "transformer_list"):
        inner += [entry[1] for entry in getattr(transformer, entries, None) or ()]
    found = [transformer]
    for part in inner:
        if not isinstance(part, str):
            found += _parts(part)
    return found


def _holds_text(values: Any) -> bool:
    return any(isinstance(value, str) for value in np.asarray(values, object).reshape(-1))


def _with_empty(values: NDArray[Any]) -> NDArray[Any]:
    """Categories of text with the missing one as an empty text."""
    if values.dtype.kind != "O" or not _holds_text(values):
        return values
    return np.array(["" if value is None or value != value else value for value in values], object)


def _some(names: Sequence[str] | Mapping[str, object]) -> str:
    shown = [repr(name) for name in list(names)[:6]]
    return ", ".join(shown) + (", …" if len(names) > 6 else "")
