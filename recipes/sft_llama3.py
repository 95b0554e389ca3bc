"""Supervised fine-tuning: where all other stages start.

deepspeed recipes/sft_llama3.py --model meta-llama/Meta-Llama-3-8B --data my_chats.jsonl --output-dir runs/sft
"""

from rto_fast import commands

DEFAULTS = commands.SFT

if __name__ == "__main__":
    commands.recipe("sft")
