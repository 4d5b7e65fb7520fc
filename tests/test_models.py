"""The networks, their training and their outputs on a pool, against plain loops."""

import copy
import inspect
import io
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchvision.models.resnet import BasicBlock

import models
from errors import UserError
from models import augment, training
from models.resnet import NETWORKS, fold_batchnorm
from utils import generator

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
    images = augment.to_device(pixels, MEAN, STD, 1, True, device)
    return images, (torch.arange(count) % 5).to(device)


def create(name="tiny", num_classes=5, feat_dim=0, seed=0, dropout=0.0, device=CPU):
    return models.create(name, num_classes, feat_dim, generator(seed, "init"), device, dropout)


def train(network, data, indices, **settings):
    """Two epochs of batches of 16, unless `settings` say otherwise; returns their mean losses."""
    losses = []
    settings = {"max_epoch": 2, "batch_size": 16, "lr_model": 0.02} | settings
    settings.setdefault("after_epoch", lambda epoch, loss, snapshot: losses.append(loss))
    models.train(network, *data, indices, partial(generator, 0), **settings)
    return losses


def plain_input(images, index):
    """One image, from its bytes."""
    size = images.height * images.width
    pixels = images.pixels[index * size : (index + 1) * size].view(images.height, images.width, 3)
    normalised = (pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return normalised.permute(2, 0, 1).unsqueeze(0)


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

# Parameters before the head, and entries of the pooled vector. By hand: a k x k convolution from a
# to b channels has k k a b weights, and a batch norm of 2 b follows it.
BACKBONES = {
    "resnet18": (11_168_832, 512),
    "resnet34": (21_276_992, 512),
    "resnet50": (23_500_352, 2048),
    "resnet20": (269_072, 64),
}


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_parameter_counts(name):
    backbone, pooled = BACKBONES[name]
    for classes, feat_dim in ((10, 0), (20, 2)):
        with torch.device("meta"):
            network = models.ResNet(name, classes, feat_dim)
        features = feat_dim or pooled
        head = features * classes + classes
        if feat_dim:
            head += pooled * feat_dim + feat_dim
        assert sum(p.numel() for p in network.parameters()) == backbone + head


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


@pytest.mark.parametrize("synchronised", [False, True])  # as CUDA ranks train
@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_outputs_memory_format_and_folded_batch_norms(name, synchronised):
    network = randomize_statistics(create(name, 4, 2)).eval()
    images = torch.randn(3, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        features, logits = network(images)
        assert features.shape == (3, 2)
        assert torch.equal(logits, network.fc(features))
        for parameter in network.parameters():
            if parameter.ndim == 4:
                assert parameter.is_contiguous(memory_format=torch.channels_last)

        if synchronised:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        before = copy.deepcopy(network)
        folded = fold_batchnorm(network)
        assert not any("running_mean" in name for name in folded.state_dict())
        assert_same(network, before)
        for ours, expected in zip(folded(images), (features, logits), strict=True):
            assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_initialisation_is_pytorchs_from_its_generator_alone():
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
    """The published recipe, an image at a time: five epochs of batches of 16; the mean losses."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 0.02, 0.9, weight_decay=5e-4)
    centers = torch.empty(4, network.feature_dim).normal_(generator=generator(0, "centers"))
    losses = []
    for epoch in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * 0.5 ** (epoch // 2)
        draws = generator(0, "epoch", epoch)
        order = indices[torch.randperm(len(indices), generator=draws)]
        parameters = augment.draw(images, len(indices), draws)
        total = 0.0
        for index, batch in zip(order.split(16), parameters.split(16), strict=True):
            features, logits = network(augment.augment(images, index, batch))
            loss, distance, pull = 0.0, 0.0, torch.zeros_like(centers)
            for feature, row, i in zip(features, logits, index.tolist(), strict=True):
                target = int(targets[i])
                row = row / (temperature[target] if temperature else 1)
                loss = loss + row.logsumexp(0) - row[target]
                if target < 4:  # an invalid image has no centre, but counts in len(index)
                    difference = feature - centers[target]
                    distance = distance + difference.square().sum()
                    pull[target] -= 2 * difference.detach()
            optimizer.zero_grad()
            ((loss + weight_cent * distance) / len(index)).backward()
            optimizer.step()
            centers -= 0.5 * pull / len(index)  # as if their loss had weight 1
            total += float(loss.detach())
        losses.append(total / len(indices))
    return losses


@pytest.mark.parametrize("temperature", [None, [0.5] * 4 + [2.0]])
@pytest.mark.parametrize("weight_cent", [0.0, 0.05, 1.0])
def test_training_is_plain_sgd_on_the_mean_loss(weight_cent, temperature):
    """Center loss, weight decay, decay of the learning rate, a partial batch, repeated images."""
    data, indices = make_data(), torch.cat([torch.arange(3, 43), torch.tensor([4, 4, 9, 6])])
    ours, theirs = create(feat_dim=3), create(feat_dim=3)
    settings = {"max_epoch": 5, "stepsize": 2, "weight_cent": weight_cent, "num_centers": 4}
    losses = train(ours, data, indices, temperature=temperature, **settings)
    expected = plain_training(theirs, *data, indices, temperature, weight_cent)
    assert losses == pytest.approx(expected, rel=1e-5)
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(parameter, other, rtol=0, atol=2e-6)


def test_the_published_setting_is_the_default():
    published = {"max_epoch": 100, "batch_size": 128, "lr_model": 0.01, "stepsize": 20}
    published |= {"gamma": 0.5, "weight_cent": 0.0, "lr_cent": 0.5, "amp": "off"}
    parameters = inspect.signature(models.train).parameters
    assert {key: parameters[key].default for key in published} == published


def test_a_batch_of_one_image_on_a_1x1_feature_map():
    """8x8 images through resnet18: in the last batch, batch norm has one value per channel."""
    network, data = create("resnet18", feat_dim=2), make_data()
    losses = train(network, data, torch.arange(5), batch_size=4)  # raises if not finite
    assert losses[1] != losses[0]
    models.predict(network, data[0], torch.arange(5))  # likewise


DIVERGENCES = {
    "loss": {"lr_model": 1e9},
    "weights, in the last step": {"lr_model": 1e38, "temperature": [1e-3] * 5, "batch_size": 40},
}


@pytest.mark.parametrize("what", DIVERGENCES)
def test_divergence_is_the_users_to_mend_and_is_not_kept(what):
    kept, settings = [], DIVERGENCES[what] | {"after_epoch": lambda *epoch: kept.append(epoch)}
    with pytest.raises(UserError, match="--lr-model"):
        train(create(), make_data(), torch.arange(40), **settings)
    assert not kept


OVERFLOW = {"amp": "fp16", "temperature": [0.2] * 5}  # gradients too large for the first steps


def test_a_first_step_that_overflows_in_fp16_is_skipped():
    network, new = create(), create()
    torch.use_deterministic_algorithms(True)  # memory that nobody has written to is NaN
    try:
        train(network, make_data(), torch.arange(16), max_epoch=1, **OVERFLOW)
        for parameter, first in zip(network.parameters(), new.parameters(), strict=True):
            assert torch.equal(parameter, first)
        train(network, make_data(), torch.arange(16), max_epoch=4, **OVERFLOW)
    finally:
        torch.use_deterministic_algorithms(False)
    for parameter, first in zip(network.parameters(), new.parameters(), strict=True):
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, first)


VARIANTS = {  # settings, and the probability of dropout
    "plain": ({}, 0.0),
    "dropout": ({}, 0.5),
    "center loss": ({"weight_cent": 0.1, "num_centers": 4}, 0.0),
    "fp16 after a skipped step": (OVERFLOW, 0.0),
    "all": ({"amp": "bf16", "weight_cent": 0.1, "temperature": [0.5] * 4 + [1.0]}, 0.5),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_interrupted_after_every_epoch_is_the_same_bit_by_bit(variant):
    settings, dropout = VARIANTS[variant]
    settings = {"max_epoch": 4, "stepsize": 2, "batch_size": 16} | settings
    data, indices = make_data(), torch.arange(40)
    whole, saved, losses = create(dropout=dropout), io.BytesIO(), []
    expected = train(whole, data, indices, **settings)

    def after_epoch(epoch, loss, snapshot):
        losses.append(loss)
        saved.seek(0)
        torch.save(snapshot(), saved)
        raise KeyboardInterrupt

    network, state = create(dropout=dropout), None
    for epoch in range(4):
        with pytest.raises(KeyboardInterrupt):
            train(network, data, indices, state=state, after_epoch=after_epoch, **settings)
        # Another process knows nothing but the file.
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        torch.manual_seed(epoch)
        network = create(dropout=dropout, seed=epoch + 1)
    assert train(network, data, indices, state=state, **settings) == []
    assert losses == expected
    assert_same(network, whole)


# ---- prediction --------------------------------------------------------------------------------


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("eval_batch_size", [1, 16, 256])
def test_predict_equals_a_loop_over_images_and_masks(eval_batch_size, augmented):
    network = randomize_statistics(create(feat_dim=2, dropout=0.5))
    images, indices = make_data()[0], torch.randperm(60, generator=generator(0))[:33]
    masks = models.dropout_masks(network, 3, generator(0))
    parameters, inputs = None, [plain_input(images, i) for i in indices.tolist()]
    if augmented:
        parameters = augment.draw(images, 33, generator(1))
        inputs = augment.augment(images, indices, parameters).split(1)
    expected = {"features": torch.zeros(33, 2), "logits": torch.zeros(33, 5)}
    expected["mc_logits"] = torch.zeros(3, 33, 5)
    plain = copy.deepcopy(network).eval()
    with torch.no_grad():
        for i, image in enumerate(inputs):
            expected["features"][i], expected["logits"][i] = (out[0] for out in plain(image))
            for j, mask in enumerate(masks):
                expected["mc_logits"][j, i] = plain.head(plain.pooled(image)[0] * mask)[1]
    settings = {"eval_batch_size": eval_batch_size, "masks": masks, "parameters": parameters}
    for fields in (FIELDS, ("mc_logits",)):
        outputs = models.predict(network, images, indices, fields, **settings)
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
    assert models.evaluate(network, images, targets, eval_batch_size=16) == 100 * correct / 37


def test_outputs_that_are_not_finite_are_the_users_to_mend():
    network, data = create(), make_data()
    network.fc.bias.data[0] = math.nan
    with pytest.raises(UserError, match="--lr-model"):
        models.predict(network, data[0], torch.arange(9))


# ---- torch.compile -----------------------------------------------------------------------------


def test_compilation_happens_in_the_first_round_only_and_changes_nothing(monkeypatch):
    """Batches of another shape, or the next round's networks, would be compiled anew."""
    backend, compile_ = CompileCounterWithBackend("aot_eager"), torch.compile  # a fast one
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend=backend))
    data = make_data()
    for number in range(3):
        labeled, pool = torch.arange(37 + number), torch.arange(20 + number, 60)
        outputs = []
        for compile in (False, True):
            network = create(feat_dim=2, seed=number, dropout=0.5)
            train(network, data, labeled, compile=compile)
            masks = models.dropout_masks(network, 3, generator(number))
            settings = {"eval_batch_size": 16, "masks": masks, "compile": compile}
            outputs.append(models.predict(network, data[0], pool, FIELDS, **settings))
        for field in FIELDS:
            eager, compiled = (output[field] for output in outputs)
            assert eager.shape == compiled.shape
            assert torch.allclose(eager, compiled, rtol=1e-3, atol=1e-4), field
        assert backend.frame_count == 2  # a step of training, a batch of prediction


