import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from collect.training import checkpoint as checkpoints
from collect.training.checkpoint import Checkpoint, CheckpointFault
from collect.training.loop import Hook, Training
from predictor.errors import FileFault
from tests.collect.tiny import Losses, PlainNet, break_off, run


def test_saves_come_when_they_are_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    now = 0.0

    class Ticking(Hook):
        def on_step(self, training: Training) -> None:
            nonlocal now
            now += 1.0

    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    save = Checkpoint.save

    def watched(self: Checkpoint, training: Training, hooks: Any) -> None:
        saved.append(training.step)
        save(self, training, hooks)

    monkeypatch.setattr(Checkpoint, "save", watched)
    run(Ticking(), path=tmp_path / "checkpoint", seconds=5)
    assert saved == [5, 10, 15]


def test_without_a_checkpoint_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(Losses())
    assert list(tmp_path.iterdir()) == []


# Bad files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    break_off(Losses(6), path=path)
    return path


def test_nothing_but_the_checkpoint_is_left(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("position", [30, 0.6, -1])
def test_a_flipped_bit(saved: Path, position: float) -> None:
    content = bytearray(saved.read_bytes())
    content[int(position * len(content)) if isinstance(position, float) else position] ^= 4
    saved.write_bytes(content)
    with pytest.raises(CheckpointFault, match="checkpoint: the checkpoint is damaged: remove the file"):
        run(Losses(), path=saved)


@pytest.mark.parametrize("length", [22, 54, -1])
def test_a_file_cut_short(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(CheckpointFault, match=r"checkpoint: .*damaged: remove the file"):
        run(Losses(), path=saved)


@pytest.mark.parametrize(
    "content", [b"", b"SmartFRZ checkpoint 0\n", b"not ours at all, and longer than the head of one"]
)
def test_something_else(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    with pytest.raises(CheckpointFault, match="is not a checkpoint of this version: remove the file"):
        run(Losses(), path=saved)


def test_a_hostile_file_runs_nothing(saved: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (saved.parent / "run",)

    for body in (pickle.dumps(Hostile(), protocol=2), _saved({"training": Hostile()}), _saved([1]), _saved({"a": 1})):
        digest = checkpoints.hashlib.sha256(body).digest()
        saved.write_bytes(checkpoints._MAGIC + digest + body)
        with pytest.raises(CheckpointFault, match="holds something else than a checkpoint"):
            run(Losses(), path=saved)
    assert not (saved.parent / "run").exists()


def _saved(content: Any) -> bytes:
    body = checkpoints.io.BytesIO()
    torch.save(content, body)
    return body.getvalue()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, r"another training, whose seed differs \(0 there, 1 here\): remove the file"),
        ({"lr": 0.04}, r"whose lr differs \(0\.05 there, 0\.04 here\)"),
        ({"epochs": 4}, r"whose epochs differs \(3\.0 there, 4\.0 here\)"),
    ],
)
def test_the_checkpoint_of_another_training(saved: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointFault, match=message):
        run(Losses(), path=saved, **settings)


def test_the_checkpoint_of_a_training_with_other_hooks(saved: Path) -> None:
    with pytest.raises(CheckpointFault, match=r"whose hooks differs \(\['Losses'\] there, \[\] here\)"):
        run(path=saved)


def test_the_checkpoint_of_another_network(saved: Path) -> None:
    with pytest.raises(CheckpointFault, match="another training, whose parameters differs: remove"):
        run(Losses(), path=saved, net=PlainNet)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileFault, match="cannot be written"):
        run(Losses(), path=tmp_path / "file" / "checkpoint")


def test_a_failed_save_keeps_the_one_before(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("predictor.shared.files.os.replace", full)
    with pytest.raises(FileFault, match="the disk is full"):
        run(Losses(), path=saved)
    assert saved.read_bytes() == before


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), {1}, torch.nn.Parameter(torch.zeros(1))])
def test_a_hooks_state_that_could_not_be_read_back_fails_at_once(value: Any, tmp_path: Path) -> None:
    class Odd(Hook):
        def state_dict(self) -> dict[str, Any]:
            return {"rows": [1, value]}

    with pytest.raises(TypeError, match=r"Odd\.state_dict\(\)\['rows'\]\[1\] is a .*: give tensors"):
        run(Odd(), path=tmp_path / "checkpoint")
