"""Writes docs/families.md: every causal language model of transformers, packed, alone or refused.

    python tools/families.py              all families; minutes on one core
    python tools/families.py llama bloom  prints these only

Each is built tiny and random, written to a folder and loaded as a run loads it, in fp32 on the CPU.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rto_fast.errors import ConfigError
from rto_fast.models.attention import ALONE, PACKED
from rto_fast.models.family import check_family, difference, own_outputs
from rto_fast.models.load import load_policy
from rto_fast.models.packing import Placement

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
LARGEST = 5_000_000
"""Parameters of a model that is still tiny; what cannot be made so small is not tried."""
LONGEST = 40
"""Tokens of the longest sequence: longer than every window of the tiny models."""

SIZES = {
    64: "vocab_size max_position_embeddings n_positions n_ctx max_seq_len seq_length vocab_size_per_layer_input",
    48: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size intermediate_size_mlp decoder_ffn_dim encoder_ffn_dim "
    "dim_ff d_inner feed_forward_size",
    32: "hidden_size n_embd d_model word_embed_proj_dim embedding_size emb_dim lru_width hidden_size_global",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "q_lora_rank kv_lora_rank qk_head_dim index_head_dim",
    8: "head_dim attention_head_size kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_d_state "
    "mamba_n_heads mamba_d_head mamba_headdim state_size mamba_num_heads "
    "mamba_head_dim linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input",
    5: "sliding_window attention_chunk_size window_size attention_window_size sliding_window_size",
    4: "num_hidden_layers n_layer n_layers num_layers hidden_layers num_attention_heads n_head n_heads num_heads "
    "decoder_attention_heads encoder_attention_heads rotary_dim num_experts num_local_experts n_routed_experts "
    "moe_num_experts index_topk mamba_dt_rank linear_num_value_heads",
    2: "decoder_layers encoder_layers num_blocks num_key_value_heads num_experts_per_tok num_experts_per_token moe_k "
    "moe_topk index_n_heads mamba_expand n_mamba_heads linear_num_key_heads eos_token_id",
    1: "n_group topk_group mamba_n_groups n_groups mamba_ngroups bos_token_id is_decoder",
    0: "pad_token_id",
}
"""The tiny value of every size by the names that families give it."""
TINY = {name: value for value, names in SIZES.items() for name in names.split()}
PATTERNS = ("layer_types", "layers_block_type")
"""Lists with the kind of every layer; the tiny model has all kinds."""
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
MORE: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": SLIDING | {"rope_parameters": dict.fromkeys(SLIDING["layer_types"], ROPE)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8},
    "gemma3n_text": SLIDING | {"num_kv_shared_layers": 2, "intermediate_size": 48},
    "gemma4_text": SLIDING | {"per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 4, "hc_lowrank": 8},
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_headdim": 32},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What single families need besides."""


def tiny_config(family: str) -> PretrainedConfig:
    """The family's default config with every size made small."""
    make = CONFIG_MAPPING[family]
    return make(**_shrunk(make()))


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        inner = getattr(config, name, None) if isinstance(value, dict | list) else None
        if isinstance(inner, PretrainedConfig):
            out[name] = _shrunk(inner)
        elif name in PATTERNS and inner:
            kinds = list(dict.fromkeys(inner))
            out[name] = [kinds[i % len(kinds)] for i in range(TINY["num_hidden_layers"])]
        elif name in TINY and not isinstance(value, list | dict) and (value is not None or name.endswith("token_id")):
            out[name] = bool(TINY[name]) if name == "is_decoder" else TINY[name]
    if "kv_lora_rank" in out and "num_key_value_heads" in out:  # latent attention: every head has its own keys
        out["num_key_value_heads"] = out["num_attention_heads"]
    return out | MORE.get(config.model_type, {})


def save_tiny(family: str, folder: str) -> None:
    """Writes a random model whose next-token distribution is far from uniform. Raises whatever the family raises."""
    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters at the least")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(0, 0.15)
            elif "bias" in name or "sink" in name:
                p.normal_(0, 0.3)
    model.save_pretrained(folder)
    config.save_pretrained(folder)  # a model of text alone keeps only its part


def tried(folder: str, own: list[Tensor], placement: Placement) -> tuple[float | None, str]:
    """(largest difference of a log-prob in nats, "") or (None, why the model is refused)."""
    attention = None if placement.kernel == ALONE else PACKED
    try:
        model = load_policy(folder, dtype=torch.float32, attention=attention, argument="model")
        check_family(model, own, placement, "model")
        return difference(model, own, placement).nats, ""
    except ConfigError as error:
        return None, str(error)


def row(family: str) -> tuple[str, str, str]:
    """(family, packed | alone | refused | not tried, figures or the reason)."""
    packed, alone = (Placement(torch.device("cpu"), k, False, 1000, longest=LONGEST) for k in ("sdpa", ALONE))
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_tiny(family, folder)
            raw = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        except Exception as error:  # the families' own, of any type
            return family, "not tried", f"no tiny model: {_short(error)}"
        try:
            own = own_outputs(raw, alone, "model")
        except ConfigError as error:
            return family, "not tried", f"the tiny {_short(error)}"
        nats, why_packed = tried(folder, own, packed)
        if nats is not None:
            return family, "packed", f"{nats:.0e} nat"
        nats, why_alone = tried(folder, own, alone)
        if nats is not None:
            return family, "alone", f"{nats:.0e} nat; packed: {_short(why_packed, folder)}"
        return family, "refused", _short(why_alone, folder)


def _short(reason: object, folder: str = "") -> str:
    """One line without the path and without what every such line says."""
    text = " ".join(str(reason).split()).replace(f"model: {folder!r} ", "").replace("Use --packing off", "")
    return text.replace("|", "/").strip(" .")[:240]


def page(rows: list[tuple[str, str, str]]) -> str:
    counts = {kind: sum(r[1] == kind for r in rows) for kind in ("packed", "alone", "refused", "not tried")}
    lines = [
        "# Model families", "",
        "Made by `python tools/families.py` over tiny random models of every causal language model in transformers "
        f"{transformers.__version__}, in fp32 on a CPU. Figures: the largest difference of any log-prob from "
        "transformers' own forward of each sequence alone with eager attention.", "",
        "* **packed**: runs by default.",
        "* **alone**: runs with `--packing off`, one sequence a row; by default the run is refused before it writes.",
        "* **refused**: gives other log-probs than its own either way, or does not run on text alone.",
        "* **not tried**: no tiny model can be built from the default config, or a package is missing. The check when "
        "a model is loaded decides.", "",
        "Whatever this table says, every run compares its own models when it loads them, in its dtype on its device. "
        "Tiny models have windows of 5 tokens: a family that attends in chunks packs where no sequence is longer than "
        "a chunk. Layers with a state (linear attention, state spaces, short convolutions) run alone: the PyTorch code "
        "that transformers has for them does not know where the sequences of a row end. Dropout and what else a family "
        "draws at random in training is taken out.", "",
        ", ".join(f"{kind} {count}" for kind, count in counts.items()) + ".", "",
        "| family | | |", "|---|---|---|",
        *(f"| {family} | {kind} | {text} |" for family, kind, text in rows), "",
    ]  # fmt: skip
    return "\n".join(lines)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with open("/dev/null", "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def main(names: list[str]) -> None:
    rows = []
    for family in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with _quiet():
            rows.append(row(family))
        print(*rows[-1], sep=" | ", flush=True)
    if not names:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
