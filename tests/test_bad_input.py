"""What a user can get wrong ends with one line and exit status 2; a bug ends with a traceback."""

import io

import pytest
import torch
from forks import BASELINE, LFOSA, SMALL, UNTRAINED, assert_ends_well, assert_one_line, at, find
from trees import Trace

# One flag of each kind with texts that it refuses.
NUMBERS = {
    "--query-batch": "0 -1 1.5 1e3 abc nan",
    "--max-epoch": "-1 1.5",
    "--seed": "-1 2147483648",
    "--lr-model": "0 -1 nan inf 1e999 0,5 abc",
    "--weight-cent": "-1 nan",
    "--init-percent": "0 100",
    "--dropout": "0 1",
    "--known-T": "0 inf",
    "--checkpoint-seconds": "-1",
    "--gpu": "abc -1",
}
# Each with what the line must say, besides.
MISTAKES = [
    (BASELINE, "--max-epoch ", "--max-epoch"),  # an empty text
    (BASELINE, "--seed", "--seed"),
    (BASELINE, "--dataset imagenet", "TinyImagenet"),
    (BASELINE, "--model resnet-18", "resnet18"),
    (BASELINE, "--query-strategy Uncertainity", "uncertainty"),
    (BASELINE, "--query-strategy AV_temperature", "--query-strategy"),  # needs the detector
    (BASELINE, "--amp fp8", "fp16"),
    (BASELINE, "--querry-strategy random", "--querry-strategy"),
    (BASELINE, "--see 1", "--see"),  # an abbreviation, which a new flag could make ambiguous
    (BASELINE, "--known-T 0.5", "--known-T"),  # LfOSA's alone
    (BASELINE, "cifar10", "cifar10"),
    (BASELINE, "--resume --overwrite", "--overwrite"),
    (LFOSA, "--model mlp", "--encoder"),
    (LFOSA, "--encoder resnet5", "resnet50"),
    (LFOSA, "--dataset embeddings --encoder resnet50", "--encoder"),
    (LFOSA, "--dataset embeddings --model resnet20", "--model"),
    (LFOSA, "--dataset embeddings --image-size 8", "--image-size"),
    (LFOSA, "--dataset embeddings --augment-pool", "--augment-pool"),
    (LFOSA, "--dataset embeddings --no-rotation", "--rotation"),
    (BASELINE, "--known-class 10", "--known-class"),  # the digits have 10 classes
    (BASELINE, "--init-percent 0.01", "--init-percent"),  # no image
    (BASELINE, "--save-dir /dev/null", "/dev/null"),
    (BASELINE, "--save-dir /proc/new", "/proc/new"),
    (BASELINE, "--dataset cifar10 --data-dir /dev/null", "/dev/null"),
    (BASELINE, f"--save-dir {'long' * 99}", "long"),
    # So far from the published setting that the log's name is longer than a file system takes.
    (LFOSA, "--known-T 1e-9 --query-strategy BALD --drop-unknown --augment-pool --amp bf16 "
     "--class-seed 2147483647 --max-epoch 2147483647 --feat-dim 2147483647 --stepsize 2147483647 "
     "--lr-model 0.12345678901 --weight-cent 0.12345678901", "name"),
]  # fmt: skip


def case(script, text, *parts):
    return pytest.param(script, text.split(" "), parts, id=f"{script[:-3]} {text[:40]}")


@pytest.mark.parametrize(
    ("script", "arguments", "parts"),
    [
        *(
            case(LFOSA, f"{flag}={text}", flag)
            for flag, texts in NUMBERS.items()
            for text in texts.split()
        ),
        *(case(*mistake) for mistake in MISTAKES),
    ],
)
def test_mistake(forks, tmp_path, script, arguments, parts):
    assert_one_line(forks.run(tmp_path, script, "--use-cpu", *arguments), *parts)
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there(forks, tmp_path):
    before = "import torch; torch.cuda.is_available = lambda: True\n"
    before += "torch.cuda.device_count = lambda: 1"
    ran = forks.run(tmp_path, BASELINE, "--gpu", "1", before=before)
    assert_one_line(ran, "--gpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "before", "says"),
    [
        (["--lr-model", "1e6"], "", "--lr-model"),
        ([], at("models", "predict", 1, "import torch; torch.empty(10**15)"), "--batch-size"),
        ([], at("models", "train", 2, "import torch; raise torch.OutOfMemoryError"), "-batch-size"),
    ],
)
def test_a_failure_in_mid_run_leaves_the_last_checkpoint(forks, tmp_path, arguments, before, says):
    arguments = [*SMALL, "--max-epoch", "2", *arguments]
    assert_one_line(forks.run(tmp_path, LFOSA, *arguments, before=before), says)
    assert find(tmp_path, "pt")


