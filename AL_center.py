"""Baselines for open-set active learning: one classifier is trained, evaluated and queried.

Each round trains a new K-way classifier on the labeled images, evaluates it, and has a query
strategy choose the images whose labels the oracle gives. LfOSA itself is AL_center_temperature.py.
"""

import utils


def main() -> None:
    run = utils.start(__doc__, detector=False)
    K = run.data.num_known

    for split in run.rounds():
        # Classifier: the known classes, on the images labeled so far.
        classifier = run.train("classifier", K, split.labeled)
        accuracy = run.evaluate(classifier)

        # Query: the images of the pool that the strategy chooses.
        queried = run.query(split, classifier)

        # The oracle: known images become labeled.
        run.end_round(accuracy, queried)


if __name__ == "__main__":
    utils.run_script(main)
