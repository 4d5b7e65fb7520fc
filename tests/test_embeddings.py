"""Vectors instead of images: the user's own, and those of an encoder of torchvision's."""

import csv
import io
import pickle
import shutil

import numpy as np
import pytest
import torch
import torchvision
from forks import BASELINE, KILL, LFOSA, assert_ends_well, assert_one_line, at_write, find, read
from PIL import Image
from test_own_images import read as answered
from test_scripts import parse  # noqa: F401
from torch import nn
from trees import class_folders, picture, write_folder

import datasets
import models
import plot
from datasets import digits, embeddings
from datasets.encoder import Encoder
from errors import UserError
from models import vectors

CPU = torch.device("cpu")
OURS = "--use-cpu --no-tensorboard --dataset embeddings --data-dir vectors".split()
SMALL = [*OURS, "--init-percent", "20", "--query-batch", "8", "--max-query", "2"]
ENCODER = "shufflenet_v2_x0_5"  # torchvision's smallest weights
NO_NETWORK = "import os; os.environ['https_proxy'] = 'http://127.0.0.1:9'\n"


def save(folder, dtype=np.float16, count=None):
    """The digits' pixels as a user's vectors, with names of classes; count: of each part."""
    folder.mkdir(parents=True, exist_ok=True)
    raw, names = digits.load(None), np.array([f"digit {label}" for label in range(10)])
    for part, images, labels in (
        ("train", raw.train, raw.train_labels),
        ("test", raw.test, raw.test_labels),
    ):
        vectors = images[:count, ..., 0].reshape(-1, 64).astype(dtype)
        np.save(folder / f"{part}.npy", vectors)
        np.save(folder / f"{part}_labels.npy", names[labels[:count]])
    return folder


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_standardized_by_the_training_columns(dtype):
    rng = np.random.default_rng()
    offset = 1e6 if dtype == np.float64 else 10
    train, test = (rng.normal(offset, 3, (n, 7)).astype(dtype) for n in (400, 90))
    train[:, 3] = 0.1  # constant
    sets = vectors.to_device(train, test, CPU)
    mean, std = train.astype(np.float64).mean(0), train.astype(np.float64).std(0)
    for rows, inputs in zip((train, test), sets, strict=True):
        index = torch.from_numpy(rng.permutation(len(rows))[:50])
        plain = (rows[index].astype(np.float64) - mean) / np.where(std > 1e-9, std, np.inf)
        plain[:, 3] = 0
        batch = inputs.batch(index, inputs.draw(50, torch.Generator()))
        assert batch.dtype == torch.float32 and inputs.rows.dtype == torch.from_numpy(rows).dtype
        np.testing.assert_allclose(batch, plain, rtol=1e-5, atol=1e-5)


def test_integer_labels_of_two_kinds_stay_integers(tmp_path):
    save(tmp_path)
    for part, kind in (("train", np.uint64), ("test", np.int32)):
        file = tmp_path / f"{part}_labels.npy"
        np.save(file, np.array([int(name[-1]) for name in np.load(file)], kind))
    assert embeddings.load(tmp_path).classes == tuple("0123456789")


def test_lfosa_finds_known_classes(forks, tmp_path):
    precision = {}
    save(tmp_path / "vectors")
    settings = ["--max-query", "3", "--max-epoch", "30", "--known-class", "4", "--save-dir"]
    for strategy in ("random", "AV_temperature"):
        folder = f"{strategy}/log_AL"
        words = [*OURS, *settings, folder, "--query-strategy", strategy, "--save-model"]
        assert_ends_well(forks.run(tmp_path, LFOSA, *words))
        log, _ = read(tmp_path / strategy)
        precision[strategy] = np.mean(list(log["Precision"].values()))
        assert log["Acc"][2] > 85  # chance is 25
    # Seeds 1 to 3: 0.91, 0.90, 0.92 against 0.35, 0.41, 0.40.
    assert precision["AV_temperature"] > precision["random"] + 0.3

    # The classifier can be applied with what NAME.model.pt holds.
    saved = torch.load(find(tmp_path / "random", "model.pt"))
    network = models.MLP(64, 4, 0, 0.0)
    network.load_state_dict(saved["classifier"])
    labels = np.load(tmp_path / "vectors/test_labels.npy")
    known = np.isin(labels, saved["classes"][:4])
    rows = torch.from_numpy(np.load(tmp_path / "vectors/test.npy")[known]).float()
    with torch.no_grad():
        found = network.eval()((rows - saved["mean"]) / saved["std"])[1].argmax(1)
    right = np.array(saved["classes"])[found] == labels[known]
    assert 100 * right.mean() == pytest.approx(read(tmp_path / "random")[0]["Acc"][2])


# Together they read all that a strategy can.
RUNS = [(LFOSA, name) for name in ("BADGE", "Coreset", "EAOA", "EOAL")]
RUNS += [(BASELINE, "BALD"), (BASELINE, "OpenMax")]


