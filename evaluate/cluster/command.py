"""`python -m evaluate cluster-check`: three Ray nodes on this machine against the machine alone, a line a check."""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from collect.gather import plan as gather_plan
from evaluate.cluster import timing
from evaluate.cluster.compare import outcomes_differ, results_differ, trajectories_differ
from evaluate.cluster.kills import Killer, run_under_kills
from evaluate.cluster.nodes import HEAD, WORKERS, Nodes, running_nodes, why_not
from predictor.errors import UsageError, unknown

_TINY = """\
name = "tiny"
[sampling]
weights = 8
snapshots = 4
[probe]
samples = 8
features = 16
[[runs]]
workload = "mlp-digits"
train_samples = 400
epochs = 5
seed = [0, 1, 2, 3]
"""
"""Runs of a moment, for checks that are not about training."""
_CHECKPOINTS = "checkpoint_seconds = 1\n"
"""The demo's runs take seconds: without a checkpoint each second, no run would go on from one."""


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    only: tuple[str, ...] = ()
    """The checks to run; without: all but those that measure time."""
    kills: int = 50
    """Over all checks."""
    seed: int = 0
    """Of what is killed when."""
    out: Path = Path("runs/cluster")
    """Where all files go."""


@dataclass
class Bench:
    """What the checks share."""

    nodes: Nodes
    killer: Killer
    out: Path

    def results(self, name: str) -> Path:
        """A folder of results that no node sees."""
        return self.out / "results" / name

    def log(self, name: str) -> Path:
        """The file for what a command prints."""
        return self.out / "logs" / f"{name}.log"

    def on_cluster(self, name: str, *arguments: str, kills: int = 0) -> str:
        """Run a program of ours on the cluster, and say why it failed."""
        command = [sys.executable, "-m", *arguments, "--engine", "ray", "--address", self.nodes.address]
        return run_under_kills(self.nodes, command, self.log(name), self.killer, kills)

    def alone(self, name: str, *arguments: str) -> str:
        """Run it on this machine, and say why it failed."""
        with self.log(name).open("ab") as log:
            done = subprocess.run(
                [sys.executable, "-m", *arguments], stdout=log, stderr=log, env=self.nodes.environment
            )
        return f"failed: see {self.log(name)}" if done.returncode else ""


def run_checks(settings: Settings, say: Callable[[str], None] = print) -> int:
    """Run the checks, and say a line each. Returns the exit status: 1 where one failed."""
    for name in settings.only:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    if settings.kills < 0:
        raise UsageError(f"kills={settings.kills}: give a number from 0")
    if reason := why_not():
        raise UsageError(reason)
    names = settings.only or tuple(name for name in CHECKS if name not in timing.CHECKS)
    out = settings.out.resolve()
    for part in ("results", "logs"):
        shutil.rmtree(out / part, ignore_errors=True)
        (out / part).mkdir(parents=True)
    killer, failed = Killer(settings.seed, settings.kills), 0
    hidden, logs = out / "results", out / "logs"
    alone = contextlib.nullcontext(Nodes(out, hidden, logs))  # what is timed has the machine for itself
    for timed, context in ((False, running_nodes(hidden, logs)), (True, alone)):
        group = [name for name in names if (name in timing.CHECKS) == timed]
        if not group:
            continue
        with context as nodes:
            for name in group:
                start = time.monotonic()
                why, remark = CHECKS[name](Bench(nodes, killer, out))
                failed += bool(why)
                say(f"{'FAILED' if why else 'ok':6}  {name}: {why or remark} ({time.monotonic() - start:.0f} s)")
                sys.stdout.flush()
    killed = ", ".join(f"{count} {kind}s" for kind, count in killer.done.most_common())
    say(
        f"{len(names) - failed} of {len(names)} checks ok; {sum(killer.done.values())} kills with seed {settings.seed}"
        + (f": {killed}" if killed else "")
        + f"; files: {settings.out}"
    )
    return int(failed > 0)


def _token(bench: Bench) -> tuple[str, str]:
    """A driver with another token gets nowhere."""
    wrong = {**bench.nodes.environment, "RAY_AUTH_TOKEN": "0" * 32}
    out, log = bench.results("token"), bench.log("token")
    arguments = ["gather", "trajectories", "--suite", str(_suite(bench, "tiny", _TINY)), "--out", str(out)]
    arguments += ["--engine", "ray", "--address", bench.nodes.address]
    driver = bench.nodes.popen(HEAD, [sys.executable, "-m", "collect", *arguments], log, wrong)
    status, printed = driver.wait(), log.read_text(errors="replace")
    if status != 2 or "ray get-auth-token" not in printed or list(out.rglob("*.h5")):
        return f"exit status {status}: see {log}", ""
    return "", "a driver with another token is refused"


