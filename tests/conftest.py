import numpy as np
import pytest
from PIL import Image

from itpn.errors import RunStopped
from itpn.tasks.configs import (
    OptimizerConfig,
    PretrainingConfig,
    PretrainingDataConfig,
    PretrainingModelConfig,
    RunConfig,
    TrainerConfig,
)
from itpn.tasks.run import train
from itpn.training.stopping import StopRequest


@pytest.fixture
def train_until(monkeypatch):
    """Stops a run after a step, as Ctrl-C does."""

    def run(config: RunConfig, step: int) -> None:
        decide = StopRequest.decide

        def stop(self, training):
            if training.step == step:
                self.signum = 2
            return decide(self, training)

        with monkeypatch.context() as patched:
            patched.setattr(StopRequest, "decide", stop)
            with pytest.raises(RunStopped):
                train(config, "test")

    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """26 small images of blurred noise."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(26):
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((45, 36), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def settings(photos, tmp_path):
    """A run of 3 epochs of 6 steps that takes a second."""

    def make(**trainer) -> PretrainingConfig:
        return PretrainingConfig(
            model=PretrainingModelConfig(
                name="itpn_nano",
                patch_size=8,
                decoder_embed_dim=32,
                decoder_depth=1,
                decoder_num_heads=2,
                drop_path_rate=0.1,
            ),
            data=PretrainingDataConfig(root=(str(photos),), img_size=32, batch_size=4, num_workers=0),
            optimizer=OptimizerConfig(lr=1e-3),
            trainer=TrainerConfig(
                max_epochs=3, log_every_n_steps=1, checkpoint_every_n_steps=100, visualize_every_n_steps=100, **trainer
            ),
            output_dir=str(tmp_path / "runs"),
        )

    return make
