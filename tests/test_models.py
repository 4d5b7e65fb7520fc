"""The networks, their training, and their outputs on a pool, against plain loops."""

import contextlib
import copy
import io
import math
import random
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchvision.models.resnet import BasicBlock

import models
from datasets import OpenSetData, augment
from models import center_loss, resnet, training
from models.resnet import NETWORKS, Subsample, fold_batchnorm
from query_strategies import PoolOutputs
from utils import generator

CPU = torch.device("cpu")
FIELDS = PoolOutputs._fields[1:]
ALL_NETWORKS = list(NETWORKS)  # before the fixture below adds its own


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A network small enough to be trained many times; structure as resnet18's."""
    monkeypatch.setitem(NETWORKS, "tiny", (BasicBlock, (8, 16), (1, 1)))


def create(name="tiny", num_classes=4, feat_dim=0, seed=0, dropout=0.0):
    return models.create(name, num_classes, feat_dim, generator(seed, "init"), CPU, dropout)


def settings(**changes):
    """Arguments of the command line, as far as the networks need them."""
    args = Namespace(max_epoch=2, batch_size=16, lr_model=0.02, stepsize=20, gamma=0.5)
    args.weight_cent, args.lr_cent, args.amp, args.compile = 0.0, 0.5, "off", False
    args.eval_batch_size = 16
    vars(args).update(changes)
    return args


def make_images(count, size, seed, device=CPU):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return augment.to_device(pixels, (0.5, 0.4, 0.3), (0.3, 0.2, 0.25), 1, True, device)


def make_data(count=60, size=8, classes=4, seed=0, device=CPU):
    """Random images of `classes` known classes and an unknown one."""
    train, test = make_images(count, size, seed, device), make_images(37, size, seed + 1, device)
    targets = torch.arange(count) % (classes + 1)
    test_targets = torch.arange(37) % classes
    known = targets < classes
    return OpenSetData(train, targets.to(device), known, test, test_targets.to(device))


def train(network, data, indices, args, seed=0, **options):
    models.train(network, data, indices, args, lambda *p: generator(seed, *p), **options)
    return network


def plain_input(images, index):
    """One image, from its bytes."""
    size = images.height * images.width
    pixels = images.pixels[index * size : (index + 1) * size].view(images.height, images.width, 3)
    mean, std = torch.tensor((0.5, 0.4, 0.3)), torch.tensor((0.3, 0.2, 0.25))
    return ((pixels / 255 - mean) / std).permute(2, 0, 1).unsqueeze(0)


def randomize_statistics(network, seed=0):
    """As if the network had been trained: no batch norm is close to the identity."""
    draws = generator(seed, "statistics")
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 2, generator=draws)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(0, 0.5, generator=draws)
    return network


def assert_same(network, other):
    state, expected = network.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for key in state:
        assert torch.equal(state[key], expected[key]), key


# ---- networks ----------------------------------------------------------------------------------

BACKBONES = {  # parameters below the head, derived by hand in models/resnet.py; pooled vector P
    "resnet18": (11_168_832, 512),
    "resnet34": (21_276_992, 512),
    "resnet50": (23_500_352, 2048),
    "resnet20": (269_072, 64),
}


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_parameter_counts(name):
    backbone, pooled = BACKBONES[name]
    with torch.device("meta"):
        for classes, feat_dim in ((10, 0), (20, 2), (1, 7)):
            network = models.ResNet(name, classes, feat_dim)
            head = pooled * feat_dim + feat_dim + feat_dim * classes + classes
            head = head if feat_dim else pooled * classes + classes
            assert sum(p.numel() for p in network.parameters()) == backbone + head
    told = 269_722 if name == "resnet20" else backbone
    assert f"{told:,}" in resnet.__doc__


