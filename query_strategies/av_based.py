"""AV_based: LfOSA's sampling on a network without an unknown class (Ning et al., CVPR 2022).

For every predicted class a two-component Gaussian mixture is fitted to the max activation values
of the images predicted as it (equation 6); an image's score is the posterior of the component
with the larger mean.
"""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

from .outputs import PoolOutputs, top_k

READS = ("logits",)  # fields of PoolOutputs

NO_CANDIDATE = -1.0  # below every posterior: taken only once all candidates are


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size.

    Images of a class predicted fewer than twice are no candidates: they come last, in chance order.
    """
    mav = outputs.logits.amax(1)
    return top_k(upper_posterior(mav, outputs.logits, generator), count, generator)


def upper_posterior(values: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
    """Posterior of the component with the larger mean, (n,) float64; else NO_CANDIDATE.

    values: (n,), which the mixtures are fitted to; logits: (n, C), for the predicted classes.
    """
    prediction = logits.argmax(1)
    # Grouped by one stable sort: each class is a run of `by_class`, in pool order.
    by_class = torch.argsort(prediction, stable=True)
    sizes = torch.bincount(prediction, minlength=logits.shape[1]).tolist()
    values = values[by_class].double().cpu().numpy()
    seeds = torch.randint(2**31, (len(sizes),), generator=generator).tolist()
    probability = np.full(len(values), NO_CANDIDATE)
    end = 0
    with threadpool_limits(1):  # more threads only wait for each other on so few numbers
        for size, seed in zip(sizes, seeds, strict=True):
            begin, end = end, end + size
            if size >= 2:
                probability[begin:end] = _of_one_class(values[begin:end], seed)
    scores = torch.empty(len(values), dtype=torch.float64, device=logits.device)
    return scores.index_copy_(0, by_class, torch.from_numpy(probability).to(logits.device))


def _of_one_class(values: np.ndarray, seed: int) -> np.ndarray:
    """Posterior of the upper of two Gaussian components fitted to `values`: (m,) -> (m,)."""
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # ten iterations are the protocol
        posterior = mixture.fit(values[:, None]).predict_proba(values[:, None])
    return posterior[:, mixture.means_.argmax()]
