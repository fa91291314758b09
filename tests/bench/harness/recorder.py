"""A proxy for one connection at a time that writes down what went through, to repeat it byte for byte."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from harness.load import Connection, Reply


@dataclass(frozen=True, slots=True)
class Exchange:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    reply: Reply


@dataclass(slots=True)
class Recorder:
    """``port`` to send to instead; ``seen`` in the order in which the answers came."""

    port: int
    seen: list[Exchange] = field(default_factory=list)


@contextlib.contextmanager
def recording(port: int) -> Iterator[Recorder]:
    """Pass everything on to ``port`` of this machine."""
    listener = socket.create_server(("127.0.0.1", 0))
    recorder = Recorder(listener.getsockname()[1])

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_serve, args=(client, port, recorder), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield recorder
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def _serve(client: socket.socket, port: int, recorder: Recorder) -> None:
    upstream = Connection(port)
    stream = client.makefile("rb")
    with client, contextlib.closing(upstream), contextlib.suppress(ConnectionError):
        while line := stream.readline():
            method, path, _ = line.decode("latin-1").split()
            head, headers = line, {}
            while (line := stream.readline()) not in (b"\r\n", b""):
                head += line
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
            body = stream.read(int(headers.get("content-length", 0)))
            answer = bytes(upstream.exchange(head + b"\r\n" + body))
            recorder.seen.append(Exchange(method, path, headers, body, Connection.parse(answer)))
            client.sendall(answer)
