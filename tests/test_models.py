"""The networks, their training and their outputs on a pool, against plain loops."""

import copy
import io
import itertools
import math
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

import models
from errors import UserError
from experiment.run import generator
from models import CenterLoss, Objective, Settings, augment
from models.resnet import NETWORKS, fold_batchnorm

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)
FIELDS = ("features", "logits", "mc_logits")
ALL_NETWORKS = list(NETWORKS)  # before the fixture below adds its own


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A network small enough to be trained many times; structure as resnet18's."""
    monkeypatch.setitem(NETWORKS, "tiny", (BasicBlock, (8, 16), (1, 1)))


def make_data(count=60, size=8, device=CPU):
    """Random images, and their targets: 4 known classes and, as class 4, unknown images."""
    shape = count, size, size, 3
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = augment.to_device(pixels, MEAN, STD, 1, True, 15, device)
    return images, (torch.arange(count) % 5).to(device)


def create(name="tiny", num_classes=5, feat_dim=0, seed=0, dropout=0.0, device=CPU):
    return models.create(name, num_classes, feat_dim, generator(seed, "init"), device, dropout)


def train(network, data, indices, objective=None, state=None, **settings):
    """Begin two epochs of batches of 16, unless `settings` say otherwise."""
    settings = Settings(**{"max_epoch": 2, "batch_size": 16, "lr_model": 0.02} | settings)
    objective = objective or Objective()
    return models.train(network, objective, *data, indices, partial(generator, 0), settings, state)


def losses_of(training):
    """Train to the end; the mean loss of each epoch."""
    return [loss for _, loss, _ in training]


def center_loss(network, weight, temperature=None, seed=0):
    shape = 4, network.feature_dim
    return CenterLoss(Objective(temperature), shape, weight, 0.5, generator(seed, "centers"))


def plain_input(images, index):
    """One image, from its bytes."""
    size = images.height * images.width
    pixels = images.pixels[index * size : (index + 1) * size].view(images.height, images.width, 3)
    normalized = (pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return normalized.permute(2, 0, 1).unsqueeze(0)


@torch.no_grad()
def randomize_statistics(network):
    """As if the network had been trained: no batch norm is close to the identity."""
    draws = generator(0, "statistics")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 2, generator=draws)
    return network


def assert_same(network, other):
    state, expected = network.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for key in state:
        assert torch.equal(state[key], expected[key]), key


# ---- networks ----------------------------------------------------------------------------------

# Parameters before the head. By hand: a k x k convolution from a to b channels has k k a b weights,
# and a batch norm of 2 b follows it.
BACKBONES = {"resnet18": 11_168_832, "resnet34": 21_276_992, "resnet50": 23_500_352}
# A quarter of the channels: a 16th of the weights between them, a 4th of all others.
BACKBONES |= {"resnet18-narrow": 700_176, "resnet34-narrow": 1_333_328}
BACKBONES |= {"resnet50-narrow": 1_479_056, "resnet20": 269_072}


@pytest.mark.parametrize("name", BACKBONES)
def test_parameter_counts(name):
    with torch.device("meta"):
        network = models.ResNet(name, 10, 2)
    counts = [parameter.numel() for parameter in network.parameters()]
    assert sum(counts) == BACKBONES[name] + network.pooled_dim * 2 + 2 + 2 * 10 + 10


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
    shortcut = create("resnet20").stages[3].downsample
    x = torch.randn(2, 16, 6, 6)
    y = shortcut(x)
    for i, j in itertools.product(range(3), repeat=2):
        assert torch.equal(y[:, :, i, j], nn.functional.pad(x[:, :, 2 * i, 2 * j], (0, 16)))


CASES = [(name, False) for name in ALL_NETWORKS] + [("tiny", True)]


