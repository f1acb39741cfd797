"""Freezing in two real processes that talk over gloo: in step after each change, and less to say.

This file is also the program of those processes. They train every case once and leave behind what they saw; the tests
then look at it.
"""

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from predictor import FeatureCache, FreezeController
from predictor.errors import UsageError
from predictor.freezing.wrappers import follow
from tests.predictor.scripted import Script
from tests.predictor.twins import run_both

STEPS = 8
PHASES = {2: {0, 1}, 4: {0, 1, 2}, 6: {1}, 7: ()}
SHARDS = hasattr(torch.cpu.Stream, "record_event")
"""Whether FSDP2 runs on the CPU, which it does not in PyTorch 2.6."""
SIZES = [8 * 8 + 8 + 16, 8 * 8 + 8, 8 * 8 + 8, 8 * 3 + 3]  # the numbers in each of the three layers and the head


def make_net(seed=0, norm=nn.LayerNorm):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 8), norm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)
    )


def batch(step, rank):
    draw = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 8, generator=draw), torch.randint(3, (4,), generator=draw)


def weights_of(net):
    """All weights as one tensor, put together from their shards where they are sharded."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def compiled_ddp(net):
    return torch.compile(DistributedDataParallel(net), backend="eager")


class Process:
    """One of the two: a training and what it saw."""

    def __init__(self, net, answers, wrap=DistributedDataParallel, say=print, hook=None, **options):
        self.net, self.sent, self.seen = net, 0, {"weights": [], "bytes": [], "frozen": []}
        self.model = wrap(net, **options)
        ddp = getattr(self.model, "_orig_mod", self.model)
        if hook is not None:
            hook(ddp)
        elif isinstance(ddp, DistributedDataParallel):
            ddp.register_comm_hook(self, Process.count)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        self.controller = FreezeController(self.model, self.optimizer, Script(answers), total_steps=STEPS, say=say)

    @staticmethod
    def count(process, bucket):
        process.sent += bucket.buffer().numel()
        return allreduce_hook(None, bucket)

    def run(self, steps=range(STEPS), micro_batches=1):
        for step in steps:
            self.sent = 0
            for micro in range(micro_batches):
                if micro_batches > 1:
                    self.model.require_backward_grad_sync = micro == micro_batches - 1
                x, y = batch(step * micro_batches + micro, dist.get_rank())
                F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.controller.step()
            self.optimizer.zero_grad()
            self.seen["weights"].append(weights_of(self.net))
            self.seen["bytes"].append(self.sent)
            self.seen["frozen"].append(sorted(self.controller.frozen))
        return self


def freezes_and_unfreezes(folder):
    return Process(make_net(), PHASES).run().seen


def views_of_buckets(folder):
    return Process(make_net(), PHASES, gradient_as_bucket_view=True).run().seen


def with_batch_norm(folder):
    return Process(make_net(norm=nn.BatchNorm1d), PHASES).run().seen


def accumulates(folder):
    return Process(make_net(), PHASES).run(micro_batches=2).seen


def frozen_from_the_start(folder):
    return Process(make_net(), {0: {0, 1}}).run().seen


def ranks_disagree(folder):
    """Each process's policy answers something else."""
    return Process(make_net(), {1: {0, 1}, 4: {1}} if dist.get_rank() == 0 else {1: {2}, 5: {0}}).run().seen


def compiled(folder):
    return Process(make_net(), {2: {0, 1}, 5: ()}, compiled_ddp).run().seen


def wrapped_later(folder):
    """The controller is made of the bare model, and freezes before DDP is there."""
    training = Process(make_net(), {0: {0}, 3: {0, 1}, 5: ()}, lambda net: net)
    training.model = DistributedDataParallel(training.net)
    training.model.register_comm_hook(training, Process.count)
    follow(training.controller, training.model)
    return training.run().seen


