import pytest


@pytest.fixture(scope="session")
def two_processes(pair):
    """Call it with a function and its arguments: the results of ``function(rank, *arguments)`` in two processes."""
    return pair
