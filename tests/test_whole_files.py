"""Files and folders that appear when they are complete."""

import os
from pathlib import Path

import pytest

from diffusers_far.whole_files import written_whole


def test_a_file_takes_the_place_of_another_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("old")
    with written_whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    with written_whole(path) as partial:
        partial.mkdir()
        (partial / "a").write_text("1")
    assert os.listdir(path) == ["a"]
    with pytest.raises(OSError, match="not empty"), written_whole(path) as partial:
        partial.mkdir()
        (partial / "b").write_text("2")
    assert os.listdir(path) == ["a"]
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_nothing_is_left_after_an_exception(is_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "result"
    with pytest.raises(KeyboardInterrupt), written_whole(path) as partial:
        if is_folder:
            partial.mkdir()
            partial = partial / "inside"
        partial.write_text("half")
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    with written_whole(path) as first, written_whole(path) as second:
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1"  # whose turn to rename came last
    assert os.listdir(tmp_path) == ["shared"]
