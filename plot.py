"""Draw the curves of the logs that AL_center.py and AL_center_temperature.py wrote.

Selection recall, selection precision and classification accuracy against the query round, as one
PNG each, and a Markdown table of the final round and of the mean over the rounds.

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
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ["MPLBACKEND"] = "agg"  # a notebook's backend need not be installed here
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MEASURES = {  # in the file name -> key in the log, axis label, decimals in the table
    "recall": ("Recall", "Selection Recall", 3),
    "precision": ("Precision", "Selection Precision", 3),
    "accuracy": ("Acc", "Classification Accuracy (%)", 2),
}
LIMITS = {"Acc": 100, "Err": 100, "Precision": 1, "Recall": 1}  # key in the log -> largest value
ROUNDING = 1e-3  # by which float32 numbers may miss a limit
DATASETS = {  # in the log's name -> folder of its figures, name in titles
    "cifar10": ("cifar", "CIFAR-10"),
    "cifar100": ("cifar", "CIFAR-100"),
    "TinyImagenet": ("tinyimagenet", "Tiny-ImageNet"),
}
PAPER = "AV_temperature AV_based random uncertainty certainty Coreset BALD OpenMax".split()
OTHERS = "KMeans Max_AV AV_uncertainty margin BADGE".split()
COLOURS = "C3 C0 C2 C1 C4 C5 C6 C9 0.25 0.35 0.45 0.55 0.65".split()
STYLES = dict(zip(PAPER + OTHERS, zip(COLOURS, "os^DvPXp<>hd*", strict=True), strict=True))
DASHES = ("-", "--", "-.", (0, (1, 1, 4, 1, 4, 1)))  # variants of a strategy, in turn
FILLS = ("full", "none", "left", "top")  # of their markers

NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"  # as Python prints a float or an int
LOG_NAME = re.compile(
    r"(?P<lfosa>temperature_)?(?!temperature_)(?P<model>[A-Za-z0-9][\w.-]*?)"
    r"_(?P<dataset>[A-Za-z0-9-][A-Za-z0-9.-]*)"
    rf"(?:_known(?P<known>\d+)_init(?P<init>{NUMBER})_batch(?P<batch>\d+))?"
    r"_seed(?P<seed>\d+)_(?P<strategy>[A-Za-z0-9][\w-]*?)"
    rf"(?(lfosa)(?P<temperatures>_unknown_T{NUMBER}_known_T{NUMBER}(?:_modelB_T{NUMBER})?))"
    r"(?:__(?P<settings>[\w.,+-]+))?\.pkl",
    re.ASCII,
)
PUBLISHED = ("unknown_T0.5", "known_T0.5", "modelB_T1.0")

Log = dict[str, dict[int, float]]  # key of LIMITS -> round -> value


class Run(NamedTuple):
    """What the file name of a log says; known, init and batch are empty with an annotator.

    Runs in one figure share the first five, compared ones the first four.
    """

    dataset: str
    known: str  # number of known classes
    init: str  # percent of the known images
    batch: str  # images per query
    model: str
    strategy: str
    traits: tuple[str, ...]  # what differs from the published setting: ("max-epoch10", ...)
    seed: int
    folder: str = ""  # of --compare; empty for our own runs


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
    return Run(*group, tuple(traits), int(part["seed"]))


class NumberType:
    """Stands in for numpy.dtype in a pickle: the name of a type of numbers, such as "<f8"."""

    def __init__(self, code: str, *_: object):
        self.code = code

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


def load_log(path: Path, run: Run) -> Log:
    """Read one log; ValueError with a reason for whatever is wrong with the file.

    With an annotator, measures may lack rounds; else all have the same rounds 0, 1, ...
    """
    try:
        with path.open("rb") as file:
            content = PlainUnpickler(file).load()
        log = {key: dict(content[key]) for key in LIMITS}
    except Exception as error:  # damaged bytes raise nearly every class there is
        raise ValueError(f"not a sound log ({error!r:.200})") from None
    for key, limit in LIMITS.items():
        for q, value in log[key].items():
            plain = type(q) is int and type(value) in (int, float)
            if not (plain and -ROUNDING <= value <= limit + ROUNDING):  # NaN fails as well
                raise ValueError(f"{key}[{q!r}] = {value!r:.20} is no number from 0 to {limit}")
    if not any(log.values()):
        raise ValueError("no round is done yet")
    if run.known and any(set(log[key]) != set(range(len(log["Acc"]))) for key in LIMITS):
        raise ValueError("its measures do not have the same rounds 0, 1, ...")
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
        if not names and len(folders) > 1:
            say(f"no log in {folder}")
        for path in (Path(folder, name) for name in names):
            try:
                run = parse_name(path.name)._replace(folder=compared)
                log = load_log(path, run)
                if logs.setdefault(run, log) != log:
                    raise ValueError("another log of the same run, read before, differs from it")
            except ValueError as error:
                say(f"skipped {path}: {error}")
    return logs


def line_style(strategy: str, variant: int, compared: bool) -> dict:
    """Keyword arguments of a line. A strategy looks the same in every figure."""
    code = zlib.crc32(strategy.encode())  # a user's own strategy gets its look from its name
    own = matplotlib.colormaps["Dark2"](code % 8), "H8+x1234"[code // 8 % 8]
    colour, marker = STYLES.get(strategy, own)
    width = 2.2 if strategy == "AV_temperature" else 1.4 if strategy in PAPER else 0.8
    return {
        "color": colour,
        "marker": marker,
        "fillstyle": FILLS[variant % len(FILLS)],
        "markerfacecoloralt": "white",
        "markersize": 3 if compared else 3.5 + width / 2,
        "linestyle": ":" if compared else DASHES[variant % len(DASHES)],
        "linewidth": min(width, 1.2) if compared else width,
        "zorder": 2 + width - 0.5 * compared,  # the thick ones in front
    }


def make_curves(logs: dict[Run, Log], common: list[str]) -> list[Curve]:
    """The curves of one figure, LfOSA first; the labels of ours leave out the common traits."""

    def order(run: Run) -> tuple:
        return [*STYLES, run.strategy].index(run.strategy), run.strategy, run.folder, run

    model = next(run.model for run in logs if not run.folder)
    methods: dict[Run, dict[int, Log]] = {}
    for run in sorted(logs, key=order):
        methods.setdefault(run._replace(seed=0), {})[run.seed] = logs[run]
    curves, variants = [], Counter()
    for run, seeds in methods.items():
        if run.folder and methods.get(run._replace(folder="")) == seeds:
            continue  # the same logs as ours make one curve
        label = ["LfOSA" if run.strategy == "AV_temperature" else run.strategy]
        label += [trait for trait in run.traits if run.folder or trait not in common]
        notes = [run.folder] * bool(run.folder) + [run.model] * (run.model != model)
        label = ", ".join(label) + (f" ({', '.join(notes)})" if notes else "")
        lengths = {seed: len(log["Precision"]) for seed, log in seeds.items()}
        if len(set(lengths.values())) > 1:
            say(f"{label}: drawn are the rounds that all seeds have; rounds by seed: {lengths}")
        style = line_style(run.strategy, variants[run.strategy, run.folder], bool(run.folder))
        variants[run.strategy, run.folder] += 1
        curves.append(Curve(label, style, list(seeds.values())))
    return curves


def table(curves: list[Curve]) -> list[str]:
    """Markdown rows: seeds, rounds, and each known measure in the final and over all rounds."""
    known = [measure for measure in MEASURES if any(curve.values(measure)[0] for curve in curves)]
    columns = [f"{when} {measure}" for measure in known for when in ("final", "mean")]
    rows = [["strategy", "seeds", "rounds", *columns], ["---"] + ["---:"] * (2 + len(columns))]
    for curve in curves:
        length = max(len(curve.values(measure)[0]) for measure in MEASURES)
        rows.append([curve.label, str(len(curve.logs)), str(length)])
        for measure in known:
            rounds, values = curve.values(measure)
            for per_seed in (values[:, -1], values.mean(axis=1)) if rounds else ():
                cell = f"{per_seed.mean():.{MEASURES[measure][2]}f}"
                if len(per_seed) > 1:
                    cell += f" ± {per_seed.std(ddof=1):.{MEASURES[measure][2]}f}"
                rows[-1].append(cell)
            rows[-1] += [] if rounds else ["-", "-"]
    return [f"| {' | '.join(row)} |" for row in rows]


def draw(curves: list[Curve], measure: str, title: str) -> Figure:
    """The figure of one measure: mean lines over the rounds, bands of one standard deviation."""
    figure = Figure(figsize=(5, 4))  # inches: one column of a paper
    axes = figure.add_subplot()
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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # 1: also with one round
    axes.grid(color="0.9", linewidth=0.6)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
    axes.legend(handlelength=3, fontsize=7, **below)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG so that the path never holds half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    """Draw and print everything; SystemExit with status 2 if the user has to change something."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.usage = argparse.SUPPRESS  # the examples say it, and an error is one line without it
    folder = {"metavar": "DIR", "type": os.path.expanduser}
    text = "folders with logs of the two scripts, in them or below (default: log_AL)"
    parser.add_argument("--log-dir", nargs="+", default=["log_AL"], help=text, **folder)
    text = "folder for the figures (default: gifs)"
    parser.add_argument("--out-dir", default="gifs", help=text, **folder)
    text = "folder with logs to compare with, drawn dotted into our figures of the same data set, "
    text += "known classes, initial percentage and query batch, whatever their network"
    parser.add_argument("--compare", help=text, **folder)
    args = parser.parse_args(argv)

    logs, compared = read_logs(args.log_dir), {}
    if not logs:
        parser.error(f"no log in {', '.join(args.log_dir)}: name the folders with --log-dir")
    if args.compare:
        name = str(Path(*Path(args.compare).parts[-2:]))  # short, for the legend
        compared = read_logs([args.compare], name.encode(errors="replace").decode())
        if not {run[:4] for run in compared} & {run[:4] for run in logs}:
            say(f"--compare: no log in {args.compare} has the same data set, known, init and batch")
    matplotlib.rcdefaults()  # the figures are the same whatever a user's matplotlibrc says
    matplotlib.rcParams["text.parse_math"] = False  # a "$" in a folder's name is no formula
    report, figures = [], sorted({run[:5] for run in logs})
    for figure in figures:
        dataset, known, init, batch, model = figure
        ours = {run: log for run, log in logs.items() if run[:5] == figure}
        theirs = {run: log for run, log in compared.items() if run[:4] == figure[:4]}
        # what all our runs have in common stands in the title
        common = [t for t in next(iter(ours)).traits if all(t in run.traits for run in ours)]
        curves = make_curves(ours | theirs, common)
        family, name = DATASETS.get(dataset, (dataset.lower(), dataset))
        title, stem = f"{name}, {model}", f"{family}/{dataset}_{model}"
        if known:
            title += f", {known} known classes, init {init} %, batch {batch}"
            stem += f"_init{init}_known{known}"  # as the published figures
        if sum(f[:3] + f[4:] == (dataset, known, init, model) for f in figures) > 1:
            stem += f"_batch{batch}"  # only where another figure would have the same name
        if common:
            title += f"; {'ours: ' if theirs else ''}{', '.join(common)}"
        report += [f"## {title}", "", *table(curves), ""]
        for measure in MEASURES:
            path = Path(args.out_dir, f"{stem}_{measure}.png")
            drawn = [curve for curve in curves if curve.values(measure)[0]]
            try:
                if drawn:
                    save(draw(drawn, measure, title), path)
            except OSError as error:
                parser.error(f"cannot write {path}: {error.strerror}; choose another --out-dir")
    try:
        print(*report, sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # not told a second time
        if not isinstance(error, BrokenPipeError):  # "plot.py | head" has seen enough
            parser.error(f"cannot print the tables: {error.strerror}")


if __name__ == "__main__":
    if sys.stdout is not None:  # None: the standard output is closed
        sys.stdout.reconfigure(errors="replace")  # for a terminal that has no "±"
    main()
