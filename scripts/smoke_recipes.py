"""One optimiser step of every stage of the papers' recipes, at full size with batch 1: its time and its peak memory.

python scripts/smoke_recipes.py [RECIPE …]        without names, every packaged recipe but the tiny ones

Each recipe has a process of its own, so that one that the machine cannot hold is reported, and the others still run.
Networks whose weights are not here are replaced by random ones of the same size, and the table says so: time and memory
are those of the real ones. Images and sounds are noise, but for VTP, which learns from sample photographs with captions. On a CPU
the step is float32, whatever the recipe's precision.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MINUTES = 15          # after which a recipe is given up
# transformers' configs of the teachers that the recipes name
TEACHERS = {
    "facebook/dinov3-vitl16-pretrain-lvd1689m": {
        "model_type": "dinov3_vit", "hidden_size": "1024", "intermediate_size": "4096", "num_hidden_layers": "24",
        "num_attention_heads": "16", "num_register_tokens": "4", "patch_size": "16",
    },
    "openai/whisper-large-v3": {
        "d_model": "1280", "encoder_layers": "32", "encoder_attention_heads": "20", "encoder_ffn_dim": "5120",
        "num_mel_bins": "128",
    },
    "vit_small_patch16_224.dino": {
        "model_type": "dinov2", "hidden_size": "384", "num_hidden_layers": "12", "num_attention_heads": "6", "patch_size": "16",
        "image_size": "224",      # as large, but for its layer scales
    },
}
CLASSIFIERS = {"convnext-small": "convnext_small", "lpips-vgg16": "vgg16", "lpips-alexnet": "alexnet"}      # torchvision's names


def main(names):
    """A process for each recipe; print the table."""
    from rich.console import Console
    from rich.table import Table

    from tokenizers_lab.config import list_recipes
    from tokenizers_lab.eval.provenance import environment

    table = Table("recipe", "stage", "trained", "one step", "peak memory", "loss", "stand-ins")
    for name in names or [r for r in list_recipes() if "tiny" not in r]:
        command = [sys.executable, str(Path(__file__)), "--child", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
        except subprocess.TimeoutExpired:
            table.add_row(name, "", "", f"more than {MINUTES} minutes")
            continue
        if done.returncode == 0:
            for row in json.loads(done.stdout.splitlines()[-1]):
                table.add_row(name, *row)
        elif done.returncode == -signal.SIGKILL:
            table.add_row(name, "", "", "no", "more than this machine has (killed)")
        else:
            table.add_row(name, "", "", "no: " + (done.stderr.strip().splitlines() or ["no message"])[-1])
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    machine = environment("cuda" if has_cuda() else "cpu")
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    print(f"batch 1; {machine['processor']}, {machine['cpu_count']} cores, {machine['threads']} threads, {gib:.0f} GiB of memory")


def child(name):
    """One step of each stage of a recipe; prints the rows as JSON."""
    import torch
    from accelerate import Accelerator

    from tokenizers_lab.config import load_config, override_objective
    from tokenizers_lab.draw import Draw
    from tokenizers_lab.training.objective import ADVERSARIAL
    from tokenizers_lab.training.optim import build_optimizer, set_learning_rate, update_ema
    from tokenizers_lab.training.run import Adversary, GeneratorStep, build_networks

    device = torch.device("cuda" if has_cuda() else "cpu")
    cfg = load_config(name, ["init_from=null", "train.accumulate=1"])
    missing = [*replace_missing(cfg.objective), *(f"random {source.split('/')[-1]}" for source in cfg.init_parts.values())]
    cfg.init_parts = {}
    missing += replace_missing_texts(cfg.model)
    nets = build_networks(cfg, device)
    batch = (captioned(cfg) if getattr(cfg.data, "texts", False) else noise(cfg)).to(device)
    rows = []
    for number, stage in enumerate(cfg.stages):
        nets.objective.cfg = override_objective(cfg.objective, stage.objective)
        nets.select(stage.parts)
        nets.tokenizer.train()
        nets.objective.train()
        nets.objective.begin_stage(nets.tokenizer, stage)
        generator = GeneratorStep(nets.tokenizer, nets.objective)
        optimizer, rival = build_optimizer(generator.named_parameters(), cfg.train.optimizer), None
        set_learning_rate(optimizer, stage.lr)
        if ADVERSARIAL & stage.weights.keys():
            nets.objective.discriminators.requires_grad_(True)
            rival = Adversary(nets.objective, cfg.train, Accelerator(cpu=not has_cuda()), lambda finite: finite)
            set_learning_rate(rival.optimizer, stage.lr)

        began = time.perf_counter()
        half = device.type == "cuda" and cfg.train.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            judge = rival.judge if rival is not None and rival.first else None
            losses = generator(batch, Draw(0, step=number, device=device), frozenset(stage.weights), judge)      # every term
            loss = sum(stage.weights[term] * value for term, value in losses.terms.items())
        loss.backward()
        if rival is not None and not rival.first:
            rival.judge(losses.real, losses.fake)
        trained = [p for p in generator.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, cfg.train.optimizer.clip or float("inf"))
        assert bool(loss.isfinite()) and bool(norm.isfinite()), "the loss or the gradient is not finite"
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rival is not None:
            rival.update()
            rival.begin()
        update_ema(nets.ema, nets.tokenizer, cfg.train.ema)
        nets.objective.after_step(nets.tokenizer)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        count = sum(p.numel() for p in trained) / 1e6
        rows.append((stage.name, f"{count:.1f} M", f"{seconds:.2f} s", peak_memory(), f"{loss.item():.4f}", ", ".join(missing)))
    print(json.dumps(rows))


def noise(cfg):
    """A batch of one image or segment of noise, with features of teachers that are precomputed."""
    import torch

    from tokenizers_lab.data.batch import ImageBatch, SpeechBatch
    from tokenizers_lab.settings import ImageDataConfig

    generator = torch.Generator().manual_seed(0)
    if isinstance(cfg.data, ImageDataConfig):
        return ImageBatch(torch.rand(1, 3, cfg.data.size, cfg.data.size, generator=generator), ["noise"])
    seconds, rates = cfg.data.segment_seconds, (cfg.data.sample_rate, cfg.data.teacher_rate)
    audio, teacher_audio = (
        None if rate is None else torch.rand(1, 1, round(seconds * rate), generator=generator) - 0.5 for rate in rates)
    lengths, unknown = torch.tensor([audio.shape[2]]), [None]
    width = getattr(cfg.objective, "teacher_width", 0)
    features = {name: torch.randn(1, round(seconds * 50), width, generator=generator) for name in ("sm", "lm") if width}
    return SpeechBatch(audio, lengths, ["noise"], unknown, unknown, unknown, torch.zeros(1, dtype=torch.int64), teacher_audio,
                       features)


def captioned(cfg):
    """A batch of one sample photograph with a caption, as the loader gives it of a manifest of such pairs."""
    import tempfile

    from tokenizers_lab import data
    from tokenizers_lab.data.loader import build_loader
    from tokenizers_lab.data.manifest import Row, write_manifest

    photos = sorted((Path(data.__file__).parent / "samples/photos/train").glob("*.jpg"))[:4]
    with tempfile.TemporaryDirectory() as folder:
        for photo in photos:
            shutil.copy(photo, folder)
        rows = [Row(p.name, f"a photograph of {p.stem.rstrip('-0123456789').replace('-', ' ')}") for p in photos]
        write_manifest(Path(folder) / "manifest.jsonl", rows)
        cfg.data.train, cfg.data.workers = folder, 0
        batch, _ = next(iter(build_loader(cfg.data, 1, cfg.train.seed, 0, 1)))
    return batch


def replace_missing_texts(model):
    """Bytes in place of CLIP's byte pairs where their file is not here: the table is as large, other rows of it are read."""
    from tokenizers_lab.clip_bpe import clip_encoder
    from tokenizers_lab.errors import WeightsMissing
    from tokenizers_lab.text import CLIP

    texts = getattr(getattr(model, "text", None), "text", None)
    if texts is None or texts.tokenizer != CLIP:
        return []
    try:
        clip_encoder()
    except WeightsMissing:
        texts.tokenizer = "bytes"
        return ["bytes for CLIP's byte pairs"]
    return []


