"""Several machines in one study: who may begin a trial, and which trials have ended with their worker.

A worker shows that it lives by a number that it raises in its trial (a beat). The others count their own beats in which
that number stood still. So no clocks are compared, and no time counts in which the storage was away or a machine slept.
Optuna's own heartbeat does: it compares clocks, knows databases only, and never misses a trial whose worker was killed
before the first beat.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from predictor.training.study_storage import JournalFault, database_error, say

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

STALE_SECONDS = 120.0
"""After so long without a sign of its worker a trial counts as failed."""
_MISSED_BEATS = 6
_POLL_SECONDS = 1.0
_FAULTS = 3
"""So many trials in a row may lose their connection in the middle of a write."""
_ENDED = (RuntimeError, ValueError)
"""What Optuna raises for a trial that has ended, the first from its storages and the second from `tell`."""
_BEAT, _WORKER = "beat", "worker"


def run_trials(
    study: "optuna.Study",
    objective: "Callable[[optuna.Trial], float]",
    *,
    trials: int,
    timeout: float | None,
    after: "Callable[[FrozenTrial | None], None]",
) -> None:
    """Run trials until the study has as many finished ones as asked for, by whichever worker, and not one more.

    Args:
        study: the study, which other workers may use at the same time.
        objective: what runs a trial.
        trials: finished trials of the study at the end.
        timeout: begin no trial, and wait for no other worker, after so many seconds.
        after: called with each trial that ended here, and with None now and then while others are waited for.
    """
    end = time.monotonic() + (float("inf") if timeout is None else timeout)
    faults, waiting = 0, False
    with _heartbeat(study) as heart:
        while time.monotonic() < end:
            try:
                if len(finished(study)) >= trials:
                    return
                with _interrupt_held() as let_interrupt:
                    trial = _begin(study, trials)
                    ended = None if trial is None else _run(study, trial, objective, heart, let_interrupt)
                after(ended)
                if trial is None:
                    if not waiting:
                        say(f"waiting for the last trials: {running_text(study)}")
                    time.sleep(_POLL_SECONDS)
                faults, waiting = 0, trial is None
            except Exception as error:
                faults += 1
                if database_error(error) is None or faults == _FAULTS:
                    raise


def finished(study: "optuna.Study") -> "list[FrozenTrial]":
    """The trials of a study that count."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def best_trial(study: "optuna.Study") -> "optuna.trial.FrozenTrial":
    """The earliest of the best: a database may give any of them. Raises ValueError if no trial is complete."""
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(complete, key=lambda trial: (trial.value, -trial.number))


def running_text(study: "optuna.Study") -> str:
    """Which trials run, and where."""
    running = _running(study)
    if not running:
        return "none"
    shown = ", ".join(f"{trial.number} ({trial.user_attrs.get(_WORKER, 'just begun')})" for trial in running[:8])
    return f"{shown}{', ...' if len(running) > 8 else ''}"


def give_up(study: "optuna.Study", number: int) -> bool:
    """Mark a running trial as failed. False if it has ended, or another worker did so. Its settings are tried again."""
    from optuna.trial import TrialState

    trial, *later = study.get_trials(deepcopy=False)[number:]
    if trial.state != TrialState.RUNNING:
        return False
    # Settings that were asked for wait before the place is free: it may be the last one.
    asked = trial.system_attrs.get("fixed_params")
    if asked is not None and all(each.system_attrs.get("fixed_params") != asked for each in later):
        study.enqueue_trial(asked)
    try:
        study.tell(number, state=TrialState.FAIL)
    except _ENDED:
        return False
    return True


def _begin(study: "optuna.Study", trials: int) -> "optuna.Trial | None":
    """A new trial, unless those that have finished and that run are as many as asked for."""
    if len(finished(study)) + len(_running(study)) >= trials:
        return None
    trial = study.ask()
    try:
        trial.set_user_attr(_WORKER, f"{socket.gethostname()}:{os.getpid()}")
        # Another worker may have begun one since. Numbers are given out one by one, so that just one of both sees too
        # many before its own.
        before = [each for each in study.get_trials(deepcopy=False) if each.number < trial.number]
        if sum(each.state.name != "FAIL" for each in before) < trials:
            return trial
        trial.set_user_attr("withdrawn", "the study has as many trials as it was asked for")
        give_up(study, trial.number)
    except BaseException:
        _try_to_give_up(study, trial.number)
        raise
    return None


