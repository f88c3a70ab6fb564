"""The noise of a draw: frozen values, the same bits in C++, and its quality.

All seeds are fixed: nothing here can flake.

Bounds are five standard deviations of what true noise would give.
"""

import math

import numpy as np
import pytest
import torch

from appo.rollout.native.sampling import native_sample
from appo.rollout.native.sampling.noise import halves, key, uniform, uniforms

torch.set_num_threads(1)
needs_native = pytest.mark.skipif(
    not native_sample.available(), reason="no native library or no AVX2"
)
ISAS = ["", "avx2"]


def bits(seed, position, ids):
    """All 64, as int64."""
    upper, lower = halves(key(seed, position), ids)
    return (upper << 32) | lower


def field(seeds, positions, ids):
    """u of every (seed, position) pair and id: [len(seeds) · len(positions), ids]."""
    rows = [uniforms(key(s, t), torch.arange(ids)) for s in seeds for t in positions]
    return torch.stack(rows)


def test_frozen_values():
    """Rollouts can be repeated only as long as these stay as they are."""
    assert key(0, 0) == (1293516399, 2802244911, 956087953, 595752380)
    found = [uniform(0, 0, 0), uniform(7, 100, 49151), uniform(-1, 2**40, 5), uniform(2**63, 3, 2)]
    assert found == [
        0.16222539925665552,
        0.9913871135869063,
        0.35228173738647833,
        0.6934855524269976,
    ]
    assert uniform(2**64 + 7, 100, 49151) == uniform(7, 100, 49151)  # seeds count modulo 2^64


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_cpp_has_the_same_bits(isa):
    for seed, position in [(0, 0), (-1, 1), (2**63 - 1, 17), (-(2**63), 2**40), (12345, 4096)]:
        for count in (1, 15, 16, 17, 1000, 151_936):
            want = bits(seed, position, torch.arange(count))
            assert torch.equal(native_sample.noise_bits(seed, position, count, isa), want)


def test_small_noise_keeps_its_digits():
    """The upper 32 bits alone would tie the smallest of many: the lower ones tell them apart."""
    words = key(3, 5)
    ids = torch.arange(1 << 20)
    u = uniforms(words, ids)
    assert 0 < u.min() < 2.0**-17 and u.max() < 1
    least = u.argmin()
    upper, _ = halves(words, least[None])
    assert u[least] != upper.item() * 2.0**-32  # digits below 2^-32 are there
    assert len(u.unique()) == len(u)


def correlation(a, b):
    return torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].item()


# What may be neighbours: (seeds, positions, how to pair the field with itself).
NEIGHBOURS = {
    "positions": (range(4), range(61), lambda u: (u.view(4, 61, -1)[:, 1:], u.view(4, 61, -1)[:, :-1])),
    "seeds": (range(240), [9], lambda u: (u[1:], u[:-1])),
    "ids": (range(16), range(15), lambda u: (u[:, 1:], u[:, :-1])),
    "ids, 16 apart": (range(16), range(15), lambda u: (u[:, 16:], u[:, :-16])),
    "seed and position": (range(16), range(15), lambda u: (u.view(16, 15, -1)[1:, :-1], u.view(16, 15, -1)[:-1, 1:])),
    "id and position": (range(4), range(61), lambda u: (u.view(4, 61, -1)[:, 1:, :-1], u.view(4, 61, -1)[:, :-1, 1:])),
}  # fmt: skip


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_are_independent(name):
    seeds, positions, pairs = NEIGHBOURS[name]
    a, b = pairs(field(seeds, positions, 2000))
    n = a.numel()
    assert n > 400_000
    for f in (lambda u: u, lambda u: -torch.log1p(-u), lambda u: (u - 0.5).abs()):
        assert abs(correlation(f(a), f(b))) < 5 / math.sqrt(n)
    # The joint distribution in 32 x 32 cells, and where races are decided: both below 1/64.
    cells = torch.bincount(((a * 32).long() * 32 + (b * 32).long()).flatten(), minlength=1024)
    chi2 = ((cells - n / 1024) ** 2 / (n / 1024)).sum().item()
    assert abs(chi2 - 1023) < 5 * math.sqrt(2 * 1023)
    both = ((a < 1 / 64) & (b < 1 / 64)).sum().item()
    assert abs(both - n / 4096) < 5 * math.sqrt(n / 4096)


def test_uniform_over_ids_and_over_positions():
    u = field(range(20), range(20), 5000)
    for means, count in ((u.mean(0), 400), (u.mean(1), 5000)):  # each mean, and how they scatter
        z = (means - 0.5) * math.sqrt(12 * count)
        assert z.abs().max() < 5
        assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / len(z))
    chi2 = np.bincount((u * 4096).long().flatten().numpy(), minlength=4096)
    chi2 = ((chi2 - u.numel() / 4096) ** 2 / (u.numel() / 4096)).sum()
    assert abs(chi2 - 4095) < 5 * math.sqrt(2 * 4095)


def test_every_bit_of_the_key_and_of_the_id_turns_half_of_the_bits():
    """Avalanche of the 64 bits against seed, position and id: 64 draws each, every output bit
    turned 10 to 54 times.
    """
    ids = torch.arange(0, 64 * 997, 997)
    shifts = torch.arange(64)

    def spread(seed, position, ids=ids):
        return (bits(seed, position, ids)[:, None] >> shifts) & 1

    base = spread(11, 13)
    changed = [spread(11 ^ (1 << b), 13) for b in range(63)]
    changed += [spread(11, 13 ^ (1 << b)) for b in range(40)]
    changed += [spread(11, 13, ids ^ (1 << b)) for b in range(17)]
    for other in changed:
        turned = (base ^ other).sum(0)
        assert turned.min() >= 10 and turned.max() <= 54  # 5.5 standard deviations
