"""Which policies make a family, what it is called, and which of them is the rival."""

import pytest

from evaluate.analysis.families import colour_indices, families, policy_names, rival
from evaluate.trials.records import read_results
from predictor.errors import UsageError


@pytest.fixture
def suite(write, trial, told):
    """Results of one trial under each label, with what its configuration says of the policy."""

    def make(**entries):
        rows = []
        for label, entry in {"none": {"name": "none"}, **entries}.items():
            row = trial("a", label, 0)
            rows.append(row | {"config": {**row["config"], "policy": told(label, **entry)}})
        return read_results(write(rows))

    return make


def test_a_policy_with_the_same_changes_is_one_family_whatever_its_settings(suite):
    results = suite(
        **{
            "static 0.4": {"name": "static", "options": {"share": 0.4}},
            "smart": {"name": "smartfrz"},
            "static 0.4 kept": {"name": "static", "options": {"share": 0.4}, "cache": True},
            "last two": {"name": "static", "options": {"last": 2}},
            "probe": {"name": "static", "options": {"share": 1.0}, "cache": True, "lr_factor": 10.0},
            "static 0.7 kept": {"name": "static", "options": {"share": 0.7}, "cache": True},
            "adapters 8": {"name": "none", "lora": 8, "lr_factor": 3.0},
            "adapters 16": {"name": "none", "lora": 16, "lr_factor": 10.0},
        }
    )
    found = families(results)
    assert [(family.name, family.members) for family in found] == [
        ("static", ("static 0.4", "last two")),
        ("smart", ("smart",)),
        ("static, cached", ("static 0.4 kept", "static 0.7 kept")),
        ("probe", ("probe",)),
        ("lora, lr factor", ("adapters 8", "adapters 16")),
    ]
    assert [(family.policy, family.changes) for family in found[2:4]] == [
        ("static", ("cache",)),
        ("static", ("cache", "lr_factor")),
    ]
    indices = colour_indices(results)
    assert indices["none"] == 0
    assert indices["static 0.4"] == indices["last two"] == 1
    assert indices["adapters 16"] == 5
    assert policy_names(results) == ["none", "static", "smartfrz"]


def test_a_word_that_a_change_has_makes_another_family(suite):
    results = suite(
        a={"name": "static", "cache": "views"},
        b={"name": "static", "cache": True},
        c={"name": "static", "cache": "views"},
        d={"name": "none", "sieve": 0.2},
        e={"name": "none", "sieve": 0.4},
    )
    assert [(family.name, family.members) for family in families(results)] == [
        ("static, views cache", ("a", "c")),
        ("b", ("b",)),
        ("sieve", ("d", "e")),
    ]


def test_names_of_families_are_different(suite):
    results = suite(
        **{
            "static, cached": {"name": "linear"},
            "a": {"name": "static", "cache": True},
            "b": {"name": "static", "cache": True},
        }
    )
    assert [family.name for family in families(results)] == ["static, cached", "a / b"]


def test_without_a_configuration_each_label_is_a_family(write, trial):
    rows = [trial("a", label, 0, config={}) for label in ("none", "static 0.4", "static 0.7")]
    results = read_results(write(rows, policies=["none", "static 0.4", "static 0.7", "planned"]))
    assert [family.members for family in families(results)] == [("static 0.4",), ("static 0.7",), ("planned",)]
    assert policy_names(results) == ["none", "static 0.4", "static 0.7", "planned"]


def test_the_rival_trains_for_fewer_steps_and_changes_nothing_else(suite):
    found = families(suite(**{"fewer, kept": {"name": "shorter", "cache": True}, "fewer": {"name": "shorter"}}))
    assert rival(found).name == "fewer"
    assert rival(found[:1]) is None
    assert rival(found, "fewer, kept").name == "fewer, kept"
    with pytest.raises(UsageError, match=r"there are 'fewer, kept', fewer$"):  # quoted, for a comma ends no name
        rival(found, "few")
