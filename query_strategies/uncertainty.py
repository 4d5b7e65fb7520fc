"""uncertainty: the largest entropy of softmax(logits)
(Lewis and Gale, "A Sequential Algorithm for Training Text Classifiers", SIGIR 1994)."""

import torch
from torch import Tensor

from .outputs import PoolOutputs, top_k

READS = ("logits",)  # fields of PoolOutputs


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size."""
    logits = outputs.logits.double()
    log_probability = logits.log_softmax(1)
    entropy = -(log_probability.exp() * log_probability).sum(1)
    return top_k(entropy, count, generator)
