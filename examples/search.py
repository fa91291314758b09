"""Search a folder of text by meaning: paragraphs to vectors once, then for each question the nearest, ranked.

    python examples/search.py                                  # three questions about this project's own docs
    python examples/search.py ~/notes "where is the key of the cellar?"

Needs the gateway of `make serve`, and INFERWAY_BASE_URL and INFERWAY_API_KEY as it prints them. With a cross-encoder
deployed, name it in --rerank-with: it reads question and paragraph together, which finds more than two vectors can.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inferway import Inferway

DOCS = Path(__file__).resolve().parents[1] / "docs"
QUESTIONS = (
    "How do I revoke a key that has leaked?",
    "What happens to a request when the process of its model crashes?",
    "How can only a part of the traffic go to a new version?",
)
CANDIDATES = 20


@dataclass(frozen=True)
class Paragraph:
    file: str
    line: int
    text: str


def paragraphs(folder: Path) -> Iterator[Paragraph]:
    """Each paragraph of the text files in a folder that has some words; what is code or a table is left out."""
    for path in sorted((*folder.rglob("*.md"), *folder.rglob("*.txt"))):
        line = 1
        for block in path.read_text(errors="replace").split("\n\n"):
            text = " ".join(block.split())
            if len(text.split()) >= 8 and not text.startswith(("```", "|", "    ")):
                yield Paragraph(str(path.relative_to(folder)), line + len(block) - len(block.lstrip("\n")), text)
            line += block.count("\n") + 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DOCS)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", default="minilm", help="gives the vectors")
    parser.add_argument("--rerank-with", help="orders the nearest; the same model where none is named")
    args = parser.parse_args()

    found = list(paragraphs(args.folder))
    with Inferway() as client:
        started = time.perf_counter()
        vectors = client.embed([paragraph.text for paragraph in found], model=args.model, input_type="document")
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        took = time.perf_counter() - started
        print(f"{len(found)} paragraphs became vectors of {vectors.shape[1]} numbers in {took:.1f} s.")
        for question in args.questions:
            query = client.embed(question, model=args.model, input_type="query")[0]
            nearest = np.argsort(vectors @ query)[::-1][:CANDIDATES]
            ranking = client.rerank(
                question, [found[i].text for i in nearest], model=args.rerank_with or args.model, top_n=2
            )
            print(f"\n{question}  (ranked by {ranking.method})")
            for ranked in ranking.results:
                paragraph = found[nearest[ranked.index]]
                print(f"  {ranked.score:.2f}  {paragraph.file}:{paragraph.line}")
                print(textwrap.indent(textwrap.shorten(paragraph.text, 180), "        "))


if __name__ == "__main__":
    main()
