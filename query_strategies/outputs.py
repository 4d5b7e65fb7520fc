"""What a strategy sees of the pool, and how all of them take the best images."""

from typing import NamedTuple

import torch
from torch import Tensor


class Diverged(ValueError):
    """A loss or an output is no longer a finite number; one line for the user."""


class PoolOutputs(NamedTuple):
    """The querying network's outputs on n pool images, row i for pool position i.

    A field that the strategy does not list in its READS is None.
    """

    size: int  # n, the number of images in the pool
    num_known: int = 0  # K
    features: Tensor | None = None  # (n, F) float32, what goes into the last linear layer
    logits: Tensor | None = None  # (n, C) float32; in LfOSA the detector's, C = K + 1
    mc_logits: Tensor | None = None  # (S, n, C) float32, logits under S dropout masks


def top_k(score: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions of the `count` highest scores: (count,) int64, best first.

    score: (n,). `generator`, a CPU one, decides the order of equal scores.
    """
    order = torch.randperm(len(score), generator=generator).to(score.device)
    return order[torch.sort(score[order], descending=True, stable=True).indices[:count]]
