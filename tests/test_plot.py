"""plot.py: what it reads, refuses, averages, draws and prints. Builds its own logs."""

import io
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import plot
from query_strategies import STRATEGIES

SCRIPT = Path(plot.__file__)
MEASURES = ("recall", "precision", "accuracy")
LFOSA, EOAL = (f"{x}_unknown_T0.5_known_T0.5_modelB_T1.0" for x in ("AV_temperature", "EOAL"))
EAOA = "EAOA_unknown_T1.0_known_T1.0_modelB_T1.0"


def make_log(recall=(0.1, 0.2), accuracy=(20.0, 30.0)):
    rows = {"Acc": accuracy, "Err": [100 - a for a in accuracy]}
    rows |= {"Precision": [r / 2 for r in recall], "Recall": recall}
    return {key: dict(enumerate(values)) for key, values in rows.items()}


def write(folder, method, log=None, seed=1, data="cifar100", setting="_known20_init8_batch1500"):
    """A log, or the bytes of one, under the name that the scripts give; `method` ends the name."""
    script = "temperature_" if "_unknown_T" in method else ""
    path = folder / f"{script}resnet18_{data}{setting}_seed{seed}_{method}.pkl"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(log if isinstance(log, bytes) else pickle.dumps(log or make_log()))
    return path


def run_plot(*words, cwd, env=None):
    command = [sys.executable, "-X", "dev", str(SCRIPT), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """A function that runs plot.py on a folder and returns the figures, by their files' stems."""
    figures = {}
    monkeypatch.setattr(Figure, "savefig", lambda fig, path, **_: figures.update({path.stem: fig}))

    def run(folder, *words):
        figures.clear()
        plot.main(["--log-dir", str(folder), "--out-dir", str(tmp_path / "out"), *words])
        return dict(figures)

    return run


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines}


def look(line):
    pattern = line._unscaled_dash_pattern  # get_linestyle calls each pattern of one's own "--"
    return line.get_color(), line.get_marker(), pattern


@pytest.mark.parametrize("temperature", ["_modelB_T1.0", ""])  # without it as published first
def test_every_part_of_a_name_comes_back(temperature):
    start = "temperature_wide_resnet_my.photos-2_known4_init0.5_batch60_seed3_my_idea"
    end = f"_unknown_T0.5_known_T1e-05{temperature}__max-epoch10_known-CAT,狗.pkl"
    run = plot.parse_name(start + end)
    assert (run.model, run.dataset, run.strategy) == ("wide_resnet", "my.photos-2", "my_idea")
    assert (run.known, run.init, run.batch, run.seed) == ("4", "0.5", "60", 3)
    assert set(run.traits) > {"known-T1e-05", "max-epoch10", "known-CAT,狗"}
    annotator = plot.parse_name("mlp_猫狗-1a2b3c4d_seed1_random.pkl")
    assert (annotator.dataset, annotator.known, annotator.traits) == ("猫狗-1a2b3c4d", "", ())


@pytest.mark.parametrize("end", ["seed\u0661_random.pkl", "seed1_random (1).pkl"])  # Arabic 1; copy
def test_what_the_scripts_do_not_write_is_no_name(end):
    with pytest.raises(ValueError):
        plot.parse_name(f"resnet18_digits_{end}")


