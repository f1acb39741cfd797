"""From a suite to trials: ids made of configurations, and everything wrong found before any training."""

import dataclasses
import hashlib
import json

import pytest

from evaluate.trials import plan as plan_module
from evaluate.trials.plan import Settings, find_predictor, make_plan
from evaluate.trials.suite import PolicyEntry, Suite, WorkloadEntry, read_suite
from predictor.errors import FileFault, UsageError
from predictor.model.file import fingerprint

SUITE = Suite(
    "mine",
    (WorkloadEntry("mlp-digits", "mlp-digits", None, {"train_samples": 100, "epochs": 2}),),
    (PolicyEntry("none", "none"), PolicyEntry("smartfrz", "smartfrz")),
    (0,),
)
CPU = Settings("cpu", slots=2)


def plan(tmp_path, suite=SUITE, predictor=None, settings=CPU):
    return make_plan(suite, dataclasses.replace(settings, predictor=predictor))


def ids(*args, **options):
    return [trial.id for trial in plan(*args, **options).trials]


def with_policy(name, **options):
    return dataclasses.replace(SUITE, policies=(*SUITE.policies[:1], PolicyEntry(name, name, options)))


def with_entry(*args, **settings):
    return dataclasses.replace(SUITE, policies=(*SUITE.policies[:1], PolicyEntry(*args, **settings)))


def with_workload(name="mlp-digits", source=None, **recipe):
    return dataclasses.replace(SUITE, workloads=(WorkloadEntry(name, "work", source, recipe),))


def test_a_plan_trains_and_writes_nothing(tmp_path, make_predictor_file):
    path = make_predictor_file()
    made = plan(tmp_path, predictor=path)
    assert [job.title for job in made.jobs] == ["mlp-digits, none, seed 0", "mlp-digits, smartfrz, seed 0"]
    assert made.predictors == {fingerprint(path): path}
    assert not (tmp_path / "out").exists()


def test_what_a_result_starts_with(tmp_path, make_predictor_file):
    path = make_predictor_file()
    row = plan(tmp_path, predictor=path).trials[1].row
    options = {"predictor": f"sha256:{fingerprint(path)}"}
    assert (row["workload"], row["family"], row["source"], row["seed"]) == ("mlp-digits", "mlp", "digits", 0)
    assert (row["policy"], row["policy_name"], row["policy_options"]) == ("smartfrz", "smartfrz", options)
    assert row["slots"] == 2
    assert row["config"]["recipe"]["train_samples"] == 100
    assert row["config"]["recipe"]["batch_size"] == 32  # the workload's own


def test_ids_depend_on_the_configuration_alone(tmp_path, make_predictor_file):
    path = make_predictor_file()
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(path.read_bytes())
    before = ids(tmp_path, predictor=path)
    assert len(set(before)) == 2
    assert ids(tmp_path / "other", predictor=moved, settings=Settings("cpu", slots=1)) == before


def test_another_predictor_makes_other_trials_of_those_that_use_it(tmp_path, make_predictor_file):
    none, smartfrz = ids(tmp_path, predictor=make_predictor_file(0.9))
    assert ids(tmp_path, predictor=make_predictor_file(0.8))[0] == none
    assert ids(tmp_path, predictor=make_predictor_file(0.8))[1] != smartfrz


@pytest.mark.parametrize(
    "changed",
    [
        dataclasses.replace(SUITE, seeds=(1,)),
        with_workload("vgg-digits"),
        with_workload(epochs=3),
        with_workload(source="fashion"),
    ],
)
def test_another_setting_is_another_trial(tmp_path, make_predictor_file, changed):
    path = make_predictor_file()
    assert not set(ids(tmp_path, changed, predictor=path)) & set(ids(tmp_path, with_workload(), predictor=path))


def test_options_make_another_trial(tmp_path):
    assert ids(tmp_path, with_policy("linear", start=0.2))[1] != ids(tmp_path, with_policy("linear", start=0.3))[1]


