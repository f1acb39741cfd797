"""The Trainer's callback looks at the first batches by itself, and the training draws what it would have drawn."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from predictor.integrations.huggingface import FreezeCallback
from tests.predictor.integrations.test_huggingface import equal, make_bert, sentences
from tests.predictor.scripted import LookingScript


class Noted(Trainer):
    """Keeps its losses, as trainers with metrics of their own do."""

    metrics: list

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.metrics.append(float(loss.detach()))
        return loss


def run(folder, answers, data=None, wants=True, model=None, **options):
    """Train. Returns the trainer, the policy, and the weights."""
    policy = LookingScript(answers)
    policy.wants_look = wants
    callback = FreezeCallback(policy)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=3,
        learning_rate=0.01,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        **options,
    )
    trainer = Noted(model or make_bert(), arguments, train_dataset=data or sentences(), callbacks=[callback])
    trainer.metrics = []
    trainer.train()
    policy = callback.controller.policy
    return trainer, policy, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    "options", [{}, {"accelerator_config": {"use_seedable_sampler": False}}], ids=["own", "global"]
)
def test_it_looks_before_the_first_step_and_leaves_the_training_as_it_is(tmp_path, options):
    without = run(tmp_path, {}, wants=False, **options)
    trainer, policy, weights = run(tmp_path, {}, **options)
    assert len(policy.looks) == 1
    assert policy.looks[0].batches == 8
    assert equal(weights, without[2])
    assert trainer.metrics == without[0].metrics  # what it notes while looking is taken back


def test_what_froze_stands_still(tmp_path):
    _, policy, weights = run(tmp_path, {0: range(5)})
    before = make_bert().state_dict()
    assert (len(policy.looks), policy.counted) == (1, [True])
    assert torch.equal(
        weights["bert.embeddings.word_embeddings.weight"], before["bert.embeddings.word_embeddings.weight"]
    )
    assert not torch.equal(weights["classifier.weight"], before["classifier.weight"])


@pytest.mark.parametrize("smoothed", [0.0, 0.5])
def test_losses_are_those_that_the_trainer_computes(tmp_path, smoothed):
    looks = [run(tmp_path, {}, label_smoothing_factor=factor)[1].looks[0] for factor in (0.0, smoothed)]
    assert (looks[0] == looks[1]) == (smoothed == 0.0)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(sentences())


def test_a_stream_of_samples_is_not_looked_at(tmp_path, capsys):
    _, policy, _ = run(tmp_path, {}, data=Stream())
    assert policy.looks == []
    assert capsys.readouterr().out.count("no look at the first batches") == 1


class InTrainingOnly(torch.nn.Module):
    """Gives a loss in training alone."""

    def __init__(self):
        super().__init__()
        self.bert = make_bert()

    def forward(self, input_ids, labels=None):
        output = self.bert(input_ids=input_ids, labels=labels)
        return {"loss": output.loss} if self.training else {"logits": output.logits}


def test_a_model_without_a_loss_in_evaluation_mode_is_not_looked_at(tmp_path, capsys):
    _, policy, weights = run(tmp_path, {}, model=InTrainingOnly())
    assert policy.looks == []
    assert capsys.readouterr().out.count("no look at the first batches") == 1
    assert equal(weights, run(tmp_path, {}, model=InTrainingOnly(), wants=False)[2])
