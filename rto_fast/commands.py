"""The commands of `rto-fast`, and the settings that each starts from.

They are the paper's for Llama-3-8B. PPO's are RTO's with the token reward off; the paper's own PPO had a reward model
of 8B parameters and a learning rate of 8e-7.
"""

from __future__ import annotations

import dataclasses
import difflib
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rto_fast import cli
from rto_fast.config import DistillConfig, DPOConfig, PPOConfig, RLVRConfig, RMConfig, RTOConfig, SFTConfig
from rto_fast.demo.config import ArithmeticConfig, DemoConfig
from rto_fast.errors import REFUSED

PREFERENCES: dict[str, Any] = {
    "data": "HuggingFaceH4/ultrafeedback_binarized",
    "data_split": "train_prefs",
    "eval_split": "test_prefs",
    "invalid_rows": "skip_empty",  # which these data may hold
}
RTO = RTOConfig(
    policy="OpenRLHF/Llama-3-8b-sft-mixture",
    dpo_model=("RTO-RL/Llama3-8B-DPO",),
    reward_model=("RTO-RL/Llama3.2-1B-RewardModel",),
    data="weqweasdas/ultra_train",
    output_dir="runs/rto_llama3",
)
RTO_LORA = dataclasses.replace(
    RTO, lora_rank=16, dpo_model=("runs/dpo_lora/model",), reward_model=("runs/rm_lora/model",),
    output_dir="runs/rto_lora",
)  # fmt: skip
"""One base in memory: the adapters are those that rto-fast dpo and rm write with a rank and the policy as --model."""
PPO = PPOConfig(
    policy=RTO.policy, reward_model=RTO.reward_model, data=RTO.data, output_dir="runs/ppo_llama3",
)  # fmt: skip
DPO = DPOConfig(model="OpenRLHF/Llama-3-8b-sft-mixture", output_dir="runs/dpo_llama3", **PREFERENCES)
RM = RMConfig(model="meta-llama/Llama-3.2-1B-Instruct", output_dir="runs/rm_llama3", **PREFERENCES)
SFT = SFTConfig(
    model="meta-llama/Meta-Llama-3-8B",
    data="HuggingFaceH4/ultrafeedback_binarized",
    data_split="train_sft",
    invalid_rows="skip_empty",
    output_dir="runs/sft_llama3",
)
DISTILL = DistillConfig(
    policy="meta-llama/Llama-3.2-1B-Instruct",
    teacher="meta-llama/Llama-3.1-8B-Instruct",
    data="weqweasdas/ultra_train",
    output_dir="runs/distill",
)
RLVR = RLVRConfig(policy="Qwen/Qwen2.5-1.5B-Instruct", output_dir="runs/rlvr")
DEMO = DemoConfig()
ARITHMETIC = ArithmeticConfig()


@dataclass(frozen=True)
class Stage:
    """A command with a config's fields as its flags."""

    about: str
    defaults: Any
    """A config, or "module:name" of its class where importing that takes seconds."""
    run: str
    """"module:function", called with the config."""

    def __call__(self, args: Sequence[str], prog: str | None) -> None:
        defaults = pkgutil.resolve_name(self.defaults)() if isinstance(self.defaults, str) else self.defaults
        cli.main(defaults, self.run, args, prog=prog)


@dataclass(frozen=True)
class Tool:
    """A command that reads its own arguments."""

    about: str
    main: str
    """"module:function", called with them; returns the exit code."""

    def __call__(self, args: Sequence[str], prog: str | None) -> None:
        sys.exit(pkgutil.resolve_name(self.main)(args))


COMMANDS: dict[str, Stage | Tool] = {
    "sft": Stage("supervised fine-tuning", SFT, "rto_fast.supervised.sft:train_sft"),
    "rm": Stage("reward model from preference pairs", RM, "rto_fast.supervised.reward_model:train_rm"),
    "dpo": Stage("DPO and its relatives: the token reward's source", DPO, "rto_fast.supervised.dpo:train_dpo"),
    "rto": Stage("Reinforced Token Optimization", RTO, "rto_fast.trainer:train"),
    "ppo": Stage("the same loop without the token reward", PPO, "rto_fast.trainer:train"),
    "distill": Stage("on-policy distillation: a teacher pays each token", DISTILL, "rto_fast.trainer:train"),
    "rlvr": Stage("mathematics with a verifiable reward", RLVR, "rto_fast.trainer:train"),
    "generate": Stage(
        "responses to a benchmark's prompts", "rto_fast.generate:GenerateConfig", "rto_fast.generate:generate"
    ),
    "export": Tool("a checkpoint as Hugging Face folders", "rto_fast.export:main"),
    "extrapolate": Stage(
        "weights beyond a model, away from an earlier one: a next round's reference",
        "rto_fast.models.extrapolate:ExtrapolateConfig",
        "rto_fast.models.extrapolate:extrapolate",
    ),
    "report": Tool("report.html of a run, built again", "rto_fast.report.__main__:main"),
    "audit": Stage(
        "what token rewards lean on: kinds of tokens, places, agreement with the score",
        "rto_fast.scoring.audit:AuditConfig",
        "rto_fast.scoring.audit:show",
    ),
    "memory": Stage(
        "GiB and seconds of a run, phase by phase, from its models' configs",
        "rto_fast.memory.command:MemoryConfig",
        "rto_fast.memory.command:show",
    ),
    "demo": Stage("all stages on an embedded task, in minutes", DEMO, "rto_fast.demo.pipeline:run"),
    "arithmetic": Stage("verifiable rewards on embedded sums, in minutes", ARITHMETIC, "rto_fast.demo.arithmetic:run"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: rto-fast COMMAND [flags]", "", *lines, "", "rto-fast COMMAND --help lists its flags."])


def main(args: Sequence[str]) -> None:
    """Runs the command that the first argument names. Exit codes are those of cli.py."""
    args = [a for a in args if not a.startswith("--local_rank")]  # the deepspeed launcher puts it first
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return
    name, *rest = args
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        cli.stop(f"unknown command {name!r}; {hint}there are {', '.join(COMMANDS)}", REFUSED, cli.speaks())
    COMMANDS[name](rest, f"rto-fast {name}")


def recipe(name: str, defaults: Any = None) -> None:
    """Runs a command with the process's flags, under the script's own name; defaults: other ones than the command's."""
    command = COMMANDS[name]
    if defaults is not None:
        assert isinstance(command, Stage)
        command = dataclasses.replace(command, defaults=defaults)
    command(sys.argv[1:], None)