@pytest.mark.parametrize("error", ["FileNotFoundError", "RuntimeError"])
def test_a_bug_in_a_strategy_ends_with_its_traceback(forks, tmp_path, error):
    before = at("query_strategies.random", "query", 1, f"raise {error}('mine')")
    ran = forks.run(tmp_path, BASELINE, *UNTRAINED, before=before)
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr and f"{error}: " in ran.stderr.splitlines()[-1]


# Checkpoints that cannot be gone on with


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def saved(thing):
    """A function from the content of a checkpoint to that of another one."""

    def replace(content):
        file = io.BytesIO()
        torch.save(thing, file)
        return file.getvalue()

    return replace


def of_another_run(content):
    state = torch.load(io.BytesIO(content))
    state["experiment"]["name"] = "another"
    return saved(state)(content)


NO_RIGHTS = """
import builtins, io
original = io.open
def refusing(path, *args, **kwargs):
    if str(path).endswith(".pt"):
        raise PermissionError(13, "Permission denied", path)
    return original(path, *args, **kwargs)
io.open = builtins.open = refusing
"""
SAME = bytes  # the content as it is
CHECKPOINTS = {  # content -> content, further arguments, source for the fork, what the line says
    "empty": (lambda content: b"", "", "", "damaged"),
    "cut": (lambda content: content[:-1000], "", "", "damaged"),
    "one bit flipped": (flipped, "", "", "damaged"),
    "with code": (saved({"format": Trace()}), "", "", "overwrite"),
    "of an earlier version": (saved({"round": 1, "network": {}}), "", "", "version"),
    "of another run": (of_another_run, "", "", "another"),
    "of other kernels": (SAME, "--deterministic", "", "deterministic"),
    "without rights to read it": (SAME, "", NO_RIGHTS, "Permission denied"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used(forks, tmp_path, kind):
    change, arguments, before, says = CHECKPOINTS[kind]
    assert_ends_well(forks.run(tmp_path, LFOSA, *UNTRAINED))
    checkpoint, log = find(tmp_path, "pt"), find(tmp_path, "pkl")
    content = change(checkpoint.read_bytes())
    checkpoint.write_bytes(content)
    there = log.read_bytes()
    arguments = [*UNTRAINED, "--resume", *arguments.split()]
    ran = forks.run(tmp_path, LFOSA, *arguments, before=before)
    assert_one_line(ran, checkpoint.name, says)
    if before:
        assert "overwrite" not in ran.stderr  # it may be sound
    assert (checkpoint.read_bytes(), log.read_bytes()) == (content, there)
    assert not (tmp_path / "trace").exists()


# Unusual, but no mistake


@pytest.mark.parametrize("arguments", ["--drop-unknown --query-batch 250", "--query-batch 350"])
def test_a_pool_without_images_to_query(forks, tmp_path, arguments):
    arguments = [*UNTRAINED, "--query-strategy", "AV_temperature", *arguments.split()]
    ran = forks.run(tmp_path, LFOSA, *arguments, "--max-query", "3")
    assert_ends_well(ran)
    assert ("the pool is empty" in ran.stdout) == ("--drop-unknown" in arguments)


CONTAINER = "import os; os.environ.pop('HOME'); os.getuid = lambda: 54321"  # no such user
ASCII = "import sys; sys.stdout.reconfigure(encoding='ascii'); sys.stderr.reconfigure("
ASCII += "encoding='ascii')"
CLOSED = "import os, sys; os.close(1); sys.stdout = None"
UNREAD = "import os; pipe = os.pipe(); os.close(pipe[0]); os.dup2(pipe[1], 1)"


@pytest.mark.parametrize(
    ("before", "save_dir"),
    [(CONTAINER, "log_AL"), (ASCII, "журналы"), (CLOSED, "log_AL"), (UNREAD, "log_AL")],
)
def test_surroundings(forks, tmp_path, before, save_dir):
    ran = forks.run(tmp_path, BASELINE, *UNTRAINED, "--save-dir", save_dir, before=before)
    assert_ends_well(ran)
    assert len(list((tmp_path / save_dir).glob("*.pkl"))) == 1


def test_home(forks, tmp_path):
    before = f"import os; os.environ['HOME'] = {str(tmp_path)!r}"
    assert_ends_well(
        forks.run(tmp_path, BASELINE, *UNTRAINED, "--save-dir=~/log_AL", before=before)
    )
    assert find(tmp_path, "pkl") and not (tmp_path / "~").exists()
