"""Preference objectives: each against fp64 truth from whole logits and against TRL's released trainers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch
from loop_helpers import save_llama, write_rows
from objective_truth import relative, truth_loss
from transformers import AutoModelForCausalLM

from rto_fast.algo import preference
from rto_fast.config import DPOConfig
from rto_fast.config.supervised import READERS
from rto_fast.demo.tiny_task import make_task
from rto_fast.errors import ConfigError
from rto_fast.supervised import reference_cache
from rto_fast.supervised.dpo import OBJECTIVES, train_dpo
from rto_fast.supervised.kto import Answers
from rto_fast.supervised.loop import evaluate, train_step
from rto_fast.supervised.prepare import prepare
from rto_fast.supervised.stage import RowBatch

SETTINGS = {
    "beta": 0.3, "r_dpo_alpha": 0.02, "simpo_gamma": 0.4, "tdpo_alpha": 0.7, "kto_desirable_weight": 1.3,
    "kto_undesirable_weight": 0.8, "tgdpo_alpha": 0.6, "tis_low": -0.3, "tis_high": 0.4, "mpo_keep": 0.4,
}  # fmt: skip


GUIDED = ("tgdpo", "tis_dpo")


def small(tiny, output_dir, **settings) -> DPOConfig:
    base = {
        "model": tiny.policy, "data": tiny.pairs, "output_dir": str(output_dir), "dtype": "fp32", "zero_stage": 0,
        "batch": 8, "lr": 1e-3, "max_rows": 24, "max_length": 64, "gradient_checkpointing": False,
        "data_cache": False, "data_workers": 1, "epochs": 1.0,
    }  # fmt: skip
    objective = settings.get("objective", "dpo")
    own = {k: v for k, v in SETTINGS.items() if objective in READERS[k]}
    return DPOConfig(**(base | own | settings))


def make_stage(config: DPOConfig):
    common = prepare(config)
    return OBJECTIVES[config.objective].stage(config, common), common


@pytest.fixture
def negatives(tmp_path):
    """Rows of one to three rejected for each prompt and chosen, as MPPO groups them."""
    task = make_task(100, "easy")
    texts, rows = task.texts(40, 5), []
    for i in range(8):
        for j in range(1 + i % 3):
            rows.append(
                {
                    "prompt": texts[i]["prompt"],
                    "chosen": texts[i]["response"],
                    "rejected": texts[8 + 3 * i + j]["response"],
                }
            )
    return write_rows(tmp_path / "negatives.jsonl", rows)


def guided(objective, tiny) -> dict[str, str]:
    """The settings that an objective needs beside the others'."""
    return {"guide_model": tiny.dpo_ref if objective == "tgdpo" else tiny.policy} if objective in GUIDED else {}


@pytest.mark.parametrize(
    ("objective", "options"),
    [*((objective, {}) for objective in OBJECTIVES), ("dpo", {"label_smoothing": 0.1}), ("dpo", {"nll_coef": 0.7}),
     ("tis_dpo", {"guide_base": "dpo_ref"})],
)  # fmt: skip
def test_loss_and_gradient_equal_the_fp64_formula(objective, options, tiny, tmp_path, one_rank, negatives):
    start, base = (tiny.dpo, tiny.policy) if objective == "kto" else (tiny.policy, tiny.dpo)  # KTO: baseline > 0
    reference = {} if objective in ("simpo", "mpo", "mppo") else {"reference": base}
    data = negatives if objective == "mppo" else tiny.pairs
    options = {k: getattr(tiny, v) if k == "guide_base" else v for k, v in options.items()} | guided(objective, tiny)
    config = small(tiny, tmp_path / "run", model=start, objective=objective, data=data, eval_fraction=0.0, **reference,
                   **options)  # fmt: skip
    stage, common = make_stage(config)
    index = list(range(min(6, len(stage.train))))
    rows = [stage.train[i] for i in index]
    stage.begin(stage.model, index, False, common.placement)
    total, metrics = stage.loss(stage.model, RowBatch(rows, index, False, common.placement))
    (total / stage.count(rows)).backward()

    model, ref = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in (start, base))
    kto = None
    if objective == "kto":
        answers = stage.answers[0]
        assert stage.kl > 0
        kto = [bool(answers.desirable[i]) for i in index], [answers.mismatched[i] for i in index]
    if objective == "mppo":
        assert {len(r.responses) for r in rows} == {2, 3, 4}
    truth = truth_loss(objective, config, model, ref, rows, kto)
    truth.backward()
    assert total.item() / len(rows) == pytest.approx(truth.item(), rel=2e-5)
    ours, theirs = dict(stage.model.lm.named_parameters()), dict(model.named_parameters())
    assert relative([ours[n].grad for n in theirs], [p.grad for p in theirs.values()]) < 5e-5
    assert all(math.isfinite(v.item()) for v in metrics.values())


