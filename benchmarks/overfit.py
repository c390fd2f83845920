"""Can the detector learn a handful of real images by heart? Trains on a few of a COCO folder, evaluates on the same.

python benchmarks/overfit.py COCO --images 5 --steps 300
"""

import argparse
import json
import shutil
from pathlib import Path

from itpn.data.annotations import read_objects
from itpn.tasks.configs import (
    DetectionConfig,
    DetectionDataConfig,
    DetectionEvaluationConfig,
    DetectionModelConfig,
    FineTuningConfig,
)
from itpn.tasks.configs import TrainerConfig as Trainer
from itpn.tasks.run import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of COCO's layout")
    parser.add_argument("--images", type=int, default=5, help="those with the largest objects")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--img-size", type=int, default=256)
    parser.add_argument("--model", default="itpn_nano")
    parser.add_argument("--out", type=Path, default=Path("runs/overfit"))
    options = parser.parse_args()
    folder = pick(options.data, options.images, options.out / "data")
    config = DetectionConfig(
        model=DetectionModelConfig(name=options.model, scratch=True, head_width=64, proposals=200, samples=64),
        data=DetectionDataConfig(
            root=str(folder),
            img_size=options.img_size,
            batch_size=options.images,
            num_workers=0,
            crop_prob=0.0,
            scales=(1.0, 1.0),
        ),
        optimizer=FineTuningConfig(lr=2e-3, warmup_epochs=10, clip_grad=1.0),
        trainer=Trainer(max_epochs=options.steps, log_every_n_steps=10),
        evaluation=DetectionEvaluationConfig(every_n_epochs=50),
        output_dir=str(options.out),
    )
    train(config, "overfit")


def pick(source: Path, count: int, target: Path) -> Path:
    """A folder whose two sets are the same few images."""
    images = read_objects(str(source), "train")
    assert images is not None
    areas = []
    for index in range(len(images)):
        objects = images.objects_of(index)
        whole = float(images.sizes[index].prod())
        areas.append(min((known["area"] / whole for known in objects), default=0.0))
    ids = {int(images.ids[index]) for index in sorted(range(len(images)), key=lambda i: -areas[i])[:count]}
    content = json.loads((source / "annotations" / "instances_train2017.json").read_text())
    content["images"] = [image for image in content["images"] if image["id"] in ids]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in ids]
    (target / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train2017", "val2017"):
        (target / split).mkdir(exist_ok=True)
        for image in content["images"]:
            shutil.copy(source / "train2017" / image["file_name"], target / split)
        (target / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return target


if __name__ == "__main__":
    main()
