"""The loaders against small data sets of the real layout, whole and broken. No network."""

import errno
import io
import os
import pickle
import re
import shutil
import tarfile
import time
import unicodedata
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from hashlib import md5
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
import trees
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from trees import ROOT, write_folder, write_zip

import datasets
from datasets import DATASETS, digits, folder, tiny_imagenet
from errors import UserError

pytestmark = [  # a file left open is an error
    pytest.mark.filterwarnings("error::ResourceWarning"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]
RNG = np.random.default_rng(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The same whether or not there is a network."""

    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def create(name, data_dir, known_class=None, known=None, **options):
    which = datasets.KnownClasses(known_class, known)
    return datasets.create(name, Path(data_dir), torch.device("cpu"), which, **options)


def check_fails(name, data_dir, *parts):
    """Creating the data set tells these parts, and changes nothing in its folder."""
    before = contents(data_dir)
    with pytest.raises(UserError) as caught:
        create(name, data_dir)
    for part in parts:
        assert str(part) in str(caught.value)
    assert contents(data_dir) == before


def contents(data_dir):
    """All files below a folder but the locks, which stay."""
    paths = [path for path in data_dir.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.read_bytes() for path in paths}


def check_arrays(raw, expected):
    for array, like, dtype in zip(raw[:4], expected, [np.uint8, np.int64] * 2, strict=True):
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, like)


def without(files, *names):
    return {name: content for name, content in files.items() if name not in names}


# ---- any data set ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "TinyImagenet"])
def test_no_data_and_no_network(tmp_path, name):
    check_fails(name, tmp_path, tmp_path, "http", "MD5", "no network")


ANT, BEE = trees.class_folders("ant"), trees.class_folders("bee")
BEE_TEST = {name: content for name, content in BEE.items() if name.startswith("test/")}
NEEDS = {  # files of a folder (none: the digits), what is chosen, what the message names
    "more known than there are": ({}, {"known_class": 20}, "10 classes"),
    "size of other images": ({}, {"image_size": 32}, "--image-size"),
    "nothing unknown": (ANT | BEE, {"known": ["bee", "ant"]}, "2 classes"),
    "no such class": (ANT | BEE, {"known": ["bees"]}, "bees.*ant, bee"),
    "known class untested": (ANT | without(BEE, *BEE_TEST), {"known": ["bee"]}, "test .*bee"),
    "known class untrained": (ANT | BEE_TEST, {"known": ["bee"]}, "training .*bee"),
    "no unknown image": (ANT | BEE_TEST, {"known": ["ant"]}, "unknown class"),
    "nothing but ants": (ANT, {}, r"\bant\b"),
    "no train/": ({"ant/0.png": b"", "bee/0.png": b""}, {}, "train/CLASS/"),
}


def test_known_classes_may_be_typed_with_spaces_and_in_another_form_of_unicode(tmp_path):
    kafer, drawn = unicodedata.normalize("NFD", "käfer"), trees.class_folders("ant, small")
    files = BEE | trees.class_folders(kafer) | drawn
    known = ["käfer", " ant", " small "]  # --known "käfer, ant, small "
    data = create("folder", write_folder(tmp_path, files), known=known)
    assert (data.classes, data.num_known) == (("ant, small", kafer, "bee"), 2)
    names = ["cat", "cat ", "k\u00e4fer", "ka\u0308fer"]
    assert [folder.class_names([name], names) for name in names] == [[name] for name in names]


@pytest.mark.parametrize("files, options, part", NEEDS.values(), ids=NEEDS)
def test_what_a_run_needs(tmp_path, files, options, part):
    with pytest.raises(UserError, match=part):
        create("folder" if files else "digits", write_folder(tmp_path, files), **options)


# ---- CIFAR -------------------------------------------------------------------------------------


def __reduce__(self):
    return os.mkdir, ("trace",)


def pickled(file, content):
    """Write a pickle; return its MD5."""
    file.write_bytes(pickle.dumps(content))
    return md5(file.read_bytes()).hexdigest()


@pytest.fixture(params=["cifar10", "cifar100"])
def small_cifar(request, tmp_path, monkeypatch):
    """Its loader, torchvision's class, the folder of its batches and its arrays."""
    source = getattr(torchvision.datasets, request.param.upper())
    batches, key = tmp_path / source.base_folder, {"cifar10": "labels", "cifar100": "fine_labels"}
    batches.mkdir()
    arrays = []
    for kind in ("train_list", "test_list"):
        sums = []
        pixels = RNG.integers(256, size=(len(getattr(source, kind)), 4, 3, 32, 32), dtype=np.uint8)
        labels = RNG.integers(10, size=pixels.shape[:2])
        for (file, _), rows, ids in zip(getattr(source, kind), pixels, labels, strict=True):
            batch = {"data": rows.reshape(4, -1), key[request.param]: ids.tolist()}
            sums.append([file, pickled(batches / file, batch)])
        monkeypatch.setattr(source, kind, sums)
        arrays += [pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.reshape(-1)]
    names = {source.meta["key"]: [f"class {number}" for number in range(10)]}
    sums = {"md5": pickled(batches / source.meta["filename"], names)}
    monkeypatch.setattr(source, "meta", source.meta | sums)
    return DATASETS[request.param].load, source, batches, arrays


def make_tar(source, batches):
    archive = batches.parent / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, source.base_folder)
    return archive


def test_cifar(small_cifar, tmp_path, monkeypatch, capfd):
    """From the folder below data_dir or data_dir itself, and from an archive of another MD5."""
    load, source, batches, arrays = small_cifar
    monkeypatch.chdir(batches)
    make_tar(source, batches)
    linked = tmp_path / "linked" / source.base_folder
    linked.parent.mkdir()
    linked.symlink_to(batches.rename(tmp_path / "renamed"))
    for data_dir in (linked.parent, linked, linked.resolve(), Path(".")):
        check_arrays(load(data_dir), arrays)
    raw = load(tmp_path)
    check_arrays(raw, arrays)
    assert raw.classes[9] == "class 9"
    assert capfd.readouterr().out.count(source.tgz_md5) == 1


def test_cifar_damaged(small_cifar, tmp_path, monkeypatch):
    """A damaged file is told and not unpickled."""
    monkeypatch.chdir(tmp_path)
    _, source, batches, _ = small_cifar
    name, bad = source.__name__.lower(), pickle.dumps(trees.Trace())
    for file in (source.train_list[-1][0], source.test_list[0][0], source.meta["filename"]):
        whole = (batches / file).read_bytes()
        (batches / file).write_bytes(bad)
        check_fails(name, tmp_path, batches, source.tgz_md5, source.url)
        (batches / file).write_bytes(whole)
    archive = make_tar(source, batches)
    shutil.rmtree(batches)
    archive.write_bytes(archive.read_bytes()[:1000])
    check_fails(name, tmp_path, archive, md5(archive.read_bytes()).hexdigest(), source.tgz_md5)
    assert not (tmp_path / "trace").exists()


# ---- Tiny ImageNet -----------------------------------------------------------------------------

FILES = trees.tiny_imagenet()
ANNOTATIONS = f"{ROOT}/val/val_annotations.txt"
IMAGE = f"{ROOT}/train/n00000010/images/n00000010_4.JPEG"
TEST = f"{ROOT}/val/images/val_2.JPEG"
CLASS_OF = dict(line.split("\t")[:2] for line in FILES[ANNOTATIONS].decode().splitlines())
CACHE = f"{ROOT}.npy"
MD5 = tiny_imagenet.PUBLISHED.md5


def expected(files=FILES):
    """Arrays of the original layout as a plain loop over it makes them."""
    arrays = [[], [], [], []]
    wnids = ["n00000000", "n00000010", "n00000020"]
    names = [(f"train/{wnid}/images/{wnid}_{n}", wnid) for wnid in wnids for n in range(100)]
    names += [(f"val/images/val_{n}", CLASS_OF[f"val_{n}.JPEG"]) for n in range(12)]
    for name, wnid in names:
        if content := files.get(f"{ROOT}/{name}.JPEG"):
            images, labels = arrays[:2] if name.startswith("train/") else arrays[2:]
            images.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
            labels.append(wnids.index(wnid))
    return arrays


def sort_val(files, inner="images/"):
    """Validation images in class folders, as popular scripts leave them."""

    def in_class(match):
        return f"/val/{CLASS_OF[match[1]]}/{inner}{match[1]}"

    return {re.sub("/val/images/(val.*)", in_class, name): files[name] for name in files}


def flatten(files):
    """No folder images/ anywhere, no annotations."""
    files = sort_val(without(files, ANNOTATIONS), inner="")
    return {re.sub(r"(train/\w+/)images/", r"\1", name): files[name] for name in files}


FORMS = [(dict, "folder"), (sort_val, "itself"), (flatten, "twice")]
FORMS += [(dict, "zip without top folder"), (sort_val, "zip")]


@pytest.mark.parametrize("form, place", FORMS)
def test_tiny_imagenet_forms(tmp_path, form, place):
    files = form(FILES)
    if "without" in place:
        files = {name.removeprefix(f"{ROOT}/"): content for name, content in files.items()}
    if "zip" in place:
        write_zip(tmp_path / f"{ROOT}.zip", files)
    else:
        write_folder(tmp_path / ROOT if place == "twice" else tmp_path, files)
    raw = tiny_imagenet.load(tmp_path / ROOT if place == "itself" else tmp_path)
    check_arrays(raw, expected())
    assert raw.classes == ("n00000000", "n00000010", "n00000020")


def test_tiny_imagenet_is_downloaded_and_decoded_once(tmp_path, monkeypatch):
    """Of several runs started together one does it; later ones need the cache alone."""
    archive = tmp_path / "new" / f"{ROOT}.zip"

    def download_url(url, root, filename, md5):
        time.sleep(0.1)
        write_zip(Path(root, filename), FILES)

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download_url)
    with ThreadPoolExecutor(4) as threads:
        for raw in threads.map(tiny_imagenet.load, [archive.parent] * 4):
            check_arrays(raw, expected())
    assert contents(tmp_path).keys() == {archive, archive.parent / CACHE}  # nothing is extracted
    arrays = expected()
    monkeypatch.setattr(Image, "open", None)
    for _ in range(2):  # with the archive, and without
        raw = tiny_imagenet.load(archive.parent)
        check_arrays(raw, arrays)
        assert isinstance(raw.train, np.memmap)
        archive.unlink(missing_ok=True)


