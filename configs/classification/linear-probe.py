"""A linear classifier on the frozen features of any checkpoint, in one go."""

from itpn.tasks.classification.recipes import linear_probe

config = linear_probe()
