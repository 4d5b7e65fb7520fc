"""uncertainty: the largest entropy of softmax(logits)
(Lewis and Gale, "A Sequential Algorithm for Training Text Classifiers", SIGIR 1994)."""

import torch
from torch import Tensor

from .outputs import PoolOutputs, in_chunks, top_k

READS = ("logits",)  # fields of PoolOutputs


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size."""
    return top_k(in_chunks(entropy, outputs.logits), count, generator)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats: (n, C) -> (n,) float64, which has fewer ties."""
    log_probability = logits.double().log_softmax(1)
    return -(log_probability.exp() * log_probability).sum(1)
