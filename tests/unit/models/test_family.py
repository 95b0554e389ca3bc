"""Families: packed where exact, refused where not, and right with one sequence a row."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
import transformers
from loop_helpers import ROOT, small_run
from transformers import AutoModelForCausalLM

from rto_fast import trainer
from rto_fast.config import DPOConfig, RMConfig, RTOConfig, SFTConfig
from rto_fast.errors import ConfigError
from rto_fast.models.attention import ALONE, PACKED
from rto_fast.models.family import check_config, check_family, difference, own_outputs, sequences
from rto_fast.models.heads import PolicyModel
from rto_fast.models.load import load_policy, new_scalar
from rto_fast.models.packing import PackedBatch, Placement, micro_batches
from rto_fast.supervised.dpo import train_dpo
from rto_fast.supervised.reward_model import train_rm
from rto_fast.supervised.sft import train_sft

VOCAB = 50
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
TEXT = SMALL | {"sliding_window": 5, "query_pre_attn_scalar": 8, "bos_token_id": 1, "eos_token_id": 2}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
PACKS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, sliding_window=5, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": lambda: transformers.Gemma2Config(**TEXT, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=TEXT,
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        image_token_index=VOCAB - 1, boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3, mm_tokens_per_image=4,
    ),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.3),
}  # fmt: skip
ALONE_ONLY = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**SMALL, **LINEAR),
    "mamba": lambda: transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8),
    "gptj": lambda: transformers.GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=8),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, window_size=5,
        attention_types=[[["global", "local"], 1]],
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "mpt": lambda: transformers.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4),
    "stablelm": lambda: transformers.StableLmConfig(**SMALL),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SMALL, attention_chunk_size=5, intermediate_size_mlp=48, num_local_experts=2
    ),
}  # fmt: skip
REFUSED = {"bert": lambda: transformers.BertConfig(**SMALL, is_decoder=True)}


def placed(kernel: str) -> Placement:
    return Placement(torch.device("cpu"), kernel, lockstep=False, micro_tokens=100, longest=40)


def loading(kernel: str, dtype: torch.dtype = torch.float32) -> dict:
    attention = None if kernel == ALONE else PACKED
    return {"dtype": dtype, "attention": attention, "argument": "model", "placement": placed(kernel)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function: family -> folder of a random model whose next-token distribution is far from uniform."""
    made: dict[str, str] = {}
    configs = PACKS | ALONE_ONLY | REFUSED

    def folder(family: str) -> str:
        if family not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(configs[family]())
            with torch.no_grad():
                for p in model.parameters():
                    if p.dim() >= 2:
                        p.normal_(0, 0.25)
            made[family] = str(tmp_path_factory.mktemp(family))
            model.save_pretrained(made[family])
        return made[family]

    return folder


def own_logps(path: str, rows: list[torch.Tensor]) -> torch.Tensor:
    """Of all tokens but the first ones, by transformers' own forward of each sequence alone."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = [model(input_ids=r[None], use_cache=False).logits[0, :-1].log_softmax(-1) for r in rows]
    return torch.cat([x.gather(1, r[1:, None])[:, 0] for x, r in zip(logits, rows, strict=True)])


def our_logps(path: str, rows: list[torch.Tensor], kernel: str) -> torch.Tensor:
    model = load_policy(path, **loading(kernel))
    with torch.no_grad():
        return model(PackedBatch.make(rows, [1] * len(rows), torch.device("cpu"), kernel))


@pytest.mark.parametrize("family", PACKS)
def test_a_family_that_packs_has_its_own_log_probs(folders, family):
    rows = [torch.randint(3, VOCAB - 5, (n,)) for n in (7, 1, 20, 2)]
    expected = own_logps(folders(family), rows)
    for kernel in ("sdpa", ALONE):
        torch.testing.assert_close(our_logps(folders(family), rows, kernel), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "cohere"])
def test_sinks_soft_caps_and_scales_have_their_own_gradients(folders, family):
    rows = [torch.randint(3, VOCAB - 5, (n,)) for n in (7, 20, 2)]
    ours = load_policy(folders(family), **loading("sdpa"))
    ours(PackedBatch.make(rows, [1] * 3, torch.device("cpu"), "sdpa")).sum().backward()
    own = AutoModelForCausalLM.from_pretrained(folders(family), attn_implementation="eager").eval()
    for row in rows:
        logp = own(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        logp.gather(1, row[1:, None]).sum().backward()
    expected = dict(own.named_parameters())
    assert any("sinks" in name for name in expected) == (family == "gpt_oss")
    for name, p in ours.lm.named_parameters():
        if p.grad is not None:
            limit = 1e-4 * float(expected[name].grad.abs().max()) + 1e-5
            torch.testing.assert_close(p.grad, expected[name].grad, atol=limit, rtol=0)


@pytest.mark.parametrize("family", ALONE_ONLY)
def test_a_family_that_does_not_pack_is_refused_and_right_alone(folders, family):
    with pytest.raises(ConfigError, match=r"^model: .*Use --packing off$") as refusal:
        load_policy(folders(family), **loading("sdpa"))
    assert "\n" not in str(refusal.value)
    rows = [torch.randint(3, VOCAB, (n,)) for n in (7, 2, 20, 1)]
    torch.testing.assert_close(
        our_logps(folders(family), rows, ALONE), own_logps(folders(family), rows), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.parametrize("kernel", ["sdpa", ALONE])
def test_a_family_that_is_not_right_either_way_is_refused(folders, family, kernel):
    with pytest.raises(ConfigError, match="cannot be packed" if kernel == "sdpa" else r"model: .* is not supported"):
        load_policy(folders(family), **loading(kernel))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_tells_rounding_from_a_leak(folders, dtype):
    """In 16 bits too; a critic's backbone is judged by its states."""
    load_policy(folders("llama"), **loading("sdpa", dtype))
    new_scalar(folders("llama"), **loading("sdpa", dtype))
    for load in (load_policy, new_scalar):
        with pytest.raises(ConfigError, match=r"in a packed row its .* differ"):
            load(folders("bloom" if load is load_policy else "qwen3_5"), **loading("sdpa", dtype))