def test_what_an_entry_leaves_out_is_in_no_id(tmp_path):
    """Results from before there were caches, ends, adapters, factors, sieves and masks keep their ids."""
    config = plan(tmp_path, with_policy("linear")).trials[1].config
    assert config["policy"] == {"name": "linear", "label": "linear", "options": {}}
    assert type(config["recipe"]["epochs"]) is float  # though the suite says 2: one training, one id
    assert set(config) == {"workload", "label", "source", "recipe", "policy", "seed", "device"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    assert ids(tmp_path, with_policy("linear"))[1] == digest[:16]
    assert ids(tmp_path, with_entry("linear", "linear", sieve=0.0, sparse=0.0))[1] == digest[:16]


CHANGES = [{"cache": True}, {"stop": True}, {"lr_factor": 10.0}, {"probe": True}, {"sieve": 0.2}, {"sparse": 0.9}]


@pytest.mark.parametrize("settings", CHANGES)
def test_what_an_entry_says_makes_another_trial(tmp_path, settings):
    plain, changed = (ids(tmp_path, with_entry("linear", "x", **part))[1] for part in ({}, settings))
    assert plain != changed


def test_adapters_make_another_trial(tmp_path):
    assert ids(tmp_path, with_entry("shorter", "x", lora=4))[1] != ids(tmp_path, with_entry("shorter", "x"))[1]


def test_a_factor_multiplies_the_workloads_own_learning_rate(tmp_path):
    suite = dataclasses.replace(with_entry("none", "fast", lr_factor=10.0), workloads=SUITE.workloads)
    plain, fast = plan(tmp_path, suite).trials
    assert fast.recipe == {**plain.recipe, "lr": 10 * plain.recipe["lr"]}


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        (
            {"augment": True},
            {"cache": True},
            "'x' keeps features .* work augments its samples.*take one of views, first",
        ),
        ({"augment": True}, {"cache": "compressed"}, r"cache = \"compressed\"\), and work augments .*augment = false"),
        ({}, {"lora": 4}, "'x' trains adapters .* no layer to freeze"),
        ({}, {"lora": 4, "cache": True}, "'x' trains adapters"),
        (
            {"train_samples": 100},
            {"sieve": 1e-3},
            r"'x' leaves out no sample of work \(sieve = 0\.001\), which has 100",
        ),
        (
            {"train_samples": 100, "batch_size": 90},
            {"sieve": 0.2},
            r"'x' \(sieve = 0\.2\) on work: batch_size=90.* fashion has 80 beside .* leave out less",
        ),
        (
            {"train_samples": 100, "batch_size": 90},
            {"infobatch": 0.5},
            r"'x' \(infobatch = 0\.5\) on work: batch_size=90.* leave out less",
        ),
        ({}, {"infobatch": 0.5, "sieve": 0.2}, r"sieve = 0\.2, infobatch = 0\.5\): take one"),
    ],
)
def test_what_does_not_go_together(tmp_path, recipe, settings, message):
    suite = dataclasses.replace(
        with_entry("linear", "x", **settings), workloads=with_workload(source="fashion", **recipe).workloads
    )
    with pytest.raises(UsageError, match=message):
        plan(tmp_path, suite)


def test_an_end_that_never_comes(tmp_path):
    for name in ("shorter", "greentrainer"):
        with pytest.raises(UsageError, match=f"'x' stops once all layers are frozen .* with {name} they never are"):
            plan(tmp_path, with_entry(name, "x", stop=True))


def test_masks_beside_adapters(tmp_path):
    with pytest.raises(UsageError, match=r"'x' trains adapters \(lora = 4\).*masks.*\(sparse = 0\.9\): leave one"):
        plan(tmp_path, with_entry("none", "x", lora=4, sparse=0.9))


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (with_policy("smartfreeze"), "there is no policy 'smartfreeze': did you mean 'smartfrz'"),
        (with_policy("linear", begin=0.5), "begin"),
        (with_policy("shorter", budget=2.0), "budget=2.0"),
        (with_policy("smartfrz", predictor=3), "policy 'smartfrz': predictor = 3: give the path"),
        (with_workload("mlp-digit"), "there is no workload 'mlp-digit': did you mean 'mlp-digits'"),
        (with_workload(epoch=3), "did you mean 'epochs'"),
        (with_workload(source="digit"), "there is no source 'digit': did you mean 'digits'"),
        (with_workload(train_samples=10**9), "samples"),
        (with_workload(batch_size=100_000), "workload 'work': batch_size=100000.* digits has 1437: lower them"),
        (with_workload(source="glosses"), "workload 'work': source 'glosses' holds text, .* takes images: choose"),
        (with_workload("textcnn-glosses", "digits"), "workload 'work': source 'digits' holds image"),
    ],
)
def test_what_does_not_exist_is_named(tmp_path, suite, message):
    with pytest.raises(UsageError, match=message):
        plan(tmp_path, suite)