@pytest.mark.parametrize(("name", "synchronized"), CASES)  # synchronized: as CUDA ranks train
def test_outputs_memory_format_and_folded_batch_norms(name, synchronized):
    network = randomize_statistics(create(name, 4, 2)).eval()
    images = torch.randn(3, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        features, logits = network(images)
        assert features.shape == (3, 2)
        assert torch.equal(logits, network.fc(features))
        for parameter in network.parameters():
            if parameter.ndim == 4:
                assert parameter.is_contiguous(memory_format=torch.channels_last)

        if synchronized:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        before = copy.deepcopy(network)
        folded = fold_batchnorm(network)
        assert not any("running_mean" in name for name in folded.state_dict())
        assert_same(network, before)
        for ours, expected in zip(folded(images), (features, logits), strict=True):
            assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_initialization_is_pytorchs_from_its_generator_alone():
    """Weights are uniform within 1 / sqrt(fan in): kaiming_uniform with a = sqrt(5)."""
    state = torch.get_rng_state()
    network = create("resnet18", 20, 2)
    assert torch.equal(torch.get_rng_state(), state)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight, bound = module.weight.detach(), 1 / math.sqrt(module.weight[0].numel())
            assert weight.abs().max() <= bound * (1 + 1e-6)
            if weight.numel() > 1000:
                assert weight.abs().mean() == pytest.approx(bound / 2, rel=0.05)
    torch.manual_seed(2)
    assert_same(create("resnet18", 20, 2), network)
    assert not torch.equal(create("resnet18", 20, 2, seed=1).fc.weight, network.fc.weight)


def test_dropout_acts_on_the_pooled_vector_in_training_only():
    network, images = create("resnet20", dropout=0.25), torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        pooled, (features, _) = network.pooled(images), network(images)
        kept = features != 0
        assert kept.float().mean() == pytest.approx(0.75, abs=0.03)
        assert torch.allclose(features[kept], pooled[kept] / 0.75)
        network.eval()
        assert torch.equal(network(images)[0], network.pooled(images))


# ---- training ----------------------------------------------------------------------------------


def plain_training(network, images, targets, indices, temperature, weight_cent):
    """The published recipe, an image at a time: five epochs of batches of 16; the mean losses, and
    the centers."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 0.02, 0.9, weight_decay=5e-4)
    centers = torch.empty(4, network.feature_dim).normal_(generator=generator(0, "centers"))
    losses = []
    for epoch in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * 0.5 ** (epoch // 2)
        draws = generator(0, "epoch", epoch)
        order = indices[torch.randperm(len(indices), generator=draws)]
        parameters = images.draw(len(indices), draws)
        total = 0.0
        for index, batch in zip(order.split(16), parameters.split(16), strict=True):
            features, logits = network(images.batch(index, batch))
            loss, pull = 0.0, torch.zeros_like(centers)
            for feature, row, i in zip(features, logits, index.tolist(), strict=True):
                target = int(targets[i])
                row = row / (temperature[target] if temperature else 1)
                loss = loss + row.logsumexp(0) - row[target]
                if target < 4:  # an invalid image has no center, but counts in len(index)
                    difference = feature - centers[target]
                    loss = loss + weight_cent * difference.square().sum()
                    pull[target] -= 2 * difference.detach()
            optimizer.zero_grad()
            (loss / len(index)).backward()
            optimizer.step()
            centers -= 0.5 * pull / len(index)  # as if their loss had weight 1
            total += float(loss.detach())
        losses.append(total / len(indices))
    return losses, centers


@pytest.mark.parametrize("temperature", [None, [0.5] * 4 + [2.0]])
@pytest.mark.parametrize("weight_cent", [0.0, 0.05, 1.0])
def test_training_is_plain_sgd_on_the_mean_loss(weight_cent, temperature):
    """Center loss, weight decay, decay of the learning rate, a partial batch, repeated images."""
    data, indices = make_data(), torch.cat([torch.arange(3, 43), torch.tensor([4, 4, 9, 6])])
    ours, theirs = create(feat_dim=3), create(feat_dim=3)
    objective = Objective(temperature)
    if weight_cent:
        objective = center_loss(ours, weight_cent, temperature)
    losses = losses_of(train(ours, data, indices, objective, max_epoch=5, stepsize=2))
    expected, centers = plain_training(theirs, *data, indices, temperature, weight_cent)
    assert losses == pytest.approx(expected, rel=1e-5)
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(parameter, other, rtol=0, atol=2e-6)
    for parameter in objective.parameters():
        assert torch.allclose(parameter, centers, rtol=0, atol=2e-5)


class Anchored(Objective):
    """What a method may do: a head of its own, and points that each epoch finds anew."""

    def __init__(self, network, seed=0):
        super().__init__([0.5] * 5)
        self.head = nn.Parameter(torch.randn(network.feature_dim, generator=generator(seed)))
        self.found, self.batches = [], []

    def optimizers(self):
        return [torch.optim.SGD([self.head], 0.01, 0.9, nesterov=True)]

    def before_epoch(self, features_of):
        self.found.append(features_of(torch.arange(7)))

    def forward(self, batch):
        self.batches.append(batch)
        anchor = self.found[-1].mean(0)
        own = ((batch.features - anchor) @ self.head - 1).square().sum()
        return super().forward(batch) + 0.1 * own


def test_an_objective_sees_the_images_of_each_batch_and_the_network_before_each_epoch():
    network, data = create(), make_data()
    objective, indices, seen = Anchored(network), torch.tensor([*range(20), 3, 3]), 0
    states = [copy.deepcopy(network)]
    for _ in train(network, data, indices, objective, max_epoch=3):
        states.append(copy.deepcopy(network))
        of_epoch, seen = objective.batches[seen:], len(objective.batches)
        images = torch.cat([batch.index for batch in of_epoch])
        assert images.sort().values.tolist() == sorted(indices.tolist())
        assert all(data[1][batch.index].equal(batch.targets) for batch in of_epoch)
    for state, found in zip(states[:-1], objective.found, strict=True):
        expected = models.predict(state, data[0], torch.arange(7), ("features",))["features"]
        assert torch.equal(found, expected)


def test_a_batch_of_one_image_on_a_1x1_feature_map():
    """8x8 images through resnet18: in the last batch, batch norm has one value per channel."""
    network, data = create("resnet18", feat_dim=2), make_data()
    losses = losses_of(train(network, data, torch.arange(5), batch_size=4))  # raises if not finite
    assert losses[1] != losses[0]
    models.predict(network, data[0], torch.arange(5))  # likewise


DIVERGENCES = {  # temperature, and settings
    "loss": (None, {"lr_model": 1e9}),
    "weights, in the last step": ([1e-3] * 5, {"lr_model": 1e38, "batch_size": 40}),
}


@pytest.mark.parametrize("what", DIVERGENCES)
def test_divergence_is_the_users_to_fix_and_is_not_kept(what):
    kept, (temperature, settings) = [], DIVERGENCES[what]
    objective = Objective(temperature)
    with pytest.raises(UserError, match="--lr-model"):
        kept.extend(train(create(), make_data(), torch.arange(40), objective, **settings))
    assert not kept


def overflowing(network, seed=0):  # gradients too large for the first steps in fp16
    return Objective([0.2] * 5)


def test_a_first_step_that_overflows_in_fp16_is_skipped():
    network, new = create(), create()
    fp16 = make_data(), torch.arange(16), overflowing(network)
    torch.use_deterministic_algorithms(True)  # memory that nobody has written to is NaN
    try:
        losses_of(train(network, *fp16, amp="fp16", max_epoch=1))
        for parameter, first in zip(network.parameters(), new.parameters(), strict=True):
            assert torch.equal(parameter, first)
        losses_of(train(network, *fp16, amp="fp16", max_epoch=4))
    finally:
        torch.use_deterministic_algorithms(False)
    for parameter, first in zip(network.parameters(), new.parameters(), strict=True):
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, first)


def plain(network, seed=0):
    return Objective()


def with_centers(network, seed=0):
    return center_loss(network, 0.1, [0.5] * 4 + [1.0], seed)


VARIANTS = {  # what makes the objective of a network, settings, and the probability of dropout
    "plain": (plain, {}, 0.0),
    "dropout": (plain, {}, 0.5),
    "center loss": (with_centers, {}, 0.0),
    "fp16 after a skipped step": (overflowing, {"amp": "fp16"}, 0.0),
    "a method's own": (Anchored, {}, 0.0),
    "bf16, center loss, dropout": (with_centers, {"amp": "bf16"}, 0.5),
}


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_slow_mixed_precision_is_told(amp, capsys):
    instructions = {
        "bf16": {"avx512bw", "avx_ne_convert"},
        "fp16": {"avx512_fp16", "avx_ne_convert"},
    }
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "avx2" not in (has := set(cpuinfo.read_text().split())):
        pytest.skip("the instructions are known here for Linux on x86 alone")
    flags = Namespace(use_cpu=True, compile=False, deterministic=False, amp=amp)
    models.parallel.setup_device(flags)
    slow = amp != "off" and not has & instructions[amp]
    assert (f"--amp {amp}" in capsys.readouterr().out) == slow


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_interrupted_after_every_epoch_is_the_same_bit_by_bit(variant):
    make, settings, dropout = VARIANTS[variant]
    settings = {"max_epoch": 4, "stepsize": 2} | settings
    data, indices, saved, losses = make_data(), torch.arange(40), io.BytesIO(), []
    whole = create(dropout=dropout)
    objective = make(whole)
    expected = losses_of(train(whole, data, indices, objective, **settings))

    state = None
    for seed in range(4):  # another process knows nothing but the file
        torch.manual_seed(seed)
        network = create(dropout=dropout, seed=seed)
        other = make(network, seed)
        _, loss, snapshot = next(train(network, data, indices, other, state, **settings))
        losses.append(loss)
        saved.seek(0)
        torch.save(snapshot(), saved)
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
    assert losses == expected
    kept = {key: state[key] for key in ("epoch", "network", "objective")}  # of a finished one
    network = create(dropout=dropout, seed=5)
    other = make(network, 5)
    assert losses_of(train(network, data, indices, other, kept, **settings)) == []
    assert_same(network, whole)
    assert_same(other, objective)


# ---- prediction --------------------------------------------------------------------------------


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("eval_batch_size", [1, 16, 256])
def test_predict_equals_a_loop_over_images_and_masks(eval_batch_size, augmented):
    network = randomize_statistics(create(feat_dim=2, dropout=0.5))
    images, indices = make_data()[0], torch.randperm(60, generator=generator(0))[:33]
    masks = models.dropout_masks(network, 3, generator(0))
    parameters, inputs = None, [plain_input(images, i) for i in indices.tolist()]
    if augmented:
        parameters = images.draw(33, generator(1))
        inputs = images.batch(indices, parameters).split(1)
    expected = {"features": torch.zeros(33, 2), "logits": torch.zeros(33, 5)}
    expected["mc_logits"] = torch.zeros(3, 33, 5)
    plain = copy.deepcopy(network).eval()
    with torch.no_grad():
        for i, image in enumerate(inputs):
            expected["features"][i], expected["logits"][i] = (out[0] for out in plain(image))
            for j, mask in enumerate(masks):
                expected["mc_logits"][j, i] = plain.head(plain.pooled(image)[0] * mask)[1]
    more = Settings(eval_batch_size=eval_batch_size), masks, parameters
    for fields in (FIELDS, ("mc_logits",)):
        outputs = models.predict(network, images, indices, fields, *more)
        assert tuple(outputs) == fields
        for field in fields:
            assert outputs[field].dtype == torch.float32
            assert outputs[field].shape == expected[field].shape
            assert torch.allclose(outputs[field], expected[field], rtol=1e-4, atol=1e-5), field


def test_dropout_masks():
    masks = models.dropout_masks(create("resnet20", dropout=0.3), 2000, generator(0))
    assert masks.shape == (2000, 64)
    assert set(masks.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
    assert (masks.mean(0) - 1).abs().max() < 0.09  # 6 standard deviations
    assert (torch.corrcoef(masks.T).fill_diagonal_(0)).abs().max() < 0.13


def test_accuracy_equals_counting():
    images, targets = make_data(37)
    network = randomize_statistics(create())
    logits = models.predict(network, images, torch.arange(37))["logits"].tolist()
    guesses = [row.index(max(row)) for row in logits]
    correct = sum(a == b for a, b in zip(guesses, targets.tolist(), strict=True))
    assert 0 < correct < 37
    found = models.evaluate(network, images, targets, Settings(eval_batch_size=16))
    assert found == 100 * correct / 37


def test_outputs_that_are_not_finite_are_the_users_to_fix():
    network, data = create(), make_data()
    network.fc.bias.data[0] = math.nan
    with pytest.raises(UserError, match="--lr-model"):
        models.predict(network, data[0], torch.arange(9))


# ---- torch.compile -----------------------------------------------------------------------------


def test_compilation_happens_in_the_first_round_only_and_changes_nothing(monkeypatch):
    """Batches of another shape, or the next round's networks, would be compiled anew."""
    compiled, compile_ = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph  # a fast one

    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend=backend))
    data = make_data()
    for number in range(3):
        labeled, pool = torch.arange(37 + number), torch.arange(20 + number, 60)
        outputs = []
        for compile in (False, True):
            network = create(feat_dim=2, seed=number, dropout=0.5)
            losses_of(train(network, data, labeled, compile=compile))
            masks = models.dropout_masks(network, 3, generator(number))
            settings = Settings(eval_batch_size=16, compile=compile)
            outputs.append(models.predict(network, data[0], pool, FIELDS, settings, masks))
        for field in FIELDS:
            eager, fast = (output[field] for output in outputs)
            assert eager.shape == fast.shape
            assert torch.allclose(eager, fast, rtol=1e-3, atol=1e-4), field
        if number == 0:
            first = len(compiled)
        assert len(compiled) == first > 0


# ---- CUDA --------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("amp", list(models.AMP))
def test_training_and_prediction_on_cuda(amp, compile):
    """The outputs are the CPU's, within the precision of the type."""
    device, index = torch.device("cuda"), torch.arange(50)
    settings = {"amp": amp, "compile": compile, "eval_batch_size": 16}
    network, data = create("resnet18", 5, 2, 0, 0.5, device), make_data(size=32, device=device)
    objective = center_loss(network, 0.1, [0.5] * 5).to(device)
    losses_of(train(network, data, index, objective, **settings))
    masks = models.dropout_masks(network, 3, generator(0))
    ours = models.predict(network, data[0], index, FIELDS, Settings(**settings), masks)
    network, images = network.cpu(), make_data(size=32)[0]
    expected = models.predict(network, images, index, FIELDS, masks=masks.cpu())
    for field in FIELDS:
        assert ours[field].device.type == "cuda"
        difference = (ours[field].cpu() - expected[field]).abs().max()
        assert difference <= 0.1 * expected[field].abs().max(), field
