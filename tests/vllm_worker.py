"""Training runs one after the other, on the ranks that tests start: vllm_worker.py '[settings, ...]'.

Settings with "loses": a parameter's name; the engine never gets it from the second push on, and the run's SyncError
goes into `error` in its folder.
"""

import json
import sys
from pathlib import Path

from rto_fast import run, trainer
from rto_fast.config import RTOConfig
from rto_fast.errors import SyncError
from rto_fast.rollout.vllm_engines.colocated import VLLMEngine


def train(settings: dict) -> None:
    trainer.train(RTOConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}))


def train_without(name: str, settings: dict) -> None:
    plain = VLLMEngine.push

    def push(engine, weights, version):
        return plain(engine, (pair for pair in weights if engine.version < 1 or pair[0] != name), version)

    VLLMEngine.push = push
    try:
        train(settings)
    except SyncError as error:
        (Path(settings["output_dir"]) / "error").write_text(str(error))
    finally:
        VLLMEngine.push = plain


if __name__ == "__main__":
    run.report_run = lambda folder, **_: folder  # nobody looks at it
    for settings in json.loads(sys.argv[1]):
        if lost := settings.pop("loses", ""):
            train_without(lost, settings)
        else:
            train(settings)
