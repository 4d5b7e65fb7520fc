"""Exceptions used everywhere, and how a line reaches the terminal."""

import os
import sys

import torch.distributed as dist
from tqdm import tqdm


class UserError(Exception):
    """Something the user can fix. Its text is printed in one line, and the exit status is 2."""


class Stopped(Exception):
    """Raised after an epoch if a signal asked to stop; the checkpoint is written.

    signal: its number. The exit status is 128 plus it.
    """

    def __init__(self, signal: int) -> None:
        self.signal = signal


def tell(line: str) -> None:
    """Print a line above the progress bars; under torchrun only one process of a machine does.

    The run goes on if nobody reads its output any more.
    """
    if dist.is_torchelastic_launched() and os.environ["LOCAL_RANK"] != "0":
        return
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
