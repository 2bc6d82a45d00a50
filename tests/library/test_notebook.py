"""docs/library.ipynb runs from its first cell to its last, and shows pictures."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "docs" / "library.ipynb"


def test_the_notebook(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits-mirai-e").symlink_to(finished)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [[output for output in cell.outputs if output.output_type != "stream"] for cell in code]
    sheet = Image.open(io.BytesIO(base64.b64decode(outputs[1][0].data["image/png"])))
    assert sheet.size[1] == 10 * (64 + 2) + 2  # ten rows of digits of 8 pixels, enlarged to 64
    assert 8 * 66 + 2 < sheet.size[0] < 8 * 66 + 2 + 60  # eight of them and the class
    assert "image/png" in outputs[3][0].data
    loss, cosines = eval(outputs[4][0].data["text/plain"])
    assert loss == pytest.approx(-2 * sum(cosines), abs=1e-5)


def test_what_is_committed_was_run() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
