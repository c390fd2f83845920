"""The first contact with a GPU: a recipe by its default settings for some steps, then with images that the GPU decodes.

    python benchmarks/first_run.py PHOTOS
    PYTHONPATH=src python3 benchmarks/first_run.py PHOTOS --batch-size 48 --steps 50

PHOTOS is any folder of photographs; with fewer images than a batch, batches are smaller. For each run it prints images
a second, device, versions and the last loss. A run that fails is named, and makes the exit code 1.
"""

import argparse
import json
import platform
import tempfile

import torch
from arms import Failures

from itpn.data.files import find_training_images
from itpn.tasks.configs import PretrainingConfig
from itpn.tasks.recipe_files import read_recipe
from itpn.tasks.run import train

RECIPE = "itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="folder of photographs")
    parser.add_argument("--recipe", default=RECIPE, help="of a pre-training (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, help="default: the recipe's, or all photographs where they are fewer")
    parser.add_argument("--num-workers", type=int, help="default: the recipe's")
    parser.add_argument("--img-size", type=int, help="default: the recipe's")
    parser.add_argument("--decode", nargs="+", choices=("workers", "gpu"), help="default: both where there is a GPU")
    parser.add_argument("--out", help="folder of the runs (default: one that is removed)")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"device: {torch.cuda.get_device_name() if cuda else 'no GPU'}")
    failures = Failures()
    with tempfile.TemporaryDirectory() as folder:
        for decode in options.decode or (("workers", "gpu") if cuda else ("workers",)):
            with failures.of(f"--data.decode {decode}"):
                run_once(options, decode, options.out or folder)
    failures.end()


def run_once(options: argparse.Namespace, decode: str, folder: str) -> None:
    """Train, and print a line of results and one of versions."""
    recipe, config = read_recipe(options.recipe)
    assert isinstance(config, PretrainingConfig), "give a recipe of pre-training"
    config.data.root, config.data.decode = (options.photos,), decode  # type: ignore[assignment]
    for name in ("batch_size", "num_workers", "img_size"):
        if getattr(options, name) is not None:
            setattr(config.data, name, getattr(options, name))
    config.trainer.max_steps = options.steps
    config.output_dir, config.name = folder, f"decode-{decode}"
    images = len(find_training_images(config.data.root).images)
    summary = json.loads((train(config, recipe) / "summary.json").read_text())
    print(
        f"--data.decode {decode}: {summary['steps']} steps on {images} photographs, "
        f"{summary['images_per_second']:.1f} images/s, {summary['data_wait_fraction']:.1%} waiting for data, "
        f"loss {summary['metrics']['loss']:.4f}, {summary['peak_memory_gb']:.2f} GB, {summary['precision']}, "
        f"{summary['device']}"
    )
    print(f"versions: {', '.join(f'{name} {version}' for name, version in summary['versions'].items())}", flush=True)


if __name__ == "__main__":
    main()
