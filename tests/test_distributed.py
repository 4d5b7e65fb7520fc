"""Several processes of torchrun: the batch of all, restarts, stops, and processes that fail.

Run by torchrun, this file is also the program of the processes: see `program`.
"""

import contextlib
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

import AL_center_temperature
import datasets
import models
import utils
from datasets.files import UserError
from models import parallel
from query_strategies import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
LFOSA = "AL_center_temperature.py"
TINY = ["--use-cpu", "--no-tensorboard", "--checkpoint-seconds", "0"]
RUN = [*TINY, "--max-query", "5", "--max-epoch", "5"]
POOLS = [1, 40, 64, 65, 200]  # images, in batches of 64: some ranks have none
BATCHES = [32, 7, 1]  # images: equal shares, unequal ones, and a rank without one
FIELDS = ("features", "logits", "mc_logits")


# ---- what is computed by one process, and by each of two ----------------------------------------


def arguments(*words):
    """Arguments as AL_center_temperature.py would have them."""
    sys.argv = [LFOSA, *TINY, *words]
    return utils.parse_arguments("test", detector=True)


def new_network(dropout=0.0):
    draws = utils.generator(1, "init")
    return models.create("resnet20", 5, 16, draws, torch.device("cpu"), dropout)


def predicted(data, size):
    """Outputs of given weights for the first `size` images."""
    network = new_network(dropout=0.5)
    masks = models.dropout_masks(network, 3, utils.generator(1, "masks"))
    images = torch.arange(size)
    return models.predict(network, data.train, images, FIELDS, eval_batch_size=64, masks=masks)


def selected(data, name, folder):
    """What strategy `name` queries, by an untrained network."""
    more = ["--max-epoch", "0", "--eval-batch-size", "64", "--save-dir", folder]
    args = arguments("--query-strategy", name, *more)
    run = utils.Run(args, torch.device("cpu"), data)
    network = run.train("detector", data.num_known + 1, run.split.labeled)
    return run.select(run.predict(network, run.split))


def trained(data, images, fixed_batchnorm):
    """Gradients, centers, loss and weights after one epoch of training on `images` images."""
    network, found = new_network(), {}
    for module in network.modules():
        if fixed_batchnorm and isinstance(module, torch.nn.BatchNorm2d):
            module.eval().train = lambda mode=True: None  # models.train switches to training

    def after_epoch(epochs, loss, snapshot):
        found.update(loss=torch.tensor(loss), **snapshot()["centers"])

    settings = {"max_epoch": 1, "batch_size": 32, "weight_cent": 0.1, "temperature": [0.5] * 5}
    train = data.train, data.targets, torch.arange(images), partial(utils.generator, 1)
    models.train(network, *train, after_epoch=after_epoch, **settings)
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return {"gradients": gradients | found, "state": network.state_dict()}


def computed(data, folder):
    network, test = new_network(), (data.test, data.test_targets)
    return {
        "accuracy": models.evaluate(network, *test, eval_batch_size=64),
        "predicted": {size: predicted(data, size) for size in POOLS},
        "selected": {name: selected(data, name, folder) for name in STRATEGIES},
        "steps": {images: trained(data, images, True)["gradients"] for images in BATCHES},
    }


def fail(kind, rank):
    """Fail in process `rank` alone, while the others wait for it."""
    parallel.setup_device(arguments())
    if parallel.rank() == int(rank):
        raise {"mend": UserError, "bug": ValueError}[kind](f"of rank {rank}")
    parallel.any_rank(False)


