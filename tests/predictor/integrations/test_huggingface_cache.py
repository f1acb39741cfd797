"""The feature cache in the Trainer: real trainings of a tiny BERT, whose samples have ids."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments

from predictor.errors import UsageError
from predictor.integrations.huggingface import FreezeCallback
from tests.predictor.counted import alike
from tests.predictor.integrations.test_huggingface import FRONT, StopAt, make_bert, sentences
from tests.predictor.scripted import LookingScript, Script


def make_trainer(folder, callback, numbered=True, stop=None, **options):
    data = [{**row, "sample_id": index} if numbered else row for index, row in enumerate(sentences())]
    settings = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",  # Adam makes full steps of a gradient that is zero but for rounding
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "remove_unused_columns": False,
        **options,
    }
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    callbacks = [callback, *([StopAt(stop)] if stop else [])]
    return Trainer(make_bert(), arguments, train_dataset=data, eval_dataset=data[:5], callbacks=callbacks)


def test_a_cached_training_is_the_same_and_skips_the_frozen_prefix(tmp_path):
    # Both evaluate: a loader that is begun takes a random number. The seed is set when a Trainer is made.
    plain = make_trainer(tmp_path, FreezeCallback(Script({0: FRONT})), numbered=False, eval_strategy="epoch")
    plain.train()
    callback = FreezeCallback(Script({0: FRONT}), ids="sample_id")
    cached = make_trainer(tmp_path, callback, eval_strategy="epoch")
    cached.train()
    assert (callback.cache.hits, callback.cache.misses, callback.cache.reason) == (12, 6, "")
    assert all(map(alike, plain.model.state_dict().values(), cached.model.state_dict().values()))
    assert callback.cache.bytes == 0
    assert not cached.model._forward_pre_hooks
    assert not any("forward" in vars(module) for name, module in cached.model.named_modules() if name)


def test_what_a_first_look_freezes_is_cached(tmp_path):
    callback = FreezeCallback(LookingScript({0: FRONT}), ids="sample_id")
    trainer = make_trainer(tmp_path, callback, num_train_epochs=2)
    trainer.train()
    assert len(callback.controller.policy.looks) == 1
    assert (callback.cache.hits, callback.cache.misses, callback.cache.reason) == (6, 6, "")


def test_a_resumed_training_fills_its_cache_anew(tmp_path):
    made = {"ids": "sample_id", "memory_gb": 1.0}
    make_trainer(tmp_path, FreezeCallback("static", share=0.5, **made), stop=6).train()
    callback = FreezeCallback("static", share=0.5, **made)
    trainer = make_trainer(tmp_path, callback, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    (used,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, FreezeCallback))
    assert (used.cache.hits, used.cache.misses) == (6, 6)


def test_flops_are_reported_though_the_model_has_no_argument_for_ids(tmp_path, capsys):
    callback = FreezeCallback("static", share=0.5, ids="sample_id")
    trainer = make_trainer(tmp_path, callback)
    forward = trainer.model.forward

    def strict(input_ids, labels=None, num_items_in_batch=None):
        return forward(input_ids=input_ids, labels=labels)

    trainer.model.forward = strict
    trainer.train()
    assert "of a full one's FLOPs" in capsys.readouterr().out
    assert callback.cache.hits


def test_samples_without_ids_are_refused(tmp_path):
    callback = FreezeCallback("static", share=0.5, ids="sample_id")
    with pytest.raises(UsageError, match="called in training without 'sample_id'"):
        make_trainer(tmp_path, callback, numbered=False).train()
    with pytest.raises(UsageError, match="remove_unused_columns=False"):
        make_trainer(tmp_path, callback, remove_unused_columns=True).train()


def test_settings_beside_a_policy_that_is_made_are_refused():
    with pytest.raises(UsageError, match="front: settings go with a policy's name"):
        FreezeCallback(Script({}), front=0.4)


def test_a_copy_of_the_model_has_no_part_in_the_cache(tmp_path):
    copies = []

    class Copying(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            copies.append(copy.deepcopy(model))

    callback = FreezeCallback("static", share=0.5, ids="sample_id")
    trainer = make_trainer(tmp_path, callback)
    trainer.add_callback(Copying())
    trainer.train()
    hits = callback.cache.hits
    for model in (copies[-1], pickle.loads(pickle.dumps(copies[-1]))):
        model.train()
        model(input_ids=torch.ones(2, 6, dtype=torch.long), sample_id=torch.arange(2))
    assert callback.cache.hits == hits


def test_activations_that_are_checkpointed_are_computed_from_whole_inputs(tmp_path):
    plain = make_trainer(tmp_path, FreezeCallback(Script({0: FRONT})), numbered=False)
    plain.train()
    # The prefix ends inside the first block, which the backward pass computes once more.
    callback = FreezeCallback(Script({0: FRONT}), ids="sample_id")
    fields = TrainingArguments.__dataclass_fields__
    option = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    cached = make_trainer(tmp_path, callback, **{option: True, f"{option}_kwargs": {"use_reentrant": False}})
    cached.train()
    assert "activations are checkpointed" in callback.cache.reason
    assert all(map(alike, plain.model.state_dict().values(), cached.model.state_dict().values()))


def test_a_pass_that_was_interrupted_is_over_at_the_next(tmp_path):
    callback = FreezeCallback("static", share=0.5, ids="sample_id")
    trainer = make_trainer(tmp_path, callback)
    calls = 0

    def interrupt(module, args):
        nonlocal calls
        calls += module.training
        if module.training and calls == 9:
            raise KeyboardInterrupt

    trainer.model.classifier.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert callback.cache.hits == 12


def test_a_pass_that_fails_leaves_nothing_behind(tmp_path):
    callback = FreezeCallback("static", share=0.5, ids="sample_id")
    trainer = make_trainer(tmp_path, callback)
    trainer.train_dataset[7]["labels"] = 99  # no class
    with pytest.raises(IndexError):
        trainer.train()
    assert not any("forward" in vars(module) for name, module in trainer.model.named_modules() if name)
    trainer.train_dataset[7]["labels"] = 1
    trainer.train()
    assert not trainer.model._forward_pre_hooks
    assert torch.isfinite(torch.cat([p.flatten() for p in trainer.model.parameters()])).all()
