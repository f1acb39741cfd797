"""Lightning's callback looks at the first batches by itself, and the training draws what it would have drawn."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

pytest.importorskip("lightning")
import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger

from predictor.integrations.lightning import FreezeCallback
from tests.predictor.integrations.test_lightning import Plain, TwoOptimizers, equal, images
from tests.predictor.scripted import LookingScript

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*defined a `validation_step`"),
]


class Logs(Plain):
    """Logs in its step in every way there is, and keeps its losses."""

    def __init__(self, net):
        super().__init__(net)
        self.kept = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.kept.append(loss.item())
        self.log("train/loss", loss, on_epoch=True)
        self.log_dict({"train/again": loss})
        self.logger.log_metrics({"direct": loss.item()}, step=len(self.kept))
        return {"loss": loss}


def run(folder, net, answers, module=Logs, data=None, wants=True, loading=(), **options):
    """Train. Returns the module, the policy, the weights and where the logger wrote. loading: DataLoader options."""
    policy = LookingScript(answers)
    policy.wants_look = wants
    callback = FreezeCallback(policy, **options)
    shuffle = not isinstance(data, IterableDataset)
    loader = DataLoader(images() if data is None else data, 3, shuffle=shuffle, **dict(loading))
    logger = CSVLogger(folder, name="run")
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        callbacks=[callback],
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    made = module(net)
    torch.manual_seed(7)
    trainer.fit(made, loader)
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return made, callback.controller.policy, weights, logger.experiment.metrics_file_path


LOADING = {
    "global": dict,
    "own": lambda: {"generator": torch.Generator().manual_seed(1)},
    "workers": lambda: {"num_workers": 1, "persistent_workers": True},
}


@pytest.mark.parametrize("kind", LOADING)
def test_it_looks_before_the_first_step_and_leaves_the_training_as_it_is(kind, tmp_path, make_toy):
    without = run(tmp_path / "without", make_toy(), {}, wants=False, loading=LOADING[kind]())
    module, policy, weights, path = run(tmp_path / "with", make_toy(), {}, loading=LOADING[kind]())
    assert [look.batches for look in policy.looks] == [8]
    assert equal(weights, without[2])
    assert module.kept == without[0].kept  # what it notes while looking is taken back
    assert not {"log", "log_dict"} & vars(module).keys()
    with open(path) as ours, open(without[3]) as theirs:
        assert ours.read() == theirs.read()


def test_what_froze_stands_still(tmp_path, make_toy):
    net = make_toy()
    _, policy, weights, _ = run(tmp_path, net, {0: {0}})
    before = make_toy().state_dict()
    assert (len(policy.looks), policy.counted) == (1, [True])
    assert torch.equal(weights["body.0.weight"], before["body.0.weight"])
    assert not torch.equal(weights["body.3.weight"], before["body.3.weight"])


class WithoutNumber(Plain):
    """Takes the batch alone."""

    def training_step(self, batch):
        return super().training_step(batch, 0)


def test_a_step_that_takes_the_batch_alone(tmp_path, make_toy):
    assert len(run(tmp_path, make_toy(), {}, module=WithoutNumber)[1].looks) == 1


class Stream(IterableDataset):
    def __iter__(self):
        return iter(images())


class InTrainingOnly(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if self.net.training else None


@pytest.mark.filterwarnings("ignore:.*IterableDataset")
@pytest.mark.parametrize(
    ("module", "data", "options"),
    [(Plain, Stream(), {"total_steps": 8}), (InTrainingOnly, None, {}), (TwoOptimizers, None, {"total_steps": 8})],
)
def test_where_there_is_no_look_one_line_says_why(module, data, options, tmp_path, make_toy, capsys):
    _, policy, weights, _ = run(tmp_path, make_toy(), {}, module=module, data=data, **options)
    assert policy.looks == []
    assert capsys.readouterr().out.count("no look at the first batches") == 1
    assert equal(weights, run(tmp_path, make_toy(), {}, module=module, data=data, wants=False, **options)[2])
