"""BALD: mutual information between prediction and dropout mask
(Gal, Islam and Ghahramani, "Deep Bayesian Active Learning with Image Data", ICML 2017)."""

import torch
from torch import Tensor

from .outputs import PoolOutputs, in_chunks, top_k

READS = ("mc_logits",)  # fields of PoolOutputs


def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, best first; count <= outputs.size."""
    information = in_chunks(mutual_information, outputs.mc_logits, dim=1)
    return top_k(information, count, generator)


def mutual_information(mc_logits: Tensor) -> Tensor:
    """Entropy of the mean prediction minus mean entropy, in nats: (S, n, C) -> (n,) float64."""
    log_probability = mc_logits.double().log_softmax(2)
    probability = log_probability.exp()
    mean = probability.mean(0)
    return torch.special.entr(mean).sum(1) + (probability * log_probability).sum(2).mean(0)
