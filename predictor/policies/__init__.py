"""Freezing methods by name, one file each."""

from collections.abc import Callable
from typing import Any

from predictor.errors import UsageError
from predictor.policies.autofreeze import AutoFreezePolicy
from predictor.policies.autorgn import AutoRGNPolicy
from predictor.policies.base import FreezePolicy
from predictor.policies.egeria import EgeriaPolicy
from predictor.policies.freezeout import FreezeOutPolicy
from predictor.policies.grades import GradESPolicy
from predictor.policies.gradual import GradualPolicy
from predictor.policies.greentrainer import GreenTrainerPolicy
from predictor.policies.linear import LinearPolicy
from predictor.policies.lisa import LisaPolicy
from predictor.policies.none import NonePolicy
from predictor.policies.pipetransformer import PipeTransformerPolicy
from predictor.policies.random_layers import RandomPolicy
from predictor.policies.scheduled import SchedulePolicy
from predictor.policies.shorter import ShorterPolicy
from predictor.policies.simfreeze import SimFreezePolicy
from predictor.policies.slimfit import SlimFitPolicy
from predictor.policies.smartfrz import SmartFRZPolicy
from predictor.policies.spectrum import SpectrumPolicy
from predictor.policies.spfde import SpFDEPolicy
from predictor.policies.static import StaticPolicy
from predictor.policies.stopped import StoppedPolicy
from predictor.shared.user_code import named

POLICIES: dict[str, Callable[..., FreezePolicy]] = {
    "none": NonePolicy,
    "shorter": ShorterPolicy,
    "stopped": StoppedPolicy,
    "static": StaticPolicy,
    "random": RandomPolicy,
    "linear": LinearPolicy,
    "gradual": GradualPolicy,
    "schedule": SchedulePolicy,
    "freezeout": FreezeOutPolicy,
    "spfde": SpFDEPolicy,
    "autofreeze": AutoFreezePolicy,
    "pipetransformer": PipeTransformerPolicy,
    "greentrainer": GreenTrainerPolicy,
    "slimfit": SlimFitPolicy,
    "lisa": LisaPolicy,
    "grades": GradESPolicy,
    "spectrum": SpectrumPolicy,
    "autorgn": AutoRGNPolicy,
    "egeria": EgeriaPolicy,
    "simfreeze": SimFreezePolicy,
    "smartfrz": SmartFRZPolicy,
}


def policy_class(name: str) -> Callable[..., FreezePolicy]:
    """The class of the policy called `name`: a key of POLICIES, or the user's own class, as "package.module:Class".

    Raises:
        UsageError: there is no such name.
    """
    return POLICIES[name] if name in POLICIES else named("policy", name, POLICIES)


def make_policy(name: str, **options: Any) -> FreezePolicy:
    """Build a policy by its name: `make_policy("static", share=0.3)`, or `make_policy("mine:Waiting")` for your own.

    Args:
        name: a key of POLICIES, or "package.module:Class".
        options: the policy's settings. Its docstring lists them.

    Raises:
        UsageError: there is no such name or option, an option's value cannot work, or the class is no FreezePolicy.
    """
    kind = policy_class(name)
    try:
        policy = kind(**options)
    except TypeError as error:
        raise UsageError(f"policy {name!r} cannot be made with {options}: {error}") from error
    if not isinstance(policy, FreezePolicy):
        raise UsageError(f"policy {name!r} makes {policy!r}: derive it from predictor.FreezePolicy")
    return policy
