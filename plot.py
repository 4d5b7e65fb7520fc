"""Draw the logs of AL_center.py and AL_center_temperature.py, and print a Markdown table.

    python plot.py                             # log_AL/*.pkl -> gifs/*/*.png
    python plot.py --log-dir results           # all logs in the folders below results
    python plot.py --compare results/digits    # our curves, and dotted those of results/digits

Each measure becomes a PNG; different numbers of known classes also get one that shows them side by
side. Lines and tables show means over the seeds; bands and the numbers after "±" are one sample
standard deviation (ddof = 1). Needs only NumPy and Matplotlib. Code inside a log is never run.
"""

import argparse
import contextlib
import os
import pickle
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

if "IPython" not in sys.modules:  # a notebook's backend may be missing outside of it
    os.environ["MPLBACKEND"] = "agg"
import matplotlib.figure
import numpy as np
from matplotlib import font_manager

MEASURES = {  # in the file name -> key in the log, axis label, decimals in the table
    "recall": ("Recall", "Selection Recall", 3),
    "precision": ("Precision", "Selection Precision", 3),
    "accuracy": ("Acc", "Classification Accuracy (%)", 2),
}
LIMITS = {"Acc": 100, "Err": 100, "Precision": 1, "Recall": 1}  # key in the log -> largest value
FOLDERS = {"cifar10": "cifar", "cifar100": "cifar"}  # of the figures; else dataset.lower()
MAIN = "AV_temperature EOAL EAOA AV_based random uncertainty certainty Coreset BALD OpenMax".split()
OTHERS = "KMeans Max_AV AV_uncertainty margin BADGE".split()  # drawn thin
COLORS = "C3 C8 black C0 C2 C1 C4 C5 C6 C9 0.25 0.35 0.45 0.55 0.65".split()
STYLES = dict(zip(MAIN + OTHERS, zip(COLORS, "oHps^DvPXp<>hd*", strict=True), strict=True))
OWN_COLORS, OWN_MARKERS = "navy magenta darkgreen goldenrod teal".split(), "x+1234"  # a user's
# Variants of a strategy, in turn. The gaps of "--" would hide behind a thick line's markers.
DASHES = ("-", (0, (2.5, 2)), "-.", (0, (1, 1, 4, 1, 4, 1)))
DOTS = (":", (0, (1, 4)), (0, (1, 1, 1, 4)))  # those of --compare

LOG_NAME = re.compile(
    r"(?P<lfosa>temperature_)?(?P<model>[\w.-]+?)_(?P<dataset>(?u:[^\W_]|[.-])+?)"
    r"(?:(?:-(?P<digest>[0-9a-f]{8}))?"  # of a user's data; an annotator's have a mark
    r"_known(?P<known>\d+)_init(?P<init>[\d.e+-]+)_batch(?P<batch>\d+))?"
    r"_seed(?P<seed>\d+)_(?P<strategy>[\w-]+?)"
    r"(?P<temperatures>(?:_(?:unknown|known|modelB)_T[\d.e+-]+)*)"
    r"(?:__(?P<settings>(?u:[\w.,+-])+))?\.pkl",
    re.ASCII,
)
DETECTOR_T = {"AV_temperature": "0.5", "EOAL": "0.5", "EAOA": "1.0"}  # of LfOSA's script alone

Log = dict[str, dict[int, float]]  # key of LIMITS -> round -> value


class Run(NamedTuple):
    """What a log's file name says."""

    dataset: str
    init: str  # percent of the known images; like batch and known empty with an annotator
    batch: str  # images per query
    model: str
    known: str  # number of known classes
    strategy: str
    folder: str  # of --compare; empty for our own runs
    traits: tuple[str, ...]  # ("8fbf7e21", "max-epoch10"): the data; what is not as published
    seed: int

    @property
    def family(self) -> tuple[str, str, str, str]:
        """A family has a panel for each number of known classes, side by side."""
        return self.dataset, self.init, self.batch, self.model


class Curve(NamedTuple):
    """A method: the rounds that all its S seeds have, and what they measured there."""

    label: str
    style: dict  # keyword arguments of the line
    values: dict[str, tuple[list[int], np.ndarray]]  # measure -> R rounds, (S, R)


