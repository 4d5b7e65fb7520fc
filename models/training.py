"""How a network is trained, evaluated and applied to the pool."""

import functools
import itertools
import math
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets import OpenSetData, augment
from datasets.augment import Images
from query_strategies import Diverged, PoolOutputs

from . import center_loss, parallel
from .resnet import ResNet, fold_batchnorm

MOMENTUM = 0.9  # published
WEIGHT_DECAY = 5e-4  # published
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # --amp


class Misfit(Exception):
    """A snapshot to go on from is of another network; one line for the user."""


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


def train(
    network: ResNet,
    data: OpenSetData,
    indices: Tensor,
    args: Namespace,
    generator: Callable[..., torch.Generator],
    temperature: list[float] | None = None,
    state: dict | None = None,
    pause: Callable[[int | None, Callable[[], dict]], None] = lambda *_: None,
    report: Callable[[int, float], None] = lambda *_: None,
) -> None:
    """Train `network` in place with SGD on the training images `indices` (int64, on the CPU).

    args: known_class, max_epoch, batch_size, lr_model, stepsize, gamma, weight_cent, lr_cent, amp, compile.
    generator: (*purpose) -> a CPU generator; every epoch draws from its own, so that training
    can go on from any step. temperature: one per class, see `batch_loss`.
    state: what `snapshot` returned in an earlier process, to go on from there.
    pause(epochs done, or None within an epoch; snapshot) follows every step,
    report(epochs done, mean loss) every epoch. Under torchrun the ranks share out each batch.
    Raises Diverged after an epoch, and from a snapshot, where loss or weights are not finite;
    Misfit where state does not fit.
    """
    device = data.train.pixels.device
    count, amp = len(indices), AMP[args.amp]
    if temperature is not None:
        temperature = torch.tensor(temperature, device=device)
    optimizer = torch.optim.SGD(
        network.parameters(), args.lr_model, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
    )
    # As the first step would, were it not for fp16: a fused step that the scaler skips leaves the
    # momentum uninitialised.
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.stepsize, args.gamma)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    parts = {"network": network, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    centers = None
    if args.weight_cent > 0:
        shape = args.known_class, network.feature_dim  # invalid images have no centre
        centers = center_loss.create(*shape, generator("centers"), device)
        center_optimizer = torch.optim.SGD(centers.parameters(), args.lr_cent)
        parts |= {"centers": centers, "center_optimizer": center_optimizer}
    epoch, step, loss_sum = 0, 0, torch.zeros((), device=device)
    if state is not None:
        try:
            epoch, step, loss_sum = state["epoch"], state["step"], loss_sum + state["loss"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except Exception as error:  # torch names no common class
            raise Misfit("the checkpoint is of another network: start with --overwrite") from error

    def snapshot() -> dict:
        where = {"epoch": epoch, "step": step, "loss": _finite(loss_sum, network, epoch)}
        return where | {name: part.state_dict() for name, part in parts.items()}

    module = network
    if parallel.world() > 1:
        module = DistributedDataParallel(network, [device] if device.type == "cuda" else None)
    network.train()
    bar = _bar("train", total=args.max_epoch, initial=epoch)
    while epoch < args.max_epoch:
        draws = generator("epoch", epoch)
        order = indices[torch.randperm(count, generator=draws)].to(device)
        parameters = augment.draw(data.train, count, draws).to(device)
        begins = range(0, count, args.batch_size)
        # Dropout draws on the device: from one seed a step, so that any step can be the first.
        seeds = torch.randint(2**62, (len(begins),), generator=draws).tolist()
        for begin in begins[step:]:
            end = min(begin + args.batch_size, count)
            share, weight = parallel.share(begin, end)
            index = order[share]
            images = augment.augment(data.train, index, parameters[share])
            targets = data.targets[index]
            if network.dropout_rate:
                torch.manual_seed(seeds[step] + parallel.rank())
            # One shape, hence one compilation: the last partial batch runs as it is.
            whole = end - begin == args.batch_size
            compiled = args.compile and whole
            loss_of = _compiled(batch_loss, device.type) if compiled else batch_loss
            optimizer.zero_grad()
            features, loss = loss_of(module, images, targets, temperature, amp)
            loss_sum += loss.detach() * (weight > 0)
            if centers is not None:
                center_optimizer.zero_grad()
                loss = loss + args.weight_cent * centers(features, targets)
            scaler.scale(loss * weight).backward()
            scaler.step(optimizer)
            if centers is not None:
                center_loss.step(centers, center_optimizer, scaler, 1 / args.weight_cent)
            scaler.update()
            step += 1
            if step < len(begins):
                pause(None, snapshot)
        parallel.add(loss_sum)
        mean_loss = _finite(loss_sum, network, epoch) / count
        epoch, step, loss_sum = epoch + 1, 0, torch.zeros((), device=device)
        scheduler.step()
        report(epoch, mean_loss)
        bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
        bar.update()
        pause(epoch, snapshot)
    bar.close()
    # Batch norm's running statistics: DistributedDataParallel copies rank 0's before every step,
    # hence not after the last one, which some ranks may have done on a stand-in image.
    parallel.copy_rank0(network.buffers())


@torch.inference_mode()
def score(
    network: ResNet,
    images: Images,
    indices: Tensor,
    args: Namespace,
    reads: tuple[str, ...] = ("logits",),
    masks: Tensor | None = None,
    parameters: Tensor | None = None,
) -> PoolOutputs:
    """What the network says of the images `indices` (n, int64, on the CPU), without augmentation.

    args: eval_batch_size, amp, compile. reads: the fields of PoolOutputs to fill; the others
    stay None, and with none at all the network is not run. masks: from `dropout_masks`, for
    mc_logits. parameters: (n, 9) from `augment.draw`, to score through the training augmentation
    after all. Under torchrun the ranks share out the batches and rank 0 gets it all; elsewhere
    the fields are None.
    """
    if not reads:
        return PoolOutputs(len(indices))
    device, size, amp = images.pixels.device, args.eval_batch_size, AMP[args.amp]
    # Whole batches are shared out, so that each is the same computation on any number of ranks.
    edges = [min(e * size, len(indices)) for e in parallel.bounds(math.ceil(len(indices) / size))]
    counts = [end - begin for begin, end in itertools.pairwise(edges)]
    mine = slice(edges[parallel.rank()], edges[parallel.rank() + 1])
    # One shape, hence one compilation and one choice of cuDNN's: the last batch is filled up, and
    # its surplus cut off.
    n = counts[parallel.rank()]
    surplus = -n % size if args.compile or device.type == "cuda" else 0
    indices = F.pad(indices[mine], (0, surplus)).to(device)
    if parameters is not None:
        parameters = F.pad(parameters[mine], (0, 0, 0, surplus)).to(device)
    classes = network.fc.out_features
    shapes = {"features": (n + surplus, network.feature_dim), "logits": (n + surplus, classes)}
    if masks is not None:
        shapes["mc_logits"] = (len(masks), n + surplus, classes)
    filled = {name: torch.empty(shapes[name], device=device) for name in reads}
    folded = fold_batchnorm(network)
    forward = _compiled(_forward, device.type) if args.compile else _forward
    for begin in _bar("score", range(0, n, size)):
        rows = slice(begin, begin + size)
        if parameters is None:
            batch = augment.normalize(images, indices[rows])
        else:
            batch = augment.augment(images, indices[rows], parameters[rows])
        outputs = forward(folded, batch, masks, amp)
        for name, tensor in filled.items():
            tensor[..., rows, :] = outputs[name]
    gathered = {
        name: parallel.gather_rows(tensor[..., :n, :], counts, dim=tensor.ndim - 2)
        for name, tensor in filled.items()
    }
    return PoolOutputs(sum(counts), **gathered)


def _forward(network: ResNet, images: Tensor, masks: Tensor | None, amp) -> dict[str, Tensor]:
    """One batch of `score`: the fields of PoolOutputs by name."""
    with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
        pooled = network.pooled(images)
        features, logits = network.head(pooled)
        outputs = {"features": features, "logits": logits}
        if masks is not None:
            outputs["mc_logits"] = network.head(pooled * masks.unsqueeze(1))[1]
    return outputs


def dropout_masks(network: ResNet, samples: int, generator: torch.Generator) -> Tensor:
    """Dropout masks (samples, pooled_dim) of 0 and 1 / (1 - rate), on the network's device.

    One mask is one draw of the weights, applied to every image: what `BALD` marginalises over.
    """
    keep = 1 - network.dropout_rate
    masks = torch.rand(samples, network.pooled_dim, generator=generator) < keep
    return (masks / keep).to(network.fc.weight.device)


def evaluate(network: ResNet, data: OpenSetData, args: Namespace) -> float:
    """Accuracy on the test images of the known classes, in percent.

    Raises Diverged where the network's outputs are not finite.
    """
    logits = score(network, data.test, torch.arange(data.test.count), args).logits

    def accuracy() -> float:
        if not torch.isfinite(logits).all():
            raise Diverged("the classifier's outputs are not finite: lower --lr-model")
        correct = (logits.argmax(1) == data.test_targets).sum()
        return 100 * int(correct) / len(data.test_targets)

    return parallel.from_rank0(accuracy)


@functools.cache
def _compiled(function: Callable, device_type: str) -> Callable:
    """torch.compile, once per function; with CUDA graphs on CUDA.

    A graph's outputs are overwritten by its next run: whatever outlives a batch is copied or added
    up before. A new network has new addresses, so its first batch records the graph anew.
    """
    mode = "reduce-overhead" if device_type == "cuda" else None
    return torch.compile(function, mode=mode, dynamic=False)


def _finite(loss_sum: Tensor, network: nn.Module, epoch: int) -> float:
    """The loss as a number; Diverged where it, or what the last step made of a weight, is none."""
    loss = float(loss_sum)
    if not math.isfinite(loss):
        raise Diverged(f"the training loss became {loss} in epoch {epoch + 1}: lower --lr-model")
    if not torch.stack([weight.isfinite().all() for weight in network.parameters()]).all():
        raise Diverged(f"the weights became nan or inf in epoch {epoch + 1}: lower --lr-model")
    return loss


def _bar(description: str, iterable=None, **options) -> tqdm:
    """A progress bar of rank 0 that vanishes when done and where there is no terminal."""
    disable = True if parallel.rank() else None
    return tqdm(iterable, description, leave=False, disable=disable, **options)
