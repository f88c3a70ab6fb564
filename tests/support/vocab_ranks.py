"""What each rank of the vocabulary-parallel test runs.

A module of its own, so that a spawned process can import it.
"""

import pytest
import torch
import torch.distributed as dist

from appo.kernels import linear_logprob_entropy

SHARDS = {1: [23], 2: [15, 8], 3: [1, 17, 5]}  # columns of each rank


def whole(dtype):
    g = torch.Generator().manual_seed(3)
    h = torch.randn(9, 8, generator=g, dtype=torch.float64)
    w = torch.randn(23, 8, generator=g, dtype=torch.float64)
    y = torch.randint(23, (9,), generator=g)
    y[4] = -100
    inv_temp = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return h.to(dtype), w.to(dtype), y, inv_temp.to(wide)


def loss_and_grads(h, w, y, inv_temp, **shard):
    leaves = [x.clone().requires_grad_() for x in (h, w, inv_temp)]
    out = linear_logprob_entropy(leaves[0], leaves[1], y, inv_temp=leaves[2], **shard)
    (out.logp + 0.3 * out.entropy + 0.01 * out.lse**2).sum().backward()
    return [x.detach() for x in out], [x.grad for x in leaves]


class Gathered:
    """Bytes that this rank hands to all_gather for every token, by watching the calls."""

    def __init__(self, monkeypatch):
        self.sizes = []
        gather = dist.all_gather

        def watched(parts, mine, group=None):
            self.sizes.append(mine.nbytes)
            return gather(parts, mine, group=group)

        monkeypatch.setattr(dist, "all_gather", watched)


def worker(rank, world, dtype, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        h, w, y, inv_temp = whole(dtype)
        start = sum(SHARDS[world][:rank])
        end = start + SHARDS[world][rank]
        want, (want_h, want_w, want_t) = loss_and_grads(h, w, y, inv_temp)
        with pytest.MonkeyPatch.context() as patch:
            gathered = Gathered(patch)
            shard = {"vocab_start": start, "group": dist.group.WORLD}
            got, (got_h, got_w, got_t) = loss_and_grads(h, w[start:end], y, inv_temp, **shard)
        assert gathered.sizes == [16, 4 * len(y) * inv_temp.element_size()]  # shard limits, stats
        bound = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2e-6}[dtype]
        grad = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)
        torch.testing.assert_close(got_h, want_h, rtol=grad, atol=grad)
        torch.testing.assert_close(got_w, want_w[start:end], rtol=grad, atol=grad)
        torch.testing.assert_close(got_t, want_t, rtol=max(bound, 1e-5), atol=max(bound, 1e-5))
        equal_on_all_ranks(got)
        if world > 1:
            with pytest.raises(ValueError, match="vocab_start of rank 1 is 1, expected 23"):
                linear_logprob_entropy(h, w, y, vocab_start=rank, group=dist.group.WORLD)
        dist.barrier()  # nobody closes the connection while another still reads from it
    finally:
        dist.destroy_process_group()


def equal_on_all_ranks(values):
    """Bit for bit: every rank merges the same numbers in the same order."""
    mine = torch.stack(values)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    assert all(torch.equal(mine, part) for part in parts)
