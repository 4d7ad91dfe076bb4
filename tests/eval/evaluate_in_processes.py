"""Evaluates the toy on one process's share of the pictures: RANK WORLD STORE RESULT; the first process writes the result."""

import sys
from pathlib import Path

import torch
from toy import Toy, ToyConfig, batches, pictures

from tokenizers_lab.eval.images import evaluate_images
from tokenizers_lab.eval.latents import collect_latent_stats, latent_statistics
from tokenizers_lab.eval.provenance import write_json

torch.set_num_threads(1)
rank, world = map(int, sys.argv[1:3])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
share = batches(pictures(7), 1)[rank::world]
torch.manual_seed(0)
tokenizer = Toy(ToyConfig()).fit(pictures(16))
result = evaluate_images(tokenizer, share, ("psnr",))      # SSIM imports torchmetrics, for seconds
result["latents"], _ = latent_statistics(tokenizer, share)
result["collected"] = [values.tolist() for values in collect_latent_stats(tokenizer, share)]
if rank == 0:
    write_json(result, Path(sys.argv[4]))
torch.distributed.destroy_process_group()
