"""RTO against PPO on an embedded task, from nothing, in minutes on a laptop.

deepspeed recipes/rto_tiny.py
"""

from rto_fast import cli, demo

if __name__ == "__main__":
    cli.main(demo.DemoConfig(), "rto_fast.demo:run")