@pytest.mark.parametrize("content", [b"", b"\x80\x05cos\nsystem\n(S'touch gone'\ntR.", b'{"format": "smartfrz"}'])
def test_a_hostile_predictor_file_is_refused_before_anything_is_written(tmp_path, content):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFault, match=r"hostile\.safetensors"):
        plan(tmp_path, predictor=path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_predictor_that_is_not_there(tmp_path):
    with pytest.raises(FileFault, match=r"gone\.safetensors"):
        plan(tmp_path, predictor=tmp_path / "gone.safetensors")


def test_which_predictor_is_used(tmp_path, monkeypatch):
    trained, shipped = tmp_path / "trained", tmp_path / "shipped"
    monkeypatch.setattr(plan_module, "TRAINED", trained)
    monkeypatch.setattr(plan_module, "SHIPPED", shipped)
    with pytest.raises(UsageError, match="python -m predictor train"):
        find_predictor(None)
    shipped.touch()
    assert find_predictor(None) == shipped
    trained.touch()
    assert find_predictor(None) == trained
    assert find_predictor(tmp_path / "given") == tmp_path / "given"


def test_a_predictor_of_the_policys_own(tmp_path, make_predictor_file):
    own, given = make_predictor_file(0.9), make_predictor_file(0.8)
    made = plan(tmp_path, with_policy("smartfrz", predictor=str(own)), predictor=given)
    assert made.predictors == {fingerprint(own): own}


@pytest.mark.parametrize(
    ("slots", "gpus", "sharing"), [(1, 0, 1), (2, 0, 2), (1, 2, 1), (2, 2, 1), (3, 2, 2), (4, 2, 2)]
)
def test_how_many_trials_share_a_device(monkeypatch, slots, gpus, sharing):
    monkeypatch.setattr(plan_module, "visible_gpus", lambda device: tuple("0123"[:gpus]))
    assert Settings("auto", slots).sharing == sharing


def test_no_slots():
    with pytest.raises(UsageError, match="slots=0"):
        Settings("cpu", slots=0)


def test_the_default_suite_is_fit_to_run(tmp_path, make_predictor_file):
    made = plan(tmp_path, read_suite("quick"), predictor=make_predictor_file())
    assert {trial.family for trial in made.trials} == {"mlp", "resnet"}
    assert {trial.source for trial in made.trials} == {"fashion", "fashion-last"}


def test_the_suite_of_spfde_puts_its_three_parts_together(tmp_path):
    made = plan(tmp_path, read_suite("spfde"))
    entries = [trial.policy for trial in made.trials]
    parts = {entry.label: (entry.name, entry.sparse, entry.sieve) for entry in entries}
    assert parts["none"] == ("none", 0.0, 0.0)
    assert parts["sparse, spfde, sieve"] == ("spfde", 0.9, 0.2)
    assert parts["sieve"] == ("none", 0.0, 0.2)
    assert len(made.jobs) == 10 * 2 * 3 == len({job.id for job in made.jobs})


def test_changed_code_of_ones_own_makes_another_trial(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_calm.py").write_text(
        "from predictor.policies.linear import LinearPolicy\nclass Calm(LinearPolicy): pass"
    )
    own = with_policy("mine_calm:Calm")
    before = ids(tmp_path, own)
    assert ids(tmp_path, own) == before
    with (tmp_path / "mine_calm.py").open("a") as file:
        file.write("\n")
    after = ids(tmp_path, own)
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)


@pytest.mark.parametrize("name", ["random", "lisa"])
def test_what_a_policy_draws_hangs_on_the_trials_seed(tmp_path, name):
    def drawn(**options):
        suite = dataclasses.replace(with_policy(name, **options), seeds=(0, 1))
        return [trial.policy.options for trial in plan(tmp_path, suite).trials if trial.policy.name == name]

    assert drawn() == [{}, {"seed": 1}]  # 0 is what it draws by on its own
    assert drawn(seed=7) == [{"seed": 7}, {"seed": 7}]
