"""What each rank of the vocabulary-parallel test runs: a module of its own, so that a spawned process can import it."""

import pytest
import torch
import torch.distributed as dist

from appo.kernels import linear_logprob_entropy


def whole():
    g = torch.Generator().manual_seed(3)
    h = torch.randn(9, 8, generator=g, dtype=torch.float64)
    w = torch.randn(23, 8, generator=g, dtype=torch.float64)
    y = torch.randint(23, (9,), generator=g)
    y[4] = -100
    inv_temp = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    return h, w, y, inv_temp


def loss_and_grads(h, w, y, inv_temp, **shard):
    leaves = [x.clone().requires_grad_() for x in (h, w, inv_temp)]
    out = linear_logprob_entropy(leaves[0], leaves[1], y, inv_temp=leaves[2], block=(4, 5), **shard)
    (out.logp + 0.3 * out.entropy + 0.01 * out.lse**2).sum().backward()
    return [x.detach() for x in out], [x.grad for x in leaves]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        h, w, y, inv_temp = whole()
        start, end = ((0, 15), (15, 23))[rank]
        want, (want_h, want_w, want_t) = loss_and_grads(h, w, y, inv_temp)
        shard = {"vocab_start": start, "group": dist.group.WORLD}
        got, (got_h, got_w, got_t) = loss_and_grads(h, w[start:end], y, inv_temp, **shard)
        same = {"rtol": 1e-11, "atol": 1e-11}
        torch.testing.assert_close(got, want, **same)
        torch.testing.assert_close(got_h, want_h, **same)
        torch.testing.assert_close(got_w, want_w[start:end], **same)
        torch.testing.assert_close(got_t, want_t, **same)
        with pytest.raises(ValueError, match="vocab_start of rank 1 is 1, expected 23"):
            linear_logprob_entropy(h, w, y, vocab_start=rank, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
