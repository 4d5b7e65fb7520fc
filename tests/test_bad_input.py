"""What a user can get wrong ends with one line and exit status 2, and writes nothing.

`pytest -s tests/test_bad_input.py` also prints how many bad inputs were tried.
"""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from forks import BASELINE, LFOSA, UNTRAINED, assert_ends_well, assert_one_line, at, find
from test_loaders import IMAGE, small_archive

import plot
import utils
from datasets import tiny_imagenet

NOWHERE = "http://127.0.0.1:9"  # no proxy listens there
OFFLINE = (
    f"import os; os.environ.update(http_proxy={NOWHERE!r}, https_proxy={NOWHERE!r}, no_proxy='')"
)
ONE_GPU = "import torch; torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1"
FULL = "import shutil, types; shutil.disk_usage = lambda _: types.SimpleNamespace(total=9, free=9)"


@pytest.fixture(scope="module")
def tried():
    """What was tried, told at the end."""
    names = []
    yield names
    print(f"\nbad inputs tried: {len(names)}")


def not_numbers(low_included=False, integer=False):
    """Texts that a flag for a finite number above 0 refuses."""
    return ["-1", "nan", "inf", "abc"] + ["0"] * (not low_included) + ["1.5"] * integer


def zip_of(folder, changes):
    """Write tiny-imagenet-200.zip with changed members; source that makes its MD5 the right one."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in (small_archive() | changes).items():
            file.writestr(name, data)
    folder.mkdir()
    (folder / "tiny-imagenet-200.zip").write_bytes(content.getvalue())
    digest = hashlib.md5(content.getvalue()).hexdigest()
    return f"{OFFLINE}; from datasets import tiny_imagenet; tiny_imagenet.MD5 = {digest!r}"


def archive_of(name, content):
    def prepare(folder):
        folder.mkdir()
        (folder / name).write_bytes(content)
        return OFFLINE

    return prepare


# Script, arguments, what the line must say, and source for the fork or what prepares the data
# folder and returns such source. --save-dir is a folder that is not there.
CASES = []


def case(script, arguments, *parts, before=""):
    CASES.append(pytest.param(script, arguments, parts, before, id=f"{script[:-3]} {arguments}"))


for flag, options in {
    "--known-class": {"integer": True},
    "--query-batch": {"integer": True},
    "--max-query": {"integer": True},
    "--batch-size": {"integer": True},
    "--eval-batch-size": {"integer": True},
    "--stepsize": {"integer": True},
    "--mc-samples": {"integer": True},
    "--checkpoint-epochs": {"integer": True},
    "--max-epoch": {"integer": True, "low_included": True},
    "--feat-dim": {"integer": True, "low_included": True},
    "--seed": {"integer": True, "low_included": True},
    "--class-seed": {"integer": True, "low_included": True},
    "--init-percent": {},
    "--lr-model": {},
    "--lr-cent": {},
    "--gamma": {},
    "--weight-cent": {"low_included": True},
    "--dropout": {},
    "--known-T": {},
    "--unknown-T": {},
    "--modelB-T": {},
}.items():
    kind = "integer" if options.get("integer") else "finite number"
    for text in not_numbers(**options):
        case(LFOSA, f"{flag}={text}", flag, f"{text!r} is not a", kind)

case(BASELINE, "--known-class 10", "--known-class 10: digits has 10 classes, so choose 1 to 9")
case(BASELINE, "--dataset cifar100 --known-class 100", "choose 1 to 99")
case(BASELINE, "--dataset TinyImagenet --known-class 200", "choose 1 to 199")
case(BASELINE, "--init-percent 0.01", "labels 0 of 576", "at least one is labeled")
case(BASELINE, "--init-percent 100", "'100' is not a finite number above 0 and below 100")
case(BASELINE, "--dropout 1", "'1' is not a finite number above 0 and below 1")
case(BASELINE, "--dataset cifar-100", "did you mean cifar100 or cifar10?", "TinyImagenet, digits")
case(BASELINE, "--dataset imagenet", "did you mean TinyImagenet")
case(BASELINE, "--max-epoch ", "'' is not an integer from 0 to")
case(BASELINE, "--query-batch 1e3", "'1e3' is not an integer")
case(BASELINE, "--seed 2147483648", "'2147483648' is not an integer from 0 to 2147483647")
case(BASELINE, "--lr-model 1e999", "'1e999' is not a finite number above 0")
case(BASELINE, "--gamma 0,5", "'0,5' is not a finite number")
case(BASELINE, "--dataset zzz", "'zzz' is unknown: choose from cifar10, cifar100, TinyImagenet")
case(BASELINE, "--model resnet-18", "did you mean resnet18")
case(BASELINE, "--query-strategy Uncertainity", "did you mean uncertainty?")
case(BASELINE, "--query-strategy bold", "did you mean BALD?")
case(BASELINE, "--query-strategy av_temperature", "run AL_center_temperature.py instead")
case(BASELINE, "--amp fp8", "did you mean fp16")
case(BASELINE, "--querry-strategy random", "did you mean --query-strategy?")
case(BASELINE, "--known_class 4", "did you mean --known-class?")
case(BASELINE, "-seed 4", "did you mean --seed?")
case(BASELINE, "--known-T 0.5", "--known-T")
case(BASELINE, "--see 1", "--see")  # no abbreviations: they would change meaning with a new flag
case(BASELINE, "--seed", "--seed: expected one argument")
case(BASELINE, "cifar10", "unrecognized arguments: cifar10")
case(BASELINE, "two\nlines", "unrecognized arguments: two lines")
case(BASELINE, "--resume --overwrite", "not allowed with argument")
case(BASELINE, "--gpu abc", "--gpu abc: give the number of a device")
case(BASELINE, "--gpu -1", "--gpu")
case(BASELINE, "--gpu 0,1", "one process per device: torchrun", "--nproc-per-node=2")
case(BASELINE, "--gpu 7", "there is no device 7, only 0 to 0", before=ONE_GPU)
case(BASELINE, "", "checkpoints need another 4 MB, 0 MB are free", before=FULL)
case(BASELINE, "--save-dir /dev/null", "--save-dir /dev/null: cannot write to /dev/null")
case(BASELINE, "--save-dir /dev/null/deeper", "cannot write to /dev/null")
case(BASELINE, "--save-dir /proc/new", "--save-dir /proc/new:")
case(BASELINE, f"--save-dir {'long' * 99}", "File name too long")
case(BASELINE, "--dataset cifar10", "put cifar-10-python.tar.gz there, from http", before=OFFLINE)
case(BASELINE, "--dataset cifar100", "put cifar-100-python.tar.gz there", "MD5", before=OFFLINE)
case(LFOSA, "--dataset tinyimagenet", "put tiny-imagenet-200.zip from http", before=OFFLINE)
case(BASELINE, "--dataset cifar10 --data-dir /dev/null", "/dev/null", before=OFFLINE)
for dataset, name in (
    ("cifar10", "cifar-10-python.tar.gz"),
    ("cifar100", "cifar-100-python.tar.gz"),
    ("TinyImagenet", "tiny-imagenet-200.zip"),
):  # cut short or tampered with, all that shows is another MD5
    prepare = archive_of(name, b"\x1f\x8b not the whole of it")
    case(LFOSA, f"--dataset {dataset}", "put ", name, "MD5", before=prepare)
for what, changes, parts in (
    ("leaves the folder", {"../../outside": b""}, ["../../outside, which leaves the folder"]),
    ("has a corrupted image", {IMAGE: small_archive()[IMAGE][:-999]}, [f"broken image {IMAGE}"]),
):
    prepare = lambda folder, changes=changes: zip_of(folder, changes)  # noqa: E731
    parts = ["tiny-imagenet-200.zip", *parts]
    CASES.append(
        pytest.param(LFOSA, "--dataset TinyImagenet", parts, prepare, id=f"a zip that {what}")
    )


@pytest.mark.parametrize(("script", "arguments", "parts", "before"), CASES)
def test_bad_input(forks, tried, tmp_path, monkeypatch, capsys, script, arguments, parts, before):
    folders = ["--save-dir", "new/logs", "--data-dir", "data"]
    if callable(before):
        before = before(tmp_path / "data")
    words = arguments.split(" ") if arguments else []
    monkeypatch.setattr(sys, "argv", [script, *words])
    try:  # what the parser refuses needs no process of its own
        utils.parse_arguments("", detector=script == LFOSA)
        ran = forks.run(tmp_path, script, *folders, *words, before=before)
    except SystemExit as end:
        ran = subprocess.CompletedProcess(words, end.code, *capsys.readouterr())
    assert_one_line(ran, *parts)
    tried.append(arguments)
    assert {file.name for file in tmp_path.iterdir()} <= {"data"}
    assert not (tmp_path / "data" / f"{tiny_imagenet.FOLDER}.npy").exists()


def test_a_log_that_is_not_one_of_ours(tmp_path, capsys):
    name = "resnet18_cifar100_known20_init8_batch1500_seed{}_random.pkl"
    contents = [b"", b"text", pickle.dumps([1]), pickle.dumps({"Acc": {0: 1.0}}), b"cos\nabort\n."]
    for seed, content in enumerate(contents):
        (tmp_path / name.format(seed)).write_bytes(content)
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"Acc": {}}))
    assert plot.main(["--log-dir", str(tmp_path), "--out-dir", str(tmp_path / "gifs")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(contents) + 2
    assert all("skipped" in line for line in lines[:-1]) and "no log to draw" in lines[-1]
    assert not (tmp_path / "gifs").exists()


# Resuming

OTHERS = [
    ("--eval-batch-size 100", "--eval-batch-size was 256, is 100"),
    ("--lr-cent 0.1", "--lr-cent was 0.5, is 0.1"),
    ("--deterministic", "--deterministic was False, is True"),
    ("--compile", "--compile was False, is True"),
    ("--mc-samples 3 --dropout 0.1", "--dropout was 0.5, is 0.1; --mc-samples was 20, is 3"),
]


@pytest.fixture(scope="module")
def one_round(forks, tmp_path_factory):
    """Folder of a run that was killed in the second round; the checkpoint holds a network."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ["--use-cpu", "--max-epoch", "1"]
    before = at("models.training", "_forward", 10, "os._exit(9)")
    assert forks.run(folder, LFOSA, *arguments, before=before).returncode == 9
    return folder, arguments


