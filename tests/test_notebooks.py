"""Every notebook runs from top to bottom."""

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb")))
def test_notebook_runs(notebook):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    read = nbformat.read(ROOT / "notebooks" / notebook, as_version=4)
    nbclient.NotebookClient(read, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
