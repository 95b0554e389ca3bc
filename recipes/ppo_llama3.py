"""PPO in the paper's setting, the same loop with the token reward off (beta1 = 0).

deepspeed recipes/ppo_llama3.py --output-dir runs/ppo
"""

from rto_fast import commands

DEFAULTS = commands.PPO

if __name__ == "__main__":
    commands.recipe("ppo")
