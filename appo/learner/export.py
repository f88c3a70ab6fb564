"""The trained policy as a folder that transformers and rollout engines load."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel

from appo.learner.lora import Gather, HFModel, merged_tensors

COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens*",
    "added_tokens*",
    "chat_template*",
    "generation_config.json",
)


def export(
    path: Path,
    lm: HFModel,
    adapters: PeftModel | None,
    model_dir: Path,
    *,
    gather: Gather | None,
    writes: bool,
) -> None:
    """Merged weights, config and the tokenizer files of `model_dir` under `path`.

    Adapters alone in `path/adapter`.

    Collective where `gather` is (ZeRO-3); only a rank that `writes` touches the disk and holds the
    whole model.
    """
    tensors: dict[str, Any] = {}
    for name, t in merged_tensors(lm, changed_only=False, gather=gather):
        if writes:
            tensors[name] = t.to("cpu", copy=True).contiguous()
    if writes:
        from huggingface_hub import save_torch_state_dict

        path.mkdir(parents=True, exist_ok=True)
        lm.config.save_pretrained(path)
        save_torch_state_dict(tensors, path, metadata={"format": "pt"})
        for file in (f for pattern in COMPANIONS for f in model_dir.glob(pattern)):
            shutil.copy2(file, path / file.name)
    if adapters is not None:
        trained = [p for p in lm.parameters() if p.requires_grad]
        with gather(trained) if gather else nullcontext():
            if writes:
                adapters.save_pretrained(str(path / "adapter"))
