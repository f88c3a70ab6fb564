"""`appo.kernels` is a typed door: lazy at run time, and type checkers see through it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from appo import kernels

ROOT = Path(__file__).resolve().parents[2]
FACADE = ROOT / "appo" / "kernels" / "__init__.py"

USE = """\
from torch import Tensor

from appo.kernels import LogProbEntropy, PolicyLoss, linear_logprob_entropy, policy_loss
from appo._kernels.linear_logprob.op import linear_logprob_entropy as deep


def right(h: Tensor, w: Tensor, y: Tensor) -> LogProbEntropy:
    return linear_logprob_entropy(h, w, y, inv_temp=0.5)


def wrong(h: Tensor, w: Tensor, y: Tensor) -> PolicyLoss:
    linear_logprob_entropy(h, w, "targets")  # line 12
    return policy_loss(h, w, y)  # line 13


reveal_type(linear_logprob_entropy)  # line 16
reveal_type(deep)  # line 17
reveal_type(policy_loss)  # line 18
"""
HEAD = (
    "def (h: Tensor, w: Tensor, targets: Tensor, *, rows: Tensor | None =, inv_temp: float | Tensor =, "
    "softcap: float | None =, vocab_start: int =, group: Any =, backend: str =, deterministic: bool =, "
    "saved_bytes: int =, block: tuple[int, int] | None =) -> LogProbEntropy"
)


def plain(text):
    """A revealed type with short names, whatever the spelling of mypy's version."""
    for long in ("torch._tensor.", "builtins.", "appo._kernels.linear_logprob.op.",
                 "appo._kernels.policy_loss.op."):  # fmt: skip
        text = text.replace(long, "")
    text = text.replace("Union[Tensor, None]", "Tensor | None")
    return re.sub(r"tuple\[Tensor[^()]*, fallback=(\w+)\]", r"\1", text)  # a named tuple


@pytest.mark.slow
def test_mypy_sees_the_signatures(tmp_path):
    """The facade and the deep import reveal the full signature; two wrong calls are two errors."""
    file = tmp_path / "use.py"
    file.write_text(USE)
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *config, str(file)],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    errors = [line for line in lines if ": error:" in line]
    assert [line.split(":")[1] for line in errors] == ["12", "13"], done.stdout + done.stderr
    assert '"str"; expected "Tensor"' in errors[0] and "[call-arg]" in errors[1]
    revealed = [plain(line.split('"')[1]) for line in lines if "Revealed type" in line]
    assert revealed[:2] == [HEAD, HEAD]
    assert revealed[2].startswith("def (logp: Tensor, old_logp: Tensor, ")
    assert revealed[2].endswith("-> PolicyLoss")


def typed_imports():
    """Public name → module of the imports under `if TYPE_CHECKING`."""
    found = {}
    for block in ast.parse(FACADE.read_text()).body:
        if isinstance(block, ast.If):
            for line in block.body:
                for alias in line.names:
                    assert alias.asname == alias.name, "`as` the same name makes it public for mypy"
                    found[alias.name] = line.module
    return found


def test_three_lists_of_public_names_agree():
    table = {name: f"appo._kernels.{module}" for name, module in kernels._PUBLIC.items()}
    assert typed_imports() == table
    assert sorted(kernels.__all__) == sorted(table)
    assert set(table) <= set(dir(kernels))


@pytest.mark.parametrize("name", sorted(kernels._PUBLIC))
def test_public_names_are_what_the_source_defines(name):
    """Read from the source: the name is defined in that module, not imported into it. And it loads."""
    file = ROOT / "kernels" / (kernels._PUBLIC[name].replace(".", "/") + ".py")
    defined = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined.update(ast.unparse(target) for target in node.targets)
    assert name in defined, f"{file} does not define {name}"
    module = (
        sys.modules[f"appo._kernels.{kernels._PUBLIC[name]}"] if hasattr(kernels, name) else None
    )
    assert getattr(kernels, name) is getattr(module, name)


def test_unknown_name():
    with pytest.raises(AttributeError, match="'appo.kernels' has no attribute 'polcy_loss'"):
        _ = kernels.polcy_loss
