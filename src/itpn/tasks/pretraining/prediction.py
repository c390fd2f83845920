"""Original, masked and predicted images, or features as colours: of `itpn predict`, and while a run is trained."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from itpn.checkpoints.files import Checkpoint
from itpn.data.files import ImageSource
from itpn.data.pixels import resize_pixels
from itpn.masked.masked_model import MaskedImageModel
from itpn.masked.targets import IMAGE_TARGETS
from itpn.tasks.display import make_display
from itpn.tasks.drawing import caption_files, show, tile_images
from itpn.tasks.pixels import stored_read_settings
from itpn.tasks.prediction import PredictionOptions, read_batches, read_preprocessing, save_image
from itpn.tasks.pretraining.config import PretrainingConfig
from itpn.tasks.pretraining.data import PretrainingData, read_samples
from itpn.tasks.pretraining.module import PretrainingModule
from itpn.training.config import freeze, from_dict


def predict(model: MaskedImageModel, checkpoint: Checkpoint, source: ImageSource, options: PredictionOptions) -> None:
    """Write images of what the model predicts for masked patches."""
    crop, normalize = read_preprocessing(checkpoint, model)
    config = from_dict(checkpoint.settings, PretrainingConfig) if checkpoint.settings else PretrainingConfig()
    mean, std = (tuple(values.flatten().tolist()) for values in (normalize.mean, normalize.std))
    network = replace(config.model, in_chans=model.backbone.in_chans)
    config = replace(config, seed=options.seed, model=network, data=replace(config.data, mean=mean, std=std))
    module = PretrainingModule(model, freeze(config), "predict")
    reading = stored_read_settings(checkpoint, options.max_pixels)
    for number, (names, images) in enumerate(read_batches(source, crop, reading)):
        save_image(draw_predictions(module, images, captions=caption_files(names)), options.out, number)


def build_visualization(
    module: PretrainingModule, config: PretrainingConfig, data: PretrainingData
) -> Callable[[], Image.Image]:
    """Draws the same images at every call."""
    make_display(config)  # which finds wrong channels before the first step
    samples = functools.cache(lambda: read_samples(data.windows or data.train, config))
    return lambda: draw_predictions(module, samples())


def draw_predictions(
    module: PretrainingModule, images: Tensor, sets: int = 2, captions: Sequence[str] = ()
) -> Image.Image:
    """Rows of original, masked and predicted images, the latter with the visible patches kept. A model that predicts no
    pixels shows its first loss instead: target (where there is one) and prediction, three principal components as
    colours.

    Args:
        images: [n, C, H, W] as they are stored.
        sets: rows side by side.
        captions: below the original images.
    """
    columns = mask_and_predict(module, images)
    below = [text for caption in captions for text in (caption, *[""] * (len(columns) - 1))]
    tiles = [show(image) for row in zip(*columns.values(), strict=True) for image in row]
    titles = list(columns) * min(sets, len(images))
    return tile_images(tiles, titles, per_row=len(titles), side=None, captions=below)


def mask_and_predict(module: PretrainingModule, images: Tensor) -> dict[str, Tensor]:
    """The columns of :func:`draw_predictions` by title, uint8 [n, 3, H, W] each.

    The same images get the same masks, so that visualizations of a run can be compared.
    """
    display = make_display(module.config).fit(images)
    images = images.to(module.device)
    original, x = display(images), module.normalize(images)
    grid = module.model.backbone.grid_of(x.shape[-2:])
    generator = torch.Generator().manual_seed(module.config.seed)
    mask = module.model.draw_mask(len(x), grid, generator=generator).to(x.device)
    if "pixel" in module.model.objective.weights:
        reconstructed = module.model.reconstruct(x, mask, module.normalize.find_valid(images))
        masked, predicted = (display(module.normalize.undo(own)) for own in reconstructed[:2])
        return {"original": original, "masked": masked, "predicted": predicted}
    masked = display(module.normalize.undo(x.masked_fill(module.model.mask_map(mask, grid), 0.0)))
    return {"original": original, "masked": masked, **_draw_features(module, images, x, mask, grid)}


def _draw_features(
    module: PretrainingModule, images: Tensor, x: Tensor, mask: Tensor, grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Feature maps as images, uint8 [n, 3, H, W]."""
    batch = {"image": images}
    if module.teacher_size is not None:
        size, nodata = module.teacher_size, module.normalize.pixels.nodata
        batch["teacher_image"] = torch.stack([resize_pixels(image, size, nodata=nodata) for image in images])
    output = module.model.forward_eval(x, mask, module.make_targets(batch, x))
    prediction = output.prediction.float()  # [n, N, D]
    target = prediction if output.target is None else output.target
    flat = target.flatten(0, 1)
    mean = flat.mean(dim=0)
    with torch.random.fork_rng(devices=[]):  # the decomposition starts from random numbers
        torch.manual_seed(0)
        _, _, axes = torch.pca_lowrank((flat - mean).cpu(), q=min(6, *flat.shape), center=False)
    axes = F.pad(axes[:, :3], (0, max(0, 3 - axes.shape[1]))).to(x.device)  # a single patch has one
    spread = (2 * ((flat - mean) @ axes).std(dim=0)).clamp(min=1e-6)  # two std span a colour's range
    # which loss they are of: the first, whose error is there if its target is
    name = next(iter(output.losses)) if output.target is not None else ""
    titles = (f"target {name}", f"predicted {name}")
    if name not in IMAGE_TARGETS:
        titles = ("teacher's features", "predicted features")
    columns = {titles[0]: target} if output.target is not None else {}
    columns[titles[1]] = prediction

    def paint(features: Tensor) -> Tensor:
        colours = (((features - mean) @ axes) / spread * 0.5 + 0.5).clamp(0, 1) * 255  # [n, N, 3]
        maps = colours.round().to(torch.uint8).transpose(1, 2).unflatten(2, grid)
        side = module.model.backbone.patch_size
        return maps.repeat_interleave(side, 2).repeat_interleave(side, 3)

    return {title: paint(features) for title, features in columns.items()}
