"""The loaders against small data sets of the real layout, whole and broken. No network."""

import errno
import hashlib
import io
import os
import pickle
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torchvision
from PIL import Image

from datasets import cifar, digits, tiny_imagenet
from datasets.files import DataError, one_at_a_time


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The same whether or not there is a network."""

    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no\nnetwork")  # two lines, of which the error makes one

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def md5(content):
    return hashlib.md5(content).hexdigest()


def check_message(caught, *parts):
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert str(part) in message


def check_arrays(arrays, expected):
    for array, like, dtype in zip(arrays, expected, [np.uint8, np.int64] * 2, strict=True):
        assert isinstance(array, np.ndarray)
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, like)


def test_one_at_a_time(tmp_path):
    """Whoever waits for the file finds it removed, and another in its place."""
    inside, lock = [], tmp_path / "new" / ".lock"

    def enter(number):
        with one_at_a_time(lock):
            inside.append(number)
            time.sleep(0.001)
            assert inside == [number]
            inside.clear()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(enter, range(100)))
    assert not list(lock.parent.iterdir())


# CIFAR


class Mine:
    """Unpickling it leaves a trace."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


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
    meta = pickle.dumps({source.meta["key"]: [str(number) for number in range(classes)]})
    (folder / source.meta["filename"]).write_bytes(meta)
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5(meta)})
    return name, source, folder, arrays


def make_tar(source, folder, monkeypatch):
    archive = folder.parent / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, source.base_folder)
    monkeypatch.setattr(source, "tgz_md5", md5(archive.read_bytes()))
    return archive


def test_cifar(small_cifar, tmp_path, capfd):
    name, _, _, arrays = small_cifar
    check_arrays(cifar.load(tmp_path, name), arrays)
    assert capfd.readouterr().out == ""


def test_cifar_archive_replaces_damaged_files(small_cifar, tmp_path, monkeypatch):
    name, source, folder, arrays = small_cifar
    make_tar(source, folder, monkeypatch)
    (folder / source.test_list[0][0]).write_bytes(pickle.dumps(Mine(tmp_path / "trace")))
    check_arrays(cifar.load(tmp_path, name), arrays)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("which", ["train", "test", "meta"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "tampered"])
def test_cifar_damaged_file(small_cifar, tmp_path, which, damage):
    name, source, folder, _ = small_cifar
    lists = {"train": source.train_list, "test": source.test_list}
    file = folder / (source.meta["filename"] if which == "meta" else lists[which][-1][0])
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.write_bytes(pickle.dumps(Mine(tmp_path / "trace")))
    with pytest.raises(DataError) as caught:
        cifar.load(tmp_path, name)
    check_message(caught, tmp_path, source.filename, source.url, source.tgz_md5)
    check_message(caught, source.base_folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "wrong MD5", "truncated, right MD5"])
def test_cifar_damaged_archive(small_cifar, tmp_path, monkeypatch, damage):
    name, source, folder, _ = small_cifar
    archive = make_tar(source, folder, monkeypatch)
    shutil.rmtree(folder)
    if damage == "missing":
        archive.unlink()
    elif damage == "wrong MD5":
        monkeypatch.setattr(source, "tgz_md5", "0" * 32)
    else:
        archive.write_bytes(archive.read_bytes()[:2000])
        if damage == "truncated, right MD5":
            monkeypatch.setattr(source, "tgz_md5", md5(archive.read_bytes()))
    with pytest.raises(DataError) as caught:
        cifar.load(tmp_path, name)
    check_message(caught, tmp_path, source.filename, source.url, source.tgz_md5)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_data_dir_is_a_file(tmp_path, name):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataError) as caught:
        cifar.load(file, name)
    check_message(caught, file)


# Tiny ImageNet

ROOT = "tiny-imagenet-200"
CLASSES = ["n01", "n02", "n10"]
ANNOTATIONS = f"{ROOT}/val/val_annotations.txt"


def jpeg(rng, size=(64, 64), mode="RGB"):
    shape = (size[1], size[0]) + (3,) * (mode == "RGB")
    file = io.BytesIO()
    Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def members():
    return small_archive()


