"""The examples of all READMEs work as they stand there, and the README's table is what the published trials show."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.trajectories import write_runs
from evaluate.report.published import publish
from tests.data.made import made_trajectory

CHECKOUT = Path(__file__).parent.parent
PACKAGES = ("predictor", "data", "collect", "evaluate")
READMES = [CHECKOUT / "README.md", *(path for name in PACKAGES for path in (CHECKOUT / name).rglob("README.md"))]
BLOCKS = [block for path in READMES for block in re.findall(r"```(\w+)\n(.*?)```", path.read_text(), flags=re.DOTALL)]
SHORT = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss_fn, steps = nn.functional.cross_entropy, 6
loader = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(steps)]
"""


def block(containing, language="python"):
    found = [text for kind, text in BLOCKS if kind == language and containing in text]
    assert len(found) == 1, f"{containing!r} is in {len(found)} blocks"
    return found[0]


def run(code, folder):
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_five_lines_and_the_cache(tmp_path):
    cache = "from predictor import FeatureCache\nloader = [(range(8), *row) for row in loader]\n" + block(
        "FeatureCache("
    )
    run(f"{SHORT}{block('# after the optimizer')}{cache}", tmp_path)


def test_a_head_is_probed(tmp_path):
    assert "False" in run(f"{SHORT}{block('probe_head(model')}", tmp_path)  # labels at random


def test_samples_are_sieved(tmp_path):
    data = "data, epochs = [(index, *(part[0] for part in row)) for index, row in enumerate(loader)], 3\n"
    run(f"{SHORT}{data}{block('SieveSampler(')}assert len(loader) == 1 and len(sampler) == 5\n", tmp_path)


def test_the_first_batches_are_looked_at(tmp_path):
    made = "from predictor import FreezeController, make_policy\npolicy = make_policy('static', layers=1)\n"
    made += "policy.wants_look = True\ncontroller = FreezeController(model, optimizer, policy, total_steps=steps)\n"
    run(f"{SHORT}{made}{block('controller.look(loader, lambda')}assert controller.looked == steps / 2\n", tmp_path)


def test_the_complete_loop_freezes(tmp_path):
    assert "layers frozen)" in run(block('digits = load_source("digits")'), tmp_path)


def test_a_layer_freezes_with_its_adapters(tmp_path):
    model = (
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "from predictor import FreezeController, make_policy\n"
        "size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=9)\n"
        "model = BertForSequenceClassification(BertConfig(**size))\n"
    )
    layers = "assert any('lora_A' in layer.name for layer in controller.layers)\n"
    run(f"{SHORT}{model}{block('get_peft_model(model')}{layers}", tmp_path)


def test_the_trainer_of_hugging_face(tmp_path):
    pytest.importorskip("transformers")
    check = "\nassert trainer.callback_handler.callbacks, trainer\nprint('steps', trainer.state.global_step)"
    assert "steps 50" in run(block("BertForSequenceClassification(") + check, tmp_path)


MODULE = """
import torch
from lightning.pytorch import LightningModule

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

module = Net()
data = torch.utils.data.TensorDataset(torch.randn(640, 64), torch.randint(10, (640,)))
loader = torch.utils.data.DataLoader(data, batch_size=32)
"""


def test_the_trainer_of_lightning(tmp_path):
    pytest.importorskip("lightning")
    check = "\nassert trainer.global_step == 60\nprint('layers', len(trainer.callbacks[0].controller.layers))"
    assert "layers 1" in run(MODULE + block("lightning.pytorch") + check, tmp_path)


def test_a_source_of_ones_own_gives_batches(tmp_path):
    files = "for split in ('train', 'test'):\n"
    files += "    torch.save(torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8), f'{split}_bytes.pt')\n"
    files += "    torch.save(torch.arange(40) % 10, f'{split}_labels.pt')\n"
    use = "ids, x, y = next(mine().batches('train', 8, shuffle=False))\nprint(tuple(x.shape), len(y))"
    assert "(8, 1, 8, 8) 8" in run(f"{block('def mine()')}\n{files}{use}", tmp_path)


