"""Facts out of free text, as typed Python objects: a language model writes JSON that follows a schema, always.

    python examples/extract.py
    python examples/extract.py "Grace Hopper, 37, works in Philadelphia."

Needs the gateway of `make serve`, and INFERWAY_BASE_URL and INFERWAY_API_KEY as it prints them. The schema comes from a
pydantic model. The gateway holds the answer to it token by token, so that even a small model cannot write anything
else: what it says may be wrong, how it says it cannot.
"""

from __future__ import annotations

import argparse
import json

from pydantic import BaseModel, Field

from inferway import Inferway

TEXTS = (
    "Ada is 36 years old and lives in London.",
    "My neighbour Tom, 52, moved here from Oslo.",
    "Marie Curie, 45 years old, works in Paris.",
)


class Person(BaseModel):
    """Somebody that a text tells of."""

    name: str
    age: int = Field(ge=0, le=150)
    city: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", default=TEXTS)
    parser.add_argument("--model", default="smollm2")
    args = parser.parse_args()

    with Inferway() as client:
        for text in args.texts:
            answer = client.chat.create(
                [
                    {"role": "system", "content": "Extract the person from the text as JSON."},
                    {"role": "user", "content": text},
                ],
                model=args.model,
                response_format=Person,
                temperature=0,
                max_tokens=100,
            )
            person: Person = answer.parsed
            print(f"{text}\n  {person!r}")

        # Any JSON schema will do, and the answer can be streamed as well.
        schema = {
            "type": "object",
            "properties": {"mood": {"enum": ["glad", "angry", "neutral"]}},
            "required": ["mood"],
        }
        with client.chat.create(
            f"Is this glad, angry or neutral? {args.texts[0]}",
            model=args.model,
            response_format={**schema, "additionalProperties": False},
            stream=True,
            max_tokens=20,
        ) as stream:
            pieces = list(stream.text_stream)
            print(f"\n{len(pieces)} pieces make {json.dumps(stream.get_final().parsed)}")


if __name__ == "__main__":
    main()
