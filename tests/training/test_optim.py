"""Parameter groups: decay by name and shape, learning rates by name."""

import pytest
import torch
from torch import nn

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.settings import OptimizerConfig
from tokenizers_lab.training.optim import build_optimizer, ema_decay, set_learning_rate


def networks():
    return nn.ModuleDict({"encoder": nn.Linear(2, 2), "flow": nn.Linear(2, 2), "frozen": nn.Linear(2, 2).requires_grad_(False)})


def rates(module, optimizer):
    of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in module.named_parameters() if id(p) in of}


def test_a_part_of_a_name_scales_the_rate_and_leaves_the_decay_alone():
    module, cfg = networks(), OptimizerConfig(weight_decay=0.1)
    optimizer = build_optimizer(module.named_parameters(), cfg, {"encoder.weight": 0.5, "encoder": 0.2, "frozen": 3.0})
    set_learning_rate(optimizer, 1e-3)
    assert rates(module, optimizer) == pytest.approx(
        {"encoder.weight": 5e-4, "encoder.bias": 2e-4, "flow.weight": 1e-3, "flow.bias": 1e-3}
    )
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(module["encoder"].weight), id(module["flow"].weight)}
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    sum(p.sum() for p in module.parameters() if p.requires_grad).backward()
    optimizer.step()      # AdamW's first step moves by the rate, apart from decay
    moved = {name: (p - before[name]).abs().max().item() for name, p in module.named_parameters()}
    assert moved["encoder.bias"] == pytest.approx(2e-4, rel=1e-3) and moved["flow.bias"] == pytest.approx(1e-3, rel=1e-3)


def test_without_scales_there_are_the_two_groups_of_old():
    optimizer = build_optimizer(networks().named_parameters(), OptimizerConfig())
    assert [(len(g["params"]), bool(g["weight_decay"])) for g in optimizer.param_groups] == [(2, True), (2, False)]
    set_learning_rate(optimizer, 1e-3)
    assert {g["lr"] for g in optimizer.param_groups} == {1e-3}


def test_a_name_that_fits_nothing_is_refused():
    with pytest.raises(ConfigError, match="no parameter's name contains 'encodr'"):
        build_optimizer(networks().named_parameters(), OptimizerConfig(), {"encodr": 0.2})


def test_a_saved_optimiser_keeps_its_scales():
    module = networks()
    first = build_optimizer(module.named_parameters(), OptimizerConfig(), {"encoder": 0.2})
    second = build_optimizer(module.named_parameters(), OptimizerConfig(), {"encoder": 0.2})
    second.load_state_dict(first.state_dict())
    set_learning_rate(second, torch.tensor(1.0).item())
    assert rates(module, second)["encoder.bias"] == pytest.approx(0.2)


def test_the_average_ramps_up():
    decay = 0.5 ** (1 / 400)      # halved in 400 steps
    assert ema_decay(decay, 0.0, 3) == decay and ema_decay(decay, 0.05, 0) == 0      # at first a copy
    assert ema_decay(decay, 0.05, 2000) == pytest.approx(0.5 ** (1 / 100)) and ema_decay(decay, 0.05, 20) == 0.5
    assert ema_decay(decay, 0.05, 8000) == pytest.approx(decay) and ema_decay(decay, 0.05, 10**9) == decay
    assert ema_decay(0.0, 0.05, 5) == 0
