"""RTO against PPO on an embedded task, from nothing, in minutes on a laptop.

deepspeed recipes/rto_tiny.py
"""

from rto_fast import cli
from rto_fast.demo.config import DemoConfig

if __name__ == "__main__":
    cli.main(DemoConfig(), "rto_fast.demo.pipeline:run")
