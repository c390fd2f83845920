"""A whole run on the GPU by default settings, compiled, and with images that the GPU decodes."""

import csv
import json
import math

import pytest

from itpn.tasks.configs import (
    OptimizerConfig,
    PretrainingConfig,
    PretrainingDataConfig,
    PretrainingModelConfig,
    TrainerConfig,
)
from itpn.tasks.run import train

GPU = pytest.mark.gpu


@pytest.mark.parametrize(
    ("accelerator", "decode"),
    [("cpu", "workers"), pytest.param("gpu", "workers", marks=GPU), pytest.param("gpu", "gpu", marks=GPU)],
)
def test_a_run(photos, tmp_path, capsys, accelerator, decode):
    config = PretrainingConfig(
        model=PretrainingModelConfig(
            "itpn_nano", patch_size=8, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2
        ),
        data=PretrainingDataConfig(root=(str(photos),), img_size=32, batch_size=8, num_workers=0, decode=decode),
        optimizer=OptimizerConfig(lr=1e-3),
        trainer=TrainerConfig(max_steps=6, log_every_n_steps=2, visualize_every_n_steps=3, accelerator=accelerator),
        output_dir=str(tmp_path),
    )
    run = train(config, "test")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == 6
    assert summary["images_seen"] == 48
    assert summary["images_skipped"] == 0
    with (run / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert ("compiled in" in capsys.readouterr().out) == (accelerator == "gpu")
    assert summary["precision"] == ("bf16-mixed" if accelerator == "gpu" else "32-true")
