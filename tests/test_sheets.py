"""The annotator's sheets: no form that a spreadsheet saves loses or changes an answer."""

import codecs
import contextlib
import csv
import io
import os
import re
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import sheets
from errors import UserError

LATIN = ["a", "b", "7", " ", ",", ";", '"', "'", "é", "ñ", "ß"]  # what cp1252 can write
QUERY = ("file", "predicted", "probability", "label")
OTHERS = [*LATIN, "e\N{COMBINING ACUTE ACCENT}", "日", "ж"]


def words(pieces, **sizes):
    """Lists of words that differ in more than case or the form of their Unicode."""
    word = st.lists(st.sampled_from(pieces), min_size=1, max_size=5).map("".join).map(str.strip)
    folded = {"unique_by": lambda text: unicodedata.normalize("NFC", text.casefold())}
    return st.lists(word.filter(bool), **folded, **sizes)


def save(draw, path, rows, verbatim=0):
    """Save (file, label) rows in some form; from row `verbatim` on, spelled in some way."""

    def pick(*choices):
        return draw(st.sampled_from(choices))

    columns = draw(st.permutations(["file", "label", *pick((), ("note", "probability"))]))
    text, separator, newline = io.StringIO(newline=""), pick(",", ";", "\t"), pick("\n", "\r\n")
    form = {"delimiter": separator, "lineterminator": newline}
    sheet = csv.writer(text, quoting=pick(csv.QUOTE_ALL, csv.QUOTE_MINIMAL), **form)
    sheet.writerow([pick(name, name.upper(), f" {name.title()} ") for name in columns])
    unicode_form = pick("NFC", "NFD", "NFC")
    for number, (file, label) in enumerate(rows):
        file = unicodedata.normalize(unicode_form, file)
        file = pick(file, file.replace("/", "\\"), f"./{file}", f" {file} ")
        if number >= verbatim:
            label = pick(label, label.upper(), f" {label.title()} ")
        cells = dict(file=file, label=label, note='so, "it"\nseems; ', probability="0,5")
        sheet.writerow([cells[name] for name in columns])
        text.write(pick("", "", newline, separator * len(columns) + newline))  # an empty row
    content, encoded = text.getvalue(), []
    for encoding in ("utf-8", "utf-8-sig", "cp1252", "utf-16"):
        with contextlib.suppress(UnicodeEncodeError):
            encoded.append(pick(content, content.removesuffix(newline)).encode(encoding))
    path.write_bytes(pick(*encoded))


@settings(deadline=None, max_examples=50)
@given(st.data(), st.sampled_from([LATIN, OTHERS]), st.sampled_from([0, 1, 2, 11]))
def test_what_is_read_is_what_was_answered(data, pieces, count):
    """Each image has one true answer, which no sheet, one sheet or several sheets hold."""
    names = data.draw(words(pieces, min_size=8, max_size=20))
    images = [f"{'deep/er/' * (i % 2)}x{name}.png" for i, name in enumerate(names)]
    classes = data.draw(words(pieces, min_size=1, max_size=4))
    answer = st.sampled_from([*classes, "unknown", "skip"])
    truth = {file: data.draw(answer) for file in images} | dict(zip(images, classes, strict=False))
    test, train = images[-3:], images[:-3]

    def some_rows(files):
        """Some of the files, some of them twice, in any order, with their answer or none."""
        drawn = data.draw(st.lists(st.sampled_from(files), max_size=12))
        return [(file, truth[file] if data.draw(st.booleans()) else "") for file in drawn]

    start = [(file, truth[file]) for file in images[: len(classes)]] + some_rows(train)
    queries = [some_rows(train) for _ in range(count)]
    tests = some_rows(test)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(data.draw, folder / "labels.csv", start, verbatim=len(classes))
        save(data.draw, folder / "test.csv", tests)
        for number, rows in enumerate(queries, start=1):
            save(data.draw, folder / f"query_{number}.csv", rows)
        got = sheets.read(folder, images)

    assert got.classes == tuple(sorted(classes))
    assert got.labels == {file: label for file, label in sum(queries, start) if label}
    assert got.test == {file: label for file, label in tests if label in classes}
    assert got.taken == {*got.labels, *(file for file, _ in tests)}
    assert len(got.queries) == count
    for number, rows in enumerate(queries, start=1):
        expected = {}
        for file, label in rows:
            expected[file] = label or expected.get(file)
        assert list(got.queries[number - 1].items()) == list(expected.items())
        known = [label in classes for label in expected.values() if label not in (None, "skip")]
        assert got.precisions().get(number - 1) == (sum(known) / len(known) if known else None)


