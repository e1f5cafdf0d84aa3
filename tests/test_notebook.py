"""The notebook of the docs runs as it is, in a kernel of its own."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from PIL import Image

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def shortened(source: str) -> str:
    """The cell with trainings of a few steps."""
    return source.replace('"train.steps": 300', '"train.steps": 20').replace('"train.steps": 600', '"train.steps": 20')


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the docs folder, as Jupyter starts it; with a kernel of this interpreter, whatever others are installed."""
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    write_kernel_spec(str(tmp_path / "jupyter" / "kernels" / "here"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert sum(shortened(cell.source) != cell.source for cell in notebook.cells) == 2
    for cell in notebook.cells:
        cell.source = shortened(cell.source)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=120, kernel_name="here", resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pngs = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in pngs]
    assert len(pictures) == 2
    assert all(picture.std() > 10 for picture in pictures), "a picture of one colour shows nothing"
    assert sys.executable in (tmp_path / "jupyter" / "kernels" / "here" / "kernel.json").read_text()
    assert list(tmp_path.glob("quickstart_*/exported/config.json"))
