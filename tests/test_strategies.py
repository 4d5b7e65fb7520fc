"""Every registered strategy: one contract for all, and each against a plain computation."""

import math
import random
import types

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

import query_strategies
import utils
from query_strategies import STRATEGIES, PoolOutputs, av_based, bald, kmeans, outputs, select

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SIZE, CLASSES, FEATURES, MASKS = 40, 5, 3, 4  # of the pools below


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pool(size=SIZE, classes=CLASSES, seed=0):
    """Random outputs on a pool, every field filled."""
    draws = seeded(seed)
    return PoolOutputs(
        size,
        torch.randn(size, FEATURES, generator=draws),
        3 * torch.randn(size, classes, generator=draws),
        3 * torch.randn(MASKS, size, classes, generator=draws),
    )


def only_read(name, everything, device="cpu"):
    """The outputs as strategy `name` gets them: what it does not list in READS is None."""
    fields = everything._asdict()
    read = {field: fields[field].clone().to(device) for field in STRATEGIES[name].READS}
    return PoolOutputs(everything.size, **read)


# ---- the contract ------------------------------------------------------------------------------


def ordinary(seed):
    return pool(seed=seed)


def constant(seed):
    return PoolOutputs(SIZE, *(torch.ones_like(tensor) for tensor in pool()[1:]))


def doubled(seed):
    """Every image is in the pool twice."""
    some = pool(SIZE // 2, seed=seed)
    return PoolOutputs(SIZE, *(torch.cat([t, t], dim=t.ndim - 2) for t in some[1:]))


def one_class_once(seed):
    everything = pool(seed=seed)
    everything.logits[:, 2] = -20
    everything.logits[7, 2] = 20
    return everything


def every_class_once(seed):
    """Nothing for a mixture to be fitted to."""
    everything = pool(CLASSES, seed=seed)
    everything.logits.add_(20 * torch.eye(CLASSES))
    return everything


def all_unknown(seed):
    everything = pool(seed=seed)
    everything.logits[:, -1] += 40
    everything.mc_logits[..., -1] += 40
    return everything


def extreme(seed):
    signs = pool(seed=seed)
    return PoolOutputs(SIZE, *(1e4 * tensor.sign() for tensor in signs[1:]))


def single_output(seed):
    """A classifier of one known class."""
    return pool(classes=1, seed=seed)


def pool_of_one(seed):
    return pool(1, seed=seed)


POOLS = [ordinary, constant, doubled, one_class_once, every_class_once]
POOLS += [all_unknown, extreme, single_output, pool_of_one]


def global_random_state():
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2:], random.getstate()