@settings(deadline=None, max_examples=50)
@given(st.data(), words([*OTHERS, *"=+-@", "\\", "./", "x "], min_size=3, max_size=12))
def test_a_written_query_is_filled_in_and_read(data, names):
    """A script fills the sheet in; no later sheet takes its place."""
    images = [f"{name}.png" for name in names]
    answers = [data.draw(st.sampled_from(["Cat", "unknown", "skip", None])) for _ in images]
    with tempfile.TemporaryDirectory() as name:
        folder, query = Path(name), Path(name, "query_1.csv")
        (folder / "labels.csv").write_text("file,label\nstart.png,Cat\n")
        sheets.write_query(query, QUERY, [(file, "Cat", 1 / 3, "") for file in images])
        assert sheets.read(folder, [*images, "start.png"]).queries == [dict.fromkeys(images)]
        rows = list(csv.DictReader(io.StringIO(query.read_text("utf-8-sig"), newline="")))
        others = dict(predicted="Cat", probability="0.3333", label="")
        assert [row | {"file": ""} for row in rows] == [{"file": ""} | others for _ in images]
        assert all(Path(row["file"]) == Path(file) for row, file in zip(rows, images, strict=True))
        assert not any(row["file"].startswith(tuple("=+-@")) for row in rows)
        with query.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(r | {"label": a} for r, a in zip(rows, answers, strict=True))
        filled = query.read_bytes()
        with pytest.raises(UserError, match=r"query_1\.csv"):
            sheets.write_query(query, QUERY, [(images[0], "Cat", 0.5, "")])
        assert query.read_bytes() == filled
        [got] = sheets.read(folder, [*images, "start.png"]).queries
    assert list(got.items()) == list(zip(images, answers, strict=True))


IMAGES = [f"{letter}.png" for letter in "abcdefgh"]
GOOD = {
    "labels.csv": "file,label\na.png,cat\nb.png,Dög\n\nc.png,unknown\nf.png,\ng.png,dÖG\n",
    "test.csv": "file,label\ne.png,cat\n",
    "query_1.csv": "file,predicted,probability,label\nd.png,cat,0.9,Dög\n",
}


@pytest.mark.parametrize(
    ("sheet", "text", "told"),
    [
        ("query_1.csv", "file,label\n\nd.png,dgö", "row 3|Dög"),
        ("query_1.csv", 'note;file;label\n"a\nb";d.png;\n;"z\n.png";cat', "row 3|z"),
        ("labels.csv", "file,label\na.png,cat\n,cat", "row 3"),
        ("labels.csv", "file,label\na.png,cat\na.png,Dög", "row 3|labels.csv, row 2|Dög"),
        ("query_1.csv", "label,file\nskip,a.png", "row 2|labels.csv, row 2|skip|cat"),
        ("test.csv", "file,label\na.png,cat", "row 2|labels.csv, row 2|a.png"),
        ("query_1.csv", "file,label,Label\nd.png,,cat", "row 1|label"),
        ("query_1.csv", "", "row 1|file|label"),
        ("query_1.csv", 'file,label,note\nb.png,,\na.png,,"\nd.png,cat,', "row 3"),
    ],
)
def test_a_fault_is_told_in_one_line_with_its_place(tmp_path, sheet, text, told):
    for name, content in (GOOD | {sheet: text}).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        sheets.read(tmp_path, IMAGES)
    for part in [sheet, *told.split("|")]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_are_no_sheets_and_no_query_sheet_may_be_missing(tmp_path):
    others = ["query_1.csv.bak", "query_1 (copy).csv", "~$query_1.csv", "query_01.csv", "x.csv"]
    for name, content in (GOOD | dict.fromkeys(others, "nonsense")).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    got = sheets.read(tmp_path, IMAGES)
    assert (got.classes, got.labels["g.png"]) == (("Dög", "cat"), "Dög")  # as spelled first
    assert len(got.queries) == 1
    (tmp_path / "query_3.csv").write_text("file,label")
    with pytest.raises(UserError, match=r"query_2\.csv"):
        sheets.read(tmp_path, IMAGES)


def test_predictions_are_replaced_in_a_form_that_excel_understands(tmp_path):
    for probability in (1 / 4, 3 / 4):
        rows = [("é,1.png", "dög", probability)]
        sheets.write_table(tmp_path / "p.csv", ("file", "class", "probability"), rows)
    content = (tmp_path / "p.csv").read_bytes()
    assert content.startswith(codecs.BOM_UTF8)  # else it shows Ã© for é
    assert content.decode("utf-8-sig") == 'file,class,probability\r\n"é,1.png",dög,0.7500\r\n'


NAMES = [
    "query_1 (1).csv",
    "query_1 - query_1.csv",
    "query_1.CSV",
    "Query 1.xlsx",
    "query_1.csv.txt",
]
NAMES += ["Copy of query_1.csv", "answers/query_1.csv", "query_1.ods", "query_01.csv"]


@pytest.mark.parametrize("name", NAMES)
def test_a_query_sheet_saved_under_another_name_is_missed(tmp_path, name):
    """Gone, or beside the unanswered original: the file is named, and no round is begun."""

    def read():
        others = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")]
        return sheets.read(tmp_path, IMAGES, others)

    (tmp_path / "labels.csv").write_text("file,label\na.png,cat\n")
    sheets.write_query(tmp_path / "query_1.csv", QUERY, [("b.png", "cat", 0.9, "")])
    empty, copy = (tmp_path / "query_1.csv").read_bytes(), tmp_path / name
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(b"PK\3\4" if name.endswith(("x", "s")) else empty.strip() + b"cat\r\n")
    for gone in (False, True):
        if gone:
            (tmp_path / "query_1.csv").unlink()
        with pytest.raises(UserError) as caught:
            read()
        assert name in str(caught.value) and "\n" not in str(caught.value)
    copy.unlink()
    with pytest.raises(UserError, match=r"query_1\.csv"):  # nothing looks like it
        read()
    (tmp_path / "query_1.csv").write_bytes(empty.strip() + b"cat\r\n")
    copy.write_bytes(empty)  # nobody answered in it
    assert read().labels == {"a.png": "cat", "b.png": "cat"}


