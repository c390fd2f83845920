"""What `pip install` brings works away from the checkout: recipes are found and train."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]


def test_a_wheel_trains_in_an_empty_folder(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("itpn-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert (tmp_path / "site/itpn/py.typed").is_file()  # type checkers use our annotations
    [about] = (tmp_path / "site").glob("itpn-*.dist-info")
    assert "Author: itpn contributors\n" in (about / "METADATA").read_text(encoding="utf-8")
    assert (about / "licenses/LICENSE").is_file()
    empty = tmp_path / "empty"
    (empty / "photos").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(empty / "photos" / f"{i}.jpg")

    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    where = subprocess.run(
        [sys.executable, "-c", "import itpn; print(itpn.__file__)"], cwd=empty, env=env, check=True, capture_output=True
    )
    assert str(tmp_path / "site") in where.stdout.decode()
    options = "--data.root photos --data.num-workers 0 --trainer.max-steps 1 --data.img-size 32"
    command = [sys.executable, "-m", "itpn", "train", "itpn-pixel_nano", *options.split()]
    subprocess.run(command, cwd=empty, env=env, check=True, capture_output=True)
    assert (empty / "runs/itpn-pixel_nano/default/model.safetensors").is_file()


def test_the_workflow_runs_what_ci_runs_with_every_declared_python():
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    commands = [line for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines() if line.startswith("make")]
    assert commands
    assert {f"{command} PYTHON=python" for command in commands} <= set(steps)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    assert pythons == re.findall(r"Python :: (3\.\d+)", project)
    assert f'requires-python = ">={pythons[0]}"' in project
    assert f'"torch>={jobs["compile"]["strategy"]["matrix"]["torch"][0]}"' in project
