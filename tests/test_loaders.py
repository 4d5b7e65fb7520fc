"""The loaders against small data sets of the real layout, whole and broken. No network."""

import errno
import hashlib
import io
import os
import pickle
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import trees
from PIL import Image, ImageOps
from trees import ROOT, write_folder, write_zip

import datasets
from datasets import cifar, digits, folder, tiny_imagenet
from datasets.files import UserError, one_at_a_time

# Files left open are told when they are collected.
pytestmark = [
    pytest.mark.filterwarnings("error::ResourceWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The same whether or not there is a network."""

    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no\nnetwork")  # two lines, of which the error makes one

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def md5(content):
    return hashlib.md5(content).hexdigest()


def create(name, folder, **options):
    return datasets.create(name, str(folder), torch.device("cpu"), **options)


def check_fails(name, folder, *parts, **options):
    """Creating the data set tells these parts in one line, and changes nothing in its folder."""
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        create(name, folder, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert str(part) in message
    assert contents(folder) == before


def contents(folder):
    """All files below a folder but the locks, which stay."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.read_bytes() for path in paths}


def check_arrays(raw, expected):
    for array, like, dtype in zip(raw[:4], expected, [np.uint8, np.int64] * 2, strict=True):
        assert isinstance(array, np.ndarray)
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, like)


def test_one_at_a_time(tmp_path):
    inside = []

    def enter(number):
        with one_at_a_time(tmp_path / "new" / ".lock"):
            inside.append(number)
            time.sleep(0.001)
            assert inside == [number]
            inside.clear()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(enter, range(100)))


# Every data set


class Mine:
    """Unpickling it leaves a trace."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "TinyImagenet"])
def test_nothing_there(tmp_path, name):
    check_fails(name, tmp_path, tmp_path, "is missing", "http", "MD5", "no network")


@pytest.mark.parametrize("name", ["cifar10", "TinyImagenet"])
def test_data_dir_that_can_be_no_folder(tmp_path, name):
    (tmp_path / "file").touch()
    for place, fault in (("file", "Not a directory"), ("x" * 300, "File name too long")):
        with pytest.raises(UserError, match=f"{fault}.*{place}|{place}.*{fault}"):
            create(name, tmp_path / place)


def test_home_is_looked_up_only_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as if there were none
    assert create("digits", "~/data").num_known == 4
    with pytest.raises(UserError, match="--data-dir ~/data"):
        create("cifar10", "~/data")
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "data", trees.tiny_imagenet())
    assert create("TinyImagenet", "~/data", known_class=1).train.count == 33


# CIFAR


@pytest.fixture(params=["cifar10", "cifar100"])
def small_cifar(request, tmp_path, monkeypatch):
    """Name, torchvision class, folder of the batches and arrays of a small CIFAR in tmp_path."""
    name = request.param
    source = getattr(torchvision.datasets, name.upper())
    classes, key = (10, "labels") if name == "cifar10" else (100, "fine_labels")
    rng = np.random.default_rng(0)
    folder = tmp_path / source.base_folder
    folder.mkdir()
    arrays = []
    for kind in ("train_list", "test_list"):
        images, labels, files = [], [], []
        for file, _ in getattr(source, kind):
            data = rng.integers(256, size=(4, 3 * 32 * 32), dtype=np.uint8)
            ids = rng.integers(classes, size=4).tolist()
            batch = {"data": data, key: ids, "coarse_labels": [0] * 4}
            (folder / file).write_bytes(pickle.dumps(batch))
            files.append([file, md5((folder / file).read_bytes())])
            images += [image.reshape(3, 32, 32).transpose(1, 2, 0) for image in data]
            labels += ids
        arrays += [np.stack(images), np.array(labels)]
        monkeypatch.setattr(source, kind, files)
    meta = pickle.dumps({source.meta["key"]: [f"class {number}" for number in range(classes)]})
    (folder / source.meta["filename"]).write_bytes(meta)
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5(meta)})
    return name, source, folder, arrays


def make_tar(source, folder):
    archive = folder.parent / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, source.base_folder)
    return archive


@pytest.mark.parametrize("where", ["below", "itself", "archive of another MD5"])
def test_cifar(small_cifar, tmp_path, where, capfd):
    name, source, folder, arrays = small_cifar
    if "archive" in where:
        make_tar(source, folder)
        shutil.rmtree(folder)
    raw = cifar.load(folder if where == "itself" else tmp_path, name)
    check_arrays(raw, arrays)
    assert raw.classes[9] == "class 9"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("which", ["train", "test", "meta"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "tampered"])
