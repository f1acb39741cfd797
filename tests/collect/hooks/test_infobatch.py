"""InfoBatch: samples and weights worked out by hand, the length of whole trainings, and resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from collect.hooks.infobatch import InfoBatch, expected_share
from collect.training.loop import Hook, Training, train
from predictor.errors import UsageError
from tests.collect.tiny import BrokenOff, Losses, PlainNet, Trace, same, tiny_source, tiny_workload, weights
from tests.collect.training.test_resume import assert_same


def run(*hooks: Hook, path: Path | None = None, expected: float = 1.0, **recipe: Any) -> Training:
    """Eight epochs of six steps of four samples out of 24, where none are left out."""
    return train(
        tiny_workload(**{"epochs": 8, **recipe}),
        seed=0,
        hooks=hooks,
        device="cpu",
        checkpoint=path,
        checkpoint_seconds=0,
        source=tiny_source(),
        expected=expected,
    )


class ByHand:
    """A training on eight samples whose epochs end by hand, with losses made up."""

    def __init__(self, share: float = 0.5, total_steps: int = 1000) -> None:
        self.training = Training(tiny_workload(batch_size=1), tiny_source(8), seed=0, device=torch.device("cpu"))
        self.training.total_steps = self.training.planned_steps = total_steps
        self.infobatch = InfoBatch(share)
        self.infobatch.on_start(self.training)

    @property
    def among(self) -> list[int] | None:
        return None if self.training.among is None else self.training.among.tolist()

    def epoch(self, losses: dict[int, float]) -> dict[int, float]:
        """An epoch in which samples have these losses; returns what the next epoch's samples weigh."""
        self.note(losses)
        self.training.step += self.training.epoch_steps
        self.infobatch.on_step(self.training)
        among = self.among or list(range(8))
        return dict(zip(among, self.infobatch.state_dict()["weights"][among].tolist(), strict=True))

    def note(self, losses: dict[int, float]) -> list[float]:
        """A batch with these losses; returns its weights."""
        assert self.training.weigh is not None
        return self.training.weigh(torch.tensor(list(losses)), torch.tensor(list(losses.values()))).tolist()


def test_half_of_the_samples_below_the_mean_are_left_out_and_the_other_half_counts_twice() -> None:
    hand = ByHand()
    assert hand.note(dict.fromkeys(range(8), 1.0)) == [1.0] * 8
    # A mean of 2: four below, of which two stay.
    found = hand.epoch({0: 1, 1: 1, 2: 1, 3: 1, 4: 3, 5: 3, 6: 3, 7: 3})
    assert {index: weight for index, weight in found.items() if index >= 4} == dict.fromkeys(range(4, 8), 1.0)
    assert sorted(found.values()) == [1.0] * 4 + [2.0] * 2
    assert hand.training.epoch_steps == 6
    assert hand.infobatch.figures["left_out"] == 2 / 8
    assert hand.infobatch.figures["below_mean"] == 4 / 8


def test_what_was_left_out_keeps_its_last_loss() -> None:
    hand = ByHand()
    found = hand.epoch({index: 1.0 if index < 4 else 3.0 for index in range(8)})
    stayed, gone = ([index for index in range(4) if (index in found) == kept] for kept in (True, False))
    # Those that stayed are hard now: the mean is (2 * 9 + 2 * 1 + 4 * 3) / 8 = 4, with six below.
    found = hand.epoch({**dict.fromkeys(stayed, 9.0), **dict.fromkeys(range(4, 8), 3.0)})
    assert [found[index] for index in stayed] == [1.0, 1.0]
    assert list(found.values()).count(2.0) == 3
    assert len(set(found) & {*gone, *range(4, 8)}) == 3


def test_a_sample_that_was_not_seen_yet_stays_in() -> None:
    found = ByHand().epoch({0: 1.0, 1: 1.0, 2: 4.0})
    assert sorted(found) != list(range(8))
    assert all(found[index] == 1.0 for index in range(2, 8))


def test_the_weighted_gradient_is_that_of_all_samples_on_average() -> None:
    losses = {index: 0.5 * index for index in range(8)}  # a mean of 1.75: four below
    sums = torch.zeros(8)
    hand = ByHand()
    for _ in range(400):
        for index, weight in hand.epoch(losses).items():
            sums[index] += weight
    assert torch.allclose(sums / 400, torch.ones(8), atol=0.2)


