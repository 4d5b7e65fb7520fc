"""Fixtures of more than one test file."""

import pytest
from forks import Forks


@pytest.fixture(scope="session")
def forks():
    """The process that runs scripts without their imports: see forks.py."""
    with Forks() as running:
        yield running
