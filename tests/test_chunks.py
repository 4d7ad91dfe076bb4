"""Every speech system: pieces give what the whole gives, padded batches what single files give, memory does not grow."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from speech_networks import LOCAL, NETWORKS, cut, network, speech
from torch import nn

from tokenizers_lab.chunks import decode_pieces, encode_pieces
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import CheckpointError, InputError
from tokenizers_lab.models.lm_spt.model import LMSPT
from tokenizers_lab.nn.fold import fold_weight_norms
from tokenizers_lab.nn.streams import stream_of
from tokenizers_lab.registry import systems
from tokenizers_lab.tokenizer import SpeechTokenizer

EVERY = [(system, name) for system, named in NETWORKS.items() for name in named]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decodings(tokenizer):
    """Options of `decode` for each way of decoding."""
    return [{"decoding": way} for way in ("all", "semantic", "auxiliary", "acoustic")] if tokenizer.system == "lm_spt" else [{}]


def encoded(tokenizer, audio, sizes, seconds, **options):
    return torch.cat(list(encode_pieces(tokenizer, cut(audio, *sizes), seconds, **options)), -1)


def decoded(tokenizer, codes, sizes, seconds, **options):
    return torch.cat(list(decode_pieces(tokenizer, cut(codes, *sizes), seconds, **options)), -1)


def streamed(stream, x, *sizes):
    parts = [stream.push(piece) for piece in cut(x, *sizes)] + [stream.finish(x[..., :0])]
    return torch.cat([part for part in parts if part.shape[-1]], -1)


def test_no_speech_system_is_forgotten():
    assert set(NETWORKS) == {name for name, system in systems().items() if system.kind == "speech"}


# --- pieces are the whole -------------------------------------------------------------------------------------------------

@torch.inference_mode()
@pytest.mark.parametrize("system, name", LOCAL)
def test_pieces_of_a_local_network_are_the_whole(system, name):
    tokenizer = network(system, name)
    assert tokenizer.local and tokenizer.causal == ("causal" in name)
    audio = speech(2.5, tokenizer.sample_rate)
    audio = audio[..., : audio.shape[-1] - 7]                       # the last frame is not full
    exact = copy.deepcopy(tokenizer).double()                       # sums in another order move no code here
    codes = exact.encode(audio.double()).codes
    assert len(codes.unique()) > 15                                 # a constant code would prove nothing
    assert torch.equal(encoded(exact, audio.double(), (1, 70, 12_345), 0.7), codes)
    for options in decodings(tokenizer)[:: 1 if name.endswith("5 Hz") else 2]:
        whole = tokenizer.decode(codes, **options)
        made = decoded(tokenizer, codes, (1, 3, 17), 0.7, **options)
        assert made.dtype == whole.dtype and made.shape == whole.shape and whole.std() > 0.005
        torch.testing.assert_close(made, whole, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("system, name", [pair for pair in LOCAL if "causal" not in pair[1]])
def test_in_float32_the_features_agree_and_a_code_moves_only_at_a_border(system, name):
    tokenizer = network(system, name)
    audio = speech(2.5, tokenizer.sample_rate)
    encoder = tokenizer.semantic_encoder if system == "lm_spt" else tokenizer.encoder
    whole, made = encoder(audio), streamed(encoder.stream(), audio, 5000)
    assert (made - whole).abs().max() < 1e-5 * whole.abs().max()
    same = encoded(tokenizer, audio, (5000,), 1.0) == tokenizer.encode(audio).codes
    assert same.float().mean() >= 0.99


@torch.inference_mode()
@pytest.mark.parametrize("samples", [1, 2, 3, 7, 60, 500])
@pytest.mark.parametrize("system, name", [
    ("lm_spt", "25 Hz"), ("lm_spt", "25 Hz causal"), ("dm_codec", "no LSTM"), ("dm_codec", "LSTM")])
def test_the_shortest_audio(system, name, samples):
    tokenizer = network(system, name)
    audio = speech(1.0, tokenizer.sample_rate)[..., 4000 : 4000 + samples]
    codes = tokenizer.encode(audio).codes
    assert torch.equal(encoded(tokenizer, audio, (1,), 1e-9), codes)
    torch.testing.assert_close(decoded(tokenizer, codes, (1,), 1e-9), tokenizer.decode(codes), atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["LSTM", "LSTM of one direction"])
def test_the_decoders_lstm_is_carried_on(name):
    tokenizer = network("dm_codec", name)
    assert not tokenizer.local and tokenizer.decode_context() is None
    codes = torch.randint(0, 64, (1, 3, 400), generator=torch.Generator().manual_seed(0))
    whole = tokenizer.decode(codes)
    torch.testing.assert_close(decoded(tokenizer, codes, (1, 30), 0.3), whole, atol=1e-5, rtol=0)
    apart = torch.cat([tokenizer.decode(part) for part in codes.split(15, -1)], -1)      # what it would be without the state
    assert (apart - whole).abs().max() > 1e-3


def forgetful(bias):
    """A DM-Codec in float64 whose LSTMs keep sigmoid(bias) of their cells from frame to frame; codebooks of its own features."""
    tokenizer = copy.deepcopy(network("dm_codec", "LSTM")).double().train()
    with torch.no_grad():
        for key, parameter in tokenizer.named_parameters():
            if "lstm.bias" in key:
                parameter[len(parameter) // 4 : len(parameter) // 2] += bias / 2      # there are two biases
        for i in range(tokenizer.codebooks):
            tokenizer.quantizer.book(i).started.zero_()
        tokenizer.quantizer(tokenizer.encoder(speech(4.0, 16_000).double()), Draw(0))
    return tokenizer.eval()


@torch.inference_mode()
def test_the_difference_of_an_lstm_of_both_directions_falls_with_the_context():
    audio = speech(6.0, 16_000).double()
    networks = {bias: forgetful(bias) for bias in (0.0, 1.0)}
    for bias, context, least, most in ((0, 1.0, 1.0, 1e-9), (1, 0.02, 0.5, 0.1), (1, 0.5, 0.85, 1e-2), (1, 1.0, 0.98, 1e-3)):
        tokenizer = networks[bias]
        codes, features = tokenizer.encode(audio).codes, tokenizer.encoder(audio)
        same = (encoded(tokenizer, audio, (16_000,), 2.0, context=context) == codes).double().mean()
        found = streamed(tokenizer.encoder.stream(round(50 * context)), audio, 32_000)
        assert same >= least and (found - features).norm() <= most * features.norm()
        assert context > 0.1 or same < 0.8                                     # that the context counts
        whole = tokenizer.encode(audio[..., :32_000]).codes                    # one block is exact, whatever the context
        assert torch.equal(encoded(tokenizer, audio[..., :32_000], (16_000,), 2.0, context=context), whole)


# --- how far it sees ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("system, name", [
    ("lm_spt", "25 Hz"), ("lm_spt", "25 Hz causal"), ("lm_spt", "FSQ, one encoder"), ("dm_codec", "no LSTM"),
    ("dm_codec", "no LSTM, snake, odd strides")])
def test_the_contexts_are_those_of_the_gradients(system, name):
    tokenizer = copy.deepcopy(network(system, name)).double()
    reach, hop = tokenizer.encode_context(), tokenizer.hop
    frame = reach.before // hop + 2
    audio = (0.1 * torch.randn(1, 1, (frame + 3) * hop + reach.behind, dtype=torch.float64)).requires_grad_()
    encoder = tokenizer.semantic_encoder if system == "lm_spt" else tokenizer.encoder
    encoder(audio)[..., frame].sum().backward()
    seen = audio.grad[0, 0].nonzero().flatten()
    assert (seen[0], seen[-1]) == (frame * hop - reach.before, (frame + 1) * hop - 1 + reach.behind)
    for options in decodings(tokenizer)[::2]:                                  # of LM-SPT: the main and the auxiliary decoder
        reach, size = tokenizer.decode_context(**options), tokenizer.frame_samples(**options)
        auxiliary = options.get("decoding") == "auxiliary"
        decoder, width = tokenizer.aux_decoder if auxiliary else tokenizer.decoder, 8 if system == "lm_spt" else 16
        frame = reach.before + 2
        latents = torch.randn(1, width, frame + reach.behind + 3, dtype=torch.float64, requires_grad=True)
        decoder(latents)[..., frame * size : (frame + 1) * size].abs().sum().backward()
        seen = latents.grad.abs().sum((0, 1)).nonzero().flatten()
        assert (seen[0], seen[-1]) == (frame - reach.before, frame + reach.behind)


def test_a_layer_of_which_nothing_is_known_is_refused():
    with pytest.raises(TypeError, match="Softmax has no stream"):
        stream_of(nn.Sequential(nn.ELU(), nn.Softmax(-1)))


class Unknown(LMSPT):
    """A local network that does not say so."""

    encode_stream = SpeechTokenizer.encode_stream

    def decode_stream(self, context=2.0):
        return SpeechTokenizer.decode_stream(self, context)


@torch.inference_mode()
def test_overlapping_windows_of_an_unknown_network():
    known = network("lm_spt", "25 Hz")
    tokenizer = Unknown(known.cfg).double().eval()
    tokenizer.load_state_dict(known.state_dict())
    assert not tokenizer.local and not tokenizer.causal
    audio = speech(4.0).double()[..., :-5]
    codes = tokenizer.encode(audio).codes
    enough = 12 / 25                       # seconds: the 11 frames that the decoder sees, and more than the encoder's 8
    assert torch.equal(encoded(tokenizer, audio, (999, 20_000), 0.9, context=enough), codes)
    whole = tokenizer.decode(codes)
    torch.testing.assert_close(decoded(tokenizer, codes, (7,), 0.9, context=enough), whole, atol=1e-6, rtol=0)
    short = decoded(tokenizer, codes, (7,), 0.9, context=1 / 25)
    assert short.shape == whole.shape and (short - whole).abs().max() > 1e-4


# --- bad input ------------------------------------------------------------------------------------------------------------

def test_bad_pieces_get_their_error():
    tokenizer = network("lm_spt", "25 Hz")
    audio, codes = speech(1.0), torch.zeros(1, 4, 3, dtype=torch.int64)
    for pieces, message in (([], "nothing in it"), ([audio[..., :0]], "nothing in it"), ([audio, audio * float("nan")], "finite"),
                            ([audio, torch.cat([audio, audio])], "one shape"), ([audio[0]], "float"), ([audio.int()], "int32")):
        with pytest.raises(InputError, match=message):
            list(encode_pieces(tokenizer, pieces))
    for pieces, message in (([], "nothing in it"), ([codes, codes + 64], "in \\[0, 64\\)"), ([codes, codes[:, :2]], "one shape")):
        with pytest.raises(InputError, match=message):
            list(decode_pieces(tokenizer, pieces))
    with pytest.raises(InputError, match="decoding must be one of"):
        list(decode_pieces(tokenizer, [codes], decoding="loud"))


def test_gradients_and_modes_of_the_caller_are_left_alone():
    tokenizer = network("dm_codec", "no LSTM")
    for _ in encode_pieces(tokenizer, cut(speech(1.0, 16_000), 4000), 0.1):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# --- padded batches -------------------------------------------------------------------------------------------------------

@torch.inference_mode()
@pytest.mark.parametrize("system, name", EVERY)
def test_padded_batches_are_single_files(system, name):
    tokenizer = copy.deepcopy(network(system, name)).double()
    audio = speech(0.7, tokenizer.sample_rate).double()
    lengths = torch.tensor([audio.shape[-1], 4_111, 1])
    batch = torch.cat([audio, audio.flip(-1), -audio])                        # what lies behind an item's end is sound
    together = tokenizer.encode(batch, lengths)
    made = tokenizer.decode(together.codes, together.lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = tokenizer.encode(batch[i : i + 1, :, :length]).codes
        frames = tokenizer.frames(length)
        assert together.lengths[i] == frames == alone.shape[2] and torch.equal(together.codes[i, :, :frames], alone[0])
        samples = frames * tokenizer.frame_samples()
        torch.testing.assert_close(made[i, :, :samples], tokenizer.decode(alone)[0], atol=1e-6, rtol=0)
        assert not made[i, :, samples:].any() and not together.codes[i, :, frames:].any()


# --- folded weight norms --------------------------------------------------------------------------------------------------

@torch.inference_mode()
@pytest.mark.parametrize("system, name", [("lm_spt", "25 Hz"), ("dm_codec", "LSTM")])
def test_folded_weight_norms_change_no_bit_and_cannot_be_saved(system, name, tmp_path):
    tokenizer = network(system, name)
    audio = speech(1.0, tokenizer.sample_rate)
    fused = copy.deepcopy(tokenizer).fuse()
    codes = tokenizer.encode(audio).codes
    assert torch.equal(fused.encode(audio).codes, codes) and torch.equal(fused.decode(codes), tokenizer.decode(codes))
    assert torch.equal(encoded(fused, audio, (9999,), 0.3), encoded(tokenizer, audio, (9999,), 0.3))
    assert not any("original" in key for key in fused.state_dict()) and fold_weight_norms(fused) == 0
    with pytest.raises(CheckpointError, match="save it before"):
        fused.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
    tokenizer.save_pretrained(tmp_path / "own")                                # whose keys are as before


# --- memory ---------------------------------------------------------------------------------------------------------------

LONG = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from speech_networks import network
from tokenizers_lab.chunks import decode_pieces, encode_pieces

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024      # MiB; of this program, not its parent

torch.set_num_threads(1)
tokenizer, draw = network(sys.argv[2], sys.argv[3]), torch.Generator().manual_seed(0)
second = tokenizer.sample_rate
for seconds in (60, 1200):
    audio = (torch.rand(1, 1, second, generator=draw) - 0.5 for _ in range(seconds))
    made = sum(piece.shape[-1] for piece in decode_pieces(tokenizer, encode_pieces(tokenizer, audio, 5.0), 5.0))
    assert made == tokenizer.frames(seconds * second) * tokenizer.frame_samples(), made
    print(peak())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("system, name", [("lm_spt", "8 kHz"), pytest.param("dm_codec", "LSTM, 8 kHz", marks=pytest.mark.slow)])
def test_twenty_minutes_need_the_memory_of_one(system, name):
    command = [sys.executable, "-c", LONG, str(Path(__file__).parent), system, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    minute, long = map(float, done.stdout.split())
    assert long <= 1.1 * minute and long - minute < 15, (minute, long)      # 20 minutes of audio alone are 37 MiB
