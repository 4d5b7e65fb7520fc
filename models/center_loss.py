"""Center loss (Wen et al., "A Discriminative Feature Learning Approach for Deep Face
Recognition", ECCV 2016, equation 2): features are drawn to a learned centre of their class."""

import torch
from torch import Tensor, nn

from . import parallel


class CenterLoss(nn.Module):
    """Half the squared distance between each feature and the centre of its class, summed."""

    def __init__(self, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.empty(num_classes, feature_dim))

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """features: (B, F), targets: (B,) int64 in 0..num_classes-1. Returns a scalar."""
        return 0.5 * (features - self.centers[targets]).square().sum()


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
    parallel.average(centers.centers.grad)
    centers.centers.grad.mul_(factor)
    scaler.step(optimizer)
