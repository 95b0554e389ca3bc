"""Packed sequences: each has the log-probs, values and gradients that it has alone, without packing."""

import itertools

import pytest
import torch
import transformers
from loop_helpers import ROOT
from rto_kernels import token_logprobs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_fast.contract import Request, Rollout
from rto_fast.errors import ConfigError
from rto_fast.models.attention import PACKED, PackedLayout, packed_attention, resolve_attention
from rto_fast.models.heads import logps_at
from rto_fast.models.load import load_policy, load_scalar
from rto_fast.models.packing import PackedBatch, Placement, balance, micro_batches, plan

VOCAB = 50
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "llama_gqa": (transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "llama_tied": (transformers.LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mistral_window": (transformers.MistralConfig, {"num_key_value_heads": 1, "sliding_window": 5}),
    "qwen3_gqa": (transformers.Qwen3Config, {"num_key_value_heads": 2}),
    "gemma2_softcap": (
        transformers.Gemma2Config,
        {
            "num_key_value_heads": 2,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
            "hidden_activation": "gelu",
        },
    ),
}
STORIES = ROOT.parent / "shared" / "models" / "stories260k"

# (prompt, response) lengths: unequal, prompts of one token, empty responses, a single token in all, runs of
# equal lengths side by side and apart, shorter and longer than Mistral's window.
LENGTHS = {
    "unequal": [(1, 1), (1, 7), (3, 4), (6, 0), (5, 12), (1, 20)],
    "runs": [(2, 3), (4, 1), (1, 4), (3, 9), (6, 6), (2, 10), (4, 1)],
    "one_token": [(1, 0), (1, 2), (1, 0), (9, 2)],
    "alone": [(3, 11)],
}


@pytest.fixture(scope="module", params=[*FAMILIES, "stories260k"])
def folder(request, tmp_path_factory):
    """A causal LM; for the random ones a softmax far from uniform."""
    if request.param == "stories260k":
        if not STORIES.is_dir():
            pytest.skip(f"no {STORIES}")
        return str(STORIES)
    kind, settings = FAMILIES[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**(SMALL | settings)))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, 0.25)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def scalar_folder(folder, tmp_path_factory):
    """A classifier on the same backbone with a random head and statistics."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    torch.manual_seed(1)
    with torch.no_grad():
        model.score.weight.normal_(0, 1)
    model.config.mean, model.config.std = 0.4, 2.5
    path = tmp_path_factory.mktemp("scalar")
    model.save_pretrained(path)
    return str(path)


def sequences_of(lengths):
    torch.manual_seed(3)
    return [torch.randint(3, VOCAB, (p + r,)) for p, r in lengths], [p for p, _ in lengths]


def packed(lengths):
    sequences, prompts = sequences_of(lengths)
    return PackedBatch.make(sequences, prompts, torch.device("cpu"), "sdpa"), sequences, prompts


def close(actual, expected, *, relative):
    """Within `relative` of the largest expected magnitude."""
    scale = max(1e-3, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, atol=relative * scale, rtol=0)


def close_gradients(actual, expected):
    """Each within 2e-5 of its own largest entry and 1e-6 of the model's: transformers' RMSNorm rounds to fp32."""
    assert actual.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, grad in actual.items():
        atol = 2e-5 * float(expected[name].abs().max()) + 1e-6 * largest
        torch.testing.assert_close(grad, expected[name], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_policy_is_as_each_sequence_alone(folder, lengths):
    """Log-probs at two temperatures, entropy, and the gradient of a weighted sum of all three.

    In fp64, so that no tolerance hides a mask or a position that is slightly wrong.
    """
    batch, sequences, prompts = packed(lengths)
    ours = load_policy(folder, dtype=torch.float64, attention=PACKED, argument="policy").train()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").train()

    logps, entropies = [], []
    for tokens, start in zip(sequences, prompts, strict=True):
        logits = theirs(tokens[None]).logits[0]
        rows = [torch.log_softmax(logits / t, -1) for t in (0.7, 1.0)]
        logps.append(torch.stack([r[start - 1 : -1].gather(1, tokens[start:, None])[:, 0] for r in rows]))
        entropies.append(-(rows[0].exp() * rows[0]).sum(-1)[start - 1 : -1])
    expected, expected_entropy = torch.cat(logps, 1), torch.cat(entropies)

    def read(*args, **head):
        _, entropy = token_logprobs(*args, temperature=0.7, return_entropy=True, **head)
        return logps_at((0.7, 1.0))(*args, **head), entropy

    logp, entropy = ours(batch, read)
    assert logp.shape == (2, sum(r for _, r in lengths))
    close(logp.detach(), expected.detach(), relative=1e-6)
    close(entropy.detach(), expected_entropy.detach(), relative=1e-6)

    weight = torch.randn(3, logp.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (weight[:2] * logp).sum().add((weight[2] * entropy).sum()).backward()
    (weight[:2] * expected).sum().add((weight[2] * expected_entropy).sum()).backward()
    close_gradients(gradients(ours.lm), gradients(theirs))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_critic_is_as_each_sequence_alone(scalar_folder, lengths):
    """Values of all response states and after the last token, normalised; and their gradients."""
    batch, sequences, prompts = packed(lengths)
    ours = load_scalar(scalar_folder, dtype=torch.float32, attention=PACKED, argument="reward_model").train()
    theirs = AutoModelForSequenceClassification.from_pretrained(
        scalar_folder, dtype=torch.float32, attn_implementation="eager"
    ).train()
    states, ends = [], []
    for tokens, start in zip(sequences, prompts, strict=True):
        hidden = theirs.base_model(tokens[None]).last_hidden_state[0]
        value = (hidden @ theirs.score.weight[0] - 0.4) / 2.5
        states.append(value[start - 1 : -1])
        ends.append(value[-1:])
    expected = torch.cat([*states, *ends])
    values = ours(batch, torch.cat([batch.state_positions, batch.last_positions]))
    torch.testing.assert_close(values.detach(), expected.detach(), atol=1e-5, rtol=1e-5)
    weight = torch.randn(values.shape, generator=torch.Generator().manual_seed(5))
    (weight * values).sum().backward()
    (weight * expected).sum().backward()
    close_gradients(gradients(ours.classifier), gradients(theirs))


def test_gradient_checkpointing_changes_nothing(folder):
    batch, _, _ = packed(LENGTHS["runs"])
    results = []
    for checkpointed in (False, True):
        model = load_policy(folder, dtype=torch.float32, attention=PACKED, argument="policy").train()
        if checkpointed:
            model.lm.gradient_checkpointing_enable({"use_reentrant": False})
        logp = model(batch)
        logp.square().sum().backward()
        results.append((logp.detach(), gradients(model.lm)))
    (plain, plain_grads), (checked, checked_grads) = results
    assert torch.equal(plain, checked)
    for name, grad in plain_grads.items():
        close(checked_grads[name], grad, relative=1e-6)


@torch.no_grad()
def test_neighbours_are_not_seen(folder):
    """Other tokens in one sequence leave all other sequences as they were, and change its own."""
    lengths = LENGTHS["unequal"]
    sequences, prompts = sequences_of(lengths)
    model = load_policy(folder, dtype=torch.float32, attention=PACKED, argument="policy")
    cpu = torch.device("cpu")
    cut = [r for _, r in lengths]
    before = model(PackedBatch.make(sequences, prompts, cpu, "sdpa")).split(cut)
    sequences[4] = (sequences[4] - 3 + 7) % (VOCAB - 3) + 3
    after = model(PackedBatch.make(sequences, prompts, cpu, "sdpa")).split(cut)
    for i, (x, y) in enumerate(zip(before, after, strict=True)):
        if i == 4:
            assert (x - y).abs().max() > 0.01
        else:
            close(x, y, relative=1e-6)


def test_positions_of_rollout_and_packed_batch_agree():
    """Both read response token t at the position before it, and number positions from 0 in each sequence."""
    lengths = [(1, 1), (1, 0), (4, 3), (2, 5)]
    sequences, prompts = sequences_of(lengths)
    requests = [
        Request(tuple(s[:p].tolist()), 0, i, 0, i) for i, (s, p) in enumerate(zip(sequences, prompts, strict=True))
    ]
    answers = [s[p:].tolist() for s, p in zip(sequences, prompts, strict=True)]
    rollout = Rollout.from_lists(requests, answers, [[0.0] * len(a) for a in answers], [False] * 4, 0)
    batch = PackedBatch.make(sequences, prompts, torch.device("cpu"), "sdpa")
    states, at = [], 0
    for prompt, response in lengths:
        states += [at + prompt - 1 + t for t in range(response)]
        at += prompt + response
    assert batch.state_positions.tolist() == rollout.state_positions.tolist() == states
    flat = torch.cat(sequences).tolist()
    assert batch.response_tokens.tolist() == rollout.response_tokens.tolist() == [flat[i + 1] for i in states]
    assert batch.layout.position_ids[0].tolist() == [i for p, r in lengths for i in range(p + r)]
    assert batch.last_positions.tolist() == [1, 2, 9, 16]
    assert batch.cu_responses.tolist() == rollout.cu_responses.tolist() == [0, 1, 1, 4, 9]
    picked = rollout.select([3, 0])
    assert [s.tolist() for s in picked.sequences()] == [sequences[3].tolist(), sequences[0].tolist()]
    assert rollout.response_index([3, 0]).tolist() == [4, 5, 6, 7, 8, 0]


def test_plan_covers_every_sequence_once_within_the_budget():
    lens = [31, 5, 5, 17, 64, 2, 90, 5, 8, 8, 1, 33]
    for ranks in (1, 2, 3):
        for budget in (1, 40, 1000):
            made = plan(lens, ranks, budget)
            assert len({len(rank) for rank in made}) == 1, "every rank gets as many micro-batches"
            assert sorted(i for rank in made for part in rank for i in part) == list(range(len(lens)))
            for part in (p for rank in made for p in rank):
                assert len(part) <= 1 or sum(lens[i] for i in part) <= budget
                assert [lens[i] for i in part] in (
                    sorted(lens[i] for i in part),
                    sorted((lens[i] for i in part), reverse=True),
                )
    shares = [sum(lens[i] for i in share) for share in balance(lens, 2)]
    assert max(shares) <= 4 / 3 * max(sum(lens) / 2, max(lens))
    assert micro_batches([0, 3], lens, 10) == [[0], [3]], "a sequence longer than the budget goes alone"


@torch.no_grad()
def test_placement_gives_every_sequence_its_own_place(folder):
    """Micro-batches reorder by length; their indices lead back."""
    sequences, prompts = sequences_of(LENGTHS["unequal"])
    model = load_policy(folder, dtype=torch.float32, attention=PACKED, argument="policy")
    seen = {}
    for budget in (1, 12, 1000):
        placement = Placement(torch.device("cpu"), "sdpa", lockstep=False, micro_tokens=budget)
        for index, batch in placement.micro(sequences, prompts):
            pieces = model(batch).split(batch.cu_responses.diff().tolist())
            for i, piece in zip(index, pieces, strict=True):
                assert piece.numel() == LENGTHS["unequal"][i][1]
                close(piece, seen.setdefault(i, piece), relative=1e-5)
    assert len(seen) == len(sequences)


def test_attention_that_cannot_run_is_refused():
    cpu = torch.device("cpu")
    assert resolve_attention("auto", cpu, torch.bfloat16) == (PACKED, "sdpa")
    for choice in ("flash_attention_2", "varlen"):
        with pytest.raises(ValueError, match="CUDA"):
            resolve_attention(choice, cpu, torch.bfloat16)


def _plain_varlen(q, k, v, cu, window_size, scale):
    """Attention of each packed sequence [N, heads, d] by the formula."""
    out = torch.empty_like(q)
    for start, end in itertools.pairwise(cu.tolist()):
        i = torch.arange(end - start)
        seen = i[:, None] >= i
        if window_size[0] >= 0:
            seen &= i[:, None] - i <= window_size[0]
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * (scale or q.shape[-1] ** -0.5)
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[start:end])
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("release", ["2.11", "2.12"])
def test_varlen_is_called_as_each_pytorch_release_takes_it(monkeypatch, release, window):
    """PyTorch 2.11's varlen_attn knows no grouped queries; later ones want to be told of them."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        assert query.shape == key.shape == value.shape
        assert window_size[1] == 0
        return _plain_varlen(query, key, value, cu_seq_q, window_size, scale)

    def new(*args, enable_gqa=False, **kw):
        assert enable_gqa
        query, key, value, *rest = args
        return old(query, *(x.repeat_interleave(2, 1) for x in (key, value)), *rest, **kw)

    monkeypatch.setattr(varlen, "varlen_attn", old if release == "2.11" else new)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 8, generator=generator) for heads in (4, 2, 2))
    outs = [
        packed_attention(
            None, q, k, v, None, packed_layout=PackedLayout.make([5, 1, 6], "cpu", kernel), sliding_window=window
        )[0]
        for kernel in ("varlen", "sdpa")
    ]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


def test_what_packed_attention_does_not_know_is_refused():
    """A keyword that changes attention in a family never falls away in silence."""
    x, layout = torch.randn(1, 2, 4, 8), PackedLayout.make([4], "cpu")
    for keyword in ({"position_bias": x}, {"head_mask": torch.ones(2)}, {"some_new_thing": 3}):
        with pytest.raises(ConfigError, match=f"takes {next(iter(keyword))}, which packed attention does not know"):
            packed_attention(None, x, x, x, None, packed_layout=layout, **keyword)
    for keyword in ({"is_causal": False}, {"dropout": 0.1}):
        with pytest.raises(ConfigError, match="causal"):
            packed_attention(None, x, x, x, None, packed_layout=layout, **keyword)
    llama = AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**(SMALL | {"num_key_value_heads": 2})), attn_implementation=PACKED
    )
    with pytest.raises(ConfigError, match="layout"):
        llama(torch.ones(1, 4, dtype=torch.int64))
