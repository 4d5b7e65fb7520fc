"""Draw the logs of AL_center.py and AL_center_temperature.py, a PNG for each measure.

Print a Markdown table of the measures in the final round and of their means over the rounds.

    python plot.py                             # log_AL/*.pkl -> gifs/*/*.png
    python plot.py --log-dir results           # all logs in the folders below results
    python plot.py --compare results/digits    # our curves, and dotted those of results/digits

Lines are means over the seeds; bands and the numbers after "±" are one sample standard deviation
(ddof = 1). Needs NumPy and Matplotlib only. No code in a log is run.
"""

import argparse
import glob
import os
import pickle
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ["MPLBACKEND"] = "agg"  # a notebook's backend need not be installed here
import matplotlib
import numpy as np
from matplotlib.figure import Figure

MEASURES = {  # in the file name -> key in the log, axis label, decimals in the table
    "recall": ("Recall", "Selection Recall", 3),
    "precision": ("Precision", "Selection Precision", 3),
    "accuracy": ("Acc", "Classification Accuracy (%)", 2),
}
LIMITS = {"Acc": 100, "Err": 100, "Precision": 1, "Recall": 1}  # key in the log -> largest value
FOLDERS = {"cifar10": "cifar", "cifar100": "cifar"}  # of the figures; else dataset.lower()
PAPER = "AV_temperature AV_based random uncertainty certainty Coreset BALD OpenMax".split()
OTHERS = "KMeans Max_AV AV_uncertainty margin BADGE".split()
COLOURS = "C3 C0 C2 C1 C4 C5 C6 C9 0.25 0.35 0.45 0.55 0.65".split()
STYLES = dict(zip(PAPER + OTHERS, zip(COLOURS, "os^DvPXp<>hd*", strict=True), strict=True))
DASHES = ("-", "--", "-.", (0, (1, 1, 4, 1, 4, 1)))  # variants of a strategy, in turn

LOG_NAME = re.compile(
    r"(?P<lfosa>temperature_)?(?P<model>[\w.-]+?)_(?P<dataset>[A-Za-z0-9.-]+)"
    r"(?:_known(?P<known>\d+)_init(?P<init>[\d.e+-]+)_batch(?P<batch>\d+))?"
    r"_seed(?P<seed>\d+)_(?P<strategy>[\w-]+?)"
    r"(?P<temperatures>(?:_(?:unknown|known|modelB)_T[\d.e+-]+)*)"
    r"(?:__(?P<settings>[\w.,+-]+))?\.pkl",
    re.ASCII,
)
PUBLISHED = ("unknown_T0.5", "known_T0.5", "modelB_T1.0")

Log = dict[str, dict[int, float]]  # key of LIMITS -> round -> value


class Run(NamedTuple):
    """What the file name of a log says. Runs in one figure share the first five.

    known, init and batch are empty with an annotator, whose logs may lack rounds.
    """

    dataset: str
    known: str  # number of known classes
    init: str  # percent of the known images
    batch: str  # images per query
    model: str
    strategy: str
    folder: str  # of --compare; empty for our own runs
    traits: tuple[str, ...]  # what differs from the published setting: ("max-epoch10", ...)
    seed: int


class Curve(NamedTuple):
    """The logs of a method, one per seed, and the look of their mean."""

    label: str
    style: dict  # keyword arguments of the line
    logs: list[Log]

    def values(self, measure: str) -> tuple[list[int], np.ndarray]:
        """The R rounds that all S seeds have, and the measure's values (S, R)."""
        columns = [log[MEASURES[measure][0]] for log in self.logs]
        rounds = sorted(set.intersection(*map(set, columns)))
        return rounds, np.array([[column[q] for q in rounds] for column in columns])


def say(message: str) -> None:
    """One line on the standard error."""
    print("plot.py:", message, file=sys.stderr)


def parse_name(name: str) -> Run:
    """Read a log's file name; ValueError if it is not one that the two scripts would give."""
    match = LOG_NAME.fullmatch(name)
    if not match:
        raise ValueError("its name is not that of a log")
    part = match.groupdict("")
    traits = ["LfOSA script"] if part["lfosa"] and part["strategy"] != "AV_temperature" else []
    # older published logs lack modelB_T: their classifier had no temperature yet
    temperatures = re.findall(r"[a-zA-Z]+_T[^_]+", part["temperatures"])
    traits += [text.replace("_", "-") for text in temperatures if text not in PUBLISHED]
    traits += part["settings"].split("_") if part["settings"] else []
    group = [part[key] for key in Run._fields[:6]]
    return Run(*group, "", tuple(traits), int(part["seed"]))


