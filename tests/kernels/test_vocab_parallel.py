"""A head split unevenly over two gloo ranks gives the statistics and gradients of the whole head."""

import torch.multiprocessing as mp
from vocab_ranks import worker


def test_two_ranks(tmp_path):
    context = mp.spawn(worker, args=(str(tmp_path),), nprocs=2, join=False)
    assert context is not None
    while not context.join(timeout=60):  # raises with the worker's traceback if one failed
        pass
    assert all(p.exitcode == 0 for p in context.processes)
