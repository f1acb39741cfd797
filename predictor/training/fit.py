"""Training a freeze predictor: AdamW on binary cross entropy. The epoch with the lowest validation loss is kept."""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from predictor.errors import DivergedError, UsageError
from predictor.model.config import CLOCK, MOTION, PredictorConfig
from predictor.model.file import PredictorFile
from predictor.model.first_prefix import PrefixModel
from predictor.model.network import FreezePredictor
from predictor.model.sampling import SampleSpec
from predictor.shared.tracking import Tracker
from predictor.training.config import FitConfig
from predictor.training.continued import check_sampling, start_of
from predictor.training.dataset import Tokens, WindowSet
from predictor.training.metrics import Floats, auroc, choose_threshold
from predictor.training.splits import Split, split_by_run

_COLUMNS = ("train_loss", "validation_loss", "validation_auroc", "learning_rate")
_QUARTILES_TO_DEVIATION = 1.349  # the distance of a normal distribution's quartiles, in deviations


@dataclass(frozen=True)
class Fitted:
    """A trained network and how it was trained."""

    model: FreezePredictor
    history: list[dict[str, float | None]]
    """An epoch a row: train_loss, validation_loss, validation_auroc, learning_rate."""
    best_epoch: int
    """From 1: the epoch whose weights were kept. 0 for a predictor that was continued and got no better."""
    fit_seconds: float

    def probability_N(self, windows: WindowSet) -> Floats:
        """The predicted probabilities, in the order of the set's index."""
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
    """Thresholds by risk, if they are known: see `predictor.training.thresholds`."""
    prefix: PrefixModel | None = None
    """What prefixes cost that freeze before the first step, as the predictor that was continued knew it."""

    def file(self, card: dict[str, Any]) -> PredictorFile:
        """What `save_predictor` writes."""
        return PredictorFile(self.fitted.model.cpu().eval(), self.spec, self.threshold, card, self.risks, self.prefix)


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

    Args:
        windows: labelled windows of finished runs.
        spec: how the runs were sampled.
        config: what the predictor sees, and its widths.
        settings: how it is trained.
        learn_from: the same runs with labels of another rule, to train on. Epoch, threshold and figures always use the
            labels of `windows`.
        progress: whether to show a progress bar.
        tracker: where the figures of each epoch go.

    Raises:
        UsageError: for data that cannot train a predictor: too few runs, one class only, fewer weights than configured,
            another sampling than that of the predictor to go on from.
    """
    start = start_of(settings)
    check_sampling(start, spec)
    split = split_by_run(windows.runs, settings.validation, settings.test, settings.split_seed)
    train, validation = (learn_from or windows).subset(split.train), windows.subset(split.validation)
    fitted = fit_on(train, validation, config, settings, progress=progress, tracker=tracker)
    probability_N = fitted.probability_N(validation)
    threshold = choose_threshold(validation.labels_N.numpy(), probability_N, settings.false_freeze)
    return FitResult(fitted, spec, split, threshold, prefix=None if start is None else start.prefix)


def fit_on(
    train: WindowSet,
    validation: WindowSet,
    config: PredictorConfig,
    settings: FitConfig,
    *,
    progress: bool = False,
    tracker: Tracker | None = None,
) -> Fitted:
    """Train on `train`, keep the best epoch on `validation`. The global random state is left as it was."""
    check_windows(train, config)
    started = time.perf_counter()
    device = pick_device(settings.device)
    with torch.random.fork_rng([device] if device.startswith("cuda") else []):
        torch.manual_seed(settings.seed)
        model = FreezePredictor(config).to(device)
        train_tokens, validation_tokens = Tokens(train, config, device), Tokens(validation, config, device)
        generator = torch.Generator().manual_seed(settings.seed)
        start = start_of(settings)
        if start is None:
            fit_scaling(model, train_tokens.sample(generator), settings.scaling)
        else:
            model.load_state_dict(start.model.state_dict())
        history, best_epoch = _epochs(model, train_tokens, validation_tokens, settings, generator, progress, tracker)
    return Fitted(model.eval(), history, best_epoch, time.perf_counter() - started)


def check_windows(windows: WindowSet, config: PredictorConfig) -> None:
    """Raise UsageError if `windows` cannot train a predictor of this configuration."""
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
            f"all {len(windows)} training windows are labelled {kind}: a predictor needs both classes; change the "
            "label threshold, or gather longer runs"
        )


@torch.no_grad()
def fit_scaling(model: FreezePredictor, tokens_NTD: Tensor, scaling: str) -> None:
    """Set how the model scales its inputs: "standard", "robust" (median and quartiles) or "none".

    All raw weights share one scale, because a position has no meaning across layers.
    """
    raw = model.config.inputs == "raw"
    mean, deviation = model.scaling.mean, model.scaling.deviation
    flat = tokens_NTD.flatten(0, 1)
    if scaling == "standard":
        mean.copy_(flat.mean() if raw else flat.mean(dim=0))
        deviation.copy_(flat.std() if raw else flat.std(dim=0))
    if scaling == "robust":
        flat = flat.reshape(-1, 1 if raw else flat.shape[-1])
        low_D, middle_D, high_D = (flat.sort(dim=0).values[int(part * (len(flat) - 1))] for part in (0.25, 0.5, 0.75))
        mean.copy_(middle_D.expand_as(mean))
        deviation.copy_(((high_D - low_D) / _QUARTILES_TO_DEVIATION).expand_as(deviation))


def pick_device(name: str) -> str:
    """The device that `name` means. `auto` is a GPU if there is one. Raises UsageError for one that is not there."""
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
) -> tuple[list[dict[str, float | None]], int]:
    """Train until the validation loss no longer falls. The best epoch's weights are left in `model`.

    Returns:
        A row an epoch, and the best epoch, from 1. It is 0 where the predictor that is continued was the best.
    """
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    pos_weight = _pos_weight(train.labels_N) if settings.balance else None
    history: list[dict[str, float | None]] = []
    best_loss, best_epoch, best_state = float("inf"), 0, copy.deepcopy(model.state_dict())
    if settings.continue_from:
        best_loss, _ = _validate(model, validation, pos_weight)
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
    return history, best_epoch


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
    for indices_B in _batches(len(tokens), settings, generator):
        labels_B = tokens.labels_N[indices_B.to(tokens.device)].float()
        tokens_BTD = _hide_clock(model, tokens[indices_B], settings.hide_clock)
        loss = F.binary_cross_entropy_with_logits(model(tokens_BTD), labels_B, pos_weight=pos_weight)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach() * len(indices_B)
        seen += len(indices_B)
    return float(total) / seen


def _batches(windows: int, settings: FitConfig, generator: torch.Generator) -> Iterator[Tensor]:
    indices_N = torch.randperm(windows, generator=generator)[: settings.epoch_windows]
    yield from torch.split(indices_N, settings.batch_size)


def _hide_clock(model: FreezePredictor, tokens_BTD: Tensor, share: float) -> Tensor:
    """Put the mean in the place of some windows' clock. Raw tokens have none."""
    if model.config.inputs == "raw" or not share:
        return tokens_BTD
    first = len(MOTION)
    clock_D = torch.zeros(tokens_BTD.shape[-1], dtype=torch.bool, device=tokens_BTD.device)
    clock_D[first : first + len(CLOCK)] = True
    hidden_B11 = torch.rand(len(tokens_BTD), 1, 1, device=tokens_BTD.device) < share
    return tokens_BTD.where(~(hidden_B11 & clock_D), model.scaling.mean)


def _validate(model: FreezePredictor, tokens: Tokens, pos_weight: Tensor | None) -> tuple[float, float | None]:
    """Loss and AUROC."""
    logits_N = _logits(model, tokens)
    loss = F.binary_cross_entropy_with_logits(logits_N, tokens.labels_N.float(), pos_weight=pos_weight)
    area = auroc(tokens.labels_N.cpu().numpy(), _probability(logits_N)) if bool(loss.isfinite()) else None
    return float(loss), area


@torch.no_grad()
def _logits(model: FreezePredictor, tokens: Tokens) -> Tensor:
    model.eval()
    return torch.cat([model(tokens_BTD) for tokens_BTD in tokens.chunks()])


def _probability(logits_N: Tensor) -> Floats:
    probability_N: Floats = logits_N.sigmoid().double().cpu().numpy()
    return probability_N


def _pos_weight(labels_N: Tensor) -> Tensor:
    return (~labels_N).sum() / labels_N.sum()
