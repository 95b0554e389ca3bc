"""Reward model of the paper's setting: Llama-3.2-1B on UltraFeedback, Bradley-Terry, one epoch.

deepspeed recipes/rm_llama3.py --output-dir runs/rm
"""

from rto_fast import commands

DEFAULTS = commands.RM

if __name__ == "__main__":
    commands.recipe("rm")
