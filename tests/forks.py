"""Runs the scripts in forks of one process that has done the imports, which take seconds.

Apart from that a fork is what a shell starts: it has its own arguments, working folder and
output, and runs the script as __main__. So a test can start, and kill, as many as it likes.
Only forks know `--dataset few`, a quarter of the digits, and `--model tiny`, two residual blocks.
"""

import gc
import importlib
import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINE, LFOSA = "AL_center.py", "AL_center_temperature.py"
TORCHRUN = "torchrun"  # in place of a script: torchrun, whose workers are forks as well
SMALL = "--use-cpu --dataset few --model tiny".split()
UNTRAINED = [*SMALL, *"--max-epoch 0 --query-strategy random --max-query 2".split()]
FEW = ("train", "train_labels", "test", "test_labels")
LIMIT = 300  # seconds after which a fork that hangs is killed


class Forks:
    """The process that forks; leaving the `with` block ends it."""

    def __enter__(self):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # It does have threads, of libraries, which OMP_NUM_THREADS=1 keeps from working.
        command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", __file__]
        self.server = subprocess.Popen(command, **pipes, text=True, env=env)
        assert self.server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_):
        self.server.communicate()

    def _ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, cwd, script, *arguments, before=""):
        """Start a script in folder `cwd` and return its process id.

        before: Python source that the fork runs first, to change what the script will meet.
        """
        script = script if script == TORCHRUN else ROOT / script
        argv = [str(script), *map(str, arguments)]
        return self._ask(cwd=str(cwd), argv=argv, before=before)

    def wait(self, pid):
        """The subprocess.CompletedProcess of a script that was started, when it has ended."""
        return subprocess.CompletedProcess(**self._ask(wait=pid))

    def run(self, cwd, script, *arguments, before=""):
        """Start a script and wait for its end."""
        return self.wait(self.start(cwd, script, *arguments, before=before))


def at(module, function, call, action, which="True"):
    """Source for Forks: at a call of module.function (or module:Class.method) do `action`.

    call: the number of the call, from 1, among those for which the expression `which` holds.
    """
    return f"""
import os, pathlib, pkgutil, signal, time
module = pkgutil.resolve_name({module!r})
original, left = module.{function}, {call}
def replacement(*args, **kwargs):
    global left
    if {which}:
        left -= 1
        if left == 0:
            {action}
    return original(*args, **kwargs)
module.{function} = replacement
"""


def at_write(ending, number, action):
    """Source for Forks: do `action` where NAME`ending` is complete, but not yet in its place."""
    path = "str(args[1]).replace('model.pt', 'model')"  # it is no other .pt
    which = f"{path}.endswith('{ending.replace('model.pt', 'model')}')"
    return at("os", "replace", number, action, which)


def send(*numbers):
    """An action for `at`: the process sends itself these signals, one by one."""
    return "; time.sleep(0); ".join(f"os.kill(os.getpid(), {int(number)})" for number in numbers)


KILL = send(signal.SIGKILL)


def results(folder):
    """The content of the files that a run is for."""
    return {suffix: find(folder, suffix).read_bytes() for suffix in ("pkl", "queries.json")}


def read(folder):
    """Log and queries of the run in `folder`."""
    log, queries = results(folder).values()
    return pickle.loads(log), json.loads(queries)


def find(folder, suffix):
    """The one file NAME.suffix of a run in folder/log_AL, None without any."""
    files = (folder / "log_AL").glob(f"*.{suffix}")
    files = [file for file in files if file.name.endswith(".model.pt") == (suffix == "model.pt")]
    assert len(files) <= 1
    return files[0] if files else None


def assert_ends_well(ran):
    assert (ran.returncode, ran.stderr) == (0, ""), ran


def assert_one_line(ran, *parts):
    """It ended with exit status 2 and one line on stderr that has these parts."""
    assert ran.returncode == 2, ran
    assert len(ran.stderr.splitlines()) == 1, ran
    for part in parts:
        assert part in ran.stderr, ran


def small():
    """Make `few` and `tiny` known."""
    datasets = importlib.import_module("datasets")
    resnet = importlib.import_module("models.resnet")
    digits = datasets.DATASETS["digits"]
    raw = digits.load(None)
    few = raw._replace(**{name: getattr(raw, name)[: len(getattr(raw, name)) // 4] for name in FEW})
    settings = digits.defaults | {"query_batch": 20}
    datasets.DATASETS["few"] = digits._replace(load=lambda _: few, defaults=settings)
    resnet.NETWORKS["tiny"] = (resnet.BasicBlock, (8, 16), (1, 1))
    importlib.import_module("models").NETWORKS.append("tiny")


def serve():
    """Fork for every request on stdin that asks for a script, until stdin is closed."""
    for name in ("utils", "sklearn.datasets", "sklearn.model_selection", "tensorboardX"):
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)  # threads do not survive a fork
    small()
    gc.freeze()  # or every fork copies all of this on its first collection
    started = {}
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            argv, *files = started.pop(request["wait"])
            _, status = os.waitpid(request["wait"], 0)
            reply = {"args": argv, "returncode": os.waitstatus_to_exitcode(status)}
            for name, file in zip(("stdout", "stderr"), files, strict=True):
                file.seek(0)
                reply[name] = file.read()
                file.close()
        else:
            files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
            reply = os.fork()
            if reply == 0:
                os.chdir(request["cwd"])
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                for number, file in enumerate(files, 1):
                    os.dup2(file.fileno(), number)
                run(request["argv"], request["before"])
            started[reply] = (request["argv"], *files)
        print(json.dumps(reply), flush=True)


def run(argv, before=""):
    """In the fork: become the script, without the interpreter's clean-up, slow in a fork."""
    signal.alarm(LIMIT)
    sys.argv = argv
    try:
        exec(before, {})
        if argv[0] == TORCHRUN:
            torchrun()
        else:
            runpy.run_path(argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def torchrun():
    """torchrun, with forks of this process for the interpreters that it starts."""
    main = importlib.import_module("torch.distributed.run").main
    name = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
    importlib.import_module(name).Popen = Worker
    main()


class Worker:
    """What torchrun needs of a subprocess.Popen; the process is named after its rank."""

    def __init__(self, args, env, **_):
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            os.environ.update(env)
            Path("/proc/self/comm").write_text(f"rank{env['RANK']}")
            run([*args[2:]])  # the words after `python -u`

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.02)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve()
