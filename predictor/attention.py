"""The freeze predictor: attention over a window of one layer's snapshots, the newest asking the older ones."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from predictor.errors import FileFault, UsageError
from predictor.files import written_whole
from predictor.sampling import SampleSpec, thinned
from predictor.signals import CLOCK, SIGNALS, rms

_FORMAT = "smartfrz-predictor"
_VERSION = 3
_EPS = 1e-8
_LARGEST_FILE_BYTES = 64 << 20
MOTION = ("log_step", "cosine", "log_displacement", "straightness", "change_of_log_step", "evenness")


@dataclass(frozen=True)
class PredictorConfig:
    """The form of a predictor."""

    inputs: Literal["gain", "motion", "raw"] = "gain"
    """What it sees of a snapshot: scale-free statistics of how the weights moved, with all signals ("gain") or those of
    the clock alone ("motion"); or the raw weights, as in the paper."""
    window: int = 10
    """Snapshots in a window (W)."""
    weights: int = 256
    """Sampled weights it looks at (K); at most as many as were recorded."""
    hidden: int = 64
    """Width of the hidden layers of the K, Q and V networks."""
    key: int = 32
    """Width of keys, queries and values."""
    dropout: float = 0.1
    """Dropout in the K, Q and V networks."""

    def __post_init__(self) -> None:
        if self.window < 3:
            raise UsageError(f"window={self.window}: two motions need at least 3 snapshots")
        if min(self.weights, self.hidden, self.key) < 1 or not 0 <= self.dropout < 1:
            raise UsageError(f"{self}: widths count from 1, dropout lies in [0, 1)")

    @property
    def width(self) -> int:
        """Numbers in a token."""
        return self.weights if self.inputs == "raw" else len(MOTION) + len(self.signals)

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals in a token."""
        return {"gain": SIGNALS, "motion": CLOCK, "raw": ()}[self.inputs]


def motion_BTF(windows_BWK: Tensor) -> Tensor:
    """How the weights moved at each of a window's T = W - 1 steps, in the order of MOTION.

    With w_t the sampled weights, s the root mean square (RMS) of the newest, and d_t = (w_t - w_(t-1)) / s:
    log_step: log RMS(d_t). cosine: between d_t and d_(t-1), 0 at the first. log_displacement: log RMS((w_t - w_0) / s).
    straightness: that displacement over the path, sum of RMS(d_i) up to t. change_of_log_step: log_step less the one
    before, 0 at the first. evenness: mean |d_t| / RMS(d_t), which is small where few weights do all the moving.

    None of them changes with the layer's scale, nor with the order or, in expectation, the number of the weights.
    """
    scale_B11 = rms(windows_BWK[:, -1:]).unsqueeze(-1) + _EPS
    scaled_BWK = windows_BWK / scale_B11
    steps_BTK = scaled_BWK.diff(dim=1)
    size_BT = rms(steps_BTK)
    displacement_BT = rms(scaled_BWK[:, 1:] - scaled_BWK[:, :1])
    log_step_BT = (size_BT + _EPS).log()
    cosine_BT = F.cosine_similarity(steps_BTK[:, 1:], steps_BTK[:, :-1], dim=-1, eps=_EPS)
    columns = (
        log_step_BT,
        F.pad(cosine_BT, (1, 0)),
        (displacement_BT + _EPS).log(),
        displacement_BT / (size_BT.cumsum(dim=1) + _EPS),
        F.pad(log_step_BT.diff(dim=1), (1, 0)),
        steps_BTK.abs().mean(dim=-1) / (size_BT + _EPS),
    )
    return torch.stack(columns, dim=-1)


