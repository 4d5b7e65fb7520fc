"""Runs that are killed, stopped, locked out or left without space, and lose nothing by it.

`pytest -s tests/test_interruptions.py` also prints how many kills the runs survived.
"""

import os
import pickle
import random
import shlex
import signal
import struct
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from forks import (
    BASELINE,
    LFOSA,
    ROOT,
    UNTRAINED,
    assert_ends_well,
    assert_one_line,
    at,
    find,
    wait_for,
)
from tensorboardX.proto.event_pb2 import Event

# BALD, for the stream of its dropout masks
SCRIPTS = [(BASELINE, ("--query-strategy", "BALD", "--mc-samples", "4")), (LFOSA, ())]
TINY = ["--use-cpu", "--max-epoch", "2", "--checkpoint-epochs", "1", "--init-percent", "5"]
TINY += ["--query-batch", "20", "--batch-size", "16"]  # two steps per epoch in the first round
KILLS = 20  # per script
NO_SPACE = "raise OSError(28, 'No space left on device')"


@pytest.fixture(scope="module")
def reference(forks, tmp_path_factory):
    """The .pkl of an uninterrupted run with `arguments`, which is made once."""
    logs = {}

    def run(script, *arguments):
        if (script, arguments) not in logs:
            folder = tmp_path_factory.mktemp("reference")
            assert_ends_well(forks.run(folder, script, *arguments))
            logs[script, arguments] = find(folder, "pkl").read_bytes()
        return logs[script, arguments]

    return run


def send(*numbers):
    """An action for `at`: the process sends itself these signals."""
    return "; ".join(f"os.kill(os.getpid(), {int(number)})" for number in numbers)


KILL = send(signal.SIGKILL)
# Called in this order by a write: os.fsync of the file, os.replace, os.fsync of the folder.
HALF = f"os.path.isfile(f'/proc/self/fd/{{args[0]}}') and os.truncate(args[0], 999); {KILL}"
INSIDE_A_WRITE = [("fsync", HALF), ("fsync", KILL), ("replace", KILL)]


def read(folder):
    """Checkpoint and log of the run in `folder`; each is whole or not there, hence None."""
    checkpoint, log = find(folder, "pt"), find(folder, "pkl")
    if checkpoint:
        assert zipfile.ZipFile(checkpoint).testzip() is None
        checkpoint = torch.load(checkpoint, weights_only=True)
    return checkpoint, log and pickle.loads(log.read_bytes())


def scalars(folder):
    """(name, step) of all scalars in the TensorBoard files of the run in `folder`."""
    found = set()
    for file in (folder / "log_AL" / "tb").glob("*/events*"):
        rest = file.read_bytes()
        while len(rest) >= 16:  # length, its checksum, event, its checksum; the last may be cut
            (length,) = struct.unpack("<Q", rest[:8])
            if len(rest) < 16 + length:
                break
            event = Event.FromString(rest[12 : 12 + length])
            found |= {(value.tag, event.step) for value in event.summary.value}
            rest = rest[16 + length :]
    return found


@pytest.mark.parametrize(("script", "strategy"), SCRIPTS)
def test_twenty_kills_change_no_byte(forks, reference, tmp_path, script, strategy):
    seed = random.SystemRandom().randrange(2**32)
    print(f"{script}: seed of the kills {seed}")
    draws = random.Random(seed)
    begin = time.perf_counter()
    forks.run(tmp_path, script, *UNTRAINED, "--save-dir", "unused")
    brief = time.perf_counter() - begin  # a start and little more, on this machine and right now

    rounds, kills, inside, done, late = 2, 0, 0, 0, 0
    while True:
        text = find(tmp_path, "log")
        size = text.stat().st_size if text else 0
        arguments = [*TINY, *strategy, "--max-query", rounds]
        before, writes = "", kills % 3 == 2  # every third kill
        if kills < KILLS and writes:
            function, action = draws.choice(INSIDE_A_WRITE)
            before = at("os", function, draws.randint(1, 8), action)
        pid = forks.start(tmp_path, script, *arguments, "--resume", before=before)
        if kills < KILLS and not writes:
            time.sleep(draws.uniform(0, 1.5 * brief))
            os.kill(pid, signal.SIGKILL)
        ran = forks.wait(pid)
        _, log = read(tmp_path)
        assert len(log["Acc"]) >= done if log else done == 0  # a round that was done stays done
        done = len(log["Acc"]) if log else 0
        if ran.returncode == -signal.SIGKILL:
            kills, inside = kills + 1, inside + writes
            text = find(tmp_path, "log")
            late += bool(text) and not writes and text.stat().st_size > size  # it was under way
            continue
        assert_ends_well(ran)
        if kills >= KILLS:
            break
        rounds += 1  # the run was over too early; it may always grow

    assert find(tmp_path, "pkl").read_bytes() == reference(script, *arguments)
    files = {file.suffix for file in (tmp_path / "log_AL").iterdir()}
    assert files == {".pkl", ".pt", ".log", ""}  # no half of a write is left; "" is tb
    assert late > 0
    network = "classifier" if script == BASELINE else "detector"
    steps = {("Recall", q) for q in range(rounds)}
    steps |= {(f"loss/{network}", step) for step in range(1, 2 * rounds + 1)}
    assert steps <= scalars(tmp_path)
    print(f"{script}: kills survived: {kills} ({inside} inside a write), in {rounds} rounds")