def tell(message: str) -> None:
    """One line on the standard error; the standard output holds the tables alone."""
    print("plot.py:", message, file=sys.stderr)


def parse_name(name: str) -> Run:
    """Read a log's file name; ValueError if it is not one that the two scripts would give.

    A digest is no part of `dataset`: a user's data of one name, such as embeddings made anew, share
    a figure. The mark of an annotator's folder is.
    """
    if not (match := LOG_NAME.fullmatch(name)):
        raise ValueError("its name is not that of a log")
    part = match.groupdict("")
    own_T = DETECTOR_T.get(part["strategy"])
    published = (f"unknown_T{own_T or 0.5}", f"known_T{own_T or 0.5}", "modelB_T1.0")
    # older published logs lack modelB_T: their classifier had no temperature yet
    temperatures = re.findall(r"[a-zA-Z]+_T[^_]+", part["temperatures"])
    traits = [part["digest"]] if part["digest"] else []
    traits += ["LfOSA script"] if part["lfosa"] and not own_T else []
    traits += [text.replace("_", "-") for text in temperatures if text not in published]
    traits += filter(None, part["settings"].split("_"))
    given = {key: part[key] for key in Run._fields if key in part}
    return Run(**given | {"folder": "", "traits": tuple(traits), "seed": int(part["seed"])})


class NumberType:
    """Stands in for numpy.dtype, through which a pickle could read any memory."""

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
        raise ValueError(f"cannot be read as a log ({error!r:.200})") from None
    for key, limit in LIMITS.items():  # float32 may exceed it slightly
        for q, value in log[key].items():
            number = isinstance(q, int) and isinstance(value, int | float)
            if not (number and -0.001 <= value <= limit + 0.001):  # NaN fails as well
                raise ValueError(f"{key}[{q!r}] = {value!r:.20} is no number from 0 to {limit}")
    if not any(log.values()):
        raise ValueError("nothing is measured in it yet")
    for q, accuracy in log["Acc"].items():
        if abs(accuracy + log["Err"].get(q, 0) - 100) > 0.1:  # both may be rounded
            raise ValueError(f"Acc[{q}] + Err[{q}] is not 100: they must be in percent")
    return log


def read_logs(folders: list[str], compared: str = "") -> dict[Run, Log]:
    """Sound logs in and below the folders; says what is left out. Of a run the first log counts."""
    logs = {}
    for folder in folders:
        errors, paths = [], []
        for parent, below, files in os.walk(folder, onerror=errors.append, followlinks=True):
            below[:] = [name for name in below if not name.startswith(".")]
            paths += [Path(parent, name) for name in files if re.fullmatch(r"[^.].*\.pkl", name)]
        if not paths and not errors:
            errors = [FileNotFoundError(0, "no log in it", folder)]
        for error in errors:
            tell(f"{'--compare' if compared else '--log-dir'}: {error.filename}: {error.strerror}")
        for path in sorted(paths):
            try:
                run = parse_name(path.name)._replace(folder=compared)
                log = load_log(path)
                if logs.setdefault(run, log) != log:
                    raise ValueError("another log of the same run, read before, differs from it")
            except ValueError as error:
                tell(f"skipped {path}: {error}")
    return logs


def make_curves(logs: dict[Run, Log], styles: dict, common: list[str]) -> dict[str, list[Curve]]:
    """The curves for each number of known classes, LfOSA first; labels leave out common traits."""
    methods, curves, dashes = {}, {}, {}
    for run in sorted(logs, key=lambda r: (int(r.known or 0), [*styles].index(r.strategy), r)):
        methods.setdefault(run._replace(seed=0), []).append(logs[run])
    for run, seeds in methods.items():
        name = "LfOSA" if run.strategy == "AV_temperature" else run.strategy
        label = ", ".join([name, *(trait for trait in run.traits if trait not in common)])
        color, marker = styles[run.strategy]
        width = 2.2 if name == "LfOSA" else 0.8 if run.strategy in OTHERS else 1.4
        used = dashes.setdefault((run.strategy, run.folder), {})  # the same for all known
        patterns = DOTS if run.folder else DASHES
        dash = used.setdefault(run.traits, patterns[len(used) % len(patterns)])
        if run.folder:
            label, width = f"{label} ({run.folder})", min(width, 1.2)
        if len({len(log["Precision"]) for log in seeds}) > 1:
            tell(f"{label}: only the rounds that all seeds have are drawn")
        style = {"color": color, "marker": marker, "markersize": 3 + width / 2}
        style |= {"linestyle": dash, "linewidth": width, "zorder": 2 + width}  # thick ones in front
        values = {}
        for measure, (key, _, _) in MEASURES.items():
            rounds = sorted(set.intersection(*(set(log[key]) for log in seeds)))
            values[measure] = rounds, np.array([[log[key][q] for q in rounds] for log in seeds])
        curves.setdefault(run.known, []).append(Curve(label, style, values))
    return curves


