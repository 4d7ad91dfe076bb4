"""The parts of an LM-SPT parity folder that are checked on their own: data, inference, quantizers, losses, discriminators."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.discriminators.dac import level_peak
from tokenizers_lab.discriminators.mrd import ResolutionDiscriminator
from tokenizers_lab.discriminators.result import Judgement
from tokenizers_lab.losses.adversarial import feature_matching, hinge_discriminator
from tokenizers_lab.network import load_weights, read_weights
from tokenizers_lab.nn.mel import whisper_filters
from tokenizers_lab.nn.resample import resample_julius
from tokenizers_lab.parity import GivenDraw
from tokenizers_lab.quantizers.dual import DualRVQ
from tokenizers_lab.quantizers.factorised import FactorisedRVQ, dropout_levels

from .config import ModelConfig
from .convert import official_names
from .model import LMSPT, Resynthesis
from .objective import LMSPTObjective
from .segments import cut_segment

FRAMES, MEL_FRAMES, TOKENS = 160, 96, 64          # how much of long tensors a folder keeps


@dataclass
class Batch:
    """The training batch."""

    audio: Tensor            # (B, 1, L) at the codec's rate
    teacher_audio: Tensor    # (B, 1, L') at the teacher's rate
    seconds: Tensor          # seconds without padding, of all items together


def segments(given: dict[str, Tensor], config: dict[str, Any], tokenizer: LMSPT, teacher_rate: int) -> Batch:
    """The folder's raw clips, cut where its draws say."""
    rate, seconds = config["data"]["raw_sample_rate"], config["data"]["segment_seconds"]
    starts = given["data.rand_start"].tolist()
    cuts = [cut_segment(given[f"data.raw.{i}"], rate, start, seconds, tokenizer.sample_rate, teacher_rate)
            for i, start in enumerate(starts)]
    audio, heard = (torch.stack([getattr(cut, name) for cut in cuts])[:, None] for name in ("audio", "teacher_audio"))
    return Batch(audio, heard, torch.tensor(sum(cut.seconds for cut in cuts)))


