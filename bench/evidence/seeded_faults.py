"""Do the tests notice a broken kernel, or a broken tree?

Plants one fault at a time in a copy of the sources and looks.

    python bench/evidence/seeded_faults.py [--quick] [--json FILE]

Each fault replaces one piece of text in one file. If the text is not there exactly once the script
stops: a fault that no longer applies must be rewritten, not skipped. C++ is rebuilt in the copy;
--quick leaves those faults out. The control, all the same tests without a fault, must be green.
Exit status 1 if a fault goes unnoticed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # for `bench`
COPIED = ("appo", "kernels", "csrc", "bench", "tests", "pyproject.toml", "CMakeLists.txt")
TESTS = "tests/kernels/linear_logprob/test_matrix.py"
ATTENTION = "tests/kernels/tree_attention/test_op.py"
FOREIGN = "tests/kernels/tree_attention/test_foreign.py"
TRAINING = "tests/learner/test_tree_training.py"
# faults in the Python definition of the tree: tests/rollout/native/test_tree_faults.py
TREE = "tests/rollout/native/test_segment_tree.py"
LOW = "[](float x) { uint32_t b; __builtin_memcpy(&b, &x, 4); b &= 0xffff0000u; __builtin_memcpy(&x, &b, 4); return x; }"


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in `file`.

    Of the tests in `tests` those that the expression `select` names must fail.
    """

    name: str
    file: str
    old: str
    new: str
    select: str
    tests: str = TESTS

    @property
    def native(self) -> bool:
        return self.file.startswith("csrc/")


