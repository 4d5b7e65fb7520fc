"""LfOSA: active learning for open-set annotation (Ning et al., CVPR 2022, algorithm 1).

Each round trains a detector with K + 1 outputs, the last of which stands for unknown images, and a
K-way classifier. Then it queries the images that are most probably known, judged by the detector's
max activation values. The baselines are in AL_center.py.
"""

import torch

import utils


def main() -> None:
    run = utils.start(__doc__, detector=True)
    K = run.data.num_known

    # The loss divides an image's logits by the temperature of its class.
    detector_T = [run.args.known_T] * K + [run.args.unknown_T]
    classifier_T = [run.args.modelB_T] * K

    for split in run.rounds():
        # Detector: the K known classes and, as class K, the invalid images.
        seen = torch.cat([split.labeled, split.invalid])
        detector = run.train("detector", K + 1, seen, detector_T)

        # Classifier: the known classes alone.
        classifier = run.train("classifier", K, split.labeled, classifier_T)
        accuracy = run.evaluate(classifier)

        # Active sampling: the images of the pool that are most probably known.
        queried = run.query(split, detector, classifier)

        # The oracle: known images become labeled, unknown ones invalid.
        run.end_round(accuracy, queried)


if __name__ == "__main__":
    utils.run_script(main)
