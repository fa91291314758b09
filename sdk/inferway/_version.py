"""The one place in the SDK that knows its version; a test holds it against `pyproject.toml`."""

__version__ = "0.1.0"
