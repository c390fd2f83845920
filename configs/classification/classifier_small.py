"""A classifier of your own images, a folder for each class, from any checkpoint."""

from itpn.tasks.classification.recipes import small_fine_tuning

config = small_fine_tuning()
