"""Draw the curves of the logs that AL_center.py and AL_center_temperature.py wrote.

For every data set, network, number of known classes, initial percentage and query batch found in
the log folders: selection recall, selection precision and classification accuracy against the
query round, averaged over the seeds, as three PNGs; and a Markdown table of the final round and
of the mean over the rounds on the standard output.

    python plot.py                                    # log_AL/*.pkl -> gifs/*/*.png
    python plot.py --log-dir a/log_AL b/log_AL        # logs of several machines, drawn together
    python plot.py --compare published/log_AL         # the published curves, dotted, beside ours

Lines are means over the seeds; bands and the numbers after "±" are one sample standard deviation
(ddof = 1), which a single seed does not have. Needs NumPy and Matplotlib only.
"""

import argparse
import colorsys
import io
import os
import pickle
import pickletools
import re
import signal
import sys
import textwrap
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_LOG_BYTES = 1_000_000  # a log of 10 rounds has 517; more is a checkpoint or something else
ROUNDING = 1e-3  # percent by which a float32 accuracy may miss 0 or 100
FIGURE_INCHES = (5, 4)  # width, height: one column of a paper
DPI = 150  # 750 pixels wide
TITLE_WIDTH = 68  # characters of the title's font in FIGURE_INCHES
LEGEND_INSIDE = 6  # curves; a longer legend hides too much and goes below the axes
PUBLISHED_TEMPERATURES = {"unknown-T": 0.5, "known-T": 0.5, "modelB-T": 1.0}  # in a name's order

