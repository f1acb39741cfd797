"""Training a freeze predictor: AdamW on binary cross entropy, the epoch with the lowest validation loss kept."""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from predictor.errors import DivergedError, UsageError
from predictor.model.features import CLOCK
from predictor.model.file import PredictorFile
from predictor.model.network import MOTION, FreezePredictor, PredictorConfig
from predictor.model.sampling import SampleSpec
from predictor.shared.tracking import Tracker
from predictor.training.metrics import Floats, auroc, choose_threshold
from predictor.training.splits import Split, split_by_run
from predictor.training.tokens import Tokens, fit_scaling
from predictor.training.windows import WindowSet

_COLUMNS = ("train_loss", "validation_loss", "validation_auroc", "learning_rate")


@dataclass(frozen=True)
class FitConfig:
    """How a predictor is trained."""

    epochs: int = 10
    """Epochs at most."""
    patience: int = 5
    """Stop after so many epochs without a lower validation loss."""
    epoch_windows: int = 4096
    """Windows drawn for an epoch, at most; neighbours overlap, so that all of them would tell little more."""
    batch_size: int = 128
    """Windows in a batch."""
    learning_rate: float = 0.002
    """AdamW's learning rate at the start; a cosine brings it to zero at the last epoch."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    hide_clock: float = 0.3
    """Share of training windows whose progress, depth and learning rate are hidden, so that the motion must be read:
    how a family's layers settle over time is soon learnt by heart, and is another in the next family."""
    balance: bool = False
    """Let both classes count the same in the loss; the probabilities then no longer are those of the data."""
    scaling: Literal["standard", "robust", "none"] = "standard"
    """Inputs less their mean over their deviation; less their median over their quartiles' distance; or as they are."""
    false_freeze: float = 0.02
    """Threshold: the lowest at which at most this share of the freezes on the validation runs is false."""
    validation: float = 0.2
    """Share of the runs that choose the epoch and the threshold."""
    test: float = 0.2
    """Share of the runs kept for the test."""
    split_seed: int = 0
    """Seed of the split into training, validation and test runs."""
    seed: int = 0
    """Seed of the first weights, the order and the dropout."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, or cuda:N."""

    def __post_init__(self) -> None:
        if min(self.epochs, self.patience, self.epoch_windows, self.batch_size) < 1:
            raise UsageError(f"{self}: epochs, patience, epoch_windows and batch_size count from 1")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise UsageError(f"{self}: learning_rate > 0, weight_decay >= 0")
        if not (0 <= self.false_freeze < 1 and 0 <= self.hide_clock < 1):
            raise UsageError(f"{self}: false_freeze and hide_clock are shares in [0, 1)")


@dataclass(frozen=True)
class Fitted:
    """A trained model, how it came about, and its judgements."""

    model: FreezePredictor
    history: list[dict[str, float | None]]
    """An epoch a row: train_loss, validation_loss, validation_auroc, learning_rate."""
    best_epoch: int
    """From 1; the one whose weights were kept."""
    fit_seconds: float

    def probability_N(self, windows: WindowSet) -> Floats:
        """Probabilities in the order of the set's index."""
        device = str(next(self.model.parameters()).device)
        return _probability(_logits(self.model, Tokens(windows, self.model.config, device)))


@dataclass(frozen=True)
class FitResult:
    """A predictor with the runs that it was trained on, and the threshold that its validation runs chose."""

    fitted: Fitted
    spec: SampleSpec
    split: Split
    threshold: float
    risks: tuple[tuple[float, float], ...] = ()
    """Thresholds by risk, where they are known: see `predictor.training.thresholds`."""

    def file(self, card: dict[str, Any]) -> PredictorFile:
        """What `save_predictor` writes."""
        return PredictorFile(self.fitted.model.cpu().eval(), self.spec, self.threshold, card, self.risks)


def fit(
    windows: WindowSet,
    spec: SampleSpec,
    config: PredictorConfig,
    settings: FitConfig,
    *,
    learn_from: WindowSet | None = None,
    progress: bool = True,
    tracker: Tracker | None = None,
) -> FitResult:
    """Split `windows` by run, train on the training runs, choose epoch and threshold on the validation runs.

    learn_from: the same runs with labels of another rule, to learn from; epoch, threshold and figures always go by the
        labels of `windows`.

    Raises UsageError where the data cannot train a predictor: too few runs, one class only, fewer weights than asked.
    """
    split = split_by_run(windows.runs, settings.validation, settings.test, settings.split_seed)
    train, validation = (learn_from or windows).subset(split.train), windows.subset(split.validation)
    fitted = fit_on(train, validation, config, settings, progress=progress, tracker=tracker)
    probability_N = fitted.probability_N(validation)
    threshold = choose_threshold(validation.labels_N.numpy(), probability_N, settings.false_freeze)
    return FitResult(fitted, spec, split, threshold)


def fit_on(
    train: WindowSet,
    validation: WindowSet,
    config: PredictorConfig,
    settings: FitConfig,
    *,
    progress: bool = False,
    tracker: Tracker | None = None,
) -> Fitted:
    """Train on `train`, keep the best epoch on `validation`. The global random state stays as it was."""
    check_windows(train, config)
    started = time.perf_counter()
    device = pick_device(settings.device)
    with torch.random.fork_rng([device] if device.startswith("cuda") else []):
        torch.manual_seed(settings.seed)
        model = FreezePredictor(config).to(device)
        train_tokens, validation_tokens = Tokens(train, config, device), Tokens(validation, config, device)
        generator = torch.Generator().manual_seed(settings.seed)
        fit_scaling(model, train_tokens.sample(generator), settings.scaling)
        history = _epochs(model, train_tokens, validation_tokens, settings, generator, progress, tracker)
    best_epoch = min(range(len(history)), key=lambda epoch: history[epoch]["validation_loss"] or 0.0) + 1
    return Fitted(model.eval(), history, best_epoch, time.perf_counter() - started)


