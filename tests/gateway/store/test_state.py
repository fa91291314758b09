"""The state directory and the pepper file."""

from __future__ import annotations

import os
import secrets
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inferway_gateway.core.keys import Peppers
from inferway_gateway.store.state import StateError, load_peppers, prepare_directory

SECRET = secrets.token_bytes(32)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "new" / "inferway"


class TestDirectory:
    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
    def test_is_made_for_its_owner_alone_whatever_the_umask(self, home: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            prepare_directory(home)
        finally:
            os.umask(before)
        assert _mode(home) == 0o700

    def test_that_is_there_is_left_as_it_is(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o755)
        prepare_directory(tmp_path)
        assert _mode(tmp_path) == 0o755

    @pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777, 0o720])
    def test_that_others_may_write_to_is_refused(self, tmp_path: Path, mode: int) -> None:
        tmp_path.chmod(mode)
        with pytest.raises(StateError, match="only its owner may write"):
            prepare_directory(tmp_path)

    def test_below_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StateError, match="cannot use"):
            prepare_directory(tmp_path / "file" / "state")


class TestPepperFile:
    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
    def test_is_made_private_at_first_use_and_kept(self, home: Path, umask: int) -> None:
        before = os.umask(umask)
        try:
            first = load_peppers(home)
        finally:
            os.umask(before)
        assert _mode(home / "pepper") == 0o600
        assert load_peppers(home).checks() == first.checks()
        assert [file.name for file in home.iterdir()] == ["pepper"]

    def test_differs_from_home_to_home(self, tmp_path: Path) -> None:
        assert load_peppers(tmp_path / "a").checks() != load_peppers(tmp_path / "b").checks()

    def test_is_one_for_all_who_start_at_once(self, home: Path) -> None:
        barrier = threading.Barrier(16)

        def start() -> bytes:
            barrier.wait(timeout=30)
            return load_peppers(home).checks()[1]

        with ThreadPoolExecutor(16) as threads:
            futures = [threads.submit(start) for _ in range(16)]
        assert len({future.result() for future in futures}) == 1
        assert [file.name for file in home.iterdir()] == ["pepper"]

    def test_with_several_versions_is_read(self, home: Path) -> None:
        prepare_directory(home)
        file = home / "pepper"
        file.write_text(f"1:{SECRET.hex()},2:{secrets.token_hex(32)}\n")
        file.chmod(0o600)
        peppers = load_peppers(home)
        assert peppers.current == 2
        assert peppers.checks()[1] == Peppers({1: SECRET}).checks()[1]

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o666, 0o610])
    def test_that_others_may_use_is_refused(self, home: Path, mode: int) -> None:
        load_peppers(home)
        (home / "pepper").chmod(mode)
        with pytest.raises(StateError, match="readable by its owner only"):
            load_peppers(home)

    def test_that_is_a_link_is_refused(self, home: Path, tmp_path: Path) -> None:
        load_peppers(tmp_path / "other")
        prepare_directory(home)
        (home / "pepper").symlink_to(tmp_path / "other" / "pepper")
        with pytest.raises(StateError, match="symbolic link"):
            load_peppers(home)

    def test_that_links_nowhere_is_refused(self, home: Path) -> None:
        prepare_directory(home)
        (home / "pepper").symlink_to(home / "nothing")
        with pytest.raises(StateError, match="symbolic link"):
            load_peppers(home)

    def test_that_is_no_file_is_refused_without_waiting_for_it(self, home: Path) -> None:
        prepare_directory(home)
        os.mkfifo(home / "pepper", 0o600)
        with pytest.raises(StateError, match="something else"):
            load_peppers(home)

    def test_that_is_a_directory_is_refused(self, home: Path) -> None:
        prepare_directory(home)
        (home / "pepper").mkdir(mode=0o700)
        with pytest.raises(StateError, match="something else"):
            load_peppers(home)

    def test_that_cannot_be_written_is_refused_and_leaves_nothing(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StateError, match="No space left"):
            load_peppers(home)
        assert list(home.iterdir()) == []

    def test_that_cannot_be_read_is_refused(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        load_peppers(home)

        def broken(*_: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "open", broken)
        with pytest.raises(StateError, match="Input/output error"):
            load_peppers(home)

    @pytest.mark.parametrize("text", ["", "\n", "short", "1:" + "ab" * 31, "ü" * 64, "0:" + "ab" * 32, "ab" * 10_000])
    def test_with_another_text_is_refused_without_quoting_it(self, home: Path, text: str) -> None:
        prepare_directory(home)
        file = home / "pepper"
        file.write_text(text, encoding="utf-8")
        file.chmod(0o600)
        with pytest.raises(StateError) as caught:
            load_peppers(home)
        assert str(file) in str(caught.value)
        assert not text.strip() or text.strip() not in str(caught.value)


class TestPepperSetting:
    def test_goes_before_the_file_which_is_not_made(self, home: Path) -> None:
        peppers = load_peppers(home, SECRET.hex())
        assert peppers.checks() == Peppers({1: SECRET}).checks()
        assert not home.exists()

    def test_of_another_form_is_refused_without_quoting_it(self, home: Path) -> None:
        with pytest.raises(StateError) as caught:
            load_peppers(home, "hunter2")
        assert "INFERWAY_KEY_PEPPER" in str(caught.value)
        assert "hunter2" not in str(caught.value) + repr(caught.value.__cause__)
