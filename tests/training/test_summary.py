"""The table at the end of a run."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from itpn.system.console import Output
from itpn.training.summary import print_summary


@pytest.mark.parametrize(("epochs", "shown"), [(1, "36 (1 epoch)"), (2.5, "36 (2.5 epochs)"), (0.5, "36 (0.5 epochs)")])
def test_epochs_and_paths(epochs, shown):
    page = io.StringIO()
    folder = Path("/data/" + "experiments/" * 8)
    files = SimpleNamespace(weights=folder / "model.safetensors", summary=folder / "summary.json")
    run = SimpleNamespace(job=SimpleNamespace(evaluation=None), folder=files, console=Output(file=page, width=80))
    summary = {"steps": 36, "epochs": epochs, "metrics": {}, "images_seen": 1, "images_skipped": 0}
    summary |= {"images_per_second": 1.0, "data_wait_fraction": 0.0, "peak_memory_gb": 1.0, "duration_seconds": 1.0}
    log: Any = SimpleNamespace(run=run)
    print_summary(log, summary, folder / "reconstructions/step-00000036.png")
    text = page.getvalue()
    assert shown in text
    for path in (files.weights, files.summary, folder / "reconstructions/step-00000036.png"):
        assert f"{path}\n" in text
