"""What a strategy sees of the pool, and the order it shares with all others."""

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
    features: Tensor | None = None  # (n, F) float32, what goes into the last linear layer
    logits: Tensor | None = None  # (n, C) float32; in LfOSA the detector's, C = K + 1
    mc_logits: Tensor | None = None  # (S, n, C) float32, logits under S dropout masks


def highest(score: Tensor, mav: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest scores: (count,) int64, best first.

    score, mav: (n,). Equal scores: the higher max activation value first, then pool order.
    """
    order = torch.sort(mav, descending=True, stable=True).indices
    return order[torch.sort(score[order], descending=True, stable=True).indices[:count]]
