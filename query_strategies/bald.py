"""BALD: mutual information between prediction and dropout mask
(Gal, Islam and Ghahramani, "Deep Bayesian Active Learning with Image Data", ICML 2017)."""

import torch
from torch import Tensor

from .outputs import PoolOutputs, top_k

READS = ("mc_logits",)  # fields of PoolOutputs

CHUNK = 1 << 16  # pool images at a time, so that a million need no gigabytes of temporaries


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size."""
    parts = outputs.mc_logits.split(CHUNK, dim=1)
    information = torch.cat([mutual_information(part) for part in parts])
    return top_k(information, count, generator)


def mutual_information(mc_logits: Tensor) -> Tensor:
    """Entropy of the mean prediction minus mean entropy, in nats: (S, n, C) -> (n,) float64."""
    log_probability = mc_logits.double().log_softmax(2)
    probability = log_probability.exp()
    mean = probability.mean(0)
    return torch.special.entr(mean).sum(1) + (probability * log_probability).sum(2).mean(0)
