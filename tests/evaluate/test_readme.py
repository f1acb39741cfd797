"""The README's own policy works as it stands there."""

import re
from pathlib import Path

from evaluate.trials.plan import Settings, make_plan
from evaluate.trials.suite import read_suite
from evaluate.trials.trial import run_trial

README = Path(__file__).parents[2] / "evaluate" / "README.md"


def test_a_policy_of_ones_own_is_trained_under(tmp_path, monkeypatch):
    blocks = dict(re.findall(r"```\w+\n# (calm\.\w+).*?\n(.*?)```", README.read_text(), flags=re.DOTALL))
    for name, text in blocks.items():
        (tmp_path / name).write_text(text + ("[recipe]\nepochs = 4\n" if name.endswith("toml") else ""))
    monkeypatch.syspath_prepend(tmp_path)
    plan = make_plan(read_suite(str(tmp_path / "calm.toml")), Settings("cpu", 1))
    assert len(plan.trials) == 9
    own = next(trial for trial in plan.trials if trial.policy.name == "calm:Calm")
    result = run_trial(own.as_payload(), tmp_path, lambda share: None)
    assert result["status"] == "finished"
    assert result["freezes"]