def _run(
    study: "optuna.Study",
    trial: "optuna.Trial",
    objective: "Callable[[optuna.Trial], float]",
    heart: "_Heart",
    let_interrupt: Callable[[], None],
) -> "FrozenTrial | None":
    """Run a trial. None if other workers have given it up meanwhile."""
    import optuna

    try:
        let_interrupt()
        heart.trial = trial
        heart.beat()
        try:
            told: dict[str, Any] = {"values": objective(trial)}
        except optuna.TrialPruned:
            told = {"state": optuna.trial.TrialState.PRUNED}
        return study.tell(trial, **told)
    except BaseException as error:
        if _was_given_up(study, trial.number, error):
            return None
        _try_to_give_up(study, trial.number)
        raise
    finally:
        heart.trial = None


def _was_given_up(study: "optuna.Study", number: int, error: BaseException) -> bool:
    """Whether an error comes from other workers' having given up our trial, as when this machine slept."""
    from optuna.trial import TrialState

    if not isinstance(error, _ENDED):
        return False
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    if number not in {trial.number for trial in failed}:
        return False
    say(f"trial {number}: the other workers heard nothing from here for {STALE_SECONDS:g} seconds, and it was given up")
    return True


def _running(study: "optuna.Study") -> "list[FrozenTrial]":
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def _try_to_give_up(study: "optuna.Study", number: int) -> None:
    """On the way out with an error. Where the storage is away, other workers will miss the beats."""
    with _storage_may_be_away():
        give_up(study, number)


@contextmanager
def _storage_may_be_away() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if database_error(error) is None and not isinstance(error, JournalFault):
            raise


@contextmanager
def _interrupt_held() -> Iterator[Callable[[], None]]:
    """Hold back one Ctrl-C until the function that is yielded is called, or the end.

    It would leave a trial running that nobody knows of. A second one is not held back.
    """
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            raise KeyboardInterrupt
        held.append(number)

    def let_interrupt() -> None:
        signal.signal(signal.SIGINT, before)
        if held:
            held.clear()
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.signal(signal.SIGINT, hold)
    try:
        yield let_interrupt
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


class _Heart:
    """The beats of this worker's trial, and those that it misses of others'."""

    def __init__(self, study: "optuna.Study") -> None:
        self.trial: optuna.Trial | None = None
        self._study = study
        self._count = 0
        self._silent: dict[int, tuple[int | None, int]] = {}
        """By number of a trial, the last beat that was seen, and how many of our own it has been that since."""

    def beat(self) -> None:
        trial = self.trial
        self._count += 1
        if trial is not None:
            with suppress(*_ENDED):
                trial.set_user_attr(_BEAT, self._count)

    def watch(self) -> None:
        """Give up the trials whose workers have not been heard of for long."""
        ours = self.trial
        silent = {}
        for trial in _running(self._study):
            if ours is not None and trial.number == ours.number:
                continue
            beat = trial.user_attrs.get(_BEAT)
            last, missed = self._silent.get(trial.number, (beat, -1))
            silent[trial.number] = (beat, missed + 1 if last == beat else 0)
            if silent[trial.number][1] >= _MISSED_BEATS and give_up(self._study, trial.number):
                where = trial.user_attrs.get(_WORKER, "a worker that was killed at once")
                say(
                    f"trial {trial.number} of {where} has failed: nothing was heard of it for {STALE_SECONDS:g} seconds"
                )
        self._silent = silent


@contextmanager
def _heartbeat(study: "optuna.Study") -> Iterator[_Heart]:
    heart, ended = _Heart(study), threading.Event()

    def beats() -> None:
        while not ended.wait(STALE_SECONDS / _MISSED_BEATS):
            with _storage_may_be_away():
                heart.beat()
                heart.watch()

    thread = threading.Thread(target=beats, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield heart
    finally:
        ended.set()
        # A beat that waits for a lost connection must not keep us.
        thread.join(timeout=2)
