"""Files of outcomes: written, read, and refused."""

import json
import math
from dataclasses import replace

import pytest

from data.outcomes.accuracy_cost import harms_of
from data.outcomes.records import OutcomeFolder, Result, outcome_of, read_outcomes, write_outcomes
from predictor.errors import DamagedFile, FileFault, UsageError
from tests.data.made_outcomes import ended, made_outcome, made_run


def written(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(**changes):
    return {**made_outcome().as_dict(), **changes}


def test_what_is_written_is_read(tmp_path):
    outcomes = tuple(made_run(s10_2=0.7, s20_1=None))
    write_outcomes(tmp_path / "o.jsonl", outcomes)
    assert read_outcomes(tmp_path / "o.jsonl") == outcomes
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 5
    assert outcome_of(json.loads(json.dumps(outcomes[3].as_dict()))) == outcomes[3]


def test_a_number_that_is_none_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_outcomes(tmp_path / "o.jsonl", [made_outcome(flops_share=math.nan)])
    assert not list(tmp_path.iterdir())


def test_extra_loss_is_that_over_the_unfrozen_run():
    assert made_outcome().extra_loss == pytest.approx(0.1)
    assert made_outcome(result=ended(None)).extra_loss == math.inf
    with pytest.raises(UsageError, match="run mlp-0: diverged with nothing frozen"):
        _ = made_outcome(unfrozen=Result("diverged")).extra_loss


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"run_id": "mlp-0", "sta', "cut short, or not JSON"),
        ("", "cut short, or not JSON"),
        ("[1]", r"the line is \[1\], not an object"),
        (row(run_id=""), "run_id is '', not a name"),
        (row(step=-1), "step is -1, not a whole number from 0"),
        (row(step=True), "step is True, not a whole number"),
        (row(step=40), "step is 40, and the training has 40"),
        (row(total_steps=10**30), "total_steps is 10{30}, not a whole number from 0 to 9007199254740992"),
        (row(layer_count=2**53 + 1), "layer_count is 9007199254740993, not a whole number from 0 to"),
        (row(kind="back"), "kind is 'back', not one of unfrozen, noise, front, single"),
        (row(kind="noise"), "2 frozen layers in an outcome of the kind 'noise'"),
        (row(layers=[1, 0]), r"layers are \[1, 0\], not rising places among 3 layers"),
        (row(layers=[0, 3]), r"layers are \[0, 3\], not rising places"),
        (row(layers="01"), "layers is '01', not a list"),
        (row(layer_names=["layers.0"]), "1 layer_names for 2 layers"),
        (row(layer_names=["layers.0", 7]), "layer_names is 7, not a name"),
        (row(flops_share=None), "flops_share is missing"),
        (json.dumps(row(flops_share=math.inf)), "flops_share is inf, not a finite number"),
        (row(flops_share="half"), "flops_share is 'half', not a finite number"),
        (row(result=None), "result is None, not an object"),
        (row(result={"status": "lost"}), "status is 'lost', not one of finished, diverged"),
        (row(result={"status": "finished"}), "result is finished, with final_loss None"),
        (row(result={"status": "diverged", "final_loss": 1, "final_accuracy": 1}), "result is diverged, with final"),
        (row(unfrozen={"status": "diverged"}), "a continuation of a run that diverged"),
        (row(facts=3), "facts is 3, not an object"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path, line, fault):
    path = written(tmp_path / "o.jsonl", made_run()[0].as_dict(), line, row(step=11))
    with pytest.raises(FileFault, match=rf"o.jsonl, line 2: {fault}.* gather it again with"):
        read_outcomes(path)


def test_numbers_that_are_too_long(tmp_path):
    text = json.dumps(row()).replace('"flops_share": 0.5', '"flops_share": 1' + "0" * 400)
    with pytest.raises(FileFault, match="line 1"):
        read_outcomes(written(tmp_path / "o.jsonl", text))


def test_only_what_nobody_could_have_written_so_is_damage(tmp_path):
    for content in (b"", b"\xff\xfe{}", json.dumps(row()).encode()[:-9]):
        (tmp_path / "o.jsonl").write_bytes(content)
        with pytest.raises(DamagedFile):
            read_outcomes(tmp_path / "o.jsonl")
    for path in (written(tmp_path / "newer.jsonl", row(kind="back")), tmp_path):
        with pytest.raises(FileFault) as caught:
            read_outcomes(path)
        assert caught.type is FileFault


def test_a_line_that_comes_twice(tmp_path):
    path = written(tmp_path / "o.jsonl", row(), row(result=ended(0.7).__dict__))
    with pytest.raises(FileFault, match="line 2: run mlp-0: comes twice"):
        read_outcomes(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileFault, match=r"none.jsonl: cannot be read \(No such file.*make it with `python -m collect"):
        read_outcomes(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(FileFault, match=r"empty.jsonl: is empty"):
        read_outcomes(tmp_path / "empty.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(FileFault, match=r"bytes.jsonl: not a text"):
        read_outcomes(tmp_path / "bytes.jsonl")


def test_a_run_that_diverged_stands_alone(tmp_path):
    lost = replace(made_run()[0], result=Result("diverged"), unfrozen=Result("diverged"))
    write_outcomes(tmp_path / "o.jsonl", [lost])
    assert read_outcomes(tmp_path / "o.jsonl") == (lost,)


def test_where_things_lie(tmp_path):
    files = OutcomeFolder(tmp_path / "outcomes")
    assert files.packed == tmp_path / "outcomes.jsonl"
    assert files.run("a1").relative_to(files.root).as_posix() == "runs/a1.jsonl"
    assert files.state("a1", 7).parent == files.so_far("a1").parent == files.under_way("a1")
    with pytest.raises(UsageError, match=r"run_id='\.\./a'"):
        files.run("../a")


def test_a_seed_may_be_as_large_as_torch_takes_them(tmp_path):
    large = made_outcome(seed=2**63, order_seed=2**63 + 1)
    write_outcomes(tmp_path / "o.jsonl", [large])
    assert read_outcomes(tmp_path / "o.jsonl") == (large,)


def test_harm_of_all_that_can_be_read_can_be_worked_out(tmp_path):
    front = made_outcome(step=2**53 - 1, total_steps=2**53, layer_count=2**53)
    write_outcomes(tmp_path / "o.jsonl", [front])
    (harm,) = harms_of(read_outcomes(tmp_path / "o.jsonl")).values()
    assert harm.step_P.tolist() == [2**53 - 1, 2**53]
