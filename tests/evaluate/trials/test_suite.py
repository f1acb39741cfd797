"""Suite files: what they say, and what is said of one that is wrong."""

import pytest

from evaluate.trials.suite import SUITES, PolicyEntry, WorkloadEntry, read_suite
from predictor.errors import FileFault, UsageError

GOOD = """
name = "mine"
seeds = [1, 0]
margin = 0.01
workloads = ["mlp-digits", "vgg-digits"]
policies = ["none", "linear"]
"""


def read(tmp_path, text):
    path = tmp_path / "suite.toml"
    path.write_text(text, encoding="utf-8")
    return read_suite(str(path))


def test_names_alone(tmp_path):
    suite = read(tmp_path, GOOD)
    assert (suite.name, suite.seeds, suite.margin, suite.baseline) == ("mine", (1, 0), 0.01, "none")
    assert suite.workloads[1] == WorkloadEntry("vgg-digits", "vgg-digits")
    assert suite.policies[1] == PolicyEntry("linear", "linear")


def test_a_workload_may_belong_to_a_group(tmp_path):
    workloads = 'workloads = [{ name = "mlp-digits", group = "short" }, "vgg-digits"]'
    suite = read(tmp_path, GOOD.replace('workloads = ["mlp-digits", "vgg-digits"]', workloads))
    assert [entry.group for entry in suite.workloads] == ["short", ""]


def test_a_suite_about_the_predictor_that_ships(tmp_path):
    assert not read(tmp_path, GOOD).shipped
    assert read(tmp_path, 'predictor = "shipped"\n' + GOOD).shipped
    with pytest.raises(FileFault, match="predictor: 'mine': give 'shipped'"):
        read(tmp_path, 'predictor = "mine"\n' + GOOD)


def test_tables(tmp_path):
    suite = read(
        tmp_path,
        """
        name = "mine"
        seeds = [0]
        baseline = "plain"
        scores = "end"
        [recipe]
        epochs = 3
        lr = 0.1
        [[workloads]]
        name = "mlp-digits"
        label = "small"
        source = "fashion"
        recipe = { lr = 0.2 }
        [[policies]]
        name = "none"
        label = "plain"
        [[policies]]
        name = "shorter"
        options = { budget = 0.5 }
        cache = true
        stop = true
        lora = 8
        lr_factor = 10
        probe = true
        sieve = 0.2
        sparse = 0.9
        infobatch = 0.5
        """,
    )
    assert suite.scores == "end"
    assert suite.workloads == (WorkloadEntry("mlp-digits", "small", "fashion", {"epochs": 3, "lr": 0.2}),)
    assert suite.policies == (
        PolicyEntry("none", "plain"),
        PolicyEntry("shorter", "shorter", {"budget": 0.5}, True, True, 8, 10.0, 0.2, 0.9, probe=True, infobatch=0.5),
    )
    assert suite.policies[0].changes == {}
    changes = {"cache": True, "stop": True, "lora": 8, "lr_factor": 10.0, "probe": True, "sieve": 0.2, "sparse": 0.9}
    assert suite.policies[1].changes == {**changes, "infobatch": 0.5}


def test_policies_of_a_seed_and_workload_follow_each_other(tmp_path):
    cells = [(seed, work.label, policy.label) for seed, work, policy in read(tmp_path, GOOD).cells()]
    assert cells == [
        (1, "mlp-digits", "none"),
        (1, "mlp-digits", "linear"),
        (1, "vgg-digits", "none"),
        (1, "vgg-digits", "linear"),
        (0, "mlp-digits", "none"),
        (0, "mlp-digits", "linear"),
        (0, "vgg-digits", "none"),
        (0, "vgg-digits", "linear"),
    ]


OWN_SEEDS = """
name = "mine"
seeds = [0, 1]
[[workloads]]
name = "mlp-digits"
seeds = [0, 1, 2]
[[workloads]]
name = "vgg-digits"
[[policies]]
name = "none"
[[policies]]
name = "linear"
seeds = [0, 2]
"""


