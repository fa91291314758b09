"""The process in which chat templates are rendered. Run as a program; it knows the standard library and jinja2.

A template is somebody's program. Jinja's sandbox keeps it from objects that it is not given, and nothing keeps it from
taking time and memory: so it runs here, where memory has a limit, no file can be written, and whoever waits for it ends
the process when its time is over.

Messages on the socket, both ways: four bytes of length, big-endian, and JSON. Asked: ``source``, ``variables``,
``limit`` (characters of the text). Answered: ``text``, or ``error`` in words and whether the template itself said so
(``said``).
"""

from __future__ import annotations

import datetime
import json
import resource
import socket
import sys
from collections import OrderedDict
from typing import Any, Final

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError, UndefinedError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES: Final = 512 * 1024 * 1024
TEMPLATES_KEPT: Final = 64
_SAID_CHARACTERS: Final = 500


class _SaidNoError(Exception):
    """The template called ``raise_exception``."""


class _Generation(Extension):
    """``{% generation %}`` marks an assistant's words for training; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes for HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise _SaidNoError(str(message)[:_SAID_CHARACTERS])


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(str(form)[:64])


def environment() -> ImmutableSandboxedEnvironment:
    """What templates of conversations expect to find."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
        autoescape=False,
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    return made


class Renderer:
    """Renders templates; keeps those that were compiled lately."""

    def __init__(self) -> None:
        self._environment = environment()
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def respond(self, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            template = self._template(asked["source"])
            text, left = [], asked["limit"]
            for piece in template.generate(**asked["variables"]):
                left -= len(piece)
                if left < 0:
                    return {"error": f"its text is longer than {asked['limit']} characters", "said": False}
                text.append(piece)
            return {"text": "".join(text)}
        except _SaidNoError as error:
            return {"error": str(error), "said": True}
        except TemplateSyntaxError as error:
            return {
                "error": f"it cannot be read, line {error.lineno}: {error.message}"[:_SAID_CHARACTERS],
                "said": False,
            }
        except SecurityError:
            return {"error": "it does what templates may not do", "said": False}
        except (UndefinedError, TemplateError) as error:
            return {"error": str(error)[:_SAID_CHARACTERS], "said": False}
        except MemoryError:
            return {"error": "it takes too much memory", "said": False}
        except Exception as error:  # whatever a foreign program does wrong is its answer
            return {"error": f"it failed with {type(error).__name__}", "said": False}

    def _template(self, source: str) -> Any:
        found = self._compiled.get(source)
        if found is None:
            found = self._compiled[source] = self._environment.from_string(source)
            if len(self._compiled) > TEMPLATES_KEPT:
                self._compiled.popitem(last=False)
        else:
            self._compiled.move_to_end(source)
        return found


def confine() -> None:
    """Take from this process what rendering does not need."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))


def main() -> None:
    renderer = Renderer()
    renderer.respond({"source": "{{ messages | tojson }}", "variables": {"messages": []}, "limit": 100})  # imports
    confine()
    with socket.socket(fileno=int(sys.argv[1])) as line, line.makefile("rwb") as stream:
        stream.write(b"\0")
        stream.flush()
        while len(head := stream.read(4)) == 4:
            asked = json.loads(stream.read(int.from_bytes(head, "big")))
            answer = json.dumps(renderer.respond(asked)).encode()
            stream.write(len(answer).to_bytes(4, "big") + answer)
            stream.flush()


if __name__ == "__main__":
    main()
