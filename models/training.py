"""How a network is trained, evaluated and applied to images."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from errors import UserError

from . import augment, parallel
from .augment import Images
from .resnet import ResNet, fold_batchnorm

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # --amp


def batch_loss(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    amp: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Features (B, F) and the cross-entropy summed over the batch.

    images: (B, 3, H, W), targets: (B,) int64. temperature: (C,) or None; an image's logits are
    first divided by the entry of its own target (LfOSA's low-temperature cross-entropy).
    """
    with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
        features, logits = network(images)
    logits = logits.float()
    if temperature is not None:
        logits = logits / temperature[targets].unsqueeze(1)
    return features.float(), F.cross_entropy(logits, targets, reduction="sum")


def center_loss(features: Tensor, targets: Tensor, centers: Tensor) -> Tensor:
    """The squared distances between the features and the centres of their classes, summed.

    Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016,
    equation 2, has half of it; LfOSA's released code has the whole. features: (B, F), targets: (B,)
    int64, centers: (K, F). A target of K or more (an invalid image) has no centre and adds nothing.
    """
    last = len(centers) - 1
    squares = (features - centers[targets.clamp(max=last)]).square().sum(1)
    return (squares * (targets <= last)).sum()


def train(
    network: ResNet,
    images: Images,
    targets: Tensor,
    indices: Tensor,
    generator: Callable[..., torch.Generator],
    *,
    temperature: Sequence[float] | None = None,
    max_epoch: int = 100,
    batch_size: int = 128,
    lr_model: float = 0.01,
    stepsize: int = 20,
    gamma: float = 0.5,
    weight_cent: float = 0.0,
    lr_cent: float = 0.5,
    num_centers: int | None = None,
    amp: str = "off",
    compile: bool = False,
    state: dict | None = None,
    after_epoch: Callable[[int, float, Callable[[], dict]], None] = lambda *_: None,
) -> None:
    """Train `network` in place with SGD on the images `indices`; the defaults are published.

    targets: (N,) int64 on the device, of all images. indices: (n,) int64 on the CPU; an image
    may stand there several times. generator(*purpose): a CPU generator; every epoch draws from
    its own. temperature: one per class, see `batch_loss`. lr_model is multiplied by gamma every
    `stepsize` epochs. num_centers: K; targets of K or more have no centre.
    after_epoch(epochs done, mean loss, snapshot) may keep what `snapshot()` returns: passed as
    `state` it continues the training; on the CPU the result is equal to the last bit. For a
    finished training its "epoch" and "network" are enough. Under torchrun the ranks share each
    batch. Raises UserError if the loss or a weight became NaN or infinite.
    """
    device, count = targets.device, len(indices)
    if temperature is not None:
        temperature = torch.tensor(temperature, device=device)
    settings = {"momentum": 0.9, "weight_decay": 5e-4}  # published
    optimizer = torch.optim.SGD(network.parameters(), lr_model, **settings, fused=True)
    # Fused SGD leaves the momentum uninitialised if GradScaler skips the first step: zero it.
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, stepsize, gamma)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    parts = {"network": network, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    centers = None
    if weight_cent > 0:
        shape = num_centers or network.fc.out_features, network.feature_dim
        drawn = torch.randn(shape, generator=generator("centers"))
        centers = nn.Embedding.from_pretrained(drawn, freeze=False).to(device)
        center_optimizer = torch.optim.SGD(centers.parameters(), lr_cent)
        parts |= {"centers": centers, "center_optimizer": center_optimizer}
    first = 0
    if state is not None:
        first = state["epoch"]
        for name in parts.keys() & state.keys():
            parts[name].load_state_dict(state[name])
    module = network
    if parallel.world() > 1:
        module = DistributedDataParallel(network, [device] if device.type == "cuda" else None)

    def snapshot() -> dict:
        return {"epoch": epoch + 1} | {name: part.state_dict() for name, part in parts.items()}

    network.train()
    bar = _bar("train", range(first, max_epoch), initial=first, total=max_epoch)
    for epoch in bar:
        draws = generator("epoch", epoch)
        order = indices[torch.randperm(count, generator=draws)].to(device)
        parameters = augment.draw(images, count, draws).to(device)
        begins = range(0, count, batch_size)
        # Dropout draws on the device: one seed per step makes it the same after a resumption.
        seeds = torch.randint(2**62, (len(begins),), generator=draws).tolist()
        loss_sum = torch.zeros((), device=device)
        for begin, seed in zip(begins, seeds, strict=True):
            end = min(begin + batch_size, count)
            share, weight = parallel.share(begin, end)
            index = order[share]
            inputs = augment.augment(images, index, parameters[share])
            if network.dropout_rate:
                torch.manual_seed(seed + parallel.rank())
            # Only whole batches are compiled: one shape, hence one compilation.
            compiled = compile and end - begin == batch_size
            loss_of = _compiled(batch_loss, device.type) if compiled else batch_loss
            optimizer.zero_grad()
            features, loss = loss_of(module, inputs, targets[index], temperature, AMP[amp])
            loss_sum += loss.detach() * (weight > 0)
            if centers is not None:
                center_optimizer.zero_grad()
                loss = loss + weight_cent * center_loss(features, targets[index], centers.weight)
            scaler.scale(loss * weight).backward()
            scaler.step(optimizer)
            if centers is not None:
                # The centres move as if their loss had weight 1 (Wen et al., algorithm 1).
                parallel.add(centers.weight.grad)
                centers.weight.grad.mul_(1 / weight_cent / parallel.world())
                scaler.step(center_optimizer)
            scaler.update()
        parallel.add(loss_sum)
        mean_loss = float(loss_sum) / count
        finite = torch.stack([weight.isfinite().all() for weight in network.parameters()]).all()
        if not (math.isfinite(mean_loss) and finite):
            raise UserError(f"training diverged in epoch {epoch + 1}: lower --lr-model")
        scheduler.step()
        bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
        after_epoch(epoch + 1, mean_loss, snapshot)
    if parallel.world() > 1:
        # DistributedDataParallel copies rank 0's batch norm statistics before, not after a step.
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


@torch.inference_mode()
def predict(
    network: ResNet,
    images: Images,
    indices: Tensor,
    fields: Sequence[str] = ("logits",),
    *,
    eval_batch_size: int = 256,
    amp: str = "off",
    compile: bool = False,
    masks: Tensor | None = None,
    parameters: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """Apply the network to the images `indices`, (n,) int64 on the CPU, without augmentation.

    Returns for each of `fields`: "features" (n, F), "logits" (n, C) or "mc_logits" (S, n, C),
    float32 on the device. masks: (S, P) from `dropout_masks`, for mc_logits. parameters: (n, 9)
    from `augment.draw`, to apply the training augmentation after all. Under torchrun the ranks
    share the batches, rank 0 gets the result, and the others get None for each field.
    Raises UserError if an output is NaN or infinite.
    """
    device, size, classes = images.pixels.device, eval_batch_size, network.fc.out_features
    # Whole batches are shared out, so that each is the same computation on any number of ranks.
    edges = [min(e * size, len(indices)) for e in parallel.bounds(math.ceil(len(indices) / size))]
    first, last = edges[parallel.rank()], edges[parallel.rank() + 1]
    counts = [end - begin for begin, end in itertools.pairwise(edges)]
    rows, samples = max(counts), 0 if masks is None else len(masks)
    shapes = {"features": (rows, network.feature_dim), "logits": (rows, classes)}
    shapes["mc_logits"] = samples, rows, classes
    outputs = {name: torch.empty(shapes[name], device=device) for name in fields}
    folded, indices = fold_batchnorm(network), indices.to(device)
    for begin in _bar("predict", range(first, last, size)):
        end = min(begin + size, last)
        index = indices[begin:end]
        if parameters is None:
            batch = augment.normalize(images, index)
        else:
            batch = augment.augment(images, index, parameters[begin:end].to(device))
        # As in training, only whole batches are compiled.
        forward = _compiled(_forward, device.type) if compile and len(index) == size else _forward
        found = forward(folded, batch, masks, AMP[amp])
        for name, tensor in outputs.items():
            tensor[..., begin - first : end - first, :] = found[name]
    for name, tensor in outputs.items():
        outputs[name] = parallel.gather_rows(tensor, counts)
        if parallel.rank() == 0 and not outputs[name].isfinite().all():
            raise UserError(f"the network's {name} are not finite: lower --lr-model")
    return outputs


def _forward(network: ResNet, images: Tensor, masks: Tensor | None, amp) -> dict[str, Tensor]:
    """One batch of `predict`: its fields by name."""
    with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
        pooled = network.pooled(images)
        features, logits = network.head(pooled)
        outputs = {"features": features, "logits": logits}
        if masks is not None:
            outputs["mc_logits"] = network.head(pooled * masks.unsqueeze(1))[1]
    return outputs


def dropout_masks(network: ResNet, samples: int, generator: torch.Generator) -> Tensor:
    """Dropout masks (samples, P) of 0 and 1 / (1 - rate), on the network's device.

    One mask is one draw of the weights, applied to every image: what `BALD` marginalises over.
    """
    keep = 1 - network.dropout_rate
    masks = torch.rand(samples, network.pooled_dim, generator=generator) < keep
    return (masks / keep).to(network.fc.weight.device)


def evaluate(network: ResNet, images: Images, targets: Tensor, **settings) -> float:
    """Accuracy in percent, NaN without images; targets: (M,) int64. settings: as for `predict`."""
    if not len(targets):
        return math.nan
    logits = predict(network, images, torch.arange(len(targets)), **settings)["logits"]
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
