"""KMeans: k-means with as many centers as images to query; the image nearest to each center."""

import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import pairwise_distances_argmin
from threadpoolctl import threadpool_limits
from torch import Tensor

from .outputs import PoolOutputs

READS = ("features",)  # fields of PoolOutputs

ITERATIONS = 30  # Lloyd steps at most; see query


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, in order of the centers.

    If two centers have the same nearest image, the first takes it and the other takes its nearest
    free image; of equally near ones, one by chance. To save time, k-means starts once, from images
    drawn at random (k-means++ alone would take longer than all of it), and stops after ITERATIONS
    Lloyd steps.
    """
    features = outputs.features.float().cpu().numpy()
    seed = int(torch.randint(2**31, (), generator=generator))
    # Threads add up their parts of a center in the order in which they finish. With more than two
    # the sum can differ between runs.
    kmeans = KMeans(count, init="random", n_init=1, max_iter=ITERATIONS, random_state=seed)
    with threadpool_limits(2, "openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than centers
        centers = kmeans.fit(features).cluster_centers_
    order = torch.randperm(len(features), generator=generator)  # the first of equally near images
    return order[nearest_distinct(centers, features[order.numpy()])]


def nearest_distinct(centers: np.ndarray, features: np.ndarray) -> np.ndarray:
    """For each center its nearest image; of centers that share one, see `query`: (k,) int64.

    centers: (k, F), features: (n, F), k <= n.
    """
    chosen = pairwise_distances_argmin(centers, features)
    taken = np.zeros(len(features), bool)
    taken[chosen] = True
    _, first = np.unique(chosen, return_index=True)
    for i in np.setdiff1d(range(len(centers)), first):  # few, unless images are equal
        distance = np.square(features - centers[i]).sum(1)
        distance[taken] = np.inf
        chosen[i] = distance.argmin()
        taken[chosen[i]] = True
    return chosen
