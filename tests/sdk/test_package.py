"""What goes along with a model, and what does not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.linear_model import LinearRegression

import models
from inferway import ConfigurationError, _package
from inferway._package import Package, Source, pack


def content(source: Source, offset: int = 0) -> bytes:
    return b"".join(bytes(piece) for piece in source.pieces(offset))


def contents(package: Package) -> dict[str, bytes]:
    return {source.path: content(source) for source in package.sources}


def write(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


# --- files and bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["str", "Path", "bytes", "bytearray", "proto"])
def test_a_model_is_the_same_in_every_form(tmp_path: Path, kind: str) -> None:
    data = onnx.load_model_from_string(models.add_one()).SerializeToString(deterministic=True)
    path = tmp_path / "churn-final (2).onnx"
    path.write_bytes(data)
    forms: dict[str, Any] = {
        "str": str(path),
        "Path": path,
        "bytes": data,
        "bytearray": bytearray(data),
        "proto": onnx.load_model_from_string(data),
    }
    package = pack(forms[kind])
    assert contents(package) == {"model.onnx": data}
    assert package.size == len(data)
    assert package.signature is not None
    assert [spec.name for spec in package.signature.inputs] == ["x"]


def test_the_files_that_hold_a_models_weights_go_along(tmp_path: Path) -> None:
    model, weights = models.external_data(location="weights/w.bin")
    write(tmp_path, net_dot_onnx=model, weights__w_dot_bin=weights, other_dot_bin=b"not named")
    assert contents(pack(tmp_path / "net.onnx")) == {"model.onnx": model, "weights/w.bin": weights}


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "a/../../secret", "a\\b", "", ".hidden", "a\x00b"])
def test_weights_outside_of_the_models_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "in"
    write(folder, net_dot_onnx=models.external_data(location=location)[0])
    (tmp_path / "secret").write_bytes(b"secret")
    for what in (folder / "net.onnx", folder):
        with pytest.raises(ConfigurationError, match="not a path within the model's own folder"):
            pack(what)


def test_weights_behind_a_link_that_leads_out_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder, net_dot_onnx=models.external_data(location="w.bin")[0])
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "w.bin").symlink_to("../secret")
    with pytest.raises(ConfigurationError, match="a link that leads out"):
        pack(folder / "net.onnx")


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, net_dot_onnx=models.external_data(location="w.bin")[0])
    for what in (tmp_path / "net.onnx", tmp_path):
        with pytest.raises(ConfigurationError, match=r"keeps weights in 'w\.bin', and .* has no such file"):
            pack(what)


def test_bytes_cannot_bring_weights_files_along() -> None:
    model, _ = models.external_data()
    with pytest.raises(ConfigurationError, match="deploy its path"):
        pack(model)


@pytest.mark.parametrize("data", [b"", b"text"], ids=["empty", "text"])
def test_what_is_no_model_is_refused_by_its_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "net.onnx").write_bytes(data)
    with pytest.raises(ConfigurationError, match=r"net\.onnx (is empty|cannot be read as an ONNX model)"):
        pack(tmp_path / "net.onnx")
    with pytest.raises(ConfigurationError, match="the bytes cannot be read as an ONNX model"):
        pack(data)


@pytest.mark.parametrize("model", [None, 5, ["model.onnx"], np.zeros(3)], ids=["None", "int", "list", "array"])
def test_what_is_no_model_at_all_is_refused_by_its_type(model: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"got {type(model).__name__}"):
        pack(model)


def test_a_model_of_a_framework_says_how_it_becomes_one_of_onnx() -> None:
    class Forest(LinearRegression):  # type: ignore[misc]  # scikit-learn ships no types
        """Of the user's own module, by its name."""

    for model in (LinearRegression(), Forest()):
        with pytest.raises(ConfigurationError, match=r"got \w+: export it first, with inferway\.to_onnx\(model, "):
            pack(model)


def test_a_path_without_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="and there is none"):
        pack(tmp_path / "nothing.onnx")


# --- folders -----------------------------------------------------------------------------------------------------


def test_every_file_of_a_folder_goes_along_but_hidden_ones(tmp_path: Path) -> None:
    model, weights = models.external_data(location="data/w.bin")
    write(
        tmp_path, model_dot_onnx=model, data__w_dot_bin=weights, inferway_dot_toml=b"", labels_dot_txt=b"a\nb\n",
        _dot_DS_Store=b"x", _dot_git__config=b"x", __pycache____a_dot_pyc=b"x",
    )  # fmt: skip
    (tmp_path / "__pycache__").mkdir()
    package = pack(tmp_path)
    assert list(contents(package)) == ["data/w.bin", "inferway.toml", "labels.txt", "model.onnx"]
    assert set(package.left_out) == {".DS_Store", ".git", "__pycache__"}


