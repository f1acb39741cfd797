"""Files of outcomes: written, read, and refused."""

import gzip
import json
import math
from dataclasses import replace

import pytest

from data.outcomes.accuracy_cost import accuracy_costs
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


def test_extra_loss_is_that_over_the_unfrozen_run():
    assert made_outcome().extra_loss == pytest.approx(0.1)
    assert made_outcome(result=ended(None)).extra_loss == math.inf
    lost = made_outcome("unfrozen", 0, (), result=Result("diverged"), unfrozen=Result("diverged"))
    with pytest.raises(UsageError, match="run mlp-0: diverged with nothing frozen"):
        _ = lost.extra_loss


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"run_id": "mlp-0", "sta', "cut short, or not JSON"),
        ("", "cut short, or not JSON"),
        ("[1]", "an object"),
        ("[" * 100_000, "recursion"),
        (json.dumps(row()).replace('"flops_share": 0.5', '"flops_share": 1' + "0" * 400), "flops_share: 10"),
        (row(run_id=""), "run_id: '': "),
        (row(step=-1), "step: -1: "),
        (row(step=True), "step: True: give a valid integer"),
        (row(step=40), "step=40: give a step before total_steps=40"),
        (row(total_steps=10**30), "total_steps: 1000000000000000000000000000000: "),
        (row(kind="frnt"), "'frnt': did you mean 'front'"),
        (row(kind="noise"), "kind='noise' with 2 frozen layers"),
        (row(layers=[1, 0]), "layers=[1, 0]: give rising indices"),
        (row(layers=[0, 3]), "layers=[0, 3]: give rising indices below layer_count=3"),
        (row(layers="01"), "layers: '01': give a valid list"),
        (row(layer_names=["layers.0"]), "1 names for 2 layers"),
        (row(layer_names=["layers.0", 7]), "layer_names[1]: 7: give a valid string"),
        (row(flops_share=None), "flops_share: None: give a valid number"),
        (json.dumps(row(flops_share=math.inf)), "flops_share: inf: give a finite number"),
        (row(result=None), "result: None: give an object"),
        (row(result={"status": "lost"}), "result: there is no status 'lost': there are finished, diverged"),
        (row(result={"status": "finished"}), "result: status='finished' with final_loss=None"),
        (
            row(result={"status": "diverged", "final_loss": 1, "final_accuracy": 1}),
            "status='diverged' with final_loss=1",
        ),
        (row(unfrozen={"status": "diverged"}), "diverged with nothing frozen"),
        (row(facts=3), "facts: 3: give"),
    ],
)
def test_a_line_that_does_not_fit_is_named_with_key_and_value(tmp_path, line, words):
    path = written(tmp_path / "o.jsonl", made_run()[0].as_dict(), line, row(step=11))
    with pytest.raises(FileFault, match=r"o.jsonl, line 2: .* gather it again with") as caught:
        read_outcomes(path)
    assert words in str(caught.value)


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}\n", "not a text of JSON lines"),  # not packed
        (gzip.compress(b"{" * 1000)[:-8], "not a text of JSON lines"),
        (gzip.compress(bytes(1 << 24)), "a line of more than 8388608 bytes"),
        (gzip.compress(b""), "is empty"),
    ],
    ids=["not packed", "cut short", "no lines", "empty"],  # the packed bytes name the second at which they were packed
)
def test_a_damaged_packed_file_is_refused(tmp_path, content, message):
    (tmp_path / "o.jsonl.gz").write_bytes(content)
    with pytest.raises(FileFault, match=message):
        read_outcomes(tmp_path / "o.jsonl.gz")


def test_a_packed_file_is_read(tmp_path):
    write_outcomes(tmp_path / "o.jsonl", outcomes := (made_outcome(),))
    (tmp_path / "o.jsonl.gz").write_bytes(gzip.compress((tmp_path / "o.jsonl").read_bytes()))
    assert read_outcomes(tmp_path / "o.jsonl.gz") == outcomes


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


def test_the_accuracy_cost_of_the_largest_numbers_that_can_be_read(tmp_path):
    prefix = made_outcome(step=2**53 - 1, total_steps=2**53, layer_count=2**53)
    write_outcomes(tmp_path / "o.jsonl", [prefix])
    (cost,) = accuracy_costs(read_outcomes(tmp_path / "o.jsonl")).values()
    assert cost.step_P.tolist() == [2**53 - 1, 2**53]
