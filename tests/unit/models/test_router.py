"""The auxiliary loss of mixtures of experts is transformers' own; mixtures train on two ranks under ZeRO-3."""

from __future__ import annotations

import json
import runpy

import pytest
import torch
from experts_worker import ROWS, STEPS, WITH_AUX
from launches import Launch
from loop_helpers import ROOT, make_tiny_models, small_run
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from rto_fast.config import DPOConfig, RMConfig, RTOConfig, SFTConfig
from rto_fast.errors import ConfigError
from rto_fast.models.attention import ALONE, PACKED
from rto_fast.models.load import load_policy, new_scalar
from rto_fast.models.packing import PackedBatch, plan
from rto_fast.models.router import watch_router
from rto_fast.supervised.dpo import train_dpo
from rto_fast.supervised.loop import batch_rows
from rto_fast.supervised.reward_model import train_rm
from rto_fast.supervised.sft import train_sft
from rto_fast.trainer import train

SPREAD = ("mixtral", "gpt_oss", "qwen3_moe", "olmoe", "granitemoe", "dbrx", "jetmoe", "phimoe")
"""Trained on two ranks: experts as one parameter of three dimensions, of two (DBRX), in attention too (JetMoE)."""
BALANCED = (*SPREAD, "qwen2_moe", "ernie4_5_moe", "flex_olmo", "minimax")
"""Families with an auxiliary loss."""
EXPERTS = 8


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """mixture(family) -> folder of a tiny model with 8 experts a layer, 2 for each token."""
    root = tmp_path_factory.mktemp("mixtures")
    families = runpy.run_path(str(ROOT / "tools" / "families.py"))
    families["TINY"].update(
        dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS)
    )

    def made(family: str):
        if not (root / family).exists():
            families["save_tiny"](family, str(root / family))
        return root / family

    return made