def test_a_folder_with_one_onnx_file_of_any_name_is_a_model(tmp_path: Path) -> None:
    write(tmp_path, net_dot_onnx=models.add_one())
    package = pack(tmp_path)
    assert list(contents(package)) == ["net.onnx"]
    assert package.signature is not None


def test_a_folder_with_several_models_says_which_name_is_taken(tmp_path: Path) -> None:
    write(tmp_path, a_dot_onnx=models.add_one(), b_dot_onnx=models.add_one())
    with pytest.raises(ConfigurationError, match=r"expected one model, found 'a\.onnx', 'b\.onnx'"):
        pack(tmp_path)


def test_a_folder_of_a_repository_gives_its_one_version(tmp_path: Path) -> None:
    write(tmp_path, config_dot_pbtxt=b"max_batch_size: 4", labels_dot_txt=b"a")
    write(tmp_path / "3", model_dot_onnx=models.add_one())
    package = pack(tmp_path)
    assert list(contents(package)) == ["config.pbtxt", "labels.txt", "model.onnx"]
    assert package.left_out == ()


def test_of_several_versions_the_one_that_is_asked_for_goes_along(tmp_path: Path) -> None:
    write(tmp_path / "1", model_dot_onnx=models.add_one())
    write(tmp_path / "2", model_dot_onnx=models.add_one(increment=2.0))
    package = pack(tmp_path, 2)
    assert contents(package) == {"model.onnx": models.add_one(increment=2.0)}
    assert package.left_out == ("1/",)
    for version in (None, 3):
        with pytest.raises(ConfigurationError, match="holds the versions 1, 2"):
            pack(tmp_path, version)


def test_a_file_in_a_version_and_beside_it_is_refused(tmp_path: Path) -> None:
    write(tmp_path, labels_dot_txt=b"a")
    write(tmp_path / "1", model_dot_onnx=models.add_one(), labels_dot_txt=b"b")
    with pytest.raises(ConfigurationError, match=r"'labels\.txt' twice"):
        pack(tmp_path)


@pytest.mark.parametrize("definition", ["pipeline.toml", "remote.toml"])
def test_a_definition_in_the_place_of_a_model_is_enough(tmp_path: Path, definition: str) -> None:
    (tmp_path / definition).write_text("")
    package = pack(tmp_path)
    assert list(contents(package)) == [definition]
    assert package.signature is None


def test_a_folder_without_a_model_says_what_was_expected(tmp_path: Path) -> None:
    write(tmp_path, readme_dot_txt=b"")
    with pytest.raises(ConfigurationError, match=r"expected model\.onnx, one other \.onnx file"):
        pack(tmp_path)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_a_folder_of_transformers_says_how_it_becomes_a_model(tmp_path: Path, weights: str) -> None:
    for name in ("config.json", "tokenizer.json", weights):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ConfigurationError, match=rf"holds no model.*{weights} is exported.*models\.builder -i"):
        pack(tmp_path)


def test_a_link_within_the_folder_is_followed_and_one_out_of_it_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", model_dot_onnx=models.add_one())
    (folder / "same.txt").symlink_to("model.onnx")
    assert contents(pack(folder))["same.txt"] == models.add_one()
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "out.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigurationError, match=r"out\.txt is a link that leads out"):
        pack(folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: os.mkfifo(folder / "pipe"), "neither a file nor a folder"),
        (lambda folder: (folder / "gone").symlink_to("nowhere"), "leads nowhere"),
        (lambda folder: (folder / "loop").symlink_to("."), "a link to a folder"),
        (lambda folder: (folder / "näme.txt").write_bytes(b""), "cannot be the name of a model's file"),
    ],
    ids=["fifo", "dangling", "folder", "name"],
)
def test_what_is_no_plain_file_is_refused(tmp_path: Path, make: Any, words: str) -> None:
    write(tmp_path, model_dot_onnx=models.add_one())
    make(tmp_path)
    with pytest.raises(ConfigurationError, match=words):
        pack(tmp_path)


def test_a_large_file_that_no_model_names_is_refused(tmp_path: Path) -> None:
    write(tmp_path, model_dot_onnx=models.external_data(location="w.bin")[0])
    for name in ("w.bin", "checkpoint.pt"):
        with (tmp_path / name).open("wb") as opened:
            opened.truncate(_package.LARGE_BYTES)
    with pytest.raises(ConfigurationError, match=r"checkpoint\.pt has 67108864 bytes and no model"):
        pack(tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    assert set(pack(tmp_path).by_path) == {"model.onnx", "w.bin"}


def test_too_many_files_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_package, "MAX_FILES", 3)
    write(tmp_path, model_dot_onnx=models.add_one(), a=b"", b=b"")
    assert len(pack(tmp_path).sources) == 3
    write(tmp_path, c=b"")
    with pytest.raises(ConfigurationError, match="more than 3 files"):
        pack(tmp_path)


