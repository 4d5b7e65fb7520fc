"""Two processes of torchrun against one, and the grid of runs that --help shows.

Run by torchrun, this file is also the program of the two processes: see `checks`.
"""

import contextlib
import itertools
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import AL_center
import AL_center_temperature
import models
import utils
from datasets import DataError
from models import parallel
from query_strategies import STRATEGIES, select

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TINY = ["--use-cpu", "--no-tensorboard", "--dataset", "digits", "--checkpoint-epochs", "2"]
RUN = ["--max-query", "4", "--max-epoch", "6", *TINY]
POOLS = [1, 40, 64, 65, 200]  # images, in batches of 64
BATCHES = [32, 7, 1]  # images: equal shares, unequal ones, and one rank without
FIELDS = ("features", "logits", "mc_logits")


# ---------------------------------------------------------------------------------------------
# What is computed by one process, and by each of two


def arguments(*words):
    """Arguments as AL_center_temperature.py would have them."""
    before, sys.argv = sys.argv, ["AL_center_temperature.py", *TINY, *words]
    try:
        return utils.parse_arguments("test", detector=True)
    finally:
        sys.argv = before


def new_network(dropout=0.0):
    create = partial(models.create, "resnet20", 5, 16)
    return create(utils.generator(1, "init"), torch.device("cpu"), dropout)


def scored(data):
    """Pool outputs and queries of given weights, by pool size."""
    args = arguments("--eval-batch-size", "64")
    network = new_network(dropout=0.5)
    masks = models.dropout_masks(network, 3, utils.generator(1, "masks"))
    found = {"accuracy": models.evaluate(network, data, args)}
    for size in POOLS:
        outputs = models.score(network, data.train, torch.arange(size), args, FIELDS, masks)
        queries = {}
        for name in STRATEGIES:
            draws = utils.generator(1, name)
            query = partial(select, name, outputs, 20, draws)
            queries[name] = parallel.from_rank0(query)
        found[size] = {field: getattr(outputs, field) for field in FIELDS}, queries
    return found


def trained(data, images, fixed_batchnorm):
    """Gradients, centres, loss and weights after one epoch of training on `images` images."""
    args = arguments("--max-epoch", "1", "--weight-cent", "0.1", "--batch-size", "32")
    network = new_network()
    for module in network.modules():
        if fixed_batchnorm and isinstance(module, torch.nn.BatchNorm2d):
            module.eval().train = lambda mode=True: None  # models.train switches to training
    found = {}

    def pause(epochs, snapshot):
        if epochs:
            found["centers"] = snapshot()["centers"]["centers"].clone()

    hooks = {"pause": pause, "report": lambda epochs, loss: found.update(loss=torch.tensor(loss))}
    draws = partial(utils.generator, 1)
    models.train(network, data, torch.arange(images), args, draws, [0.5] * 4 + [0.7], **hooks)
    gradients = {name: p.grad for name, p in network.named_parameters()}
    return {"gradients": gradients | found, "state": network.state_dict()}


def computed(data):
    steps = {images: trained(data, images, True)["gradients"] for images in BATCHES}
    return {"scored": scored(data), "steps": steps}


def checks(folder):
    """The program of each of the two processes; what it finds is judged by the tests below."""
    args = arguments()
    device = utils.setup_device(args)
    found = {}

    def caught(call):
        try:
            return call()
        except Exception as error:
            return type(error).__name__, str(error)

    def fail_on(rank):
        if parallel.rank() == rank:
            raise DataError(f"of rank {rank}")

    def reading():
        begin = time.monotonic()
        data = utils.datasets.create("digits", "", 4, None, device)
        return begin, time.monotonic(), data

    *found["reading"], data = parallel.one_first(reading)
    found["from rank 0"] = caught(lambda: parallel.from_rank0(lambda: fail_on(0)))
    found["first fails"] = caught(lambda: parallel.one_first(lambda: fail_on(0)))
    found["other fails"] = caught(lambda: parallel.one_first(lambda: fail_on(1)))
    found["any"] = [parallel.any_rank(parallel.rank() == 1), parallel.any_rank(False)]
    found |= computed(data)
    # Batches of 32 and 1: the last step's stand-in image must not leave its batch statistics.
    found["state"] = trained(data, 33, False)["state"]

    def run(script, name, words):
        sys.argv = [f"{script.__name__}.py", *words, "--save-dir", f"{folder}/{name}"]
        return script.main

    run(AL_center, "baseline", [*TINY, "--max-query", "1", "--max-epoch", "1"])()
    run(AL_center_temperature, "whole", RUN)()
    torch.save(found, f"{folder}/{parallel.rank()}.pt")
    # And a run that the test stops.
    utils.run_script(run(AL_center_temperature, "broken", [*RUN, "--overwrite"]))


