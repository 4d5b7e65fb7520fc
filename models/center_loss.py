"""Center loss: features are drawn to a learned centre of their class.

Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016.
Equation 2 there has half the squared distances; LfOSA's released code has the whole ones.
"""

from torch import Tensor


def center_loss(features: Tensor, targets: Tensor, centers: Tensor) -> Tensor:
    """The squared distances between the features and the centres of their classes, summed.

    features: (B, F), targets: (B,) int64, centers: (K, F). Returns a scalar. A target of K or more
    (an invalid image) has no centre and adds nothing.
    """
    last = len(centers) - 1
    squares = (features - centers[targets.clamp(max=last)]).square().sum(1)
    return (squares * (targets <= last)).sum()
