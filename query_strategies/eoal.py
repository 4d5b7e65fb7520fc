"""EOAL: low entropy of binary classifiers, close to no single cluster of invalid images, and spread
over clusters of the pool (Safaei et al., "Entropic Open-set Active Learning", AAAI 2024)."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.objective import Batch, Objective, mean_where

from .clustering import clusters, partitions
from .outputs import PoolOutputs, distances, in_chunks, top_k
from .uncertainty import entropy

READS = ("logits", "features", "objective")  # fields of PoolOutputs
NEEDS_DETECTOR = True

# Settings of the paper and of the code that its authors released.
HEADS_SGD = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
OPEN_SET_WEIGHT = 0.5
INVALID_SHARE = 0.8  # alpha, the weight of the invalid images, if there are any
CLUSTER_WEIGHT = 0.1
PULL_WEIGHT = 0.1  # of the distance to the own center, in the cluster loss
EPSILON = 1e-8  # added to probabilities before the logarithm


class OpenSetObjective(Objective):
    """The cross-entropy, the open-set loss of K binary classifiers (the heads) on the features, and
    once there are invalid images, CLUSTER_WEIGHT times the cluster loss of these.

    invalid: (u,) int64, the invalid images among the training images. The state of a training holds
    the heads, and the centers of the last epoch, (C, F) with C at most K; (0, F) without invalid
    images.
    """

    def __init__(
        self,
        network: nn.Module,
        temperature: Sequence[float] | None,
        invalid: Tensor,
        generator_for: Callable[..., torch.Generator],
    ) -> None:
        super().__init__(temperature)
        self.K, width = network.fc.out_features - 1, network.feature_dim
        drawn = 2 * torch.rand(2 * self.K, width, generator=generator_for("heads")) - 1
        self.weight = nn.Parameter(drawn / math.sqrt(width))  # as nn.Linear draws it
        self.register_buffer("invalid", invalid.unique(), persistent=False)  # sorted
        self.register_buffer("clusters", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("centers", torch.empty(0, width), persistent=False)

    def get_extra_state(self) -> Tensor:
        return self.centers

    def set_extra_state(self, state: Tensor) -> None:
        self.centers = state.to(self.weight.device)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([self.weight], **HEADS_SGD)]

    def before_epoch(self, features_of: Callable[[Tensor], Tensor]) -> None:
        """Cluster the invalid images into K clusters."""
        if len(self.invalid):
            features = features_of(self.invalid.cpu())
            self.clusters = clusters(features, self.K)
            members = F.one_hot(self.clusters).T.double()  # (C, u)
            self.centers = (members @ features.double() / members.sum(1, keepdim=True)).float()

    def heads(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, 2, K): logits of "is not class c" and of "is class c"."""
        return F.linear(features, self.weight).unflatten(1, (2, self.K))

    def forward(self, batch: Batch) -> Tensor:
        any_invalid = len(self.invalid) > 0
        loss = open_set_loss(self.heads(batch.features), batch.targets, any_invalid)
        if any_invalid:
            images = batch.targets == self.K
            own = self.clusters[torch.searchsorted(self.invalid, batch.index[images])]
            pull = cluster_loss(batch.features[images], own, self.centers)
            loss = loss + CLUSTER_WEIGHT * pull
        return super().forward(batch) + len(batch.targets) * loss


objective = OpenSetObjective  # what the detector's training minimizes


def open_set_loss(heads: Tensor, targets: Tensor, any_invalid: bool) -> Tensor:
    """The loss of the binary classifiers, a scalar; a batch without a kind of images adds 0 for it.

    heads: (B, 2, K) logits; targets: (B,) int64, K for an invalid image. Of a labeled image: its
    own class's loss plus the largest of the others', none for K = 1. Of an invalid image: the mean
    losses of "is class c" and of "is not class c". any_invalid: whether the training has any; the
    labeled images then have the weight 1 - INVALID_SHARE, else 1.
    """
    K = heads.shape[2]
    is_not, is_class = (-(heads.softmax(1) + EPSILON).log()).unbind(1)  # (B, K) each
    own = F.one_hot(targets.clamp(max=K - 1), K).bool()
    largest = is_not.masked_fill(own, 0).amax(1)
    labeled = mean_where(targets < K, (is_class * own).sum(1) + largest)
    if not any_invalid:
        return OPEN_SET_WEIGHT * labeled
    invalid = mean_where(targets == K, (is_class + is_not).mean(1))
    return OPEN_SET_WEIGHT * ((1 - INVALID_SHARE) * labeled + INVALID_SHARE * invalid)


