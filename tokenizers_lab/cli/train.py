"""`toklab train`: train a recipe, and show what it learned."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .common import say

if TYPE_CHECKING:
    from tokenizers_lab.settings import RunConfig

help = "train a tokenizer from a recipe or a config file"
description = """Train a tokenizer, then evaluate it on the held-out images or clips.
CONFIG is a YAML file or the name of a recipe (toklab list); key=value changes an option (toklab config CONFIG shows all).
On several GPUs: accelerate launch -m tokenizers_lab train CONFIG, or torchrun -m tokenizers_lab train CONFIG."""
example = "toklab train rectok/tiny train.batch_size=16 name=mine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, overrides, and what to do with a run that exists."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a recipe's name such as rectok/tiny")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="options that differ from the config")
    again = parser.add_mutually_exclusive_group()
    for option, mode, text in (
        ("--resume", "must", "go on with the run where it stopped"),
        ("--auto-resume", "auto", "go on if there is a run, else start"),
        ("--fresh", "fresh", "delete the run of this name and start anew"),
    ):
        again.add_argument(option, action="store_const", dest="resume", const=mode, help=text)
    parser.add_argument("--max-minutes", type=float, metavar="M", help="stop after M minutes of training, resumable")
    parser.set_defaults(resume="never")


def run(args: argparse.Namespace) -> int:
    """Train; 0 if the run ended or its time is over, 128 + n after signal n."""
    from tokenizers_lab.config import load_config

    limit = [] if args.max_minutes is None else [f"train.max_minutes={args.max_minutes}"]
    cfg = load_config(args.config, [*args.overrides, *limit])
    from tokenizers_lab.training.checkpoint import newest_checkpoint, read_state
    from tokenizers_lab.training.loop import train

    folder = Path(cfg.out) / f"{cfg.system}-{cfg.name}"
    before = newest_checkpoint(folder) if args.resume in ("must", "auto") else None
    step_before = -1 if before is None else int(read_state(before)["step"])
    result = train(cfg, resume=args.resume)
    if not leave_process_group():
        return 128 + result.signal if result.status == "interrupted" else 0
    if result.status == "interrupted":
        say(f"stopped at step {result.step} of {result.total}, saved in {result.folder}; go on with: {again(args)}")
        return 128 + result.signal
    if result.status == "finished" and step_before == result.step:
        say(f"{result.folder} is finished already: all {result.total} steps are done (--fresh starts it anew)")
        if not show_results(result.folder):
            summarise(cfg, result.folder)
        return 0
    if result.status == "out of time":
        say(f"the time is over at step {result.step} of {result.total}; go on with: {again(args)}")
    summarise(cfg, result.folder)
    return 0


def leave_process_group() -> bool:
    """End the processes' common group; True on the main process, which evaluates alone."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return os.environ.get("RANK", "0") == "0"


def again(args: argparse.Namespace) -> str:
    """The command that goes on with the run."""
    program = sys.argv[0] if Path(sys.argv[0]).name == "toklab" else "toklab"
    return shlex.join([program, "train", args.config, *args.overrides, "--resume"])


def summarise(cfg: "RunConfig", folder: Path) -> None:
    """Evaluate on the held-out data and print the table and the paths; without held-out data, where the weights are."""
    if not cfg.data.val:
        say(f"trained weights: {folder} (data.val names no held-out data, so nothing was measured)")
        return
    import torch

    from tokenizers_lab.eval.summary import finish_run, print_summary

    print_summary(finish_run(folder, device="cuda" if torch.cuda.is_available() else "cpu"))


def show_results(folder: Path) -> bool:
    """Print the results that an earlier session left, if they are of the newest checkpoint."""
    from tokenizers_lab.eval.runs import open_run, read_results
    from tokenizers_lab.eval.summary import print_summary, result_paths

    opened = open_run(folder)
    results, paths = read_results(opened), result_paths(opened)
    if results is None or not all(path.exists() for path in paths.values()):
        return False
    print_summary({**results, "paths": {name: str(path) for name, path in paths.items()}})
    return True
