"""What a training step of a detector takes: memory at its peak, and time, for one image of full size.

python benchmarks/detector.py mask-rcnn_itpn-pixel-base_1x_coco --checkpointing
"""

import argparse
import time

import numpy as np
import torch
from rich.console import Console
from torchvision.ops import masks_to_boxes

from itpn.data.scenes import draw_scene
from itpn.models.detector import Detector
from itpn.tasks.configs import DetectionConfig
from itpn.tasks.detection.network import build_recipe
from itpn.tasks.recipe_files import read_recipe
from itpn.training.launch import device_name, peak_memory_gb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--model", help="where the recipe leaves it to a checkpoint")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--checkpointing", action="store_true", help="of activations")
    parser.add_argument("--relative", action="store_true", help="positions, as CLIP supervision has them")
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    _, config = read_recipe(options.recipe)
    assert isinstance(config, DetectionConfig)
    config.model.name, config.model.scratch = options.model or config.model.name, True
    config.model.rel_pos_bias = options.relative
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = build_recipe(config, None, None)
    assert isinstance(model, Detector)
    model.set_grad_checkpointing(options.checkpointing)
    model.transform.in_training = False
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), config.optimizer.lr, fused=True)
    scene = draw_scene(0, "train", 0, img_size=(options.height, options.width))
    image = torch.from_numpy(scene.image).permute(2, 0, 1).float().to(device) / 255
    masks = torch.from_numpy(np.stack([one.mask for one in scene.instances])).to(torch.uint8)
    boxes = masks_to_boxes(masks)
    target = {"boxes": boxes, "labels": torch.ones(len(masks), dtype=torch.int64), "masks": masks}
    target = {name: value.to(device) for name, value in target.items()}
    for step in range(options.steps):
        begin = time.perf_counter()
        loss = torch.stack(list(model([image], [target]).values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cells = f"loss {loss.item():.2f}, {time.perf_counter() - begin:.1f} s, peak {peak_memory_gb(device):.2f} GB"
        Console().print(f"step {step}: {cells}, {device_name(device)}")


if __name__ == "__main__":
    main()