def cluster_loss(features: Tensor, clusters: Tensor, centers: Tensor) -> Tensor:
    """PULL_WEIGHT times the distance to the own center, plus log(1 + sum over the other centers of
    exp(that distance - distance to the other)); the mean over U images, 0 for none. A scalar.

    features: (U, F), clusters: (U,) int64, centers: (C, F).
    """
    to_centers = distances(features, centers)
    own = to_centers.gather(1, clusters.unsqueeze(1))
    # The own center's term of the sum is exp(0), the 1 of the formula.
    losses = PULL_WEIGHT * own[:, 0] + (own - to_centers).logsumexp(1)
    return losses.sum() / max(len(features), 1)


@torch.no_grad()
def query(outputs: PoolOutputs, count: int, generator: torch.Generator) -> Tensor:
    """Positions of `count` pool images, (count,) int64, in order of choice; count <= outputs.size.

    Images that the detector predicts as known are clustered by FINCH, into its finest partition
    with at most `count` clusters (one cluster, if all have more). Each cluster gives an equal
    number of images, lowest scores first, round after round, until the query is full. The clusters
    come in the order in which a random permutation of the images meets them. Too few such images:
    the lowest scores of the others follow.
    """
    learned = outputs.objective

    def scores(features: Tensor) -> Tensor:
        to_centers = distances(features, learned.centers) if len(learned.centers) else None
        return score(learned.heads(features), to_centers)

    preference = -in_chunks(scores, outputs.features)
    is_known = outputs.logits.argmax(1) < outputs.num_known
    candidates = is_known.nonzero()[:, 0]
    if len(candidates) <= count:
        others = (~is_known).nonzero()[:, 0]
        others = others[top_k(preference[others], count - len(candidates), generator)]
        candidates = candidates[top_k(preference[candidates], count, generator)]
        return torch.cat([candidates, others])
    candidates = candidates[top_k(preference[candidates], len(candidates), generator)]
    order = torch.randperm(len(candidates), generator=generator).to(candidates.device)
    found = partitions(outputs.features[candidates[order]])
    label = next((each for each in found if each.max() < count), 0 * found[0])
    cluster = torch.empty_like(order)
    cluster[order] = torch.from_numpy(label).to(order)
    return candidates[in_rounds(cluster, count)]


def score(heads: Tensor, to_centers: Tensor | None) -> Tensor:
    """How little an image looks known, low for known: (n,) float64, in [-1, 1].

    The mean entropy of the binary classifiers, minus that of the softmax of the negative distances
    to the centers, each over its largest value. heads: (n, 2, K) logits; to_centers: (n, C).
    """
    both = heads.transpose(1, 2).flatten(0, 1)  # (n K, 2)
    value = entropy(both).view(len(heads), -1).mean(1) / math.log(2)
    if to_centers is not None and to_centers.shape[1] > 1:  # one center: an entropy of 0
        value = value - entropy(-to_centers) / math.log(to_centers.shape[1])
    return value


def in_rounds(cluster: Tensor, count: int) -> Tensor:
    """The first `count` of n images, when in each round every cluster in turn gives its next ones.

    cluster: (n,) int64 from 0, of images in order of preference; at most `count` clusters. In a
    round a cluster gives count / clusters images, rounded down. Returns (count,) int64 in 0..n-1.
    """
    sizes = cluster.bincount()
    order = cluster.sort(stable=True).indices
    rank = torch.empty_like(order)  # of an image in its cluster
    begins = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    rank[order] = torch.arange(len(order), device=order.device) - begins
    turn = rank // (count // len(sizes)) * len(sizes) + cluster
    return turn.sort(stable=True).indices[:count]