def finds_unused_by_itself(folder):
    """DDP that was told to look for parameters without gradients needs no following, and saves nothing."""
    training = Process(make_net(), PHASES, lambda net: net)
    training.model = DistributedDataParallel(training.net, find_unused_parameters=True)
    training.model.register_comm_hook(training, Process.count)
    return training.run().seen


def resumes(folder):
    """Stopped while two layers are frozen, and gone on with in fresh objects."""
    first = Process(make_net(), PHASES).run(range(3))
    parts = ("net", "optimizer", "controller")
    path = folder / f"checkpoint-{dist.get_rank()}.pt"
    torch.save({part: getattr(first, part).state_dict() for part in parts}, path)
    second = Process(make_net(seed=1), PHASES)
    for part, state in torch.load(path, weights_only=True).items():
        getattr(second, part).load_state_dict(state)
    return second.run(range(3, STEPS)).seen


def released(folder):
    """Two layers of three are frozen from the start, and let go for another training with the same DDP."""
    training = Process(make_net(), {0: {0, 1}}).run(range(4))
    training.controller.close()
    training.controller.release()
    training.seen["frozen"][-1] = sorted(training.controller.frozen)
    training.controller = FreezeController(training.model, training.optimizer, Script({}), total_steps=STEPS)
    return training.run(range(4, STEPS)).seen


def halves_in_cpp(folder):
    """A hook that DDP runs in C++."""
    kind = dist.BuiltinCommHookType.FP16_COMPRESS
    training = Process(make_net(), PHASES, hook=lambda ddp: ddp._register_builtin_comm_hook(kind)).run()
    return {**training.seen, "hook": training.model._get_ddp_logging_data()["comm_hook"]}


def power_sgd(folder):
    """A hook that keeps tensors for each bucket, and starts in the third step after a change."""
    state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=1)
    answers = {3: {0, 1}}
    training = Process(make_net(), answers, hook=lambda ddp: ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook))
    return {**training.run().seen, "compressed": state.total_numel_after_compression, "kept": len(state.error_dict)}


def refused_hook(folder):
    """A second hook, which DDP refuses and yet lists."""
    training = Process(make_net(), PHASES)
    with pytest.raises(RuntimeError):
        training.model.register_comm_hook(None, allreduce_hook)
    return training.run().seen


class Gathering(nn.Sequential):
    """Waits in its forward pass for what the other process sends, as contrastive models do."""

    def forward(self, x):
        got = [torch.zeros(1), torch.zeros(1)]
        dist.all_gather(got, torch.ones(1))
        return super().forward(x) * torch.stack(got).mean()


def gathers_in_forward(folder):
    """What the layers cost is counted by both, though one alone has something to say."""
    return Process(Gathering(*make_net()), PHASES, say=print if dist.get_rank() == 0 else None).run().seen


def sharded(folder):
    """FSDP2. The user's code switches a frozen layer on before the sixth step."""
    from torch.distributed.fsdp import fully_shard

    net = make_net()
    for index in (0, 3, 5):
        fully_shard(net[index])
    fully_shard(net)
    training = Process(net, PHASES if dist.get_rank() == 0 else {1: {2}}, lambda net: net)
    with pytest.raises(UsageError, match="use DDP with the cache, or FSDP2 without"):
        FeatureCache(training.controller)
    training.run(range(5))
    net.requires_grad_(True)
    with pytest.warns(UserWarning, match="switched frozen layer"):
        training.run(range(5, STEPS))
    return training.seen


