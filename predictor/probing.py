"""A probed head: before a fine-tuning, the new head is fitted to the features that the pretrained layers give."""

import fnmatch
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from predictor.errors import UsageError
from predictor.layers.isolated_pass import isolated
from predictor.layers.parts import unwrapped
from predictor.layers.tensors import converted, tensors_anywhere_in

Unpack = Callable[[Any], tuple[Any, Tensor]]
"""From a batch to the model's inputs (a tensor, a tuple of inputs or a dict of named ones) and the labels."""
_LABELS = ("labels", "label", "label_ids")
_FOLD = 5
"""One of so many samples of each class is held out."""
_FEWEST = 10
"""Samples that have to be held out, to decide by."""
_PENALTIES = tuple(10 ** (-step / 2) for step in range(13))
"""Strengths of the penalty that are tried, the strongest first: 1 to 1e-6, for features of mean square length 1."""
_WORSE = 1.02
"""By this factor the held-out loss may rise above the least before no weaker penalty is tried."""
_ITERATIONS = 50
_KEPT = 0.85
"""The share of the best probe's gain that the chosen one has to reach, so that the head is as small as it can be: a
confident head leaves the layers before it little to learn from, and what they learn fits it (Ren et al. 2302.05779)."""
_CLEAR, _ERRORS = 0.1, 2.0
"""The share of the loss, and the standard errors, by which a probe has to be better."""


class _Unfit(Exception):
    """There is no probe, for the reason that it gives."""


@dataclass(frozen=True)
class ProbedHead:
    """What `probe_head` did.

    Losses are mean cross entropies. "Held out" means: on the samples that the fit did not see.
    """

    probed: bool
    """Whether the head has the fitted weights now."""
    reason: str = ""
    """Why it was left as it was; empty where it was probed."""
    head: str = ""
    """The name of the head's linear layer; empty where none was found."""
    samples: int = 0
    """Samples whose features were taken."""
    passed: int = 0
    """Samples that the model was run on. Those of the first batch count twice: the first time shows the head."""
    penalty: float = math.nan
    """The strength of the penalty that was chosen."""
    accuracy: float = math.nan
    """The probe's held-out accuracy, a share of 1."""
    loss: float = math.nan
    """The probe's held-out loss."""
    loss_before: float = math.nan
    """The held-out loss of the head as it was, or of the frequencies of the classes where that is less."""
    train_accuracy: float = math.nan
    """The probe's accuracy on the samples that it was fitted to."""
    train_loss: float = math.nan
    """Its loss on them."""
    fit_flops: int = 0
    """FLOPs of the fit's matrix products. The model's passes are not among them."""
    seconds: float = 0.0
    """Wall-clock time of all of it."""


