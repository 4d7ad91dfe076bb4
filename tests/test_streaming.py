"""Streaming of causal networks: pieces of any size give what the whole gives, at once, at a cost that does not grow."""

import copy
from itertools import product

import pytest
import torch
from speech_networks import CAUSAL_NAMES, cut, network, speech
from torch import Tensor

from tokenizers_lab.errors import InputError
from tokenizers_lab.nn.seanet import Conv1d, SEANetDecoder, SEANetEncoder
from tokenizers_lab.nn.streams import Stream, context_of, stream_of
from tokenizers_lab.streaming import StreamingDecoder, StreamingEncoder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
@pytest.mark.parametrize("name, sizes", [(name, (1, 959, 2, 5000, 0, 37)) for name in CAUSAL_NAMES] + [("25 Hz causal", (960,))])
def test_pieces_are_the_whole_and_come_at_once(name, sizes):
    tokenizer = network("lm_spt", name)
    audio = speech(2.0)[..., :-100]
    exact = copy.deepcopy(tokenizer).double()
    whole = exact.encode(audio.double()).codes
    encoder, taken, codes = StreamingEncoder(exact), 0, []
    for piece in [audio[..., start : start + size] for start, size in starts(audio.shape[-1], sizes)]:
        codes.append(encoder.push(piece.double()))
        taken += piece.shape[-1]
        assert sum(part.shape[-1] for part in codes) == taken // tokenizer.hop      # no look-ahead: every full frame is out
    codes.append(encoder.flush())
    assert codes[-1].shape == (1, 4, 1) and torch.equal(torch.cat(codes, -1), whole)
    for decoding in ("all", "semantic", "auxiliary", "acoustic"):
        decoder = StreamingDecoder(tokenizer, decoding=decoding)
        parts = [(piece.shape[-1], decoder.push(piece)) for piece in cut(whole, 1, 3, 7)]
        assert all(made.shape[-1] == frames * tokenizer.frame_samples(decoding) for frames, made in parts)
        assert decoder.flush().shape == (1, 1, 0)
        made = torch.cat([made for _, made in parts], -1)
        torch.testing.assert_close(made, tokenizer.decode(whole, decoding=decoding), atol=1e-5, rtol=0)


def starts(length: int, sizes):
    """(start, size) of pieces of these sizes, again and again, empty ones too."""
    start, i = 0, 0
    while start < length:
        yield start, sizes[i % len(sizes)]
        start, i = start + sizes[i % len(sizes)], i + 1


def kept(stream: object) -> int:
    """Numbers that a stream and those inside it keep."""
    if isinstance(stream, Tensor):
        return stream.untyped_storage().nbytes() // stream.element_size()
    if isinstance(stream, list | tuple):
        return sum(kept(part) for part in stream)
    return sum(kept(value) for name, value in vars(stream).items() if name != "weight") if isinstance(stream, Stream) else 0


@torch.inference_mode()
def test_what_is_kept_does_not_grow():
    tokenizer = network("lm_spt", "25 Hz causal")
    encoder, decoder = StreamingEncoder(tokenizer), StreamingDecoder(tokenizer)
    sizes = []
    for piece in cut(speech(2.0), 960):
        decoder.push(encoder.push(piece))
        sizes.append((kept(encoder.stream), kept(decoder.stream)))
    assert 100 < sizes[-1][0] < 20_000 and 100 < sizes[-1][1] < 20_000 and len(set(sizes[20:50])) == 1


@torch.inference_mode()
def test_the_next_recording_starts_anew_and_several_run_together():
    tokenizer = network("lm_spt", "25 Hz causal")
    audio = torch.cat([speech(1.0), speech(1.0).flip(-1)])
    whole = tokenizer.encode(audio).codes
    encoder, decoder = StreamingEncoder(tokenizer), StreamingDecoder(tokenizer)
    for _ in range(2):
        codes = torch.cat([encoder.push(piece) for piece in cut(audio, 7000)] + [encoder.flush()], -1)
        assert (codes == whole).float().mean() > 0.99
        made = torch.cat([decoder.push(piece) for piece in cut(whole, 4)] + [decoder.flush()], -1)
        torch.testing.assert_close(made, tokenizer.decode(whole), atol=1e-5, rtol=0)
    fewer = torch.cat([decoder.push(piece) for piece in cut(whole[:, :2], 4)], -1)      # codebooks
    torch.testing.assert_close(fewer, tokenizer.decode(whole[:, :2]), atol=1e-5, rtol=0)
    assert encoder.flush().shape == (1, 4, 0) and StreamingDecoder(tokenizer).flush().shape == (1, 1, 0)


