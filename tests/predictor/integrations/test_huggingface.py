"""The Trainer's callback: real trainings of a tiny BERT that freeze, stop, resume and end equal."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from predictor import layers_of, make_policy
from predictor.errors import UsageError
from predictor.integrations.huggingface import FreezeCallback
from tests.predictor.scripted import WatchingScript
from tests.predictor.twins import run_both

STEPS = 8  # 24 sentences, two epochs; batches of 3, gradients of two added up


class StopAt(TrainerCallback):
    """Saves and stops, as a job that runs out of time."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.step


def make_bert(seed=0):
    torch.manual_seed(seed)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(
        BertConfig(vocab_size=16, max_position_embeddings=8, num_labels=2, **size)  # with dropout
    )


def sentences(count=24):
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 16, (count, 6), generator=draw)
    return [{"input_ids": row, "labels": int(row.sum()) % 2} for row in tokens]


def make_trainer(folder, callback, seed=0, stop=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        use_cpu=True,
        disable_tqdm=True,
        **{"report_to": [], "logging_strategy": "no", "save_strategy": "no", **options},
    )
    callbacks = [callback, *([StopAt(stop)] if stop else [])]
    data = sentences()
    return Trainer(make_bert(seed), arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def trained(trainer, **options):
    trainer.train(**options)
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


FRONT = frozenset(range(5))  # of the layers: embeddings, and what the first block begins with
ALL = range(len(layers_of(make_bert())))


def test_policies_are_asked_once_an_optimizer_step_while_gradients_stand(tmp_path):
    callback = FreezeCallback(WatchingScript({3: FRONT, 6: ()}))
    trained(make_trainer(tmp_path, callback))
    assert callback.controller.policy.observed == [(step, True) for step in range(1, STEPS + 1)]
    assert [str(event).split(":")[0] for event in callback.controller.history] == ["step 3", "step 6"]


def test_frozen_layers_stand_still_and_the_others_train(tmp_path):
    before = make_bert()
    callback = FreezeCallback(WatchingScript({0: FRONT}))
    trainer = make_trainer(tmp_path, callback)
    trained(trainer)
    frozen = {id(p) for index in FRONT for p in callback.controller.layers[index].parameters()}
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    held = {name for name, parameter in trainer.model.named_parameters() if id(parameter) in frozen}
    assert held
    for (name, then), now in zip(before.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(then, now) == (name in held), name
    # Frozen no earlier than training begins: the optimizer holds them all, and can train them later.
    assert in_optimizer == {id(p) for p in trainer.model.parameters()}


@pytest.mark.parametrize(("stop", "steps"), [(True, 5), (False, STEPS)])
def test_training_may_end_when_all_layers_are_frozen(stop, steps, tmp_path):
    trainer = make_trainer(tmp_path, FreezeCallback(WatchingScript({2: FRONT, 5: ALL}), stop=stop))
    trained(trainer)
    assert trainer.state.global_step == steps


def test_an_early_end_leaves_the_checkpoint_and_the_evaluation_of_an_end(tmp_path):
    answers = {2: FRONT, 5: ALL}
    often = {"save_strategy": "steps", "save_steps": 99, "eval_strategy": "steps", "eval_steps": 99}
    trainer = make_trainer(
        tmp_path, FreezeCallback(WatchingScript(answers), stop=True), load_best_model_at_end=True, **often
    )
    trained(trainer)
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [5]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-5")
    # Whoever wants the rest after all goes on from there. An evaluation draws random numbers, so all make that one.
    unbroken = FreezeCallback(WatchingScript(answers))
    expected = trained(make_trainer(tmp_path / "unbroken", unbroken, eval_strategy="steps", eval_steps=5))
    resumed = make_trainer(tmp_path, FreezeCallback(WatchingScript(answers)), seed=1)
    assert equal(expected, trained(resumed, resume_from_checkpoint=True))


@pytest.mark.parametrize(
    ("options", "evaluated", "saved"),
    [
        ({"eval_strategy": "steps", "eval_steps": 99, "eval_delay": 6}, [], []),
        ({"eval_strategy": "steps", "eval_steps": 5}, [5], []),  # once, though it was due
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, [4, 5], ["checkpoint-4", "checkpoint-5"]),
        ({}, [], []),
    ],
)
def test_an_early_end_evaluates_and_saves_no_more_than_an_end_would(options, evaluated, saved, tmp_path):
    trainer = make_trainer(tmp_path, FreezeCallback(WatchingScript({5: ALL}), stop=True), **options)
    trained(trainer)
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == evaluated
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == saved


@pytest.mark.parametrize("stop", [3, 5])
def test_resumed_equals_unbroken_bit_for_bit(stop, tmp_path):
    answers = {2: FRONT, 7: {0}}
    unbroken = FreezeCallback(WatchingScript(answers))
    expected = trained(make_trainer(tmp_path / "unbroken", unbroken))
    trained(make_trainer(tmp_path / "run", FreezeCallback(WatchingScript(answers)), stop=stop))
    resumed = FreezeCallback(WatchingScript(answers))
    trainer = make_trainer(tmp_path / "run", resumed, seed=1)
    assert equal(expected, trained(trainer, resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}")))
    assert resumed.controller.history == unbroken.controller.history
    assert resumed.controller.history[-1].frozen == (0,)


def test_a_policy_with_tensors_in_its_state_resumes_too(tmp_path, make_predictor_file):
    def policy():
        return make_policy("smartfrz", predictor=make_predictor_file(), prefix=False)

    unbroken = FreezeCallback(policy())
    expected = trained(make_trainer(tmp_path / "unbroken", unbroken))
    stop = unbroken.controller.history[0].step
    assert stop > 0
    trained(make_trainer(tmp_path / "run", FreezeCallback(policy()), stop=stop))
    trainer = make_trainer(tmp_path / "run", FreezeCallback(policy()), seed=1)
    assert equal(expected, trained(trainer, resume_from_checkpoint=True))


@pytest.mark.parametrize("name", ["linear", "smartfrz"])
def test_by_name_it_is_remade_when_the_trainer_restores_callbacks(name, tmp_path, make_predictor_file):
    settings = {"linear": {"start": 0.25, "level": 0.5}, "smartfrz": {"predictor": make_predictor_file()}}

    def make(seed=0, **options):
        callback = FreezeCallback(name, **settings[name])
        return make_trainer(tmp_path, callback, seed, restore_callback_states_from_checkpoint=True, **options)

    expected = trained(make())
    trained(make(stop=5))
    trainer = make(seed=1)
    assert equal(expected, trained(trainer, resume_from_checkpoint=True))
    remade = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, FreezeCallback)]
    assert len(remade) == 1
    assert remade[0].controller.history[-1].frozen


