"""The annotator's sheets: what a person has answered, and what the person is asked next.

A folder of images holds labels.csv (the start), perhaps test.csv (the test set), and query_1.csv,
query_2.csv, ... Each has a column `file`, the path of an image relative to the folder, and a column
`label`: a class, "unknown", "skip" (never ask again, train on nothing) or empty (not answered).
Known are the classes of labels.csv. Sheets are read as spreadsheets save them. The file
.lfosa-asked names every query sheet that was written, so that a missing one is noticed.
"""

import codecs
import contextlib
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

from errors import UserError, tell

from .files import write_whole

csv.field_size_limit(2**31 - 1)  # an item may be a long text
START, TEST, ASKED = "labels.csv", "test.csv", ".lfosa-asked"
UNKNOWN, SKIP = "unknown", "skip"
WORKBOOKS = (".xls", ".xlsx", ".xlsm", ".ods", ".numbers")
SAVED = (".csv", ".tsv", ".txt", *WORKBOOKS)


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
        answers = [[x for x in query.values() if x not in (None, SKIP)] for query in self.queries]
        return {q: fmean(x != UNKNOWN for x in given) for q, given in enumerate(answers) if given}


def read(
    folder: Path, images: Collection[str], others: Collection[str] = (), encoding: str | None = None
) -> Sheets:
    """Read all sheets in `folder`.

    images: the paths of all images below the folder, relative to it, with "/"; unreadable ones too,
    because a sheet may name them. others: the paths of the other files, among which a sheet that
    was saved under another name is looked for. encoding: that of sheets in neither UTF-8 nor
    UTF-16; None: Western European, with a note. The same answer may be given twice. An image
    whose label in test.csv is no known class is neither tested on nor queried.
    Raises UserError, in one line with sheet and row, for what cannot be understood, for unknown
    labels and images, for contradictions, and if a query sheet is missing or if a copy has answers
    that it lacks. Raises OSError.
    """
    alike = {_plain(image): image for image in images} | {image: image for image in images}
    names = {"": None, UNKNOWN: UNKNOWN, SKIP: SKIP}  # folded -> label; labels.csv adds its classes
    copies, answers = _copies(others), {}  # image -> label, sheet and row of its first answer
    order = [START, *_queries(folder, copies), TEST]
    sheets = {sheet: {} for sheet in order if sheet != TEST or (folder / TEST).exists()}
    guessed, spelled = {}, {}  # sheet -> encoding; folded label -> its spellings
    for sheet, labels in sheets.items():
        rows, guess = _rows(sheet, (folder / sheet).read_bytes(), encoding)
        guessed |= {sheet: guess} if guess else {}
        for number, row in enumerate(rows, start=2):
            place, file, label = f"{sheet}, row {number}", row.get("file", ""), row.get("label", "")
            if not (file + label).strip():
                continue
            read_as = f" (read as {guess}, see --sheet-encoding)" if guess else ""
            read_as = "" if (file + label).isascii() else read_as
            image = alike.get(file) or alike.get(_plain(file))
            if not image:
                fault = f"{folder} has no {file!r}{read_as}; put it back"
                if file in others:  # such as a phone's HEIC
                    fault = f"{file!r} is not among the items that can be read; convert it"
                raise UserError(f"{place}: {fault}, or remove the row")
            if sheet == START:
                names.setdefault(_fold(label), label.strip())
            if _fold(label) not in names:
                [nearest] = difflib.get_close_matches(_fold(label), names, n=1, cutoff=0)
                fault = f"{place}: {label!r} is no class of {START}, nor {UNKNOWN} or {SKIP}"
                raise UserError(f"{fault}; the nearest is {names[nearest]!r}{read_as}")
            spelling = composed(label)
            spelled.setdefault(_fold(label), {})[spelling] = None
            label = names[_fold(label)]
            labels[image] = label or labels.get(image)
            if not label:
                continue
            first, source, row = answers.setdefault(image, (label, sheet, number))
            if first != label or (source == TEST) != (sheet == TEST):
                fault = f"{place}: {file!r} is {label!r}, but {first!r} in {source}, row {row}; "
                fault += f"a file has one answer, not in {TEST} and elsewhere"
                raise UserError(fault)
    _check_copies(folder, copies, sheets, alike, encoding)
    classes = tuple(sorted(set(names.values()) - {None, UNKNOWN, SKIP}))
    _tell_doubts(classes, guessed, [spelled.get(_fold(name), ()) for name in classes])
    test = sheets.pop(TEST, {})
    _, *queries = sheets.values()
    return Sheets(
        classes=classes,
        labels={file: label for file, (label, sheet, _) in answers.items() if sheet != TEST},
        test={file: label for file, label in test.items() if label in classes},
        queries=queries,
        taken=frozenset(answers).union(test),
    )


