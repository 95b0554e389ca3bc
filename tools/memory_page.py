"""Writes docs/memory.md: what runs hold in each phase, by the arithmetic of `rto-fast memory`.

python tools/memory_page.py            writes the page
python tools/memory_page.py --check    fails where the page is not what it would write
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from rto_fast import cli
from rto_fast.memory.command import MemoryConfig
from rto_fast.memory.fit import largest_micro_tokens, largest_share, remedies, shortage
from rto_fast.memory.host import host_phases
from rto_fast.memory.phases import GIB, models_of, phases
from rto_fast.memory.seconds import checkpoint_bytes, seconds

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
LARGE = "--policy llama-3-70b --dpo-model llama-3-70b --reward-model llama-3-8b"
RUNS = {
    "8B, 8 ranks": ("", True),
    "8B, 8 ranks, frozen models whole": ("--partition-frozen no", False),
    "8B, 1 rank": ("--ranks 1", True),
    "70B, 8 ranks": (LARGE, True),
    "70B, 32 ranks": (f"{LARGE} --ranks 32", True),
}
"""Name of a row, the flags that it starts from, and whether it is made to fit."""
HEAD = """# Memory

`python tools/memory_page.py` writes this page. All of it is arithmetic on the models' configs (`rto_fast/memory/`). On
CPUs it was compared with the resident memory of a run with a 230 MB policy, on one and two ranks: within a tenth in
rollout, scoring and update (`tests/unit/memory/test_memory.py`). No figure here was measured on a GPU.

```bash
rto-fast memory                                  # Llama-3-8B with 1B critic and reward model, 8 ranks of 80 GB
rto-fast memory --ranks 1                        # says which flags make it fit
rto-fast memory --policy MODEL --dpo-model MODEL --reward-model MODEL --device-gib 141
```

It takes every flag of `rto-fast rto`. A model is a folder, a `config.json`, a Hub id, or `llama-3.2-1b`, `llama-3-8b`,
`llama-3-70b`, whose configs come along. A run on GPUs asks the same before it loads anything, and is refused where a
phase does not fit; `--memory-check False` starts it all the same.

## What a rank holds

With P parameters, b bytes each (bf16: 2) and R ranks:

| what | bytes | when |
|---|---|---|
| weights of policy and critic | b P (ZeRO-3: b P / R) | always |
| their fp32 weights | 4 P / R (`--offload`: on the host) | always |
| moments of AdamW | 8 P / R (`--offload`: on the host) | from the first update on |
| reference, DPO and reward models | b P / R; whole: b P (`--park-frozen`: one at a time, in scoring alone) | always |
| linear maps of those with `--frozen-dtype` | int8: 1 a number, nf4: 0.56 | always |
| linear maps of the base with `--lora-base-dtype` | the same | the same |
| vLLM | its share of the device | in rollouts; 2 GiB while it sleeps |
| fp32 gradients | 4 P / R (ZeRO-2 and 3; `--offload`: on the host) | in an update; under ZeRO-3 always |
| a bucket of gradients, what ZeRO-3 gathers | 0.5, and 1.05 billion elements at most | in an update, in scoring |
| layer inputs and one layer's activations | by `--micro-tokens`, `--score-tokens` | in an update, in scoring |
| lm_head | its gradient in fp32 and bf16, 1 GiB of probabilities | in a policy update |
| CUDA, NCCL, gaps | 1.3 GiB | always |

With several ranks on GPUs frozen models are partitioned (`--partition-frozen auto`): scoring then waits for the links,
some 5 % by the same arithmetic, and their bits are those of whole models. On one rank, on CPUs, and with
`--frozen-dtype`, they stay whole.

## Frozen models in 8 or 4 bits

