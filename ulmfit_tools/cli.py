"""The command line: `ulmfit-tools train | lr-find | groups | evaluate | predict | cache`.

Bad input ends with one line on standard error and exit code 2; a run stopped by a signal writes a last checkpoint and
exits with 128 + the signal's number, as shells expect.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ulmfit_tools import __version__
from ulmfit_tools.cli_flags import (
    PROGRAM,
    CacheFlags,
    DataFlags,
    EvaluateFlags,
    GroupFlags,
    ModelFlags,
    PredictFlags,
    RangeFlags,
    TrainFlags,
    as_flags,
    config_flags,
    defaults,
    need,
    parse,
)
from ulmfit_tools.errors import InputError, nearest


def train(argv: Sequence[str], settings: Mapping[str, Any] | None = None) -> int:
    """Fine-tune a text classifier by a plan; any field of TrainingArguments is a flag too.

    Args:
        argv: The flags; they win over a `--config` file's, which win over `settings`.
        settings: Values for flags that are not given.
    """
    from ulmfit_tools.data import load_text_classification
    from ulmfit_tools.plans import FineTuningPlan, run_plan
    from ulmfit_tools.plans.run import check_run
    from ulmfit_tools.reporting.tables import print_data, print_result
    from ulmfit_tools.trainer import ULMFiTTrainingArguments

    classes = [ModelFlags, DataFlags, TrainFlags, ULMFiTTrainingArguments]
    argv = [*as_flags(settings or {}), *config_flags(argv), *argv]
    given = parse("train", classes, argv, f"{_first_line(train)} What the plan sets wins over the defaults shown.")
    model, data_flags, flags = (defaults(c, given) for c in (ModelFlags, DataFlags, TrainFlags))
    need("train", model, "model")
    need("train", data_flags, "dataset")
    own = {f.name for c in (ModelFlags, DataFlags, TrainFlags) for f in dataclasses.fields(c)}
    training = {key: value for key, value in given.items() if key not in own}
    if "output_dir" not in training:
        raise InputError("train needs --output_dir, the folder for the run")
    output_dir = training.pop("output_dir")
    plan = FineTuningPlan.load(flags.plan)
    args = check_run(plan, output_dir, training, resume=flags.resume, overwrite=flags.overwrite)
    data = load_text_classification(
        data_flags.dataset,
        text_columns=data_flags.text_column,
        label_column=data_flags.label_column,
        validation_split=flags.validation_split,
        seed=args.seed,
    )
    if _main_process():
        print_data(data)
    result = run_plan(
        plan,
        model=model.model,
        data=data,
        output_dir=output_dir,
        max_length=data_flags.max_length,
        resume=flags.resume,
        overwrite=flags.overwrite,
        trust_remote_code=model.trust_remote_code,
        **training,
    )
    if _main_process():
        print_result(result, data)
    return 0


def lr_find(argv: Sequence[str]) -> int:
    """Sweep the learning rate over a few steps and suggest one; any field of TrainingArguments is a flag too."""
    from tempfile import TemporaryDirectory

    from ulmfit_tools.lr_range import lr_range_test
    from ulmfit_tools.reporting.lr_plot import print_lr_curve, save_lr_curve
    from ulmfit_tools.trainer import ULMFiTTrainingArguments

    classes = [ModelFlags, DataFlags, RangeFlags, ULMFiTTrainingArguments]
    given = parse("lr-find", classes, [*config_flags(argv), *argv], _first_line(lr_find))
    model, data, flags = (defaults(c, given) for c in (ModelFlags, DataFlags, RangeFlags))
    need("lr-find", model, "model")
    need("lr-find", data, "dataset")
    for path in (flags.plot, flags.json):
        if path is not None:
            _check_new_file(path)
    if flags.plot is not None:
        _check_picture(flags.plot)
        if flags.json is not None and Path(flags.plot).resolve() == Path(flags.json).resolve():
            raise InputError(f"--plot and --json need a file each. Received: {flags.plot} for both")
    own = {f.name for c in (ModelFlags, DataFlags, RangeFlags) for f in dataclasses.fields(c)}
    names = ("start_lr", "end_lr", "num_steps", "mode", "num_sweeps", "confirm", "eval_batches")
    with TemporaryDirectory() as folder:
        training = {key: value for key, value in given.items() if key not in own}
        trainer = _range_trainer(model, data, flags.validation_split, training, folder)
        curve = lr_range_test(trainer, **{name: getattr(flags, name) for name in names})
    if _main_process():
        print_lr_curve(curve)
        if flags.json is not None:
            Path(flags.json).write_text(curve.to_json(), encoding="utf-8")
        if flags.plot is not None:
            save_lr_curve(curve, flags.plot)
    return 0


def _range_trainer(
    model_flags: Any,
    data_flags: Any,
    validation_split: float | None,
    training: Mapping[str, Any],
    folder: str,
) -> Any:
    """The trainer that a range test is for; what it would evaluate, save, push and report is left out."""
    from transformers import DataCollatorWithPadding, set_seed

    from ulmfit_tools.data import ensure_padding, load_model_and_tokenizer, load_text_classification, tokenize
    from ulmfit_tools.reporting.tables import print_data
    from ulmfit_tools.trainer import ULMFiTTrainer, ULMFiTTrainingArguments, try_arguments
    from ulmfit_tools.training_args import check_values

    idle = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    idle |= {"push_to_hub": False, "report_to": "none"}
    every = {"ddp_find_unused_parameters": False}  # nothing is frozen; looking for it costs time and a warning
    try:
        args = ULMFiTTrainingArguments(**{**every, **training, **idle, "output_dir": folder})
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise InputError(f"lr-find, training arguments: {' '.join(str(error).split())}") from None
    check_values(args)
    args.dataloader_pin_memory &= args.device.type != "cpu"
    data = load_text_classification(
        data_flags.dataset,
        text_columns=data_flags.text_column,
        label_column=data_flags.label_column,
        validation_split=validation_split,
        seed=args.seed,
    )
    if _main_process():
        print_data(data)
    set_seed(args.seed)
    model, tokenizer = load_model_and_tokenizer(
        model_flags.model, label_names=data.label_names, trust_remote_code=model_flags.trust_remote_code
    )
    try_arguments(model, args)
    ensure_padding(tokenizer, model)
    splits = tokenize(data, tokenizer, max_length=data_flags.max_length, config=model.config)
    return ULMFiTTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def _check_new_file(path: str) -> None:
    """Said before the work and not after it: that a file cannot be written."""
    from tempfile import TemporaryFile

    if not Path(path).name:
        raise InputError(f"The file to write needs a name. Received: {path!r}")
    try:
        if Path(path).exists():
            raise InputError(f"{path} exists already: choose another file, nothing was written")
        with TemporaryFile(dir=Path(path).parent):
            pass
    except OSError as error:
        folder = Path(path).parent
        raise InputError(
            f"{path} cannot be written ({error.strerror}): its folder, {folder}, must exist and allow it"
        ) from None


def _check_picture(path: str) -> None:
    from io import BytesIO

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('Plots need matplotlib, which is not installed: pip install "ulmfit-tools[plot]"') from None
    figure, kind = Figure(), Path(path).suffix.lower()
    allowed = [f".{kind}" for kind in figure.canvas.get_supported_filetypes()]
    if kind not in allowed:
        raise InputError(f"--plot is a picture file, as curve.png: {', '.join(allowed)}. Received: {path}")
    figure.subplots()  # numbers on its axes, which a kind may have other needs for
    try:
        figure.savefig(BytesIO(), format=kind[1:])
    except RuntimeError as error:  # pgf needs a TeX
        raise InputError(f"--plot cannot be written as {kind} here ({error}): try .png. Received: {path}") from None


def groups(argv: Sequence[str]) -> int:
    """Show the layer groups of a model with their parameters and rates, before anything is trained."""
    from ulmfit_tools.data import load_model_and_tokenizer
    from ulmfit_tools.layers import layer_groups
    from ulmfit_tools.param_groups import group_learning_rates
    from ulmfit_tools.reporting.tables import print_groups

    given = parse("groups", [ModelFlags, GroupFlags], argv, _first_line(groups))
    flags, rates = defaults(ModelFlags, given), defaults(GroupFlags, given)
    need("groups", flags, "model")
    model, _ = load_model_and_tokenizer(flags.model, label_names=["0", "1"], trust_remote_code=flags.trust_remote_code)
    found = layer_groups(model, rates.num_layer_groups)
    learning_rate = rates.learning_rate
    if rates.learning_rate_low is not None:
        learning_rate = (rates.learning_rate_low, rates.learning_rate)
    print_groups(model, found, group_learning_rates(len(found), learning_rate, factor=rates.discriminative_factor))
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Score a fine-tuned model on a labelled dataset: accuracy, F1, MCC, and each class by itself."""
    from ulmfit_tools.inference import evaluate_model
    from ulmfit_tools.reporting.tables import print_evaluation

    given = parse("evaluate", [ModelFlags, DataFlags, EvaluateFlags], argv, _first_line(evaluate))
    model, data, flags = (defaults(c, given) for c in (ModelFlags, DataFlags, EvaluateFlags))
    need("evaluate", model, "model")
    need("evaluate", data, "dataset")
    if flags.json is not None:
        _check_new_file(flags.json)
    result = evaluate_model(
        model.model,
        data.dataset,
        split=flags.split,
        text_columns=data.text_column,
        label_column=data.label_column,
        max_length=data.max_length,
        batch_size=flags.batch_size,
        trust_remote_code=model.trust_remote_code,
    )
    print_evaluation(result)
    if flags.json is not None:
        Path(flags.json).write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8")
    return 0


