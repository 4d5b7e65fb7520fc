"""Center loss: features are drawn to a learned centre of their class.

Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016.
Equation 2 there has half the squared distances; LfOSA's released code has the whole ones.
"""

import torch
from torch import Tensor, nn


class CenterLoss(nn.Module):
    """The squared distances between the features and the centres of their classes, summed."""

    def __init__(self, num_classes: int, feature_dim: int, generator: torch.Generator) -> None:
        """Draw the centres from N(0, 1)."""
        super().__init__()
        self.centers = nn.Parameter(torch.randn(num_classes, feature_dim, generator=generator))

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """features: (B, F), targets: (B,) int64. Returns a scalar.

        A target of num_classes or more (an invalid image) has no centre and adds nothing.
        """
        last = len(self.centers) - 1
        squares = (features - self.centers[targets.clamp(max=last)]).square().sum(1)
        return (squares * (targets <= last)).sum()
