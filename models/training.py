"""How a network is trained, evaluated and applied to images."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from errors import UserError

from . import parallel
from .augment import Images
from .network import Network
from .objective import Batch, Objective
from .resnet import fold_batchnorm
from .vectors import Embeddings

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # --amp


@dataclass(frozen=True)
class Settings:
    """How networks are trained and applied. The defaults are published; a data set may have others.

    This is the one list of hyperparameters: each is an argument of the scripts, too.
    """

    max_epoch: int = 100
    feat_dim: int = 2  # see Network
    batch_size: int = 128
    lr_model: float = 0.01
    stepsize: int = 20  # epochs between decays of the learning rate
    gamma: float = 0.5  # factor of each decay
    weight_cent: float = 0.0  # of the center loss
    lr_cent: float = 0.5
    dropout: float = 0.5  # on the pooled vector, only for BALD
    mc_samples: int = 20  # dropout masks that BALD averages over
    amp: str = "off"  # one of AMP
    compile: bool = False
    eval_batch_size: int = 256


PUBLISHED = Settings()


def train(
    network: Network,
    objective: Objective,
    inputs: Images | Embeddings,
    targets: Tensor,
    indices: Tensor,
    generator_for: Callable[..., torch.Generator],
    settings: Settings = PUBLISHED,
    state: dict | None = None,
) -> Iterator[tuple[int, float, Callable[[], dict]]]:
    """Train `network` and `objective` in place with SGD on the images `indices`.

    targets: (N,) int64 on the device, of all images. indices: (n,) int64 on the CPU; an image
    may stand there several times. generator_for(*purpose): a CPU generator; every epoch draws
    from its own.
    Yields after each epoch (epochs done, mean loss, snapshot): what `snapshot()` returns, passed as
    `state`, continues the training; on the CPU the result is equal to the last bit. For a finished
    training its "epoch", "network" and "objective" are enough. Under torchrun the ranks share each
    batch. Raises UserError if the loss or a weight became NaN or infinite.
    """
    count, parts = len(indices), _parts(network, objective, settings, targets.device)
    optimizers = [part for name, part in parts.items() if name.startswith("optimizer")]
    state = state or {"epoch": 0}
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state[name])
    module = parallel.distributed(network)

    def features_of(images: Tensor) -> Tensor:
        found = predict(network, inputs, images, ("features",), settings)["features"]
        return found.clone()  # gradients may be computed with it

    def snapshot() -> dict:
        return {"epoch": epoch + 1} | {name: part.state_dict() for name, part in parts.items()}

    network.train()
    first, last = state["epoch"], settings.max_epoch
    bar = _bar("train", range(first, last), initial=first, total=last)
    for epoch in bar:
        objective.before_epoch(features_of)
        draws = generator_for("epoch", epoch)
        loss_sum = torch.zeros((), device=targets.device)
        for index, batch, size, weight in _batches(inputs, indices, settings.batch_size, draws):
            # Only whole batches are compiled: one shape, hence one compilation.
            compiled = settings.compile and size == settings.batch_size
            forward = _compiled(_outputs, batch.device.type) if compiled else _outputs
            features, logits = forward(module, batch, settings.amp)
            loss = objective(Batch(index, features, logits, targets[index])) * weight
            _step(loss, optimizers, parts["scaler"], objective)
            loss_sum += loss.detach() * size
        parallel.average([loss_sum])
        mean_loss = float(loss_sum) / count
        if not (math.isfinite(mean_loss) and _finite(network) and _finite(objective)):
            raise UserError(f"training diverged in epoch {epoch + 1}: lower --lr-model")
        parts["scheduler"].step()
        bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
        yield epoch + 1, mean_loss, snapshot
    parallel.copy_from_rank0(network.buffers())  # the statistics of batch norm, after the last step


def _parts(
    network: nn.Module, objective: Objective, settings: Settings, device: torch.device
) -> dict[str, object]:
    """All that has a state in a training: "network", "objective", "optimizer ...", and so on."""
    published = {"momentum": 0.9, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(network.parameters(), settings.lr_model, **published, fused=True)
    # Fused SGD leaves the momentum uninitialized if GradScaler skips the first step: zero it.
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    optimizers = [optimizer, *objective.optimizers()]
    return {
        "network": network,
        "objective": objective,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, settings.stepsize, settings.gamma),
        "scaler": torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16"),
        **{f"optimizer {i}": each for i, each in enumerate(optimizers)},
    }


def _batches(
    inputs: Images | Embeddings, indices: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, int, float]]:
    """An epoch's batches in random order: index, network input, the whole batch's size, weight.

    Under torchrun index and input are this rank's share; weight is that of its summed loss.
    """
    count = len(indices)
    order = indices[torch.randperm(count, generator=generator)].to(inputs.device)
    parameters = inputs.draw(count, generator).to(inputs.device)
    begins = range(0, count, batch_size)
    # Dropout draws on the device: one seed per step makes it the same after a resumption.
    seeds = torch.randint(2**62, (len(begins),), generator=generator).tolist()
    for begin, seed in zip(begins, seeds, strict=True):
        if inputs.device.type == "cpu":  # torch.manual_seed seeds other devices, too: half a step
            torch.default_generator.manual_seed(seed + parallel.rank())
        else:
            torch.manual_seed(seed + parallel.rank())
        end = min(begin + batch_size, count)
        share, weight = parallel.share(begin, end)
        yield order[share], inputs.batch(order[share], parameters[share]), end - begin, weight


def _step(
    loss: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    objective: Objective,
) -> None:
    """Move all parameters; DistributedDataParallel averages the gradients of the network's."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    scaler.scale(loss).backward()
    parallel.average([parameter.grad for parameter in objective.parameters()])
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()


