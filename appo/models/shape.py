"""The shape of a model: one reader of config.json for checks, engines, learner, memory estimate.

    family (one row of FAMILIES, or the user's own) + config.json → ModelShape

A family is data. It says what the keys of config.json and the tensors of the checkpoint are called,
which linear layers have a bias, and whether queries and keys are normed. What is computed is the
same for all of them: RMSNorm, attention with rotary positions and grouped heads, SwiGLU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appo.errors import ModelError
from appo.imports import resolve

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelFamily:
    """How one family of decoder models is written down.

    model_type    as in config.json
    architecture  the first of `architectures` in config.json: the class in transformers
    keys          names of Llama's keys in config.json → names here, where they differ
    names         parts of Llama's tensor names → parts here, where they differ
    qkv_bias, o_bias  None: as `attention_bias` in config.json says
    mlp_bias      None: as `mlp_bias` in config.json says
    qk_norm       RMSNorm over each head of queries and keys

    >>> ModelFamily("my_llama", "MyLlamaForCausalLM", keys={"hidden_size": "d_model"})
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False


FAMILIES: dict[str, ModelFamily] = {
    f.model_type: f
    for f in (
        ModelFamily("llama", "LlamaForCausalLM"),
        ModelFamily("qwen2", "Qwen2ForCausalLM", qkv_bias=True, o_bias=False, mlp_bias=False),
        ModelFamily("qwen3", "Qwen3ForCausalLM", mlp_bias=False, qk_norm=True),
    )
}

EXPECTED = "an appo.models.shape.ModelFamily('my_llama', 'MyLlamaForCausalLM', keys={…})"


@dataclass(frozen=True)
class ModelShape:
    """The numbers of one model; names follow the field, not the file."""

    family: str
    layers: int
    hidden: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_positions: int
    rope: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "silu"
    sliding: bool = False  # some layer attends to a window only
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def query(self) -> int:
        """Elements of one token's queries in one layer."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Elements of one token's keys (or values) in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def bias(self) -> tuple[str, ...]:
        """Linear layers that have a bias."""
        return (
            LINEARS[:3] * self.qkv_bias + LINEARS[3:4] * self.o_bias + LINEARS[4:] * self.mlp_bias
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one transformer layer: name → (inputs, outputs)."""
        h, i, q, k = self.hidden, self.ff, self.query, self.key
        sizes = [(h, q), (h, k), (h, k), (q, h), (h, i), (h, i), (i, h)]
        return dict(zip(LINEARS, sizes, strict=True))

    def tensors(self) -> list[int]:
        """Elements of every parameter; a tied head once."""
        matrices = [a * b for a, b in self.linears().values()]
        biases = [b for name, (_, b) in self.linears().items() if name in self.bias]
        norms = [self.hidden] * 2 + [self.head_dim] * (2 * self.qk_norm)
        ends = [self.vocab * self.hidden] * (1 if self.tied else 2) + [self.hidden]
        return (matrices + biases + norms) * self.layers + ends

    @property
    def parameters(self) -> int:
        """Elements of all parameters; a tied head counts once."""
        return sum(self.tensors())

    def tensor(self, name: str) -> str:
        """The name in this family of the tensor or module that Llama calls `name`."""
        for old, new in self.names.items():
            name = f".{name}.".replace(f".{old}.", f".{new}.")[1:-1]
        return name


def own_family(text: str | None) -> ModelFamily | None:
    """The family that `model.family` names; None when it names none. Raises ConfigError."""
    if text is None:
        return None
    found: ModelFamily = resolve(text, "model.family", EXPECTED, _family_problem)
    return found


def _family_problem(found: Any) -> str:
    if not isinstance(found, ModelFamily):
        return f"is of type {type(found).__name__}"
    if found.model_type in FAMILIES:
        return f"has the model_type {found.model_type!r}, which is built in"
    unknown = sorted(set(found.keys) - KEYS)
    return f"renames the key {unknown[0]!r}, which is none of Llama's" if unknown else ""


def read_config(folder: Path | str) -> dict[str, Any]:
    """The content of `folder`/config.json.

    Raises ModelError when there is none that can be read.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"cannot load a model from {str(folder)!r}: no config.json there, so it is not a Hugging Face model folder; "
            "give a local model folder"
        )
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ModelError when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def read_shape(
    source: Path | str | Mapping[str, Any], family: ModelFamily | None = None
) -> ModelShape:
    """The shape of a model folder, or of the content of its config.json.

    family: the user's own, known beside FAMILIES.
    Raises ModelError for a family that is not known and for a field that is missing or malformed.
    """
    config = source if isinstance(source, Mapping) else read_config(source)
    where = "config.json" if isinstance(source, Mapping) else f"{source}/config.json"
    known = FAMILIES | ({family.model_type: family} if family else {})
    name = config.get("model_type", "?")
    if name not in known:
        raise ModelError(
            f"{where}: model_type={name!r} is not supported; use one of {', '.join(known)}"
        )
    try:
        return _shape(_llama_keys(config, known[name].keys), known[name])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{where}: missing or malformed field {error}") from error


# Keys of config.json that are read.
KEYS = frozenset({
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "max_position_embeddings",
    "hidden_act", "layer_types", "use_sliding_window", "sliding_window", "rope_parameters", "rope_scaling", "rope_theta",
})  # fmt: skip


def _llama_keys(config: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The content of config.json under Llama's names."""
    return {key: config[name] for key in KEYS if (name := keys.get(key, key)) in config}


def _shape(c: Mapping[str, Any], family: ModelFamily) -> ModelShape:
    hidden, heads = int(c["hidden_size"]), int(c["num_attention_heads"])
    attention_bias = bool(c.get("attention_bias", False))
    windowed = c.get("use_sliding_window") and c.get("sliding_window")
    return ModelShape(
        family=family.model_type,
        layers=int(c["num_hidden_layers"]),
        hidden=hidden,
        ff=int(c["intermediate_size"]),
        heads=heads,
        kv_heads=int(c.get("num_key_value_heads") or heads),
        head_dim=int(c.get("head_dim") or hidden // heads),
        vocab=int(c["vocab_size"]),
        eps=float(c.get("rms_norm_eps", 1e-6)),  # the default of transformers
        tied=bool(c.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=bool(c.get("mlp_bias", False)) if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        max_positions=int(c["max_position_embeddings"]),
        rope=_rope(c),
        activation=c.get("hidden_act", "silu"),
        sliding=bool(windowed or "sliding_attention" in (c.get("layer_types") or ())),
        names=dict(family.names),
    )


def _rope(c: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in one form: transformers 5 has rope_parameters, before it rope_scaling."""
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
    return rope
