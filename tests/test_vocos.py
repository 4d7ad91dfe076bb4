"""Vocos: the inverse STFT, padded batches, pieces, and what keeps its gradient finite."""

import pytest
import torch
from torch.nn import functional as F

from tokenizers_lab.nn import vocos
from tokenizers_lab.nn.streams import context_of
from tokenizers_lab.nn.vocos import ISTFT, Vocos

HOP = 12


def network(n_fft: int = 48, layers: int = 3) -> Vocos:
    """A small one in float64 in which everything matters, scales and biases too."""
    torch.manual_seed(0)
    made = Vocos(5, 8, 16, layers, n_fft, HOP).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.eval().requires_grad_(False)


def features(items: int = 3, frames: int = 29) -> torch.Tensor:
    return torch.randn(items, 5, frames, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("n_fft, hop", [(48, 12), (50, 20), (7, 3), (20, 18)])
def test_the_inverse_of_a_true_stft_is_the_signal(n_fft, hop):
    torch.manual_seed(0)
    istft, audio = ISTFT(n_fft, hop).double(), torch.randn(2, 11 * hop, dtype=torch.float64)
    around = F.pad(audio, (istft.cut, istft.cut))
    spectrum = torch.stft(around, n_fft, hop, window=istft.window, center=False, return_complex=True)
    torch.testing.assert_close(istft(spectrum), audio[:, None])


@pytest.mark.parametrize("n_fft, hop", [(48, 48), (48, 13), (48, 0), (12, 48)])
def test_a_hop_that_gives_no_whole_signal_is_refused(n_fft, hop):
    with pytest.raises(ValueError, match="n_fft − hop must be even"):
        Vocos(5, 8, 16, 1, n_fft, hop)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_items_of_a_padded_batch_come_out_as_if_alone(kind):
    vocoder, x, lengths = network().to(kind), features().to(kind) * 3, torch.tensor([29, 1, 14])
    made = vocoder(x, lengths)
    assert made.shape == (3, 1, 29 * HOP)
    for item, frames in enumerate(lengths.tolist()):
        alone = vocoder(x[item : item + 1, :, :frames])
        assert alone.shape == (1, 1, frames * HOP) and alone.abs().max() > 0.05
        torch.testing.assert_close(made[item : item + 1, :, : frames * HOP], alone, atol=1e-5, rtol=0)
        assert not made[item, :, frames * HOP :].any()
    assert (vocoder(x)[2] - made[2])[:, : 14 * HOP].abs().max() > 1e-3      # without lengths what is behind counts


@pytest.mark.parametrize("sizes", [(1,), (2,), (5, 0, 3), (29,), (40,)])
@pytest.mark.parametrize("n_fft", [48, 20])
def test_pieces_are_the_whole(sizes, n_fft):
    vocoder, x = network(n_fft), features()
    stream, parts, start, i = vocoder.stream(), [], 0, 0
    while start < x.shape[2]:
        parts.append(stream.push(x[..., start : start + sizes[i % len(sizes)]]))
        start, i = start + sizes[i % len(sizes)], i + 1
    parts.append(stream.finish(x[..., :0]))
    torch.testing.assert_close(torch.cat([part for part in parts if part.shape[-1]], -1), vocoder(x))


def test_a_stream_may_end_with_its_first_piece_or_without_any():
    vocoder, x = network(), features(frames=1)
    torch.testing.assert_close(vocoder.stream().finish(x), vocoder(x))
    assert vocoder.stream().finish(x[..., :0]).shape[-1] == 0


def test_the_context_is_what_a_frame_depends_on():
    vocoder, x, place = network(), features(1, 61), 30
    context = context_of(vocoder.stream(), 1, HOP)
    assert context == (3 * 4 + 2, 3 * 4 + 2)      # four convolutions of 7 frames, and segments of four hops
    ours = slice(place * HOP, (place + 1) * HOP)
    whole = vocoder(x)[..., ours]
    for distance, counts in ((14, True), (15, False)):
        for other in (place - distance, place + distance):
            changed = x.clone()
            changed[..., other] += 10
            assert ((vocoder(changed)[..., ours] - whole).abs().max() > 1e-12) == counts
    window = x[..., place - context.before : place + context.behind + 1]
    torch.testing.assert_close(vocoder(window)[..., context.before * HOP : (context.before + 1) * HOP], whole)


def test_magnitudes_end_at_100_and_the_gradient_stays_finite():
    head = vocos.ISTFTHead(8, 48, HOP)
    with torch.no_grad():
        head.out.bias[:3] = torch.tensor([500.0, 4.0, -4.0])      # the exponential of 500 is infinite in float32
    x = torch.randn(2, 8, 5, requires_grad=True)
    levels = head.spectrum(x).abs()
    torch.testing.assert_close(levels[:, 0], torch.full((2, 5), 100.0))
    assert levels[:, 1].max() < 100.01 and levels[:, 2].max() < 0.2
    head(x).square().sum().backward()
    gradient = head.out.bias.grad
    assert gradient.isfinite().all() and x.grad.isfinite().all() and gradient[0] == 0 and gradient[1] != 0


def test_the_head_is_in_float32_under_autocast():
    vocoder, x = network().float(), features().float()
    frames = vocoder.backbone(x)
    with torch.autocast("cpu", torch.bfloat16):
        made = vocoder.head(frames)
    assert made.dtype == torch.float32 and torch.equal(made, vocoder.head(frames))


def test_first_weights():
    torch.manual_seed(0)
    vocoder = Vocos(40, 64, 128, 4, 48, HOP)
    for layer in (vocoder.backbone.embed, vocoder.backbone.blocks[1].expand):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and not layer.bias.any()
    assert (vocoder.backbone.blocks[3].scale == 0.25).all() and vocoder.head.out.bias.any()
