"""`toklab app`: a page in the browser to play with tokenizers."""

import argparse
from pathlib import Path

from .common import MODEL_HELP, say, show_progress

help = "a page in the browser to try tokenizers on images and sounds"
description = """Serve a page on this machine (Gradio; pip install 'tokenizers-lab[app]'). Drop or record a sound, or drop an
image: the page shows the reconstruction beside the original, the codes or latents as a picture, what they cost, and
metrics; two models side by side. Files of codes or latents, as toklab encode writes them, can be downloaded, and
dropped to be decoded. Without MODEL the newest runs in ./runs are shown. The page fetches nothing from elsewhere;
what was dropped is deleted after --keep-minutes, and in the end. Ctrl-C ends it."""
example = "toklab app runs/rectok-tiny runs/dm_codec-tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, address, limits."""
    parser.add_argument("models", metavar="MODEL", nargs="*", help=f"{MODEL_HELP}; default: the newest runs in ./runs")
    parser.add_argument("--device", default=None, help="cpu, cuda, mps; default: a GPU if there is one")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--max-mb", type=float, default=20.0, metavar="N", help="megabytes of a file at most; default: 20")
    parser.add_argument("--max-seconds", type=float, default=60.0, metavar="S", help="seconds of a sound at most; default: 60")
    parser.add_argument("--max-pixels", type=int, default=50_000_000, metavar="N",
                        help="pixels of an image file at most; default: 50000000")
    parser.add_argument("--max-view", type=int, default=1024 * 1024, metavar="N",
                        help="pixels that are encoded at most, after the crop; default: 1048576")
    parser.add_argument("--keep-minutes", type=float, default=60.0, metavar="M",
                        help="how long files that were dropped or made are kept; default: 60")


def run(args: argparse.Namespace) -> int:
    """Load the models and serve until Ctrl-C."""
    from tokenizers_lab.errors import ConfigError

    for name in ("max_mb", "max_seconds", "max_pixels", "max_view", "keep_minutes"):
        if not getattr(args, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name):g}")

    from tokenizers_lab.eval.app.actions import Limits
    from tokenizers_lab.eval.app.loaded import load_models, runs_in
    from tokenizers_lab.eval.app.server import LOOPBACK, check_gradio, check_port, serve

    from .common import device_of

    check_gradio()
    check_port(args.host, args.port)
    names = args.models or runs_in(Path("runs"))
    models = load_models(names, device_of(args), lambda names: show_progress(names, "loading"))
    for model in models:
        size = f"{model.parameters / 1e6:.2f} M parameters"
        say(f"{model.title}: {model.tokenizer.system}, {size}; {model.warning or model.origin}")
    if args.host not in LOOPBACK:
        say(f"anyone who reaches {args.host} can use these models: there is no password")
    limits = Limits(args.max_mb, args.max_seconds, args.max_pixels, args.max_view)
    serve(models, limits, args.host, args.port, args.keep_minutes * 60, announce)
    return 0


def announce(address: str) -> None:
    """Say where the page is, at once, also into a pipe."""
    print(f"open {address} (Ctrl-C ends)", flush=True)
