"""Computes every tensor of a TaDiCodec parity folder, by the functions that train and infer."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenizers_lab.diffusion.flow import FlowPath
from tokenizers_lab.diffusion.mel_flow import sinusoidal
from tokenizers_lab.network import load_weights, read_weights
from tokenizers_lab.nn.mel import vocoder_filters, vocoder_log_mel, vocoder_mel
from tokenizers_lab.nn.rope import rotary_table
from tokenizers_lab.parity import GivenDraw
from tokenizers_lab.quantizers.bsq import BinaryQuantizer, mean_distribution
from tokenizers_lab.settings import OptimizerConfig, StageConfig
from tokenizers_lab.training.objective import weighted_sum
from tokenizers_lab.training.optim import build_optimizer, learning_rate, set_learning_rate

from .config import ModelConfig, ObjectiveConfig
from .convert import VOCODER, from_official, official_name
from .model import TaDiCodec
from .objective import TaDiCodecObjective
from .parity_vocoder import vocoder_tensors

STEPS = ("train", "train_drop")      # two steps of training, with other draws
PEAK, WARMUP = 7.5e-5, 32_000        # of the paper's schedule
BSQ_DEFAULTS = {"beta": 0.0, "gamma0": 1.0, "gamma": 1.0, "zeta": 1.0, "group_size": 1, "inv_temperature": 1.0}


@dataclass
class GivenText:
    """Stands for the text tokenizer: the folder's ids, whatever is said."""

    ids: Tensor
    lengths: Tensor

    def encode(self, texts: list[str | None]) -> tuple[Tensor, Tensor]:
        """The given ids of the last so many items, without the columns that pad them all."""
        longest = int(self.lengths.max()) if len(texts) == len(self.ids) else int(self.lengths[-len(texts) :].max())
        return self.ids[-len(texts) :, :longest], self.lengths[-len(texts) :]


