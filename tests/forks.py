"""Runs the scripts in forks of one process that has done the imports, which take seconds.

Apart from that a fork is what a shell starts: it has its own arguments, working folder and
output, and runs the script as __main__. So a test can start, and kill, as many as it likes.
"""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds after which a fork that hangs is killed


class Forks:
    """The process that forks; leaving the `with` block ends it."""

    def __enter__(self):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen([sys.executable, __file__], **pipes, text=True, env=env)
        return self

    def __exit__(self, *_):
        self.server.communicate()

    def _ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, cwd, script, *arguments, before=""):
        """Start a script in folder `cwd` and return its process id.

        before: Python source that the fork runs first, to patch something or to limit itself.
        """
        argv = [str(ROOT / script), *map(str, arguments)]
        return self._ask(cwd=str(cwd), argv=argv, before=before)

    def wait(self, pid):
        """The subprocess.CompletedProcess of a script that was started, when it has ended."""
        return subprocess.CompletedProcess(**self._ask(wait=pid))

    def run(self, cwd, script, *arguments, before=""):
        """Start a script and wait for its end."""
        return self.wait(self.start(cwd, script, *arguments, before=before))


def serve():
    """Fork for every request on stdin that asks for a script, until stdin is closed."""
    import sklearn.datasets  # noqa: F401 - these four, so that no fork need import them
    import sklearn.mixture  # noqa: F401
    import sklearn.model_selection  # noqa: F401
    import tensorboardX.summary  # noqa: F401
    import torch

    import utils  # noqa: F401

    torch.set_num_threads(1)  # threads do not survive a fork
    gc.freeze()  # or every fork copies all of this on its first collection
    running = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            argv, *files = running.pop(request["wait"])
            _, status = os.waitpid(request["wait"], 0)
            reply = {"args": argv, "returncode": os.waitstatus_to_exitcode(status)}
            for name, file in zip(("stdout", "stderr"), files, strict=True):
                file.seek(0)
                reply[name] = file.read()
                file.close()
        else:
            files = [tempfile.TemporaryFile("w+", buffering=1) for _ in range(2)]
            reply = os.fork()
            if reply == 0:
                run(files, **request)
            running[reply] = (request["argv"], *files)
        print(json.dumps(reply), flush=True)


def run(files, cwd, argv, before):
    """In the fork: become the script, and leave out the interpreter's clean-up, slow after forks."""
    signal.alarm(LIMIT)
    os.chdir(cwd)
    for number, file in zip((0, 1, 2), (open(os.devnull), *files), strict=True):
        os.dup2(file.fileno(), number)
    sys.argv = argv
    try:
        exec(before, {})
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


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve()
