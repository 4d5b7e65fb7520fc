"""Draw the logs of AL_center.py and AL_center_temperature.py, a PNG for each measure.

Print a Markdown table of the measures in the final round and of their means over the rounds.

    python plot.py                             # log_AL/*.pkl -> gifs/*/*.png
    python plot.py --log-dir results           # all logs in the folders below results
    python plot.py --compare results/digits    # our curves, and dotted those of results/digits

Logs that differ only in the number of known classes are also drawn side by side, as in the paper.
Lines are means over the seeds; bands and the numbers after "±" are one sample standard deviation
(ddof = 1). Needs only NumPy and Matplotlib. Code inside a log is never run.
"""

import argparse
import os
import pickle
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

if "ipykernel" not in sys.modules:  # a notebook's backend may be missing outside of it
    os.environ["MPLBACKEND"] = "agg"
import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

MEASURES = {  # in the file name -> key in the log, axis label, decimals in the table
    "recall": ("Recall", "Selection Recall", 3),
    "precision": ("Precision", "Selection Precision", 3),
    "accuracy": ("Acc", "Classification Accuracy (%)", 2),
}
LIMITS = {"Acc": 100, "Err": 100, "Precision": 1, "Recall": 1}  # key in the log -> largest value
FOLDERS = {"cifar10": "cifar", "cifar100": "cifar"}  # of the figures; else dataset.lower()
PAPERS = ["AV_temperature", "EOAL", "EAOA"]  # LfOSA and its successors
PAPERS += "AV_based random uncertainty certainty Coreset BALD OpenMax".split()
OTHERS = "KMeans Max_AV AV_uncertainty margin BADGE".split()
COLOURS = "C3 C8 black C0 C2 C1 C4 C5 C6 C9 0.25 0.35 0.45 0.55 0.65".split()
STYLES = dict(zip(PAPERS + OTHERS, zip(COLOURS, "oHps^DvPXp<>hd*", strict=True), strict=True))
# Of strategies that a user adds; 5 colours and 6 markers give 30 different pairs.
OWN_STYLES = [*zip("navy magenta darkgreen goldenrod teal".split() * 6, "x+1234" * 5, strict=True)]
DASHES = ("-", "--", "-.", (0, (1, 1, 4, 1, 4, 1)))  # variants of a strategy, in turn

LOG_NAME = re.compile(
    r"(?P<lfosa>temperature_)?(?P<model>[\w.-]+?)_(?P<dataset>(?u:[^\W_]|[.-])+)"
    r"(?:_known(?P<known>\d+)_init(?P<init>[\d.e+-]+)_batch(?P<batch>\d+))?"
    r"_seed(?P<seed>\d+)_(?P<strategy>[\w-]+?)"
    r"(?P<temperatures>(?:_(?:unknown|known|modelB)_T[\d.e+-]+)*)"
    r"(?:__(?P<settings>(?u:[\w.,+-])+))?\.pkl",
    re.ASCII,
)
# Strategies that only LfOSA's script offers, and the detector's published temperature.
DETECTOR_T = {"AV_temperature": "0.5", "EOAL": "0.5", "EAOA": "1.0"}

Log = dict[str, dict[int, float]]  # key of LIMITS -> round -> value


class Run(NamedTuple):
    """What a log's file name says. Figures side by side share the first four, one figure five.

    init, batch and known are empty with an annotator, whose logs may lack rounds.
    """

    dataset: str
    init: str  # percent of the known images
    batch: str  # images per query
    model: str
    known: str  # number of known classes
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


def tell(message: str) -> None:
    """One line on the standard error; the standard output holds the tables alone."""
    print("plot.py:", message, file=sys.stderr)