def test_a_second_file_of_the_same_path_is_refused(tmp_path: Path) -> None:
    package = pack(models.add_one()).with_file("golden.json", b"{}")
    assert contents(package)["golden.json"] == b"{}"
    with pytest.raises(ConfigurationError, match=r"a golden\.json of its own"):
        package.with_file("golden.json", b"{}")


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_file_is_read_from_any_place_in_pieces_of_a_mebibyte(tmp_path: Path) -> None:
    model, _ = models.external_data(location="w.bin")
    data = np.random.default_rng(0).bytes(2_500_000)
    write(tmp_path, net_dot_onnx=model, w_dot_bin=data)
    source = pack(tmp_path / "net.onnx").by_path["w.bin"]
    assert [len(piece) for piece in source.pieces()] == [1048576, 1048576, 402848]
    for offset in (0, 1, 1048576, 2_499_999, 2_500_000):
        assert content(source, offset) == data[offset:]


def test_a_file_that_became_shorter_is_not_sent_as_if_it_were_whole(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(models.add_one())
    source = pack(path).sources[0]
    path.write_bytes(b"short")
    with pytest.raises(ConfigurationError, match="became shorter"):
        content(source)
    path.unlink()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        content(source)


# --- a ModelProto that is too large for a message ---------------------------------------------------------------


def large_proto() -> onnx.ModelProto:
    """y = (x @ a + b) @ c with weights in every form that a TensorProto has, and a text that has no raw form."""
    generator = np.random.default_rng(0)
    a, c = (generator.normal(size=(40, 40)).astype(np.float32) for _ in range(2))
    b = generator.normal(size=400).astype(np.float32)
    initializers = [
        numpy_helper.from_array(a, "a"),
        helper.make_tensor("b", TensorProto.FLOAT, [400], b.tolist()),
        helper.make_tensor("half", TensorProto.FLOAT16, [800], np.arange(800, dtype=np.float16).tolist()),
        numpy_helper.from_array(c, "c"),
        numpy_helper.from_array(np.array([10], np.int64), "k"),
        TensorProto(name="words", data_type=TensorProto.STRING, dims=[2], string_data=[b"x" * 2000, b"y"]),
    ]
    nodes = [models.node("MatMul", ["x", "a"], ["h"]), models.node("MatMul", ["h", "c"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [models.value("x", models.F32, ["n", 40])], [models.value("y", models.F32, ["n", 40])], initializers
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", models.OPSET)], ir_version=models.IR_VERSION)
    made.metadata_props.add(key="author", value="me")
    made.doc_string = "a large model"
    return made


def test_a_proto_that_is_too_large_is_parted_into_graph_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_package, "PROTOBUF_LIMIT_BYTES", 4000)
    proto = large_proto()
    before = proto.SerializeToString(deterministic=True)
    package = pack(proto)
    assert proto.SerializeToString(deterministic=True) == before, "the caller's model must stay as it is"
    assert set(package.by_path) == {"model.onnx", "model.onnx.data"}
    for path, data in contents(package).items():
        (tmp_path / path).write_bytes(data)
        assert len(data) == package.by_path[path].size
    back = onnx.load(tmp_path / "model.onnx")
    for one, other in zip(proto.graph.initializer, back.graph.initializer, strict=True):
        assert one.name == other.name
        assert np.array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
    head = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    outside = {t.name: {e.key: e.value for e in t.external_data} for t in head.graph.initializer if t.external_data}
    assert set(outside) == {"a", "b", "half", "c"}
    assert all(int(entry["offset"]) % 4096 == 0 for entry in outside.values())
    del proto.graph.initializer[:], head.graph.initializer[:]
    assert head == proto
    assert package.signature is not None
    whole = content(package.by_path["model.onnx.data"])
    for offset in range(0, len(whole), 999):
        assert content(package.by_path["model.onnx.data"], offset) == whole[offset:]


def test_a_large_proto_without_its_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_package, "PROTOBUF_LIMIT_BYTES", 10)
    with pytest.raises(ConfigurationError, match="keeps weights in other files"):
        pack(onnx.load_model_from_string(models.external_data()[0]))


def test_a_proto_that_no_parting_makes_smaller_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_package, "PROTOBUF_LIMIT_BYTES", 1000)
    constant = helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(np.zeros(1000, np.float32)))
    graph = helper.make_graph([constant], "g", [], [models.value("y", models.F32, [1000])])
    with pytest.raises(ConfigurationError, match="longer than 2 GiB without its initializers"):
        pack(helper.make_model(graph))
    large = large_proto()
    large.graph.node.append(constant)
    with pytest.raises(ConfigurationError, match="longer than 2 GiB without its initializers"):
        pack(large)
