"""BADGE: k-means++ draws among the gradients of the last linear layer (Ash et al., "Deep Batch
Active Learning by Diverse, Uncertain Gradient Lower Bounds", ICLR 2020, algorithm 1).

The gradient of an image, its prediction taken as its label, is the outer product e f' of the errors
e = softmax(logits) - one-hot of the prediction and the features f. It is never built: inner
products of outer products are products of inner products, <e f', g h'> = <e, g> <f, h>.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .outputs import PoolOutputs, distances, in_chunks, top_k

READS = ("features", "logits")  # fields of PoolOutputs


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, in order of choice; count <= outputs.size.

    The first has the largest gradient. Each further one is drawn with a probability proportional to
    the squared distance of its gradient to the nearest chosen one.
    """
    prediction = one_hot(outputs.logits.argmax(1), outputs.logits.shape[1])
    errors = outputs.logits.double().softmax(1) - prediction
    e_norms, f_norms = (
        in_chunks(lambda part: part.double().square().sum(1), rows)  # (n,) float64
        for rows in (errors, outputs.features)
    )
    chosen = top_k(e_norms * f_norms, 1, generator).tolist()
    nearest = torch.full((outputs.size,), math.inf, dtype=torch.float64)
    for draw in torch.rand(count - 1, dtype=torch.float64, generator=generator):
        squares = squared_distances(errors, outputs.features, e_norms, f_norms, chosen[-1])
        nearest = torch.minimum(nearest, squares.cpu())
        weights = nearest if nearest.any() else torch.ones_like(nearest)
        weights[chosen] = 0
        sums = weights.cumsum(0)
        chosen.append(int(torch.searchsorted(sums, draw * sums[-1], right=True)))
    return torch.tensor(chosen)


def squared_distances(
    errors: Tensor, features: Tensor, e_norms: Tensor, f_norms: Tensor, i: int
) -> Tensor:
    """Squared distance of each image's gradient to the gradient of image i: (n,) float64.

    By e f' - g h' = ((e - g)(f + h)' + (e + g)(f - h)') / 2: equal images are exactly 0 apart.
    """
    e_minus = distances(errors, errors[[i]])[:, 0].double().square()
    f_minus = distances(features, features[[i]])[:, 0].double().square()
    e_plus = 2 * (e_norms + e_norms[i]) - e_minus
    f_plus = 2 * (f_norms + f_norms[i]) - f_minus
    cross = 2 * (e_norms - e_norms[i]) * (f_norms - f_norms[i])
    return ((e_minus * f_plus + e_plus * f_minus + cross) / 4).clamp(min=0)  # rounding
