"""``inferway chat``: talk to a language model of a gateway, in the terminal or from a script.

A client's command: it goes through the SDK, and works without the gateway's extra. The answer goes to stdout; how fast
it was, and what went wrong, goes to stderr. Where stdin is no terminal its whole text is one message.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from . import cli_models

if TYPE_CHECKING:
    from inferway import ChatCompletion, Inferway

COMMANDS: Final = frozenset({"chat"})
"""Commands that need no gateway on this machine."""

_SILENCE_S: Final = 60.0
"""An answer may take any time, but no longer than this between two pieces; a gateway at work tells that it is."""

_HELP: Final = """\
/system TEXT   say how the model is to answer, and begin anew; without a text: show it
/reset         forget the conversation
/save FILE     write the conversation as JSON
/help          this list
/exit          leave, as does Ctrl+D
Ctrl+C ends an answer that is being written; what has come of it stays in the conversation."""


def add_parser(commands: Any) -> None:
    """Add ``chat`` to the sub-commands of a parser (what ``ArgumentParser.add_subparsers`` gave)."""
    chat = cli_models.add_client_command(
        commands, "chat", _chat, "talk to a language model of a gateway", "Talking needs the scope infer."
    )
    chat.add_argument("model", metavar="MODEL", help="its name; NAME@ALIAS and NAME:ADAPTER work as well")
    chat.add_argument("message", nargs="?", metavar="MESSAGE", help="say this, print the answer and leave")
    chat.add_argument("--system", metavar="TEXT", help="how the model is to answer")
    chat.add_argument("--max-tokens", type=_positive, metavar="N", help="of one answer")
    chat.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest word each time")
    chat.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answers")
    chat.add_argument("--quiet", action="store_true", help="do not tell how fast the answer was")


def _chat(client: Inferway, args: argparse.Namespace) -> None:
    conversation = Conversation(client, args)
    if args.message is not None or not sys.stdin.isatty():
        text = args.message if args.message is not None else sys.stdin.read().strip()
        if not text:
            raise cli_models.WrongArguments("expected a message, as an argument or on standard input")
        conversation.ask(text)
        if conversation.interrupted:
            raise KeyboardInterrupt
        return
    conversation.talk()


class Conversation:
    """What was said so far, and how to go on.

    Attributes:
        messages: the conversation as it is sent, without what ``--system`` or ``/system`` says.
        interrupted: the last answer was ended by Ctrl+C.
    """

    def __init__(self, client: Inferway, args: argparse.Namespace) -> None:
        self._client = client
        self._args = args
        self.system: str | None = args.system
        self.messages: list[dict[str, Any]] = []
        self.interrupted = False

    def talk(self) -> None:
        """Ask at the terminal until the user leaves. Raises what the first answer raises, and ends then."""
        import inferway

        with suppress(ImportError):
            import readline  # noqa: F401 - line editing and history of input()

        _say(f"{self._args.model} on {self._client.base_url}; /help tells what you can do.\n")
        answered = False
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                # As in a shell: what was typed is gone, and nothing else.
                print()
                continue
            if not line:
                continue
            if line.startswith("/"):
                if not self._command(line):
                    return
                continue
            try:
                self.ask(line)
                answered = True
            except KeyboardInterrupt:
                # Before the answer began.
                print()
            except inferway.APIError as error:
                if not answered:
                    raise
                _say(f"inferway: {error}\n")
                if error.code == "context_length_exceeded":
                    _say("The conversation is too long for the model: /reset forgets it.\n")

    def _command(self, line: str) -> bool:
        """Do what a line with a slash says; False to leave."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/exit", "/quit"):
            return False
        if word == "/help":
            _say(_HELP + "\n")
        elif word == "/reset":
            self.messages.clear()
            _say("The conversation is forgotten.\n")
        elif word == "/system" and rest:
            self.system = rest
            self.messages.clear()
            _say("The model is told so from now on; the conversation begins anew.\n")
        elif word == "/system":
            _say((self.system or "Nothing was said about how to answer.") + "\n")
        elif word == "/save" and rest:
            self._save(Path(rest).expanduser())
        elif word == "/save":
            _say("Name the file: /save FILE\n")
        else:
            _say(f"There is no {word}; /help tells what there is.\n")
        return True

    def _save(self, path: Path) -> None:
        kept = {"model": self._args.model, "messages": self._sent()}
        try:
            path.write_text(json.dumps(kept, ensure_ascii=False, indent=2) + "\n")
        except OSError as error:
            _say(f"{path} cannot be written: {error.strerror or error}\n")
        else:
            _say(f"{len(self.messages)} messages are in {path}.\n")

    def _sent(self) -> list[dict[str, Any]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages]

    def ask(self, text: str) -> None:
        """Say something and print the answer as it is written. Ctrl+C ends the answer, and what has come is kept.

        Raises:
            inferway.APIError: there is no answer, or it broke off; what had come of it is kept.
        """
        from inferway import APIError, StreamInterruptedError, Timeout

        self.interrupted = False
        self.messages.append({"role": "user", "content": text})
        begun = time.monotonic()
        first: float | None = None
        try:
            with self._client.chat.create(
                self._sent(),
                model=self._args.model,
                stream=True,
                max_tokens=self._args.max_tokens,
                temperature=self._args.temperature,
                seed=self._args.seed,
                timeout=Timeout(total=None, read=_SILENCE_S),
            ) as stream:
                try:
                    for piece in stream.text_stream:
                        if first is None:
                            first = time.monotonic()
                        if not self._args.json:
                            print(piece, end="", flush=True)
                except KeyboardInterrupt:
                    self.interrupted = True
                answer = stream.snapshot
        except StreamInterruptedError as error:
            self._keep(error.partial)
            if not self._args.json:
                print()
            raise
        except (APIError, KeyboardInterrupt):
            # Nothing came: the question is as good as not asked.
            self.messages.pop()
            raise
        self._keep(answer)
        if self._args.json:
            usage = answer.usage
            print(json.dumps({
                "model": answer.model, "text": answer.text, "finish_reason": answer.finish_reason,
                "usage": None if usage is None else {
                    "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
                },
            }))  # fmt: skip
            return
        print(flush=True)
        if not self._args.quiet:
            _say(self._told(answer, begun, first))

    def _keep(self, answer: ChatCompletion) -> None:
        if answer.text:
            self.messages.append({"role": "assistant", "content": answer.text})
        else:
            self.messages.pop()

    def _told(self, answer: ChatCompletion, begun: float, first: float | None) -> str:
        """How much came, and how fast."""
        now = time.monotonic()
        if self.interrupted:
            return f"[ended by Ctrl+C after {now - begun:.1f} s]\n"
        words: list[str] = []
        tokens = answer.usage.completion_tokens if answer.usage is not None else 0
        if tokens:
            words.append(f"{tokens} tokens")
            # The first one waited for the prompt; the others show how fast the model writes.
            if first is not None and tokens > 1 and now > first:
                words.append(f"{(tokens - 1) / (now - first):.0f} tokens/s")
        if first is not None:
            words.append(f"the first after {(first - begun) * 1e3:.0f} ms")
        if answer.finish_reason == "length":
            words.append("cut at the limit of tokens")
        return f"[{', '.join(words)}]\n" if words else ""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _say(words: str) -> None:
    """About the conversation, not part of it: dimmed on a terminal."""
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        words = f"\x1b[2m{words}\x1b[0m"
    print(words, end="", file=sys.stderr, flush=True)