def small_archive():
    """Content of a small archive by name, in an order that is not the one of the labels."""
    rng = np.random.default_rng(0)
    files = {f"{ROOT}/": b"", f"{ROOT}/wnids.txt": b"n10\nn01\nn02\n"}
    for wnid in reversed(CLASSES):
        files[f"{ROOT}/train/{wnid}/{wnid}_boxes.txt"] = b""
        for number in (10, 9, 0):
            mode = "L" if (wnid, number) == ("n02", 9) else "RGB"
            files[f"{ROOT}/train/{wnid}/images/{wnid}_{number}.JPEG"] = jpeg(rng, mode=mode)
    for number in (2, 10, 1, 0):
        files[f"{ROOT}/val/images/val_{number}.JPEG"] = jpeg(rng)
    files[f"{ROOT}/test/images/test_0.JPEG"] = jpeg(rng)
    labels = {0: "n10", 1: "n01", 2: "n02", 10: "n10"}
    lines = [f"val_{number}.JPEG\t{wnid}\t0\t1\t62\t63\n" for number, wnid in labels.items()]
    files[ANNOTATIONS] = "".join(lines[::-1]).encode()
    return files


def expected(members):
    def pixels(names):
        images = [Image.open(io.BytesIO(members[name])).convert("RGB") for name in names]
        return np.stack([np.asarray(image) for image in images])

    train = [f"{ROOT}/train/{w}/images/{w}_{n}.JPEG" for w in CLASSES for n in (0, 9, 10)]
    test = [f"{ROOT}/val/images/val_{number}.JPEG" for number in (0, 1, 2, 10)]
    labels = np.arange(3).repeat(3), np.array([2, 0, 1, 2])
    return pixels(train), labels[0], pixels(test), labels[1]


def make_zip(tmp_path, members, monkeypatch):
    archive = tmp_path / f"{ROOT}.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    monkeypatch.setattr(tiny_imagenet, "MD5", md5(archive.read_bytes()))
    return archive


