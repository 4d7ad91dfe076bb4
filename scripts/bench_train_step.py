"""Our training step against a hand-written one of the same losses, clipping, fused AdamW and foreach EMA, in one process.

python scripts/bench_train_step.py [key=value …]        options of the config, such as train.precision=bf16

Blocks of steps alternate: our loop runs inside `train`, and its loader, whenever a block is over, runs the hand-written
one before it gives the next batch. So a drift of the machine falls on both. Goal: a ratio of at most 1.03.
"""

import statistics
import sys
import tempfile
import time

import torch
from rich.console import Console
from rich.table import Table

from tokenizers_lab.config import load_config
from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.draw import Draw
from tokenizers_lab.eval.provenance import environment
from tokenizers_lab.training import loop
from tokenizers_lab.training.run import build_networks

RECIPE = "rectok/tiny"
WARM_UP = 4           # steps of both before the first block
BLOCK = 4             # steps of a block
PAIRS = 8             # blocks of ours, each between two of the other side
OVERRIDES = [
    "train.log_every=10", "train.validate_every=0", "train.checkpoint_every=1000000", "data.val=null",
    "objective.mask_ratio_type=fixed",      # as many tokens in every step
]

cfg = load_config(RECIPE, [*OVERRIDES, *sys.argv[1:]])
stage = cfg.stages[0]
stage.starts, stage.warmup, stage.schedule = {}, 0.0, "constant"      # every loss counts from the first step on
cfg.stages = [stage]
stage.steps = WARM_UP + BLOCK * PAIRS + 1      # the last step, after which the loop saves, is not timed
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# --- the hand-written step: what the same networks cost at least ----------------------------------------------------------
nets = build_networks(cfg, device)
nets.tokenizer.train()
nets.objective.train()
objective, ema = nets.objective, list(nets.ema.parameters())
trained = [*nets.tokenizer.parameters(), *objective.heads.parameters()]
judges = list(objective.discriminators.parameters())
active, adversarial = frozenset(stage.weights), "gan" in stage.weights
weight_decay, clip = cfg.train.optimizer.weight_decay, cfg.train.optimizer.clip
options = {"lr": stage.lr, "betas": tuple(cfg.train.optimizer.betas), "weight_decay": weight_decay, "fused": True}
optimizer, judge_optimizer = torch.optim.AdamW(trained, **options), torch.optim.AdamW(judges, **options)
images = torch.rand(cfg.train.batch_size, 3, cfg.data.size, cfg.data.size, generator=torch.Generator().manual_seed(0))
everyday = ImageBatch(images, [str(i) for i in range(len(images))])      # the batch of every step


def hand_written_step(number, batch):
    """Forward, backward, clip, update, average."""
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.precision == "bf16"):
        losses = objective.generator_losses(nets.tokenizer, batch, Draw(cfg.train.seed, 0, number, device), active)
    sum(stage.weights[name] * term for name, term in losses.terms.items()).backward()
    if adversarial:
        sum(objective.discriminator_losses(losses.real, losses.fake.detach()).terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(judges, clip)
        judge_optimizer.step()
        judge_optimizer.zero_grad(set_to_none=True)
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
print(f"{RECIPE}, batch {cfg.train.batch_size}, {cfg.data.size} px; losses: {', '.join(sorted(active))}")
print(f"{PAIRS} blocks of {BLOCK} steps of each side, after {WARM_UP} steps")
machine = environment(device)
print(f"{machine['processor']}, {machine['threads']} threads, torch {torch.__version__}; goal: a ratio of at most 1.03")