def own_aux(model, rows) -> torch.Tensor:
    """transformers' own, of a padded batch with its mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss


def tokens_of(row) -> list[int]:
    return [*row.prompt, *row.responses[0]]


RAGGED = [[5, 9, 11, 30, 2, 8], [7], [40, 41, 3], [12, 50, 9, 9, 9, 31, 22, 6, 3]]


@pytest.mark.parametrize("kernel", ["sdpa", ALONE])
@pytest.mark.parametrize("family", BALANCED)
def test_packed_rows_have_transformers_own_loss(mixture, family, kernel):
    folder = mixture(family)
    own = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    truth = own_aux(own, RAGGED)
    truth.backward()
    if family == "minimax":  # linear attention
        kernel = ALONE
    attention = None if kernel == ALONE else PACKED
    model = load_policy(str(folder), dtype=torch.float32, attention=attention, argument="model").train()
    watch_router(model, 0.5)
    rows = [torch.tensor(r) for r in RAGGED]
    model(PackedBatch.make(rows, [1] * len(rows), torch.device("cpu"), kernel)).sum()
    loss = model.router.take()
    loss.backward()
    torch.testing.assert_close(loss, truth, rtol=2e-5, atol=0)
    moved = 0
    for (name, mine), theirs in zip(model.lm.named_parameters(), own.parameters(), strict=True):
        if theirs.grad is not None and theirs.grad.abs().max() > 1e-7:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            moved += 1
    assert moved > 4


def test_nothing_is_computed_in_evaluation_or_when_off(mixture):
    batch = PackedBatch.make([torch.tensor(RAGGED[0])], [1], torch.device("cpu"), "sdpa")
    model = load_policy(str(mixture("mixtral")), dtype=torch.float32, attention=PACKED, argument="model")
    watch_router(model, 0.0)
    assert model.router is None
    watch_router(model, 0.1)
    asked = []
    model.lm.base_model.register_forward_pre_hook(
        lambda m, a, k: asked.append(k.get("output_router_logits")), with_kwargs=True
    )
    model.eval()(batch)
    with pytest.raises(AssertionError, match="no forward"):
        model.router.take()
    model.train()(batch)
    model.router.take()
    assert asked == [None, True]


def test_reward_models_have_it_too(mixture):
    batch = PackedBatch.make([torch.tensor(r) for r in RAGGED], [1] * len(RAGGED), torch.device("cpu"), "sdpa")
    folder = str(mixture("qwen3_moe"))
    model = new_scalar(folder, dtype=torch.float32, attention=PACKED, argument="model").train()
    watch_router(model, 0.1)
    model(batch, batch.last_positions)
    torch.testing.assert_close(model.router.take(), own_aux(AutoModelForCausalLM.from_pretrained(folder), RAGGED))


def test_models_without_experts_are_refused(tiny, tmp_path):
    common = {"output_dir": str(tmp_path / "run"), "router_aux_coef": 0.01, "model": tiny.policy, "max_length": 64}
    line = r"router_aux_coef: transformers has no auxiliary loss for LlamaForCausalLM; leave --router-aux-coef at 0$"
    for run, config in (
        (train_sft, SFTConfig(data=tiny.texts, **common)),
        (train_dpo, DPOConfig(data=tiny.pairs, **common)),
        (train_rm, RMConfig(data=tiny.pairs, **common)),
        (train, RTOConfig(**small_run(tiny, tmp_path / "run", router_aux_coef=0.01))),
    ):
        with pytest.raises(ConfigError, match=line):
            run(config)
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"]


@pytest.fixture(scope="module")
def trained(mixture, tmp_path_factory):
    """[ranks] -> {(family, coefficient): what experts_worker found}."""
    folder = tmp_path_factory.mktemp("ranks")
    models = mixture(SPREAD[0]).parent
    for family in SPREAD:
        mixture(family)
    found = {}
    for ranks in (1, 2):
        target = folder / f"{ranks}.pt"
        worker = [ROOT / "tests" / "experts_worker.py", models, target, *SPREAD]
        result = Launch(worker, ranks=ranks, log=folder / f"log{ranks}").wait(240)
        assert result.returncode == 0, result.output
        found[ranks] = torch.load(target)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", SPREAD)
def test_two_ranks_under_zero3_train_as_one(trained, mixture, family):
    one, two = trained[1][family, 0.0], trained[2][family, 0.0]
    first, second = two["experts"]
    assert any(first[name] != second[name] for name in first), "the ranks' tokens went to the same experts"
    assert len(one["steps"]) == STEPS
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-4)
        assert "train/router_aux" not in b
    start = AutoModelForCausalLM.from_pretrained(mixture(family)).state_dict()
    gap = sum(float((one["weights"][n] - two["weights"][n]).square().sum()) for n in one["weights"])
    moved = sum(float((one["weights"][n] - start[n]).square().sum()) for n in one["weights"])
    assert gap < 1e-4 * moved


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", WITH_AUX)
def test_the_loss_of_a_batch_is_its_micro_batches_by_tokens(trained, mixture, family, ranks):
    """Against transformers' own of what each rank holds; and it is lower where it is trained on."""
    model = AutoModelForCausalLM.from_pretrained(mixture(family))
    step = trained[ranks][family, 0.1]["steps"]
    rows = [tokens_of(r) for r in ROWS]
    rows = [rows[i] for i in batch_rows(SFTConfig(batch=len(rows)), len(rows), 0)]
    parts = [[rows[i] for i in part] for share in plan([len(r) for r in rows], ranks, 64) for part in share]
    assert len(parts) == ranks
    with torch.no_grad():
        truth = sum(float(own_aux(model, part)) * sum(map(len, part)) for part in parts) / sum(map(len, rows))
    assert step[0]["train/router_aux"] == pytest.approx(truth, rel=1e-4)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """`TinyModels` whose policy is a Mixtral."""
    tiny = make_tiny_models(tmp_path_factory.mktemp("experts"))
    llama = AutoConfig.from_pretrained(tiny.policy)
    sizes = {n: getattr(llama, n) for n in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                            "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                                            "bos_token_id", "eos_token_id", "pad_token_id")}  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)).save_pretrained(tiny.policy)
    return tiny


@pytest.mark.slow
@pytest.mark.parametrize("update", [{}, {"policy_update": "p3o", "responses_per_prompt": 2, "rollout_batch": 4}])
def test_the_policys_updates_have_it(one_rank, experts, tmp_path, update):
    """One train batch, in one micro-batch: transformers' own of its sequences. Off, no weight changes for it."""
    weights, rows = [], []
    start = AutoModelForCausalLM.from_pretrained(experts.policy)
    for coefficient in (0.0, 0.1):
        folder = tmp_path / str(coefficient)
        settings = small_run(
            experts, folder, beta1=0.0, train_batch=8, iterations=1, reward_model=(), reward_fn=("test_router:length",),
            router_aux_coef=coefficient, policy_lr=1e-3, report=False, **update,
        )  # fmt: skip
        run = train(RTOConfig(**settings), lambda rollout, texts: rows.append(rollout.sequences()) or {})
        metrics = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        weights.append(run.policy.model.lm.model.layers[0].mlp.gate.weight.detach().clone())
        if coefficient:
            with torch.no_grad():
                truth = float(own_aux(start, [r.tolist() for r in rows[-1]]))
            assert metrics["policy/router_aux"] == pytest.approx(truth, rel=1e-4)
        else:
            assert "policy/router_aux" not in metrics
    assert not torch.equal(*weights)


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [len(r) / 50 for r in responses]
