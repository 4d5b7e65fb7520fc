"""OpenMax: the smallest probability of the unknown class, which takes its share from known logits
(Bendale and Boult, "Towards Open Set Deep Networks", CVPR 2016, algorithms 1 and 2).

Only the logits of the K known classes are read, also of the detector.
"""

import math
import warnings

import torch
from scipy.stats import weibull_min
from torch import Tensor

from .outputs import PoolOutputs, in_chunks, top_k

READS = ("logits", "labeled_logits", "labeled_targets")  # fields of PoolOutputs

TAIL = 20  # distances to which a class's Weibull distribution is fitted, the largest ones
ALPHA = 10  # classes whose logits are recalibrated, the highest ones of an image


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size."""
    K = outputs.num_known
    fitted = fit(outputs.labeled_logits[:, :K], outputs.labeled_targets)
    fitted = [tensor.to(outputs.logits.device) for tensor in fitted]
    unknown = in_chunks(lambda part: unknown_probability(part, *fitted), outputs.logits[:, :K])
    return top_k(-unknown, count, generator)


def fit(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each class's mean logits (K, K), and shape (K,) and scale (K,) of its Weibull distribution.

    logits: (m, K), targets: (m,), of the labeled images. Only correctly classified ones count. A
    class with fewer than three distinct positive distances to its mean gets an infinite scale: no
    distance is far from it. All float64, on the CPU.
    """
    logits, targets = logits.double().cpu(), targets.cpu()
    classes = logits.shape[1]
    means = torch.zeros(classes, classes, dtype=torch.float64)
    shape = torch.ones(classes, dtype=torch.float64)
    scale = torch.full((classes,), math.inf, dtype=torch.float64)
    right = logits.argmax(1) == targets
    for c in range(classes):
        images = logits[right & (targets == c)]
        mean = images.mean(0)
        distance = (images - mean).norm(dim=1)
        tail = distance[distance > 0].sort().values[-TAIL:]
        if len(tail.unique()) >= 3:
            means[c] = mean
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # distances that hardly differ
                shape[c], _, scale[c] = weibull_min.fit(tail.numpy(), floc=0)
    return means, shape, scale


def unknown_probability(logits: Tensor, means: Tensor, shape: Tensor, scale: Tensor) -> Tensor:
    """Probability of the unknown class: (n, K) logits -> (n,) float64."""
    logits = logits.double()
    alpha = min(ALPHA, logits.shape[1])
    rank = logits.argsort(dim=1, descending=True, stable=True).argsort(1)  # 0 for the highest
    trust = (alpha - rank.double()).clamp(min=0) / alpha  # (alpha + 1 - i) / alpha, i = rank + 1
    far = -torch.expm1(-((torch.cdist(logits, means) / scale) ** shape))  # the Weibull's F
    taken = logits.clamp(min=0) * trust * far  # v (1 - w), where negative logits lose nothing
    recalibrated = torch.cat([logits - taken, taken.sum(1, keepdim=True)], 1)
    return recalibrated.softmax(1)[:, -1]