def test_a_guide_without_say_leaves_dpo():
    ratio, guide, sign = torch.tensor([0.3, -0.2]), torch.tensor([2.0, -1.0]), torch.tensor([1.0, -1.0])
    assert preference.tgdpo_weights(guide, sign, beta=0.1, alpha=0.0).tolist() == [1.0, 1.0]
    weights = preference.tgdpo_weights(guide, sign, beta=0.1, alpha=0.5)
    assert weights.tolist() == pytest.approx([1.1, 1.05])
    assert preference.tis_weights(guide, sign, low=-0.5, high=1.5).tolist() == pytest.approx(
        [math.exp(1.5), math.exp(0.5)]
    )
    plain = preference.dpo_loss(*ratio[:, None], torch.zeros(1), torch.zeros(1), beta=0.1)
    assert torch.equal(preference.token_weighted_loss(*ratio[:, None], beta=0.1), plain)


@pytest.mark.parametrize("name", ["guide_model", "guide_base"])
def test_a_guide_of_other_tokens_is_refused_before_it_is_loaded(name, tiny, tmp_path, one_rank):
    save_llama(tmp_path / "other", seed=1, vocab=50, ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    settings = {"guide_model": tiny.dpo} | {name: str(tmp_path / "other")}
    with pytest.raises(ConfigError, match=f"^{name}: .* has a vocabulary of 50 tokens, the model's has"):
        train_dpo(small(tiny, tmp_path / "run", objective="tis_dpo", **settings))
    assert not list((tmp_path / "run").glob("*.jsonl"))


@pytest.mark.parametrize("keep", [0.02, 0.3])
def test_mpo_of_two_answers_ends_where_its_loss_is_least(keep):
    """Two answers of one token, p of chosen: the least of -sigmoid(beta h) - keep (log p + log(1-p)) / 2."""
    beta, logits = 0.6, torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss():
        optimiser.zero_grad()
        logp = logits.log_softmax(0)
        value = preference.mpo_loss(logp[:1], logp[1:], logp.mean()[None], beta=beta, keep=keep).sum()
        value.backward()
        return value

    optimiser.step(loss)
    p = torch.linspace(1e-5, 1 - 1e-5, 200001, dtype=torch.float64)
    by_hand = -1 / (1 + ((1 - p) / p) ** beta) - keep / 2 * (p.log() + (1 - p).log())
    assert logits.softmax(0)[0].item() == pytest.approx(float(p[by_hand.argmin()]), abs=2e-5)
    assert 0.5 < logits.softmax(0)[0] < 0.9995


def test_r_dpo_gives_a_longer_chosen_answer_less_gradient():
    ratio = torch.zeros(2, requires_grad=True)
    lens = torch.tensor([40.0, 10.0]), torch.tensor([10.0, 40.0])
    preference.r_dpo_loss(ratio, torch.zeros(2), *lens, beta=0.1, alpha=0.05).sum().backward()
    assert abs(ratio.grad[0]) < abs(ratio.grad[1])


# TRL


def trl_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def trl_arguments(cls, folder, **settings):
    return cls(
        output_dir=str(folder), per_device_train_batch_size=8, report_to=[], use_cpu=True, bf16=False, max_length=64,
        gradient_checkpointing=False, **settings,
    )  # fmt: skip


def trl_pairs(rows, tokenizer):
    """The rows' own tokens as TRL's text columns; decoded and encoded again they are the same."""
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    return [
        {"prompt": decode(r.prompt), "chosen": " " + decode(r.responses[0]), "rejected": " " + decode(r.responses[1])}
        for r in rows
    ]


def our_rows(batch, masks, tokenizer):
    """(prompt, response) token ids of each sequence of a TRL batch, pads left out."""
    out = []
    for ids, mask, attention in zip(batch["input_ids"], masks, batch["attention_mask"], strict=True):
        ids, mask = ids[attention.bool()], mask[attention.bool()].bool()
        out.append((ids[~mask].tolist(), ids[mask].tolist()))
    return out


def our_loss(stage, rows, placement, reference):
    """Mean loss and gradients of the stage on rows of other data, with the reference's log-probs computed anew."""
    from rto_fast.models.load import load_policy

    index = list(range(len(rows)))
    ref = load_policy(reference, dtype=torch.float32, attention="sdpa", argument="reference")
    stage.reference = (reference_cache.reference_logps(ref, rows, placement),) * 2
    total, _ = stage.loss(stage.model, RowBatch(rows, index, False, placement))
    (total / len(rows)).backward()
    return total.item() / len(rows), dict(stage.model.lm.named_parameters())


@pytest.mark.parametrize("objective", ["dpo", "ipo"])
def test_equals_trl_dpo_trainer(objective, tiny, tmp_path, one_rank):
    trl = pytest.importorskip("trl")
    from rto_fast.supervised.stage import Row

    stage, common = make_stage(small(tiny, tmp_path / "run", objective=objective, reference=tiny.dpo))
    theirs, ref = (AutoModelForCausalLM.from_pretrained(p) for p in (tiny.policy, tiny.dpo))
    args = trl_arguments(
        trl.DPOConfig, tmp_path / "trl", beta=0.3, loss_type=["sigmoid" if objective == "dpo" else "ipo"]
    )
    rows = trl_pairs(stage.train[:8], common.tokenizer)
    trainer = trl.DPOTrainer(
        model=theirs, ref_model=ref, args=args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=common.tokenizer,
    )  # fmt: skip
    trainer.model.eval()
    batch = trl_batch(trainer)
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    loss.backward()
    flat = our_rows(batch, batch["completion_mask"], common.tokenizer)
    half = len(flat) // 2
    pairs = [Row(c[0], (c[1], r[1])) for c, r in zip(flat[:half], flat[half:], strict=True)]
    value, parameters = our_loss(stage, pairs, common.placement, tiny.dpo)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    named = dict(trainer.model.named_parameters())
    assert relative([parameters[n].grad for n in named], [p.grad.double() for p in named.values()]) < 2e-5


def test_equals_trl_kto_trainer(tiny, tmp_path, one_rank):
    trl = pytest.importorskip("trl")
    from rto_fast.supervised.stage import Row

    stage, common = make_stage(small(tiny, tmp_path / "run", objective="kto", model=tiny.dpo, reference=tiny.policy))
    theirs, ref = (AutoModelForCausalLM.from_pretrained(p) for p in (tiny.dpo, tiny.policy))
    args = trl_arguments(
        trl.KTOConfig, tmp_path / "trl", beta=0.3, desirable_weight=1.3, undesirable_weight=0.8, loss_type="kto"
    )
    decode = lambda ids: common.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    rows = [
        {"prompt": decode(r.prompt), "completion": " " + decode(r.responses[0]), "label": bool(good)}
        for r, good in zip(stage.train[:8], stage.desirable[0][:8], strict=True)
    ]
    trainer = trl.KTOTrainer(
        model=theirs, ref_model=ref, args=args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=common.tokenizer,
    )  # fmt: skip
    trainer.model.eval()
    batch = trl_batch(trainer)
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    loss.backward()
    own = [Row(p, (c,)) for p, c in our_rows(batch, batch["completion_mask"], common.tokenizer)]
    kl = {k.removeprefix("KL_"): v for k, v in batch.items() if k.startswith("KL_")}
    mismatched = [Row(p, (c,)) for p, c in our_rows(kl, kl["completion_mask"], common.tokenizer)]
    from rto_fast.models.load import load_policy

    reference = load_policy(tiny.policy, dtype=torch.float32, attention="sdpa", argument="reference")
    stage.answers = (Answers(own, mismatched, torch.as_tensor(batch["label"]).bool()),) * 2
    stage.desirable = (stage.answers[0].desirable,) * 2
    stage.mismatched_reference = (reference_cache.reference_logps(reference, mismatched, common.placement),) * 2
    stage.begin(stage.model, range(len(own)), False, common.placement)
    assert stage.kl > 0
    value, parameters = our_loss(stage, own, common.placement, tiny.policy)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    named = dict(trainer.model.named_parameters())
    assert relative([parameters[n].grad for n in named], [p.grad.double() for p in named.values()]) < 2e-5


def test_equals_trl_simpo(tiny, tmp_path, one_rank):
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from rto_fast.supervised.stage import Row

    stage, common = make_stage(small(tiny, tmp_path / "run", objective="simpo"))
    args = trl_arguments(
        CPOConfig, tmp_path / "trl", beta=2.5, simpo_gamma=0.4, loss_type="simpo", cpo_alpha=0.0,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = CPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny.policy), args=args, processing_class=common.tokenizer,
        train_dataset=datasets.Dataset.from_list(trl_pairs(stage.train[:8], common.tokenizer)),
    )  # fmt: skip
    trainer.model.eval()
    batch = trl_batch(trainer)
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch, train_eval="train")
    loss.backward()

    def side(name):
        ids, labels, attention = (batch[f"{name}_{k}"] for k in ("input_ids", "labels", "attention_mask"))
        return our_rows({"input_ids": ids, "attention_mask": attention}, labels != -100, common.tokenizer)

    pairs = [Row(c[0], (c[1], r[1])) for c, r in zip(side("chosen"), side("rejected"), strict=True)]
    value, parameters = our_loss(stage, pairs, common.placement, tiny.dpo)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    named = dict(trainer.model.named_parameters())
    assert relative([parameters[n].grad for n in named], [p.grad.double() for p in named.values()]) < 2e-5


