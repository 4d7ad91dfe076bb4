"""Quantization to signs against the authors' tensors and another library, and flavours of that library behind our result."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.quantizers.bsq import BinaryQuantizer, mean_distribution
from tokenizers_lab.quantizers.others import LibraryQuantizer

PARITY = Path(__file__).parent / "parity" / "bsq" / "io.safetensors"
OFFICIAL = {      # bits, group, inverse temperature, beta, gamma0, gamma, zeta
    "bsq": (10, 1, 1.0, 0.0, 1.0, 1.0, 1.0),
    "bsq_opt": (6, 2, 3.0, 0.25, 0.5, 0.8, 0.1),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_it_is_the_authors_quantizer(name):
    bits, group, temperature, beta, gamma0, gamma, zeta = OFFICIAL[name]
    given = {key.removeprefix(name + "."): value for key, value in load_file(PARITY).items() if key.startswith(name + ".")}
    bsq = BinaryQuantizer(bits, True, group, temperature).train()
    z = given["z"].clone().requires_grad_()
    found = bsq.quantize(z.transpose(1, 2))      # the authors' vectors are on the sphere already
    made = found.quantized.transpose(1, 2)
    losses = found.losses
    entropies = gamma0 * losses["sample_entropy"] - gamma * losses["codebook_entropy"]
    loss = beta * losses["commitment"] + zeta * entropies / temperature
    logits = (given["z"] * 4 * temperature / bits**0.5).flatten(0, 1)
    assert torch.equal(found.codes[:, 0], given["indices"])
    for ours, theirs in (
        (made, "zq"), (losses["commitment"], "commit_loss"), (losses["sample_entropy"], "persample_entropy"),
        (losses["codebook_entropy"], "codebook_entropy"), (loss, "loss"), (mean_distribution(logits, group), "avg_prob"),
        (torch.autograd.grad(loss, z, retain_graph=True)[0], "grad_loss"),
        (torch.autograd.grad((made * given["weight"]).sum(), z)[0], "grad_straight_through"),
    ):
        torch.testing.assert_close(ours, given[theirs], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spherical", [False, True])
def test_lookup_free_quantization_is_that_of_vector_quantize_pytorch(spherical):
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.LFQ(dim=9, codebook_size=512, spherical=spherical, commitment_loss_weight=1.0).train()
    ours = BinaryQuantizer(9, spherical, group=0, inverse_temperature=0.5).train()
    x = torch.randn(4, 9, 30)
    (values, codes, _), parts = theirs(x.transpose(1, 2), inv_temperature=0.5, return_loss_breakdown=True)
    found = ours(x)
    assert torch.equal(found.codes[:, 0], codes.long())
    torch.testing.assert_close(found.quantized, values.transpose(1, 2))
    torch.testing.assert_close(found.losses["codebook_entropy"], parts.batch_entropy)             # the joint one, over 512 codes
    torch.testing.assert_close(found.losses["sample_entropy"], parts.per_sample_entropy, atol=1e-3, rtol=1e-3)   # theirs clamps
    torch.testing.assert_close(found.losses["commitment"] / 9, parts.commitment)
    assert torch.equal(ours.decode(found.codes).transpose(1, 2), theirs.indices_to_codes(codes))


def test_the_joint_distribution_is_the_brute_force_one():
    logits = torch.randn(50, 6, dtype=torch.float64)
    codes = (torch.arange(64)[:, None] >> torch.arange(5, -1, -1)) & 1                              # (64, 6)
    brute = torch.where(codes.bool(), torch.sigmoid(logits)[:, None], torch.sigmoid(-logits)[:, None]).prod(-1).mean(0)
    torch.testing.assert_close(mean_distribution(logits, 6)[0], brute)
    torch.testing.assert_close(mean_distribution(logits, 3).sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("spherical", [False, True])
def test_every_code_and_its_vector_are_one(spherical):
    quantizer = BinaryQuantizer(14, spherical).eval()
    codes = torch.arange(2**14).view(4, 1, -1)
    vectors = quantizer.decode(codes)
    assert torch.equal(quantizer.encode(vectors), codes) and torch.equal(quantizer(vectors).codes, codes)
    found = quantizer.train()(vectors * 0.7)
    assert torch.equal(found.quantized, vectors) and found.health["balance"] == 0 and found.health["usage"] == 1
    assert vectors.unique().tolist() == pytest.approx([-quantizer.level, quantizer.level])
    wide = BinaryQuantizer(40)      # codes beyond what a float can count
    large = torch.tensor([[[2**40 - 1, 2**39 + 1, 12345678901]]])
    assert torch.equal(wide.encode(wide.decode(large)), large)


def test_padding_does_not_count_and_half_precision_changes_nothing():
    quantizer = BinaryQuantizer(8, group=0).train()
    x, junk = torch.randn(2, 8, 10), torch.randn(2, 8, 5)
    counted = torch.arange(15).expand(2, 15) < 10
    plain, padded = quantizer(x), quantizer(torch.cat([x, junk], 2), counted)
    for name, value in plain.losses.items():
        torch.testing.assert_close(padded.losses[name], value)
    with torch.autocast("cpu", torch.bfloat16):
        low = quantizer(x)
    assert torch.equal(low.codes, plain.codes) and all(torch.equal(low.losses[k], v) for k, v in plain.losses.items())
    with pytest.raises(ValueError, match="must divide"):
        BinaryQuantizer(8, group=3)


OPTIONS = {
    "vq": {"codebook_size": 16}, "sim-vq": {"codebook_size": 16}, "fsq": {"levels": [4, 4, 3]}, "lfq": {"codebook_size": 16},
    "residual-vq": {"codebook_size": 16, "num_quantizers": 3}, "residual-sim-vq": {"codebook_size": 16, "num_quantizers": 3},
    "residual-fsq": {"levels": [4, 4, 3], "num_quantizers": 3}, "residual-lfq": {"codebook_size": 16, "num_quantizers": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_other_flavours_give_our_result(name):
    pytest.importorskip("vector_quantize_pytorch")
    quantizer = LibraryQuantizer(name, dim=8, **OPTIONS[name])
    x = torch.randn(2, 8, 9, requires_grad=True)
    found = quantizer(x)
    books = 3 if "residual" in name else 1
    assert found.codes.shape == (2, books, 9) and found.quantized.shape == x.shape and 0 < found.health["usage"] <= 1
    (gradient,) = torch.autograd.grad(found.quantized.sum() + sum(found.losses.values()), x)
    assert gradient.abs().sum() > 0
    quantizer.eval()
    torch.testing.assert_close(quantizer.decode(quantizer.encode(x)), quantizer(x).quantized)


def test_what_the_library_cannot_give_is_refused():
    pytest.importorskip("vector_quantize_pytorch")
    for name, options, text in (
        ("simvq", {}, "nearest: 'sim-vq'"), ("fsq", {"levles": [3]}, "cannot be built"),
        ("residual-vq", {"dim": 8, "quantize_dropout": True}, "global seed"),
    ):
        with pytest.raises(ConfigError, match=text):
            LibraryQuantizer(name, **options)