def make_folder(tmp_path, members):
    for name, content in members.items():
        if not name.endswith("/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)


def check_fails(tmp_path, *parts):
    """Loading raises DataError with these parts in its message, and leaves no file behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError) as caught:
        tiny_imagenet.load(tmp_path)
    check_message(caught, tmp_path, *parts)
    assert sorted(tmp_path.iterdir()) == before


def test_tiny_imagenet(tmp_path, members, monkeypatch, capfd):
    archive = make_zip(tmp_path, members, monkeypatch)
    check_arrays(tiny_imagenet.load(tmp_path), expected(members))
    assert sorted(os.listdir(tmp_path)) == [f"{ROOT}.npy", f"{ROOT}.zip"]  # nothing extracted
    archive.unlink()
    monkeypatch.setattr(tiny_imagenet, "decode", None)
    arrays = tiny_imagenet.load(tmp_path)
    check_arrays(arrays, expected(members))
    assert isinstance(arrays[0], np.memmap)
    assert capfd.readouterr() == ("", "")  # and no bar where there is no terminal


def test_tiny_imagenet_folder(tmp_path, members):
    make_folder(tmp_path, members)
    check_arrays(tiny_imagenet.load(tmp_path), expected(members))


def test_tiny_imagenet_download(tmp_path, members, monkeypatch):
    source = make_zip(tmp_path, members, monkeypatch)
    calls = []

    def download_url(url, root, filename, md5):
        calls.append((url, md5))
        os.makedirs(root, exist_ok=True)
        shutil.copy(source, os.path.join(root, filename))

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download_url)
    check_arrays(tiny_imagenet.load(tmp_path / "new"), expected(members))
    assert calls == [(tiny_imagenet.URL, tiny_imagenet.MD5)]


def test_tiny_imagenet_more_images_than_a_chunk(tmp_path, members, monkeypatch):
    name = f"{ROOT}/train/n01/images/n01_0.JPEG"
    files = {f"{ROOT}/train/n01/images/n01_{i}.JPEG": members[name] for i in range(1001)}
    files |= {f"{ROOT}/val/images/val_0.JPEG": members[f"{ROOT}/val/images/val_0.JPEG"]}
    make_zip(tmp_path, files | {ANNOTATIONS: b"val_0.JPEG\tn01\t0\t0\t1\t1\n"}, monkeypatch)
    train, train_labels, test, test_labels = tiny_imagenet.load(tmp_path)
    assert train.shape == (1001, 64, 64, 3)
    assert (train == expected(members)[0][0]).all()
    np.testing.assert_array_equal(test, expected(members)[2][:1])
    assert (train_labels == 0).all() and test_labels.tolist() == [0]


def truncate(content):
    return content[:-1]


def append(content):
    return content + b"\0"


def more_images(content):
    return content.replace(b"(13, 64, 64, 3)", b"(15, 64, 64, 3)")


def other_shape(content):
    return content.replace(b"(13, 64, 64, 3)", b"(13, 32,128, 3)")


def other_order(content):
    return content.replace(b"'fortran_order': False", b"'fortran_order': True ", 1)


def no_header(content):
    return b"\0" * 128 + content[128:]


def empty(content):
    return b""


def train_label_too_large(content):  # the 4 test labels and their header come last
    at = len(content) - 4 * 8 - 128 - 8
    return content[:at] + np.int64(4).tobytes() + content[at + 8 :]


def test_label_too_large(content):
    return content[:-8] + np.int64(3).tobytes()


def test_label_negative(content):
    return content[:-8] + np.int64(-1).tobytes()


test_label_too_large.__test__ = test_label_negative.__test__ = False
DAMAGES = [truncate, append, more_images, other_shape, other_order, no_header, empty]
DAMAGES += [train_label_too_large, test_label_too_large, test_label_negative]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)
def test_tiny_imagenet_damaged_cache(tmp_path, members, monkeypatch, damage):
    archive = make_zip(tmp_path, members, monkeypatch)
    tiny_imagenet.load(tmp_path)
    cache = tmp_path / f"{ROOT}.npy"
    whole = cache.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    cache.write_bytes(damaged)
    check_arrays(tiny_imagenet.load(tmp_path), expected(members))
    assert cache.read_bytes() == whole
    cache.write_bytes(damaged)
    archive.unlink()
    check_fails(tmp_path, archive, "is missing")


def test_tiny_imagenet_cache_cut_anywhere(tmp_path, members, monkeypatch):
    make_zip(tmp_path, members, monkeypatch).rename(tmp_path / "elsewhere.zip")
    make_folder(tmp_path, members)
    tiny_imagenet.load(tmp_path)
    shutil.rmtree(tmp_path / ROOT)
    cache = tmp_path / f"{ROOT}.npy"
    whole = cache.read_bytes()
    ends = [*range(0, 140, 7), *range(len(whole) - 400, len(whole), 7)]
    for end in ends:
        cache.write_bytes(whole[:end])
        check_fails(tmp_path, f"{ROOT}.zip", "is missing")


def test_tiny_imagenet_crash_while_decoding(tmp_path, members, monkeypatch):
    make_zip(tmp_path, members, monkeypatch)

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            tiny_imagenet.load(tmp_path)
    assert os.listdir(tmp_path) == [f"{ROOT}.zip"]
    check_arrays(tiny_imagenet.load(tmp_path), expected(members))


def test_tiny_imagenet_removes_what_a_kill_has_left(tmp_path, members, monkeypatch):
    make_zip(tmp_path, members, monkeypatch)
    old, new = (tmp_path / f"{ROOT}.npy.{name}.tmp" for name in ("old", "new"))
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    check_arrays(tiny_imagenet.load(tmp_path), expected(members))
    assert new.exists() and not old.exists()  # another process may be writing the new one


def test_tiny_imagenet_disk_full(tmp_path, members, monkeypatch):
    make_zip(tmp_path, members, monkeypatch)

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    check_fails(tmp_path, f"{ROOT}.npy", "No space left on device")


def test_tiny_imagenet_nothing_there(tmp_path):
    check_fails(
        tmp_path, tmp_path / f"{ROOT}.zip", "is missing", tiny_imagenet.URL, tiny_imagenet.MD5
    )


def test_tiny_imagenet_data_dir_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataError) as caught:
        tiny_imagenet.load(file)
    check_message(caught, file)


@pytest.mark.parametrize("damage", ["MD5", "truncated"])
def test_tiny_imagenet_damaged_zip(tmp_path, members, monkeypatch, damage):
    archive = make_zip(tmp_path, members, monkeypatch)
    if damage == "MD5":
        monkeypatch.setattr(tiny_imagenet, "MD5", "0" * 32)
    else:
        archive.write_bytes(archive.read_bytes()[:-100])
    check_fails(tmp_path, archive, "is damaged", tiny_imagenet.MD5)


def test_tiny_imagenet_not_a_zip(tmp_path, monkeypatch):
    archive = make_zip(tmp_path, {}, monkeypatch)
    archive.write_bytes(b"no zip file at all")
    monkeypatch.setattr(tiny_imagenet, "MD5", md5(archive.read_bytes()))
    check_fails(tmp_path, archive, "cannot be read as a zip file")


def test_tiny_imagenet_member_with_wrong_crc(tmp_path, members, monkeypatch):
    archive = make_zip(tmp_path, members, monkeypatch)
    name = f"{ROOT}/train/n02/images/n02_0.JPEG"
    content = archive.read_bytes()
    at = content.index(members[name]) + 1000
    archive.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    monkeypatch.setattr(tiny_imagenet, "MD5", md5(archive.read_bytes()))
    check_fails(tmp_path, archive, name, "CRC")


RNG = np.random.default_rng(1)
IMAGE = f"{ROOT}/train/n02/images/n02_9.JPEG"
TEST = f"{ROOT}/val/images/val_2.JPEG"
BROKEN = {  # a change of the members (None: absent), and what the message names
    "absolute path": ({"/etc/n01.JPEG": b""}, ["/etc/n01.JPEG", "leaves the folder"]),
    "parent folder": ({f"{ROOT}/../../a.JPEG": b""}, ["../../a.JPEG", "leaves the folder"]),
    "backslashes": ({f"{ROOT}\\..\\..\\a": b""}, ["..\\a", "leaves the folder"]),
    "drive": ({"C:a.JPEG": b""}, ["C:a.JPEG", "leaves the folder"]),
    "two lines": ({"../a\nb": b""}, ["../a b", "leaves the folder"]),
    "no image": ({IMAGE: b"no image"}, [IMAGE, "broken"]),
    "empty image": ({IMAGE: b""}, [IMAGE, "broken"]),
    "truncated image": ({IMAGE: jpeg(RNG)[:-2000]}, [IMAGE, "broken"]),
    "truncated test image": ({TEST: jpeg(RNG)[:-2000]}, [TEST, "broken"]),
    "too small": ({IMAGE: jpeg(RNG, (32, 64))}, [IMAGE, "32x64 instead of 64x64"]),
    "too large": ({TEST: jpeg(RNG, (64, 65))}, [TEST, "64x65 instead of 64x64"]),
    "image missing": ({IMAGE: None}, ["class n02 has only 2 images"]),
    "empty class": ({f"{ROOT}/train/n03/n03_boxes.txt": b""}, ["class n03 has only 0 images"]),
    "annotations missing": ({ANNOTATIONS: None}, [ANNOTATIONS, "no readable"]),
    "annotations unreadable": ({ANNOTATIONS: b"\xff"}, [ANNOTATIONS, "no readable"]),
    "annotations empty": ({ANNOTATIONS: b""}, [ANNOTATIONS, "no line for val_0.JPEG"]),
    "annotation missing": (
        {ANNOTATIONS: b"".join(f"val_{i}.JPEG\tn01\t0\n".encode() for i in (0, 1, 10))},
        [ANNOTATIONS, "no line for val_2.JPEG"],
    ),
    "unknown class": (
        {ANNOTATIONS: b"val_1.JPEG\tn01\t0\nval_0.JPEG\tn77\t0\n"},
        [ANNOTATIONS, "unknown class n77", "line 2"],
    ),
    "line without class": ({ANNOTATIONS: b"val_0.JPEG\n"}, [ANNOTATIONS, "line 1"]),
    "test image missing": ({TEST: None}, [ANNOTATIONS, "missing image val_2.JPEG"]),
    "no test images": (
        {f"{ROOT}/val/images/val_{i}.JPEG": None for i in (0, 1, 2, 10)} | {ANNOTATIONS: b""},
        [ANNOTATIONS, "no line for any image"],
    ),
}


@pytest.mark.parametrize("change, parts", BROKEN.values(), ids=BROKEN)
def test_tiny_imagenet_broken_member(tmp_path, members, monkeypatch, change, parts):
    files = {name: content for name, content in (members | change).items() if content is not None}
    archive = make_zip(tmp_path, files, monkeypatch)
    check_fails(tmp_path, archive, *parts)


def test_tiny_imagenet_no_classes(tmp_path, monkeypatch):
    archive = make_zip(tmp_path, {f"{ROOT}/val/": b""}, monkeypatch)
    check_fails(tmp_path, archive, "no images of any class")


def test_tiny_imagenet_empty_folder(tmp_path):
    (tmp_path / ROOT).mkdir()
    check_fails(tmp_path, tmp_path / ROOT, "no images of any class", f"{ROOT}.zip")


def test_tiny_imagenet_broken_folder(tmp_path, members):
    make_folder(tmp_path, members)
    (tmp_path / IMAGE).write_bytes(b"no image")
    check_fails(tmp_path, tmp_path / ROOT, IMAGE)
    (tmp_path / ANNOTATIONS).unlink()
    check_fails(tmp_path, tmp_path / ROOT, ANNOTATIONS)


# Digits


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    source = load_digits()
    train, train_labels, test, test_labels = arrays = digits.load(tmp_path)
    check_arrays(digits.load(tmp_path), arrays)
    assert os.listdir(tmp_path) == []
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
    pixels = digits.load(tmp_path)[0] / 255
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), digits.MEAN, atol=5e-5)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), digits.STD, atol=5e-5)
