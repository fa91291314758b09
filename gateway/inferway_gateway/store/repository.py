"""A model repository on disk, in the layout that Triton users have.

    ROOT/NAME/VERSION/model.onnx      external data beside it
    ROOT/NAME/model.onnx              a single version, taken as version 1
    ROOT/NAME/VERSION/pipeline.toml   in place of a model: a graph of others, see elsewhere.py
    ROOT/NAME/VERSION/remote.toml     in place of a model: one on other servers, see elsewhere.py
    ROOT/NAME/config.pbtxt            optional, see triton_config.py
    ROOT/NAME/inferway.toml           optional, see model_options.py
    ROOT/NAME/labels.txt              whatever label_filename says
    ROOT/NAME/warmup/FILE             whatever input_data_file says

Two rules hold for everything here. What is broken is reported on its own entry and disturbs no other model. And nothing
outside the repository is read: every path is resolved, symbolic links included, and must stay inside, so whoever may
write a configuration cannot have the server show him another file as "labels".

Source: Triton Inference Server, "Model Repository".
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, Final

from ..core.backend import Artifact
from ..core.catalog import LANGUAGE_FILE
from ..core.errors import ModelNotFoundError, VersionNotFoundError
from ..core.model_config import ModelConfig
from . import triton_config
from .elsewhere import ENSEMBLE_FILE, PIPELINE_FILE, REMOTE_FILE
from .model_options import apply_options, parse_options
from .triton_config import MAX_CONFIG_BYTES, ConfigError
from .triton_config import describe_config as describe_config

log = logging.getLogger(__name__)

NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""The contract's pattern of a model name."""

VERSION_PATTERN: Final = re.compile(r"[1-9][0-9]{0,17}")
"""Triton passes over folders that start with 0 or are no number; 18 digits fit its 64 bits."""

DEFAULT_FILE: Final = "model.onnx"
ONNX_FOLDER: Final = "onnx"
"""Where sentence-transformers and transformers.js put the graph, the rest of the model being one folder above."""
MAX_LABEL_BYTES: Final = 16 << 20
MAX_FILES: Final = 10_000
"""Files of one model that a scan looks at; more is a folder that was not meant to be a model."""


@dataclass(frozen=True, slots=True)
class RepositoryModel:
    """What the repository holds under one name.

    Attributes:
        versions: version to its ONNX file, or to what stands for one, ascending.
        config: as the files say; the default where ``error`` is set.
        error: why the model cannot be served, in words for the operator and without paths; None where it can.
        fingerprint: changes whenever any file of the model does.
        version_fingerprints: version to a value that changes whenever its own files or the configuration do.
        remark: what was read and had no effect; empty where nothing was.
        folder: the model's own; None where it could not be read.
    """

    name: str
    versions: Mapping[int, Path]
    config: ModelConfig
    error: str | None
    fingerprint: str
    version_fingerprints: Mapping[int, str] = field(default_factory=dict)
    remark: str = ""
    folder: Path | None = None

    def artifact(self, version: int) -> Artifact:
        """The files of one version, as a backend needs them.

        Raises:
            VersionNotFoundError: there is no such version.
        """
        path = self.versions.get(version)
        if path is None:
            raise VersionNotFoundError(f"Request for unknown model: '{self.name}' version {version} is not found")
        return Artifact(self.name, version, path, self.config, self.folder)


