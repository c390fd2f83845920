"""Classes of pixels in small images, such as the generated sample set's, on a laptop."""

from itpn.tasks.segmentation.recipes import nano_segmentation

config = nano_segmentation()
