"""Two processes against one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).parent / "models" / "gradient_of_heads.py"


def compare_processes(given: dict[str, Any], folder: Path) -> int:
    """A training step in one process and in two: the same gradients and statistics of batch norm.

    Returns:
        How many batch norms there are.
    """
    torch.save(given, folder / "given.pt")
    results = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        out = folder / f"{len(results)}.pt"
        command = [sys.executable, *launcher, SCRIPT, folder / "given.pt", out]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        results.append(torch.load(out, weights_only=True))
    one, two = results
    largest = max(gradient.norm() for gradient in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        # a bias before batch norm has no gradient but rounding
        assert (two["gradients"][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12 * largest, name
    changed = 0
    for name, buffer in one["buffers"].items():
        assert torch.allclose(two["buffers"][name].float(), buffer.float(), rtol=1e-5, atol=1e-7), name
        changed += name.endswith("running_mean")
    return changed
