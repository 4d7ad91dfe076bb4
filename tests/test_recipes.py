"""Every packaged recipe loads and builds, without memory, with the sizes that the papers publish."""

import pytest
import torch

from tokenizers_lab.config import list_recipes, load_config, override_objective
from tokenizers_lab.hub import build_tokenizer
from tokenizers_lab.models.rectok.convert import official_name
from tokenizers_lab.models.rectok.objective import RecTokObjective
from tokenizers_lab.training.optim import build_optimizer, discriminator_learning_rate, learning_rate

# parameters by part; RecTok's encoder and decoder make the published 172 M, LM-SPT's parts the 74,652,220 of its checkpoint
DM_CODEC = {"encoder": 67_705_856, "decoder": 35_182_530}
LM_SPT = {"semantic_encoder": 16_238_144, "acoustic_encoder": 16_238_144, "quantizer": 508_032, "decoder": 40_446_770,
          "aux_decoder": 1_221_130}
UNIFLOW = {"encoder": 304_012_288, "project": 1_115_200, "conditioner": 78_790_656, "flow": 68_667_980}      # 452,586,124
TADICODEC = {"encoder": 134_349_824, "decoder": 328_516_736, "text_embedding": 32_870_400, "to_code": 14_350, "from_code": 15_360,
             "vocoder": 255_042_434}      # the codec's parts make the 495,766,670 of the authors' classes
XY_TOKENIZER = {      # the 519,621,074 of the released checkpoint
    "semantic_encoder": 87_002_112, "semantic_encoder_adapter": 28_349_952, "acoustic_encoder": 87_002_112,
    "pre_rvq_adapter": 29_530_368, "downsample": 28_317_696, "quantizer": 3_152_896, "post_rvq_adapter": 33_072_384,
    "upsample": 9_437_184, "acoustic_decoder": 87_001_424, "vocoder": 126_754_946}
VFM_VAE = {"encoder": 11_592_960, "decoder": 128_144_914}      # and 38 strengths of the release's fixed noise: 139,737,912
VTP_TEXT = {"text": 123_650_304}      # with the other parts the authors' 731,570,689 (Large), 295,639,297 (Base), 167,177,857
VTP_LARGE = {"trunk": 303_542_528, "decoder": 303_591_424, "contrast": 786_433, **VTP_TEXT}
PUBLISHED = {
    "dm_codec/librispeech16k": DM_CODEC, "dm_codec/librispeech16k-lm": DM_CODEC,
    "lm_spt/librispeech24k": LM_SPT, "lm_spt/emilia24k": LM_SPT,
    "rectok/imagenet256": {"encoder": 86_033_920, "decoder": 85_936_980},
    "rectok/imagenet256-decoder-finetune": {"encoder": 86_033_920, "decoder": 85_936_980},
    "tadicodec/emilia24k": TADICODEC, "tadicodec/vocos-24k": {"vocoder": 255_042_434},
    "uniflow/imagenet-internvit300m": UNIFLOW,
    "xy_tokenizer/emilia16k-stage1": XY_TOKENIZER, "xy_tokenizer/emilia16k-stage2": XY_TOKENIZER,
    "vtp/large": VTP_LARGE, "vtp/decoder-finetune": VTP_LARGE,
    "vtp/base": {"trunk": 85_690_368, "decoder": 85_708_800, "contrast": 589_825, **VTP_TEXT},
    "vtp/small": {"trunk": 21_611_520, "decoder": 21_621_120, "contrast": 294_913, **VTP_TEXT},
    **{f"vfm_vae/imagenet256-{stage}": VFM_VAE for stage in ("strong", "weak", "ssim", "patchgan")},
    # generators, whole, with their position tables; SiT's by its formula, with REG's class token
    "generation/rectok-ditdh-xl": {"": 835_316_436}, "generation/rectok-ditdh-s": {"": 193_587_924},
    "generation/vtp-lightningdit-xl": {"": 675_330_496}, "generation/vtp-lightningdit-b": {"": 130_605_376},
    "generation/vfm_vae-lightningdit-xl": {"": 675_256_736}, "generation/uniflow-lightningdit-xl": {"": 675_330_496},
    "generation/vfm_vae-sit-xl": {"": 676_626_848},
}
OF_OURS = {"lm_spt/librispeech24k-25hz", "lm_spt/librispeech24k-6hz"}      # frame rates without a published configuration
PAPER = [name for name in list_recipes() if "tiny" not in name.partition("/")[2]]


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_builds(name):
    cfg = load_config(name)
    with torch.device("meta"):
        tokenizer = build_tokenizer(cfg.system, cfg.model)
    for part, parameters in PUBLISHED.get(name, {}).items():
        assert count(tokenizer.get_submodule(part)) == parameters
    for stage in cfg.stages:
        override_objective(cfg.objective, stage.objective)
        for part in stage.parts:
            assert part in ("heads", "discriminators") or count(tokenizer.get_submodule(part)) > 0


