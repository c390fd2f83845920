"""What networks are trained for: one folder and one registered line for each task."""

from itpn.tasks.classification import TASK as CLASSIFICATION
from itpn.tasks.detection import TASK as DETECTION
from itpn.tasks.pretraining import TASK as PRETRAINING
from itpn.tasks.segmentation import TASK as SEGMENTATION
from itpn.tasks.spec import register_task

# a file with tensors of several heads is taken for the first of these
for task in (PRETRAINING, SEGMENTATION, DETECTION, CLASSIFICATION):
    register_task(task)