def test_made_of_an_object_it_says_that_it_cannot_be_remade(tmp_path):
    def make(**options):
        callback = FreezeCallback(make_policy("static"))
        return make_trainer(tmp_path, callback, restore_callback_states_from_checkpoint=True, **options)

    trained(make(stop=2))
    with pytest.raises(UsageError, match="name the policy"):
        trained(make(), resume_from_checkpoint=True)


def test_a_checkpoint_from_before_the_callback_is_refused(tmp_path):
    trained(make_trainer(tmp_path, TrainerCallback(), stop=2))
    with pytest.raises(UsageError, match="checkpoint at step 2 was written without this callback"):
        trained(make_trainer(tmp_path, FreezeCallback(make_policy("static"))), resume_from_checkpoint=True)


def test_the_state_in_the_checkpoint_is_json(tmp_path):
    trained(make_trainer(tmp_path, FreezeCallback(WatchingScript({1: {0}})), stop=2))
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["FreezeCallback"]["attributes"]["_saved"]


def test_one_callback_serves_one_training_after_another(tmp_path):
    callback = FreezeCallback(WatchingScript({2: FRONT}))
    first = trained(make_trainer(tmp_path, callback))
    trainer = make_trainer(tmp_path, callback)
    assert equal(first, trained(trainer))
    assert set(callback.controller.history[-1].frozen) == FRONT
    # The model is let go when training ends, and trains on as a whole.
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


class Interrupt(TrainerCallback):
    """Ctrl-C in a notebook."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_what_an_interrupted_training_left_frozen_is_warned_of_until_it_is_released(tmp_path):
    trainer = make_trainer(tmp_path, FreezeCallback(WatchingScript({2: FRONT})))
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()

    def again():
        other = make_trainer(tmp_path, FreezeCallback(WatchingScript({})))
        other.model = other.model_wrapped = trainer.model
        trained(other)

    with pytest.warns(UserWarning, match="5 of 16 layers, the first .*, were left frozen by an earlier controller"):
        again()
    freezing = next(c for c in trainer.callback_handler.callbacks if isinstance(c, FreezeCallback))
    freezing.controller.release()
    again()


def test_layers_can_be_named(tmp_path):
    callback = FreezeCallback(
        make_policy("static", layers=1),
        layers=lambda model: layers_of(model, patterns=["bert.embeddings*", "*.layer.0*"]),
    )
    trained(make_trainer(tmp_path, callback))
    assert [layer.name for layer in callback.controller.layers] == ["bert.embeddings*", "*.layer.0*"]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # the name it had for years
def test_checkpointing_works_and_the_reentrant_kind_is_refused(tmp_path):
    def make(reentrant):
        callback = FreezeCallback(WatchingScript({0: FRONT}))
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        return make_trainer(tmp_path, callback, gradient_checkpointing=True, **options)

    expected = trained(make_trainer(tmp_path, FreezeCallback(WatchingScript({0: FRONT}))))
    assert equal(expected, trained(make(reentrant=False)))
    with pytest.raises(UsageError, match="checkpoint with use_reentrant=False"):
        trained(make(reentrant=True))


def test_a_share_of_the_steps_is_refused():
    with pytest.raises(UsageError, match=r"takes a share of 0\.5 of the steps"):
        FreezeCallback("shorter", budget=0.5)


@pytest.mark.parametrize(("name", "option"), [("shorter", {"schedule": "linear"}), ("stopped", {"cooldown": 0.2})])
def test_another_schedule_is_refused(name, option):
    with pytest.raises(UsageError, match="give the trainer that schedule"):
        FreezeCallback(name, budget=1.0, **option)


def one_of_two(folder):
    """What one of two processes under DDP sees; the second's policy wants something else."""
    main = os.environ["RANK"] == "0"
    callback = FreezeCallback(WatchingScript({0: {0}, 2: FRONT, 3: {0}} if main else {1: {1}}))
    trainer = make_trainer(folder, callback, ddp_backend="gloo", ddp_find_unused_parameters=True)
    weights = trained(trainer)
    frozen = [list(event.frozen) for event in callback.controller.history]
    try:
        trained(
            make_trainer(
                folder, FreezeCallback(WatchingScript({})), ddp_backend="gloo", ddp_find_unused_parameters=False
            )
        )
    except UsageError as error:
        torch.save({"weights": weights, "frozen": frozen, "error": str(error)}, folder / f"seen-{main}.pt")