def parse_name(name: str) -> Run:
    """Read a log's file name; ValueError if it is not one that the two scripts would give."""
    match = LOG_NAME.fullmatch(name)
    if not match:
        raise ValueError("its name is not that of a log")
    part = match.groupdict("")
    detector_T = DETECTOR_T.get(part["strategy"])
    traits = ["LfOSA script"] if part["lfosa"] and not detector_T else []
    published = [f"{kind}_T{detector_T or 0.5}" for kind in ("unknown", "known")] + ["modelB_T1.0"]
    # older published logs lack modelB_T: their classifier had no temperature yet
    temperatures = re.findall(r"[a-zA-Z]+_T[^_]+", part["temperatures"])
    traits += [text.replace("_", "-") for text in temperatures if text not in published]
    traits += part["settings"].split("_") if part["settings"] else []
    given = {key: part[key] for key in Run._fields if key in part}
    return Run(**given | {"folder": "", "traits": tuple(traits), "seed": int(part["seed"])})


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
    """All sound logs in and below the folders; what else is there is named on the standard error.

    `compared` becomes the runs' folder. If two logs of a run differ, the first one counts.
    """
    paths, logs = [], {}
    for folder in folders:
        errors, found = [], []
        for parent, below, files in os.walk(folder, onerror=errors.append, followlinks=True):
            below[:] = [name for name in below if not name.startswith(".")]
            found += [Path(parent, name) for name in files if re.fullmatch(r"[^.].*\.pkl", name)]
        if not found and not errors:
            errors.append(FileNotFoundError(0, "no log in it", folder))
        for error in errors:
            tell(f"{'--compare' if compared else '--log-dir'}: {error.filename}: {error.strerror}")
        paths += sorted(found)
    for path in paths:
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
    order, methods = [*styles], {}
    for run in sorted(logs, key=lambda run: (int(run.known or 0), order.index(run.strategy), run)):
        methods.setdefault(run._replace(seed=0), []).append(logs[run])
    curves, dashes = {}, {}
    for run, seeds in methods.items():
        name = "LfOSA" if run.strategy == "AV_temperature" else run.strategy
        label = ", ".join([name, *(trait for trait in run.traits if trait not in common)])
        colour, marker = styles[run.strategy]
        width = 2.2 if name == "LfOSA" else 0.8 if run.strategy in OTHERS else 1.4
        used = dashes.setdefault((run.strategy, run.folder), {})  # the same for all known
        dash = used.setdefault(run.traits, DASHES[len(used) % len(DASHES)])
        if run.folder:
            label, width, dash = f"{label} ({run.folder})", min(width, 1.2), ":"
        style = {"color": colour, "marker": marker, "markersize": 3 + width / 2}
        if len({len(log["Precision"]) for log in seeds}) > 1:
            tell(f"{label}: only the rounds that all seeds have are drawn")
        style |= {"linestyle": dash, "linewidth": width, "zorder": 2 + width}  # thick ones in front
        curves.setdefault(run.known, []).append(Curve(label, style, seeds))
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


def draw(panels: dict[str, list[Curve]], measure: str, title: str = "") -> Figure:
    """Panels by title, side by side: mean lines over the rounds, bands of one deviation."""
    count = len(panels)
    figure = Figure(figsize=(2 + 3 * count, 4))  # inches; one panel fits a column of a paper
    row = figure.subplots(1, count, sharey=True, squeeze=False, gridspec_kw={"wspace": 0.05})[0]
    lines = {}  # label -> line, for one legend
    for axes, (name, curves) in zip(row, panels.items(), strict=True):
        for curve in curves:
            rounds, values = curve.values(measure)
            if not rounds:
                continue
            mean, style = values.mean(axis=0), curve.style
            (lines[curve.label],) = axes.plot(rounds, mean, label=curve.label, **style)
            if len(values) > 1 and style["linestyle"] != ":":
                std = values.std(axis=0, ddof=1)
                band = {"alpha": 0.06 * style["linewidth"], "linewidth": 0, "zorder": 1}
                axes.fill_between(rounds, mean - std, mean + std, color=style["color"], **band)
        axes.set_title(name, fontsize=9, wrap=True)
        axes.set_xlabel("Query Round")
        axes.locator_params(axis="x", integer=True, nbins=10, min_n_ticks=1)  # also for one round
        axes.grid(color="0.9", linewidth=0.6)
    row[0].set_ylabel(MEASURES[measure][1])
    figure.suptitle(title, fontsize=9)
    middle = (count + 0.05 * (count - 1)) / 2  # of the row, in widths of a panel
    below = {"loc": "upper center", "bbox_to_anchor": (middle, -0.14), "ncols": 2 * count}
    row[0].legend(lines.values(), lines, handlelength=3, fontsize=7, **below)
    return figure