def test_the_check_leaves_no_trace(folders):
    """Random state, weights, attention and mode are as without it."""
    plain = load_policy(folders("llama"), **(loading("sdpa") | {"placement": None}))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    checked = load_policy(folders("llama"), **loading("sdpa"))
    assert torch.equal(torch.get_rng_state(), before)
    assert checked.lm.config._attn_implementation == PACKED
    assert checked.training == plain.training
    assert all(torch.equal(x, y) for x, y in zip(checked.parameters(), plain.parameters(), strict=True))


def test_windows_that_the_run_overruns_are_overrun(folders):
    """Else a family that is not told of its window would pass."""
    config = transformers.MistralConfig(**SMALL, sliding_window=12)
    assert max(len(s) for s in sequences(config, 40)) == 27
    assert max(len(s) for s in sequences(config, 12)) < 12


def test_what_a_short_row_cannot_show_is_read_from_the_config():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = transformers.LlamaConfig(**(SMALL | {"max_position_embeddings": 32}), rope_parameters=rope)
    assert "32 tokens" in check_config(dynamic, placed("sdpa"))
    chunks = transformers.Llama4TextConfig(**SMALL, attention_chunk_size=16)
    assert "chunks of 16" in check_config(chunks, placed("sdpa"))
    for config in (dynamic, chunks):
        assert not check_config(config, placed(ALONE))
        assert not check_config(config, Placement(torch.device("cpu"), "sdpa", False, 100, longest=16))


def test_without_packing_every_row_is_a_micro_batch():
    config = SFTConfig(data="x", model="x", packing="off")
    assert micro_batches(range(3), [1, 1, 5], config.micro_budget(100)) == [[2], [0], [1]]
    with pytest.raises(ConfigError, match="varlen"):
        SFTConfig(data="x", model="x", packing="off", attention="varlen").validate()
    with pytest.raises(ConfigError, match="mppo"):
        DPOConfig(data="x", model="x", packing="off", objective="mppo", zero_stage=3).validate()


