"""What a wrong JSON or TOML file's reader is told."""

import dataclasses
import math
import random
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data.validation import suggestion, validated
from predictor.errors import FileFault, UsageError


class _Run(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    workload: str
    seeds: tuple[int, ...] = ()
    lr: float = 0.1
    mode: Literal["plain", "cache"] = "plain"
    size: Annotated[int, Field(ge=1)] | str = 1

    @model_validator(mode="after")
    def _check(self) -> "_Run":
        if len(self.seeds) > 3:
            raise ValueError(f"{len(self.seeds)} seeds: give up to 3")
        return self


@dataclasses.dataclass(frozen=True)
class _Suite:
    name: str
    runs: list[_Run]
    out: Path = Path("runs")


def _suite(**run: Any) -> dict[str, Any]:
    return {"name": "quick", "runs": [{"workload": "mlp"} | run]}


def test_content_that_fits_becomes_an_instance() -> None:
    suite = validated(_Suite, _suite(seeds=[0, 1]) | {"out": "there"}, "FILE")
    assert suite == _Suite("quick", [_Run(workload="mlp", seeds=(0, 1))], Path("there"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (_suite(seeds=[0, "x"]), ["FILE: runs[0].seeds[1]: 'x'", "integer"]),
        (_suite(seeds=[True]), ["runs[0].seeds[0]: True", "integer"]),
        (_suite(sedes=[0]), ["runs[0].sedes", "did you mean 'seeds'", "workload"]),
        (_suite(mode="cahce"), ["runs[0].mode: 'cahce'", "did you mean 'cache'", "'plain'"]),
        (_suite(size=0), ["runs[0].size: 0", "greater", " or ", "string"]),
        (_suite(seeds=[0, 1, 2, 3]), ["runs[0]: 4 seeds: give up to 3"]),
        (_suite(lr=None), ["runs[0].lr: None", "number"]),
        ({"runs": []}, ["FILE: name: missing"]),
        ({"name": 3, "runs": 4}, ["FILE: name: 3", "\nFILE: runs: 4"]),
        ([], ["FILE: "]),
    ],
)
def test_an_error_names_the_place_the_value_and_the_cure(content: Any, named: list[str]) -> None:
    with pytest.raises(FileFault) as caught:
        validated(_Suite, content, "FILE", FileFault)
    assert all(part in str(caught.value) for part in named), str(caught.value)


def test_deep_nesting_is_an_error_like_others() -> None:
    content: Any = []
    for _ in range(100_000):
        content = [content]
    with pytest.raises(UsageError, match="FILE"):
        validated(_Suite, content, "FILE")


def test_every_number_arrives_as_it_was() -> None:
    numbers = random.Random(0)
    floats = [math.ldexp(numbers.random(), numbers.randint(-1000, 1000)) for _ in range(2000)] + [-0.0, 5e-324, 0.1]
    assert validated(list[float], floats, "FILE") == floats
    assert validated(dict[str, Any], {"all": floats, "large": 1 << 90}, "FILE") == {"all": floats, "large": 1 << 90}


def test_a_suggestion_names_what_is_close_and_what_there_is() -> None:
    assert suggestion("sedes", ["workload", "seeds"]) == "did you mean 'seeds'? there are workload, seeds"
    assert suggestion("zzz", ["workload"]) == "there are workload"
