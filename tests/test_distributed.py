"""Several processes of torchrun: the batch of all, restarts, stops, and processes that fail.

Run by torchrun, this file is also the program of the processes: see `program`.
"""

import itertools
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from forks import LFOSA, ROOT, SMALL, TORCHRUN, assert_one_line
from test_interruptions import OWN_LOSS

import AL_center_temperature
import datasets
import models
import utils
from errors import UserError
from experiment.run import Run, generator
from models import CenterLoss, Objective, Settings, parallel
from query_strategies import STRATEGIES

TINY = ["--use-cpu", "--no-tensorboard", "--checkpoint-seconds", "0"]
RUN = [*TINY, *SMALL, *"--max-query 6 --max-epoch 8 --batch-size 16".split()]
TWO = ["--standalone", "--nproc-per-node=2"]
POOLS = [1, 64, 65, 200]  # images, in batches of 64: some ranks have none
BATCHES = [32, 7, 1]  # images: equal shares, unequal ones, and a rank without one
FIELDS = ("features", "logits", "mc_logits")
SELECTED = ("Coreset", "OpenMax", "BALD")  # together they read every field


# ---- what is computed by one process, and by each of two ----------------------------------------


def arguments(*words):
    """Arguments as AL_center_temperature.py would have them."""
    sys.argv = [LFOSA, *TINY, *words]
    return utils.parse_arguments("test", detector=True)


def new_network(dropout=0.0):
    draws = generator(1, "init")
    return models.create("resnet20", 5, 16, draws, torch.device("cpu"), dropout)


def predicted(data, size):
    """Outputs of given weights for the first `size` images."""
    network = new_network(dropout=0.5)
    masks = models.dropout_masks(network, 3, generator(1, "masks"))
    images, settings = torch.arange(size), Settings(eval_batch_size=64)
    return models.predict(network, data.train, images, FIELDS, settings, masks)


def selected(data, name, folder):
    """What strategy `name` queries, by an untrained network."""
    more = ["--max-epoch", "0", "--eval-batch-size", "64", "--save-dir", folder]
    args = arguments("--query-strategy", name, *more)
    run = Run(args, torch.device("cpu"), data, detector=True)
    detector = run.train("detector", data.num_known + 1, run.split.labeled)
    return run.query(run.split._replace(pool=run.split.pool[:301]), detector, detector)


def trained(data, images, fixed_batchnorm):
    """Gradients, centers, loss and weights after one epoch of training on `images` images."""
    network, known = new_network(), data.num_known
    for module in network.modules():
        if fixed_batchnorm and isinstance(module, torch.nn.BatchNorm2d):
            module.eval().train = lambda mode=True: None  # models.train switches to training
    shape, draws = (known, network.feature_dim), partial(generator, 1)
    objective = CenterLoss(Objective([0.5] * (known + 1)), shape, 0.1, 0.5, draws("centers"))
    inputs = data.train, data.targets, torch.arange(images), draws
    settings = Settings(max_epoch=1, batch_size=32)
    ((_, loss, _),) = models.train(network, objective, *inputs, settings)
    found = {name: p.grad for name, p in network.named_parameters()}
    found |= {"loss": torch.tensor(loss), **objective.state_dict()}
    return {"step": found, "state": network.state_dict()}


def computed(data, folder):
    test = data.test, data.test_targets, Settings(eval_batch_size=64)
    return {
        "accuracy": models.evaluate(new_network(), *test),
        "predicted": {size: predicted(data, size) for size in POOLS},
        "selected": {name: selected(data, name, folder) for name in SELECTED},
        "steps": {images: trained(data, images, True)["step"] for images in BATCHES},
    }


def fail():
    """Fail in the second process alone, while the first waits for it."""
    parallel.setup_device(arguments())
    if parallel.rank() == 1:
        raise UserError("of rank 1")
    parallel.any_rank(False)


def program(folder):
    """What each of two processes does; the tests below judge what it finds."""
    device = parallel.setup_device(arguments())
    data = datasets.create("digits", None, device, datasets.KnownClasses(4))
    STRATEGIES["OpenMax"].describe = lambda outputs: f"{len(outputs.logits)} images"
    found = computed(data, f"{folder}/selected")
    found["any"] = [parallel.any_rank(parallel.rank() == 1), parallel.any_rank(False)]
    # Batches of 32 and 1: the last step's stand-in image must not leave its batch statistics.
    found["state"] = trained(data, 33, False)["state"]
    torch.save(found, f"{folder}/{parallel.rank()}.pt")
    parallel.setup_device = lambda args: device  # it has joined the other one already
    for name in ("whole", "stopped"):  # the test stops the second one
        sys.argv = [LFOSA, *RUN, "--save-dir", f"{folder}/{name}"]
        AL_center_temperature.main()


