"""random: uniformly, without replacement."""

import torch
from torch import Tensor

from .outputs import PoolOutputs

READS = ()  # fields of PoolOutputs; the network does not even run


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64; count <= outputs.size."""
    return torch.randperm(outputs.size, generator=generator)[:count]