def compute(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of the folder's io.safetensors, by name; `given` are its inputs."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(folder, config)
    if tokenizer.cfg.text_condition:
        tokenizer.text_tokenizer = GivenText(given["text_ids"], given["text_mask"].sum(1))      # type: ignore[assignment]
    cfg, frames = tokenizer.cfg, given["wav_lengths"] // tokenizer.cfg.mel.hop
    mel = vocoder_mel(given["wav"], cfg.mel, cfg.sample_rate).transpose(1, 2)
    mask = torch.arange(mel.shape[1]) < frames[:, None]
    with torch.no_grad():
        result = front_end(cfg, given["wav"]) | {"mel": mel, "x_mask": mask.long(), "mel_lengths": frames}
        result |= encoder_tensors(tokenizer, mel, mask)
        result |= decoder_tensors(tokenizer, given, mask, result["encode.vq_emb"])
        result |= sampling_tensors(tokenizer, given, config["sampling"], mel, result["encode.indices"])
    options = {"bsq": {**BSQ_DEFAULTS, "embed_dim": cfg.bits}, "bsq_opt": {**BSQ_DEFAULTS, **config.get("bsq_opt", {})}}
    for name in (name for name in options if f"{name}.z" in given):
        result |= {f"{name}.{k}": v for k, v in quantizer_tensors(name, options[name], given).items()}
    result["bsq.codebook"] = tokenizer.quantizer.decode(torch.arange(tokenizer.codebook_size)[None, None])[0].T
    result |= schedule(given["schedule.steps"])
    result |= training(tokenizer, given, config)
    result |= vocoder_tensors(
        folder, config, given, lambda audio: vocoder_mel(audio[:, 0], cfg.mel, cfg.sample_rate), result["sample.guided"])
    return {name: value.detach() for name, value in result.items()}


def load_tokenizer(folder: Path, config: dict[str, Any]) -> TaDiCodec:
    """The tokenizer of the authors' weights and config, in eval mode."""
    voice = {VOCODER + k: v for k, v in read_weights(folder / "vocoder.safetensors").items()}
    converted = from_official(read_weights(folder / "weights.safetensors") | voice, config)
    tokenizer = TaDiCodec(converted.model)
    load_weights(tokenizer, converted.tokenizer, "weights.safetensors")
    return tokenizer.eval()


def front_end(cfg: ModelConfig, audio: Tensor) -> dict[str, Tensor]:
    """The mel front end; audio (B, L)."""
    mel = cfg.mel
    filters = vocoder_filters(cfg.sample_rate, mel.n_fft, mel.bands, mel.low, mel.high)      # (bins, bands)
    return {
        "mel.filterbank_row_sum": filters.sum(0), "mel.filterbank_row_argmax": filters.argmax(0),
        "mel.log": vocoder_log_mel(audio, mel, cfg.sample_rate).transpose(1, 2),
    }


def encoder_tensors(tokenizer: TaDiCodec, mel: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What leaves the encoder's layers and the quantizer, of the padded batch and of its last item alone."""
    result: dict[str, Tensor] = {}
    alone = mel[-1:, : int(mask[-1].sum())]
    for name, part, seen in (("encode.", mel, mask), ("encode.last_alone_", alone, None)):
        with watched(*tokenizer.encoder.tower.layers, tokenizer.encoder.tower.norm, tokenizer.to_code) as calls:
            z = tokenizer.analyse(part, seen)
        codes = tokenizer.quantizer.encode(z)
        found = {"hidden": calls[-2].output, "indices": codes[:, 0],
                 "vq_emb": tokenizer.quantizer.quantize(z).quantized.transpose(1, 2)}
        if seen is not None:
            found |= {"down": calls[-1].given[0], "z": z.transpose(1, 2),
                      "index2vq": tokenizer.quantizer.decode(codes).transpose(1, 2), **hidden_states(calls[:-1])}
        result |= {name + k: v for k, v in found.items()}
    return result


def decoder_tensors(tokenizer: TaDiCodec, given: Mapping[str, Tensor], mask: Tensor, quantized: Tensor) -> dict[str, Tensor]:
    """The decoder at a given point: its inputs' embeddings, its layers, its velocity; of the batch and of its last item alone."""
    decoder, (x, time, condition) = tokenizer.decoder, (given[f"probe.{name}"] for name in ("xt", "t", "cond"))
    text, alone, frames = tokenizer.read([""] * len(x)), tokenizer.read([""]), int(mask[-1].sum())
    with watched(*decoder.tower.layers, decoder.tower.norm) as calls:
        flow = decoder(x, time, condition, mask, text_padding_counts=True, **text)
    cos, sin = rotary_table(torch.arange(12), decoder.tower.head_dim).chunk(2, dim=-1)
    embedded = decoder.embed_time(time)
    plain, adaptive = (tower.layers[0].get_submodule("attention_norm") for tower in (tokenizer.encoder.tower, decoder.tower))
    result = {
        "probe.flow": flow, "probe.cond_mlp": decoder.condition_mlp(condition),
        "probe.flow_last_alone": decoder(
            x[-1:, :frames], time[-1:], condition[-1:, :frames], text_padding_counts=True, **alone),
        "probe.flow_no_text": decoder(x, time, torch.zeros_like(condition), mask),
        "probe.upsampled": tokenizer.condition(quantized.transpose(1, 2), x.shape[1]),
        "time.sinusoidal": sinusoidal(time, tokenizer.cfg.width), "time.embedding": embedded,
        "rope.cos": cos, "rope.sin": sin,
        "norm.plain_out": plain(condition), "norm.adaptive_out": adaptive(condition, embedded),
    }
    result |= {f"probe.{name}": state[:, -x.shape[1] :] for name, state in hidden_states(calls).items()}
    if decoder.text_mlp is not None:
        result |= {"probe.text_embedding": text["text"], "probe.text_prefix": decoder.text_mlp(text["text"])}
    return result


def sampling_tensors(
    tokenizer: TaDiCodec, given: Mapping[str, Tensor], options: Mapping[str, Any], mel: Tensor, codes: Tensor
) -> dict[str, Tensor]:
    """What the flow makes of noise, in all the folder's ways."""
    condition = tokenizer.condition(tokenizer.quantizer.decode(given["sample.indices"][:, None]))
    prompt, noise, text = given["sample.prompt_mel"], given["sample.rand_noise"], tokenizer.read([""] * len(condition))
    usual: dict[str, Any] = {
        "condition": condition, "noise": noise, "prompt": prompt, "text": text, "steps": options["n_timesteps"],
        "guidance": options["cfg"], "rescale": options["rescale_cfg"], "batch_as_released": True,
    }

    def sample(**changes: Any) -> Tensor:
        return tokenizer.sample(**{**usual, **changes})

    first = {k: v[:1] for k, v in text.items()}
    masks = torch.cat([given["sample.prompt_mask"], given["sample.x_mask"]], dim=1).bool()
    encoded = tokenizer.condition(tokenizer.quantizer.decode(codes[:, None]))
    with watched(tokenizer.decoder) as calls:
        result = {"sample.cond": condition, "sample.guided": sample()}
    passes = len(calls) // usual["steps"]      # of the decoder, in a step
    flows = [call.output[:, prompt.shape[1] :] for call in calls[:passes]]
    result |= dict(zip(("sample.guided_step0_flow_cond", "sample.guided_step0_flow_uncond"), flows))
    return result | {
        "sample.guided_times": torch.stack([call.given[1][0] for call in calls[::passes]]),
        "sample.guided_no_rescale": sample(rescale=0.0), "sample.no_guidance": sample(guidance=0.0),
        "sample.cfg_1": sample(guidance=1.0), "sample.one_step": sample(steps=1), "sample.masked_batch": sample(mask=masks),
        "sample.no_prompt": sample(prompt=None, noise=given["sample.rand_noise_no_prompt"]),
        "sample.first_alone": sample(condition=condition[:1], noise=noise[:1], prompt=prompt[:1], text=first),
        "reconstruct.mel": sample(condition=encoded, noise=given["reconstruct.rand_noise"], prompt=mel[:, : prompt.shape[1]]),
    }


def quantizer_tensors(name: str, options: Mapping[str, Any], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A quantizer of these options on the folder's vectors: codes, values, losses and gradients."""
    bits, group, heat = options["embed_dim"], options["group_size"], options["inv_temperature"]
    quantizer = BinaryQuantizer(bits, True, group, heat).train()
    z = given[f"{name}.z"].clone().requires_grad_()
    made = quantizer.quantize(z.transpose(1, 2))      # the folder's vectors are on the sphere already
    value, losses = made.quantized.transpose(1, 2), made.losses
    entropy = options["gamma0"] * losses["sample_entropy"] - options["gamma"] * losses["codebook_entropy"]
    loss = options["beta"] * losses["commitment"] + options["zeta"] * entropy / heat
    grad_loss = torch.autograd.grad(loss, z, retain_graph=True)[0]
    straight = torch.autograd.grad((value * given[f"{name}.weight"]).sum(), z)[0]
    grouped = (z > 0).unflatten(-1, (-1, group))
    return {
        "zq": value, "indices": made.codes[:, 0], "loss": loss, "commit_loss": losses["commitment"],
        "persample_entropy": losses["sample_entropy"], "codebook_entropy": losses["codebook_entropy"],
        "grad_loss": grad_loss, "grad_straight_through": straight,
        "group_indices": (grouped * 2 ** torch.arange(group - 1, -1, -1)).sum(-1),
        "avg_prob": mean_distribution((z * (4 * heat * quantizer.level)).flatten(0, 1), group),
    }


def schedule(steps: Tensor) -> dict[str, Tensor]:
    """Learning rates of the paper's recipe at the given steps."""
    stage = StageConfig(name="train", lr=PEAK, warmup=WARMUP, schedule="inverse_sqrt")
    rates = [learning_rate(stage, stage.lr, step, 800_000) for step in steps.tolist()]
    return {"schedule.lr": torch.tensor(rates, dtype=torch.float64)}


# --- training ---------------------------------------------------------------------------------------------------------------

def training(tokenizer: TaDiCodec, given: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Two steps of training with their gradients, then the update of the first."""
    options = config["tadicodec"]
    cfg = ObjectiveConfig(
        prompt_drop=options["context_drop_p"], condition_drop=options["cond_drop_p"], batch_as_released=True)
    objective = TaDiCodecObjective(cfg, tokenizer.cfg)
    objective.train()
    tokenizer.train()
    batch = SimpleNamespace(audio=given["wav"][:, None], lengths=given["wav_lengths"], texts=[""] * len(given["wav"]))
    result: dict[str, Tensor] = {}
    for name in reversed(STEPS):      # the first is updated, so it comes last
        draws = {"time": "rand_t", "noise": "rand_noise", "context": "rand_context_u", "prompt_length": "rand_prompt_len",
                 "condition": "rand_cond_u"}
        draw = GivenDraw(given, {purpose: (f"{name}.{tensor}",) for purpose, tensor in draws.items()})
        tokenizer.zero_grad()
        result |= {f"{name}.{k}": v for k, v in one_step(tokenizer, objective, batch, draw).items()}
    return result | update(tokenizer, config["step"], result)


def one_step(tokenizer: TaDiCodec, objective: TaDiCodecObjective, batch: Any, draw: GivenDraw) -> dict[str, Tensor]:
    """Losses, their gradients and everything on the way to them."""
    coded = objective.code(tokenizer, batch)
    flow = objective.flow(tokenizer, coded, batch.texts, draw)
    losses = objective.codec_losses(coded, flow, frozenset({"flow", "entropy", "commitment"}))
    terms, parts = losses.terms, coded.quantized.losses
    total = weighted_sum(terms, {"flow": 1.0, "entropy": 1.0, "commitment": 0.0})
    encoder = list(tokenizer.encoder.parameters())
    alone = torch.autograd.grad(terms["entropy"], encoder, retain_graph=True)
    total.backward()
    kept = flow.prompt[:, None] > torch.arange(coded.mel.shape[1])
    result = {
        "z": tokenizer.analyse(coded.mel, coded.mask).transpose(1, 2), "vq_emb": coded.quantized.quantized.transpose(1, 2),
        "indices": coded.quantized.codes[:, 0], "cond": flow.condition, "t": flow.time,
        "prompt_len": flow.prompt if bool(flow.prompt.any()) else flow.prompt.float(),
        "xt": flow.x, "target_mask": (~kept)[..., None].float(), "final_mask": flow.counted[..., None].float(),
        "flow_pred": flow.predicted, "flow_target": flow.target,
        "x_pred": FlowPath("data").data_of(flow.x, flow.predicted, flow.time),
        "loss.diff": terms["flow"], "loss.vq": terms["entropy"], "loss.total": total,
        "loss.commit_unweighted": terms["commitment"], "loss.persample_entropy": parts["sample_entropy"],
        "loss.codebook_entropy": parts["codebook_entropy"],
        "grad_norm.encoder_from_vq_loss": torch.nn.utils.get_total_norm(alone),
        "grad_norm.total": gradient_norm(tokenizer),
    }
    names = {"encoder": "encoder", "decoder": "decoder", "to_code": "vq_in_linear", "from_code": "vq_out_linear",
             "text_embedding": "text_emb"}
    return result | {f"grad_norm.{theirs}": gradient_norm(tokenizer.get_submodule(ours))
                     for ours, theirs in names.items() if hasattr(tokenizer, ours)}


def update(tokenizer: TaDiCodec, options: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first step's gradients, and every parameter after one clipped update from zero state, by official name."""
    named = [(name, p) for name, p in tokenizer.named_parameters() if not name.startswith(VOCODER)]
    result = {f"grad.{official_name(name)}": p.grad.clone() for name, p in named if p.grad is not None}
    settings = OptimizerConfig(
        betas=tuple(options["betas"]), eps=options["eps"], weight_decay=options["weight_decay"], decay_vectors=True)
    optimizer = build_optimizer(named, settings)
    set_learning_rate(optimizer, options["lr"])
    result["step.grad_norm_before_clip"] = torch.nn.utils.clip_grad_norm_([p for _, p in named], options["clip_grad_norm"])
    optimizer.step()
    return result | {f"step.{official_name(name)}": p.detach().clone() for name, p in named}


def gradient_norm(module: nn.Module) -> Tensor:
    """L2 norm of the gradients of all parameters; 0 where there are none."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


# --- looking inside ---------------------------------------------------------------------------------------------------------

class Call(NamedTuple):
    """One call of a module."""

    given: tuple[Any, ...]      # its arguments without a name
    output: Tensor


@contextmanager
def watched(*modules: nn.Module) -> Iterator[list[Call]]:
    """Every call of these modules, in order."""
    calls: list[Call] = []
    hooks = [m.register_forward_hook(lambda _, given, output: calls.append(Call(given, output))) for m in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def hidden_states(calls: list[Call]) -> dict[str, Tensor]:
    """Each layer's input and the last norm's output, of calls of the layers and of that norm."""
    states = [call.given[0] for call in calls[:-1]] + [calls[-1].output]
    return {f"hidden_states.{i}": state for i, state in enumerate(states)}
