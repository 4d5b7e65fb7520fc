"""margin: the smallest gap between the two largest class probabilities (Scheffer, Decomain and
Wrobel, "Active Hidden Markov Models for Information Extraction", IDA 2001)."""

import torch
from torch import Tensor

from .outputs import PoolOutputs, in_chunks, top_k

READS = ("logits",)  # fields of PoolOutputs


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size."""
    return top_k(-in_chunks(gap, outputs.logits), count, generator)


def gap(logits: Tensor) -> Tensor:
    """Largest minus second largest probability: (n, C) -> (n,) float64; 0 if C is 1."""
    largest = logits.double().softmax(1).topk(min(2, logits.shape[1])).values
    return largest[:, 0] - largest[:, -1]
