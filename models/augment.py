"""Batched augmentation on uint8 images that live on the device: one gather per batch.

Random crop with zero padding, horizontal flip and nearest-neighbor rotation all move pixels
without mixing them, so their composition is one table of source pixels per image. The rotation
follows Pillow's 16.16 fixed-point affine, hence equals torchvision's PIL transforms bit by bit.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DEGREES = 15.0  # of the rotation, as released


class Images(NamedTuple):
    """N images of H x W pixels on the device, with what turns them into network input."""

    pixels: Tensor  # (N * H * W + 1, 3) uint8; the last row is the zero of padding and corners
    height: int
    width: int
    scale: Tensor  # (W * 3,) float32, 1 / (255 std) per channel, repeated over a row of pixels
    shift: Tensor  # (W * 3,) float32, -mean / std per channel, likewise
    padding: int  # pixels around the image for the random crop
    flip: bool  # whether half of the images are mirrored
    degrees: float  # largest angle of the rotation, to either side
    dimension = 3  # channels, the size of a network's input

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random augmentation parameters for `count` images: (count, 9) int32 on the CPU.

        Columns: six coefficients of `rotation`, left and top of the crop (-padding..padding), flip
        (0 or 1). Drawn on the CPU so that every device sees the same numbers.
        """
        p = self.padding
        crop = torch.randint(-p, p + 1, (count, 2), generator=generator)
        flip = torch.randint(0, 2, (count, 1), generator=generator)
        if not self.flip:
            flip.zero_()
        angle = torch.empty(count, dtype=torch.float64)
        angle.uniform_(-self.degrees, self.degrees, generator=generator)
        return torch.cat([rotation(angle, self.height, self.width), crop, flip], 1).int()

    def batch(self, index: Tensor, parameters: Tensor | None = None) -> Tensor:
        """Network input of index (B,), augmented by parameters (B, 9) from `draw`, if given.

        Scaled to [0, 1] and normalized: (B, 3, H, W) float32, channels_last.
        """
        row = self.width * 3
        if parameters is None:
            source = self.pixels[:-1].view(-1, self.height, row).index_select(0, index)
        else:
            source = self.pixels.index_select(0, source_pixels(self, index, parameters).view(-1))
        rows = source.view(-1, self.height, row).float().mul_(self.scale).add_(self.shift)
        return rows.view(-1, self.height, self.width, 3).permute(0, 3, 1, 2)


def to_device(
    images: np.ndarray, mean, std, padding: int, flip: bool, degrees: float, device
) -> Images:
    """Copy (N, H, W, 3) uint8 images to the device; mean and std are per channel, in [0, 1]."""
    _, height, width, _ = images.shape
    pixels = np.empty((images.size // 3 + 1, 3), np.uint8)
    pixels[:-1].reshape(images.shape)[...] = images
    pixels[-1] = 0
    mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    # A whole row of pixels as the innermost dimension: 10 times as fast on a CPU as 3 channels.
    scale, shift = (1 / (255 * std)).repeat(width).float(), (-mean / std).repeat(width).float()
    return Images(
        pixels=torch.from_numpy(pixels).to(device),
        height=height,
        width=width,
        scale=scale.to(device),
        shift=shift.to(device),
        padding=padding,
        flip=flip,
        degrees=degrees,
    )


def source_pixels(images: Images, index: Tensor, parameters: Tensor) -> Tensor:
    """For every output pixel, the row of `images.pixels` that it comes from: (B, H, W) int64."""
    height, width = images.height, images.width
    x = torch.arange(width, dtype=torch.int32, device=index.device)
    y = torch.arange(height, dtype=torch.int32, device=index.device).view(-1, 1)
    a0, a1, a2, a3, a4, a5, left, top, flip = parameters.view(-1, 9, 1, 1).unbind(1)
    # Last transform first: rotation, in the frame of the cropped and flipped image ...
    x, y = (a0 * x + a1 * y + a2) >> 16, (a3 * x + a4 * y + a5) >> 16
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    # ... then the flip, and the crop back into the frame of the stored image.
    x = torch.where(flip.bool(), width - 1 - x, x) + left
    y = y + top
    inside &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
    first = index.view(-1, 1, 1) * (height * width)
    return torch.where(inside, first + (y * width + x), len(images.pixels) - 1)


def rotation(angle: Tensor, height: int, width: int) -> Tensor:
    """Pillow's nearest-neighbor rotation as 16.16 fixed-point coefficients.

    angle: (B,) float64, degrees counter-clockwise. Returns (B, 6) int64 (a0..a5): output pixel
    (x, y) comes from ((a0 x + a1 y + a2) >> 16, (a3 x + a4 y + a5) >> 16).
    """
    radians = -torch.deg2rad(angle % 360)
    cos, sin = radians.cos().round(decimals=15), radians.sin().round(decimals=15)
    center_x, center_y = width / 2, height / 2
    offset_x = cos * -center_x + sin * -center_y + center_x
    offset_y = -sin * -center_x + cos * -center_y + center_y
    # Half a pixel: Pillow maps pixel centers, not corners.
    offset_x, offset_y = offset_x + cos * 0.5 + sin * 0.5, offset_y - sin * 0.5 + cos * 0.5
    coefficients = torch.stack([cos, sin, offset_x, -sin, cos, offset_y], 1)
    return torch.floor(coefficients * 65536 + 0.5).long()
