"""TRL, OpenRLHF and verl, patched, against themselves, unpatched; skipped where they do not import."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE, INTERPRET, sample
from launches import Launch
from rto_kernels import token_logprobs
from rto_kernels.integrations import openrlhf as on_openrlhf
from rto_kernels.integrations import trl as on_trl
from rto_kernels.integrations import verl as on_verl

WORKER = Path(__file__).with_name("trl_zero3_worker.py")

pytestmark = pytest.mark.skipif(INTERPRET, reason="what is patched does not depend on the backend")


@pytest.fixture(autouse=True)
def ordinary_memory(nan_filled_memory):
    """The libraries under test were not written for NaN-filled memory."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def trl():
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed", exc_type=ImportError)
    if not hasattr(utils, "_ChunkedLogProbFunction"):
        pytest.skip("this TRL has no fused LM head; the integration is for 1.16")
    yield utils
    on_trl.unpatch()


# What OpenRLHF imports from packages that are not installed here, most for GPUs; nothing of it is called.
STAND_INS = {
    "flash_attn": {
        "flash_attn": [],
        "flash_attn.utils": [],
        "flash_attn.utils.distributed": ["all_gather"],
        "flash_attn.bert_padding": ["index_first_axis", "pad_input", "rearrange", "unpad_input"],
    },
    "peft": {
        "peft": ["LoraConfig", "TaskType", "get_peft_model"],
        "peft.tuners": [],
        "peft.tuners.lora": ["LoraLayer"],
    },
    "pylatexenc": {"pylatexenc": ["latex2text"]},
    "vllm": {"vllm": ["SamplingParams"], "vllm.inputs": ["TokensPrompt"], "vllm.utils": ["random_uuid"]},
}


@pytest.fixture
def openrlhf(monkeypatch):
    for package, modules in STAND_INS.items():
        if importlib.util.find_spec(package) is None:
            for name, attributes in modules.items():
                module = types.ModuleType(name)
                module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
                vars(module).update(dict.fromkeys(attributes))
                monkeypatch.setitem(sys.modules, name, module)
    pytest.importorskip("openrlhf.models.loss", reason="OpenRLHF is not installed", exc_type=ImportError)
    try:
        maker = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    except ImportError:
        maker = None
    yield types.SimpleNamespace(
        loss=importlib.import_module("openrlhf.models.loss"),
        utils=importlib.import_module("openrlhf.models.utils"),
        actor=importlib.import_module("openrlhf.models.actor"),
        maker=maker,
    )
    on_openrlhf.unpatch()


# Packages of verl whose modules are loaded without their `__init__`, where that wants what is not installed; and what
# the modules under test import by name, of which nothing but ActorConfig is looked at.
BARE = {
    "verl": [],
    "verl.trainer": [],
    "verl.trainer.ppo": [],
    "verl.trainer.config": ["AlgoConfig"],
    "verl.utils": ["as_torch_index", "group_mean_std"],
    "verl.utils.device": ["get_device_name", "get_torch_device"],
    "verl.utils.import_utils": [],
    "verl.workers": [],
    "verl.workers.config": [],
    "tensordict": ["TensorDict"],
    "omegaconf": ["DictConfig"],
}


def bare_verl(monkeypatch):
    """verl's two modules on their own; skips where there are no sources of verl."""
    there = importlib.util.find_spec("verl")
    if there is None:
        pytest.skip("verl is not installed")
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
        monkeypatch.delitem(sys.modules, name)
    for name, attributes in BARE.items():
        if name.partition(".")[0] == "verl" or importlib.util.find_spec(name) is None:
            module = types.ModuleType(name)
            module.__path__ = [str(Path(there.origin).parent.joinpath(*name.split(".")[1:]))]
            vars(module).update({attribute: type(attribute, (), {}) for attribute in attributes})
            monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["verl.utils.import_utils"])["deprecated"] = lambda *_: lambda function: function
    vars(sys.modules["verl.workers.config"])["ActorConfig"] = VerlConfig


@pytest.fixture
def verl(monkeypatch):
    try:
        core = importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError:
        bare_verl(monkeypatch)
        core = importlib.import_module("verl.trainer.ppo.core_algos")
    yield types.SimpleNamespace(core=core, functional=importlib.import_module("verl.utils.torch_functional"))
    on_verl.unpatch()


def random(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE)


