"""Every source keeps to the same contract: ids, order, resume, augmentation, probe batches, subsets."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from data.sources import SOURCES, Source, load_source
from data.sources.base import balanced, generator_for, stratified
from predictor.errors import UsageError

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def folder_source(root: Path) -> Source:
    """Three classes of 7, 5 and 4 training images and 3 test images each; no two images are alike."""
    for split, counts in (("train", (7, 5, 4)), ("test", (3, 3, 3))):
        for label, count in enumerate(counts):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                image = Image.radial_gradient("L").rotate(20 * index).crop((0, 0, 40 + index, 30 + 3 * label))
                image.convert("RGB").save(folder / f"{index}.png")
    return load_source(f"imagefolder:{root}@8")


@pytest.fixture(params=["digits", "fashion", "glosses", "imagefolder"], scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    if request.param == "imagefolder":
        return folder_source(tmp_path_factory.mktemp("images"))
    return load_source(request.param, train_samples=100)


def same(left: list[tuple[Tensor, ...]], right: list[tuple[Tensor, ...]]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_epoch_gives_every_sample_once_with_its_own_label(source: Source, split: str) -> None:
    batches = list(source.batches(split, 7, shuffle=True))
    ids = torch.cat([ids_B for ids_B, _, _ in batches])
    labels = torch.cat([labels_B for _, _, labels_B in batches])
    assert sorted(ids.tolist()) == list(range(source.size(split)))
    assert torch.equal(labels, source.labels(split)[ids])
    assert set(labels.tolist()) == set(range(source.classes))


def test_an_id_names_the_same_input_in_every_order(source: Source) -> None:
    inputs = {}
    for ids_B, x, _ in source.batches("train", 5, shuffle=False):
        inputs.update(zip(ids_B.tolist(), x, strict=True))
    assert list(inputs) == list(range(source.size("train")))
    for ids_B, x, _ in source.batches("train", 9, shuffle=True, seed=3, epoch=2):
        assert all(torch.equal(inputs[index], row) for index, row in zip(ids_B.tolist(), x, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_shapes_types_and_places(source: Source, device: str) -> None:
    ids_B, x, labels_B = next(source.batches("test", 4, shuffle=True, device=device))
    assert x.shape == (4, *source.shape)
    assert x.dtype == (torch.float32 if source.kind == "image" else torch.int64)
    assert ids_B.dtype == labels_B.dtype == torch.int64
    assert (ids_B.device.type, x.device.type, labels_B.device.type) == ("cpu", device, device)
    assert source.probe(3, device).device.type == device
    assert bool(source.vocabulary) == (source.kind == "text")


def test_the_order_depends_on_seed_and_epoch_alone(source: Source) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [i for ids_B, _, _ in source.batches("train", 8, shuffle=True, seed=seed, epoch=epoch) for i in ids_B]

    first = order(1, 0)
    torch.manual_seed(99)
    assert order(1, 0) == first
    assert len({tuple(map(int, order(seed, epoch))) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_starting_later_gives_the_rest_of_the_unbroken_epoch(source: Source) -> None:
    augment = source.augmentable
    whole = list(source.batches("train", 5, shuffle=True, seed=1, epoch=4, augment=augment))
    for start in (1, len(whole) - 1, len(whole)):
        rest = source.batches("train", 5, shuffle=True, seed=1, epoch=4, augment=augment, start=start)
        assert same(list(rest), whole[start:])


def test_augmentation_repeats_itself_and_differs_between_epochs(source: Source) -> None:
    def epoch(number: int, augment: bool = True) -> list[tuple[Tensor, ...]]:
        return list(source.batches("train", 5, shuffle=False, seed=1, epoch=number, augment=augment))

    if source.augmentable:
        assert same(epoch(0), epoch(0))
        assert not same(epoch(0), epoch(1))
        assert not same(epoch(0), epoch(0, augment=False))
    else:
        with pytest.raises(UsageError, match=r"augment=True.*augment=False"):
            epoch(0)


def test_the_global_random_numbers_stand_still(source: Source) -> None:
    before = torch.get_rng_state()
    list(source.batches("train", 5, shuffle=True, augment=source.augmentable))
    source.probe(4)
    source.limited(6)
    assert torch.equal(torch.get_rng_state(), before)


def test_probe_batches_are_fixed_and_balanced(source: Source) -> None:
    inputs = torch.cat([x for _, x, _ in source.batches("test", 50, shuffle=False)])
    samples = 2 * source.classes + 1
    probe = source.probe(samples)
    assert len(probe) == samples
    assert torch.equal(probe, source.probe(samples))
    chosen = balanced(source.labels("test"), samples)
    assert torch.equal(probe, inputs[chosen])
    assert sorted(source.labels("test")[chosen].bincount().tolist()) == [2] * (source.classes - 1) + [3]
    assert len(source.probe(10**6)) == source.size("test")
    assert torch.equal(source.limited(6).probe(samples), probe)


def test_a_limited_source_keeps_the_test_split(source: Source) -> None:
    small = source.limited(12)
    assert (small.size("train"), small.size("test")) == (12, source.size("test"))
    assert (small.shape, small.vocabulary, small.classes) == (source.shape, source.vocabulary, source.classes)
    chosen = stratified(source.labels("train"), 12)
    rows = torch.cat([x for _, x, _ in source.batches("train", 50, shuffle=False)])[chosen]
    ids_B, x, labels_B = next(small.batches("train", 12, shuffle=False))
    assert torch.equal(ids_B, torch.arange(12))
    assert torch.equal(x, rows)
    assert torch.equal(labels_B, source.labels("train")[chosen])


def test_drop_last_leaves_out_a_batch_that_is_not_full(source: Source) -> None:
    size = source.size("train")
    kept = [len(ids_B) for ids_B, _, _ in source.batches("train", 7, shuffle=True, drop_last=True)]
    assert kept == [7] * (size // 7)
    assert sum(len(ids_B) for ids_B, _, _ in source.batches("train", 7, shuffle=True)) == size


def test_an_epoch_among_some_samples(source: Source) -> None:
    among = torch.tensor([3, 14, 15, 8, 1])
    batches = list(source.batches("train", 2, shuffle=True, seed=1, among=among))
    ids = [ids_B.tolist() for ids_B, _, _ in batches]
    assert [len(part) for part in ids] == [2, 2, 1]
    assert sorted(i for part in ids for i in part) == [1, 3, 8, 14, 15]
    assert ids != [[3, 14], [15, 8], [1]]
    labels = source.labels("train")
    assert all(torch.equal(labels_B, labels[ids_B]) for ids_B, _, labels_B in batches)
    inputs = torch.cat([x for _, x, _ in source.batches("train", 50, shuffle=False)])
    assert all(torch.equal(x, inputs[ids_B]) for ids_B, x, _ in batches)
    assert same(list(source.batches("train", 2, shuffle=True, seed=1, among=among, start=1)), batches[1:])
    full = list(source.batches("train", 2, shuffle=True, seed=1, among=among, drop_last=True))
    assert same(full, batches[:2])
    in_order = source.batches("train", 5, shuffle=False, among=among)
    assert torch.equal(next(in_order)[0], among)


def test_wrong_calls_are_refused_at_once(source: Source) -> None:
    size = source.size("train")
    with pytest.raises(UsageError, match=r"batch_size=0.*choose 1 to"):
        source.batches("train", 0, shuffle=True)
    with pytest.raises(UsageError, match=f"batch_size={size + 1} with {size} train samples"):
        source.batches("train", size + 1, shuffle=True, drop_last=True)
    for odd in (-1, size):
        with pytest.raises(UsageError, match=f"among: the ids of train samples are 0 to {size - 1}"):
            source.batches("train", 1, shuffle=True, among=torch.tensor([0, odd]))
    with pytest.raises(UsageError, match="batch_size=3 with 2 train samples"):
        source.batches("train", 3, shuffle=True, drop_last=True, among=torch.tensor([0, 1]))
    with pytest.raises(UsageError, match=r"split='valid'.*train or test"):
        source.size("valid")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="samples=0"):
        source.probe(0)
    for samples in (0, size + 1):
        with pytest.raises(UsageError, match=f"{samples} samples out of {size}"):
            source.limited(samples)


def test_stratified_keeps_shares_and_is_nested() -> None:
    labels = torch.tensor([0] * 80 + [1] * 20)[torch.randperm(100, generator=generator_for(5))]
    for samples, expected in ((5, [4, 1]), (50, [40, 10]), (100, [80, 20])):
        assert labels[stratified(labels, samples)].bincount().tolist() == expected
    sets = [set(stratified(labels, samples).tolist()) for samples in range(1, 101)]
    assert [len(chosen) for chosen in sets] == list(range(1, 101))
    assert all(small < large for small, large in pairwise(sets))
    assert stratified(labels, 30).tolist() == sorted(stratified(labels, 30).tolist())


def test_balanced_takes_turns_until_a_class_is_used_up() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    assert labels[balanced(labels, 3)].tolist() == [0, 1, 2]
    assert labels[balanced(labels, 7)].tolist() == [0, 1, 2, 0, 2, 0, 0]
    assert sorted(balanced(labels, 7).tolist()) == list(range(7))


def test_generators_of_near_numbers_are_unrelated() -> None:
    numbers = [(seed, epoch) for seed in range(20) for epoch in range(20)]
    assert len({torch.rand(1, generator=generator_for(*pair)).item() for pair in numbers}) == len(numbers)
    words = [("a", 1), ("b", 1), ("a", 2), (1,)]
    assert len({torch.rand(1, generator=generator_for(*keys)).item() for keys in words}) == len(words)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        UsageError, match=r"there is no source 'mnist': did you mean 'mnist-5k'. there are digits, .*imagefolder:PATH"
    ):
        load_source("mnist")


@pytest.mark.parametrize(("name", "train", "test"), [("digits", 1437, 360), ("fashion", 10_000, 2_000)])
def test_embedded_images(name: str, train: int, test: int) -> None:
    source = load_source(name)
    assert (source.name, source.size("train"), source.size("test"), source.classes) == (name, train, test, 10)
    x = torch.cat([x for _, x, _ in source.batches("train", 500, shuffle=False)])
    assert abs(x.mean().item()) < 0.01
    assert abs(x.std().item() - 1) < 0.01


def test_registry_entries_are_named_after_themselves(tmp_path: Path) -> None:
    loaders: dict[str, Callable[[], Source]] = {name: SOURCES[name] for name in ("digits", "fashion", "glosses")}
    assert all(make().name == name for name, make in loaders.items())
    assert folder_source(tmp_path).name == f"imagefolder:{tmp_path}@8"