FAULTS = [
    Fault(
        "targets shifted by one",
        "kernels/linear_logprob/op.py",
        "column = targets - options.vocab_start\n",
        "column = targets - options.vocab_start - 1\n",
        "test_values and torch and 1100",
    ),
    Fault(
        "entropy gradient set to 0",
        "kernels/linear_logprob/op.py",
        "d_entropy * LN2, d_logp)",
        "d_entropy * 0.0, d_logp)",
        "test_gradients and torch",
    ),
    Fault(
        "-inf mask dropped, PyTorch",
        "kernels/linear_logprob/blocks.py",
        "return x.masked_fill_(x < EMPTY, EMPTY)",
        "return x",
        "test_minus_infinity and torch",
    ),
    Fault(
        "statistics merged in bf16, PyTorch",
        "kernels/common/stats.py",
        "return Stats(m, s, u, a.z + b.z)",
        "return Stats(m, s.bfloat16().to(m.dtype), u.bfloat16().to(m.dtype), a.z + b.z)",
        "test_values and torch and 32001",
    ),
    Fault(
        "columns past V not masked, Triton partial",
        "kernels/linear_logprob/gpu/partial.py",
        "(column < V)[None, :]",
        "(column < V + COLUMNS)[None, :]",
        "test_values and triton and 1100",
    ),
    Fault(
        "statistics merged in bf16, Triton merge",
        "kernels/common/gpu/algebra.py",
        "    s = tl.sum(weight * s, axis=0)\n",
        "    s = tl.sum(weight * s, axis=0).to(tl.bfloat16).to(tl.float32)\n",
        "test_values and triton and 1100",
    ),
    Fault(
        "targets shifted by one, Triton partial",
        "kernels/linear_logprob/gpu/partial.py",
        "column[None, :] == target[:, None]",
        "column[None, :] == target[:, None] + 1",
        "test_values and triton and 1100",
    ),
    Fault(
        "entropy gradient set to 0, Triton dlogits",
        "kernels/common/gpu/algebra.py",
        "p_factor[:, None] - plogp_factor[:, None] * logp2",
        "p_factor[:, None] + 0.0 * logp2",
        "test_gradients and triton",
    ),
    Fault(
        "columns past V not masked, C++",
        "csrc/linear_logprob/rows.h",
        "    if (count < V::lanes) e = V::keep(e, count, zero);\n",
        "",
        "test_values and cpu and 1100",
    ),
    Fault(
        "targets shifted by one, C++",
        "csrc/linear_logprob/stats.cpp",
        "const int64_t column = p_.column[n] - v0;",
        "const int64_t column = p_.column[n] - v0 - 1;",
        "test_values and cpu and 1100",
    ),
    Fault(
        "-inf mask dropped, C++",
        "csrc/linear_logprob/rows.h",
        "V::sub(V::max(low, V::mul(V::load(x + j), factor)), m);",
        "V::sub(V::mul(V::load(x + j), factor), m);",
        "test_minus_infinity and cpu",
    ),
    Fault(
        "entropy gradient set to 0, C++",
        "csrc/linear_logprob/grads.cpp",
        "g_.plogp_factor ? g_.plogp_factor[n] * scale : 0.0f",
        "0.0f",
        "test_gradients and cpu",
    ),
    Fault(
        "statistics merged in bf16, C++",
        "csrc/linear_logprob/stats.cpp",
        "return {m, wa * a.s + wb * b.s,",
        f"const auto low = {LOW};\n  return {{m, low(wa * a.s + wb * b.s),",
        "test_values and cpu and 1100",
    ),
    Fault(
        "a block freed early, C++ tree",
        "csrc/kv_tree/kv_tree.cpp",
        "      cut(node, most, most);\n",
        "      cut(node, most, most - 1);\n",
        "NativeTree",
        TREE,
    ),
    Fault(
        "a block free while it may be read, C++ tree",
        "csrc/kv_tree/kv_tree.cpp",
        "if (!open_) blocks_.settle();",
        "blocks_.settle();",
        "NativeTree",
        TREE,
    ),
    Fault(
        "truncation drops what children inherit, C++ tree",
        "csrc/kv_tree/kv_tree.cpp",
        "if (length > node->base && node->inherited() < length - node->base) {",
        "if (length > node->base) {",
        "NativeTree",
        TREE,
    ),
    Fault(
        "KV of old weights stays, C++ tree",
        "csrc/kv_tree/kv_tree.cpp",
        "    keep(node.get(), 0);\n",
        "",
        "NativeTree",
        TREE,
    ),
    Fault(
        "a slot with KV overwritten, C++ tree",
        "csrc/kv_tree/layout.cpp",
        "t.slots.push_back(i < node->kv ? -1 : node->slot(i));",
        "t.slots.push_back(node->slot(i));",
        "NativeTree",
        TREE,
    ),
    Fault(
        "one row under new weights makes a node fresh, C++ tree",
        "csrc/kv_tree/kv_tree.h",
        "return std::min(lost, count) > seen;",
        "return std::min(lost, count) > 0 && seen == 0;",
        "NativeTree",
        TREE,
    ),
    Fault(
        "a plan that failed stays open, C++ tree",
        "csrc/kv_tree/plan.cpp",
        "    cancel();\n    throw;\n",
        "    throw;\n",
        "no_memory",
        "tests/rollout/native/test_tree_faults.py",
    ),
    Fault(
        "a node without a handle after a failed add, C++ tree",
        "csrc/kv_tree/kv_tree.cpp",
        "  made->tokens.assign(ids, ids + count);\n  Node* node = made.get();\n  node->id = next_node_;\n"
        "  nodes_.emplace(next_node_, std::move(made));\n",
        "  Node* node = made.get();\n  node->id = next_node_;\n"
        "  nodes_.emplace(next_node_, std::move(made));\n  node->tokens.assign(ids, ids + count);\n",
        "no_memory",
        "tests/rollout/native/test_tree_faults.py",
    ),
    Fault(
        "subtrees end a token late, PyTorch attention",
        "kernels/tree_attention/backend_torch.py",
        "(j <= i) & (i < subtree_end[None, :last])",
        "(j <= i) & (i <= subtree_end[None, :last])",
        "test_every_loss_in_float64 and rollouts",
        TRAINING,
    ),
    Fault(
        "gradients of shared keys of one query block only, PyTorch attention",
        "kernels/tree_attention/backend_torch.py",
        "dk[:, :b] += (ds.transpose(2, 3) @ q).sum(1)",
        "dk[:, :b] = (ds.transpose(2, 3) @ q).sum(1)",
        "test_large_trees and torch",
        ATTENTION,
    ),
    Fault(
        "subtrees end a token late, Triton attention",
        "kernels/tree_attention/gpu/forward.py",
        "(row[:, None] < ends[None, :])",
        "(row[:, None] <= ends[None, :])",
        "test_small_trees and triton and forks",
        ATTENTION,
    ),
    Fault(
        "a block of keys that some do not see taken as a whole, C++ attention",
        "csrc/tree_attention/problem.h",
        "least_[static_cast<size_t>(block)] >= b;",
        "least_[static_cast<size_t>(block)] > a;",
        "test_large_trees and cpu",
        ATTENTION,
    ),
    Fault(
        "gradients of shared keys of the last queries only, C++ attention",
        "csrc/tree_attention/backward.cpp",
        "mine.dk.get() + low * s_.sum,\n              s_.sum, true);",
        "mine.dk.get() + low * s_.sum,\n              s_.sum, false);",
        "test_large_trees and cpu",
        ATTENTION,
    ),
    Fault(
        "tiles take their gradients in any order, C++ attention",
        "csrc/tree_attention/backward.cpp",
        "turn_.wait(lock, [&] { return next_[static_cast<size_t>(tile)] == block; });",
        "(void)tile, (void)block;",
        "test_every_instruction_set_and_number_of_threads and float32",
        ATTENTION,
    ),
    Fault(
        "partly hidden blocks taken as whole, FlexAttention",
        "kernels/tree_attention/backend_flex.py",
        "whole = (last <= q0) & (min_end > q1)",
        "whole = (last <= q0) & (min_end > q0)",
        "test_blocks_are_those",
        FOREIGN,
    ),
    Fault(
        "siblings seen, flash-attn",
        "kernels/tree_attention/backend_flash.py",
        "before[ends[before] > start]",
        "before[ends[before] >= start]",
        "test_runs_have_the_keys",
        FOREIGN,
    ),
    Fault(
        "positions are indices of the stream",
        "appo/learner/policy.py",
        "position_ids=batch.position_ids[None]",
        "position_ids=torch.arange(batch.unique_tokens)[None]",
        "test_every_loss_in_float64 and rollouts",
        TRAINING,
    ),
    Fault(
        "hidden states of the token before, learner",
        "appo/learner/policy.py",
        "rows=batch.source[edges]",
        "rows=batch.source[edges].clamp(min=1) - 1",
        "test_every_loss_in_float64 and rollouts",
        TRAINING,
    ),
    Fault(
        "labels shifted by one, packing",
        "appo/packing/pack.py",
        "tokens.ids[at],",
        "tokens.ids[np.roll(at, -1)],",
        "test_every_loss_in_float64 and rollouts",
        TRAINING,
    ),
    Fault(
        "positions are indices, packing",
        "appo/packing/placement.py",
        "position=np.arange(len(shift)) + shift,",
        "position=np.arange(len(shift)) + 0 * shift,",
        "test_every_loss_in_float64 and rollouts",
        TRAINING,
    ),
    Fault(
        "the end of the earlier of equal forks, packing",
        "appo/packing/placement.py",
        "np.concatenate([-rank[child], np.ones(nodes, np.int64)])",
        "np.concatenate([rank[child], np.ones(nodes, np.int64)])",
        "test_every_loss_in_float64 and rollouts",
        TRAINING,
    ),
    Fault(
        "old log-probs of another token, packing",
        "appo/packing/pack.py",
        '"old_logp": old_logp[at],',
        '"old_logp": old_logp[np.roll(at, 1)],',
        "test_every_loss_in_float64 and weight and old log-probs",
        TRAINING,
    ),
    Fault(
        "old log-probs of the token before",
        "appo/algo/objective.py",
        "torch.where(fresh, current, rows.old_logp)",
        "torch.where(fresh, current, rows.old_logp.roll(1))",
        "test_every_loss_in_float64 and weight and old log-probs",
        TRAINING,
    ),
    Fault(
        "the prompt counted in the denominator",
        "appo/algo/credit.py",
        "tokens += sum(int(c.loss_mask.sum()) for c in credits)",
        "tokens += sum(int(c.loss_mask.sum()) + tree.prompt_len for c in credits)",
        "test_every_loss_in_float64 and temperature",
        TRAINING,
    ),
    Fault(
        "branches trained on the tokens they inherit",
        "appo/algo/credit.py",
        "    mask[:trained_from] = False\n",
        "",
        "test_credits_train_every_token_once",
        TRAINING,
    ),
]


