"""Training runs of seconds that still have every part: real photographs or speech, teachers, GAN, two stages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from pairs import write_shapes

# RecTok: GAN from step 5, stage 2 from step 8 with a fresh discriminator, 12 steps in all
SHORT = [
    "name=short", "train.batch_size=4", "train.log_every=1", "train.checkpoint_every=2", "train.validate_every=4",
    "data.val_limit=3", "data.size=32", "model.image_size=32", "model.encoder.width=32", "model.encoder.depth=1",
    "model.decoder.width=32", "model.decoder.depth=1", "model.latent_channels=4",
    "objective.semantic_decoder.width=32", "objective.semantic_decoder.depth=1", "objective.discriminator_width=8",
    "stages.0.steps=8", "stages.0.warmup=2", "stages.0.starts.gan=5", "stages.1.steps=4", "stages.1.warmup=1",
]
SPEECH = ["name=short", "train.batch_size=4", "train.log_every=1", "train.checkpoint_every=2", "train.validate_every=4",
          "data.val_limit=3", "data.val_seconds=0.5", "data.segment_seconds=0.32"]
DM_CODEC = [
    *SPEECH, "model.filters=4", "model.width=16", "model.codebooks=2", "model.codebook_size=16",
    "stages=[{name: a, steps: 8, lr: 1e-3, weights: {waveform: 500, mel: 1, commitment: 10, distillation: 120, gan: 1, "
    "feature_matching: 1}, starts: {gan: 5, feature_matching: 5}}, {name: b, steps: 4, lr: 1e-3, parts: [decoder], "
    "fresh: [discriminators], weights: {waveform: 500, mel: 1, gan: 1}}]",
]
LM_SPT = [
    *SPEECH, "model.semantic_width=4", "model.acoustic_width=4", "model.decoder_width=32", "model.latent=16",
    "model.auxiliary.width=32", "model.codebooks=3", "objective.teacher_seconds=0.32",
    "stages=[{name: a, steps: 8, lr: 1e-3, discriminator_lr: 1e-3, discriminator_schedule: constant, weights: {mel: 15, gan: 1, "
    "feature_matching: 2, distill: 500, acoustic_codebook: 1, semantic_codebook: 1}, starts: {gan: 5, feature_matching: 5}}, "
    "{name: b, steps: 4, lr: 1e-3, parts: [decoder], fresh: [discriminators], weights: {mel: 15, gan: 1}}]",
]
UNIFLOW = [      # the teacher is copied when stage b begins
    "name=short", "train.batch_size=4", "train.log_every=1", "train.checkpoint_every=2", "train.validate_every=4",
    "data.val_limit=3", "data.size=32", "model.image_size=32", "model.encoder.width=32", "model.encoder.heads=4",
    "model.encoder.hidden=48", "model.encoder.depth=2", "model.width=32", "model.global_heads=4", "model.global_blocks=1",
    "model.flow_blocks=1", "model.latent_channels=4", "model.encoder.drop_path=0.5",
    "stages=[{name: a, steps: 5, lr: 1e-3, weights: {flow: 1, semantic: 1}}, "
    "{name: b, steps: 7, lr: 1e-3, weights: {flow: 1, distill: 1}}]",
]
TADICODEC = [      # whole clips in batches of similar length; the vocoder against its discriminators in stage b
    *(o for o in SPEECH if "segment" not in o), "data.batch_frames=250", "model.width=16", "model.heads=2",
    "model.encoder_layers=1", "model.decoder_layers=1", "model.bits=6", "model.vocoder.kind=vocos", "model.vocoder.width=8",
    "model.vocoder.hidden=16", "model.vocoder.layers=1", "objective.vocoder.enabled=true", "objective.vocoder.periods=[2]",
    "objective.vocoder.period_channels=[2, 2, 2, 2, 2]", "objective.vocoder.spectral_ffts=[128]",
    "objective.vocoder.spectral_channels=[2, 2, 2, 2, 2]",
    "stages=[{name: a, steps: 5, lr: 1e-3, parts: [encoder, to_code, from_code, text_embedding, decoder], weights: {flow: 1, "
    "entropy: 1}}, {name: b, steps: 7, lr: 1e-3, parts: [vocoder], weights: {mel: 10, gan: 2, feature_matching: 2, "
    "spectral_feature_matching: 1}, starts: {gan: 2, feature_matching: 2, spectral_feature_matching: 2}}]",
]
VFM_VAE = [      # both discriminators, and the guard, from the last losses on; half of the decoder in stage b
    "name=short", "train.batch_size=4", "train.log_every=1", "train.checkpoint_every=2", "train.validate_every=4",
    "train.ema_rampup=0.05", "train.guard={jump: 2, terms: [l1], discriminator: 1e4}", "data.val_limit=3", "data.size=32",
    "data.crop_min=0", "data.crop_share=0.5", "model.image_size=32", "model.latent_channels=4", "model.widths=[4, 16]",
    "model.code=16", "model.channel_base=3072", "model.channel_max=24", "model.latent_widths=[24, 16, 16, 8]",
    "model.expansion=2", "objective.lpips=none", "objective.patchgan_width=4", "objective.judge.size=32",
    "stages=[{name: a, steps: 8, lr: 1e-3, weights: {l1: 1, ssim: 1, multiscale: 1, kl: 1e-6, vf: 1, gan: 0.1}, "
    "starts: {gan: 5}, objective: {adaptive: {l1: 1}}}, {name: b, steps: 4, lr: 1e-3, parts: [decoder.synthesis.blocks.3, "
    "decoder.synthesis.blocks.4], objective: {equivariance: false}, weights: {gan: 0.1, patchgan: 0.1, feature_matching: 1}}]",
]
VTP = [      # the teacher and its centres in stage a, the discriminator in stage b
    "name=short", "train.batch_size=4", "train.log_every=1", "train.checkpoint_every=2", "train.validate_every=4",
    "data.size=32", "data.train_size=40", "data.val_limit=3", "model.image_size=32", "model.latent_channels=6",
    *(f"model.{part}.{size}" for part in ("trunk", "decoder") for size in ("width=32", "depth=1", "heads=2")),
    "model.text.width=16", "model.text.depth=1", "model.text.heads=2", "model.text.text.context=16",
    "objective.targets=centring", "objective.lpips=none", "objective.ssl_drop=0.5", "objective.head.prototypes=16",
    "objective.crops.global_size=32", "objective.crops.local_size=16", "objective.crops.local_crops=2",
    "stages=[{name: a, steps: 8, lr: 1e-3, weights: {l1: 1, dino: 1, ibot: 1, koleo: 0.1, contrastive: 1}}, "
    "{name: b, steps: 4, lr: 1e-3, parts: [decoder], weights: {l1: 1, gan: 0.5}, starts: {gan: 1}}]",
]
OPTIONS = {"rectok": SHORT, "dm_codec": DM_CODEC, "lm_spt": LM_SPT, "uniflow": UNIFLOW, "tadicodec": TADICODEC,
           "vfm_vae": VFM_VAE, "vtp": VTP}


class Runner:
    """Runs `toklab train` of a system's tiny recipe, cut short, in processes of its own, as a person does."""

    def __init__(self, out: Path, system: str = "rectok"):
        self.out, self.run, self.system = out, out / f"{system}-short", system
        self.data = []
        if system == "vtp":
            pairs = write_shapes(out / "pairs", 12)
            self.data = [f"data.train={pairs}", f"data.val={pairs}"]

    def start(self, *options: str, processes: int = 1) -> subprocess.Popen:
        launch = [sys.executable, "-m"]
        if processes > 1:
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                      "--master_port", str(20000 + os.getpid() % 20000), "-m"]
        command = [*launch, "tokenizers_lab", "train", f"{self.system}/tiny", *OPTIONS[self.system], *self.data,
                   f"out={self.out}", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True)

    def finish(self, process: subprocess.Popen) -> str:
        output, _ = process.communicate(timeout=300)
        return output

    def train(self, *options: str, processes: int = 1) -> str:
        process = self.start(*options, processes=processes)
        output = self.finish(process)
        assert process.returncode == 0, output
        return output

    def signal_at(self, process: subprocess.Popen, step: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to all processes of the run once `step` was logged."""
        deadline = time.monotonic() + 240
        while self.step() < step:
            assert process.poll() is None, self.finish(process)
            assert time.monotonic() < deadline, "the run did not reach the step"
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before the signal"
        family = [psutil.Process(process.pid)]
        for member in [*family[0].children(recursive=True), *family]:      # torchrun's workers have process groups of their own
            member.send_signal(number)

    def records(self) -> list[dict]:
        file = self.run / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []      # the last line may be half written
        return [json.loads(line) for line in lines if line.endswith("}")]

    def step(self) -> int:
        return max((r["step"] for r in self.records()), default=0)


