"""PPO on RTO's terms: the same models, data and learning rates with the token reward off (beta1 = 0).

The paper's own PPO had a reward model of 8B parameters and a learning rate of 8e-7.

deepspeed recipes/ppo_llama3.py --output-dir runs/ppo
"""

from rto_fast import commands

DEFAULTS = commands.PPO

if __name__ == "__main__":
    commands.recipe("ppo")
