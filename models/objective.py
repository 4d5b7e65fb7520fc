"""What a training minimizes. A method that changes it subclasses Objective in its own file."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Batch(NamedTuple):
    """What an objective sees of a batch of B images, all of them labeled or invalid."""

    index: Tensor  # (B,) int64, which training images they are
    features: Tensor  # (B, F) float32, the input of the network's last layer
    logits: Tensor  # (B, C) float32
    targets: Tensor  # (B,) int64, 0..K-1, or K for an invalid image


class Objective(nn.Module):
    """Cross-entropy, each image's logits divided by the temperature of its class.

    LfOSA's low-temperature cross-entropy (Ning et al., CVPR 2022, equation 4). temperature: one per
    class, (C,); None: 1 for all. A subclass may have parameters, with optimizers of their own, and
    what its state_dict holds outlives an interruption: tensors and plain values, no NumPy arrays.
    """

    def __init__(self, temperature: Sequence[float] | None = None) -> None:
        super().__init__()
        values = None if temperature is None else torch.tensor(temperature)
        self.register_buffer("temperature", values, persistent=False)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers of the objective's own parameters; they keep their learning rate.

        A parameter without an optimizer is not trained. With --amp fp16 an optimizer needs a
        gradient in every batch, if only of 0.
        """
        return []

    def before_epoch(self, features_of: Callable[[Tensor], Tensor]) -> None:
        """Prepare an epoch. features_of(indices (n,)) -> (n, F): the network as it is now.

        What is computed here must follow from the network and the arguments, because a run that
        is resumed between two epochs computes it again. One that is resumed after the last does
        not: what the query reads of it must be in the state_dict, as EOAL's centers are.
        """

    def forward(self, batch: Batch) -> Tensor:
        """The loss summed over the batch, a scalar; its gradient is divided by B."""
        logits = batch.logits
        if self.temperature is not None:
            logits = logits / self.temperature[batch.targets].unsqueeze(1)
        return F.cross_entropy(logits, batch.targets, reduction="sum")


class CenterLoss(Objective):
    """Another objective plus `weight` times the squared distances to the centers of the classes.

    Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016,
    equation 2, has half of it; LfOSA's released code has the whole. A target of K or more (an
    invalid image) has no center and adds nothing. The centers, drawn from `generator`, are (K, F),
    and move as if their weight were 1 (algorithm 1 there), with the learning rate `lr`.
    """

    def __init__(
        self,
        base: Objective,
        shape: tuple[int, int],
        weight: float,
        lr: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.base, self.weight, self.lr = base, weight, lr
        self.centers = nn.Parameter(torch.randn(shape, generator=generator))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [*self.base.optimizers(), torch.optim.SGD([self.centers], self.lr)]

    def before_epoch(self, features_of: Callable[[Tensor], Tensor]) -> None:
        self.base.before_epoch(features_of)

    def forward(self, batch: Batch) -> Tensor:
        pull = center_loss(batch.features, batch.targets, self.centers.detach())
        move = center_loss(batch.features.detach(), batch.targets, self.centers)
        # `move` gives the centers their gradient, and nothing to the value.
        return self.base(batch) + self.weight * pull + (move - move.detach())


def center_loss(features: Tensor, targets: Tensor, centers: Tensor) -> Tensor:
    """The squared distances between the features and the centers of their classes, summed.

    features: (B, F), targets: (B,) int64, centers: (K, F).
    """
    last = len(centers) - 1
    squares = (features - centers[targets.clamp(max=last)]).square().sum(1)
    return (squares * (targets <= last)).sum()


def mean_where(mask: Tensor, values: Tensor) -> Tensor:
    """Mean of the values (B,) where the mask (B,) is true, 0 if it nowhere is. A scalar."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
