"""ResNets with the CIFAR stem (He et al., CVPR 2016), from torchvision's residual blocks.

A 3x3 stride-1 convolution instead of the 7x7 one, no max-pooling, global average pooling, and
PyTorch's default initialization. `resnet18` has 11,168,832 parameters before the head.
"""

import copy
import itertools

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck

from .network import Network

# name -> residual block, channels per stage, blocks per stage
NETWORKS = {
    "resnet18": (BasicBlock, (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (64, 128, 256, 512), (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (64, 128, 256, 512), (3, 4, 6, 3)),
    # Later papers' widths, globally pooled.
    "resnet18-narrow": (BasicBlock, (16, 32, 64, 128), (2, 2, 2, 2)),
    "resnet34-narrow": (BasicBlock, (16, 32, 64, 128), (3, 4, 6, 3)),
    "resnet50-narrow": (Bottleneck, (16, 32, 64, 128), (3, 4, 6, 3)),
    "resnet20": (BasicBlock, (16, 32, 64), (3, 3, 3)),  # He et al.'s own net for CIFAR
}


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that uses its running statistics where a channel has one single value.

    nn.BatchNorm2d raises there: for a last batch of one image and a 1x1 feature map (8x8 digits).
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            statistics = self.running_mean, self.running_var
            return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class ResNet(Network):
    """Images (B, 3, H, W) -> features (B, F) and logits (B, C); feat_dim, dropout: see Network."""

    def __init__(self, name: str, num_classes: int, feat_dim: int = 2, dropout: float = 0.0):
        super().__init__()
        block, widths, depths = NETWORKS[name]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = BatchNorm(widths[0])
        self.stages = nn.Sequential()
        channels = widths[0]
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                wider = width * block.expansion
                shortcut = None
                if name == "resnet20" and stride == 2:  # every other pixel, zero channels
                    zeros = nn.ZeroPad3d((0, 0, 0, 0, 0, width - channels))
                    shortcut = nn.Sequential(nn.AvgPool2d(1, 2), zeros)
                elif stride == 2 or channels != wider:
                    projection = nn.Conv2d(channels, wider, 1, stride, bias=False)
                    shortcut = nn.Sequential(projection, BatchNorm(wider))
                self.stages.append(block(channels, width, stride, shortcut, norm_layer=BatchNorm))
                channels = wider
        self.add_head(channels, num_classes, feat_dim, dropout)

    def pooled(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the backbone's pooled vector (B, pooled_dim)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.stages(x).mean((2, 3))


def fold_batchnorm(network: nn.Module) -> nn.Module:
    """A copy of the network for inference, its batch norms folded into the convolutions.

    There a batch norm is one multiply-add per channel, which the convolution can do for free.
    """
    folded = copy.deepcopy(network).eval()
    for module in list(folded.modules()):
        children = list(module.named_children())  # in the order of their use
        for (first, conv), (second, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm):
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())
    return folded
