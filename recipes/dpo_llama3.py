"""DPO of the paper's setting: the model whose log-ratio to its reference is RTO's token reward.

deepspeed recipes/dpo_llama3.py --output-dir runs/dpo
"""

from rto_fast import commands

DEFAULTS = commands.DPO

if __name__ == "__main__":
    commands.recipe("dpo")