def test_tiny_imagenet_archive_of_another_md5(tmp_path, capfd):
    """It is read if it is sound; else both MD5s are told. Nobody touches the file."""
    archive = write_zip(tmp_path / f"{ROOT}.zip", FILES)
    whole = archive.read_bytes()
    check_arrays(tiny_imagenet.load(tmp_path), expected())
    told = capfd.readouterr().out
    assert md5(whole).hexdigest() in told and MD5 in told
    (tmp_path / CACHE).unlink()
    at = whole.index(FILES[TEST]) + 1000
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for bad in (whole[:-100], b"", flipped):
        archive.write_bytes(bad)
        check_fails("TinyImagenet", tmp_path, archive, md5(bad).hexdigest(), MD5)
    write_folder(tmp_path, FILES)
    check_arrays(tiny_imagenet.load(tmp_path), expected())  # the folder beside it is used


def test_tiny_imagenet_files_changed_after_decoding(tmp_path, capfd):
    """Images were added, removed and replaced."""
    smaller = {IMAGE: trees.picture(RNG, quality=30)}
    added = FILES | {IMAGE.replace("_4.", "_55."): FILES[IMAGE]}
    for files in (FILES, added, without(FILES, IMAGE), FILES | smaller):
        shutil.rmtree(tmp_path / ROOT, ignore_errors=True)
        check_arrays(tiny_imagenet.load(write_folder(tmp_path, files)), expected(files))
        assert ("other files" in capfd.readouterr().out) == (files is not FILES)