def test_two_processes_stay_in_step(tmp_path):
    run_both("tests.predictor.integrations.test_huggingface", tmp_path)
    first, second = (torch.load(tmp_path / f"seen-{main}.pt", weights_only=True) for main in (True, False))
    assert first["frozen"] == second["frozen"] == [[0], sorted(FRONT), [0]]
    assert equal(first["weights"], second["weights"])
    assert "ddp_find_unused_parameters=False: " in first["error"]
    assert "ddp_find_unused_parameters=True" in first["error"]


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))


def logged(folder):
    """(step, value) of each figure in TensorBoard's event files, by its name."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
@pytest.mark.parametrize(("dry_run", "group"), [(False, "freeze"), (True, "freeze_dry_run")])
def test_the_freezing_is_logged_where_the_trainer_logs(dry_run, group, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    callback = FreezeCallback(WatchingScript({0: {0}, 2: FRONT, 5: ALL}), dry_run=dry_run)
    often = {"report_to": ["tensorboard"], "logging_strategy": "steps", "logging_steps": 4}
    trained(make_trainer(tmp_path, callback, **often))
    figures = logged(tmp_path)  # older Transformers have a folder of their own for it
    layers = dict(figures[f"train/{group}/frozen_layers"])
    assert layers == {1: 1, 2: len(FRONT), 4: len(FRONT), 5: len(ALL), 8: len(ALL)}
    assert dict(figures[f"train/{group}/saved_share"])[8] == pytest.approx(callback.controller.timeline.saved_share)
    assert 0 < dict(figures[f"train/{group}/step_flops_share"])[8] < 1


class WandbSpy(TrainerCallback):
    """Notes what goes to wandb, whose `log` is made anew when a run starts."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.rows = monkeypatch, []

    def on_train_begin(self, args, state, control, **kwargs):
        import wandb

        self.monkeypatch.setattr(wandb, "log", self.rows.append)


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_the_freezing_is_logged_to_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "disabled", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    callback, spy = FreezeCallback(WatchingScript({2: FRONT})), WandbSpy(monkeypatch)
    trainer = make_trainer(tmp_path, callback, report_to=["wandb"], logging_strategy="steps", logging_steps=4)
    trainer.add_callback(spy)
    trained(trainer)
    told = [row["train/global_step"] for row in spy.rows if row.get("train/freeze/frozen_layers") == len(FRONT)]
    assert set(told) == {2, 4, 8}


def test_a_dry_run_freezes_nothing_and_says_so(tmp_path, capsys):
    dry = trained(make_trainer(tmp_path, FreezeCallback(WatchingScript({2: FRONT, 5: ALL}), dry_run=True, stop=True)))
    assert equal(dry, trained(make_trainer(tmp_path, FreezeCallback("none"))))
    told = capsys.readouterr().out
    assert told.count("dry run of 8 steps") == 1
    assert "step 5: freeze" in told


def test_a_dry_run_is_remade_when_the_trainer_restores_callbacks(tmp_path):
    callback = FreezeCallback("linear", dry_run=True)
    assert FreezeCallback(**callback.state()["args"])._dry_run


def test_the_best_model_is_loaded_into_layers_that_train_again(tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    callback = FreezeCallback(WatchingScript({2: FRONT}))
    trainer = make_trainer(
        tmp_path, callback, load_best_model_at_end=True, metric_for_best_model="loss", neftune_noise_alpha=5.0, **often
    )
    trained(trainer)
    best = BertForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert equal(trainer.model.state_dict(), best.state_dict())
    trainer.predict(sentences())
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    trainer.model.train()
    assert all(module.training for module in trainer.model.modules())
