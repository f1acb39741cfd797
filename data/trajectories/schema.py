"""Every field of a trajectory file, in one table: the writer creates from it, the reader checks against it."""

import re
from dataclasses import dataclass

FORMAT = "smartfrz-trajectories"
FORMAT_VERSION = 2
"""Of new files. Version 1 had `update_norm` in every run."""
READABLE_VERSIONS = (1, 2)

MOST = {"T": 100_000, "L": 4_096, "K": 65_536, "bytes": 1 << 20}
"""The longest that each dimension may be; a reader refuses what declares more."""
MOST_RUN_BYTES = 1 << 30
"""What all fields of one run may take in memory."""
MOST_RUNS = 100_000
"""Runs in one file."""

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class Field:
    """One dataset of a run. Dimensions: T snapshots, L layers in execution order, K sampled weights, bytes of JSON."""

    name: str
    dims: tuple[str, ...]
    dtype: str
    """NumPy's name of the stored type, always little-endian."""
    unit: str
    doc: str
    retired: bool = False
    """Whether only older files have it. It counts in their checksums, and nothing else reads it."""

    @property
    def json(self) -> bool:
        """Whether the bytes are UTF-8 JSON."""
        return self.dims == ("bytes",)

    @property
    def attribute(self) -> str:
        """Its name in `Trajectory`, which carries the shape."""
        return self.name if self.json else f"{self.name}_{''.join(self.dims)}"

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return int(self.dtype[-1])


def _json(name: str, doc: str) -> Field:
    return Field(name, ("bytes",), "|u1", "JSON", doc)


FIELDS: tuple[Field, ...] = (
    _json("config", "the run's full configuration: workload, family, source, recipe, seed, sampling, total_steps"),
    _json("provenance", "versions, hardware, when and how the run was made"),
    _json("outcome", "status (finished or diverged), final_accuracy, final_loss, train_seconds, cpu_seconds"),
    _json("layer_names", "names of the freezable layers, in execution order"),
    Field("layer_sizes", ("L",), "<i8", "weights", "number of weights of each layer"),
    Field("step", ("T",), "<i8", "optimizer steps", "steps done when the snapshot was taken; 0 is before the first"),
    Field("lr", ("T",), "<f8", "1", "learning rate"),
    Field("loss", ("T",), "<f4", "1", "mean training loss since the snapshot before; NaN at step 0"),
    Field("seconds", ("T",), "<f8", "s", "training time until then, evaluation left out"),
    Field("weights", ("T", "L", "K"), "<f4", "1", "each layer's sampled weights, at positions that never change"),
    Field("gradient_norm", ("T", "L"), "<f4", "1", "Euclidean norm of the layer's gradient; NaN where there is none"),
    Field("update_norm", ("T", "L"), "<f4", "1", "length of the last optimizer step, by the sample", retired=True),
    Field("similarity", ("T", "L"), "<f4", "1", "CKA of the layer's output to the final network's; NaN where none"),
)
WRITTEN = tuple(field for field in FIELDS if not field.retired)
"""The fields of new files."""


def is_run_id(name: str) -> bool:
    """Whether a name may be a run's id: letters, digits, `.`, `_` and `-`, so that it is a file name everywhere."""
    return _RUN_ID.fullmatch(name) is not None
