import getpass
import json
import platform
from datetime import datetime
from importlib.metadata import version

import pytest
import torch

from collect.training.provenance import provenance, versions


def test_what_made_a_result_and_nothing_of_whom() -> None:
    made = provenance()
    text = json.dumps(made)
    assert datetime.fromisoformat(made["made"]).tzinfo is not None
    assert made["versions"]["torch"] == version("torch")
    assert made["versions"]["python"] == platform.python_version()
    assert made["hardware"]["threads"] == torch.get_num_threads()
    assert made["hardware"]["cpu"]
    assert made["hardware"]["memory_gb"] > 0
    assert f'"{platform.node()}"' not in text
    assert f"/{getpass.getuser()}" not in text


def test_code_away_from_its_checkout_is_told_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMARTFRZ_COMMIT", "0123456789ab+")
    assert versions.__wrapped__()["commit"] == "0123456789ab+"
