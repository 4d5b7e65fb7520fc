"""plot.py: what it reads, refuses, averages, draws and prints. Builds its own logs."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest

import plot

SCRIPT = Path(plot.__file__)
MEASURES = ("Acc", "Err", "Precision", "Recall")
RANDOM = "random"
LFOSA = "AV_temperature_unknown_T0.5_known_T0.5_modelB_T1.0"


def log_name(method, seed=1, dataset="cifar100", model="resnet18", init="8", batch=1500):
    """The name that the scripts give; `method` is all that follows the seed."""
    script = "temperature_" if "_unknown_T" in method else ""
    start = f"{script}{model}_{dataset}_known20_init{init}_batch{batch}"
    return f"{start}_seed{seed}_{method}.pkl"


def make_log(recall=(0.1, 0.2), accuracy=(20.0, 30.0)):
    columns = (accuracy, [100 - a for a in accuracy], [r / 2 for r in recall], recall)
    return {key: dict(enumerate(c)) for key, c in zip(MEASURES, columns, strict=True)}


def write(folder, method, log=None, **name):
    path = folder / log_name(method, **name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(log or make_log()))
    return path


def curves_of(folder, compare=None):
    """Title and curves of the only group in a folder."""
    logs = plot.read_logs([str(folder)])
    (group,) = {run.group for run in logs}
    return plot.make_curves(group, logs, plot.read_logs([str(compare)]) if compare else {})


def labels_of(folder, compare=None):
    return [curve.label for curve in curves_of(folder, compare)[1]]


def run_plot(*words, cwd):
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "TinyImagenet", "digits"])
@pytest.mark.parametrize("init", ["8", "0.5"])
@pytest.mark.parametrize("strategy", ["random", "AV_based", "AV_temperature", "my_new_idea"])
@pytest.mark.parametrize("settings", [(), ("drop-unknown",), ("max-epoch10", "lr-model0.001")])
@pytest.mark.parametrize("temperatures", [None, (0.5, 1.0, 2.0)])
def test_every_part_of_a_name_comes_back(dataset, init, strategy, settings, temperatures):
    method = strategy
    if temperatures:
        method += "_unknown_T{}_known_T{}_modelB_T{}".format(*temperatures)
    method += "__" + "_".join(settings) if settings else ""
    run = plot.parse_name(log_name(method, 3, dataset, "resnet20", init, 400))
    assert run.group == (dataset, "resnet20", 20, init, 400)
    assert run.method == (strategy, temperatures, settings)
    assert run.seed == 3
    assert run.method.is_lfosa == (strategy == "AV_temperature" and temperatures is not None)


def test_a_name_from_before_modelB_T_is_the_same_run_as_one_with_it():
    old, new = log_name(LFOSA.replace("_modelB_T1.0", "")), log_name(LFOSA)
    assert plot.parse_name(old) == plot.parse_name(new)


@pytest.mark.parametrize(
    "name",
    [
        "notes.pkl",
        log_name(RANDOM).replace("_seed1", ""),
        "temperature_" + log_name(RANDOM),  # says LfOSA, but lacks the temperatures
        log_name(LFOSA).removeprefix("temperature_"),
        log_name(RANDOM) + ".tmp",
        log_name(RANDOM) + "\n",
        log_name(RANDOM, model="$x^"),  # Matplotlib would read it as a formula
    ],
)
def test_a_name_of_something_else_is_refused(name):
    with pytest.raises(ValueError, match="name"):
        plot.parse_name(name)


# ---- logs --------------------------------------------------------------------------------------


class Attack:
    """Unpickles as a call of open(path, "w")."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(tmp_path, protocol):
    victim, path = tmp_path / "victim", tmp_path / "log.pkl"
    path.write_bytes(pickle.dumps(make_log() | {"more": Attack(victim)}, protocol))
    with pytest.raises(ValueError, match="refused"):
        plot.load_log(path)
    assert not victim.exists()
    pickle.loads(path.read_bytes())["more"].close()
    assert victim.exists()  # it was an attack


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_logs_load_whatever_the_protocol_and_whole_numbers(tmp_path, protocol):
    path = tmp_path / "log.pkl"
    path.write_bytes(pickle.dumps(make_log(recall=(0, 1)), protocol))
    assert plot.load_log(path)["Recall"] == [0.0, 1.0]


def changed(**measures):
    return pickle.dumps(make_log() | measures)