@pytest.mark.parametrize(("script", "strategy"), RUNS)
def test_every_strategy(forks, tmp_path, script, strategy):
    save(tmp_path / "vectors", count=200)
    more = ["--max-epoch", "2", "--query-strategy", strategy, "--mc-samples", "3"]
    assert_ends_well(forks.run(tmp_path, script, *SMALL, *more))
    assert list(read(tmp_path)[0]["Precision"]) == [0, 1]


def spoil(name, change):
    """A fault: `change` takes the array of file `name` and returns another."""

    def spoiled(folder):
        np.save(folder / name, change(np.load(folder / name)))

    return spoiled


def with_nan(rows):
    rows[17, 5] = np.nan
    return rows


FAULTS = {
    "missing": (lambda folder: (folder / "test.npy").unlink(), ["test.npy"]),
    "length": (spoil("train_labels.npy", lambda x: x[1:]), ["train.npy", "200", "199"]),
    "dimension": (spoil("test.npy", lambda x: x[:, 1:]), ["64", "63"]),
    "NaN": (spoil("train.npy", with_nan), ["train.npy", "17"]),
    "objects": (spoil("train_labels.npy", lambda x: x.astype(object)), ["train_labels.npy"]),
    "integers": (spoil("train.npy", lambda x: x.astype(int)), ["train.npy", "int64"]),
    "shape": (spoil("test.npy", lambda x: x[0]), ["test.npy"]),
    "no array": (lambda folder: (folder / "test.npy").write_bytes(b"PK"), ["test.npy"]),
    "no test": (spoil("test_labels.npy", lambda x: np.full_like(x, "digit 9")), ["digit 0"]),
}


