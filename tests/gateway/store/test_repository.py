"""Models on disk: what a scan finds, what it refuses, and that nothing broken or outside disturbs the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inferway_gateway.core.errors import ModelNotFoundError, VersionNotFoundError
from inferway_gateway.core.model_config import VersionPolicy
from inferway_gateway.store.repository import ModelRepository, RepositoryModel
from models import ModelFiles, add_one, add_sub, write_repository


def scan_one(path: Path, files: ModelFiles | bytes) -> RepositoryModel:
    write_repository(path, {"m": files})
    return ModelRepository(path).scan()["m"]


def test_a_model_without_configuration_is_served_as_its_newest_version(tmp_path: Path) -> None:
    repository = ModelRepository(write_repository(tmp_path, {"add": {1: add_one(), 2: add_one(), 10: add_one()}}))
    model = repository.scan()["add"]
    assert model.error is None
    assert list(model.versions) == [1, 2, 10]
    assert repository.served_versions(model) == (10,)
    artifact = repository.artifact("add", 2)
    assert (artifact.name, artifact.version) == ("add", 2)
    assert artifact.path.read_bytes() == add_one()


def test_a_model_file_without_version_folder_is_version_one(tmp_path: Path) -> None:
    (tmp_path / "add").mkdir()
    (tmp_path / "add" / "model.onnx").write_bytes(add_one())
    model = ModelRepository(tmp_path).scan()["add"]
    assert (model.error, list(model.versions)) == (None, [1])


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("latest { num_versions: 2 }", (2, 3)),
        ("latest { }", (3,)),
        ("all { }", (1, 2, 3)),
        ("specific { versions: [3, 1] }", (1, 3)),
        ("specific { versions: [1, 7] }", (1,)),
    ],
)
def test_the_version_policy_chooses_what_is_served(tmp_path: Path, policy: str, served: tuple[int, ...]) -> None:
    files = ModelFiles({n: add_one() for n in (1, 2, 3)}, config=f"version_policy: {{ {policy} }}")
    repository = ModelRepository(write_repository(tmp_path, {"m": files}))
    assert repository.served_versions(repository.scan()["m"]) == served


def test_a_policy_that_names_no_version_present_is_an_error_that_says_which_are(tmp_path: Path) -> None:
    model = scan_one(tmp_path, ModelFiles({1: add_one()}, config="version_policy { specific { versions: 7 } }"))
    assert model.error == "version_policy asks for versions [7], there are [1]"


def test_folders_that_are_no_version_are_passed_over(tmp_path: Path) -> None:
    write_repository(tmp_path, {"m": {1: add_one()}})
    for name in ("0", "01", "latest", "-3", "1.5", "99999999999999999999"):
        (tmp_path / "m" / name).mkdir()
        (tmp_path / "m" / name / "model.onnx").write_bytes(add_one())
    (tmp_path / "m" / "2").mkdir()
    assert list(ModelRepository(tmp_path).scan()["m"].versions) == [1]


def test_a_configuration_may_name_another_file(tmp_path: Path) -> None:
    files = ModelFiles({}, config='default_model_filename: "net.onnx"', files={"4/net.onnx": add_one()})
    assert list(scan_one(tmp_path, files).versions) == [4]


def test_a_model_may_be_a_folder_that_holds_its_external_data(tmp_path: Path) -> None:
    files = ModelFiles({}, files={"1/model.onnx/model.onnx": add_one(), "1/model.onnx/model.onnx.data": b"x"})
    model = scan_one(tmp_path, files)
    assert model.versions[1] == (tmp_path / "m" / "1" / "model.onnx" / "model.onnx").resolve()


def test_broken_models_have_an_error_each_and_leave_the_others_alone(tmp_path: Path) -> None:
    write_repository(
        tmp_path,
        {
            "good": add_one(),
            "text": ModelFiles({1: add_one()}, config="max_batch_size: many"),
            "binary": ModelFiles({1: add_one()}, files={"config.pbtxt": b"\xff\xfe"}),
            "options": ModelFiles({1: add_one()}, toml="speed = 11"),
            "no toml": ModelFiles({1: add_one()}),
            "untoml": ModelFiles({1: add_one()}, toml="= 3"),
            "empty": ModelFiles({}),
            "named": ModelFiles({1: add_one()}, config='name: "other"'),
        },
    )
    repository = ModelRepository(tmp_path)
    models = repository.scan()
    errors = {name: model.error for name, model in models.items()}
    assert errors.pop("good") is None
    assert all(errors.values())
    assert "1:17" in str(errors["text"])
    assert "config.pbtxt is not UTF-8: invalid start byte at byte 0" in str(errors["binary"])
    assert str(errors["options"]).startswith("inferway.toml: speed is not known, expected one of run_timeout_s, ")
    assert str(errors["untoml"]).startswith("inferway.toml: not TOML")
    assert str(errors["no toml"]).startswith("the folder's name must match")
    assert str(errors["empty"]).startswith("no version")
    assert errors["named"] == "config.pbtxt: name is 'other', expected the folder's name 'named' or none"
    assert all(not repository.served_versions(model) for model in models.values() if model.error)
    assert not any(str(tmp_path) in str(error) for error in errors.values())


def test_hidden_folders_and_loose_files_are_no_models(tmp_path: Path) -> None:
    write_repository(tmp_path, {"m": add_one(), ".git": add_one()})
    (tmp_path / "README.md").write_text("models")
    assert list(ModelRepository(tmp_path).scan()) == ["m"]


def test_a_missing_repository_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ModelRepository(tmp_path / "none").scan()


def test_labels_are_read_in_order_and_only_from_the_models_folder(tmp_path: Path) -> None:
    output = 'output {{ name: "y" label_filename: "{}" }}'
    labels = b"cat\ndog\r\n\nfish\n"
    good = scan_one(tmp_path, ModelFiles({1: add_one()}, output.format("labels.txt"), files={"labels.txt": labels}))
    assert good.config.outputs[0].labels == ("cat", "dog", "", "fish")

    (tmp_path / "secret").write_text("secret")
    for name in ("../../secret", str(tmp_path / "secret"), "../other/labels.txt", "a/../../../secret"):
        model = scan_one(tmp_path, ModelFiles({}, output.format(name)))
        assert model.error == f"config.pbtxt: {name} must lie in the model's folder"
    missing = scan_one(tmp_path, ModelFiles({}, output.format("none.txt")))
    assert missing.error == "config.pbtxt: label file 'none.txt' is missing"


def test_links_may_lead_about_the_repository_and_not_out_of_it(tmp_path: Path) -> None:
    outside = write_repository(tmp_path / "outside", {"m": add_one()})
    (outside / "labels.txt").write_text("secret")
    root = write_repository(tmp_path / "root", {"m": add_one(), "file": ModelFiles({}), "labels": add_one()})
    (root / "folder").symlink_to(outside / "m")
    (root / "file" / "1").mkdir()
    (root / "file" / "1" / "model.onnx").symlink_to(outside / "m" / "1" / "model.onnx")
    (root / "labels" / "labels.txt").symlink_to(outside / "labels.txt")
    (root / "labels" / "config.pbtxt").write_text('output { name: "y" label_filename: "labels.txt" }')
    (root / "inside").symlink_to(root / "m")
    models = ModelRepository(root).scan()
    assert models["inside"].error is None
    for name in ("folder", "file", "labels"):
        assert "leads out of the repository" in str(models[name].error), name
    assert models["labels"].config.outputs == ()


def test_a_pipe_in_place_of_a_file_does_not_block_the_scan(tmp_path: Path) -> None:
    write_repository(tmp_path, {"m": add_one()})
    os.mkfifo(tmp_path / "m" / "config.pbtxt")
    assert ModelRepository(tmp_path).scan()["m"].error == "config.pbtxt is not a regular file"


def test_an_oversized_configuration_is_refused(tmp_path: Path) -> None:
    model = scan_one(tmp_path, ModelFiles({1: add_one()}, config="#" * (2 << 20)))
    assert model.error == "config.pbtxt is larger than 1048576 bytes"


def test_an_unchanged_model_keeps_its_entry_and_a_changed_one_does_not(tmp_path: Path) -> None:
    write_repository(tmp_path, {"a": {1: add_one(), 2: add_one()}, "b": add_one()})
    repository = ModelRepository(tmp_path)
    first = repository.scan()
    again = repository.scan()
    assert again["a"] is first["a"]
    assert again["b"] is first["b"]

    new = tmp_path / "new"
    new.write_bytes(add_sub())
    new.rename(tmp_path / "a" / "2" / "model.onnx")
    changed = repository.scan()
    assert changed["b"] is first["b"]
    assert changed["a"].fingerprint != first["a"].fingerprint
    assert changed["a"].version_fingerprints[1] == first["a"].version_fingerprints[1]
    assert changed["a"].version_fingerprints[2] != first["a"].version_fingerprints[2]


def test_a_rename_that_keeps_size_and_time_is_noticed(tmp_path: Path) -> None:
    write_repository(tmp_path, {"a": add_one()})
    repository = ModelRepository(tmp_path)
    before = repository.scan()["a"]
    path = tmp_path / "a" / "1" / "model.onnx"
    status = path.stat()
    new = tmp_path / "new"
    new.write_bytes(add_one(increment=2.0))
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert new.stat().st_size == status.st_size
    new.rename(path)
    assert repository.scan()["a"].fingerprint != before.fingerprint


def test_a_changed_configuration_changes_every_version(tmp_path: Path) -> None:
    write_repository(tmp_path, {"a": {1: add_one(), 2: add_one()}})
    repository = ModelRepository(tmp_path)
    before = repository.scan()["a"]
    (tmp_path / "a" / "config.pbtxt").write_text("max_batch_size: 4")
    after = repository.scan()["a"]
    assert after.config.max_batch_size == 4
    assert all(after.version_fingerprints[v] != before.version_fingerprints[v] for v in (1, 2))


def test_models_that_appear_and_go_are_seen_by_the_next_scan(tmp_path: Path) -> None:
    repository = ModelRepository(write_repository(tmp_path, {"a": add_one()}))
    assert list(repository.scan()) == ["a"]
    write_repository(tmp_path, {"b": add_one()})
    (tmp_path / "a").rename(tmp_path / ".a")
    assert list(repository.scan()) == ["b"]


def test_a_link_to_nothing_is_no_model_until_there_is_something(tmp_path: Path) -> None:
    write_repository(tmp_path, {"m": ModelFiles({})})
    (tmp_path / "m" / "1").mkdir()
    (tmp_path / "m" / "1" / "model.onnx").symlink_to(tmp_path / "m" / "real")
    repository = ModelRepository(tmp_path)
    assert "no version" in str(repository.scan()["m"].error)
    (tmp_path / "m" / "real").write_bytes(add_one())
    assert repository.scan()["m"].error is None


def test_a_folder_of_very_many_files_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferway_gateway.store.repository.MAX_FILES", 5)
    files = {f"1/{number}": b"" for number in range(6)}
    models = ModelRepository(write_repository(tmp_path, {"m": ModelFiles({1: add_one()}, files=files), "n": add_one()}))
    found = models.scan()
    assert found["m"].error == "the folder holds more than 5 files"
    assert found["n"].error is None


def test_a_warmup_file_is_found_in_the_warmup_folder(tmp_path: Path) -> None:
    config = """
        model_warmup { name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: 16 input_data_file: "data" } } }
    """
    files = ModelFiles({1: add_one()}, config)
    assert scan_one(tmp_path, files).error == "config.pbtxt: warm-up file 'data' is missing"
    model = scan_one(tmp_path, ModelFiles({1: add_one()}, config, files={"warmup/data": bytes(64)}))
    assert model.error is None
    assert Path(model.config.warmup[0].inputs[0].file).read_bytes() == bytes(64)


def test_unknown_names_and_versions_have_no_artifact(tmp_path: Path) -> None:
    repository = ModelRepository(write_repository(tmp_path, {"a": add_one()}))
    repository.scan()
    with pytest.raises(ModelNotFoundError):
        repository.artifact("b", 1)
    with pytest.raises(VersionNotFoundError):
        repository.artifact("a", 2)


def test_a_configuration_given_with_load_takes_the_place_of_the_file(tmp_path: Path) -> None:
    files = ModelFiles({1: add_one(), 2: add_one()}, config="max_batch_size: 4", toml="run_timeout_s = 2.0")
    repository = ModelRepository(write_repository(tmp_path, {"a": files}))
    model = repository.scan()["a"]
    served = repository.with_config(model, {"max_batch_size": 8, "version_policy": {"all": {}}})
    assert served.config.max_batch_size == 8
    assert served.config.version_policy == VersionPolicy("all")
    assert served.config.run_timeout_s == 2.0
    assert repository.served_versions(served) == (1, 2)
    assert served.version_fingerprints[1] != model.version_fingerprints[1]
    assert repository.with_config(model, {}).fingerprint != served.fingerprint


def test_a_field_of_a_newer_triton_is_reported_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repository = ModelRepository(
        write_repository(tmp_path, {"a": ModelFiles({1: add_one()}, config="max_batch_size: 4\nnew_in_2030 { x: 1 }")})
    )
    model = repository.scan()["a"]
    assert (model.error, model.config.max_batch_size) == (None, 4)
    assert "new_in_2030" in model.remark
    repository.scan()
    assert len([record for record in caplog.records if "new_in_2030" in record.getMessage()]) == 1
