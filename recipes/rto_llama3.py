"""Reinforced Token Optimization in the paper's setting: Llama-3-8B on UltraFeedback prompts.

deepspeed recipes/rto_llama3.py --output-dir runs/rto
"""

from rto_fast import cli
from rto_fast.config import RTOConfig

DEFAULTS = RTOConfig(
    policy="OpenRLHF/Llama-3-8b-sft-mixture",
    dpo_model="RTO-RL/Llama3-8B-DPO",
    reward_model=("RTO-RL/Llama3.2-1B-RewardModel",),
    data="weqweasdas/ultra_train",
    output_dir="runs/rto_llama3",
)

if __name__ == "__main__":
    cli.main(DEFAULTS, "rto_fast.trainer:train")
