"""HiViT-small from scratch, ImageNet-1K classification, 300 epochs on 8 GPUs."""

from itpn.tasks.classification.recipes import from_scratch

config = from_scratch("hivit_small", drop_path_rate=0.3)