def test_workloads_and_policies_may_have_their_own_seeds(tmp_path):
    suite = read(tmp_path, OWN_SEEDS)
    cells = [(seed, work.label, policy.label) for seed, work, policy in suite.cells()]
    assert cells == [
        (0, "mlp-digits", "none"),
        (0, "mlp-digits", "linear"),
        (0, "vgg-digits", "none"),
        (0, "vgg-digits", "linear"),
        (1, "mlp-digits", "none"),
        (1, "vgg-digits", "none"),
        (2, "mlp-digits", "none"),
        (2, "mlp-digits", "linear"),
    ]
    assert suite.policies[1].changes == {}  # a trial's id does not depend on what else is trained


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "seeds = [0, 2]",
            "seeds = [2]",
            r"'linear' has seeds \[2\] and workload 'vgg-digits' \[0, 1\]: give them one",
        ),
        ("seeds = [0, 2]", "seeds = [0, 99]", "policy 'linear': no workload has seed 99: give it to one"),
        ("seeds = [0, 2]", "seeds = [0, 0]", r"policies\[1\].seeds: \[0, 0\]"),
        ("seeds = [0, 2]", "seeds = []", r"policies\[1\].seeds: give at least one"),
        ("seeds = [0, 1, 2]", "seeds = [-1]", r"workloads\[0\].seeds\[0\]: -1"),
        ('name = "none"', 'name = "none"\nseeds = [0]', "baseline 'none' is trained with every seed"),
    ],
)
def test_seeds_that_compare_nothing_are_refused(tmp_path, old, new, message):
    assert old in OWN_SEEDS
    with pytest.raises(FileFault, match=message):
        read(tmp_path, OWN_SEEDS.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "mine"', "", "name: missing"),
        ('name = "mine"', 'name = "../mine"', "name: '../mine'"),
        ('name = "mine"', "name = 3", "name: 3"),
        ("seeds = [1, 0]", "seeds = []", "seeds: give at least one"),
        ("seeds = [1, 0]", "seeds = [1, 1]", r"seeds: \[1, 1\]"),
        ("seeds = [1, 0]", "seeds = [true]", r"seeds\[0\]: True"),
        ("seeds = [1, 0]", f"seeds = [{2**64}]", rf"seeds\[0\]: {2**64}: .*less than"),
        ("margin = 0.01", "margin = 2", "margin: 2: .*less than 1"),
        ("margin = 0.01", "margn = 0.01", "did you mean 'margin'"),
        ("margin = 0.01", 'scores = "ends"', "did you mean 'end'"),
        ('["mlp-digits", "vgg-digits"]', "[]", "workloads: give at least one"),
        (
            '["mlp-digits", "vgg-digits"]',
            '[{ name = "mlp-digits", label = "" }]',
            r"workloads\[0\].label: ''",
        ),
        ('["mlp-digits", "vgg-digits"]', '[""]', r"workloads\[0\].name: ''"),
        ('["none", "linear"]', '["none", { name = "linear", label = "" }]', r"policies\[1\].label: ''"),
        ('["mlp-digits", "vgg-digits"]', "[1]", r"workloads\[0\]: 1"),
        ('["mlp-digits", "vgg-digits"]', '[{ nam = "x" }]', r"workloads\[0\].nam: .*did you mean 'name'"),
        ('["none", "linear"]', '["none", "none"]', "policy 'none' comes twice"),
        ('["none", "linear"]', '["linear"]', "baseline must be one"),
        ('["none", "linear"]', '["none", { name = "linear", options = 3 }]', r"policies\[1\].options: 3"),
        ('["none", "linear"]', '["none", { name = "linear", cache = "exact" }]', "cache: 'exact': write true"),
        ('["none", "linear"]', '["none", { name = "linear", lora = 0 }]', "lora: 0"),
        ('["none", "linear"]', '["none", { name = "linear", lora = true }]', "lora: True"),
        ('["none", "linear"]', '["none", { name = "linear", lr_factor = 0 }]', "lr_factor: 0: .*greater than 0"),
        ('["none", "linear"]', '["none", { name = "linear", sieve = 1 }]', "sieve: 1: .*less than 1"),
        ('["none", "linear"]', '["none", { name = "linear", stop = 1 }]', "stop: 1"),
        ('["none", "linear"]', '["none", { name = "linear", sparse = nan }]', "sparse: nan"),
        ('["none", "linear"]', '["none", { name = "linear", sparsity = 0.9 }]', "did you mean 'sparse'"),
        ('["none", "linear"]', "[", "suite.toml"),
        ('["none", "linear"]', "[" * 3000 + "]" * 3000, "suite.toml: "),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(FileFault, match=message):
        read(tmp_path, GOOD.replace(old, new))


def test_a_name_that_is_none_gets_the_closest(tmp_path):
    with pytest.raises(UsageError, match=r"did you mean 'quick'\? there are .*quick.*PATH.toml"):
        read_suite("quik")
    with pytest.raises(FileFault, match=r"gone.toml: cannot be read"):
        read_suite(str(tmp_path / "gone.toml"))


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.toml")), ids=lambda path: path.stem)
def test_suites_that_ship(path):
    suite = read_suite(path.stem)
    assert suite.name == path.stem
    assert len(suite.seeds) >= 2
    assert "shorter" in {entry.name for entry in suite.policies}  # a method that cannot beat it is not worth having
