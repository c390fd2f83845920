"""Integers of 32 bits as numbers from 0 to 1: float32 holds only 24 of their bits."""

import numpy as np
import pytest
import torch

from itpn.data.channels import find_percentiles, is_valid, scale_channels
from itpn.tasks.source_images import find_missing

MOST = 2**31 - 1


def stored(values: object, dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype)).reshape(1, 1, -1)


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
@pytest.mark.parametrize("low", [1_000_000_000, 999_999_999.5])
def test_the_low_end_is_subtracted_exactly(dtype, low):
    values = np.arange(1_000_000_000, 1_000_000_101)
    scaled = scale_channels(stored(values, dtype), [0], (low,), (low + 100,))
    assert scaled.dtype == torch.float32
    assert np.allclose(scaled.flatten(), ((values - low) / 100).clip(0, 1), atol=1e-6)


def test_low_and_high_of_each_channel():
    images = torch.tensor([1_000_000_050, 30, 5], dtype=torch.int32).reshape(3, 1, 1)
    scaled = scale_channels(images, [2, 0], (1e9, 0.0, 0.0), (1e9 + 100, 1.0, 10.0))
    assert scaled.flatten().tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("dtype", "nodata"), [("int32", MOST), ("int32", -MOST - 1), ("uint32", 2**32 - 1)])
def test_neighbours_of_no_data_have_data(dtype, nodata):
    near = 1 if nodata < 0 else -1
    image = stored([nodata, nodata + near, nodata + 100 * near, 7], dtype)
    assert is_valid(image, float(nodata)).flatten().tolist() == [False, True, True, True]
    assert find_missing(image, float(nodata)).flatten().tolist() == [True, False, False, False]
    assert not find_missing(image, None).any()
    scaled = scale_channels(image, [0], (-MOST - 1.0,), (2.0**32,), float(nodata)).flatten()
    assert scaled[0] == 0
    assert (scaled[1:] > 0).any()
    assert find_percentiles(image[..., :3], (0.0, 100.0), float(nodata)) == (
        [float(min(nodata + near, nodata + 100 * near))],
        [float(max(nodata + near, nodata + 100 * near))],
    )


def test_percentiles_of_large_numbers():
    values = stored(np.arange(1_000_000_000, 1_000_000_101), "uint32")
    assert find_percentiles(values, (1.0, 99.0)) == ([1_000_000_001.0], [1_000_000_099.0])
    assert find_percentiles(stored([5, 5], "int32"), (1.0, 99.0), 5) == ([0.0], [1.0])


def test_an_infinite_value_is_no_data():
    image = torch.tensor([float("nan"), float("inf"), 1.0]).reshape(1, 1, 3)
    assert find_missing(image, -9999).flatten().tolist() == [True, True, False]
