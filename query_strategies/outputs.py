"""What a strategy sees, and how it takes the best images."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# How much is computed at a time, to save memory.
CHUNK = 1 << 16  # images, each by itself
BLOCK = 1 << 24  # pairs of images, a float64 number of each: 128 MiB


class PoolOutputs(NamedTuple):
    """The queried network's outputs; row i of the pool's fields is pool position i.

    A field that the strategy does not list in its READS is None. The labeled images are the known
    ones, without the invalid ones. --augment-pool augments the pool alone.
    """

    size: int  # n, the number of images in the pool
    num_known: int  # K; the logits have K columns, or K + 1 if the network is LfOSA's detector
    features: Tensor | None = None  # (n, F) float32, the input of the last linear layer
    logits: Tensor | None = None  # (n, C) float32
    mc_logits: Tensor | None = None  # (S, n, C) float32, logits under S dropout masks
    labeled_features: Tensor | None = None  # (m, F) float32
    labeled_logits: Tensor | None = None  # (m, C) float32
    labeled_targets: Tensor | None = None  # (m,) int64, 0..K-1
    invalid_features: Tensor | None = None  # (u, F) float32, one row per entry of Split.invalid
    classifier_logits: Tensor | None = None  # (n, K) float32, of the classifier on the pool
    precisions: tuple[float, ...] | None = None  # of the earlier rounds' queries, in [0, 1]
    objective: nn.Module | None = None  # the method's own, as training left it


def in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor, dim: int = 0) -> Tensor:
    """function(rows), CHUNK images at a time, so that a million do not need gigabytes.

    dim: the dimension of `rows` that counts the images; in the result it is the first.
    """
    return torch.cat([function(part) for part in rows.split(CHUNK, dim)])


def top_k(score: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions of the `count` highest scores: (count,) int64, best first.

    score: (n,). `generator`, a CPU one, decides the order of equal scores.
    """
    order = torch.randperm(len(score), generator=generator).to(score.device)
    return order[torch.sort(score[order], descending=True, stable=True).indices[:count]]


def distances(rows: Tensor, centers: Tensor) -> Tensor:
    """Euclidean distances: (n, F), (C, F) -> (n, C); exactly 0 between equal rows."""
    return torch.cdist(rows, centers, compute_mode="donot_use_mm_for_euclid_dist")
