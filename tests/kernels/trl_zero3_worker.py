"""Two steps of TRL's SFT and DPO with a ZeRO-3 model, TRL's own and on our head.

python trl_zero3_worker.py FOLDER     # FOLDER: rows.json, and a model with its tokenizer in model/; rank 0 writes
                                      # found.json: a name → losses, gradient norms, calls of our head
"""

import json
import os
import sys
from pathlib import Path

import datasets
import deepspeed
import torch
import transformers
import trl
from rto_kernels.integrations import trl as on_trl

ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "zero_allow_untested_optimizer": True,
}
"""Every parameter is split, however small."""


def run(folder: Path, name: str, rows: dict, **settings) -> dict:
    calls = []
    ours = on_trl.token_logprobs
    on_trl.token_logprobs = lambda *a, **k: calls.append(k["gather"]) or ours(*a, **k)
    trainer = getattr(trl, f"{name}Trainer")(
        model=str(folder / "model"),
        args=getattr(trl, f"{name}Config")(
            output_dir=str(folder / name), max_steps=2, per_device_train_batch_size=2, seed=3, logging_steps=1,
            report_to=[], use_cpu=True, learning_rate=1e-2, save_strategy="no", gradient_checkpointing=False,
            deepspeed=ZERO3, optim="adamw_torch", disable_tqdm=True, **settings,
        ),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model", padding_side="left"),
    )  # fmt: skip
    trainer.train()
    on_trl.token_logprobs = ours
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "losses": [row["loss"] for row in logs],
        "norms": [row["grad_norm"] for row in logs],
        "top": [row["mean_token_accuracy"] for row in logs],
        "calls": len(calls),
        "gathered": sum(x is not None for x in calls),
    }


def main() -> None:
    deepspeed.init_distributed("gloo")
    folder = Path(sys.argv[1])
    rows = json.loads((folder / "rows.json").read_text())
    found = {}
    for name, settings in (("SFT", {"bf16": True}), ("DPO", {"bf16": False})):
        key = f"{name} {'bf16' if settings['bf16'] else 'fp32'}"
        found[f"{key} theirs"] = run(folder, name, rows[name], **settings)
        on_trl.patch()
        found[f"{key} ours"] = run(folder, name, rows[name], **settings)
        on_trl.unpatch()
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