def probe_head(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    head: str | None = None,
    unpack: Unpack | None = None,
    samples: int = 20_000,
) -> ProbedHead:
    """Fit the last linear layer of a classifier to the features that it gets, where that helps.

        report = probe_head(model, loader)             # before the first step
        print(report.probed, report.reason, report.accuracy)

    One pass over the loader in evaluation mode collects the head's inputs. A multinomial logistic regression with an L2
    penalty is fitted to four fifths of them, with weaker and weaker penalties until the loss rises on the fifth that is
    held out, each class in proportion. The strongest penalty with most of the best one's gain is taken. Weight and bias
    go into the head. All else is afterwards as it was: modes, buffers, random generators, other parameters.

    **It abstains**, leaves the head as it was, and gives the reason: where the probe is not clearly better on held-out
    samples than the head as it was and than the frequencies of the classes; where a class has no sample; where the
    task is not one label a sample out of as many classes as the head has outputs (regression, several labels, labels by
    token); where the model's output is not that of a linear layer, as with a convolution for a head, or that layer does
    not train, is tied or is parametrized; and where the model is sharded.

    **The head** is the linear layer that runs last. It is proved on each batch that the model's logits are its output,
    unchanged; of a model that classifies each token and then picks one, the features of that token are taken.

    Call it before the first optimizer step and before copies of the model are made (an exponential average, a
    teacher). Under autocast, call it in that context. With DistributedDataParallel all processes call it, each on its
    own loader, and get the head of the first one. A FeatureCache whose prefix is already frozen is filled by the same
    pass, if each batch comes inside `cache.batch(ids)`:

        def batches():
            for ids, x, y in loader:
                with cache.batch(ids):
                    yield x, y

    Args:
        model: the model, with or without what is wrapped around it.
        loader: the training's batches, without random augmentation if possible: (inputs, labels), (input, input,
            labels), or a dict with "labels" whose other entries are named inputs. It is iterated over once; a sampler
            that counts its epochs, such as SieveSampler, counts this one.
        head: the linear layer's name, or that of a module with it; by default it is found.
        unpack: makes inputs and labels of a batch, where batches have another form.
        samples: the number of samples after which the pass ends. Their features stay in memory until the fit is done.

    Raises:
        UsageError: `samples` is below 1; `head` names no linear layer; a batch has another form; the loader is empty;
            the model cannot be called with the inputs; or it is called in inference mode.
    """
    if samples < 1:
        raise UsageError(f"samples={samples}: give the number of samples to look at, from 1")
    if torch.is_inference_mode_enabled():
        raise UsageError("probe_head was called in inference mode, in which nothing can be fitted: call it outside")
    began = time.perf_counter()
    bare = unwrapped(model)
    collector = _Collector(bare, _candidates(bare, head), unpack or _unpacked)
    try:
        report, weights = _probed(collector, loader, samples)
    except _Unfit as reason:
        report, weights = collector.report(reason=str(reason)), None
    parallel = next((each for each in model.modules() if isinstance(each, DistributedDataParallel)), None)
    if parallel is not None:
        report, weights = _of_the_first(parallel, report, weights)
    if weights is not None:
        _write(bare.get_submodule(report.head), weights)
    return replace(report, seconds=time.perf_counter() - began)


def _unpacked(batch: Any) -> tuple[Any, Tensor]:
    """The inputs and labels of a batch of a usual form."""
    if isinstance(batch, Mapping):
        key = next((name for name in _LABELS if name in batch), None)
        if key is not None:
            return {name: value for name, value in batch.items() if name != key}, batch[key]
        found = f"a dict of {', '.join(map(str, batch))}"
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        return tuple(batch[:-1]), batch[-1]
    else:
        found = type(batch).__name__
    raise UsageError(
        f"the loader gives {found}, which has no labels that can be told apart: give (inputs, labels), a dict with "
        "'labels', or unpack=, a function from a batch to inputs and labels"
    )


def _candidates(model: nn.Module, head: str | None) -> dict[nn.Module, str]:
    """The linear layers that may be the head, with their names."""
    linear = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if head is not None:
        named = [module for name, module in model.named_modules() if fnmatch.fnmatchcase(name, head)]
        inside = {part for module in named for part in module.modules()}
        linear = {module: name for module, name in linear.items() if module in inside}
        if not linear:
            raise UsageError(f"head={head!r} names no linear layer, nor a module with one: see model.named_modules()")
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {
        module: name
        for module, name in linear.items()
        # Others are not looked at: a hook on a frozen module would be one that a FeatureCache has to mind.
        if module.weight.requires_grad
        and module.weight.is_floating_point()
        and not is_parametrized(module)
        and all(holders[id(parameter)] == 1 for parameter in module.parameters())
    }


