"""A classifier of images of 32 px, from any checkpoint."""

from itpn.tasks.classification.recipes import cifar_fine_tuning

config = cifar_fine_tuning()
