"""The training engine: from a config to a Lightning Trainer, a run folder and what stands in it."""
