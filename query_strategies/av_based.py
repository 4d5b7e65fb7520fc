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

NO_CANDIDATE = -1.0  # below every posterior: taken last, in chance order


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size."""
    mav = outputs.logits.amax(1)
    return top_k(upper_posterior(mav, outputs.logits, generator), count, generator)


def upper_posterior(values: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
    """Posterior of the component with the larger mean, (n,) float64, on the logits' device.

    values: (n,), which the mixtures are fitted to; logits: (n, C), for the predicted classes. An
    image of a class that is predicted fewer than twice gets NO_CANDIDATE.
    """
    values, prediction = values.double().cpu().numpy(), logits.argmax(1).cpu().numpy()
    seeds = torch.randint(2**31, logits.shape[1:], generator=generator).tolist()
    posterior = np.full(len(values), NO_CANDIDATE)
    with threadpool_limits(1):  # more threads only wait for each other on so few numbers
        for c, seed in enumerate(seeds):
            images = np.flatnonzero(prediction == c)
            if len(images) >= 2:
                posterior[images] = _of_one_class(values[images], seed)
    return torch.from_numpy(posterior).to(logits.device)


def _of_one_class(values: np.ndarray, seed: int) -> np.ndarray:
    """Posterior of the upper of two Gaussian components fitted to `values`: (m,) -> (m,)."""
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # ten iterations are the protocol
        posterior = mixture.fit(values[:, None]).predict_proba(values[:, None])
    return posterior[:, mixture.means_.argmax()]
