"""Files are written whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from predictor.errors import FileFault, UsageError
from predictor.shared.files import append_json_line, held, read_json_lines, write_json, written_whole

CHECKOUT = Path(__file__).parents[3]


def test_a_block_that_ends_well_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        with written_whole(path) as part:
            part.write_text(text)
        assert path.read_text() == text
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half():
        with written_whole(path) as part:
            part.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_full_disk_is_said_with_the_cure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileFault, match=r"file\.json: cannot be written \(No space left on device\): the disk is full"):
        write_json(tmp_path / "file.json", {"a": 1})
    with pytest.raises(FileFault, match="the disk is full"):
        append_json_line(tmp_path / "rows.jsonl", {"a": 1})
    assert not (tmp_path / "file.json").exists()


def test_a_folder_that_is_a_file_is_said_with_the_cure(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(FileFault, match="choose another place with --out"):
        write_json(tmp_path / "taken" / "file.json", {})


def test_lines_are_appended_and_a_line_cut_short_by_a_kill_costs_only_itself(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_json_line(path, {"row": 1})
    with path.open("a") as file:
        file.write('{"row": 2, "cut')
    append_json_line(path, {"row": 3})
    assert read_json_lines(path) == [{"row": 1}, {"row": 3}]
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_a_place_is_held_by_one_process_and_let_go_of_when_it_is_killed(tmp_path):
    lock = tmp_path / ".lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom predictor.shared.files import held\n"
        f"with held(Path({str(lock)!r}), 'nobody'):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="another tune is at work there"), held(lock, "another tune"):
            pass
    finally:
        other.kill()
        other.communicate()
    with held(lock, "another tune"):
        pass


def test_a_lock_where_none_can_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(FileFault, match="choose another place with --out"), held(tmp_path / "taken" / ".lock", "x"):
        pass
