import pytest

from tests.processes import Pair


@pytest.fixture(scope="session")
def two_processes():
    """Call it with a function and its arguments: the results of ``function(rank, *arguments)`` in two processes."""
    pair = Pair()
    yield pair
    pair.close()
