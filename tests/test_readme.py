"""The README's examples work as they stand there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (CHECKOUT / "README.md").read_text(), flags=re.DOTALL)
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


def test_samples_are_sieved(tmp_path):
    data = "data, epochs = [(place, *(part[0] for part in row)) for place, row in enumerate(loader)], 3\n"
    run(f"{SHORT}{data}{block('SieveSampler(')}assert len(loader) == 1 and len(sampler) == 5\n", tmp_path)


def test_the_complete_loop_freezes(tmp_path):
    assert "layers frozen)" in run(block('digits = load_source("digits")'), tmp_path)


def test_the_trainer_of_hugging_face(tmp_path):
    pytest.importorskip("transformers")
    check = "\nassert trainer.callback_handler.callbacks, trainer\nprint('steps', trainer.state.global_step)"
    assert "steps 50" in run(block("BertForSequenceClassification(") + check, tmp_path)


def test_the_trainer_of_lightning(tmp_path):
    pytest.importorskip("lightning")
    check = "\nprint('events', len(trainer.callbacks[0].controller.history))"
    assert re.search(r"events [1-9]", run(block("LightningModule") + check, tmp_path))


def test_a_workload_of_ones_own_is_gathered(tmp_path):
    (tmp_path / "mine.py").write_text(block("# mine.py"))
    (tmp_path / "mine.toml").write_text(block("mine:tiny", "toml"))
    code = (
        "import runpy, sys\nsys.path.insert(0, '.')\n"
        "sys.argv = ['collect', 'gather', 'trajectories', '--suite', 'mine.toml', '--out', 'runs', '--slots', '1']\n"
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
        "sys.argv = ['evaluate', 'run-suite', '--suite', 'calm.toml', '--out', 'runs', '--slots', '1']\n"
        "runpy.run_module('evaluate', run_name='__main__')"
    )
    assert "calm:Calm" in run(code, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "runs" / "results.jsonl").read_text().splitlines()]
    own_rows = [row for row in rows if row["policy_name"] == "calm:Calm"]
    assert [row["status"] for row in own_rows] == ["finished"] * 3
    assert any(row["freezes"] for row in own_rows)
