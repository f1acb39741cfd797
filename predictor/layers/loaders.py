"""A data loader that is opened beside the training, which opens it again as if it were for the first time."""

import copy
from typing import Any

from torch.utils.data import DataLoader


def beside_the_training(loader: Any) -> Any:
    """A loader with the same samples whose workers end with its iterator; what has no workers that stay, as it is."""
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    fresh = copy.copy(loader)
    vars(fresh).update(persistent_workers=False, _iterator=None)
    return fresh