@pytest.mark.filterwarnings("error")  # a warning per round is noise on the user's terminal
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", POOLS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_contract(name, make, device):
    for seed in range(2):
        everything = make(seed)
        size = everything.size
        for count in {1, 2, size // 2, size - 1, size, size + 1, 10 * size} - {0}:
            given = only_read(name, everything, device)
            state = global_random_state()
            positions = select(name, given, count, seeded(seed))
            assert global_random_state() == state
            for field, before in only_read(name, everything, device)._asdict().items():
                after = getattr(given, field)
                assert after == before if field == "size" or before is None else after.equal(before)
            assert positions.dtype == torch.int64
            assert positions.device.type == "cpu"
            assert positions.shape == (min(count, size),)
            assert len(set(positions.tolist())) == len(positions)
            assert set(positions.tolist()) <= set(range(size))
            assert torch.equal(positions, select(name, given, count, seeded(seed)))


READS = [(name, field) for name, module in STRATEGIES.items() for field in module.READS]


@pytest.mark.parametrize("count", [SIZE // 2, SIZE])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "field"), READS)
def test_outputs_that_are_not_finite_are_refused(name, field, value, count):
    for seed in range(3):
        given = only_read(name, pool(seed=seed))
        tensor = getattr(given, field).view(-1)
        tensor[torch.randint(len(tensor), (), generator=seeded(seed))] = value
        with pytest.raises(ValueError, match=field):
            select(name, given, count, seeded(0))


# ---- order -------------------------------------------------------------------------------------


def best(score, mav, count):
    """The protocol's order in plain words: higher score, then higher MAV, then pool order."""
    return sorted(range(len(score)), key=lambda i: (-score[i], -mav[i], i))[:count]


def mav_of(logits):
    return [max(row) for row in logits.tolist()]


@pytest.mark.parametrize("seed", range(10))
def test_highest_with_many_ties(seed):
    draws = seeded(seed)
    size = int(torch.randint(1, 200, (), generator=draws))
    score = torch.randint(0, 4, (size,), generator=draws).double()
    mav = torch.randint(-2, 2, (size,), generator=draws).float()
    count = int(torch.randint(1, size + 1, (), generator=draws))
    expected = best(score.tolist(), mav.tolist(), count)
    assert outputs.highest(score, mav, count).tolist() == expected


def softmax(logits):
    top = max(logits)
    weights = [math.exp(a - top) for a in logits]
    return [w / sum(weights) for w in weights]


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


# ---- random ------------------------------------------------------------------------------------


def test_random_is_uniform_without_replacement():
    draws, trials, size, count = seeded(0), 6000, 8, 3
    at = np.zeros((count, size))  # how often each image is queried at each place
    together = np.zeros((size, size))
    for _ in range(trials):
        chosen = select("random", PoolOutputs(size), count, draws).tolist()
        at[range(count), chosen] += 1
        together[np.ix_(chosen, chosen)] += 1
    assert abs(at / trials - 1 / size).max() < 0.026  # 6 standard deviations
    pairs = together[~np.eye(size, dtype=bool)] / trials
    assert abs(pairs - count * (count - 1) / (size * (size - 1))).max() < 0.025


# ---- uncertainty and BALD ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_uncertainty_against_plain_entropy(seed):
    logits = pool(60, seed=seed).logits
    score = [entropy(softmax(row)) for row in logits.tolist()]
    positions = select("uncertainty", PoolOutputs(60, logits=logits), 25, seeded(0))
    assert positions.tolist() == best(score, mav_of(logits), 25)


def test_uncertainty_of_equal_entropies_takes_the_higher_mav_first():
    even = torch.tensor([0.0, 5.0, -3.0, 5.0, 9.0]).unsqueeze(1).expand(5, 3).clone()
    sure = torch.tensor([[99.0, 0.0, 0.0]])
    logits = torch.cat([sure, even])
    positions = select("uncertainty", PoolOutputs(6, logits=logits), 5, seeded(0))
    assert positions.tolist() == [5, 2, 4, 1, 3]


@pytest.mark.parametrize("chunk", [3, 1 << 16])
@pytest.mark.parametrize("seed", range(5))
def test_bald_against_plain_mutual_information(seed, chunk, monkeypatch):
    monkeypatch.setattr(bald, "CHUNK", chunk)
    given = only_read("BALD", pool(60, seed=seed))
    score = []
    for i in range(60):
        samples = [softmax(logits) for logits in given.mc_logits[:, i].tolist()]
        mean = [sum(column) / MASKS for column in zip(*samples, strict=True)]
        score.append(entropy(mean) - sum(map(entropy, samples)) / MASKS)
    assert bald.mutual_information(given.mc_logits).tolist() == pytest.approx(score, abs=1e-12)
    assert select("BALD", given, 25, seeded(0)).tolist() == best(score, mav_of(given.logits), 25)


def test_bald_prefers_disagreement_to_noise():
    """Masks that all say 50:50 tell nothing; masks sure of different classes tell one bit."""
    noise, disagreement, agreement = [[0, 0], [0, 0]], [[50, 0], [0, 50]], [[50, 0], [50, 0]]
    mc_logits = torch.tensor([noise, disagreement, agreement]).float().transpose(0, 1)
    information = bald.mutual_information(mc_logits).tolist()
    assert information == pytest.approx([0, math.log(2), 0], abs=1e-9)


# ---- AV_based and AV_temperature ---------------------------------------------------------------

ignore_convergence = pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.ConvergenceWarning"  # of the plain computation, ten iterations
)


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


def plain_posteriors(logits, generator):
    """Image by image and class by class: posterior of the upper component, None without one."""
    size, classes = logits.shape
    seeds = torch.randint(2**31, (classes,), generator=generator).tolist()
    by_class = {}
    for i in range(size):
        row = logits[i].tolist()
        by_class.setdefault(row.index(max(row)), []).append((i, max(row)))
    posterior = [None] * size
    for c, images in by_class.items():
        if len(images) < 2:
            continue
        values = np.array([[mav] for _, mav in images])
        mixture = GaussianMixture(
            n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seeds[c]
        ).fit(values)
        upper = 0 if mixture.means_[0, 0] >= mixture.means_[1, 0] else 1
        for (i, _), both in zip(images, mixture.predict_proba(values).tolist(), strict=True):
            posterior[i] = both[upper]
    return posterior


def plain_order(posterior, mav, count):
    """Candidates as by `best`, then whoever is none, by MAV."""
    score = [-1 if p is None else p for p in posterior]
    return best(score, mav, count)


@ignore_convergence
@pytest.mark.parametrize("seed", range(20))
def test_av_based_against_plain_mixtures(seed):
    logits, count = activations(seed)
    posterior = plain_posteriors(logits, seeded(seed))
    ours = av_based.known_probability(logits, seeded(seed)).tolist()
    assert ours == [av_based.NO_CANDIDATE if p is None else p for p in posterior]
    positions = select("AV_based", PoolOutputs(len(logits), logits=logits), count, seeded(seed))
    assert positions.tolist() == plain_order(posterior, mav_of(logits), count)


@ignore_convergence
@pytest.mark.parametrize("seed", range(20))
def test_av_temperature_against_plain_mixtures(seed):
    logits, count = activations(seed)
    posterior = plain_posteriors(logits, seeded(seed))
    for i, row in enumerate(logits.tolist()):
        if row.index(max(row)) == len(row) - 1:
            posterior[i] = 0
    given = PoolOutputs(len(logits), logits=logits)
    positions = select("AV_temperature", given, count, seeded(seed))
    assert positions.tolist() == plain_order(posterior, mav_of(logits), count)


@ignore_convergence
def test_the_pools_above_cover_what_is_rare():
    """Ties, non-candidates among the selected, and images of the unknown class do occur."""
    ties = filled_up = unknown = 0
    for seed in range(20):
        logits, count = activations(seed)
        posterior = plain_posteriors(logits, seeded(seed))
        candidates = [p for p in posterior if p is not None]
        ties += len(candidates) > len(set(candidates))
        filled_up += len(candidates) < count < len(posterior)
        unknown += (logits.argmax(1) == logits.shape[1] - 1).any()
    assert min(ties, filled_up, unknown) >= 2


def test_posterior_is_bayes_rule():
    """Two far clusters of activations: the upper one is known, and the posterior as computed by
    hand from the clusters' own weights, means and variances."""
    draws = seeded(0)
    lower = 2 + torch.randn(60, generator=draws)
    upper = 12 + torch.randn(40, generator=draws)
    mav = torch.cat([lower, upper])[torch.randperm(100, generator=draws)]
    logits = torch.stack([mav, mav - 50], 1)
    posterior = av_based.known_probability(logits, seeded(0)).tolist()
    parts = []
    for values in (lower.tolist(), upper.tolist()):
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values) + 5e-4
        parts.append((len(values) / 100, mean, variance))

    def density(value, weight, mean, variance):
        return weight * math.exp(-((value - mean) ** 2) / (2 * variance)) / math.sqrt(variance)

    for value, p in zip(mav.tolist(), posterior, strict=True):
        low, high = (density(value, *part) for part in parts)
        assert p == pytest.approx(high / (low + high), abs=1e-4)


def test_images_predicted_unknown_come_after_all_that_may_be_known():
    """However sure the detector is of them; among themselves by MAV."""
    draws = seeded(0)
    logits = torch.randn(50, 4, generator=draws)
    logits[:30, 0] = 6 + torch.randn(30, generator=draws)  # predicted as a known class
    logits[30:, 3] = 20 + torch.randn(20, generator=draws)  # predicted as the unknown class
    shuffled = torch.randperm(50, generator=draws)
    positions = select("AV_temperature", PoolOutputs(50, logits=logits[shuffled]), 49, draws)
    chosen = shuffled[positions]
    assert set(chosen[:30].tolist()) == set(range(30))
    unknown_mav = logits[chosen[30:], 3].tolist()
    assert unknown_mav == sorted(unknown_mav, reverse=True)
    # AV_based, on the same outputs, knows of no unknown class.
    positions = select("AV_based", PoolOutputs(50, logits=logits[shuffled]), 30, seeded(0))
    assert (shuffled[positions] >= 30).any()


# ---- KMeans ------------------------------------------------------------------------------------


def plain_nearest(centers, features):
    """First choices first, an earlier centre before a later; then whoever lost takes what is
    nearest among the rest."""

    def ranking(center):
        distance = [sum((a - b) ** 2 for a, b in zip(center, f, strict=True)) for f in features]
        return sorted(range(len(features)), key=lambda i: (distance[i], i))

    rankings = [ranking(center) for center in centers]
    chosen, taken = [None] * len(centers), set()
    for i, order in enumerate(rankings):
        if order[0] not in taken:
            chosen[i] = order[0]
            taken.add(order[0])
    for i, order in enumerate(rankings):
        if chosen[i] is None:
            chosen[i] = next(j for j in order if j not in taken)
            taken.add(chosen[i])
    return chosen


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
def test_kmeans_takes_the_image_nearest_to_each_centre(seed):
    features = pool(80, seed=seed).features
    positions = select("KMeans", PoolOutputs(80, features=features), 12, seeded(seed))
    random_state = int(torch.randint(2**31, (), generator=seeded(seed)))
    fit = KMeans(12, init="random", n_init=1, max_iter=30, random_state=random_state)
    centers = fit.fit(features.numpy()).cluster_centers_
    for center, position in zip(centers, positions.tolist(), strict=True):
        distance = np.square(features.numpy().astype(float) - center).sum(1)
        assert distance[position] <= distance.min() + 1e-6


def test_kmeans_finds_obvious_clusters_whatever_the_copies():
    """Four far clusters, one of them a thousand copies of one image: some of each is queried."""
    draws = seeded(0)
    middle = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    cluster = torch.arange(4).repeat_interleave(torch.tensor([1000, 20, 20, 20]))
    features = middle[cluster] + torch.randn(1060, 2, generator=draws) * (cluster > 0).unsqueeze(1)
    positions = select("KMeans", PoolOutputs(1060, features=features), 60, draws)
    assert len(set(positions.tolist())) == 60
    assert set(cluster[positions].tolist()) == {0, 1, 2, 3}


# ---- a strategy of one's own -------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch):
    """What a user writes: a module of five lines and an entry in the registry."""

    def query(outputs, count, generator):
        first, second = outputs.logits.softmax(1).topk(2, dim=1).values.T
        return (first - second).argsort(stable=True)[:count]

    module = types.ModuleType("margin")
    module.READS, module.query = ("logits",), query
    monkeypatch.setitem(STRATEGIES, "margin", module)
    return module


def parse(monkeypatch, script, *words):
    monkeypatch.setattr("sys.argv", [script, *words])
    return utils.parse_arguments("test", detector=script == "AL_center_temperature.py")


SCRIPTS = ["AL_center.py", "AL_center_temperature.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_own_strategy_is_offered_by_both_scripts(own, script, monkeypatch, capsys):
    assert parse(monkeypatch, script, "--query-strategy", "margin").query_strategy == "margin"
    with pytest.raises(SystemExit):
        parse(monkeypatch, script, "--help")
    assert "margin" in capsys.readouterr().out
    test_contract("margin", ordinary, "cpu")


def test_own_strategy_that_needs_the_detector_is_offered_by_lfosa_alone(own, monkeypatch, capsys):
    own.NEEDS_DETECTOR = True
    assert query_strategies.needs_detector("margin")
    words = "--query-strategy", "margin"
    assert parse(monkeypatch, SCRIPTS[1], *words).query_strategy == "margin"
    with pytest.raises(SystemExit):
        parse(monkeypatch, SCRIPTS[0], *words)
    with pytest.raises(SystemExit):
        parse(monkeypatch, SCRIPTS[0], "--help")
    assert "margin" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["AV_temperature", "av_temperature"])
def test_baselines_refuse_av_temperature(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(monkeypatch, "AL_center.py", "--query-strategy", name)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "AL_center_temperature.py" in message
    assert message.count("\n") == 1
