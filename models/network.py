"""What all networks share: a pooled vector, features and logits; and a small network on vectors."""

import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 256  # units of the MLP's hidden layer


class Network(nn.Module):
    """A batch of network input -> features (B, F) and logits (B, C).

    A subclass computes the pooled vector in `pooled`, and ends its __init__ with `add_head`.
    """

    def add_head(self, pooled_dim: int, num_classes: int, feat_dim: int, dropout: float) -> None:
        """Add the layers behind the pooled vector.

        feat_dim F: the pooled vector goes through a linear layer to F features and, with no
        non-linearity between, through another to the logits. 0: the pooled vector is the features.
        dropout: probability with which an entry of the pooled vector is dropped in training.
        """
        self.pooled_dim = pooled_dim
        self.feature_dim = feat_dim or pooled_dim
        self.dropout_rate = dropout
        self.feature_layer = nn.Linear(pooled_dim, feat_dim) if feat_dim else nn.Identity()
        self.fc = nn.Linear(self.feature_dim, num_classes)

    def pooled(self, x: Tensor) -> Tensor:
        """Network input (B, ...) -> pooled vectors (B, pooled_dim)."""
        raise NotImplementedError

    def head(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled vectors (..., pooled_dim) -> features (..., F) and logits (..., C)."""
        features = self.feature_layer(pooled)
        return features, self.fc(features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pooled(x)
        if self.training and self.dropout_rate:
            pooled = F.dropout(pooled, self.dropout_rate)
        return self.head(pooled)


class MLP(Network):
    """Vectors (B, D) -> features (B, F) and logits (B, C); feat_dim, dropout: see Network."""

    def __init__(self, dimension: int, num_classes: int, feat_dim: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(dimension, WIDTH)
        self.add_head(WIDTH, num_classes, feat_dim, dropout)

    def pooled(self, x: Tensor) -> Tensor:
        """Vectors (B, D) -> the hidden layer after its ReLU (B, WIDTH)."""
        return F.relu(self.hidden(x), inplace=True)
