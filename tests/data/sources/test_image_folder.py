"""Folders of images: workers change nothing, broken files and odd folders are named."""

import copy
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.sources import folder as folder_module
from data.sources import load_source
from data.sources.base import Source
from data.sources.folder import _cut, _Images, _middle, _Order, _pixels_wanted, _random_part, _workers
from predictor.errors import FileFault, UsageError


def write_images(root: Path, split: str, classes: str = "ab", count: int = 6) -> None:
    for label, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for index in range(count):
            image = Image.linear_gradient("L").resize((30 + index, 24)).rotate(40 * label)
            image.save(root / split / name / f"{index}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path, "train")
    write_images(tmp_path, "val", count=2)
    return tmp_path


def test_files_classes_and_size(root: Path) -> None:
    source = load_source(f"imagefolder:{root}")
    assert (source.kind, source.classes, source.shape) == ("image", 2, (3, 224, 224))
    assert source.labels("train").tolist() == [0] * 6 + [1] * 6
    assert source.size("test") == 4
    assert load_source(f"imagefolder:{root}@16").shape == (3, 16, 16)
    assert load_source(f"imagefolder:{root}@16", train_samples=4).labels("train").tolist() == [0, 0, 1, 1]


def test_pixels_are_normalized_as_for_imagenet(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 30), colour).save(tmp_path / split / name / "0.png")
    ids_B, x, _ = next(load_source(f"imagefolder:{tmp_path}@8").batches("train", 2, shuffle=False))
    for image, red, blue in zip(x, (1, 0), (0, 1), strict=True):
        for channel, share, mean, deviation in ((0, red, 0.485, 0.229), (1, 0, 0.456, 0.224), (2, blue, 0.406, 0.225)):
            expected = torch.full((8, 8), (share - mean) / deviation)
            torch.testing.assert_close(image[channel], expected, atol=0.01, rtol=0)
    assert ids_B.tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # DataLoader's own way, on Python 3.12 and later
def test_workers_change_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_source(f"imagefolder:{root}@12")

    def epoch(start: int = 0) -> list[tuple[torch.Tensor, ...]]:
        return list(source.batches("train", 3, shuffle=True, seed=2, epoch=1, augment=True, start=start))

    alone = epoch()
    monkeypatch.setattr(folder_module, "_workers", lambda on_gpu=False: 2)
    state = torch.get_rng_state()
    for start in (0, 2):
        found = epoch(start)
        assert len(found) == 4 - start
        for one, other in zip(found, alone[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    (root / "train" / "b" / "3.png").write_bytes(b"no image")
    with pytest.raises(FileFault, match=r"3.png: no image that can be read") as caught:
        epoch()
    assert "Traceback" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_stay_from_epoch_to_epoch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_workers", lambda on_gpu=False: 2)
    source = load_source(f"imagefolder:{root}@12")

    def epoch(number: int, source: Source = source) -> Iterator[tuple[torch.Tensor, ...]]:
        return source.batches("train", 3, shuffle=True, seed=2, epoch=number, augment=True)

    def workers() -> set[int | None]:
        return {child.pid for child in multiprocessing.active_children()}

    before = workers()
    first = [list(epoch(number)) for number in range(3)]
    started = workers() - before
    assert len(started) == 2
    next(epoch(1))  # left after a batch
    outer, inner = epoch(0), epoch(1)  # one inside the other
    for ours, others in zip(first[0], zip(outer, inner, strict=True), strict=True):
        assert torch.equal(ours[1], others[0][1])
    for number, expected in enumerate(first):
        assert all(torch.equal(a[1], b[1]) for a, b in zip(epoch(number), expected, strict=True))
    assert started <= workers()
    assert len(list(copy.deepcopy(source).batches("train", 3, shuffle=False))) == 4
    limited = source.limited(6)
    assert [x.tolist() for x, *_ in epoch(0, limited)] != [x.tolist() for x, *_ in first[0]]
    assert len(list(epoch(0, limited))) == 2


def photograph(path: Path, size: tuple[int, int]) -> None:
    """A JPEG with nothing finer than a few pixels, so that its halves look alike."""
    gradient = Image.linear_gradient("L")
    Image.merge("RGB", [gradient, gradient.rotate(90), gradient.rotate(180)]).resize(size).save(path, quality=95)


def test_a_large_photograph_is_decoded_smaller_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photograph(tmp_path / "a.jpg", (640, 480))
    decoded = []
    convert = Image.Image.convert

    def noted(image: Image.Image, *args: object) -> Image.Image:
        decoded.append(image.size)
        return convert(image, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "convert", noted)
    images = _Images([str(tmp_path / "a.jpg")], 48)
    for seeds in (None, (0, 0), (0, 1), (0, 2)):
        exact, fast = (images[_Order(0, seeds, fast)] for fast in (False, True))
        assert isinstance(exact, torch.Tensor)
        assert isinstance(fast, torch.Tensor)
        assert exact.shape == fast.shape == (3, 48, 48)
        assert (exact.float() - fast.float()).abs().max() < 8
    assert decoded[::2] == [(640, 480)] * 4
    assert all(size[0] < 640 for size in decoded[1::2])


def test_as_many_pixels_are_decoded_as_are_wanted() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        part = _random_part(640, 480, generator)
        width, height = _pixels_wanted((640, 480), part, 48)
        assert part.width * width / 640 >= 48
        assert part.height * height / 480 >= 48
    assert _pixels_wanted((640, 480), None, 224) == (342, 256)


def test_a_gpu_has_more_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 24)
    assert (_workers(), _workers(on_gpu=True)) == (8, 24)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 128)
    assert _workers(on_gpu=True) == 32


