"""Reinforced Token Optimization: DPO's token rewards, optimised by PPO, on packed batches."""