# ---- CUDA --------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__ < "2.9", reason="its cross_entropy asks for a real device")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_cuda_path_mixes_no_devices(monkeypatch):
    """Without a GPU: fake tensors compute nothing and have no backward pass, but refuse to mix
    host and device. Training goes up to the loss of its first step, prediction to its end."""

    def loss_alone(*args, batch_loss=training.batch_loss):
        features, loss = batch_loss(*args)
        assert (features.device.type, loss.device.type) == ("cuda", "cuda")
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "batch_loss", loss_alone)
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: [0] * len(tensor))
    monkeypatch.setattr(FakeTensor, "__bool__", lambda tensor: True, raising=False)
    mode = FakeTensorMode()
    mode.__deepcopy__ = lambda memo: mode  # fold_batchnorm copies the network
    with mode:
        with torch.device("cuda"):
            network = models.ResNet("resnet20", 5, 2, 0.5)
        data, index = make_data(20, device=torch.device("cuda")), torch.arange(20)
        parameters = augment.draw(data[0], 20, generator(0))
        with pytest.raises(RuntimeError, match="device"):  # it does refuse
            augment.augment(data[0], index, parameters.cuda())
        with pytest.raises(KeyboardInterrupt):
            train(network, data, index, temperature=[0.5] * 5)
        masks = models.dropout_masks(network, 3, generator(0))
        for settings in ({"parameters": None}, {"parameters": parameters}):
            outputs = models.predict(network, data[0], index, FIELDS, masks=masks, **settings)
            assert {outputs[field].device.type for field in FIELDS} == {"cuda"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("amp", list(models.AMP))
def test_training_and_prediction_on_cuda(amp, compile):
    """The outputs are the CPU's, within the precision of the type."""
    device, index, settings = torch.device("cuda"), torch.arange(50), {"amp": amp}
    network, data = create("resnet18", 5, 2, 0, 0.5, device), make_data(size=32, device=device)
    settings["compile"] = compile
    train(network, data, index, temperature=[0.5] * 5, weight_cent=0.1, **settings)
    masks = models.dropout_masks(network, 3, generator(0))
    settings |= {"eval_batch_size": 16, "masks": masks}
    ours = models.predict(network, data[0], index, FIELDS, **settings)
    network, images = network.cpu(), make_data(size=32)[0]
    expected = models.predict(network, images, index, FIELDS, masks=masks.cpu())
    for field in FIELDS:
        assert ours[field].device.type == "cuda"
        difference = (ours[field].cpu() - expected[field]).abs().max()
        assert difference <= 0.1 * expected[field].abs().max(), field
