"""Supervised fine-tuning: where all other stages start.

deepspeed recipes/sft_llama3.py --model meta-llama/Meta-Llama-3-8B --data my_chats.jsonl --output-dir runs/sft
"""

from rto_fast import cli
from rto_fast.config import SFTConfig

DEFAULTS = SFTConfig(
    model="meta-llama/Meta-Llama-3-8B",
    data="HuggingFaceH4/ultrafeedback_binarized",
    data_split="train_sft",
    output_dir="runs/sft_llama3",
)

if __name__ == "__main__":
    cli.main(DEFAULTS, "rto_fast.supervised.sft:train_sft")
