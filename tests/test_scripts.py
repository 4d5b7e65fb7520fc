"""Both scripts and the plot script, run as a shell would run them, on digits with tiny settings."""

import pickle
import re
import subprocess
import sys

import pytest
import torch
from forks import ROOT, Forks

import AL_center
import AL_center_temperature
import models
import plot
import utils
from datasets import DATASETS
from query_strategies import STRATEGIES, needs_detector

BASELINE, LFOSA = "AL_center.py", "AL_center_temperature.py"
TINY = ["--use-cpu", "--max-query", "2", "--max-epoch", "1", "--dataset", "digits"]
RUNS = [(LFOSA, name) for name in STRATEGIES]
RUNS += [(BASELINE, name) for name in STRATEGIES if not needs_detector(name)]


@pytest.fixture(scope="module")
def forks():
    with Forks() as server:
        yield server


def parse(monkeypatch, detector, *arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    return utils.parse_arguments("test", detector)


@pytest.mark.parametrize(("script", "strategy"), RUNS)
def test_every_strategy_in_both_scripts(forks, tmp_path, script, strategy):
    ran = forks.run(tmp_path, script, *TINY, "--query-strategy", strategy, "--mc-samples", "3")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""  # bars vanish where there is no terminal, and nothing warns

    (path,) = (tmp_path / "log_AL").glob("*.pkl")
    run = plot.parse_name(path.name)
    assert run.method.strategy == strategy
    assert run.group == plot.Group("digits", "resnet20", 4, "20", 60)
    assert (run.seed, run.method.temperatures is not None) == (1, script == LFOSA)

    log = pickle.loads(path.read_bytes())
    assert list(log) == ["Acc", "Err", "Precision", "Recall"]
    for measure in log.values():
        assert list(measure) == [0, 1]
        assert all(type(value) is float for value in measure.values())
    for q in (0, 1):
        assert log["Acc"][q] + log["Err"][q] == 100
    # 1,437 training images, 576 of them known, 115 labeled at the start; 60 queried
    found = [round(60 * log["Precision"][q]) for q in (0, 1)]
    known = 576
    assert log["Recall"][0] == pytest.approx((115 + found[0]) / known)
    assert log["Recall"][1] == pytest.approx((115 + sum(found)) / known)

    lines = [line for line in ran.stdout.splitlines() if line.startswith("round ")]
    assert len(lines) == 2
    assert "labeled 115 invalid 0 pool 1322" in lines[0]
    assert f"labeled {115 + found[0]} invalid {60 - found[0]} pool {1322 - found[0]}" in lines[1]
    for word in ("accuracy", "precision", "recall", "train", "evaluate", "query"):
        assert word in lines[1]
    text = path.with_suffix(".log").read_text()
    assert all(line in text for line in lines) and "'seed': 1" in text
    assert list((tmp_path / "log_AL" / "tb" / path.stem).glob("events*"))


@pytest.mark.parametrize("script", [AL_center, AL_center_temperature])
def test_each_network_has_its_images_its_temperatures_and_its_task(monkeypatch, tmp_path, script):
    """Round 1, after a round with labeled and invalid images."""
    lfosa = script is AL_center_temperature
    arguments = [*TINY, "--save-dir", str(tmp_path), "--no-tensorboard", "--resume"]
    if lfosa:
        arguments += ["--known-T", "1", "--unknown-T", "2", "--modelB-T", "3"]
    trained, used = [], {}

    def train(network, data, indices, args, generator, temperature=None, **hooks):
        trained.append((network, indices.tolist(), temperature))

    def watched(function):
        original = getattr(models, function)

        def replacement(network, *rest):
            used[function] = network
            return original(network, *rest)

        monkeypatch.setattr(models, function, replacement)

    def run(rounds):
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments, "--max-query", str(rounds)])
        script.main()

    run(1)
    (path,) = tmp_path.glob("*.pt")
    state = torch.load(path, weights_only=True)
    labeled, invalid = state["labeled"].tolist(), state["invalid"].tolist()
    assert labeled and invalid
    monkeypatch.setattr(models, "train", train)
    watched("score")
    watched("evaluate")
    run(2)
    if lfosa:
        detector, classifier = trained
        assert (sorted(detector[1]), detector[2]) == (sorted(labeled + invalid), [1, 1, 1, 1, 2])
        assert (sorted(classifier[1]), classifier[2]) == (sorted(labeled), [3, 3, 3, 3])
        assert detector[0].fc.out_features == 5 and classifier[0].fc.out_features == 4
    else:
        (classifier,) = trained
        detector = classifier
        assert (sorted(classifier[1]), classifier[2]) == (sorted(labeled), None)
    assert used == {"score": detector[0], "evaluate": classifier[0]}


def test_lfosa_finds_what_random_does_not(forks, tmp_path):
    recall = {}
    for script, strategy in ((BASELINE, "random"), (LFOSA, "AV_temperature")):
        arguments = ["--max-query", "3", "--max-epoch", "10", "--query-strategy", strategy]
        ran = forks.run(tmp_path, script, *TINY, *arguments, "--save-dir", strategy)
        assert ran.returncode == 0, ran.stderr
        (path,) = (tmp_path / strategy).glob("*.pkl")
        recall[strategy] = pickle.loads(path.read_bytes())["Recall"][2]
    # Seeds 1 to 3: 0.46, 0.47, 0.50 against 0.31, 0.29, 0.32. A perfect query would give 0.51.
    assert recall["AV_temperature"] > recall["random"] + 0.08


