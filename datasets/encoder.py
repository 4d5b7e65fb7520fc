"""Embeddings of images: torchvision's classification networks without their last linear layer."""

import contextlib
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.transforms import functional
from tqdm import tqdm

from errors import UserError, tell
from models.resnet import fold_batchnorm

from . import embeddings
from .files import one_at_a_time, write_whole
from .folder import Crop
from .raw import Raw

BATCH = {"cpu": 32, "cuda": 256}  # images at a time


def names() -> list[str]:
    """The networks that `--encoder` knows: those with a last linear layer to leave out."""
    return torchvision.models.list_models(module=torchvision.models, exclude="squeezenet*")


class Encoder:
    """One of `names` with its default weights and their preprocessing; read once it is needed."""

    def __init__(self, name: str, device: torch.device, folder: Path, cropped: bool) -> None:
        """folder: where embeddings are kept. cropped: whether `crop` has brought images to size."""
        self.name, self.device, self.folder, self.cropped = name, device, folder, cropped
        self.weights = torchvision.models.get_model_weights(name).DEFAULT
        self.transforms = self.weights.transforms()

    @property
    def crop(self) -> Crop:
        """How the images of a folder are brought to the size of the network's input."""
        [crop], [resize] = self.transforms.crop_size, self.transforms.resize_size
        return Crop(crop, resize, self.transforms.interpolation)

    def embed(self, raw: Raw) -> Raw:
        """The data set with the embeddings of its images in their place."""
        train, test = self.encode(raw.train), self.encode(raw.test)
        return raw._replace(train=train, test=test, digest=embeddings.digest(train, test))

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Embeddings (N, D) float16 of (N, H, W, 3) uint8 images, read from a file if there is one.

        The file is kept in the folder if that can be written, and named after the encoder, its
        weights and the images. Raises UserError if the weights cannot be had.
        """
        digest = embeddings.digest(np.array([*images.shape, self.cropped]), images)
        file = self.folder / f".lfosa-{self.name}-{self.weights.name}-{digest[:16]}.npy"
        with one_at_a_time(self.folder / ".lfosa-encoder.lock"):
            with contextlib.suppress(FileNotFoundError, UserError):  # a damaged one is made anew
                return embeddings.read_vectors(file, len(images), "the data")
            found = self.apply(images)
            try:
                write_whole(file, partial(np.save, arr=found))
            except UserError as error:
                tell(f"note: {error}: the embeddings stay in memory")
        return found

    @torch.inference_mode()
    def apply(self, images: np.ndarray) -> np.ndarray:
        """Compute what `encode` returns.

        In float32, on CUDA in TF32, whose 11 bits are those of the float16 that is kept; bfloat16
        has 8.
        """
        network, dimension = self._network()
        network = fold_batchnorm(network).to(self.device, memory_format=torch.channels_last)
        found, size = np.empty((len(images), dimension), np.float16), BATCH[self.device.type]
        precision = torch.get_float32_matmul_precision()
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as convolutions always may
        begins = range(0, len(images), size)
        for begin in tqdm(begins, "encoding", unit=" batches", leave=False, disable=None):
            part = np.array(images[begin : begin + size])
            batch = torch.from_numpy(part).to(self.device).permute(0, 3, 1, 2)
            if self.cropped:  # then this is left of the weights' own preprocessing
                batch = functional.convert_image_dtype(batch, torch.float32)
                batch = functional.normalize(batch, self.transforms.mean, self.transforms.std)
            else:
                batch = self.transforms(batch)
            found[begin : begin + size] = network(batch).half().cpu().numpy()
        torch.set_float32_matmul_precision(precision)
        if not np.isfinite(found).all():
            raise UserError(f"--encoder {self.name}: some embeddings are not finite in float16")
        return found

    def _network(self) -> tuple[nn.Module, int]:
        """The network without its last linear layer, for inference, and its D."""
        url, weights = self.weights.url, self.weights
        file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
        try:
            # First as data alone: torchvision would run code that the file holds.
            progress = sys.stderr.isatty()
            weights.get_state_dict(progress=progress, check_hash=True, weights_only=True)
            network = torchvision.models.get_model(self.name, weights=weights, progress=False)
        except MemoryError:
            raise
        except Exception as error:  # neither torch nor urllib names a common class
            why = f"({str(error).strip().partition(chr(10))[0]})"
            if file.exists():
                raise UserError(f"{file} is not {url} {why}: remove it or replace it") from error
            what = f"the weights of {self.name} cannot be downloaded {why}"
            raise UserError(f"{what}: put {file.name} from {url} into {file.parent}") from error
        linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
        parent, _, child = linear[-1].rpartition(".")
        dimension = network.get_submodule(linear[-1]).in_features
        setattr(network.get_submodule(parent), child, nn.Identity())
        return network.eval(), dimension
