"""The Trainer's callback records real trainings of a tiny BERT, and goes on from the Trainer's checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from collect.recording.huggingface import RecordingCallback
from data.trajectories import Trajectory, open_trajectories
from predictor.errors import UsageError
from predictor.integrations.huggingface import FreezeCallback
from predictor.model.sampling import SampleSpec
from tests.predictor.scripted import Script

SPEC = SampleSpec(weights=16, snapshots=4)
STEPS = 8  # 24 sentences, two epochs; batches of 3, gradients of two added up


class StopAt(TrainerCallback):  # type: ignore[misc]
    """Saves and stops, as a job that runs out of time."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


def make_bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=16, max_position_embeddings=8, num_labels=2, **size))


def sentences(count: int = 24) -> list[dict[str, Any]]:
    tokens = torch.randint(1, 16, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int(row.sum()) % 2} for row in tokens]


def probe() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.stack([row["input_ids"] for row in sentences(8)])}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(folder: Path, *callbacks: TrainerCallback, seed: int = 0, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=3,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"gradient_accumulation_steps": 2, "save_strategy": "no", "logging_strategy": "no", **options},
    )
    data = sentences()
    return Trainer(
        make_bert(seed),
        arguments,
        train_dataset=data,
        eval_dataset=data,
        callbacks=list(callbacks),
        compute_metrics=accuracy,
    )


def recorded(path: Path | None) -> Trajectory:
    assert path is not None
    with open_trajectories(path) as file:
        (run,) = list(file)
    return run


def test_a_training_is_recorded_with_losses_gradients_and_figures(tmp_path: Path) -> None:
    losses = []

    class Losses(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            losses.extend([kwargs["logs"]["loss"]] if "loss" in kwargs["logs"] else [])

    callback = RecordingCallback(tmp_path / "out", probe(), sampling=SPEC, source="sentences")
    often = {"eval_strategy": "epoch", "logging_strategy": "steps", "logging_steps": 4}
    trainer = make_trainer(tmp_path, callback, Losses(), gradient_accumulation_steps=1, **often)
    trainer.train()
    run = recorded(callback.path)
    assert run.step_T.tolist() == [0, 4, 8, 12, 16]
    assert run.lr_T == pytest.approx([0.01 * (1 - max(step - 1, 0) / 16) for step in run.step_T])
    assert run.loss_T[1:] == pytest.approx(losses, abs=1e-3)
    assert np.isfinite(run.gradient_norm_TL[1:]).all()
    assert np.isfinite(run.similarity_TL).mean() > 0.9
    assert run.outcome["final_accuracy"] == trainer.state.log_history[-2]["eval_accuracy"]
    assert run.config["family"] == "BertForSequenceClassification"
    assert not trainer.model._forward_hooks


def test_recording_changes_no_number_of_the_training(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([RecordingCallback(tmp_path / "out", probe(), sampling=SPEC)], []):
        trainer = make_trainer(tmp_path, *callbacks)
        trainer.train()
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("stop", [3, 4])
def test_resumed_equals_unbroken(tmp_path: Path, stop: int) -> None:
    def make() -> RecordingCallback:
        return RecordingCallback(tmp_path / "one.h5", probe(), sampling=SPEC)

    unbroken, broken, resumed = make(), make(), make()
    make_trainer(tmp_path / "unbroken", unbroken).train()
    theirs = recorded(unbroken.path)
    (tmp_path / "one.h5").unlink()
    with pytest.warns(UserWarning, match=f"ended at step {stop}"):
        make_trainer(tmp_path / "run", broken, StopAt(stop)).train()
    stopped = recorded(broken.path).run_id
    make_trainer(tmp_path / "run", resumed, seed=1).train(resume_from_checkpoint=True)
    ours = recorded(resumed.path)
    assert ours.run_id == stopped
    for name in ("step_T", "lr_T", "loss_T", "weights_TLK"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
    np.testing.assert_allclose(ours.similarity_TL, theirs.similarity_TL, atol=1e-5)


def test_a_checkpoint_from_before_the_callback_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, StopAt(3)).train()
    trainer = make_trainer(tmp_path, RecordingCallback(tmp_path / "out", probe()))
    with pytest.raises(UsageError, match="checkpoint at step 3"):
        trainer.train(resume_from_checkpoint=True)


def test_the_best_model_that_is_loaded_at_the_end_is_not_the_final_one(tmp_path: Path) -> None:
    callback = RecordingCallback(tmp_path / "out", probe(), sampling=SPEC)
    often = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 2}
    trainer = make_trainer(tmp_path, callback, EarlyStoppingCallback(99), **often, **best)
    weights = []
    trainer.add_callback(Keep(weights))
    trainer.train()
    run = recorded(callback.path)
    assert run.step_T[-1] == STEPS
    assert run.similarity_TL[-1][np.isfinite(run.similarity_TL[-1])] == pytest.approx(1.0)
    assert np.isin(run.weights_TLK[-1, 0], weights[-1]).all()


class Keep(TrainerCallback):  # type: ignore[misc]
    def __init__(self, weights: list[Any]) -> None:
        self.weights = weights

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in kwargs["model"].parameters()]).numpy().copy())


def test_one_callback_records_several_trainings_and_beside_freezing(tmp_path: Path) -> None:
    callback = RecordingCallback(tmp_path / "out", probe(), sampling=SPEC)
    for _ in range(2):
        make_trainer(tmp_path, callback, FreezeCallback(Script({4: {0, 1}}))).train()
    assert len(list((tmp_path / "out" / "runs").glob("*.h5"))) == 2
    assert np.isnan(recorded(callback.path).gradient_norm_TL[-1, 0])


def test_restoring_callbacks_is_refused_with_the_cure(tmp_path: Path) -> None:
    callback = RecordingCallback(tmp_path / "out", probe(), sampling=SPEC)
    with pytest.warns(UserWarning, match="ended at step 3"):
        make_trainer(tmp_path, callback, StopAt(3)).train()
    resumed = RecordingCallback(tmp_path / "out", probe(), sampling=SPEC)
    trainer = make_trainer(tmp_path, resumed, restore_callback_states_from_checkpoint=True)
    with pytest.raises(UsageError, match="restore_callback_states_from_checkpoint=True"):
        trainer.train(resume_from_checkpoint=True)
