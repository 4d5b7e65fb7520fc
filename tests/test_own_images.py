"""A folder of one's own images: the simulated oracle, and a person who answers in sheets."""

import csv
import json
import os
import pickle
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from forks import BASELINE, KILL, LFOSA, ROOT, assert_one_line, at_write
from PIL import Image
from sklearn.datasets import load_digits

from datasets import open_set
from experiment.run import generator

FOLDER = "--dataset folder --model tiny --use-cpu --no-tensorboard --image-size 8".split()
FOLDER += ["--data-dir", "pictures"]
QUICK = [*FOLDER, "--max-epoch", "1", "--query-batch", "4"]
UNTRAINED = [*FOLDER, "--max-epoch", "0", "--query-strategy", "random", "--query-batch", "4"]


def write(sheet, answers):
    with sheet.open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *answers.items()])


def read(sheet):
    with sheet.open(encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


class Person:
    """Has few labels of a folder, and knows which of its images show one of the `known` digits.

    The images are pictures/{part}/{digit}/{number}.png; parts: name -> images per class. All
    differ. Two of each known class in each part are labeled at the start.
    """

    def __init__(self, home, parts=None, known="01"):
        self.folder, self.home, self.truth = home / "pictures", home, {}
        digits = load_digits()
        for digit in range(10):
            images = iter(digits.images[digits.target == digit])
            for part, count in (parts or {"mixed": 4}).items():
                (self.folder / f"{part}/{digit}").mkdir(parents=True)
                for number in range(count):
                    file = f"{part}/{digit}/{number}.png"
                    Image.fromarray((15 * next(images)).astype(np.uint8)).save(self.folder / file)
                    self.truth[file] = str(digit) if str(digit) in known else "unknown"
        self.start = [file for file in self.truth if file.endswith(("/0.png", "/1.png"))]
        self.start = [file for file in self.start if self.truth[file] in known]
        write(self.folder / "labels.csv", {file: self.truth[file] for file in self.start})

    def asked(self, number):
        return [row["file"] for row in read(self.folder / f"query_{number}.csv")]

    def answer(self, number, files=None):
        """Fill in the sheet, or only what it asks about `files`."""
        answers = dict.fromkeys(self.asked(number), "")
        answers |= {file: self.truth[file] for file in files or answers}
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
    person = Person(home, {"test": 5, "train": 12}, known="1358")
    shutil.copytree(person.folder, tmp_path / "pictures", ignore=lambda *_: ["labels.csv"])
    settings = [*FOLDER, *"--max-epoch 8 --lr-model 0.05 --batch-size 8 --query-batch 12".split()]
    simulation = "--known 8,1,3,5 --init-percent 30 --max-query 3 --drop-unknown".split()
    succeed(forks, tmp_path, LFOSA, *settings, *simulation)
    [log] = tmp_path.glob("log_AL/*.pkl")
    [queries] = tmp_path.glob("log_AL/*.queries.json")
    log, queries = pickle.loads(log.read_bytes()), json.loads(queries.read_text())

    train = sorted(file for file in person.truth if file.startswith("train/"))
    known = torch.tensor([person.truth[file] != "unknown" for file in train])
    start = open_set.initial_split(known, 30, generator(1, "split")).labeled
    write(person.folder / "labels.csv", {train[i]: person.truth[train[i]] for i in start})
    tests = {file: digit for file, digit in person.truth.items() if file.startswith("test/")}
    write(person.folder / "test.csv", tests)
    for number, queried in enumerate(queries, start=1):
        succeed(forks, home, LFOSA, *settings)
        assert person.asked(number) == [train[i] for i in queried]
        person.answer(number)
    succeed(forks, home, LFOSA, *settings)
    assert person.log()["Precision"] == log["Precision"]
    assert list(person.log()["Acc"].values())[:3] == list(log["Acc"].values())
    assert max(log["Acc"].values()) > 40  # of four classes: networks that have learned


def test_the_example_of_the_readme(forks, tmp_path, monkeypatch):
    """With fewer epochs, for a smaller network."""
    section = (ROOT / "README.md").read_text().partition("## Your own images")[2]
    [example] = re.findall("```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    quick = ["--max-epoch", "1", "--model", "tiny"]

    def run(command, check):
        assert command[0] == "python" and check
        succeed(forks, tmp_path, *command[1:], *quick)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    [folder] = {sheet.parent for sheet in tmp_path.glob("*/labels.csv")}
    assert all(row["label"] for number in (1, 2) for row in read(folder / f"query_{number}.csv"))
    assert len(list(tmp_path.glob("log_AL/*_predictions.csv"))) == 1


def test_killed_at_any_moment_the_same_command_goes_on(forks, tmp_path):
    whole, killed = (Person(tmp_path / name) for name in ("whole", "killed"))
    for person in (whole, killed):
        succeed(forks, person.home, LFOSA, *QUICK)
        person.answer(1)
    # At the checkpoints with the detector, with both networks, and at the end of the round.
    writes = [(".pt", 2), (".pt", 3), (".pt", 4), ("predictions.csv", 1), ("query_2.csv", 1)]
    for ending, call in writes:
        before = at_write(ending, call, KILL)
        assert forks.run(killed.home, LFOSA, *QUICK, before=before).returncode == -9
        assert not (killed.folder / "query_2.csv").exists()
    for person in (whole, killed):
        succeed(forks, person.home, LFOSA, *QUICK)
    for sheet in ("query_1.csv", "query_2.csv"):
        assert (killed.folder / sheet).read_bytes() == (whole.folder / sheet).read_bytes()


def test_a_round_begun_with_other_answers_is_begun_anew_and_keeps_the_sheets(forks, person):
    killed = at_write("query_1.csv", 1, KILL)
    assert forks.run(person.home, LFOSA, *QUICK, before=killed).returncode == -9
    with (person.folder / "labels.csv").open("a") as sheet:
        sheet.write("mixed/7/0.png,seven\n")  # a third class: other networks
    assert "answers" in succeed(forks, person.home, LFOSA, *QUICK).stdout
    [predictions] = person.home.glob("log_AL/*_predictions.csv")
    assert {row["class"] for row in read(predictions)} <= {"0", "1", "seven"}
    person.answer(1)
    assert "anew" not in succeed(forks, person.home, LFOSA, *QUICK).stdout  # as it should be
    person.answer(2)
    answered = (person.folder / "query_2.csv").read_bytes()
    succeed(forks, person.home, LFOSA, *QUICK, "--overwrite")
    assert (person.folder / "query_2.csv").read_bytes() == answered
    assert len(person.asked(3)) == 4


def test_what_is_answered_is_never_asked_again_until_the_pool_is_empty(forks, person):
    command, number, asked = (BASELINE, *UNTRAINED, "--query-batch", "12"), 0, []
    person.truth |= {file: "skip" for file, digit in person.truth.items() if digit == "unknown"}
    while "finished" not in succeed(forks, person.home, *command).stdout:
        number += 1
        ran = succeed(forks, person.home, *command)  # nothing is answered yet
        assert f"query_{number}.csv" in ran.stdout
        answered = person.asked(number)[:9]  # the others stay in the pool
        person.answer(number, answered)
        asked += answered
    assert sorted(asked) == sorted(set(person.truth) - set(person.start)) and number == 4
    assert person.log()["Precision"].keys() <= set(range(number))


def test_the_last_answers_are_trained_on(forks, person):
    tested = [file for file in person.truth if file.endswith("/3.png")]
    tests = {file: person.truth[file] for file in tested if person.truth[file] != "unknown"}
    write(person.folder / "test.csv", tests)
    command = (LFOSA, *QUICK, "--query-batch", "99", "--save-model")
    succeed(forks, person.home, *command)
    person.answer(1)
    [file] = person.home.glob("log_AL/*.model.pt")
    before = torch.load(file)
    for _ in range(2):  # once finished it may be started again
        succeed(forks, person.home, *command)
        after = torch.load(file)
        assert not torch.equal(*(model["classifier"]["fc.weight"] for model in (before, after)))
        assert list(person.log()["Acc"]) == [0, 1] and list(person.log()["Precision"]) == [0]
    [predictions] = person.home.glob("log_AL/*_predictions.csv")
    assert read(predictions) == [] and not (person.folder / "query_2.csv").exists()


def test_the_folder_may_change_between_the_rounds(forks, person):
    folder = person.folder
    succeed(forks, person.home, LFOSA, *QUICK)
    person.answer(1)
    free = set(person.truth) - set(person.start) - set(person.asked(1))
    gone, *tested = sorted(file for file in free if person.truth[file] != "unknown")
    (folder / gone).rename(folder / "mixed/new.png")
    (folder / "mixed/broken.png").write_bytes(b"no image")
    shutil.copyfile(folder / "mixed/new.png", os.fsencode(folder) + b"/caf\xe9.png")  # no Unicode
    write(folder / "test.csv", {file: person.truth[file] for file in tested})
    ran = succeed(forks, person.home, LFOSA, *QUICK, "--query-batch", "99")
    [journal] = person.home.glob("log_AL/*.log")
    assert "mixed/broken.png" in journal.read_text() and ".png" not in ran.stderr
    # The query is larger than the pool.
    assert set(person.asked(2)) == free - {gone, *tested} | {"mixed/new.png"}
    assert list(person.log()["Acc"]) == [1] and list(person.log()["Precision"]) == [0]
    succeed(forks, person.home, "plot.py")
    figures = [figure.stem.rpartition("_")[2] for figure in person.home.glob("gifs/*/*.png")]
    assert sorted(figures) == ["accuracy", "precision"]


@pytest.mark.parametrize(
    "flag", ["--known-class=2", "--init-percent=9", "--max-query=3", "--drop-unknown", "--known=0"]
)
def test_what_the_sheets_decide_is_no_option(forks, person, flag):
    ran = forks.run(person.home, LFOSA, *UNTRAINED, flag)
    assert_one_line(ran, flag.partition("=")[0], "labels.csv")


def test_a_start_without_a_class_is_told(forks, person):
    write(person.folder / "labels.csv", dict.fromkeys(person.truth, "unknown"))
    assert_one_line(forks.run(person.home, LFOSA, *UNTRAINED), "labels.csv", "class")


def test_a_labeled_file_that_is_no_image_is_not_called_absent(forks, person):
    (person.folder / "phone.xyz").write_bytes(b"a format that Pillow does not know")
    with (person.folder / "labels.csv").open("a") as sheet:
        sheet.write("phone.xyz,0\n")
    assert_one_line(forks.run(person.home, LFOSA, *UNTRAINED), "phone.xyz", "convert")


def test_the_folder_may_move_and_another_of_its_name_is_kept_apart(forks, tmp_path):
    here, there = (Person(tmp_path / name) for name in ("here", "there"))
    tested = [file for file in here.truth if file.endswith("/3.png")]
    write(here.folder / "test.csv", {file: here.truth[file] for file in tested})
    command = [LFOSA, *QUICK, "--save-dir", tmp_path / "log"]
    succeed(forks, here.home, *command)
    here.answer(1)
    moved = tmp_path / "disk" / "mounted"
    shutil.copytree(here.folder, moved)
    shutil.rmtree(here.folder)
    succeed(forks, tmp_path, *command, "--data-dir", moved)
    here.folder = moved
    assert len(here.asked(2)) == 4
    succeed(forks, there.home, *command)
    logs = [pickle.loads(log.read_bytes()) for log in (tmp_path / "log").glob("*.pkl")]
    assert sorted(len(log["Acc"]) for log in logs) == [0, 2]
    copy = shutil.copytree(moved, tmp_path / "copy")
    ran = forks.run(tmp_path, *command, "--data-dir", copy)
    assert_one_line(ran, "copy", "mounted", "--save-dir")  # one log cannot hold the rounds of both
    own_log = ["--save-dir", tmp_path / "own"]
    succeed(forks, tmp_path, *command, "--data-dir", copy, *own_log)
    succeed(forks, tmp_path, *command, "--data-dir", moved)
    (moved / ".lfosa-name").unlink()
    assert ".lfosa-name" in succeed(forks, tmp_path, *command, "--data-dir", moved).stdout


def test_an_answered_copy_of_a_sheet_stops_the_round(forks, person):
    succeed(forks, person.home, BASELINE, *UNTRAINED)
    sheet, copy = person.folder / "query_1.csv", person.folder / "query_1 (1).csv"
    empty = sheet.read_bytes()
    person.answer(1)
    sheet.rename(copy)
    assert_one_line(forks.run(person.home, BASELINE, *UNTRAINED), copy.name)
    sheet.write_bytes(empty)
    assert_one_line(forks.run(person.home, BASELINE, *UNTRAINED), copy.name)
    copy.replace(sheet)
    succeed(forks, person.home, BASELINE, *UNTRAINED)
    assert not set(person.asked(2)) & set(person.asked(1))
    (person.folder / "query_2.csv").unlink()
    assert_one_line(forks.run(person.home, BASELINE, *UNTRAINED), "query_2.csv", ".lfosa-asked")
    (person.folder / ".lfosa-asked").unlink()
    succeed(forks, person.home, BASELINE, *UNTRAINED)
    assert len(person.asked(2)) == 4


def test_rows_added_while_a_query_is_unanswered_are_said_and_used(forks, person):
    """Also of a class of which no image can be read: its count stays in the line of counts."""
    succeed(forks, person.home, BASELINE, *UNTRAINED)
    assert "changed" not in succeed(forks, person.home, BASELINE, *UNTRAINED).stdout
    asked = person.asked(1)
    late = next(x for x in person.truth if x not in asked and x not in person.start)
    (person.folder / "mixed/broken.png").write_bytes(b"no image")
    with (person.folder / "labels.csv").open("a") as sheet:
        sheet.write(f"{late},unknown\nmixed/broken.png,zebra\n")
    for _ in range(2):
        assert "changed" in succeed(forks, person.home, BASELINE, *UNTRAINED).stdout
    assert person.asked(1) == asked
    person.answer(1)
    ran = succeed(forks, person.home, BASELINE, *UNTRAINED, "--query-batch", "99")
    assert "zebra 0" in ran.stdout and "changed" not in ran.stdout
    assert late not in person.asked(2) and len(person.asked(2)) == 40 - 4 - 4 - 1