SOUND = pickle.dumps(make_log())
DAMAGED = {
    "empty file": b"",
    "text": b"hello\n",
    "truncated": SOUND[:-20],
    "not UTF-8": SOUND.replace(b"Recall", b"\xff\xfeCall"),
    "stack underflow": b"\x80\x04R.",
    "missing memo": b"\x80\x04h\x07.",
    "huge memo index": SOUND[:-1] + b"r\xff\xff\xff\x00.",  # 0.3 GB, sound otherwise
    "huge length": b"\x80\x04\x96" + b"\xff" * 7 + b"\x7f.",
    "deep nesting": pickle.MARK * 100_000 + pickle.TUPLE * 100_000 + b".",
    "huge file": SOUND + bytes(2_000_000),
    "list": pickle.dumps([1, 2]),
    "no measures": pickle.dumps({}),
    "missing measure": pickle.dumps({"Acc": {0: 1.0}}),
    "list instead of rounds": changed(Recall=[0.1, 0.2]),
    "no rounds": pickle.dumps({key: {} for key in MEASURES}),
    "rounds from 1": changed(Recall={1: 0.1, 2: 0.2}),
    "rounds as text": changed(Recall={"0": 0.1, "1": 0.2}),
    "different lengths": changed(Recall={0: 0.1}),
    "NaN": changed(Acc={0: 20.0, 1: float("nan")}),
    "infinity": changed(Acc={0: 20.0, 1: float("inf")}),
    "beyond float": changed(Acc={0: 20.0, 1: 10**400}),
    "text as number": changed(Acc={0: 20.0, 1: "30"}),
    "bool as number": changed(Acc={0: 20.0, 1: True}),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_log_is_named_in_one_line_and_the_others_are_used(tmp_path, capsys, data):
    write(tmp_path, RANDOM, seed=1)
    bad = tmp_path / log_name(RANDOM, seed=2)
    bad.write_bytes(data)
    assert [run.seed for run in plot.read_logs([str(tmp_path)])] == [1]
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(re.escape(f"skipped {bad}: ") + ".{6}", line)


def test_the_reason_names_the_measure(tmp_path):
    path = tmp_path / "log.pkl"
    path.write_bytes(DAMAGED["rounds from 1"])
    with pytest.raises(ValueError, match="rounds of Recall are not 0 to 1"):
        plot.load_log(path)


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path, capsys):
    write(tmp_path, RANDOM, seed=1)
    (tmp_path / log_name(RANDOM, seed=2)).mkdir()
    os.mkfifo(tmp_path / log_name(RANDOM, seed=3))
    (tmp_path / log_name(RANDOM, seed=4)).symlink_to("nowhere")
    (tmp_path / "run.log").write_text("not a pickle, and not meant to be one")
    assert len(plot.read_logs([str(tmp_path)])) == 1
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_run_in_two_folders_counts_once_and_a_contradiction_is_named(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, RANDOM, seed=1)
    write(b, RANDOM, seed=1)
    write(b, RANDOM, seed=2)
    assert len(plot.read_logs([str(a), str(b)])) == 2
    assert capsys.readouterr().err == ""
    other = write(b, RANDOM, make_log(recall=(0.3, 0.4)), seed=1)
    logs = plot.read_logs([str(a), str(b), str(tmp_path / "c")])
    assert [log["Recall"][0] for log in logs.values()] == [0.1, 0.1]  # the first folder's
    contradiction, missing = capsys.readouterr().err.splitlines()
    assert str(other) in contradiction and str(a) in contradiction
    assert str(tmp_path / "c") in missing


# ---- curves ------------------------------------------------------------------------------------


def test_seeds_are_averaged_over_the_rounds_they_share(tmp_path, capsys):
    write(tmp_path, RANDOM, make_log((0.1, 0.2, 0.9), (20.0, 30.0, 99.0)), seed=1)
    write(tmp_path, RANDOM, make_log((0.3, 0.6), (24.0, 36.0)), seed=2)
    _, (curve,) = curves_of(tmp_path)
    assert curve.seeds == (1, 2)
    mean, std = plot.mean_std(curve.values["recall"])
    assert mean == pytest.approx([0.2, 0.4])
    assert std == pytest.approx([0.02**0.5, 0.08**0.5])  # sample: divided by 2 - 1
    assert plot.mean_std(curve.values["accuracy"])[0] == pytest.approx([22.0, 33.0])
    (line,) = capsys.readouterr().err.splitlines()
    assert "random" in line and "2 rounds (seed 1 has 3, seed 2 has 2)" in line
    assert plot.table([curve])[2] == (
        "| random | 2 | 2 | 0.400 ± 0.283 | 0.300 ± 0.212 | 0.200 ± 0.141 | 0.150 ± 0.106"
        " | 33.00 ± 4.24 | 27.50 ± 3.54 |"
    )


def test_one_seed_has_no_deviation(tmp_path):
    write(tmp_path, RANDOM)
    _, curves = curves_of(tmp_path)
    assert plot.table(curves)[2] == (
        "| random | 1 | 2 | 0.200 | 0.150 | 0.100 | 0.075 | 30.00 | 25.00 |"
    )
    assert not plot.draw(curves, "recall", "").axes[0].collections