def graded(function, *inputs):
    """(outputs, gradients) under a random upstream gradient, the same at every call."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = function(*leaves)
    outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if isinstance(out, torch.Tensor)]
    ups = [random(*out.shape, seed=30 + i) for i, out in enumerate(outs)]
    total = sum((out.float() * up).sum() for out, up in zip(outs, ups, strict=True) if out.requires_grad)
    return outs, torch.autograd.grad(total, leaves)


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


def rollout(seed=0):
    """[4, 9] tokens with right padding and a gap, and a 0/1 mask."""
    layout = sample("gaps", seed)
    mask = (layout.mask[:4, :9]).float()
    mask[:, 0] = 1
    return mask, [random(4, 9, scale=0.6, seed=s) for s in range(10, 16)]


def test_openrlhf_log_probs(openrlhf):
    logits, labels = random(2, 5, 9), torch.arange(10, device=DEVICE).reshape(2, 5) % 9
    expected = graded(lambda x: openrlhf.actor.log_probs_from_logits(x * 1, labels, 0.7), logits)
    original = openrlhf.actor.log_probs_from_logits
    on_openrlhf.patch()
    assert openrlhf.actor.log_probs_from_logits is openrlhf.utils.log_probs_from_logits is not original
    got = graded(lambda x: openrlhf.actor.log_probs_from_logits(x * 1, labels, 0.7), logits)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    on_openrlhf.unpatch()
    assert openrlhf.actor.log_probs_from_logits is original


def test_openrlhf_gae(openrlhf):
    if openrlhf.maker is None:
        pytest.skip("OpenRLHF's experience maker does not import here")
    mask, (rewards, values, *_) = rollout()
    for action_mask in (mask, mask.bool(), None):
        args = (None, values, rewards, action_mask, 0.99, 0.95)
        inside = torch.ones_like(mask) if action_mask is None else mask
        expected = [x * inside for x in openrlhf.maker.get_advantages_and_returns(*args)]
        on_openrlhf.patch()
        got = openrlhf.maker.get_advantages_and_returns(*args)
        on_openrlhf.unpatch()
        torch.testing.assert_close(list(got), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("batch", [{}, {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 8}])
def test_openrlhf_losses(openrlhf, token_level, dual_clip, batch):
    mask, (logp, old_logp, advantages, values, old_values, returns) = rollout()
    policy = openrlhf.loss.PolicyLoss(0.1, 0.3, dual_clip=dual_clip, token_level_loss=token_level)
    value = openrlhf.loss.ValueLoss(0.2, token_level_loss=token_level)

    def run(logp, values):
        loss, clip_ratio, kl, _, _ = policy(logp, old_logp, advantages, mask, **batch)
        return loss, value(values, old_values, returns, mask, **batch), clip_ratio.detach(), kl.detach()

    expected = graded(run, logp, values)
    on_openrlhf.patch()
    torch.testing.assert_close(graded(run, logp, values), expected, rtol=1e-5, atol=1e-6)


CORRECTIONS = [
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.8, 1.2)},  # TIS
    {"is_correction_level": "token", "is_correction_threshold": (0.6, 1.8)},  # ICEPOP
    {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.3)},
    {"is_correction_level": "token", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.05)},
    {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.2)},
    {"policy_loss_type": "gspo"},
    {"policy_loss_type": "gspo", "is_correction_level": "token"},
]


def called(monkeypatch, module) -> list:
    """Into this list goes an entry for each call that an integration makes of our loss."""
    calls, ours = [], module.ppo_loss
    monkeypatch.setattr(module, "ppo_loss", lambda *a, **k: calls.append(k) or ours(*a, **k))
    return calls


@pytest.mark.parametrize("options", CORRECTIONS, ids=str)
@pytest.mark.parametrize("dual_clip", [None, 1.2])
@pytest.mark.parametrize("token_level", [True, False])
def test_openrlhf_corrections_and_gspo(openrlhf, monkeypatch, options, dual_clip, token_level):
    mask, (logp, old_logp, advantages, rollout_logp, *_) = rollout()
    # Log-probs: the divergences are of probabilities.
    logp, old_logp, rollout_logp = (-x.abs() - 0.1 for x in (logp, old_logp, rollout_logp))
    policy = openrlhf.loss.PolicyLoss(0.1, 0.2, dual_clip=dual_clip, token_level_loss=token_level, **options)

    def run(logp):
        loss, *log = policy(logp, old_logp, advantages, mask, rollout_logp, dp_size=2, batch_num_tokens=50,
                            global_batch_size=8)  # fmt: skip
        return loss, *(torch.zeros(()) if x is None else x.detach() for x in log)

    expected = graded(run, logp)
    calls = called(monkeypatch, on_openrlhf)
    on_openrlhf.patch()
    torch.testing.assert_close(graded(run, logp), expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 1
    if "is_correction_level" in options and "policy_loss_type" not in options:
        assert 0 < expected[0][4] < 1, "the bounds cut nothing, or everything"


def test_openrlhf_other_losses_fall_through(openrlhf, monkeypatch):
    _, (logp, old_logp, advantages, rollout_logp, *_) = rollout()
    loss = openrlhf.loss.PolicyLoss(is_correction_level="token")
    calls = called(monkeypatch, on_openrlhf)
    on_openrlhf.patch()
    on_openrlhf.unpatch()
    expected = loss(logp, old_logp, advantages, None, rollout_logp)
    on_openrlhf.patch()
    assert loss(logp, old_logp, advantages, None, rollout_logp) == expected
    double = [x.double() for x in (logp, old_logp, advantages)]
    assert loss(*double, torch.ones(4, 9), rollout_logp.double())[0].dtype == torch.float64
    assert not calls


def test_verl_log_probs(verl):
    logits, labels = random(2, 5, 9), torch.arange(10, device=DEVICE).reshape(2, 5) % 9
    expected = graded(lambda x: verl.functional.logprobs_from_logits(x * 1, labels), logits)
    on_verl.patch()
    got = graded(lambda x: verl.functional.logprobs_from_logits(x * 1, labels), logits)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_verl_gae(verl):
    mask, (rewards, values, *_) = rollout()
    original = verl.core.get_adv_estimator_fn("gae")
    expected = [x * mask for x in original(rewards, values, mask, 0.99, 0.95)]
    on_verl.patch()
    patched = verl.core.get_adv_estimator_fn("gae")
    assert patched is verl.core.compute_gae_advantage_return is not original
    torch.testing.assert_close(list(patched(rewards, values, mask, 0.99, 0.95)), expected, rtol=1e-5, atol=1e-5)
    on_verl.unpatch()
    assert verl.core.get_adv_estimator_fn("gae") is verl.core.compute_gae_advantage_return is original


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("entropy_from_logits", (10, 9)),
        ("entropy_from_logits", (2, 5, 9)),
        ("entropy_from_logits", (0, 9)),
        ("entropy_from_logits_with_chunking", (10, 9)),
    ],
)
def test_verl_entropy(verl, name, shape):
    logits = random(*shape, scale=3.0)
    expected = graded(getattr(verl.functional, name), logits)
    original = getattr(verl.functional, name)
    on_verl.patch()
    assert getattr(verl.functional, name) is not original
    torch.testing.assert_close(graded(getattr(verl.functional, name), logits), expected, rtol=1e-5, atol=1e-5)


class VerlConfig(dict):
    """As much of verl's ActorConfig as its policy losses read."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, 0.1, None
    policy_loss = types.SimpleNamespace(clip_cov_ratio=0.3, clip_cov_lb=0.1, clip_cov_ub=None)

    def __init__(self, **batch):
        super().__init__(clip_ratio_c=1.4)
        self.global_batch_info = batch