class ModelRepository:
    """One folder of models. What touches the disk blocks; no two calls may run at once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[str, RepositoryModel] = {}

    def scan(self) -> dict[str, RepositoryModel]:
        """Look at the folder again.

        A model none of whose files changed since the last scan keeps its entry, so that polling costs only the
        ``stat`` of each file.

        Returns:
            Every model by name, in order of name, the broken ones with ``error`` set.
        Raises:
            OSError: the folder itself is missing or cannot be read.
        """
        root = self._root.resolve(strict=True)
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        found: dict[str, RepositoryModel] = {}
        for name in names:
            known = self._models.get(name)
            found[name] = model = self._look(root, name, known)
            said = (known.error, known.remark) if known is not None else (None, "")
            if model.error is not None and model.error != said[0]:
                log.warning("model '%s' cannot be served: %s", name, model.error)
            elif model.remark and model.remark != said[1]:
                log.warning("model '%s': %s", name, model.remark)
        self._models = found
        return dict(found)

    def served_versions(self, model: RepositoryModel) -> tuple[int, ...]:
        """The versions that the model's version policy asks for, ascending; none where the model has an error."""
        if model.error is not None:
            return ()
        policy = model.config.version_policy
        versions = sorted(model.versions)
        if policy.kind == "all":
            return tuple(versions)
        if policy.kind == "specific":
            return tuple(version for version in versions if version in policy.specific)
        return tuple(versions[-policy.latest :])

    def artifact(self, name: str, version: int) -> Artifact:
        """The files of one version as the last scan found them.

        Raises:
            ModelNotFoundError, VersionNotFoundError: the last scan found no such model or version.
        """
        model = self._models.get(name)
        if model is None:
            raise ModelNotFoundError(f"Request for unknown model: '{name}' is not found")
        return model.artifact(version)

    def with_config(self, model: RepositoryModel, config: dict[str, Any]) -> RepositoryModel:
        """The model served under another configuration, for the repository extension's ``load`` with ``config``.

        Args:
            config: in Triton's JSON form. It takes the place of ``config.pbtxt``; ``inferway.toml`` still holds.
        Raises:
            ConfigError: it cannot be read, or asks for what cannot be done.
        """
        folder = ModelFolder(self._root.resolve(strict=True), model.name)
        message, remark = triton_config.parse_json(config)
        if triton_config.ENSEMBLE in (message.platform, model.config.platform):
            raise ConfigError("an ensemble is loaded as its files say")
        served, versions = _read(folder, message)
        tag = hashlib.sha256(repr(sorted(served.raw.items())).encode()).hexdigest()[:32]
        return replace(
            model,
            config=served,
            versions=versions,
            error=_lack(served, versions),
            remark=remark,
            fingerprint=f"{model.fingerprint}-{tag}",
            version_fingerprints={v: f"{model.version_fingerprints.get(v, '')}-{tag}" for v in versions},
        )

    def _look(self, root: Path, name: str, known: RepositoryModel | None) -> RepositoryModel:
        fingerprint = ""
        versions: Mapping[int, Path] = {}
        try:
            if NAME_PATTERN.fullmatch(name) is None:
                raise ConfigError(f"the folder's name must match {NAME_PATTERN.pattern}")
            folder = ModelFolder(root, name)
            parts = dict(_fingerprints(root, folder.path))
            fingerprint = _digest(*parts.values())
            if known is not None and known.fingerprint == fingerprint:
                return known
            versions = _find_versions(folder, DEFAULT_FILE)
            message, remark = read_message(folder)
            config, versions = _read(folder, message)
            own = {v: _digest(parts.get("", ""), parts.get(str(v), "")) for v in versions}
            lack = _lack(config, versions)
            return RepositoryModel(name, versions, config, lack, fingerprint, own, remark, folder.path)
        except ConfigError as error:
            return RepositoryModel(name, versions, ModelConfig(), str(error), fingerprint)
        except OSError as error:
            return RepositoryModel(name, versions, ModelConfig(), f"cannot be read: {error.strerror}", fingerprint)


class ModelFolder:
    """A model's folder, as the only way to files in it: each path is held against the repository's root."""

    def __init__(self, root: Path, name: str) -> None:
        self._root = root
        self.path = (root / name).resolve()
        self.name = name
        if not self.path.is_relative_to(root):
            raise ConfigError("the folder is a link that leads out of the repository")

    def find(self, what: str, *parts: str) -> Path | None:
        """The regular file of that relative path, resolved; None where there is none.

        Raises:
            ConfigError: the path leaves the model's folder, a link leaves the repository, or it is no regular file.
        """
        if any("\0" in part or "\\" in part for part in parts):
            raise ConfigError(f"{what} is no file name")
        inside = self.path.joinpath(*parts)
        if not Path(os.path.normpath(inside)).is_relative_to(self.path):
            raise ConfigError(f"{what} must lie in the model's folder")
        path = inside.resolve()
        if not path.is_relative_to(self._root):
            raise ConfigError(f"{what} is a link that leads out of the repository")
        if not path.exists():
            return None
        if not path.is_file():
            raise ConfigError(f"{what} is not a regular file")
        return path

    def read_text(self, name: str, limit: int) -> str | None:
        """The text of a file, or None where there is none; ``limit`` bounds its bytes."""
        path = self.find(name, name)
        if path is None:
            return None
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise ConfigError(f"{name} is larger than {limit} bytes")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None

    def read_labels(self, name: str) -> tuple[str, ...]:
        text = self.read_text(name, MAX_LABEL_BYTES)
        if text is None:
            raise ConfigError(f"label file '{name}' is missing")
        return tuple(line.rstrip("\r") for line in text.removesuffix("\n").split("\n"))

    def find_warmup_file(self, name: str) -> str:
        path = self.find(f"warm-up file '{name}'", "warmup", name)
        if path is None:
            raise ConfigError(f"warm-up file '{name}' is missing")
        return str(path)


def read_message(folder: ModelFolder) -> tuple[Any, str]:
    text = folder.read_text("config.pbtxt", MAX_CONFIG_BYTES)
    try:
        return triton_config.parse_text(text or "")
    except ConfigError as error:
        raise ConfigError(f"config.pbtxt: {error}") from None