def test_what_cannot_stream_says_so():
    for system, name, message in (("lm_spt", "25 Hz", "7168 samples ahead"), ("dm_codec", "LSTM", "as far as the end"),
                                  ("dm_codec", "no LSTM", "1195 samples ahead")):
        with pytest.raises(InputError, match=f"cannot stream: its encoder looks {message}.*encode_pieces"):
            StreamingEncoder(network(system, name))
    with pytest.raises(InputError, match=r"decoder looks 10 frames ahead.*decode_pieces"):
        StreamingDecoder(network("lm_spt", "25 Hz"))
    causal = network("lm_spt", "25 Hz causal")
    with pytest.raises(InputError, match="decoding must be one of"):
        StreamingDecoder(causal, decoding="loud")
    encoder, decoder = StreamingEncoder(causal), StreamingDecoder(causal)
    for wrong in (torch.full((1, 1, 5), float("nan")), torch.zeros(1, 2, 5), torch.zeros(5), torch.zeros(1, 1, 5).int()):
        with pytest.raises(InputError, match="audio must be"):
            encoder.push(wrong)
    with pytest.raises(InputError, match="codes must be"):
        decoder.push(torch.full((1, 4, 2), 99))
    encoder.push(torch.zeros(1, 1, 5))
    with pytest.raises(InputError, match="of 1 recordings at once, not 2"):
        encoder.push(torch.zeros(2, 1, 5))


@torch.inference_mode()
@pytest.mark.parametrize("mode, lstm_layers, causal", [
    ("constant", 0, True), ("constant", 1, True), ("reflect", 0, True), ("reflect", 0, False), ("constant", 0, False)])
def test_seanet_layers_in_pieces(mode, lstm_layers, causal):
    torch.manual_seed(0)
    options = {"filters": 2, "strides": (5, 2), "lstm_layers": lstm_layers, "causal": causal, "mode": mode}
    encoder, decoder = SEANetEncoder(6, **options).double(), SEANetDecoder(6, **options).double()
    inputs = [(encoder, torch.randn(2, 1, samples), 10) for samples in (133, 140)] + [(decoder, torch.randn(2, 6, 14), 1)]
    for (layers, x, frame), sizes in product(inputs, ((1, 4, 25), (1,))):
        stream, x = stream_of(layers), x.double()
        if not lstm_layers:
            assert (context_of(stream, frame, 10 // frame).behind == 0) == causal
        made, at_once, taken = [], True, 0
        for piece in cut(x, *sizes):
            made.append(stream.push(piece))
            taken += piece.shape[-1]
            at_once &= sum(part.shape[-1] for part in made) == (taken // frame) * (10 // frame)
        made.append(stream.finish(x[..., :0]))
        assert at_once == (causal and mode == "constant")      # a start that is reflected waits for what it reflects
        torch.testing.assert_close(torch.cat([part for part in made if part.shape[-1]], -1), layers(x), atol=1e-9, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("kernel, stride, dilation", [(4, 2, 1), (10, 5, 1), (6, 3, 1), (7, 1, 1), (3, 1, 4), (1, 1, 1)])
def test_one_reflecting_convolution_in_pieces(kernel, stride, dilation):
    for causal, samples in product((True, False), range(1, 24)):
        layer = Conv1d(2, 3, kernel, stride, dilation, causal).double()
        x = torch.randn(1, 2, samples, dtype=torch.float64)
        stream = layer.stream()
        made = [stream.push(piece) for piece in cut(x, 1)] + [stream.finish(x[..., :0])]
        torch.testing.assert_close(torch.cat([part for part in made if part.shape[-1]], -1), layer(x), atol=1e-12, rtol=0)