BATCHES = [{}, {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 8, "loss_scale_factor": 7}]
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("weighted", [True, False])
def test_verl_losses(verl, mode, batch, weighted):
    mask, (logp, old_logp, advantages, values, old_values, returns) = rollout()
    mask[3] = 0  # a sequence without response tokens
    weights = random(4, 9, seed=20).exp() if weighted else None

    def run(logp, values):
        policy = verl.core.get_policy_loss_fn("vanilla")
        loss, metrics = policy(old_logp, logp, advantages, mask, mode, VerlConfig(**batch), weights)
        value, fraction = verl.core.compute_value_loss(values, returns, old_values, mask, 0.3, mode, **batch)
        return loss, value, fraction, torch.tensor(list(metrics.values()))

    expected = graded(run, logp, values)
    on_verl.patch()
    torch.testing.assert_close(graded(run, logp, values), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vanilla", "gspo", "cispo", "clip_cov"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [True, False])
def test_verl_policy_losses(verl, monkeypatch, name, mode, weighted):
    mask, (logp, old_logp, advantages, *_) = rollout()
    mask[3] = 0  # a sequence without response tokens
    weights = random(4, 9, seed=20).exp() if weighted else None
    monkeypatch.setattr(verl.core, "ActorConfig", VerlConfig)

    def run(logp):
        torch.manual_seed(7)  # clip-cov draws tokens
        policy = verl.core.get_policy_loss_fn(name)
        loss, metrics = policy(old_logp, logp, advantages, mask, mode, VerlConfig(**BATCHES[1]), weights)
        loss -= 0.1 * logp.sum()  # as verl's worker takes the entropy's share away, in place
        return loss, torch.tensor([metrics[key] for key in sorted(metrics)])

    expected = graded(run, logp)
    names = sorted(verl.core.get_policy_loss_fn(name)(old_logp, logp, advantages, mask, mode, VerlConfig())[1])
    calls = called(monkeypatch, on_verl)
    on_verl.patch()
    torch.testing.assert_close(graded(run, logp), expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 1
    assert names == sorted(verl.core.get_policy_loss_fn(name)(old_logp, logp, advantages, mask, mode, VerlConfig())[1])
