"""The command line: arguments to settings, settings to a running gateway.

``inferway serve`` and ``inferway keys`` need the extra ``[gateway]``; without it they say so and how to get it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__


def _parser() -> tuple[argparse.ArgumentParser, Any]:
    parser = argparse.ArgumentParser(prog="inferway", description="Serve ONNX models, and manage who may call them.")
    parser.add_argument("--version", action="version", version=f"inferway {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model repository",
        description="Serve every model of a directory laid out as NAME/VERSION/model.onnx. "
        "Each option can also be set in the environment, as INFERWAY_ and its name in capitals.",
    )
    serve.add_argument("model_dir", type=Path, nargs="?", metavar="DIR", help="the model repository")
    serve.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on, 0 for a free one (default 8080)")
    serve.add_argument("--no-auth", dest="auth", action="store_false", default=None, help="ask for no API key")
    serve.add_argument(
        "--insecure", action="store_true", default=None, help="allow other machines to connect without API keys"
    )
    serve.add_argument("--server-name", help="name in the server's metadata (default inferway)")
    serve.add_argument(
        "--model-control",
        choices=("none", "explicit", "poll"),
        help="none: load all at start; explicit: load on request; poll: follow the directory (default none)",
    )
    serve.add_argument("--load-model", dest="load_models", action="append", metavar="NAME", help="explicit: load it")
    serve.add_argument("--poll-interval-s", type=float, help="seconds between two looks at the directory (default 5)")
    serve.add_argument(
        "--strict-readiness",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="ready only when every model is (default yes)",
    )
    serve.add_argument("--state-dir", type=Path, help="directory of the database and the pepper")
    serve.add_argument("--database-url", help="SQLAlchemy URL, for example postgresql+psycopg://user@host/db")
    serve.add_argument("--cpus", type=int, help="runner threads (default: processors this process may use)")
    serve.add_argument("--providers", help="execution providers in order of preference, comma separated")
    serve.add_argument(
        "--trial-budget-s",
        type=float,
        help="seconds for trying ONNX Runtime options on each model, 0: none (default 1)",
    )
    serve.add_argument("--access-log", action="store_true", default=None, help="write a record for each request")
    serve.add_argument("--log-format", choices=("auto", "json", "text"), help="how to write the log")
    serve.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="least severe record written")
    serve.set_defaults(run=_serve)
    return parser, commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed, 2 wrong arguments or a missing extra."""
    try:
        from .cli_keys import add_parser
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("inferway_gateway", "inferway_contract"):
            raise
        return _fail(f"this needs the gateway ({error.name} is not installed): pip install 'inferway[gateway]'", 2)
    parser, commands = _parser()
    add_parser(commands)
    args = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130


def _serve(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from .app import create_app
    from .http.application import is_inference
    from .http.logs import configure_logging
    from .server.policy import DrainPolicy, EdgeLimits
    from .server.serve import run
    from .settings import Settings

    chosen = {name: value for name, value in vars(args).items() if value is not None and name in Settings.model_fields}
    try:
        settings = Settings(**chosen)
    except ValidationError as error:
        return _fail("; ".join(f"{_option(e['loc'])}: {e['msg']}" for e in error.errors()), 2)
    if settings.model_dir is None:
        return _fail("expected a model repository: inferway serve DIR", 2)
    if not settings.model_dir.is_dir():
        return _fail(f"expected {settings.model_dir} to be a directory of models, and there is none", 2)
    configure_logging(settings.log_format, settings.log_level)
    app = create_app(settings)

    def ready(port: int) -> None:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"Inferway listens on http://{host}:{port}", file=sys.stderr, flush=True)

    try:
        run(
            app,
            host=settings.host,
            port=settings.port,
            limits=EdgeLimits(
                header_bytes=settings.header_limit_bytes,
                header_count=settings.header_limit_count,
                header_timeout_s=settings.header_timeout_s,
                body_bytes=settings.body_limit_bytes,
                body_timeout_s=settings.body_timeout_s,
                body_min_bytes_per_s=settings.body_min_rate,
                connections=settings.max_connections,
                keep_alive_s=settings.keep_alive_s,
            ),
            drain=DrainPolicy(delay_s=settings.drain_delay_s, timeout_s=settings.drain_timeout_s),
            on_drain=app.begin_drain,
            stats=app.edge_stats,
            fast=is_inference,
            ready=ready,
        )
    except OSError as error:
        return _fail(f"could not listen on {settings.host} port {settings.port}: {error.strerror or error}", 1)
    except SystemExit:
        return _fail(app.startup_problem, 1) if app.startup_problem is not None else 1
    return 0


def _option(location: Sequence[int | str]) -> str:
    return "--" + str(location[0]).replace("_", "-") if location else "settings"


def _fail(words: str, status: int) -> int:
    print(f"inferway: {words}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
