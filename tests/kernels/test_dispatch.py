"""Which backend runs, launch counting, and what a wrong argument is told."""

import contextlib
import inspect
import os
import subprocess
import sys

import pytest
import rto_kernels as rk
import torch
from kernel_checks import BACKENDS, DEVICE, TRITON, sample
from rto_kernels import linear_ppo
from rto_kernels._dispatch import INTERPRET, check_local, count_launch, count_launches, resolve_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


def test_public_names_are_all_there():
    for name in rk.__all__:
        assert callable(getattr(rk, name))


# What other codebases call: these arguments, in this order, with these defaults. Further ones are keywords.
SIGNATURES = {
    "token_logprobs": """hidden, weight, targets, *, bias=None, temperature=1.0, softcap=None, ignore_index=-100,
        return_entropy=False, save_probs=False, process_group=None, vocab_start=None""",
    "logprobs_from_logits": """logits, targets, *, temperature=1.0, ignore_index=-100, return_entropy=False,
        inplace_backward=False""",
    "token_rewards": """policy_logp, ref_logp, dpo_logp, scores, *, beta1, beta2, beta3=1.0, dpo_clip=0.0,
        score_clip=10.0, dpo_ref_logp=None, cu_seqlens=None, mask=None""",
    "logits_token_rewards": """policy_logits, ref_logits, dpo_logits, targets, scores, *, beta1, beta2, beta3=1.0,
        temperature=1.0, dpo_clip=0.0, score_clip=10.0, cu_seqlens=None, mask=None""",
    "fused_token_rewards": """hiddens, weights, targets, scores, *, beta1, beta2, beta3=1.0, temperature=1.0,
        dpo_clip=0.0, score_clip=10.0, cu_seqlens=None, mask=None""",
    "gae": 'rewards, values, *, gamma=1.0, lam=0.95, cu_seqlens=None, mask=None, gaps="zero", bootstrap=None',
    "rewards_gae": """policy_logp, ref_logp, dpo_logp, scores, values, *, beta1, beta2, beta3=1.0, dpo_clip=0.0,
        score_clip=10.0, dpo_ref_logp=None, gamma=1.0, lam=0.95, cu_seqlens=None, mask=None, gaps="zero",
        bootstrap=None""",
    "whiten_moments": "moments, group=None, *, correction=0",
    "ppo_loss": """logp, old_logp, advantages, values=None, old_values=None, returns=None, *, clip=0.2, value_clip=0.2,
        whiten=None, entropy=None, entropy_coef=0.0, sampler_logp=None, is_cap=None, aggregation="sequence",
        denominator=None, cu_seqlens=None, mask=None""",
    "gae_ppo_loss": """logp, old_logp, rewards, old_values, values=None, *, gamma=1.0, lam=0.95, gaps="zero",
        bootstrap=None, clip=0.2, value_clip=0.2, entropy=None, entropy_coef=0.0, sampler_logp=None, is_cap=None,
        aggregation="sequence", denominator=None, cu_seqlens=None, mask=None""",
    "fused_linear_ppo_loss": """hidden, weight, targets, old_logp, advantages, *, bias=None, temperature=1.0,
        softcap=None, ignore_index=-100, clip=0.2, whiten=None, entropy_coef=0.0, sampler_logp=None, is_cap=None,
        aggregation="sequence", denominator=None, cu_seqlens=None, mask=None""",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_what_others_call(name):
    def arguments(function):
        return {k: (p.kind, p.default) for k, p in inspect.signature(function).parameters.items()}

    promised = {}
    exec(f"def f({SIGNATURES[name]}): pass", promised)
    promised, ours = arguments(promised["f"]), arguments(getattr(rk, name))
    assert {k: ours.get(k) for k in promised} == promised
    positional = [k for k, (kind, _) in ours.items() if kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == [k for k, (kind, _) in promised.items() if kind is not inspect.Parameter.KEYWORD_ONLY]
    extra = {k: ours[k] for k in ours.keys() - promised.keys()}
    assert all(default is not inspect.Parameter.empty for _, default in extra.values())


def test_backend_follows_the_device():
    here = torch.zeros(1, device=DEVICE)
    assert resolve_backend(None, here) == ("triton" if TRITON else "torch")
    assert resolve_backend("torch", here) == "torch"
    with pytest.raises(ValueError, match="backend must be None, 'triton' or 'torch', got 'cuda'"):
        resolve_backend("cuda", here)
    if not TRITON:
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            rk.gae(torch.zeros(1, 1), torch.zeros(1, 1), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_tensor_always_takes_triton():
    assert resolve_backend(None, torch.zeros(1, device="cuda")) == "triton"


def test_launches_are_counted_by_block():
    with count_launches() as outer:
        count_launch("a")
        with count_launches() as inner:
            count_launch("a")
            count_launch("b")
    assert inner == {"a": 1, "b": 1}
    assert outer == {"a": 2, "b": 1}


def call(name: str, **changes):
    layout = sample("packed")
    scores = layout.sequences()
    args = {
        "token_rewards": {
            "policy_logp": layout.tokens(), "ref_logp": layout.tokens(), "dpo_logp": layout.tokens(),
            "scores": scores, "beta1": 0.1, "beta2": 0.1, "cu_seqlens": layout.cu_seqlens,
        },
        "gae": {"rewards": layout.tokens(), "values": layout.tokens(), "cu_seqlens": layout.cu_seqlens},
        "ppo_loss": {
            "logp": layout.tokens(), "old_logp": layout.tokens(), "advantages": layout.tokens(),
            "values": layout.tokens(), "old_values": layout.tokens(), "returns": layout.tokens(),
            "cu_seqlens": layout.cu_seqlens,
        },
    }[name]  # fmt: skip
    return getattr(rk, name)(**{**args, **changes})


WRONG = [
    (
        "token_rewards",
        {"ref_logp": torch.zeros(3)},
        r"ref_logp must have shape \[56\] like policy_logp, got \[3\]",
    ),
    ("token_rewards", {"scores": torch.zeros(4)}, r"scores must have shape \[B\] = \[5\], got \[4\]"),
    ("token_rewards", {"dpo_logp": torch.zeros(56, dtype=torch.int64)}, "dpo_logp must have dtype float32"),
    ("token_rewards", {"dpo_logp": None}, "dpo_logp must be a tensor .*, got NoneType"),
    ("token_rewards", {"policy_logp": torch.zeros(2, 28)}, r"policy_logp must have shape \[N\], packed"),
    (
        "token_rewards",
        {"cu_seqlens": None},
        r"policy_logp must have shape \[B, T\] \(or \[N\] with cu_seqlens=\)",
    ),
    ("token_rewards", {"cu_seqlens": torch.tensor([0.0, 56.0])}, "cu_seqlens must have dtype int32, int64"),
    (
        "token_rewards",
        {"cu_seqlens": torch.tensor([0, 30, 20, 56])},
        "cu_seqlens must start at 0, never fall",
    ),
    ("token_rewards", {"cu_seqlens": torch.tensor([0, 17, 17, 18, 51, 55])}, "end at the 56 packed tokens"),
    ("token_rewards", {"cu_seqlens": torch.tensor([], dtype=torch.int32)}, "at least its leading 0"),
    ("gae", {"values": torch.zeros(55)}, r"values must have shape \[56\], a value a token, got \[55\]"),
    ("gae", {"bootstrap": torch.zeros(56)}, r"bootstrap must have shape \[B\] = \[5\], got \[56\]"),
    ("gae", {"gaps": "skip"}, "gaps must be 'zero' or 'carry', got 'skip'"),
    ("gae", {"mask": torch.ones(5)}, r"mask must have shape \[56\] like rewards, got \[5\]"),
    ("ppo_loss", {"returns": None}, "returns must be a tensor .*, got NoneType"),
    ("ppo_loss", {"old_values": None}, "old_values must be a tensor .*, got NoneType"),
    ("ppo_loss", {"aggregation": "batch"}, "aggregation must be 'sequence' or 'token', got 'batch'"),
    ("ppo_loss", {"denominator": 0}, "denominator must be a positive count, got 0"),
    ("ppo_loss", {"denominator": torch.ones(2)}, r"denominator must be one number, got \[2\]"),
    ("ppo_loss", {"whiten": (torch.ones(3), torch.ones(3))}, r"whiten must be two numbers .* shape \[3\]"),
    ("ppo_loss", {"clip": (-0.1, 0.2)}, "clip must not be negative"),
    ("ppo_loss", {"entropy_coef": 0.1}, "entropy must be a tensor .*, got NoneType"),
    ("ppo_loss", {"is_cap": 2.0}, "sampler_logp must be a tensor .*, got NoneType"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG)
def test_a_wrong_argument_is_named(monkeypatch, name, changes, message):
    monkeypatch.setenv("RTO_KERNELS_CHECK", "1")  # else a GPU's values would not be looked at
    on_device = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), changes)
    with pytest.raises(ValueError, match=message):
        call(name, **on_device)


@pytest.mark.parametrize("moments", [torch.zeros(4, dtype=torch.float64), torch.zeros(3)])
def test_wrong_moments_are_named(moments):
    with pytest.raises(ValueError, match="moments must have"):
        rk.whiten_moments(moments)


def test_what_may_be_left_out():
    call("ppo_loss", old_values=None, value_clip=None)
    call("ppo_loss", values=None, old_values=None, returns=None)
    call("ppo_loss", clip=None, value_clip=0.0)
    call("token_rewards", dpo_clip=None, score_clip=None)


@pytest.mark.skipif(not TRITON, reason="needs TRITON_INTERPRET=1 or a CUDA GPU")
def test_kernels_refuse_fp64():
    with pytest.raises(ValueError, match="rewards must have dtype float32, bfloat16, float16, got"):
        rk.gae(*(torch.zeros(1, 2, dtype=torch.float64, device=DEVICE) for _ in range(2)), backend="triton")


def test_a_tensor_on_another_device_is_named():
    with pytest.raises(ValueError, match=r"values must be on .* like the other arguments"):
        rk.gae(torch.zeros(2, 2), torch.zeros(2, 2, device="meta"), backend="torch")


def test_shards_are_refused_with_the_remedy():
    class Partitioned(torch.nn.Parameter):
        pass

    shard = Partitioned(torch.empty(0))
    shard.ds_id, shard.ds_numel, shard.ds_shape = 0, 6, (2, 3)
    with pytest.raises(
        ValueError, match=r"weight is a ZeRO-3 partition .*forward\(\) of the module .*GatheredParameters"
    ):
        check_local("weight", shard)


@pytest.mark.skipif(INTERPRET, reason="starts processes of its own")
def test_importing_needs_torch_and_triton_alone():
    code = (
        "import sys, rto_kernels; "
        "bad = {'transformers', 'deepspeed', 'trl', 'verl', 'openrlhf', 'rto_fast'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.skipif(INTERPRET, reason="fake tensors run no kernel")
def test_fake_tensors_pass_through():
    with FakeTensorMode():
        token = torch.zeros(6)
        cu_seqlens = torch.tensor([0, 2, 2, 6])
        tokens, estimate = rk.rewards_gae(
            token, token, token, torch.zeros(3), token, beta1=0.1, beta2=0.1, cu_seqlens=cu_seqlens
        )
        logp = torch.zeros(6, dtype=torch.bfloat16, requires_grad=True)
        loss = rk.ppo_loss(logp, token, estimate.advantages, cu_seqlens=cu_seqlens).policy_loss
        (grad,) = torch.autograd.grad(loss, logp)
    assert (tokens.rewards.shape, estimate.moments.dtype, loss.shape) == ((6,), torch.float64, ())
    assert (grad.shape, grad.dtype) == ((6,), torch.bfloat16)


def _released(weight):
    """As DeepSpeed leaves a parameter after GatheredParameters: another, empty tensor behind the same object."""
    weight.ds_id, weight.ds_numel, weight.ds_shape = 0, weight.numel(), weight.shape
    weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", [False, torch.bfloat16])
def test_a_weight_released_before_the_backward_pass_is_refused(backend, save):
    hidden = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(40, 8, device=DEVICE), requires_grad=False)
    targets = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    logp = rk.token_logprobs(hidden, weight, targets, save_probs=save, backend=backend)
    _released(weight)
    with pytest.raises(
        ValueError, match=r"weight had 320 elements .* released in between; make the call in the forward"
    ):
        logp.sum().backward()
    assert hidden.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", [False, torch.bfloat16])
def test_a_weight_released_before_the_backward_pass_can_be_gathered_again(backend, save):
    torch.manual_seed(0)
    hidden = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    weight, bias = (torch.nn.Parameter(torch.randn(*shape, device=DEVICE)) for shape in ((40, 8), (40,)))
    targets = torch.tensor([3, -100, 39, 0, 3], device=DEVICE)
    options = {"bias": bias, "save_probs": save, "return_entropy": True, "extras": ["is_top1"], "backend": backend}

    def results(**gather):
        logp, entropy, top = rk.token_logprobs(hidden, weight, targets, **options, **gather)
        whole = weight.data
        if gather:
            _released(weight)
        grads = torch.autograd.grad((logp * torch.arange(1, 6, device=DEVICE)).sum() + entropy.sum(), leaves)
        gathered, weight.data = weight.numel(), whole
        return [logp, entropy, top, *grads], gathered

    @contextlib.contextmanager
    def gather(*parameters, whole=weight.data):
        assert [*map(id, parameters)] == [id(weight), id(bias)]
        weight.data = whole
        yield
        weight.data = whole[:0]

    leaves = hidden, weight, bias
    expected, _ = results()
    got, left = results(gather=gather)
    assert left == 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gather_is_refused_where_each_rank_keeps_its_shard():
    x = torch.zeros(1, 2, device=DEVICE)
    with pytest.raises(ValueError, match="gather must be None with process_group"):
        rk.token_logprobs(x, x, torch.zeros(1, dtype=torch.int64), process_group=object(), gather=object())


def test_a_reference_kl_with_a_released_weight_is_refused():
    hidden = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(40, 8, device=DEVICE), requires_grad=False)
    kl = rk.token_kl(hidden, weight, hidden.detach() * 2, torch.randn(40, 8, device=DEVICE))
    _released(weight)
    with pytest.raises(ValueError, match="weight had 320 elements"):
        kl.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
def test_cuda_graphs_of_torch_compile_leave_the_arrival_counter_whole():
    """mode="reduce-overhead" warms up in a pool that ends with its graph; the counter outlives it."""

    @torch.compile(mode="reduce-overhead")
    def f(rewards, values):
        return rk.gae(rewards, values).advantages * 1.0

    for seed in range(6):
        x = torch.randn(2, 7, 300, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)
        torch.testing.assert_close(f(*x), rk.gae(*x).advantages)
        torch.compiler.cudagraph_mark_step_begin()


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_no_floating_point_cumsum(aggregation):
    """It is not deterministic on a GPU, and refused there under torch.use_deterministic_algorithms(True)."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "cumsum" in str(function):
                assert not args[0].is_floating_point()
            return function(*args, **(kwargs or {}))

    mask, ends = torch.tensor([True, False, True, True]), torch.tensor([0, 3, 4], dtype=torch.int32)
    with Watch():
        c = linear_ppo.token_weights(mask, ends, aggregation, None)
    expected = [1 / 4, 0, 1 / 4, 1 / 2] if aggregation == "sequence" else [1 / 3, 0, 1 / 3, 1 / 3]
    torch.testing.assert_close(c, torch.tensor(expected, dtype=torch.float64))
