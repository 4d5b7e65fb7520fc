"""Every flag of both scripts, run: it changes the experiment as it says, or nothing of it.

A run with the flag that is killed and resumed ends with the same bytes as one that is not.
"""

import shutil
import sys
from unittest import mock

import pytest
import torch
from forks import BASELINE, KILL, LFOSA, assert_ends_well, at_write, find, results
from trees import class_folders, write_folder

import plot
import utils

# Six classes of five pictures, three of them known: a run takes half a second.
TINY = "--use-cpu --no-tensorboard --save-model --checkpoint-seconds 0 --dataset folder --data-dir "
TINY += "pictures --image-size 8 --init-percent 40 --query-batch 4 --max-query 2 --max-epoch 2 "
TINY += "--batch-size 4 --lr-model 0.05"
BALD = "--query-strategy BALD --mc-samples 3"
# The flags that change an experiment: arguments that a run without the flag has too, and the flag.
CHANGES = {
    "dataset": ("", "--dataset digits"),
    "data_dir": ("", "--data-dir others"),
    "query_strategy": ("", "--query-strategy random"),
    "known_class": ("", "--known-class 2"),
    "init_percent": ("", "--init-percent 60"),
    "query_batch": ("", "--query-batch 5"),
    "max_query": ("", "--max-query 3"),
    "seed": ("", "--seed 2"),
    "protocol": ("", "--protocol EAOA"),  # apart from what TINY sets
    "class_seed": ("", "--class-seed 1"),
    "known": ("", "--known f,b"),
    "drop_unknown": ("--query-batch 9", "--drop-unknown"),
    "augment_pool": ("", "--augment-pool"),
    "rotation": ("", "--no-rotation"),
    "image_size": ("", "--image-size 9"),
    "model": ("", "--model resnet18-narrow"),
    "max_epoch": ("", "--max-epoch 3"),
    "feat_dim": ("", "--feat-dim 2"),
    "batch_size": ("", "--batch-size 3"),
    "lr_model": ("", "--lr-model 0.02"),
    "stepsize": ("", "--stepsize 1"),
    "gamma": ("--stepsize 1", "--gamma 0.1"),
    "weight_cent": ("", "--weight-cent 0.1"),
    "lr_cent": ("--weight-cent 0.1", "--lr-cent 0.1"),
    "dropout": (BALD, "--dropout 0.1"),
    "mc_samples": (BALD, "--mc-samples 4"),
    "amp": ("", "--amp bf16"),
    "known_T": ("", "--known-T 2"),
    "unknown_T": ("", "--unknown-T 2"),
    "modelB_T": ("", "--modelB-T 2"),
}
# Those that change nothing but time, memory and files; here all of them at once.
OTHERS = {
    "gpu": "--gpu 7",
    "use_cpu": "--use-cpu",
    "eval_batch_size": "--eval-batch-size 5",
    "deterministic": "--deterministic",
    "save_dir": "--save-dir log_AL",
    "save_model": "--save-model",
    "no_tensorboard": "--no-tensorboard",
    "checkpoint_seconds": "--checkpoint-seconds 60",
    "resume": "--resume",
}
ELSEWHERE = {
    "overwrite",  # in test_interruptions.py: it excludes --resume
    "compile",  # below
    "encoder",  # in test_embeddings.py
    "sheet_encoding",  # in test_sheets.py
}


def flags(detector):
    """The names of all arguments of a script."""
    with mock.patch.object(sys, "argv", ["script.py"]):
        return vars(utils.parse_arguments("test", detector)).keys() - {"settings", "given"}


FLAGS = {BASELINE: flags(False), LFOSA: flags(True)}
CASES = [(BASELINE, flag) for flag in CHANGES if flag in FLAGS[BASELINE]]
CASES += [(LFOSA, flag) for flag in CHANGES if flag not in FLAGS[BASELINE]]
CASES += [(LFOSA, "weight_cent"), (LFOSA, "drop_unknown"), (LFOSA, "augment_pool")]


def test_every_flag_is_run_here():
    for names in FLAGS.values():
        assert names <= CHANGES.keys() | OTHERS.keys() | ELSEWHERE


@pytest.fixture(scope="module")
def outcome(forks, tmp_path_factory):
    """The folder of a run, and what it found: log, queries, and the weights of its networks.

    killed: in place of its sixth checkpoint, or LfOSA's eighth, and then resumed; this is in the
    second round, in the second epoch of a training.
    """
    home = tmp_path_factory.mktemp("flags")
    write_folder(home / "pictures", class_folders(*"abcdef"))
    write_folder(home / "others", class_folders(*"abcdefg"))
    found = {}

    def run(script, words, killed=False):
        key = script, words, killed
        if key not in found:
            (folder := home / f"{len(list(home.iterdir()))}").mkdir()
            for pictures in ("pictures", "others"):
                (folder / pictures).symlink_to(home / pictures)
            arguments = [script, *TINY.split(), *words.split()]
            if killed:
                before = at_write("pt", 6 + 2 * (script == LFOSA), KILL)
                assert forks.run(folder, *arguments, before=before).returncode == -9
                arguments.append("--resume")
            assert_ends_well(forks.run(folder, *arguments))
            saved = torch.load(find(folder, "model.pt"))
            names = ("detector", "classifier")[script == BASELINE :]
            weights = torch.cat([w.flatten() for name in names for w in saved[name].values()])
            found[key] = folder, (results(folder), weights.tolist())
        return found[key]

    return run


@pytest.mark.parametrize(("script", "flag"), CASES)
def test_a_flag_changes_the_experiment_and_a_killed_run_with_it_resumes(outcome, script, flag):
    usual, words = CHANGES[flag]
    folder, changed = outcome(script, f"{usual} {words}")
    other, unchanged = outcome(script, usual)
    assert changed != unchanged
    names = [plot.parse_name(find(each, "pkl").name) for each in (folder, other)]
    assert (names[0] != names[1]) == (flag != "max_query")  # a run may always grow
    assert outcome(script, f"{usual} {words}", killed=True)[1] == changed


@pytest.mark.parametrize("script", [BASELINE, LFOSA])
def test_flags_of_machine_and_files_change_nothing(outcome, script):
    (_, found), (_, expected) = (
        outcome(script, words) for words in (" ".join(OTHERS.values()).strip(), "")
    )
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_run(outcome, monkeypatch):
    _, (_, weights) = outcome(BASELINE, "--compile")
    assert weights == pytest.approx(outcome(BASELINE, "")[1][1], rel=1e-2, abs=1e-3)
    assert outcome(BASELINE, "--compile", killed=True)[1][1] == weights
