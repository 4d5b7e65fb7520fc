"""Every registered strategy: one contract for all, and each against a plain computation."""

import bisect
import copy
import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import weibull_min
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

import models
from query_strategies import STRATEGIES, PoolOutputs, kmeans, select
from query_strategies.uncertainty import entropy

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SIZE, KNOWN, FEATURES, MASKS = 40, 4, 3, 4  # of the pools below


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def needs_detector(name):
    return getattr(STRATEGIES[name], "NEEDS_DETECTOR", False)


def pool(seed, size=SIZE, known=KNOWN, classes=None, labeled=30, invalid=12):
    """Random outputs, all but `objective`; of a detector unless `classes` says otherwise."""
    draws, classes = seeded(seed), classes or known + 1
    targets = torch.randint(known, (labeled,), generator=draws)
    logits = 3 * torch.randn(size, classes, generator=draws)
    labeled_logits = torch.randn(labeled, classes, generator=draws) + 3 * one_hot(targets, classes)
    return PoolOutputs(
        size=size,
        num_known=known,
        features=torch.randn(size, FEATURES, generator=draws),
        logits=logits,
        mc_logits=3 * torch.randn(MASKS, size, classes, generator=draws),
        labeled_features=torch.randn(labeled, FEATURES, generator=draws),
        labeled_logits=labeled_logits,
        labeled_targets=targets,
        invalid_features=torch.randn(invalid, FEATURES, generator=draws),
        classifier_logits=logits[:, :known] + torch.randn(size, known, generator=draws),
        precisions=(0.7, 0.2),
    )


@functools.cache
def network(known, device):
    return models.create("resnet20", known + 1, FEATURES, seeded(0), torch.device(device))


def learnt(name, outputs, device):
    """The strategy's objective, prepared for an epoch with these invalid images."""
    invalid = torch.arange(len(outputs.invalid_features))
    detector = network(outputs.num_known, device)
    objective = STRATEGIES[name].objective(detector, None, invalid, lambda *_: seeded(0)).to(device)
    objective.before_epoch(lambda indices: outputs.invalid_features[indices].to(device))
    return objective


def only_read(name, outputs, device="cpu"):
    """The outputs as strategy `name` gets them: what it does not list in READS is None."""
    read = {field: getattr(outputs, field) for field in STRATEGIES[name].READS}
    if "objective" in read:
        read["objective"] = learnt(name, outputs, device)
    read = {key: each.to(device) if torch.is_tensor(each) else each for key, each in read.items()}
    return PoolOutputs(outputs.size, outputs.num_known, **read)


# ---- the contract ------------------------------------------------------------------------------


def changed(outputs, change):
    """The outputs with all tensors but the targets changed."""
    fields = outputs._asdict()
    del fields["labeled_targets"]
    fields = {name: each for name, each in fields.items() if torch.is_tensor(each)}
    return outputs._replace(**{name: change(tensor) for name, tensor in fields.items()})


def same(value, other):
    """Whether two fields of outputs are equal to the last bit."""
    if isinstance(value, nn.Module):
        value, other = value.state_dict(), other.state_dict()
        return value.keys() == other.keys() and all(same(value[key], other[key]) for key in value)
    return value.equal(other) if torch.is_tensor(value) else value == other


def all_unknown(outputs):
    for logits in outputs.logits, outputs.mc_logits, outputs.labeled_logits:
        logits[..., -1] += 40
    return outputs


POOLS = {
    "ordinary": pool,
    "constant": lambda seed: changed(pool(seed), torch.ones_like),
    "zero": lambda seed: changed(pool(seed), torch.zeros_like),
    "all unknown": lambda seed: all_unknown(pool(seed)),
    "extreme": lambda seed: changed(pool(seed), lambda tensor: 1e4 * tensor.sign()),
    "classifier of one class": lambda seed: pool(seed, known=1, classes=1),
    "detector of one class": lambda seed: pool(seed, known=1),
    "one image": lambda seed: pool(seed, size=1),
    "one labeled image": lambda seed: pool(seed, labeled=1),
    "no invalid image": lambda seed: pool(seed, invalid=0),
    "one invalid image": lambda seed: pool(seed, invalid=1),
}


