"""OpenRLHF, patched, against itself, unpatched; skipped where it does not import."""

import importlib
import sys
import types

import pytest
import torch
from integration_helpers import MARKS, called, graded, random, rollout
from kernel_checks import DEVICE
from rto_kernels.integrations import openrlhf as on_openrlhf

pytestmark = MARKS


def stand_in(*args, **kwargs):
    """Of a function, or of a decorator whose function nobody calls."""
    return stand_in


# What OpenRLHF imports from packages that are not installed here, most for GPUs; but for decorators nothing is called.
STAND_INS = {
    "aiohttp": {"aiohttp": []},
    "torchdata": {"torchdata": [], "torchdata.stateful_dataloader": ["StatefulDataLoader"]},
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
    "ray": {
        "ray": ["remote"],
        "ray.util": [],
        "ray.util.placement_group": ["PlacementGroup", "placement_group"],
        "ray.util.scheduling_strategies": ["PlacementGroupSchedulingStrategy"],
    },
    "vllm": {"vllm": ["SamplingParams"], "vllm.inputs": ["TokensPrompt"], "vllm.utils": ["random_uuid"]},
}


@pytest.fixture
def openrlhf(monkeypatch, peers):
    for package, modules in STAND_INS.items():
        if importlib.util.find_spec(package) is None:
            for name, attributes in modules.items():
                module = types.ModuleType(name)
                module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
                vars(module).update(dict.fromkeys(attributes, stand_in))
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
