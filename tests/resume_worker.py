"""One of the processes that `test_resume_distributed.py` launches: trains, is stopped, resumes and compares.

python resume_worker.py FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from runs import copy_until, differences, make_trainer, outcome
from test_checkpoints import damage
from transformers import TrainerCallback

from ulmfit_tools.checkpoints import list_checkpoints, step_of
from ulmfit_tools.trainer import TrainingInterrupted

SETTINGS = {"eval_steps": 2, "eval_strategy": "steps", "save_steps": 1, "logging_steps": 3, "ddp_backend": "gloo"}


class SignalToTheLastProcess(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def resumed(folder, step, state, damaged=False):
    """The outcome of a run that goes on after a step, or after the one before where that step's files are damaged."""
    part = folder / f"part-{step}-{damaged}"
    if state.is_main_process:
        copy_until(folder / "whole", part, step)
        if damaged:
            damage(part / f"checkpoint-{step}" / "rng_state_1.pth", "half")
    state.wait_for_everyone()
    trainer = make_trainer(part, **SETTINGS)
    trainer.train(resume_from_checkpoint=True)
    return outcome(trainer)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    whole = make_trainer(folder / "whole", **SETTINGS)
    whole.train()
    expected, state = outcome(whole), PartialState()
    found = {"processes": state.num_processes, "steps": whole.state.global_step}
    for step in (2, 5, 10):
        found[f"resumed after {step}"] = differences(expected, resumed(folder, step, state))
    found["resumed after damage"] = differences(expected, resumed(folder, 8, state, damaged=True))
    try:
        make_trainer(folder / "stopped", callbacks=[SignalToTheLastProcess()], **SETTINGS).train()
    except TrainingInterrupted as stop:
        found["stopped"] = step_of(stop.checkpoint)
    trainer = make_trainer(folder / "stopped", **SETTINGS)
    trainer.train(resume_from_checkpoint=True)
    found["resumed after a signal"] = differences(expected, outcome(trainer))
    found["checkpoints"] = [step_of(path) for path in list_checkpoints(folder / "stopped")]
    (folder / f"rank-{state.process_index}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
