"""A training in which everything goes wrong on the second process alone.

    accelerate launch .. -m tests.runtime.faulty FOLDER

Its memory holds one row, its loss is not a number once, and it alone is asked to end. Each
process leaves `{rank}.json` and `{rank}.safetensors`.
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from latent_reasoning.config import Guard
from latent_reasoning.runtime.parallel import join_processes
from latent_reasoning.runtime.signals import StopRequest, TrainingInterruptedError
from tests.training.tiny_training import TinyPlan, TinyTask, run, settings, tiny_model, weights


def main(folder: Path) -> None:
    processes = join_processes(torch.device("cpu"))
    rank, second = processes.rank, processes.rank == 1
    model, log = tiny_model(), []
    told = None
    for stop in (StopRequest(1e-9 if second else None), StopRequest()):
        task = TinyTask(
            model,
            processes=processes,
            plan=TinyPlan(micro_batch_size=2),
            memory=lambda step: 1 if second and step == 2 else 4,
            fault=lambda step, n: math.nan if second and step == 5 and not n else 1.0,
        )
        try:
            result = run(folder / "c", task, settings(), log=log, guard=Guard(), stop=stop)
        except TrainingInterruptedError as interruption:
            told = str(interruption)
    found = {
        "told": told,
        "micro_batch_size": task.plan.micro_batch_size,
        "rollbacks": result.rollbacks,
        "log": log,
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    save_file(weights(model), folder / f"{rank}.safetensors")
    processes.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
