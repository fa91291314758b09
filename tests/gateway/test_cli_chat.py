"""``inferway chat``: what it asks, what it prints where, and how a terminal's keys are taken."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inferway_gateway.__main__ import main
from scripted import Answer, ScriptedServer, as_json

HEAD = {"id": "chat-1", "object": "chat.completion.chunk", "created": 7, "model": "smol"}
WAIT_S = 30


def event(delta: dict[str, Any] | None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + json.dumps({**HEAD, "choices": choices, **more}).encode() + b"\n\n"


def streamed(*texts: str, finish: str = "stop") -> Answer:
    usage = {"prompt_tokens": 3, "completion_tokens": len(texts), "total_tokens": 3 + len(texts)}
    body = [*(event({"content": text}) for text in texts), event({}, finish), event(None, usage=usage)]
    return Answer(200, b"".join(body) + b"data: [DONE]\n\n", {"Content-Type": "text/event-stream"})


def endless(text: str) -> Answer:
    """An answer that begins and never ends."""
    return Answer(200, event({"content": text}), {"Content-Type": "text/event-stream"}, drip=b": keep-alive\n\n")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    made = ScriptedServer()
    monkeypatch.setenv("INFERWAY_BASE_URL", made.url)
    monkeypatch.setenv("INFERWAY_API_KEY", "key-1234567890")
    yield made
    made.stop()


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def test_a_message_is_answered_on_stdout_and_the_speed_told_on_stderr(said: Any, server: ScriptedServer) -> None:
    server.script = [streamed("Hel", "lo")]
    status, out, err = said("chat", "smol", "Hi", "--system", "Be kind.", "--max-tokens", "9", "--temperature", "0",
                            "--seed", "1")  # fmt: skip
    assert (status, out) == (0, "Hello\n")
    assert re.fullmatch(r"\[2 tokens, \d+ tokens/s, the first after \d+ ms\]\n", err)
    sent = server.seen[0].json
    assert sent["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["seed"]) == ("smol", 9, 0, 1)
    assert server.seen[0].headers["authorization"] == "Bearer key-1234567890"
    # An answer may take any time, so the gateway is told of no limit.
    assert "inferway-timeout-ms" not in server.seen[0].headers


def test_a_pipe_is_one_message(said: Any, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = [streamed("Hello", finish="length"), streamed("Hello")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    status, out, err = said("chat", "smol")
    assert (status, out) == (0, "Hello\n")
    assert "cut at the limit of tokens" in err
    assert server.seen[0].json["messages"] == [{"role": "user", "content": "two\nlines"}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi"))
    assert said("chat", "smol", "--quiet") == (0, "Hello\n", "")


def test_json_is_one_object(said: Any, server: ScriptedServer) -> None:
    server.script = [streamed("Hel", "lo")]
    status, out, err = said("chat", "smol", "Hi", "--json")
    assert json.loads(out) == {
        "model": "smol", "text": "Hello", "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }  # fmt: skip
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (as_json({"error": {"message": "no model 'smol'", "code": "model_not_found"}}, 404), 1, "no model 'smol'"),
        (as_json({"error": {"message": "no key", "code": "unauthenticated"}}, 401), 1, "inferway keys create"),
        (Answer(200, event({"content": "Hel"}), {"Content-Type": "text/event-stream"}), 1, "before the answer was"),
    ],
    ids=["no model", "no key", "cut"],
)
def test_what_goes_wrong_is_one_line(
    said: Any, server: ScriptedServer, answer: Answer, status: int, words: str
) -> None:
    server.script = [answer]
    found, out, err = said("chat", "smol", "Hi")
    assert found == status
    assert out in ("", "Hel\n")
    assert words in err
    assert len(err.splitlines()) == 1


def test_nothing_to_say_is_a_wrong_argument(said: Any, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert said("chat", "smol") == (2, "", "inferway: expected a message, as an argument or on standard input\n")
    assert server.seen == []


class Terminal:
    """Somebody at a terminal in which `inferway chat` runs."""

    def __init__(self, *arguments: str) -> None:
        self._end, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "inferway_gateway", "chat", *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=lambda: _own_terminal(inner),
            env={**os.environ, "TERM": "dumb", "NO_COLOR": "1"},
        )
        os.close(inner)
        self.shown = ""
        self._read = 0
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        while True:
            try:
                piece = os.read(self._end, 4096)
            except OSError:
                return
            if not piece:
                return
            self.shown += piece.decode().replace("\r\n", "\n")

    def until(self, pattern: str) -> str:
        """What is shown from here on up to a pattern."""
        give_up = time.monotonic() + WAIT_S
        while not (found := re.compile(pattern).search(self.shown, self._read)):
            assert time.monotonic() < give_up, self.shown
            assert self.process.poll() is None or re.compile(pattern).search(self.shown, self._read), self.shown
            time.sleep(0.01)
        text = self.shown[self._read : found.end()]
        self._read = found.end()
        return text

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def leave(self) -> int:
        status = self.process.wait(WAIT_S)
        self._thread.join(WAIT_S)
        os.close(self._end)
        return status


def _own_terminal(inner: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(inner, termios.TIOCSCTTY, 0)


def test_a_conversation_at_a_terminal(server: ScriptedServer, tmp_path: Path) -> None:
    server.script = [streamed("Hel", "lo"), streamed("Yes."), streamed("Arr!"), streamed("Anew.")]
    terminal = Terminal("smol")
    terminal.until(r"/help tells what you can do\.\n> ")
    terminal.type("/help\n")
    assert "/save FILE" in terminal.until(r"conversation\.\n> ")
    terminal.type("Hi\n")
    assert "Hello\n[2 tokens" in terminal.until(r"ms\]\n> ")
    terminal.type("Again?\n")
    terminal.until(r"Yes\.\n\[1 tokens.*\]\n> ")
    assert [message["content"] for message in server.seen[1].json["messages"]] == ["Hi", "Hello", "Again?"]
    terminal.type("/system Talk like a pirate.\n")
    terminal.until(r"begins anew\.\n> ")
    terminal.type("/system\n")
    terminal.until(r"Talk like a pirate\.\n> ")
    terminal.type("Hi\n")
    terminal.until(r"Arr!\n\[.*\]\n> ")
    assert [message["role"] for message in server.seen[2].json["messages"]] == ["system", "user"]
    kept = tmp_path / "talk.json"
    terminal.type(f"/save {kept}\n")
    terminal.until(r"2 messages are in")
    assert json.loads(kept.read_text())["messages"][-1] == {"role": "assistant", "content": "Arr!"}
    terminal.type(f"/save {tmp_path}/no/such/folder\n")
    terminal.until(r"cannot be written")
    terminal.type("/save\n/dance\n\n/reset\n")
    terminal.until(r"Name the file")
    terminal.until(r"There is no /dance")
    terminal.until(r"is forgotten\.\n> ")
    terminal.type("Hi\n")
    terminal.until(r"Anew\.\n\[.*\]\n> ")
    assert len(server.seen[3].json["messages"]) == 2
    terminal.type("/exit\n")
    assert terminal.leave() == 0


def test_ctrl_c_ends_the_answer_and_keeps_what_had_come(server: ScriptedServer) -> None:
    server.script = [endless("Once upon"), streamed("Bye."), Answer(hang=True), streamed("Here.")]
    terminal = Terminal("smol")
    terminal.until(r"> ")
    terminal.type("\x03")
    terminal.until(r"\n> ")
    terminal.type("Tell a tale\n")
    terminal.until("Once upon")
    terminal.type("\x03")
    terminal.until(r"\[ended by Ctrl\+C after [\d.]+ s\]\n> ")
    terminal.type("Thanks\n")
    terminal.until(r"Bye\.\n")
    told = [message["content"] for message in server.seen[1].json["messages"]]
    assert told == ["Tell a tale", "Once upon", "Thanks"]
    terminal.until(r"> ")
    terminal.type("Still there?\n")
    assert server.hanging.wait(WAIT_S)
    terminal.type("\x03")
    assert server.closed.wait(WAIT_S)
    terminal.until(r"\n> ")
    terminal.type("Hello?\n")
    terminal.until(r"Here\.\n")
    # The question that had no answer is as good as not asked.
    assert "Still there?" not in [message["content"] for message in server.seen[3].json["messages"]]
    terminal.until(r"> ")
    terminal.type("\x04")
    assert terminal.leave() == 0


def test_a_later_answer_may_fail_and_the_conversation_goes_on(server: ScriptedServer) -> None:
    no = as_json({"error": {"message": "at most 8 tokens", "code": "context_length_exceeded"}}, 400)
    cut = Answer(200, event({"content": "Hal"}), {"Content-Type": "text/event-stream"})
    server.script = [streamed("Hello"), no, cut, streamed("Bye")]
    terminal = Terminal("smol", "--quiet")
    for question, pattern in (
        ("Hi", "Hello\n"),
        ("Hm", "at most 8 tokens.*\n.*/reset forgets it"),
        ("So", "Hal\n.*before the answer"),
        ("And", "Bye\n"),
    ):
        terminal.until(r"> ")
        terminal.type(question + "\n")
        terminal.until(pattern)
    told = [message["content"] for message in server.seen[3].json["messages"]]
    assert told == ["Hi", "Hello", "So", "Hal", "And"]
    terminal.type("\x04")
    assert terminal.leave() == 0


def test_a_wrong_model_ends_it_at_once(server: ScriptedServer) -> None:
    server.script = [as_json({"error": {"message": "no model 'smol'", "code": "model_not_found"}}, 404)]
    terminal = Terminal("smol")
    terminal.until(r"> ")
    terminal.type("Hi\n")
    assert terminal.leave() == 1
    assert "inferway: no model 'smol'" in terminal.shown


def test_ctrl_c_without_a_terminal_ends_the_command(server: ScriptedServer) -> None:
    server.script = [endless("Once upon")]
    with subprocess.Popen(
        [sys.executable, "-m", "inferway_gateway", "chat", "smol", "Hi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 100) == b"Once upon"
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130


OPERATORS = ("sqlalchemy", "pydantic_settings", "starlette", "uvicorn", "onnxruntime", "tokenizers", "jinja2")
BARE = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPERATORS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from inferway_gateway.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_needs_the_client_alone(server: ScriptedServer) -> None:
    server.script = [streamed("Hel", "lo")]
    done = subprocess.run(
        [sys.executable, "-c", BARE, "chat", "smol", "Hi", "--quiet"], capture_output=True, text=True, timeout=WAIT_S
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello\n", "")