def replace_missing(objective):
    """Let networks whose weights are nowhere have random ones of their size; returns their names. Nothing is fetched.

    Teachers whose features can come with the data (a backend `none`) are left out: their features are noise then.
    """
    import torchvision

    from tokenizers_lab.errors import WeightsMissing
    from tokenizers_lab.losses import perceptual
    from tokenizers_lab.teachers.networks import load_network, local_folder

    os.environ["TOKENIZERS_LAB_OFFLINE"] = "1"
    missing = []
    for name in ("speech_teacher", "language_teacher", "recognizer"):
        if hasattr(objective, name):
            missing.append(f"features for {getattr(objective, name).source}")
            getattr(objective, name).backend = "none"
    for teacher in [*getattr(objective, "teachers", {}).values(), *filter(None, [getattr(objective, "teacher", None)])]:
        try:
            local_folder(teacher.source)
        except WeightsMissing:
            if teacher.backend != "transformers" or teacher.source not in TEACHERS:
                raise
            missing.append(f"random {teacher.source.split('/')[-1]}")
            teacher.backend, teacher.config = "random", TEACHERS[teacher.source]
    judge = getattr(objective, "judge", None)
    if judge is not None:
        try:
            load_network(judge.backend, judge.source, dict(judge.config))
        except WeightsMissing:
            missing.append(f"random {judge.source}")
            judge.backend, judge.config = "random", TEACHERS[judge.source]
    find_state_dict = perceptual.find_state_dict

    def find_or_random(name, path=None):
        try:
            return find_state_dict(name, path)
        except WeightsMissing:
            missing.append(f"random {name}")
            return getattr(torchvision.models, CLASSIFIERS[name])(weights=None).state_dict(), "random weights"

    perceptual.find_state_dict = find_or_random
    return missing


def has_cuda():
    import torch

    return torch.cuda.is_available()


def peak_memory():
    """Of the GPU's tensors, or else of the whole process, so far."""
    import torch

    peak = torch.cuda.max_memory_allocated() if has_cuda() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"{peak / 2**30:.1f} GiB"


if sys.argv[1:2] == ["--child"]:
    child(sys.argv[2])
else:
    main(sys.argv[1:])
