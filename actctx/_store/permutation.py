"""A random permutation of which any part is computed by itself, so that none of it is in memory.

# NOTE [The permutation]
A number below `size` is two digits of about its square root. Each of twelve rounds adds to one
digit a hash of the other, which can be undone, so different numbers stay different: an alternating
Feistel network. What is not below `size` goes through it again until it is. Both are of Black and
Rogaway 2002, "Ciphers with arbitrary finite domains"; the hash is the end of SplitMix64 (Steele,
Lea and Flood 2014, "Fast splittable pseudorandom number generators").
"""

import math

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 12


def permuted(
    numbers: Int64[np.ndarray, "_"], size: int, random: np.random.Generator
) -> Int64[np.ndarray, "_"]:
    """Return where a random permutation of the numbers below a size puts some of them.

    Args:
        numbers: The numbers, each below `size`.
        size: How many there are, of which none are held.
        random: What the permutation is drawn from.

    """
    keys = random.integers(2**64, size=_ROUNDS, dtype=np.uint64)
    found = numbers.astype(np.uint64)
    left = np.arange(len(found))
    while len(left):
        found[left] = _mixed(found[left], size, keys)
        left = left[found[left] >= size]
    return found.astype(np.int64)


def _mixed(
    numbers: UInt64[np.ndarray, "_"], size: int, keys: UInt64[np.ndarray, "_"]
) -> UInt64[np.ndarray, "_"]:
    base = math.isqrt(size - 1) + 1
    bases = np.array([-(-size // base), base], dtype=np.uint64)
    digits = [*np.divmod(numbers, bases[1])]
    for turn, key in enumerate(keys):
        one, other = turn % 2, 1 - turn % 2
        added = _hash(digits[other] + key) % bases[one]
        digits[one] = (digits[one] + added) % bases[one]
    mixed: np.ndarray = digits[0] * bases[1] + digits[1]
    return mixed


def _hash(values: UInt64[np.ndarray, "_"]) -> UInt64[np.ndarray, "_"]:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    hashed: np.ndarray = values ^ (values >> np.uint64(31))
    return hashed
