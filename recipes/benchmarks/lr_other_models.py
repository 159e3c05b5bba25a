"""How good are suggested rates for other models? Six families, small, with random weights, on 3,000 rows of TREC.

    python recipes/benchmarks/lr_other_models.py run      # a sweep and 7 trainings for each of 6 models: hours
    python recipes/benchmarks/lr_other_models.py table    # what each rule's rate would have cost

One rate for all layers, 4 epochs in batches of 16 (752 steps), 1,500 held-out questions. No constant of our rule was
chosen on them. `table --results recipes/benchmarks/results/lr_other_models.jsonl` shows what was measured.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lr_starts import Case, Tasks, trainer_of
from lr_suggestions import Results, print_rules
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from ulmfit_tools.lr_curve import LRCurve
from ulmfit_tools.lr_range import lr_range_test

WIDE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
NARROW = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 512}
MODELS: dict[str, tuple[type, int, dict[str, Any]]] = {
    "bert": (BertConfig, 2, {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}),
    "albert": (AlbertConfig, 4, {"embedding_size": 128} | WIDE),
    "electra": (ElectraConfig, 3, {"embedding_size": 128} | WIDE),
    "distilbert": (DistilBertConfig, 3, {"dim": 256, "n_heads": 4, "hidden_dim": 1024}),
    "gpt2": (GPT2Config, 3, {"n_embd": 192, "n_head": 3, "bos_token_id": 0, "eos_token_id": 0}),
    "llama": (LlamaConfig, 3, NARROW),
}
RATES = [3e-4, 1e-3, 3e-3, 1e-4, 5.5e-4, 1.8e-3, 3e-5]


def cases() -> Iterator[Case]:
    """One start of each model."""
    for name, (_, layers, _) in MODELS.items():
        yield Case("trec", 0, False, layers=layers, train_rows=3000, epochs=4, model=name)


def make_trainer(case: Case, tasks: Tasks, folder: str, rate: float) -> Any:
    """A trainer of a model with random weights."""
    _, _, label_names = tasks.load(case)
    kind, layers, settings = MODELS[case.model]
    vocabulary = {"vocab_size": len(tasks.tokenizer), "pad_token_id": tasks.tokenizer.pad_token_id}
    set_seed(case.seed)
    depth = kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")  # type: ignore[attr-defined]
    config = kind(num_labels=len(label_names), **vocabulary, **settings, **{depth: layers})
    model = AutoModelForSequenceClassification.from_config(config)
    return trainer_of(model, case, tasks, folder, rate, case.epochs)


def run(results: Results, tasks: Tasks) -> None:
    """A range test of each model, and real training at every rate; what is in the results is not done again."""
    for case in cases():
        with tempfile.TemporaryDirectory() as folder:
            key = case.key("sweep", sweep="ours")
            if not results.find(**key):
                curve = lr_range_test(make_trainer(case, tasks, folder, RATES[0]))
                results.add(key | {"curve": json.loads(curve.to_json())})
            for rate in RATES:
                key = case.key("curve", rate=rate)
                if not results.find(**key):
                    trainer = make_trainer(case, tasks, folder, rate)
                    trainer.train()
                    results.add(key | {"accuracy": trainer.evaluate()["eval_accuracy"]})
                    print(f"{case.model} at {rate:g}: {results.lines[-1]['accuracy']:.3f}", flush=True)


def print_table(results: Results) -> None:
    """The regret of each rule over the models whose rates are all there, and our own for each of them."""
    complete = {}
    for case in cases():
        points = {line["rate"]: line["accuracy"] for line in results.find(**case.key("curve"))}
        sweeps = results.find(**case.key("sweep", sweep="ours"))
        if sweeps and set(RATES) <= set(points):
            complete[case] = points, {"ours": LRCurve.from_json(json.dumps(sweeps[0]["curve"]))}
    if not complete:
        raise SystemExit(f"No model in {results.path} has its sweep and all of its rates yet")
    print_rules(complete)
    print()
    for case, (points, curves) in complete.items():
        best = max(points, key=points.__getitem__)
        print(f"  {case.model}: {points[best]:.3f} at {best:g}, suggested {curves['ours'].suggestion:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--results", type=Path, default=Path("runs/lr_other_models.jsonl"))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ULMFIT_TOOLS_DATA", "../shared/data")))
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = Results(options.results)
    if options.command == "run":
        run(results, Tasks(options.data, bf16=False, held_out_rows=1500))
    print_table(results)


if __name__ == "__main__":
    main()
