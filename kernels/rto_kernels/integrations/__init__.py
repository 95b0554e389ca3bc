"""Other codebases' log-prob, GAE and PPO-loss functions replaced by ours: one module a codebase.

Each has `patch()`, `unpatch()` and `FALLS_THROUGH`, the options that stay with the original.
"""