class FreezePredictor(nn.Module):
    """Answers whether a layer may be frozen now.

    The layout is SmartFRZ's as third parties read it: three networks make keys, queries and values; the query comes
    from the newest token, keys and values from the older ones; one head; z = sum softmax(q k_t / sqrt(d)) v_t; an
    output network. Ours: but for `inputs="raw"` tokens are scale-free (raw weights do not transfer to another
    architecture), and the newest token's own value joins z; else it would reach the output through the scores alone.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.networks = _Networks(3, (config.width, config.hidden, config.hidden, config.key), config.dropout)
        joined = config.key * (1 if config.inputs == "raw" else 2)
        self.output = nn.Sequential(nn.Linear(joined, config.key), nn.ReLU(), nn.Linear(config.key, 1))
        self.register_buffer("mean", torch.zeros(config.width))
        self.register_buffer("deviation", torch.ones(config.width))

    def forward(self, windows_BWK: Tensor, signals_BWS: Tensor) -> Tensor:
        """logit_B: above zero means more likely freezable than not.

        windows_BWK: the sampled weights, oldest snapshot first; of more weights than the configured K, K are taken.
        signals_BWS: the signals at the same snapshots, in the order of predictor.signals.SIGNALS; at least the clock's
            where it takes no others.
        """
        return self.judge(self.tokens(windows_BWK, signals_BWS))

    def tokens(self, windows_BWK: Tensor, signals_BWS: Tensor) -> Tensor:
        """tokens_BTF before scaling. They hold no parameter, so a training computes them once."""
        if windows_BWK.shape[1] != self.config.window or windows_BWK.shape[2] < self.config.weights:
            raise UsageError(
                f"windows of shape {tuple(windows_BWK.shape)}: this predictor needs {self.config.window} snapshots of "
                f"at least {self.config.weights} weights"
            )
        if signals_BWS.shape[-1] < len(self.config.signals):
            raise UsageError(f"{signals_BWS.shape[-1]} signals: this predictor needs {', '.join(self.config.signals)}")
        windows_BWK = thinned(windows_BWK, self.config.weights).float()
        if self.config.inputs == "raw":
            return windows_BWK
        signals_BTS = signals_BWS[:, 1:, : len(self.config.signals)].float()
        return torch.cat([motion_BTF(windows_BWK), signals_BTS], dim=-1)

    def judge(self, tokens_BTF: Tensor) -> Tensor:
        """logit_B from unscaled tokens."""
        tokens_BTF = (tokens_BTF - self.mean) / (self.deviation + _EPS)
        made_3BTD = self.networks(tokens_BTF.flatten(0, 1)).unflatten(1, tokens_BTF.shape[:2])
        key_BTD, query_BTD, value_BTD = made_3BTD.unbind()
        z_B1D = F.scaled_dot_product_attention(query_BTD[:, -1:], key_BTD[:, :-1], value_BTD[:, :-1])
        z_BD = z_B1D.squeeze(1)
        if self.config.inputs != "raw":
            z_BD = torch.cat([z_BD, value_BTD[:, -1]], dim=-1)
        logit_B: Tensor = self.output(z_BD).squeeze(-1)
        return logit_B

    @torch.no_grad()
    def calibrate(self, slope: float, shift: float) -> None:
        """From here on answer slope x logit + shift."""
        last = self.output[-1]
        assert isinstance(last, nn.Linear)
        last.weight.mul_(slope)
        last.bias.mul_(slope).add_(shift)

    @torch.no_grad()
    def fit_scaling(self, tokens_NTF: Tensor) -> None:
        """Take mean and deviation from the training windows' tokens. They are stored with the weights."""
        flat = tokens_NTF.flatten(0, 1)
        if self.config.inputs == "raw":  # one scale for all: a position has no meaning across layers
            self.mean.fill_(float(flat.mean()))
            self.deviation.fill_(float(flat.std()))
        else:
            self.mean.copy_(flat.mean(dim=0))
            self.deviation.copy_(flat.std(dim=0))