`--frozen-dtype int8` or `nf4` (`pip install 'rto-fast[train,quant]'`: bitsandbytes) holds the linear maps of reference,
DPO, reward and token-reward models in codes: a row's largest number is its scale in int8, 64 numbers share one in nf4
([arXiv 2305.14314](https://arxiv.org/abs/2305.14314)). A matrix is decoded to the run's dtype before each product, so
activations are not rounded, and scoring does the same products. Embeddings and heads stay as they are.

Token rewards are differences of log-probs, bounded by `dpo_clip / beta1`, 1 nat by default, and mostly smaller by far.
So a run says at its start how far they are off against whole models, on 64 responses of the
policy, and so does every row of its metrics (`frozen/token_reward_error_mean` and `_max`, `ref_logp` and `score` in the
same way). The whole models are loaded a second time for it, one at a time. The KL's reference is rounded too.

Loading takes no room for the whole model on the device: it is read to the host, and its matrices go to the device one
by one, to be put in codes there. Those of a whole model that errors are measured against go there for their own product
alone.

Measured on a CPU in fp32 (`python -m bench.code_error`): DPO models of `stories1m`, of whole weights and of an adapter
of rank 16, after one pass over 640 of its real pairs (held-out accuracy .53 and .56), on 64 responses of `stories1m`:

| in codes | size of a token reward, nat | its error | mean, nat | largest | reference's log-prob, error | largest |
|---|---|---|---|---|---|---|
| frozen models, int8 | .400 | 3.1 % | .013 | .16 | .0085 | .11 |
| frozen models, nf4 | .422 | 31.3 % | .13 | 1.7 | .12 | 1.6 |
| base of adapters, int8 | .465 | 1.5 % | .0068 | .076 | .0084 | .079 |
| base of adapters, nf4 | .490 | 19.9 % | .098 | 1.7 | .12 | 2.0 |

Size is the mean of |log(pi_dpo / pi_ref)|, the error beside it is a share of that. int8 is fit for use there, nf4 is
not. The model has 0.8 M parameters; no larger one was measured.

* Refused under `--zero-stage 3` and `--partition-frozen yes`, which take weights apart, for families without
  `nn.Linear` maps (GPT-2), and without bitsandbytes. Experts that a family keeps as one parameter stay as they are.
* With `--lora-rank` the flag is for models with weights of their own. Those on the policy's base stay on it; it is in
  codes with [`--lora-base-dtype`](lora.md#a-base-in-8-or-4-bits-qlora), and their error is measured in the same way.
* bitsandbytes 0.50 decodes nf4 wrongly on CPUs with AVX-512 where a row ends within a block; here it is given blocks as
  rows, which it decodes rightly.

## What a host holds

| what | bytes on a node with n of the R ranks | when |
|---|---|---|
| a model that ZeRO-3 takes apart | b P: rank 0 reads it for all ranks | while it is loaded |
| other models | n times 4 tensors on their way from the files to the devices | while they are loaded |
| `--frozen-dtype`, `--lora-base-dtype` | n b P of the largest model in codes | while it is loaded and measured |
| `--park-frozen` | n b P of every frozen model | always |
| `--offload` | n / R of (4 + b) P, 4 P of gradients and 8 P of moments | the last two from the first update on |
| Python, CUDA's host side | 3 GiB a rank, an estimate | always |

Rank 0 spreads a model one parameter at a time; the other ranks never see it whole. The files' own pages are not
counted, since the system takes them back when it needs them. A run on GPUs asks for the host's free memory, too;
`rto-fast memory` assumes `--host-gib` and `--node-ranks`.

Measured on CPUs, two ranks, a frozen policy of 193 MiB in fp32 from bf16 files (97 MiB), partitioned; MiB of resident
memory at most (`tests/unit/backend/test_spread.py`):

| | rank 0 | rank 1 | together |
|---|---|---|---|
| every rank loads the whole model | 289 | 295 | 584 |
| rank 0 loads it | 290 | 0, then 103 with its part | 290, then 393 at most |

A whole run with models of 193 MiB under ZeRO-3 held 1,413 MiB at most on both ranks together while it was built, the
sampler's weights on each of them among it; the arithmetic says 1,348.

## Runs

Devices of 79.6 GiB, GiB of one rank at each phase's peak, nodes of 8 ranks, everything else by default. Where the
defaults do not fit, the row shows the flags that `rto-fast memory` proposes, and the figures with them. The two host
columns are GiB of all ranks of a node together.

"""
TAIL = """
Seconds are those of an iteration of 1,024 sequences of full length, 2,048 tokens, and assume 400 TFLOP/s, 2.6 TB/s
from memory, 200 GB/s between ranks; each is a flag of `rto-fast memory`. They are a floor for
comparing settings, no forecast.
"""


ADAPTERS = """
## Adapters

With `--lora-rank` an adapter has A numbers: of rank 16 on all linear maps 11 million for 1B, 42 million for 8B, 207
million for 70B. The policy's base lies there once, for all models whose folders name its weights ([how](lora.md)):

| what | bytes | when |
|---|---|---|
| the base | b P (ZeRO-3: b P / R) | always |
| adapters of policy, critic, reference, DPO and reward models, and heads | b A each (ZeRO-3: b A / R) | always |
| fp32 weights and moments of what is trained | 12 A / R | always, moments from the first update on |
| its fp32 gradients | 4 A / R | in an update |
| a model with other weights, a critic with `--lora-critic own` | b P, as above | always |
| the gradient of the frozen lm_head | none | |
| one matrix with its adapter merged | 5 of its copies at most | while whole weights go to the sampler |
| vLLM's base, in the host's memory | b P a rank | while it sleeps, where the adapter alone is pushed |
| vLLM, activations | as above | |

Measured on a CPU, one rank, as MB of resident memory at most beside a tiny run's, and in brackets by arithmetic: a
policy of 230 MB in fp32 with the transformers engine, reference and DPO model, no critic
(`tests/unit/memory/test_memory.py`).

| | rollout | scoring | policy update |
|---|---|---|---|
| whole weights | 1,420 (1,417) | 1,420 (1,417) | 2,024 (2,019) |
| rank 8, reference and DPO model on the policy's base | 427 (422) | 429 (422) | 436 (438) |

In `rto-fast memory --lora-rank 16` a name such as `llama-3-8b` stands for an adapter on weights of that size, and the
policy's name for one on its base. In the table policy, reference and DPO model are of one size, reward model and critic
too (70B: of 8B, which stands apart from the base); GiB of one rank on devices of 79.6 GiB, or of 23.5 in the rows of
24 GB. Held: between the phases, with 1.3 GiB of CUDA's and 2 GiB of vLLM's asleep. Where the defaults do not fit, flags
are those that `rto-fast memory` proposes.

"""
SIZES = {"1B": ("llama-3.2-1b",) * 2, "8B": ("llama-3-8b",) * 2, "70B": ("llama-3-70b", "llama-3-8b")}
"""Names of policy, reference and DPO model, and of reward model and critic."""
CARD_24 = 23.5
"""GiB that a card of 24 GB has."""


def sized_row(size: str, ranks: int, rank: int, room: float) -> str:
    """One run of a size, of whole weights (rank 0) or with adapters."""
    model, reward = SIZES[size]
    asked = MemoryConfig(policy=model, dpo_model=(model,), reward_model=(reward,), ranks=ranks, lora_rank=rank,
                         device_gib=room)  # fmt: skip
    config, helps, fits = mended(asked)
    models = models_of(config)
    found = phases(config, models, config.machine)
    worst = max(found, key=lambda p: p.total)
    times = seconds(dataclasses.replace(config, save_every=0), models, config.machine, config.rates)
    written = checkpoint_bytes(config, models) / 1e9
    cells = [size, f"{ranks}{' of 24 GB' if room == CARD_24 else ''}", f"rank {rank}" if rank else "whole"]
    cells += [" ".join(f"`{h}`" for h in helps) or "-", f"{found[-1].total / GIB:.1f}"]
    cells += [f"{worst.total / GIB:.1f}, {worst.name}", "yes" if fits else "no"]
    cells += [f"{sum(times.values()):.0f}" if fits else "-", f"{written:.{0 if written >= 10 else 1}f}"]
    return "| " + " | ".join(cells) + " |"


def sized_table() -> list[str]:
    columns = ["models", "GPUs", "trained", "flags", "held", "at most", "fits", "s", "checkpoint, GB"]
    runs = [("1B", 1, CARD_24), *((size, ranks, 79.6) for size in SIZES for ranks in (1, 8, 64))]
    rows = [sized_row(size, ranks, rank, room) for size, ranks, room in runs for rank in (0, 16)]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *rows]


def mended(config: MemoryConfig) -> tuple[MemoryConfig, list[str], bool]:
    """The settings with the flags that make them fit, those flags, and whether they do."""
    models, machine = models_of(config), config.machine
    helps = remedies(config, models, machine) if shortage(config, models, machine) else []
    adapted = cli.parse(config, " ".join(helps).split())
    return adapted, helps, shortage(adapted, models, machine) is None


def row(name: str, flags: str, mend: bool) -> str:
    config = cli.parse(MemoryConfig(), flags.split())
    adapted, helps, fits = mended(config)
    if not mend:
        adapted, helps = config, []
        fits = shortage(config, models_of(config), config.machine) is None
    models, machine = models_of(config), config.machine
    peaks = {p.name: f"{p.total / GIB:.1f}" for p in phases(adapted, models, machine)}
    times = seconds(dataclasses.replace(adapted, save_every=0), models, machine, adapted.rates)
    hosts = [f"{p.total / GIB:.0f}" for p in host_phases(adapted, models, machine)]
    cells = [name, " ".join(f"`{h}`" for h in helps) or "-", *peaks.values(), *hosts, "yes" if fits else "no"]
    cells += [f"{largest_micro_tokens(adapted, models, machine):,}", f"{largest_share(adapted, models, machine):.2f}"]
    cells += [f"{sum(times.values()):.0f}", f"{checkpoint_bytes(adapted, models) / 1e9:.0f}"]
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    config = MemoryConfig()
    names = [p.name for p in phases(config, models_of(config), config.machine)]
    columns = [
        "run",
        "flags",
        *names,
        "host, loading",
        "host, training",
        "fits",
        "most `--micro-tokens`",
        "most `--vllm-memory-share`",
        "s",
        "checkpoint, GB",
    ]
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    runs = "\n".join([*table, *(row(name, *run) for name, run in RUNS.items())]) + "\n" + TAIL
    return HEAD + runs + ADAPTERS + "\n".join(sized_table()) + "\n"


def main() -> int:
    if "--check" in sys.argv:
        return 0 if PAGE.exists() and PAGE.read_text() == page() else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
