"""The top-level kernels/ folder must never be mistaken for the PyPI package `kernels`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_is_not_a_package():
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_ignores_our_kernels():
    """With the repository root on sys.path a model must still import, and our folder must not be run as `kernels`."""
    code = (
        "import sys; from transformers import Qwen3ForCausalLM; from transformers.utils import is_kernels_available; "
        "import appo.kernels; appo.kernels.future_value; "
        "ours = sys.modules.get('kernels'); assert getattr(ours, '__file__', None) is None, ours; "
        "assert 'kernels.scan' not in sys.modules and 'appo._kernels.branching.future_value' in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


def test_no_second_copy_of_a_definition():
    """In a checkout `appo/kernels/` holds the path shim and nothing else: the source is kernels/."""
    import appo._kernels.branching.future_value

    assert [p.name for p in (ROOT / "appo" / "kernels").glob("*.py")] == ["__init__.py"]
    source = Path(appo._kernels.branching.future_value.__file__).resolve()
    assert source.parent == ROOT / "kernels" / "branching"
