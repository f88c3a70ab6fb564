"""The statistics algebra on its own: any split and any merge tree give the statistics of the whole."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appo._kernels.common.stats import LOG2E, column_stats, empty, finish, merge

torch.set_num_threads(1)


def stats_of(x, target, v0):
    return column_stats((x * LOG2E).clone(), target - v0)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_merge_tree(data):
    vocab = data.draw(st.integers(1, 12))
    value = st.floats(-600, 600)
    x = torch.tensor(
        [data.draw(st.lists(value, min_size=vocab, max_size=vocab))], dtype=torch.float64
    )
    target = torch.tensor([data.draw(st.integers(0, vocab - 1))])
    cuts = sorted(data.draw(st.sets(st.integers(1, max(vocab - 1, 1)), max_size=4)) - {vocab})
    borders = [0, *cuts, vocab]
    parts = [stats_of(x[:, a:b], target, a) for a, b in itertools.pairwise(borders)]
    parts.append(empty(1, x))
    while len(parts) > 1:  # merge two at random positions until one is left
        b = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        a = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(merge(a, b))
    logp, entropy, lse = (t.item() for t in finish(parts[0]))
    want_logp = torch.log_softmax(x, 1)[0]
    p = want_logp.exp()
    want_entropy = -torch.special.xlogy(p, p).sum().item()
    assert math.isclose(logp, want_logp[target].item(), rel_tol=1e-12, abs_tol=1e-12)
    assert math.isclose(entropy, want_entropy, rel_tol=1e-10, abs_tol=1e-10)
    assert math.isclose(lse, torch.logsumexp(x, 1).item(), rel_tol=1e-12, abs_tol=1e-12)
    assert logp <= 0 <= entropy


def test_nothing_merges_to_nothing():
    like = torch.zeros(1)
    none = merge(empty(3, like), empty(3, like))
    assert not any(bool(torch.isnan(t).any()) for t in none)
    assert torch.equal(none.s, torch.zeros(3))
