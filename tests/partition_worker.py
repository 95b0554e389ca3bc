"""Scores of one rollout with whole and with partitioned frozen models, before and after an update, on these ranks.

python partition_worker.py MODELS OUT        # MODELS: a JSON dict of paths; OUT: a file that rank 0 writes
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch
from invariance_worker import SEQUENCES, rollout
from loop_helpers import TinyModels, small_run

from rto_fast import build, distributed
from rto_fast.config import RTOConfig
from rto_fast.scoring.score import score_rollout
from rto_fast.trainer import compute_targets
from rto_fast.updates.ppo import TrainBatch


def scores(paths: dict[str, str], folder: Path, dtype: str, partition: str) -> list[dict[str, torch.Tensor]]:
    """Every tensor of Scores before and after one update of policy and critic, and the policy's weights at the end."""
    settings = small_run(
        TinyModels(**paths), folder, dtype=dtype, zero_stage=2, partition_frozen=partition, micro_tokens=100,
        score_tokens=100, rollout_batch=SEQUENCES, train_batch=SEQUENCES, max_response_length=100,
        dpo_ref=paths["dpo_ref"], sync_proof=False, policy_lr=1e-2,
    )  # fmt: skip
    config = RTOConfig(**settings)
    run, drawn, out = build.build(config), rollout(), []
    assert hasattr(run.scorers.reference.module, "optimizer") == (partition == "yes")
    for _ in range(2):
        found, _ = score_rollout(drawn, run.texts(drawn), run.scorers, config, run.placement, lambda n: None)
        out.append(dataclasses.asdict(found))
        batch = TrainBatch(
            run, drawn, found, compute_targets(drawn, found, config, config.beta2), list(range(len(drawn)))
        )
        batch.update_policy(0)
        batch.update_critic(0)
    run.logger.close()
    return [*out, {name: tensor.clone() for name, tensor in run.policy.weights()}]


def main() -> None:
    paths, target = json.loads(sys.argv[1]), Path(sys.argv[2])
    distributed.init()
    torch.set_num_threads(1)
    found = {}
    for dtype in ("fp32", "bf16"):
        for partition in ("no", "yes"):
            with tempfile.TemporaryDirectory() as folder:
                root = Path(distributed.broadcast_object(folder))
                found[dtype, partition] = scores(paths, root / "run", dtype, partition)
                distributed.barrier()
    if distributed.rank() == 0:
        torch.save(found, target)


if __name__ == "__main__":
    main()
