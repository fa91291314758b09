"""The same gateway with somebody else's client: the `openai` package chats, streams, extracts and embeds.

    pip install openai
    python examples/openai_client.py

Needs the gateway of `make serve`, and INFERWAY_BASE_URL and INFERWAY_API_KEY as it prints them. Whatever speaks to
OpenAI's API speaks to the gateway when it is given the address, with /v1 behind it, and a key.
"""

from __future__ import annotations

import os

from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int
    city: str


def main() -> None:
    base_url = os.environ.get("INFERWAY_BASE_URL", "http://127.0.0.1:8080")
    with OpenAI(base_url=f"{base_url}/v1", api_key=os.environ["INFERWAY_API_KEY"]) as client:
        print("models:", ", ".join(sorted(model.id for model in client.models.list())))

        with client.chat.completions.create(
            model="smollm2",
            messages=[
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "What is the capital of France?"},
            ],
            temperature=0,
            max_tokens=40,
            stream=True,
        ) as stream:
            for chunk in stream:
                if chunk.choices:
                    print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()

        parsed = client.chat.completions.parse(
            model="smollm2",
            messages=[
                {"role": "system", "content": "Extract the person from the text as JSON."},
                {"role": "user", "content": "Ada is 36 years old and lives in London."},
            ],
            response_format=Person,
            temperature=0,
            max_tokens=100,
        )
        print(repr(parsed.choices[0].message.parsed))

        made = client.embeddings.create(model="minilm", input=["A cat sits.", "A feline rests."])
        first, second = (item.embedding for item in made.data)
        print(f"alike: {sum(a * b for a, b in zip(first, second, strict=True)):.2f}")


if __name__ == "__main__":
    main()
