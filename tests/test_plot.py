"""plot.py: what it reads, refuses, averages, draws and prints. Builds its own logs."""

import os
import pickle
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot

SCRIPT = Path(plot.__file__)
LFOSA = "AV_temperature_unknown_T0.5_known_T0.5_modelB_T1.0"
SETTING = "_known20_init8_batch1500"


def log_name(method, seed=1, data="cifar100", model="resnet18", setting=SETTING):
    """The name that the scripts give; `method` is all that follows the seed."""
    script = "temperature_" if "_unknown_T" in method else ""
    return f"{script}{model}_{data}{setting}_seed{seed}_{method}.pkl"


def make_log(recall=(0.1, 0.2), accuracy=(20.0, 30.0)):
    rows = {"Acc": accuracy, "Err": [100 - a for a in accuracy]}
    rows |= {"Precision": [r / 2 for r in recall], "Recall": recall}
    return {key: dict(enumerate(values)) for key, values in rows.items()}


def write(folder, method, log=None, **name):
    path = folder / log_name(method, **name)
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


@pytest.mark.parametrize("data", ["cifar10", "TinyImagenet", "my.photos-2"])
@pytest.mark.parametrize("model", ["resnet18", "wide_resnet"])
@pytest.mark.parametrize("setting", ["_known4_init0.5_batch60", ""])
@pytest.mark.parametrize("temperatures", ["", "_unknown_T0.5_known_T1.0_modelB_T1.0"])
@pytest.mark.parametrize("settings", [(), ("max-epoch10", "known-CAT,DOG", "lr-model1e-05")])
def test_every_part_of_a_name_comes_back(data, model, setting, temperatures, settings):
    method = "my_new_idea" + temperatures + ("__" + "_".join(settings) if settings else "")
    run = plot.parse_name(log_name(method, 3, data, model, setting))
    parts = (run.dataset, run.model, run.seed, run.strategy)
    assert parts == (data, model, 3, "my_new_idea")
    assert (run.known, run.init, run.batch) == (("4", "0.5", "60") if setting else ("", "", ""))
    own = ("LfOSA script", "known-T1.0") if temperatures else ()
    assert run.traits == own + settings


def test_a_name_from_before_modelB_T_is_the_same_run_as_one_with_it():
    old = log_name(LFOSA.replace("_modelB_T1.0", ""))
    assert plot.parse_name(old) == plot.parse_name(log_name(LFOSA))


NOT_LOGS = ["notes.pkl", log_name("random").replace("_seed1", ""), log_name("random") + ".tmp"]
NOT_LOGS += ["temperature_" + log_name("random"), log_name(LFOSA).removeprefix("temperature_")]


@pytest.mark.parametrize("name", NOT_LOGS)
def test_a_name_of_something_else_is_refused(name):
    with pytest.raises(ValueError, match="name"):
        plot.parse_name(name)


