"""Baselines for open-set active learning: one classifier is trained, evaluated and queried.

Each round trains a new K-way classifier on the labeled images, measures it, and lets a query
strategy choose the images whose labels the oracle tells. LfOSA itself is AL_center_temperature.py.

example:
  python AL_center.py --dataset cifar100 --query-strategy uncertainty --seed 1
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below, which take seconds: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import models
import utils


def main() -> None:
    args = utils.parse_arguments(__doc__, detector=False)
    device = utils.setup_device(args)
    utils.check_files(args)
    data = utils.load(args, device)
    run = utils.start(args, device, data.known)

    while utils.goes_on(run):
        # Train a classifier from scratch on the labeled images.
        classifier = utils.network(run, "classifier", args.known_class, queried=True)
        with utils.training(run, "classifier") as hooks:
            models.train(classifier, data, run.split.labeled, args, **hooks)

        with run.timed("evaluate"):
            accuracy = models.evaluate(classifier, data, args)

        # Select a query batch from the unlabeled pool.
        queried = utils.query(run, classifier, data)

        # The oracle tells the labels; known images become labeled.
        utils.end_round(run, accuracy, queried, data.known)


if __name__ == "__main__":
    utils.run_script(main)
