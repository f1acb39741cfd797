"""Fixtures that several folders' tests share."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from predictor.model.file import PredictorFile, save_predictor
from predictor.model.network import FreezePredictor, PredictorConfig
from predictor.model.sampling import SampleSpec
from tests.second_device import AVAILABLE, Child

# One thread, as `make test` asks for, unless the tests are run with more on purpose.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
# A shell starts what it puts in the background deaf to Ctrl-C, and programs that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def forget_own_modules(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forget the modules that a test wrote and imported: the next one may write another of the same name."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    for name, module in list(sys.modules.items()) if folder else ():
        origin = getattr(getattr(module, "__spec__", None), "origin", None)
        if isinstance(origin, str) and Path(origin).is_relative_to(folder):
            del sys.modules[name]


class ToyNet(nn.Module):
    """Two convolutions with BatchNorm and dropout, one linear layer, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(4 * 8 * 8, 16),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


@pytest.fixture
def make_toy() -> Callable[..., ToyNet]:
    """Build the same toy network again and again; another seed gives other weights."""

    def make(seed: int = 0) -> ToyNet:
        torch.manual_seed(seed)
        return ToyNet()

    return make


@pytest.fixture
def make_predictor_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a small untrained predictor whose answer is always the same probability."""

    def make(
        probability: float = 0.9,
        threshold: float = 0.5,
        risks: tuple[tuple[float, float], ...] = (),
        **config: int,
    ) -> Path:
        torch.manual_seed(0)
        model = FreezePredictor(PredictorConfig(**{"window": 3, "weights": 8, "hidden": 4, "key": 4, **config}))
        last = model.output[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, torch.tensor(probability).logit().item())
        path = tmp_path / f"predictor-{probability}-{threshold}-{len(risks)}.safetensors"
        spec = SampleSpec(weights=8, snapshots=12)
        save_predictor(path, PredictorFile(model, spec, threshold, {"note": "untrained"}, risks))
        return path

    return make


@pytest.fixture(scope="session")
def on_second_device() -> Iterator[Child]:
    """Run a function of a module in a process that has a second device; `tests/second_device.py` says how."""
    if not AVAILABLE:
        pytest.skip(f"PyTorch {torch.__version__} takes no device that is written in Python")
    child = Child()
    yield child
    child.close()
