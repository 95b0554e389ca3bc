"""TRL, patched, against itself, unpatched; skipped where it does not import."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from integration_helpers import MARKS, graded, random
from kernel_checks import DEVICE
from launches import Launch
from rto_kernels import token_logprobs
from rto_kernels.integrations import trl as on_trl

WORKER = Path(__file__).with_name("trl_zero3_worker.py")

pytestmark = MARKS


@pytest.fixture
def trl():
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed", exc_type=ImportError)
    if not hasattr(utils, "_ChunkedLogProbFunction"):
        pytest.skip("this TRL has no fused LM head; the integration is for 1.16")
    yield utils
    on_trl.unpatch()


def counted(monkeypatch) -> list:
    """Into this list go the arguments of every call of token_logprobs that the patched TRL makes."""
    calls = []
    monkeypatch.setattr(on_trl, "token_logprobs", lambda *a, **k: calls.append(k) or token_logprobs(*a, **k))
    return calls


def tiny_model(folder, tokens: int = 24):
    """(path of a two-layer Llama, word tokenizer), both made on the spot."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(tokens - 2)} | {"<pad>": tokens - 2, "<eos>": tokens - 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokens, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=tokens - 2, eos_token_id=tokens - 1, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")  # TRL loads its reference from there
    return str(folder / "model"), tokenizer


def recorder(seen: dict):
    """A callback that keeps the last step's gradients and the first one's logs."""
    transformers = pytest.importorskip("transformers")

    class Recorder(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen["grads"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.setdefault("logs", dict(logs))

    return Recorder()


def tiny_grpo(folder):
    """What a step of TRL's GRPO on the tiny model did."""
    model, tokenizer = tiny_model(folder)
    datasets = pytest.importorskip("datasets")
    from trl import GRPOConfig, GRPOTrainer

    seen = {}

    def many_even_words(completion_ids, **kwargs):
        return [float(sum(i % 2 == 0 for i in ids)) for ids in completion_ids]

    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(
            output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, num_generations=4, seed=3,
            logging_steps=1, max_completion_length=6, report_to=[], use_cpu=DEVICE == "cpu", beta=0.1,
            learning_rate=1e-3, temperature=0.8, bf16=False, save_strategy="no", gradient_checkpointing=False,
        ),
        reward_funcs=many_even_words,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5"]}),
        processing_class=tokenizer,
        callbacks=[recorder(seen)],
    )  # fmt: skip
    trainer.train()
    return seen


ROWS = {
    "SFT": {"text": ["w1 w2 w3 w4 w5", "w4 w5 w6", "w7 w1 w9 w2", "w3 w3 w8"]},
    "DPO": {"prompt": ["w1 w2", "w4 w5"] * 2, "chosen": [" w6 w7 w8"] * 4, "rejected": [" w9", " w2 w3"] * 2},
    "KTO": {
        "prompt": ["w1 w2", "w4"] * 2,
        "completion": [" w6 w7", " w2", " w8 w9", " w3"],
        "label": [True, False] * 2,
    },
}


def tiny_trainer(folder, name: str, **settings):
    """What two steps of TRL's SFT, DPO or KTO on the tiny model did."""
    model, tokenizer = tiny_model(folder)
    datasets = pytest.importorskip("datasets")
    trl = importlib.import_module("trl")
    seen = {}
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(
            output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, seed=3, logging_steps=1, report_to=[],
            use_cpu=DEVICE == "cpu", learning_rate=1e-2, bf16=False, save_strategy="no", gradient_checkpointing=False,
            **settings,
        ),
        train_dataset=datasets.Dataset.from_dict(ROWS[name]),
        processing_class=tokenizer,
        callbacks=[recorder(seen)],
    )  # fmt: skip
    trainer.train()
    seen["losses"] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "settings", "asks", "logged"),
    [
        ("SFT", {}, {"is_top1"}, ["mean_token_accuracy", "entropy"]),
        ("DPO", {}, {"is_top1", "mean_logits"}, ["mean_token_accuracy", "logits/chosen", "logits/rejected"]),
        ("DPO", {"use_weighting": True}, {"is_top1", "mean_logits", "log_sum_sq_probs"}, ["rewards/margins"]),
        ("KTO", {}, {"mean_logits"}, ["logits/chosen", "logits/rejected"]),
    ],
    ids=["SFT", "DPO", "WPO", "KTO"],
)
def test_trl_trainers_run_through_our_head(trl, tmp_path, monkeypatch, name, settings, asks, logged):
    expected = tiny_trainer(tmp_path / "theirs", name, **settings)
    calls = counted(monkeypatch)
    on_trl.patch()
    got = tiny_trainer(tmp_path / "ours", name, **settings)
    # Both steps' policies ask for by-products; a call without them scores the reference.
    assert sum(set(call["extras"]) == asks for call in calls) >= 2
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-4, abs=1e-6)
    assert len(got["losses"]) == 2
    assert got["grads"].keys() == expected["grads"].keys()
    for key, grad in expected["grads"].items():
        torch.testing.assert_close(got["grads"][key], grad, rtol=1e-3, atol=1e-5)
    for key in logged:
        assert got["logs"][key] == pytest.approx(expected["logs"][key], rel=1e-4, abs=1e-5), key