def test_the_last_eighth_of_the_planned_epochs_goes_through_all_samples() -> None:
    seen: list[list[int]] = []

    class Seen(Hook):
        def on_start(self, training: Training) -> None:
            inner = training.around_forward

            def note(ids_B: torch.Tensor) -> Any:
                if not seen or training.epoch != before[0]:
                    seen.append([])
                    before[0] = training.epoch
                seen[-1] += ids_B.tolist()
                return inner(ids_B)

            before = [-1]
            training.around_forward = note

    infobatch = InfoBatch()
    expected = expected_share(0.5, 8)
    assert expected == pytest.approx(1 - 0.5 * 0.7 * 6 / 8)
    among = Trace(lambda training: (training.step, training.epoch_ended))
    training = run(infobatch, Seen(), among, expected=expected, net=PlainNet)
    assert (training.step, training.total_steps, training.planned_steps) == (35, 35, 35)  # .7375 of 48
    assert sorted(seen[0]) == sorted(seen[-1]) == list(range(24))
    assert all(len(set(epoch)) == len(epoch) < 24 for epoch in seen[1:-1])
    assert infobatch.figures["pruned_epochs"] == len(seen) - 2
    assert training.epochs == len(seen)
    # One row of the curve an epoch.
    assert [row["epoch"] for row in training.curve] == list(range(1, len(seen) + 1))
    assert training.scheduler.get_last_lr()[0] < 0.05 * 0.01  # the schedule has come to its end


def test_a_weight_of_one_changes_nothing() -> None:
    class Ones(Hook):
        def on_start(self, training: Training) -> None:
            training.weigh = lambda ids_B, loss_B: torch.ones_like(loss_B)

    ones, plain = run(Ones(), epochs=1), run(epochs=1)
    assert all(torch.allclose(a, b) for a, b in zip(weights(ones).values(), weights(plain).values(), strict=True))


def test_weights_multiply_the_loss_that_is_minimised() -> None:
    class Last(Hook):
        def on_start(self, training: Training) -> None:
            training.weigh = lambda ids_B, loss_B: 2.0 * (ids_B < 12)

        def on_step(self, training: Training) -> None:
            training.stop("seen")

    training = run(Last(), net=PlainNet, batch_size=24)
    _, x_BCHW, labels_B = next(tiny_source().batches("train", 24, shuffle=False))
    first = Training(tiny_workload(PlainNet), tiny_source(), seed=0, device=torch.device("cpu")).model
    loss_B = F.cross_entropy(first(x_BCHW), labels_B, reduction="none")
    assert training.loss.item() == pytest.approx(loss_B[:12].mean().item())


@pytest.mark.parametrize("breaks_at", [6, 9, 33])
def test_a_training_resumes_bit_for_bit(breaks_at: int, tmp_path: Path) -> None:
    """Broken off in an epoch's last step, inside an epoch that leaves samples out, and in the last phase."""
    recipe = {"augment": True}
    whole = InfoBatch()
    expected = run(Losses(), whole, expected=0.75, **recipe).state_dict()
    with pytest.raises(BrokenOff):
        run(Losses(breaks_at), InfoBatch(), path=tmp_path / "checkpoint", expected=0.75, **recipe)
    resumed = InfoBatch()
    training = run(Losses(), resumed, path=tmp_path / "checkpoint", expected=0.75, **recipe)
    assert_same(training.state_dict(), expected)
    assert_same(resumed.state_dict(), whole.state_dict())


def test_a_checkpoint_from_before_epochs_had_lengths_of_their_own() -> None:
    training = Training(tiny_workload(), tiny_source(), seed=0, device=torch.device("cpu"))
    state = training.state_dict()
    del state["epoch"]
    state["step"] = 8
    training.load_state_dict(state)
    assert (training.epoch, training.epoch_steps) == (1, 6)
    assert training.epochs == pytest.approx(8 / 6)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_that_cannot_work_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match=f"share={share}: give a share"):
        InfoBatch(share)


def test_samples_that_are_left_out_already_or_too_few_are_refused() -> None:
    with pytest.raises(UsageError, match="leave left_out at 0"):
        train(tiny_workload(), seed=0, hooks=[InfoBatch()], device="cpu", source=tiny_source(), left_out=0.5)
    with pytest.raises(UsageError, match="leave out less"):
        run(InfoBatch(), batch_size=20)


def test_two_trainings_with_one_seed_are_the_same() -> None:
    assert same(weights(run(InfoBatch())), weights(run(InfoBatch())))