@contextmanager
def watched(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside, outputs of the modules of item 0 are kept, the first frames of each."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: kept.__setitem__(name, output[:1, :, :FRAMES])

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def inference(tokenizer: LMSPT, audio: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encoding and all ways of decoding, in eval mode. The authors' code neither fills the last frame nor the output."""
    encoder = tokenizer.semantic_encoder
    layers: dict[str, nn.Module] = {f"act.semantic_encoder.block.{i}": layer for i, layer in enumerate(encoder)}
    layers["act.semantic_encoder.block.1.block.0"] = next(encoder[1].children())
    for part, decoder in (("decoder", tokenizer.decoder), ("aux_decoder", tokenizer.aux_decoder)):
        layers |= {f"act.{part}.model.{i}": layer for i, layer in enumerate(decoder)}
    result: dict[str, Tensor] = {}
    with watched(layers) as kept:
        codes = encode(tokenizer, audio)
        result |= {"infer.codes": codes.transpose(0, 1), "infer.decode": decode(tokenizer, codes)}
        result["infer.aux_semantic_decode"] = decode(tokenizer, codes[:1], "auxiliary")
        result |= kept
    semantic, acoustic = tokenizer.latents(audio)
    result |= {
        "enc.z_semantic": semantic, "enc.z_acoustic": acoustic,
        "infer.z_q": tokenizer.quantized(codes, "all"), "infer.z_q_semantic": tokenizer.quantized(codes, "semantic"),
        "infer.decode_semantic_only": decode(tokenizer, codes[:1], "semantic"),
        "infer.decode_acoustic_only": decode(tokenizer, codes[:1], "acoustic"),
    }
    result |= {f"infer.decode_{k}_codebooks": decode(tokenizer, codes[:1, :k]) for k in range(1, tokenizer.codebooks)}
    if "infer.codes_given" in given:
        codes = given["infer.codes_given"].transpose(0, 1)
        result |= {"infer.decode_given": decode(tokenizer, codes),
                   "infer.aux_semantic_decode_given": decode(tokenizer, codes, "auxiliary")}
    if "infer.x_odd" in given:
        codes, made = encode(tokenizer, given["infer.x_odd"]), tokenizer(given["infer.x_odd"])
        result |= {"infer.codes_odd": codes.transpose(0, 1), "infer.decode_odd": decode(tokenizer, codes),
                   "infer.forward_odd_x": made.reconstruction, "infer.forward_odd_semantic_x": made.resynthesis}
    return result


def encode(tokenizer: LMSPT, audio: Tensor) -> Tensor:
    """Codes (B, K, T) without padding to whole frames."""
    codes = tokenizer.encode(audio, pad=False).codes
    assert codes is not None
    return codes


def decode(tokenizer: LMSPT, codes: Tensor, decoding: str = "all") -> Tensor:
    """Audio as long as the decoder makes it."""
    return tokenizer.synthesise(tokenizer.quantized(codes, decoding), decoding=decoding)


def variant_quantizer(file: Path, described: dict[str, Any]) -> DualRVQ:
    """The folder's dual quantizer with an FSQ semantic part."""
    own = ModelConfig()
    quantizer = DualRVQ(
        described["input_dim"], described["n_codebooks"], own.semantic_size, own.semantic_dim,
        described["acoustic_codebook_size"], described["acoustic_codebook_dim"], described["semantic_subtraction"],
        described["semantic_quantizer_kwargs"]["levels"])
    state = read_weights(file)
    names = {key: official_names(f"quantizer.{key}", own)[0].removeprefix("quantizer.") for key in quantizer.state_dict()}
    found = {key: state.pop(name) for key, name in names.items() if name in state}
    load_weights(quantizer, found | {"usage_updates": quantizer.usage_updates} | state, file.name)
    return quantizer


def quantizer_tensors(prefix: str, quantizer: DualRVQ, given: dict[str, Tensor], dropout: float) -> dict[str, Tensor]:
    """A dual quantizer on the given latents: eval, training with dropout and gradients, encode, decode."""
    quantizer = deepcopy(quantizer).eval()
    latents = [given[f"q.z_{part}"].clone().requires_grad_() for part in ("semantic", "acoustic")]
    with torch.no_grad():
        made, codes = quantizer(*latents), quantizer.encode(*latents)
        result = {
            "eval.z_q": made.quantized, "eval.acoustic_commit_loss": made.acoustic.losses["commitment"],
            "encode.codes": codes.transpose(0, 1), "decode.z_q": quantizer.decode(codes),
            "decode.z_q_semantic": quantizer.decode_semantic(codes), "decode.z_q_acoustic_only": quantizer.decode_acoustic(codes),
        }
        subtracts, quantizer.subtract = quantizer.subtract, False
        result["no_subtraction.codes"] = quantizer.encode(*latents).transpose(0, 1)
        quantizer.subtract = subtracts
    draw = GivenDraw(given, {"quantizer_dropout": ("q.rand_dropout_acoustic",)})
    used = dropout_levels(draw, "quantizer_dropout", len(latents[0]), quantizer.acoustic.codebooks, dropout)
    made = quantizer.train()(*latents, used)
    gradients = torch.autograd.grad(made.quantized.square().mean(), latents)
    result |= {"train.z_q": made.quantized, "train.codes": made.codes,
               "train.grad_z_semantic": gradients[0], "train.grad_z_acoustic": gradients[1]}
    for name, part in (("semantic", made.semantic), ("acoustic", made.acoustic)):
        result |= {f"train.z_q_{name}": part.quantized, f"train.{name}_commit_loss": part.losses["commitment"],
                   f"train.{name}_codebook_loss": part.losses["codebook"]}
    return {f"{prefix}.{name}": value for name, value in result.items()}


@torch.no_grad()
def usage(quantizer: DualRVQ, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The usage buffers after one and two training forwards."""
    quantizer = deepcopy(quantizer).train()
    semantic, acoustic = given["q.z_semantic"], given["q.z_acoustic"]
    result = {}
    for call, pick in ((1, slice(None)), (2, list(reversed(range(len(semantic))))[:3])):
        quantizer(semantic[pick], acoustic[pick])
        for part in ("semantic", "acoustic"):
            result[f"usage.{part}_after_{call}"] = getattr(quantizer, f"{part}_usage").clone()
            result[f"usage.metric_{part}_after_{call}"] = quantizer.usage()[f"{part}_usage"]
    return result


def forward_tensors(tokenizer: LMSPT, made: Resynthesis, audio: Tensor, draw: GivenDraw, dropout: float) -> dict[str, Tensor]:
    """The training forward and its quantizers' insides."""
    quantizer = tokenizer.quantizer
    semantic, acoustic = tokenizer.latents(audio)
    rest = acoustic - made.quantized.semantic.quantized if quantizer.subtract else acoustic
    levels = quantizer.acoustic.chain(rest)
    first = quantizer.semantic
    projected = first.chain(semantic)[0].projected if isinstance(first, FactorisedRVQ) else first(semantic).projected
    counted = dropout_levels(draw, "quantizer_dropout", len(audio), len(levels), dropout)
    whole = torch.arange(len(audio)) >= int(len(audio) * dropout)           # the authors say one more for items without dropout
    return {
        "train.codes": made.quantized.codes, "train.x": made.reconstruction, "train.semantic_x": made.resynthesis,
        "train.z_q_semantic": made.quantized.semantic.quantized, "train.z_q_acoustic": made.quantized.acoustic.quantized,
        "train.z_e_semantic": projected,
        "train.z_e_acoustic": torch.cat([level.projected for level in levels], dim=1),
        "train.acoustic_commit_per_codebook": torch.stack([level.commitment for level in levels]),
        "train.n_quantizers": torch.where(whole, len(levels) + 1, counted).float(),
    }


@torch.no_grad()
def mel_tensors(objective: LMSPTObjective, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """The mel loss, scale by scale."""
    logs, magnitudes = objective.mel.terms(fake, real)
    result = {"mel.log_terms": logs, "mel.mag_terms": magnitudes}
    for bands, scale in zip(objective.cfg.mel_bands, objective.mel.scales):
        result[f"mel.filters_{bands}"] = scale.get_buffer("filters").T
        result |= {f"mel.mel_{bands}_{name}": scale(x[:1])[:, None] for name, x in (("real", real), ("fake", fake))}
    return result


@torch.no_grad()
def teacher_tensors(objective: LMSPTObjective, made: Resynthesis, batch: Batch) -> dict[str, Tensor]:
    """What the teacher hears, and its features."""
    teacher, fake = objective.teacher, made.reconstruction
    target, heard = teacher.log_mel(batch.teacher_audio.squeeze(1)), objective.hear(made.resynthesis, objective.resynthesis_rate)
    result = {
        "data.input_features_first": target[..., :MEL_FRAMES], "data.input_features_floor": target[:, 0, -1],
        "teacher.mel_filters": whisper_filters(teacher.bands),
        "teacher.mel_pred_first": heard[..., :MEL_FRAMES], "teacher.mel_pred_floor": heard[0, 0, -1],
        "teacher.mel_from_24k_first": objective.hear(fake, objective.rate)[:1, :, :MEL_FRAMES],
        "teacher.loss_from_24k": objective.distill(fake, batch.teacher_audio, objective.rate),
    }
    for name, mel in (("target", target), ("pred", heard)):
        features = teacher.encode(mel)
        result |= {f"teacher.features_{name}_first": features[:, :TOKENS], f"teacher.features_{name}_mean": features.mean(1)}
    whole = objective.cfg
    for name, kind in (("l1", "l1"), ("mse", "l2")):
        objective.cfg = replace(whole, distill_loss=kind)
        result[f"loss.distill_{name}"] = objective.distill(made.resynthesis, batch.teacher_audio)
    objective.cfg = whole
    return result


@torch.no_grad()
def discriminator_tensors(objective: LMSPTObjective, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """The discriminators before their update, member by member."""
    judge: Any = objective.discriminators["dac"]
    reals: list[Judgement] = judge(real)
    fakes: list[Judgement] = judge(fake)
    result = {"disc.preprocessed_real": level_peak(real)[:1]}
    for name, judged in (("real", reals), ("fake", fakes)):
        result |= {f"disc.before.logits_{name}.{i}": j.features[-1] for i, j in enumerate(judged)}
    result |= {f"disc.before.fmap_real.{i}.{k}": m[:1] for i, j in enumerate(reals) for k, m in enumerate(j.features)}
    pairs = list(zip(reals, fakes))
    result |= {
        "disc.before.terms_fake": torch.stack([f.logits.square().mean() for f in fakes]),
        "disc.before.terms_real": torch.stack([(1 - r.logits).square().mean() for r in reals]),
        "disc.before.feature_terms": torch.stack(
            [F.l1_loss(a, b) for r, f in pairs for a, b in zip(f.features[:-1], r.features[:-1])]),
    }
    # switched off in the authors' code: hinge losses, means over the members
    result |= {
        "loss.discriminator_hinge": torch.stack([2 * hinge_discriminator(r.logits, f.logits) for r, f in pairs]).mean(),
        "loss.before.adv_generator_hinge": torch.stack([F.relu(1 - f.logits).mean() for f in fakes]).mean(),
        "loss.before.feature_matching_hinge": torch.stack(
            [feature_matching(r.features[:-1], f.features[:-1]) for r, f in pairs]).mean(),
    }
    last = judge.mrd.discriminators[-1] if len(judge.mrd.discriminators) else None
    if isinstance(last, ResolutionDiscriminator):
        low, high = last.bands[0]
        result["disc.mrd_last_band0_real"] = last.spectrogram(level_peak(real))[:1, :, :16, low:high]
        result |= {f"disc.before.fmap_real.last.{k}": m[:1, :, :8] for k, m in enumerate(reals[-1].features)}
    return result


@torch.no_grad()
def scale_tensors(objective: LMSPTObjective, audio: Tensor) -> dict[str, Tensor]:
    """The scale discriminators alone."""
    judge: Any = objective.discriminators["dac"]
    result: dict[str, Tensor] = {}
    for i, (rate, judged) in enumerate(zip(judge.rates, judge(audio))):
        slower = resample_julius(level_peak(audio), judge.sample_rate, judge.sample_rate // rate)
        result |= {f"msd.logits_real.{i}": judged.features[-1], f"msd.fmap0_real.{i}": judged.features[0][:1, :, :256],
                   f"msd.resampled.{i}": slower[:1]}
    return result