def predict(argv: Sequence[str]) -> int:
    """Label texts with a fine-tuned model."""
    from ulmfit_tools.data import read_texts
    from ulmfit_tools.inference import predict_texts, run_settings
    from ulmfit_tools.reporting.tables import print_notes, print_predictions, write_predictions

    given = parse("predict", [ModelFlags, PredictFlags], argv, _first_line(predict))
    model, flags = defaults(ModelFlags, given), defaults(PredictFlags, given)
    need("predict", model, "model")
    if (flags.text is None) == (flags.file is None):
        raise InputError('predict needs texts: either --text "..." or --file texts.csv')
    if flags.output is not None:
        _check_new_file(flags.output)
    texts: Any = flags.text
    if flags.file is not None:
        texts, notes = read_texts(flags.file, flags.text_column, run_settings(model.model).get("text_columns"))
        print_notes(notes)
    predictions = predict_texts(
        model.model,
        texts,
        batch_size=flags.batch_size,
        max_length=flags.max_length,
        trust_remote_code=model.trust_remote_code,
    )
    if flags.output is None:
        print_predictions(predictions)
    else:
        write_predictions(predictions, Path(flags.output))
        print(f"{len(predictions)} predictions in {flags.output}")
    return 0


def cache(argv: Sequence[str]) -> int:
    """Tell how large the precomputed activations are, and delete them with --remove."""
    from ulmfit_tools.activation_store import cache_size, remove_cache
    from ulmfit_tools.feature_cache import activation_cache

    flags = defaults(CacheFlags, parse("cache", [CacheFlags], argv, _first_line(cache)))
    folder = Path(flags.folder) if flags.folder is not None else activation_cache()
    if flags.folder is not None and not folder.is_dir():
        raise InputError(f"There is no folder {folder}")
    entries, nbytes = cache_size(folder)
    sets = "1 set" if entries == 1 else f"{entries} sets"
    print(f"{folder}: {sets} of activations, {nbytes / 2**20:,.1f} MiB")
    if flags.remove:
        print(f"{remove_cache(folder) / 2**20:,.1f} MiB freed")
    return 0


