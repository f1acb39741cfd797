"""One run's trajectory in memory, the arrays that a file holds of it, and the checksum over them."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data.trajectories.schema import FIELDS, WRITTEN

Arrays = dict[str, npt.NDArray[Any]]
"""Stored arrays by the names of their fields."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Everything that is recorded of one training run. `schema.FIELDS` describes each array."""

    run_id: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    outcome: dict[str, Any]
    layer_names: tuple[str, ...]
    layer_sizes_L: npt.NDArray[np.int64]
    step_T: npt.NDArray[np.int64]
    lr_T: npt.NDArray[np.float64]
    loss_T: npt.NDArray[np.float32]
    seconds_T: npt.NDArray[np.float64]
    weights_TLK: npt.NDArray[np.float32]
    gradient_norm_TL: npt.NDArray[np.float32]
    similarity_TL: npt.NDArray[np.float32]

    @property
    def finished(self) -> bool:
        """Whether the training finished. Otherwise it diverged."""
        return bool(self.outcome.get("status") == "finished")


def arrays_of(trajectory: Trajectory) -> Arrays:
    """The arrays that a file holds. Numbers in the JSON parts that are not finite become null."""
    arrays: Arrays = {}
    for field in WRITTEN:
        value = getattr(trajectory, field.attribute)
        if field.json:
            text = json.dumps(_finite(value), sort_keys=True, allow_nan=False)
            arrays[field.name] = np.frombuffer(text.encode(), dtype=np.uint8)
        else:
            arrays[field.name] = np.ascontiguousarray(value, dtype=field.dtype)
    return arrays


def trajectory_of(run_id: str, arrays: Arrays, parts: Mapping[str, Any]) -> Trajectory:
    """The trajectory of stored arrays and of JSON parts that are `parsed`."""
    values: dict[str, Any] = {
        field.attribute: parts[field.name] if field.json else arrays[field.name] for field in WRITTEN
    }
    values["layer_names"] = tuple(values["layer_names"])
    return Trajectory(run_id=run_id, **values)


def parsed(name: str, text_u1: npt.NDArray[np.uint8]) -> Any:
    """The content of a JSON part. Raises ValueError where it is not JSON, or not an object or list as it should be."""
    try:
        value = json.loads(text_u1.tobytes().decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if name == "layer_names":
        if not isinstance(value, list) or not all(isinstance(part, str) and part for part in value):
            raise ValueError("not a list of names")
    elif not isinstance(value, dict):
        raise ValueError(f"a JSON object is expected, not {type(value).__name__}")
    return value


def checksum(run_id: str, arrays: Arrays) -> str:
    """SHA-256, in hexadecimal, over a run's id and each field that it has: name, type, shape and bytes."""
    digest = hashlib.sha256(f"{run_id}\n".encode())
    for field in (field for field in FIELDS if field.name in arrays):
        array = arrays[field.name]
        digest.update(f"{field.name} {field.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _finite(value: Any) -> Any:
    """The value with None for every NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
