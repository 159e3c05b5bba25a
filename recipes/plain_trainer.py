"""The pieces in a plain `transformers.Trainer`: discriminative rates, a slanted triangle, gradual unfreezing.

python recipes/plain_trainer.py
"""

from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from ulmfit_tools import GradualUnfreezing, discriminative_optimizer, get_slanted_triangular_schedule
from ulmfit_tools.data import load_model_and_tokenizer, load_text_classification, tokenize
from ulmfit_tools.metrics import classification_metrics

MODEL = "minilm"  # or a Hub name, or a model folder
DATASET = "stdlib-docs"  # or a file, a folder of splits, a Hub name
MAX_LENGTH = 64  # tokens

args = TrainingArguments(
    output_dir="runs/plain_trainer",
    learning_rate=4e-4,  # the head's; earlier layer groups get less
    num_train_epochs=2,
    per_device_train_batch_size=32,
    train_sampling_strategy="group_by_length",
    eval_strategy="epoch",
    save_strategy="no",
)
data = load_text_classification(DATASET)
model, tokenizer = load_model_and_tokenizer(MODEL, label_names=data.label_names)
rows = tokenize(data, tokenizer, max_length=MAX_LENGTH)


class SlantedTrainer(Trainer):
    """`Trainer` makes its schedule from a fixed list of names; this hands it another one."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = get_slanted_triangular_schedule(optimizer or self.optimizer, num_training_steps)
        return self.lr_scheduler


trainer = SlantedTrainer(
    model=model,
    args=args,
    train_dataset=rows["train"],
    eval_dataset=rows["validation"],
    processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=classification_metrics,
    optimizer_cls_and_kwargs=discriminative_optimizer(args),
    callbacks=[GradualUnfreezing(by="fraction", every=0.1, groups_per_stage=3)],
)
# Classifiers average over the batch whatever they are told; without this, Trainer takes their loss for one that is
# scaled already, and k accumulation steps or processes make it k times too large.
trainer.model_accepts_loss_kwargs = False
trainer.train()
print(trainer.evaluate(rows["test"], metric_key_prefix="test"))
