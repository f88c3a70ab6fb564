"""Tree attention by the kernels of others: FlexAttention's block mask and flash-attn's plan against the dense definition.

Both run on a GPU only. Here FlexAttention is the eager one that torch has for debugging, and flash-attn is a stand-in with
its interface and its meaning of `causal`; what is tested is what we hand to them and make of their answers.
"""

import itertools

import pytest
import torch
from support.attention_problems import HEADS, LARGE, TREES, error, exact, problem, random_ends, run
from torch.nn.attention import flex_attention as flex

from appo._kernels.tree_attention import backend_flash as attention_flash
from appo._kernels.tree_attention import backend_flex as attention_flex
from appo._kernels.tree_attention import backend_torch as attention_torch
from appo._kernels.tree_attention.last_call import LastCall
from appo.kernels import tree_attention

torch.set_num_threads(1)
ALL = TREES | LARGE


# -- FlexAttention


def blocks_of(mask):
    """{(query block, key block): "some" | "all"} of a BlockMask."""
    found = {}
    for kind, count, index in (
        ("some", mask.kv_num_blocks, mask.kv_indices),
        ("all", mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for q, n in enumerate(count[0, 0].tolist()):
            for k in index[0, 0, q, :n].tolist():
                assert (q, k) not in found
                found[q, k] = kind
    return found


@pytest.mark.parametrize("block", [8, 16, 128])
@pytest.mark.parametrize("name", ALL)
def test_blocks_are_those_of_the_dense_mask(name, block):
    """Block by block: "all" where every pair is seen, "some" where one is, none elsewhere; ragged ends are "some"."""
    subtree_end = ALL[name].int()
    n = subtree_end.shape[0]
    seen = attention_torch.visible(subtree_end, 0, n)
    want = {}
    for q, rows in enumerate(seen.split(block)):
        for k, pairs in enumerate(rows.split(block, dim=1)):
            if pairs.any():
                whole = bool(pairs.all()) and pairs.numel() == block**2
                want[q, k] = "all" if whole else "some"
    assert blocks_of(attention_flex.block_mask(subtree_end, block)) == want


@pytest.mark.parametrize(("seed", "n", "block"), [(0, 300, 32), (1, 257, 16), (2, 128, 128)])
def test_block_mask_is_the_one_that_torch_makes(seed, n, block):
    """Also the lists of query blocks, which backward walks, and the function that decides single pairs."""
    subtree_end = random_ends(n, seed)
    ours = attention_flex.block_mask(subtree_end, block)
    theirs = flex.create_block_mask(
        lambda b, h, q, k: (k <= q) & (q < subtree_end[k]),
        None,
        None,
        n,
        n,
        "cpu",
        BLOCK_SIZE=block,
    )
    assert blocks_of(ours) == blocks_of(theirs)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for part in ("q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, part), getattr(theirs, part))
    at = torch.arange(n)
    assert torch.equal(
        ours.mask_mod(None, None, at[:, None], at), attention_torch.visible(subtree_end, 0, n)
    )
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE


def test_block_mask_of_a_long_stream_holds_no_pairs_of_tokens():
    """200,000 tokens: a mask would take 40 GB; what is held is a few numbers per pair of blocks."""
    mask = attention_flex.block_mask(random_ends(200_000, 0))
    held = sum(x.numel() for x in mask.as_tuple(flatten=True) if isinstance(x, torch.Tensor))
    assert held < 5 * (200_000 / 128) ** 2


@pytest.fixture
def flex_with_gradients(monkeypatch):
    """torch refuses gradients on a CPU, though its eager form, all scores in memory, has them."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention_flex, "_check", lambda _: None)
    monkeypatch.setattr(attention_flex, "BLOCK", 16)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", ["one token", "wide fork", "forks at both ends", "random 131"])
def test_flex_results_and_gradients(flex_with_gradients, name, heads):
    subtree_end = TREES[name]
    inputs = problem(subtree_end, *heads, dtype=torch.float64)
    assert error(run("flex", subtree_end, *inputs), exact(subtree_end, *inputs)) < 1e-12


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_on_a_cpu_gives_results_but_no_gradient():
    subtree_end = TREES["random 100"]
    q, k, v, *_ = problem(subtree_end, 4, 2, 16)
    o = tree_attention(q, k, v, subtree_end, backend="flex")
    assert error([o], exact(subtree_end, q, k, v, o, torch.zeros(100, 4))[:1]) < 1e-5
    with pytest.raises(NotImplementedError, match="backend='flex' has no gradient on a CPU"):
        tree_attention(q.requires_grad_(), k, v, subtree_end, backend="flex")


# -- flash-attn


def varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """flash_attn_varlen_func by its documentation: causal is aligned to the bottom right corner; lse[Hq, total]."""
    assert causal and deterministic and return_attn_probs and dropout_p == 0.0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    group = q.shape[1] // k.shape[1]
    o, lse = [], []
    bounds = [[x[i : i + 2].tolist() for i in range(len(x) - 1)] for x in (cu_seqlens_q, cu_seqlens_k)]  # fmt: skip
    for (a, b), (c, d) in zip(*bounds, strict=True):
        assert b - a <= max_seqlen_q and d - c <= max_seqlen_k
        rows = q[a:b].transpose(0, 1)
        keys, values = (x[c:d].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(1 + (d - c) - (b - a))
        scores = (softmax_scale * rows @ keys.transpose(1, 2)).masked_fill(hidden, -torch.inf)
        o.append((scores.softmax(-1) @ values).transpose(0, 1))
        lse.append(scores.logsumexp(-1))
    return torch.cat(o), torch.cat(lse, 1), None


@pytest.fixture
def flash(monkeypatch):
    monkeypatch.setattr(attention_flash, "_check", lambda _: None)
    monkeypatch.setattr(attention_flash, "_varlen", lambda: varlen)
    return monkeypatch


def flash_error(subtree_end, *inputs):
    """Of o and the gradients; lse has none."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    o, lse = tree_attention(*leaves, subtree_end, backend="flash", return_lse=True)
    grads = torch.autograd.grad(o, leaves, inputs[3])
    want = exact(subtree_end, *inputs[:4], torch.zeros_like(inputs[4]))
    return error([o.detach(), lse.detach(), *grads], want)


@pytest.mark.parametrize("name", ALL)
def test_runs_have_the_keys_that_their_queries_see(name):
    """Every query sees the keys of its run but for as many at the end as there are queries after it."""
    subtree_end = ALL[name].int()
    n = subtree_end.shape[0]
    seen = attention_torch.visible(subtree_end, 0, n)
    plan = attention_flash.runs(subtree_end)
    q, k = plan.q_ends.tolist(), plan.k_ends.tolist()
    assert q[0] == k[0] == 0 and q[-1] == n and k[-1] == len(plan.keys)
    assert plan.most_q == max(b - a for a, b in itertools.pairwise(q))
    assert plan.most_k == max(b - a for a, b in itertools.pairwise(k))
    for (a, b), (c, d) in zip(itertools.pairwise(q), itertools.pairwise(k)):
        for i in range(a, b):
            assert torch.equal(plan.keys[c : d - (b - 1 - i)], seen[i].nonzero()[:, 0])
    leaves = (subtree_end == torch.arange(1, n + 1)).sum()
    assert len(q) - 1 == leaves  # no run could be longer


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", ["one token", "wide fork", "forks at both ends", "random 131"])
def test_flash_results_and_gradients(flash, name, heads):
    subtree_end = TREES[name]
    assert flash_error(subtree_end, *problem(subtree_end, *heads, dtype=torch.float64)) < 1e-12


def test_copies_are_summed_in_float32(flash):
    """Two tokens copied for 300 runs: in bfloat16 the sum of their gradients would stop growing."""
    subtree_end = torch.tensor([302] * 2 + list(range(3, 303)))
    q, k, v, d_o, zero = problem(subtree_end, 2, 1, 8, dtype=torch.bfloat16)
    assert flash_error(subtree_end, q, k, v, d_o.abs(), zero) < 1e-2


def top_left(*args, **kwargs):
    """A causal mask aligned to the other corner, as flash-attn before 2.1 and others have it."""
    args = list(args)
    lengths = [x.diff().tolist() for x in args[3:5]]
    keys = [torch.arange(c, c + m) for c, m in zip(args[4].tolist(), lengths[0])]
    args[1], args[2] = (x[torch.cat(keys)] for x in args[1:3])
    args[4] = args[3]
    return varlen(*args, **kwargs)


def last_copy(ctx, grad):
    (index,) = ctx.saved_tensors
    return grad.new_zeros(ctx.like[0]).index_put_((index,), grad), None


@pytest.mark.parametrize("fault", ["mask aligned to the top left", "one copy's gradient only"])
def test_flash_faults_are_caught(flash, fault):
    subtree_end = TREES["random 131"]
    inputs = problem(subtree_end, 4, 2, 16)
    assert flash_error(subtree_end, *inputs) < 1e-5
    if fault.startswith("mask"):
        flash.setattr(attention_flash, "_varlen", lambda: top_left)
    else:
        flash.setattr(attention_flash._Copies, "backward", staticmethod(last_copy))
    assert flash_error(subtree_end, *inputs) > 1e-2


def test_flash_has_no_gradient_of_lse(flash):
    subtree_end = TREES["random 100"]
    q, k, v, *_ = problem(subtree_end, 2, 1, 8)
    _, lse = tree_attention(q.requires_grad_(), k, v, subtree_end, backend="flash", return_lse=True)
    with pytest.raises(RuntimeError, match="no gradient of lse"):
        lse.sum().backward()


def test_flash_says_what_is_missing(monkeypatch):
    q = torch.zeros(2, 2, 4)
    attention_flash._varlen.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", None)  # whatever is installed
    with pytest.raises(RuntimeError, match=r"not installed: pip install 'appo\[flash-attn\]'"):
        tree_attention(q, q, q, torch.tensor([2, 2]), backend="flash")
    monkeypatch.setattr(attention_flash, "_varlen", lambda: varlen)
    with pytest.raises(RuntimeError, match="needs a CUDA device, q is on cpu"):
        tree_attention(q, q, q, torch.tensor([2, 2]), backend="flash")


# -- both


@pytest.mark.parametrize("backend", ["flex", "flash"])
def test_bad_streams_are_refused_and_empty_ones_are_not(flash, backend):
    q = torch.zeros(2, 2, 4)
    with pytest.raises(ValueError, match=r"subtree_end\[1\] is 1, expected 2 … 2"):
        tree_attention(q, q, q, torch.tensor([2, 1]), backend=backend)
    empty = q[:0].requires_grad_()
    tree_attention(empty, empty, empty, torch.tensor([], dtype=torch.int), backend=backend).sum().backward()  # fmt: skip
    assert empty.grad.shape == (0, 2, 4)


def test_what_was_derived_is_kept_until_the_stream_changes():
    made = []
    last_call = LastCall(
        lambda subtree_end, size: made.append((subtree_end.tolist(), size)) or len(made)
    )
    subtree_end = torch.tensor([2, 2])
    assert last_call(subtree_end, 1) == last_call(subtree_end, 1) == 1
    assert last_call(subtree_end, 2) == 2  # another question
    assert last_call(subtree_end.clone(), 2) == 3  # another stream, though equal
    assert last_call(subtree_end, 2) == 4
    subtree_end[0] = 1
    assert last_call(subtree_end, 2) == 5  # written to
    assert made[-1] == ([1, 2], 2)
    with torch.inference_mode():
        unknown = torch.tensor([2, 2])
    assert last_call(unknown, 2) == 6 and last_call(unknown, 2) == 7  # nobody knows whether it was
