"""Fixtures of more than one test file."""

import os

import pytest
from forks import Forks

# Before anything imports torch: the images are tiny, and pytest-xdist uses the cores already.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def forks():
    """The process that runs scripts without their imports: see forks.py."""
    with Forks() as running:
        yield running
