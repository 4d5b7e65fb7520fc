"""Named sets of defaults, `--protocol`: what LfOSA's paper sets, and what later papers set.

EOAL: Safaei et al., "Entropic Open-set Active Learning", AAAI 2024. EAOA: Zong and Huang,
"Rethinking Epistemic and Aleatoric Uncertainty for Active Open-Set Annotation", CVPR 2025. Their
released codes list the classes of which the first K are known.
"""

from typing import NamedTuple


class Protocol(NamedTuple):
    """What a protocol sets; single flags override it."""

    defaults: dict[str, object]  # arguments
    class_order: dict[str, str]  # data set -> class ids, the first K of which are known


_ORDER = {
    "cifar10": "8 2 7 4 3 5 9 6 0 1",
    "cifar100": "27 56 53 69 57 89 77 21 37 86 51 46 30 68 49 18 20 43 54 19 92 31 3 82 26 12 67 17"
    " 63 55 91 62 99 38 47 50 78 24 0 44 76 16 75 71 11 94 6 73 65 32 64 66 1 15 40 87 2 96 7 23"
    " 84 72 79 74 59 85 39 28 52 48 14 35 61 81 29 36 25 9 97 42 83 70 90 10 8 98 4 41 13 22 80 95"
    " 93 58 5 33 45 88 34 60",
    # The published list repeats ids after the first 40.
    "TinyImagenet": "74 38 136 85 145 132 102 91 156 97 149 143 168 11 73 181 8 76 148 125 51 19 45"
    " 66 141 12 96 167 90 104 103 35 187 126 124 95 182 180 99 109",
}
_LATER = dict(drop_unknown=True, feat_dim=0, stepsize=60, max_query=11, model="resnet18-narrow")

PROTOCOLS = {
    "LfOSA": Protocol({}, {}),
    "EOAL": Protocol(_LATER | dict(max_epoch=300), _ORDER),
    "EAOA": Protocol(_LATER | dict(max_epoch=200, rotation=False), _ORDER),
}
