"""DPO of the paper's setting: the model whose log-ratio to its reference is RTO's token reward.

deepspeed recipes/dpo_llama3.py --output-dir runs/dpo
"""

from rto_fast import cli
from rto_fast.config import DPOConfig

DEFAULTS = DPOConfig(
    model="OpenRLHF/Llama-3-8b-sft-mixture",
    data="HuggingFaceH4/ultrafeedback_binarized",
    data_split="train_prefs",
    eval_split="test_prefs",
    output_dir="runs/dpo_llama3",
)

if __name__ == "__main__":
    cli.main(DEFAULTS, "rto_fast.supervised.dpo:train_dpo")
