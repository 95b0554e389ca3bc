"""On-policy distillation: the policy learns its own responses' log-probs from a larger teacher on the same tokens.

`--scale 1` minimises KL(policy || teacher); above 1 it goes beyond the teacher, away from `--base` (arXiv 2602.12125).

deepspeed recipes/distill.py --teacher meta-llama/Llama-3.1-8B-Instruct --output-dir runs/distill
"""

from rto_fast import commands

DEFAULTS = commands.DISTILL

if __name__ == "__main__":
    commands.recipe("distill")