@pytest.mark.parametrize("name", PAPER)
def test_a_papers_recipe_says_what_to_expect(name):
    from tokenizers_lab.config import find_recipe

    header = [line for line in find_recipe(name).read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    for needed in ("arXiv", "accelerate launch", "Expected:", "Hardware:"):
        assert needed in text, f"{name}: its header does not say {needed}"
    assert name in PUBLISHED or name in OF_OURS, f"{name}: give its published parameter counts"


def test_rectoks_recipe_is_the_papers():
    cfg = load_config("rectok/imagenet256")
    with torch.device("meta"):
        objective = RecTokObjective(cfg.objective, cfg.model, build_frozen=False, teacher_widths={"dinov3": 1024})
        assert count(objective.heads) == 1_606_336
        assert count(objective.discriminators) == 3136 + 131_072 + 524_288 + 2_097_152 + 8193 + 2 * (128 + 256 + 512)
    stage, optimizer = cfg.stages[0], cfg.train.optimizer
    assert (stage.epochs, stage.warmup, stage.starts, cfg.train.batch_size) == (200, 50, {"gan": 100}, 1024)
    assert stage.weights == {"mse": 1, "perceptual": 1, "kl": 1e-6, "semantic": 1, "gan": 0.5}
    assert stage.lr == pytest.approx(1e-4 * cfg.train.batch_size / 256)
    assert (tuple(optimizer.betas), optimizer.eps, optimizer.weight_decay, optimizer.clip) == ((0.9, 0.95), 1e-8, 1e-4, 3.0)
    second = load_config("rectok/imagenet256-decoder-finetune")
    stage = second.stages[0]
    assert (stage.epochs, stage.warmup, stage.starts, stage.parts) == (100, 5, {}, ["decoder"])
    assert stage.lr == pytest.approx(5e-5 * second.train.batch_size / 256)
    assert (second.objective.gamma, second.objective.mask_ratio, second.objective.teachers) == (0, 0, {})
    assert second.model == cfg.model and second.init_from


def test_uniflows_recipe_is_the_papers():
    cfg = load_config("uniflow/imagenet-internvit300m")
    (stage,), model = cfg.stages, cfg.model
    assert (model.image_size, model.patch, model.latent_channels, model.steps, model.encoder.drop_path) == (448, 14, 64, 1, 0.1)
    assert cfg.init_parts == {"encoder": "OpenGVLab/InternViT-300M-448px"}
    assert (cfg.objective.beta, cfg.objective.time.distribution, cfg.objective.time.uniform_share) == (2, "fat_lognorm", 0.1)
    assert stage.weights["flow"] == stage.weights["distill"] and stage.weights.keys() == {"flow", "distill"}
    assert stage.epochs == 30 and 69_000 < stage.epochs * cfg.data.samples / cfg.train.batch_size < 71_000
    with torch.device("meta"):
        tokenizer = build_tokenizer(cfg.system, model)
    named = [(f"tokenizer.{name}", p) for name, p in tokenizer.named_parameters()]
    groups = build_optimizer(named, cfg.train.optimizer, stage.lr_scale).param_groups
    rates = {id(p): round(stage.lr * group["lr_scale"], 9) for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in tokenizer.encoder.parameters()} == {2e-5}
    assert {rates[id(p)] for p in tokenizer.flow.parameters()} == {1e-4}


def test_the_speech_recipes_are_the_papers():
    cfg = load_config("dm_codec/librispeech16k")
    stage, optimizer = cfg.stages[0], cfg.train.optimizer
    assert stage.weights == {"waveform": 500, "mel": 1, "commitment": 10, "distillation": 120, "gan": 1, "feature_matching": 1}
    assert (stage.epochs, stage.lr, stage.warmup, stage.schedule, cfg.train.batch_size) == (10, 1e-4, 0, "cosine", 6)
    assert (tuple(optimizer.betas), optimizer.weight_decay, optimizer.clip) == ((0.9, 0.99), 0, 0)
    assert (cfg.data.segment_seconds, cfg.data.crop, cfg.objective.guidance) == (3, "fixed", "combined")
    assert load_config("dm_codec/librispeech16k-lm").objective.guidance == "lm"
    cfg = load_config("lm_spt/librispeech24k")
    stage, optimizer = cfg.stages[0], cfg.train.optimizer
    assert stage.weights == {"mel": 15, "gan": 1, "feature_matching": 2, "acoustic_codebook": 1, "acoustic_commitment": 0.25,
                             "distill": 500, "semantic_commitment": 0.25, "semantic_codebook": 1}
    assert (tuple(optimizer.betas), optimizer.weight_decay, optimizer.clip) == ((0.8, 0.9), 0.01, 1) and optimizer.decay_vectors
    assert round(stage.warmup * cfg.data.samples / cfg.train.batch_size) == 100
    rates = [discriminator_learning_rate(stage, done, stage.epochs) for done in (0.0, 10.0, 20.0)]
    assert rates == [1e-3] * 3
    assert learning_rate(stage, stage.lr, stage.epochs, stage.epochs) == pytest.approx(5e-5)
    cfg = load_config("tadicodec/emilia24k")
    stage, optimizer = cfg.stages[0], cfg.train.optimizer
    assert (stage.steps, stage.lr, stage.warmup, stage.schedule) == (800_000, 7.5e-5, 32_000, "inverse_sqrt")
    assert stage.weights == {"flow": 1, "entropy": 1} and "vocoder" not in stage.parts
    assert learning_rate(stage, stage.lr, 128_000, stage.steps) == pytest.approx(stage.lr / 2)
    assert (tuple(optimizer.betas), optimizer.weight_decay, optimizer.clip) == ((0.9, 0.999), 0.01, 0.5)
    assert optimizer.decay_vectors and (cfg.data.batch_frames, cfg.data.max_seconds, cfg.train.batch_size) == (10_000, 40, 320)
    assert (cfg.objective.prompt_drop, cfg.objective.condition_drop, cfg.objective.text_drop) == (0.2, 0.2, 0)
    for name, hop in (("librispeech24k", 1920), ("librispeech24k-25hz", 960), ("librispeech24k-6hz", 3840)):
        model = load_config(f"lm_spt/{name}").model
        with torch.device("meta"):
            assert build_tokenizer("lm_spt", model).hop == hop


def test_rectok_decays_exactly_the_tensors_that_the_authors_decay():
    cfg = load_config("rectok/imagenet256")
    with torch.device("meta"):
        tokenizer = build_tokenizer(cfg.system, cfg.model)
        heads = RecTokObjective(cfg.objective, cfg.model, build_frozen=False, teacher_widths={"dinov3": 1024}).heads
    parts = {"tokenizer": tokenizer, "heads": heads}
    named = [(f"{part}.{n}", p) for part, module in parts.items() for n, p in module.named_parameters()]
    groups = build_optimizer(named, cfg.train.optimizer).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    words = ("ln", "bias", "embedding", "norm", "gamma", "embed", "token", "diffloss")
    for name, parameter in named:
        official = official_name(name.split(".", 1)[1])
        expected = parameter.dim() >= 2 and not any(word in official for word in words)
        assert (id(parameter) in decayed) == expected, official
