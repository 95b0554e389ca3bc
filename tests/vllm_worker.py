"""One training run with vLLM, started on several ranks by test_vllm.py: vllm_worker.py '{settings of RTOConfig}'."""

import json
import sys

from rto_fast import trainer
from rto_fast.config import RTOConfig

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    trainer.train(RTOConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}))
