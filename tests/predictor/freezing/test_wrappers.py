"""What stands around a model: what is followed, and what is refused with the cure."""

import re
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import predictor
from predictor import FreezeController
from predictor.errors import UsageError
from predictor.freezing.wrappers import Agreement, follow, has_gradients, refuse_unfit
from tests.predictor.scripted import Script

X = torch.linspace(-1, 1, 4 * 8).reshape(4, 8)
Y = torch.tensor([0, 1, 2, 0])


class Blocks(nn.Module):
    """Linear blocks and a head. `run` says how a block is called, and which are left out."""

    def __init__(self, run=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, 3)
        self.run = run

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x)


def start(model, answers, total_steps=9):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, FreezeController(model, optimizer, Script(answers), total_steps=total_steps)


def train(model, answers, steps=6, cleared_before=False):
    optimizer, controller = start(model, answers)
    for _ in range(steps):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        if cleared_before:
            optimizer.zero_grad()
        controller.step()
        optimizer.zero_grad()
    controller.release()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Activation checkpointing


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def not_reentrant(block, x):
    return checkpoint(block, x, use_reentrant=False)


@pytest.mark.parametrize("answers", [{0: {0, 1}}, {2: {0}, 3: {0, 1, 2}, 5: ()}])
def test_checkpointing_that_is_not_reentrant_changes_nothing(answers):
    assert torch.equal(train(Blocks(not_reentrant), answers), train(Blocks(), answers))


@pytest.mark.parametrize(("answers", "at"), [({0: {0}}, 3), ({2: {0}}, 5)])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_inside_a_forward_is_found_by_what_it_does(answers, at):
    model = Blocks(reentrant)
    train(model, answers, steps=at - 1)  # a layer may miss a step or two: left out at random, say
    with pytest.raises(UsageError, match=r"no gradient has reached layer 1 .*use_reentrant=False"):
        train(Blocks(reentrant), answers, steps=at)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_it_is_found_too_where_later_layers_get_gradients():
    def second_alone(block, x):
        return reentrant(block, x) if block is model.blocks[1] else block(x)

    model = Blocks(second_alone)
    with pytest.raises(UsageError, match=r"no gradient has reached layer 1 "):
        train(model, {1: {0}})


@pytest.mark.parametrize("answers", [{0: {0}}, {2: {0}}])
def test_gradients_that_were_cleared_are_not_taken_to_be_lost(answers):
    assert torch.equal(train(Blocks(), answers, cleared_before=True), train(Blocks(), answers))


def test_a_layer_that_is_left_out_now_and_then_is_not_taken_to_be_lost():
    calls = []

    def every_other(block, x):
        calls.append(block)
        return x if block is model.blocks[1] and len(calls) // 4 % 2 else block(x)

    model = Blocks(every_other)
    train(model, {2: {0}})


def left_out(block, x):
    """As LayerDrop leaves a block out at random, and as a branch that another task uses."""
    return x


def detached(block, x):
    """As a loop keeps a backbone from training in its first epochs, or a generator in a discriminator's step."""
    return block(x).detach()


def without_gradients(block, x):
    with torch.no_grad():
        return block(x)


@pytest.mark.parametrize("run", [left_out, detached, without_gradients])
@pytest.mark.parametrize("frozen_at", [0, 2])
def test_a_layer_without_gradients_for_some_steps_is_not_taken_to_be_lost(run, frozen_at):
    model = Blocks()
    optimizer, controller = start(model, {frozen_at: {0}}, total_steps=12)
    for number in range(12):
        before = model.blocks[1][0].weight.detach().clone()
        model.run = lambda block, x, number=number: (
            run(block, x) if block is model.blocks[1] and 2 <= number < 9 else block(x)
        )
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert controller.frozen == {0}
    assert not torch.equal(before, model.blocks[1][0].weight)
    assert not model.blocks[1][0]._forward_pre_hooks


def test_a_layer_that_the_user_froze_is_not_taken_to_be_lost():
    model = Blocks()
    model.blocks[1].requires_grad_(False)
    train(model, {0: {0}})
    train(model, {2: {0}})


def test_what_the_user_froze_stays_so_when_its_layer_unfreezes_or_is_released():
    model = Blocks()
    model.blocks[0].requires_grad_(False)
    kept = model.blocks[1][0].bias.requires_grad_(False)
    before = [p.clone() for p in (*model.blocks[0].parameters(), kept)]
    train(model, {1: {0, 1}, 2: {1}, 3: {0}})
    _, controller = start(model, {0: {0, 1, 2}})
    controller.release()
    still = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert still == [*(f"blocks.0.{name}" for name, _ in model.blocks[0].named_parameters()), "blocks.1.0.bias"]
    assert all(map(torch.equal, before, (*model.blocks[0].parameters(), kept)))


@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl")
def test_torchs_own_wrapper_is_refused_at_once_where_it_is_reentrant():
    model = Blocks()
    model.blocks[1] = checkpoint_wrapper(model.blocks[1], CheckpointImpl.REENTRANT)
    with pytest.raises(UsageError, match=r"CheckpointWrapper: reentrant .* checkpoint with use_reentrant=False"):
        start(model, {})
    model = Blocks()
    model.blocks[1] = checkpoint_wrapper(model.blocks[1], CheckpointImpl.NO_REENTRANT)
    assert torch.equal(train(model, {2: {0, 1}}), train(Blocks(), {2: {0, 1}}))


# DDP in one process; test_ddp.py has two


