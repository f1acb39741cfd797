"""A trained predictor's file: safetensors, with its configuration, sampling, thresholds and card as JSON."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from predictor.errors import FileFault, UsageError
from predictor.model.config import PredictorConfig
from predictor.model.first_prefix import PrefixModel
from predictor.model.network import FreezePredictor
from predictor.model.sampling import SampleSpec
from predictor.shared.files import written_whole

_FORMAT = "smartfrz-predictor"
_VERSION = 3
_LARGEST_FILE_BYTES = 64 << 20
_SCALING = "scaling."
"""Stands before the names of the scaling's tensors in the network, and not in the file."""


@dataclass(frozen=True)
class PredictorFile:
    """A trained predictor and everything that must be stored with it."""

    model: FreezePredictor
    spec: SampleSpec
    """How the weights that it was trained on were sampled. A training that uses it samples the same way."""
    threshold: float
    """Freeze where the probability is at least this."""
    card: dict[str, Any]
    """What it was trained on, the label rule, and its figures on runs that it never saw. JSON."""
    risks: tuple[tuple[float, float], ...] = ()
    """Rising pairs: percentage points of accuracy that may be lost, and the threshold for that. Empty if the predictor
    has not learned what freezing costs."""
    prefix: PrefixModel | None = None
    """What prefixes cost that freeze before the first step. None if it has not learned that."""

    @property
    def weighs(self) -> bool:
        """Whether doubt is weighed against saving, as in `predictor.model.decision`. Thresholds by risk need it."""
        return bool(self.risks)

    def threshold_for(self, risk: float) -> float:
        """The threshold for a risk: linear between those of the file.

        Raises UsageError for a risk outside of them, and for a file that has none.
        """
        if not self.risks:
            raise UsageError(
                f"risk={risk}: this predictor does not know what freezing costs; train one with --outcomes, or give "
                "threshold="
            )
        known, thresholds = zip(*self.risks, strict=True)
        if not known[0] <= risk <= known[-1]:
            raise UsageError(f"risk={risk}: give percentage points of accuracy from {known[0]:g} to {known[-1]:g}")
        above = next(index for index, other in enumerate(known) if other >= risk)
        below = max(above - 1, 0)
        share = (risk - known[below]) / (known[above] - known[below]) if above > below else 0.0
        return float(thresholds[below] + share * (thresholds[above] - thresholds[below]))


def save_predictor(path: Path, file: PredictorFile) -> None:
    """Write a predictor as safetensors, its configuration as one JSON string in the metadata."""
    from safetensors.torch import save

    meta = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": asdict(file.model.config),
        "spec": asdict(file.spec),
        "threshold": file.threshold,
        "risks": file.risks,
        "card": file.card,
        **({} if file.prefix is None else {"prefix": file.prefix.as_dict()}),
    }
    tensors = {
        name.removeprefix(_SCALING): tensor.detach().cpu().contiguous()
        for name, tensor in file.model.state_dict().items()
    }
    content = save(tensors, {"smartfrz": json.dumps(meta, sort_keys=True)})
    with written_whole(path) as part:
        part.write_bytes(content)


def load_predictor(path: Path | str) -> PredictorFile:
    """Read a predictor. Runs no code from the file. Raises FileFault for a file that is no sound predictor."""
    path = Path(path)
    meta, tensors = _read(path)
    try:
        # On the meta device it takes no memory, whatever widths the file's configuration claims.
        with torch.device("meta"):
            model = FreezePredictor(_build(PredictorConfig, meta["config"]))
        spec = _build(SampleSpec, meta["spec"])
        threshold = float(meta["threshold"])
        risks = tuple((float(risk), float(cut)) for risk, cut in meta.get("risks", ()))
        prefix = PrefixModel.from_dict(meta["prefix"]) if "prefix" in meta else None
        names = {name.removeprefix(_SCALING): name for name in model.state_dict()}
        model.load_state_dict({names[name]: tensor for name, tensor in tensors.items()}, assign=True)
    except (
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        ArithmeticError,
    ) as error:
        reason = " ".join(str(error).split())[:160]
        raise _fault(path, f"its configuration and weights do not fit ({reason})") from error
    if not 0 <= threshold <= 1:
        raise _fault(path, f"threshold {threshold} lies outside [0, 1]")
    if not all(0 <= cut <= 1 for _, cut in risks) or any(not one < other for (one, _), (other, _) in pairwise(risks)):
        raise _fault(path, f"its risks {risks!r:.80} are not rising numbers with thresholds from 0 to 1")
    if model.config.weights > spec.weights:
        raise _fault(path, f"it needs {model.config.weights} weights a layer and its sampling gives {spec.weights}")
    if not all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise _fault(path, "some of its weights are not finite numbers of 32 bits")
    return PredictorFile(model.eval(), spec, threshold, meta.get("card", {}), risks, prefix)


def fingerprint(path: Path | str) -> str:
    """The first 12 hexadecimal digits of a predictor file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise _fault(path, f"it is larger than {_LARGEST_FILE_BYTES >> 20} MiB")
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["smartfrz"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise _fault(path, str(error.strerror or error)) from error
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        if isinstance(error, FileFault):
            raise
        raise _fault(path, f"it is not a predictor file ({error})") from error
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise _fault(path, "it is a safetensors file, but not a predictor")
    if meta.get("version") != _VERSION:
        raise _fault(path, f"it is of version {meta.get('version')!r}, and this program reads version {_VERSION}")
    return meta, tensors


def _build(kind: type[Any], content: Any) -> Any:
    """A configuration from JSON: exactly its fields, each of the type of its default, no width above 65,536.

    A seed is no width. `kind` itself bounds it.
    """
    known = {field.name: type(field.default) for field in fields(kind)}
    if not isinstance(content, dict) or set(content) != set(known):
        raise UsageError(f"{kind.__name__} needs {sorted(known)}")
    for name, value in content.items():
        wanted = (int, float) if known[name] is float else known[name]
        huge = isinstance(value, int) and value > 1 << 16 and name != "seed"
        if not isinstance(value, wanted) or isinstance(value, bool) or huge:
            raise UsageError(f"{kind.__name__}.{name}={value!r}")
    return kind(**content)


def _fault(path: Path, what: str) -> FileFault:
    return FileFault(f"{path}: {what}; make one with `python -m predictor train`")