# ---- starting, watching and ending torchrun -----------------------------------------------------


class Torchrun:
    """torchrun with the given words in a `with`, which ends all its processes."""

    def __init__(self, forks, folder, *words, before=""):
        before += "\nimport os, tempfile; tempfile.tempdir = os.getcwd()"  # of torchrun's logs
        self.forks, self.pid = forks, forks.start(folder, TORCHRUN, *words, before=before)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pid:
            for pid in [*self.workers().values(), self.pid]:
                os.kill(pid, signal.SIGKILL)
            print(self.ended())

    def workers(self):
        """Process ids by name, rank0 or rank1."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return {Path(f"/proc/{pid}/comm").read_text().strip(): int(pid) for pid in children}

    def ended(self):
        """Wait for its end."""
        pid, self.pid = self.pid, None
        return self.forks.wait(pid)


def until(condition):
    """Wait until `condition` holds."""
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def read(folder, suffix):
    (path,) = folder.glob(f"*{suffix}")
    return path.read_bytes()


def inside_round(folder, done):
    """Whether `done` rounds or more are done, and a network is under training."""
    for path in folder.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        unfinished = any("scheduler" in network for network in state["networks"].values())
        return state["round"] >= done and unfinished


@pytest.fixture(scope="module")
def pair(forks, tmp_path_factory):
    """What two processes find, and where they left a run that was stopped by SIGTERM."""
    folder = tmp_path_factory.mktemp("pair")
    with Torchrun(forks, folder, *TWO, __file__, folder) as torchrun:
        until(lambda: inside_round(folder / "stopped", 1))
        os.kill(torchrun.pid, signal.SIGTERM)
        ran = torchrun.ended()
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return folder, ran.stdout, ranks


# ---- two processes compute what one does --------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What this process alone computes."""
    folder = str(tmp_path_factory.mktemp("single"))
    data = datasets.create("digits", None, torch.device("cpu"), datasets.KnownClasses(4))
    return computed(data, folder)


def test_outputs_equal_those_of_one_process(pair, single):
    for size, field in itertools.product(POOLS, FIELDS):
        first, second = (rank["predicted"][size][field] for rank in pair[2])
        assert torch.equal(first, single["predicted"][size][field]), (size, field)
        assert second is None  # only rank 0 needs memory for the pool
    assert len({found["accuracy"] for found in [single, *pair[2]]}) == 1


def test_selections_equal_those_of_one_process(pair, single):
    for name, rank in itertools.product(SELECTED, pair[2]):
        assert torch.equal(rank["selected"][name], single["selected"][name]), name


def test_all_hear_of_a_signal_to_one(pair):
    assert all(rank["any"] == [True, False] for rank in pair[2])


@pytest.mark.parametrize("images", BATCHES)
def test_gradients_and_centers_are_those_of_the_batch_of_all_processes(pair, single, images):
    expected = single["steps"][images]
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    for rank in pair[2]:
        for name, gradient in expected.items():
            assert (rank["steps"][images][name] - gradient).abs().max() < 1e-5, name


@pytest.mark.parametrize("processes", [1, 3, 7])
@pytest.mark.parametrize("batch", [1, 5, 32])
def test_the_average_over_ranks_is_the_mean_over_the_batch(monkeypatch, processes, batch):
    values, losses = torch.randn(100 + batch, dtype=torch.float64), []
    monkeypatch.setattr(parallel, "world", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        share, weight = parallel.share(100, 100 + batch)
        losses.append(values[share].sum() * weight)
    torch.testing.assert_close(sum(losses) / processes, values[100:].mean())


def test_ranks_end_training_with_the_same_weights_and_statistics(pair):
    states = [rank["state"] for rank in pair[2]]
    for name, tensor in states[0].items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, states[1][name]), name


# ---- a run that is stopped, killed and restarted ends with the same bytes -----------------------


def stopped_well(folder, output):
    """Assert that a run has been stopped after an epoch, and that one line says how it goes on."""
    state = torch.load(next(folder.glob("*.pt")), weights_only=True)
    assert len(pickle.loads(read(folder, ".pkl"))["Acc"]) == state["round"] < 6
    (line,) = (line for line in output.splitlines() if line.startswith("stopped"))
    assert "torchrun" in line


