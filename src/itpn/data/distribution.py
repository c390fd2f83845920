"""The values of a channel over many images: mean, percentiles, and what scaling makes of them."""

import math
from collections.abc import Sequence

import numpy as np


class Distribution:
    """The values of one channel: all of them in a histogram up to 16 bits, a random part of deeper numbers.

    Each value has the same chance to be in that part, whatever image it is of.

    Args:
        dtype: of the values.
        limit: size of the part.
    """

    def __init__(self, dtype: np.dtype, limit: int) -> None:
        self.count, self.minimum, self.maximum = 0, math.inf, -math.inf
        self._mean = self._squares = 0.0
        self._offset = int(np.iinfo(dtype).min) if dtype.kind in "iu" else 0
        self._counts = (
            np.zeros(2 ** (8 * dtype.itemsize), np.int64) if dtype.kind in "iu" and dtype.itemsize < 4 else None
        )
        self._parts: list[np.ndarray] = []
        self._limit = limit
        self._rate = 1.0  # of the values that are kept
        self._rng = np.random.default_rng(0)

    def add(self, values: np.ndarray) -> None:
        """Values [n] of an image."""
        if not values.size:
            return
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))
        mean, squares = float(values.mean(dtype=np.float64)), float(values.var(dtype=np.float64)) * values.size
        total = self.count + values.size
        shift = mean - self._mean
        self._squares += squares + shift**2 * self.count * values.size / total
        self._mean += shift * values.size / total
        self.count = total
        if self._counts is not None:
            self._counts += np.bincount(values.astype(np.int64) - self._offset, minlength=len(self._counts))
        else:
            self._keep(values)

    def _keep(self, values: np.ndarray) -> None:
        """Add a random part of some values; where there are too many then, thin out all of them alike."""
        self._parts.append(self._draw(values, self._rate) if self._rate < 1 else values)
        while (kept := sum(part.size for part in self._parts)) > self._limit:
            rate = 0.9 * self._limit / kept
            self._rate *= rate
            self._parts = [self._draw(part, rate) for part in self._parts]

    def _draw(self, values: np.ndarray, rate: float) -> np.ndarray:
        return values[self._rng.random(values.size, dtype=np.float32) < rate]

    @property
    def mean(self) -> float:
        return self._mean

    @property
    def std(self) -> float:
        return math.sqrt(self._squares / self.count) if self.count else 0.0

    def percentile(self, percents: Sequence[float]) -> list[float]:
        """The values below which so many percent lie; 0 where there are none."""
        if not self.count:
            return [0.0] * len(percents)
        if self._counts is None:
            inner: list[float] = np.percentile(self._values, percents).tolist()
        else:
            ends = np.cumsum(self._counts)
            ranks = np.asarray(percents) / 100 * (self.count - 1)
            inner = (np.searchsorted(ends, ranks, side="right") + self._offset).astype(float).tolist()
        exact = {0.0: self.minimum, 100.0: self.maximum}
        return [exact.get(percent, value) for percent, value in zip(percents, inner, strict=True)]

    def scaled(self, low: float, high: float) -> tuple[float, float]:
        """Mean and std of the values that are clipped to a range and scaled to [0, 1]; 0 and 1 where there are none."""
        if not self.count:
            return 0.0, 1.0
        if self._counts is None:
            values, weights = self._values.astype(np.float64), None
        else:
            values, weights = np.arange(len(self._counts), dtype=np.float64) + self._offset, self._counts
        values = ((values - low) / (high - low)).clip(0, 1)
        mean = float(np.average(values, weights=weights))
        return mean, math.sqrt(float(np.average((values - mean) ** 2, weights=weights)))

    @property
    def _values(self) -> np.ndarray:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]
