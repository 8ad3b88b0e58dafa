import pytest


@pytest.fixture(scope="session")
def two_processes(pair):
    """A function that calls ``function(rank, *arguments)`` in two connected processes and returns both results."""
    return pair