ANSWERED = "file,label\nb.png,cat\nc.png,unknown\nd.png,"
COPIES = {  # a copy of it, how much later it was saved, and whether it may have other answers
    "query_1 (1).csv": ("file,label\nb.png,Cat\nc.png,cat\nd.png,", 60, True),
    "query_1 (2).csv": ("file,label\nb.png,Cat\nc.png,\nd.png,", 60, False),
    "query_1 (3).csv": ("file,label\nb.png,Cat\nc.png,cat\nd.png,", -60, False),
    "query_1 (4).csv": ("file,label\nb.png,\nc.png,\nd.png,cat", -60, True),
    "query_1 notes.txt": ("d.png: a cat?", 60, False),
    "query_1.xlsx": ("PK\3\4", 60, True),
    "query_1.ods": ("PK\3\4", -60, False),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_with_other_answers_stops_the_round(tmp_path, name):
    content, later, other = COPIES[name]
    (tmp_path / "labels.csv").write_text("file,label\na.png,cat\n")
    (tmp_path / "query_1.csv").write_text(ANSWERED)
    (tmp_path / name).write_text(content)
    saved = (tmp_path / "query_1.csv").stat().st_mtime + later
    os.utime(tmp_path / name, (saved, saved))
    if other:
        with pytest.raises(UserError, match=re.escape(name)):
            sheets.read(tmp_path, IMAGES, [name])
    else:
        got = sheets.read(tmp_path, IMAGES, [name])
        assert got.queries == [{"b.png": "cat", "c.png": "unknown", "d.png": None}]


LANGUAGES = [("gbk", "猫 狗"), ("shift_jis", "ソ 猫"), ("cp1251", "кошка пёс")]


@pytest.mark.parametrize("encoding, names", LANGUAGES)
def test_sheets_of_other_countries(tmp_path, capsys, encoding, names):
    """Guessed wrongly they are told, and no two classes become one; then the encoding is given."""
    names = names.split()
    text = "file,label\n" + "".join(f"{x}.png,{y}\n" for x, y in zip("ab", names, strict=True))
    (tmp_path / "labels.csv").write_bytes(text.encode(encoding))
    wrong = sheets.read(tmp_path, IMAGES)
    told = capsys.readouterr().out
    assert len(wrong.classes) == 2 and "--sheet-encoding" in told
    assert all(name in told for name in ("labels.csv", "cp1252", *wrong.classes))
    (tmp_path / "query_1.csv").write_bytes(f"file,label\nc.png,{names[0]}".encode("utf-16"))
    got = sheets.read(tmp_path, IMAGES, encoding=encoding)
    assert got.classes == tuple(sorted(names)) and got.labels["c.png"] == names[0]
    assert "encoding" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"labels\.csv.*nonsense"):
        sheets.read(tmp_path, IMAGES, encoding="nonsense")


def test_labels_that_differ_in_case_are_one_class_and_said(tmp_path, capsys):
    (tmp_path / "labels.csv").write_text(
        "file,label\na.png,Cat\nb.png,cat\nc.png,Straße\nd.png,STRASSE\ne.png,Unknown\nf.png,dog\n",
        encoding="utf-8",
    )
    assert sheets.read(tmp_path, IMAGES).classes == ("Cat", "Straße", "dog")
    out = capsys.readouterr().out
    assert all(repr(name) in out for name in ("Cat", "cat", "Straße", "STRASSE"))
    assert "dog" not in out and len(out.splitlines()) == 1


def test_names_that_a_spreadsheet_takes_for_formulas(tmp_path):
    """Typed with or without an apostrophe; written so that no cell begins like a formula."""
    images = ["=a.png", "+b.png", "-c.png", "@d.png", "'=e.png", "in/=f.png"]
    typed = ["=a.png", "'+b.png", "./-c.png", "'@d.png", "'=e.png", "in\\=f.png"]
    rows = "".join(f"{file},=x\n" for file in typed)
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    assert [*sheets.read(tmp_path, images).labels] == images
    header = ("file", "class", "temperature", "place")
    cells = [("=a.png", "=x", -0.5, "@home"), ("+b.png", "-1", -2, "a-b")]
    sheets.write_table(tmp_path / "p.csv", header, cells)
    got = list(csv.reader(io.StringIO((tmp_path / "p.csv").read_text("utf-8-sig"))))
    assert got[1:] == [["./=a.png", " =x", "-0.5000", " @home"], ["./+b.png", "-1", "-2", "a-b"]]
