"""Runs that are killed, stopped, locked out or left without space, and lose nothing by it.

`pytest -s tests/test_interruptions.py` also prints how many kills the runs survived.
"""

import itertools
import json
import os
import pickle
import random
import shlex
import signal
import struct
import sys
import time
import zipfile
from collections import Counter

import pytest
import torch
from forks import (
    BASELINE,
    KILL,
    LFOSA,
    SMALL,
    UNTRAINED,
    assert_ends_well,
    assert_one_line,
    at,
    at_write,
    find,
    results,
    send,
)
from tensorboardX.proto.event_pb2 import Event

from query_strategies import STRATEGIES

# Two steps per epoch in the first round, and a checkpoint after every epoch.
TINY = [*SMALL, *"--max-epoch 2 --checkpoint-seconds 0 --batch-size 16 --save-model".split()]
RUNS = {  # BALD, for the stream of its dropout masks
    BASELINE: [*TINY, "--query-strategy", "BALD", "--mc-samples", "4"],
    LFOSA: TINY,
}
STEP = ("torch.optim:SGD", "step")
KILLS = 20  # per script
OWN_LOSS = [name for name in STRATEGIES if hasattr(STRATEGIES[name], "objective")]
NO_SPACE = "raise OSError(28, 'No space left on device')"


WRITES = [  # a kill when a file is half there, is whole but not in its place, and is in its place
    f"os.truncate(args[0], os.path.getsize(args[0]) // 2); {KILL}",
    KILL,
    f"original(*args); {KILL}",
]


def rounds_done(folder):
    """Rounds in the log; each file of the run is whole, or not there yet."""
    checkpoint, log, queries = (find(folder, suffix) for suffix in ("pt", "pkl", "queries.json"))
    assert not checkpoint or zipfile.ZipFile(checkpoint).testzip() is None
    assert not queries or all(json.loads(queries.read_text()))
    return len(pickle.loads(log.read_bytes())["Acc"]) if log else 0


def scalars(folder):
    """How often each (name, step) stands in the TensorBoard files of the run in `folder`."""
    found = Counter()
    for file in (folder / "log_AL" / "tb").glob("*/events*"):
        rest = file.read_bytes()
        while len(rest) >= 16:  # length, its checksum, event, its checksum; the last may be cut
            (length,) = struct.unpack("<Q", rest[:8])
            if len(rest) < 16 + length:
                break
            event = Event.FromString(rest[12 : 12 + length])
            values = (value for value in event.summary.value if value.HasField("simple_value"))
            found.update((value.tag, event.step) for value in values)
            rest = rest[16 + length :]
    return found


@pytest.fixture(scope="module")
def reference(forks, tmp_path_factory):
    """The folder of an uninterrupted run of a script with `arguments`, which is made once."""
    folders = {}

    def run(script, *arguments):
        if (script, arguments) not in folders:
            folder = folders[script, arguments] = tmp_path_factory.mktemp("reference")
            assert_ends_well(forks.run(folder, script, *arguments))
        return folders[script, arguments]

    return run


@pytest.fixture
def resume(forks, reference, tmp_path):
    """Go on with the run in tmp_path, and compare it with one that was never interrupted."""

    def run(script, *arguments):
        assert_ends_well(forks.run(tmp_path, script, *arguments, "--resume"))
        assert results(tmp_path) == results(reference(script, *arguments))

    return run


