"""Data sieving: exchanges worked out by hand, the samples of whole trainings, and resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from collect.hooks.sieve import Sieve
from collect.training.loop import Hook, Training, train
from predictor.errors import FileFault, UsageError
from tests.collect.tiny import BrokenOff, Losses, PlainNet, Trace, same, tiny_source, tiny_workload, weights
from tests.collect.training.test_resume import assert_same


def run(*hooks: Hook, left_out: float = 0.5, path: Path | None = None, **recipe: Any) -> Training:
    """Three epochs of three steps of four samples, out of 24, where half of them are left out."""
    return train(
        tiny_workload(**recipe),
        seed=0,
        hooks=hooks,
        device="cpu",
        checkpoint=path,
        checkpoint_seconds=0,
        source=tiny_source(),
        left_out=left_out,
    )


class ByHand:
    """A sieve on eight samples, four of them left out; epochs end by hand, with answers made up."""

    def __init__(self, **options: Any) -> None:
        cpu = torch.device("cpu")
        self.training = Training(tiny_workload(batch_size=4), tiny_source(8), seed=0, device=cpu, left_out=0.5)
        self.training.total_steps = 100
        self.sieve = Sieve(**options)
        self.sieve.on_start(self.training)

    @property
    def among(self) -> list[int]:
        assert self.training.among is not None
        return self.training.among.tolist()

    @property
    def queue(self) -> list[int]:
        return self.sieve.samples.queue.tolist()

    def epoch(self, answers: dict[int, str]) -> None:
        """An epoch in which samples are looked at so often: r for right, w for wrong."""
        assert self.training.on_answers is not None
        for look in range(max(map(len, answers.values()))):
            seen = {name: answer[look] == "r" for name, answer in answers.items() if look < len(answer)}
            self.training.on_answers(torch.tensor(list(seen)), torch.tensor(list(seen.values())))
        self.training.step += self.training.steps_per_epoch
        self.sieve.on_step(self.training)


def test_the_easiest_go_to_the_tail_and_as_many_come_from_the_head() -> None:
    hand = ByHand()
    (a, b, c, d), (q, r, s, t) = hand.among, hand.queue
    assert sorted([a, b, c, d, q, r, s, t]) == list(range(8))
    # Forgotten: a never, b once, and it is right again. c never was right, and d is wrong at the end: the hardest.
    hand.epoch({a: "rr", b: "rwr", c: "ww", d: "rw"})
    assert hand.among == sorted([c, d, q, r])
    assert hand.queue == [s, t, a, b]
    # c is learned and forgotten once, d learned and forgotten twice, q is never right, r always.
    hand.epoch({c: "rwr", d: "rwrwr", q: "w", r: "r"})
    assert hand.among == sorted([d, q, s, t])
    assert hand.queue == [a, b, r, c]
    assert hand.sieve.figures == {"left_out": 4, "exchanges": 2}


def test_counts_begin_anew_with_each_interval_and_what_is_known_stays() -> None:
    hand = ByHand(moved=0.25)  # one of four
    (a, b, c, d), (q, r, s, _) = hand.among, hand.queue
    hand.epoch({a: "r", b: "rwr", c: "rwrwr", d: "w"})
    assert hand.queue[-1] == a
    # b's and c's events were of the interval before: now only b forgets. q comes in and is never right.
    hand.epoch({b: "wr", c: "r", d: "w", q: "w"})
    assert hand.queue[-1] == c
    hand.epoch({b: "r", d: "w", q: "w", r: "w"})
    assert hand.queue[-1] == b
    hand.epoch({d: "r", q: "w", r: "w", s: "w"})
    assert hand.queue == [a, c, b, d]
    hand.epoch({q: "r", r: "w", s: "w"})  # whoever waits longest comes first: a is back
    assert hand.queue == [c, b, d, q]
    # a was right when it left, and is wrong at its first look: forgotten once.
    hand.training.on_answers(torch.tensor([a]), torch.tensor([False]))
    assert hand.sieve.state_dict()["forgotten"][a] == 1
    hand.epoch({a: "r", r: "r", s: "w"})
    assert hand.queue == [b, d, q, r]


def test_an_interval_of_several_epochs() -> None:
    hand = ByHand(every=2)
    a, b, c, d = before = hand.among
    hand.epoch({a: "r", b: "r", c: "r", d: "r"})
    assert (hand.among, hand.sieve.samples.exchanges) == (before, 0)
    hand.epoch({a: "r", b: "wr", c: "r", d: "wr"})
    assert hand.sieve.samples.exchanges == 1
    assert set(hand.queue[-2:]) == {a, c}


def test_more_in_the_queue_than_in_the_epochs() -> None:
    cpu = torch.device("cpu")
    training = Training(tiny_workload(batch_size=2), tiny_source(8), seed=0, device=cpu, left_out=0.75)
    sieve = Sieve(moved=1.0)
    sieve.on_start(training)
    head, before = sieve.samples.queue[:2].tolist(), training.among
    training.step, training.total_steps = 1, 100
    sieve.on_step(training)
    assert training.among is not None
    assert before is not None
    assert training.among.tolist() == sorted(head)
    assert sorted(sieve.samples.queue[-2:].tolist()) == before.tolist()


class Seen(Hook):
    """Notes the ids of each epoch's batches."""

    def __init__(self, steps: int = 3) -> None:
        self.steps = steps
        self.epochs: list[list[int]] = []

    def on_start(self, training: Training) -> None:
        inner = training.on_answers

        def note(ids_B: Tensor, right_B: Tensor) -> None:
            if training.step % self.steps == 0:
                self.epochs.append([])
            self.epochs[-1] += ids_B.tolist()
            if inner is not None:
                inner(ids_B, right_B)

        training.on_answers = note