def as_cells(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[list[str]]:
    """The cells of a sheet, the header first. No spreadsheet takes one for a formula."""
    cells = [list(header)]
    for row in rows:
        cells.append([_cell(name, value) for name, value in zip(header, row, strict=True)])
    return cells


def write_table(path: Path | str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write or replace a table: UTF-8 with a byte order mark, or Excel would take it for cp1252."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(as_cells(header, rows))
    write_whole(path, lambda file: file.write(text.getvalue().encode("utf-8-sig")))


def write_query(sheet: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a query sheet, and remember it. Raises UserError if it exists: it may hold answers."""
    if os.path.lexists(sheet):
        raise UserError(f"{sheet} exists: a query sheet is never overwritten")
    write_table(sheet, header, rows)
    with contextlib.suppress(OSError), sheet.with_name(ASKED).open("a") as asked:
        asked.write(f"{sheet.name}\n")


def read_cells(
    sheet: str, content: bytes, encoding: str | None = None
) -> tuple[list[list[str]], str]:
    """The cells of a sheet, row by row, the header first; and the encoding, if it is a guess."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        unicode = "utf-16"
    else:  # without a mark, the zero bytes of an ASCII header tell
        unicode = {b"\0": "utf-16-be"}.get(content[:1], "utf-8-sig")
        unicode = {b"\0": "utf-16-le"}.get(content[1:2], unicode)
    # Latin-1 reads what cp1252 lacks, so that no two names become one.
    for name in (unicode, *([encoding] if encoding else ["cp1252", "latin-1"])):
        with contextlib.suppress(UnicodeError, LookupError):
            text = content.decode(name)
            break
    else:
        raise UserError(f"{sheet} is neither {unicode} nor, as --sheet-encoding says, {encoding}")
    separator = max(",;\t", key=text.partition("\n")[0].count)
    rows = []
    try:
        rows.extend(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:  # the rows before it are in the list
        raise UserError(f"{sheet}, row {len(rows) + 1}: quotes are misplaced ({error})") from error
    return rows or [[]], "" if name in (unicode, encoding) else name


def _rows(sheet: str, content: bytes, encoding: str | None) -> tuple[list[dict[str, str]], str]:
    """The rows below the header, folded name of a column -> cell; and a guessed encoding.

    A row may end early.
    """
    (header, *rows), guess = read_cells(sheet, content, encoding)
    header = [_fold(cell) for cell in header]
    if not header.count("file") == header.count("label") == 1:
        what = "name one column file and one column label, with , or ; between"
        raise UserError(f"{sheet}, row 1: {what}")
    return [dict(zip(header, cells, strict=False)) for cells in rows], guess


def _copies(others: Iterable[str]) -> dict[int, list[str]]:
    """Files that look like a query sheet but have another name or place: by the query's number.

    Such as "query_2 (1).csv", "query_2 - query_2.csv", "query_2.CSV", "query_2.xlsx" and
    "old/query_2.csv", which browsers, spreadsheets and file managers make.
    """
    copies = {}
    for path in sorted(others):
        name = path.rpartition("/")[2]
        match = re.search(r"query[ _-]?0*([1-9][0-9]{0,5})(?![0-9])", name, re.IGNORECASE)
        saved = name.casefold().endswith(SAVED) and not name.startswith("~$")  # Excel's locks
        if match and saved and path != f"query_{match[1]}.csv":
            copies.setdefault(int(match[1]), []).append(path)
    return copies


def _queries(folder: Path, copies: dict[int, list[str]]) -> list[str]:
    """The query sheets in order. Raises UserError if one is gone that was written."""
    there, asked = set(os.listdir(folder)), folder / ASKED
    written = asked.read_text("utf-8", "replace").split() if asked.exists() else []
    matches = [re.fullmatch(r"query_([1-9][0-9]*)\.csv", name) for name in (*there, *written)]
    last = max((int(match[1]) for match in matches if match), default=0)
    if last + 1 in copies:
        last += 1
    queries = [f"query_{number}.csv" for number in range(1, last + 1)]
    for number, sheet in enumerate(queries, start=1):
        if sheet not in there:
            what = f"put it back, or remove {ASKED} there to be asked anew"
            if found := " or ".join(map(repr, copies.get(number, ()))):
                what = f"if {found} is that sheet, save it as {sheet}; otherwise rename it"
            raise UserError(f"{folder / sheet} is missing: {what}")
    return queries


def _check_copies(
    folder: Path, copies: dict[int, list[str]], sheets: dict, alike: dict, encoding: str | None
) -> None:
    """Raise UserError if a query sheet's copy has answers that the sheet lacks, or newer ones."""
    for number, paths in copies.items():
        sheet = f"query_{number}.csv"
        answers = sheets.get(sheet, {})
        for path in paths if answers else ():
            newer = (folder / path).stat().st_mtime > (folder / sheet).stat().st_mtime
            try:
                rows, guess = _rows(path, (folder / path).read_bytes(), encoding)
                found = [(row.get("file", ""), _fold(row.get("label", ""))) for row in rows]
                newer = newer and not guess  # a label may be misread
            except UserError:  # such as a workbook, which may answer what the sheet does not
                counts = newer and path.casefold().endswith(WORKBOOKS)
                counts = counts or not any(answers.values())
                found = [(file, "?") for file, answer in answers.items() if counts and not answer]
            for file, label in found:
                image = alike.get(file) or alike.get(_plain(file))
                answer = _fold(answers.get(image) or "")
                if label and image in answers and (not answer or (newer and label != answer)):
                    what = f"if so, save it as {sheet}; otherwise remove it"
                    raise UserError(f"{folder / path} may have newer answers than {sheet}: {what}")


def _tell_doubts(classes: tuple[str, ...], guessed: dict, spelled: list) -> None:
    """Say which encodings were guessed, and which spellings are taken for one class."""
    if guessed:
        names = ", ".join([name for name in classes if not name.isascii()] or classes)
        taken = ", ".join(f"{sheet} as {encoding}" for sheet, encoding in guessed.items())
        tell(
            f"note: sheets that are not in Unicode were read in a guessed encoding: {taken}. If "
            f"these classes look wrong, give --sheet-encoding (such as gbk): {names:.500}"
        )
    if several := [" and ".join(map(repr, forms)) for forms in spelled if len(forms) > 1]:
        tell(f"note: labels taken for one class: {'; '.join(several)}")


def _cell(column: str, value: object) -> str:
    """The text of a cell. Before what a spreadsheet would take for a formula stand "./" or " ".

    Both are dropped in reading, and "./" leaves the path valid.
    """
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    if column == "file":
        return f"./{text}" if text.startswith(tuple("=+-@")) else text
    return f" {text}" if re.match(r"[=@]|[+-](?!\d*\.?\d*$)", text) else text


def _plain(file: str) -> str:
    """The form in which paths are compared: Windows writes "\\", macOS another form of Unicode.

    Before =, +, - or @ a person types an apostrophe, so that a spreadsheet keeps them as text.
    """
    file = re.sub("^'(?=[=+@-])", "", file.strip()).replace("\\", "/").removeprefix("./")
    return unicodedata.normalize("NFC", file)


def _fold(text: str) -> str:
    """The form in which labels and column names are compared."""
    return composed(text.casefold())


def composed(text: str) -> str:
    """The text without spaces around it, each accented letter as one character where it can be."""
    return unicodedata.normalize("NFC", text.strip())
