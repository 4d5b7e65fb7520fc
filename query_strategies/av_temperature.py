"""AV_temperature: LfOSA (Ning et al., CVPR 2022), AV_based on the detector.

The detector's last class stands for the unknown: images predicted as it get probability 0.
"""

import torch
from torch import Tensor

from .av_based import known_probability
from .outputs import PoolOutputs, highest

READS = ("logits",)  # fields of PoolOutputs
NEEDS_DETECTOR = True  # only where the last logit is the unknown class


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size.

    Fewer candidates than `count` are filled up as in AV_based.
    """
    mav, prediction = outputs.logits.max(1)
    probability = known_probability(outputs.logits, generator)
    probability[prediction == outputs.logits.shape[1] - 1] = 0
    return highest(probability, mav, count)