@pytest.fixture(scope="module")
def bloom(tiny, tmp_path_factory):
    """A Bloom, which cannot be packed, with the tiny task's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.policy)
    torch.manual_seed(0)
    ids = {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, **ids)
    folder = tmp_path_factory.mktemp("bloom")
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, 0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def small_stage(data: str, folder: Path, **settings) -> dict:
    return {
        "data": data, "output_dir": str(folder), "dtype": "fp32", "batch": 8, "max_rows": 24, "max_length": 64,
        "gradient_checkpointing": False, "data_cache": False, "data_workers": 1, "lr": 1e-3,
    } | settings  # fmt: skip


def first_losses(folder: Path) -> list[float]:
    """Losses of the first logged step."""
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    return [value for key, value in row.items() if key.endswith("loss")]


def dpo(objective: str):
    return lambda tiny, kw: train_dpo(
        DPOConfig(model=tiny.policy, objective=objective, **small_stage(tiny.pairs, **kw))
    )


STAGES = {
    "sft": lambda tiny, kw: train_sft(SFTConfig(model=tiny.policy, **small_stage(tiny.texts, **kw))),
    "rm": lambda tiny, kw: train_rm(RMConfig(model=tiny.policy, **small_stage(tiny.pairs, **kw))),
    **{objective: dpo(objective) for objective in ("dpo", "tdpo2", "kto", "mppo")},
    "rto": lambda tiny, kw: trainer.train(
        RTOConfig(**small_run(tiny, kw.pop("folder"), prompt_key="prompt", iterations=1, **kw))
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_learns_the_same_without_packing(one_rank, tiny, tmp_path, capsys, stage):
    for packing in ("on", "off"):
        STAGES[stage](tiny, {"folder": tmp_path / packing, "packing": packing})
        assert ("packing: off, one sequence a row" in capsys.readouterr().out) == (packing == "off")
    on, off = (first_losses(tmp_path / packing) for packing in ("on", "off"))
    assert on
    assert off == pytest.approx(on, rel=1e-5, abs=1e-6)


def test_a_family_that_cannot_be_packed_learns_without(one_rank, tiny, bloom, tmp_path):
    """At ZeRO-3 too, with one loss whatever a micro-batch holds."""
    losses = []
    for i, settings in enumerate(({"zero_stage": 3}, {"micro_tokens": 7})):
        folder = tmp_path / str(i)
        train_sft(SFTConfig(model=bloom, packing="off", **small_stage(tiny.texts, folder, **settings)))
        losses += first_losses(folder)
    assert losses[1:] == pytest.approx(losses[:-1], rel=1e-6)


def test_a_family_that_cannot_be_packed_writes_nothing(one_rank, tiny, bloom, tmp_path):
    for train, config, data in ((train_sft, SFTConfig, tiny.texts), (train_dpo, DPOConfig, tiny.pairs)):
        with pytest.raises(ConfigError, match=r"^model: .*BloomForCausalLM.*cannot be packed.*Use --packing off$"):
            train(config(model=bloom, **small_stage(data, tmp_path / "run")))
        assert not [f for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"]


def test_the_page_of_families_says_what_a_run_does():
    row = runpy.run_path(str(ROOT / "tools" / "families.py"))["row"]
    kinds = {family: row(family)[1] for family in ("llama", "lfm2", "deepseek_v3", "bert", "musicgen")}
    assert kinds == {
        "llama": "packed", "lfm2": "alone", "deepseek_v3": "packed", "bert": "refused", "musicgen": "not tried",
    }  # fmt: skip


DRAWN = {
    "opt": {"dropout": 0.5, "activation_dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "biogpt": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "layerdrop": 0.5},
    "mixtral": {"router_jitter_noise": 0.5, "attention_dropout": 0.5},
    "phimoe": {"router_jitter_noise": 0.01, "input_jitter_noise": 0.5},
}  # fmt: skip
"""Families that drop or draw at random in training, by modules, by functions, layers or routers."""


@pytest.mark.parametrize("family", DRAWN)
def test_nothing_is_drawn_at_random_in_training(one_rank, tmp_path, family):
    """PPO's first ratio would not be 1."""
    families = runpy.run_path(str(ROOT / "tools" / "families.py"))
    families["MORE"][family] = families["MORE"].get(family, {}) | DRAWN[family]
    families["save_tiny"](family, str(tmp_path))
    model = load_policy(str(tmp_path), dtype=torch.float32, attention=None, argument="model")
    batch = PackedBatch.make([torch.arange(3, 30), torch.arange(9, 15)], [1, 2], torch.device("cpu"), ALONE)
    with torch.no_grad():
        assert torch.equal(model.train()(batch), model.eval()(batch))


def test_a_model_that_draws_at_random_in_training_is_refused(one_rank, tiny):
    """Whatever its module calls it."""
    lm = AutoModelForCausalLM.from_pretrained(tiny.policy, attn_implementation=PACKED)
    placement = Placement(torch.device("cpu"), "sdpa", False, 100)
    own = own_outputs(lm, placement, "model")
    norm = lm.model.norm
    norm.register_forward_hook(lambda module, args, out: torch.nn.functional.dropout(out, 0.1, module.training))
    model = PolicyModel(lm)
    assert difference(model, own, placement).relative < 1e-4
    with pytest.raises(
        ConfigError, match=r"^model cannot be packed: in training its log-probs differ by .* evaluation"
    ):
        check_family(model, own, placement, "model")
