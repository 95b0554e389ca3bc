"""Mathematics with a verifiable reward: 1 where math-verify finds the problem's answer in the response, else 0.

The data have GSM8K's columns: `question`, and `answer` with "#### 42" at its end. RLOO without a critic by default;
`--advantage grpo` or `gae` (PPO), and with `--dpo-model` RTO, whose token reward stands beside the answer's.

deepspeed recipes/rlvr_math.py --data openai/gsm8k:main --output-dir runs/rlvr
"""

from rto_fast import commands

DEFAULTS = commands.RLVR

if __name__ == "__main__":
    commands.recipe("rlvr")
