"""Adapters in DeepSpeed: after two steps, packed outputs against those of the merged model, on this number of ranks.

python adapter_worker.py BASES FOLDER      # BASES: a JSON dict of paths; FOLDER: models and found-RANKS.pt go there
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from invariance_worker import rollout

from rto_fast import distributed
from rto_fast.backend.train_engine import TrainEngine
from rto_fast.config import SFTConfig
from rto_fast.models.attention import PACKED
from rto_fast.models.load import load_policy, load_scalar, new_scalar
from rto_fast.models.packing import PackedBatch, Placement
from rto_fast.models.save import export


def batch() -> PackedBatch:
    drawn = rollout()
    return PackedBatch.make(drawn.sequences(), drawn.prompt_lens.tolist(), distributed.device(), "sdpa")


def case(base: str, kind: str, stage: int, lora: dict, folder: Path) -> dict[str, object]:
    """What the engine answers and holds, and what its export does when it is loaded merged."""
    config = SFTConfig(
        model=base, zero_stage=stage, dtype="fp32", lora_rank=3, gradient_checkpointing=True, warmup_ratio=0.0, **lora
    )
    home = "rank 0" if stage == 3 else "host"
    loading = {"dtype": torch.float32, "attention": PACKED, "argument": "model"}
    placed = loading | {"placement": Placement(distributed.device(), "sdpa", stage == 3, 4096, 256), "home": home}
    torch.manual_seed(0)
    make = load_policy if kind == "policy" else lambda *a, **k: new_scalar(*a, head_std=0.1, **k)
    engine = TrainEngine(make(base, lora=config.lora, **placed), config, peak_lr=1e-2, total_steps=3)
    row, place = batch(), [] if kind == "policy" else [batch().last_positions]
    first = engine.evaluate(row, *place).detach().clone()
    for step in range(2):
        engine.update([0], lambda _: engine(row, *place).square().mean() / distributed.world_size(), step=step)
    ours = engine.evaluate(row, *place).detach().clone()
    pushed = {name: tensor.clone() for name, tensor in engine.weights()}
    trained = {name for name, p in engine.model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.endswith("score.weight") for name in trained)
    target = folder / f"{distributed.world_size()}-{Path(base).name}-{kind}-{stage}-{len(lora)}"
    export(engine.model, target, write=distributed.rank() == 0)
    distributed.barrier()
    merged = (load_policy if kind == "policy" else load_scalar)(str(target), **loading)
    return {
        "first": first, "ours": ours, "merged": merged(row, *place).detach(), "pushed": pushed,
        "weights": dict(merged.inner.state_dict()),
    }  # fmt: skip


def main() -> None:
    bases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    distributed.init()
    torch.set_num_threads(1)
    found = {}
    for (name, base), kind, stage in itertools.product(bases.items(), ("policy", "scalar"), (2, 3)):
        found[name, kind, stage, "plain"] = case(base, kind, stage, {}, folder)
    for stage in (2, 3):
        found["untied", "policy", stage, "dora"] = case(bases["untied"], "policy", stage, {"lora_dora": True}, folder)
    if distributed.rank() == 0:
        torch.save(found, folder / f"found-{distributed.world_size()}.pt")


if __name__ == "__main__":
    main()
