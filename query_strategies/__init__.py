"""Query strategies: pure functions from the pool's outputs to positions in the pool.

To add one: copy `uncertainty.py` to a new file, change what `query` computes, list in READS the
fields of PoolOutputs that it uses, and import it and add a line to STRATEGIES below. Its name may
have letters, digits, "-" and single "_".
"""

from types import ModuleType

import torch
from torch import Tensor

from . import av_based, av_temperature, bald, kmeans, random_sampling, uncertainty
from .outputs import Diverged, PoolOutputs

# What --query-strategy offers, in both scripts; NEEDS_DETECTOR = True in a module keeps it to
# AL_center_temperature.py.
STRATEGIES: dict[str, ModuleType] = {
    "random": random_sampling,
    "uncertainty": uncertainty,
    "AV_based": av_based,
    "AV_temperature": av_temperature,
    "KMeans": kmeans,
    "BALD": bald,
}


def needs_detector(name: str) -> bool:
    """Whether strategy `name` reads the last logit as the unknown class."""
    return getattr(STRATEGIES[name], "NEEDS_DETECTOR", False)


def select(name: str, outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions in the pool that strategy `name` queries: (min(count, n),) int64, on the CPU.

    Distinct, in 0..n-1, best first; draws only from `generator`, a CPU one. A pool smaller than
    `count` is queried whole. Raises Diverged where an output the strategy reads is not finite.
    """
    for field in STRATEGIES[name].READS:
        if not torch.isfinite(getattr(outputs, field)).all():
            raise Diverged(f"the pool's {field} are not finite: lower --lr-model")
    if outputs.size <= count:
        return torch.arange(outputs.size)
    return STRATEGIES[name].query(outputs, count, generator).cpu()
