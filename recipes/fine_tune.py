"""Fine-tune a text classifier by a plan, in one process or many.

    python recipes/fine_tune.py --output_dir runs/docs
    accelerate launch --num_processes 2 recipes/fine_tune.py --output_dir runs/docs --resume

It takes the flags of `ulmfit-tools train`; the settings below are used for those that are not given.
"""

import sys
from functools import partial

from ulmfit_tools.cli import run, train

SETTINGS = {
    "model": "minilm",  # or a Hub name, or a model folder
    "dataset": "stdlib-docs",  # or a Hub name, a .csv .tsv .json .jsonl .parquet .txt file, a folder of splits
    "plan": "gradual_unfreezing",  # or baseline, chain_thaw, fastai_eight_steps, a YAML file
}

if __name__ == "__main__":
    sys.exit(run(partial(train, settings=SETTINGS), sys.argv[1:]))
