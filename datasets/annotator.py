"""Images or vectors of which few are labeled: a person is the oracle, and answers in sheets."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from errors import UserError, tell

from . import embeddings, folder, sheets
from .files import one_at_a_time, write_whole
from .open_set import Split
from .raw import Items, Raw

NAME = ".lfosa-name"  # the file that keeps a folder's name in logs


def load(
    items: Items,
    sheet_encoding: str | None = None,
    encode: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[Raw, dict]:
    """All items as training images or vectors, those of test.csv as the test set, in their order.

    Labels of training images that are of no known class are K. Unreadable images are skipped.
    Returns also the further fields of OpenSetData by name. Raises UserError if a sheet is faulty
    or if no labeled image can be read, and OSError. sheet_encoding: see sheets.read. encode: from
    images to vectors.
    """
    if not os.access(items.folder, os.W_OK):  # before the round rather than after it
        raise UserError(f"cannot write to {items.folder}, where the query sheets go")
    answered = sheets.read(items.folder, items.names, items.others, sheet_encoding)
    if not answered.classes:  # before the reading, which may take long
        raise UserError("labels.csv names no class")
    inputs, broken = items.read()
    inputs = encode(inputs) if encode else inputs
    digest = embeddings.digest(inputs)
    names = [name for name in items.names if name not in broken]
    position = {name: i for i, name in enumerate(names)}
    class_id = {name: label for label, name in enumerate(answered.classes)}
    K = len(class_id)
    labels = np.array([class_id.get(answered.labels.get(name), K) for name in names], np.int64)
    labeled = np.flatnonzero(labels < K)
    if not len(labeled):
        raise UserError("labels.csv assigns no class to any readable item")
    unknown = [name for name, label in answered.labels.items() if label == sheets.UNKNOWN]
    invalid = [position[name] for name in unknown if name in position]  # in order of the answers
    pool = [i for i, name in enumerate(names) if name not in answered.taken]
    test = [i for i, name in enumerate(names) if name in answered.test]
    raw = Raw(
        train=inputs,
        train_labels=labels,
        test=inputs[test],
        test_labels=np.array([class_id[answered.test[names[i]]] for i in test], np.int64),
        classes=answered.classes,
    )
    content = repr((names, answered.classes, answered.labels, answered.test, pool, digest))
    pictures = zip(items.names, items.pictures, strict=True)
    log_name = name(items.folder)
    return raw, {
        "name": log_name,
        "identity": log_name,
        "num_known": K,
        "names": tuple(names),
        "sheets": answered,
        "split": Split(*(torch.tensor(x, dtype=torch.int64) for x in (labeled, invalid, pool))),
        "answers_digest": hashlib.sha256(content.encode()).hexdigest()[:16],
        "left_out": broken,
        "folder": items.folder,
        "columns": items.columns,
        "pictures": tuple(picture for name, picture in pictures if name not in broken),
    }


def name(data_dir: Path) -> str:
    """The folder's name in logs, which is kept in it: it may be moved or mounted elsewhere.

    It ends in random digits, so that no other folder has it, but a whole copy of this one.
    """
    kept = data_dir / NAME
    with one_at_a_time(data_dir / ".lfosa-cache.lock"):
        if not kept.exists():
            if (data_dir / "query_1.csv").exists():
                what = "so a new log begins; to continue an old one, copy its file here"
                tell(f"note: {kept} is missing, {what}")
            new = folder.log_name(data_dir, secrets.token_hex(4))
            write_whole(kept, lambda file: file.write(new.encode()))
        return kept.read_text("utf-8").strip()


def is_copy(folder: Path, of: Path) -> bool:
    """Whether the folder has its name in logs from another one, which is still there."""
    with contextlib.suppress(OSError):
        same_name = (folder / NAME).read_bytes() == (of / NAME).read_bytes()
        return same_name and not folder.samefile(of)
    return False
