"""Two connected processes for the tests of this folder."""

import pytest

from tests.processes import Pair


@pytest.fixture(scope="session")
def pair():
    pair = Pair()
    yield pair
    pair.close()
