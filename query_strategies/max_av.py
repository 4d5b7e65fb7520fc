"""Max_AV: the largest max activation value (in the code that LfOSA's authors released).

On the detector the unknown class is a class like any other.
"""

import torch
from torch import Tensor

from .outputs import PoolOutputs, top_k

READS = ("logits",)  # fields of PoolOutputs


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size."""
    return top_k(outputs.logits.amax(1), count, generator)
