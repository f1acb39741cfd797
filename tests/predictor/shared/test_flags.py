"""Flags made from fields, exit statuses, and help that answers at once."""

import argparse
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from predictor.errors import UsageError
from predictor.model.config import PredictorConfig
from predictor.shared import flags as cli

CHECKOUT = Path(__file__).parents[3]


def parser(**options):
    made = argparse.ArgumentParser(prog="x")
    cli.add_fields(made, PredictorConfig, **options)
    return made


def test_defaults_of_the_flags_are_those_of_the_class():
    assert cli.from_flags(PredictorConfig, parser().parse_args([])) == PredictorConfig()


def test_flags_have_the_fields_types_choices_and_help(capsys):
    flags = parser().parse_args(["--inputs", "raw", "--window", "12", "--dropout", "0.3"])
    made = cli.from_flags(PredictorConfig, flags)
    assert (made.inputs, made.window, made.dropout) == ("raw", 12, 0.3)
    assert "Snapshots in a window (W) (default: 10)" in " ".join(parser().format_help().split())
    with pytest.raises(SystemExit):
        parser().parse_args(["--inputs", "cooked"])


@dataclass(frozen=True)
class Others:
    on: bool = cli.option(False, "100 % of it")
    seconds: float | None = cli.option(None, "Seconds")


def test_flags_of_bools_and_of_what_may_be_none():
    made = argparse.ArgumentParser(prog="x")
    cli.add_fields(made, Others)
    assert cli.from_flags(Others, made.parse_args([])) == Others()
    assert cli.from_flags(Others, made.parse_args(["--on", "--seconds", "3"])) == Others(True, 3.0)
    assert "100 % of it (default: False)" in " ".join(made.format_help().split())


def test_only_the_fields_asked_for_become_flags():
    assert "--hidden" not in parser(only=["window"]).format_help()


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [(UsageError("x=1: give 2"), 2, "error: x=1: give 2"), (KeyboardInterrupt(), 130, "the same command goes on")],
)
def test_what_the_user_can_cure_has_no_traceback(raised, status, said, capsys):
    def main(_):
        raise raised

    with pytest.raises(SystemExit) as left:
        cli.run(main)
    assert left.value.code == status
    assert said in capsys.readouterr().err


def program(code, redirected="", **environment):
    """Run a program in a shell, its main function one expression."""
    code = f"from predictor.shared import flags; flags.run(lambda _: {code})"
    return subprocess.run(
        f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {redirected}",
        shell=True,
        cwd=CHECKOUT,
        env={**os.environ, **environment},
        capture_output=True,
    )


@pytest.mark.parametrize(
    ("encoding", "printed"), [("latin-1", "\\u0394 ü\n".encode("latin-1")), ("ascii", b"\\u0394 \\xfc\n")]
)
def test_text_that_the_outputs_encoding_lacks_is_printed_as_escapes(encoding, printed):
    done = program(r"print('\u0394 \xfc')", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, b"")


@pytest.mark.parametrize("code", ["print('text')", "print('text', flush=True)", "print('text' * 100_000)"])
@pytest.mark.parametrize("redirected", ["> /dev/full", ">&-"])
def test_an_output_that_takes_nothing_ends_in_one_line(code, redirected):
    done = program(code, redirected)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("program", ["collect", "predictor", "evaluate", "data"])
def test_help_loads_nothing_heavy(program):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{program!r}, '--help']\n"
        f"try: runpy.run_module({program!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'optuna', 'wandb', 'sklearn', 'matplotlib', 'h5py'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
