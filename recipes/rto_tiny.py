"""RTO against PPO on an embedded task, from nothing, in minutes on a laptop.

deepspeed recipes/rto_tiny.py
"""

from rto_fast import commands

DEFAULTS = commands.DEMO

if __name__ == "__main__":
    commands.recipe("demo")
