"""Records any training as `collect gather trajectories` records its own, for a predictor of one's own."""

import math
import operator
import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from collect.hooks.cka import CKARecorder, ProbeSpec
from collect.hooks.recorder import Recorder
from collect.recording.inputs import ProbeBatch
from collect.training.device import Clock
from collect.training.provenance import provenance
from data.trajectories.folder import GatherFolder
from data.trajectories.trajectory import Trajectory
from data.trajectories.writer import write_runs
from predictor.errors import FileFault, UsageError
from predictor.freezing.learning_rates import innermost
from predictor.freezing.optimizers import as_optimizers, joint, optimizers_of
from predictor.layers.layer import Layer, layers_of
from predictor.layers.parts import unwrapped
from predictor.layers.tensors import copied
from predictor.model.sampling import SampleSpec

Call = Callable[[nn.Module, Any], object]
"""Calls a model on a probe batch."""
_SAMPLING = SampleSpec()
"""As suites have it, and the predictor that ships."""


class Recording:
    """Records how the layers of a model move while it trains.

        with Recording(model, optimizer, total_steps=steps, out="runs/mine", probe=x) as recording:
            for x, y in loader:
                loss = loss_fn(model(x), y)
                loss.backward()
                optimizer.step()
                recording.step(loss)
                optimizer.zero_grad()

    At `sampling.snapshots` of the training's steps it samples each layer's weights and runs the model on the probe, in
    evaluation mode, as a pass that leaves no trace. At the end it compares each snapshot's outputs with the final ones,
    by CKA, and writes the run's file: whole or not at all, and not when the block ends with an error. `python -m data
    merge` and `python -m predictor train --data` take it beside runs that were gathered.

    **To resume**, make model, optimizer and recording as at the start, then load the state of each. The run keeps its
    id and its probe.

    **Several processes** (DDP, FSDP2): make it and call `step` in each; the first one writes. With gradient
    accumulation call `step` once an optimizer step. A training that ends early is recorded up to its last snapshot.

    Args:
        model: any module, as the loop calls it.
        optimizer: one or several; the first learning rate of the one that holds most of the layers is recorded.
        total_steps: optimizer steps of the whole training.
        out: a folder, for `OUT/runs/ID.h5`, or the path of a new file that ends in .h5.
        probe: a batch of the model's inputs, of the same kind as in the loop: a tensor, a tuple of inputs, a dict of
            named ones, or a list of images. What the model has no argument for is left out, such as the labels of
            (x, y). Best are 80 samples that are not trained on. At most 128 are used.
        layers: those that may freeze, front to back. By default `layers_of(model)`, in execution order on the probe.
        call: how the model is called on the probe, as `lambda model, batch: model.encode(batch)`.
        workload: a name for what is trained. By default the model's class.
        family: the kind of network: figures are given by family, and for families left out. By default the model's
            class.
        source: a name for what it is trained on.
        seed: the training's seed. By default torch's initial one.
        recipe: what else is worth knowing about the training, as JSON.
        sampling: when snapshots are taken, and of which weights. One predictor needs one kind.
        replace: whether `out` may be a file that exists, as where a training that ended early is resumed. It stays
            until the new one is whole.

    Raises:
        UsageError: total_steps is below 1; the model cannot be called on the probe; or the file exists.
        FileFault: the folder cannot be written to.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        total_steps: int,
        out: str | Path,
        probe: Any,
        layers: Sequence[Layer] | None = None,
        call: Call | None = None,
        workload: str | None = None,
        family: str | None = None,
        source: str = "own",
        seed: int | None = None,
        recipe: Mapping[str, Any] | None = None,
        sampling: SampleSpec = _SAMPLING,
        replace: bool = False,
    ) -> None:
        self.run_id = uuid.uuid4().hex[:12]
        """The run's id, which it keeps when it is resumed."""
        self._out = Path(out)
        total_steps = _count(total_steps)
        _refuse_unfit(self._out, self.path, replace)
        self._probe, self._call_probe = ProbeBatch(probe), call
        network = unwrapped(model)
        if call is None:
            self._probe.fit(network)
        self.layers = tuple(self._layers_of(network) if layers is None else layers)
        """The layers that are recorded, front to back."""
        main = innermost(optimizers_of(joint(as_optimizers(optimizer), self.layers))[0])
        self._watched = _Watched(network, self.layers, main, total_steps, self._probe)
        self._recorder = Recorder(sampling)
        self._similarity = CKARecorder(sampling, ProbeSpec(samples=len(self._probe)), call=self._call)
        kind = type(network).__name__
        self._config: dict[str, Any] = {
            "workload": workload or kind,
            "family": family or kind,
            "source": source,
            "recipe": {"optimizer": type(main).__name__, "lr": self._watched.lr, **(recipe or {})},
            "seed": torch.initial_seed() if seed is None else seed,
            "sampling": asdict(sampling),
            "probe": asdict(self._similarity.probe),
            "total_steps": total_steps,
            "recorded": "in a training of one's own",
        }
        self._closed = self._warned = False
        self._missed = 0
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The run's file, once it is finished."""
        return self._out if self._out.suffix == ".h5" else GatherFolder(self._out).run(self.run_id)

    def step(self, loss: Tensor | float | None = None) -> None:
        """Call after `optimizer.step()` and before `zero_grad()`, with the step's loss if it is to be recorded."""
        watched = self._watched
        if watched.step >= watched.total_steps:
            self._warn_of_overrun()
            return
        watched.step += 1
        watched.set_loss(loss)
        if self._recorder.spec.due(watched.step, watched.total_steps):
            self._check_gradients()
        self._recorder.on_step(watched)
        self._similarity.on_step(watched)

    def finish(self, *, accuracy: float | None = None, loss: float | None = None) -> Path | None:
        """Write the run's file, and stop recording. A second call does nothing.

        Args:
            accuracy: on held-out samples at the end, from 0 to 1, if it is known.
            loss: on held-out samples at the end, if it is known.

        Returns:
            The file; None in processes that do not write.
        """
        if not self._closed:
            self.close()
            self._write(accuracy, loss)
        return self.path if _is_first() else None

    def close(self) -> None:
        """Stop recording, and write nothing."""
        self._closed = True
        self._watched.close()

    def untimed(self) -> AbstractContextManager[None]:
        """A context whose time does not count as training, such as an evaluation."""
        return self._watched.untimed()

    def __enter__(self) -> "Recording":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """All that is recorded so far: numbers, strings, tensors, lists and dicts of them."""
        state = {
            "run_id": self.run_id,
            "step": self._watched.step,
            "total_steps": self._watched.total_steps,
            "layers": [layer.name for layer in self.layers],
            "clock": self._watched.clock.state_dict(),
            "recorder": self._recorder.state_dict(),
            "similarity": self._similarity.state_dict(),
            "probe": self._probe.state_dict(),
        }
        return copied(state)  # the recorder goes on writing into its own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`.

        Raises:
            UsageError: the state is of a model with other layers, or of a training of another length.
        """
        names = [layer.name for layer in self.layers]
        for what, theirs, ours in (
            ("layers", state["layers"], names),
            ("total_steps", state["total_steps"], self._watched.total_steps),
        ):
            if theirs != ours:
                raise UsageError(
                    f"this state is of a recording with {what}={theirs}, and here are {ours}: resume the same "
                    "training, or begin a new recording"
                )
        self.run_id = state["run_id"]
        self._probe.load_state_dict(state["probe"])
        if len(self._probe) != self._config["probe"]["samples"]:
            self._start()  # for as many samples as it had
        self._recorder.load_state_dict(state["recorder"])
        self._similarity.load_state_dict(state["similarity"])
        self._watched.resume(state["step"], state["clock"])

    def _start(self) -> None:
        """Take the snapshot at step 0."""
        self._similarity.probe = ProbeSpec(samples=len(self._probe))
        self._config["probe"] = asdict(self._similarity.probe)
        self._recorder.on_start(self._watched)
        try:
            self._similarity.on_start(self._watched)
        except Exception as error:
            raise _unfit_probe(self._watched.model, error) from error
        if not any(triangle_LP.any() for triangle_LP in self._similarity.state_dict()["triangles"]):
            raise UsageError(
                "probe: no layer's output has a row for each of its samples, or all of its samples are alike: give a "
                "batch of different samples, with the samples in the first dimension"
            )

    def _call(self, model: nn.Module, batch: Any) -> object:
        if self._call_probe is None:
            return self._probe.call(model)
        return self._call_probe(model, self._probe.on(self._watched.device))

    def _layers_of(self, network: nn.Module) -> tuple[Layer, ...]:
        if self._call_probe is not None:
            return layers_of(network)
        try:
            with torch.no_grad():
                return layers_of(network, self._probe.on(next(network.parameters()).device))
        except UsageError as error:
            raise (_unfit_probe(network, error.__cause__) if error.__cause__ else error) from error

    def _check_gradients(self) -> None:
        """Warn where gradients were cleared before `step`: their norms are a part of what a predictor sees."""
        training = [p for layer in self.layers for p in layer.parameters() if p.requires_grad]
        gone = bool(training) and all(parameter.grad is None for parameter in training)
        self._missed = self._missed + 1 if gone else 0
        if self._missed == 2:
            warnings.warn(
                f"no layer had a gradient at step {self._watched.step} and at the snapshot before: call "
                "recording.step() after optimizer.step() and before optimizer.zero_grad(); in Lightning's manual "
                "optimization clear them at the start of training_step. A predictor learns little from this run",
                stacklevel=3,
            )

    def _warn_of_overrun(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"more than total_steps={self._watched.total_steps} steps: what follows is not recorded, and the "
                "network at that step is taken for the final one. Give the optimizer steps of all epochs: "
                "len(loader) * epochs // accumulation",
                stacklevel=3,
            )

    def _write(self, accuracy: float | None, loss: float | None) -> None:
        watched = self._watched
        fields = self._recorder.fields()
        sound = bool(torch.from_numpy(fields["weights_TLK"]).isfinite().all())
        watched.status = "finished" if sound and (loss is None or math.isfinite(loss)) else "diverged"
        self._similarity.on_end(watched)
        if not _is_first():
            return
        if watched.step < watched.total_steps:
            warnings.warn(
                f"the training ended at step {watched.step} of total_steps={watched.total_steps}: the network at its "
                "last snapshot is taken for the final one",
                stacklevel=4,
            )
        trajectory = Trajectory(
            run_id=self.run_id,
            config=self._config,
            provenance=provenance(),
            outcome={
                "status": watched.status,
                "final_accuracy": _share(accuracy),
                "final_loss": None if loss is None else float(loss),
                "train_seconds": watched.train_seconds,
                "cpu_seconds": watched.clock.cpu_seconds,
                "steps": watched.step,
            },
            similarity_TL=self._similarity.similarity_TL,
            **fields,
        )
        write_runs(self.path, [trajectory])


class _Watched:
    """What the toolkit's hooks see of a training that is not the toolkit's: see `collect.training.state.Training`."""

    def __init__(
        self, model: nn.Module, layers: tuple[Layer, ...], optimizer: Optimizer, total_steps: int, probe: ProbeBatch
    ) -> None:
        self.model = model
        self.layers = layers
        self.total_steps = total_steps
        self.step = 0
        self.status = "running"
        self.device = layers[0].own[0].device
        self.loss = torch.full((), math.nan, device=self.device)
        self.source, self.precision = _Source(probe), _Plain()
        self.clock = Clock(torch.device("cpu"))  # it never waits for a GPU
        self.clock.start()
        self._optimizer = optimizer
        self._lr: float | Tensor | None = None  # of the newest step
        self._hook = optimizer.register_step_post_hook(self._note_lr)

    @property
    def lr(self) -> float:
        """The learning rate of the last step, also where the schedule has gone on; before the first, that of it."""
        return float(self._optimizer.param_groups[0]["lr"] if self._lr is None else self._lr)

    @property
    def train_seconds(self) -> float:
        """Wall-clock seconds so far."""
        return self.clock.wall_seconds

    def untimed(self) -> AbstractContextManager[None]:
        """A context whose time does not count."""
        return self.clock.paused()

    def set_loss(self, loss: Tensor | float | None) -> None:
        """Take the loss of the step just taken."""
        if isinstance(loss, Tensor):
            self.loss = loss.detach().float().mean().to(self.device)
        else:
            self.loss = torch.tensor(math.nan if loss is None else float(loss))

    def resume(self, step: int, clock: dict[str, Any]) -> None:
        """Go on at a step, with the seconds that it took."""
        self.step = step
        self.clock.load_state_dict(clock)
        self.clock.start()

    def close(self) -> None:
        """Stop the clock, and remove the hook from the optimizer."""
        self.clock.stop()
        self._hook.remove()

    def _note_lr(self, optimizer: Optimizer, *_: object) -> None:
        lr = optimizer.param_groups[0]["lr"]
        self._lr = lr.clone() if isinstance(lr, Tensor) else lr  # a tensor is overwritten, and reading it waits


class _Source:
    """The probe, as hooks ask a source for it."""

    name = "probe"

    def __init__(self, probe: ProbeBatch) -> None:
        self._probe = probe

    def probe(self, samples: int, device: torch.device) -> ProbeBatch:
        """The probe."""
        return self._probe


class _Plain:
    """Full precision: `call` may open a context of its own."""

    def forward(self) -> AbstractContextManager[None]:
        """No context."""
        return nullcontext()


def _count(total_steps: Any) -> int:
    try:
        steps = int(total_steps) if isinstance(total_steps, float) else operator.index(total_steps)
    except (TypeError, ValueError, OverflowError):
        steps = 0
    if steps < 1 or steps != total_steps:
        raise UsageError(f"total_steps={total_steps!r}: give the number of optimizer steps of the whole training")
    return steps


def _refuse_unfit(out: Path, path: Path, replace: bool) -> None:
    """Find out now what would otherwise lose a whole training's recording."""
    if path.exists() and not replace and _is_first():
        raise UsageError(
            f"out={str(out)!r}: the file exists: name a folder, which holds many runs, or give replace=True"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileFault(f"{path.parent}: cannot be made ({error.strerror}): give another out") from error
    if not os.access(path.parent, os.W_OK):
        raise FileFault(f"{path.parent}: cannot be written to: give another out, or make it writable")


def _unfit_probe(model: nn.Module, error: BaseException) -> UsageError:
    return UsageError(
        f"probe: {type(model).__name__} cannot be called on it ({type(error).__name__}: {error}): give the model's "
        "inputs alone, such as batch[0] of (x, y), or say how with call=lambda model, batch: ..."
    )


def _share(accuracy: float | None) -> float | None:
    """An accuracy that a file may hold. What is none must not lose the recording."""
    if accuracy is None or 0 <= accuracy <= 1:
        return None if accuracy is None else float(accuracy)
    warnings.warn(f"accuracy={accuracy}: not from 0 to 1; it is left out of the run's file", stacklevel=5)
    return None


def _is_first() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