def test_trajectories_are_read(tmp_path):
    (tmp_path / "runs").mkdir()
    write_runs(tmp_path / "runs" / "trajectories.h5", [made_trajectory()])
    assert made_trajectory().run_id in run(block("open_trajectories("), tmp_path)


def test_the_table_is_what_the_published_trials_show(tmp_path):
    text = (CHECKOUT / "README.md").read_text()
    rows = [row.split("|") for row in re.findall(r"^\|.*\dx \[.*\|$", text, flags=re.MULTILINE)]
    assert len(rows) >= 4
    shown = publish(tmp_path / "picture.svg")
    for row in rows:
        *figures, multiplier = [cell.strip() for cell in row[3:6]]
        bound = {"≥": "at least", "≤": "at most"}.get(multiplier[0], "")
        figures.append(multiplier.lstrip("≥≤ "))
        (line,) = [line for line in shown.splitlines() if all(figure in line for figure in figures)]
        assert ("at least" in line or "at most" in line) == bool(bound), row
        assert bound in line, row


def test_a_workload_of_ones_own_is_gathered(tmp_path):
    (tmp_path / "mine.py").write_text(block("# mine.py"))
    (tmp_path / "mine.toml").write_text(block("mine:tiny", "toml"))
    code = (
        "import runpy, sys\nsys.path.insert(0, '.')\n"
        "sys.argv = ['collect', 'gather', 'trajectories', '--suite', 'mine.toml', '--out', 'runs', '--slots', '2']\n"
        "runpy.run_module('collect', run_name='__main__')"
    )
    assert "4 runs" in run(code, tmp_path)
    assert (tmp_path / "runs" / "trajectories.h5").exists()


def test_a_policy_of_ones_own_is_compared(tmp_path):
    own = block("# calm.py")
    assert len(own.splitlines()) < 40
    (tmp_path / "calm.py").write_text(own)
    (tmp_path / "calm.toml").write_text(block("# calm.toml", "toml") + "[recipe]\nepochs = 4\n")
    code = (
        "import runpy, sys\nsys.path.insert(0, '.')\n"
        "sys.argv = ['evaluate', 'run-suite', '--suite', 'calm.toml', '--out', 'runs', '--slots', '2']\n"
        "runpy.run_module('evaluate', run_name='__main__')"
    )
    assert "calm:Calm" in run(code, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "runs" / "results.jsonl").read_text().splitlines()]
    own_rows = [row for row in rows if row["policy_name"] == "calm:Calm"]
    assert [row["status"] for row in own_rows] == ["finished"] * 3
    assert any(row["freezes"] for row in own_rows)


def command(text, folder):
    """Run a command line of a README in a folder."""
    arguments = [sys.executable, *text.split()[1:]]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_a_script_of_ones_own_to_a_predictor_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text(block("# own.py"))
    printed = [command(line, tmp_path) for line in block("python own.py", "sh").splitlines()]
    assert "runs/own: 3 runs" in printed[1]
    assert "goes on from shipped" in printed[2]
    run(
        "from predictor import make_policy\nmake_policy('smartfrz', predictor='runs/mine.safetensors')",
        tmp_path,
    )


def test_the_trainings_of_hugging_face_are_recorded(tmp_path):
    pytest.importorskip("transformers")
    before = block("BertForSequenceClassification(").replace("trainer.train()", "evaluation_data = data")
    run(before + block("# trainer.py"), tmp_path)
    assert len(list((tmp_path / "runs/own/runs").glob("*.h5"))) == 1


def test_the_trainings_of_lightning_are_recorded(tmp_path):
    pytest.importorskip("lightning")
    more = "from lightning.pytorch import Trainer\nNet.forward = lambda self, x: self.net(x)\nx = data[:80][0]\n"
    run(MODULE + more + block("# fit.py"), tmp_path)
    assert len(list((tmp_path / "runs/own/runs").glob("*.h5"))) == 1
