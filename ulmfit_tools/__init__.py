"""Learning-rate practice that works, for fine-tuning text classifiers with `transformers.Trainer`.

The names below are loaded when they are first used, so importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulmfit_tools.callbacks import LogGroupRates, StopWhenOverfit
    from ulmfit_tools.data import load_text_classification
    from ulmfit_tools.data.augmentation import Augmentation, augmented
    from ulmfit_tools.errors import InputError
    from ulmfit_tools.feature_cache import CannotPrecompute, precomputed
    from ulmfit_tools.freezing import freeze_to, unfreeze
    from ulmfit_tools.gradual_unfreezing import GradualUnfreezing
    from ulmfit_tools.layers import LayerGroup, LayerGroups, layer_groups
    from ulmfit_tools.lr_curve import LRCurve
    from ulmfit_tools.lr_range import lr_range_test
    from ulmfit_tools.param_groups import discriminative_optimizer, discriminative_param_groups
    from ulmfit_tools.plans import FineTuningPlan, Phase, PlanResult, UntilOverfit, run_plan, shipped_plans
    from ulmfit_tools.schedules import (
        get_cyclical_schedule,
        get_one_cycle_schedule,
        get_sgdr_schedule,
        get_slanted_triangular_schedule,
    )
    from ulmfit_tools.trainer import TrainingInterrupted, ULMFiTTrainer, ULMFiTTrainingArguments

__version__ = "0.1.0"

_MODULE_OF = {
    "layer_groups": "layers",
    "LayerGroup": "layers",
    "LayerGroups": "layers",
    "discriminative_param_groups": "param_groups",
    "discriminative_optimizer": "param_groups",
    "get_slanted_triangular_schedule": "schedules",
    "get_cyclical_schedule": "schedules",
    "get_sgdr_schedule": "schedules",
    "get_one_cycle_schedule": "schedules",
    "freeze_to": "freezing",
    "unfreeze": "freezing",
    "GradualUnfreezing": "gradual_unfreezing",
    "LogGroupRates": "callbacks",
    "StopWhenOverfit": "callbacks",
    "lr_range_test": "lr_range",
    "LRCurve": "lr_curve",
    "ULMFiTTrainer": "trainer",
    "ULMFiTTrainingArguments": "trainer",
    "TrainingInterrupted": "trainer",
    "Phase": "plans",
    "UntilOverfit": "plans",
    "FineTuningPlan": "plans",
    "PlanResult": "plans",
    "run_plan": "plans",
    "shipped_plans": "plans",
    "precomputed": "feature_cache",
    "CannotPrecompute": "feature_cache",
    "Augmentation": "data.augmentation",
    "augmented": "data.augmentation",
    "load_text_classification": "data",
    "InputError": "errors",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