def _finite(module: nn.Module) -> bool:
    """Whether no parameter is NaN or infinite, with one wait for the device."""
    found = [parameter.isfinite().all() for parameter in module.parameters()]
    return not found or bool(torch.stack(found).all())


def _outputs(network: nn.Module, batch: Tensor, amp: str) -> tuple[Tensor, Tensor]:
    """Features (B, F) and logits (B, C) of a batch of network input, float32."""
    with torch.autocast(batch.device.type, dtype=AMP[amp], enabled=amp != "off"):
        features, logits = network(batch)
    return features.float(), logits.float()


@torch.inference_mode()
def predict(
    network: Network,
    inputs: Images | Embeddings,
    indices: Tensor,
    fields: Sequence[str] = ("logits",),
    settings: Settings = PUBLISHED,
    masks: Tensor | None = None,
    parameters: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """Apply the network to the images `indices`, (n,) int64 on the CPU, without augmentation.

    Returns for each of `fields`: "features" (n, F), "logits" (n, C) or "mc_logits" (S, n, C),
    float32 on the device. masks: (S, P) from `dropout_masks`, for mc_logits. parameters: those
    from `inputs.draw`, to apply the training augmentation after all. Under torchrun the ranks
    share the batches, rank 0 gets the result, and the others get None for each field.
    Raises UserError if an output is NaN or infinite.
    """
    device, size = inputs.device, settings.eval_batch_size
    # Whole batches are shared out, so that each is the same computation on any number of ranks.
    edges = [min(e * size, len(indices)) for e in parallel.bounds(math.ceil(len(indices) / size))]
    first, last = edges[parallel.rank()], edges[parallel.rank() + 1]
    counts = [end - begin for begin, end in itertools.pairwise(edges)]
    rows, samples = max(counts), 0 if masks is None else len(masks)
    shapes = {"features": (rows, network.feature_dim), "logits": (rows, network.fc.out_features)}
    shapes["mc_logits"] = samples, *shapes["logits"]
    outputs = {name: torch.empty(shapes[name], device=device) for name in fields}
    folded, indices = fold_batchnorm(network), indices.to(device)
    for begin in _bar("predict", range(first, last, size)):
        end = min(begin + size, last)
        index = indices[begin:end]
        augmented = None if parameters is None else parameters[begin:end].to(device)
        # As in training, only whole batches are compiled.
        compiled = settings.compile and len(index) == size
        forward = _compiled(_forward, device.type) if compiled else _forward
        found = forward(folded, inputs.batch(index, augmented), masks, settings.amp)
        for name, tensor in outputs.items():
            tensor[..., begin - first : end - first, :] = found[name]
    for name, tensor in outputs.items():
        outputs[name] = parallel.gather_rows(tensor, counts)
        if parallel.rank() == 0 and not outputs[name].isfinite().all():
            raise UserError(f"the network's {name} are not finite: lower --lr-model")
    return outputs


def _forward(network: Network, batch: Tensor, masks: Tensor | None, amp: str) -> dict[str, Tensor]:
    """One batch of `predict`: its fields by name."""
    with torch.autocast(batch.device.type, dtype=AMP[amp], enabled=amp != "off"):
        pooled = network.pooled(batch)
        features, logits = network.head(pooled)
        outputs = {"features": features, "logits": logits}
        if masks is not None:
            outputs["mc_logits"] = network.head(pooled * masks.unsqueeze(1))[1]
    return outputs


def dropout_masks(network: Network, samples: int, generator: torch.Generator) -> Tensor:
    """Dropout masks (samples, P) of 0 and 1 / (1 - rate), on the network's device.

    One mask is one draw of the weights, applied to every image: what `BALD` marginalizes over.
    """
    keep = 1 - network.dropout_rate
    masks = torch.rand(samples, network.pooled_dim, generator=generator) < keep
    return (masks / keep).to(network.fc.weight.device)


def evaluate(
    network: Network, inputs: Images | Embeddings, targets: Tensor, settings: Settings = PUBLISHED
) -> float:
    """Accuracy in percent on all of `inputs`, NaN without any; targets: (M,) int64."""
    if not len(targets):
        return math.nan
    logits = predict(network, inputs, torch.arange(len(targets)), settings=settings)["logits"]
    return parallel.from_rank0(
        lambda: 100 * int((logits.argmax(1) == targets).sum()) / len(targets)
    )


@functools.cache
def _compiled(function: Callable, device_type: str) -> Callable:
    """torch.compile, once per function; with CUDA graphs on CUDA.

    CUDA graphs reuse output buffers: copy what must outlive a batch.
    """
    mode = "reduce-overhead" if device_type == "cuda" else None
    return torch.compile(function, mode=mode, dynamic=False)


def _bar(description: str, iterable: Iterable, **options) -> tqdm:
    """A progress bar of rank 0, shown only on a terminal and removed when done."""
    disable = True if parallel.rank() else None
    return tqdm(iterable, description, leave=False, disable=disable, **options)
