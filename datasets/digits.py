"""scikit-learn's handwritten digits: 1,797 images of 8x8 grey pixels, part of the package.

Small enough to try every part of the project on a CPU, without any download. Source: the test set
of "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.
"""

from pathlib import Path

import numpy as np

from .raw import Raw


def load(data_dir: Path) -> Raw:
    """1,437 training and 360 test images (8, 8, 3), both in the order of the data set.

    The test images are a fixed stratified fifth. data_dir is not used.
    """
    from sklearn.datasets import load_digits  # here: they would slow down every start
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).clip(0, 255).astype(np.uint8)  # ink was 0..16
    images = np.repeat(grey[..., None], 3, axis=3)
    labels = digits.target.astype(np.int64)
    order = np.arange(len(labels))
    parts = train_test_split(order, test_size=0.2, random_state=0, stratify=labels)
    train, test = map(np.sort, parts)
    return Raw(
        train=images[train],
        train_labels=labels[train],
        test=images[test],
        test_labels=labels[test],
        classes=tuple(map(str, digits.target_names)),
    )