@pytest.mark.parametrize("script", RUNS)
def test_twenty_kills_change_no_byte(forks, reference, tmp_path, script):
    seed = random.SystemRandom().randrange(2**32)
    print(f"{script}: seed of the kills {seed}")
    draws = random.Random(seed)
    begin = time.perf_counter()
    forks.run(tmp_path, script, *UNTRAINED, "--save-dir", "unused")
    brief = time.perf_counter() - begin  # a start and little more, on this machine and right now

    rounds, kills, done = 2, 0, 0
    while True:
        arguments = [*RUNS[script], "--max-query", str(rounds)]
        before, in_a_write = "", kills % 2 == 1
        if kills < KILLS and in_a_write:  # of a file that is written at first, or later
            suffix = draws.choice(["pt", "pkl", "queries.json", "model.pt"])
            before = at_write(f".{suffix}", draws.randint(1, 4), WRITES[kills // 2 % 3])
        pid = forks.start(tmp_path, script, *arguments, "--resume", before=before)
        if kills < KILLS and not in_a_write:
            time.sleep(draws.uniform(0.2 * brief, 2 * brief))
            os.kill(pid, signal.SIGKILL)
        ran = forks.wait(pid)
        assert rounds_done(tmp_path) >= done  # a round that was done stays done
        done = rounds_done(tmp_path)
        if ran.returncode == -signal.SIGKILL:
            kills += 1
            continue
        assert_ends_well(ran)
        if kills >= KILLS:
            break
        rounds += 1  # the run was over before its kill; it may always grow
        assert rounds < 5 * KILLS

    whole = reference(script, *arguments)
    assert results(tmp_path) == results(whole)
    for name in ("classifier", "detector")[: 1 + (script == LFOSA)]:
        weights, others = (torch.load(find(f, "model.pt"))[name] for f in (tmp_path, whole))
        assert all(torch.equal(weights[key], others[key]) for key in others)
    assert not list((tmp_path / "log_AL").glob("*.tmp"))  # no half of a write is left
    assert scalars(whole).keys() <= scalars(tmp_path).keys()
    print(f"{script}: kills survived: {kills}, in {rounds} rounds")


@pytest.mark.parametrize("strategy", OWN_LOSS)
def test_what_a_methods_own_loss_has_learnt_survives_kills(forks, resume, tmp_path, strategy):
    """In the first round's detector, in that of the second round and in its classifier."""
    arguments = [*TINY, "--query-strategy", strategy, "--max-query", "2"]
    for write, rounds in ((3, 0), (7, 1), (4, 1)):
        before = at_write(".pt", write, KILL)
        ran = forks.run(tmp_path, LFOSA, *arguments, "--resume", before=before)
        assert ran.returncode == -signal.SIGKILL and rounds_done(tmp_path) == rounds
    resume(LFOSA, *arguments)


@pytest.mark.parametrize(
    ("script", "number", "place"),
    [
        (BASELINE, signal.SIGTERM, at(*STEP, 1, "{}")),
        (BASELINE, signal.SIGINT, at(*STEP, 4, "{}")),  # the network's last
        (LFOSA, signal.SIGUSR1, at(*STEP, 6, "{}")),  # the classifier's second
        # In the write after the first epoch, and after the last one of the detector.
        (BASELINE, signal.SIGTERM, at_write(".pt", 2, "{}")),
        (LFOSA, signal.SIGUSR1, at_write(".pt", 3, "{}")),
    ],
)
def test_a_signal_in_training_ends_the_run_after_the_epoch(
    forks, reference, tmp_path, script, number, place
):
    arguments = [*RUNS[script], "--max-query", "1"]
    ran = forks.run(tmp_path, script, *arguments, before=place.format(send(number)))
    assert (ran.returncode, ran.stderr) == (128 + number, ""), ran
    line = ran.stdout.splitlines()[-1]
    _, *words = shlex.split(line[line.index(sys.executable) :])
    assert_ends_well(forks.run(tmp_path, *words))
    assert results(tmp_path) == results(reference(script, *arguments))
    assert set(scalars(tmp_path).values()) == {1}  # no epoch was done twice


@pytest.mark.parametrize(
    ("script", "place", "numbers"),
    [
        (BASELINE, (*STEP, 2), (signal.SIGTERM, signal.SIGTERM)),
        (LFOSA, (*STEP, 6), (signal.SIGTERM, signal.SIGINT)),
        (BASELINE, ("datasets", "create", 1), (signal.SIGTERM,)),
        (BASELINE, ("models", "predict", 1), (signal.SIGUSR1,)),
        (LFOSA, ("query_strategies.av_temperature", "query", 1), (signal.SIGINT,)),
        (LFOSA, ("experiment.run:Run", "end_round", 1), (signal.SIGTERM,)),
    ],
)
def test_a_second_signal_or_one_outside_training_ends_the_run_at_once(
    forks, resume, tmp_path, script, place, numbers
):
    arguments = [*RUNS[script], "--max-query", "1"]
    action = f"{send(*numbers)}; time.sleep(300)"
    ran = forks.run(tmp_path, script, *arguments, before=at(*place, action))
    assert (ran.returncode, ran.stderr) == (-numbers[-1], "")
    resume(script, *arguments)


def test_a_second_process_is_refused(forks, resume, tmp_path):
    arguments = [*TINY, "--max-query", "1"]
    before = at(*STEP, 6, "pathlib.Path('training').touch(); time.sleep(300)")
    first = forks.start(tmp_path, LFOSA, *arguments, before=before)
    end = time.monotonic() + 60
    while not (tmp_path / "training").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    files = {file: file.read_bytes() for file in (tmp_path / "log_AL").iterdir() if file.is_file()}
    for flag in ("--resume", "--overwrite"):
        assert_one_line(forks.run(tmp_path, LFOSA, *arguments, flag), "another process")
    assert {file: file.read_bytes() for file in files} == files
    os.kill(first, signal.SIGKILL)
    assert forks.wait(first).returncode == -signal.SIGKILL
    resume(LFOSA, *arguments)


def test_a_file_system_without_locks_is_refused(forks, tmp_path):
    before = at("fcntl", "flock", 1, "raise OSError(38, 'Function not implemented')")
    ran = forks.run(tmp_path, BASELINE, *UNTRAINED, before=before)
    assert_one_line(ran, "Function not implemented")


def test_no_space_in_any_write(forks, resume, tmp_path):
    arguments = [*UNTRAINED, "--save-model", "--no-tensorboard"]
    for write in itertools.count(1):
        before, done = at("os", "fsync", write, NO_SPACE), rounds_done(tmp_path)
        ran = forks.run(tmp_path, BASELINE, *arguments, "--resume", before=before)
        assert rounds_done(tmp_path) >= done
        if ran.returncode == 0:
            break
        assert_one_line(ran, "No space left on device")
    assert write > 6
    resume(BASELINE, *arguments)


@pytest.mark.parametrize(
    "before",
    [
        # A disk that is full in the middle of the checkpoint, and of TensorBoard's file.
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))",
        at("tensorboardX.event_file_writer:EventsWriter", "write_event", 4, NO_SPACE),
        "import glob, os; text = glob.glob('log_AL/*.log')[0]\n"
        "os.remove(text); os.symlink('/dev/full', text)",
    ],
)
def test_full_disk(forks, resume, tmp_path, before):
    arguments = [*TINY, "--max-query"]
    assert_ends_well(forks.run(tmp_path, LFOSA, *arguments, "1"))
    ran = forks.run(tmp_path, LFOSA, *arguments, "2", "--resume", before=before)
    assert_one_line(ran, "cannot write")
    assert rounds_done(tmp_path) == 1
    assert not list((tmp_path / "log_AL").glob("*.tmp"))
    if (text := find(tmp_path, "log")).is_symlink():
        text.unlink()
    resume(LFOSA, *arguments, "2")


