"""RTO with adapters under ZeRO-3, no weight kept whole between its uses: what a rank holds.

python one_base_worker.py SETTINGS OUT      # SETTINGS: a JSON dict of RTOConfig; every rank writes OUT-RANK.json
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from rto_fast import distributed, run, trainer
from rto_fast.backend import frozen, train_engine
from rto_fast.config import RTOConfig

plain = train_engine.deepspeed_config


def nothing_stays(config) -> dict:
    """DeepSpeed keeps matrices of up to 100,000 numbers whole, which here are all."""
    settings = plain(config)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def held() -> dict[str, int]:
    """Numbers of all parts of parameters in this process, trained and frozen, and of the whole parameters."""
    gc.collect()
    found = {id(p): p for p in gc.get_objects() if isinstance(p, torch.nn.Parameter) and hasattr(p, "ds_tensor")}
    kinds = {"frozen": False, "trained": True}
    return {
        f"{name} {what}": sum(size(p) for p in found.values() if p.requires_grad == trained)
        for name, trained in kinds.items()
        for what, size in (("parts", lambda p: p.ds_tensor.numel()), ("whole", lambda p: p.ds_numel))
    } | {"gathered": sum(p.numel() for p in found.values() if p.ds_tensor.numel() < p.ds_numel and not p.ds_persist)}


def main() -> None:
    settings, out = json.loads(sys.argv[1]), sys.argv[2]
    run.report_run = lambda folder, **_: folder
    train_engine.deepspeed_config = frozen.deepspeed_config = nothing_stays
    done = trainer.train(RTOConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}))
    base = [p for p in done.policy.model.parameters() if not p.requires_grad]
    models = {
        "critic": done.critic.model, "reference": done.scorers.reference.module, "dpo": done.scorers.dpo.module,
        "reward": done.scorers.rewards[0].model.module,
    }  # fmt: skip
    shared = {name: sum(any(p is q for q in base) for p in model.parameters()) for name, model in models.items()}
    found = held() | {"base": sum(p.ds_numel for p in base), "shared": shared, "tensors": len(base)}
    Path(f"{out}-{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
