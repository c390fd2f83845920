"""`itpn demo`: the whole path on generated images, in minutes on two cores."""

from pathlib import Path

from rich.console import Console

from itpn.data.shapes import write_shapes
from itpn.engine.run import train
from itpn.recipes import read_recipe


def demo(output_dir: Path) -> None:
    """Write the sample set, pre-train itpn_nano on it, and say where everything is.

    Raises:
        UserError: the folder cannot be written.
        RunStopped: as :func:`itpn.engine.run.train`; the same command goes on.
    """
    console = Console()
    folders = write_shapes(output_dir / "shapes", train=1200, val=120, img_size=64)
    console.print(f"sample images: {folders.imagefolder} (also as COCO and ADE20K beside it)", soft_wrap=True)
    recipe, config = read_recipe("itpn-pixel_nano")
    config.data.root = (str(folders.imagefolder),)
    # many small steps: the most to be seen in two minutes on two cores
    config.data.batch_size, config.data.num_workers = 32, 1
    config.optimizer.lr = 1.5e-3
    config.trainer.max_epochs = 10
    config.trainer.devices = 1  # eight GPUs would make few steps of these images
    config.output_dir = str(output_dir)
    run = train(config, recipe)
    console.print(
        f"[bold]look at[/bold] {max((run / 'reconstructions').glob('*.png'))}: three of four units were hidden.\n"
        f"weights: {run / 'model.safetensors'}\ncurves: tensorboard --logdir {run / 'tensorboard'}\n"
        f"your own images: itpn train itpn-pixel_tiny --data.root FOLDER",
        soft_wrap=True,
        highlight=False,
    )
