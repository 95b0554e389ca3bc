"""Reinforced Token Optimization on one GPU: adapters of policy, critic, DPO model and reward model on one 8B base.

Rank 16 on all linear maps, learning rates ten times those of whole weights (docs/lora.md says where that comes from).
The DPO model and the reward model are trained first, as adapters on the same base:

rto-fast dpo --lora-rank 16 --output-dir runs/dpo_lora
rto-fast rm --lora-rank 16 --model OpenRLHF/Llama-3-8b-sft-mixture --output-dir runs/rm_lora
python recipes/rto_lora.py --output-dir runs/rto_lora
"""

from rto_fast import commands

DEFAULTS = commands.RTO_LORA

if __name__ == "__main__":
    commands.recipe("rto", DEFAULTS)
