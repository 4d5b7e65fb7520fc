"""Both scripts and the plot script, run as a shell would run them, on digits with tiny settings."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from forks import (
    BASELINE,
    LFOSA,
    ROOT,
    SMALL,
    UNTRAINED,
    assert_ends_well,
    assert_one_line,
    find,
    read,
)

import datasets
import models
import plot
import utils
from datasets import DATASETS, digits
from datasets.raw import Raw
from experiment.protocols import PROTOCOLS
from query_strategies import STRATEGIES

TINY = [*SMALL, "--max-query", "2", "--max-epoch", "1"]
RUNS = [(LFOSA, name) for name in STRATEGIES]
RUNS += [
    (BASELINE, name) for name in STRATEGIES if not getattr(STRATEGIES[name], "NEEDS_DETECTOR", 0)
]


@pytest.fixture
def parse(monkeypatch):
    def parsed(detector, *arguments):
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        return utils.parse_arguments("test", detector)

    return parsed


PUBLIC = {"cifar10": 10, "cifar100": 100, "TinyImagenet": 200}  # classes


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Start a run on a data set of which only the number of classes is real."""

    def started(detector, dataset, *arguments):
        labels = np.arange(30 * PUBLIC[dataset]) % PUBLIC[dataset]
        pixels = np.zeros((len(labels), 8, 8, 3), np.uint8)
        raw = Raw(pixels, labels, pixels, labels, tuple(map(str, range(PUBLIC[dataset]))))
        small = DATASETS[dataset]._replace(load=lambda data_dir: raw, class_ids=None)
        monkeypatch.setitem(DATASETS, dataset, small)
        words = ["--use-cpu", "--save-dir", str(tmp_path), "--dataset", dataset, *arguments]
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        return utils.start("test", detector)

    return started