# ---------------------------------------------------------------------------------------------
# Starting, watching and ending torchrun


class Torchrun:
    """torchrun with the given words in a `with`, which ends all its processes."""

    def __init__(self, folder, words):
        self.mark = f"TEST_DISTRIBUTED={folder}/{time.monotonic_ns()}"  # known to its processes
        name, value = self.mark.split("=")
        env = {**os.environ, name: value, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        env["TMPDIR"] = str(folder)  # torchrun leaves its logs there
        self.output = Path(folder, "output")
        with open(self.output, "w") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": env}
            self.process = subprocess.Popen([*TORCHRUN, *words], **options)

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
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                words = path.read_text(errors="replace").split("\0")
                if self.mark in words:
                    found |= {int(w[5:]): int(path.parts[2]) for w in words if w[:5] == "RANK="}
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


def log_of(folder):
    (path,) = folder.glob("*.pkl")
    return pickle.loads(path.read_bytes())


def text_of(folder):
    """NAME.log, which has a line for every round done; empty where it is not there yet."""
    return "".join(path.read_text() for path in folder.glob("*.log"))


def inside_round(folder, done):
    """Whether `done` rounds or more are done, and a network is under training."""
    if f"round {done - 1} " not in text_of(folder):
        return False
    (path,) = folder.glob("*.pt")
    state = torch.load(path, weights_only=True)
    return state["round"] >= done and state["training"] is not None


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes find, and where they left a run that was stopped by SIGTERM."""
    folder = tmp_path_factory.mktemp("pair")
    words = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", __file__, str(folder)]
    with Torchrun(folder, words) as torchrun:
        torchrun.until(lambda: inside_round(folder / "broken", 1))
        torchrun.process.send_signal(signal.SIGTERM)
        _, output = torchrun.wait()
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return folder, output, ranks


@pytest.fixture(scope="module")
def single():
    """The same of this process, with as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield computed(utils.datasets.create("digits", "", 4, None, torch.device("cpu")))
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------
# Two processes


@pytest.mark.parametrize("size", POOLS)
def test_pool_outputs_and_queries_equal_those_of_one_process(pair, single, size):
    outputs, queries = single["scored"][size]
    ranks = [rank["scored"][size] for rank in pair[2]]
    for field in FIELDS:
        assert torch.equal(ranks[0][0][field], outputs[field]), field
        assert ranks[1][0][field] is None  # only rank 0 needs memory for the pool
    for name in STRATEGIES:
        for rank in ranks:
            assert torch.equal(rank[1][name], queries[name]), name


def test_accuracy_equals_that_of_one_process(pair, single):
    accuracies = {found["scored"]["accuracy"] for found in [single, *pair[2]]}
    assert len(accuracies) == 1


@pytest.mark.parametrize("images", BATCHES)
def test_gradients_of_a_global_batch_equal_those_of_one_process(pair, single, images):
    expected = single["steps"][images]
    assert expected["loss"] > 0
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    for rank in pair[2]:
        for name, gradient in expected.items():
            assert (rank["steps"][images][name] - gradient).abs().max() < 1e-5, name


def test_ranks_end_training_with_the_same_weights_and_statistics(pair):
    states = [rank["state"] for rank in pair[2]]
    for name, tensor in states[0].items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensor, states[1][name]), name


def test_errors_reach_every_rank_and_one_reads_the_data_first(pair):
    first, other = pair[2]
    assert first["reading"][1] <= other["reading"][0]  # its end, the other's begin
    for name in ("from rank 0", "first fails"):
        assert first[name] == ("DataError", "of rank 0")
        assert other[name] == ("Elsewhere", "of rank 0")
    assert first["other fails"] == ("Elsewhere", "of rank 1")
    assert other["other fails"] == ("DataError", "of rank 1")
    assert first["any"] == other["any"] == [True, False]


