"""The engine on its Triton runner: here in the interpreter on a model of one layer, on a device
with the `gpu` tests.
"""

import sys
import types
import warnings

import numpy as np
import pytest
import torch
from support.engine_watch import Watch
from support.head_backends import ON_DEVICE, marks_of
from support.tiny_models import build, finish

from appo.errors import EngineError
from appo.rollout.engine import SamplingParams
from appo.rollout.native import NativeEngine
from appo.rollout.native.attention import flash
from appo.rollout.native.device.graphs import Graphs

pytest.importorskip("triton")
from appo.rollout.native.device.device import BUCKETS, FIXED_ROWS, DeviceRunner
from appo.rollout.native.device.device_tables import Stage, TableShape

torch.set_num_threads(1)
interpreted = [*marks_of("triton"), pytest.mark.skipif(ON_DEVICE, reason="the CPU is tested in Triton's interpreter")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build("qwen3", path, num_hidden_layers=1)
    return path


def engine_of(folder, runner="device", **settings):
    return NativeEngine(folder, **{"dtype": "float32", "runner": runner, **settings})


def rollout(engine, roots=2, new=3, append=(5, 6, 7), prompt=37):
    """Siblings, a fork inside one of them, appended tokens: (tokens, logprobs) of every sequence,
    and scores of the fork.
    """
    root = engine.add_prompt(list(range(3, 3 + prompt)))
    seqs = [engine.fork(root, prompt) for _ in range(roots)]
    for i, seq in enumerate(seqs):
        engine.submit(seq, SamplingParams(new), seed=i)
    events = finish(engine)
    child = engine.fork(seqs[0], prompt + 1)
    engine.append(child, list(append))
    engine.submit(child, SamplingParams(new), seed=9)
    events |= finish(engine)
    scored = engine.score([child])[0]
    return [(engine.tokens(s), events[s].logprobs) for s in (*seqs, child)], scored.logprobs


class TestInterpreted:
    pytestmark = interpreted

    def test_agrees_with_the_host(self, folder):
        """Under the eyes of Watch: freed and unwritten memory is NaN, and nothing but the rows'
        slots is written.
        """
        engine = engine_of(folder, prefill_chunk=16)
        Watch(engine)
        ours, scored = rollout(engine)
        theirs, expected = rollout(engine_of(folder, "torch"))
        for (tokens, logprobs), (same, close) in zip(ours, theirs):
            assert tokens == same
            np.testing.assert_allclose(logprobs, close, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(scored, expected, rtol=1e-5, atol=1e-5)

    def test_bits_in_deterministic_mode(self, folder):
        """Whoever decodes beside a sequence, and in whatever chunks its prompt was run."""
        alone, scored = rollout(engine_of(folder, deterministic=True), roots=1, new=2, prompt=20)
        engine = engine_of(folder, deterministic=True, prefill_chunk=13)
        beside, again = rollout(engine, roots=2, new=2, prompt=20)
        assert alone[0] == beside[0] and alone[-1] == beside[-1]
        assert scored.tolist() == again.tolist()

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_padding_changes_nothing(self, folder, deterministic):
        """A step as it would be captured, with padded tables, gives the bits of the same step as it
        is.
        """
        engine = engine_of(folder, deterministic=deterministic)
        prompt = engine.add_prompt(list(range(3, 30)))
        seqs = [engine.fork(prompt, 27) for _ in range(3)]
        tree, runner = engine.tree, engine.runner
        with torch.inference_mode():
            runner.pool.ensure(10)
            layout = tree.plan(seqs, 1000)
            runner.forward(layout, None)
            tree.commit(layout)
            for seq in seqs:
                tree.extend(seq, [4])
            layout = tree.plan(seqs, 0)
            assert (len(layout.ids), layout.prefill_rows) == (3, 0)
            plain = runner.forward(layout, layout.out_rows[1:]).clone()
            runner.graphs = Eager()
            padded = runner.forward(layout, layout.out_rows[1:])
        assert runner.graphs.keys == [TableShape(FIXED_ROWS if deterministic else 4, *(64,) if deterministic else (8,))]  # fmt: skip
        assert plain[:2].any() and torch.equal(plain, padded)
        assert len(plain) == (FIXED_ROWS if deterministic else 2)

    @pytest.mark.parametrize("grown", ["pool", "tables"])
    def test_no_replay_in_memory_of_another_size(self, folder, monkeypatch, grown):
        """Memory grows twice with no captured pass in between and lies where it lay at first, its
        parts elsewhere.
        """
        recorded = []

        def capture(self, body):
            recorded.append(Recorded())
            return recorded[-1], body()

        monkeypatch.setattr(Graphs, "_capture", capture)
        engine = engine_of(folder)
        runner, tree = engine.runner, engine.tree
        runner.graphs = Graphs(torch.device("cuda"))
        whole = torch.zeros(1 << 20)
        monkeypatch.setattr(
            runner.pool, "_plain", lambda blocks: in_turn(runner.pool, blocks, whole)
        )
        runner.pool.arena = runner.pool._plain(4)
        numbers = torch.zeros(1 << 18, dtype=torch.int64)
        runner.stage.host, runner.stage.buffer = numbers[:4096], numbers[:4096]
        seq = tree.add([3, 4, 5])

        def decode():
            layout = tree.plan([seq], 1000)
            runner.forward(layout, layout.out_rows)
            tree.commit(layout)
            tree.extend(seq, [6])

        with torch.inference_mode():
            for _ in range(4):  # the prompt; as it is; captured; replayed
                decode()
            assert [graph.replays for graph in recorded] == [2] and runner.graphs.captured == 1
            where = runner.pool.arena.data_ptr(), runner.stage.buffer.data_ptr()
            if grown == "pool":
                runner.pool.ensure(5)
                runner.pool.ensure(9)
            else:
                runner.stage.host, runner.stage.buffer = numbers[:8192], numbers[:8192]
            assert where == (runner.pool.arena.data_ptr(), runner.stage.buffer.data_ptr())
            decode()
        assert [graph.replays for graph in recorded] == [2] and runner.graphs.captured == 0

    def test_more_rows_than_a_pass_takes(self, folder, monkeypatch):
        """Passes of 8 rows one after another: what later rows read was written by earlier ones."""
        monkeypatch.setattr("appo.rollout.native.device.device.MAX_ROWS", 8)
        engine, host = engine_of(folder), engine_of(folder, "torch")
        ours, theirs = (e.score([e.add_prompt(list(range(30)))])[0] for e in (engine, host))
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=1e-5, atol=1e-5)

    def test_causal_parts_by_flash_attn(self, folder, monkeypatch):
        """With a stand-in for the library that computes what its documentation says."""
        calls = pretend_flash(monkeypatch)
        monkeypatch.setattr(flash, "CHUNK", 8)
        engine = engine_of(folder, prefill_chunk=20)
        engine.runner = DeviceRunner(engine.model, engine.runner.pool, False, flash=True)
        ours, _ = rollout(engine, append=range(10, 22))
        theirs, _ = rollout(engine_of(folder, "torch"), append=range(10, 22))
        for (tokens, logprobs), (same, close) in zip(ours, theirs):
            assert tokens == same
            np.testing.assert_allclose(logprobs, close, rtol=1e-5, atol=1e-5)
        assert {20, 16} <= set(
            calls
        )  # chunks of the prompt; the rest of it; with what was appended: 13

    def test_what_cannot_be_asked_for(self, folder):
        engine = engine_of(folder)
        pool = engine.runner.pool
        with pytest.raises(EngineError, match="flash_attn is not installed: pip install 'appo.flash-attn.'"):  # fmt: skip
            DeviceRunner(engine.model, pool, False, flash=True)
        with pytest.raises(EngineError, match="deterministic mode has one way"):
            DeviceRunner(engine.model, pool, True, flash=True)
        with pytest.raises(EngineError, match="layout 'plain', not 'packed'"):
            pool.layout = "packed"
            DeviceRunner(engine.model, pool, False)

    def test_why_the_runner_cannot_run(self, folder, monkeypatch):
        monkeypatch.setattr("appo._kernels.common.gpu.launch.interpreted", lambda: False)
        with pytest.raises(EngineError, match="the device is cpu; use device='cuda'"):  # fmt: skip
            engine_of(folder)
        monkeypatch.setitem(sys.modules, "appo.rollout.native.device.device", None)
        with pytest.raises(EngineError, match="runner='device'"):
            engine_of(folder)


def in_turn(pool, blocks, memory):
    """A plain arena in the first or the second half of `memory`: not the one where the pool is now."""
    shape = (pool.layers, 2, blocks, 16, pool.kv_heads, pool.head_dim)
    size, half = int(np.prod(shape)), len(memory) // 2
    assert size <= half
    at = half if pool.arena.data_ptr() == memory.data_ptr() else 0
    return memory[at : at + size].view(shape)


class Eager:
    """In place of Graphs: shapes are padded as for a capture, passes run as they are."""

    why_not = None

    def __init__(self):
        self.keys = []

    def keep(self, *memory):
        pass

    def run(self, key, body):
        self.keys.append(key)
        return body()


def pretend_flash(monkeypatch):
    """A module `flash_attn` with the varlen function in plain PyTorch; → the lengths it was called
    with.
    """
    calls = []

    def flash_attn_varlen_func(q, k, v, cuts, cuts_k, longest, most_k, causal, return_attn_probs):
        assert causal and return_attn_probs and cuts.dtype == torch.int32
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
        for a, b in zip(cuts.tolist(), cuts.tolist()[1:]):
            calls.append(b - a)
            keys, values = (x[a:b].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            scores = torch.einsum("ihd,jhd->hij", q[a:b], keys) / q.shape[2] ** 0.5
            scores = scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), -torch.inf)
            out[a:b] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values)
            lse[:, a:b] = scores.logsumexp(-1)
        return out, lse, None

    module = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "unavailable", lambda *_: None)
    return calls