def test_one_thread_means_no_workers() -> None:
    assert torch.get_num_threads() == 1
    assert _workers() == 0


def test_broken_images_are_named(root: Path) -> None:
    source = load_source(f"imagefolder:{root}@8")
    path = root / "train" / "a" / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(FileFault, match=r"2.png: no image that can be read.*delete it or replace it"):
        list(source.batches("train", 4, shuffle=False))
    path.unlink()
    with pytest.raises(FileFault, match=r"2.png: no image that can be read"):
        list(source.batches("train", 4, shuffle=True))


def test_odd_folders_are_named(root: Path) -> None:
    with pytest.raises(FileFault, match="has no folder train: make one"):
        load_source(f"imagefolder:{root}/nowhere")
    with pytest.raises(UsageError, match="imagefolder:PATH"):
        load_source("imagefolder:")
    (root / "val" / "c").mkdir()
    with pytest.raises(FileFault, match="no valid file for the classes c"):
        load_source(f"imagefolder:{root}")
    Image.new("L", (9, 9)).save(root / "val" / "c" / "0.png")
    with pytest.raises(FileFault, match=r"train and val differ in their classes \(c\): give both the same"):
        load_source(f"imagefolder:{root}")


def test_grey_palette_and_tiny_images_are_read(root: Path) -> None:
    Image.new("P", (1, 1)).save(root / "train" / "a" / "tiny.png")
    Image.new("LA", (300, 2)).save(root / "train" / "b" / "flat.png")
    for augment in (False, True):
        batches = load_source(f"imagefolder:{root}@8").batches("train", 14, shuffle=False, augment=augment)
        assert next(batches)[1].isfinite().all()


def test_evaluation_cuts_out_the_middle() -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (16, 0, 48, 32))
    middle = _middle(image, 28)  # 32 high: nothing is resized
    assert middle.size == (28, 28)
    assert middle.getextrema() == ((255, 255),) * 3


def test_random_parts_vary_and_are_mirrored_one_time_in_two() -> None:
    image = Image.linear_gradient("L").rotate(90).convert("RGB")  # brightness runs from one side to the other
    rising = []
    for seed in range(60):
        part = _cut(image, _random_part(*image.size, torch.Generator().manual_seed(seed)), image.size, 16)
        assert part.size == (16, 16)
        rising.append(part.getpixel((0, 8))[0] < part.getpixel((15, 8))[0])
    assert 15 < sum(rising) < 45
