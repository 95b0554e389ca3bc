"""PPO-ptx: the loss on supervised rows beside every policy update, against transformers in fp64."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from loop_helpers import small_run, watched_gradients, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rto_fast import build, trainer
from rto_fast.config import RTOConfig, SFTConfig
from rto_fast.data.load import load_ptx, load_sft
from rto_fast.data.order import rows_of_step
from rto_fast.errors import ConfigError, DataError
from rto_fast.scoring.score import score_rollout

pytestmark = pytest.mark.usefixtures("one_rank")

COEF = 0.7
UPDATES = {
    "ppo": {"loss_aggregation": "token", "temperature": 0.8},
    "ppo, zero 3, bootstrap": {"zero_stage": 3, "truncation": "bootstrap"},
    "sampler": {"behaviour_logp": "sampler"},
    "p3o": {"policy_update": "p3o", "responses_per_prompt": 2},
    "rebel": {"policy_update": "rebel", "responses_per_prompt": 2},
}


def ptx_run(tiny, folder, **settings):
    given = {"ptx_coef": COEF, "ptx_data": tiny.texts, "report": False, "max_grad_norm": 0.0, "prompt_key": "prompt",
             "max_response_length": 24, "micro_tokens": 50}  # fmt: skip
    return RTOConfig(**small_run(tiny, folder, **given | settings))


def figures(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k.startswith(("policy/", "critic/", "reward/", "kl/"))} for r in lines]


def one_update(config):
    """(the first policy update of a run and its gradients, the run), the rollout scored and its targets made."""
    run = build.build(config)
    rollout = trainer.draw(run, 0)
    scores, _ = score_rollout(rollout, run.texts(rollout), run.scorers, config, run.placement, lambda tokens: None)
    targets = trainer.compute_targets(rollout, scores, config, run.state.kl.beta2)
    update = trainer.POLICY_UPDATES[config.policy_update]
    update = trainer.SAMPLER_CORRECTED if config.behaviour == "sampler" else update
    batch = update.batch(run, rollout, scores, targets, run.train_batches(0, 0, len(rollout))[0])
    with watched_gradients(run.policy) as gradients:
        stats = batch.update_policy(3)
    run.logger.close()
    return stats, dict(gradients), run


def nll_of(tiny, rows):
    """(mean negative log-prob of the rows' response tokens, its gradients), by transformers in fp64, row by row."""
    model = AutoModelForCausalLM.from_pretrained(tiny.policy, dtype=torch.float64).eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        (response,) = row.responses
        tokens = torch.tensor([*row.prompt, *response])
        logps = torch.log_softmax(model(tokens[None]).logits[0], -1)
        for t in range(len(row.prompt), len(tokens)):
            total = total - logps[t - 1, tokens[t]]
            count += 1
    (total / count).backward()
    return total.item() / count, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("case", UPDATES)
def test_the_gradient_is_the_updates_own_and_that_of_the_supervised_rows(tiny, tmp_path, case):
    """The update's own is that of a run without PTX, which test_loop_math.py judges."""
    alone, own, _ = one_update(ptx_run(tiny, tmp_path / "alone", ptx_coef=0.0, ptx_data="", **UPDATES[case]))
    stats, gradients, run = one_update(config := ptx_run(tiny, tmp_path / "ptx", **UPDATES[case]))
    rows = [run.ptx[i] for i in rows_of_step(f"ptx/{config.seed}", len(run.ptx), config.train_batch, 3)]
    assert len({row.tokens for row in rows}) > 1
    nll, expected = nll_of(tiny, rows)
    assert alone.ptx_loss is None
    assert stats.ptx_loss == pytest.approx(nll, rel=1e-5)
    assert stats.loss == pytest.approx(alone.loss, rel=1e-5)
    assert trainer.of_ptx([stats]) == {"policy/ptx_loss": stats.ptx_loss}
    assert gradients.keys() == expected.keys()
    whole = {n: own[n].double() + COEF * g for n, g in expected.items()}
    largest = max(float(g.abs().max()) for g in whole.values())
    assert max(float(g.abs().max()) for g in own.values()) > 0.001 * largest
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), whole[name], rtol=1e-4, atol=1e-5 * largest)
    norm = math.sqrt(sum(float(g.square().sum()) for g in whole.values()))
    assert stats.result.grad_norm == pytest.approx(norm, rel=1e-4)