def patched(root: Path, fault: Fault) -> str:
    """The text of the file with the fault in it.

    ValueError unless there is exactly one place for it.
    """
    text = (root / fault.file).read_text()
    if text.count(fault.old) != 1:
        raise ValueError(
            f"fault {fault.name!r}: {fault.file} holds its text {text.count(fault.old)} times, expected once; "
            "the file has changed, so write the fault anew"
        )
    return text.replace(fault.old, fault.new)


class Copy:
    """The sources in a folder of their own.

    With the native library of this checkout or, rebuilt, with its own.
    """

    def __init__(self, root: Path):
        self.root = root
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=ignored, symlinks=True)
            else:
                shutil.copy(source, root / name)
        # The checkout may be installed in editable mode: the copy comes first.
        self.env = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
        where = "import appo, appo._kernels.common.stats as s; print(appo.__file__, s.__file__)"
        files = self._run([sys.executable, "-c", where], self.env).stdout.split()
        if not all(Path(f).is_relative_to(root) for f in files):
            raise RuntimeError(f"the copy in {root} is not what runs: {files}")

    def plant(self, fault: Fault) -> None:
        text = patched(self.root, fault)
        (self.root / fault.file).write_text(text)
        if fault.native:
            self.build()

    def restore(self, fault: Fault) -> None:
        shutil.copyfile(ROOT / fault.file, self.root / fault.file)

    def build(self) -> None:
        """Compile csrc/ into the copy's appo/_native; only what changed, after the first time."""
        build, tools = self.root / "build", Path(sys.executable).parent
        env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        if not build.exists():
            configure = ["cmake", "-S", str(self.root), "-B", str(build)]
            configure += [f"-DPython_EXECUTABLE={sys.executable}"]
            configure += [f"-DCMAKE_INSTALL_PREFIX={self.root / 'appo' / '_native'}"]
            self._run(configure, env)
        self._run(["cmake", "--build", str(build), "--target", "install"], env)

    def pytest(self, faults: Sequence[Fault]) -> tuple[str, str]:
        """("green" | "red" | "skipped", name of the first failed test).

        Raises RuntimeError for anything else.
        """
        expression = " or ".join(f"({s})" for s in dict.fromkeys(f.select for f in faults))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "-rf"]
        command += [*dict.fromkeys(f.tests for f in faults), "-k", expression]
        done = subprocess.run(command, cwd=self.root, env=self.env, capture_output=True, text=True)
        failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.M)
        if done.returncode == 1 and failed:
            return "red", failed[1]
        if done.returncode == 0:
            return ("green" if re.search(r"\d+ passed", done.stdout) else "skipped"), ""
        raise RuntimeError(
            f"pytest -k {expression!r} broke:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )

    def _run(self, command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return done


def examine(faults: Sequence[Fault], folder: Path) -> list[dict[str, str]]:
    """Plant each fault in a copy under `folder`.

    Rows {name, file, result, test}, the control first.

    result is "caught" (test names the first one that failed), "MISSED", or "cannot run here" (the
    tests are skipped).
    """
    for fault in faults:
        patched(ROOT, fault)  # all of them, before anything takes time
    copy = Copy(folder / "copy")
    if any(f.native for f in faults):
        copy.build()
    state, failed = copy.pytest(faults)
    if state != "green":
        raise RuntimeError(f"without a fault the tests are {state} {failed}, so they prove nothing")
    rows = [{"name": "none (control)", "file": "", "result": state, "test": ""}]
    words = {"red": "caught", "green": "MISSED", "skipped": "cannot run here"}
    for fault in faults:
        copy.plant(fault)
        state, failed = copy.pytest([fault])
        copy.restore(fault)
        row = {k: v for k, v in asdict(fault).items() if k in ("name", "file")}
        rows.append(row | {"result": words[state], "test": failed})
    return rows


def document(rows: list[dict[str, str]], args: argparse.Namespace) -> dict[str, object]:
    from bench.common import machine

    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "quick": args.quick,
        "cases": [
            {"unit": "caught", "ours": float(row["result"] != "MISSED"), "peers": {},
             "ratio_best_peer": None, "error": None, **row} for row in rows
        ],
    }  # fmt: skip


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    from bench.common import arguments

    args = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        rows = examine([f for f in FAULTS if not (args.quick and f.native)], Path(folder))
    table = Table(*rows[0], title="Seeded faults")
    for row in rows:
        table.add_row(*(value.replace("[", r"\[") for value in row.values()))
    Console(width=160).print(table)
    if args.json:
        args.json.write_text(json.dumps(document(rows, args), indent=2) + "\n")
    sys.exit(any(row["result"] == "MISSED" for row in rows))


if __name__ == "__main__":
    main()
