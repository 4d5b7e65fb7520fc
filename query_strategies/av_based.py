"""AV_based: LfOSA's sampling on a network without an unknown class (Ning et al., CVPR 2022).

For every predicted class a two-component Gaussian mixture is fitted to the max activation values
of the images predicted as it (equation 6); an image's score is the posterior of the component
with the larger mean.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

from .outputs import PoolOutputs, top_k

READS = ("logits",)  # fields of PoolOutputs

NO_CANDIDATE = -1.0  # below every posterior: taken last, in random order


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size."""
    mav = outputs.logits.amax(1)
    return top_k(upper_posterior(mav, outputs.logits, generator), count, generator)


def upper_posterior(values: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
    """Posterior of the component with the larger mean, (n,) float64, on the logits' device.

    values: (n,), which the mixtures are fitted to; logits: (n, C), for the predicted classes. An
    image of a class that is predicted fewer than twice gets NO_CANDIDATE.
    """
    seeds = torch.randint(2**31, logits.shape[1:], generator=generator).tolist()
    return mixture_posterior(values, logits.argmax(1), seeds, np.argmax)


def mixture_posterior(
    values: Tensor, groups: Tensor, seeds: Sequence[int], pick: Callable[[np.ndarray], int]
) -> Tensor:
    """Posterior of one component of the mixture that is fitted to the values of an image's group.

    values, groups: (n,), the groups counted from 0, each with its seed. pick: which of the two
    means, np.argmax or np.argmin. (n,) float64, on the values' device; NO_CANDIDATE for an image
    that is alone in its group.
    """
    column, groups = values.double().cpu().numpy()[:, None], groups.cpu().numpy()
    posterior = np.full(len(values), NO_CANDIDATE)
    # More threads than one only wait for each other on so few numbers.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # ten iterations are the protocol
        settings = {"max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}
        for g, seed in enumerate(seeds):
            images = np.flatnonzero(groups == g)
            if len(images) >= 2:
                mixture = GaussianMixture(2, random_state=seed, **settings).fit(column[images])
                component = pick(mixture.means_)
                posterior[images] = mixture.predict_proba(column[images])[:, component]
    return torch.from_numpy(posterior).to(values.device)