def test_micro_batches_change_nothing(tiny, tmp_path):
    """One row each, and all in one."""
    (a, small, _), (b, large, _) = (
        one_update(ptx_run(tiny, tmp_path / str(tokens), micro_tokens=tokens)) for tokens in (1, 4096)
    )
    assert a.ptx_loss == pytest.approx(b.ptx_loss, rel=1e-6)
    largest = max(float(g.abs().max()) for g in large.values())
    for name, gradient in small.items():
        torch.testing.assert_close(gradient, large[name], rtol=1e-4, atol=2e-6 * largest)


def test_rows_come_once_an_epoch_in_a_seeded_order():
    steps = [rows_of_step("ptx/0", 10, 4, step) for step in range(10)]
    drawn = [row for step in steps for row in step]
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert rows_of_step("ptx/0", 10, 4, 7) == steps[7]
    assert rows_of_step("ptx/1", 10, 4, 7) != steps[7]
    assert Counter(rows_of_step("ptx/0", 3, 7, 0)).most_common(1)[0][1] == 3  # fewer rows than a step takes


def test_every_update_takes_the_next_rows(tiny, tmp_path, monkeypatch):
    """From the policy's first on: the critic's warm-up takes none."""
    seen = []
    whole = trainer.TrainBatch.update_policy
    monkeypatch.setattr(trainer.TrainBatch, "update_policy", lambda b, step: seen.append(step) or whole(b, step))
    config = ptx_run(tiny, tmp_path / "run", iterations=3, critic_warmup=1, ppo_epochs=2, sync_proof=False)
    trainer.train(config)
    assert seen == list(range(8))
    assert ["policy/ptx_loss" in row for row in figures(tmp_path / "run")] == [False, True, True]


def test_the_loss_falls_and_is_logged(tiny, tmp_path):
    """With a large weight the policy learns the supervised rows."""
    config = ptx_run(tiny, tmp_path / "run", iterations=6, ptx_coef=30.0, policy_lr=1e-2, max_grad_norm=1.0)
    trainer.train(config)
    losses = [row["policy/ptx_loss"] for row in figures(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]


def test_resumed_bit_for_bit(tiny, tmp_path, monkeypatch):
    settings = {"iterations": 3, "save_every": 2, "policy_lr": 1e-3, "critic_lr": 1e-3, "sync_proof": False}
    trainer.train(ptx_run(tiny, tmp_path / "whole", **settings))

    def stops(run, iteration, *more, whole=trainer.rto_iteration):
        if iteration == 2:
            raise KeyboardInterrupt
        return whole(run, iteration, *more)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "rto_iteration", stops)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(ptx_run(tiny, tmp_path / "cut", **settings))
    trainer.train(ptx_run(tiny, tmp_path / "cut", **settings, resume="auto"))
    whole, cut = (load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_other_rows_are_refused_on_resume(tiny, tmp_path):
    data = Path(write_rows(tmp_path / "ptx.jsonl", [json.loads(r) for r in Path(tiny.texts).read_text().splitlines()]))
    settings = {"iterations": 1, "save_every": 1, "ptx_data": str(data), "sync_proof": False}
    trainer.train(ptx_run(tiny, tmp_path / "run", **settings))
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match=r"resume: ptx_data: '.*ptx.jsonl': ptx.jsonl has other contents"):
        trainer.train(ptx_run(tiny, tmp_path / "run", **settings, resume="auto"))
    with pytest.raises(ConfigError, match=r"resume: .* other settings: ptx_coef=0.7 \(now 0.2\)"):
        trainer.train(ptx_run(tiny, tmp_path / "run", **settings, resume="auto", ptx_coef=0.2))