def table(curves: list[Curve]) -> list[str]:
    """Markdown rows: seeds, rounds, and each measure in the final round and over all rounds."""
    columns = [f"{when} {measure}" for measure in MEASURES for when in ("final", "mean")]
    rows = [["strategy", "seeds", "rounds", *columns], ["---"] + ["---:"] * (2 + len(columns))]
    for curve in curves:
        seeds, length = np.max([values.shape for _, values in curve.values.values()], axis=0)
        row = [curve.label, str(seeds), str(length)]
        for measure, (rounds, values) in curve.values.items():
            decimals = MEASURES[measure][2]
            for per_seed in (values[:, -1], values.mean(axis=1)) if rounds else ():
                spread = f" ± {per_seed.std(ddof=1):.{decimals}f}" if len(per_seed) > 1 else ""
                row.append(f"{per_seed.mean():.{decimals}f}{spread}")
            row += [] if rounds else ["-", "-"]
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def draw(panels: dict[str, list[Curve]], measure: str, title: str = "") -> matplotlib.figure.Figure:
    """Panels by title, side by side: mean lines over the rounds, bands of one deviation."""
    count = len(panels)
    figure = matplotlib.figure.Figure((2 + 3 * count, 4))  # inches; one fits a paper's column
    row = figure.subplots(1, count, sharey=True, squeeze=False, gridspec_kw={"wspace": 0.05})[0]
    lines = {}  # label -> line, for one legend
    for axes, (name, curves) in zip(row, panels.items(), strict=True):
        for curve in (curve for curve in curves if curve.values[measure][0]):
            rounds, values = curve.values[measure]
            mean, style = values.mean(axis=0), curve.style
            (lines[curve.label],) = axes.plot(rounds, mean, label=curve.label, **style)
            if len(values) > 1 and style["linestyle"] not in DOTS:
                std = values.std(axis=0, ddof=1)
                band = {"alpha": 0.06 * style["linewidth"], "linewidth": 0, "zorder": 1}
                axes.fill_between(rounds, mean - std, mean + std, color=style["color"], **band)
        axes.set_title(name, fontsize=9, wrap=True)
        axes.set_xlabel("Query Round")
        axes.locator_params(axis="x", integer=True, nbins=10, min_n_ticks=1)  # also for one round
        axes.grid(color="0.9", linewidth=0.6)
    row[0].set_ylabel(MEASURES[measure][1])
    figure.suptitle(title, fontsize=9)
    below = {"loc": "upper center", "bbox_to_anchor": (0.525 * count - 0.025, -0.14)}
    row[0].legend(lines.values(), lines, ncols=2 * count, handlelength=3, fontsize=7, **below)
    return figure


def use_fonts(text: str) -> None:
    """Draw what Matplotlib's font lacks with other installed ones; say what all of them lack."""
    families, own = ["DejaVu Sans"], font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    missing = {character for character in text if not own.get_char_index(ord(character))}
    for path in sorted(font_manager.findSystemFonts()) if missing else ():
        with contextlib.suppress(OSError, RuntimeError):  # damaged, or without outlines
            font = font_manager.get_font(path)
            if found := {character for character in missing if font.get_char_index(ord(character))}:
                font_manager.fontManager.addfont(path)  # newer perhaps than Matplotlib's list
                families.append(font.family_name)
                missing -= found
    if missing:
        tell(f"boxes stand for {''.join(sorted(missing))}, which no installed font has")
        warnings.filterwarnings("ignore", "Glyph")
    matplotlib.rcParams["font.family"] = families


