"""The model runner: Llama, Qwen2 and Qwen3 as one straight loop over layers.

The caller supplies attention.

This is the definition, and what runs where the C++ runner (layers.py) cannot. Both work on the same
weights: `native` is the C++ runner of a model that has one.

q, k, v are one linear and gate, up another. The residual stream and the norms are float32; the
rotary embedding is one complex product in float32 because the pairs it turns are made neighbours
when weights are loaded (a permutation inside each head of q and k leaves q·k unchanged).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from appo.errors import ModelError
from appo.models.shape import ModelShape
from appo.rollout.native.model import layers as native_layers
from appo.rollout.native.model.adapters import Adapters
from appo.rollout.native.model.linear import Layer, Linear, Slice, Target
from appo.rollout.native.model.weights import inverse_frequencies
from appo.rollout.native.sampling.definition import Sampled, SamplingRows

# attention(layer, q[M,Hq,D], k[M,Hkv,D], v[M,Hkv,D]) -> [M, Hq*D]
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Model:
    """Weights in `dtype` and the forward pass. `load` fills them; until then they are zero.

    fp32_logits: take the output layer of a bfloat16 model in float32. Products of bfloat16 numbers
    are exact there, so this only avoids rounding: of each logit to 8 bits, which is half of all
    error in a bfloat16 logprob (SmolLM2-135M: mean 0.030 with, 0.014 without; Hugging Face 0.037),
    and of the hidden state, which is little of it (0.018 with, 0.018 without, on another text). In
    PyTorch it costs a float32 copy. In C++ logits are float32 in any case; the hidden state in
    float32 doubles the head's multiplications, an eighth of a decode step at 16 rows.
    runner: "torch", "native" (C++) or "auto", which is C++ where it can run.
    """

    def __init__(
        self,
        config: ModelShape,
        dtype: torch.dtype,
        device: torch.device,
        max_context: int,
        fp32_logits: bool = True,
        runner: str = "auto",
    ):
        c = self.config = config
        self.dtype, self.device = dtype, device
        q, kv, d = c.heads * c.head_dim, c.kv_heads * c.head_dim, c.hidden

        def linear(o: int, i: int, bias: bool) -> Linear:
            zeros = torch.zeros(o, dtype=dtype, device=device) if bias else None
            return Linear(torch.zeros(o, i, dtype=dtype, device=device), zeros, dtype)

        def ones(*shape: int) -> Tensor:
            return torch.ones(*shape, device=device)

        self.embed = torch.zeros(c.vocab, d, dtype=dtype, device=device)
        self.layers = [
            Layer(
                norm1=ones(d),
                qkv=linear(q + 2 * kv, d, c.qkv_bias),
                qk_norm=ones(c.heads + c.kv_heads, c.head_dim) if c.qk_norm else None,
                o=linear(d, q, c.o_bias),
                norm2=ones(d),
                gate_up=linear(2 * c.ff, d, c.mlp_bias),
                down=linear(d, c.ff, c.mlp_bias),
            )
            for _ in range(c.layers)
        ]
        self.norm = ones(d)
        head = self.embed if c.tied else torch.zeros_like(self.embed)
        self.head = Linear(head, None, torch.float32 if fp32_logits else dtype)
        angles = torch.outer(torch.arange(max_context, dtype=torch.float32), inverse_frequencies(c))
        self.turn = (
            torch.polar(torch.ones_like(angles), angles).unsqueeze(1).to(device)
        )  # [context, 1, D/2] complex
        self.native = native_layers.choose(runner, config, dtype, device)
        self.slices: dict[str, Slice] = {}  # module name -> its part of a fused linear
        self.targets = _targets(self)

    def load(self, named_tensors: Iterable[tuple[str, object]]) -> set[str]:
        """Copy tensors with Hugging Face names into place.

        Check all of them before the first is written.

        `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r] (scaling folded in) replace that
        module's adapter. Returns the names written. Raises ModelError for an unknown name or a
        wrong shape.
        """
        pairs: list[tuple[str, Tensor]] = []
        adapters = Adapters()
        lm_head, embed = map(self.config.tensor, ("lm_head.weight", "model.embed_tokens.weight"))
        for name, value in named_tensors:
            if adapters.take(name, value):
                continue
            if name == lm_head and self.config.tied:
                # a tied model's state_dict names the same tensor twice
                name = embed
            if name.endswith("rotary_emb.inv_freq"):
                continue
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
            want = self.targets.get(name)
            if want is None:
                raise ModelError(
                    f"weight {name!r} does not belong to a {self.config.family} model; use Hugging Face names"
                )
            if tuple(tensor.shape) != want.shape:
                raise ModelError(
                    f"weight {name!r} has shape {tuple(tensor.shape)}, the model needs {want.shape}"
                )
            pairs.append((name, tensor))
        if not pairs and not adapters.parts:
            raise ModelError("no weights given: named_tensors is empty")
        with torch.no_grad():
            install = adapters.check(self.slices, self.dtype)
            for name, _ in pairs:  # a new (merged) weight replaces what was applied to the old one
                if (place := self.slices.get(name.removesuffix(".weight"))) is not None:
                    place.linear.adapter, place.linear.adapted = None, frozenset()
            install()
            for name, tensor in pairs:
                self.targets[name].write(tensor.detach())
            if pairs:  # adapters alone leave every weight, and its packed copy, as it is
                self._pack([name for name, _ in pairs])
            if self.native is not None:
                self.native.adapt(self)
        return {name for name, _ in pairs} | set(adapters.parts)

    def _pack(self, changed: Iterable[str]) -> None:
        if self.native is not None:
            self.native.pack(self, changed)
            return
        for layer in self.layers:
            for part in (layer.qkv, layer.o, layer.gate_up, layer.down):
                part.pack()
        self.head.pack()

    def forward(
        self, ids: Tensor, positions: Tensor, attention: Attention, out_rows: Tensor | None
    ) -> Tensor:
        """Final hidden states, normed, as the output layer wants them.

        [R, d], rows `out_rows` (None: all) of ids[M].

        Always in PyTorch; `native.forward` is the same over a block pool.
        """
        x = self.embed[ids].float()  # [M, d], the residual stream
        self._layers(x, positions, attention)
        if out_rows is not None:
            x = x.index_select(0, out_rows)
        return F.rms_norm(x, self.norm.shape, self.norm, self.config.eps).to(self.head.compute)

    def _layers(self, x: Tensor, positions: Tensor, attention: Attention) -> None:
        """All layers, x[M, d] in place."""
        c = self.config
        nq, nqk = c.heads, c.heads + c.kv_heads
        shape = (len(x), nqk, c.head_dim // 2, 2)
        turn = self.turn[positions]  # [M, 1, D/2]
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(self._norm(x, layer.norm1))  # [M, (Hq + 2 Hkv) D]
            qk = qkv[:, : nqk * c.head_dim].float().view(shape[0], nqk, c.head_dim)
            if layer.qk_norm is not None:
                qk = F.rms_norm(qk, (c.head_dim,), None, c.eps).mul_(layer.qk_norm)
            qk = torch.view_as_real(torch.view_as_complex(qk.view(shape)) * turn).to(self.dtype)
            qk = qk.view(shape[0], nqk, c.head_dim)
            v = qkv[:, nqk * c.head_dim :].view(shape[0], c.kv_heads, c.head_dim)
            x.add_(layer.o(attention(index, qk[:, :nq], qk[:, nq:], v)))
            gate_up = layer.gate_up(self._norm(x, layer.norm2))
            x.add_(layer.down(F.silu(gate_up[:, : c.ff]).mul_(gate_up[:, c.ff :])))

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V], float32 if fp32_logits or from the C++ head, else in the weights' dtype."""
        return self.head(hidden) if self.native is None else self.native.logits(hidden)

    def sample(self, hidden: Tensor, rows: SamplingRows) -> Sampled | None:
        """One token per row by the C++ head, from a tile of logits at a time.

        None where PyTorch is the runner.
        """
        return None if self.native is None else self.native.head.sample(hidden, rows)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.eps).to(self.dtype)


def _targets(m: Model) -> dict[str, Target]:
    """Name in the checkpoint -> place, for every tensor of the model.

    Written here as Llama has them.
    """
    c = m.config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    out: dict[str, Target] = {}

    def put(name: str, into: Tensor, heads: int = 0, shape: tuple[int, ...] | None = None) -> None:
        out[c.tensor(name)] = Target(into, shape or tuple(into.shape), heads)

    def put_linear(name: str, linear: Linear, a: int, b: int, heads: int = 0) -> None:
        put(f"{name}.weight", linear.weight[a:b], heads)
        m.slices[c.tensor(name)] = Slice(linear, a, b, heads)
        if linear.bias is not None:
            put(f"{name}.bias", linear.bias[a:b], heads)

    put("model.embed_tokens.weight", m.embed)
    put("model.norm.weight", m.norm)
    if not c.tied:
        put("lm_head.weight", m.head.weight)
    for i, layer in enumerate(m.layers):
        at = f"model.layers.{i}"
        put(f"{at}.input_layernorm.weight", layer.norm1)
        put(f"{at}.post_attention_layernorm.weight", layer.norm2)
        put_linear(f"{at}.self_attn.q_proj", layer.qkv, 0, q, c.heads)
        put_linear(f"{at}.self_attn.k_proj", layer.qkv, q, q + kv, c.kv_heads)
        put_linear(f"{at}.self_attn.v_proj", layer.qkv, q + kv, q + 2 * kv)
        put_linear(f"{at}.self_attn.o_proj", layer.o, 0, c.hidden)
        put_linear(f"{at}.mlp.gate_proj", layer.gate_up, 0, c.ff)
        put_linear(f"{at}.mlp.up_proj", layer.gate_up, c.ff, 2 * c.ff)
        put_linear(f"{at}.mlp.down_proj", layer.down, 0, c.hidden)
        if layer.qk_norm is not None:
            put(f"{at}.self_attn.q_norm.weight", layer.qk_norm[: c.heads], 1, (c.head_dim,))
            put(f"{at}.self_attn.k_norm.weight", layer.qk_norm[c.heads :], 1, (c.head_dim,))
    return out