class Attack:
    """Unpickles as a call of open(path, "w")."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [0, pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_that_calls_something_is_skipped_and_calls_nothing(tmp_path, capsys, protocol):
    victim = tmp_path / "victim"
    data = pickle.dumps(make_log() | {"more": Attack(victim)}, protocol)
    write(tmp_path, "random", data)
    assert plot.read_logs([str(tmp_path)]) == {}
    assert "open" in capsys.readouterr().err and not victim.exists()
    pickle.loads(data)["more"].close()
    assert victim.exists()  # it was an attack


@pytest.mark.parametrize("protocol", [0, pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.float16])
def test_python_and_numpy_numbers_are_read(tmp_path, kind, protocol):
    log = {key: {np.int64(q): kind(v) for q, v in log.items()} for key, log in make_log().items()}
    write(tmp_path, "random", pickle.dumps(log, protocol))
    (read,) = plot.read_logs([str(tmp_path)]).values()
    assert read == log and type(read["Acc"][0]) is float


SOUND = make_log()
UNSOUND = {
    "empty": b"",
    "truncated": pickle.dumps(SOUND)[:-20],
    "missing measure": pickle.dumps({"Acc": {0: 1.0}}),
    "no rounds": pickle.dumps({key: {} for key in SOUND}),
    "rounds from 1": SOUND | {"Recall": {1: 0.1, 2: 0.2}},
    "different lengths": SOUND | {"Recall": {0: 0.1}},
    "NaN": SOUND | {"Precision": {0: 0.1, 1: float("nan")}},
    "text as number": SOUND | {"Acc": {0: 20.0, 1: "30"}},
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
    assert {run.seed for run in plot.read_logs([str(tmp_path)])} == {1, 2}
    assert capsys.readouterr().err == ""
    other = write(tmp_path / "b", "random", make_log(recall=(0.3, 0.4)), seed=1)
    logs = plot.read_logs([str(tmp_path), str(tmp_path / "nothing")])
    assert {log["Recall"][0] for log in logs.values()} == {0.1}  # the first one read
    contradiction, missing = capsys.readouterr().err.splitlines()
    assert str(other) in contradiction and str(tmp_path / "nothing") in missing


def test_figure_and_table_show_mean_and_sample_deviation_of_the_shared_rounds(tmp_path, capsys):
    recalls = [(0.1, 0.2, 0.9), (0.3, 0.6), (0.2, 0.1)]
    for seed, recall in enumerate(recalls):
        write(tmp_path, "random", make_log(recall, [10.0] * len(recall)), seed=seed)
    (curve,) = curves_of(tmp_path).values()
    rounds = list(zip(*recalls, strict=False))  # two, as zip stops at the shortest
    means, stds = ([f(values) for values in rounds] for f in (statistics.mean, statistics.stdev))
    axes = plot.draw([curve], "recall", "").axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx(means)
    heights = axes.collections[0].get_paths()[0].get_extents()
    assert heights.y1 == pytest.approx(max(m + s for m, s in zip(means, stds, strict=True)))
    over_rounds = [statistics.mean(recall[:2]) for recall in recalls]
    cells = [cell.strip() for cell in plot.table([curve])[2].split("|")]
    assert cells[1:5] == ["random", "3", "2", f"{means[1]:.3f} ± {stds[1]:.3f}"]
    both = statistics.mean(over_rounds), statistics.stdev(over_rounds)
    assert cells[5] == f"{both[0]:.3f} ± {both[1]:.3f}"
    assert cells[8] == "10.00 ± 0.00"
    assert "random" in capsys.readouterr().err  # a seed was cut


def test_lfosa_is_first_and_in_front_and_a_strategy_always_looks_the_same(tmp_path):
    methods = [LFOSA, *plot.PAPER[1:], *plot.OTHERS, "my_idea", LFOSA + "__drop-unknown"]
    for method in methods:
        write(tmp_path / "many", method)
    write(tmp_path / "few", "my_idea")
    many, few = curves_of(tmp_path / "many"), curves_of(tmp_path / "few")
    assert list(many)[:2] == ["LfOSA", "LfOSA, drop-unknown"]
    lines = plot.draw(list(many.values()), "recall", "").axes[0].lines
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(lines) == len(methods)
    for front in (max(lines, key=type(lines[0]).get_zorder), max(lines, key=lambda x: x.get_lw())):
        assert front.get_label().startswith("LfOSA")
    assert few["my_idea"].style == many["my_idea"].style


def test_compared_curves_are_dotted_and_say_where_they_come_from(tmp_path):
    for method in (LFOSA, "random"):
        write(tmp_path / "ours", method)
    write(tmp_path / "theirs", "random")  # equal to ours
    write(tmp_path / "theirs", LFOSA, make_log(recall=(0.3, 0.4)))
    write(tmp_path / "theirs" / "below", "BALD", model="resnet34")
    curves = curves_of(tmp_path / "ours", tmp_path / "theirs")
    assert list(curves) == ["LfOSA", "LfOSA (theirs)", "random", "BALD (theirs, resnet34)"]
    dotted = [label for label, curve in curves.items() if curve.style["linestyle"] == ":"]
    assert dotted == ["LfOSA (theirs)", "BALD (theirs, resnet34)"]
    assert curves["LfOSA"].style["color"] == curves["LfOSA (theirs)"].style["color"]


def test_the_command_draws_and_prints_whatever_its_surroundings(tmp_path):
    for method in (LFOSA, "random"):
        write(tmp_path / "log_AL", f"{method}__max-epoch10")
        write(tmp_path / "их логи", method)
    run_plot("--out-dir", "plain", "--compare", tmp_path / "их логи", cwd=tmp_path)
    (tmp_path / "matplotlibrc").write_text("lines.linestyle: --\nfont.size: 20\n")
    surroundings = {"MPLBACKEND": "module://not_installed", "PYTHONIOENCODING": "ascii"}
    surroundings = os.environ | surroundings | {"HOME": str(tmp_path)}
    words = ("--out-dir=~/out", "--compare", "~/их логи")
    result = run_plot(*words, cwd=tmp_path, env=surroundings)
    assert (result.returncode, result.stderr) == (0, "")
    heading, _, *rows = result.stdout.strip().splitlines()
    assert "CIFAR-100" in heading and "max-epoch10" in heading
    assert [row.split("|")[1].split()[0] for row in rows[2:]] == ["LfOSA"] * 2 + ["random"] * 2
    for measure in ("accuracy", "precision", "recall"):
        figure = f"cifar/cifar100_resnet18_init8_known20_{measure}.png"
        content = (tmp_path / "out" / figure).read_bytes()
        assert content == (tmp_path / "plain" / figure).read_bytes()


def test_a_reader_that_has_seen_enough_and_a_closed_output_are_no_errors(tmp_path):
    write(tmp_path / "log_AL", "random")
    for redirection in ("| true", ">&-"):
        command = f"'{sys.executable}' '{SCRIPT}' {redirection}"
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60}
        result = subprocess.run(["bash", "-o", "pipefail", "-c", command], **options)
        assert (result.returncode, result.stderr) == (0, "")


def test_what_an_annotator_does_not_know_is_left_out(tmp_path, capsys):
    log = make_log((0.1, 0.2, 0.3), (20.0, 30.0, 40.0)) | {"Recall": {}}
    log["Precision"].pop(2)  # the newest sheet has no answers yet
    write(tmp_path, "random", log, data="my.photos", setting="")
    write(tmp_path, LFOSA, log | {"Acc": {}, "Err": {}}, data="my.photos", setting="")
    plot.main(["--log-dir", str(tmp_path), "--out-dir", str(tmp_path)])
    heading, _, columns, _, lfosa, random = capsys.readouterr().out.strip().splitlines()
    assert heading == "## my.photos, resnet18"
    assert "recall" not in columns and "precision" in columns
    assert lfosa == "| LfOSA | 1 | 2 | 0.100 | 0.075 | - | - |"
    assert random == "| random | 1 | 3 | 0.100 | 0.075 | 40.00 | 30.00 |"
    names = {path.name for path in (tmp_path / "my.photos").iterdir()}
    assert names == {f"my.photos_resnet18_{measure}.png" for measure in ("precision", "accuracy")}


def test_figures_name_the_batch_only_where_another_would_share_the_name(tmp_path):
    for batch in ("400", "1500"):
        write(tmp_path, "random", setting=f"_known20_init8_batch{batch}")
    write(tmp_path, "random", data="digits", setting="_known4_init0.5_batch60")
    plot.main(["--log-dir", str(tmp_path), "--out-dir", str(tmp_path / "out")])
    found = {str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*recall.png")}
    stem = "cifar/cifar100_resnet18_init8_known20"
    batches = {f"{stem}_batch400_recall.png", f"{stem}_batch1500_recall.png"}
    assert found == batches | {"digits/digits_resnet18_init0.5_known4_recall.png"}


def test_what_the_user_can_mend_is_one_line_and_status_2(tmp_path):
    result = run_plot(cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert "log_AL" in line and "--log-dir" in line
    write(tmp_path / "log_AL", "random")
    (tmp_path / "taken").write_text("")
    result = run_plot("--out-dir", "taken", cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "taken" in line and "--out-dir" in line


def test_a_failed_write_leaves_the_earlier_figure_and_nothing_else(tmp_path):
    class Broken:
        def savefig(self, path, **_):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    figure = tmp_path / "figure.png"
    figure.write_bytes(b"earlier")
    with pytest.raises(OSError, match="No space"):
        plot.save(Broken(), figure)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]


def test_plotting_needs_neither_torch_nor_the_project(tmp_path):
    (tmp_path / "plot.py").write_bytes(SCRIPT.read_bytes())
    code = "import sys, plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
