"""Vectors that the user's own encoder has computed, of images, text, sound or anything else.

Fully labeled, the oracle knows all: DIR/train.npy (N, D), train_labels.npy (N,), test.npy (M, D)
and test_labels.npy (M,). With a person as the oracle: embeddings.npy (N, D) and items.csv, see
`items`. Vectors are float16, float32 or float64; labels are integers or strings.
"""

from pathlib import Path

import numpy as np

from errors import UserError

from . import sheets
from .raw import Raw

CHUNK = 1 << 22  # numbers at a time
VECTORS, ITEMS = "embeddings.npy", "items.csv"


def load(data_dir: Path) -> Raw:
    """Training and test vectors in the order of the files; classes are ordered by number or name.

    Raises UserError if a file is not what it should be, and OSError.
    """
    labels = {part: _labels(data_dir / f"{part}_labels.npy") for part in ("train", "test")}
    train, test = (
        vectors(data_dir / f"{part}.npy", len(labels[part]), f"{part}_labels.npy")
        for part in ("train", "test")
    )
    if train.shape[1] != test.shape[1]:
        D = f"{train.shape[1]} numbers in train.npy and {test.shape[1]} in test.npy"
        raise UserError(f"{data_dir}: a vector has {D}")
    classes, numbers = np.unique(np.concatenate([*labels.values()]), return_inverse=True)
    numbers = numbers.astype(np.int64)
    sets = train, numbers[: len(train)], test, numbers[len(train) :]
    return Raw(*sets, tuple(map(str, classes.tolist())))


def items(data_dir: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The rows of DIR/items.csv, in the order of embeddings.npy, and their further columns.

    Returns the cells of the column `file`, which may be any text that tells items apart, and for
    each other column, by name, its cells. Raises UserError for a faulty sheet, and OSError.
    """
    header, *rows = sheets.table(ITEMS, (data_dir / ITEMS).read_bytes())
    plain = [name.strip().casefold() for name in header]
    if taken := {"predicted", "probability", "label"}.intersection(plain):
        raise UserError(f"{ITEMS}: a query sheet has its own column {min(taken)}: rename this one")
    if plain.count("file") != 1:
        raise UserError(f"{ITEMS}, row 1: name one column file")
    rows = [row + [""] * (len(header) - len(row)) for row in rows if row]
    columns = dict(zip(header, map(list, zip(*rows, strict=False)), strict=False))
    names = columns.pop(header[plain.index("file")], [])
    first = {}
    for number, name in enumerate(names, start=2):
        if not name.strip() or name in first:
            fault = f"is that of row {first[name]}" if name in first else "is empty"
            raise UserError(f"{ITEMS}, row {number}: file {name!r} {fault}")
        first[name] = number
    return names, columns


def vectors(path: Path, count: int, beside: str) -> np.ndarray:
    """Read (count, D) finite numbers, as stored but for the order of their bytes.

    beside: the file that tells the count. Raises UserError, and OSError.
    """
    stored = _open(path)
    if stored.dtype not in (np.float16, np.float32, np.float64) or stored.ndim != 2:
        found = f"{stored.dtype} {stored.shape}"
        raise UserError(f"{path} must be float16, float32 or float64 (N, D), and is {found}")
    if len(stored) != count or not stored.size:
        raise UserError(f"{path} has {len(stored)} vectors, {beside} has {count} rows")
    numbers = np.empty(stored.shape, stored.dtype.newbyteorder("="))
    step = max(1, CHUNK // stored.shape[1])
    for begin in range(0, count, step):
        part = numbers[begin : begin + step]
        part[...] = stored[begin : begin + step]
        if not (finite := np.isfinite(part).all(1)).all():
            row = begin + int(finite.argmin())
            raise UserError(f"{path}: row {row}, counted from 0, is NaN or infinite")
    return numbers


def _labels(path: Path) -> np.ndarray:
    """Read labels, (N,) integers or strings."""
    labels = np.array(_open(path))
    if labels.dtype.kind not in "iuU" or labels.ndim != 1:
        found = f"{labels.dtype} {labels.shape}"
        raise UserError(f"{path} must be integers or strings (N,), and is {found}")
    return labels


def _open(path: Path) -> np.ndarray:
    """Map a .npy file into memory. Objects are refused: unpickling them could run code."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise UserError(f"{path} is no array of numbers or strings ({error})") from error
