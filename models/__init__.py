"""Networks that return (features, logits), and how they are trained and applied."""

import torch

from . import resnet
from .network import MLP, Network
from .objective import CenterLoss, Objective
from .resnet import ResNet
from .training import AMP, Settings, dropout_masks, evaluate, predict, train

__all__ = ["AMP", "MLP", "NETWORKS", "CenterLoss", "Network", "Objective", "ResNet", "Settings"]
__all__ += ["create", "dropout_masks", "evaluate", "predict", "train"]

NETWORKS = [*resnet.NETWORKS, "mlp"]  # on images, and on vectors


def create(
    name: str,
    num_classes: int,
    feat_dim: int,
    generator: torch.Generator,
    device: torch.device,
    dropout: float = 0.0,
    dimension: int = 3,
) -> Network:
    """A new network with PyTorch's default initialization, from the seed of `generator`.

    name: one of NETWORKS; feat_dim, dropout: see Network; dimension: of the input, see Images and
    Embeddings. channels_last on the device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        head = num_classes, feat_dim, dropout
        network = MLP(dimension, *head) if name == "mlp" else ResNet(name, *head)
    if device.type == "cuda" and torch.distributed.is_initialized():
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network.to(device, memory_format=torch.channels_last)
