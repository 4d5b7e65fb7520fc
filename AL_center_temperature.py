"""LfOSA: active learning for open-set annotation (Ning et al., CVPR 2022, algorithm 1).

Each round trains a detector with K + 1 outputs, its last class the unknown images queried so far;
queries the images that are most probably known by the detector's max activation values; and
trains and measures a K-way classifier on the labeled images. Baselines are AL_center.py.

example:
  python AL_center_temperature.py --dataset cifar100 --seed 1
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import models
import utils


def main() -> None:
    args = utils.parse_arguments(__doc__, detector=True)
    device = utils.setup_device(args)
    utils.check_files(args)
    data = utils.load(args, device)
    run = utils.start(args, device, data.known)

    # The loss divides an image's logits by the temperature of its class.
    detector_T = [args.known_T] * args.known_class + [args.unknown_T]
    classifier_T = [args.modelB_T] * args.known_class

    while utils.goes_on(run):
        split = run.split
        if run.state["queried"] is None:
            # Open-set detector training: labeled images and, as class K, the invalid ones.
            detector = utils.network(run, "detector", args.known_class + 1, queried=True)
            if utils.reads_network(args):  # all strategies but random
                with utils.training(run, "detector") as hooks:
                    indices = torch.cat([split.labeled, split.invalid])
                    models.train(detector, data, indices, args, temperature=detector_T, **hooks)

            # Active sampling: max activation values of the pool, a Gaussian mixture per predicted
            # class, and the images with the highest probability of being known.
            utils.keep_query(run, utils.query(run, detector, data))

        # Classifier training, on the images labeled before this query: accuracy and query belong
        # to the same round.
        classifier = utils.network(run, "classifier", args.known_class, queried=False)
        with utils.training(run, "classifier") as hooks:
            models.train(classifier, data, split.labeled, args, temperature=classifier_T, **hooks)

        with run.timed("evaluate"):
            accuracy = models.evaluate(classifier, data, args)

        # The oracle tells the labels: known images become labeled, unknown ones invalid.
        utils.end_round(run, accuracy, run.state["queried"], data.known)


if __name__ == "__main__":
    utils.run_script(main)
