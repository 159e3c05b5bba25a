"""The weights that each phase of a plan hands on to the next, `phases/*/model`: checked on resume, deleted in time."""

from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from ulmfit_tools.checkpoints import EARLIER_RUN, clean_up, delete_folder, list_checkpoints, verify
from ulmfit_tools.errors import InputError
from ulmfit_tools.plans.phase import Phase
from ulmfit_tools.plans.record import RunFolder

logger = logging.get_logger(__name__)


def handed_on(folder: RunFolder, phases: Sequence[Phase], index: int) -> Path:
    """Where a phase leaves its weights for the next."""
    return folder.phase_folder(index, phases[index].name) / "model"


def phases_to_keep(folder: RunFolder, phases: Sequence[Phase]) -> int:
    """How many of the phases that are done need not be done again: all, unless the weights of the last are damaged.

    Then it is trained again where the weights that it began with are at hand: for the first phase those of the model,
    for another one only where the process was killed before it deleted them. Nothing is written.

    Raises:
        InputError: The weights are damaged, and those before them are gone.
    """
    states = [folder.phase_state(index, phase.name)["status"] for index, phase in enumerate(phases)]
    done = next((index for index, status in enumerate(states) if status != "done"), len(phases))
    if done == 0:
        return 0
    weights = handed_on(folder, phases, done - 1)
    problems = verify(weights)
    if not problems:
        return done
    damage = f"{weights} is damaged: {'; '.join(problems)}."
    if done > 1 and verify(handed_on(folder, phases, done - 2)):
        raise InputError(
            f"{damage} The run cannot go on from it, and the weights before it are deleted by now: start anew with "
            "--overwrite"
        )
    logger.warning(f"{damage} Phase '{phases[done - 1].name}' is trained again.")
    return done - 1


def go_on_after(folder: RunFolder, phases: Sequence[Phase], kept: int) -> None:
    """Prepare a folder for a run that keeps its first phases: the next one is trained, also if it was done."""
    for index in range(kept):
        tidy(folder, phases, index)
    if kept < len(phases) and folder.phase_state(kept, phases[kept].name)["status"] == "done":
        folder.write_phase_state(kept, phases[kept].name, {"status": "new", "seconds": 0.0})


def tidy(folder: RunFolder, phases: Sequence[Phase], index: int) -> None:
    """Remove what a phase's result makes needless: its checkpoints, and the weights that it started from.

    So are damaged checkpoints that it set aside when it started anew. Killed in between, it is done again on resume.
    """
    here = folder.phase_folder(index, phases[index].name)
    for names in ("checkpoint-*", "model", f"{EARLIER_RUN}*"):
        clean_up(here, names)
    for checkpoints in [*list_checkpoints(here), *here.glob(f"{EARLIER_RUN}*")]:
        delete_folder(checkpoints)
    if index > 0 and handed_on(folder, phases, index - 1).is_dir():
        delete_folder(handed_on(folder, phases, index - 1))


def tidy_complete(folder: RunFolder, phases: Sequence[Phase]) -> None:
    """Remove what a complete run does not need any more: the last phase's weights too, which are the result now."""
    for index in range(len(phases)):
        tidy(folder, phases, index)
    if handed_on(folder, phases, len(phases) - 1).is_dir():
        delete_folder(handed_on(folder, phases, len(phases) - 1))