def test_ddp_keeps_its_settings_and_its_hooks(one_process):
    model = DistributedDataParallel(Blocks(), find_unused_parameters=False, bucket_cap_mb=3)
    called = []
    model.register_forward_hook(lambda *_: called.append(1))
    model.eval()
    optimizer, controller = start(model, {0: {0}, 1: ()})
    assert controller.model is model.module
    assert [layer.name for layer in controller.layers] == [f"blocks.{index}.0" for index in range(4)]
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    controller.step()
    assert called == [1]
    assert model.bucket_bytes_cap == 3 * 2**20
    assert not model.training


def test_an_optimizer_that_moves_what_has_no_gradient_is_refused():
    model = Blocks()
    with pytest.raises(UsageError, match=r"LBFGS cannot freeze layers while it trains: .* use SGD or AdamW"):
        FreezeController(model, torch.optim.LBFGS(model.parameters()), Script({}), total_steps=4)


def test_ddp_with_a_static_graph_is_refused(one_process):
    with pytest.raises(
        UsageError, match="static_graph=True cannot freeze layers while it trains: leave static_graph out"
    ):
        start(DistributedDataParallel(Blocks(), static_graph=True), {})


@pytest.mark.parametrize("setting", ["mixed_precision", "_use_python_reducer", "_delay_all_reduce_params"])
def test_ddp_settings_that_cannot_be_followed_are_refused(setting, one_process):
    model = DistributedDataParallel(Blocks())
    setattr(model, setting, [1])  # a stand-in: these settings do not work, or are slow to start, on the CPU
    with pytest.raises(UsageError, match=r"mixed_precision \(use torch.autocast\)"):
        start(model, {})


def test_a_ddp_whose_private_parts_are_others_has_to_look_for_unused_parameters(one_process, monkeypatch):
    plain, looking = (DistributedDataParallel(Blocks(), find_unused_parameters=looks) for looks in (False, True))
    monkeypatch.delattr(DistributedDataParallel, "_build_params_for_reducer")
    with pytest.raises(UsageError, match="find_unused_parameters=True"):
        start(plain, {})
    assert torch.equal(train(looking, {2: {0, 1}}), train(Blocks(), {2: {0, 1}}))


def test_what_is_wrapped_later_is_followed_or_refused_alike(one_process):
    net = Blocks()
    _, controller = start(net, {})
    assert controller.agree(frozenset({1}), 4) == {1}
    follow(controller, DistributedDataParallel(net))
    assert isinstance(controller.agree, Agreement)
    assert controller.agree(frozenset({1, 3}), 4) == {1, 3}
    with pytest.raises(UsageError, match="static_graph"):
        follow(controller, DistributedDataParallel(net, static_graph=True))


@pytest.fixture
def groups_made(one_process, monkeypatch):
    """Ranks and options of each process group that is made, as in two processes whose gradients travel over NCCL."""
    made, new_group = [], dist.new_group

    def make(ranks, **options):
        made.append((ranks, options))
        return new_group([0], **options)

    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(dist, "new_group", make)
    return made


def test_processes_agree_over_the_cpu_also_where_gradients_travel_otherwise(groups_made):
    assert Agreement()(frozenset({2}), 3) == {2}
    assert groups_made == [([0, 1], {"backend": "gloo", "use_local_synchronization": True})]


def test_no_group_is_made_only_to_be_replaced(groups_made):
    net = Blocks()
    model = DistributedDataParallel(net)
    groups_made.clear()  # of DDP itself
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    controller = FreezeController(model, optimizer, Script({}), total_steps=4, agree=lambda wanted, layers: wanted)
    assert groups_made == []
    for _ in range(2):
        follow(controller, model)
        assert controller.agree(frozenset({1}), 4) == {1}
    assert len(groups_made) == 1


def test_one_process_agrees_with_itself_without_a_group(one_process, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.delattr(dist, "new_group")
    assert Agreement()(frozenset({2}), 3) == {2}


# FSDP1 and DeepSpeed


def test_fsdp1_is_refused(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    model = FullyShardedDataParallel(
        Blocks(), sharding_strategy=ShardingStrategy.NO_SHARD, device_id=torch.device("cpu"), use_orig_params=True
    )
    with pytest.raises(UsageError, match=r"FullyShardedDataParallel cannot .* use FSDP2, .*fully_shard"):
        start(model, {})


def test_deepspeed_is_refused_as_model_and_as_optimizer():
    # Stand-ins by name: DeepSpeed does not run here. They show that the check looks at names, and nothing more.
    class DeepSpeedEngine(nn.Module):
        pass

    class DeepSpeedOptimizerWrapper(torch.optim.SGD):
        pass

    class Inherited(DeepSpeedEngine):
        pass

    with pytest.raises(UsageError, match=r"DeepSpeedEngine cannot .* use DDP or FSDP2"):
        start(nn.Sequential(DeepSpeedEngine(), nn.Linear(1, 1), nn.Linear(1, 1)), {})
    with pytest.raises(UsageError, match=r"DeepSpeedEngine cannot "):
        refuse_unfit(Inherited())
    with pytest.raises(UsageError, match=r"DeepSpeedOptimizerWrapper cannot "):
        refuse_unfit(Blocks(), [DeepSpeedOptimizerWrapper(Blocks().parameters(), 0.1)])


def test_an_optimizer_has_gradients_while_any_of_its_parameters_does():
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not has_gradients(optimizer)
    model.head.bias.grad = torch.zeros(3)
    assert has_gradients(optimizer)


def test_no_trainer_is_imported_but_by_its_own_adapter():
    library = Path(predictor.__file__).parent
    trainers = re.compile(
        r"^\s*(from|import) (transformers|accelerate|lightning|pytorch_lightning|predictor\.integrations)", re.M
    )
    importing = {path.relative_to(library) for path in library.rglob("*.py") if trainers.search(path.read_text())}
    assert importing == {Path("integrations/huggingface.py"), Path("integrations/lightning.py")}
