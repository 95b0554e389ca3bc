"""Training runs one after the other, on the ranks that tests start: vllm_worker.py '[settings, ...]'."""

import json
import sys

from rto_fast import report, trainer
from rto_fast.config import RTOConfig

if __name__ == "__main__":
    report.report_run = lambda folder, **_: folder  # nobody looks at it
    for settings in json.loads(sys.argv[1]):
        config = RTOConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
        trainer.train(config)
