"""Models on one base: shared tensors, modules and gradients of their own, the outputs of models loaded alone."""

from __future__ import annotations

import shutil

import pytest
import torch
from loop_helpers import save_llama
from test_adapters import LOADING, lora, moved, packed

from rto_fast.backend import frozen as frozen_module
from rto_fast.config import DPOConfig
from rto_fast.models.load import load_policy, load_scalar, new_scalar
from rto_fast.models.one_base import OneBase
from rto_fast.models.save import export

pytest.importorskip("peft")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folders(request, tmp_path) -> dict[str, str]:
    """A base, a copy of it, another model, and adapters of a DPO model and a reward model on the copy."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    for name, seed in (("base", 1), ("other", 2)):
        save_llama(tmp_path / name, seed=seed, vocab=87, ids=ids, tied=request.param)
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    found = {name: str(tmp_path / name) for name in ("base", "other", "copy", "dpo", "rm")}
    export(moved(load_policy(found["copy"], lora=lora(), **LOADING)), tmp_path / "dpo", write=True)
    reward = moved(new_scalar(found["copy"], lora=lora(), **LOADING))
    reward.mean, reward.std = 0.3, 1.7
    export(reward, tmp_path / "rm", write=True)
    return found


def places(model) -> set[int]:
    return {p.data_ptr() for p in model.parameters()}


def test_models_of_the_same_weights_share_them(folders):
    """By contents, whatever the folder is called; each has adapters of its own."""
    policy = load_policy(folders["base"], lora=lora(), **LOADING)
    base = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    one = OneBase(policy, folders["base"])
    reference, dpo = one.language(folders["copy"], "reference"), one.language(folders["dpo"], "dpo_model")
    reward, critic = one.scalar(folders["rm"], "reward_model"), one.scalar(folders["rm"], "critic", lora())
    fresh = one.scalar(folders["base"], "critic", lora(), new=True)
    head = {policy.lm.lm_head.weight.data_ptr()} - {policy.lm.get_input_embeddings().weight.data_ptr()}
    assert places(reference) == base
    for model in (dpo, reward, critic, fresh):
        assert places(model) >= base - head
    own = [places(model) - base for model in (policy, dpo, reward, critic, fresh)]
    assert all(own)
    assert len(set.union(*own)) == sum(map(len, own))
    assert one.language(folders["other"], "dpo_ref") is None
    assert one.scalar(folders["copy"], "reward_model") is None  # a language model
    assert one.said() == (
        f"one base: {folders['base']} is held once for policy, reference, dpo_model, reward_model, critic; weights of "
        f"their own: dpo_ref {folders['other']}"
    )


def test_they_compute_what_models_loaded_alone_do(folders):
    policy = load_policy(folders["base"], lora=lora(), **LOADING)
    one, batch = OneBase(policy, folders["base"]), packed()
    plain = load_policy(folders["base"], **LOADING)(batch)
    assert torch.equal(one.language(folders["copy"], "reference")(batch), plain)
    assert torch.equal(policy(batch), plain)  # KL to the reference: exactly 0
    dpo = one.language(folders["dpo"], "dpo_model")(batch)
    assert (dpo - load_policy(folders["dpo"], **LOADING)(batch)).abs().max() < 1e-5
    reward = one.scalar(folders["rm"], "reward_model")(batch, batch.last_positions)
    alone = load_scalar(folders["rm"], **LOADING)(batch, batch.last_positions)
    assert (reward - alone).abs().max() < 1e-5
    assert not one.scalar(folders["base"], "critic", lora(), new=True)(batch, batch.last_positions).any()


def test_gradients_do_not_mix(folders):
    policy = load_policy(folders["base"], lora=lora(), **LOADING)
    one, batch = OneBase(policy, folders["base"]), packed()
    critic, dpo = one.scalar(folders["rm"], "critic", lora()), one.language(folders["dpo"], "dpo_model")
    models = {"policy": policy, "critic": critic, "dpo": dpo}
    losses = {"policy": policy(batch).sum(), "critic": critic(batch, batch.last_positions).sum()}
    for trained, loss in losses.items():
        loss.backward()
        for name, model in models.items():
            with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
            wanted = {n for n, p in model.named_parameters() if p.requires_grad} if name == trained else set()
            assert with_gradient == wanted, (trained, name)
            model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_an_adapter_stands_on_a_base_that_zero_3_has_in_parts(folders, one_rank, monkeypatch, kind):
    """New ones and those of a folder; DoRA reads the norms of weights that lie in parts."""
    spread = frozen_module.spread
    monkeypatch.setattr(
        frozen_module,
        "spread",
        lambda model, settings: (
            settings["zero_optimization"].update(stage3_param_persistence_threshold=0),
            spread(model, settings),
        ),
    )
    config = DPOConfig(model=folders["base"], zero_stage=3, dtype="fp32")
    asked = lora(dora=kind == "dora")
    policy = load_policy(folders["base"], lora=asked, **LOADING)
    one = OneBase(policy, folders["base"])
    frozen_module.frozen(policy, config)
    assert all(p.numel() == 0 for p in one.base.parameters()), "no weight is whole"
    row, wanted = packed(), moved(load_policy(folders["base"], lora=asked, **LOADING))
    fresh = moved(one.language(folders["copy"], "dpo_model", asked))
    assert torch.equal(frozen_module.frozen(fresh, config)(row), wanted(row))
    if kind == "plain":
        alone = load_policy(folders["dpo"], lora=lora(), **LOADING)
        assert torch.equal(frozen_module.frozen(one.language(folders["dpo"], "dpo_model"), config)(row), alone(row))
        reward = load_scalar(folders["rm"], lora=lora(), **LOADING)
        ours = frozen_module.frozen(one.scalar(folders["rm"], "reward_model"), config)
        assert torch.equal(ours(row, row.last_positions), reward(row, row.last_positions))
