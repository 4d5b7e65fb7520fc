"""A small network on vectors, such as the embeddings of an encoder."""

import torch.nn.functional as F
from torch import Tensor, nn

from .network import Network

WIDTH = 256  # units of the hidden layer


class MLP(Network):
    """Vectors (B, D) -> features (B, F) and logits (B, C); feat_dim, dropout: see Network."""

    def __init__(self, dimension: int, num_classes: int, feat_dim: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(dimension, WIDTH)
        self.add_head(WIDTH, num_classes, feat_dim, dropout)

    def pooled(self, x: Tensor) -> Tensor:
        """Vectors (B, D) -> the hidden layer after its ReLU (B, WIDTH)."""
        return F.relu(self.hidden(x), inplace=True)
