"""What the tests of tree attention share.

Streams, inputs, and the dense definition in float64 to compare with.
"""

import torch
from support.head_backends import device_of

from appo._kernels.tree_attention import backend_torch as attention_torch
from appo.kernels import tree_attention


def random_ends(n, seed):
    """subtree_end of a random stream.

    Trees side by side, each a chain under which further trees stand. Deep and uneven.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(most):
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    ends = [0] * n
    spans = [(0, n)]
    while spans:
        at, stop = spans.pop()
        while at < stop:
            size = min(draw(stop - at), (stop - at) // 2 + 1)
            chain = draw(size)
            ends[at : at + chain] = [at + size] * chain
            spans.append((at + chain, at + size))
            at += size
    return torch.tensor(ends, dtype=torch.int32)


def forks_at_both_ends():
    """A chain of 5 with forks after its first token (two), after its third and after its last.

    Two single tokens.
    """
    return torch.tensor([14, 9, 9, 7, 7, 6, 7, 9, 9, 11, 11, 14, 14, 14], dtype=torch.int32)


# name → subtree_end; small enough for the interpreter of Triton
TREES = {
    "one token": torch.tensor([1]),
    "single tokens": torch.arange(1, 38),
    "one chain": torch.full((70,), 70),
    "several chains": torch.tensor([20] * 20 + [21] + [65] * 44),
    "wide fork": torch.tensor([69] * 5 + [4 * i + 9 for i in range(16) for _ in range(4)]),
    "forks at both ends": forks_at_both_ends(),
    "chain of nodes with one child": torch.tensor([40] * 7 + [40] * 9 + [40] * 24),
    "random 100": random_ends(100, 0),
    "random 131": random_ends(131, 3),
}
LARGE = {
    "random 515": random_ends(515, 1),
    "random 700": random_ends(700, 2),
    "chain of 300": torch.full((300,), 300),
    "prompt of 256, 9 of 50": torch.tensor([706] * 256 + [50 * i + 306 for i in range(9) for _ in range(50)]),
}  # fmt: skip
HEADS = [(1, 1, 16), (3, 1, 8), (4, 2, 20)]
LARGE_HEADS = [(9, 3, 64), (8, 2, 128), (7, 1, 33), (2, 2, 256)]


def problem(subtree_end, heads, kv_heads, dim, dtype=torch.float32, seed=0):
    """q, k, v, and the upstream gradients of o and lse."""
    g = torch.Generator().manual_seed(seed)
    n = subtree_end.shape[0]
    shapes = [(n, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, d_o = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    return q, k, v, d_o, torch.randn(n, heads, generator=g)


def run(backend, subtree_end, q, k, v, d_o, d_lse):
    """(o, lse, dq, dk, dv) on the CPU."""
    device = device_of(backend)
    leaves = [x.to(device).detach().requires_grad_() for x in (q, k, v)]
    out = tree_attention(*leaves, subtree_end.to(device), backend=backend, return_lse=True)
    grads = torch.autograd.grad(out, leaves, (d_o.to(device), d_lse.to(device)))
    return [x.detach().cpu() for x in (*out, *grads)]


def exact(subtree_end, q, k, v, d_o, d_lse):
    """The same from the dense definition in float64, by autograd."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = attention_torch.dense(*leaves, subtree_end, q.shape[2] ** -0.5)
    grads = torch.autograd.grad(out, leaves, (d_o.double(), d_lse.double()))
    return [x.detach() for x in (*out, *grads)]


def error(got, want):
    """The largest relative distance of the results.

    Of an absolute zero (one key: no gradient of q) the absolute one.
    """
    pairs = zip(got, want, strict=True)
    return max(float((a.double() - b).norm()) / max(float(b.norm()), 1e-2) for a, b in pairs)
