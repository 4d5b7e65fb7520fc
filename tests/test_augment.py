"""The batched augmentation against PIL and torchvision, pixel for pixel."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from models import augment

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def make(count, size, padding, flip=True, degrees=augment.DEGREES, seed=None):
    """Random images as the project keeps them, and as PIL images."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return augment.to_device(pixels, MEAN, STD, padding, flip, degrees, "cpu"), pixels


def plain(image, left, top, flip, angle, padding):
    """The published transforms, one PIL image at a time: crop, flip, rotation."""
    size = image.shape[0]
    padded = TF.pad(Image.fromarray(image), padding, fill=0)
    image = TF.crop(padded, top + padding, left + padding, size, size)
    image = TF.hflip(image) if flip else image
    return TF.rotate(image, angle)  # nearest neighbor and zero fill are torchvision's defaults


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (64, 8), (8, 1), (9, 1)])
def test_pixels_equal_pil(size, padding):
    seed = torch.seed()
    print("seed", seed)
    count = 4096 if size == 32 else 512
    images, pixels = make(count, size, padding, seed=seed)
    angle = torch.empty(count, dtype=torch.float64).uniform_(-15, 15)
    angle[:4] = torch.tensor([0.0, 15.0, -15.0, 1e-9])
    crop = torch.randint(-padding, padding + 1, (count, 2))
    flip = torch.randint(0, 2, (count, 1))
    parameters = torch.cat([augment.rotation(angle, size, size), crop, flip], 1).int()
    index = torch.randperm(count)
    source = augment.source_pixels(images, index, parameters)
    ours = images.pixels[source].numpy()
    for i in range(count):
        left, top = crop[i].tolist()
        theirs = plain(pixels[index[i]], left, top, bool(flip[i]), float(angle[i]), padding)
        assert np.array_equal(ours[i], np.asarray(theirs)), (i, left, top, flip[i], angle[i])


def test_network_input_equals_totensor_and_normalize():
    images, pixels = make(64, 32, 4)
    index = torch.randperm(64)
    parameters = images.draw(64, torch.Generator().manual_seed(0))
    source = images.pixels[augment.source_pixels(images, index, parameters)].numpy()
    expected = torch.stack([TF.normalize(TF.to_tensor(image), MEAN, STD) for image in source])
    ours = images.batch(index, parameters)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    plain_input = torch.stack([TF.normalize(TF.to_tensor(p), MEAN, STD) for p in pixels[index]])
    assert torch.allclose(images.batch(index), plain_input, rtol=0, atol=1e-6)


def test_parameters_follow_the_published_distribution():
    images, _ = make(1, 32, 4)
    parameters = images.draw(40_000, torch.Generator().manual_seed(0))
    left, top, flip = parameters[:, 6:].double().T
    for crop in (left, top):
        assert (crop.min(), crop.max()) == (-4, 4)
        counts = torch.bincount((crop + 4).long())
        assert (counts / 40_000 - 1 / 9).abs().max() < 0.01
    assert abs(flip.mean() - 0.5) < 0.01
    # cos and sin as 16.16 fixed point: the angle comes back, uniform between -15 and 15 degrees
    angle = torch.rad2deg(torch.atan2(-parameters[:, 1].double(), parameters[:, 0].double()))
    assert angle.abs().max() <= 15.001
    steps = torch.linspace(0, 1, 7).double()
    assert torch.allclose(angle.quantile(steps), 30 * steps - 15, atol=0.4)
    assert abs(np.corrcoef(left, top)[0, 1]) < 0.02
    assert abs(np.corrcoef(left, angle)[0, 1]) < 0.02
    upright, _ = make(1, 8, 1, flip=False, degrees=0)
    parameters = upright.draw(1000, torch.Generator().manual_seed(0))
    assert parameters[:, 8].sum() == 0
    assert parameters[:, :6].unique(dim=0).tolist() == [[65536, 0, 32768, 0, 65536, 32768]]