# KTO's data and baseline


def test_kto_takes_labelled_rows_as_well_as_pairs(tiny, tmp_path, one_rank):
    pairs = [json.loads(line) for line in Path(tiny.pairs).read_text().splitlines()][:12]
    rows = [
        {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
        for p in pairs
        for side in ("chosen", "rejected")
    ]
    data = write_rows(tmp_path / "labelled.jsonl", rows)
    kwargs = {"objective": "kto", "eval_fraction": 0.0, "max_rows": 0}
    labelled, _ = make_stage(small(tiny, tmp_path / "a", data=data, **kwargs))
    paired, _ = make_stage(small(tiny, tmp_path / "b", data=write_rows(tmp_path / "pairs.jsonl", pairs), **kwargs))
    assert labelled.train == paired.train
    assert labelled.desirable[0].tolist() == paired.desirable[0].tolist() == [True, False] * 12
    assert torch.equal(labelled.reference[0], paired.reference[0])
    for row, other in zip(labelled.train, labelled.answers[0].mismatched, strict=True):
        assert other.prompt == row.prompt
        assert other.responses != row.responses


@pytest.mark.parametrize("bad", ["yes", None, 3])
def test_kto_label_must_be_a_truth_value(bad, tiny, tmp_path, one_rank):
    data = write_rows(tmp_path / "bad.jsonl", [{"prompt": "A fox.", "completion": "It slept.", "label": bad}])
    with pytest.raises(ConfigError, match="label"):
        make_stage(small(tiny, tmp_path / "run", objective="kto", data=data))


def test_kto_needs_two_prompts(tiny, tmp_path, one_rank):
    rows = [{"prompt": "A fox.", "chosen": "It slept.", "rejected": "It ran home."}]
    data = write_rows(tmp_path / "one.jsonl", rows)
    with pytest.raises(ConfigError, match="two different prompts"):
        make_stage(small(tiny, tmp_path / "run", objective="kto", data=data, eval_fraction=0.0))


def test_kto_step_does_not_depend_on_micro_batches(tiny, tmp_path, one_rank):
    from rto_fast.backend.train_engine import TrainEngine

    class Quiet:
        def progress(self, tokens):
            pass

    found = []
    for budget in (24, 4096):
        config = small(
            tiny,
            tmp_path / f"run{budget}",
            objective="kto",
            model=tiny.dpo,
            reference=tiny.policy,
            zero_stage=2,
            micro_tokens=budget,
        )
        stage, common = make_stage(config)
        engine = TrainEngine(stage.model, config, peak_lr=config.lr, total_steps=4)
        metrics, applied = train_step(config, stage, engine, common.placement, Quiet(), 0)
        assert applied
        found.append((metrics, evaluate(stage, engine, common.placement)))
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b, rel=5e-5, abs=1e-5)
    assert found[0][0]["train/kl_baseline"] > 0


