"""FINCH's clusters (Sarfraz et al., "Efficient Parameter-free Clustering Using First Neighbor
Relations", CVPR 2019), with cosine distances, for as many images as a pool has."""

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .outputs import BLOCK


def first_neighbors(features: Tensor) -> Tensor:
    """Which other row is nearest to each row, by cosine: (n, F) -> (n,) int64; (1, F) -> 0.

    In float64, because rows of few features are nearer to each other than float32 can tell.
    """
    unit = normalize(features.double())
    found = torch.empty(len(unit), dtype=torch.int64, device=unit.device)
    # One block for all, because a new one each time would not fit where the last one lay.
    block = unit.new_empty(min(len(unit), max(1, BLOCK // len(unit))), len(unit))
    for begin in range(0, len(unit), len(block)):
        part = unit[begin : begin + len(block)]
        similarity = torch.mm(part, unit.T, out=block[: len(part)])
        similarity.diagonal(begin).fill_(-torch.inf)
        found[begin : begin + len(part)] = similarity.max(1).indices  # faster than argmax
    return found


def partitions(features: Tensor) -> list[np.ndarray]:
    """FINCH's partitions of the rows of `features` (n, F), n >= 1, finest first.

    Each is (n,) int, the clusters counted from 0. The steps are those of finch.FINCH, which would
    hold the distances of all the first clusters to each other: 2.5 GB for 50 thousand images.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that pynndescent, not needed here, is not installed
        from finch.finch import clust_rank, get_clust, get_merge  # only where FINCH is needed
    data, means, labels, found = features.float().cpu().numpy(), features, [], []
    while True:
        nearest = first_neighbors(means).cpu().numpy()
        merged, count = get_clust(clust_rank(nearest[:, None], initial_rank=nearest)[0], None)
        if found and (count == 1 or len(means) - count <= 1):
            return found
        labels, means = get_merge(labels, merged, data)
        means = torch.from_numpy(means).to(features.device)
        found.append(labels)


def clusters(features: Tensor, count: int) -> Tensor:
    """FINCH's clusters of the rows, exactly `count`; all of the finest partition if it has fewer.

    (n, F), n >= 1 -> (n,) int64, counted from 0, on the features' device.
    """
    found = partitions(features)
    labels = next((each for each in reversed(found) if each.max() >= count - 1), found[0])
    return torch.from_numpy(merge(features.cpu().numpy(), labels, count)).to(features.device)


def merge(features: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Merge the two clusters with the nearest means, by cosine, until at most `count` are left.

    features: (n, F); labels: (n,) int, the clusters counted from 0. Returns (n,) int64, from 0. As
    finch.FINCH with req_clust, which computes all distances anew for every merge.
    """
    size = labels.max() + 1
    group = np.arange(size)
    # A sum has the direction of the mean.
    sums = np.stack([np.bincount(labels, weights=column) for column in features.T], axis=1)
    unit = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-300)
    distance = 1 - unit @ unit.T
    np.fill_diagonal(distance, np.inf)
    bound = distance.min(1)  # no other cluster is nearer than this
    for _ in range(size - count):
        while True:  # most bounds were never reached before the merging ends
            i = bound.argmin()
            j = distance[i].argmin()
            if not distance[i, j] > bound[i]:
                break
            bound[i] = distance[i, j]
        group[group == j] = i
        sums[i] += sums[j]
        unit[i] = sums[i] / max(np.linalg.norm(sums[i]), 1e-300)
        row = np.where(np.isinf(distance[i]), np.inf, 1 - unit @ unit[i])  # infinite: merged away
        row[j] = np.inf
        distance[i], distance[:, i], distance[j], distance[:, j] = row, row, np.inf, np.inf
        bound = np.minimum(bound, row)
        bound[i], bound[j] = row.min(), np.inf
    return np.unique(group[labels], return_inverse=True)[1]