def test_lfosa_comes_first_and_names_say_which_script_ran(tmp_path):
    other_script = LFOSA.replace("AV_temperature", RANDOM)
    for method in ("zebra", "BALD", RANDOM, other_script, "AV_based", "KMeans", LFOSA, "a_b"):
        write(tmp_path, method)
    baselines = ["AV_based", "random", "random (LfOSA script)", "KMeans", "BALD", "a_b", "zebra"]
    assert labels_of(tmp_path) == ["LfOSA", *baselines]


def test_labels_show_what_differs_and_the_title_what_is_common(tmp_path):
    write(tmp_path, f"{LFOSA}__max-epoch10_feat-dim0")
    write(tmp_path, f"{LFOSA.replace('known_T0.5_m', 'known_T1.0_m')}__max-epoch10_feat-dim0")
    write(tmp_path, f"{RANDOM}__max-epoch10")
    write(tmp_path, f"{RANDOM}__max-epoch10_drop-unknown")
    title, curves = curves_of(tmp_path)
    assert title == "CIFAR-100, resnet18, 20 known classes, init 8 %, batch 1500; max-epoch10"
    assert [curve.label for curve in curves] == [
        "LfOSA, feat-dim0",
        "LfOSA, known-T1.0, feat-dim0",
        "random",
        "random, drop-unknown",
    ]


def test_published_logs_join_whatever_their_model_and_are_marked(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write(ours, f"{RANDOM}__max-epoch10", model="resnet20")
    write(theirs, RANDOM)
    write(theirs, LFOSA, model="resnet20")
    write(theirs, f"{RANDOM}__max-epoch10")
    write(theirs, "BALD", init="20")
    write(theirs, "KMeans", batch=400)
    write(theirs, "AV_based", dataset="cifar10")
    title, curves = curves_of(ours, theirs)
    assert title.endswith("; ours: max-epoch10")
    assert [(curve.label, curve.published) for curve in curves] == [
        ("LfOSA (published)", True),
        ("random", False),
        ("random (published, resnet18)", True),
        ("random, max-epoch10 (published, resnet18)", True),
    ]
    assert "| random, max-epoch10 (published, resnet18) | 1 |" in plot.table(curves)[-1]


# ---- figures -----------------------------------------------------------------------------------


def test_lfosa_is_solid_and_on_top_and_others_dashed_and_published_ones_dotted(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for method in (LFOSA, RANDOM, "AV_based"):
        for seed in (1, 2):
            write(ours, method, make_log((0.1, 0.1 + 0.1 * seed)), seed=seed)
            write(theirs, method, seed=seed)
    _, curves = curves_of(ours, theirs)
    axes = plot.draw(curves, "recall", "a title").axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["LfOSA"].get_linestyle() == "-"
    assert lines["random"].get_linestyle() == lines["AV_based"].get_linestyle() == "--"
    lfosa = lines.pop("LfOSA")
    assert all(lfosa.get_zorder() > line.get_zorder() for line in lines.values())
    assert lfosa.get_ydata() == pytest.approx([0.1, 0.25])
    assert len(axes.collections) == 3  # bands: ours, not theirs
    for name in ("LfOSA", "random", "AV_based"):
        published = lines[f"{name} (published)"]
        assert published.get_linestyle() == ":"
        assert published.get_color() == (lfosa if name == "LfOSA" else lines[name]).get_color()
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"LfOSA", *lines}
    assert axes.get_title() == "a title"


@pytest.mark.parametrize("rounds", [1, 2, 4, 10, 50])
def test_rounds_are_marked_at_whole_numbers(tmp_path, rounds):
    write(tmp_path, RANDOM, make_log([0.1] * rounds, [20.0] * rounds))
    _, curves = curves_of(tmp_path)
    ticks = plot.draw(curves, "recall", "").axes[0].get_xticks()
    assert len(ticks) > 0 and all(tick == int(tick) for tick in ticks)


def test_a_strategy_looks_the_same_in_every_figure(tmp_path):
    looks = {}
    for folder, methods in (
        ("a", ("my_idea", RANDOM)),
        ("b", (LFOSA, "a_idea", "my_idea", RANDOM)),
    ):
        for method in methods:
            write(tmp_path / folder, method)
        _, curves = curves_of(tmp_path / folder)
        for measure in plot.MEASURES:
            for line in plot.draw(curves, measure, "").axes[0].lines:
                look = (line.get_color(), line.get_marker())
                assert looks.setdefault(line.get_label(), look) == look
    assert len(set(looks.values())) == 4
    assert looks["my_idea"] == ("#5cd69f", ">")  # tomorrow's process must agree


def test_listed_strategies_can_be_told_apart_in_grey():
    colours, markers = zip(*plot.STYLES.values(), strict=True)
    assert len(set(markers)) == len(markers)
    grey = sorted(np.array([matplotlib.colors.to_rgb(c) for c in colours]) @ (0.299, 0.587, 0.114))
    assert min(np.diff(grey)) > 0.07
    assert max(grey) < 0.75  # still seen on white


def test_variants_of_a_strategy_are_drawn_differently(tmp_path):
    for method in (LFOSA, RANDOM):
        for setting in ("", "__feat-dim0", "__drop-unknown"):
            write(tmp_path, method + setting)
    _, curves = curves_of(tmp_path)
    styles = [plot.line_style(curve) for curve in curves]
    assert len({(s["color"], s["fillstyle"], s["linestyle"]) for s in styles}) == 6
    assert {s["linestyle"] for s in styles[:3]} == {"-"}
    assert len({s["color"] for s in styles}) == 2


def test_figures_have_the_published_names_and_the_batch_only_where_needed(tmp_path):
    groups = [
        plot.parse_name(log_name(RANDOM, **name)).group
        for name in (
            {"dataset": "cifar10"},
            {"dataset": "TinyImagenet"},
            {"dataset": "digits", "init": "0.5", "model": "resnet20"},
            {"batch": 400},
            {"batch": 1500},
        )
    ]
    assert [plot.figure_stem(group, groups) for group in groups] == [
        "cifar/cifar10_resnet18_init8_known20",
        "tinyimagenet/TinyImagenet_resnet18_init8_known20",
        "digits/digits_resnet20_init0.5_known20",
        "cifar/cifar100_resnet18_init8_known20_batch400",
        "cifar/cifar100_resnet18_init8_known20_batch1500",
    ]


def test_a_failed_write_leaves_the_earlier_figure_and_nothing_else(tmp_path):
    class Broken:
        def savefig(self, path, **_):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    figure = tmp_path / "figure.png"
    figure.write_bytes(b"earlier")
    with pytest.raises(OSError, match="No space"):
        plot.save(Broken(), figure)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        ("figure.png", b"earlier")
    ]


