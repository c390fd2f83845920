"""What gives targets: networks of timm, folders of transformers, and the EMA of the network itself."""

AUTO = "auto"  # the name of a teacher that its checkpoint says
