"""A probed head: before a fine-tuning, the new head is fitted to the features that the pretrained layers give."""

import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from predictor.errors import UsageError
from predictor.layers.parts import unwrapped
from predictor.probing.features import FeatureCollector, Unfit, Unpack
from predictor.probing.regression import FEWEST, Regression, chosen, held_out, losses_before, too_little


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
    token); where the model's output is not that of a linear layer, as with a convolution for a head, or that layer or
    its bias does not train, is tied or is parametrized; where a hook on it or a forward of its own makes something else
    of its input; and where the model is sharded.

    **The head** is the linear layer that runs last. With the first batch it is proved that it just multiplies by its
    weight and adds its bias, and on each batch that the model's logits are its output, unchanged and in its order; of a
    model that classifies each token and then picks one, the features of that token are taken.

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
            labels), or a dict with "labels" whose other entries are named inputs. It is iterated over once, and is
            afterwards as it was: a sampler that counts its epochs, such as SieveSampler, does not count this one.
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
    collector = FeatureCollector(bare, head, unpack)
    try:
        report, weights = _probed(collector, loader, samples)
    except Unfit as reason:
        report, weights = _report(collector, reason=str(reason)), None
    parallel = next((each for each in model.modules() if isinstance(each, DistributedDataParallel)), None)
    if parallel is not None:
        report, weights = _of_the_first(parallel, report, weights)
    if weights is not None:
        _write(bare.get_submodule(report.head), weights)
    return replace(report, seconds=time.perf_counter() - began)


def _probed(
    collector: FeatureCollector, loader: Iterable[Any], samples: int
) -> tuple[ProbedHead, tuple[Tensor, ...] | None]:
    """The report, and the head's new weight and bias; None where it is to stay as it is."""
    x_NF, y_N = collector.collect(loader, samples)
    linear = collector.linear
    _check_data(x_NF, y_N, linear.out_features)
    held_N = held_out(y_N)
    if int(held_N.sum()) < FEWEST:
        raise Unfit(f"{len(y_N)} samples leave {int(held_N.sum())} to be held out, of {FEWEST} at least")
    with _without_autocast(x_NF.device), torch.enable_grad():
        fitted, held = ((x_NF[some_N.to(x_NF.device)], y_N[some_N]) for some_N in (~held_N, held_N))
        before_H = losses_before(linear, fitted[1], held)
        fit = Regression(*fitted, linear.out_features, linear.bias is not None)
        point = chosen(fit, held, before_H.mean().item())
    report = _report(
        collector,
        penalty=point.penalty,
        accuracy=point.accuracy,
        loss=point.loss,
        loss_before=before_H.mean().item(),
        train_accuracy=point.train_accuracy,
        train_loss=point.train_loss,
        fit_flops=fit.flops,
    )
    if reason := too_little(point.losses_H, before_H):
        return replace(report, reason=reason), None
    return replace(report, probed=True), point.weights


def _report(collector: FeatureCollector, **found: Any) -> ProbedHead:
    """What is known so far."""
    return ProbedHead(False, head=collector.head, samples=collector.samples, passed=collector.passed, **found)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _check_data(x_NF: Tensor, y_N: Tensor, classes: int) -> None:
    if classes < 2 or not 0 <= int(y_N.min()) <= int(y_N.max()) < classes:
        raise Unfit(f"labels are {int(y_N.min())} to {int(y_N.max())}, and the head has {classes} outputs")
    missing = (torch.bincount(y_N, minlength=classes) == 0).nonzero().flatten().tolist()
    if missing:
        raise Unfit(
            f"{len(missing)} of {classes} classes, {missing[0]} first, have none of the {len(y_N)} samples: shuffle, "
            "or raise samples="
        )
    if not bool(x_NF.isfinite().all()):
        raise Unfit("the features are not all finite")


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