def test_only_rank_0_writes(pair):
    folder, output, _ = pair
    assert len(list((folder / "baseline").iterdir())) == 3  # .pkl, .log, .pt
    assert list(log_of(folder / "whole")["Acc"]) == [0, 1, 2, 3]
    assert output.count("finished after 4 rounds") == 1


def test_stopped_by_sigterm_killed_and_restarted(pair, tmp_path):
    """Stopped in a round; its own command goes on; a rank is killed in one; all is there."""
    folder, output, _ = pair
    (command,) = re.findall("stopped; go on with: (.*)", output)
    checkpoint = torch.load(next((folder / "broken").glob("*.pt")), weights_only=True)
    assert 0 < checkpoint["round"] < 4
    assert list(log_of(folder / "broken")["Acc"]) == list(range(checkpoint["round"]))
    if checkpoint["training"]:  # all ranks stopped after the same epoch
        assert checkpoint["training"]["step"] == 0

    program, *words = shlex.split(command)
    assert program == "torchrun"
    assert words[:3] == ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    with Torchrun(tmp_path, words) as torchrun:
        torchrun.until(lambda: text_of(folder / "broken").count("processes=2") == 2)
        torchrun.until(lambda: inside_round(folder / "broken", 2))
        os.kill(torchrun.workers()[1], signal.SIGKILL)
        status, output = torchrun.wait()
    assert status == 0, output
    assert text_of(folder / "broken").count("processes=2") == 3  # starts
    assert log_of(folder / "broken") == log_of(folder / "whole")


def test_a_loss_that_diverges_ends_all_ranks_with_one_line(tmp_path):
    words = ["--standalone", "--nproc-per-node=2", "AL_center.py", *TINY, "--lr-model", "1e30"]
    with Torchrun(tmp_path, [*words, "--max-epoch", "2", "--save-dir", str(tmp_path)]) as torchrun:
        status, output = torchrun.wait()
    assert status != 0
    ours = [line for line in output.splitlines() if line.startswith("AL_center.py: ")]
    assert len(ours) == 1
    assert ours[0].startswith("AL_center.py: error: the training loss became nan in epoch 1")
    assert str(ROOT / "models") not in output  # no traceback of ours


# ---------------------------------------------------------------------------------------------
# What needs no second process


def test_a_restart_takes_nothing_from_the_processes_before():
    """torchrun's store goes on holding what a killed process said last."""
    store = dist.HashStore()
    store.set("hello 1", "of a process that is dead")
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(parallel._store_of_this_start, store, 0, 2)
        time.sleep(0.1)  # rank 0 answers the dead one, and waits on
        assert not first.done()
        other = threads.submit(parallel._store_of_this_start, store, 1, 2)
        first.result(10).set("address", "new")
        assert other.result(10).get("address") == b"new"
    assert not store.check(["address"])


def test_synchronised_batch_norm_can_be_folded():
    """What CUDA ranks train is scored as any other network; their batch norm runs on CUDA only."""
    network = new_network().eval()
    images = torch.rand(3, 3, 8, 8)
    with torch.inference_mode():
        expected = network(images)[1]
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        assert isinstance(network.bn1, torch.nn.SyncBatchNorm)
        logits = models.resnet.fold_batchnorm(network)(images)[1]
    torch.testing.assert_close(logits, expected)


LOST = "[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:25509"


