"""SmartFRZ: freeze each layer of a network during training, once training it further gains nothing.

These are the library's public names. They are imported at first use, so that a command's `--help` does not wait for
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from predictor.cache.augmented import AugmentedCache as AugmentedCache
    from predictor.cache.compression import Compression as Compression
    from predictor.cache.feature_cache import FeatureCache as FeatureCache
    from predictor.controller import FreezeController as FreezeController
    from predictor.freezing.event import FreezeEvent as FreezeEvent
    from predictor.freezing.freeze import release as release
    from predictor.layers.layer import Layer as Layer
    from predictor.layers.layer import layers_of as layers_of
    from predictor.policies import make_policy as make_policy
    from predictor.policies.base import FreezePolicy as FreezePolicy
    from predictor.policies.base import View as View
    from predictor.probing.probe import ProbedHead as ProbedHead
    from predictor.probing.probe import probe_head as probe_head
    from predictor.sieving import SieveSampler as SieveSampler

_HOME = {
    "AugmentedCache": "predictor.cache.augmented",
    "Compression": "predictor.cache.compression",
    "FeatureCache": "predictor.cache.feature_cache",
    "FreezeController": "predictor.controller",
    "FreezeEvent": "predictor.freezing.event",
    "FreezePolicy": "predictor.policies.base",
    "Layer": "predictor.layers.layer",
    "ProbedHead": "predictor.probing.probe",
    "SieveSampler": "predictor.sieving",
    "View": "predictor.policies.base",
    "layers_of": "predictor.layers.layer",
    "make_policy": "predictor.policies",
    "probe_head": "predictor.probing.probe",
    "release": "predictor.freezing.freeze",
}
__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