class _Collector:
    """Runs a model over a loader, and collects what its head gets."""

    def __init__(self, model: nn.Module, candidates: Mapping[nn.Module, str], unpack: Unpack) -> None:
        self._model, self._candidates, self._unpack = model, candidates, unpack
        self.linear: Any = None
        self._samples = self._passed = 0

    def report(self, **found: Any) -> ProbedHead:
        """What is known so far."""
        name = self._candidates.get(self.linear, "")
        return ProbedHead(False, head=name, samples=self._samples, passed=self._passed, **found)

    def collect(self, loader: Iterable[Any], most: int) -> tuple[Tensor, Tensor]:
        """Features x_NF in float32, and labels y_N on the CPU."""
        if any(hasattr(parameter, "device_mesh") for parameter in self._model.parameters()):
            raise _Unfit("the model is sharded (FSDP2): call probe_head before fully_shard")
        features, labels = [], []
        # With gradients: a FeatureCache takes a pass without them for a test.
        with isolated(self._model, gradients=True), _once(loader) as iterator:
            for batch in iterator:
                inputs, y_B = self._unpack(batch)
                _check_labels(y_B)
                if self.linear is None:
                    self.linear = self._last_called(inputs, len(y_B))
                features.append(self._features(inputs, len(y_B)))
                labels.append(y_B.detach().cpu().long())
                self._samples += len(y_B)
                if self._samples >= most:
                    break
        if not features:
            raise UsageError("loader gives no batch: give one that can be iterated over more than once")
        return torch.cat(features), torch.cat(labels)

    def _last_called(self, inputs: Any, samples: int) -> nn.Module:
        called: list[nn.Module] = []

        def note(module: nn.Module, *_: Any) -> None:
            called.append(module)

        with _hooked(self._candidates, note):
            self._call(inputs, samples)
        if not called:
            raise _Unfit("the model has no linear layer that trains, shares no weight, and is called in its pass")
        return called[-1]

    def _features(self, inputs: Any, samples: int) -> Tensor:
        """What the head makes the logits of: one row a sample.

        The head's output is replaced by the number of each row. So the logits show which rows they are, and that
        nothing else is made of them.
        """
        taken: list[Tensor] = []

        def mark(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x_RF = args[0].detach().flatten(0, -2)
            taken.append(x_RF)
            marks_R1 = torch.arange(len(x_RF), dtype=torch.float32, device=output.device)[:, None]
            return marks_R1.repeat(1, output.shape[-1]).view(output.shape)

        with _hooked([self.linear], mark):
            output = self._call(inputs, samples)
        for logits_BC in _tensors_in(output):
            if logits_BC.shape == (samples, self.linear.out_features) and len(taken) == 1:
                rows_B = logits_BC[:, 0].detach().long().clamp(0, len(taken[0]) - 1)
                if bool((logits_BC == rows_B[:, None]).all()):
                    return taken[0].index_select(0, rows_B).float()
        raise _Unfit(
            f"the model's output is not that of its last linear layer, {self._candidates[self.linear]!r}, one row a "
            "sample"
        )

    def _call(self, inputs: Any, samples: int) -> Any:
        self._passed += samples
        device = next(self._model.parameters()).device
        args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        try:
            args, kwargs = converted((args, kwargs), lambda tensor: tensor.detach().to(device, copy=True))
            return self._model(*args, **kwargs)
        except Exception as error:
            raise UsageError(
                f"{type(self._model).__name__} cannot be called with the inputs of a batch ({type(error).__name__}: "
                f"{error}): where a batch is not (inputs, labels), give unpack=, a function from it to both"
            ) from error


@contextmanager
def _once(loader: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """An iterator over a loader, after which the loader's generators are as they were."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    generators = [getattr(owner, "generator", None) for owner in owners]
    states = [(each, each.get_state()) for each in generators if isinstance(each, torch.Generator)]
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        if isinstance(iterator, Generator):
            iterator.close()  # now, not when it is collected: it may be inside `cache.batch`
        for generator, state in states:
            generator.set_state(state)


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors_in(output: Any) -> list[Tensor]:
    return tensors_anywhere_in(dict(output) if isinstance(output, Mapping) else output)


def _check_labels(y_B: Any) -> None:
    if not isinstance(y_B, Tensor):
        raise UsageError(f"labels are a {type(y_B).__name__}: give a tensor, by unpack= where the loader gives none")
    if y_B.dim() != 1 or y_B.is_floating_point() or y_B.dtype == torch.bool:
        kind = str(y_B.dtype).removeprefix("torch.")
        raise _Unfit(f"labels are {kind} of shape {tuple(y_B.shape)}, not one class a sample")


def _probed(collector: _Collector, loader: Iterable[Any], samples: int) -> tuple[ProbedHead, tuple[Tensor, ...] | None]:
    """The report, and the head's new weight and bias; None where it is to stay as it is."""
    x_NF, y_N = collector.collect(loader, samples)
    linear = collector.linear
    _check_data(x_NF, y_N, linear.out_features)
    held_N = _held_out(y_N)
    if int(held_N.sum()) < _FEWEST:
        raise _Unfit(f"{len(y_N)} samples leave {int(held_N.sum())} to be held out, of {_FEWEST} at least")
    with _without_autocast(x_NF.device), torch.enable_grad():
        fitted, held = ((x_NF[some_N.to(x_NF.device)], y_N[some_N]) for some_N in (~held_N, held_N))
        before_H = _losses_before(linear, fitted[1], held)
        fit = _Fit(*fitted, linear.out_features, linear.bias is not None)
        point = _chosen(fit, held, before_H.mean().item())
    report = collector.report(
        penalty=point.penalty,
        accuracy=point.accuracy,
        loss=point.loss,
        loss_before=before_H.mean().item(),
        train_accuracy=point.train_accuracy,
        train_loss=point.train_loss,
        fit_flops=fit.flops,
    )
    if reason := _too_little(point.losses_H, before_H):
        return replace(report, reason=reason), None
    return replace(report, probed=True), point.weights


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _check_data(x_NF: Tensor, y_N: Tensor, classes: int) -> None:
    if classes < 2 or not 0 <= int(y_N.min()) <= int(y_N.max()) < classes:
        raise _Unfit(f"labels are {int(y_N.min())} to {int(y_N.max())}, and the head has {classes} outputs")
    missing = (torch.bincount(y_N, minlength=classes) == 0).nonzero().flatten().tolist()
    if missing:
        raise _Unfit(
            f"{len(missing)} of {classes} classes, {missing[0]} first, have none of the {len(y_N)} samples: shuffle, "
            "or raise samples="
        )
    if not bool(x_NF.isfinite().all()):
        raise _Unfit("the features are not all finite")


def _held_out(y_N: Tensor) -> Tensor:
    """Which samples are held out: every fifth of each class, in the order in which they came."""
    order_N = torch.argsort(y_N, stable=True)
    sorted_N = y_N[order_N]
    rank_N = torch.empty_like(y_N)
    rank_N[order_N] = torch.arange(len(y_N)) - torch.searchsorted(sorted_N, sorted_N)
    return rank_N % _FOLD == _FOLD // 2


def _losses_before(linear: Any, fitted_y: Tensor, held: tuple[Tensor, Tensor]) -> Tensor:
    """The held-out losses without a probe: of the head as it is, or of the frequencies where those are less."""
    x_HF, y_H = held[0], held[1].to(held[0].device)
    bias = None if linear.bias is None else linear.bias.detach().float()
    own_H = F.cross_entropy(F.linear(x_HF, linear.weight.detach().float(), bias), y_H, reduction="none")
    share_C = torch.bincount(fitted_y, minlength=linear.out_features) / len(fitted_y)
    prior_H = -share_C.log().to(y_H.device)[y_H]
    return own_H if own_H.mean() < prior_H.mean() else prior_H


@dataclass(frozen=True)
class _Point:
    """A fit with one penalty."""

    penalty: float
    weights: tuple[Tensor, ...]
    losses_H: Tensor
    accuracy: float
    train_accuracy: float
    train_loss: float

    @property
    def loss(self) -> float:
        """The mean held-out loss."""
        return self.losses_H.mean().item()


class _Fit:
    """A multinomial logistic regression, fitted with one penalty after the other, each from the one before.

    Features are centred, where the head has a bias, and scaled by one number to a mean square length of 1. Scaling each
    alone would give much weight to features that hardly vary.
    """

    def __init__(self, x_NF: Tensor, y_N: Tensor, classes: int, bias: bool) -> None:
        self._mean_F = x_NF.mean(dim=0) * bias
        x_NF = x_NF - self._mean_F
        self._scale = x_NF.square().sum(dim=1).mean().sqrt().clamp_min(1e-12)
        self._x_NF, self._y_N = x_NF / self._scale, y_N.to(x_NF.device)
        self._weight_CF = x_NF.new_zeros(classes, x_NF.shape[1], requires_grad=True)
        self._bias_C = x_NF.new_zeros(classes, requires_grad=bias)
        self.flops = 0

    def fit(self, penalty: float) -> None:
        """Minimise the mean cross entropy plus half of the penalty times the squared length of the weights."""
        wanted = [parameter for parameter in (self._weight_CF, self._bias_C) if parameter.requires_grad]
        optimizer = torch.optim.LBFGS(wanted, max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            self.flops += 4 * self._x_NF.numel() * len(self._bias_C)  # the logits, and the gradient of the weights
            logits_NC = F.linear(self._x_NF, self._weight_CF, self._bias_C)
            value = F.cross_entropy(logits_NC, self._y_N) + penalty / 2 * self._weight_CF.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def point(self, penalty: float, held: tuple[Tensor, Tensor]) -> _Point:
        """What the fit with this penalty gives."""
        weight_CF = self._weight_CF / self._scale
        weights = (weight_CF, self._bias_C - weight_CF @ self._mean_F) if self._bias_C.requires_grad else (weight_CF,)
        x_HF, y_H = held[0], held[1].to(held[0].device)
        held_HC, own_NC = F.linear(x_HF, *weights), F.linear(self._x_NF, self._weight_CF, self._bias_C)
        return _Point(
            penalty,
            tuple(each.clone() for each in weights),
            F.cross_entropy(held_HC, y_H, reduction="none"),
            (held_HC.argmax(dim=1) == y_H).float().mean().item(),
            (own_NC.argmax(dim=1) == self._y_N).float().mean().item(),
            F.cross_entropy(own_NC, self._y_N).item(),
        )


def _chosen(fit: _Fit, held: tuple[Tensor, Tensor], before: float) -> _Point:
    """The strongest penalty with which most of the best probe's gain on held-out samples is there."""
    points: list[_Point] = []
    for penalty in _PENALTIES:
        fit.fit(penalty)
        points.append(fit.point(penalty, held))
        least = min(point.loss for point in points)
        if points[-1].loss > _WORSE * least:
            break
    enough = _KEPT * (before - least)
    return next((point for point in points if before - point.loss >= enough), points[0])


def _too_little(losses_H: Tensor, before_H: Tensor) -> str:
    """Why the probe's held-out losses are not clearly below those without it; empty where they are."""
    gain_H = (before_H - losses_H).double()
    gain, before = gain_H.mean().item(), before_H.mean().item()
    error = gain_H.std().item() / math.sqrt(len(gain_H)) if len(gain_H) > 1 else math.inf
    if gain >= max(_CLEAR * before, _ERRORS * error):
        return ""
    return (
        f"the probe's loss on {len(gain_H)} held-out samples, {before - gain:.3f}, is not clearly below {before:.3f}, "
        "that of the head as it was or of the frequencies of the classes"
    )


@torch.no_grad()
def _write(linear: Any, weights: tuple[Tensor, ...]) -> None:
    for parameter, value in zip((linear.weight, linear.bias), weights, strict=False):
        parameter.copy_(value)


def _of_the_first(
    model: DistributedDataParallel, report: ProbedHead, weights: tuple[Tensor, ...] | None
) -> tuple[ProbedHead, tuple[Tensor, ...] | None]:
    """What the first process found, so that all have the same weights."""
    group = model.process_group
    found = [(report, None if weights is None else tuple(each.cpu() for each in weights))]
    torch.distributed.broadcast_object_list(found, torch.distributed.get_global_rank(group, 0), group=group)
    return found[0]