CASES = (
    freezes_and_unfreezes,
    views_of_buckets,
    with_batch_norm,
    accumulates,
    frozen_from_the_start,
    ranks_disagree,
    compiled,
    wrapped_later,
    finds_unused_by_itself,
    resumes,
    released,
    gathers_in_forward,
    halves_in_cpp,
    power_sgd,
    refused_hook,
    *([sharded] if SHARDS else []),
)


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({case.__name__: case(folder) for case in CASES}, folder / f"seen-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each process saw, by case."""
    folder = tmp_path_factory.mktemp("ddp")
    run_both("tests.predictor.freezing.test_ddp", folder)
    return [torch.load(folder / f"seen-{rank}.pt", weights_only=True) for rank in range(2)]


def sent_while(frozen):
    """How many gradients what trains has to say."""
    return sum(size for index, size in enumerate(SIZES) if index not in frozen)


def frozen_before(frozen, first=()):
    """What was frozen during each step, from what was frozen after each."""
    return [list(first), *frozen[:-1]]


EVERY = [case.__name__ for case in CASES]


@pytest.mark.parametrize("case", EVERY)
def test_processes_stay_in_step(seen, case):
    first, second = (rank[case] for rank in seen)
    assert first["frozen"] == second["frozen"]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


@pytest.mark.parametrize("case", EVERY)
def test_they_train(seen, case):
    weights = seen[0][case]["weights"]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(weights))


@pytest.mark.parametrize(
    ("case", "first"),
    [
        ("freezes_and_unfreezes", ()),
        ("views_of_buckets", ()),
        ("with_batch_norm", ()),
        ("accumulates", ()),
        ("frozen_from_the_start", (0, 1)),
        ("ranks_disagree", ()),
        ("compiled", ()),
        ("wrapped_later", (0,)),
        ("resumes", (0, 1)),
        ("released", (0, 1)),
        ("gathers_in_forward", ()),
        ("refused_hook", ()),
    ],
)
def test_only_gradients_of_what_trains_are_sent(seen, case, first):
    case = seen[0][case]
    assert case["bytes"] == [sent_while(frozen) for frozen in frozen_before(case["frozen"], first)]


def test_communication_hooks_stay(seen):
    assert seen[0]["halves_in_cpp"]["hook"] == "BuiltinCommHookType.FP16_COMPRESS"
    assert seen[0]["power_sgd"]["compressed"] > 0
    assert seen[0]["power_sgd"]["kept"] > 0


def test_one_that_looks_for_unused_parameters_itself_sends_them_all(seen):
    assert seen[0]["finds_unused_by_itself"]["bytes"] == [sent_while(())] * STEPS


@pytest.mark.parametrize("case", EVERY)
def test_frozen_layers_stand_still_and_the_others_move(seen, case):
    case = seen[0][case]
    for step in range(1, len(case["weights"])):
        before, after = (case["weights"][at].split(SIZES) for at in (step - 1, step))
        still = [index for index in range(3) if torch.equal(before[index], after[index])]
        assert still == case["frozen"][step - 1], step


def test_the_first_process_decides(seen):
    assert seen[1]["ranks_disagree"]["frozen"] == [[0, 1]] * 3 + [[1]] * 5
    if SHARDS:
        assert seen[1]["sharded"]["frozen"] == seen[0]["freezes_and_unfreezes"]["frozen"]


def test_resumed_equals_unbroken_bit_for_bit(seen):
    unbroken, resumed = seen[0]["freezes_and_unfreezes"]["weights"], seen[0]["resumes"]["weights"]
    assert all(torch.equal(a, b) for a, b in zip(unbroken[3:], resumed, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        "freezes_and_unfreezes",
        "views_of_buckets",
        "finds_unused_by_itself",
        "resumes",
        *["sharded"] * SHARDS,
    ],
)
def test_it_is_the_training_of_one_process_on_both_batches(seen, case):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    controller = FreezeController(net, optimizer, Script(PHASES), total_steps=STEPS)
    for step in range(STEPS):
        x, y = (torch.cat(parts) for parts in zip(batch(step, 0), batch(step, 1), strict=True))
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    torch.testing.assert_close(seen[0][case]["weights"][-1], weights_of(net))


if __name__ == "__main__":
    main(int(os.environ["RANK"]), Path(sys.argv[1]))
