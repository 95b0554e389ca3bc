"""Reward model of the paper's setting: Llama-3.2-1B on UltraFeedback, Bradley-Terry, one epoch.

deepspeed recipes/rm_llama3.py --output-dir runs/rm
"""

from rto_fast import cli
from rto_fast.config import RMConfig

DEFAULTS = RMConfig(
    model="meta-llama/Llama-3.2-1B-Instruct",
    data="HuggingFaceH4/ultrafeedback_binarized",
    data_split="train_prefs",
    eval_split="test_prefs",
    output_dir="runs/rm_llama3",
)

if __name__ == "__main__":
    cli.main(DEFAULTS, "rto_fast.supervised.reward_model:train_rm")
