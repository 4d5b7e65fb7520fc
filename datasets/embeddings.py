"""Vectors that the user's own encoder has computed, of images, text, sound or anything else.

Fully labeled, the oracle knows all: DIR/train.npy (N, D), train_labels.npy (N,), test.npy (M, D)
and test_labels.npy (M,). With a person as the oracle: embeddings.npy (N, D) and items.csv, see
`items`. Vectors are float16, float32 or float64; labels are integers or strings.
"""

import hashlib
from pathlib import Path

import numpy as np

from errors import UserError
from models.vectors import CHUNK

from . import decoding, sheets
from .raw import Items, Raw

ITEMS = "items.csv"


def load(data_dir: Path) -> Raw:
    """Training and test vectors in the order of the files; classes are ordered by number or name.

    Raises UserError if a file is not what it should be, and OSError.
    """
    if data_dir.is_dir() and not (data_dir / "train_labels.npy").exists():
        what = "train.npy, test.npy and their _labels.npy, or embeddings.npy, items.csv, labels.csv"
        raise UserError(f"{data_dir} needs {what}")
    labels = {part: _labels(data_dir / f"{part}_labels.npy") for part in ("train", "test")}
    train, test = (
        read_vectors(data_dir / f"{part}.npy", len(labels[part]), f"{part}_labels.npy")
        for part in ("train", "test")
    )
    if train.shape[1] != test.shape[1]:
        D = f"{train.shape[1]} numbers in train.npy and {test.shape[1]} in test.npy"
        raise UserError(f"{data_dir}: a vector has {D}")
    classes, numbers = np.unique(np.concatenate([*labels.values()]), return_inverse=True)
    numbers = numbers.astype(np.int64)
    return Raw(
        train=train,
        train_labels=numbers[: len(train)],
        test=test,
        test_labels=numbers[len(train) :],
        classes=tuple(map(str, classes.tolist())),
        digest=digest(train, test),
    )


def items(data_dir: Path, sheet_encoding: str | None = None) -> Items:
    """The vectors of DIR/embeddings.npy, for a person to label; items.csv has their names.

    Its column `file` may be any text that tells items apart. Raises UserError for a faulty sheet,
    and OSError.
    """
    content = (data_dir / ITEMS).read_bytes()
    (header, *rows), guess = sheets.read_cells(ITEMS, content, sheet_encoding)
    if guess:  # the query sheets would hold misread names, and they are never overwritten
        raise UserError(
            f"{ITEMS} is not in Unicode: give --sheet-encoding (such as {guess} or gbk)"
        )
    while header and not header[-1].strip():  # a spreadsheet saves empty columns too
        header.pop()
    plain = [name.strip().casefold() for name in header]
    if plain.count("file") != 1:
        raise UserError(f"{ITEMS}, row 1: name one column file")
    if taken := {"predicted", "probability", "label"}.intersection(plain):
        raise UserError(f"{ITEMS}: query sheets have a column {min(taken)} themselves: rename it")
    if twice := {name for name in header if header.count(name) > 1}:
        raise UserError(f"{ITEMS}, row 1: two columns are called {min(twice)!r}")
    numbered = [(n, row) for n, row in enumerate(rows, start=2) if any(map(str.strip, row))]
    for number, row in numbered:
        if any(map(str.strip, row[len(header) :])):
            what = 'more cells than names of columns; around a text with a comma put quotes (")'
            raise UserError(f"{ITEMS}, row {number}: {what}")
    rows = [row + [""] * (len(header) - len(row)) for _, row in numbered]
    columns = dict(zip(header, map(list, zip(*rows, strict=False)), strict=False))
    names = columns.pop(header[plain.index("file")], [])
    first = {}
    for (number, _), name in zip(numbered, names, strict=True):
        if not name.strip() or name in first:
            fault = f"is that of row {first[name]}" if name in first else "is empty"
            raise UserError(f"{ITEMS}, row {number}: file {name!r} {fault}")
        first[name] = number

    images = (columns[name] for name in columns if name.strip().casefold() == "image")

    def numbers() -> tuple[np.ndarray, dict[str, str]]:
        return read_vectors(data_dir / "embeddings.npy", len(names), ITEMS), {}

    return Items(
        folder=data_dir,
        names=names,
        pictures=next(images, [""] * len(names)),
        others=sorted(decoding.walk(data_dir)),
        read=numbers,
        columns=columns,
    )


def digest(*arrays: np.ndarray) -> str:
    """Hex digits that change with the numbers."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array))  # torchvision's CIFAR is a transposed view
    return found.hexdigest()


def read_vectors(path: Path, count: int, beside: str) -> np.ndarray:
    """Read (count, D) finite numbers, as stored but for the order of their bytes.

    beside: the file that tells the count. Raises UserError, and OSError.
    """
    stored = _open(path)
    if (
        stored.dtype.newbyteorder("=") not in (np.float16, np.float32, np.float64)
        or stored.ndim != 2
    ):
        found = f"{stored.dtype} {stored.shape}"
        raise UserError(f"{path} must be float16, float32 or float64 (N, D), and is {found}")
    if not stored.size:
        raise UserError(f"{path} is empty")
    if len(stored) != count:
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
    """Read labels, (N,) int64 or strings. Integers of two kinds together would become floats."""
    labels = np.array(_open(path))
    if labels.dtype.kind not in "iuU" or labels.ndim != 1:
        found = f"{labels.dtype} {labels.shape}"
        raise UserError(f"{path} must be integers or strings (N,), and is {found}")
    return labels if labels.dtype.kind == "U" else labels.astype(np.int64)


def _open(path: Path) -> np.ndarray:
    """Map a .npy file into memory. Objects are refused: unpickling them could run code."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        what = "is no array of numbers or strings: convert it with astype before saving it"
        raise UserError(f"{path} {what} ({error})") from error
