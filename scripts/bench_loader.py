"""The training loader against bare decoding in as many processes: python scripts/bench_loader.py [FOLDER]

Bare decoding is the least that any loader must do: open, convert, crop and scale with Pillow, stack, and make floats, in
torch's own DataLoader. Both give batches of the same pixels (checked). Each block starts its processes anew and is timed
once their queues have settled; blocks alternate. Without FOLDER, JPEGs of ImageNet's usual size are made from the sample
photographs. Goal: at least 0.95 of bare decoding's speed.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from tokenizers_lab.data.decode import read_image
from tokenizers_lab.data.loader import build_loader
from tokenizers_lab.data.sources import sample_path
from tokenizers_lab.data.transforms import fit_image
from tokenizers_lab.eval.provenance import environment
from tokenizers_lab.settings import ImageDataConfig

BATCH, SIZE = 16, 256
WORKERS = max(1, min(8, (os.cpu_count() or 2) - 1))      # one core for the consumer
SETTLE = 2 * WORKERS + 1      # batches that are taken before a block is timed
TIMED = 12                    # batches of a block
PAIRS = 5                     # blocks of each side
IMAGES, MADE_SIZE, QUALITY = 128, (500, 375), 90         # of the folder that is made

made = tempfile.TemporaryDirectory()
folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(made.name)
if len(sys.argv) == 1:
    photos = sorted(sample_path("photos", "train").iterdir())
    for i in range(IMAGES):
        photo = read_image(photos[i % len(photos)]).resize(MADE_SIZE, Image.Resampling.BICUBIC)
        photo.save(folder / f"{i:04d}.jpg", quality=QUALITY)
files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
cfg = ImageDataConfig(train=str(folder), size=SIZE, crop="center", flip=False, workers=WORKERS)


class Bare(Dataset):
    """Batch n of the files, in a fixed order, as uint8 (B, 3, H, W)."""

    def __len__(self):
        return 10**6

    def __getitem__(self, n):
        pixels = np.empty((BATCH, 3, SIZE, SIZE), np.uint8)
        for i in range(BATCH):
            with Image.open(files[(n * BATCH + i) % len(files)]) as image:
                pixels[i] = np.asarray(fit_image(image.convert("RGB"), SIZE)).transpose(2, 0, 1)
        return torch.from_numpy(pixels)


def bare():
    """Float batches in [0, 1], for ever."""
    loader = DataLoader(Bare(), batch_size=None, num_workers=WORKERS, prefetch_factor=2, pin_memory=torch.cuda.is_available())
    for pixels in loader:
        yield pixels.float().div_(255)


def ours():
    """The same of our loader."""
    for batch, _ in build_loader(cfg, BATCH, seed=0):
        yield batch.images


def seconds(batches):
    """Wall time of the timed batches of a fresh loader."""
    for _ in range(SETTLE):
        next(batches)
    began = time.perf_counter()
    for _ in range(TIMED):
        next(batches)
    took = time.perf_counter() - began
    batches.close()
    return took


# --- the same pixels: every image of our first batch is one of the bare ones ---------------------------------------------------
wanted = {np.asarray(fit_image(read_image(f), SIZE)).tobytes() for f in files}
first = (next(ours()) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
assert all(image.numpy().tobytes() in wanted for image in first), "the loader does not give the pixels of bare decoding"

times = [(seconds(ours()), seconds(bare())) for _ in range(PAIRS)]
images = BATCH * TIMED
ratios = [b / a for a, b in times]
low, _, high = statistics.quantiles(ratios)
our_speed, bare_speed = (images / statistics.median(side) for side in zip(*times))
table = Table("images a second, median", "ours", "bare decoding", "ratio (median)", "quartiles")
table.add_row(f"{len(files)} files, {SIZE} px", f"{our_speed:.0f}", f"{bare_speed:.0f}", f"{statistics.median(ratios):.3f}",
              f"{low:.3f} to {high:.3f}")
Console(width=None if sys.stdout.isatty() else 120).print(table)
print(f"{WORKERS} workers, batch {BATCH}; {PAIRS} blocks of {images} images each")
machine = environment()
print(f"{machine['processor']}, {machine['cpu_count']} cores, torch {torch.__version__}; goal: at least 0.95")
