"""Plans of a few steps, run on a tiny model, and stopped as by a crash."""

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from ulmfit_tools import FineTuningPlan, Phase, run_plan

TWO_PHASES = FineTuningPlan(
    name="two",
    settings={"learning_rate": 1e-2, "per_device_train_batch_size": 16},
    phases=[Phase(name="head", train="head", epochs=1), Phase(name="all", epochs=2)],
)


def run(plan, model, data, folder, **more):
    settings = {"use_cpu": True, "disable_tqdm": True, "seed": 3} | more
    return run_plan(plan, model=model, data=data, output_dir=folder, **settings)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Stop(Exception):
    pass


class StopAt(TrainerCallback):
    """Raises in the given phase (named by its folder) at the given step, as a crash would."""

    def __init__(self, phase, step, event="on_step_end"):
        self.phase, self.step = phase, step
        setattr(self, event, self.stop)

    def stop(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.phase) and state.global_step == self.step:
            raise Stop