def as_of_torchrun(monkeypatch, rank):
    """The environment of one of two processes that it starts."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")


def test_what_a_cluster_sets_without_torchrun_is_not_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert utils.setup_device(arguments()) == torch.device("cpu")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("rank", "world", "error", "status", "line"),
    [
        (0, 1, DataError("x"), 2, "error: x"),  # before the ranks join: one per machine tells
        (1, 1, DataError("x"), 2, ""),
        (0, 2, DataError("x"), 2, "error: x"),
        (1, 2, DataError("x"), 2, "error: rank 1: x"),
        (1, 2, parallel.Elsewhere("x"), 2, ""),
        (0, 2, models.Diverged("x"), 2, "error: x"),  # all ranks raise it
        (1, 2, models.Diverged("x"), 2, ""),
        (1, 2, models.Misfit("x"), 2, ""),
        (1, 2, RuntimeError(LOST), 1, "error: rank 1: another process has ended, --res"),
        (1, 2, utils.Stopped(), 143, ""),
    ],
)
def test_who_tells_an_error(monkeypatch, capsys, rank, world, error, status, line):
    monkeypatch.setattr(sys, "argv", ["AL_center.py"])
    as_of_torchrun(monkeypatch, rank)
    monkeypatch.setattr(parallel, "rank", lambda: rank if world > 1 else 0)
    monkeypatch.setattr(parallel, "world", lambda: world)
    monkeypatch.setattr(utils.signal, "signal", lambda *_: None)
    monkeypatch.setitem(utils._stop, "waits", False)

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        utils.run_script(main)
    assert ended.value.code == status
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == (1 if line else 0)
    assert told.err.startswith(f"AL_center.py: {line}" if line else "")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_tells_a_mistyped_argument(monkeypatch, capsys, rank):
    as_of_torchrun(monkeypatch, rank)
    with pytest.raises(SystemExit) as ended:
        arguments("--seed", "x")
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 - rank


def test_several_gpus_need_torchrun(monkeypatch):
    args = arguments("--gpu", "0,1")
    monkeypatch.setattr(sys, "argv", ["AL_center.py", "--gpu", "0,1"])
    command = "torchrun --standalone --nproc-per-node=2 AL_center.py --gpu 0,1"
    with pytest.raises(utils.UserError, match=re.escape(command)):
        utils.setup_device(args)


@pytest.mark.parametrize("flags", [["--compile"], ["--gpu", "1"], ["--gpu", "1,1"]])
def test_refused_under_torchrun(monkeypatch, flags):
    as_of_torchrun(monkeypatch, 0)
    with pytest.raises(utils.UserError, match=flags[0]):
        utils.setup_device(arguments(*flags))
    assert not dist.is_initialized()


def test_several_machines_go_on_with_torchrun(monkeypatch):
    for name, value in {"RUN_ID": "7", "MAX_RESTARTS": "0"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    options = "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT --nproc-per-node=8"
    assert utils._torchrun() == ["torchrun", *options.split()]


@pytest.mark.parametrize("how", ["array", "xargs"])
@pytest.mark.parametrize("script", ["AL_center.py", "AL_center_temperature.py"])
def test_the_grid_of_the_help_text(monkeypatch, capsys, tmp_path, script, how):
    """Run the very text of --help, with a `python` that only tells its arguments."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        utils.parse_arguments("test", detector=script != "AL_center.py")
    text = capsys.readouterr().out
    (grid,) = re.findall(r"^  #!/bin/bash\n(?:  .*\n)+", text, re.M)
    (count,) = (int(last) + 1 for last in re.findall(r"--array=0-(\d+)", grid))
    (xargs,) = re.findall(r"^  (seq .*)", text, re.M)
    (tmp_path / "grid.sh").write_text(textwrap.dedent(grid))
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$@"\n')
    stub.chmod(0o755)

    loop = f"for i in $(seq 0 {count - 1}); do SLURM_ARRAY_TASK_ID=$i bash grid.sh; done"
    command = ["bash", "-c", xargs if how == "xargs" else loop]
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")

    runs, names = [], set()
    for line in ran.stdout.splitlines():
        program, *words = line.split()
        monkeypatch.setattr(sys, "argv", [program, *words])
        args = utils.parse_arguments("test", detector=program == "AL_center_temperature.py")
        assert args.resume
        assert (program == "AL_center.py") == (args.query_strategy != "AV_temperature")
        runs.append((args.seed, args.query_strategy, args.known_class))
        names.add(utils.run_name(args))
    assert count == len(names) == len(runs)
    published = ["random", "uncertainty", "AV_based", "AV_temperature", "KMeans", "BALD"]
    assert set(runs) == set(itertools.product([1, 2, 3, 4], published, [20, 30, 40]))
    if how == "array":
        assert [seed for seed, _, _ in runs[:5]] == [1, 2, 3, 4, 1]


if __name__ == "__main__":
    checks(sys.argv[1])
