"""Every packaged recipe loads and builds, without memory, with the sizes that the papers publish."""

import pytest
import torch

from tokenizers_lab.config import list_recipes, load_config, override_objective
from tokenizers_lab.hub import build_tokenizer
from tokenizers_lab.models.rectok.convert import official_name
from tokenizers_lab.models.rectok.objective import RecTokObjective
from tokenizers_lab.training.optim import build_optimizer

# parameters by part; encoder and decoder make the published 172 M
PUBLISHED = {
    "rectok/imagenet256": {"encoder": 86_033_920, "decoder": 85_936_980},
    "rectok/imagenet256-decoder-finetune": {"encoder": 86_033_920, "decoder": 85_936_980},
}
PAPER = [name for name in list_recipes() if not name.endswith("/tiny")]


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
    assert name in PUBLISHED, f"{name}: give its published parameter counts"


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
