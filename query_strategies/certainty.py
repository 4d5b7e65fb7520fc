"""certainty: the smallest entropy of softmax(logits), the opposite of uncertainty
(a baseline in LfOSA's paper, Ning et al., CVPR 2022)."""

import torch
from torch import Tensor

from .outputs import PoolOutputs, in_chunks, top_k
from .uncertainty import entropy

READS = ("logits",)  # fields of PoolOutputs


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size."""
    return top_k(-in_chunks(entropy, outputs.logits), count, generator)