class _Networks(nn.Module):
    """Several networks of the same widths side by side, on the same inputs: as many calls as one of them would take.

    A decision is so small that its time is that of the calls.
    """

    def __init__(self, count: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        shapes = list(pairwise(widths))
        linears = [[nn.Linear(inputs, outputs) for inputs, outputs in shapes] for _ in range(count)]
        stacks = list(zip(*linears, strict=True))
        self.weights = nn.ParameterList(torch.stack([one.weight.detach().T for one in stack]) for stack in stacks)
        self.biases = nn.ParameterList(torch.stack([one.bias.detach()[None] for one in stack]) for stack in stacks)

    def forward(self, inputs_NF: Tensor) -> Tensor:
        """outputs_CND of the C networks; ReLU and dropout between the layers."""
        x_CNF = inputs_NF.expand(self.weights[0].shape[0], *inputs_NF.shape)
        for place, (weight_CFD, bias_C1D) in enumerate(zip(self.weights, self.biases, strict=True)):
            if place:
                x_CNF = F.dropout(x_CNF.relu(), self.dropout, self.training)
            x_CNF = torch.baddbmm(bias_C1D, x_CNF, weight_CFD)
        return x_CNF


@dataclass(frozen=True)
class PredictorFile:
    """A trained predictor and all that must travel with it."""

    model: FreezePredictor
    spec: SampleSpec
    """How the weights that it was trained on were sampled; the run time samples the same way."""
    threshold: float
    """Freeze where the probability is at least this."""
    card: dict[str, Any]
    """What it was trained on, the label rule, and how well it does on what it never saw. JSON."""
    risks: tuple[tuple[float, float], ...] = ()
    """Pairs, rising: percentage points of accuracy that may be lost, and the threshold for that; empty where nothing is
    known of what freezing costs."""

    @property
    def weighs(self) -> bool:
        """Whether doubt is weighed against saving (`predictor.weighing`), for which thresholds by risk are chosen."""
        return bool(self.risks)

    def threshold_for(self, risk: float) -> float:
        """The threshold for a risk, linear between those of the file. Raises UsageError for a risk outside of them."""
        if not self.risks:
            raise UsageError(
                f"risk={risk}: this predictor does not know what freezing costs; train one with --outcomes, or give "
                "threshold="
            )
        known, thresholds = zip(*self.risks, strict=True)
        if not known[0] <= risk <= known[-1]:
            raise UsageError(f"risk={risk}: give percentage points of accuracy from {known[0]:g} to {known[-1]:g}")
        above = next(place for place, other in enumerate(known) if other >= risk)
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
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in file.model.state_dict().items()}
    content = save(tensors, {"smartfrz": json.dumps(meta, sort_keys=True)})
    with written_whole(path) as part:
        part.write_bytes(content)


def load_predictor(path: Path | str) -> PredictorFile:
    """Read a predictor. Runs no code from the file; raises FileFault when it is not what it should be."""
    path = Path(path)
    meta, tensors = _read(path)
    try:
        # Built without memory: the file's own tensors are what it takes, whatever widths its configuration claims.
        with torch.device("meta"):
            model = FreezePredictor(_build(PredictorConfig, meta["config"]))
        spec = _build(SampleSpec, meta["spec"])
        threshold = float(meta["threshold"])
        risks = tuple((float(risk), float(cut)) for risk, cut in meta.get("risks", ()))
        model.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise _fault(path, f"its configuration and weights do not fit ({reason})") from error
    if not 0 <= threshold <= 1:
        raise _fault(path, f"threshold {threshold} lies outside [0, 1]")
    if not all(0 <= cut <= 1 for _, cut in risks) or any(not one < other for (one, _), (other, _) in pairwise(risks)):
        raise _fault(path, f"its risks {risks!r:.80} are no rising numbers with thresholds from 0 to 1")
    if model.config.weights > spec.weights:
        raise _fault(path, f"it wants {model.config.weights} weights a layer and its sampling gives {spec.weights}")
    if not all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise _fault(path, "some of its weights are not finite numbers of 32 bits")
    return PredictorFile(model.eval(), spec, threshold, meta.get("card", {}), risks)


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
    """A configuration from JSON: exactly its fields, each of the type of its default, no width beyond reason.

    A seed is no width; `kind` itself bounds it.
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