class NumberType:
    """Stands in for numpy.dtype, with which a pickle could read any place of the memory."""

    def __init__(self, code: str, *_: object):
        self.code = code  # such as "f8"

    def __setstate__(self, state: tuple) -> None:
        self.code = state[1] + self.code  # the byte order comes first


class PlainUnpickler(pickle.Unpickler):
    """Loads containers, strings, Python's and NumPy's numbers, and nothing that runs code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("numpy", "dtype"):
            return NumberType
        if module in ("numpy._core.multiarray", "numpy.core.multiarray") and name == "scalar":
            return lambda kind, data: np.frombuffer(data, kind.code).item()
        if (module, name) == ("_codecs", "encode"):  # the scalar's bytes in protocols 0 to 2
            return lambda text, _: text.encode("latin1")
        raise ValueError(f"refused, it would run {module}.{name}")


def load_log(path: Path) -> Log:
    """Read one log. Raises ValueError, with a reason, if the file is not a sound log."""
    try:
        with path.open("rb") as file:
            content = PlainUnpickler(file).load()
        log = {key: dict(content[key]) for key in LIMITS}
    except Exception as error:  # damaged bytes raise nearly every class there is
        raise ValueError(f"not a sound log ({error!r:.200})") from None
    for key, limit in LIMITS.items():  # float32 may exceed it slightly
        for q, value in log[key].items():
            number = isinstance(q, int) and isinstance(value, int | float)
            if not (number and -0.001 <= value <= limit + 0.001):  # NaN fails as well
                raise ValueError(f"{key}[{q!r}] = {value!r:.20} is no number from 0 to {limit}")
    if not any(log.values()):
        raise ValueError("no round is done yet")
    for q, accuracy in log["Acc"].items():
        if abs(accuracy + log["Err"].get(q, 0) - 100) > 0.1:  # both may be rounded
            raise ValueError(f"Acc[{q}] + Err[{q}] is not 100: they must be in percent")
    return log


def read_logs(folders: list[str], compared: str = "") -> dict[Run, Log]:
    """All sound logs in and below the folders; the others are named on the standard error.

    `compared` becomes the runs' folder. Of different logs of one run the first is taken.
    """
    logs = {}
    for folder in folders:
        names = sorted(glob.glob("**/*.pkl", root_dir=folder, recursive=True))  # none hidden
        if not names:
            say(f"no log in {folder} (--log-dir and --compare name folders with logs)")
        for path in (Path(folder, name) for name in names):
            try:
                run = parse_name(path.name)._replace(folder=compared)
                log = load_log(path)
                if logs.setdefault(run, log) != log:
                    raise ValueError("another log of the same run, read before, differs from it")
            except ValueError as error:
                say(f"skipped {path}: {error}")
    return logs


def make_curves(logs: dict[Run, Log], common: list[str]) -> list[Curve]:
    """The curves of one figure, LfOSA first; their labels leave out the common traits."""
    methods = {}
    for run in sorted(logs, key=lambda run: ([*STYLES, run.strategy].index(run.strategy), run)):
        methods.setdefault(run._replace(seed=0), []).append(logs[run])
    curves, variants = [], Counter()
    for run, seeds in methods.items():
        name = "LfOSA" if run.strategy == "AV_temperature" else run.strategy
        label = ", ".join([name, *(trait for trait in run.traits if trait not in common)])
        colour, marker = STYLES.get(run.strategy, ("black", "x"))  # a user's own one is black
        width = 2.2 if name == "LfOSA" else 0.8 if run.strategy in OTHERS else 1.4
        dash = DASHES[variants[colour, run.folder] % len(DASHES)]
        variants[colour, run.folder] += 1
        if run.folder:
            label, width, dash = f"{label} ({run.folder})", min(width, 1.2), ":"
        style = {"color": colour, "marker": marker, "markersize": 3 + width / 2}
        if len({len(log["Precision"]) for log in seeds}) > 1:
            say(f"{label}: only the rounds that all seeds have are drawn")
        style |= {"linestyle": dash, "linewidth": width, "zorder": 2 + width}  # thick ones in front
        curves.append(Curve(label, style, seeds))
    return curves


def table(curves: list[Curve]) -> list[str]:
    """Markdown rows: seeds, rounds, and each measure in the final round and over all rounds."""
    columns = [f"{when} {measure}" for measure in MEASURES for when in ("final", "mean")]
    rows = [["strategy", "seeds", "rounds", *columns], ["---"] + ["---:"] * (2 + len(columns))]
    for curve in curves:
        length = max(len(curve.values(measure)[0]) for measure in MEASURES)
        row = [curve.label, str(len(curve.logs)), str(length)]
        for measure, (_, _, decimals) in MEASURES.items():
            rounds, values = curve.values(measure)
            if not rounds:
                row += ["-", "-"]
                continue
            for per_seed in (values[:, -1], values.mean(axis=1)):
                cell = f"{per_seed.mean():.{decimals}f}"
                if len(per_seed) > 1:
                    cell += f" ± {per_seed.std(ddof=1):.{decimals}f}"
                row.append(cell)
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def draw(curves: list[Curve], measure: str, title: str) -> Figure:
    """The figure of one measure: mean lines over the rounds, bands of one standard deviation."""
    axes = Figure(figsize=(5, 4)).add_subplot()  # inches: one column of a paper
    for curve in curves:
        rounds, values = curve.values(measure)
        mean, style = values.mean(axis=0), curve.style
        axes.plot(rounds, mean, label=curve.label, **style)
        if len(values) > 1 and style["linestyle"] != ":":
            std = values.std(axis=0, ddof=1)
            band = {"alpha": 0.06 * style["linewidth"], "linewidth": 0, "zorder": 1}
            axes.fill_between(rounds, mean - std, mean + std, color=style["color"], **band)
    axes.set_title(title, fontsize=9, wrap=True)
    axes.set(xlabel="Query Round", ylabel=MEASURES[measure][1])
    axes.locator_params(axis="x", integer=True, nbins=10, min_n_ticks=1)  # 1: also with one round
    axes.grid(color="0.9", linewidth=0.6)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
    axes.legend(handlelength=3, fontsize=7, **below)
    return axes.figure


def main(argv: list[str] | None = None) -> None:
    """Draw and print everything; SystemExit with status 2 if the user has to change something."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    folder = {"metavar": "DIR", "type": os.path.expanduser}
    text = "folders with logs of the two scripts, in them or below (default: log_AL)"
    parser.add_argument("--log-dir", nargs="+", default=["log_AL"], help=text, **folder)
    parser.add_argument("--out-dir", default="gifs", help="for figures (default: gifs)", **folder)
    text = "folder with logs of the same setting and network, drawn dotted into our figures"
    parser.add_argument("--compare", help=text, **folder)
    args = parser.parse_args(argv)

    matplotlib.rcdefaults()  # the figures are the same whatever a user's matplotlibrc says
    matplotlib.rcParams["text.parse_math"] = False  # a "$" in a folder's name is no formula
    logs = read_logs(args.log_dir)
    if not logs:
        sys.exit(2)  # what is wrong has been said
    figures = sorted({run[:5] for run in logs})
    if args.compare:
        compared = read_logs([args.compare], str(Path(*Path(args.compare).parts[-2:])))
        if not {run[:5] for run in compared}.intersection(figures):
            say(f"--compare: {args.compare} has no log of the same setting and network")
        logs |= compared
    report = []
    for figure in figures:
        dataset, known, init, batch, model = figure
        runs = {run: log for run, log in logs.items() if run[:5] == figure}
        common = [t for t in next(iter(runs)).traits if all(t in run.traits for run in runs)]
        curves = make_curves(runs, common)
        title = f"{dataset}, {model}"
        stem = f"{FOLDERS.get(dataset, dataset.lower())}/{dataset}_{model}"
        if known:
            title += f", {known} known classes, init {init} %, batch {batch}"
            stem += f"_init{init}_known{known}"  # as the published figures
        if sum(f[:3] + f[4:] == (dataset, known, init, model) for f in figures) > 1:
            stem += f"_batch{batch}"  # only where another figure would have the same name
        if common:
            title += f"; {', '.join(common)}"
        report += [f"## {title}", "", *table(curves), ""]
        for measure in MEASURES:
            path = Path(args.out_dir, f"{stem}_{measure}.png")
            drawn = [curve for curve in curves if curve.values(measure)[0]]
            try:
                if drawn:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    draw(drawn, measure, title).savefig(path, dpi=150, bbox_inches="tight")
            except OSError as error:
                parser.error(f"cannot write {path}: {error.strerror}; choose another --out-dir")
    try:
        print(*report, sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # "plot.py | head" has seen enough
            parser.error(f"cannot print the tables: {error.strerror}")


if __name__ == "__main__":
    if sys.stdout is not None:  # None: the standard output is closed
        sys.stdout.reconfigure(errors="replace")  # for a terminal that has no "±"
    main()
