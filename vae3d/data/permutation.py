"""A permutation of 0, ..., n - 1 that needs no memory: each place is computed from n, a key and the index alone.

A Feistel network over pairs of numbers in Z_a x Z_a with a = ceil(sqrt(n)), walked until it lands below n: Black and
Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), the constructions "cycle-walking" and "generalized
Feistel". a^2 is at most 2 sqrt(n) + 1 above n, so almost no index needs a second walk. The round function is the
finaliser of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), with a
64-bit key per round. For shuffling, not for secrets.
"""

from __future__ import annotations

import math

import numpy as np

from vae3d.seeding import seed_of

ROUNDS = 8
MASK = 2**64 - 1
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64


class Permutation:
    """The permutation of range(count) for a key: permutation[i] for an int, permutation.take(indices) for an array.

    key: integers and strings, such as (seed, epoch). Equal on every machine and version of Python and NumPy.
    """

    def __init__(self, count: int, *key: int | str) -> None:
        self.count = count
        self.side = max(1, math.isqrt(max(0, count - 1)) + 1)  # ceil(sqrt(count))
        self.keys = [seed_of(*key, "permutation", i) for i in range(ROUNDS)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        """Raises IndexError unless 0 <= index < count."""
        if not 0 <= index < self.count:
            raise IndexError(f"{index} is not in range({self.count})")
        side, place = self.side, index
        while True:
            left, right = divmod(place, side)
            for key in self.keys:
                z = (right + key) * GOLDEN & MASK
                z = (z ^ z >> 30) * MIX_1 & MASK
                z = (z ^ z >> 27) * MIX_2 & MASK
                left, right = right, (left + (z ^ z >> 31)) % side
            place = left * side + right
            if place < self.count:
                return place

    def take(self, indices: np.ndarray) -> np.ndarray:
        """permutation[i] of each of an array of indices, int64."""
        places = np.array(indices, dtype=np.uint64)
        if places.size and not (np.min(indices) >= 0 and np.max(indices) < self.count):
            raise IndexError(f"indices are not in range({self.count})")
        walking = np.ones(places.shape, bool)
        while walking.any():
            places[walking] = self._walk(places[walking])
            walking = places >= self.count
        return places.astype(np.int64)

    def _walk(self, places: np.ndarray) -> np.ndarray:
        side = np.uint64(self.side)
        left, right = places // side, places % side
        for key in self.keys:
            z = mix((right + np.uint64(key)) * np.uint64(GOLDEN))
            left, right = right, (left + z % side) % side  # (left + z) modulo side, without the overflow of their sum
        return left * side + right


def mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, of uint64 values."""
    z = (z ^ z >> np.uint64(30)) * np.uint64(MIX_1)
    z = (z ^ z >> np.uint64(27)) * np.uint64(MIX_2)
    return z ^ z >> np.uint64(31)
