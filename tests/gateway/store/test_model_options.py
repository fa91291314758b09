"""``inferway.toml``: what it can say, and that what it cannot say is an error that helps."""

from __future__ import annotations

import pytest

from inferway_gateway.core.model_config import BatchPolicy, ModelConfig, PaddingAxis, SessionOptions
from inferway_gateway.store.model_options import apply_options, parse_options
from inferway_gateway.store.triton_config import ConfigError


def test_everything_that_can_be_said_arrives() -> None:
    options = parse_options(
        """
        run_timeout_s = 2

        [batching]
        enabled = true
        row_exact = false
        max_queue_rows = 10
        max_queue_bytes = 1000

        [[batching.padding]]
        inputs = { input_ids = 1, attention_mask = 1 }
        outputs = { tokens = 1 }
        fill = { input_ids = 7 }
        buckets = [16, 32]
        max_waste = 0.5

        [session]
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        intra_op_threads = 2
        disabled_optimizers = ["SkipLayerNormFusion"]
        trial = false
        inline = false
        """
    )
    config = apply_options(ModelConfig(batching=BatchPolicy(preferred_rows=(4,))), options)
    assert config.run_timeout_s == 2.0
    assert config.batching == BatchPolicy(
        enabled=True,
        preferred_rows=(4,),
        max_queue_rows=10,
        max_queue_bytes=1000,
        row_exact=False,
        padding=(
            PaddingAxis(
                inputs={"input_ids": 1, "attention_mask": 1},
                outputs={"tokens": 1},
                fill={"input_ids": 7.0},
                buckets=(16, 32),
                max_waste=0.5,
            ),
        ),
    )
    assert config.session == SessionOptions(
        providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
        intra_op_threads=2,
        disabled_optimizers=("SkipLayerNormFusion",),
        trial=False,
        inline=False,
    )


def test_what_is_not_said_stays_as_it_was() -> None:
    config = ModelConfig(session=SessionOptions(intra_op_threads=3), batching=BatchPolicy(max_queue_rows=5))
    assert apply_options(config, parse_options("")) == config


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "speed = 1",
            "speed is not known, expected one of "
            "run_timeout_s, instances, isolation, max_batch_size, batching, session",
        ),
        (
            "[batching]\nenable = true",
            "batching.enable is not known, expected one of enabled, row_exact, max_queue_rows",
        ),
        ("[session]\nthreads = 2", "session.threads is not known, expected one of providers, intra_op_threads"),
        ("[batching]\nmax_batch_size = 8", "padding; did you mean max_batch_size?"),
        ("row_exact = true", "did you mean batching.row_exact?"),
        ("[batching]\nenabled = 1", "batching.enabled: Input should be a valid boolean"),
        ("[batching]\nmax_queue_rows = '10'", "batching.max_queue_rows: Input should be a valid integer"),
        ("run_timeout_s = 0", "run_timeout_s: Input should be greater than 0"),
        ("run_timeout_s = nan", "run_timeout_s"),
        ("[session]\nproviders = ['cuda']", "session.providers.0: String should match"),
        ("[session]\nintra_op_threads = 0", "greater than or equal to 1"),
        ("[[batching.padding]]\ninputs = {}", "batching.padding.0.inputs"),
        ("[[batching.padding]]\ninputs = { x = 0 }", "batching.padding.0.inputs.x: Input should be greater than"),
        ("[[batching.padding]]\ninputs = { x = 1 }\nfill = { y = 0 }", "names ['y'], which is not among inputs"),
        ("[[batching.padding]]\ninputs = { x = 1 }\nbuckets = [4, 2]", "must be ascending"),
        ("[[batching.padding]]\ninputs = { x = 1 }\nmax_waste = 2.0", "max_waste"),
        ("[[batching.padding]]\ninput = { x = 1 }", "batching.padding.0.input is not known, expected one of inputs"),
        ("a = ", "not TOML"),
        ("a = " + "[" * 100_000, "not TOML"),
    ],
)
def test_a_mistake_is_an_error_that_names_it(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(text)
    assert reason in str(caught.value)
