"""RTO against PPO on an embedded task, from nothing, in minutes on a laptop.

deepspeed recipes/rto_tiny.py
"""

from rto_fast import cli
from rto_fast.demo.config import DemoConfig

DEFAULTS = DemoConfig()

if __name__ == "__main__":
    cli.main(DEFAULTS, "rto_fast.demo.pipeline:run")
