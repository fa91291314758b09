"""The examples run as a newcomer runs them, in processes of their own, against the gateway that `make serve` leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
EXAMPLES: Final = ROOT / "examples"
START_TIMEOUT_S: Final = 180
RUN_TIMEOUT_S: Final = 300

ALONE: Final = {"INFERWAY_BASE_URL": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
"""Without a gateway that is configured."""
TENSORFLOW_NOISE: Final = r"^(WARNING: All log messages before|[IWE]0000 |To enable the following).*\n"
"""Keras imports TensorFlow where it is installed, on whichever backend it runs."""

pytestmark = pytest.mark.xdist_group("examples")


def run(name: str, *arguments: str, environment: dict[str, str] | None = None, noise: str | None = None) -> str:
    """What an example printed. ``noise``: lines of the standard error that are a library's."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert (done.stderr if noise is None else re.sub(noise, "", done.stderr, flags=re.MULTILINE)) == ""
    return done.stdout


@pytest.fixture(scope="module")
def serving() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`make serve`, and what it printed until it came to rest."""
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "demo.py"), "--serve"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("The key is shown"):
                break
        else:
            raise AssertionError("".join(printed))
        yield process, "".join(printed)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(START_TIMEOUT_S)
        process.stdout.close()


@pytest.fixture(scope="module")
def environment(serving: tuple[subprocess.Popen[str], str]) -> dict[str, str]:
    """The variables that `make serve` tells one to export."""
    return dict(re.findall(r"export (\w+)=(\S+)", serving[1]))


def test_the_demo_shows_three_models_answering_and_ends() -> None:
    printed = run("demo.py")
    assert re.search(r"A The cat sits on the mat\. +1\.00 +0\.56", printed)
    assert re.search(r"read as \d +read as \d +read as \d +read as \d, is \d", printed)
    accuracy = re.search(r"are read right: ([\d.]+)%", printed)
    assert accuracy is not None
    assert float(accuracy[1]) > 95
    assert re.search(r"smollm2 +version 1, +[\d.]+ MB, READY", printed)
    assert "smollm2: Photosynthesis is" in printed
    assert re.search(r"\d+ tokens, \d+ tokens/s, the first after \d+ ms", printed)
    assert "make serve" in printed
    assert all(len(line) <= 100 for line in printed.splitlines())


def test_serve_prints_how_to_call_it_and_shows_the_key_once(
    serving: tuple[subprocess.Popen[str], str], environment: dict[str, str]
) -> None:
    _, printed = serving
    assert set(environment) == {"INFERWAY_BASE_URL", "INFERWAY_API_KEY"}
    assert printed.count(environment["INFERWAY_API_KEY"]) == 1
    command = re.search(r"^ +(curl .*)$", printed, re.MULTILINE)
    assert command is not None
    done = subprocess.run(
        ["bash", "-c", command[1]],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )
    assert '"name":"digits"' in done.stdout


def test_the_search_finds_where_the_answers_are(environment: dict[str, str]) -> None:
    printed = run("search.py", environment=environment)
    assert re.search(r"[1-9]\d{2} paragraphs became vectors of 384 numbers", printed)
    answers = re.findall(r"\?  \(ranked by embedding\)\n  0\.\d\d  ([\w-]+)\.md:\d+", printed)
    assert len(answers) == 3
    assert "keys" in answers[0]


def test_the_search_reads_another_folder(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(
        "The wine is in the rack on the left, sorted by the year of its harvest.\n\n"
        "The key of the cellar hangs behind the kitchen door, under the calendar.\n"
    )
    printed = run("search.py", str(tmp_path), "How do I get into the basement?", environment=environment)
    assert re.search(r"2 paragraphs .*\n\nHow .*\n  0\.\d\d  notes.txt:3\n +The key of the cellar", printed)


def test_a_key_for_a_team_does_what_it_may_and_nothing_else(environment: dict[str, str]) -> None:
    printed = run("team_keys.py", environment=environment)
    assert "It sees ['digits']" in printed
    assert "minilm: 404, model_not_found" in printed
    assert "statistics: 403, permission_denied" in printed
    assert "both work: True" in printed
    assert "revoked: 401, unauthenticated" in printed


def test_a_canary_grows_and_a_bad_one_is_taken_back() -> None:
    printed = run("canary.py")
    assert "Each sees the same version again: True" in printed
    few = re.search(r"version 1 answers [\d.]+%, version 2 answers ([\d.]+)%", printed)
    assert few is not None
    assert 3 < float(few[1]) < 8
    assert "Who had version 2 still has it: True" in printed
    failed = re.search(r"Version 3 failed (\d+) of its \d+ requests; version 2 answered (\d+) of these", printed)
    assert failed is not None
    assert failed[1] == failed[2]
    assert re.search(r"auto_rolled_back +by gateway", printed)
    assert re.search(r"version 3 failed \d+ of \d+ requests, version 2 0 of \d+", " ".join(printed.split()))
    assert all(len(line) <= 100 for line in printed.splitlines())


def test_serve_ends_in_order_on_an_interrupt() -> None:
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "demo.py"), "--serve"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("The key is shown"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 0
    assert errors == ""


def test_facts_are_extracted_as_typed_objects(environment: dict[str, str]) -> None:
    printed = run("extract.py", environment=environment)
    assert "Person(name='Ada', age=36, city='London')" in printed
    assert printed.count("Person(") == 3
    assert re.search(r'pieces make \{"mood": "(glad|angry|neutral)"\}', printed)


def test_the_openai_package_speaks_to_the_gateway(environment: dict[str, str]) -> None:
    printed = run("openai_client.py", environment=environment)
    assert "models: digits, minilm, smollm2" in printed
    assert "The capital of France is Paris." in printed
    assert "Person(name='Ada', age=36, city='London')" in printed
    alike = re.search(r"alike: ([\d.]+)", printed)
    assert alike is not None
    assert float(alike[1]) > 0.4


@pytest.mark.slow
@pytest.mark.torch
def test_a_keras_model_is_trained_optimised_deployed_and_called() -> None:
    check_the_way(run("train_optimize_deploy.py", "--rows", "2000", environment=ALONE, noise=TENSORFLOW_NOISE), "torch")


@pytest.mark.slow
@pytest.mark.tensorflow
def test_the_same_way_leads_from_keras_on_tensorflow() -> None:
    environment = {**ALONE, "KERAS_BACKEND": "tensorflow"}
    printed = run("train_optimize_deploy.py", "--rows", "2000", environment=environment, noise=TENSORFLOW_NOISE)
    check_the_way(printed, "tensorflow")


def check_the_way(printed: str, backend: str) -> None:
    """What the founding example promises: it learns, is optimised, deployed, and answers as Keras does."""
    assert f"on {backend}, 2000 rows of 1000 numbers" in printed
    assert re.search(r"loss +[\d.]+ █[▁▂▃▄▅▆▇█]{9}", printed)
    assert re.search(r"^. static int8", printed, re.MULTILINE)
    assert "sequential version 1: succeeded" in printed
    same = re.search(r"500 rows went through the gateway and ([\d.]+)% of them", printed)
    assert same is not None
    assert float(same[1]) > 80  # a pruned model that was trained further decides some rows otherwise
    served = re.search(r"([\d.]+) to the optimised model run here", printed)
    assert served is not None
    assert float(served[1]) < 1e-4
    accuracy = re.search(r"Keras ([\d.]+), deployed ([\d.]+)", printed)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.7
    assert float(accuracy[2]) >= float(accuracy[1]) - 0.02
    rows = re.findall(r"^(before|after).*? (\d+) kB +[\d.]+ µs +[\d.]+ µs +([\d.]+)$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["before", "after"]
    assert float(rows[1][2]) >= float(rows[0][2]) - 0.01