def global_random_state():
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2:], random.getstate()


@pytest.mark.filterwarnings("error")  # a warning per round is noise on the user's terminal
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_contract(name, kind, device):
    if needs_detector(name) and kind.startswith("classifier"):
        pytest.skip("reads the logit of class K")
    make = POOLS[kind]
    size = make(0).size
    for seed, count in enumerate({1, 2, size // 2, size - 1, size, size + 1, 10 * size} - {0}):
        given = only_read(name, make(seed), device)
        before, state = copy.deepcopy(given), global_random_state()
        positions = select(name, given, count, seeded(seed))
        assert global_random_state() == state
        assert all(map(same, given, before))
        assert positions.dtype == torch.int64
        assert positions.device.type == "cpu"
        assert positions.shape == (min(count, size),)
        assert len(set(positions.tolist())) == len(positions)
        assert set(positions.tolist()) <= set(range(size))
        assert torch.equal(positions, select(name, given, count, seeded(seed)))


@pytest.mark.parametrize("name", STRATEGIES)
def test_equal_images_have_equal_chances(name):
    """Of images that a strategy cannot tell apart, each generator has others first, at each place
    of the query. For `random` all images are of this kind."""
    trials, size, count = 150, 8, 3
    given = only_read(name, changed(pool(0, size), torch.ones_like))
    queried = np.zeros((count, size))  # how often each image is queried at each place
    for trial in range(trials):
        chosen = select(name, given, count, seeded(trial)).tolist()
        queried[range(count), chosen] += 1
    assert abs(queried / trials - 1 / size).max() < 0.135  # 5 standard deviations


# ---- one score per image -----------------------------------------------------------------------


def best(score, count, generator):
    """Highest score first; of equal ones, which comes first in a random order of all images."""
    order = torch.randperm(len(score), generator=generator).tolist()
    return sorted(order, key=lambda i: -score[i])[:count]


def softmax(logits):
    top = max(logits)
    weights = [math.exp(a - top) for a in logits]
    return [w / sum(weights) for w in weights]


def plain_entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def negative_gap(probabilities):
    *_, second, first = sorted(probabilities)
    return second - first


def plain_information(mc_logits):
    """Entropy of the mean prediction minus mean entropy: (S, C) -> a number."""
    samples = [softmax(logits) for logits in mc_logits]
    mean = [sum(column) / MASKS for column in zip(*samples, strict=True)]
    return plain_entropy(mean) - sum(map(plain_entropy, samples)) / MASKS


SCORES = {  # of image i, from all outputs
    "uncertainty": lambda outputs, i: plain_entropy(softmax(outputs.logits[i].tolist())),
    "certainty": lambda outputs, i: -plain_entropy(softmax(outputs.logits[i].tolist())),
    "margin": lambda outputs, i: negative_gap(softmax(outputs.logits[i].tolist())),
    "Max_AV": lambda outputs, i: max(outputs.logits[i].tolist()),
    "BALD": lambda outputs, i: plain_information(outputs.mc_logits[:, i].tolist()),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", SCORES)
def test_scores_of_single_images(name, seed, monkeypatch):
    monkeypatch.setattr("query_strategies.outputs.CHUNK", 7 + 100 * seed)
    given = only_read(name, pool(seed, 60))
    score = [SCORES[name](given, i) for i in range(60)]
    assert select(name, given, 25, seeded(seed)).tolist() == best(score, 25, seeded(seed))


# ---- AV_based, AV_temperature, AV_uncertainty --------------------------------------------------


def activations(seed):
    """Logits of a small pool, known images with higher activations, and how many to query."""
    draws = seeded(seed)
    classes = int(torch.randint(2, 16, (), generator=draws))
    size = int(torch.randint(2, 2 + 5 * classes, (), generator=draws))
    logits = torch.randn(size, classes, generator=draws)
    winner = torch.randint(classes, (size,), generator=draws)
    known = torch.rand(size, generator=draws) < 0.5
    top = torch.where(known, 9.0, 4.0) + 2 * torch.randn(size, generator=draws)
    logits[torch.arange(size), winner] = top
    return logits, int(torch.randint(1, size, (), generator=draws))


def plain_posteriors(values, logits, generator):
    """Image by image and class by class: posterior of the upper component, -1 without one."""
    seeds = torch.randint(2**31, logits.shape[1:], generator=generator).tolist()
    by_class = {}
    for i, row in enumerate(logits.tolist()):
        by_class.setdefault(row.index(max(row)), []).append(i)
    posterior = [-1] * len(logits)
    for c, images in by_class.items():
        if len(images) < 2:
            continue
        column = np.array([[values[i]] for i in images])
        mixture = GaussianMixture(
            n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seeds[c]
        ).fit(column)
        upper = 0 if mixture.means_[0, 0] >= mixture.means_[1, 0] else 1
        for i, both in zip(images, mixture.predict_proba(column).tolist(), strict=True):
            posterior[i] = both[upper]
    return posterior


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # ten iterations
@pytest.mark.parametrize("name", ["AV_based", "AV_temperature", "AV_uncertainty"])
def test_av_against_plain_mixtures(name):
    ties = filled_up = unknown = 0
    for seed in range(20):
        (logits, count), draws = activations(seed), seeded(seed)
        values = [max(row) for row in logits.tolist()]
        if name == "AV_uncertainty":
            values = [v * h for v, h in zip(values, entropy(logits).tolist(), strict=True)]
        posterior = plain_posteriors(values, logits, draws)
        if name == "AV_temperature":
            for i in (logits.argmax(1) == logits.shape[1] - 1).nonzero().flatten().tolist():
                posterior[i] = 0
        given = PoolOutputs(len(logits), logits.shape[1] - 1, logits=logits)
        assert select(name, given, count, seeded(seed)).tolist() == best(posterior, count, draws)
        candidates = [p for p in posterior if p >= 0]
        ties += len(candidates) > len(set(candidates))
        filled_up += len(candidates) < count
        unknown += 0 in posterior
    assert ties and filled_up  # what is rare did occur
    assert unknown or name != "AV_temperature"


# ---- Coreset and BADGE -------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1, 3, 100])  # of integers: small ones give ties
@pytest.mark.parametrize("seed", range(5))
def test_coreset_against_plain_loops(seed, spread):
    given = only_read("Coreset", changed(pool(seed, 60), lambda t: (spread * t).round()))
    images, draws = given.features.tolist(), seeded(seed)
    centers, chosen = given.labeled_features.tolist(), []
    for _ in range(25):
        distance = [min(math.dist(image, center) for center in centers) for image in images]
        for i in chosen:
            distance[i] = -1
        chosen += best(distance, 1, draws)
        centers.append(images[chosen[-1]])
    assert select("Coreset", given, 25, seeded(seed)).tolist() == chosen


@pytest.mark.parametrize("copies", [1, 3])  # with 3, draws go on where all distances are 0
@pytest.mark.parametrize("seed", range(2))
def test_badge_against_gradients_by_autograd(seed, copies):
    """Gradients of a last layer's weights, image by image, with the prediction as the label."""
    draws, count = seeded(seed), 15 * copies
    features = torch.randn(20, FEATURES, generator=draws).repeat(copies, 1)
    weight = torch.randn(KNOWN, FEATURES, generator=draws).double().requires_grad_()
    logits = features.double() @ weight.T
    gradients = []
    for row in logits:
        loss = cross_entropy(row, row.argmax())
        gradients += torch.autograd.grad(loss, weight, retain_graph=True)
    fields = {"features": features, "logits": logits.detach().float()}
    given = PoolOutputs(len(features), KNOWN, **fields)
    positions = select("BADGE", given, count, seeded(seed))

    draws = seeded(seed)
    chosen = best([float(gradient.norm()) for gradient in gradients], 1, draws)
    for draw in torch.rand(count - 1, generator=draws, dtype=torch.float64).tolist():
        weights = [min(float((g - gradients[i]).norm() ** 2) for i in chosen) for g in gradients]
        if sum(weights) == 0:
            weights = [i not in chosen for i in range(len(gradients))]
        sums = list(itertools.accumulate(weights))
        chosen.append(bisect.bisect(sums, draw * sums[-1]))
    assert positions.tolist() == chosen


# ---- OpenMax -----------------------------------------------------------------------------------


def plain_unknown_probability(outputs):
    """Algorithms 1 and 2 of Bendale and Boult, CVPR 2016, an image and a class at a time."""
    known = outputs.num_known
    right = [[] for _ in range(known)]  # logits of the rightly classified labeled images, by class
    for row, target in zip(outputs.labeled_logits.tolist(), outputs.labeled_targets, strict=True):
        v = row[:known]
        if v[target] == max(v):
            right[target].append(v)
    means, weibulls = [], []
    for rows in right:
        means.append([sum(column) / len(rows) for column in zip(*rows, strict=True)])
        tail = sorted(math.dist(v, means[-1]) for v in rows)[-20:]
        weibulls.append(weibull_min.fit(tail, floc=0) if len(set(tail)) >= 3 else None)
    probability = []
    for row in outputs.logits.tolist():
        v, recalibrated, unknown = row[:known], row[:known], 0
        alpha = min(10, known)
        for i, c in enumerate(sorted(range(known), key=lambda c: -v[c])[:alpha], start=1):
            if weibulls[c] and v[c] > 0:
                far = weibull_min.cdf(math.dist(v, means[c]), *weibulls[c])
                w = 1 - (alpha + 1 - i) / alpha * far
                recalibrated[c] = v[c] * w
                unknown += v[c] * (1 - w)
        probability.append(softmax([*recalibrated, unknown])[-1])
    return probability


@pytest.mark.parametrize("known", [3, 12])  # fewer and more classes than alpha
@pytest.mark.parametrize("seed", range(3))
def test_openmax_against_a_transcription_of_the_paper(seed, known, monkeypatch):
    monkeypatch.setattr("query_strategies.outputs.CHUNK", 7)
    targets = torch.arange(400) % (known - 1)
    targets[:3] = known - 1
    labeled = torch.randn(400, known + 1, generator=seeded(seed)) + 4 * one_hot(targets, known + 1)
    labeled[1] = labeled[0]  # three images, two distances: too few for a distribution
    given = only_read("OpenMax", pool(seed, 60, known))
    given = given._replace(labeled_logits=labeled, labeled_targets=targets)
    score = [-p for p in plain_unknown_probability(given)]
    assert select("OpenMax", given, 59, seeded(seed)).tolist() == best(score, 59, seeded(seed))


# ---- KMeans ------------------------------------------------------------------------------------


def plain_nearest(centers, features):
    """First choices first, an earlier center before a later; then whoever lost takes what is
    nearest among the rest."""
    images, center_of = range(len(features)), {}
    rankings = [sorted(images, key=lambda i: math.dist(c, features[i])) for c in centers]
    for c, ranking in enumerate(rankings):
        center_of.setdefault(ranking[0], c)
    for c, ranking in enumerate(rankings):
        if c not in center_of.values():
            center_of[next(i for i in ranking if i not in center_of)] = c
    return sorted(center_of, key=center_of.get)


@pytest.mark.parametrize("spread", [1, 3, 100])  # of integers: small ones give ties
@pytest.mark.parametrize("seed", range(8))
def test_nearest_distinct_against_plain_loops(seed, spread):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 60))
    features = rng.integers(0, spread, (size, 2)).astype(np.float32)
    centers = rng.integers(0, spread, (int(rng.integers(1, size + 1)), 2)).astype(np.float32)
    chosen = kmeans.nearest_distinct(centers, features)
    assert chosen.tolist() == plain_nearest(centers.tolist(), features.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_takes_the_image_nearest_to_each_center(seed):
    features = pool(seed, 80).features
    positions = select(
        "KMeans", PoolOutputs(80, KNOWN, features=features), 12, seeded(seed)
    ).tolist()
    random_state = int(torch.randint(2**31, (), generator=seeded(seed)))
    fit = KMeans(12, init="random", n_init=1, max_iter=30, random_state=random_state)
    centers = fit.fit(features.numpy()).cluster_centers_
    for center, position in zip(centers, positions, strict=True):
        distance = np.square(features.numpy().astype(float) - center).sum(1)
        assert distance[position] <= distance.min() + 1e-6
