"""Going on from a trained predictor: its weights, its scaling, its sampling, and what it knows of prefixes."""

from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from predictor.errors import UsageError
from predictor.model.config import PredictorConfig
from predictor.model.file import PredictorFile, fingerprint, load_predictor
from predictor.model.sampling import SampleSpec
from predictor.training.config import CONTINUED_LEARNING_RATE, FitConfig

_SHIPPED_NAME = "shipped"


def start_of(settings: FitConfig) -> PredictorFile | None:
    """The predictor to go on from; None to begin anew."""
    return load_predictor(_path(settings.continue_from)) if settings.continue_from else None


def continued(
    config: PredictorConfig, settings: FitConfig, given: Collection[str]
) -> tuple[PredictorConfig, FitConfig]:
    """The configuration and settings for going on, where `settings.continue_from` asks for it.

    What the predictor sees, its widths and its scaling stay. The learning rate is lower, unless it was given.

    Args:
        config: what the flags say.
        settings: what the flags say.
        given: the flags that were given, such as --hidden.

    Raises:
        UsageError: a flag would change what stays.
    """
    start = start_of(settings)
    if start is None:
        return config, settings
    for name in (*(field.name for field in fields(PredictorConfig)), "scaling"):
        if f"--{name}" in given:
            raise UsageError(
                f"--{name} with --continue-from {settings.continue_from}: a predictor keeps what it sees, its widths "
                "and its scaling: leave one of the two out"
            )
    if "--learning-rate" not in given:
        settings = replace(settings, learning_rate=CONTINUED_LEARNING_RATE)
    return start.model.config, settings


def check_sampling(start: PredictorFile | None, spec: SampleSpec) -> None:
    """Raise UsageError for runs that were sampled otherwise than those of the predictor to go on from."""
    if start is not None and start.spec != spec:
        raise UsageError(
            f"these runs were sampled by {spec}, and the predictor to go on from learned from {start.spec}: record "
            "with sampling=SampleSpec() and suites' defaults for the one that ships, or train without --continue-from"
        )


def origin(settings: FitConfig) -> dict[str, Any]:
    """What a card says about the predictor that was continued. Empty for a new one."""
    start = start_of(settings)
    if start is None:
        return {}
    path = _path(settings.continue_from)
    before = {name: start.card[name] for name in ("labels", "data", "continued_from") if name in start.card}
    names = ("first_prefix", "first_prefix_scratch")
    kept: dict[str, Any] = {name: start.card[name] for name in names if name in start.card}
    return {"continued_from": {"name": settings.continue_from, "sha256": fingerprint(path), **before}, **kept}


def _path(name: str) -> Path:
    if name != _SHIPPED_NAME:
        return Path(name)
    from predictor.policies.smartfrz import SHIPPED

    return SHIPPED
