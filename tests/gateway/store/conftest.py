"""A PostgreSQL server and an S3 server of our own, and one database URL per kind of database."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

_NAMES = count(1)
_BUCKETS = count(1)


@dataclass
class PostgresServer:
    """A server on a Unix socket in its own directory, without durability."""

    binaries: Path
    directory: Path
    user: str | None
    """Who runs it: PostgreSQL refuses root."""

    def run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.binaries / program, *arguments],
            user=self.user,
            group=None if self.user is None else pwd.getpwnam(self.user).pw_gid,
            extra_groups=None if self.user is None else [],
            cwd=self.directory,
            env={"PATH": os.defpath, "LC_ALL": "C", "PGPASSFILE": "/nonexistent"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=60,
        )

    def create(self) -> None:
        data = str(self.directory / "data")
        self.run("initdb", "-D", data, "-U", "inferway", "--auth=trust", "-E", "UTF8", "--no-locale", "--no-sync")

    def control(self, *action: str) -> None:
        """``pg_ctl``: start, stop or restart, and wait until it is so."""
        options = f"-F -k {self.directory} -c listen_addresses='' -c max_connections=50 -c shared_buffers=16MB"
        log = str(self.directory / "log")
        start = [] if action[0] == "stop" else ["-o", options, "-l", log]
        self.run("pg_ctl", "-D", str(self.directory / "data"), "-w", *start, *action)

    def new_schema(self) -> str:
        """The URL of an empty schema of its own, which takes a hundredth of the time of a database."""
        name = f"keys_{next(_NAMES)}"
        with psycopg.connect(
            host=str(self.directory), user="inferway", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
        return f"postgresql://inferway@/postgres?host={self.directory}&options=-csearch_path%3D{name}"

    def stop(self) -> None:
        """Let the server and every process of it hang, until ``resume``."""
        processes = self._processes()
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        # The signal was sent by now, which is not to say that it has arrived.
        end = time.monotonic() + 10
        while any(_state(pid) != "T" for pid in processes):
            assert time.monotonic() < end
            os.sched_yield()

    def resume(self) -> None:
        for pid in self._processes():
            os.kill(pid, signal.SIGCONT)

    def _processes(self) -> list[int]:
        main = int((self.directory / "data" / "postmaster.pid").read_text().split("\n", 1)[0])
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        return [main, *map(int, children)]


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    candidates = [*versions, *([Path(found).resolve()] if found else [])]
    return candidates[-1].parent if candidates else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running server. Where PostgreSQL is not installed, tests are skipped, or fail if services are required."""
    binaries = _binaries()
    if binaries is None:
        words = "no PostgreSQL server is installed (initdb is neither in /usr/lib/postgresql/*/bin nor on the PATH)"
        if os.environ.get("INFERWAY_REQUIRE_SERVICES") == "1":
            pytest.fail(words)
        pytest.skip(words)
    # Not pytest's own directory: another user could not reach what is below it. Short, for the socket's sake.
    directory = Path(tempfile.mkdtemp(prefix="inferway-pg-"))
    user = None
    if os.geteuid() == 0:
        known = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in known else "nobody"
        entry = pwd.getpwnam(user)
        os.chown(directory, entry.pw_uid, entry.pw_gid)
    server = PostgresServer(binaries, directory, user)
    try:
        server.create()
        server.control("start")
        try:
            yield server
        finally:
            server.control("stop", "-m", "immediate")
    finally:
        shutil.rmtree(directory)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/inferway.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_schema()


@dataclass
class S3Server:
    """A real server of S3's protocol, in a process of its own."""

    url: str
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < end
                assert process.poll() is None
                time.sleep(0.05)
        yield S3Server(f"http://127.0.0.1:{port}", process)
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place in the store."""
    name = f"bucket-{next(_BUCKETS)}"
    urllib.request.urlopen(urllib.request.Request(f"{s3.url}/{name}", method="PUT"), timeout=10).close()
    for variable, value in (
        ("AWS_ACCESS_KEY_ID", "somebody"),
        ("AWS_SECRET_ACCESS_KEY", "something"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", s3.url),
        ("AWS_ALLOW_HTTP", "true"),
    ):
        monkeypatch.setenv(variable, value)
    return f"s3://{name}/some/prefix"
