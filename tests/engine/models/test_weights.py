import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.executors.model_loading import load_model
from engine.model_config import load_model_config
from engine.models.decoder import CausalLM
from engine.weights import model_hash
from tests.checkpoints import make_checkpoint
from tests.engine.models.runner import Piece, Reference, Runner


def load(path: Path) -> CausalLM:
    return load_model(path, load_model_config(path), torch.float32, torch.device("cpu"), None)


def change_tensors(path: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a single-file checkpoint."""
    tensors = load_file(path / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / "model.safetensors")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "llama", tokenizer=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.self_attn.k_proj.weight": None}, r"lacks model\.layers\.1\.self_attn\.k_proj\.weight$"),
        ({"model.norm.weight": None}, r"lacks model\.norm\.weight$"),
        ({"lm_head.weight": None}, r"lacks lm_head\.weight$"),
        (
            {"model.layers.9.mlp.up_proj.weight": torch.ones(1)},
            r"does not know: model\.layers\.9\.mlp\.up_proj\.weight",
        ),
        (
            {"model.norm.weight": torch.ones(63)},
            r"^model\.safetensors: tensor model\.norm\.weight has shape \[63\], the model wants \[64\]",
        ),
        ({"lm_head.weight": torch.ones(64, 512)}, r"lm_head\.weight has shape \[64, 512\]"),
        ({"lm_head.weight": torch.ones(512, 64, dtype=torch.int8)}, r"lm_head\.weight has type torch\.int8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    llama: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    change_tensors(llama, change)
    with pytest.raises(ValueError, match=message):
        load(llama)


def test_what_old_checkpoints_carry_beside_the_weights_is_ignored(llama: Path) -> None:
    change_tensors(llama, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load(llama)


def test_a_head_unlike_the_embedding_is_used_though_the_config_ties_them(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", tie_word_embeddings=True, tokenizer=False)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(tmp_path, {"lm_head.weight": embedding.clone()})
    assert load(tmp_path).lm_head is None
    change_tensors(tmp_path, {"lm_head.weight": embedding.flip(0).contiguous()})
    tokens = list(range(20, 40))
    [ours] = Runner(tmp_path).step(Piece(tokens, 0, [3, 9, 1, 2, 5]))
    assert (ours - Reference(tmp_path).logits(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "model.bin", "gone.safetensors"]
)
def test_an_index_may_only_name_safetensors_files_beside_it(llama: Path, name: str) -> None:
    (llama / "model.safetensors").rename(llama / "shard.safetensors")
    index = {"weight_map": {"lm_head.weight": "shard.safetensors", "model.norm.weight": name}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"not a plain|is missing"):
        load(llama)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a": {}}',
        (8).to_bytes(8, "little") + b"[[[[[[[[",
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(llama: Path, content: bytes) -> None:
    (llama / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"safetensors|holds no tensors"):
        load(llama)


def test_a_tensor_in_two_shards_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "one.safetensors")
    save_file({"model.norm.weight": torch.ones(64)}, llama / "two.safetensors")
    index = {"weight_map": {"lm_head.weight": "one.safetensors", "model.norm.weight": "two.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is in both one\.safetensors and two\.safetensors"):
        load(llama)


def test_a_truncated_file_is_refused(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        load(llama)


def test_pickled_weights_are_not_loaded(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors are loaded"):
        load(llama)


def test_the_hash_is_of_the_content_and_not_of_the_files(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", "qwen2", tokenizer=False)
    shards = make_checkpoint(tmp_path / "shards", "qwen2", tokenizer=False, max_shard_size=50_000)
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert model_hash(whole) == model_hash(shards)
    assert len(model_hash(whole)) == 32


def test_the_hash_changes_with_any_weight_or_setting(llama: Path) -> None:
    hashes = {model_hash(llama)}
    weight = load_file(llama / "model.safetensors")["model.norm.weight"].clone()
    weight[17] += 1
    change_tensors(llama, {"model.norm.weight": weight})
    hashes.add(model_hash(llama))
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    hashes.add(model_hash(llama))
    assert len(hashes) == 3
    (llama / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4, "transformers_version": "0"}))
    assert model_hash(llama) in hashes


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "gemma2", tokenizer=False, max_shard_size=50_000)
    calls: list[tuple[int, int]] = []
    load_model(
        path,
        load_model_config(path),
        torch.float32,
        torch.device("cpu"),
        lambda done, total: calls.append((done, total)),
    )
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert (
        calls[-1][0]
        == calls[-1][1]
        == sum(tensor.nbytes for file in path.glob("*.safetensors") for tensor in load_file(file).values())
    )