def use_fonts(text: str) -> None:
    """Let Matplotlib take the characters that its own font lacks from the installed fonts."""
    families = ["DejaVu Sans"]
    own, rest = font_manager.findfont(families[0]), font_manager.findSystemFonts()
    for path in [own, *sorted(rest, key=lambda path: ("Regular" not in path, path))]:
        try:
            font = FT2Font(path)
        except (OSError, RuntimeError):  # damaged, or without outlines
            continue
        missing = {character for character in text if not font.get_char_index(ord(character))}
        if len(missing) < len(set(text)):
            font_manager.fontManager.addfont(path)  # it may be newer than Matplotlib's list
            families.append(font.family_name)
            text = missing
    matplotlib.rcParams["font.family"] = families
    if text:
        tell(f"boxes stand for {''.join(sorted(text))}, which no installed font has")
        warnings.filterwarnings("ignore", "Glyph")


def draw_family(
    logs: dict[Run, Log], styles: dict, folder: Path, with_batch: bool
) -> tuple[list[str], list[Path]]:
    """Draw runs of one data set, init, batch and network: the tables' lines, and the PNG files.

    with_batch: other figures would have the same names without the batch in them.
    """
    dataset, init, batch, model = next(iter(logs))[:4]
    common = [t for t in next(iter(logs)).traits if all(t in run.traits for run in logs)]
    curves = make_curves(logs, styles, common)

    def title(known: str) -> str:
        parts = (dataset, model, known, init and f"init {init} %, batch {batch}")
        return "; ".join(filter(None, (", ".join(filter(None, parts)), ", ".join(common))))

    report, figures, paths = [], {}, []  # figures: known in the name -> title above, panels
    names = {known: known and f"{known} known classes" for known in curves}
    for known, its in curves.items():
        report += [f"## {title(names[known])}", "", *table(its), ""]
        figures[known] = "", {title(names[known]): its}
    if len(curves) > 1:
        figures["-".join(curves)] = title(""), {names[known]: curves[known] for known in curves}
    for known, (above, panels) in figures.items():
        stem = f"{dataset}_{model}" + (f"_init{init}_known{known}" if known else "")
        stem += f"_batch{batch}" if with_batch else ""
        for measure in MEASURES:
            if any(curve.values(measure)[0] for its in panels.values() for curve in its):
                paths.append(folder / f"{stem}_{measure}.png")
                folder.mkdir(parents=True, exist_ok=True)
                draw(panels, measure, above).savefig(paths[-1], dpi=150, bbox_inches="tight")
    return report, paths


@matplotlib.rc_context()  # a notebook gets its own settings back
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
    if args.compare:
        figures = {run[:5] for run in logs}
        compared = read_logs([args.compare], str(Path(*Path(args.compare).parts[-2:])))
        compared = {run: log for run, log in compared.items() if run[:5] in figures}
        if not compared:
            tell(f"--compare: {args.compare} has no log of the same setting and network")
        logs |= compared
    use_fonts("".join(run.dataset + run.folder + "".join(run.traits) for run in logs))
    own = sorted({run.strategy for run in logs} - STYLES.keys())  # added by the user
    styles = STYLES | {name: OWN_STYLES[i % len(OWN_STYLES)] for i, name in enumerate(own)}
    report, paths, families = [], [], sorted({run[:4] for run in logs})
    for dataset, init, batch, model in families:
        runs = {run: logs[run] for run in logs if run[:4] == (dataset, init, batch, model)}
        place = Path(args.out_dir, FOLDERS.get(dataset, dataset.lower()))
        alike = sum((f[:2], f[3]) == ((dataset, init), model) for f in families)
        try:
            lines, files = draw_family(runs, styles, place, with_batch=alike > 1)
        except OSError as error:
            parser.error(f"cannot write to {place}: {error.strerror}; choose another --out-dir")
        report, paths = report + lines, paths + files
    try:
        print(*report, sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # "plot.py | head" has seen enough
            parser.error(f"cannot print the tables: {error.strerror}")
    tell(f"{len(paths)} figures are in {', '.join(sorted({str(p.parent) for p in paths}))}")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's or a closed output has none
        sys.stdout.reconfigure(errors="replace")  # for a terminal that has no "±"
    main()