# ---- the command -------------------------------------------------------------------------------


def test_the_command_draws_and_prints_without_being_told_anything(tmp_path):
    for method in (LFOSA, RANDOM):
        write(tmp_path / "log_AL", method)
    (tmp_path / "log_AL" / "junk.pkl").write_bytes(b"junk")
    result = run_plot("--compare", "log_AL/nothing", cwd=tmp_path)
    assert result.returncode == 0
    skipped, nothing = result.stderr.splitlines()
    assert "junk.pkl" in skipped and "--compare" in nothing
    heading, _, *rows = result.stdout.strip().splitlines()
    assert heading == "## CIFAR-100, resnet18, 20 known classes, init 8 %, batch 1500"
    assert [row.split("|")[1].strip() for row in rows] == ["strategy", "---", "LfOSA", "random"]
    stem = "cifar100_resnet18_init8_known20"
    figures = sorted((tmp_path / "gifs" / "cifar").iterdir())
    assert [f.name for f in figures] == [
        f"{stem}_{measure}.png" for measure in ("accuracy", "precision", "recall")
    ]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in figures)


def test_nothing_to_draw_is_one_line_and_status_2(tmp_path):
    result = run_plot(cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert "log_AL" in line and "--log-dir" in line


def test_only_damaged_logs_is_status_2(tmp_path, capsys):
    (tmp_path / log_name(RANDOM)).write_bytes(b"")
    assert plot.main(["--log-dir", str(tmp_path), "--out-dir", str(tmp_path)]) == 2
    damaged, nothing = capsys.readouterr().err.splitlines()
    assert "empty file" in damaged and "--log-dir" in nothing


def test_an_output_folder_that_is_a_file_is_one_line_and_status_2(tmp_path, capsys):
    write(tmp_path, RANDOM)
    (tmp_path / "taken").write_text("")
    assert plot.main(["--log-dir", str(tmp_path), "--out-dir", str(tmp_path / "taken")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "taken" in line and "--out-dir" in line


def test_a_comparison_that_fits_nothing_is_said_and_ours_is_drawn(tmp_path, capsys):
    write(tmp_path / "ours", RANDOM)
    write(tmp_path / "theirs", RANDOM, dataset="cifar10")
    words = ["--log-dir", tmp_path / "ours", "--compare", tmp_path / "theirs"]
    assert plot.main([*map(str, words), "--out-dir", str(tmp_path / "out")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "--compare" in line and str(tmp_path / "theirs") in line
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_plotting_needs_no_torch(tmp_path):
    code = "import sys, plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent).returncode == 0
