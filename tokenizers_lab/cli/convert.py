"""`toklab convert`: the authors' weights to our format."""

import argparse
import json
from pathlib import Path
from typing import Any

from .common import say

help = "convert the authors' released weights to our format"
description = """Convert the authors' checkpoint of a system, read as data and never executed, to a folder that every
command takes as a model. A key that is missing, left over or of another shape is an error.
toklab train CONFIG init_from=OUT starts from it."""
example = "toklab convert rectok RecTok.pth rectok-official --heads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """System, file, output."""
    parser.add_argument("system", metavar="SYSTEM", help="which system (toklab list)")
    parser.add_argument("file", metavar="OFFICIAL.pth", help="the authors' checkpoint: a torch file or safetensors")
    parser.add_argument("out", metavar="OUT", help="folder for the converted weights")
    parser.add_argument("--heads", action="store_true", help="also keep what only training needs, such as semantic decoders")
    parser.add_argument("--latent-stats", metavar="FILE", help="generators: the latents' released mean and std, a torch file or "
                        "safetensors")
    parser.add_argument("--official-config", metavar="JSON", help="the authors' constructor arguments, for sizes of your own")


def run(args: argparse.Namespace) -> int:
    """Convert and save."""
    from tokenizers_lab.errors import ConfigError, InputError
    from tokenizers_lab.hub import convert_official, save_official, weights_sha256

    config = None
    if args.official_config:
        try:
            config = json.loads(Path(args.official_config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--official-config {args.official_config} is no readable JSON: {error}") from error
    if Path(args.out).exists() and (not Path(args.out).is_dir() or any(Path(args.out).iterdir())):
        raise InputError(f"{args.out} exists and is not empty: choose another folder")
    converted = convert_official(args.system, args.file, config)
    if args.latent_stats:
        set_statistics(converted.tokenizer, args.latent_stats)
    folder = save_official(converted, Path(args.out), heads=args.heads)
    say(f"{args.system}: {sum(p.numel() for p in converted.tokenizer.parameters()) / 1e6:.2f} M parameters -> {folder}")
    if args.heads:
        say(f"heads: {len(converted.heads)} tensors" + ("" if converted.heads else " (this release has none)"))
    say(f"licence of the release: {converted.tokenizer.provenance['licence']}")
    say(f"SHA-256 {weights_sha256(folder)}")
    return 0


def set_statistics(network: Any, file: str) -> None:
    """Give a generator the statistics that normalise its latents: `mean` and `std` of a file, of one value a channel.

    Raises InputError of another network, CheckpointError on a file that does not hold them.
    """
    from tokenizers_lab.errors import CheckpointError, InputError
    from tokenizers_lab.network import read_weights
    from tokenizers_lab.registry import get_system
    from tokenizers_lab.training.checkpoint import load_torch

    if get_system(network.system).kind != "generator":
        raise InputError(f"--latent-stats is for generators; a {network.system} tokenizer keeps its own (toklab latent-stats)")
    path = Path(file)
    found = read_weights(path) if path.suffix == ".safetensors" else load_torch(path)
    if not isinstance(found, dict) or not {"mean", "std"} <= found.keys():
        raise CheckpointError(f"--latent-stats {file} holds no tensors 'mean' and 'std'")
    network.set_latent_statistics(found["mean"].float().flatten(), found["std"].float().flatten())
