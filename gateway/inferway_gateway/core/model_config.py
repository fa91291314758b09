"""How one model is to be served: what `config.pbtxt` and `inferway.toml` say, as frozen values.

Every field has the value that holds where no file says anything; ``None`` means "derive it from the graph or measure".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class TensorConfig:
    """What a configuration says of one input or output.

    Attributes:
        dims: without the batch axis where ``max_batch_size`` > 0, as in Triton; None where not said.
        reshape: the shape that the model itself sees, without the batch axis; None where it is ``dims``.
        labels: read from the label file of an output.
    """

    name: str
    datatype: str | None = None
    dims: tuple[int, ...] | None = None
    reshape: tuple[int, ...] | None = None
    optional: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """Bounds of one priority level's queue.

    Attributes:
        default_timeout_s: how long a request may wait when it names no timeout; None is without bound.
        allow_timeout_override: a request may name a shorter timeout of its own.
        timeout_action: reject: answer with an error; delay: let it wait behind all others.
        max_queue_requests: requests that may wait; 0 is without a bound of this kind.
    """

    default_timeout_s: float | None = None
    allow_timeout_override: bool = True
    timeout_action: Literal["reject", "delay"] = "reject"
    max_queue_requests: int = 0


@dataclass(frozen=True, slots=True)
class PaddingAxis:
    """A variable axis that requests of different lengths may be padded along to share a batch.

    Attributes:
        inputs: input name to the axis number (batch axis counted) that is padded.
        outputs: output name to the axis number that is cut back to the request's own length.
        fill: input name to the value that fills the padding; 0 where not named. A mask input is filled with 0.
        buckets: lengths to pad to, ascending, also for a request that runs alone; what is longer than the last is not
            padded. Empty pads to the longest request of the batch.
        max_waste: the share of padded elements that a batch may have without buckets, 0 to 1.
    """

    inputs: dict[str, int]
    outputs: dict[str, int] = field(default_factory=dict)
    fill: dict[str, float] = field(default_factory=dict)
    buckets: tuple[int, ...] = ()
    max_waste: float = 0.25


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How requests to one model are put together.

    Attributes:
        enabled: None: batch where the probe found that rows may be batched; True: the operator vouches for it, also
            where rows depend on their mates; False: never.
        preferred_rows: sizes at which a waiting batch leaves at once.
        max_queue_delay_s: how long a batch that could leave may wait for more rows.
        max_queue_rows, max_queue_bytes: bounds of what may wait, over all priorities.
        priority_levels: 0 is one queue for all; else priorities 1 (first) to this number.
        default_priority: for a request that names none.
        queue: the policy of levels that ``queue_by_priority`` does not name.
        preserve_order: answers leave in the order of arrival, each priority level for itself.
        row_exact: run a lone row with a copy of itself where the model needs company for the same bits. None: where the
            copy costs little; False saves its time and gives the promise up.
        padding: axes that may be padded.
    """

    enabled: bool | None = None
    preferred_rows: tuple[int, ...] = ()
    max_queue_delay_s: float = 0.0
    max_queue_rows: int = 4096
    max_queue_bytes: int = 256 * 1024 * 1024
    priority_levels: int = 0
    default_priority: int = 0
    queue: QueuePolicy = field(default_factory=QueuePolicy)
    queue_by_priority: dict[int, QueuePolicy] = field(default_factory=dict)
    preserve_order: bool = False
    row_exact: bool | None = None
    padding: tuple[PaddingAxis, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How ONNX Runtime is to be set up for one model; None leaves the choice to the load-time trial.

    Attributes:
        providers: execution providers in order of preference; empty takes the gateway's.
        intra_op_threads: threads inside one run.
        disabled_optimizers: graph optimisers to leave out.
        trial: try several options on the warm-up input at load and keep the fastest.
        extensions: the model may use the operators of onnxruntime-extensions, which are native code of another package.
    """

    providers: tuple[str, ...] = ()
    intra_op_threads: int | None = None
    disabled_optimizers: tuple[str, ...] | None = None
    trial: bool = True
    inline: bool | None = None
    extensions: bool = False


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How a language model is served.

    Attributes:
        kv_cache_bytes: keys and values of all answers together, and of the prompts that are remembered; None: by the
            model, see ``backends/language/backend.py``.
        max_sequences: answers that are written at once.
        max_waiting: requests that may wait for a place; more are refused.
        wait_s: how long one may wait.
        max_tokens: of an answer whose request does not say.
        temperature, top_p, top_k: where a request does not say; None: as the model's files have them.
        template: name of a format of conversations, see ``core/chat_formats.py``; None: the model's own template.
    """

    kv_cache_bytes: int | None = None
    max_sequences: int = 16
    max_waiting: int = 256
    wait_s: float = 30.0
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    template: str | None = None


@dataclass(frozen=True, slots=True)
class WarmupInput:
    """One input of a warm-up request. Exactly one of the three sources of data is set."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    source: Literal["zero", "random", "file"] = "zero"
    file: str = ""


@dataclass(frozen=True, slots=True)
class Warmup:
    name: str
    rows: int
    count: int
    inputs: tuple[WarmupInput, ...]


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Which versions of a model are served. latest: the ``latest`` highest; all; or those of ``specific``."""

    kind: Literal["latest", "all", "specific"] = "latest"
    latest: int = 1
    specific: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What is declared of a text encoder: a graph over token ids with a ``tokenizer.json`` beside it. None, and empty,
    leave it to the files of sentence-transformers, where there are any.

    Attributes:
        task: what the model is for.
        output: the graph's output to read.
        pooling: how one vector comes of a vector for each token; none where the graph does it.
        normalise: vectors are brought to length 1.
        max_tokens: of one text, special ones counted.
        long_text: what happens to a longer one.
        dimensions: lengths to which a vector may be cut, as a model allows that was trained so; "any" for each.
        labels: of the classes, in the order of the output.
        multi_label: a text may have several labels, so that each has a probability of its own.
        activation: what makes scores of logits.
        prompts: kind of input, such as ``query`` and ``document``, to what is put before it.
    """

    task: Literal["embeddings", "classify", "rerank"] | None = None
    output: str | None = None
    pooling: Literal["mean", "cls", "last", "max", "none"] | None = None
    normalise: bool | None = None
    max_tokens: int | None = None
    long_text: Literal["error", "truncate", "chunk"] | None = None
    dimensions: tuple[int, ...] | Literal["any"] | None = None
    labels: tuple[str, ...] = ()
    multi_label: bool | None = None
    activation: Literal["softmax", "sigmoid", "none"] | None = None
    prompts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that configuration files say of one model.

    Attributes:
        max_batch_size: None: derive from the graph; 0: the model has no batch axis; n: at most n rows a run.
        instances: in this process, runs of this model that may happen at once, by default as many as there are
            processors; in worker processes, how many of these there are, by default one.
        isolation: where a model of the folder runs; None: in this process. Not for deployed models.
        run_timeout_s: a run that takes longer is ended; None takes the gateway's.
        text: declared of a text encoder; None where nothing is.
        raw: the configuration as the protocol's `config` route shows it, in Triton's JSON names.
    """

    platform: str = "onnxruntime_onnx"
    max_batch_size: int | None = None
    inputs: tuple[TensorConfig, ...] = ()
    outputs: tuple[TensorConfig, ...] = ()
    version_policy: VersionPolicy = field(default_factory=VersionPolicy)
    batching: BatchPolicy = field(default_factory=BatchPolicy)
    session: SessionOptions = field(default_factory=SessionOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    instances: int | None = None
    isolation: Literal["worker", "inprocess"] | None = None
    warmup: tuple[Warmup, ...] = ()
    run_timeout_s: float | None = None
    parameters: dict[str, str] = field(default_factory=dict)
    text: TextOptions | None = None
    raw: dict[str, Any] = field(default_factory=dict)
