"""Weights into a model: those of a folder at the start, some or all of them with every update."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from appo.errors import EngineError, ModelError
from appo.rollout.native.model.model import Model
from appo.rollout.native.model.weights import read_tensors


class ModelLoader:
    """Loads one model and knows whether it is whole. loaded: names written by the last `load`."""

    def __init__(self, model: Model):
        self.model = model
        self.loaded: set[str] = set()
        self._partially_loaded = False  # a load broke off: some weights are new, some old

    def load_folder(self, model_dir: Path) -> None:
        """All weights of a Hugging Face folder. Raises ModelError if the folder lacks one."""
        missing = set(self.model.targets) - self.model.load(read_tensors(model_dir))
        if missing:
            raise ModelError(
                f"model_dir={str(model_dir)!r} lacks {len(missing)} weights, for example {min(missing)!r}"
            )

    def load(self, named_tensors: Iterable[tuple[str, object]]) -> None:
        """Replace weights in place. Raises ModelError before the first one is written.

        After any other exception `check_whole` refuses until all weights have been loaded again.
        """
        try:
            self.loaded = self.model.load(named_tensors)
        except ModelError:
            raise  # found before anything was written
        except BaseException:
            self._partially_loaded = True
            raise
        self._partially_loaded &= not self.loaded >= set(self.model.targets)

    def check_whole(self, operation: str) -> None:
        """Raises EngineError, which names the operation, while some weights are new and some old."""
        if self._partially_loaded:
            raise EngineError(
                f"{operation}: the last load_weights broke off, so some weights are old and some new; load all of them again"
            )
