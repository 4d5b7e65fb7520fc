"""The annotator's sheets: what a person has answered, and what the person is asked next.

A folder of images holds labels.csv (the start), perhaps test.csv (the test set), and query_1.csv,
query_2.csv, ... Each has a column `file`, the path of an image relative to the folder, and a column
`label`: a class, "unknown", "skip" (never ask again, train on nothing) or empty (not answered).
Known are the classes of labels.csv. Sheets are read as spreadsheets save them.
"""

import csv
import difflib
import io
import os
import re
import unicodedata
from collections.abc import Collection, Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from .files import UserError, write_whole

UNKNOWN, SKIP = "unknown", "skip"
TEST = "test.csv"


class Sheets(NamedTuple):
    """What the sheets of a folder say. Files are spelled as in the `images` given to `read`."""

    classes: tuple[str, ...]  # the K known ones, in order of name, as first spelled in labels.csv
    labels: dict[str, str]  # answered in labels.csv or a query: file -> known class, UNKNOWN, SKIP
    test: dict[str, str]  # file -> known class
    queries: list[dict[str, str | None]]  # of query_1.csv on: file -> answer or None, best first
    taken: frozenset[str]  # never asked: files that are answered or stand in test.csv

    @property
    def waiting(self) -> bool:
        """Whether the newest query sheet has no answer at all."""
        return bool(self.queries) and not any(self.queries[-1].values())

    def precision(self, number: int) -> float | None:
        """Known / (known + unknown) among the answers in query_<number>.csv; None if there is none.

        "skip" does not count: it does not say whether the image is known.
        """
        counted = [x for x in self.queries[number - 1].values() if x not in (None, SKIP)]
        return sum(x != UNKNOWN for x in counted) / len(counted) if counted else None


class _Row(NamedTuple):
    place: str  # such as "labels.csv, row 2", where row 1 is the header
    file: str
    label: str | None
    tested: bool  # whether it stands in test.csv


def read(folder: Path, images: Collection[str]) -> Sheets:
    """Read all sheets in `folder`.

    images: the paths of all images below the folder, relative to it, with "/"; broken ones too,
    because a sheet may name them. The same answer may be given twice. In test.csv only known
    classes count: an image that is unknown, skipped or without a label there is neither tested
    on nor asked about.
    Raises UserError, in one line with sheet and row: a label or an image that does not exist, two
    different answers, an image of test.csv answered elsewhere, columns or quotes that cannot be
    understood. Also if the queries have a gap or labels.csv no class. Raises OSError.
    """
    alike = {_plain(image): image for image in images} | {image: image for image in images}
    names = {"": None, UNKNOWN: UNKNOWN, SKIP: SKIP}  # folded -> label; labels.csv adds its classes
    sheets = {}
    for sheet in _names(folder):
        sheets[sheet] = _rows(sheet, (folder / sheet).read_bytes(), alike, names)
    classes = tuple(sorted(set(names.values()) - {None, UNKNOWN, SKIP}))
    if not classes:
        raise UserError("labels.csv has no class: label at least one image")

    answers: dict[str, _Row] = {}  # file -> the first row that answers it
    for row in chain(*sheets.values()):
        first = answers.setdefault(row.file, row) if row.label else row
        if (row.label, row.tested) != (first.label, first.tested):
            raise UserError(
                f"{row.place}: {row.file!r} is {row.label!r}, but {first.label!r} in "
                f"{first.place}; an image has one answer, and not both in {TEST} and elsewhere"
            )
    tests = sheets.pop(TEST, [])
    _, *queries = sheets.values()
    return Sheets(
        classes,
        {file: row.label for file, row in answers.items() if not row.tested},
        {row.file: row.label for row in tests if row.label in classes},
        [
            {row.file: None for row in rows} | {row.file: row.label for row in rows if row.label}
            for rows in queries
        ],
        frozenset(answers).union(row.file for row in tests),
    )


def write_query(path: Path, rows: Iterable[tuple[str, str, float]]) -> None:
    """Write a new query sheet. rows: file, predicted class and its probability, best first.

    Raises UserError if the sheet exists, because it may hold answers.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists: a query sheet is never overwritten")
    table = [(file, predicted, f"{probability:.4f}", "") for file, predicted, probability in rows]
    _write(path, [("file", "predicted", "probability", "label"), *table])


def write_predictions(path: Path, rows: Iterable[tuple[str, str, float]]) -> None:
    """Write or replace the predictions. rows: file, class, probability."""
    table = [(file, predicted, f"{probability:.4f}") for file, predicted, probability in rows]
    _write(path, [("file", "class", "probability"), *table])


def _write(path: Path, table: list[tuple[str, ...]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(table)
    # Without the byte order mark ("-sig") Excel takes UTF-8 for cp1252.
    write_whole(path, lambda file: file.write(text.getvalue().encode("utf-8-sig")))


def _names(folder: Path) -> list[str]:
    """Names of the sheets: labels.csv, the query sheets in order of number, and test.csv."""
    there = os.listdir(folder)
    matches = [re.fullmatch(r"query_([1-9][0-9]*)\.csv", name) for name in there]
    numbers = sorted(int(match[1]) for match in matches if match)
    if numbers != [*range(1, len(numbers) + 1)]:
        raise UserError(f"query_{numbers[-1]}.csv is there, but not every query sheet before it")
    names = ["labels.csv", *(f"query_{number}.csv" for number in numbers)]
    return [*names, TEST] if TEST in there else names


def _rows(
    sheet: str, content: bytes, alike: dict[str, str], names: dict[str, str | None]
) -> list[_Row]:
    """The rows of a sheet that name a file. alike: a spelling of an image -> the image.

    names: a folded label -> class, UNKNOWN, SKIP or None; labels.csv adds its classes to it.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    separator = max(",;", key=text.partition("\n")[0].count)
    table = []
    try:
        for cells in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True):
            table.append(cells)
    except csv.Error as error:
        raise UserError(f"{sheet}, row {len(table) + 1}: quotes are misplaced ({error})") from error
    header = [_fold(cell) for cell in table[0]] if table else []
    if not header.count("file") == header.count("label") == 1:
        raise UserError(
            f"{sheet}, row 1: name one column file and one column label, separated by , or ;"
        )
    rows = []
    for number, cells in enumerate(table[1:], start=2):
        cell = dict(zip(header, cells, strict=False))  # a row may end early
        file, label = cell.get("file", ""), cell.get("label", "").strip()
        if not file.strip() and not label:
            continue
        place, folded = f"{sheet}, row {number}", _fold(label)
        image = alike.get(file) or alike.get(_plain(file))
        if not image:
            raise UserError(f"{place}: the image {file!r} is not there")
        if sheet == "labels.csv":
            names.setdefault(folded, label)
        if folded not in names:
            [nearest] = difflib.get_close_matches(folded, names, n=1, cutoff=0)
            raise UserError(
                f"{place}: {label!r} is no class of labels.csv, nor {UNKNOWN} or {SKIP}; "
                f"the nearest is {names[nearest]!r}"
            )
        rows.append(_Row(place, image, names[folded], sheet == TEST))
    return rows


def _plain(file: str) -> str:
    """The form in which paths are compared: Windows writes "\\", macOS another form of Unicode."""
    return unicodedata.normalize("NFC", file.strip().replace("\\", "/").removeprefix("./"))


def _fold(text: str) -> str:
    """The form in which labels and column names are compared."""
    return unicodedata.normalize("NFC", text.strip().casefold())