def test_stopped_killed_and_restarted_the_log_is_that_of_an_uninterrupted_run(
    forks, pair, tmp_path
):
    folder, output, _ = pair
    run, whole = folder / "stopped", folder / "whole"
    assert output.count("finished after 6 rounds") == 1  # of the uninterrupted run, by rank 0 alone
    stopped_well(run, output)  # by SIGTERM
    words = [*RUN, "--save-dir", run, "--resume"]

    # A killed process is restarted; SIGUSR1, Slurm's before a time limit, stops the run.
    options = [*TWO, "--max-restarts=1", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]
    with Torchrun(forks, tmp_path, *options, ROOT / LFOSA, *words) as torchrun:
        until(lambda: inside_round(run, 2))
        os.kill(torchrun.workers()["rank1"], signal.SIGKILL)
        until(lambda: inside_round(run, 3))
        os.kill(torchrun.pid, signal.SIGUSR1)
        stopped_well(run, torchrun.ended().stdout)

    # One process goes nowhere with it.
    assert_one_line(forks.run(tmp_path, LFOSA, *words), "processes")

    # Two machines, of which each has its own torchrun.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d"]
    options += [f"--rdzv-endpoint=127.0.0.1:{port}", ROOT / LFOSA, *words]
    before = "import os; os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'"
    machine = partial(Torchrun, forks, tmp_path, *options, before=before)
    with machine() as one, machine() as two:
        until(lambda: inside_round(run, 4) and one.workers() and two.workers())
        os.kill((one.workers() | two.workers())["rank1"], signal.SIGKILL)
        ended = one.ended(), two.ended()
    assert [ran.returncode for ran in ended] == [0, 0], ended

    for suffix in (".pkl", ".queries.json"):
        assert read(run, suffix) == read(whole, suffix)


# ---- processes that fail ------------------------------------------------------------------------


def told(ran):
    """The line of whoever failed; it ended all. ChildFailedError says no more."""
    assert ran.returncode != 0
    (line,) = set(re.findall(r"(?:error|Error): (.+)", ran.stdout + ran.stderr))
    return line


def test_a_run_that_diverges_tells_it_in_one_line(forks, tmp_path):
    with Torchrun(forks, tmp_path, *TWO, ROOT / LFOSA, *RUN, "--lr-model", "1e30") as torchrun:
        assert "diverged" in told(torchrun.ended())


def test_a_process_that_fails_alone_ends_all(tmp_path):
    """Started from a shell: no fork."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "torch.distributed.run", *TWO, __file__]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "of rank 1" in told(ran)


def of_torchrun(rank):
    """The environment of one of two processes that torchrun starts on a machine."""
    env = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def setenv(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def test_what_a_cluster_sets_without_torchrun_is_not_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    parallel.setup_device(arguments())
    assert (parallel.rank(), parallel.world()) == (0, 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_tells_a_mistyped_argument(monkeypatch, capsys, rank):
    setenv(monkeypatch, of_torchrun(rank))
    with pytest.raises(SystemExit) as ended:
        arguments("--seed", "x")
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1 - rank


SEVERAL = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
SEVERAL["TORCHELASTIC_MAX_RESTARTS"] = "3"
REFUSED = {  # arguments and surroundings
    "--compile": ["--compile"],
    "--gpu": ["--gpu", "2"],
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1": [],
}


@pytest.mark.parametrize("strategy", OWN_LOSS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_method_for_one_process_is_refused_before_any_file_is_written(
    forks, tmp_path, strategy, rank
):
    before = f"import os; os.environ.update({of_torchrun(rank)})"
    ran = forks.run(tmp_path, LFOSA, *RUN, "--query-strategy", strategy, before=before)
    assert_one_line(ran, strategy, "torchrun")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", REFUSED)
def test_refused_under_torchrun(monkeypatch, part):
    """Of two devices the third is wanted; several machines could not be restarted."""
    setenv(monkeypatch, of_torchrun(0) | SEVERAL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: part == "--gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = arguments(*REFUSED[part])
    args.use_cpu = False
    with pytest.raises(UserError, match=part):
        parallel.setup_device(args)


if __name__ == "__main__":
    sys.argv, folder = [LFOSA], sys.argv[1:]
    utils.run_script(partial(program, *folder) if folder else fail)
