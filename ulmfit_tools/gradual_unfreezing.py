"""Gradual unfreezing in the middle of one plain `Trainer` run, as a callback: thin over `freezing`."""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.training_args import ParallelMode

from ulmfit_tools import freezing
from ulmfit_tools.best_weights import (
    checkpoint_steps,
    load_weights,
    needed_steps,
    remove_weights,
    save_weights,
    weights_file,
)
from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.evaluations import best_step, check_metric
from ulmfit_tools.layers import LayerGroups, layer_groups

logger = logging.getLogger(__name__)

UNITS = ("epoch", "step", "fraction", "plateau")
ORDERS = ("top_down", "chain_thaw")


# `requires_grad` by parameter name, as it was before, of the models that are being unfrozen, or were when `train()`
# raised: callbacks are told of no exception. It holds no model alive.
_FOUND: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def undo_unfreezing(model: nn.Module) -> None:
    """Give a model's parameters the `requires_grad` from before gradual unfreezing, and the model its own `train`.

    It is done at the end of a run. Where `train()` raised or was interrupted, `ULMFiTTrainer` does it as well; for a
    plain `Trainer` it is done when the next `Trainer` with a `GradualUnfreezing` is made for the model, or trains it,
    and until then layers are frozen, unless you call this. A model that is not being unfrozen stays as it is.
    """
    found = _FOUND.pop(model, None)
    if found is None:
        return
    freezing.release_eval_mode(model)
    for name, parameter in model.named_parameters():
        if name in found:  # not what was put into the model since
            parameter.requires_grad_(found[name])


@dataclass
class _Run:
    """What a `train()` call settles at its begin, and how far it is."""

    groups: LayerGroups
    stages: list[frozenset[int]]
    starts: list[int]
    group_of_rates: list[int | None]  # the layer group of each optimizer group
    stage: int = -1
    evaluated: bool = True
    scheduled_rates: list[Any] = field(default_factory=list)