class Attack:
    """Unpickles as a call of open(path, "w")."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_calls_something_is_skipped_and_calls_nothing(tmp_path, capsys):
    victim = tmp_path / "victim"
    data = pickle.dumps(make_log() | {"more": Attack(victim)})
    write(tmp_path, "random", data)
    assert plot.read_logs([str(tmp_path)]) == {}
    assert "open" in capsys.readouterr().err and not victim.exists()
    pickle.loads(data)["more"].close()
    assert victim.exists()  # it was an attack


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("kind", [float, np.float64, np.float32])
def test_python_and_numpy_numbers_are_read(tmp_path, kind, protocol):
    log = {key: {np.int64(q): kind(v) for q, v in log.items()} for key, log in make_log().items()}
    write(tmp_path, "random", pickle.dumps(log, protocol))
    (read,) = plot.read_logs([str(tmp_path)]).values()
    assert read == log and type(read["Acc"][0]) is float


SOUND = make_log()
UNSOUND = {
    "empty": b"",
    "truncated": pickle.dumps(SOUND)[:-20],
    "missing measure": {"Acc": {0: 1.0}},
    "no rounds": {key: {} for key in SOUND},
    "NaN": SOUND | {"Precision": {0: 0.1, 1: float("nan")}},
    "text as number": SOUND | {"Acc": {0: 20.0, 1: "30"}},
    "text as round": SOUND | {"Recall": {"0": 0.1, "1": 0.2}},
    "NumPy array": SOUND | {"Recall": {0: 0.1, 1: np.array([0.2])}},
    "precision in percent": SOUND | {"Precision": {0: 10.0, 1: 20.0}},
    "accuracy as fraction": SOUND | {"Acc": {0: 0.7, 1: 0.8}, "Err": {0: 0.3, 1: 0.2}},
}


@pytest.mark.parametrize("log", UNSOUND.values(), ids=UNSOUND.keys())
def test_an_unsound_log_is_named_in_one_line_and_the_others_are_used(tmp_path, capsys, log):
    write(tmp_path, "random", seed=1)
    bad = write(tmp_path, "random", log, seed=2)
    assert [run.seed for run in plot.read_logs([str(tmp_path)])] == [1]
    (line,) = capsys.readouterr().err.splitlines()
    assert str(bad) in line


def test_folders_are_read_below_and_a_run_counts_once(tmp_path, capsys):
    write(tmp_path / "a", "random", seed=1)
    write(tmp_path / "b" / "c", "random", seed=1)
    write(tmp_path / "b" / "c", "random", seed=2)
    write(tmp_path / ".trash", "random", seed=3)
    (tmp_path / "notes.pkl").touch()
    other = write(tmp_path / "b", "random", make_log(recall=(0.3, 0.4)), seed=1)
    logs = plot.read_logs([str(tmp_path), str(tmp_path / "nothing")])
    assert {run.seed for run in logs} == {1, 2}
    assert {log["Recall"][0] for log in logs.values()} == {0.1}  # the first one read
    contradiction, unnamed, missing = capsys.readouterr().err.splitlines()
    assert str(other) in contradiction and "notes.pkl" in unnamed
    assert str(tmp_path / "nothing") in missing


def test_a_folder_that_cannot_be_read_is_named(tmp_path, capsys, monkeypatch):
    write(tmp_path / "a", "random", seed=1)
    write(tmp_path / "b", "random", seed=2)
    closed, scandir = str(tmp_path / "b"), os.scandir

    def without_permission(path):  # a superuser may read everything
        if os.fspath(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", without_permission)
    assert [run.seed for run in plot.read_logs([str(tmp_path)])] == [1]
    assert plot.read_logs([closed]) == {}
    below, itself = capsys.readouterr().err.splitlines()
    for line in (below, itself):
        assert closed in line and "Permission denied" in line


def test_figure_and_table_show_mean_and_sample_deviation_of_the_shared_rounds(
    tmp_path, draw, capsys
):
    recalls = [(0.1, 0.2, 0.9), (0.3, 0.6), (0.2, 0.1)]
    for seed, recall in enumerate(recalls):
        write(tmp_path, "random", make_log(recall), seed=seed)
    rounds = list(zip(*recalls, strict=False))  # two, as zip stops at the shortest
    means, stds = ([f(values) for values in rounds] for f in (mean, stdev))
    (axes,) = draw(tmp_path)["cifar100_resnet18_init8_known20_recall"].axes
    assert axes.lines[0].get_ydata() == pytest.approx(means)
    heights = axes.collections[0].get_paths()[0].get_extents()
    assert heights.y1 == pytest.approx(max(m + s for m, s in zip(means, stds, strict=True)))
    over_rounds = [mean(recall[:2]) for recall in recalls]
    final = f"{means[1]:.3f} ± {stds[1]:.3f}"
    over_all = f"{mean(over_rounds):.3f} ± {stdev(over_rounds):.3f}"
    assert f"| random | 3 | 2 | {final} | {over_all} |" in capsys.readouterr().out


def test_lfosa_is_first_and_in_front_and_no_two_lines_look_the_same(tmp_path, draw):
    own = ["zeta", "my_idea", "another"]
    methods = [LFOSA, EOAL, EAOA, *({*STRATEGIES} - {"AV_temperature", "EOAL", "EAOA"}), *own]
    for method in (*methods, LFOSA + "__drop-unknown"):
        write(tmp_path, method)
    for method in ("my_idea", LFOSA + "__drop-unknown"):
        write(tmp_path, method, data="digits")
    figures = draw(tmp_path)
    lines = lines_of(figures["cifar100_resnet18_init8_known20_recall"].axes[0])
    assert list(lines)[:4] == ["LfOSA", "LfOSA, drop-unknown", "EOAL", "EAOA"]
    assert {*own} <= {*lines} and len(lines) == len(methods) + 1
    assert len({look(line) for line in lines.values()}) == len(lines)
    assert max(lines, key=lambda label: lines[label].get_zorder()).startswith("LfOSA")
    others = lines_of(figures["digits_resnet18_init8_known20_recall"].axes[0])
    assert look(others["my_idea"]) == look(lines["my_idea"])


def test_other_temperatures_protocols_and_scripts_are_other_curves(tmp_path, draw):
    names = {"EAOA": EAOA, "EAOA, protocol-EAOA": f"{EAOA}__protocol-EAOA", "random": "random"}
    names["EAOA, unknown-T0.5, known-T0.5"] = EAOA.replace("n_T1.0", "n_T0.5")
    names["EOAL"], names["EOAL, known-T1.0"] = EOAL, EOAL.replace("known_T0.5_m", "known_T1.0_m")
    names["random, protocol-EOAL"] = "random__protocol-EOAL"
    names["random, LfOSA script"] = EOAL.replace("EOAL", "random")
    for method in names.values():
        write(tmp_path, method)
    (axes,) = draw(tmp_path)["cifar100_resnet18_init8_known20_recall"].axes
    assert set(lines_of(axes)) == set(names)


def test_several_numbers_of_known_classes_also_stand_side_by_side(tmp_path, draw):
    levels = {"5": 0.1, "20": 0.2, "100": 0.3}
    for known, level in levels.items():
        for method in ("random__amp-bf16", LFOSA):
            write(tmp_path, method, make_log((level, 0.5)), setting=f"_known{known}_init8_batch9")
    write(tmp_path, "random", setting="_known20_init8_batch9")
    figures = draw(tmp_path)
    stem = "cifar100_resnet18_init8_known{}_{}"
    every = [*levels, "5-20-100"]  # in the order of the numbers
    assert set(figures) == {stem.format(known, x) for known in every for x in MEASURES}
    figure = figures[stem.format("5-20-100", "recall")]
    firsts, labels, looks = [], set(), set()
    for axes in figure.axes:
        lines = lines_of(axes)
        firsts.append(lines["LfOSA"].get_ydata()[0])
        labels |= set(lines)
        looks.add(look(lines["random, amp-bf16"]))
        assert axes.get_ylim() == figure.axes[0].get_ylim()
    assert firsts == [*levels.values()] and len(looks) == 1
    (legend,) = (axes.get_legend() for axes in figure.axes if axes.get_legend())
    assert {text.get_text() for text in legend.get_texts()} == labels


def test_different_data_with_names_in_any_script_are_different_figures(tmp_path, draw, capsys):
    names = ("猫狗-1a2b3c4d", "猫狗-9f8e7d6c", "车辆", "Größe.2")  # of an annotator
    for name in names:
        write(tmp_path, "random", data=name, setting="")
    assert set(draw(tmp_path)) == {f"{name}_resnet18_{x}" for name in names for x in MEASURES}
    assert capsys.readouterr().out.count("| random | 1 |") == len(names)


def test_embeddings_made_anew_share_a_figure_but_no_mean(tmp_path, draw):
    recall = {"0a1b2c3d": 0.3, "1e5f6a7b": 0.5, "2c9d0e1f": 0.7, "3ab1b2b3": 0.9}  # by digest
    for mark, first in recall.items():
        folder = tmp_path / ("ours" if first < 0.6 else "shipped")
        write(folder, "random", make_log(recall=(first, 1)), data=f"vectors-{mark}")
    figures = draw(tmp_path / "ours", "--compare", str(tmp_path / "shipped"))
    lines = lines_of(figures["vectors_resnet18_init8_known20_recall"].axes[0])
    drawn = {label: line.get_ydata()[0] for label, line in lines.items()}
    assert len(drawn) == len({look(line) for line in lines.values()}) == len(recall)
    for label, first in drawn.items():
        assert recall[next(mark for mark in recall if mark in label)] == first


def test_a_character_that_no_font_has_is_told_once(tmp_path, draw, capsys):
    lacking = tmp_path / "\U0010fffd"  # for private use: no machine has it
    for folder in (tmp_path / "ours", lacking):
        write(folder, "random")
    plot.main(
        [f"--log-dir={tmp_path / 'ours'}", "--compare", str(lacking), f"--out-dir={tmp_path}"]
    )
    told = [line for line in capsys.readouterr().err.splitlines() if lacking.name in line]
    assert len(told) == 1


def test_compared_curves_are_dotted_and_say_where_they_come_from(tmp_path, draw):
    write(tmp_path / "ours", LFOSA)
    for method in (LFOSA, "BALD"):
        write(tmp_path / "theirs", method)
        write(tmp_path / "theirs", method, setting="_known30_init8_batch1500")  # not in our figures
    figures = draw(tmp_path / "ours", "--compare", str(tmp_path / "theirs"))
    assert set(figures) == {f"cifar100_resnet18_init8_known20_{measure}" for measure in MEASURES}
    ours, *theirs = lines_of(figures["cifar100_resnet18_init8_known20_recall"].axes[0]).items()
    assert ours[0] == "LfOSA" and ours[1].get_linestyle() != ":"
    assert [line.get_linestyle() for _, line in theirs] == [":", ":"]
    for (label, _), name in zip(theirs, ("LfOSA", "BALD"), strict=True):
        assert label.startswith(name) and str(Path(tmp_path.name, "theirs")) in label
    assert ours[1].get_color() == theirs[0][1].get_color()


def test_the_command_draws_and_prints_whatever_its_surroundings(tmp_path):
    for method in (LFOSA, "random"):
        write(tmp_path / "log_AL", f"{method}__max-epoch10")
        write(tmp_path / "их логи", f"{method}__max-epoch10", make_log(recall=(0.3, 0.4)))
    surroundings = {"MPLBACKEND": "module://not_installed", "PYTHONIOENCODING": "ascii"}
    surroundings = os.environ | surroundings | {"HOME": str(tmp_path)}
    words = ("--out-dir=~/out", "--compare", "~/их логи")
    result = run_plot(*words, cwd=tmp_path, env=surroundings)
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()  # where the figures are
    assert str(tmp_path / "out" / "cifar") in line
    heading, _, *rows = result.stdout.strip().splitlines()
    assert "cifar100" in heading and "max-epoch10" in heading
    assert [row.split("|")[1].split()[0] for row in rows[2:]] == ["LfOSA"] * 2 + ["random"] * 2
    names = {path.name for path in (tmp_path / "out" / "cifar").iterdir()}
    assert names == {f"cifar100_resnet18_init8_known20_{measure}.png" for measure in MEASURES}


@pytest.mark.parametrize("redirection", ["| true", ">&-"])
def test_a_reader_that_has_seen_enough_and_a_closed_output_are_no_errors(tmp_path, redirection):
    write(tmp_path / "log_AL", "random")
    command = f"set -o pipefail; '{sys.executable}' '{SCRIPT}' {redirection}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True)
    assert result.returncode == 0 and len(result.stderr.splitlines()) == 1


def test_a_notebook_sees_the_tables_and_keeps_its_own_settings(tmp_path, monkeypatch):
    write(tmp_path, "random")
    output = io.StringIO()  # like a notebook's, it has no method reconfigure
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", ["plot.py", f"--log-dir={tmp_path}", f"--out-dir={tmp_path}"])
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(version_info=(9, 0)))
    monkeypatch.setenv("MPLBACKEND", "module://the_notebooks")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 17)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "| random |" in output.getvalue()
    assert os.environ["MPLBACKEND"] == "module://the_notebooks"
    assert matplotlib.rcParams["font.size"] == 17


def test_what_an_annotator_does_not_know_is_left_out(tmp_path, draw, capsys):
    log = make_log((0.1, 0.2, 0.3), (20.0, 30.0, 40.0)) | {"Recall": {}}
    log["Precision"].pop(2)  # the newest sheet has no answers yet
    write(tmp_path, "random", log, data="my.photos", setting="")
    write(tmp_path, LFOSA, log | {"Acc": {}, "Err": {}}, data="my.photos", setting="")
    figures = draw(tmp_path)
    *_, lfosa, random = capsys.readouterr().out.strip().splitlines()
    assert lfosa == "| LfOSA | 1 | 2 | - | - | 0.100 | 0.075 | - | - |"
    assert random == "| random | 1 | 3 | - | - | 0.100 | 0.075 | 40.00 | 30.00 |"
    assert set(figures) == {"my.photos_resnet18_precision", "my.photos_resnet18_accuracy"}
    assert set(lines_of(figures["my.photos_resnet18_accuracy"].axes[0])) == {"random"}


def test_figures_name_the_batch_only_where_another_would_share_the_name(tmp_path, draw):
    for batch in ("400", "1500"):
        write(tmp_path, "random", setting=f"_known20_init8_batch{batch}")
    write(tmp_path, "random", data="digits")
    names = {name for name in draw(tmp_path) if name.endswith("recall")}
    stems = ("cifar100_{}_batch400", "cifar100_{}_batch1500", "digits_{}")
    assert names == {f"{stem.format('resnet18_init8_known20')}_recall" for stem in stems}


def test_what_the_user_can_mend_is_one_line_and_status_2(tmp_path):
    (tmp_path / "taken").write_text("")
    for words in ((), ("--out-dir", "taken")):
        result = run_plot(*words, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        for part in words or ("log_AL", "--log-dir"):
            assert part in line
        write(tmp_path / "log_AL", "random")


def test_plotting_needs_neither_torch_nor_the_project(tmp_path):
    (tmp_path / "plot.py").write_bytes(SCRIPT.read_bytes())
    code = "import sys, plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
