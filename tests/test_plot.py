"""plot.py: what it reads, refuses, averages, draws and prints. Builds its own logs."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest

import plot

SCRIPT = Path(plot.__file__)
LFOSA = "AV_temperature_unknown_T0.5_known_T0.5_modelB_T1.0"


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


def curves_of(folder, compared=None):
    logs = plot.read_logs([str(folder)])
    theirs = plot.read_logs([str(compared)], "theirs") if compared else {}
    return {curve.label: curve for curve in plot.make_curves(logs | theirs, [])}


@pytest.mark.parametrize("temperature", ["_modelB_T1.0", ""])  # without it as published first
def test_every_part_of_a_name_comes_back(temperature):
    start = "temperature_wide_resnet_my.photos-2_known4_init0.5_batch60_seed3_my_idea"
    end = f"_unknown_T0.5_known_T1e-05{temperature}__max-epoch10_known-CAT,DOG.pkl"
    traits = ("LfOSA script", "known-T1e-05", "max-epoch10", "known-CAT,DOG")
    setting = ("my.photos-2", "4", "0.5", "60", "wide_resnet")
    assert plot.parse_name(start + end) == (*setting, "my_idea", "", traits, 3)
    annotator = plot.parse_name("resnet20_digits_seed1_random.pkl")
    assert annotator == ("digits", "", "", "", "resnet20", "random", "", (), 1)


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
    assert ("in percent" in line) == (log is UNSOUND["accuracy as fraction"])


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


def test_figure_and_table_show_mean_and_sample_deviation_of_the_shared_rounds(tmp_path):
    recalls = [(0.1, 0.2, 0.9), (0.3, 0.6), (0.2, 0.1)]
    for seed, recall in enumerate(recalls):
        write(tmp_path, "random", make_log(recall), seed=seed)
    (curve,) = curves_of(tmp_path).values()
    rounds = list(zip(*recalls, strict=False))  # two, as zip stops at the shortest
    means, stds = ([f(values) for values in rounds] for f in (mean, stdev))
    axes = plot.draw([curve], "recall", "").axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx(means)
    heights = axes.collections[0].get_paths()[0].get_extents()
    assert heights.y1 == pytest.approx(max(m + s for m, s in zip(means, stds, strict=True)))
    over_rounds = [mean(recall[:2]) for recall in recalls]
    final = f"{means[1]:.3f} ± {stds[1]:.3f}"
    over_all = f"{mean(over_rounds):.3f} ± {stdev(over_rounds):.3f}"
    assert f"| random | 3 | 2 | {final} | {over_all} |" in plot.table([curve])[2]


def test_lfosa_is_first_and_in_front_and_no_two_lines_look_the_same(tmp_path):
    methods = [LFOSA, *plot.PAPER[1:], *plot.OTHERS, "my_idea", "other", LFOSA + "__drop-unknown"]
    for method in methods:
        write(tmp_path, method)
    curves = curves_of(tmp_path)
    assert list(curves)[:2] == ["LfOSA", "LfOSA, drop-unknown"]
    lines = plot.draw(list(curves.values()), "recall", "").axes[0].lines
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(lines) == len(methods)
    assert max(lines, key=lambda line: line.get_zorder()).get_label().startswith("LfOSA")


def test_compared_curves_are_dotted_and_say_where_they_come_from(tmp_path):
    write(tmp_path / "ours", LFOSA)
    for method in (LFOSA, "BALD"):
        write(tmp_path / "theirs", method)
    curves = curves_of(tmp_path / "ours", tmp_path / "theirs")
    assert list(curves) == ["LfOSA", "LfOSA (theirs)", "BALD (theirs)"]
    dotted = [label for label, curve in curves.items() if curve.style["linestyle"] == ":"]
    assert dotted == ["LfOSA (theirs)", "BALD (theirs)"]
    assert curves["LfOSA"].style["color"] == curves["LfOSA (theirs)"].style["color"]


def test_the_command_draws_and_prints_whatever_its_surroundings(tmp_path):
    for method in (LFOSA, "random"):
        write(tmp_path / "log_AL", f"{method}__max-epoch10")
        write(tmp_path / "их логи", f"{method}__max-epoch10", make_log(recall=(0.3, 0.4)))
    surroundings = {"MPLBACKEND": "module://not_installed", "PYTHONIOENCODING": "ascii"}
    surroundings = os.environ | surroundings | {"HOME": str(tmp_path)}
    words = ("--out-dir=~/out", "--compare", "~/их логи")
    result = run_plot(*words, cwd=tmp_path, env=surroundings)
    assert (result.returncode, result.stderr) == (0, "")
    heading, _, *rows = result.stdout.strip().splitlines()
    assert "cifar100" in heading and "max-epoch10" in heading
    assert [row.split("|")[1].split()[0] for row in rows[2:]] == ["LfOSA"] * 2 + ["random"] * 2
    names = {path.name for path in (tmp_path / "out" / "cifar").iterdir()}
    assert names == {f"cifar100_resnet18_init8_known20_{measure}.png" for measure in plot.MEASURES}


@pytest.mark.parametrize("redirection", ["| true", ">&-"])
def test_a_reader_that_has_seen_enough_and_a_closed_output_are_no_errors(tmp_path, redirection):
    write(tmp_path / "log_AL", "random")
    command = f"set -o pipefail; '{sys.executable}' '{SCRIPT}' {redirection}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")


def test_what_an_annotator_does_not_know_is_left_out(tmp_path, capsys):
    log = make_log((0.1, 0.2, 0.3), (20.0, 30.0, 40.0)) | {"Recall": {}}
    log["Precision"].pop(2)  # the newest sheet has no answers yet
    write(tmp_path, "random", log, data="my.photos", setting="")
    write(tmp_path, LFOSA, log | {"Acc": {}, "Err": {}}, data="my.photos", setting="")
    plot.main(["--log-dir", str(tmp_path), "--out-dir", str(tmp_path)])
    *_, lfosa, random = capsys.readouterr().out.strip().splitlines()
    assert lfosa == "| LfOSA | 1 | 2 | - | - | 0.100 | 0.075 | - | - |"
    assert random == "| random | 1 | 3 | - | - | 0.100 | 0.075 | 40.00 | 30.00 |"
    names = {path.name for path in (tmp_path / "my.photos").iterdir()}
    assert names == {f"my.photos_resnet18_{measure}.png" for measure in ("precision", "accuracy")}


def test_figures_name_the_batch_only_where_another_would_share_the_name(tmp_path):
    for batch in ("400", "1500"):
        write(tmp_path, "random", setting=f"_known20_init8_batch{batch}")
    write(tmp_path, "random", data="digits")
    plot.main(["--log-dir", str(tmp_path), "--out-dir", str(tmp_path / "out")])
    names = {path.name for path in tmp_path.rglob("*recall.png")}
    stems = ("cifar100_{}_batch400", "cifar100_{}_batch1500", "digits_{}")
    assert names == {f"{stem.format('resnet18_init8_known20')}_recall.png" for stem in stems}


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
