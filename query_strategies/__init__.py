"""Query strategies: pure functions from the pool's outputs to positions in the pool.

To add one: copy `uncertainty.py`, change what `query` computes and the fields of PoolOutputs in
READS, and add it to STRATEGIES. Its name may have letters, digits, "-" and single "_".
"""

from types import ModuleType

import torch
from torch import Tensor

from . import (
    av_based,
    av_temperature,
    av_uncertainty,
    badge,
    bald,
    certainty,
    coreset,
    kmeans,
    margin,
    max_av,
    openmax,
    random_sampling,
    uncertainty,
)
from .outputs import PoolOutputs

# NEEDS_DETECTOR = True in a module keeps it to AL_center_temperature.py.
STRATEGIES: dict[str, ModuleType] = {
    # The lines of the paper's figures: LfOSA and what it is compared with.
    "AV_temperature": av_temperature,
    "random": random_sampling,
    "uncertainty": uncertainty,
    "certainty": certainty,
    "Coreset": coreset,
    "BALD": bald,
    "OpenMax": openmax,
    # Further ones in the code that the paper's authors released.
    "AV_based": av_based,
    "AV_uncertainty": av_uncertainty,
    "Max_AV": max_av,
    # Further ones that later papers compare with.
    "margin": margin,
    "BADGE": badge,
    "KMeans": kmeans,
}


def needs_detector(name: str) -> bool:
    """Whether strategy `name` reads the last logit as the unknown class."""
    return getattr(STRATEGIES[name], "NEEDS_DETECTOR", False)


def select(name: str, outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions in the pool that strategy `name` queries: (min(count, n),) int64, on the CPU.

    Distinct, in 0..n-1, in order of choice; draws only from `generator`, a CPU one. A pool smaller
    than `count` is queried whole. The outputs must be finite.
    """
    if outputs.size <= count:
        return torch.arange(outputs.size)
    return STRATEGIES[name].query(outputs, count, generator).cpu()
