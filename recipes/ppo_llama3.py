"""PPO in the paper's setting, the same loop with the token reward off (beta1 = 0).

deepspeed recipes/ppo_llama3.py --output-dir runs/ppo
"""

import dataclasses

from rto_llama3 import DEFAULTS as RTO

from rto_fast import cli

DEFAULTS = dataclasses.replace(RTO, beta1=0.0, dpo_model="", output_dir="runs/ppo_llama3")

if __name__ == "__main__":
    cli.main(DEFAULTS, "rto_fast.trainer:train")