def _outcomes(bench: Bench) -> tuple[str, str]:
    """A few runs and what freezing does to them, under a tenth of the kills."""
    path, own, alone = _suite(bench, "tiny", _TINY), bench.results("outcomes"), bench.results("outcomes-alone")
    arguments = ["collect", "gather", "outcomes", "--suite", str(path), "--out"]
    before, kills = sum(bench.killer.done.values()), bench.killer.left // 10
    why = bench.alone("outcomes-alone", *arguments, str(alone))
    why = why or bench.on_cluster("outcomes", *arguments, str(own), kills=kills)
    why = why or outcomes_differ(alone / "outcomes.jsonl", own / "outcomes.jsonl")
    return why, f"the packed file of one machine, under {sum(bench.killer.done.values()) - before} kills"


def _gather(bench: Bench) -> tuple[str, str]:
    """The demo's gathering, under half of the kills."""
    suite = Path(gather_plan.__file__).parents[1] / "suites" / "trajectories.toml"
    path = _suite(bench, "trajectories", _CHECKPOINTS + suite.read_text(encoding="utf-8"))
    before, kills, rounds = sum(bench.killer.done.values()), (bench.killer.left + 1) // 2, 0
    arguments = ["collect", "gather", "trajectories", "--suite", str(path), "--out"]
    why = bench.alone("gather-alone", *arguments, str(bench.results("alone")))
    while not why and (not rounds or sum(bench.killer.done.values()) - before < kills):
        rounds += 1
        own = bench.results(f"gather-{rounds}")
        left = kills - sum(bench.killer.done.values()) + before
        why = bench.on_cluster("gather", *arguments, str(own), kills=left) or trajectories_differ(
            bench.results("alone") / "trajectories.h5", own / "trajectories.h5"
        )
    return why, f"{rounds} times the packed file of one machine, under {sum(bench.killer.done.values()) - before} kills"


def _quick(bench: Bench) -> tuple[str, str]:
    """The quick suite, under the other half."""
    rounds, before = 0, sum(bench.killer.done.values())
    arguments = ["evaluate", "run-suite", "--suite", "quick", "--out"]
    why = bench.alone("quick-alone", *arguments, str(bench.results("quick-alone")))
    while not why and (not rounds or bench.killer.left):
        rounds += 1
        own = bench.results(f"quick-{rounds}")
        why = bench.on_cluster("quick", *arguments, str(own), kills=bench.killer.left)
        why = why or results_differ(*(folder / "results.jsonl" for folder in (bench.results("quick-alone"), own)))
        why = why or ("" if _table(bench, own) == _table(bench, bench.results("quick-alone")) else "the tables differ")
    kills = sum(bench.killer.done.values()) - before
    return why, f"{rounds} times the results and the table of one machine, under {kills} kills"


def _full_disk(bench: Bench) -> tuple[str, str]:
    """A node without room on its disk gets no more runs, and the others do them."""
    name = WORKERS[0]
    bench.nodes.kill(name)
    bench.nodes.start(name, disk="4k")
    bench.nodes.wait(name)
    path, own = _suite(bench, "tiny", _TINY), bench.results("full-disk")
    why = bench.on_cluster("full-disk", "collect", "gather", "trajectories", "--suite", str(path), "--out", str(own))
    bench.nodes.kill(name)
    bench.nodes.start(name)
    bench.nodes.wait(name)
    printed = bench.log("full-disk").read_text(errors="replace")
    if not why and not (own / "trajectories.h5").exists():
        why = "there is no packed file"
    named = "it is named" if "is full" in printed else "no run was given to it"
    return why, f"all runs are done elsewhere; {named}"


def _table(bench: Bench, folder: Path) -> str:
    command = [sys.executable, "-m", "evaluate", "report", str(folder), "--cost", "flops", "--markdown"]
    done = subprocess.run(command, capture_output=True, text=True, env=bench.nodes.environment)
    return done.stdout


def _suite(bench: Bench, name: str, text: str) -> Path:
    path = bench.out / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


CHECKS: dict[str, Callable[[Bench], tuple[str, str]]] = {
    "token": _token,
    "full-disk": _full_disk,
    "outcomes": _outcomes,
    "gather": _gather,
    "quick": _quick,
    **timing.CHECKS,
}
"""Each gives why it failed, and what it shows."""