def test_tiny_imagenet_without_room_for_the_cache(tmp_path, monkeypatch, capfd):
    """The images are kept in memory, and nothing half written is left."""

    def fsync(descriptor):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", fsync)
    before = contents(write_folder(tmp_path, FILES))
    check_arrays(tiny_imagenet.load(tmp_path), expected())
    assert os.strerror(errno.EROFS) in capfd.readouterr().out
    assert contents(tmp_path) == before


def test_tiny_imagenet_cache_that_is_not_whole(tmp_path):
    """Cut, or as the first version of this project wrote it: told, or made anew from the source."""
    tiny_imagenet.load(write_folder(tmp_path / "source", FILES))
    cache = tmp_path / "source" / CACHE
    whole = cache.read_bytes()
    np.save(old := io.BytesIO(), expected()[0])
    for bad in (old.getvalue(), whole[:100], whole[:10_000], whole[:-100]):
        (tmp_path / CACHE).write_bytes(bad)
        check_fails("TinyImagenet", tmp_path, tmp_path / CACHE, MD5)
        cache.write_bytes(bad)
        check_arrays(tiny_imagenet.load(tmp_path / "source"), expected())
        assert cache.read_bytes() == whole


BROKEN = {  # other contents (None: absent), and what the message names
    "two images": (
        {IMAGE: FILES[IMAGE][:-2000], TEST: b""},
        ["2 of 45", "n00000010_4.JPEG (", "trunc", "val_2.JPEG"],
    ),
    "size": ({IMAGE: trees.picture(RNG, (64, 65))}, ["n00000010_4.JPEG", "65"]),
    "no annotations": ({ANNOTATIONS: None}, ["val_0.JPEG", "val/CLASS/"]),
    "class unknown": ({ANNOTATIONS: FILES[ANNOTATIONS].replace(b"n0", b"n7")}, ["n70000000"]),
    "test image missing": ({TEST: None}, ["val_2.JPEG"]),
    "no val": (dict.fromkeys(n for n in FILES if "/val/" in n), ["train/CLASS/"]),
    "no images": (dict.fromkeys(n for n in FILES if n.endswith("G")), ["train/CLASS/"]),
}


