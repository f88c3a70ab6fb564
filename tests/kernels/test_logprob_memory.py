"""No [T, V] tensor, forward or backward: every operator's output is watched while the kernel runs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from appo.kernels import linear_logprob_entropy
from appo.kernels.blocks import BLOCK

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


def test_no_logit_matrix():
    t, hidden, vocab = 600, 16, 8192
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(t, hidden, generator=generator).bfloat16().requires_grad_()
    w = torch.randn(vocab, hidden, generator=generator).bfloat16().requires_grad_()
    y = torch.randint(vocab, (t,), generator=generator)
    watch = LargestTensor([h, w])
    with watch:
        out = linear_logprob_entropy(h, w, y)
        (out.logp + 0.1 * out.entropy).sum().backward()
    block = BLOCK["cpu"][0] * BLOCK["cpu"][1] * 4
    assert watch.bytes <= block, watch.shape
    assert watch.bytes * 4 < t * vocab * 4  # far below even one float32 logit matrix
    assert h.grad.abs().sum() > 0


def test_the_watch_sees_a_logit_matrix():
    h, w = torch.randn(600, 16), torch.randn(8192, 16)
    with LargestTensor([h, w]) as watch:
        torch.log_softmax(h @ w.T, dim=1)
    assert watch.bytes == 600 * 8192 * 4
