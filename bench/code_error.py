"""What 8 and 4 bits do to the token rewards of a trained DPO model: stories1m and one of its real pairs.

    python -m bench.code_error                   # frozen models in codes, and a base in codes under adapters

Two DPO models are trained on the pairs, one of whole weights and one of an adapter, and kept below RUNS. Then each way
to hold them is measured by the loop's own start, on 64 responses of the policy, which is stories1m. Needs bitsandbytes
and ../shared beside the checkout.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the models are too small for a second thread

import torch

from bench.claim.grid import ROOT, by_flags, of_one_size
from bench.claim.report import markdown
from bench.claim.stories import PAIRS, SHARED
from rto_fast import build, distributed
from rto_fast.config import DPOConfig, RTOConfig
from rto_fast.errors import require
from rto_fast.logs.files import write_atomic
from rto_fast.models.quantised import check_code
from rto_fast.run import Run
from rto_fast.scoring.frozen_error import MEASURED
from rto_fast.scoring.score import score_rollout
from rto_fast.supervised.dpo import train_dpo

MODEL = SHARED / "models" / "stories1m"
TRAINING: dict[str, Any] = {
    "model": str(MODEL), "data": str(PAIRS), "data_split": "train", "eval_split": "", "invalid_rows": "skip_empty",
    "dtype": "fp32", "batch": 16, "max_length": 256,
    "gradient_checkpointing": False, "data_workers": 1, "save_minutes": 0.0, "data_cache": False,
}  # fmt: skip
DPO: dict[str, dict[str, Any]] = {"whole": {"lr": 2e-4}, "adapter": {"lora_rank": 16, "lora_lr": 2e-3}}
LOOP: dict[str, Any] = {
    "policy": str(MODEL), "data": str(PAIRS), "data_split": "train", "prompt_key": "prompt", "dtype": "fp32",
    "rollout_batch": MEASURED, "train_batch": 32, "max_prompt_length": 48, "max_response_length": 48, "beta3": 0.0,
    "rollout_engine": "transformers", "iterations": 1, "gradient_checkpointing": False, "data_workers": 1,
    "sync_proof": False, "data_cache": False, "report": False,
}  # fmt: skip
HELD = {
    "frozen models, int8": ("whole", {"frozen_dtype": "int8"}),
    "frozen models, nf4": ("whole", {"frozen_dtype": "nf4"}),
    "base of adapters, int8": ("adapter", {"lora_rank": 16, "lora_base_dtype": "int8"}),
    "base of adapters, nf4": ("adapter", {"lora_rank": 16, "lora_base_dtype": "nf4"}),
}
"""Of a row of the table: its DPO model, and the flags that hold it in codes."""
FIGURES = (
    "size of a token reward, nat", "its error", "mean, nat", "largest", "reference's log-prob, error", "largest",
)  # fmt: skip
"""Of token rewards the mean size and error over tokens, that error as a share of the size, in nats, and at most."""


@dataclass(frozen=True, kw_only=True)
class CodeErrorConfig:
    """What 8 and 4 bits do to the token rewards of a trained DPO model."""

    runs: Path = ROOT / "runs" / "code_error"
    """Folder of the DPO models and the table."""
    rows: int = 640
    """Pairs that a DPO model is trained on; 0 = all 3,538."""


def dpo_model(config: CodeErrorConfig, name: str) -> Path:
    """The folder of a DPO model, which is trained where it is not there yet."""
    folder = config.runs / f"dpo-{name}"
    if not (folder / "model").is_dir():
        train_dpo(DPOConfig(**TRAINING | DPO[name], max_rows=config.rows, output_dir=str(folder)))
    return folder / "model"


def rewards(run: Run) -> torch.Tensor:
    """[R] log(pi_dpo / pi_ref), nats, of the policy's responses that the run's own figures are of."""
    share = run.sync.share(run.requests(run.state.iteration)[:MEASURED], run.sampling)
    rollout = run.sync.gather(share, run.sync.sample(share.requests, run.sampling))
    scores, _ = score_rollout(rollout, run.texts(rollout), run.scorers, run.config, run.placement, lambda _: None)
    return scores.dpo_logp - scores.dpo_ref_logp


def measure(config: CodeErrorConfig, name: str) -> list[str]:
    """A row of the table."""
    kind, flags = HELD[name]
    model = dpo_model(config, kind)
    with tempfile.TemporaryDirectory() as folder:
        run = build.build(RTOConfig(**LOOP | flags, dpo_model=(str(model),), output_dir=f"{folder}/run"))
        size, error = float(rewards(run).abs().mean()), run.frozen_error
        run.logger.close()
    figures = [error[f"frozen/{what}_error_{of}"] for what in ("token_reward", "ref_logp") for of in ("mean", "max")]
    return [name, f"{size:.3f}", f"{100 * figures[0] / size:.1f} %", *(f"{one:.2g}" for one in figures)]


def main(config: CodeErrorConfig) -> None:
    require(config.rows >= 0, f"rows: must not be negative, got {config.rows}")
    require(MODEL.is_dir() and PAIRS.is_file(), f"runs: no {MODEL} and {PAIRS}")
    for kind in ("int8", "nf4"):
        check_code(kind)
    of_one_size(config.runs, "DPO models", {"rows": config.rows})
    distributed.init()
    table = markdown(["in codes", *FIGURES], [measure(config, name) for name in HELD])
    write_atomic(config.runs / "table.md", table + "\n")
    print(f"\n{table}")


if __name__ == "__main__":
    by_flags(main, CodeErrorConfig, __doc__)