def test_trl_head_of_a_zero_3_model_is_gathered_again_in_the_backward_pass(trl, tmp_path):
    pytest.importorskip("deepspeed")
    _, tokenizer = tiny_model(tmp_path)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    result = Launch([WORKER, tmp_path], ranks=2, log=tmp_path / "log").wait()
    assert result.returncode == 0, result.output[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name, loose in (("SFT bf16", 2e-2), ("DPO fp32", 1e-4)):
        theirs, ours = found[f"{name} theirs"], found[f"{name} ours"]
        # Each of two steps calls the head of the policy, and DPO's of the reference.
        assert theirs["calls"] == 0
        assert ours["calls"] == ours["gathered"] >= 2
        assert min(theirs["norms"]) > 0.1
        for key in ("losses", "norms", "top"):
            assert len(ours[key]) == 2
            assert ours[key] == pytest.approx(theirs[key], rel=loose, abs=1e-5), (name, key)


@pytest.mark.filterwarnings("ignore")
def test_trl_grpo_takes_the_same_step(trl, tmp_path, monkeypatch):
    expected = tiny_grpo(tmp_path / "theirs")
    calls = counted(monkeypatch)
    on_trl.patch()
    got = tiny_grpo(tmp_path / "ours")
    assert calls, "the patched trainer never called token_logprobs"
    assert got["grads"].keys() == expected["grads"].keys()
    assert max(g.abs().max() for g in expected["grads"].values()) > 1e-4
    for name, grad in expected["grads"].items():
        torch.testing.assert_close(got["grads"][name], grad, rtol=1e-4, atol=1e-6)
    for name in ("loss", "entropy", "kl", "grad_norm", "reward"):
        assert got["logs"][name] == pytest.approx(expected["logs"][name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("kind", ["plain", "softcap", "scaled", "bias", "entropy"])
def test_trl_fused_head(trl, kind):
    hidden, weight, bias = random(7, 6), random(11, 6, seed=1), random(11, seed=2)
    targets = torch.arange(7, device=DEVICE)
    softcap, scale = (2.0 if kind == "softcap" else None), (0.3 if kind in ("scaled", "softcap") else 1.0)
    outputs = ("log_probs", "entropy") if kind == "entropy" else ("log_probs",)

    def run(h, w, b):
        return trl._ChunkedLogProbFunction.apply(
            h, w, b if kind == "bias" else None, targets, 0.7, 4, softcap, scale, outputs
        )

    free = (hidden, weight, bias) if kind == "bias" else (hidden, weight)
    call = run if kind == "bias" else lambda h, w: run(h, w, None)
    expected = graded(call, *free)
    original = trl._ChunkedLogProbFunction
    on_trl.patch()
    assert trl._ChunkedLogProbFunction is not original
    torch.testing.assert_close(graded(call, *free), expected, rtol=1e-4, atol=1e-5)
    on_trl.unpatch()
    assert trl._ChunkedLogProbFunction is original


# Tokens, width, vocabulary and vocabulary block of TRL's own tests of its head; then sizes that nothing divides.
HEADS = [(64, 32, 128, 32), (64, 32, 100, 32), (7, 6, 11, 4), (0, 6, 11, 4)]
OUTPUTS = [
    None,
    ("log_probs",),
    ("log_probs", "entropy"),
    ("log_probs", "entropy", "is_top1"),
    ("log_probs", "entropy", "mean_logits"),
    ("log_probs", "entropy", "mean_logits", "is_top1"),
    ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"),
]


@pytest.mark.parametrize("outputs", OUTPUTS, ids=str)
@pytest.mark.parametrize("size", HEADS, ids=str)
@pytest.mark.parametrize("how", [(1.0, None, 1.0), (0.7, 20.0, 0.3)], ids=["plain", "bent"])
def test_trl_head_gives_every_output(trl, monkeypatch, outputs, size, how):
    (n, width, vocab, chunk), (temperature, softcap, scale) = size, how
    targets = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    extra = () if outputs is None else (outputs,)
    inputs = random(n, width), random(vocab, width, seed=1), random(vocab, seed=2)

    def run(h, w, b):
        return trl._ChunkedLogProbFunction.apply(h, w, b, targets, temperature, chunk, softcap, scale, *extra)

    with torch.no_grad():
        there = [x is not None for x in run(*inputs)]
    expected = graded(run, *inputs)
    calls = counted(monkeypatch)
    on_trl.patch()
    with torch.no_grad():
        assert [x is not None for x in run(*inputs)] == there
    torch.testing.assert_close(graded(run, *inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_trl_head_that_is_told_no_outputs_gives_all_five(trl):
    hidden, weight, targets = random(5, 6), random(9, 6, seed=1), torch.arange(5, device=DEVICE)
    args = (hidden, weight, None, targets, 1.0, 4)
    expected = trl._ChunkedLogProbFunction.apply(*args)
    on_trl.patch()
    got = trl._ChunkedLogProbFunction.apply(*args)
    assert len(got) == 5
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_trl_selective_log_softmax(trl):
    logits, index = random(2, 5, 9), torch.arange(10, device=DEVICE).reshape(2, 5) % 9
    row_mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]], device=DEVICE)
    several = torch.stack([index, index], -1)
    runs = {
        "logp": lambda x: trl.selective_log_softmax(x, index, 0.7, row_mask),
        "both": lambda x: trl.selective_log_softmax_and_entropy(x, index, True, 0.7, row_mask),
        "detached": lambda x: trl.selective_log_softmax_and_entropy(x, index, entropy_requires_grad=False),
        "several": lambda x: trl.selective_log_softmax(x, several),
    }
    expected = {name: graded(run, logits) for name, run in runs.items()}
    on_trl.patch()
    for name, run in runs.items():
        torch.testing.assert_close(graded(run, logits), expected[name], rtol=1e-5, atol=1e-6)