STOPS = {  # where, and of which script and signal
    "reading the data": ("sklearn.datasets", "load_digits", 1, BASELINE, signal.SIGINT),
    "a step": ("models.training", "batch_loss", 1, BASELINE, signal.SIGTERM),
    "a step of the classifier": ("models.training", "batch_loss", 5, LFOSA, signal.SIGINT),
    "a write": ("os", "fsync", 7, LFOSA, signal.SIGTERM),
    "scoring": ("models.training", "_forward", 2, BASELINE, signal.SIGTERM),
    "the query": ("utils", "select", 1, LFOSA, signal.SIGINT),
    "the oracle's answer": ("datasets.open_set", "update", 2, LFOSA, signal.SIGTERM),
}


@pytest.mark.parametrize("place", STOPS)
def test_stopped_and_resumed(forks, reference, tmp_path, place):
    *call, script, number = STOPS[place]
    arguments = [*TINY, *dict(SCRIPTS)[script], "--max-query", "2"]
    ran = forks.run(tmp_path, script, *arguments, before=at(*call, send(number)))
    assert (ran.returncode, ran.stderr) == (128 + number, ""), ran
    says, command = ran.stdout.splitlines()[-1].split(": ")
    assert says == "stopped; go on with"
    python, *words = shlex.split(command)
    assert python == sys.executable

    checkpoint, _ = read(tmp_path)
    if place == "a step":
        assert checkpoint["training"]["step"] == 1  # it was finished and kept
    elif place == "reading the data":
        assert checkpoint is None
    ran = forks.run(tmp_path, *words)
    assert_ends_well(ran)
    assert ("starting fresh" in ran.stdout) == (place == "reading the data")
    assert find(tmp_path, "pkl").read_bytes() == reference(script, *arguments)


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ((signal.SIGINT, signal.SIGINT), -signal.SIGINT),  # at once
        ((signal.SIGTERM, signal.SIGTERM), -signal.SIGTERM),
        ((signal.SIGTERM, signal.SIGINT), 128 + signal.SIGTERM),  # after the step
    ],
)
def test_second_signal(forks, tmp_path, numbers, status):
    # One by one: of two that are pending the interpreter sees the lower number first.
    action = send(numbers[0]) + "; time.sleep(0); " + send(numbers[1])
    before = at("models.training", "batch_loss", 1, action)
    ran = forks.run(tmp_path, BASELINE, *TINY, before=before)
    assert (ran.returncode, ran.stderr) == (status, "")


def test_ctrl_c_during_the_imports(tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / BASELINE)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "numpy" in line or "torch" in line:  # the first of them
            process.send_signal(signal.SIGINT)
            break
    assert "Traceback" not in process.stderr.read()
    assert process.wait() == -signal.SIGINT
    assert os.listdir(tmp_path) == []


def test_two_processes(forks, reference, tmp_path):
    arguments = [*TINY, "--max-query", "2"]
    wait = "pathlib.Path('training').touch(); time.sleep(300)"
    before = at("models.training", "batch_loss", 9, wait)
    first = forks.start(tmp_path, LFOSA, *arguments, before=before)
    wait_for(tmp_path / "training")
    files = {file: file.read_bytes() for file in (tmp_path / "log_AL").iterdir() if file.is_file()}
    for flag in ("--resume", "--overwrite"):
        ran = forks.run(tmp_path, LFOSA, *arguments, flag)
        assert_one_line(ran, "another process is running")
    assert {file: file.read_bytes() for file in files} == files
    os.kill(first, signal.SIGKILL)
    assert forks.wait(first).returncode == -signal.SIGKILL
    ran = forks.run(tmp_path, LFOSA, *arguments, "--resume")
    assert_ends_well(ran)
    assert find(tmp_path, "pkl").read_bytes() == reference(LFOSA, *arguments)


def test_finished_while_another_started(forks, tmp_path):
    # The second looks for files before the first has any, and has the lock after its end.
    go_on = "\n        while not os.path.exists('finished'): time.sleep(0.01)"
    before = at("sklearn.datasets", "load_digits", 1, f"open('started', 'w').close(){go_on}")
    second = forks.start(tmp_path, BASELINE, *UNTRAINED, before=before)
    wait_for(tmp_path / "started")
    assert_ends_well(forks.run(tmp_path, BASELINE, *UNTRAINED))
    (tmp_path / "finished").touch()
    assert_one_line(forks.wait(second), "is there already")


