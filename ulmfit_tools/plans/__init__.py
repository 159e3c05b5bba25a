"""Plans: which layers train, at which rates, for how long; as Python objects and YAML files."""

from ulmfit_tools.plans.phase import Phase, UntilOverfit
from ulmfit_tools.plans.plan import FineTuningPlan, shipped_plans
from ulmfit_tools.plans.results import PhaseResult, PlanResult
from ulmfit_tools.plans.run import run_plan

__all__ = ["FineTuningPlan", "Phase", "PhaseResult", "PlanResult", "UntilOverfit", "run_plan", "shipped_plans"]