# The whole stage, and the cache of reference log-probs


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_lowers_the_loss_and_exports_a_policy(objective, tiny, tmp_path, one_rank, negatives):
    config = small(
        tiny, tmp_path / "run", objective=objective, epochs=3.0, eval_fraction=0.2, zero_stage=2, log_every=1,
        data=negatives if objective == "mppo" else tiny.pairs, **guided(objective, tiny),
    )  # fmt: skip
    folder = train_dpo(config)
    rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    losses = [r["train/loss"] for r in rows]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert math.isfinite(rows[-1]["eval/loss"])
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's folder, and a count of the computations."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    calls = []
    compute = reference_cache.reference_logps
    monkeypatch.setattr(reference_cache, "reference_logps", lambda *a: calls.append(1) or compute(*a))
    return tmp_path / "cache" / "rto_fast", calls


def test_reference_is_computed_once(cache, tiny, tmp_path, one_rank):
    folder, calls = cache
    first, _ = make_stage(small(tiny, tmp_path / "a", data_cache=True))
    assert len(calls) == 2
    again, _ = make_stage(small(tiny, tmp_path / "b", data_cache=True, beta=0.7, lr=1e-4, objective="ipo"))
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(first.reference, again.reference, strict=True))
    assert not list(folder.glob(".part-*"))


