"""A key for somebody else: may run one model, sees no other, is replaced without a gap, and is ended.

Needs the gateway of `make serve`, and INFERWAY_BASE_URL and INFERWAY_API_KEY as it prints them.
"""

from __future__ import annotations

import numpy as np

from inferway import AuthenticationError, Inferway, ModelNotFoundError, PermissionDeniedError


def main() -> None:
    blank = np.zeros((1, 64), "float32")
    with Inferway() as admin:
        made = admin.keys.create("digits team", ["infer"], models=["digits*"], expires_in_s=7 * 86_400)
        print(
            f"Key {made.id} may {', '.join(made.scopes)} on {', '.join(made.models)} until {made.expires_at:%d %B %Y}."
        )

        team = admin.with_options(api_key=made.key)
        print(f"It sees {team.models.list()}, and a blank image is a {team.infer('digits', blank)['label'][0]}.")
        try:
            team.models.get("minilm")
        except ModelNotFoundError as error:
            print(f"It asks for minilm: {error.status_code}, {error.code}.")
        try:
            team.models.stats("digits")
        except PermissionDeniedError as error:
            print(f"It asks for statistics: {error.status_code}, {error.code}.")

        successor = admin.keys.rotate(made.id, overlap_s=3600)
        renewed = admin.with_options(api_key=successor.key)
        print(f"Key {successor.id} replaces it; for an hour both work: {team.models.list() == renewed.models.list()}.")

        for key_id in (made.id, successor.id):
            admin.keys.revoke(key_id)
        try:
            renewed.models.list()
        except AuthenticationError as error:
            print(f"Both are revoked: {error.status_code}, {error.code}.")


if __name__ == "__main__":
    main()
