"""Randomness is a function, not a state: every draw has a seed of its own, made of what it is for."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """63-bit seed of (seed, epoch, sample), (seed, step, rank) and the like; equal on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes signed 64-bit seeds
