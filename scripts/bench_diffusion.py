"""What decoding by diffusion costs: against sampling steps, and against the number of patches, with the exponent of its growth.

python scripts/bench_diffusion.py [--device cuda] [--threads N] [--rounds R] [--batch B] [--seconds S] [--only TEXT]

UniFlow as in its tiny recipe and at width 384, TaDiCodec as in its tiny recipe with Vocos in place of Griffin and Lim's method,
all with random weights, on which speed does not depend. Everything takes turns in each round; medians count. On a CPU times are
of the processor, all threads together, which other programs change little; on a GPU they are by the clock. Fitted by least
squares: time = start + steps · each, and time ∝ patches^k, in logarithms. k = 1 is what patches cost by themselves; attention
between them drives it towards 2.
"""

import argparse
import math
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from tokenizers_lab.config import load_config
from tokenizers_lab.eval.provenance import environment
from tokenizers_lab.registry import get_system

STEPS = (1, 4, 16, 32)
SIZES = (64, 128, 256)      # pixels a side
SIZE_STEPS = 4              # steps of the comparison of sizes
WIDE = ["model.width=384", "model.encoder.width=384", "model.encoder.hidden=1536", "model.encoder.depth=8",
        "model.global_blocks=4", "model.flow_blocks=6"]
IMAGE_MODELS = {"UniFlow, tiny": [], "UniFlow, width 384": WIDE}
SPEECH = "TaDiCodec, tiny"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cpu")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
parser.add_argument("--batch", type=int, default=1, help="images decoded together; times are of one")
parser.add_argument("--seconds", type=float, default=5.0, help="of sound")
parser.add_argument("--only", default="", metavar="TEXT", help="models with this in their name")
args = parser.parse_args()
torch.set_num_threads(args.threads)
device = torch.device(args.device)


def build(recipe, overrides):
    """The tokenizer of a recipe, with random weights."""
    cfg = load_config(recipe, overrides)
    torch.manual_seed(0)
    return get_system(cfg.system).resolve("tokenizer")(cfg.model).to(device).eval().requires_grad_(False)


def seconds(function):
    """Time of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def fit(x, y):
    """(intercept, slope) of the least squares line."""
    slope = statistics.covariance(x, y) / statistics.variance(x)
    return statistics.fmean(y) - slope * statistics.fmean(x), slope


# --- what is timed: (model, size, steps) -> a call, and how many images or seconds of sound it decodes
calls, patches, parameters = {}, {}, {}
with torch.inference_mode():
    for name, overrides in IMAGE_MODELS.items():
        if args.only not in name:
            continue
        model = build("uniflow/tiny", overrides)
        parameters[name] = sum(p.numel() for p in model.parameters())
        for size in SIZES:
            images = torch.rand(args.batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
            latents = model.encode(images).code
            patches[name, size] = latents.shape[2] * latents.shape[3]
            for steps in STEPS if size == SIZES[0] else [SIZE_STEPS]:
                calls[name, size, steps] = (lambda m=model, z=latents, n=steps: m.decode(z, steps=n)), args.batch
    if args.only in SPEECH:
        model = build("tadicodec/tiny", ["model.vocoder.kind=vocos"])
        parameters[SPEECH] = sum(p.numel() for p in model.parameters())
        noise = torch.rand(1, 1, round(args.seconds * model.sample_rate), generator=torch.Generator().manual_seed(0)) - 0.5
        codes = model.encode(noise.to(device)).code
        text = ["a sentence that takes about as long to say as this sound takes to hear"]
        for steps in STEPS:
            calls[SPEECH, 0, steps] = (lambda m=model, z=codes, n=steps: m.decode(z, steps=n, texts=text)), args.seconds

    times = {case: [] for case in calls}
    for number in range(args.rounds + 1):
        for case, (call, count) in calls.items():
            took = seconds(call) / count
            if number:      # the first one warms up
                times[case].append(took)
        print(f"round {number} of {args.rounds}", file=sys.stderr)
median = {case: statistics.median(found) for case, found in times.items()}

# --- tables ---------------------------------------------------------------------------------------------------------------------
console = Console(width=None if sys.stdout.isatty() else 150)
machine = environment(device)
table = Table("decoding, ms", "parameters", "of", *(f"{n} step{'s' * (n > 1)}" for n in STEPS), "start", "each step",
              title="time against sampling steps", title_justify="left")
for name, count in parameters.items():
    size = 0 if name == SPEECH else SIZES[0]
    found = [1e3 * median[name, size, steps] for steps in STEPS]
    start, each = fit(STEPS, found)
    table.add_row(name, f"{count / 1e6:.1f} M", f"image, {size} px" if size else "1 s of sound", *(f"{ms:.2f}" for ms in found),
                  f"{start:.2f}", f"{each:.2f}")
console.print(table)
if patches:
    table = Table("decoding, ms", *(f"{size} px" for size in SIZES), "patches", "exponent", "of the last two",
                  title=f"time of an image against patches, {SIZE_STEPS} steps", title_justify="left")
    for name in IMAGE_MODELS:
        if name in parameters:
            x = [math.log(patches[name, size]) for size in SIZES]
            y = [math.log(median[name, size, SIZE_STEPS]) for size in SIZES]
            table.add_row(name, *(f"{1e3 * math.exp(v):.2f}" for v in y), ", ".join(f"{math.exp(v):.0f}" for v in x),
                          f"{fit(x, y)[1]:.2f}", f"{(y[-1] - y[-2]) / (x[-1] - x[-2]):.2f}")
    console.print(table)
clock = "by the clock" if device.type == "cuda" else "processor time"
print(f"{machine['processor']}, {machine['threads']} thread(s), torch {torch.__version__}, float32, batch {args.batch}; {clock}, "
      f"median of {args.rounds} rounds in turns; {args.seconds:g} s of sound")
