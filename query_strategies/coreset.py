"""Coreset: k-center greedy on the features (Sener and Savarese, "Active Learning for Convolutional
Neural Networks: A Core-Set Approach", ICLR 2018, algorithm 1)."""

import torch
from torch import Tensor

from .outputs import BLOCK, PoolOutputs, distances, top_k

READS = ("features", "labeled_features")  # fields of PoolOutputs


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, in order of choice; count <= outputs.size.

    The centers at the start are the labeled images. Again and again the pool image farthest from
    its nearest center becomes one.
    """
    # Distances between two sets are a matrix product: fast, but only float64 tells near ones apart.
    labeled = outputs.labeled_features.double()
    parts = outputs.features.split(max(1, BLOCK // len(labeled)))
    nearest = torch.cat([torch.cdist(part.double(), labeled).amin(1).float() for part in parts])
    chosen = []
    for _ in range(count):
        chosen.append(int(top_k(nearest, 1, generator)))
        to_it = distances(outputs.features, outputs.features[chosen[-1:]])[:, 0]
        nearest = torch.minimum(nearest, to_it)
        nearest[chosen[-1]] = -1  # below every distance: no image is chosen twice
    return torch.tensor(chosen)