@pytest.mark.parametrize(("classes", "feat_dim"), [(5, 0), (4, 2), (1, 7)])
@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_output_shapes_and_memory_format(name, classes, feat_dim):
    network = create(name, classes, feat_dim)
    formats = []
    for module in network.stages:
        module.register_forward_hook(lambda *a: formats.append(a[-1]))
    images = torch.randn(3, 3, 16, 16).to(memory_format=torch.channels_last)
    features, logits = network(images)
    assert features.shape == (3, feat_dim or BACKBONES[name][1])
    assert logits.shape == (3, classes)
    assert torch.equal(logits, network.fc(features))
    for tensor in [*network.parameters(), *formats]:
        if tensor.ndim == 4:
            assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_feature_maps_of_resnet18():
    network, shapes = create("resnet18"), []
    network.bn1.register_forward_hook(lambda *a: shapes.append(tuple(a[-1].shape[1:])))
    for block in network.stages:
        block.register_forward_hook(lambda *a: shapes.append(tuple(a[-1].shape[1:])))
    network(torch.randn(2, 3, 32, 32))
    stages = [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert shapes == [(64, 32, 32)] + [shape for shape in stages for _ in range(2)]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_equals_torchvision_with_another_stem(name):
    ours = randomize_statistics(create(name, 7))
    theirs = getattr(torchvision.models, name)(num_classes=7)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    values = ours.state_dict().values()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = theirs.eval()(images)
        assert torch.allclose(ours.eval()(images)[1], expected, rtol=1e-4, atol=1e-5)


def test_resnet20_has_shortcuts_without_parameters():
    network = create("resnet20")
    shortcuts = [module for module in network.modules() if isinstance(module, Subsample)]
    assert [shortcut.extra_channels for shortcut in shortcuts] == [16, 32]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 19  # and the linear layer: 20
    assert all(c.kernel_size == (3, 3) for c in convolutions)
    x = torch.randn(2, 16, 6, 6)
    y = shortcuts[0](x)
    assert y.shape == (2, 32, 3, 3)
    for i in range(3):
        for j in range(3):
            assert torch.equal(y[:, :16, i, j], x[:, :, 2 * i, 2 * j])
    assert y[:, 16:].count_nonzero() == 0


def test_default_initialisation():
    """kaiming_uniform with a = sqrt(5): uniform within 1 / sqrt(fan in)."""
    network = create("resnet18", 20, 2)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            weight = module.weight.detach().abs()
            assert weight.max() <= bound * (1 + 1e-6)
            if weight.numel() > 1000:
                assert weight.max() > 0.99 * bound
                assert weight.mean() == pytest.approx(bound / 2, rel=0.05)
                assert module.weight.mean().abs() < 0.05 * bound
            if module.bias is not None:
                assert module.bias.abs().max() <= bound
                assert module.bias.std() > 0
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


def test_initialisation_depends_on_its_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = create("resnet20")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_same(create("resnet20"), first)
    assert not torch.equal(create("resnet20", seed=1).conv1.weight, first.conv1.weight)


def test_dropout_acts_on_the_pooled_vector_in_training_only():
    network = create("resnet20", dropout=0.25)
    with torch.no_grad():
        images = torch.randn(64, 3, 8, 8)
        pooled = network.pooled(images)
        features, _ = network(images)
        kept = features != 0
        assert kept.float().mean() == pytest.approx(0.75, abs=0.03)
        assert torch.allclose(features[kept], pooled[kept] / 0.75)
        network.eval()
        assert torch.equal(network(images)[0], network.pooled(images))


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_folded_batch_norm_changes_nothing(name):
    network = randomize_statistics(create(name, 5, 2))
    before = copy.deepcopy(network)
    folded = fold_batchnorm(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert_same(network, before)
    assert network.training
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        for ours, expected in zip(folded(images), network.eval()(images), strict=True):
            assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


# ---- loss and one step -------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [None, [0.5, 0.5, 0.5, 0.5, 2.0], [1.0] * 5])
def test_batch_loss_against_a_loop_over_images(temperature):
    network = create(num_classes=5, feat_dim=2, seed=3)
    images, targets = 3 * torch.randn(20, 3, 8, 8), torch.arange(20) % 5
    tensor = None if temperature is None else torch.tensor(temperature)
    features, loss = training.batch_loss(network, images, targets, tensor, None)
    expected_features, logits = network(images)
    expected = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        scaled = [a / (temperature[target] if temperature else 1) for a in row]
        expected += math.log(sum(math.exp(a - scaled[target]) for a in scaled))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(features, expected_features)


def test_center_loss_against_a_loop_over_images():
    loss = center_loss.create(4, 3, generator(0), CPU)
    features, targets = torch.randn(10, 3), torch.randint(4, (10,))
    expected = 0.0
    for f, t in zip(features.tolist(), targets.tolist(), strict=True):
        expected += sum((a - b) ** 2 for a, b in zip(f, loss.centers[t].tolist(), strict=True)) / 2
    assert float(loss(features, targets).detach()) == pytest.approx(expected, rel=1e-5)


def plain_training(network, data, indices, args, seed, temperature):
    """The published recipe without any of our shortcuts; returns the centres."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), args.lr_model, 0.9, weight_decay=5e-4)
    shape = network.fc.out_features, network.feature_dim
    centers = torch.empty(shape).normal_(generator=generator(seed, "centers"))
    for epoch in range(args.max_epoch):
        for group in optimizer.param_groups:
            group["lr"] = args.lr_model * args.gamma ** (epoch // args.stepsize)
        draws = generator(seed, "epoch", epoch)
        order = indices[torch.randperm(len(indices), generator=draws)]
        parameters = augment.draw(data.train, len(indices), draws)
        for index, batch in zip(
            order.split(args.batch_size), parameters.split(args.batch_size), strict=True
        ):
            targets = data.targets[index]
            features, logits = network(augment.augment(data.train, index, batch))
            loss = F.cross_entropy(logits / temperature[targets].unsqueeze(1), targets)
            distance = 0.5 * (features - centers[targets]).square().sum(1)
            loss = loss + args.weight_cent * distance.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pull = torch.zeros_like(centers)
            for feature, target in zip(features.detach(), targets.tolist(), strict=True):
                pull[target] += centers[target] - feature
            centers -= args.lr_cent * pull / len(index)
    return centers


@pytest.mark.parametrize("weight_cent", [0.0, 0.05, 2.0])
@pytest.mark.parametrize("seed", range(2))
def test_training_is_plain_sgd_on_the_mean_loss(seed, weight_cent):
    """Momentum, weight decay, decay of the learning rate, and a partial batch; the centres move
    as if their loss had weight 1."""
    data, indices = make_data(seed=seed), torch.arange(3, 43)
    args = settings(stepsize=1, weight_cent=weight_cent)
    temperature = [0.5] * 4 + [2.0]
    snapshots = []

    def pause(epochs, snapshot):
        snapshots.append(copy.deepcopy(snapshot()))

    ours = create(num_classes=5, feat_dim=3, seed=seed)
    theirs = copy.deepcopy(ours)
    train(ours, data, indices, args, seed, temperature=temperature, pause=pause)
    centers = plain_training(theirs, data, indices, args, seed, torch.tensor(temperature))
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-6)
    if weight_cent:
        assert torch.allclose(snapshots[-1]["centers"]["centers"], centers, rtol=0, atol=1e-5)
    rates = [snapshot["optimizer"]["param_groups"][0]["lr"] for snapshot in snapshots]
    assert rates == [0.02, 0.02, 0.01, 0.01, 0.01, 0.005]  # the last of an epoch: what comes next


def test_learning_rate_is_halved_every_twenty_epochs():
    rates = {}

    def pause(epochs, snapshot):
        if epochs is None:  # within an epoch: its own rate
            state = snapshot()
            rates[state["epoch"]] = state["optimizer"]["param_groups"][0]["lr"]

    args = settings(max_epoch=45, batch_size=4)
    train(create(), make_data(), torch.arange(4), settings(max_epoch=1), pause=pause)
    assert rates == {}  # one step an epoch
    train(create(), make_data(), torch.tensor([0, 1, 2, 3, 5]), args, pause=pause)
    assert rates == {epoch: 0.02 / 2 ** (epoch // 20) for epoch in range(45)}


def test_center_loss_of_weight_zero_is_never_made(monkeypatch):
    def refuse(*_):
        raise AssertionError("center loss at weight 0")

    monkeypatch.setattr(center_loss, "create", refuse)
    monkeypatch.setattr(center_loss.CenterLoss, "__init__", refuse)
    train(create(), make_data(), torch.tensor([0, 1, 2, 3]), settings())


def test_no_epoch_leaves_the_network_as_it_was():
    network = create()
    train(network, make_data(), torch.arange(4), settings(max_epoch=0))
    assert_same(network, create())


@pytest.mark.parametrize("count", [1, 5])
def test_a_batch_of_one_image_on_a_1x1_feature_map(count):
    """8x8 images through resnet18: batch norm has a single value per channel."""
    losses = []
    network = create("resnet18", feat_dim=2)
    before = copy.deepcopy(network)
    args = settings(max_epoch=8 if count == 1 else 2, batch_size=4)
    indices = torch.tensor([0, 1, 2, 3, 5])[:count]
    train(network, make_data(), indices, args, report=lambda epochs, loss: losses.append(loss))
    assert all(map(math.isfinite, losses))
    for (name, parameter), old in zip(network.named_parameters(), before.parameters(), strict=True):
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, old), name
    if count == 1:
        assert losses[-1] < losses[0]
    assert models.score(network, make_data().train, indices, args).logits.isfinite().all()


@pytest.mark.parametrize("when", ["report", "snapshot"])
def test_a_loss_that_is_not_finite_raises_diverged(when):
    def pause(epochs, snapshot):
        if when == "snapshot":
            snapshot()  # no checkpoint of such a network either

    args, network = settings(lr_model=1e9, max_epoch=3), create(num_classes=5)
    says = r"(loss|weights) became (nan|inf).* in epoch \d"
    with pytest.raises(models.Diverged, match=says) as error:
        train(network, make_data(), torch.arange(40), args, pause=pause)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_not_kept_though_the_loss_is(monkeypatch):
    """The last step of an epoch spoils them, after its loss."""
    steps, step = [], torch.optim.SGD.step

    def spoil(optimizer, *args, **options):
        steps.append(step(optimizer, *args, **options))
        if len(steps) == 3:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][4].view(-1)[0] = math.nan

    monkeypatch.setattr(torch.optim.SGD, "step", spoil)
    reports = []
    with pytest.raises(models.Diverged, match="weights became nan or inf in epoch 1"):
        hooks = {"report": lambda *_: reports.append(1)}
        train(create(num_classes=5), make_data(), torch.arange(40), settings(max_epoch=2), **hooks)
    assert not reports


def test_a_first_step_that_overflows_in_fp16_is_skipped(monkeypatch):
    batch_loss, calls, seen = training.batch_loss, [], []

    def large_at_first(*args):
        features, loss = batch_loss(*args)
        calls.append(1)
        return features, loss * (1e35 if len(calls) == 1 else 1)

    def pause(epochs, snapshot):
        if len(calls) == 1:
            seen.append(copy.deepcopy(network.state_dict()))

    monkeypatch.setattr(training, "batch_loss", large_at_first)
    args, network = settings(amp="fp16", max_epoch=1), create(num_classes=5)
    before = copy.deepcopy(dict(network.named_parameters()))
    train(network, make_data(), torch.arange(40), args, pause=pause)
    for name, parameter in network.named_parameters():
        assert torch.equal(seen[0][name], before[name]), name
        assert not torch.equal(parameter, before[name]) and parameter.isfinite().all(), name


# ---- going on ----------------------------------------------------------------------------------

VARIANTS = {  # of arguments, and the probability of dropout
    "plain": ({}, 0.0),
    "dropout": ({}, 0.5),
    "center loss": ({"weight_cent": 0.1}, 0.0),
    "bf16": ({"amp": "bf16"}, 0.0),
    "fp16": ({"amp": "fp16"}, 0.0),
    "all": ({"amp": "bf16", "weight_cent": 0.1}, 0.5),
}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_interrupted_after_every_step_is_the_same_bit_by_bit(variant):
    changes, dropout = VARIANTS[variant]
    args = settings(max_epoch=3, stepsize=2, **changes)
    data, indices, temperature = make_data(), torch.arange(40), [0.5] * 4 + [1.0]
    losses, places, saved = [], [], None

    def pause(epochs, snapshot):
        nonlocal saved
        saved = io.BytesIO()
        torch.save(snapshot(), saved)
        places.append(epochs)
        raise Interrupted

    def record(*row):
        losses.append(row)

    whole = create(num_classes=5, dropout=dropout)
    train(whole, data, indices, args, temperature=temperature, report=record)
    whole_losses, losses = losses, []
    network, state = create(num_classes=5, dropout=dropout), None
    options = {"temperature": temperature, "pause": pause, "report": record}
    while True:
        with contextlib.suppress(Interrupted):
            train(network, data, indices, args, state=state, **options)
            break
        # Another process knows nothing but the file.
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        torch.manual_seed(len(places))
        network = create(num_classes=5, dropout=dropout, seed=len(places))
    assert places == [None, None, 1, None, None, 2, None, None, 3]
    assert_same(network, whole)
    assert losses == whole_losses
    assert len(losses) == 3


@pytest.mark.parametrize("seed", range(3))
def test_training_interrupted_once_at_a_random_step(seed):
    """As above, with the steps around the interruption taken in one go."""
    at, data, indices = random.Random(seed).randrange(2, 8), make_data(), torch.arange(40)
    args = settings(max_epoch=3, weight_cent=0.1)
    whole = train(create(num_classes=5, dropout=0.5), data, indices, args)
    saved, steps = io.BytesIO(), 0

    def pause(epochs, snapshot):
        nonlocal steps
        steps += 1
        if steps == at:
            torch.save(snapshot(), saved)
            raise Interrupted

    with pytest.raises(Interrupted):
        train(create(num_classes=5, dropout=0.5), data, indices, args, pause=pause)
    saved.seek(0)
    network = create(num_classes=5, dropout=0.5, seed=9)
    train(network, data, indices, args, state=torch.load(saved, weights_only=True))
    assert_same(network, whole)


# ---- scoring -----------------------------------------------------------------------------------


def plain_outputs(network, inputs, masks):
    """One image at a time through the network in evaluation mode, one mask at a time."""
    network.eval()
    rows = {field: [] for field in FIELDS}
    with torch.no_grad():
        for image in inputs:
            features, logits = network(image)
            pooled = network.pooled(image)
            sampled = [network.head(pooled * mask)[1] for mask in masks]
            rows["features"].append(features)
            rows["logits"].append(logits)
            rows["mc_logits"].append(torch.stack(sampled))
    return {field: torch.cat(tensors, dim=-2) for field, tensors in rows.items()}


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("count", [1, 16, 33, 40])
@pytest.mark.parametrize("feat_dim", [0, 2])
def test_score_equals_a_loop_over_images(count, feat_dim, augmented):
    network = randomize_statistics(create(feat_dim=feat_dim, dropout=0.5))
    images = make_images(50, 8, seed=count)
    indices = torch.randperm(50, generator=generator(count))[:count]
    masks = models.dropout_masks(network, 3, generator(0))
    if augmented:
        parameters = augment.draw(images, count, generator(1))
        inputs = augment.augment(images, indices, parameters).split(1)
    else:
        parameters = None
        inputs = [plain_input(images, int(index)) for index in indices]
    expected = plain_outputs(copy.deepcopy(network), inputs, masks)
    before = copy.deepcopy(network)
    outputs = models.score(network, images, indices, settings(), FIELDS, masks, parameters)
    assert outputs.size == count
    for field in FIELDS:
        ours = getattr(outputs, field)
        assert ours.dtype == torch.float32
        assert ours.shape == expected[field].shape
        assert torch.allclose(ours, expected[field], rtol=1e-4, atol=1e-5), field
    assert_same(network, before)


@pytest.mark.parametrize("field", FIELDS)
def test_score_fills_what_is_read_and_no_more(field):
    network = create(dropout=0.5)
    masks = models.dropout_masks(network, 3, generator(0)) if field == "mc_logits" else None
    outputs = models.score(
        network, make_images(9, 8, 0), torch.arange(9), settings(), (field,), masks
    )
    assert [name for name in FIELDS if getattr(outputs, name) is not None] == [field]


def test_score_without_reads_runs_no_network():
    images = make_images(9, 8, 0)
    assert models.score(None, images, torch.arange(7), settings(), ()) == PoolOutputs(7)


def test_dropout_masks():
    network = create("resnet20", dropout=0.3)
    masks = models.dropout_masks(network, 2000, generator(0))
    assert masks.shape == (2000, 64)
    assert set(masks.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
    kept = (masks > 0).float()
    assert (kept.mean(0) - 0.7).abs().max() < 0.06  # 6 standard deviations
    assert abs(kept.mean() - 0.7) < 0.008
    assert (torch.corrcoef(kept.T).fill_diagonal_(0)).abs().max() < 0.13
    assert torch.equal(masks, models.dropout_masks(network, 2000, generator(0)))
    assert not torch.equal(masks, models.dropout_masks(network, 2000, generator(1)))


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_equals_a_loop_over_images(seed):
    data = make_data(seed=seed)
    network = randomize_statistics(create(seed=seed), seed)
    correct = 0
    plain = copy.deepcopy(network).eval()
    for i, target in enumerate(data.test_targets.tolist()):
        logits = plain(plain_input(data.test, i))[1].view(-1).tolist()
        correct += logits.index(max(logits)) == target
    assert 0 < correct < 37
    assert models.evaluate(network, data, settings()) == 100 * correct / 37


def test_accuracy_of_a_network_that_is_not_finite_raises_diverged():
    network = create()
    network.fc.bias.data[0] = math.nan
    with pytest.raises(models.Diverged):
        models.evaluate(network, make_data(), settings())


# ---- torch.compile -----------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch):
    """torch.compile with a fast backend: what was compiled so far, and the shapes of all calls."""
    graphs, shapes, compile_ = [], set(), torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def counting_compile(function, **_):
        compiled = compile_(function, backend=backend)

        def call(network, images, *rest):
            shapes.add((function.__name__, *images.shape))
            return compiled(network, images, *rest)

        return call

    monkeypatch.setattr(torch, "compile", counting_compile)
    training._compiled.cache_clear()
    torch._dynamo.reset()
    yield graphs, shapes
    training._compiled.cache_clear()
    torch._dynamo.reset()


def active_learning(data, rounds, compile):
    """Both scripts' use of the networks: new ones every round, more labels, a smaller pool."""
    args = settings(max_epoch=1, compile=compile)
    for number in range(rounds):
        detector = create(num_classes=5, feat_dim=2, seed=number, dropout=0.5)
        train(detector, data, torch.arange(37 + number), args, number, temperature=[0.5] * 5)
        pool = torch.arange(20 + 3 * number, data.train.count)
        masks = models.dropout_masks(detector, 3, generator(number))
        outputs = models.score(detector, data.train, pool, args, FIELDS, masks)
        classifier = create(feat_dim=2, seed=number)
        labeled = data.known.nonzero().view(-1)[: 33 + number]
        train(classifier, data, labeled, args, number, temperature=[1.0] * 4)
        yield outputs, models.evaluate(classifier, data, args), classifier.fc.weight


def test_compilation_happens_in_the_first_round_only_and_changes_nothing(compilations):
    graphs, shapes = compilations
    data = make_data()
    eager = active_learning(data, 3, compile=False)
    for number, ours in enumerate(active_learning(data, 3, compile=True)):
        if number == 0:
            after_first = len(graphs)
            assert after_first >= 4  # training and scoring, of each network
        outputs, accuracy, weight = next(eager)
        for tensor, expected in zip(ours[0][1:], outputs[1:], strict=True):
            assert torch.allclose(tensor, expected, rtol=1e-3, atol=1e-4)
        assert torch.allclose(ours[2], weight, rtol=1e-3, atol=1e-5)
        assert ours[1] == pytest.approx(accuracy, abs=100 / 37)
    assert len(graphs) == after_first
    assert shapes == {("batch_loss", 16, 3, 8, 8), ("_forward", 16, 3, 8, 8)}


# ---- CUDA --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9) and not torch.cuda.is_available(),
    reason="fake CUDA tensors of this PyTorch ask for a real device in cross_entropy",
)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_cuda_path_mixes_no_devices(name, monkeypatch):
    """Without a GPU: fake tensors compute nothing and have no backward pass, but refuse to mix
    host and device. Training goes up to the loss of its first step, scoring through all of it."""
    batch_loss = training.batch_loss

    def loss_alone(*args):
        features, loss = batch_loss(*args)
        assert (features.shape, features.device.type) == ((16, 2), "cuda")
        assert (loss.shape, loss.device.type) == ((), "cuda")
        raise Interrupted

    monkeypatch.setattr(training, "batch_loss", loss_alone)
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: [0] * len(tensor))
    mode = FakeTensorMode()
    mode.__deepcopy__ = lambda memo: mode  # fold_batchnorm copies the network
    device, args = torch.device("cuda"), settings()
    with mode:
        with device:
            network = models.ResNet(name, 5, 2, 0.5)
        data, index = make_data(20, device=device), torch.arange(20)
        parameters = augment.draw(data.train, 20, generator(0))
        with pytest.raises(RuntimeError, match="device"):  # it does refuse
            augment.augment(data.train, index, parameters.to(device))
        with pytest.raises(Interrupted):
            train(network, data, index, args, temperature=[0.5] * 5)
        masks = models.dropout_masks(network, 3, generator(0))
        for augmentation in (None, parameters):
            outputs = models.score(network, data.train, index, args, FIELDS, masks, augmentation)
            assert {getattr(outputs, field).device.type for field in FIELDS} == {"cuda"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_training_and_scoring_on_cuda(name, amp, compile):
    device, args = torch.device("cuda"), settings(amp=amp, weight_cent=0.1, compile=compile)
    data = make_data(size=32, device=device)
    network = models.create(name, 5, 2, generator(0), device, 0.5)
    train(network, data, torch.arange(50), args, temperature=[0.5] * 5)
    masks = models.dropout_masks(network, 3, generator(0))
    parameters = augment.draw(data.train, 60, generator(1))
    for augmentation in (None, parameters):
        index = torch.arange(60)
        outputs = models.score(network, data.train, index, args, FIELDS, masks, augmentation)
        for field in FIELDS:
            assert getattr(outputs, field).device.type == "cuda"
            assert getattr(outputs, field).isfinite().all()
    assert 0 <= models.evaluate(network, data, args) <= 100
