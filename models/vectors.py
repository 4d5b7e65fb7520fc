"""Vectors that live on the device as they are stored, standardized a batch at a time."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 22  # numbers at a time


class Embeddings(NamedTuple):
    """N vectors of D numbers on the device, with what turns them into network input.

    The same interface as Images: whoever trains or predicts need not know which it has.
    """

    rows: Tensor  # (N, D) float16, float32 or float64
    mean: Tensor  # (D,) float32, or float64 for such rows: of the training columns
    scale: Tensor  # (D,) likewise, 1 / standard deviation; 0 where all numbers are equal

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def dimension(self) -> int:
        """D, the size of a network's input."""
        return self.rows.shape[1]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """The augmentation parameters of `count` vectors, (count, 0): there is no augmentation."""
        return torch.empty(count, 0)

    def batch(self, index: Tensor, parameters: Tensor | None = None) -> Tensor:
        """Network input (B, D) float32 of index (B,), standardized."""
        rows = self.rows.index_select(0, index).to(self.mean.dtype)
        return rows.sub_(self.mean).mul_(self.scale).float()


def to_device(
    train: np.ndarray, test: np.ndarray, device: torch.device
) -> tuple[Embeddings, Embeddings]:
    """Copy training (N, D) and test vectors (M, D), finite floats, to the device.

    Both are standardized by the mean and the standard deviation of the training columns.
    """
    mean, std = moments(train)
    dtype = torch.float64 if train.dtype == np.float64 else torch.float32
    mean, scale = torch.from_numpy(mean).to(dtype), (1 / torch.from_numpy(std)).to(dtype)
    scale[~scale.isfinite()] = 0  # of a constant column
    mean, scale = mean.to(device), scale.to(device)
    train, test = torch.from_numpy(train).to(device), torch.from_numpy(test).to(device)
    return Embeddings(train, mean, scale), Embeddings(test, mean, scale)


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (ddof = 0) of each column of (N, D), both (D,) float64.

    Computed on the differences to the first row: exactly 0 for a constant column.
    """
    first, step = rows[0].astype(np.float64), max(1, CHUNK // rows.shape[1])
    total, squares = np.zeros_like(first), np.zeros_like(first)
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step] - first
        total += part.sum(0)
        squares += np.einsum("nd,nd->d", part, part)
    total /= len(rows)
    return first + total, np.sqrt((squares / len(rows) - total**2).clip(0))