def test_vectors_of_another_machine_are_the_same(tmp_path):
    rows = np.random.default_rng().normal(size=(9, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", rows.astype(">f4"))
    found = embeddings.read_vectors(tmp_path / "x.npy", 9, "y.npy")
    assert found.dtype == np.float32 and np.array_equal(found, rows)


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_are_one_line(forks, tmp_path, fault):
    change, told = FAULTS[fault]
    change(save(tmp_path / "vectors", count=200))
    ran = forks.run(tmp_path, LFOSA, *SMALL)
    assert_one_line(ran, *told)


def test_encoders_are_named(parse):  # noqa: F811
    for name in ("vit_b_16", "resnet50"):
        args = parse(True, "--encoder", name, "--dataset", "cifar100")
        run = plot.parse_name(f"mlp_cifar100_seed1_random{args.settings}.pkl")
        assert (args.model, args.feat_dim, args.query_batch) == ("mlp", 0, 1500)
        assert run.traits == (f"encoder-{name.replace('_', '-')}",)


# ---- a person as the oracle ---------------------------------------------------------------------


def sheet(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def test_a_person_labels_sentences(forks, tmp_path):
    folder, raw = tmp_path / "vectors", digits.load(None)
    folder.mkdir()
    truth = {f"It is, {i}, a {label}.": str(label) for i, label in enumerate(raw.train_labels)}
    names = list(truth)
    texts = [f"text {i}" + " and more" * 20_000 * (i % 9 == 0) for i in range(len(names))]

    def items(count):
        np.save(folder / "embeddings.npy", raw.train[:count, ..., 0].reshape(count, 64) / 255)
        rows = [(name, i, texts[i]) for i, name in enumerate(names[:count])]
        sheet(folder / "items.csv", [("File", "Number", "what it says"), *rows])

    items(300)
    labeled = [(name, truth[name]) for name in names[:60] if truth[name] in "01"]
    sheet(folder / "labels.csv", [("file", "label"), *labeled])
    tests = [(name, truth[name]) for name in names[60:100]]
    sheet(folder / "test.csv", [("file", "label"), *((x, y) for x, y in tests if y in "01")])
    words = [*OURS, "--max-epoch", "20", "--query-batch", "30"]
    assert forks.run(tmp_path, LFOSA, *words).returncode == 0
    rows = answered(folder / "query_1.csv")
    assert len(rows) == 30
    for row in rows:
        i = names.index(row["file"])
        assert (row["Number"], row["what it says"]) == (str(i), texts[i])
        assert row["predicted"] in "01" and not row["label"]
    known = np.mean([truth[row["file"]] in "01" for row in rows])
    assert known > 0.7  # of the pool 0.2 are
    answers = [(row["file"], truth[row["file"]]) for row in rows]
    answers = [(name, label if label in "01" else "unknown") for name, label in answers]
    sheet(folder / "query_1.csv", [("file", "label"), *answers])
    items(400)  # some came later
    assert forks.run(tmp_path, LFOSA, *words).returncode == 0
    again = [row["file"] for row in answered(folder / "query_2.csv")]
    assert not {*again} & {name for name, _ in [*answers, *labeled]}
    assert any(names.index(name) >= 300 for name in again)
    [log] = tmp_path.glob("log_AL/*.pkl")
    assert pickle.loads(log.read_bytes())["Precision"] == {0: pytest.approx(known)}


def test_new_embeddings_begin_an_open_round_again_and_keep_the_answers(forks, tmp_path):
    """As in a twin of the folder in which the round was never begun with the old ones."""
    begun, waiting = tmp_path / "begun", tmp_path / "waiting"
    folder, raw = begun / "vectors", digits.load(None)
    folder.mkdir(parents=True)
    rows, labels = raw.train[:60, ..., 0].reshape(60, 64) / 255, raw.train_labels[:30]
    np.save(folder / "embeddings.npy", rows)
    sheet(folder / "items.csv", [("file",), *((i,) for i in range(60))])
    known = [(i, label) for i, label in enumerate(labels) if label < 2]
    sheet(folder / "labels.csv", [("file", "label"), *known])
    command = [LFOSA, *OURS, *"--max-epoch 2 --query-batch 4 --checkpoint-seconds 0".split()]
    assert forks.run(begun, *command).returncode == 0
    asked_first = [(row["file"], "unknown") for row in answered(folder / "query_1.csv")]
    sheet(folder / "query_1.csv", [("file", "label"), *asked_first])
    shutil.copytree(begun, waiting)
    assert forks.run(begun, *command, before=at_write(".pt", 3, KILL)).returncode == -9
    for home in (begun, waiting):
        np.save(home / "vectors/embeddings.npy", rows**2)
        assert forks.run(home, *command).returncode == 0
    for name in ("query_1.csv", "query_2.csv"):
        assert (folder / name).read_bytes() == (waiting / "vectors" / name).read_bytes()
    assert len(answered(folder / "query_2.csv")) == 4
    assert [(row["file"], row["label"]) for row in answered(folder / "query_1.csv")] == asked_first


BAD_ITEMS = {
    "file,text\na,1\nb,2\n": ["items.csv", "2", "embeddings.npy", "3"],
    "file\na\nb\na\n": ["items.csv", "row 4", "row 2"],
    "file,x\na,1\n\n,\na,2\n": ["items.csv", "row 5", "row 2"],
    "file,x,x\na,1,2\n": ["items.csv", "'x'"],
    "name\na\nb\nc\n": ["items.csv", "file"],
    "file,label\na,1\nb,2\nc,3\n": ["items.csv", "label"],
    "file,text\na,1\nb,no, not at all\nc,3\n": ["items.csv", "row 3"],
    "file,text,\na,1,\nb,2,nameless\nc,3,\n": ["items.csv", "row 3"],
}


def test_items_in_another_encoding_need_its_name(tmp_path):
    (tmp_path / "items.csv").write_bytes("file,text\na,狗的故事\nb,x\n".encode("gbk"))
    with pytest.raises(UserError, match="--sheet-encoding"):
        embeddings.items(tmp_path)
    assert embeddings.items(tmp_path, "gbk").columns == {"text": ["狗的故事", "x"]}


def test_columns_without_name_and_content_are_left_out(tmp_path):
    (tmp_path / "items.csv").write_text("file,text,,\na,1,,\nb,2,,\n")
    assert embeddings.items(tmp_path).columns == {"text": ["1", "2"]}


@pytest.mark.parametrize("content", BAD_ITEMS)
def test_bad_items_are_one_line(forks, tmp_path, content):
    folder = tmp_path / "vectors"
    folder.mkdir()
    np.save(folder / "embeddings.npy", np.eye(3))
    (folder / "items.csv").write_text(content)
    sheet(folder / "labels.csv", [("file", "label"), ("a", "yes")])
    assert_one_line(forks.run(tmp_path, LFOSA, *OURS), *BAD_ITEMS[content])


# ---- encoders -----------------------------------------------------------------------------------


def random_weights(home, seed=0):
    """Write random weights, in the file that torchvision would download; return the network."""
    weights = torchvision.models.get_model_weights(ENCODER).DEFAULT
    file = home / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = torchvision.models.get_model(ENCODER)
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.running_var, 0.5, 1.5)
                nn.init.normal_(part.running_mean)
    torch.save(network.state_dict(), file)
    return network.eval(), weights.transforms(), file


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """What torchvision makes of a PIL image, in a home with such weights: (1024,)."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    network, transforms, _ = random_weights(tmp_path / "torch")
    network.fc = nn.Identity()

    @torch.no_grad()
    def features(image):
        return network(transforms(image)[None])[0].numpy()

    return features


def close(found, expected):
    expected = np.stack(expected)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_images_of_a_data_set_become_features(tmp_path, plain):
    images = np.random.default_rng().integers(256, size=(40, 3, 32, 32), dtype=np.uint8)
    images = images.transpose(0, 2, 3, 1)  # a view, as torchvision's CIFAR is
    encoder = Encoder(ENCODER, CPU, tmp_path, cropped=False)
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2)
    close(encoder.encode(images), [plain(image) for image in tensors])


def test_a_folder_becomes_features_once(tmp_path, plain, capsys, monkeypatch):
    rng, files = np.random.default_rng(), class_folders("cat", "dog")
    files["train/cat/0.png"] = picture(rng, (300, 400), kind="PNG")  # larger than the input
    folder = write_folder(tmp_path / "pictures", files)
    train = sorted(name for name in files if name.startswith("train"))

    def expected():
        return [plain(Image.open(io.BytesIO(files[name])).convert("RGB")) for name in train]

    def encoded():
        return datasets.create("folder", folder, CPU, encoder=ENCODER).train.rows

    first = encoded()
    close(first, expected())
    _, _, weights = random_weights(tmp_path / "torch", seed=1)
    assert encoded().equal(first)  # the file is read, whatever the weights are now
    random_weights(tmp_path / "torch")
    files["train/dog/2.png"] = picture(rng, (16, 12), kind="PNG")
    write_folder(folder, files)
    close(encoded(), expected())

    for file in folder.glob(f".lfosa-{ENCODER}*"):
        file.unlink()

    def full(path, write):
        raise UserError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("datasets.encoder.write_whole", full)
    close(encoded(), expected())
    assert "stay in memory" in capsys.readouterr().out
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=weights.name):
        encoded()


def test_no_network_and_no_weights(forks, tmp_path):
    home = f"os.environ['TORCH_HOME'] = {str(tmp_path)!r}"
    weights = torchvision.models.get_model_weights(ENCODER).DEFAULT
    ran = forks.run(tmp_path, LFOSA, "--encoder", ENCODER, before=NO_NETWORK + home)
    name = weights.url.rpartition("/")[2]
    assert_one_line(ran, name, str(tmp_path / "hub" / "checkpoints"), weights.url)


OTHER_NAME = f"""
import torchvision
torchvision.models.get_model_weights("{ENCODER}").DEFAULT._name_ = "IMAGENET1K_V9"
"""


def test_a_run_never_mixes_the_embeddings_of_two_weights(forks, tmp_path):
    """Resumed after the weights' file was replaced it reads the embeddings that are there; without
    these, or with weights of another name, it is refused."""
    write_folder(tmp_path / "pictures", class_folders(*"abcd"))
    home = f"import os; os.environ['TORCH_HOME'] = {str(tmp_path)!r}\n"
    words = "--use-cpu --no-tensorboard --dataset folder --data-dir pictures --max-epoch 2".split()
    words += ["--init-percent", "40", "--query-batch", "3", "--encoder", ENCODER, "--save-dir"]

    def run(name, rounds, before=home):
        more = [tmp_path / name / "log_AL", "--max-query", rounds, "--resume"]
        return forks.run(tmp_path, LFOSA, *words, *more, before=before)

    random_weights(tmp_path)
    for name, rounds in (("whole", 3), ("resumed", 2)):
        assert run(name, rounds).returncode == 0
    random_weights(tmp_path, seed=1)
    begun = read(tmp_path / "resumed")
    assert_one_line(run("resumed", 3, home + OTHER_NAME), "weights", "IMAGENET1K_V9")
    assert read(tmp_path / "resumed") == begun
    assert run("resumed", 3).returncode == 0
    assert read(tmp_path / "resumed") == read(tmp_path / "whole")
    for file in (tmp_path / "pictures").glob(".lfosa-*.npy"):
        file.unlink()
    assert_one_line(run("resumed", 4), ".pt")


def test_a_person_labels_encoded_images(forks, tmp_path):
    files = class_folders("cat", "dog", "cow")
    folder = write_folder(tmp_path / "pictures", files)
    rows = [(name, name.split("/")[1]) for name in files if "/1.png" in name and "cow" not in name]
    sheet(folder / "labels.csv", [("file", "label"), *rows])
    home = f"import os; os.environ['TORCH_HOME'] = {str(tmp_path)!r}"
    random_weights(tmp_path)
    words = ["--use-cpu", "--dataset", "folder", "--data-dir", "pictures", "--encoder", ENCODER]
    words += ["--query-batch", "5", "--max-epoch", "3", "--save-model"]
    ran = forks.run(tmp_path, LFOSA, *words, before=home)
    assert ran.returncode == 0, ran
    assert len(answered(folder / "query_1.csv")) == 5
    saved = torch.load(find(tmp_path, "model.pt"))
    assert saved["encoder"] == ENCODER and saved["weights"] == "IMAGENET1K_V1"
    assert saved["mean"].shape == saved["std"].shape == (1024,)
