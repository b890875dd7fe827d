"""Randomness has an owner: every draw is keyed by what it is for, never by when or where it happens."""

import hashlib

import numpy as np


def keyed_seed(*key: str | int) -> int:
    """63-bit seed of a key such as ("drop", seed, cycle, step, micro_batch)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_rng(*key: str | int) -> np.random.Generator:
    """Generator of a key such as ("augment", seed, cycle, tile_id): the same key draws the same numbers anywhere."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
