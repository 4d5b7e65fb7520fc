"""A folder of one's own images: the simulated oracle, and a person who answers in sheets."""

import csv
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from forks import BASELINE, LFOSA, ROOT, assert_one_line
from PIL import Image
from sklearn.datasets import load_digits

import utils
from datasets import open_set

FOLDER = "--dataset folder --use-cpu --no-tensorboard --image-size 8 --data-dir pictures".split()
QUICK = [*FOLDER, "--max-epoch", "1", "--query-batch", "4"]
UNTRAINED = [*FOLDER, "--max-epoch", "0", "--query-strategy", "random", "--query-batch", "4"]


def draw(folder, parts):
    """Write digits as PNG files; parts: name of a part -> images per class. Returns file -> digit.

    The files are {part}/{digit}/{number}.png; the parts have different images.
    """
    digits, truth = load_digits(), {}
    for digit in range(10):
        images = iter(digits.images[digits.target == digit])
        for part, count in parts.items():
            (folder / f"{part}/{digit}").mkdir(parents=True)
            for number in range(count):
                file = f"{part}/{digit}/{number}.png"
                Image.fromarray((15 * next(images)).astype(np.uint8)).save(folder / file)
                truth[file] = str(digit)
    return truth


def write(sheet, answers):
    with sheet.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *answers.items()])


