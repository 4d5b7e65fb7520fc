"""AV_temperature: LfOSA (Ning et al., CVPR 2022), AV_based on the detector.

The detector's class K stands for the unknown: images predicted as it get probability 0.
"""

import torch
from torch import Tensor

from .av_based import upper_posterior
from .outputs import PoolOutputs, top_k

READS = ("logits",)  # fields of PoolOutputs
NEEDS_DETECTOR = True  # logits without class K would mean nothing here


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size."""
    unknown = outputs.logits.argmax(1) == outputs.num_known
    probability = upper_posterior(outputs.logits.amax(1), outputs.logits, generator)
    return top_k(probability.masked_fill(unknown, 0), count, generator)