def assert_refused(forks, folder, arguments, *parts, before=""):
    """Resuming ends with one line of these parts, and leaves checkpoint and log as they are."""
    contents = [find(folder, suffix).read_bytes() for suffix in ("pt", "pkl")]
    assert_one_line(forks.run(folder, LFOSA, *arguments, "--resume", before=before), *parts)
    assert [find(folder, suffix).read_bytes() for suffix in ("pt", "pkl")] == contents
    assert not (folder / "trace").exists()


@pytest.mark.parametrize(("arguments", "says"), OTHERS)
def test_resumed_with_other_arguments(forks, one_round, arguments, says):
    folder, before = one_round
    assert_refused(forks, folder, [*before, *arguments.split()], "is of another run: ", says)


def test_resumed_on_another_device(forks, one_round):
    before = "import platform, utils; header = utils._header\n"
    before += "utils._header = lambda *a: header(*a) | {'device': 'H100', 'known': 'x'}"
    says = "device was cpu, is H100; known was "
    assert_refused(forks, *one_round, says, before=before)


class Mine:
    """Unpickling it leaves a trace."""

    def __reduce__(self):
        return os.mkdir, ("trace",)


def flipped(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def changed(**entries):
    """The checkpoint with entries replaced, as a file that is whole."""

    def change(content):
        state = torch.load(io.BytesIO(content), weights_only=True)
        file = io.BytesIO()
        torch.save(state | {k: v(state) if callable(v) else v for k, v in entries.items()}, file)
        return file.getvalue()

    return change


def saved(thing):
    def change(content):
        file = io.BytesIO()
        torch.save(thing, file)
        return file.getvalue()

    return change


DAMAGES = {
    "empty": lambda content: b"",
    "text": lambda content: b"no checkpoint at all",
    "cut in the middle": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "one bit flipped": flipped,
    "a pickle": lambda content: pickle.dumps({"header": {}}),
    "a pickle with code": lambda content: pickle.dumps(Mine()),
    "a checkpoint with code": saved({"header": Mine()}),
    "of something else": saved({"weight": torch.ones(3)}),
    "no dict": saved([1, 2]),
    "pool of another type": changed(pool=[1, 2, 3]),
    "no header": changed(header=None),
    "log of another type": changed(log="log"),
    "another network": changed(training=lambda s: s["training"] | {"network": {}}),
    "no optimizer": changed(training=lambda s: {**s["training"], "optimizer": None}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(forks, one_round, tmp_path, damage):
    source, arguments = one_round
    (tmp_path / "log_AL").mkdir()
    for file in (find(source, "pt"), find(source, "pkl")):
        (tmp_path / "log_AL" / file.name).write_bytes(file.read_bytes())
    checkpoint = find(tmp_path, "pt")
    checkpoint.write_bytes(DAMAGES[damage](checkpoint.read_bytes()))
    ran = forks.run(tmp_path, LFOSA, *arguments, "--resume")
    fits = (
        "is of another network" if damage in ("another network", "no optimizer") else "is damaged"
    )
    assert_one_line(ran, "checkpoint", fits, "--overwrite")
    assert not (tmp_path / "trace").exists()


# Unusual, but no mistake

HEAD = """
import models, torch
head = models.ResNet.head
def changed(self, pooled):
    features, logits = head(self, pooled)
    unknown = torch.arange(logits.shape[-1]) == 4
    return features, {}
models.ResNet.head = changed
"""
UNUSUAL = {  # arguments, logits, what it says
    "pool used up": ("--drop-unknown --query-batch 1000", "", "(the pool is empty)"),
    "no known image left": ("--query-batch 1400", "", "precision 0.000 recall 1.0"),
    "all predicted unknown": ("", "logits + 99 * unknown", ""),
    "none predicted unknown": ("", "logits - 99 * unknown", ""),
    "scores all alike": ("", "0 * logits", ""),
    "scores that differ widely": ("", "torch.exp(90 * logits)", ""),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_run(forks, tmp_path, name):
    arguments, logits, says = UNUSUAL[name]
    arguments = ["--query-strategy", "AV_temperature", *arguments.split()]
    before = HEAD.format(logits) if logits else ""
    ran = forks.run(tmp_path, LFOSA, *UNTRAINED, *arguments, before=before)
    assert_ends_well(ran)
    assert says in ran.stdout
    log = plot.load_log(find(tmp_path, "pkl"))
    assert {len(values) for values in log.values()} == {2}


def test_compile_without_a_compiler(forks, tmp_path):
    before = "import os, torch._inductor.config; os.environ['TORCHINDUCTOR_CACHE_DIR'] = 'cache'\n"
    before += "torch._inductor.config.cpp.cxx = ('/none',)"
    arguments = ["--use-cpu", "--max-epoch", "1", "--max-query", "1", "--compile"]
    ran = forks.run(tmp_path, BASELINE, *arguments, before=before)
    assert_one_line(ran, "--compile does not work here, leave it out (", "/none")


def test_diverging_at_once(forks, tmp_path):
    ran = forks.run(tmp_path, LFOSA, "--use-cpu", "--max-epoch", "2", "--lr-model", "1e6")
    assert_one_line(ran, " became nan ", " in epoch 1: lower --lr-model")


def test_diverging_leaves_the_last_good_checkpoint(forks, tmp_path):
    arguments = ["--use-cpu", "--max-epoch", "2", "--max-query", "2", "--checkpoint-epochs", "1"]
    arguments += ["--init-percent", "5", "--batch-size", "16", "--query-batch", "1"]
    action = "features, loss = original(*args); return features, loss * float('nan')"
    before = at("models.training", "batch_loss", 7, action)  # two calls per epoch
    ran = forks.run(tmp_path, BASELINE, *arguments, before=before)
    assert_one_line(ran, "the training loss became nan in epoch 2")
    state = torch.load(find(tmp_path, "pt"), weights_only=True)
    assert (state["round"], state["training"]["epoch"]) == (1, 1)
    assert_ends_well(forks.run(tmp_path, BASELINE, *arguments, "--resume"))
    assert_ends_well(forks.run(tmp_path, BASELINE, *arguments, "--save-dir", "whole/log_AL"))
    assert find(tmp_path, "pkl").read_bytes() == find(tmp_path / "whole", "pkl").read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        "MemoryError()",
        "__import__('torch').cuda.OutOfMemoryError('CUDA out of memory.')",
        "RuntimeError('[enforce fail] DefaultCPUAllocator: cannot allocate memory')",
    ],
)
def test_out_of_memory(forks, tmp_path, error):
    before = at("models.training", "_forward", 1, f"raise {error}")
    ran = forks.run(tmp_path, BASELINE, *UNTRAINED, before=before)
    assert_one_line(ran, "out of memory: lower --batch-size")


@pytest.mark.parametrize(
    ("script", "strategy", "says"),
    [
        (LFOSA, "AV_temperature", "the pool's logits are not finite: lower --lr-model"),
        (BASELINE, "random", "the classifier's outputs are not finite: lower --lr-model"),
    ],
)
def test_outputs_that_are_not_finite(forks, tmp_path, script, strategy, says):
    before = HEAD.format("logits / 0")
    arguments = [*UNTRAINED, "--query-strategy", strategy]
    assert_one_line(forks.run(tmp_path, script, *arguments, before=before), says)