MEASURES = {  # in the file name -> key in the log, axis label, decimals in the table
    "recall": ("Recall", "Selection Recall", 3),
    "precision": ("Precision", "Selection Precision", 3),
    "accuracy": ("Acc", "Classification Accuracy (%)", 2),
}
DATASETS = {  # in the log's name -> folder of its figures, name in titles
    "cifar10": ("cifar", "CIFAR-10"),
    "cifar100": ("cifar", "CIFAR-100"),
    "TinyImagenet": ("tinyimagenet", "Tiny-ImageNet"),
    "digits": ("digits", "digits"),
}
STYLES = {  # strategy -> colour, marker; in the table's order; luminances differ for grey prints
    "AV_temperature": ("#c1121f", "o"),
    "AV_based": ("#08306b", "s"),
    "uncertainty": ("#f4a62a", "^"),
    "random": ("#666666", "D"),
    "KMeans": ("#41ab5d", "v"),
    "BALD": ("#b583cc", "P"),
}
OTHER_MARKERS = ("X", "<", ">", "p", "h", "*", "d", "8")  # of strategies that STYLES lacks
DASHES = ((0, (4, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (2, 1)))  # variants of a strategy, in turn
FILLS = ("full", "none", "left", "right", "top", "bottom")  # of their markers, in turn

NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"  # as Python prints a float or an int
LOG_NAME = re.compile(
    r"(?P<temperature>temperature_)?(?!temperature_)(?P<model>[A-Za-z0-9][\w.-]*)"
    rf"_(?P<dataset>[A-Za-z0-9-]+)_known(?P<known>\d+)_init(?P<init>{NUMBER})"
    r"_batch(?P<batch>\d+)_seed(?P<seed>\d+)_(?P<strategy>[A-Za-z0-9][\w-]*?)"
    rf"(?(temperature)_unknown_T(?P<unknown_T>{NUMBER})_known_T(?P<known_T>{NUMBER})"
    rf"(?:_modelB_T(?P<modelB_T>{NUMBER}))?)"
    r"(?:__(?P<settings>[\w.+-]+))?\.pkl",
    re.ASCII,
)

Log = dict[str, list[float]]


class Group(NamedTuple):
    """What the curves of one figure share."""

    dataset: str
    model: str
    known: int  # classes
    init: str  # percent of the known images, in its shortest spelling
    batch: int  # images per query


class Method(NamedTuple):
    """What tells the curves of one figure apart."""

    strategy: str
    temperatures: tuple[float, ...] | None  # unknown, known, modelB; None: AL_center.py
    settings: tuple[str, ...]  # flags away from the published setting, as in the file name

    @property
    def is_lfosa(self) -> bool:
        return self.strategy == "AV_temperature" and self.temperatures is not None


class Run(NamedTuple):
    """What the file name of a log says."""

    group: Group
    method: Method
    seed: int


class Curve(NamedTuple):
    """The runs of one method, one row of values per seed."""

    method: Method
    label: str
    seeds: tuple[int, ...]
    values: dict[str, np.ndarray]  # by the keys of MEASURES; each [seeds, rounds]
    published: bool  # from --compare
    variant: int  # 0, 1, ... among the curves of the same strategy in the figure


def say(message: str) -> None:
    """One line on the standard error, whatever a file name or a damaged file put into it."""
    print("plot.py:", "".join(c if c.isprintable() else "?" for c in message), file=sys.stderr)


# ---- reading -----------------------------------------------------------------------------------


def parse_name(name: str) -> Run:
    """Read a log's file name; ValueError if it is not one that the two scripts would give."""
    match = LOG_NAME.fullmatch(name)
    if match is None:
        raise ValueError("its name is not that of a log")
    part = match.groupdict()
    temperatures = None
    if part["temperature"]:
        # older published logs lack modelB_T: their classifier had no temperature yet
        texts = (part["unknown_T"], part["known_T"], part["modelB_T"] or "1.0")
        temperatures = tuple(float(text) for text in texts)
    settings = tuple(part["settings"].split("_")) if part["settings"] else ()
    init = f"{float(part['init']):.12g}"
    group = Group(part["dataset"], part["model"], int(part["known"]), init, int(part["batch"]))
    return Run(group, Method(part["strategy"], temperatures, settings), int(part["seed"]))


class PlainUnpickler(pickle.Unpickler):
    """Loads containers, strings and numbers; a pickle that asks for any code is refused."""

    def find_class(self, module: str, name: str) -> None:
        what = "a log holds plain numbers, such as float() gives"
        raise ValueError(f"refused: it would run {module}.{name}; {what}")


def check_log(content: object) -> Log:
    """Lists, by round, of an unpickled log's measures; ValueError or TypeError if it is none."""
    if not isinstance(content, dict):
        raise TypeError(f"holds a {type(content).__name__} instead of a dict of measures")
    log = {}
    if list(content.values()) == [{}] * 4:
        raise ValueError("no round is done yet")
    for key in ("Acc", "Err", "Precision", "Recall"):
        rounds = content.get(key)
        if not isinstance(rounds, dict) or not rounds:
            raise ValueError(f"{key} is missing, empty or not a dict of rounds")
        if set(rounds) != set(range(len(rounds))):
            raise ValueError(f"the rounds of {key} are not 0 to {len(rounds) - 1}")
        limit = 100 if key in ("Acc", "Err") else 1
        for value in rounds.values():  # NaN fails both comparisons
            if type(value) not in (int, float) or not -ROUNDING <= value <= limit + ROUNDING:
                raise ValueError(f"{key} holds something that is not a number from 0 to {limit}")
        log[key] = [float(rounds[q]) for q in range(len(rounds))]
    if len({len(values) for values in log.values()}) > 1:
        raise ValueError("its measures have different numbers of rounds")
    return log


def load_log(path: Path) -> Log:
    """Read one log; ValueError with a reason for whatever is wrong with the file."""
    try:
        if not path.is_file():  # to open a named pipe would wait for ever
            raise ValueError("not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_LOG_BYTES + 1)
        if not data or len(data) > MAX_LOG_BYTES:
            raise ValueError("too large for a log" if data else "empty file")
        for opcode, argument, _ in pickletools.genops(data):
            # the unpickler makes room up to any index it meets: 5 damaged bytes cost 64 GB
            if "PUT" in opcode.name and (argument or 0) > len(data):
                raise ValueError("damaged pickle")
        return check_log(PlainUnpickler(io.BytesIO(data)).load())
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except Exception as error:  # rubbish bytes raise nearly every class there is
        reason = str(error) or type(error).__name__
        raise ValueError(f"not a sound log ({reason[:200]})") from None


def read_logs(folders: list[str]) -> dict[Run, Log]:
    """All sound logs of the folders, each other one named on stderr; ValueError if none is left."""
    logs, origin, unreadable = {}, {}, {}
    for folder in folders:
        try:
            names = sorted(name for name in os.listdir(folder) if name.endswith(".pkl"))
        except OSError as error:
            unreadable[folder] = f"{folder} ({error.strerror})"
            continue
        for path in (Path(folder, name) for name in names):
            try:
                run, log = parse_name(path.name), load_log(path)
            except ValueError as error:
                say(f"skipped {path}: {error}")
                continue
            if run not in logs:
                logs[run], origin[run] = log, path
            elif logs[run] != log:
                say(f"skipped {path}: differs from {origin[run]}, which is the same run")
    if not logs:
        where = ", ".join(unreadable.get(folder, folder) for folder in folders)
        raise ValueError(f"no log to draw in {where}")
    for folder in unreadable.values():
        say(f"skipped {folder}")
    return logs


# ---- curves ------------------------------------------------------------------------------------


def traits(method: Method) -> list[str]:
    """What a method does away from the published setting, as flags: ["max-epoch10", ...]."""
    temperatures = method.temperatures or PUBLISHED_TEMPERATURES.values()
    own = zip(PUBLISHED_TEMPERATURES.items(), temperatures, strict=True)
    return [f"{flag}{t}" for (flag, usual), t in own if t != usual] + list(method.settings)


def make_label(method: Method, common: list[str], notes: list[str]) -> str:
    """Legend entry: the strategy, its traits but the common ones, and notes in parentheses."""
    if method.temperatures and not method.is_lfosa:
        notes = ["LfOSA script", *notes]
    own = [trait for trait in traits(method) if trait not in common]
    label = ", ".join(["LfOSA" if method.is_lfosa else method.strategy, *own])
    return f"{label} ({', '.join(notes)})" if notes else label


def stack_seeds(logs: dict[int, Log], name: str) -> tuple[tuple[int, ...], dict[str, np.ndarray]]:
    """Seeds in order and, per measure, [seeds, rounds], cut to the seed with the fewest rounds."""
    seeds = tuple(sorted(logs))
    lengths = [len(logs[seed]["Acc"]) for seed in seeds]
    if max(lengths) > min(lengths):
        have = ", ".join(f"seed {seed} has {n}" for seed, n in zip(seeds, lengths, strict=True))
        say(f"{name}: all seeds cut to {min(lengths)} rounds ({have})")
    return seeds, {
        measure: np.array([logs[seed][key][: min(lengths)] for seed in seeds])
        for measure, (key, _, _) in MEASURES.items()
    }


def drawing_order(key: tuple[Method, bool, str]) -> tuple:
    """Sort key: LfOSA, then the strategies as in STYLES, then others by name; ours first."""
    method, published, model = key
    rank = list(STYLES).index(method.strategy) if method.strategy in STYLES else len(STYLES)
    temperatures = method.temperatures or ()  # None cannot be sorted
    scripts = len(temperatures), published, model
    return rank, method.strategy, *scripts, temperatures, method.settings


def fits(compared: Group, group: Group) -> bool:
    """Whether published runs belong into a figure of ours: they do whatever their model is."""
    return compared._replace(model=group.model) == group


def make_curves(
    group: Group, logs: dict[Run, Log], compared: dict[Run, Log]
) -> tuple[str, list[Curve]]:
    """Title and curves, in drawing order, of the group's runs and the compared ones that fit it."""
    found: dict[tuple[Method, bool, str], dict[int, Log]] = {}
    for run, log in logs.items():
        if run.group == group:
            found.setdefault((run.method, False, group.model), {})[run.seed] = log
    ours = [method for method, _, _ in found]
    common = [trait for trait in traits(ours[0]) if all(trait in traits(m) for m in ours)]
    for run, log in compared.items():
        if fits(run.group, group):
            found.setdefault((run.method, True, run.group.model), {})[run.seed] = log

    _, name = DATASETS.get(group.dataset, ("", group.dataset))
    title = f"{name}, {group.model}, {group.known} known classes, init {group.init} %"
    title = f"{title}, batch {group.batch}"
    if common:
        only = "" if len(found) == len(ours) else "ours: "
        title = f"{title}; {only}{', '.join(common)}"
    curves, seen = [], Counter()
    for method, published, model in sorted(found, key=drawing_order):
        notes = ["published"] * published + [model] * (model != group.model)
        # a compared run names all its settings: the title speaks of ours
        label = make_label(method, [] if published else common, notes)
        seeds, values = stack_seeds(found[method, published, model], f"{title}: {label}")
        variant = seen[method.strategy, published]
        seen[method.strategy, published] += 1
        curves.append(Curve(method, label, seeds, values, published, variant))
    return title, curves


def mean_std(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean and sample standard deviation over axis 0, the seeds; None for a single seed."""
    return values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else None


# ---- figures and table -------------------------------------------------------------------------


def strategy_style(strategy: str) -> tuple[str, str]:
    """Colour and marker; those of an unlisted strategy follow from its name alone."""
    if strategy in STYLES:
        return STYLES[strategy]
    code = zlib.crc32(strategy.encode())
    colour = colorsys.hls_to_rgb(code % 360 / 360, 0.3 + code // 360 % 4 / 10, 0.6)
    return matplotlib.colors.to_hex(colour), OTHER_MARKERS[code // 1440 % len(OTHER_MARKERS)]


def line_style(curve: Curve) -> dict:
    """Keyword arguments of the curve's line: colour by strategy, dashes and filling by variant."""
    colour, marker = strategy_style(curve.method.strategy)
    dashes = "-" if curve.method.is_lfosa else DASHES[curve.variant % len(DASHES)]
    fill = FILLS[curve.variant % len(FILLS)]
    return {
        "color": colour,
        "marker": marker,
        "fillstyle": fill,
        "markerfacecoloralt": "white",
        "markersize": 3 if curve.published else 5,
        "linestyle": ":" if curve.published else dashes,
        "linewidth": 1 if curve.published else 1.6,
        "zorder": (3 if curve.method.is_lfosa else 2) + 0.5 * (not curve.published),
    }


def draw(curves: list[Curve], measure: str, title: str) -> Figure:
    """The figure of one measure: mean lines over the rounds, bands of one standard deviation."""
    figure = Figure(figsize=FIGURE_INCHES)
    axes = figure.add_subplot()
    for curve in curves:
        mean, std = mean_std(curve.values[measure])
        style = line_style(curve)
        axes.plot(range(len(mean)), mean, label=curve.label, **style)
        if std is not None and not curve.published:
            band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(range(len(mean)), mean - std, mean + std, zorder=1, **band)
    lines = [textwrap.fill(part, TITLE_WIDTH, break_on_hyphens=False) for part in title.split("; ")]
    axes.set_title("\n".join(lines), fontsize=9)
    axes.set_xlabel("Query Round")
    axes.set_ylabel(MEASURES[measure][1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # 1: also with one round
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if len(curves) > LEGEND_INSIDE:
        place = {"loc": "upper center", "bbox_to_anchor": (0.46, -0.14), "ncols": 2, "fontsize": 7}
    else:
        place = {"loc": "best", "framealpha": 0.6, "fontsize": 8}
    axes.legend(handlelength=3, **place)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG so that the path never holds half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def figure_stem(group: Group, groups: list[Group]) -> str:
    """Path of the group's figures below the output folder, up to the measure.

    Named as the published ones, with the batch only where another group would share the name.
    """
    family, _ = DATASETS.get(group.dataset, (group.dataset.lower(), ""))
    stem = f"{group.dataset}_{group.model}_init{group.init}_known{group.known}"
    shared = any(g != group and g._replace(batch=group.batch) == group for g in groups)
    return f"{family}/{stem}" + (f"_batch{group.batch}" if shared else "")


def table(curves: list[Curve]) -> list[str]:
    """Markdown rows: seeds, rounds, and each measure in the final round and over the rounds."""
    columns = ["strategy", "seeds", "rounds"]
    columns += [f"{when} {measure}" for measure in MEASURES for when in ("final", "mean")]
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for curve in curves:
        cells = [curve.label, str(len(curve.seeds)), str(curve.values["recall"].shape[1])]
        for measure, (_, _, decimals) in MEASURES.items():
            values = curve.values[measure]
            for per_seed in (values[:, -1], values.mean(axis=1)):
                mean, std = mean_std(per_seed)
                spread = "" if std is None else f" ± {std:.{decimals}f}"
                cells.append(f"{mean:.{decimals}f}{spread}")
        lines.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in lines]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; sys.argv where argv is None."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # the examples say it, and an error is one line without it
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    text = "folders with the logs (.pkl) of the two scripts (default: log_AL)"
    add("--log-dir", nargs="+", default=["log_AL"], metavar="DIR", help=text)
    text = "folder for the figures, one folder in it per family of data sets (default: gifs)"
    add("--out-dir", default="gifs", metavar="DIR", help=text)
    text = "folder with published logs, drawn dotted into our figures of the same data set, known "
    text += "classes, initial percentage and query batch, whatever their model (default: none)"
    add("--compare", metavar="DIR", help=text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Draw and print everything; the exit status is 2 where the user has to change something."""
    args = parse_args(argv)
    matplotlib.rcdefaults()  # the figures are the same whatever a user's matplotlibrc says
    try:
        logs = read_logs(args.log_dir)
    except ValueError as error:
        say(f"{error}: name folders that have logs with --log-dir")
        return 2
    groups = sorted({run.group for run in logs})
    compared = {}
    if args.compare is not None:
        try:
            compared = read_logs([args.compare])
            if not any(fits(run.group, group) for run in compared for group in groups):
                say(f"--compare: no log in {args.compare} shares data set, known, init and batch")
        except ValueError as error:
            say(f"--compare: {error}")
    report = []
    for group in groups:
        title, curves = make_curves(group, logs, compared)
        report += [f"## {title}", "", *table(curves), ""]
        try:
            for measure in MEASURES:
                path = Path(args.out_dir, f"{figure_stem(group, groups)}_{measure}.png")
                save(draw(curves, measure, title), path)
        except OSError as error:
            say(f"cannot write {path}: {error.strerror}; choose another --out-dir")
            return 2
    try:
        print(*report, sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # not told a second time
        say(f"cannot print the tables: {error.strerror}")
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that has no "±"
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "plot.py | head" ends without a traceback
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
