"""Center loss: features are drawn to a learned centre of their class.

Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016.
Equation 2 there has half the squared distances; LfOSA's released code has the whole ones.
"""

import torch
from torch import Tensor, nn

from . import parallel


class CenterLoss(nn.Module):
    """The squared distances between the features and the centres of their classes, summed."""

    def __init__(self, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.empty(num_classes, feature_dim))

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """features: (B, F), targets: (B,) int64. Returns a scalar.

        A target of num_classes or more (an invalid image) has no centre and adds nothing.
        """
        last = len(self.centers) - 1
        squares = (features - self.centers[targets.clamp(max=last)]).square().sum(1)
        return (squares * (targets <= last)).sum()


def create(num_classes: int, feature_dim: int, generator: torch.Generator, device) -> CenterLoss:
    """Centres drawn from N(0, 1) with the given generator, on every device the same."""
    loss = CenterLoss(num_classes, feature_dim)
    with torch.no_grad():
        loss.centers.normal_(generator=generator)
    return loss.to(device)


def step(centers: CenterLoss, optimizer, scaler, factor: float) -> None:
    """One step of the centres' own optimizer, their gradient rescaled by `factor`.

    With factor 1/weight the centres move as if their loss had weight 1 (Wen et al., algorithm 1).
    """
    parallel.add(centers.centers.grad)
    centers.centers.grad.mul_(factor / parallel.world())
    scaler.step(optimizer)
