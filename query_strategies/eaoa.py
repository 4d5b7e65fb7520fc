"""EAOA: surely known images, and of these the hardest to classify (Zong and Huang, "Rethinking
Epistemic and Aleatoric Uncertainty for Active Open-Set Annotation: An Energy-Based Approach",
CVPR 2025).

Epistemic uncertainty separates known from unknown images: by the free energy of the detector's
logits, and by how often labeled and invalid images have a pool image among their nearest.
Aleatoric uncertainty, the classifier's, picks the informative ones among the known.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from models.objective import Batch, Objective, mean_where

from .av_based import mixture_posterior
from .outputs import BLOCK, PoolOutputs, in_chunks, top_k

READS = ("logits", "features", "classifier_logits", "labeled_features", "labeled_targets")
READS += ("invalid_features", "precisions")  # fields of PoolOutputs
NEEDS_DETECTOR = True
DEFAULTS = {"known_T": 1.0, "unknown_T": 1.0}  # arguments: a cross-entropy without temperature

# Settings of the paper and of the code that its authors released.
WEIGHT = 0.01  # of the energy loss
KNOWN_ENERGY = -25.0  # the energy of a labeled image should be below this,
INVALID_ENERGY = -7.0  # that of an invalid image above this
NEIGHBORS = 250  # pool images that a labeled or invalid image names
FIRST_K = 5  # candidates for each image of the query, in round 0
HIGH_PRECISION, LOW_PRECISION = 0.65, 0.55  # of a query, after which there is one more, or less


class EnergyObjective(Objective):
    """The cross-entropy plus WEIGHT times the energy loss, as soon as there are invalid images.

    invalid: (u,), the invalid images.
    """

    def __init__(
        self,
        network: nn.Module,
        temperature: Sequence[float] | None,
        invalid: Tensor,
        generator_for: Callable[..., torch.Generator],
    ) -> None:
        super().__init__(temperature)
        self.any_invalid = len(invalid) > 0

    def forward(self, batch: Batch) -> Tensor:
        loss = super().forward(batch)
        if self.any_invalid:
            loss = loss + len(batch.targets) * WEIGHT * energy_loss(batch.logits, batch.targets)
        return loss


objective = EnergyObjective  # what the detector's training minimizes


def energy_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """How far the energies are beyond their margins: the mean square over the labeled images plus
    that over the invalid ones, each 0 without such an image. A scalar.

    logits: (B, K + 1); targets: (B,) int64, K for an invalid image. E = -logsumexp of the K known.
    """
    K = logits.shape[1] - 1
    energy = -logits[:, :K].logsumexp(1)
    above = (energy - KNOWN_ENERGY).clamp(min=0).square()
    below = (INVALID_ENERGY - energy).clamp(min=0).square()
    return mean_where(targets < K, above) + mean_where(targets == K, below)


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64; count <= outputs.size.

    Each predicted class gives an equal share: of its k * share most surely known images, the least
    surely classified. Their order is random. If classes have too few images, the most surely known
    of the others follow.
    """
    K = outputs.num_known
    energy = in_chunks(lambda a: free_energy(a[:, :K], a[:, K]), outputs.logits)
    clean = pool_posterior(energy, generator, np.argmin)
    clean = clean * pool_posterior(neighbor_energy(outputs, generator), generator, np.argmin)
    uncertain = in_chunks(log_uncertainty, outputs.classifier_logits)
    info = pool_posterior(uncertain, generator, np.argmax)
    share, k = math.ceil(count / K), adapted_k(outputs.precisions)
    prediction, chosen = outputs.classifier_logits.argmax(1), []
    for c in range(K):
        images = (prediction == c).nonzero()[:, 0]
        images = images[top_k(clean[images], k * share, generator)]
        chosen.append(images[top_k(info[images], share, generator)])
    chosen = torch.cat(chosen)
    chosen = chosen[torch.randperm(len(chosen), generator=generator)[:count].to(chosen.device)]
    others = clean.index_fill(0, chosen, -1)  # below every posterior
    return torch.cat([chosen, top_k(others, count - len(chosen), generator)])


def describe(outputs: PoolOutputs) -> str:
    """A line for the journal: k, and the precisions that it follows from."""
    earlier = ", ".join(f"{precision:.3f}" for precision in outputs.precisions)
    return f"EAOA: k = {adapted_k(outputs.precisions)} after precisions {earlier or '(none)'}"


def adapted_k(precisions: Sequence[float]) -> int:
    """Candidates for each image of the query, after queries with these precisions, in [0, 1]."""
    k = FIRST_K
    for precision in precisions:
        if precision > HIGH_PRECISION:
            k += 1
        elif precision < LOW_PRECISION:
            k = max(k - 1, 1)
    return k


def log_uncertainty(logits: Tensor) -> Tensor:
    """log(1 - largest probability of softmax(logits)): (n, K) -> (n,) float64, -inf for K = 1."""
    logits = logits.double()
    others = logits.scatter(1, logits.argmax(1, keepdim=True), -torch.inf)
    return others.logsumexp(1) - logits.logsumexp(1)


def free_energy(known: Tensor, unknown: Tensor | None) -> Tensor:
    """-logsumexp(known (n, K)), plus log(1 + exp(unknown (n,))) if given: (n,) float64."""
    energy = -known.double().logsumexp(1)
    return energy if unknown is None else energy + softplus(unknown.double())


def neighbor_energy(outputs: PoolOutputs, generator: torch.Generator) -> Tensor:
    """The free energy of how often the images of each class name a pool image: (n,) float64."""
    K, invalid = outputs.num_known, len(outputs.invalid_features)
    features = torch.cat([outputs.labeled_features, outputs.invalid_features])
    targets = outputs.labeled_targets
    targets = torch.cat([targets, targets.new_full((invalid,), K)])
    counts = neighbor_counts(outputs.features, features, targets, K, generator)
    return free_energy(counts[:, :K], counts[:, K] if invalid else None)


def neighbor_counts(
    pool: Tensor, features: Tensor, targets: Tensor, K: int, generator: torch.Generator
) -> Tensor:
    """How often each pool image is named by images of each class: (n, K + 1) float64.

    pool: (n, F); features: (m, F), targets: (m,) int64, 0..K. An image names the NEIGHBORS pool
    images nearest to it by cosine. Counts are divided by the class's number of images over the
    mean number in the known classes; a class without images has 0.
    """
    # Equally near images are told apart by their place, which is drawn at random.
    order = torch.randperm(len(pool), generator=generator).to(pool.device)
    pool, features = normalize(pool[order].double()), normalize(features.double())
    near, rows = min(NEIGHBORS, len(pool)), max(1, BLOCK // len(pool))
    counts = pool.new_zeros(len(pool), K + 1)
    for c in range(K + 1):
        for part in features[targets == c].split(rows):
            named = (part @ pool.T).topk(near, sorted=False).indices
            counts[order, c] += named.flatten().bincount(minlength=len(pool))
    images = targets.bincount(minlength=K + 1)
    return counts * images[:K].double().mean() / images.clamp(min=1)


def pool_posterior(
    values: Tensor, generator: torch.Generator, pick: Callable[[np.ndarray], int]
) -> Tensor:
    """Posterior of the component with the larger (np.argmax) or smaller mean: (n,) float64.

    The mixture is that of AV_based, fitted to the values (n,) scaled to [0, 1]. Equal values: 1.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    low, high = values.aminmax()
    if low == high:
        return torch.ones_like(values)
    scaled = (values - low) / (high - low)
    return mixture_posterior(scaled, torch.zeros_like(values, dtype=torch.int64), [seed], pick)