def test_cifar_damaged_folder(small_cifar, tmp_path, capfd, which, damage):
    """It is told; an archive beside it is used."""
    name, source, folder, arrays = small_cifar
    archive = make_tar(source, folder)
    lists = {"train": source.train_list, "test": source.test_list}
    file = folder / (source.meta["filename"] if which == "meta" else lists[which][-1][0])
    content = file.read_bytes()[:-1] if damage == "truncated" else pickle.dumps(Mine(folder / "x"))
    file.write_bytes(content)
    parts = [md5(content), md5(file.read_bytes())]
    if damage == "missing":
        file.unlink()
        parts = ["is missing"] if any(folder.iterdir()) else []
    check_arrays(cifar.load(tmp_path, name), arrays)
    assert file.name in capfd.readouterr().err
    archive.unlink()
    check_fails(name, tmp_path, folder, file.name, *parts, source.url, source.tgz_md5)
    assert not (folder / "x").exists()


@pytest.mark.parametrize("damage", ["truncated", "no archive", "tampered"])
def test_cifar_damaged_archive(small_cifar, tmp_path, damage):
    name, source, folder, _ = small_cifar
    if damage == "tampered":
        tampered = pickle.dumps(Mine(tmp_path / "trace"))
        (folder / source.test_list[0][0]).write_bytes(tampered)
    archive = make_tar(source, folder)
    shutil.rmtree(folder)
    if damage != "tampered":
        content = archive.read_bytes()[:2000] if damage == "truncated" else b"no archive"
        archive.write_bytes(content)
    check_fails(name, tmp_path, archive, md5(archive.read_bytes()), source.url, source.tgz_md5)
    assert not (tmp_path / "trace").exists()


# Tiny ImageNet

ANNOTATIONS = f"{ROOT}/val/val_annotations.txt"


