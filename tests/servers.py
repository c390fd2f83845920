"""A process that has imported torch, which takes seconds, and from which tests fork others before it has threads."""

import multiprocessing

# what an import would take of the memory that tests/security allows
PRELOAD = [
    *("itpn.cli", "itpn.data.annotations", "itpn.data.labelled", "itpn.data.labelmaps", "itpn.checkpoints.load"),
    *("itpn.tasks.run", "itpn.tasks.classification.prediction", "itpn.tasks.detection.prediction"),
    "itpn.data.shrinking",
    *("supervision.dataset.formats.yolo", "supervision.dataset.formats.pascal_voc", "defusedxml.ElementTree"),
]
servers = multiprocessing.get_context("forkserver")
servers.set_forkserver_preload(PRELOAD)
