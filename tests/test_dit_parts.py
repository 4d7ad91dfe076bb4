"""Parts of diffusion transformers: modulation, embeddings, tables, first weights, and the line of the learning rate."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tokenizers_lab.errors import ConfigError, InputError
from tokenizers_lab.eval.generation.official import mlp_ratio
from tokenizers_lab.eval.generation.pixels import to_uint8
from tokenizers_lab.nn.dit import (
    DiTBlock,
    FinalLayer,
    FourierTimeEmbedding,
    LabelEmbedding,
    TimeEmbedding,
    check_heads,
    init_dit,
    mlp_hidden,
)
from tokenizers_lab.nn.patch import PatchEmbed, sincos_positions
from tokenizers_lab.nn.rope import apply_paired, integer_table
from tokenizers_lab.settings import StageConfig
from tokenizers_lab.training.optim import learning_rate

KINDS = [("rms_norm", True, True), ("layer_norm", False, True), ("rms_norm", False, False), ("layer_norm", True, False)]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(module, seed=0):
    """Away from the first weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


@pytest.mark.parametrize(("norm", "qk_norm", "shifts"), KINDS)
def test_a_block_is_its_formula(norm, qk_norm, shifts):
    block = moved(DiTBlock(16, 2, 24, norm, qk_norm, swiglu=shifts, shifts=shifts))
    x, condition, rope = drawn(2, 6, 16), drawn(2, 16, seed=1), integer_table(8, 2, 3)

    def normed(module, x):
        if norm == "rms_norm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight
        return F.layer_norm(x, (16,), eps=1e-6)

    def attention(x):
        out = []
        q, k, v = F.linear(x, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, -1)
        for head in (slice(0, 8), slice(8, 16)):
            a, b = (block.attn.q_norm(q[..., head]), block.attn.k_norm(k[..., head]))
            a, b = (apply_paired(t[:, None], rope)[:, 0] for t in (a, b))
            out.append((a @ b.mT / math.sqrt(8)).softmax(-1) @ v[..., head])
        return F.linear(torch.cat(out, -1), block.attn.out.weight, block.attn.out.bias)

    made = F.linear(F.silu(condition), block.modulation.weight, block.modulation.bias)[:, None].chunk(6 if shifts else 4, -1)
    shift1, scale1, gate1, shift2, scale2, gate2 = made if shifts else (0, *made[:2], 0, *made[2:])
    h = x + gate1 * attention(normed(block.norm1, x) * (1 + scale1) + shift1)
    expected = h + gate2 * block.mlp(normed(block.norm2, h) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, condition, rope), expected, atol=1e-5, rtol=1e-5)
    each = condition[:, None].expand(-1, 6, -1)
    torch.testing.assert_close(block(x, each, rope), expected, atol=1e-5, rtol=1e-5)
    other = each.clone()
    other[:, 3] += 1
    changed = (block(x, other, rope) - block(x, each, rope)).abs().amax((0, 2))
    assert changed[3] > 1e-2 and not torch.allclose(block(x, condition), expected, atol=1e-3)      # without rotary positions


def test_first_weights_are_the_identity_and_zero():
    block, final = DiTBlock(16, 2, 24), FinalLayer(16, 5)
    network = nn.ModuleList([block, final, LabelEmbedding(400, 16), TimeEmbedding(16), PatchEmbed(3, 16, 2)])
    init_dit(network)
    x, condition = drawn(2, 6, 16), drawn(2, 16)
    assert torch.equal(block(x, condition), x) and not final(x, condition).any()
    assert not block.attn.qkv.bias.any() and not network[3].mlp[0].bias.any() and not network[4].bias.any()
    assert block.attn.qkv.weight.abs().max() <= math.sqrt(6 / 64)                              # Xavier: √(6 / (in + out))
    assert network[4].weight.abs().max() > 0.9 * math.sqrt(6 / 28) > 0.3                       # over 12 inputs, 16 outputs
    for weight in (network[2].weight, network[3].mlp[0].weight):
        assert 0.018 < weight.std() < 0.022
    plain = nn.ModuleList([DiTBlock(16, 2, 24), TimeEmbedding(16)])
    init_dit(plain, xavier=False)
    assert plain[0].attn.qkv.bias.any() and plain[1].mlp[0].bias.any() and not plain[0].modulation.weight.any()
    assert 0.018 < plain[1].mlp[0].weight.std() < 0.022


