"""Time of FID from features against torch-fidelity's, side by side, on the same random features.

python scripts/bench_fid.py                      # 50,000 × 2048 twice, as for a published FID: minutes, 6 GB
python scripts/bench_fid.py --samples 10000
Goal: ratio of times at most 0.8 at a difference of at most 1e-3.
"""

import argparse
import statistics
import sys
import time

import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from tokenizers_lab.eval.fid import frechet_distance
from tokenizers_lab.eval.provenance import environment
from tokenizers_lab.eval.statistics import compute_statistics

RATIO, DIFFERENCE = 0.8, 1e-3

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--samples", type=int, default=50_000, help="samples of each set")
parser.add_argument("--width", type=int, default=2048, help="features of a sample")
parser.add_argument("--repeats", type=int, default=3, help="turns; each measures both, one after the other")
args = parser.parse_args()

# Features like Inception's: non-negative, correlated, of very different variances.
generator = torch.Generator().manual_seed(0)
mix = torch.randn(args.width, args.width, generator=generator) * torch.logspace(-2, 0, args.width) / args.width**0.5
features = [
    (torch.randn(args.samples, args.width, generator=generator) @ mix * scale + 0.3).relu_() for scale in (1.0, 1.1)
]


def ours() -> float:
    """Ours, from features to the distance."""
    return frechet_distance(*[compute_statistics(x) for x in features])


def theirs() -> float:
    """torch-fidelity's own functions, from the same features."""
    moments = [fid_features_to_statistics(x) for x in features]
    return fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]


times: dict[str, list[float]] = {"ours": [], "torch-fidelity": []}
values: dict[str, float] = {}
for turn in range(args.repeats):
    pairs = [("ours", ours), ("torch-fidelity", theirs)]
    for name, function in pairs if turn % 2 == 0 else pairs[::-1]:
        start = time.perf_counter()
        values[name] = function()
        times[name].append(time.perf_counter() - start)

machine = environment()
ratios = [a / b for a, b in zip(times["ours"], times["torch-fidelity"])]
ratio, difference = statistics.median(ratios), abs(values["ours"] - values["torch-fidelity"])
print(f"{machine['processor']}, {machine['threads']} threads; torch {machine['packages']['torch']}, "
      f"numpy {machine['packages']['numpy']}, torch-fidelity {machine['packages']['torch-fidelity']}")
print(f"FID of {args.samples} × {args.width} float32 features against as many, median of {args.repeats} turns\n")
print("| | seconds | value |\n|---|---|---|")
for name, took in times.items():
    print(f"| {name} | {statistics.median(took):.2f} ({min(took):.2f} to {max(took):.2f}) | {values[name]:.9f} |")
print(f"\nratio {ratio:.2f} (turns: {', '.join(f'{r:.2f}' for r in ratios)}; goal ≤ {RATIO}), "
      f"difference {difference:.1e} (goal ≤ {DIFFERENCE})")
sys.exit(0 if ratio <= RATIO and difference <= DIFFERENCE else 1)