class GradualUnfreezing(TrainerCallback):
    """Thaws a model's layer groups from the top, in the middle of one plain `Trainer` run.

    Which groups train is a function of `args` and `state` (`global_step`, `max_steps`, `log_history`), so a resumed
    run has the right ones at once. Layers that are frozen get no gradients, no optimizer work and no weight decay.
    The optimizer must hold every parameter that is thawed at some time, so leave the model as it is before `train()`:
    the callback does the freezing. Afterwards `requires_grad` is as it was before; of a run that was interrupted see
    `undo_unfreezing`.

    Best with rates and schedules that differ by group: `optimizer_cls_and_kwargs=discriminative_optimizer(args)`.

    Under `DistributedDataParallel`, `find_unused_parameters` must be on, which is Trainer's default except with
    activation checkpointing. Under FSDP and DeepSpeed use a plan, whose phases prepare the model anew. Under
    `torch.compile` each stage compiles once more; after `torch.compiler.config.recompile_limit` stages (8) the rest
    runs uncompiled, so raise the limit or merge groups.

    Args:
        by: What the length of a stage is counted in: `epoch`, `step`, `fraction` (of the run's steps) or `plateau`
            (a stage lasts until `metric` has not improved for `every` evaluations).
        every: The length of a stage. By default 1 epoch, 1 evaluation or an equal share of the run; `by="step"` has
            no default.
        start: How many groups, counted from the head, train at first.
        groups_per_stage: How many each further stage thaws.
        order: `top_down`, or `chain_thaw`: the head, then each other group alone from the first on, then all.
        num_groups: Merge the model's layer groups into this many first.
        warmup_steps: A group that is thawed in mid-run gets a rate that grows linearly over this many steps of its
            own, on top of the schedule. Wants an optimizer whose groups each lie within one layer group.
        eval_mode_for_frozen: Frozen layers run in eval mode: no dropout, no new batch statistics.
        restore_best: Each stage begins from the weights of the best evaluation so far. They are kept in the folder
            `_best-weights` of `args.output_dir`; the optimizer's moments stay as they are.
        metric: The metric that `by="plateau"` and `restore_best` watch.
        greater_is_better: Whether that metric improves upwards.

    Raises:
        InputError: A setting is not possible; most are known only when `train()` begins.

    Source:
        Howard & Ruder 2018 (1801.06146), section 3.3; Felbo et al. 2017 (1708.00524), section 3.3, for chain-thaw and
        for beginning each stage from the best weights.
    """

    def __init__(
        self,
        *,
        by: str = "epoch",
        every: float | None = None,
        start: int = 1,
        groups_per_stage: int = 1,
        order: str = "top_down",
        num_groups: int | None = None,
        warmup_steps: int = 0,
        eval_mode_for_frozen: bool = False,
        restore_best: bool = False,
        metric: str = "eval_loss",
        greater_is_better: bool = False,
    ):
        if by not in UNITS:
            raise InputError(f'A stage is counted by {", ".join(UNITS)}. Received: by="{by}".{nearest(by, UNITS)}')
        if order not in ORDERS:
            raise InputError(f'Known: order={", ".join(ORDERS)}. Received: order="{order}".{nearest(order, ORDERS)}')
        if by == "step" and every is None:
            raise InputError('by="step" needs the number of steps that a stage lasts. Received: every=None')
        if every is not None and (every <= 0 or (by in ("step", "plateau") and every != int(every))):
            raise InputError(f'every must be positive, and whole with by="step" or "plateau". Received: every={every}')
        if warmup_steps < 0:
            raise InputError(f"warmup_steps cannot be negative. Received: warmup_steps={warmup_steps}")
        self.by = by
        self.every = every
        self.start = start
        self.groups_per_stage = groups_per_stage
        self.order = order
        self.num_groups = num_groups
        self.warmup_steps = warmup_steps
        self.eval_mode_for_frozen = eval_mode_for_frozen
        self.restore_best = restore_best
        self.metric = metric
        self.greater_is_better = greater_is_better
        self._run: _Run | None = None

    # ---- Events ----------------------------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Undoes what an interrupted run has left, before there is an optimizer, which would lack frozen layers."""
        undo_unfreezing(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Settles the stages, refuses what would go wrong later, and freezes for the step that comes next."""
        frozen_before = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        undo_unfreezing(model)  # where an earlier `train()` raised
        if self._watches_metric() and args.eval_strategy == "no":
            raise InputError('by="plateau" and restore_best need evaluations. Received: eval_strategy="no"')
        _check_parallelism(args, model)
        groups = layer_groups(model, self.num_groups)
        stages = self._stages(model, groups)
        thawed = freezing.trainable_names(model, groups, frozenset().union(*stages))
        _check_optimizer(model, optimizer, thawed)
        if args.parallel_mode == ParallelMode.DISTRIBUTED and frozen_before.intersection(thawed):
            first = next(name for name in thawed if name in frozen_before)
            raise InputError(f'DDP was built without "{first}", which was frozen: call unfreeze(model) before train()')
        self._run = _Run(
            groups,
            stages,
            starts=self._starts(args, state, len(stages), train_dataloader),
            group_of_rates=_group_of_rates(model, groups, optimizer) if self.warmup_steps else [],
        )
        self._warn_of_unreached(self._run, state)
        _FOUND[model] = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._enter(self._run, freezing.stage_at(state.global_step, self._run.starts), model)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes that there is something new; what follows from it is decided when the next step begins."""
        if self._run is not None:
            self._run.evaluated = True

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Brings the model into the state that this step is to be taken in."""
        run = self._begun()
        if run.evaluated and self._watches_metric():
            check_metric(state.log_history, self.metric)
            run.starts = self._starts(args, state, len(run.stages), train_dataloader)
        if self.restore_best and (run.evaluated or state.global_step in run.starts):
            self._keep_or_restore_best(args, state, model)
        run.evaluated = False
        self._enter(run, freezing.stage_at(state.global_step, run.starts), model)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Lowers the rates of the groups that are warming up, for this one step."""
        if not self.warmup_steps:
            return
        run = self._begun()
        run.scheduled_rates = [group["lr"] for group in optimizer.param_groups]
        for rates, group in zip(optimizer.param_groups, run.group_of_rates, strict=True):
            if group is not None and group in run.stages[run.stage]:
                thawed_at = freezing.thaw_step(group, run.stage, run.stages, run.starts)
                rates["lr"] = rates["lr"] * freezing.warmup_factor(state.global_step, thawed_at, self.warmup_steps)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Gives the scheduler its own rates back before it goes on from them."""
        if self.warmup_steps:
            for rates, scheduled in zip(optimizer.param_groups, self._begun().scheduled_rates, strict=True):
                rates["lr"] = scheduled

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Gives every parameter its `requires_grad` back, and the model its own `train`."""
        undo_unfreezing(model)
        self._run = None

    # ---- What they are made of -------------------------------------------------------------------------------------

    def _begun(self) -> _Run:
        assert self._run is not None, "Trainer calls on_train_begin first"
        return self._run

    def _watches_metric(self) -> bool:
        return self.by == "plateau" or self.restore_best

    def _stages(self, model: nn.Module, groups: LayerGroups) -> list[frozenset[int]]:
        """The stages over the groups in which something can train: with PEFT, those that hold adapters."""
        fixed = freezing.fixed_parameters(model)
        able = [index for index, group in enumerate(groups) if not fixed.issuperset(group.parameter_names)]
        if self.order == "chain_thaw":
            stages = freezing.chain_thaw_stages(len(able))
        else:
            stages = freezing.unfreezing_stages(len(able), start=self.start, groups_per_stage=self.groups_per_stage)
        return [frozenset(able[position] for position in stage) for stage in stages]

    def _starts(self, args: TrainingArguments, state: TrainerState, num_stages: int, dataloader: Any) -> list[int]:
        """The steps at which the stages begin, as far as they are known by now."""
        if self.by == "plateau":
            return freezing.plateau_starts(
                state.log_history,
                num_stages,
                patience=int(self.every or 1),
                metric=self.metric,
                greater_is_better=self.greater_is_better,
            )
        if self.by == "fraction":
            return freezing.regular_starts(num_stages, self.every or 1 / num_stages, state.max_steps)
        if self.by == "step":
            return freezing.regular_starts(num_stages, self.every or 1)
        if not has_length(dataloader):
            raise InputError('A stream has no epochs: use by="step" or by="fraction". Received: by="epoch"')
        return freezing.regular_starts(num_stages, self.every or 1, steps_per_epoch(args, dataloader))

    def _warn_of_unreached(self, run: _Run, state: TrainerState) -> None:
        if self.by == "plateau" or run.starts[-1] < state.max_steps:
            return
        last = freezing.stage_at(state.max_steps - 1, run.starts)
        never = sorted(frozenset().union(*run.stages) - frozenset().union(*run.stages[: last + 1]))
        names = ", ".join(run.groups[index].name for index in never) or "no group"
        logger.warning(
            f"These {state.max_steps} steps reach stage {last + 1} of {len(run.stages)}; never thawed: {names}"
        )

    def _enter(self, run: _Run, stage: int, model: nn.Module) -> None:
        """Make the groups of a stage the ones that train."""
        if stage == run.stage:
            return
        freezing.set_trainable(model, run.groups, run.stages[stage])
        run.stage = stage
        if self.eval_mode_for_frozen:
            frozen = freezing.frozen_modules(model, run.groups)
            freezing.keep_in_eval_mode(model, frozen)

    def _keep_or_restore_best(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Write the weights if they are the best so far; otherwise read the best ones if a stage begins here."""
        best_of = partial(best_step, metric=self.metric, greater_is_better=self.greater_is_better)
        best, step, folder = best_of(state.log_history), state.global_step, str(args.output_dir)
        if best == step:
            if args.should_save:
                save_weights(model, weights_file(folder, step), freezing.fixed_parameters(model))
                remove_weights(folder, keep=needed_steps(state.log_history, checkpoint_steps(folder), best_of))
            PartialState().wait_for_everyone()
        elif best is not None and step in self._begun().starts:
            load_weights(model, weights_file(folder, best))


def steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int:
    """The update steps of one epoch, as Trainer counts them: the last one may accumulate fewer batches."""
    return max(1, -(-len(dataloader) // args.gradient_accumulation_steps))


def _group_of_rates(model: nn.Module, groups: LayerGroups, optimizer: Any) -> list[int | None]:
    """The layer group of each optimizer group; None for one that holds no parameter of the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[int | None] = []
    for number, group in enumerate(optimizer.param_groups):
        indices = {groups.index_of(names[id(p)]) for p in group["params"] if id(p) in names}
        if len(indices) > 1:
            raise InputError(
                f"warmup_steps needs an optimizer with groups of its own for each layer group: "
                f"pass optimizer_cls_and_kwargs=discriminative_optimizer(args). "
                f"Received: optimizer group {number} with parameters of {len(indices)} layer groups"
            )
        found.append(indices.pop() if indices else None)
    return found


def _check_optimizer(model: nn.Module, optimizer: Any, thawed: list[str]) -> None:
    """Refuse an optimizer that lacks what is to be thawed: it would stay as it is, without a word."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    missing = [name for name in thawed if id(parameters[name]) not in held]
    if missing:
        raise InputError(
            f"The optimizer holds none of {len(missing)} parameters that are to be thawed, so they would never train: "
            f"call unfreeze(model) before making the Trainer, GradualUnfreezing does the freezing; or pass "
            f'optimizer_cls_and_kwargs=discriminative_optimizer(args). Received: "{missing[0]}", frozen'
        )


def _check_parallelism(args: TrainingArguments, model: nn.Module) -> None:
    """Refuse the ways to train in parallel under which layers cannot be frozen in the middle of a run."""
    kind = AcceleratorState().distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(f"GradualUnfreezing works in one process or with DDP; use a plan. Received: {kind.value}")
    if args.parallel_mode != ParallelMode.DISTRIBUTED:
        return
    find_unused = args.ddp_find_unused_parameters
    if find_unused is None:  # as Trainer decides it
        checkpointing = args.activation_checkpointing or getattr(model, "is_activation_checkpointing", False)
        find_unused = not (isinstance(model, PreTrainedModel) and checkpointing)
    if not find_unused or args.ddp_static_graph:
        raise InputError(
            "DDP expects the same layers to train in every step: set ddp_find_unused_parameters=True, and no "
            "ddp_static_graph, or use a plan. "
            f"Received: ddp_find_unused_parameters={args.ddp_find_unused_parameters}, "
            f"activation_checkpointing={args.activation_checkpointing}, ddp_static_graph={args.ddp_static_graph}"
        )
