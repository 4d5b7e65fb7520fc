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
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from .files import UserError, write_whole

START, TEST = "labels.csv", "test.csv"
UNKNOWN, SKIP = "unknown", "skip"


class Sheets(NamedTuple):
    """What the sheets of a folder say. Files are spelled as in the `images` given to `read`."""

    classes: tuple[str, ...]  # the K known ones, in order of name, as first spelled in labels.csv
    labels: dict[str, str]  # answered in labels.csv or a query: file -> known class, UNKNOWN, SKIP
    test: dict[str, str]  # file -> known class
    queries: list[dict[str, str | None]]  # of query_1.csv on: file -> answer or None, best first
    taken: frozenset[str]  # never asked: files that are answered or stand in test.csv

    def precisions(self) -> dict[int, float]:
        """Number of a round, from 0 -> known / (known + unknown) among the answers to its query.

        "skip" does not count: it does not say whether the image is known.
        """
        told = [[x for x in query.values() if x not in (None, SKIP)] for query in self.queries]
        return {q: fmean(x != UNKNOWN for x in said) for q, said in enumerate(told) if said}


def read(folder: Path, images: Collection[str]) -> Sheets:
    """Read all sheets in `folder`.

    images: the paths of all images below the folder, relative to it, with "/"; broken ones too,
    because a sheet may name them. The same answer may be given twice. An image that has no known
    class in test.csv is neither tested on nor asked about.
    Raises UserError, in one line with sheet and row, for what cannot be understood, for unknown
    labels and images, and for contradictions. Raises OSError, also if a query sheet is missing.
    """
    alike = {_plain(image): image for image in images} | {image: image for image in images}
    names = {"": None, UNKNOWN: UNKNOWN, SKIP: SKIP}  # folded -> label; labels.csv adds its classes
    there = os.listdir(folder)
    count = sum(bool(re.fullmatch(r"query_[1-9][0-9]*\.csv", name)) for name in there)
    order = [START, *(f"query_{number}.csv" for number in range(1, count + 1)), TEST]
    sheets = {sheet: {} for sheet in order if sheet != TEST or TEST in there}  # file -> label
    answers = {}  # file -> label, and the place of the first row that says so
    for sheet, labels in sheets.items():
        for number, row in enumerate(_rows(sheet, (folder / sheet).read_bytes()), start=2):
            place, file, label = f"{sheet}, row {number}", row.get("file", ""), row.get("label", "")
            if not (file + label).strip():
                continue
            image = alike.get(file) or alike.get(_plain(file))
            if not image:
                raise UserError(f"{place}: the image {file!r} is not there")
            if sheet == START:
                names.setdefault(_fold(label), label.strip())
            if _fold(label) not in names:
                [nearest] = difflib.get_close_matches(_fold(label), names, n=1, cutoff=0)
                told = f"{place}: {label!r} is no class of {START}, nor {UNKNOWN} or {SKIP}"
                raise UserError(f"{told}; the nearest is {names[nearest]!r}")
            label = names[_fold(label)]
            labels[image] = label or labels.get(image)
            first, where = answers.setdefault(image, (label, place)) if label else (label, place)
            if first != label or (sheet == TEST) != where.startswith(TEST):
                told = f"{place}: {file!r} is {label!r}, but {first!r} in {where}"
                raise UserError(f"{told}; an image has one answer, not in {TEST} and elsewhere")
    classes = tuple(sorted(set(names.values()) - {None, UNKNOWN, SKIP}))
    test = sheets.pop(TEST, {})
    _, *queries = sheets.values()
    return Sheets(
        classes,
        {file: label for file, (label, where) in answers.items() if not where.startswith(TEST)},
        {file: label for file, label in test.items() if label in classes},
        queries,
        frozenset(answers).union(test),
    )


def table(columns: str, rows: Iterable[tuple[str, str, float]]) -> list[Sequence[str]]:
    """The cells of a sheet, the header first. rows: file, class, probability; a fourth is empty."""
    header = columns.split()
    cells = [(file, name, f"{share:.4f}", "")[: len(header)] for file, name, share in rows]
    return [header, *cells]


def write_sheet(path: Path | str, columns: str, rows: Iterable[tuple[str, str, float]]) -> None:
    """Write a sheet with these columns and rows: see `table`.

    Raises UserError if a sheet with a column `label` exists, because it may hold answers.
    """
    if "label" in columns.split() and os.path.lexists(path):
        raise UserError(f"{path} exists: a query sheet is never overwritten")
    text = io.StringIO(newline="")
    csv.writer(text).writerows(table(columns, rows))
    # Without the byte order mark ("-sig") Excel takes UTF-8 for cp1252.
    write_whole(path, lambda file: file.write(text.getvalue().encode("utf-8-sig")))


def _rows(sheet: str, content: bytes) -> list[dict[str, str]]:
    """The rows below the header: folded name of a column -> cell. A row may end early."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    separator = max(",;", key=text.partition("\n")[0].count)
    table = []
    try:
        table.extend(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:  # the rows before it are in the table
        raise UserError(f"{sheet}, row {len(table) + 1}: quotes are misplaced ({error})") from error
    header = [_fold(cell) for cell in table[0]] if table else []
    if not header.count("file") == header.count("label") == 1:
        raise UserError(
            f"{sheet}, row 1: name one column file and one column label, with , or ; between"
        )
    return [dict(zip(header, cells, strict=False)) for cells in table[1:]]


def _plain(file: str) -> str:
    """The form in which paths are compared: Windows writes "\\", macOS another form of Unicode."""
    return unicodedata.normalize("NFC", file.strip().replace("\\", "/").removeprefix("./"))


def _fold(text: str) -> str:
    """The form in which labels and column names are compared."""
    return unicodedata.normalize("NFC", text.strip().casefold())
