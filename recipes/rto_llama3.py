"""Reinforced Token Optimization in the paper's setting: Llama-3-8B on UltraFeedback prompts.

deepspeed recipes/rto_llama3.py --output-dir runs/rto
"""

from rto_fast import commands

DEFAULTS = commands.RTO

if __name__ == "__main__":
    commands.recipe("rto")
