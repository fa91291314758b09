"""The README and the guides are run as a reader would run them, and compared with the code that they describe.

A guide is read from top to bottom. Blocks marked ``bash`` run in one working directory with one environment, so that
``export`` and ``cd`` last; a block that starts ``inferway serve`` goes on running beside the others. Blocks marked
``python`` share one interpreter. A block marked ``text`` or ``json`` is what the block before it printed, with ``...``
for whatever differs from run to run. Blocks without a language are not run. A guide that starts no gateway of its own
finds the one that "Getting started" builds. Ports are free ones in place of the 8080 that is printed.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import BaseModel
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from sybil.typing import Parser

import inferway
from inferway_gateway.store.model_options import ModelOptions, parse_options

ROOT: Final = Path(__file__).resolve().parents[1]
GETTING_STARTED: Final = ROOT / "docs" / "getting-started.md"
GUIDES: Final = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(guide for guide in sorted((ROOT / "docs").glob("*.md")) if guide != GETTING_STARTED),
]
OF_ITS_OWN: Final = ("README.md", "distributed-training.md", "sdk-text.md")
"""Guides that begin with an empty directory."""
TEXTS: Final = [*GUIDES, GETTING_STARTED, ROOT / "CHANGELOG.md", ROOT / "examples" / "models" / "README.md"]
BLOCK_TIMEOUT_S: Final = 120
START_TIMEOUT_S: Final = 60
# As in the Makefile's target docs.
COG: Final = ("-I", str(ROOT / "docs"), "--markers={{{cog }}} {{{end}}}")
OUTPUT_OPTIONS: Final = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Answers each line of standard input, a JSON object with code and environment, with one line: what was printed and,
# when it failed, the traceback.
INTERPRETER: Final = textwrap.dedent(
    """
    import contextlib, io, json, linecache, os, sys, traceback
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for number, line in enumerate(sys.stdin):
        block = json.loads(line)
        if block["fresh"]:
            namespace = {"__name__": "__main__"}
        os.environ.clear()
        os.environ.update(block["environment"])
        os.chdir(block["directory"])
        printed, error, name = io.StringIO(), None, f"<block {number}>"
        linecache.cache[name] = (len(block["source"]), None, block["source"].splitlines(True), name)
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(block["source"], name, "exec"), namespace)
        except BaseException:
            error = traceback.format_exc()
        print(json.dumps({"printed": printed.getvalue(), "error": error}), file=answers, flush=True)
    answers.close()
    """
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Reader:
    """Somebody at a terminal with a clone of the project: a directory, a shell, a Python prompt, a gateway."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.printed: str | None = None
        self._fresh = True
        self._port = free_port()
        self._gateway: subprocess.Popen[bytes] | None = None
        self._python: subprocess.Popen[str] | None = None
        directory.mkdir()
        for name in ("Makefile", "deploy", "examples", "pyproject.toml", ".cache"):
            (directory / name).symlink_to(ROOT / name)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("INFERWAY_", "COV_"))},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(directory),
            "INFERWAY_PORT": str(self._port),
            "INFERWAY_BASE_URL": f"http://127.0.0.1:{self._port}",
            "INFERWAY_STATE_DIR": str(directory / "state"),
            "INFERWAY_DRAIN_DELAY_S": "0",
            "PYTHONWARNINGS": "default",
            # What `make` would do is looked up, not done: the suite itself runs under `make test`.
            "MAKEFLAGS": "-n",
        }

    def _mine(self, text: str) -> str:
        return re.sub(r"\b(127\.0\.0\.1|localhost):8080\b", rf"\1:{self._port}", text)

    def bash(self, source: str) -> str:
        """Run a block and keep the directory and the exported variables that it leaves."""
        before, serve, after = re.split(r"(^inferway serve .*$|\Z)", self._mine(source), maxsplit=1, flags=re.MULTILINE)
        assert not after.strip(), "nothing can follow a gateway in a block: it goes on running"
        left = self.directory.parent / f"{self.directory.name}.env"
        script = f"{before}\n{{ pwd; env -0; }} > {shlex.quote(str(left))}\n"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=BLOCK_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise AssertionError(f"exit status {done.returncode}\n{done.stdout}{done.stderr}{self.log()}")
        directory, _, variables = left.read_text().partition("\n")
        self.directory = Path(directory)
        self.environment = dict(entry.split("=", 1) for entry in variables.split("\0") if entry)
        if serve:
            self.serve(serve)
        return done.stdout

    def serve(self, command: str) -> None:
        """Start the gateway in place of the one that ran, and come back when it is ready."""
        self.stop_gateway()
        with (self.directory / "gateway.log").open("wb") as log:
            self._gateway = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            with inferway.Inferway(f"http://127.0.0.1:{self._port}") as client:
                client.health.wait_until_ready(timeout=START_TIMEOUT_S)
        except inferway.APIError as error:
            raise AssertionError(f"{error}{self.log()}") from None

    def log(self) -> str:
        """The end of the gateway's log, for the message of a failure."""
        log = self.directory / "gateway.log"
        return f"\n--- gateway.log\n{log.read_text()[-4000:]}" if log.exists() else ""

    def python(self, source: str) -> str:
        """Run a block in the document's interpreter."""
        if self._python is None:
            self._python = subprocess.Popen(
                [sys.executable, "-c", INTERPRETER],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._python.stdin is not None
        assert self._python.stdout is not None
        block = {
            "fresh": self._fresh,
            "source": self._mine(source),
            "environment": self.environment,
            "directory": str(self.directory),
        }
        self._fresh = False
        print(json.dumps(block), file=self._python.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._python.stdout.readline() or '{"error": "the interpreter ended"}')
        if answer["error"] is not None:
            raise AssertionError(f"{answer['error']}{self.log()}")
        printed: str = answer["printed"]
        return printed

    def begin(self) -> None:
        """Turn to another guide, which has to make its own names."""
        self._fresh, self.printed = True, None

    def stop_gateway(self) -> None:
        if self._gateway is not None:
            self._gateway.send_signal(signal.SIGTERM)
            try:
                assert self._gateway.wait(timeout=START_TIMEOUT_S) == 0, self.log()
            finally:
                self._gateway.kill()
                self._gateway = None

    def close(self) -> None:
        if self._python is not None:
            self._python.communicate(timeout=START_TIMEOUT_S)
        self.stop_gateway()

    def run(self, example: Example) -> None:
        """Sybil's evaluator of ``bash`` and ``python`` blocks."""
        language = example.region.lexemes["arguments"]
        self.printed = getattr(self, language)(example.parsed)

    def compare(self, example: Example) -> str | None:
        """Sybil's evaluator of the blocks that show what was printed."""
        assert self.printed is not None, "shows the output of a block, and none was run"
        expected, printed = self._mine(example.parsed), self.printed
        self.printed = None
        if doctest.OutputChecker().check_output(expected, printed, OUTPUT_OPTIONS):
            return None
        return f"expected\n{textwrap.indent(expected, '  ')}\ngot\n{textwrap.indent(printed, '  ')}"


def evaluate(guide: Path, reader: Reader) -> int:
    """Run every block of a guide, in order. Returns how many were run."""
    parsers: list[Parser] = [SkipParser(), *(CodeBlockParser(language, reader.run) for language in ("bash", "python"))]
    parsers += [CodeBlockParser(language, reader.compare) for language in ("text", "json")]
    document: Document = Sybil(parsers).parse(guide)
    reader.begin()
    count = 0
    for example in document.examples():
        try:
            example.evaluate()
        except AssertionError as error:
            if str(guide) in str(error):
                raise
            raise AssertionError(f"{guide.name}, line {example.line}:\n{error}") from None
        count += 1
    return count


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """Somebody with an empty directory."""
    reader = Reader(tmp_path / "inferway")
    try:
        yield reader
    finally:
        reader.close()


@pytest.fixture(scope="module")
def started_reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Somebody who has followed "Getting started" to its end."""
    reader = Reader(tmp_path_factory.mktemp("reader") / "inferway")
    try:
        evaluate(GETTING_STARTED, reader)
        yield reader
    finally:
        reader.close()


@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("guide", [*GUIDES, GETTING_STARTED], ids=lambda guide: guide.stem)
def test_every_block_of_the_guide_runs_and_prints_what_it_shows(guide: Path, request: pytest.FixtureRequest) -> None:
    reader: Reader = request.getfixturevalue("reader" if guide.name in OF_ITS_OWN else "started_reader")
    if guide == GETTING_STARTED:  # the fixture has run that one
        return
    evaluate(guide, reader)
    if re.search(r"^inferway serve .*--model-control", guide.read_text(), re.MULTILINE):
        reader.serve("inferway serve models")  # the next guide expects that one


def test_a_block_that_prints_something_else_fails(tmp_path: Path, reader: Reader) -> None:
    guide = tmp_path / "wrong.md"
    guide.write_text("```bash\necho one\n```\n\n```text\ntwo\n```\n")
    with pytest.raises(AssertionError, match=r"(?s)expected\n  two.*got\n  one"):
        evaluate(guide, reader)
    guide.write_text("```python\nprint(1 / 0)\n```\n")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        evaluate(guide, reader)


def test_the_tables_that_come_from_the_code_are_up_to_date() -> None:
    pages = [str(guide) for guide in GUIDES if "{{{cog" in guide.read_text()]
    assert {Path(page).stem for page in pages} >= {"settings", "errors", "http-api", "metrics"}
    done = subprocess.run([sys.executable, "-m", "cogapp", "--check", *COG, *pages], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n`make docs` writes them"


def fields_of(model: type[BaseModel]) -> Iterator[str]:
    """Every name that may stand in ``inferway.toml``, tables included."""
    for name, field in model.model_fields.items():
        yield name
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from fields_of(inner)


def test_the_guide_shows_every_option_of_a_model_and_none_that_is_refused() -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```", "".join(g.read_text() for g in GUIDES), re.MULTILINE | re.DOTALL)
    for block in blocks:
        parse_options(block)
    assert {key for block in blocks for key in keys_of(tomllib.loads(block))} >= set(fields_of(ModelOptions))


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def test_every_public_name_of_the_client_is_in_its_guide() -> None:
    guide = (ROOT / "docs" / "sdk.md").read_text()
    assert [name for name in inferway.__all__ if not re.search(rf"\b{name}\b", guide)] == []


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as a Markdown viewer makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(text: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", re.sub(r"\n", " ", text.read_text())):
        path, _, anchor = link.partition("#")
        target = (text.parent / path).resolve() if path else text
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_guide_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\((docs/[\w-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {str(guide.relative_to(ROOT)) for guide in (ROOT / "docs").glob("*.md")}


def test_the_changelog_speaks_of_the_version_that_the_package_has() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## (Unreleased|{re.escape(version)}\b)", changelog, re.MULTILINE)


def test_every_target_of_the_makefile_says_what_it_does() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    described = set(re.findall(r"^([a-z]+):.*## .+", makefile, re.MULTILINE))
    assert targets == described
    assert {"demo", "test"} <= targets
