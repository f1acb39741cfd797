"""Reads mutated trajectory files: `python -m tests.data.fuzz` tries 10,000.

Each file must be read as it was written, or be refused with a FileFault. HDF5 may crash, hang or run out of memory in
its child process only. The files depend on their number alone.
"""

import argparse
import random
import re
import resource
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.trajectories import child, open_trajectories
from data.trajectories.trajectory import Trajectory, arrays_of
from data.trajectories.validate import validate
from predictor.errors import FileFault
from tests.data.made import assert_same, made_trajectory, write_raw


def seeds(folder: Path) -> list[tuple[bytes, list[Trajectory]]]:
    """Small sound files: as the writer makes them, and of HDF5's first format, whose structures have no checksums."""
    noise_TLK = np.random.default_rng(0).normal(size=(20, 3, 40)).astype(np.float32)
    runs = [made_trajectory("mlp-0"), made_trajectory("mlp-1", snapshots=20, weights=40, weights_TLK=noise_TLK)]
    arrays = {run.run_id: arrays_of(run) for run in runs}
    paths = [write_raw(folder / f"{libver}.h5", arrays, libver=libver) for libver in ("v110", "earliest")]
    return [(path.read_bytes(), runs) for path in paths]


def mutated(content: bytes, number: int) -> bytes:
    """Flip bits, overwrite integers, splice, insert, remove or cut off, once to a few times."""
    chance = random.Random(number)
    data = bytearray(content)
    if content.count(b"OHDR") and chance.random() < 0.5:
        return _with_a_changed_structure(data, chance)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        start, length = chance.randrange(len(data)), chance.choice((1, 2, 4, 8, 64, 512))
        kind = chance.choice(("flip", "flip", "number", "number", "splice", "insert", "remove", "cut"))
        if kind == "flip":
            data[start] ^= 1 << chance.randrange(8)
        elif kind == "number":
            width = chance.choice((1, 2, 4, 8))
            value = chance.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, chance.getrandbits(64), chance.getrandbits(16)))
            data[start : start + width] = (value & (256**width - 1)).to_bytes(width, "little")
        elif kind == "splice":
            source = chance.randrange(len(data))
            data[start : start + length] = data[source : source + length]
        elif kind == "insert":
            data[start:start] = chance.randbytes(length)
        elif kind == "remove":
            del data[start : start + length]
        elif chance.random() < 0.2:
            del data[start:]
        if not data:
            break
    return bytes(data)


def _with_a_changed_structure(data: bytearray, chance: random.Random) -> bytes:
    """Change a structure of HDF5 1.8 or newer, and make its checksum right again, as an attacker would."""
    start = chance.choice([found.start() for found in re.finditer(b"|".join(STRUCTURES), data)])
    end = _end_of(data, start)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, width = chance.randrange(start + 4, end), chance.choice((1, 1, 2, 4, 8))
        value = chance.choice(
            (0, 1, 2**31, 2**63 - 1, 2**64 - 1, chance.getrandbits(64), data[at] ^ 1 << chance.randrange(8))
        )
        stop = min(at + width, end)
        data[at:stop] = (value & (256 ** (stop - at) - 1)).to_bytes(stop - at, "little")
    data[end : end + 4] = lookup3(bytes(data[start:end])).to_bytes(4, "little")
    return bytes(data)


STRUCTURES = (b"OHDR", b"BTHD", b"FRHP")


def _end_of(data: bytearray | bytes, start: int) -> int:
    """Where the checksum of a structure is: an object header, a B-tree's header, or a fractal heap's header."""
    kind, flags = bytes(data[start : start + 4]), data[start + 5]
    if kind != b"OHDR":
        return start + {b"BTHD": 34, b"FRHP": 142}[kind]
    body = start + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    return body + width + int.from_bytes(data[body : body + width], "little")


def lookup3(key: bytes) -> int:
    """HDF5's checksum of its structures: Bob Jenkins' lookup3, hashlittle with a start value of 0."""

    def turn(value: int, bits: int) -> int:
        return (value << bits | value >> 32 - bits) & 0xFFFFFFFF

    a = b = c = (0xDEADBEEF + len(key)) & 0xFFFFFFFF
    words = struct.iter_unpack("<III", key + bytes(-len(key) % 12))
    left = len(key)
    for one, two, three in words:
        a, b, c = (a + one) & 0xFFFFFFFF, (b + two) & 0xFFFFFFFF, (c + three) & 0xFFFFFFFF
        if left > 12:
            for bits in (4, 6, 8, 16, 19, 4):
                a = ((a - c) & 0xFFFFFFFF) ^ turn(c, bits)
                c = (c + b) & 0xFFFFFFFF
                a, b, c = b, c, a
        left -= 12
    for bits in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - turn(b, bits)) & 0xFFFFFFFF
        a, b, c = b, c, a
    # Seven turns of three names leave the result in the second.
    return b


def fate(path: Path, runs: list[Trajectory]) -> str:
    """How a file fares: refused, crashes (in the child, and so refused), or read. Raises where a promise is broken.

    A file that corrupts the child's memory may fare otherwise the next time. So validate is called, and not compared.
    """
    validate(path)
    try:
        with open_trajectories(path) as file:
            found = list(file)
    except FileFault as fault:
        return "crashes" if "HDF5 crashes" in str(fault) else "refused"
    expected = {run.run_id: run for run in runs}
    for run in found:
        assert_same(expected[run.run_id], run)
    return "read"


def fuzz(files: int, first: int = 0, *, progress: bool = False) -> Counter[str]:
    """Try files, and count how they fare."""
    with tempfile.TemporaryDirectory() as name:
        originals, path, fates = seeds(Path(name)), Path(name) / "mutated.h5", Counter[str]()
        for number in tqdm(range(first, first + files), disable=not progress):
            content, runs = originals[number % len(originals)]
            path.write_bytes(mutated(content, number))
            try:
                fates[fate(path, runs)] += 1
            except Exception as error:
                raise AssertionError(f"file {number}: {error}") from error
    return fates


def main() -> None:
    """Print how the files fare, and the most memory that a child took."""
    parser = argparse.ArgumentParser(prog="python -m tests.data.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=10_000, help="how many to try (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (default: %(default)s)")
    flags = parser.parse_args()
    fates = fuzz(flags.files, flags.first, progress=sys.stderr.isatty())
    child._stop()
    peaks = [resource.getrusage(who).ru_maxrss / 1e3 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(
        f"{fates['read']} read as written, {fates['refused']} refused, {fates['crashes']} refused after a crash of HDF5"
    )
    print(f"peak memory: {peaks[0]:.0f} MB here, {peaks[1]:.0f} MB in a child")


if __name__ == "__main__":
    main()