def read(sheet):
    with sheet.open(encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


class Person:
    """Has few labels of a folder, and knows which of its images show a 0 or a 1."""

    def __init__(self, home, parts=None, known="01"):
        self.folder, self.home, self.known = home / "pictures", home, known
        self.truth = draw(self.folder, parts or {"mixed": 4})
        start = [file for file in self.truth if file.endswith(("/0.png", "/1.png"))]
        first = [file for file in start if self.truth[file] in known]
        write(self.folder / "labels.csv", {file: self.truth[file] for file in first})

    def asked(self, number):
        return [row["file"] for row in read(self.folder / f"query_{number}.csv")]

    def answer(self, number, files=None):
        """Fill in the sheet, or only what it asks about `files`."""
        answers = dict.fromkeys(self.asked(number), "")
        for file in files or answers:
            answers[file] = self.truth[file] if self.truth[file] in self.known else "unknown"
        write(self.folder / f"query_{number}.csv", answers)

    def log(self):
        [log] = self.home.glob("log_AL/*.pkl")
        return pickle.loads(log.read_bytes())


@pytest.fixture
def person(tmp_path):
    return Person(tmp_path)


def succeed(forks, home, script, *arguments):
    ran = forks.run(home, script, *arguments)
    assert ran.returncode == 0, ran
    return ran


def test_a_person_is_asked_what_the_simulation_asks(forks, tmp_path):
    home = tmp_path / "person"
    person = Person(home, {"test": 5, "train": 20}, known="1358")
    shutil.copytree(person.folder, tmp_path / "pictures")
    (tmp_path / "pictures/labels.csv").unlink()
    settings = [*FOLDER, *"--max-epoch 10 --lr-model 0.05 --batch-size 8 --query-batch 12".split()]
    simulation = "--known 8,1,3,5 --init-percent 30 --max-query 5 --drop-unknown".split()
    succeed(forks, tmp_path, LFOSA, *settings, *simulation)
    [log] = tmp_path.glob("log_AL/*.pkl")
    [queries] = tmp_path.glob("log_AL/*.queries.json")
    log, queries = pickle.loads(log.read_bytes()), json.loads(queries.read_text())

    train = sorted(file for file in person.truth if file.startswith("train/"))
    known = torch.tensor([person.truth[file] in person.known for file in train])
    start = open_set.initial_split(known, 30, utils.generator(1, "split")).labeled
    write(person.folder / "labels.csv", {train[i]: person.truth[train[i]] for i in start})
    tests = {file: digit for file, digit in person.truth.items() if file.startswith("test/")}
    tests = {file: digit if digit in person.known else "unknown" for file, digit in tests.items()}
    write(person.folder / "test.csv", tests)
    for number, queried in enumerate(queries, start=1):
        succeed(forks, home, LFOSA, *settings)
        assert person.asked(number) == [train[i] for i in queried]
        person.answer(number)
    succeed(forks, home, LFOSA, *settings)
    assert person.log()["Precision"] == log["Precision"]
    assert {q: accuracy for q, accuracy in person.log()["Acc"].items() if q < 5} == log["Acc"]
    assert max(log["Acc"].values()) > 40  # of four classes: networks that have learned


def test_the_example_of_the_readme(tmp_path):
    section = (ROOT / "README.md").read_text().partition("## Your own images")[2]
    [example] = re.findall("```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    (tmp_path / LFOSA).symlink_to(ROOT / LFOSA)
    env = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", example]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran
    [folder] = {sheet.parent for sheet in tmp_path.glob("*/labels.csv")}
    assert all(row["label"] for number in (1, 2) for row in read(folder / f"query_{number}.csv"))
    assert len(list(tmp_path.glob("log_AL/*_predictions.csv"))) == 1


KILL = """
import os, signal
replace, left = os.replace, {call}
def kill(source, target):
    global left
    left -= str(target).endswith({ending!r})
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill
"""


# The checkpoint is written at the start, after the detector, after the classifier, and at the end.
@pytest.mark.parametrize(
    "ending, call", [(".pt", 2), (".pt", 4), ("predictions.csv", 1), ("query_2.csv", 1)]
)
def test_killed_at_any_moment_the_same_command_goes_on(forks, tmp_path, ending, call):
    sheets = []
    for name in ("killed", "whole"):
        person = Person(tmp_path / name)
        succeed(forks, person.home, LFOSA, *QUICK)
        person.answer(1)
        if name == "killed":
            before = KILL.format(ending=ending, call=call)
            assert forks.run(person.home, LFOSA, *QUICK, before=before).returncode == -9
            assert not (person.folder / "query_2.csv").exists()
        succeed(forks, person.home, LFOSA, *QUICK)
        sheets.append([(person.folder / f"query_{n}.csv").read_bytes() for n in (1, 2)])
    assert sheets[0] == sheets[1]


def test_a_round_that_was_begun_with_other_answers_is_begun_anew(forks, person):
    killed = KILL.format(ending="query_1.csv", call=1)
    assert forks.run(person.home, LFOSA, *QUICK, before=killed).returncode == -9
    with (person.folder / "labels.csv").open("a") as sheet:
        sheet.write("mixed/7/0.png,seven\n")  # a third class: other networks
    assert "anew" in succeed(forks, person.home, LFOSA, *QUICK).stdout
    [predictions] = person.home.glob("log_AL/*_predictions.csv")
    assert {row["class"] for row in read(predictions)} <= {"0", "1", "seven"}
    person.answer(1)
    assert "anew" not in succeed(forks, person.home, LFOSA, *QUICK).stdout  # as it should be


def test_what_is_answered_is_never_asked_again_until_the_pool_is_empty(forks, person):
    assert len(person.truth) == 40
    for number in range(1, 40):
        ran = succeed(forks, person.home, BASELINE, *UNTRAINED)
        if "finished" in ran.stdout:
            break
        if number == 1:
            ran = succeed(forks, person.home, BASELINE, *UNTRAINED)  # nothing is answered yet
        assert f"query_{number}.csv" in ran.stdout
        person.answer(number, person.asked(number)[:3])  # the fourth stays in the pool
        if number == 1:
            sheet = person.folder / "query_1.csv"
            sheet.write_text(sheet.read_text().replace("unknown", "skip"))
    asked = [file for n in range(1, number) for file in person.asked(n)[:3]]
    start = {row["file"] for row in read(person.folder / "labels.csv")}
    assert sorted(asked) == sorted(set(person.truth) - start)
    assert person.log()["Precision"].keys() <= set(range(number - 1)) and number > 11


def test_the_folder_may_change_between_the_rounds(forks, person):
    folder, first = person.folder, read(person.folder / "labels.csv")
    succeed(forks, person.home, LFOSA, *QUICK)
    person.answer(1)
    free = set(person.truth) - {row["file"] for row in first} - set(person.asked(1))
    gone, *tested = sorted(file for file in free if person.truth[file] in "01")
    (folder / gone).unlink()
    (folder / "mixed/new.png").write_bytes((folder / "mixed/0/0.png").read_bytes())
    (folder / "mixed/broken.png").write_bytes(b"no image")
    with open(os.fsencode(folder / "caf") + b"\xe9.png", "wb") as file:  # no sheet can hold it
        file.write((folder / "mixed/0/0.png").read_bytes())
    write(folder / "test.csv", {file: person.truth[file] for file in tested})
    ran = succeed(forks, person.home, LFOSA, *QUICK, "--query-batch", "99")
    [journal] = person.home.glob("log_AL/*.log")
    assert "mixed/broken.png" in journal.read_text() and ".png" not in ran.stderr
    there = free - {gone, *tested} | {"mixed/new.png"}
    assert set(person.asked(2)) == there  # a query that is larger than the pool
    assert list(person.log()["Acc"]) == [1] and list(person.log()["Precision"]) == [0]
    succeed(forks, person.home, "plot.py")
    figures = [figure.stem.rpartition("_")[2] for figure in person.home.glob("gifs/*/*.png")]
    assert sorted(figures) == ["accuracy", "precision"]


@pytest.mark.parametrize(
    "words", ["--known-class 2", "--init-percent=9", "--max-query 3", "--drop-unknown", "--known 0"]
)
def test_what_the_sheets_decide_is_no_option(forks, person, words):
    ran = forks.run(person.home, LFOSA, *UNTRAINED, *words.split())
    assert_one_line(ran, words.replace("=", " ").split()[0], "labels.csv")


def test_a_folder_that_takes_no_sheet_is_told_before_the_round(forks, person):
    before = "import os; os.access = lambda path, mode: False"  # root may write anywhere
    assert_one_line(forks.run(person.home, LFOSA, *UNTRAINED, before=before), "pictures")
    assert not (person.home / "log_AL").exists()


@pytest.mark.parametrize("simulated", [False, True])
def test_folders_of_the_same_name_are_told_apart(forks, tmp_path, simulated):
    here, there = (Person(tmp_path / name, {"train": 4, "test": 2}) for name in ("here", "there"))
    shutil.copyfile(there.folder / "train/3/0.png", there.folder / "train/3/1.png")
    command = [LFOSA, *UNTRAINED, "--save-dir", tmp_path / "log"]
    if simulated:
        command += ["--init-percent", "50", "--resume"]
        for person in (here, there):
            (person.folder / "labels.csv").unlink()
    succeed(forks, here.home, *command)
    assert_one_line(forks.run(there.home, *command), "another run")


def test_overwrite_does_not_touch_the_sheets(forks, person):
    succeed(forks, person.home, LFOSA, *QUICK)
    person.answer(1)
    before = (person.folder / "query_1.csv").read_bytes()
    succeed(forks, person.home, LFOSA, *QUICK, "--overwrite", "--save-model")
    assert (person.folder / "query_1.csv").read_bytes() == before
    assert len(person.asked(2)) == 4
    [model] = person.home.glob("log_AL/*.model.pt")
    assert torch.load(model)["classes"] == ["0", "1"]