@pytest.mark.parametrize("change, parts", BROKEN.values(), ids=BROKEN)
def test_tiny_imagenet_broken(tmp_path, change, parts):
    files = {name: content for name, content in (FILES | change).items() if content is not None}
    (tmp_path / "zip").mkdir()
    write_zip(tmp_path / "zip" / f"{ROOT}.zip", files)
    write_folder(tmp_path / "folder", files)
    for place in ("zip", "folder"):
        check_fails("TinyImagenet", tmp_path / place, place, *parts, MD5)


# ---- a folder of the user's images -------------------------------------------------------------


def twin(content, size):
    """Upright, in RGB, shorter side resized, center cropped; by hand."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if image.mode == "I;16":  # the upper eight bits; Pillow makes nearly everything white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    wanted = (size, longer) if width < height else (longer, size)
    image = image.convert("RGB").resize(wanted, Image.BILINEAR)
    at = round((longer - size) / 2)
    left, top = (0, at) if width < height else (at, 0)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def test_folder(tmp_path, capfd):
    """Images of many kinds and a class with an odd name; links are followed, others ignored."""
    turned, deep, data_dir = Image.Exif(), io.BytesIO(), tmp_path / "data"
    turned[0x112] = 6  # by a quarter
    Image.fromarray(RNG.integers(65536, size=(16, 16), dtype=np.uint16)).save(deep, "PNG")
    files = {
        "ant/deep/er/turned.JPG": trees.picture(RNG, (50, 20), exif=turned),
        "ant/grey.png": trees.picture(RNG, (20, 31), "L", "PNG"),
        "ant/of 16 bits.png": deep.getvalue(),
        "bee/a.webp": trees.picture(RNG, (9, 40), kind="WEBP"),
        "bee/b.tiff": trees.picture(RNG, (8, 8), kind="TIFF"),
        "cat, wild/palette.gif": trees.picture(RNG, (30, 40), kind="GIF"),
    }
    write_folder(tmp_path / "elsewhere", files)
    write_folder(data_dir / "train", without(files, "bee/a.webp", "bee/b.tiff"))
    (data_dir / "train" / "bee").symlink_to(tmp_path / "elsewhere" / "bee")
    (data_dir / "val").symlink_to(tmp_path / "elsewhere")
    others = ["train/notes.txt", "train/bee2/labels.csv", ".hidden/x.png", "train/ant/._a.webp"]
    write_folder(data_dir, dict.fromkeys(others, b"no image"))
    images, labels = [twin(files[name], 16) for name in sorted(files)], [0, 0, 0, 1, 1, 2]
    for kind in (np.ndarray, np.memmap):
        raw = folder.load(data_dir, size=16)
        check_arrays(raw, [images, labels, images, labels])
        assert raw.classes == ("ant", "bee", "cat, wild")
        assert isinstance(raw.train, kind)
    assert "1 files" in capfd.readouterr().out
    assert folder.load(data_dir, size=8).train.shape == (6, 8, 8, 3)
    assert create("folder", data_dir, known=["bee", "cat", " wild"]).classes[1] == "cat, wild"


def pixels_of(data_dir, size=16):
    """The unscaled pixels of the images there, by name; unreadable ones are skipped."""
    files, _ = folder.list_images(data_dir)
    found = folder.read(data_dir, files, size, skip_broken=True)
    names = [name for name in files if name not in found.broken]
    return dict(zip(names, np.array(found.pixels), strict=True))


def encoded(pixels, kind="TIFF", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def test_an_image_corrected_in_place_is_read_again(tmp_path):
    """Of the same size in bytes; the time of change of its content may be restored, too."""
    for restored in (False, False, True, True):
        pixels = RNG.integers(256, size=(16, 16, 3), dtype=np.uint8)
        (tmp_path / "a.bmp").write_bytes(encoded(pixels, "BMP"))
        if restored:
            os.utime(tmp_path / "a.bmp", ns=(1, 1))
        for _ in range(2):
            np.testing.assert_array_equal(pixels_of(tmp_path)["a.bmp"], pixels)


def test_transparent_images_are_drawn_on_white(tmp_path, capfd):
    grey, alpha = RNG.integers(256, size=(2, 16, 16), dtype=np.uint8)
    grey[0, 0] = 0  # the index that is transparent occurs
    color, palette = RNG.integers(256, size=(16, 16, 3), dtype=np.uint8), bytes(range(0, 256))
    see_through = Image.fromarray(np.dstack([color, alpha]))
    indexed = Image.fromarray(grey).convert("P")
    drawing = Image.fromarray(np.dstack([0 * color, alpha]))
    opaque = Image.fromarray(np.dstack([color, 0 * alpha + 255]))
    light = np.asarray(see_through.convert("L"))[..., None].repeat(3, 2)
    solid, keyed = (grey != 0)[..., None], (color.reshape(-1, 3)[7] != color).any(2)[..., None]

    def on_white(pixels, share):
        return share * pixels + (1 - share) * 255

    alpha, triple = alpha[..., None] / 255, np.repeat(grey[..., None], 3, 2)
    made = {  # what is in the file, and how it looks
        "drawing.png": (encoded(drawing, "PNG"), on_white(0 * color, alpha)),
        "rgba.tif": (encoded(see_through), on_white(color, alpha)),
        "rgba.webp": (
            encoded(see_through, "WEBP", lossless=True, exact=True),
            on_white(color, alpha),
        ),
        "la.png": (encoded(see_through.convert("LA"), "PNG"), on_white(light, alpha)),
        "index.png": (encoded(indexed, "PNG", transparency=0), on_white(triple, solid)),
        "palette.png": (
            encoded(indexed, "PNG", transparency=palette),
            on_white(triple, triple / 255),
        ),
        "key.png": (
            encoded(color, "PNG", transparency=tuple(color.reshape(-1, 3)[7].tolist())),
            on_white(color, keyed),
        ),
        "opaque.png": (encoded(opaque, "PNG"), color),
    }
    write_folder(tmp_path, {name: content for name, (content, _) in made.items()})
    found = pixels_of(tmp_path)
    for name, (_, seen) in made.items():
        np.testing.assert_allclose(found[name], seen, atol=1, err_msg=name)
    assert "7 images" in capfd.readouterr().out


RAMP = np.arange(256).reshape(16, 16)
DEEP = {  # each has 256 levels
    "fractions": (RAMP / 255).astype(np.float32),
    "signed": (RAMP / 127.5 - 1).astype(np.float32),
    "tiny": (RAMP / 2.0**20).astype(np.float32),
    "as 8 bits": RAMP.astype(np.float32),
    "10 bits": (RAMP * 4).astype(np.uint16),
    "12 bits": (RAMP * 16).astype(np.uint16),
    "14 bits": (RAMP * 64 + 5).astype(np.uint16),
    "16 bits": (RAMP * 256 + 77).astype(np.uint16),
    "thermal": (29000 + RAMP * 8).astype(np.uint16),
    "int32": (RAMP << 23).astype(np.int32),
    "CT": (RAMP * 16 - 1024).astype(np.int32),
    "int32, few": (RAMP + 10**6).astype(np.int32),
}


def test_values_beyond_eight_bits_keep_their_levels(tmp_path, capfd):
    files = {f"{name}.tif": encoded(values) for name, values in DEEP.items()}
    for bits in (10, 12, 16):
        values = (RAMP << (bits - 8)).astype(">u2").tobytes()
        files[f"{bits}.pgm"] = b"P5 16 16 %d\n" % (2**bits - 1) + values
    holes = np.where(RAMP == 3, np.nan, RAMP / 255).astype(np.float32)
    found = pixels_of(write_folder(tmp_path, files | {"holes.tif": encoded(holes)}))
    for name in files:
        np.testing.assert_array_equal(found[name], RAMP[..., None].repeat(3, 2), err_msg=name)
    assert not found["holes.tif"][0, 3].any() and len(np.unique(found["holes.tif"])) == 255
    out = capfd.readouterr().out
    assert "15 images" in out and out.count("scaled") == 1


@pytest.mark.parametrize("turn", range(1, 9))
def test_upright_whatever_else_the_exif_data_say(tmp_path, turn):
    """Turned as Pillow turns it, also if the other tags cannot be written back; else as it lies."""
    pixels, exif = RNG.integers(256, size=(16, 16, 3), dtype=np.uint8), Image.Exif()
    exif[0x112], exif[0x11A] = turn, 72.0
    sound = encoded(pixels, "PNG", exif=exif)
    broken = encoded(pixels, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff" + bytes(9))
    lost = encoded(pixels, "PNG", exif=b"Exif\0\0rubbish")
    found = pixels_of(write_folder(tmp_path, {"a.png": sound, "b.png": broken, "c.png": lost}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(sound)))
    np.testing.assert_array_equal(found["a.png"], np.asarray(upright))
    np.testing.assert_array_equal(found["b.png"], pixels)
    np.testing.assert_array_equal(found["c.png"], pixels)


def test_only_what_is_in_the_folder_for_its_owner(tmp_path, capfd):
    """No thumbnails and bins of the system, links to nowhere, or pipes; first pages are said."""
    content, frames = trees.picture(RNG, (16, 16), kind="PNG"), []
    for _ in range(3):
        frames.append(Image.fromarray(RNG.integers(256, size=(16, 16, 3), dtype=np.uint8)))
    pages = encoded(frames[0], save_all=True, append_images=frames[1:])
    moving = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    bins = "@eaDir #recycle @Recycle $RECYCLE.BIN __MACOSX .Trash-1000 .@__thumb lost+found".split()
    litter = {f"{at}{name}/a.png": content for name in bins for at in ("", "ant/")}
    litter |= {f"{at}trashbox/a.png": content for at in ("", "ant/")}  # below it may be a class
    write_folder(tmp_path, litter | {"ant/a.png": content, "b.tif": pages, "c.png": moving})
    (tmp_path / "notes").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.png")
    found = pixels_of(tmp_path)
    assert [*found] == ["ant/a.png", "ant/trashbox/a.png", "b.tif", "c.png"]
    np.testing.assert_array_equal(found["b.tif"], np.asarray(frames[0]))
    out = capfd.readouterr().out
    assert "2 images" in out and "2 files" in out
    (tmp_path / "lost.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"lost\.png"):
        folder.list_images(tmp_path)


def test_a_failure_of_the_machine_is_not_remembered(tmp_path, monkeypatch):
    """No memory ends the start; without its decoder an image is skipped until there is one."""
    names = ("a.png", "b.jpg", "c.png")
    kinds = {"png": "PNG", "jpg": "JPEG"}
    files = {name: trees.picture(RNG, (16, 16), kind=kinds[name[2:]]) for name in names}
    data_dir = write_folder(tmp_path / "train", {f"ant/{name}": files[name] for name in names})
    with monkeypatch.context() as patch:
        patch.delattr(Image.core, "jpeg_decoder")
        assert [*pixels_of(data_dir)] == ["ant/a.png", "ant/c.png"]
    assert [*pixels_of(data_dir)] == [f"ant/{name}" for name in names]
    write_folder(tmp_path / "test" / "bee", files)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", mock.Mock(side_effect=MemoryError))
        with pytest.raises(UserError, match=r"memory(?!.*batch)"):
            create("folder", tmp_path)
    assert folder.load(tmp_path).train.shape[0] == 3


def test_folder_with_broken_images(tmp_path):
    """They are refused by name; whoever wants the others gets them, and nobody else does."""
    broken = {f"train/ant/x{number}.png": b"no image" for number in range(12)}
    files = {name.replace("test/", "val/"): content for name, content in ANT.items()}
    write_folder(tmp_path, files | broken)
    check_fails("folder", tmp_path, "12 of 20", *sorted(broken)[:10])
    for _ in range(2):
        read = folder.read(tmp_path, folder.list_images(tmp_path)[0], 64, skip_broken=True)
        assert read.broken.keys() == broken.keys()
        np.testing.assert_array_equal(read.pixels, [twin(files[name], 64) for name in files])
    check_fails("folder", tmp_path, "12 of 20")


def test_folder_name_and_identity(tmp_path, monkeypatch):
    """Other images, names or known classes: another identity; another place: the same.

    The name in logs differs between different data, not between sizes or known classes of one.
    """
    files = ANT | BEE
    other = dict(zip(files, reversed(files.values()), strict=True))
    renamed = {name.replace("4.png", "9.png"): files[name] for name in files}
    found = [
        create("folder", write_folder(tmp_path / str(place) / "my_pets", content))
        for place, content in enumerate((files, files, other, renamed))
    ]
    monkeypatch.chdir(tmp_path / "0" / "my_pets")
    found.append(create("folder", ".", known=["bee"]))
    assert found[0].identity == found[1].identity
    assert len({data.identity for data in found}) == 4
    found.append(create("folder", ".", image_size=8))
    assert {data.name[:8] for data in found} == {"my-pets-"}
    same = [
        [number for number, other in enumerate(found) if other.name == data.name] for data in found
    ]
    assert same == [[0, 1, 4, 5], [0, 1, 4, 5], [2], [3], [0, 1, 4, 5], [0, 1, 4, 5]]
    twins = [create("folder", write_folder(tmp_path / name, files)) for name in ("猫狗", "车辆")]
    assert [data.name[:3] for data in twins] == ["猫狗-", "车辆-"]
    assert (found[0].train.height, found[0].train.width, found[0].train.padding) == (64, 64, 8)


@pytest.mark.parametrize("name, files", [("TinyImagenet", FILES), ("folder", ANT)])
def test_no_rights_is_told_as_that(tmp_path, monkeypatch, name, files):
    def read_bytes(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(UserError, match="Permission denied"):
        create(name, write_folder(tmp_path, files))


# ---- digits ------------------------------------------------------------------------------------


def test_digits(tmp_path):
    """Every image once, in the order of the source, a fifth of each class for the test."""
    source, raw = load_digits(), digits.load(tmp_path)
    pixels = np.rint(source.images / 16 * 255).astype(np.uint8)[..., None].repeat(3, axis=3)
    place = {image.tobytes(): number for number, image in enumerate(pixels)}
    train, test = ([place[image.tobytes()] for image in part] for part in (raw.train, raw.test))
    check_arrays(raw, [pixels[train], source.target[train], pixels[test], source.target[test]])
    assert train == sorted(train) and test == sorted(test)
    assert sorted(train + test) == list(range(1797))
    shares = np.bincount(source.target) / 5
    np.testing.assert_allclose(np.bincount(raw.test_labels), shares, atol=1)
    grey = raw.train / 255
    np.testing.assert_allclose(grey.mean((0, 1, 2)), DATASETS["digits"].mean, atol=5e-5)
    np.testing.assert_allclose(grey.std((0, 1, 2)), DATASETS["digits"].std, atol=5e-5)


def test_a_protocols_classes_are_lines_of_wnids_txt(tmp_path):
    write_folder(tmp_path / "folder", trees.tiny_imagenet())
    write_zip(tmp_path / "tiny-imagenet-200.zip", trees.tiny_imagenet())
    write_folder(tmp_path / "twice" / ROOT, trees.tiny_imagenet())
    for place in (tmp_path / "folder", tmp_path / "twice", tmp_path):
        known = datasets.KnownClasses(2, order="1 2")
        data = datasets.create("TinyImagenet", place, torch.device("cpu"), known)
        assert data.classes == ("n00000020", "n00000000", "n00000010")