def test_a_step_whose_supervised_loss_is_infinite_is_a_bad_one(tiny, tmp_path):
    config = ptx_run(tiny, tmp_path / "run", iterations=1, ptx_coef=1e300, sync_proof=False)
    trainer.train(config)
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["bad_steps"] == 1


# The data


def test_rows_are_those_of_the_sft_recipe(tiny, tmp_path, capsys):
    config = ptx_run(tiny, tmp_path / "run")
    run = build.build(config)
    run.logger.close()
    sft = SFTConfig(data=tiny.texts, model="m", max_length=40, eval_fraction=0, data_cache=False, data_workers=1)
    expected, _ = load_sft(sft, run.tokenizer, run.template)
    rows = [(row.prompt, row.responses) for row in run.ptx]
    assert rows == [(p, (r,)) for p, r in zip(expected.prompt_ids, expected.response_ids, strict=True)]
    assert f"ptx_data {tiny.texts}: 64 rows, " in capsys.readouterr().out


def test_columns_split_and_limit(tiny, tmp_path):
    import datasets

    rows = [json.loads(line) for line in Path(tiny.texts).read_text().splitlines()]
    named = [{"question": r["prompt"], "answer": r["response"]} for r in rows]
    parts = {"train": datasets.Dataset.from_list(named[:9]), "sft": datasets.Dataset.from_list(named[9:])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    run = build.build(ptx_run(tiny, tmp_path / "run"))
    run.logger.close()
    keys = {"ptx_data": str(tmp_path / "saved"), "ptx_prompt_key": "question", "ptx_response_key": "answer"}

    def load(**settings):
        return load_ptx(ptx_run(tiny, tmp_path / "none", **keys, **settings), run.tokenizer, run.template)

    assert load().counts.total == 9
    assert load(ptx_split="sft").counts.total == 55
    with pytest.raises(DataError, match=r"ptx_data: .* has no split 'gone'"):
        load(ptx_split="gone")
    longest = max(len(p) + len(r) for p, r in zip(load().prompt_ids, load().response_ids, strict=True))
    short = {"max_prompt_length": 1, "max_response_length": longest - 2, "overlong": "refuse"}
    limit = rf"over max_prompt_length \+ max_response_length {longest - 1} .*raise --max-prompt-length or --max-resp"
    with pytest.raises(DataError, match=rf"ptx_data: .* {longest} tokens, {limit}"):
        load(**short)


def test_refused():
    given = {"policy": "p", "dpo_model": "d", "reward_model": ("r",), "data": "x"}
    for settings, message in (
        ({"ptx_coef": 0.5}, r"ptx_data: ptx_coef 0.5 needs supervised rows; pass --ptx-data, or --ptx-coef 0"),
        ({"ptx_data": "y"}, r"ptx_data: 'y' is not read with ptx_coef 0; pass a --ptx-coef above 0, or leave it out"),
        ({"ptx_split": "sft"}, r"ptx_split: 'sft' is not read with ptx_coef 0"),
        ({"ptx_coef": -1.0, "ptx_data": "y"}, r"ptx_coef: must not be negative, got -1.0"),
        ({"ptx_coef": math.inf, "ptx_data": "y"}, r"ptx_coef: must be finite, got inf"),
    ):
        with pytest.raises(ConfigError, match=message):
            RTOConfig(**given, **settings).validate()
    RTOConfig(**given, ptx_coef=0.5, ptx_data="y").validate()


def test_without_it_nothing_is_added(tiny, tmp_path, monkeypatch):
    """Off, the engine is given the train batch's own micro-batches and no more."""
    run = build.build(ptx_run(tiny, tmp_path / "run", ptx_coef=0.0, ptx_data=""))
    assert run.ptx is None
    given, own, update, whole = [], [], run.policy.update, trainer.TrainBatch.update_policy
    run.policy.update = lambda micro, loss, *, step: given.append(len(micro)) or update(micro, loss, step=step)
    monkeypatch.setattr(trainer.TrainBatch, "update_policy", lambda b, s: own.append(len(b.micro)) or whole(b, s))
    metrics = trainer.rto_iteration(run, 0)
    run.logger.close()
    assert "policy/ptx_loss" not in metrics
    assert given == own
