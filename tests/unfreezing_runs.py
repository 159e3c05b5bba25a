"""Small plain `Trainer` runs, and a callback that notes which layers train in each step."""

import copy

from tiny import tiny_bert, token_rows
from transformers import Trainer, TrainerCallback, TrainingArguments

from ulmfit_tools.layers import layer_groups
from ulmfit_tools.param_groups import discriminative_optimizer

# A tiny BERT has six layer groups: the embeddings (e), four blocks (0 to 3) and the head (h).
LETTERS = "e0123h"
EPOCH = 3  # update steps: 48 rows in batches of 16


class Watch(TrainerCallback):
    """Notes which layer groups get gradients in each step, and which blocks are in eval mode."""

    def __init__(self):
        self.steps, self.trained, self.sleeping, self.rates, self.weights = [], [], [], [], {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = copy.deepcopy(model.state_dict())

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        groups = layer_groups(model)
        having = {groups.index_of(name) for name, p in model.named_parameters() if p.grad is not None}
        assert having == {groups.index_of(name) for name, p in model.named_parameters() if p.requires_grad}
        self.steps.append(state.global_step)
        self.trained.append("".join(LETTERS[index] for index in sorted(having)))
        blocks = [model.bert.embeddings, *model.bert.encoder.layer, model.bert.pooler]
        self.sleeping.append("".join(letter for letter, b in zip(LETTERS, blocks, strict=True) if not b.training))
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def arguments(folder, **settings):
    defaults = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(defaults | settings))


def trainer_of(folder, *callbacks, model=None, train_dataset=None, optimizer=None, factory=False, **settings):
    args = arguments(folder, **settings)
    return Trainer(
        model if model is not None else tiny_bert(),
        args,
        train_dataset=train_dataset if train_dataset is not None else token_rows(48),
        eval_dataset=token_rows(32, seed=1),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
        optimizer_cls_and_kwargs=discriminative_optimizer(args) if factory else None,
    )


def watched(folder, unfreezing, resume=None, **settings):
    watch = Watch()
    trainer = trainer_of(folder, unfreezing, watch, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch
