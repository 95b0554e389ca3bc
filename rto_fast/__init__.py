"""Reinforced Token Optimization: DPO's token rewards, optimised by PPO."""


def __getattr__(name: str) -> str:
    """`__version__`, that of rto_kernels, which imports torch: not before it is asked for."""
    if name == "__version__":
        import rto_kernels

        return rto_kernels.__version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
