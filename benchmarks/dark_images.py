"""Which target is right for dark and flat images? Pre-training, reconstructions, then detection with few labels.

    python benchmarks/dark_images.py shared/data/nuclei/dsb2018

The folder holds `train`, `val` and `annotations/instances_{train,val}.json`. Each arm pre-trains the same network with
the same images, crops and masks; only mean and std of the images, and the target, differ. Then masked patches of the
validation images are reconstructed, and a detector is fine-tuned from the weights with a fraction of the labels, with
the same steps and augmentation as from scratch. Metrics go to OUT/targets.csv and OUT/detection.csv, reconstructions
into the folder of each run.
"""

import argparse
import json
from pathlib import Path

import torch
from arms import Failures, show_means, write_rows
from rich.console import Console
from rich.table import Table
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from itpn.checkpoints.load import load
from itpn.data.augment import center_crop
from itpn.data.decode import decode_image
from itpn.data.image_type import Pixels
from itpn.data.normalize import Normalize
from itpn.masked.targets import normalize_patches, patchify
from itpn.tasks.recipe_files import read_recipe
from itpn.tasks.run import train

# by name: the data's mean and std instead of ImageNet's, and settings of the target
ARMS = {
    "published": (False, {}),
    "data": (True, {}),
    "imagenet, channel": (False, {"norm_pix_per": "channel"}),
    "data, channel": (True, {"norm_pix_per": "channel"}),
    "data, channel, 0.05": (True, {"norm_pix_per": "channel", "norm_pix_floor": 0.05}),
    "data, channel, 0.1": (True, {"norm_pix_per": "channel", "norm_pix_floor": 0.1}),
    "data, channel, 0.2": (True, {"norm_pix_per": "channel", "norm_pix_floor": 0.2}),
    "data, patch, 0.1": (True, {"norm_pix_floor": 0.1}),
    "data, not normalized": (True, {"norm_pix_loss": False}),
}
COLUMNS = ("offsets", "noise", "content", "kept", "R2", "R2 structure")
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def read_images(folder: Path) -> list[Tensor]:
    """uint8 [3, H, W] each."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg"))
    return [decode_image(path.read_bytes()) for path in files]


def measure_statistics(images: list[Tensor]) -> Statistics:
    """Mean and std of each channel, of pixels in [0, 1]."""
    mean = torch.stack([image.double().mean(dim=(1, 2)) for image in images]).mean(dim=0) / 255
    square = torch.stack([image.double().square().mean(dim=(1, 2)) for image in images]).mean(dim=0) / 255**2
    return tuple(mean.tolist()), tuple((square - mean**2).sqrt().tolist())


def cut_crops(images: list[Tensor], size: int) -> Tensor:
    """Parts of each image, a third of its short side wide: uint8 [n, 3, size, size]."""
    crops = []
    for image in images:
        side = min(image.shape[1:]) // 3
        corners = [
            (top, left)
            for top in range(0, image.shape[1] - side + 1, side)
            for left in range(0, image.shape[2] - side + 1, side)
        ]
        crops += [center_crop(image[:, top : top + side, left : left + side], (size, size)) for top, left in corners]
    return torch.stack(crops)


def divide_target(images: list[Tensor], arm: str, own: Statistics, data: Statistics) -> dict[str, float]:
    """What the squared target of whole images of 64 px consists of: the channels' offsets, noise of flat patches (whose
    std is below a twentieth of the data's), and the rest, which is content; "kept" is the mean square of patches with a
    fifth of the data's std or more.
    """
    config = read_recipe("itpn-pixel_nano")[1].model
    settings = {"norm_pix_loss": True, "norm_pix_per": "patch", "norm_pix_floor": 0.0} | ARMS[arm][1]
    crops = torch.stack([center_crop(image, (64, 64)) for image in images])
    pixels = patchify(Normalize(Pixels(mean=own[0], std=own[1]))(crops), config.patch_size)
    if settings["norm_pix_loss"]:
        channels = 3 if settings["norm_pix_per"] == "channel" else 1
        pixels = normalize_patches(pixels, channels, settings["norm_pix_floor"])[0]
    target = pixels.unflatten(-1, (-1, 3))  # [n, N, p * p, C]
    shown = patchify(Normalize(Pixels(mean=data[0], std=data[1]))(crops), config.patch_size).unflatten(-1, (-1, 3))
    std = shown.std(dim=2).mean(dim=-1)
    mean = target.mean(dim=2, keepdim=True)
    total, varying = target.square().sum(), (target - mean).square()
    offsets, noise = float(1 - varying.sum() / total), float(varying[std < 0.05].sum() / total)
    return {
        "offsets": offsets,
        "noise": noise,
        "content": 1 - offsets - noise,
        "kept": float(varying[std > 0.2].mean()),
    }


def explain_content(checkpoint: Path, crops: Tensor, own: Statistics, data: Statistics) -> dict[str, float]:
    """R2 of reconstructed patches that hold content: their std is above a tenth of the data's.

    Mean and std of a normalized patch are given to the reconstruction, so that only what is predicted counts. "R2" is
    of the pixels as they are seen, with wrong offsets of the channels; "R2 structure" is of what remains without these.
    """
    model = load(str(checkpoint)).eval()
    to_input, scale = Normalize(Pixels(mean=own[0], std=own[1])), torch.tensor(data[1])[:, None, None]
    torch.manual_seed(0)
    total, seen, structure = (0.0,) * 3
    for batch in crops.split(64):
        x = to_input(batch)
        mask = model.draw_mask(len(x), model.backbone.grid_of(x.shape[-2:]))
        filled = model.reconstruct(x, mask)[1]
        # in units of the data's std, whatever the network saw: [n, N, p * p, C]
        true, ours = (
            patchify((image * to_input.std / scale), model.backbone.patch_size).unflatten(-1, (-1, 3))
            for image in (x, filled)
        )
        picked = mask & (true.std(dim=2).mean(dim=-1) > 0.1)
        true, ours = true[picked], ours[picked]
        centred = true - true.mean(dim=1, keepdim=True)
        total += float(centred.square().sum())
        seen += float((true - ours).square().sum())
        structure += float((centred - ours + ours.mean(dim=1, keepdim=True)).square().sum())
    return {"R2": 1 - seen / total, "R2 structure": 1 - structure / total}


def pretrain(arm: str, options: argparse.Namespace, own: Statistics, seed: int) -> Path:
    recipe, config = read_recipe("itpn-pixel_nano")
    for name, value in ({"norm_pix_per": "patch"} | ARMS[arm][1]).items():
        setattr(config.model, name, value)
    config.data.root, (config.data.mean, config.data.std) = (str(options.data / "train"),), own
    config.data.batch_size, config.data.num_workers = options.batch_size, 0
    config.data.crop_scale = tuple(options.crop_scale)
    config.optimizer.lr = options.lr
    config.trainer.max_epochs, config.trainer.max_steps = 10**6, options.steps
    config.trainer.checkpoint_every_n_steps = 10**6
    config.seed, config.name, config.output_dir = seed, f"{arm}-{seed}", str(options.out)
    return train(config, recipe)


def detect(arm: str, options: argparse.Namespace, checkpoint: Path | None, own: Statistics, fraction: float, seed: int):
    """Box AP and AP50 on the validation images, of the last step."""
    recipe, config = read_recipe("detector_nano")
    config.model.masks = False
    config.data.root, config.data.img_size, config.data.batch_size = str(options.data), options.detector_size, 4
    config.data.max_size, config.data.num_workers = options.detector_size * 3 // 2, 0
    config.data.label_fraction, config.data.rotate90 = fraction, True
    config.trainer.max_epochs, config.trainer.max_steps = 10**6, options.detector_steps
    config.trainer.visualize_every_n_steps = config.evaluation.every_n_epochs = 10**6  # both at the end
    config.trainer.checkpoint_every_n_steps = 10**6
    config.seed, config.name, config.output_dir = seed, f"{arm}-{fraction:g}-{seed}", str(options.out)
    config.optimizer.lr = options.detector_lr[arm == "scratch"]
    if checkpoint is None:
        config.model.scratch, config.model.name, config.model.patch_size = True, "itpn_nano", 8
        config.data.mean, config.data.std = own
        config.optimizer.layer_decay = None  # which is for layers that know something
    else:
        config.model.checkpoint = str(checkpoint)
    metrics = json.loads((train(config, recipe) / "summary.json").read_text())["metrics"]
    return {name: metrics[f"val_box_{name.lower()}"] for name in ("AP", "AP50")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--arms", nargs="+", choices=["scratch", *ARMS], default=["scratch", *ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=300, help="0 for no pre-training, and no detector")
    parser.add_argument("--batch-size", type=int, default=32)
    # of 0.2 and less a nucleus covers several patches, of which some are visible
    parser.add_argument("--crop-scale", nargs=2, type=float, default=[0.05, 0.2])
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--label-fractions", nargs="+", type=float, default=[0.05, 0.2, 1.0])
    parser.add_argument("--detector-steps", type=int, default=300, help="0 for no detector")
    parser.add_argument("--detector-size", type=int, default=192)
    parser.add_argument("--detector-lr", nargs=2, type=float, default=[1e-3, 1e-3], help="pre-trained, from scratch")
    parser.add_argument("--out", type=Path, default=Path("runs/dark_images"))
    options = parser.parse_args()
    images = read_images(options.data / "train")
    data = measure_statistics(images)
    crops = cut_crops(read_images(options.data / "val"), 64)
    rows, found, failures = list[dict](), list[dict](), Failures()
    for seed in options.seeds:
        for arm in options.arms:
            with failures.of(f"{arm}, seed {seed}"):
                own = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
                if arm == "scratch" or ARMS[arm][0]:
                    own = data
                weights = None
                if arm != "scratch":
                    row = {"arm": arm, "seed": seed, **dict.fromkeys(COLUMNS, float("nan"))}
                    rows.append(row | divide_target(images, arm, own, data))
                    if options.steps:
                        weights = pretrain(arm, options, own, seed) / "model.safetensors"
                        rows[-1] |= explain_content(weights, crops, own, data)
                    Console().print(rows[-1])
                    write_rows(rows, options.out / "targets.csv")
                for fraction in options.label_fractions if options.steps and options.detector_steps else ():
                    metrics = detect(arm, options, weights, own, fraction, seed)
                    found.append({"arm": arm, "fraction": fraction, "seed": seed, **metrics})
                    Console().print(found[-1])
                    write_rows(found, options.out / "detection.csv")
    table = Table("arm", *COLUMNS, title=f"{options.steps} steps, mean over seeds {options.seeds}")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own_rows = [row for row in rows if row["arm"] == arm]
        table.add_row(arm, *(f"{sum(row[name] for row in own_rows) / len(own_rows):.3f}" for name in COLUMNS))
    Console().print(table)
    for name in ("AP", "AP50") if found else ():
        title = f"box {name} in %, {options.detector_steps} steps"
        show_means(found, name, options.arms, options.label_fractions, title)
    failures.end()


if __name__ == "__main__":
    main()
