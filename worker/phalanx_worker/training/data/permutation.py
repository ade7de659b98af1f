"""A shuffled order that needs no memory: the i-th of n in any order, computed from i alone.

Owns the arithmetic only. A balanced Feistel network permutes the smallest even number of bits that holds n, and an
index that lands outside walks on until it is inside: "cycle walking", J. Black and P. Rogaway, Ciphers with Arbitrary
Finite Domains, CT-RSA 2002, section 3. Four rounds, after M. Luby and C. Rackoff, SIAM J. Comput. 17(2), 1988. The
round function is the mixer of SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014): a shuffle, not a secret.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ROUNDS = 4
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


def permuted(indices: Indices, *, size: int, key: int) -> Indices:
    """Where a permutation of range(size) that `key` chooses takes each index. int64, any shape.

    On average fewer than four rounds of the network per index, whatever the size. Raises ValueError where an index
    lies outside.
    """
    if np.any((indices < 0) | (indices >= size)):
        raise ValueError(f"indices from {indices.min()} to {indices.max()} do not lie in 0 to {size - 1}")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = round_keys(key)
    words = _network(indices.astype(np.uint64), half_bits, keys)
    while (outside := words >= np.uint64(size)).any():
        words[outside] = _network(words[outside], half_bits, keys)
    return words.astype(np.int64)


def round_keys(key: int) -> list[int]:
    """A word of 64 bits for each round."""
    return [mixed((key + (round + 1) * _GOLDEN) & _MASK) for round in range(ROUNDS)]


def mixed(word: int) -> int:
    """The word of 64 bits, well mixed (SplitMix64's finalizer)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def key_of(*words: int) -> int:
    """One key of 64 bits out of several numbers, such as a seed and an epoch."""
    key = 0
    for word in words:
        key = mixed((key + _GOLDEN) & _MASK ^ (word & _MASK))
    return key


def _network(words: _Words, half_bits: int, keys: list[int]) -> _Words:
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = words >> shift, words & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + np.uint64(key)) & mask)
    return (left << shift) | right


def _mixed(words: _Words) -> _Words:
    """As `mixed`, for many; NumPy's unsigned integers wrap around as it wants."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