class Recorded:
    """A graph that says when it is replayed."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


def test_graphs_run_capture_and_replay(monkeypatch):
    graphs, ran = Graphs(torch.device("cuda")), []
    recorded = []

    def capture(self, body):
        recorded.append(Recorded())
        return recorded[-1], body()

    monkeypatch.setattr(Graphs, "_capture", capture)

    def body():
        ran.append(len(ran))
        return torch.tensor(len(ran))

    graphs.keep(1, 2)
    assert [int(graphs.run("a", body)) for _ in range(4)] == [1, 2, 2, 2]
    assert recorded[0].replays == 3 and graphs.captured == 1
    assert int(graphs.run("b", body)) == 3
    graphs.keep(1, 2)
    assert graphs.captured == 1
    graphs.keep(1, 3)  # the pool has moved
    assert graphs.captured == 0 and int(graphs.run("a", body)) == 4

    def fails(self, body):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "_capture", fails)
    with pytest.warns(UserWarning, match="without CUDA graphs, a capture failed: operation not"):
        assert int(graphs.run("a", body)) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int(graphs.run("a", body)) == 6 and graphs.why_not.startswith("a capture failed")
    assert Graphs(torch.device("cpu")).why_not == "the model is on cpu"
    assert Graphs(torch.device("cuda"), wanted=False).why_not == "switched off"


def test_a_decode_step_keeps_its_shape_as_sequences_grow():
    """From 16 to 1,000 own tokens of 12 sequences: as many shapes as the tables double."""
    from appo._kernels.segment_attention.gpu.work import Cut, work
    from appo.rollout.native.tree.segment_tree import SegmentTree

    tree, shapes = SegmentTree(), set()
    prompt = tree.add(range(500))
    tree.commit(tree.plan([prompt], 1000))
    leaves = [tree.fork(prompt, 500) for _ in range(12)]
    rows = next(b for b in BUCKETS if b >= 12)
    for own in (1, 15, 100, 101, 250, 500, 900, 1000):
        for leaf in leaves:
            tree.extend(leaf, [1] * (500 + own - 1 - tree.length(leaf)))
        tree.commit(tree.plan(leaves, 100_000))
        for leaf in leaves:
            tree.extend(leaf, [1])
        layout = tree.plan(leaves, 0)
        cut = Cut(3, 3, (64, 16), 132, False)
        pass_work = work(layout.segments, layout.reads, layout.limits, (0, 12), cut)
        shape = TableShape.fitting(rows, pass_work, len(layout.blocks))
        assert shape.size >= pass_work.partials and 4 * shape.size >= len(layout.blocks)
        shapes.add(shape)
        tree.abort(layout)
    assert {shape.rows for shape in shapes} == {16} and len(shapes) <= 4


def test_tables_lie_where_they_lay():
    """A buffer that is too small is replaced; otherwise the place of a table follows from the shape
    alone.
    """
    stage, shape = Stage(torch.device("cpu")), TableShape(8, 64)
    assert sum(shape.sections().values()) < len(stage.host)
    assert list(shape.sections())[:4] == ["ids", "positions", "slots", "out"]
    assert shape.sections()["tall"] == 8 * 64 and shape.sections()["starts"] == 9


# -- on a device -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not ON_DEVICE, reason="needs a CUDA device")
class TestOnDevice:
    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("whole")
        build("qwen3", path, head_dim=64, num_hidden_layers=3)
        return path

    def cuda(self, folder, **settings):
        engine = NativeEngine(folder, **{"dtype": "float32", "device": "cuda", **settings})
        assert isinstance(engine.runner, DeviceRunner)
        return engine

    def test_agrees_with_the_cpu(self, whole):
        ours, scored = rollout(self.cuda(whole), roots=9, new=30)
        theirs, expected = rollout(NativeEngine(whole, dtype="float32"), roots=9, new=30)
        for (tokens, logprobs), (same, close) in zip(ours, theirs):
            assert tokens == same
            np.testing.assert_allclose(logprobs, close, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(scored, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_graphs_give_the_bits_of_plain_launches(self, whole, dtype):
        engine, plain = (self.cuda(whole, dtype=dtype) for _ in range(2))
        plain.runner.graphs.why_not = "switched off"
        ours, theirs = (rollout(e, roots=9, new=30) for e in (engine, plain))
        assert engine.runner.graphs.captured > 0 and plain.runner.graphs.captured == 0
        assert ours[0] == theirs[0] and ours[1].tolist() == theirs[1].tolist()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_bits_in_deterministic_mode(self, whole, dtype):
        settings = dict(dtype=dtype, deterministic=True)
        alone, scored = rollout(self.cuda(whole, **settings), roots=1, new=30)
        many, again = rollout(self.cuda(whole, **settings, prefill_chunk=9), roots=20, new=30)
        assert alone[0] == many[0] and alone[-1] == many[-1]
        assert scored.tolist() == again.tolist()

    def test_new_weights(self, whole):
        """Graphs of the old weights are dropped."""
        engine = self.cuda(whole)
        rollout(engine, roots=3, new=8)
        engine.load_weights([("model.norm.weight", torch.zeros(32))], version=1)
        assert engine.runner.graphs.captured == 0
        seq = engine.add_prompt([1, 2, 3])
        engine.submit(seq, SamplingParams(6), seed=0)
        logprobs = finish(engine)[seq].logprobs
        np.testing.assert_allclose(logprobs, -np.log(engine.config.vocab), rtol=1e-5)

    def test_flash_attn(self, whole):
        if (reason := flash.unavailable(torch.bfloat16, 64, torch.device("cuda"))) is not None:
            pytest.skip(reason)
        engine = self.cuda(whole, dtype="bfloat16")
        plain = self.cuda(whole, dtype="bfloat16")
        assert engine.runner.flash is not None
        plain.runner.flash = None
        ids = np.random.default_rng(0).integers(0, engine.config.vocab, 250).tolist()
        ours, theirs = (e.score([e.add_prompt(ids)])[0].logprobs for e in (engine, plain))
        np.testing.assert_allclose(ours, theirs, atol=0.15)
