"""A head split unevenly over 1, 2 and 3 gloo ranks gives the statistics and gradients of the whole head."""

import pytest
import torch
import torch.multiprocessing as mp
from support.vocab_ranks import worker


@pytest.mark.parametrize(
    ("world", "dtype"),
    [
        (1, torch.float32),
        (2, torch.float64),
        (3, torch.float32),
        (3, torch.bfloat16),
    ],
)
def test_ranks(tmp_path, world, dtype):
    """float64 runs the definition, the others whatever `auto` means here."""
    context = mp.spawn(worker, args=(world, dtype, str(tmp_path)), nprocs=world, join=False)
    assert context is not None
    while not context.join(timeout=60):  # raises with the worker's traceback if one failed
        pass
    assert all(p.exitcode == 0 for p in context.processes)
