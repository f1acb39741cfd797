"""Folders of images: workers change nothing, broken files and odd folders are named."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from data.sources import folder as folder_module
from data.sources import load_source
from data.sources.folder import _middle, _random_part, _workers
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
    monkeypatch.setattr(folder_module, "_workers", lambda: 2)
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
        part = _random_part(image, 16, torch.Generator().manual_seed(seed))
        assert part.size == (16, 16)
        rising.append(part.getpixel((0, 8))[0] < part.getpixel((15, 8))[0])
    assert 15 < sum(rising) < 45
