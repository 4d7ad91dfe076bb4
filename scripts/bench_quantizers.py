"""Time of our quantizers against vector-quantize-pytorch's, side by side: the same vectors, the same codebooks, in turns.

python scripts/bench_quantizers.py                     # one thread, some minutes
python scripts/bench_quantizers.py --threads 2 --repeats 20
python scripts/bench_quantizers.py --device cuda
Training is forward and backward, moving averages included; eval is forward. Goal: half their time in training, never slower.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import vector_quantize_pytorch as library
from torch import Tensor

from tokenizers_lab.draw import Draw
from tokenizers_lab.eval.provenance import environment
from tokenizers_lab.quantizers.bsq import BinaryQuantizer
from tokenizers_lab.quantizers.residual import ResidualVQ

GOAL_TRAINING, GOAL_EVAL = 0.5, 1.0
SHORTEST = 0.05      # seconds of a turn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--repeats", type=int, default=9, help="turns; each measures both, one after the other")
parser.add_argument("--device", default="cpu")
parser.add_argument("--only", default="", help="cases whose name holds this text")
args = parser.parse_args()
torch.set_num_threads(args.threads)
device = torch.device(args.device)
torch.manual_seed(0)


def residual_pair(codebooks: int, size: int, width: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and theirs with equal codebooks that have started."""
    ours = ResidualVQ(codebooks, size, width, kmeans_iterations=0)
    options = {"decay": 0.99, "eps": 1e-5, "rotation_trick": False, "commitment_weight": 1.0}
    if codebooks == 1:
        theirs = library.VectorQuantize(dim=width, codebook_size=size, **options)
        books = [theirs._codebook]
    else:
        theirs = library.ResidualVQ(dim=width, codebook_size=size, num_quantizers=codebooks, **options)
        books = [layer._codebook for layer in theirs.layers]
    for i, book in enumerate(books):
        ours.book(i).embed.normal_()
        ours.book(i).embed_sum.copy_(ours.book(i).embed)
        for mine, other in ((ours.book(i).embed, book.embed), (ours.book(i).embed_sum, book.embed_avg)):
            other.data.copy_(mine[None])
        book.cluster_size.data.fill_(1)
    return ours, theirs


def binary_pair(bits: int, spherical: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and theirs, with the exact entropy over all codes where it is LFQ; BSQ's is over single bits, as in its paper."""
    ours = BinaryQuantizer(bits, spherical, group=1 if spherical else 0)
    return ours, library.LFQ(dim=bits, codebook_size=2**bits, spherical=spherical)


CASES: dict[str, tuple[Callable[[], tuple[torch.nn.Module, torch.nn.Module]], tuple[int, int, int]]] = {
    "VQ 8192 × 256, 4,096 vectors": (lambda: residual_pair(1, 8192, 256), (8, 256, 512)),
    "residual VQ 8 × 1024 × 1024, 900 vectors": (lambda: residual_pair(8, 1024, 1024), (6, 1024, 150)),
    "LFQ 2^14, 1,024 vectors": (lambda: binary_pair(14, False), (8, 14, 128)),
    "BSQ 2^14, 1,024 vectors": (lambda: binary_pair(14, True), (8, 14, 128)),
}


def run_ours(network: torch.nn.Module, x: Tensor, step: int) -> None:
    """One step, or one forward in eval mode."""
    options = {"draw": Draw(0, step=step)} if isinstance(network, ResidualVQ) and network.training else {}
    found = network(x, **options)
    if network.training:
        (found.quantized.mean() + sum(found.losses.values())).backward()


def run_theirs(network: torch.nn.Module, rows: Tensor) -> None:
    """The same; rows are (B, T, D), which spares them a transposition."""
    if isinstance(network, library.LFQ):
        values, _, loss = network(rows, inv_temperature=1.0)
    else:
        values, _, loss = network(rows)
    if network.training:
        (values.mean() + loss.sum()).backward()


def seconds(function: Callable[[], None], calls: int = 1) -> float:
    """Processor time of calls on a CPU, which does not count waiting for other programs; wall-clock time on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(case: str, training: bool) -> tuple[list[float], list[float]]:
    """Seconds of a call of both in each turn; short ones are called many times in a turn."""
    build, shape = CASES[case]
    ours, theirs = (network.to(device).train(training) for network in build())
    x = torch.randn(shape, device=device, requires_grad=training)
    rows = x.detach().transpose(1, 2).contiguous().requires_grad_(training)
    took: tuple[list[float], list[float]] = ([], [])
    calls = [1, 1]
    with torch.set_grad_enabled(training):
        for turn in range(args.repeats + 1):
            pairs = [(0, lambda: run_ours(ours, x, turn)), (1, lambda: run_theirs(theirs, rows))]      # noqa: B023
            for which, function in pairs if turn % 2 == 0 else pairs[::-1]:
                if turn == 0:      # warms up, and tells how long a call takes
                    function()
                    calls[which] = max(1, round(SHORTEST / max(seconds(function), 1e-6)))
                else:
                    took[which].append(seconds(function, calls[which]) / calls[which])
    return took


machine = environment()
print(f"{machine['processor'] if device.type == 'cpu' else torch.cuda.get_device_name()}, {args.threads} threads; "
      f"torch {machine['packages']['torch']}; {'processor' if device.type == 'cpu' else 'wall-clock'} time, medians of "
      f"{args.repeats} turns, quartiles of the ratio in brackets\n")
print("| quantizer | mode | ours, ms | vector-quantize-pytorch, ms | ratio | goal |\n|---|---|---|---|---|---|")
good = True
for case in CASES:
    if args.only not in case:
        continue
    for training in (True, False):
        mine, other = measure(case, training)
        ratios = sorted(a / b for a, b in zip(mine, other))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        goal = GOAL_TRAINING if training else GOAL_EVAL
        good = good and middle <= goal
        print(f"| {case} | {'training' if training else 'eval'} | {1000 * statistics.median(mine):.1f} | "
              f"{1000 * statistics.median(other):.1f} | {middle:.2g} ({low:.2g} to {high:.2g}) | ≤ {goal} |", flush=True)
sys.exit(0 if good else 1)
