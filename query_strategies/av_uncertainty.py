"""AV_uncertainty: AV_based with the mixtures fitted to max activation value x entropy
(in the code that LfOSA's authors released).

On the detector the unknown class is a class like any other.
"""

import torch
from torch import Tensor

from .av_based import upper_posterior
from .outputs import PoolOutputs, in_chunks, top_k
from .uncertainty import entropy

READS = ("logits",)  # fields of PoolOutputs


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size."""
    values = outputs.logits.amax(1) * in_chunks(entropy, outputs.logits)
    return top_k(upper_posterior(values, outputs.logits, generator), count, generator)