def test_time_features():
    time = torch.tensor([0.0, 0.3, 1.0])
    cosine_first = TimeEmbedding(8).features(time)
    assert cosine_first.shape == (3, 256)
    for k in (0, 1, 77, 127):
        angle = 0.3 * 10_000 ** (-k / 128)
        assert cosine_first[1, k] == pytest.approx(math.cos(angle), abs=1e-6)
        assert cosine_first[1, 128 + k] == pytest.approx(math.sin(angle), abs=1e-6)
    fourier = FourierTimeEmbedding(8)
    features, w = fourier.features(time), fourier.frequencies
    assert features.shape == (3, 512) and not w.requires_grad and 0.8 < w.std() < 1.2
    torch.testing.assert_close(features[1, :256], torch.sin(2 * math.pi * 0.3 * w), atol=1e-5, rtol=0)
    torch.testing.assert_close(features[1, 256:], torch.cos(2 * math.pi * 0.3 * w), atol=1e-5, rtol=0)
    assert fourier(time).shape == (3, 8) and "frequencies" in fourier.state_dict()


def test_the_rotary_table_turns_by_row_first_and_the_fixed_table_by_column_first():
    table = integer_table(8, 3, 5).unflatten(0, (3, 5))                 # d/4 = 2 frequencies: 1 and 1/100
    angles = torch.atan2(table[..., 8:], table[..., :8])
    for row, col in ((0, 0), (2, 1), (1, 2)):
        expected = [row, row, row / 100, row / 100, col, col, col / 100, col / 100]
        torch.testing.assert_close(angles[row, col], torch.tensor(expected), atol=1e-6, rtol=0)
    fixed = sincos_positions(3, 8).unflatten(1, (3, 3))[0]
    expected = [math.sin(2), math.sin(2 / 100), math.cos(2), math.cos(2 / 100), math.sin(1), math.sin(1 / 100), math.cos(1),
                math.cos(1 / 100)]
    torch.testing.assert_close(fixed[1, 2], torch.tensor(expected))
    with pytest.raises(ValueError, match="multiple of 4"):
        integer_table(6, 2, 2)


@pytest.mark.parametrize(("width", "hidden"), [(1152, 3072), (2048, 5461), (768, 2048), (384, 1024)])
def test_hidden_channels_and_the_way_back(width, hidden):
    assert mlp_hidden(width, 4.0, True) == hidden and mlp_hidden(width, 4.0, False) == 4 * width
    assert mlp_ratio([(hidden, width)], True) == 4.0


def test_a_ratio_that_is_not_told_is_found():
    for width in (24, 32, 100):
        for ratio in (1.0, 2.5, 3.0, 3.3, 5.7):
            for swiglu in (True, False):
                sizes = [(mlp_hidden(w, ratio, swiglu), w) for w in (width, 3 * width)]
                found = mlp_ratio(sizes, swiglu)
                assert [(mlp_hidden(w, found, swiglu), w) for w in (width, 3 * width)] == sizes
                assert mlp_ratio(sizes, swiglu, told=ratio) == ratio
    with pytest.raises(ConfigError, match="no mlp_ratio"):
        mlp_ratio([(100, 100), (500, 100)], False)


def test_heads_that_do_not_fit():
    check_heads(24, 2, True, "model.")
    for width, heads, rope in ((24, 5, True), (24, 4, True), (6, 1, False)):
        with pytest.raises(ConfigError, match=r"model\.width"):
            check_heads(width, heads, rope, "model.")
    check_heads(24, 4, False, "model.")


def test_three_rules_for_8_bit_images():
    value = torch.tensor([0.0, 0.4999, 0.5, 1.4999, 1.5, 2.5, 2.9, 254.6, 300.0, -20.0]) / 255
    images = value.view(1, 1, 2, 5).expand(1, 3, 2, 5)
    found = {rule: to_uint8(images, rule)[0, 0].flatten().tolist() for rule in ("truncate", "half_up", "nearest")}
    assert found["truncate"] == [0, 0, 0, 1, 1, 2, 2, 254, 255, 0]
    assert found["half_up"] == [0, 0, 1, 1, 2, 3, 3, 255, 255, 0]
    assert found["nearest"] == [0, 0, 0, 1, 2, 2, 3, 255, 255, 0]
    with pytest.raises(ConfigError, match="known: truncate"):
        to_uint8(images, "round")
    for bad in (images[0], images * float("nan"), images.double().int()):
        with pytest.raises(InputError):
            to_uint8(bad, "half_up")


def test_the_learning_rate_falls_along_a_line():
    stage = StageConfig(name="a", epochs=10, lr=1.0, min_lr=0.2, schedule="linear", decay_from=2.0, decay_until=6.0)
    rates = [learning_rate(stage, 1.0, done, 10) for done in (0, 2, 3, 4, 6, 9)]
    assert rates == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.2, 0.2])
    whole = StageConfig(name="a", epochs=10, lr=1.0, warmup=2.0, schedule="linear")
    assert [learning_rate(whole, 1.0, done, 10) for done in (1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