def expected(files):
    """Arrays of the original layout as a plain loop over it makes them."""
    names = {name.removeprefix(f"{ROOT}/"): name for name in files}
    lines = files[ANNOTATIONS].decode().splitlines()
    label_of = dict(line.split("\t")[:2] for line in lines)
    wnids = sorted({name.split("/")[1] for name in names if name.startswith("train/")})
    train, train_labels, test, test_labels = [], [], [], []
    for label, wnid in enumerate(wnids):
        for number in range(1000):
            if name := names.get(f"train/{wnid}/images/{wnid}_{number}.JPEG"):
                train.append(np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")))
                train_labels.append(label)
    for number in range(1000):
        if name := names.get(f"val/images/val_{number}.JPEG"):
            test.append(np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")))
            test_labels.append(wnids.index(label_of[f"val_{number}.JPEG"]))
    return np.stack(train), np.array(train_labels), np.stack(test), np.array(test_labels)


def sorted_val(files, inner="images/", keep=False):
    """The validation images in class folders, as popular scripts leave them."""
    label_of = dict(line.split("\t")[:2] for line in files[ANNOTATIONS].decode().splitlines())
    changed = dict(files)
    for name in files:
        if "/val/images/" in name:
            image = name.rsplit("/", 1)[1]
            changed[f"{ROOT}/val/{label_of[image]}/{inner}{image}"] = files[name]
            if not keep:
                del changed[name]
    return changed


def without(files, *names):
    return {name: content for name, content in files.items() if name not in names}


def flat(files):
    return {re.sub(r"(train/\w+/)images/", r"\1", name): files[name] for name in files}


def littered(files):
    """With the files that systems, notebooks and archivers leave."""
    image = next(name for name in files if "/train/" in name and name.endswith(".JPEG"))
    more = {f"{ROOT}/train/Thumbs.db": b"", f"{ROOT}/train/.DS_Store": b""}
    for part in (".ipynb_checkpoints", "__MACOSX", image.split("/")[2]):
        more[f"{ROOT}/train/{part}/images/._x_0.JPEG"] = b"no image"
    more[f"{ROOT}/train/.ipynb_checkpoints/images/n_0.JPEG"] = files[image]
    more[f"{ROOT}/val/images/.ipynb_checkpoints/val_0.JPEG"] = files[image]
    more[f"__MACOSX/{image}"] = b"no image"
    return files | more


FORMS = {
    "original": lambda files: files,
    "val in class folders": lambda files: without(sorted_val(files), ANNOTATIONS),
    "without images/": lambda files: without(flat(sorted_val(files, inner="")), ANNOTATIONS),
    "val sorted, annotations kept": sorted_val,
    "val copied": lambda files: sorted_val(files, keep=True),
    "littered": littered,
}


@pytest.mark.parametrize("place", ["folder", "itself", "zip", "zip without top folder"])
@pytest.mark.parametrize("form", FORMS)
def test_tiny_imagenet_forms(tmp_path, form, place):
    files = trees.tiny_imagenet()
    changed = FORMS[form](files)
    if place in ("folder", "itself"):
        write_folder(tmp_path, changed)
    else:
        if "without" in place:
            changed = {name.removeprefix(f"{ROOT}/"): changed[name] for name in changed}
        write_zip(tmp_path / f"{ROOT}.zip", changed)
    raw = tiny_imagenet.load(tmp_path / ROOT if place == "itself" else tmp_path)
    check_arrays(raw, expected(files))
    assert raw.classes == ("n00000000", "n00000010", "n00000020")


def test_tiny_imagenet_cache_is_enough(tmp_path, monkeypatch, capfd):
    files = trees.tiny_imagenet()
    archive = write_zip(tmp_path / f"{ROOT}.zip", files)
    monkeypatch.setattr(tiny_imagenet, "MD5", md5(archive.read_bytes()))
    tiny_imagenet.load(tmp_path)
    assert set(contents(tmp_path)) == {archive, tmp_path / f"{ROOT}.npy"}  # nothing extracted
    monkeypatch.setattr(tiny_imagenet.images, "decode", None)
    for _ in range(2):
        raw = tiny_imagenet.load(tmp_path)
        check_arrays(raw, expected(files))
        assert isinstance(raw.train, np.memmap)
        archive.unlink(missing_ok=True)
    assert capfd.readouterr() == ("", "")  # and no bar where there is no terminal


def test_tiny_imagenet_download(tmp_path, monkeypatch):
    files = trees.tiny_imagenet()
    published = write_zip(tmp_path / "published.zip", files)

    def download_url(url, root, filename, md5):
        assert (url, md5) == (tiny_imagenet.URL, tiny_imagenet.MD5)
        shutil.copy(published, os.path.join(root, filename))

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download_url)
    check_arrays(tiny_imagenet.load(tmp_path / "new"), expected(files))


def test_tiny_imagenet_archive_of_another_md5(tmp_path, capfd):
    """It is read if it is sound; else both MD5s are told, and nobody touches the file."""
    files = trees.tiny_imagenet()
    archive = write_zip(tmp_path / f"{ROOT}.zip", files)
    check_arrays(tiny_imagenet.load(tmp_path), expected(files))
    told = capfd.readouterr().err
    assert md5(archive.read_bytes()) in told and tiny_imagenet.MD5 in told
    (tmp_path / f"{ROOT}.npy").unlink()
    whole = archive.read_bytes()
    at = whole.index(files[f"{ROOT}/val/images/val_3.JPEG"]) + 1000
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for damaged in (whole[:-100], b"no archive", b"", flipped):
        archive.write_bytes(damaged)
        check_fails("TinyImagenet", tmp_path, archive, md5(damaged), tiny_imagenet.MD5)
    write_folder(tmp_path, files)  # a folder beside it is used
    check_arrays(tiny_imagenet.load(tmp_path), expected(files))


IMAGE = f"{ROOT}/train/n00000010/images/n00000010_"
CHANGES = {
    "one more": lambda files: files | {f"{IMAGE}11.JPEG": files[f"{IMAGE}4.JPEG"]},
    "one less": lambda files: without(files, f"{IMAGE}4.JPEG"),
    "renamed": lambda files: (
        without(files, f"{IMAGE}4.JPEG") | {f"{IMAGE}99.JPEG": files[f"{IMAGE}4.JPEG"]}
    ),
    "replaced": lambda files: (
        files | {f"{IMAGE}4.JPEG": trees.picture(np.random.default_rng(9), quality=30)}
    ),
    "other labels": lambda files: (
        files
        | {
            ANNOTATIONS: files[ANNOTATIONS].replace(
                b"val_3.JPEG\tn00000000", b"val_3.JPEG\tn00000010"
            )
        }
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", ["folder", "zip"])
def test_tiny_imagenet_files_changed_after_decoding(tmp_path, change, place, capfd):
    files = trees.tiny_imagenet()
    changed = CHANGES[change](files)
    for content in (files, changed):
        if place == "folder":
            shutil.rmtree(tmp_path / ROOT, ignore_errors=True)
            write_folder(tmp_path, content)
        else:
            write_zip(tmp_path / f"{ROOT}.zip", content)
        check_arrays(tiny_imagenet.load(tmp_path), expected(content))
    assert "other files" in capfd.readouterr().err


@pytest.mark.parametrize("fault", [errno.EROFS, errno.ENOSPC])
def test_tiny_imagenet_without_room_for_the_cache(tmp_path, monkeypatch, capfd, fault):
    files = trees.tiny_imagenet()
    write_folder(tmp_path, files)

    def fsync(descriptor):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "fsync", fsync)
    before = contents(tmp_path)
    check_arrays(tiny_imagenet.load(tmp_path), expected(files))
    assert os.strerror(fault) in capfd.readouterr().err
    assert contents(tmp_path) == before


def test_tiny_imagenet_crash_while_decoding(tmp_path, monkeypatch):
    write_folder(tmp_path, files := trees.tiny_imagenet())

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            tiny_imagenet.load(tmp_path)
    check_arrays(tiny_imagenet.load(tmp_path), expected(files))


def test_tiny_imagenet_cache_that_is_not_whole(tmp_path):
    """Cut anywhere, or as the first version of this project wrote it: made anew from the source."""
    write_folder(tmp_path, files := trees.tiny_imagenet())
    tiny_imagenet.load(tmp_path)
    cache = tmp_path / f"{ROOT}.npy"
    whole = cache.read_bytes()
    (tmp_path / ROOT).rename(tmp_path / "elsewhere")
    for end in [*range(0, 140, 20), len(whole) // 2, *range(len(whole) - 2000, len(whole), 97)]:
        cache.write_bytes(whole[:end])
        check_fails("TinyImagenet", tmp_path, cache, "not whole", tiny_imagenet.URL)
    (tmp_path / "elsewhere").rename(tmp_path / ROOT)
    with open(cache, "wb") as file:
        for array in expected(files):
            np.save(file, array)
    check_arrays(tiny_imagenet.load(tmp_path), expected(files))
    assert cache.read_bytes() == whole


RNG = np.random.default_rng(1)
BROKEN = {  # a change of the files (None: absent), and what the message names
    "no image": ({f"{IMAGE}4.JPEG": b"no image"}, ["n00000010_4.JPEG (cannot identify"]),
    "truncated image": ({f"{IMAGE}4.JPEG": trees.picture(RNG)[:-2000]}, ["n00000010_4.JPEG"]),
    "two broken images": (
        {f"{IMAGE}4.JPEG": b"", f"{ROOT}/val/images/val_2.JPEG": b""},
        ["2 of 45", "n00000010_4.JPEG", "val_2.JPEG"],
    ),
    "wrong size": ({f"{IMAGE}4.JPEG": trees.picture(RNG, (64, 65))}, ["4.JPEG", "64x65"]),
    "no annotations": ({ANNOTATIONS: None}, ["val_0.JPEG", "val/CLASS/"]),
    "annotations unreadable": ({ANNOTATIONS: b"\xff"}, ["decode"]),
    "annotation missing": ({ANNOTATIONS: b"val_0.JPEG\tn00000000\n"}, ["val_1.JPEG"]),
    "unknown class": (
        {ANNOTATIONS: b"".join(b"val_%d.JPEG\tn77\t0\n" % i for i in range(12))},
        ["val_0.JPEG", "n77"],
    ),
    "test image missing": ({f"{ROOT}/val/images/val_2.JPEG": None}, ["val_2.JPEG"]),
    "no test images": (
        dict.fromkeys([f"{ROOT}/val/images/val_{i}.JPEG" for i in range(12)]),
        ["33 training and 0 validation images"],
    ),
    "no training images": (
        {name: None for name in trees.tiny_imagenet() if "/train/" in name},
        ["0 training", "train/CLASS/"],
    ),
}


@pytest.mark.parametrize("change, parts", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("place", ["folder", "zip"])
def test_tiny_imagenet_broken(tmp_path, change, parts, place):
    changed = (trees.tiny_imagenet() | change).items()
    files = {name: content for name, content in changed if content is not None}
    if place == "folder":
        (tmp_path / ROOT / "train").mkdir(parents=True)
        write_folder(tmp_path, files)
    else:
        write_zip(tmp_path / f"{ROOT}.zip", files)
    check_fails("TinyImagenet", tmp_path, tmp_path, *parts, tiny_imagenet.MD5)


def test_no_rights_is_told_as_that(tmp_path, monkeypatch):
    write_folder(tmp_path, trees.tiny_imagenet())

    def read_bytes(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(UserError, match="Permission denied"):
        create("TinyImagenet", tmp_path)


# A folder of the user's images


def twin(content, size):
    """Upright, in RGB, shorter side resized, centre cropped; by hand."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    image = image.resize((size, longer) if width < height else (longer, size), Image.BILINEAR)
    at = round((longer - size) / 2)
    left, top = (0, at) if width < height else (at, 0)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def odd_pictures():
    """Files of many kinds by name."""
    rng, turned = np.random.default_rng(2), Image.Exif()
    turned[0x112] = 6  # a quarter
    palette = Image.fromarray(rng.integers(256, size=(40, 30, 3), dtype=np.uint8)).quantize(16)
    palette.save(file := io.BytesIO(), "GIF")
    return {
        "train/ant/deep/er/turned.JPG": trees.picture(rng, (50, 20), exif=turned),
        "train/ant/grey.png": trees.picture(rng, (20, 31), "L", "PNG"),
        "train/bee/a.webp": trees.picture(rng, (9, 40), kind="WEBP"),
        "train/bee/b.tiff": trees.picture(rng, (8, 8), kind="TIFF"),
        "train/cat, wild/palette.gif": file.getvalue(),
    }


@pytest.mark.parametrize("part", ["test", "val"])
def test_folder(tmp_path, part, capfd):
    files = odd_pictures()
    files |= {name.replace("train", part): content for name, content in files.items()}
    others = ["train/notes.txt", "train/bee/labels.csv", ".hidden/x.png", "train/bee/._a.webp"]
    write_folder(tmp_path / "linked", {n: files[n] for n in files if n.startswith("train/bee")})
    write_folder(tmp_path / "data", without(files, "train/bee/a.webp", "train/bee/b.tiff"))
    write_folder(tmp_path / "data", dict.fromkeys(others, b"no image"))
    (tmp_path / "data" / "train" / "bee2").symlink_to(tmp_path / "linked" / "train" / "bee")
    shutil.rmtree(tmp_path / "data" / "train" / "bee")
    (tmp_path / "data" / "train" / "bee2").rename(tmp_path / "data" / "train" / "bee")
    raw = folder.load(tmp_path / "data", size=16)
    train = [twin(files[name], 16) for name in sorted(files) if name.startswith("train/")]
    test = [twin(files[name], 16) for name in sorted(files) if name.startswith(f"{part}/")]
    labels = [0, 0, 1, 1, 2]
    check_arrays(raw, [np.stack(train), labels, np.stack(test), labels])
    assert raw.classes == ("ant", "bee", "cat, wild")
    assert "1 files" in capfd.readouterr().err
    again = folder.load(tmp_path / "data", size=16)
    check_arrays(again, raw[:4])
    assert isinstance(again.train, np.memmap)
    assert folder.load(tmp_path / "data", size=8).train.shape == (5, 8, 8, 3)


def test_folder_with_broken_images(tmp_path):
    """They are refused by name; whoever wants the others gets them."""
    broken = {f"train/ant/x{number}.png": b"no image" for number in range(12)}
    files = trees.class_folders()
    write_folder(tmp_path, files | broken)
    check_fails("folder", tmp_path, "12 of 36", *sorted(broken)[:10])
    found = folder.list_images(tmp_path)
    assert list(found) == sorted(files | broken)
    for _ in range(2):
        decoded = folder.read(tmp_path, found, 16, leave_out=True)
        assert decoded.broken.keys() == broken.keys()
        np.testing.assert_array_equal(decoded.pixels, [twin(files[n], 16) for n in sorted(files)])


@pytest.mark.parametrize("name, logged", {"a_b c": "a-b-c", "my.cats-2": "my.cats-2"}.items())
def test_folder_name_in_a_log(tmp_path, monkeypatch, name, logged):
    write_folder(tmp_path / name, trees.class_folders())
    monkeypatch.chdir(tmp_path / name)
    assert create("folder", ".").name == create("folder", f"{tmp_path / name}/").name == logged


def test_folder_identity(tmp_path):
    """Other images, names, labels or known classes: another identity; another place: the same."""
    files = trees.class_folders()
    other = dict(zip(files, reversed(files.values()), strict=True))
    moved = {name.replace("train/ant/4", "train/bee/9"): files[name] for name in files}
    identities = [
        create("folder", write_folder(tmp_path / str(place) / "pets", content)).identity
        for place, content in enumerate((files, files, other, moved))
    ]
    identities.append(create("folder", tmp_path / "0" / "pets", known=["bee"]).identity)
    assert identities[0] == identities[1]
    assert len(set(identities)) == 4


# What a run needs


def test_known_classes(tmp_path):
    write_folder(tmp_path, trees.class_folders(("ant", "bee", "cat", "dog", "eel"), train=2))
    for options, classes, num_known in (
        ({}, "ant bee cat dog eel", 2),
        ({"known": ["dog", "bee"]}, "bee dog ant cat eel", 2),
        ({"known_class": 3, "class_seed": 1}, None, 3),
    ):
        data = create("folder", tmp_path, **options)
        if classes is None:
            order = np.random.default_rng(1).permutation(5)
            classes = " ".join(np.array("ant bee cat dog eel".split())[order])
        assert data.classes == tuple(classes.split())
        assert data.num_known == num_known
        expected = [data.classes.index(name) for name in sorted(classes.split()) for _ in range(2)]
        assert data.targets.tolist() == [min(label, num_known) for label in expected]
        assert data.known.tolist() == [label < num_known for label in expected]
        assert data.test.count == len(data.test_targets) == 3 * num_known
        assert data.train.padding == 8 and data.train.height == 64


ONE = trees.class_folders(("ant",))
TWO = trees.class_folders(("ant", "bee"))
NEEDS = {
    "more known than there are": (
        "TinyImagenet",
        {"known_class": 20},
        trees.tiny_imagenet(10),
        ["10 classes"],
    ),
    "nothing unknown": (
        "TinyImagenet",
        {"known_class": 3},
        trees.tiny_imagenet(),
        ["choose 1 to 2"],
    ),
    "no test image of a known class": (
        "TinyImagenet",
        {"known_class": 3},
        trees.tiny_imagenet(4, val=2),
        ["test", "n00000020"],
    ),
    "one class": ("folder", {}, ONE, ["1 classes"]),
    "no training image of a known class": (
        "folder",
        {"known": ["cat"]},
        TWO | {"test/cat/0.png": ONE["test/ant/0.png"]},
        ["training", "cat"],
    ),
    "no unknown training image": (
        "folder",
        {"known_class": 1},
        ONE | {"test/bee/0.png": ONE["test/ant/0.png"]},
        ["unknown"],
    ),
    "no such class": ("folder", {"known": ["bees"]}, TWO, ["bees", "bee?"]),
    "all known by name": ("folder", {"known": ["bee", "ant"]}, TWO, ["2 classes"]),
    "no train/": ("folder", {}, {"ant/0.png": ONE["test/ant/0.png"]}, ["train/CLASS/"]),
    "nothing": ("folder", {}, {}, ["train/CLASS/"]),
}


@pytest.mark.parametrize("name, options, files, parts", NEEDS.values(), ids=NEEDS)
def test_what_a_run_needs(tmp_path, name, options, files, parts):
    write_folder(tmp_path, files)
    with pytest.raises(UserError) as caught:
        create(name, tmp_path, **options)
    assert all(part in str(caught.value) for part in parts)


# Digits


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    source = load_digits()
    train, train_labels, test, test_labels, classes, _ = raw = digits.load(tmp_path)
    check_arrays(digits.load(tmp_path), raw[:4])
    assert classes == tuple("0123456789")
    assert train.shape == (1437, 8, 8, 3) and test.shape == (360, 8, 8, 3)
    assert (train == train[..., :1]).all() and (test == test[..., :1]).all()
    values = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    assert np.unique(train).tolist() == values

    counts = np.bincount(source.target)
    np.testing.assert_allclose(np.bincount(test_labels), counts / 5, atol=1)
    np.testing.assert_array_equal(np.bincount(train_labels), counts - np.bincount(test_labels))

    # Both splits together hold every image once, each split in the order of the source.
    place = {image.tobytes(): i for i, image in enumerate(source.images.astype(np.uint8))}
    assert len(place) == len(source.target)
    ink = np.array(values).searchsorted
    orders = []
    for images, labels in (train, train_labels), (test, test_labels):
        order = [place[ink(image[..., 0]).astype(np.uint8).tobytes()] for image in images]
        assert order == sorted(order)
        np.testing.assert_array_equal(source.target[order], labels)
        orders += order
    assert sorted(orders) == list(range(1797))


def test_digits_statistics(tmp_path):
    pixels = digits.load(tmp_path).train / 255
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), digits.MEAN, atol=5e-5)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), digits.STD, atol=5e-5)