def _read(folder: ModelFolder, message: Any) -> tuple[ModelConfig, dict[int, Path]]:
    try:
        config = triton_config.to_model_config(message, folder.name, folder.read_labels, folder.find_warmup_file)
    except ConfigError as error:
        raise ConfigError(f"config.pbtxt: {error}") from None
    text = folder.read_text("inferway.toml", MAX_CONFIG_BYTES)
    if text is not None:
        try:
            config = apply_options(config, parse_options(text))
        except ConfigError as error:
            raise ConfigError(f"inferway.toml: {error}") from None
    if config.platform == triton_config.ENSEMBLE:
        return config, _find_ensemble_versions(folder)
    return config, _find_versions(folder, message.default_model_filename or DEFAULT_FILE)


def _find_ensemble_versions(folder: ModelFolder) -> dict[int, Path]:
    """An ensemble's configuration is all there is of it, for each version that has a folder, which is empty."""
    path = folder.find(ENSEMBLE_FILE, ENSEMBLE_FILE)
    if path is None:
        raise ConfigError(f"an ensemble must be configured in its {ENSEMBLE_FILE}")
    with os.scandir(folder.path) as entries:
        names = [entry.name for entry in entries if VERSION_PATTERN.fullmatch(entry.name) and entry.is_dir()]
    return {int(name): path for name in sorted(names, key=int)}


def _find_versions(folder: ModelFolder, file_name: str) -> dict[int, Path]:
    found: dict[int, Path] = {}
    with os.scandir(folder.path) as entries:
        names = [entry.name for entry in entries if VERSION_PATTERN.fullmatch(entry.name) and entry.is_dir()]
    for name in sorted(names, key=int):
        path = _find_language(folder, name) or _find_model(folder, file_name, name) or _find_elsewhere(folder, name)
        if path is not None:
            found[int(name)] = path
    if not names:
        path = _find_language(folder) or _find_model(folder, file_name) or _find_elsewhere(folder)
        if path is not None:
            found[1] = path
    return found


def _find_model(folder: ModelFolder, file_name: str, *version: str) -> Path | None:
    where = (*version, file_name)
    if folder.path.joinpath(*where).is_dir():
        # A model with external data may be a folder of the model's name that holds a file of that name.
        where = (*where, file_name)
    path = folder.find("/".join(where), *where)
    if path is None:
        where = (*version, ONNX_FOLDER, file_name)
        path = folder.find("/".join(where), *where)
    return path


def _find_language(folder: ModelFolder, *version: str) -> Path | None:
    """What says that the model beside it writes text."""
    return folder.find("/".join((*version, LANGUAGE_FILE)), *version, LANGUAGE_FILE)


def _find_elsewhere(folder: ModelFolder, *version: str) -> Path | None:
    """What stands for a model in a version that has none of its own."""
    for file_name in (PIPELINE_FILE, REMOTE_FILE):
        path = folder.find("/".join((*version, file_name)), *version, file_name)
        if path is not None:
            return path
    return None


def _lack(config: ModelConfig, versions: Mapping[int, Path]) -> str | None:
    if not versions:
        return "no version: expected a folder such as 1 with a model.onnx in it"
    policy = config.version_policy
    if policy.kind == "specific" and not set(policy.specific) & set(versions):
        return f"version_policy asks for versions {list(policy.specific)}, there are {sorted(versions)}"
    return None


def _fingerprints(root: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """A digest for each entry of the folder that is a folder itself, and under "" one for the files beside them.

    Files are compared by name, size, modification time and inode, so replacing one by a rename is noticed even where
    the modification time was kept. Warm-up and label files count as configuration: they go under "" too.
    """
    budget = MAX_FILES
    loose: list[str] = []
    with os.scandir(folder) as entries:
        top = sorted(entries, key=lambda entry: entry.name)
    for entry in top:
        path = Path(entry.path)
        if entry.is_symlink() and not path.resolve().is_relative_to(root):
            # Nothing behind it is ever read, so nothing behind it counts.
            facts = [f"{path}|outside"]
        else:
            facts = list(_facts(path, budget))
        budget -= len(facts)
        if VERSION_PATTERN.fullmatch(entry.name):
            yield entry.name, _digest(*facts)
        else:
            loose += facts
    yield "", _digest(*loose)


def _facts(path: Path, budget: int) -> Iterator[str]:
    """Name, size, time and inode of a file, or of each file under a folder; links are followed to what they mean."""
    waiting = [path]
    while waiting:
        here = waiting.pop()
        budget -= 1
        if budget < 0:
            raise ConfigError(f"the folder holds more than {MAX_FILES} files")
        try:
            status = here.stat()
        except OSError as error:
            # A dangling link, or a file that went away while looking.
            yield f"{here}|{error.errno}"
            continue
        if S_ISDIR(status.st_mode) and not (here.is_symlink() and here != path):
            with os.scandir(here) as entries:
                waiting += sorted((Path(entry.path) for entry in entries), reverse=True)
        elif S_ISREG(status.st_mode):
            yield f"{here}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
        else:
            yield f"{here}|{status.st_mode}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()[:32]