def test_same_seed_same_pickle_other_seed_another(forks, tmp_path):
    logs = []
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        arguments = [*TINY, "--seed", seed, "--save-dir", str(tmp_path / folder)]
        ran = forks.run(tmp_path, LFOSA, *arguments, "--no-tensorboard")
        assert ran.returncode == 0, ran.stderr
        (path,) = (tmp_path / folder).glob("*.pkl")
        logs.append(path.read_bytes())
        assert not (tmp_path / folder / "tb").exists()
    assert logs[0] == logs[1] != logs[2]


def test_from_the_shell_to_the_figures(tmp_path):
    for script, strategy in ((BASELINE, "random"), (LFOSA, "AV_temperature"), ("plot.py", "")):
        extra = [*TINY, "--query-strategy", strategy, "--max-epoch", "0", "--drop-unknown"]
        command = [sys.executable, ROOT / script, *(extra if strategy else [])]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (ran.returncode, ran.stderr) == (0, "")
    assert "| LfOSA |" in ran.stdout and "| random |" in ran.stdout
    assert "drop-unknown, max-epoch0" in ran.stdout or "max-epoch0, drop-unknown" in ran.stdout
    names = {path.name for path in (tmp_path / "gifs" / "digits").iterdir()}
    measures = ("recall", "precision", "accuracy")
    assert names == {f"digits_resnet20_init20_known4_{measure}.png" for measure in measures}


def test_published_commands_and_defaults(monkeypatch):
    published = (
        "--gpu 0 --save-dir log_AL/ --weight-cent 0 --init-percent 8 --known-class 20 "
        "--query-batch 1500 --seed 1 --model resnet18 --dataset cifar100"
    ).split()
    args = parse(monkeypatch, False, *published, "--query-strategy", "uncertainty")
    name = "resnet18_cifar100_known20_init8_batch1500_seed1_uncertainty"
    assert utils.run_name(args) == name
    short = parse(monkeypatch, False, "--dataset", "CIFAR100")
    assert vars(short) | {"save_dir": args.save_dir} == vars(args)  # they are the defaults
    training = (short.max_epoch, short.batch_size, short.lr_model, short.stepsize, short.gamma)
    assert training == (100, 128, 0.01, 20, 0.5)
    assert (short.max_query, short.feat_dim, short.lr_cent) == (10, 2, 0.5)

    temperatures = "--known-T 0.5 --unknown-T 0.5 --modelB-T 1".split()
    strategy = ["--query-strategy", "AV_temperature"]
    args = parse(monkeypatch, True, *published, *temperatures, *strategy)
    name = "temperature_resnet18_cifar100_known20_init8_batch1500_seed1_AV_temperature"
    assert utils.run_name(args) == f"{name}_unknown_T0.5_known_T0.5_modelB_T1.0"
    assert vars(parse(monkeypatch, True, "--dataset", "cifar100")) == vars(args) | {
        "save_dir": "log_AL"
    }
    assert parse(monkeypatch, True, "--dataset", "tinyimagenet").dataset == "TinyImagenet"
    digits = parse(monkeypatch, True)
    assert (digits.dataset, digits.known_class, digits.init_percent) == ("digits", 4, 20)
    assert (digits.query_batch, digits.max_epoch, digits.model) == (60, 40, "resnet20")


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-epoch", "7"],
        ["--feat-dim", "0"],
        ["--batch-size", "64"],
        ["--lr-model", "0.02"],
        ["--stepsize", "5"],
        ["--gamma", "0.1"],
        ["--weight-cent", "0.003"],
        ["--weight-cent", "0.003", "--lr-cent", "0.1"],
        ["--class-seed", "0"],
        ["--drop-unknown"],
        ["--augment-pool"],
        ["--amp", "bf16"],
        ["--query-strategy", "BALD", "--dropout", "0.25"],
        ["--query-strategy", "BALD", "--mc-samples", "5"],
        ["--known-T", "1"],
        ["--unknown-T", "2"],
        ["--modelB-T", "0.5"],
        ["--init-percent", "0.5"],
        ["--seed", "2"],
    ],
)
def test_another_experiment_has_another_name_that_plot_understands(monkeypatch, flags):
    usual = parse(monkeypatch, True, "--dataset", "cifar100")
    other = parse(monkeypatch, True, "--dataset", "cifar100", *flags)
    assert utils.run_name(other) != utils.run_name(usual)
    parsed = [plot.parse_name(utils.run_name(args) + ".pkl") for args in (usual, other)]
    assert parsed[0] != parsed[1]


def test_help_teaches_the_tool(forks, tmp_path):
    for script in (BASELINE, LFOSA):
        ran = forks.run(tmp_path, script, "--help")
        assert ran.returncode == 0
        text = " ".join(ran.stdout.split())
        for key in ("known_class", "init_percent", "query_batch", "max_epoch"):
            values = [f"{name} {dataset.defaults[key]}" for name, dataset in DATASETS.items()]
            assert f"(default: {', '.join(values)})" in text
        assert "--query-strategy" in text and "BALD" in text
        valued = [
            part for part in re.split(r"\n  (?=--)", ran.stdout) if re.match("--\\S+ [A-Z]", part)
        ]
        assert len(valued) > 20
        assert all("default: " in " ".join(part.split()) for part in valued)


def test_readme_lists_every_strategy_and_data_set_and_its_commands_parse(monkeypatch):
    readme = (ROOT / "README.md").read_text()
    tables = readme[readme.index("### Query strategies") : readme.index("## What differs")]
    for name in (*STRATEGIES, *DATASETS):
        assert f"\n| {name} |" in tables
    commands = [line for line in readme.splitlines() if line.startswith("python AL_center")]
    assert len(commands) >= 2
    for command in commands:
        _, script, *arguments = command.split()
        parse(monkeypatch, script == LFOSA, *arguments)
