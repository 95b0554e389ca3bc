"""The policy update of an adapter with a frozen lm_head beside the same with a trained one.

    python -m bench.iteration.frozen_head

A frozen head needs no gradient: of its three products (logits, d(hidden), d(weight)) the last is left out, and so are
its gradient and its AdamW states. Both take turns in one process; the ratio is the median over turns, frozen / trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench.harness import seconds
from rto_fast.algo.losses import PolicyTerms, loss_denominator, policy_loss
from rto_fast.config.lora import ALL_LINEAR, Lora
from rto_fast.models.adapters import put_on
from rto_fast.models.attention import resolve_attention
from rto_fast.models.heads import PolicyModel
from rto_fast.models.packing import PackedBatch

LENGTHS, PROMPT = (64, 40, 96, 56), 8
"""Tokens of each sequence, and of its prompt."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
ATTENTION, KERNEL = resolve_attention("auto", DEVICE, DTYPE)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")


def policy_of(width: int, layers: int, vocab: int, *, frozen: bool) -> PolicyModel:
    """A random Llama with an adapter of rank 8 on all linear maps, its lm_head trained beside it or not."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 32, vocab_size=vocab, tie_word_embeddings=False,
    )  # fmt: skip
    lm = LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION, dtype=DTYPE).to(DEVICE)
    model = PolicyModel(lm)
    put_on(model, Lora(8, 32, 0.0, (ALL_LINEAR,), False, False, 0), "random", "policy")
    model.lm.lm_head.weight.requires_grad_(not frozen)
    return model


class Update:
    """One optimiser step of PPO's policy loss on a packed batch, as `updates/ppo.py` makes it."""

    def __init__(self, policy: PolicyModel) -> None:
        self.policy = policy.train()
        self.optimiser = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-5)
        generator, vocab = torch.Generator().manual_seed(1), policy.lm.config.vocab_size
        rows = [torch.randint(vocab, (n,), generator=generator) for n in LENGTHS]
        self.batch = PackedBatch.make(rows, [PROMPT] * len(rows), DEVICE, KERNEL)
        lens = torch.tensor(LENGTHS) - PROMPT
        with torch.no_grad():
            old = policy(self.batch)
        advantages = torch.randn(int(lens.sum()), generator=generator).to(DEVICE)
        whole = loss_denominator(lens, "sequence").to(DEVICE)
        plain = torch.tensor(0.0, device=DEVICE), torch.tensor(1.0, device=DEVICE)
        self.terms = PolicyTerms(old, advantages, plain, self.batch.cu_responses, whole)

    def __call__(self) -> Tensor:
        how = {"temperature": 1.0, "clip": 0.2, "entropy_coef": 0.0, "aggregation": "sequence"}
        read = partial(policy_loss, terms=self.terms, **how)
        loss = self.policy(self.batch, read).policy_loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.detach()


def head_products(update: Update, vocab: int) -> int:
    """Matrix products with a side of `vocab` in one update, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        update()
    made = [e for e in seen.events() if e.name in PRODUCTS]
    return sum(any(vocab in shape for shape in e.input_shapes if isinstance(shape, list)) for e in made)


def measure(width: int, layers: int, vocab: int, turns: int) -> dict[str, float]:
    """Milliseconds of both updates and their ratio, medians over turns, and how many products meet the head in each."""
    updates = {name: Update(policy_of(width, layers, vocab, frozen=name == "frozen")) for name in ("frozen", "trained")}
    for update in updates.values():
        update()  # AdamW makes its states
    took = [{name: 1e3 * seconds(update) for name, update in updates.items()} for _ in range(turns)]
    found = {f"{name}_ms": statistics.median(turn[name] for turn in took) for name in updates}
    found |= {f"{name}_head_products": head_products(update, vocab) for name, update in updates.items()}
    return found | {"ratio": statistics.median(turn["frozen"] / turn["trained"] for turn in took)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 256), ("layers", 4), ("vocab", 32000), ("turns", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = vars(parser.parse_args())
    print(json.dumps(asked | {key: round(value, 3) for key, value in measure(**asked).items()}))


if __name__ == "__main__":
    main()
