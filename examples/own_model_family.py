"""A model family of your own: the tiny Qwen3 with other keys in its config.json.

    cd examples
    python own_model_family.py renamed
    appo train tiny steps=1 prompts_per_step=4 model.name=renamed model.family=own_model_family:FAMILY

transformers is told the classes, appo the keys. The first command writes a folder to try it with.
"""

import json
import shutil
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from appo.models.resolve import TINY
from appo.models.shape import ModelFamily

KEYS = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
FAMILY = ModelFamily("renamed", "RenamedForCausalLM", keys=KEYS, mlp_bias=False, qk_norm=True)


class RenamedConfig(Qwen3Config):
    model_type, attribute_map = FAMILY.model_type, KEYS


class RenamedForCausalLM(Qwen3ForCausalLM):
    config_class = RenamedConfig


AutoConfig.register(FAMILY.model_type, RenamedConfig)
AutoModelForCausalLM.register(RenamedConfig, RenamedForCausalLM)

if __name__ == "__main__":
    folder = Path(shutil.copytree(TINY, sys.argv[1]))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": FAMILY.model_type, "architectures": [FAMILY.architecture]}
    (folder / "config.json").write_text(json.dumps({KEYS.get(k, k): v for k, v in config.items()}))
