"""Our training step against a hand-written one of the same losses, clipping, fused AdamW and foreach EMA, in one process.

python scripts/bench_train_step.py [RECIPE] [--stage NAME] [--pairs N] [key=value …]
RECIPE: by default rectok/tiny; its data are read once, for the batch of every step. NAME: by default its first stage.
key=value: options of the config, such as train.precision=bf16.

Blocks of steps alternate: our loop runs inside `train`, and its loader, whenever a block is over, runs the hand-written
one before it gives the next batch. So a drift of the machine falls on both. Goal: a ratio of at most 1.03.
"""

import argparse
import statistics
import sys
import tempfile
import time

import torch
from rich.console import Console
from rich.table import Table

from tokenizers_lab.config import load_config, override_objective
from tokenizers_lab.draw import Draw
from tokenizers_lab.eval.provenance import environment
from tokenizers_lab.training import loop
from tokenizers_lab.training.objective import ADVERSARIAL
from tokenizers_lab.training.run import active_terms, build_networks

WARM_UP = 4           # steps of both before the first block
BLOCK = 4             # steps of a block
OVERRIDES = [
    "train.log_every=10", "train.validate_every=0", "train.checkpoint_every=1000000", "data.val=null", "data.workers=0",
    "train.accumulate=1", "init_from=null",      # speed does not depend on the first weights
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("recipe", nargs="?", default="rectok/tiny")
parser.add_argument("--stage", metavar="NAME")
parser.add_argument("--pairs", type=int, default=8, help="blocks of ours, each between two of the other side; at least 2")
args, overrides = parser.parse_known_args()
if "=" in args.recipe:
    overrides, args.recipe = [args.recipe, *overrides], "rectok/tiny"
cfg = load_config(args.recipe, [*OVERRIDES, *overrides])
if hasattr(cfg.objective, "mask_ratio_type"):
    cfg.objective.mask_ratio_type = "fixed"      # as many tokens in every step
cfg.init_parts = {}
known = {stage.name: stage for stage in cfg.stages}
if args.stage is not None and args.stage not in known:
    parser.error(f"{args.recipe} has no stage '{args.stage}'; it has {', '.join(known)}")
stage = cfg.stages[0] if args.stage is None else known[args.stage]
stage.starts, stage.fresh, stage.warmup, stage.schedule = {}, [], 0.0, "constant"      # every loss counts from the first step on
stage.epochs, stage.steps = None, WARM_UP + BLOCK * args.pairs + 1      # the last step, after which the loop saves, is not timed
cfg.stages = [stage]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
everyday, _ = next(iter(loop.build_loader(cfg.data, cfg.train.batch_size, cfg.train.seed)))      # the batch of every step
everyday = everyday.to(device)

# --- the hand-written step: what the same networks cost at least ----------------------------------------------------------
nets = build_networks(cfg, device)
objective, ema = nets.objective, list(nets.ema.parameters())
objective.cfg = override_objective(cfg.objective, stage.objective)
objective.begin_stage(nets.tokenizer, stage)
nets.select(stage.parts)
nets.tokenizer.train()
objective.train()
trained = [p for p in [*nets.tokenizer.parameters(), *objective.heads.parameters()] if p.requires_grad]
judges = list(objective.discriminators.parameters())
active = active_terms(stage, 0)
adversarial = bool(active & ADVERSARIAL) and bool(judges)


def adamw(parameters, settings):
    """The optimiser without groups, and the norm at which gradients are clipped."""
    options = {"lr": stage.lr, "betas": tuple(settings.betas), "weight_decay": settings.weight_decay, "fused": True}
    return torch.optim.AdamW(parameters, **options), settings.clip or float("inf")


optimizer, clip = adamw(trained, cfg.train.optimizer)
if adversarial:
    judge_optimizer, judge_clip = adamw(judges, cfg.train.discriminator_optimizer)


def judge(real, fake):
    """The discriminators' half: forward, backward, clip, update."""
    judge_optimizer.zero_grad(set_to_none=True)
    sum(objective.discriminator_losses(real, fake.detach()).terms.values()).backward()
    torch.nn.utils.clip_grad_norm_(judges, judge_clip)
    judge_optimizer.step()


def hand_written_step(number, batch):
    """Forward, backward, clip, update, average."""
    first = adversarial and objective.discriminators_first
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.precision == "bf16"):
        draw = Draw(cfg.train.seed, 0, number, device)
        losses = objective.generator_losses(nets.tokenizer, batch, draw, active, judge if first else None)
    sum(stage.weights[name] * term for name, term in losses.terms.items()).backward()
    if adversarial and not first:
        judge(losses.real, losses.fake)
    torch.nn.utils.clip_grad_norm_(trained, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch._foreach_lerp_(ema, list(nets.tokenizer.parameters()), 1 - cfg.train.ema)


# --- our loop, on a loader that has the batch in memory and runs the other side between blocks ------------------------------
def clock():
    """(wall seconds, processor seconds of all threads) once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


class Alternating:
    """Counts the batches that `train` takes; at the end of a block notes our time and runs a block of the other side."""

    def __init__(self):
        self.taken, self.ours, self.theirs, self.since = 0, [], [], (0.0, 0.0)

    def __iter__(self):
        return self

    def __next__(self):
        done = self.taken - WARM_UP      # steps of ours since warm-up
        if done == 0 or (done > 0 and done % BLOCK == 0):
            now = clock()
            if done > 0:
                self.ours.append([b - a for a, b in zip(self.since, now)])
            for number in range(WARM_UP if done == 0 else 0):
                hand_written_step(number, everyday)
            began = clock()
            for number in range(BLOCK):
                hand_written_step(self.taken + number, everyday)
            self.theirs.append([b - a for a, b in zip(began, clock())])
            self.since = clock()
        self.taken += 1
        return everyday, {}

    def wait_seconds(self):
        return 0.0


loader = Alternating()
loop.build_loader = lambda *args, **options: loader
with tempfile.TemporaryDirectory() as out:
    cfg.out = out
    loop.train(cfg)

# --- a block of ours stands between two of the other side: compare it with their mean -----------------------------------------
around = [[(a + b) / 2 for a, b in zip(before, after)] for before, after in zip(loader.theirs, loader.theirs[1:])]
table = Table("clock", "ours, ms a step", "hand-written, ms a step", "ratio (median)", "quartiles")
for place, name in enumerate(("wall", "processor, all threads")):
    ours, theirs = [b[place] for b in loader.ours], [b[place] for b in around]
    ratios = [a / b for a, b in zip(ours, theirs)]
    low, _, high = statistics.quantiles(ratios)
    table.add_row(name, f"{1e3 * statistics.median(ours) / BLOCK:.1f}", f"{1e3 * statistics.median(theirs) / BLOCK:.1f}",
                  f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}")
Console(width=None if sys.stdout.isatty() else 120).print(table)
shape = " × ".join(map(str, (everyday.images if hasattr(everyday, "images") else everyday.audio).shape))
print(f"{args.recipe}, stage {stage.name}, {shape}; losses: {', '.join(sorted(active))}")
print(f"{args.pairs} blocks of {BLOCK} steps of each side, after {WARM_UP} steps")
machine = environment(device)
print(f"{machine['processor']}, {machine['threads']} threads, torch {torch.__version__}; goal: a ratio of at most 1.03")
