"""Boxes and masks in small images, such as the generated sample set's, on a laptop."""

from itpn.tasks.detection.recipes import nano_detection

config = nano_detection()