def test_full_disk(forks, reference, tmp_path):
    arguments = [*TINY, "--max-query"]
    assert_ends_well(forks.run(tmp_path, LFOSA, *arguments, "1"))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    ran = forks.run(tmp_path, LFOSA, *arguments, "2", "--resume", before=limit)
    assert_one_line(ran, "cannot write", "File too large", "--resume")
    checkpoint, log = read(tmp_path)
    assert checkpoint["round"] == len(log["Acc"]) == 1
    assert not list((tmp_path / "log_AL").glob("*.tmp"))
    assert_ends_well(forks.run(tmp_path, LFOSA, *arguments, "2", "--resume"))
    assert find(tmp_path, "pkl").read_bytes() == reference(LFOSA, *arguments, "2")


@pytest.mark.parametrize(
    "place",
    [
        *(("os", "fsync", call) for call in (1, 3, 5, 8)),  # .pt, .pkl, .pt, the folder of .pkl
        ("os", "replace", 3),
        ("tensorboardX.record_writer", "masked_crc32c", 9),
        ("tqdm:tqdm", "write", 2),
    ],
)
def test_no_space_anywhere(forks, reference, tmp_path, place):
    before = at(*place, NO_SPACE)
    ran = forks.run(tmp_path, BASELINE, *UNTRAINED, before=before)
    assert_one_line(ran, "No space left on device")
    read(tmp_path)
    assert_ends_well(forks.run(tmp_path, BASELINE, *UNTRAINED, "--resume"))
    assert find(tmp_path, "pkl").read_bytes() == reference(BASELINE, *UNTRAINED)


def test_output_that_nobody_reads(forks, tmp_path):
    closed = "import os; pipe = os.pipe(); os.close(pipe[0]); os.dup2(pipe[1], 1)"
    ran = forks.run(tmp_path, BASELINE, *UNTRAINED, before=closed)
    assert_one_line(ran, "Broken pipe")


def test_finished_run(forks, tmp_path):
    assert_ends_well(forks.run(tmp_path, BASELINE, *UNTRAINED))
    pickled = find(tmp_path, "pkl").read_bytes()
    text = find(tmp_path, "log").read_text()
    header = find(tmp_path, "log").read_text().splitlines()[0]
    for part in ("'seed': 1", "versions={'python'", "'torch': ", "commit=", "device=cpu"):
        assert part in header
    state, _ = read(tmp_path)
    assert {"arguments", "versions", "commit", "device"} <= state["header"].keys()

    for file, other in (("pkl", "pt"), ("pt", "pkl")):  # one of them is enough to be refused
        away = find(tmp_path, other).rename(tmp_path / "away")
        assert_one_line(forks.run(tmp_path, BASELINE, *UNTRAINED), f".{file} is there already")
        away.rename(find(tmp_path, file).with_suffix(f".{other}"))
    assert find(tmp_path, "log").read_text() == text

    ran = forks.run(tmp_path, BASELINE, *UNTRAINED, "--resume")
    assert_ends_well(ran)
    assert "finished after 2 rounds" in ran.stdout and "\nround" not in ran.stdout
    assert find(tmp_path, "pkl").read_bytes() == pickled

    ran = forks.run(tmp_path, BASELINE, *UNTRAINED, "--overwrite")
    assert_ends_well(ran)
    assert "\nround 0 " in ran.stdout
    assert find(tmp_path, "pkl").read_bytes() == pickled
    assert find(tmp_path, "log").read_text().count("arguments=") == 1
    assert len(list((tmp_path / "log_AL" / "tb").glob("*/events*"))) == 1

    find(tmp_path, "pt").unlink()
    ran = forks.run(tmp_path, BASELINE, *UNTRAINED, "--resume")
    assert_one_line(ran, ".pkl is there, but no", ".pt to go on from")
    assert find(tmp_path, "pkl").read_bytes() == pickled


def test_all_start_from_the_same_split(forks, tmp_path):
    splits = []
    runs = [(BASELINE, "random"), (BASELINE, "KMeans"), (LFOSA, "AV_temperature")]
    for script, strategy in [*runs, (BASELINE, "uncertainty")]:
        seed = "2" if strategy == "uncertainty" else "1"
        folder = tmp_path / strategy
        folder.mkdir()
        before = at("utils", "query", 1, KILL)
        arguments = [*UNTRAINED, "--query-strategy", strategy, "--seed", seed]
        assert forks.run(folder, script, *arguments, before=before).returncode == -signal.SIGKILL
        state, _ = read(folder)
        splits.append((state["labeled"].tolist(), state["pool"].tolist()))
    assert splits[0] == splits[1] == splits[2] != splits[3]