def program(folder):
    """What each of two processes does; the tests below judge what it finds."""
    device = parallel.setup_device(arguments())

    def reading():
        begin = time.monotonic()
        return datasets.create("digits", "", device), (begin, time.monotonic())

    data, times = parallel.one_first(reading)
    found = {"reading": times, **computed(data, f"{folder}/selected")}
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

    def __init__(self, folder, *words, **env):
        # TMPDIR: torchrun leaves its logs there.
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
        self.output = Path(folder, f"output{time.monotonic_ns()}")
        with open(self.output, "w") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": ROOT}
            command = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
            self.process = subprocess.Popen(command, env=os.environ | env, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [*self.workers().values(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def workers(self):
        """Process ids by rank."""
        found = {}
        with contextlib.suppress(OSError):  # ended in between
            parent = self.process.pid
            for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
                rank = re.search(r"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_text())
                found |= {int(rank[1]): int(pid)} if rank else {}
        return found

    def until(self, condition):
        """Wait until `condition` holds."""
        end = time.monotonic() + 200
        while not condition():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < end, self.output.read_text()
            time.sleep(0.02)

    def wait(self):
        """Exit status and output."""
        return self.process.wait(200), self.output.read_text()


def read(folder, suffix):
    (path,) = folder.glob(f"*{suffix}")
    return path.read_bytes()


def inside_round(folder, done):
    """Whether `done` rounds or more are done, and a network is under training."""
    for path in folder.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        return state["round"] >= done and state["training"] is not None


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes find, and where they left a run that was stopped by SIGTERM."""
    folder = tmp_path_factory.mktemp("pair")
    with Torchrun(folder, "--standalone", "--nproc-per-node=2", __file__, folder) as torchrun:
        torchrun.until(lambda: inside_round(folder / "stopped", 1))
        torchrun.process.send_signal(signal.SIGTERM)
        _, output = torchrun.wait()
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return folder, output, ranks


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The same of this process."""
    data = datasets.create("digits", "", torch.device("cpu"))
    return computed(data, str(tmp_path_factory.mktemp("single")))


# ---- two processes compute what one does --------------------------------------------------------


@pytest.mark.parametrize("size", POOLS)
def test_outputs_equal_those_of_one_process(pair, single, size):
    ranks = [rank["predicted"][size] for rank in pair[2]]
    for field in FIELDS:
        assert torch.equal(ranks[0][field], single["predicted"][size][field]), field
        assert ranks[1][field] is None  # only rank 0 needs memory for the pool
    assert len({found["accuracy"] for found in [single, *pair[2]]}) == 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_selects_the_same_images_as_in_one_process(pair, single, name):
    for rank in pair[2]:
        assert torch.equal(rank["selected"][name], single["selected"][name])


@pytest.mark.parametrize("images", BATCHES)
def test_gradients_are_those_of_the_batch_of_all_processes(pair, single, images):
    expected = single["steps"][images]
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    for rank in pair[2]:
        for name, gradient in expected.items():
            assert (rank["steps"][images][name] - gradient).abs().max() < 1e-5, name


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 5, 14, 32])
def test_the_average_over_ranks_is_the_mean_over_the_batch(monkeypatch, processes, batch):
    values = torch.randn(100 + batch, dtype=torch.float64)
    monkeypatch.setattr(parallel, "world", lambda: processes)
    losses = []
    for rank in range(processes):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        share, weight = parallel.share(100, 100 + batch)
        assert len(values[share]) in (max(1, batch // processes), batch // processes + 1)
        losses.append(values[share].sum() * weight)
    torch.testing.assert_close(sum(losses) / processes, values[100:].mean())


def test_ranks_end_training_with_the_same_weights_and_statistics(pair):
    states = [rank["state"] for rank in pair[2]]
    for name, tensor in states[0].items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, states[1][name]), name


def test_one_process_reads_the_data_first_and_all_hear_of_a_signal(pair):
    (_, end), (begin, _) = (rank["reading"] for rank in pair[2])
    assert end <= begin
    assert all(rank["any"] == [True, False] for rank in pair[2])


# ---- a run that is stopped, killed and restarted ends with the same bytes -----------------------


def stopped_well(folder, output):
    """Assert that a run has been stopped after an epoch, and that one line says how it goes on."""
    state = torch.load(next(folder.glob("*.pt")), weights_only=True)
    assert len(pickle.loads(read(folder, ".pkl"))["Acc"]) == state["round"] < 5
    (line,) = (line for line in output.splitlines() if line.startswith("stopped"))
    assert "torchrun" in line


def test_stopped_killed_and_restarted_the_log_is_that_of_an_uninterrupted_run(pair, tmp_path):
    folder, output, _ = pair
    run, whole = folder / "stopped", folder / "whole"
    assert output.count("finished after 5 rounds") == 1  # of the uninterrupted run, by rank 0 alone
    stopped_well(run, output)  # by SIGTERM
    words = [LFOSA, *RUN, "--save-dir", run, "--resume"]

    # A killed process is restarted; SIGUSR1, Slurm's before a time limit, stops the run.
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    options += ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]
    with Torchrun(tmp_path, *options, *words) as torchrun:
        torchrun.until(lambda: inside_round(run, 2))
        os.kill(torchrun.workers()[1], signal.SIGKILL)
        torchrun.until(lambda: inside_round(run, 3))
        torchrun.process.send_signal(signal.SIGUSR1)
        stopped_well(run, torchrun.wait()[1])

    # One process goes nowhere with it.
    alone = [sys.executable, *map(str, words)]
    refused = subprocess.run(alone, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "processes" in refused.stderr
    assert refused.stderr.count("\n") == 1

    # Two machines, of which each has its own torchrun.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d"]
    options.append(f"--rdzv-endpoint=127.0.0.1:{port}")
    machine = partial(Torchrun, tmp_path, *options, *words, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with machine() as one, machine() as two:
        one.until(lambda: inside_round(run, 4) and one.workers() and two.workers())
        os.kill((one.workers() | two.workers())[1], signal.SIGKILL)
        ended = one.wait(), two.wait()
    assert [status for status, _ in ended] == [0, 0], ended

    for suffix in (".pkl", ".queries.json"):
        assert read(run, suffix) == read(whole, suffix)


# ---- processes that fail ------------------------------------------------------------------------


DIVERGES = [LFOSA, *TINY, "--lr-model", "1e30", "--save-dir"]  # in all processes alike
MEND, BUG = [[__file__, kind, "1"] for kind in ("mend", "bug")]  # in the second one alone


@pytest.mark.parametrize(
    ("words", "text"), [(DIVERGES, "training diverged"), (MEND, "of rank 1"), (BUG, "of rank 1")]
)
def test_a_process_that_fails_tells_it_in_one_line_and_ends_all(tmp_path, words, text):
    more = [tmp_path] if words == DIVERGES else []
    with Torchrun(tmp_path, "--standalone", "--nproc-per-node=2", *words, *more) as torchrun:
        status, output = torchrun.wait()
    assert status != 0
    (told,) = set(re.findall(r"(?:error|Error): (.+)", output))  # ChildFailedError says no more
    assert told.startswith(text)


def as_of_torchrun(monkeypatch, rank=0, **env):
    """The environment of one of two processes that torchrun starts on a machine."""
    env = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **env}
    for name, value in {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)


def test_what_a_cluster_sets_without_torchrun_is_not_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    parallel.setup_device(arguments())
    assert (parallel.rank(), parallel.world()) == (0, 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_tells_a_mistyped_argument(monkeypatch, capsys, rank):
    as_of_torchrun(monkeypatch, rank)
    with pytest.raises(SystemExit) as ended:
        arguments("--seed", "x")
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1 - rank


@pytest.mark.parametrize("words", ["--gpu 0", "--gpu 0,0", "--gpu 0,2", "--gpu 0,1,0", "--compile"])
def test_refused_under_torchrun(monkeypatch, words):
    """--gpu must name one of two devices for each process."""
    as_of_torchrun(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "gpu" in words)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = arguments(*words.split())
    args.use_cpu = False
    with pytest.raises(UserError, match=words.split()[0]):
        parallel.setup_device(args)


def test_several_machines_that_could_not_be_restarted_are_refused(monkeypatch):
    elastic = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    as_of_torchrun(monkeypatch, GROUP_WORLD_SIZE="2", **elastic)
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        parallel.setup_device(arguments())


def test_synchronised_batch_norm_can_be_folded():
    """CUDA ranks train with it, and predict as any other network."""
    network = new_network().eval()
    images = torch.rand(3, 3, 8, 8)
    with torch.inference_mode():
        expected = network(images)[1]
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        logits = models.resnet.fold_batchnorm(network)(images)[1]
    torch.testing.assert_close(logits, expected)


if __name__ == "__main__":
    sys.argv, words = [LFOSA], sys.argv[1:]
    utils.run_script(partial(program, *words) if len(words) == 1 else partial(fail, *words))