def check_windows(windows: WindowSet, config: PredictorConfig) -> None:
    """Raise UsageError where `windows` cannot train a predictor of this configuration."""
    recorded = {run.weights_TLK.shape[-1] for run in windows.runs}
    if min(recorded) < config.weights:
        raise UsageError(f"weights={config.weights}: only {min(recorded)} a layer were recorded; ask for that or less")
    for run in windows.runs:
        if not bool(run.weights_TLK.isfinite().all()):
            raise UsageError(f"run {run.run_id}: some of its weights are not finite numbers: leave it out")
    positive = int(windows.labels_N.sum())
    if positive in (0, len(windows)):
        kind = "freezable" if positive else "not yet freezable"
        raise UsageError(
            f"all {len(windows)} training windows are labelled {kind}: nothing can be learnt from one class; change "
            "the label threshold, or gather longer runs"
        )


def pick_device(name: str) -> str:
    """The device that `name` means; `auto` is a GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise UsageError(f"device={name!r}: {str(error).splitlines()[0]}; `auto` takes what there is") from error
    return name


def _epochs(
    model: FreezePredictor,
    train: Tokens,
    validation: Tokens,
    settings: FitConfig,
    generator: torch.Generator,
    progress: bool,
    tracker: Tracker | None,
) -> list[dict[str, float | None]]:
    """Train until the validation loss no longer falls; leave the best epoch's weights in `model`."""
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    pos_weight = _pos_weight(train.labels_N) if settings.balance else None
    history: list[dict[str, float | None]] = []
    best_loss, best_epoch, best_state = float("inf"), 0, copy.deepcopy(model.state_dict())
    with tqdm(range(1, settings.epochs + 1), desc="training", unit="epoch", disable=not progress) as bar:
        for epoch in bar:
            learning_rate = float(schedule.get_last_lr()[0])
            train_loss = _train_epoch(model, train, optimizer, pos_weight, settings, generator)
            schedule.step()
            loss, area = _validate(model, validation, pos_weight)
            if not loss < float("inf"):
                raise DivergedError(f"validation loss {loss} in epoch {epoch}: lower learning_rate")
            history.append(dict(zip(_COLUMNS, (train_loss, loss, area, learning_rate), strict=True)))
            if tracker is not None:
                tracker.log(history[-1], epoch)
            bar.set_postfix_str(f"loss {train_loss:.3f}, validation {loss:.3f}")
            if loss < best_loss:
                best_loss, best_epoch, best_state = loss, epoch, copy.deepcopy(model.state_dict())
            elif epoch - best_epoch >= settings.patience:
                break
    model.load_state_dict(best_state)
    return history


def _train_epoch(
    model: FreezePredictor,
    tokens: Tokens,
    optimizer: torch.optim.Optimizer,
    pos_weight: Tensor | None,
    settings: FitConfig,
    generator: torch.Generator,
) -> float:
    """The mean loss of an epoch."""
    model.train()
    total, seen = torch.zeros((), device=tokens.device), 0
    for places_B in _batches(len(tokens), settings, generator):
        labels_B = tokens.labels_N[places_B.to(tokens.device)].float()
        tokens_BTF = _hide_clock(model, tokens[places_B], settings.hide_clock)
        loss = F.binary_cross_entropy_with_logits(model.judge(tokens_BTF), labels_B, pos_weight=pos_weight)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach() * len(places_B)
        seen += len(places_B)
    return float(total) / seen


def _batches(windows: int, settings: FitConfig, generator: torch.Generator) -> Iterator[Tensor]:
    places_N = torch.randperm(windows, generator=generator)[: settings.epoch_windows]
    yield from torch.split(places_N, settings.batch_size)


def _hide_clock(model: FreezePredictor, tokens_BTF: Tensor, share: float) -> Tensor:
    """Put the mean in the place of some windows' clock. Raw tokens have none."""
    if model.config.inputs == "raw" or not share:
        return tokens_BTF
    first = len(MOTION)
    clock_F = torch.zeros(tokens_BTF.shape[-1], dtype=torch.bool, device=tokens_BTF.device)
    clock_F[first : first + len(CLOCK)] = True
    hidden_B11 = torch.rand(len(tokens_BTF), 1, 1, device=tokens_BTF.device) < share
    return tokens_BTF.where(~(hidden_B11 & clock_F), model.mean)


def _validate(model: FreezePredictor, tokens: Tokens, pos_weight: Tensor | None) -> tuple[float, float | None]:
    """Loss and AUROC."""
    logits_N = _logits(model, tokens)
    loss = F.binary_cross_entropy_with_logits(logits_N, tokens.labels_N.float(), pos_weight=pos_weight)
    area = auroc(tokens.labels_N.cpu().numpy(), _probability(logits_N)) if bool(loss.isfinite()) else None
    return float(loss), area


@torch.no_grad()
def _logits(model: FreezePredictor, tokens: Tokens) -> Tensor:
    model.eval()
    return torch.cat([model.judge(tokens_BTF) for tokens_BTF in tokens.chunks()])


def _probability(logits_N: Tensor) -> Floats:
    probability_N: Floats = logits_N.sigmoid().double().cpu().numpy()
    return probability_N


def _pos_weight(labels_N: Tensor) -> Tensor:
    return (~labels_N).sum() / labels_N.sum()
