"""Query strategies: pure functions from the pool's outputs to positions in the pool.

To add one: copy `uncertainty.py`, change what `query` computes and the fields of PoolOutputs in
READS, and add its name to NAMES. The file's name is that in small letters; the name may have
letters, digits, "-" and single "_". The file may also have
NEEDS_DETECTOR = True: only AL_center_temperature.py offers it;
objective(network, temperature, invalid, generator_for): what the queried network learns, as in
eaoa.py;
DEFAULTS: a dict of arguments whose default differs under this strategy (temperatures stand in
DETECTOR_T of plot.py, too, so that its labels leave them out);
describe(outputs): a line for the journal, NAME.log, before each query.
"""

from importlib import import_module

import torch
from torch import Tensor

from .outputs import PoolOutputs

# The curves in the paper's figures: LfOSA and what it is compared with.
NAMES = ["AV_temperature", "random", "uncertainty", "certainty", "Coreset", "BALD", "OpenMax"]
# Further ones in the code that the paper's authors released.
NAMES += ["AV_based", "AV_uncertainty", "Max_AV"]
# Further ones that later papers compare with.
NAMES += ["margin", "BADGE", "KMeans"]
# LfOSA's successors, which change what the detector learns.
NAMES += ["EOAL", "EAOA"]

STRATEGIES = {name: import_module(f".{name.lower()}", __name__) for name in NAMES}


def select(name: str, outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions in the pool that strategy `name` queries: (min(count, n),) int64, on the CPU.

    Distinct, in 0..n-1, in order of choice; draws only from `generator`, a CPU one. A pool smaller
    than `count` is queried whole. The outputs must be finite.
    """
    if outputs.size <= count:
        return torch.arange(outputs.size)
    return STRATEGIES[name].query(outputs, count, generator).cpu()
