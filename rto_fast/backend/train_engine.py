"""One trained model in DeepSpeed.

Its configuration, and an update from micro-batches of unequal size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from torch import Tensor, nn

from rto_fast import distributed
from rto_fast.backend.spread import spread
from rto_fast.config import RunConfig
from rto_fast.errors import ConfigError
from rto_fast.models.quantised import numbers_of
from rto_fast.models.save import adapter_weights, whole_weights

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did."""

    grad_norm: float
    """Global gradient norm before clipping; inf or NaN where the step was skipped for it."""
    applied: bool
    """False: a gradient was not finite and no parameter has moved."""


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, floor: float) -> float:
    """Linear warm-up, then a cosine to `floor` x peak; a pure function of the step (0 .. total - 1)."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def fuses(config: RunConfig, kind: str) -> bool:
    """Whether AdamW is one kernel, without temporaries as large as the weights: on a GPU that holds its states."""
    return kind == "cuda" and not config.offload


CPU_BUCKET = 2**24
"""Numbers of a bucket of gradients on a CPU.

DeepSpeed's own 5e8 are 2 GB that each engine asks for, and little of it is written to: a process with many engines
could not fork any more. The sums are the same."""


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's settings for one engine; the loop decides accumulation boundaries itself."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        # With ZeRO-3 on GPUs the next weights come while this layer computes.
        "overlap_comm": config.zero_stage == 3 and distributed.device().type == "cuda",
        "contiguous_gradients": True,
        # The small defaults of ZeRO-3 keep tiny parameters whole: right for memory, and exact either way.
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if distributed.device().type == "cpu":
        zero["reduce_bucket_size"] = CPU_BUCKET
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    # In bf16 sums over micro-batches would depend on how many there are. Stage 1 would change its optimiser for it.
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if config.dtype == "bf16" and config.zero_stage >= 2 else {}
    return sums | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bf16"},
        "zero_optimization": zero,
        # torch's AdamW needs no C++ build; ZeRO then wants to be told that this is meant.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


EXPERTS = ["DbrxExperts"]
"""Modules that call one with weights as often as their tokens go to experts.

ZeRO-3 gathers a module's weights at each call; where the ranks' tokens reach different experts, they would wait for
each other. Other families of transformers hold all experts of a layer in parameters of the module that loops over
them."""


def gather_experts_together(model: nn.Module) -> None:
    """Has ZeRO-3 gather all weights of such modules at once; before `deepspeed.initialize`."""
    deepspeed.utils.set_z3_leaf_modules(model, EXPERTS, raise_if_not_found=False)


class TrainEngine:
    """A model, its AdamW and its ZeRO partitions."""

    def __init__(self, model: Any, config: RunConfig, *, peak_lr: float, total_steps: int) -> None:
        self.config = config
        self.peak_lr = peak_lr
        self.total_steps = total_steps
        if config.recomputes(numbers_of(model)):
            model.inner.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, config.weight_decay), lr=peak_lr, betas=config.adam_betas,
            fused=fuses(config, distributed.device().type),
        )  # fmt: skip
        distributed.barrier()  # DeepSpeed's own groups wait 10 minutes; one rank's download may take longer
        gather_experts_together(model)
        settings = deepspeed_config(config)
        if config.zero_stage == 3:
            spread(model, settings)
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        distributed.wait_as_long_everywhere()
        self.model = model
        self.adapted = getattr(model, "adapter", None) is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """A forward in evaluation mode (no activation checkpoints, no dropout)."""
        self.deepspeed.eval()
        return self.deepspeed(*args, **kwargs)

    def router_loss(self) -> Tensor | None:
        """The auxiliary loss of the last forward in training; None where it is off (see models/router.py)."""
        return self.model.router.take() if getattr(self.model, "router", None) else None

    def lr(self, step: int) -> float:
        c = self.config
        return learning_rate(step, self.total_steps, self.peak_lr, c.warmup_ratio, c.lr_floor)

    def update(self, micro: Sequence[T], loss: Callable[[T], Tensor], *, step: int) -> StepResult:
        """One optimiser step from the sum of `loss` over all micro-batches of all ranks.

        `loss` returns a micro-batch's share of the train batch's loss (divided by the global count already).
        Every rank passes equally many micro-batches.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.deepspeed.train()
        world = distributed.world_size()
        for i, item in enumerate(micro):
            self.deepspeed.set_gradient_accumulation_boundary(i == len(micro) - 1)
            # DeepSpeed averages over ranks; the loss is a sum over them.
            self.deepspeed.backward(loss(item) * world, scale_wrt_gas=False)
        if self.config.zero_stage == 0:
            return self._stage0_step()
        self.deepspeed.step()
        return StepResult(float(self.deepspeed.get_global_grad_norm()), self.deepspeed.was_step_applied())

    def _stage0_step(self) -> StepResult:
        """ZeRO measures and checks its gradients itself; plain data parallelism does neither."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        finite = math.isfinite(norm)
        if finite:
            self.deepspeed.step()
        else:
            self.deepspeed.zero_grad()
        return StepResult(norm, applied=finite)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, full tensor), one at a time, on every rank; an adapter is merged into them."""
        return whole_weights(self.model)

    def adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name in PEFT's files, full tensor) of the adapter alone, as `weights`."""
        return adapter_weights(self.model)

    def save(self, folder: Path, name: str) -> None:
        """Of a model with an adapter: that and its optimiser, not the base."""
        self.deepspeed.save_checkpoint(str(folder), tag=name, exclude_frozen_parameters=self.adapted)

    def load(self, folder: Path, name: str) -> None:
        path, _ = self.deepspeed.load_checkpoint(str(folder), tag=name, load_module_strict=not self.adapted)
        if path is None:
            raise ConfigError(f"resume: checkpoint {folder} has no state of the {name}; delete it and resume again")


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for matrices only; norms and biases never decay."""
    if not weight_decay:
        return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.0}]
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]
