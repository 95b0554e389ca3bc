"""Reinforced Token Optimization: DPO's token rewards, optimised by PPO, on packed batches."""

__version__ = "0.1.0"