@pytest.mark.parametrize("change", ["reference", "max_rows", "max_length", "dtype", "chat_template", "seed"])
def test_a_mismatch_is_computed_anew(change, cache, tiny, tmp_path, one_rank):
    _, calls = cache
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    values = {
        "reference": tiny.dpo, "max_rows": 20, "max_length": 63, "dtype": "bf16", "chat_template": str(template),
        "seed": 7,
    }  # fmt: skip
    make_stage(small(tiny, tmp_path / "a", data_cache=True, zero_stage=2))
    make_stage(small(tiny, tmp_path / "b", data_cache=True, zero_stage=2, **{change: values[change]}))
    assert len(calls) == 4


def test_a_damaged_cache_is_made_anew(cache, tiny, tmp_path, one_rank):
    folder, calls = cache
    first, _ = make_stage(small(tiny, tmp_path / "a", data_cache=True))
    (path,) = folder.glob("reference-*.pt")
    path.write_bytes(path.read_bytes()[:200])
    again, _ = make_stage(small(tiny, tmp_path / "b", data_cache=True))
    assert len(calls) == 4
    assert torch.equal(first.reference[0], again.reference[0])
    path.unlink()
    make_stage(small(tiny, tmp_path / "c", data_cache=False))
    assert not path.exists()


def test_contradictory_settings_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="simpo has no reference"):
        train_dpo(small(tiny, tmp_path, objective="simpo", reference=tiny.dpo))
    with pytest.raises(ConfigError, match="simpo_beta"):
        small(tiny, tmp_path, objective="simpo", simpo_beta=0.0).validate()
    for option in ("label_smoothing", "nll_coef"):
        with pytest.raises(ConfigError, match=f"{option}: is for --objective dpo, not ipo"):
            small(tiny, tmp_path, objective="ipo", **{option: 0.1}).validate()
    with pytest.raises(ConfigError, match=r"label_smoothing: must lie in \[0, 0.5\), got 0.5"):
        small(tiny, tmp_path, label_smoothing=0.5).validate()
    for name, objective, settings in (
        ("guide_model", "tgdpo", {}), ("guide_model", "tis_dpo", {}), ("guide_model", "dpo", {"guide_model": "x"}),
        ("guide_base", "tgdpo", {"guide_model": "x", "guide_base": "y"}), ("guide_base", "ipo", {"guide_base": "y"}),
        ("tgdpo_alpha", "dpo", {"tgdpo_alpha": -0.1}), ("tis_low", "dpo", {"tis_low": 2.0}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^{name}: "):
            small(tiny, tmp_path, objective=objective, **settings).validate()
    with pytest.raises(ConfigError, match="kto_desirable_weight"):
        small(tiny, tmp_path, objective="kto", kto_desirable_weight=-1.0).validate()


def test_tdpos_reference_is_whole_on_every_rank(tiny, monkeypatch):
    """It lends its hidden states and its head to the policy's kernel, which no partition can."""
    from rto_fast.models.packing import Placement
    from rto_fast.supervised import dpo

    homes = []
    monkeypatch.setattr(dpo, "load_preferences", lambda *_: (mock.Mock(), mock.Mock()))
    monkeypatch.setattr(dpo, "load_policy", lambda path, home, **_: homes.append(home) or torch.nn.Linear(1, 1))
    config = DPOConfig(model=tiny.policy, data="none", output_dir="none", objective="tdpo2", zero_stage=3)
    common = mock.Mock(placement=Placement(torch.device("cpu"), "sdpa", True, 100), loading={"home": "rank 0"})
    OBJECTIVES["tdpo2"].stage(config, common)
    assert homes == ["device", "rank 0"]
