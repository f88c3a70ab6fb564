"""No [T, V] tensor, forward or backward: every operator's output is watched while the kernel runs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from appo._kernels.common.backends import native_isa
from appo._kernels.linear_logprob.backends import module
from appo._kernels.linear_logprob.blocks import BLOCK, LinearCall, Upstream

torch.set_num_threads(1)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest storage any operator returned, in bytes, besides storages known before."""

    def __init__(self, known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.bytes, self.shape = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                size = x.untyped_storage().nbytes()
                if size > self.bytes:
                    self.bytes, self.shape = size, (str(func), tuple(x.shape))
        return out


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_no_logit_matrix(backend):
    """The backend is called as the operator calls it: a dispatch mode does not see inside an operator."""
    if backend == "cpu" and native_isa() is None:
        pytest.skip("the native matrix kernels do not run here")
    t, hidden, vocab = 600, 16, 8192
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(t, hidden, generator=generator).bfloat16()
    w = torch.randn(vocab, hidden, generator=generator).bfloat16()
    y = torch.randint(vocab, (t,), generator=generator)
    call = LinearCall(h, w, y, None, torch.ones(t))
    with LargestTensor([h, w]) as watch:
        m, s, _u, _z = module(backend).partial_stats(call)
        up = Upstream(m, torch.log2(s), torch.ones(t), torch.ones(t), torch.ones(t))
        dh, dw, _ = module(backend).gradients(call, up, True, True, False, h.dtype)
    block = BLOCK["cpu"][0] * BLOCK["cpu"][1] * 4
    assert watch.bytes <= block, watch.shape
    assert watch.bytes * 4 < t * vocab * 4  # far below even one float32 logit matrix
    assert dh.abs().sum() > 0
    assert dw.abs().sum() > 0


def test_the_watch_sees_a_logit_matrix():
    h, w = torch.randn(600, 16), torch.randn(8192, 16)
    with LargestTensor([h, w]) as watch:
        torch.log_softmax(h @ w.T, dim=1)
    assert watch.bytes == 600 * 8192 * 4
