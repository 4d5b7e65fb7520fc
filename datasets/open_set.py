"""Who is labeled, invalid or still in the unlabeled pool: index sets, and the two measures."""

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError


class Split(NamedTuple):
    """Indices into the training images, int64, on the CPU."""

    labeled: Tensor  # known images whose label has been seen, sorted
    invalid: Tensor  # images found unknown, in the order of the queries: one entry per query
    pool: Tensor  # what can be queried, sorted; with the invalid images, unless they are dropped


def initial_split(known: Tensor, init_percent: float, generator: torch.Generator) -> Split:
    """Label floor(known images * init_percent / 100) known images drawn at random.

    known: (N,) bool, whether each training image is of a known class. All others are the pool.
    Raises UserError if no image would be labeled, or no known one in the pool.
    """
    candidates = known.nonzero().view(-1)
    # As typed: in binary floats, 18.4 % of 375 is a little less than 69.
    count = math.floor(len(candidates) * Fraction(str(init_percent)) / 100)
    if not 0 < count < len(candidates):
        what = f"--init-percent {init_percent:g} labels {count} of {len(candidates)} known images"
        raise UserError(f"{what}: at least one must be labeled, and one left for the pool")
    drawn = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    pool = torch.ones(len(known), dtype=torch.bool).index_fill_(0, drawn, False)
    return Split(drawn.sort().values, torch.empty(0, dtype=torch.int64), pool.nonzero().view(-1))


def update(split: Split, queried: Tensor, known: Tensor, drop_unknown: bool) -> Split:
    """The split after the oracle has answered for `queried` (indices into the training images).

    Known images become labeled. Unknown ones become invalid and stay in the pool, as in the
    published experiments; with `drop_unknown` they leave it, as in later papers.
    """
    is_known = known[queried]
    leaves = queried if drop_unknown else queried[is_known]
    stays = torch.isin(split.pool, leaves, invert=True)
    return Split(
        torch.cat([split.labeled, queried[is_known]]).sort().values,
        torch.cat([split.invalid, queried[~is_known]]),  # repeats stay: they weigh more
        split.pool[stays],
    )


def precision(queried: Tensor, known: Tensor) -> float:
    """Known images in the query / images in the query, in [0, 1]."""
    return int(known[queried].sum()) / len(queried)


def recall(split: Split, queried: Tensor, known: Tensor) -> float:
    """Share of all known images that are labeled once the query is answered, in [0, 1]."""
    labeled, found, findable = len(split.labeled), known[queried].sum(), known[split.pool].sum()
    return (int(found) + labeled) / (int(findable) + labeled)