def test_epochs_go_through_the_samples_that_are_in_each_once() -> None:
    sieve, seen = Sieve(), Seen()
    among = Trace(lambda training: training.among.tolist() if training.among is not None else None)
    training = run(among, sieve, seen)
    assert (training.step, training.steps_per_epoch) == (9, 3)
    assert [sorted(epoch) for epoch in seen.epochs] == [among.at("start")[0], among.at("step")[3], among.at("step")[6]]
    first, second, third = (set(epoch) for epoch in seen.epochs)
    # Half of the twelve in the queue come in after each of the first two epochs; nothing is exchanged at the end.
    assert len(second - first) == 6
    assert len(third - second) == 6
    assert sieve.figures == {"left_out": 12, "exchanges": 2}
    assert len(first | second | third) == 24


def test_the_answers_are_those_of_the_training_itself() -> None:
    """With a learning rate of next to nothing they are the first weights' answers, epoch after epoch."""
    seen_right: dict[int, bool] = {}

    class Listen(Hook):
        def on_start(self, training: Training) -> None:
            training.on_answers = lambda ids_B, right_B: seen_right.update(
                zip(ids_B.tolist(), right_B.tolist(), strict=True)
            )

    training = run(Listen(), left_out=0.0, net=PlainNet, lr=1e-12)
    (_, x_BCHW, labels_B) = next(tiny_source().batches("train", 24, shuffle=False))
    with torch.no_grad():
        right_B = training.model(x_BCHW).argmax(1) == labels_B
    assert [seen_right[index] for index in range(24)] == right_B.tolist()
    assert {True, False} == set(seen_right.values())


def test_listening_changes_nothing() -> None:
    assert same(weights(run(Seen())), weights(run()))


def test_without_a_sieve_the_same_samples_stay_out() -> None:
    seen = Seen()
    training = run(seen)
    assert training.among is not None
    assert [sorted(epoch) for epoch in seen.epochs] == [training.among.tolist()] * 3


@pytest.mark.parametrize("breaks_at", [2, 3])
def test_a_sieved_training_resumes_bit_for_bit(breaks_at: int, tmp_path: Path) -> None:
    """Broken off inside an epoch, and in its last step, in which samples are exchanged."""
    recipe = {"accumulate": 1, "augment": True, "clip_norm": 0.5}
    whole = Sieve()
    expected = run(Losses(), whole, **recipe).state_dict()
    with pytest.raises(BrokenOff):
        run(Losses(breaks_at), Sieve(), path=tmp_path / "checkpoint", **recipe)
    resumed = Sieve()
    training = run(Losses(), resumed, path=tmp_path / "checkpoint", **recipe)
    assert_same(training.state_dict(), expected)
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize(("there", "here", "batch_size"), [(0.5, 0.4, 5), (0.0, 0.05, 20), (0.05, 0.0, 20)])
def test_the_checkpoint_of_a_training_with_other_samples(
    there: float, here: float, batch_size: int, tmp_path: Path
) -> None:
    """12 and 14 samples fill two steps of 5; 24 and 23 one step of 20."""
    settings: dict[str, Any] = {"path": tmp_path / "checkpoint", "batch_size": batch_size, "net": PlainNet}
    with pytest.raises(BrokenOff):
        run(Losses(2), left_out=there, **settings)
    with pytest.raises(FileFault, match="whose samples_an_epoch differs"):
        run(Losses(), left_out=here, **settings)


@pytest.mark.parametrize(
    ("options", "message"), [({"every": 0}, "every=0"), ({"moved": 0}, "moved=0"), ({"moved": 1.5}, "moved=1.5")]
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sieve(**options)


def test_nothing_to_sieve() -> None:
    with pytest.raises(UsageError, match=r"needs samples that are left out: give left_out, at least 0\.042"):
        run(Sieve(), left_out=0.0)