def test_a_finished_run_stays_as_it_is_unless_asked(forks, tmp_path):
    assert_ends_well(forks.run(tmp_path, BASELINE, *UNTRAINED))
    before, text = results(tmp_path), find(tmp_path, "log").read_text()
    for there, other in (("pkl", "pt"), ("pt", "pkl")):  # one of them is enough to be refused
        away = find(tmp_path, other).rename(tmp_path / "away")
        ran = forks.run(tmp_path, BASELINE, *UNTRAINED)
        assert_one_line(ran, f".{there}", "--resume", "--overwrite")
        away.rename(find(tmp_path, there).with_suffix(f".{other}"))
    assert (results(tmp_path), find(tmp_path, "log").read_text()) == (before, text)

    ran = forks.run(tmp_path, BASELINE, *UNTRAINED, "--resume")
    assert_ends_well(ran)
    assert "finished after 2 rounds" in ran.stdout
    assert results(tmp_path) == before

    assert_ends_well(forks.run(tmp_path, BASELINE, *UNTRAINED, "--overwrite"))
    assert results(tmp_path) == before
    assert len(find(tmp_path, "log").read_text().splitlines()) == len(text.splitlines())
    assert set(scalars(tmp_path).values()) == {1}

    find(tmp_path, "pt").unlink()  # by mistake: the log cannot be gone on with, nor is it lost
    assert_one_line(forks.run(tmp_path, BASELINE, *UNTRAINED, "--resume"), ".pkl", ".pt")
    assert results(tmp_path) == before
