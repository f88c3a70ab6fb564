"""The noise of a draw.

A counter-based generator, so that it depends on (seed, position, token id) and nothing else.

Not on the batch, not on how the vocabulary is cut, not on the device: C++ (csrc/sampling/) and
Triton (kernels/sampling/gpu/sample.py) compute the same 64 bits. Two words of splitmix64 from
(seed, position) are the key of a 32-bit mixer of the id: the upper 32 bits, which are all that most
tokens need, cost three multiplications, and the lower 32 take the same again.

    u = upper / 2³² + (lower + ½) / 2⁶⁴, in (0, 1)        E = -log(1 - u), exponential with mean 1
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
M64, M32 = (1 << 64) - 1, (1 << 32) - 1
BELOW_ONE = 1.0 - 2.0**-53
Key = tuple[
    int, int, int, int
]  # 32-bit words: two for the upper bits of every token's noise, two for the lower


def _splitmix(x: int) -> int:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def key(seed: int, position: int) -> Key:
    """The key of the draw at an absolute position under a seed, any integer, modulo 2⁶⁴."""
    of_seed = _splitmix((seed + GOLDEN) & M64)
    upper = _splitmix((of_seed + (position + 1) * GOLDEN) & M64)
    lower = _splitmix((upper + GOLDEN) & M64)
    return upper & M32, upper >> 32, lower & M32, lower >> 32


def mixed(first: int, second: int, ids: Tensor) -> Tensor:
    """32 bits for each of ids int32, as int32: a Weyl sequence through C. Wellons' triple32 mixer.

    The second word enters on the way: otherwise streams with close first words would be shifted
    copies of each other.
    """
    x = (ids * _signed(0x9E3779B9)).add_(_signed(first))
    _flip(x, 17).mul_(_signed(0xED5AD4BB)).add_(_signed(second))
    _flip(x, 11).mul_(_signed(0xAC4C1B51))
    _flip(x, 15).mul_(_signed(0x31848BAB))
    return _flip(x, 14)


def _flip(x: Tensor, n: int) -> Tensor:
    """x ^= x >> n, of unsigned numbers."""
    return x.bitwise_xor_((x >> n).bitwise_and_((1 << (32 - n)) - 1))


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    return word - (word >> 31 << 32)


def halves(words: Key, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of ids under a key, each int64 from 0 to 2³² - 1."""
    ids = ids.int()
    return mixed(*words[:2], ids).long() & M32, mixed(*words[2:], ids).long() & M32


def uniforms(words: Key, ids: Tensor) -> Tensor:
    """u of ids under a key, float64.

    64 bits rounded once, so 53 significant ones however small u is.
    """
    upper, lower = halves(words, ids)
    return (upper.double() * 2.0**-32 + (lower.double() + 0.5) * 2.0**-64).clamp_(max=BELOW_ONE)


def uniform(seed: int, position: int, token: int) -> float:
    """u of one token at one absolute position under a seed."""
    return uniforms(key(seed, position), torch.tensor([token])).item()
