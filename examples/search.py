"""Find the sentence that answers a question: one call for each sentence, all at once, through the asynchronous client.

Needs the gateway of `make serve`, and INFERWAY_BASE_URL and INFERWAY_API_KEY as it prints them. Sixty calls of one
sentence each arrive together; the gateway pads them and runs them together, which its statistics show at the end.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from inferway import AsyncInferway, AsyncModelHandle

MODEL_FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "inferway-models" / "minilm"
CITIES = {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo", "Egypt": "Cairo"}
FACTS = [
    text.format(country=country, city=city)
    for country, city in CITIES.items()
    for text in (
        "The capital of {country} is {city}.",
        "Trains to {city} leave every hour.",
        "In {country}, shops are closed on Sundays.",
        "A ticket to {city} costs ninety euros.",
        "It rained in {city} for the whole week, and nobody was surprised.",
        "My aunt moved from {country} to {city} when she was young.",
        "{city} has three airports.",
        "You need no visa for {country}.",
        "They grow coffee in the mountains of {country}.",
        "The museum of {city} opens at ten.",
    )
]
QUESTIONS = [
    "Which city do Kenyans call their capital?",
    "When can I see paintings in Oslo?",
    "What is the fare to Lima?",
]


async def embed(minilm: AsyncModelHandle, tokenizer: Tokenizer, text: str) -> NDArray[Any]:
    tokens = tokenizer.encode(text)
    ids = np.array([tokens.ids])
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    vector: NDArray[Any] = (await minilm.infer(inputs)).output[0]
    return vector


async def main() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
    async with AsyncInferway() as client:
        minilm = client.model("minilm")
        before = (await client.models.stats("minilm"))[0]
        vectors = np.stack(await asyncio.gather(*(embed(minilm, tokenizer, fact) for fact in FACTS)))
        after = (await client.models.stats("minilm"))[0]
        for question in QUESTIONS:
            scores = vectors @ await embed(minilm, tokenizer, question)
            best = int(scores.argmax())
            print(f"{question}\n  {FACTS[best]} ({scores[best]:.2f})")
    rows, runs = after.inference_count - before.inference_count, after.execution_count - before.execution_count
    print(f"\n{rows} calls of one sentence took {runs} runs of the model.")


if __name__ == "__main__":
    asyncio.run(main())
