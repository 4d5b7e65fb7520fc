"""Every flag of both scripts, run: it changes the experiment, or nothing of it.

A run with all of them that is killed and resumed ends with the same bytes as one that is not.
"""

import itertools
import signal
import sys
from unittest import mock

import pytest
import torch
from forks import BASELINE, KILL, LFOSA, at_write, find, results
from trees import class_folders, write_folder

import plot
import utils

# Six classes of five pictures, three of them known.
TINY = "--use-cpu --no-tensorboard --save-model --checkpoint-seconds 0 --dataset folder --data-dir "
TINY += "pictures --image-size 8 --init-percent 40 --query-batch 4 --max-query 2 --max-epoch 2 "
TINY += "--batch-size 4 --lr-model 0.05 --model tiny"
BALD = "--query-strategy BALD --mc-samples 3"
# The flags that change an experiment: arguments that a run without the flag has too, and the flag.
CHANGES = {
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
    "save_model": "--save-model",
    "no_tensorboard": "--no-tensorboard",
    "checkpoint_seconds": "--checkpoint-seconds 60",
    "resume": "--resume",
}
ELSEWHERE = {
    "dataset",  # in the tests of each
    "save_dir",  # in every run below
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
CASES += [(LFOSA, flag) for flag in ("weight_cent", "drop_unknown", "augment_pool")]


def test_every_flag_is_run_here():
    for names in FLAGS.values():
        assert names <= CHANGES.keys() | OTHERS.keys() | ELSEWHERE


@pytest.fixture(scope="module")
def outcome(forks, tmp_path_factory):
    """The folder of a run, and what it found: log and queries, and the weights of its networks.

    kill: the run is killed in place of its checkpoint of this number, and resumed.
    """
    home = tmp_path_factory.mktemp("flags")
    write_folder(home / "pictures", class_folders(*"abcdef"))
    write_folder(home / "others", class_folders(*"abcdefg"))
    found, numbers = {}, itertools.count()

    def run(script, words, kill=None, before=""):
        if (script, words, kill) not in found:
            folder = home / f"run{next(numbers)}"
            arguments = [script, *TINY.split(), *words.split(), "--save-dir", folder / "log_AL"]
            if kill:
                killed = before + at_write(".pt", kill, KILL)
                ran = forks.run(home, *arguments, before=killed)
                assert ran.returncode == -signal.SIGKILL
                arguments.append("--resume")
            ran = forks.run(home, *arguments, before=before)
            assert ran.returncode == 0, ran
            saved = torch.load(find(folder, "model.pt"))
            names = ("detector", "classifier")[script == BASELINE :]
            weights = torch.cat([w.flatten() for name in names for w in saved[name].values()])
            found[script, words, kill] = folder, results(folder), weights.tolist()
        return found[script, words, kill]

    return run


@pytest.mark.parametrize(("script", "flag"), CASES)
def test_a_flag_changes_the_experiment_and_its_name(outcome, script, flag):
    usual, words = CHANGES[flag]
    folder, *changed = outcome(script, f"{usual} {words}")
    other, *unchanged = outcome(script, usual)
    assert changed != unchanged
    names = [plot.parse_name(find(each, "pkl").name) for each in (folder, other)]
    assert (names[0] != names[1]) == (flag != "max_query")  # a run may always grow


@pytest.mark.parametrize("third", [0, 1, 2])  # all would make a name too long for a file
@pytest.mark.parametrize("script", [BASELINE, LFOSA])
def test_a_run_with_a_third_of_the_flags_is_killed_and_resumed(outcome, script, third):
    flags = [flag for flag in CHANGES if flag in FLAGS[script] - {"known", "query_strategy"}]
    words = " ".join(" ".join(CHANGES[flag]) for flag in flags[third::3])
    _, *whole = outcome(script, words)
    _, *resumed = outcome(script, words, kill=6 + 2 * (script == LFOSA))  # in a second epoch
    assert resumed == whole


@pytest.mark.parametrize("script", [BASELINE, LFOSA])
def test_flags_of_machine_and_files_change_nothing(outcome, script):
    _, found, weights = outcome(script, " ".join(OTHERS.values()))
    _, expected, others = outcome(script, "")
    assert found == expected
    assert weights == pytest.approx(others)


def test_compiled_run(outcome):
    """With a backend that takes a second instead of a minute."""
    before = "import functools, torch\n"
    before += "torch.compile = functools.partial(torch.compile, backend='eager')\n"
    weights = outcome(BASELINE, "--compile", before=before)[2]
    assert weights == pytest.approx(outcome(BASELINE, "")[2], rel=1e-2, abs=1e-3)