@pytest.fixture(scope="module")
def known():
    """Whether each training image of `few` is of a known class."""
    known = datasets.create("digits", None, torch.device("cpu"), datasets.KnownClasses(4)).known
    return known[: len(known) // 4]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("script", "strategy"), RUNS)
def test_every_strategy_in_both_scripts(forks, known, tmp_path, script, strategy, protocol):
    words = ["--query-strategy", strategy, "--protocol", protocol, "--mc-samples", "3"]
    ran = forks.run(tmp_path, script, *TINY, *words)
    assert_ends_well(ran)  # bars vanish where there is no terminal, and nothing warns
    log, queries = read(tmp_path)
    assert list(log) == ["Acc", "Err", "Precision", "Recall"]
    for measure in log.values():
        assert list(measure) == [0, 1]
        assert all(type(value) is float for value in measure.values())
    assert [len(set(query)) for query in queries] == [20, 20]
    found, start = [int(known[query].sum()) for query in queries], int(known.sum()) // 5
    labeled = [start + sum(found[:q]) for q in (0, 1, 2)]
    rows = [line.split() for line in ran.stdout.splitlines() if line.split()[0] in ("0", "1")]
    for q in (0, 1):
        assert log["Acc"][q] + log["Err"][q] == 100
        assert log["Precision"][q] == found[q] / 20
        assert log["Recall"][q] == labeled[q + 1] / int(known.sum())
        counts = [labeled[q], 20 * q - sum(found[:q]), len(known) - labeled[q]]
        counts[2] -= counts[1] * (protocol != "LfOSA")  # unknown images leave the pool
        assert [int(cell) for cell in rows[q][1:4]] == counts
        assert " ".join(rows[q]) in " ".join(find(tmp_path, "log").read_text().split())
    assert list((tmp_path / "log_AL" / "tb").glob("*/events*"))


WATCH = """
import json, models
train = models.train
def watched(network, objective, inputs, targets, indices, *more):
    T = objective.temperature
    T = T if T is None else T.tolist()
    with open("trained", "a") as file:
        print(json.dumps([network.fc.out_features, indices.tolist(), T]), file=file)
    return train(network, objective, inputs, targets, indices, *more)
models.train = watched
"""


def test_each_network_gets_its_images_and_temperatures(forks, known, tmp_path):
    started = []
    for script in (LFOSA, BASELINE):
        folder = tmp_path / script
        folder.mkdir()
        temperatures = "--known-T 1 --unknown-T 2 --modelB-T 3".split() * (script == LFOSA)
        assert_ends_well(forks.run(folder, script, *TINY, *temperatures, before=WATCH))
        trained = [json.loads(line) for line in (folder / "trained").read_text().splitlines()]
        query = read(folder)[1][0]
        started.append(trained[0][1])
        labeled = sorted(started[0] + [index for index in query if known[index]])
        invalid = [index for index in query if not known[index]]
        if script == LFOSA:
            assert trained[0][0] == 5 and trained[1] == [4, started[0], [3.0] * 4]
            outputs, indices, temperature = trained[2]
            assert (outputs, temperature) == (5, [1.0] * 4 + [2.0])
            assert sorted(indices) == sorted(labeled + invalid)
        outputs, indices, temperature = trained[-1]
        assert (outputs, sorted(indices)) == (4, labeled)
        assert temperature == ([3.0] * 4 if script == LFOSA else None)
    assert started[0] == started[1]  # whatever the strategy


def test_saved_networks(forks, tmp_path):
    arguments = "--use-cpu --max-query 1 --max-epoch 8 --class-seed 3 --save-model".split()
    assert_ends_well(forks.run(tmp_path, LFOSA, *arguments))
    saved = torch.load(find(tmp_path, "model.pt"))
    raw, known = digits.load(None), list(saved["classes"][:4])
    labels = [raw.classes[label] for label in raw.test_labels]
    chosen = [index for index, label in enumerate(labels) if label in known]
    targets = torch.tensor([known.index(labels[index]) for index in chosen])
    pixels = torch.from_numpy(raw.test[chosen]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(saved[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for name, outputs in (("detector", 5), ("classifier", 4)):
        model, feat_dim = (saved["arguments"][key] for key in ("model", "feat_dim"))
        network = models.ResNet(model, outputs, feat_dim)
        network.load_state_dict(saved[name])
    with torch.no_grad():
        _, logits = network.eval()((pixels - mean) / std)
    accuracy = 100 * (logits.argmax(1) == targets).double().mean().item()
    assert accuracy == pytest.approx(read(tmp_path)[0]["Acc"][0])
    assert accuracy > 30  # chance is 25


def test_same_seed_same_pickle_other_seed_another(forks, tmp_path):
    logs = []
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        arguments = [*TINY, "--max-query", "1", "--seed", seed, "--save-dir", f"{folder}/log_AL"]
        assert_ends_well(forks.run(tmp_path, LFOSA, *arguments, "--no-tensorboard"))
        logs.append(find(tmp_path / folder, "pkl").read_bytes())
        assert not (tmp_path / folder / "log_AL" / "tb").exists()
    assert logs[0] == logs[1] != logs[2]


MINE = """
import types, query_strategies
mine = types.ModuleType("mine")
exec('''
READS = ("logits",)
NEEDS_DETECTOR = {}
def query(outputs, count, generator):
    return outputs.logits[:, -1].argsort()[:count]
''', vars(mine))
query_strategies.STRATEGIES["mine"] = mine
"""


def test_a_strategy_of_ones_own(forks, tmp_path):
    for script, detector in itertools.product((BASELINE, LFOSA), (False, True)):
        arguments = [*UNTRAINED, "--query-strategy", "mine", "--overwrite"]
        ran = forks.run(tmp_path, script, *arguments, before=MINE.format(detector))
        if detector and script == BASELINE:
            assert_one_line(ran, "--query-strategy")
        else:
            assert_ends_well(ran)


def shell(folder, *command):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


ELSEWHERE = f"""
import runpy, signal, sys
del signal.SIGUSR1
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
sys.path[0] = {str(ROOT)!r}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_from_the_shell_to_the_figures(tmp_path):
    """Also in Python's development mode, for files that are left open, and without what only Unix
    has."""
    words, strict = ["--use-cpu", "--max-epoch=0", "--max-query=2"], ["-X", "dev"]
    strict += ["-W", "error::ResourceWarning"]
    ran = shell(tmp_path, *strict, ROOT / BASELINE, *words, "--query-strategy=random")
    assert ran.returncode == 0 and "ResourceWarning" not in ran.stderr, ran.stderr
    ran = shell(tmp_path, "-c", ELSEWHERE, ROOT / LFOSA, *words)
    assert ran.returncode == 0, ran.stderr
    ran = shell(tmp_path, ROOT / "plot.py")
    assert ran.returncode == 0, ran
    assert "| LfOSA" in ran.stdout and "| random" in ran.stdout
    names = {path.name for path in (tmp_path / "gifs" / "digits").iterdir()}
    measures = ("recall", "precision", "accuracy")
    assert names == {f"digits_resnet20_init20_known4_{measure}.png" for measure in measures}


def test_published_commands_and_defaults(parse, start):
    published = (
        "--gpu 0 --weight-cent 0 --init-percent 8 --known-class 20 --query-batch 1500 --seed 1 "
        "--model resnet18"
    ).split()
    name = "resnet18_cifar100_known20_init8_batch1500_seed1_uncertainty"
    words = [*published, "--query-strategy", "uncertainty"]
    assert start(False, "cifar100", *words).name() == name
    args = parse(False, *words, "--dataset", "cifar100", "--save-dir", "log_AL/")
    assert vars(parse(False, "--dataset", "cifar100")) == vars(args)  # they are the defaults
    training = (args.max_epoch, args.batch_size, args.lr_model, args.stepsize, args.gamma)
    assert training == (100, 128, 0.01, 20, 0.5)
    assert (args.max_query, args.feat_dim, args.weight_cent, args.lr_cent) == (10, 2, 0, 0.5)
    assert (args.amp, args.rotation, args.drop_unknown, args.augment_pool) == ("off", 1, 0, 0)

    words = [*published, *"--known-T 0.5 --unknown-T 0.5 --modelB-T 1".split()]
    words += ["--query-strategy", "AV_temperature"]
    name = f"temperature_{name.replace('uncertainty', 'AV_temperature')}"
    name += "_unknown_T0.5_known_T0.5_modelB_T1.0"
    assert start(True, "cifar100", *words).name() == name
    args = parse(True, *words, "--dataset", "cifar100")
    assert vars(parse(True, "--dataset", "cifar100")) == vars(args)


# The first known classes, as the later papers' codes list them.
LATER = {
    "cifar10": [8, 2, 7, 4, 3, 5],
    "cifar100": [27, 56, 53, 69, 57, 89, 77, 21, 37, 86, 51, 46, 30, 68, 49, 18, 20, 43, 54, 19],
    "TinyImagenet": [74, 38, 136, 85, 145, 132, 102, 91, 156, 97, 149, 143, 168, 11, 73, 181],
}


@pytest.mark.parametrize("dataset", LATER)
@pytest.mark.parametrize("protocol", ["EOAL", "EAOA"])
def test_a_protocol_sets_its_papers_classes_and_defaults(start, parse, dataset, protocol):
    first = LATER[dataset]
    words = ["--protocol", protocol, "--known-class", str(len(first)), "--query-strategy", "random"]
    run = start(False, dataset, *words)
    args = run.args
    assert list(run.data.classes[: len(first)]) == list(map(str, first))
    assert sorted(map(int, run.data.classes)) == list(range(PUBLIC[dataset]))
    set_by = (args.drop_unknown, args.feat_dim, args.stepsize, args.max_query, args.model)
    assert set_by == (True, 0, 60, 11, "resnet18-narrow")
    epochs, rotation = {"EOAL": (300, True), "EAOA": (200, False)}[protocol]
    assert (args.max_epoch, args.rotation) == (epochs, rotation)
    assert run.name().startswith(f"resnet18-narrow_{dataset}_known{len(first)}_")
    settings = run.name().partition("_random__")[2].split("_")
    assert len(settings) == 1 and protocol in settings[0]

    # A single flag overrides it, and shows in the name; another order of classes does as well.
    mine = "--max-epoch 7 --no-drop-unknown --rotation --class-seed 3 --stepsize 60".split()
    other = start(False, dataset, *words, *mine)
    assert (other.args.max_epoch, other.args.drop_unknown, other.args.rotation) == (7, False, True)
    assert other.data.classes != run.data.classes
    shown = [*settings, "max-epoch7", "no-drop-unknown", "class-seed3"]
    shown += ["rotation"] * (not rotation)
    assert sorted(other.name().partition("_random__")[2].split("_")) == sorted(shown)


@pytest.mark.parametrize("script", [BASELINE, LFOSA])
@pytest.mark.parametrize("dataset", DATASETS)
def test_help_names_every_default_in_75_lines(forks, parse, tmp_path, script, dataset):
    before = "import os; os.environ['COLUMNS'] = '100'"
    ran = forks.run(tmp_path, script, "--dataset", dataset, "--help", before=before)
    assert_ends_well(ran)
    assert len(ran.stdout.splitlines()) <= 75
    text = re.sub(r"\n {10,}", " ", ran.stdout)  # long texts go on in the next line
    for key, default in vars(parse(script == LFOSA, "--dataset", dataset)).items():
        default = "~/data" if default == os.path.expanduser("~/data") else default
        if key not in ("settings", "given") and not isinstance(default, bool | None):
            flag = "--" + key.replace("_", "-")
            assert re.search(rf"^  {flag} .*\(default: {default}\)$", text, re.MULTILINE), flag


def test_readme_names_what_there_is_and_its_commands_parse(parse):
    readme = (ROOT / "README.md").read_text()
    assert all(name in readme for name in (*STRATEGIES, *DATASETS))
    commands = re.findall(r"^python (AL_center\S*)(.*(?:\\\n.*)*)", readme, re.MULTILINE)
    assert len(commands) >= 2
    for script, arguments in commands:
        parse(script == LFOSA, *arguments.replace("\\\n", " ").split())


def test_many_known_classes_have_a_short_mark_of_their_own(parse):
    names, marks = [f"a class named {number}" for number in range(50)], set()
    for known in (names, names[1:], [*names[2:], "others"]):
        name = f"resnet18_cifar100_seed1_random{parse(False, '--known', ','.join(known)).settings}"
        assert len(name) < 100 and len(plot.parse_name(f"{name}.pkl").traits) == 1
        marks.add(name)
    assert len(marks) == 3


SHUFFLED = """
import torch
from experiment.run import Run
rounds = Run.rounds
def shuffled(run):
    for split in rounds(run):
        targets = run.data.targets.clone()
        targets[split.pool] = targets[split.pool[torch.randperm(len(split.pool))]]
        assert not targets.equal(run.data.targets)
        run.data = run.data._replace(targets=targets)
        yield split
Run.rounds = shuffled
"""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_strategy_sees_the_labels_of_the_pool(forks, tmp_path, strategy):
    """The first query of LfOSA's script is the same when the pool's labels are shuffled."""
    words = [*TINY, "--query-strategy", strategy, "--max-query", "1", "--overwrite"]
    queries = []
    for before in ("", SHUFFLED):
        assert_ends_well(forks.run(tmp_path, LFOSA, *words, before=before))
        queries.append(read(tmp_path)[1])
    assert queries[0] == queries[1]


def test_resumed_with_another_number_of_threads_it_goes_on_and_says_so(forks, tmp_path):
    words = [tmp_path, BASELINE, *UNTRAINED, "--resume"]
    assert_ends_well(forks.run(*words))
    alike = forks.run(*words)
    other = forks.run(*words, before="import torch; torch.set_num_threads(2)")
    for ran in (alike, other):
        assert_ends_well(ran)
        assert ("note" in ran.stdout) == (ran is other)


def test_a_notebooks_output_and_interruptions_are_left_as_they_were(monkeypatch):
    class Output:  # has no `reconfigure`
        write, flush = sys.stdout.write, sys.stdout.flush

    monkeypatch.setattr(sys, "stdout", Output())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        utils.run_script(lambda: None)
    assert end.value.code == 0 and signal.getsignal(signal.SIGINT) is before


def test_the_path_that_cannot_be_written_is_named(forks, tmp_path):
    (tmp_path / "log_AL").mkdir()
    (tmp_path / "log_AL" / "tb").write_text("a file of somebody else")
    assert_one_line(forks.run(tmp_path, BASELINE, *UNTRAINED), "log_AL/tb")


@pytest.mark.parametrize(("given", "threads"), [(None, 1), ("2", 2)])
def test_threads_follow_a_containers_quota(monkeypatch, tmp_path, given, threads):
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["script.py", "--use-cpu", "--save-dir", str(tmp_path)])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        utils.start("test", detector=False)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