def _first_line(command: Callable) -> str:
    return (command.__doc__ or "").splitlines()[0]


def _main_process() -> bool:
    """By the launcher's word: Accelerate's state, asked before the training arguments, takes CPUs for one process."""
    from accelerate.utils import get_cpu_distributed_information

    return get_cpu_distributed_information().rank == 0  # of any launcher and device, whatever its name says


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "lr-find": lr_find,
    "groups": groups,
    "evaluate": evaluate,
    "predict": predict,
    "cache": cache,
}


def _overview() -> str:
    lines = [f"usage: {PROGRAM} COMMAND [flags]", ""]
    lines += [f"  {name:<10}{_first_line(command)}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", f"'{PROGRAM} COMMAND --help' lists a command's flags."])


def run(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run one command and turn what a user can cause into one line and an exit code."""
    from torch import distributed
    from transformers.utils import logging as transformers_logging

    from ulmfit_tools.trainer import TrainingInterrupted

    transformers_logging.disable_progress_bar()  # those for files of weights, a line each; training has its own
    if not _main_process():
        logging.getLogger("ulmfit_tools").setLevel(logging.ERROR)  # what all processes would say is said once
    try:
        code = command(argv)
        if distributed.is_initialized():  # left to the interpreter's end, it may abort a run that is done
            distributed.destroy_process_group()
        return code
    except InputError as error:
        _print_end(str(error))
        return 2
    except TrainingInterrupted as stop:
        _print_end(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        trains = getattr(command, "func", command) is train  # a recipe gives it settings of its own, by `partial`
        hint = "; --resume goes on from the last checkpoint" if trains else ""
        _print_end(f"interrupted{hint}")
        return 130


def _print_end(line: str) -> None:
    """Say why a command ends, below the progress bars that it leaves open: else in the midst of one."""
    from tqdm import tqdm

    for bar in sorted(tqdm._instances, key=lambda bar: -abs(bar.pos)):  # there is no public list of them
        bar.leave = None  # the inner ones go, the outermost stays as it was, with an end of line
        bar.close()
    print(f"{PROGRAM}: {line}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `ulmfit-tools`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"{PROGRAM}: there is no command '{argv[0]}'; there are {', '.join(COMMANDS)}."
              f"{nearest(argv[0], COMMANDS)}", file=sys.stderr)  # fmt: skip
        return 2
    return run(COMMANDS[argv[0]], argv[1:])


if __name__ == "__main__":
    sys.exit(main())