def draw_family(runs: dict[Run, Log], styles: dict, folder: Path, with_batch: bool) -> list[str]:
    """Draw runs of one data set, init, batch and network. Returns the lines of their tables."""
    dataset, init, batch, model = next(iter(runs)).family
    common = [t for t in next(iter(runs)).traits if all(t in run.traits for run in runs)]
    curves = make_curves(runs, styles, common)
    start, end = f"{dataset}, {model}", f", init {init} %, batch {batch}" if init else ""
    end += f"; {', '.join(common)}" if common else ""
    titles = {k: start + (f", {k} known classes" if k else "") + end for k in curves}
    figures = {k: ("", {titles[k]: curves[k]}) for k in curves}  # title above, panels
    if len(curves) > 1:
        figures["-".join(curves)] = start + end, {f"{k} known classes": curves[k] for k in curves}
    folder.mkdir(parents=True, exist_ok=True)
    for known, (above, panels) in figures.items():
        stem = f"{dataset}_{model}" + (f"_init{init}_known{known}" if known else "")
        stem += f"_batch{batch}" if with_batch else ""  # else figures would share a name
        for measure in MEASURES:
            if any(curve.values[measure][0] for panel in panels.values() for curve in panel):
                path = folder / f"{stem}_{measure}.png"
                draw(panels, measure, above).savefig(path, dpi=150, bbox_inches="tight")
    return [line for k in curves for line in (f"## {titles[k]}", "", *table(curves[k]), "")]


@matplotlib.rc_context()  # a notebook gets its own settings back
def main(argv: list[str] | None = None) -> None:
    """Draw and print everything; SystemExit with status 2 if the user has to change something."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, kind = parser.add_argument, {"metavar": "DIR", "type": os.path.expanduser}
    add("--log-dir", nargs="+", default=["log_AL"], help="with the logs (default: log_AL)", **kind)
    add("--out-dir", default="gifs", help="for the figures (default: gifs)", **kind)
    text = "with logs of the same setting and network, drawn dotted into our figures"
    add("--compare", help=text, **kind)
    args = parser.parse_args(argv)
    matplotlib.rcdefaults()  # the figures are the same whatever a user's matplotlibrc says
    matplotlib.rcParams["text.parse_math"] = False  # a "$" in a folder's name is no formula
    logs = read_logs(args.log_dir)
    if not logs:
        sys.exit(2)  # what is wrong has been said
    if args.compare:
        figures = {(run.family, run.known) for run in logs}
        name = str(Path(*Path(args.compare).parts[-2:])).encode(errors="replace").decode()
        compared = read_logs([args.compare], name)
        drawn = {run: log for run, log in compared.items() if (run.family, run.known) in figures}
        if compared and not drawn:
            tell(f"--compare: {args.compare} has no log of the same setting and network")
        logs |= drawn
    use_fonts("".join(run.dataset + run.folder + "".join(run.traits) for run in logs))
    own = enumerate(sorted({run.strategy for run in logs} - STYLES.keys()))
    styles = STYLES | {name: (OWN_COLORS[i % 5], OWN_MARKERS[i % 6]) for i, name in own}
    report, families = [], sorted({run.family for run in logs})
    folders = [Path(args.out_dir, FOLDERS.get(f[0], f[0].lower())) for f in families]
    for family, folder in zip(families, folders, strict=True):
        runs = {run: log for run, log in logs.items() if run.family == family}
        alike = [f for f in families if f[:2] + f[3:] == family[:2] + family[3:]]
        try:
            report += draw_family(runs, styles, folder, with_batch=len(alike) > 1)
        except OSError as error:
            parser.error(f"cannot write to {folder}: {error.strerror}; choose another --out-dir")
    try:
        print(*report, sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # "plot.py | head" has seen enough
            parser.error(f"cannot print the tables: {error.strerror}")
    tell(f"the figures are in {', '.join(sorted({*map(str, folders)}))}")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's or a closed output has none
        sys.stdout.reconfigure(errors="replace")  # for a terminal that has no "±"
    main()
