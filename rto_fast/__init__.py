"""Reinforced Token Optimization: DPO's token rewards, optimised by PPO."""

__version__ = "0.1.0"
