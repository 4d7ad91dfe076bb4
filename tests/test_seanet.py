"""SEANet's lengths, padding and causality, and the discriminators' parts that no parity tensor shows."""

import pytest
import torch
from torch import nn

from tokenizers_lab.discriminators.mpd import MultiPeriodDiscriminator
from tokenizers_lab.discriminators.msd import MultiScaleDiscriminator
from tokenizers_lab.discriminators.msstft import MultiScaleSTFTDiscriminator
from tokenizers_lab.losses.adversarial import feature_matching, least_squares_discriminator, least_squares_generator
from tokenizers_lab.nn.seanet import Conv1d, ConvTranspose1d, SEANetDecoder, SEANetEncoder, pad1d
from tokenizers_lab.nn.spectral_norm import spectral_norm


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(7, 1, 1), (3, 1, 4), (4, 2, 1), (10, 5, 1), (16, 8, 1), (1, 1, 1)])
def test_lengths_are_rounded_up(kernel, stride, dilation, causal):
    conv = Conv1d(2, 3, kernel, stride, dilation, causal)
    for samples in (1, 2, 7, 40, 41, 47):
        assert conv(torch.randn(1, 2, samples)).shape == (1, 3, -(-samples // stride))
    if stride > 1:
        assert ConvTranspose1d(3, 2, kernel, stride, causal)(torch.randn(1, 3, 11)).shape == (1, 2, 11 * stride)


def test_reflection_falls_back_to_zeros():
    x = torch.tensor([[[1.0, 2.0]]])
    assert pad1d(x, 1, 1).tolist() == [[[2, 1, 2, 1]]]
    assert pad1d(x, 3, 2).tolist() == [[[0, 0, 2, 1, 2, 0, 0]]]      # of 1 2 0 0: reflected, then cut
    assert pad1d(x, 1, 1, "constant").tolist() == [[[0, 1, 2, 0]]]


def make(causal):
    torch.manual_seed(0)
    options = {"filters": 2, "strides": (4, 2), "lstm_layers": 1, "causal": causal, "mode": "constant"}
    return SEANetEncoder(6, **options), SEANetDecoder(6, **options)


def test_a_causal_network_does_not_hear_the_future():
    encoder, decoder = make(causal=True)
    audio = torch.randn(1, 1, 160)
    whole = encoder(audio)
    changed = torch.cat([audio[..., :80], torch.randn(1, 1, 80)], -1)
    assert torch.allclose(encoder(changed)[..., :10], whole[..., :10], atol=1e-6)
    assert not torch.allclose(encoder(changed)[..., 10:], whole[..., 10:], atol=1e-3)
    cut = torch.cat([whole[..., :10], torch.randn(1, 6, 10)], -1)
    assert torch.allclose(decoder(cut)[..., :80], decoder(whole)[..., :80], atol=1e-6)
    encoder, _ = make(causal=False)
    assert not torch.allclose(encoder(changed)[..., 9], encoder(audio)[..., 9], atol=1e-4)


def test_causal_pieces_of_whole_strides_are_the_whole():
    encoder, _ = make(causal=True)
    audio = torch.randn(1, 1, 160)
    assert torch.allclose(encoder(audio[..., :80]), encoder(audio)[..., :10], atol=1e-6)


def test_released_sizes():
    with torch.device("meta"):
        encoder, decoder = SEANetEncoder(1024, bidirectional=True), SEANetDecoder(1024)
        judges = {MultiPeriodDiscriminator(): 41.1, MultiScaleDiscriminator(): 29.6, MultiScaleSTFTDiscriminator(): 0.47}
    assert sum(p.numel() for p in encoder.parameters()) == 67_705_856
    assert sum(p.numel() for p in decoder.parameters()) == 35_182_530
    for network, millions in judges.items():      # as the paper's code counts them
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_spectral_norm_iterates_as_torchs_hook():
    torch.manual_seed(0)
    theirs, ours = nn.utils.spectral_norm(nn.Conv1d(4, 6, 3)), nn.Conv1d(4, 6, 3)
    ours.load_state_dict({"weight": theirs.weight_orig.detach(), "bias": theirs.bias.detach()})
    spectral_norm(ours)
    ours.parametrizations.weight[0].u.copy_(theirs.weight_u)
    ours.parametrizations.weight[0].v.copy_(theirs.weight_v)
    x = torch.randn(2, 4, 9)
    for _ in range(3):
        outputs = ours(x), theirs(x)
        torch.testing.assert_close(*outputs)
    (outputs[0].sum() + ours(x).square().sum()).backward()      # two uses before one backward
    (outputs[1].sum() + theirs(x).square().sum()).backward()
    torch.testing.assert_close(ours.parametrizations.weight.original.grad, theirs.weight_orig.grad)
    before = ours.parametrizations.weight[0].u.clone()
    ours.eval()(x)
    assert torch.equal(ours.parametrizations.weight[0].u, before)


def test_period_padding_and_maps():
    member = MultiPeriodDiscriminator((5,), (4, 4)).discriminators[0]
    full = MultiPeriodDiscriminator((5,), (4, 4), pad_full=True).discriminators[0]
    rows = {samples: (member(torch.randn(1, 1, samples)).features[0].shape, full(torch.randn(1, 1, samples)).features[0].shape)
            for samples in (50, 51)}
    assert [shape[3] for shape in (*rows[50], *rows[51])] == [5, 5, 5, 5]
    assert (rows[50][0][2], rows[50][1][2]) == (-(-10 // 3), -(-11 // 3))      # a whole period more
    assert rows[51][0] == rows[51][1]


def test_least_squares_and_matching_in_closed_form():
    real, fake = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    assert least_squares_discriminator(real, fake).item() == 0.5 + 0.25
    assert least_squares_generator(fake).item() == 0.25
    maps = [torch.zeros(2, 3), torch.ones(4)]
    given = [torch.ones(2, 3, requires_grad=True), torch.full((4,), 3.0)]
    loss = feature_matching(given, maps)
    assert loss.item() == 1 + 2 and not loss.requires_grad      # the real maps carry no gradient
