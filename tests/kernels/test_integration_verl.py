"""verl, patched, against itself, unpatched; skipped where its sources are not there."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from integration_helpers import MARKS, called, graded, random, rollout
from kernel_checks import DEVICE
from rto_kernels.integrations import verl as on_verl

pytestmark = MARKS


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
def verl(monkeypatch, peers):
    try:
        core = importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError:
        bare_verl(monkeypatch)
        core = importlib.import_module("verl.trainer.ppo.core_algos")
    yield types.SimpleNamespace(core=core, functional=importlib.import_module("verl.utils.torch_functional"))
    on_verl.unpatch()


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
