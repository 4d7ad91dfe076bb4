"""Our speech tokenizers in code that was written for transformers' codecs, with a Mimi of theirs beside them."""

import pytest
import torch
from transformers import DacConfig, EncodecFeatureExtractor, MimiConfig, MimiModel

from tokenizers_lab.adapters.transformers import TransformersCodec
from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.errors import InputError
from tokenizers_lab.models.dm_codec.config import ModelConfig as DMCodecConfig
from tokenizers_lab.models.dm_codec.model import DMCodec
from tokenizers_lab.models.lm_spt.config import AuxiliaryConfig
from tokenizers_lab.models.lm_spt.config import ModelConfig as LMSPTConfig
from tokenizers_lab.models.lm_spt.model import LMSPT
from tokenizers_lab.settings import SpeechDataConfig


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dm_codec():
    torch.manual_seed(0)
    return DMCodec(DMCodecConfig(filters=4, width=16, codebooks=4, codebook_size=32)).eval()


def lm_spt(**options):
    torch.manual_seed(0)
    return LMSPT(LMSPTConfig(
        sample_rate=16_000, strides=[5, 8, 8], decoder_strides=[8, 8, 5], semantic_width=4, acoustic_width=4, decoder_width=16,
        latent=8, codebooks=4, semantic_size=32, semantic_dim=4, acoustic_size=16, acoustic_dim=4, dilations=[1],
        auxiliary=AuxiliaryConfig(width=8, strides=[8, 5, 4], sample_rate=8_000, dilations=[1]), **options)).eval()


def mimi():
    torch.manual_seed(0)
    model = MimiModel(MimiConfig(
        sampling_rate=16_000, upsampling_ratios=[5, 4, 4, 2], num_filters=4, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=16, codebook_size=32, codebook_dim=8,
        vector_quantization_hidden_dimension=8, num_quantizers=4, upsample_groups=16)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_(0, 5)
    return model


CODECS = {"mimi": mimi, "dm_codec": lambda: TransformersCodec(dm_codec()), "lm_spt": lambda: TransformersCodec(lm_spt())}


@pytest.fixture(scope="module")
def clips():
    """Three clips of sample speech, 0.75 to 1.5 s, as arrays."""
    cfg = SpeechDataConfig(train="sample:speech", val="sample:speech", val_limit=3, val_seconds=1.5, workers=0)
    audio = next(iter(validation_batches(cfg, 3))).audio
    return [audio[0, 0].numpy(), audio[1, 0, :12_001].numpy(), audio[2, 0, :17_000].numpy()]


@torch.inference_mode()
def tokenize(codec, clips, num_quantizers=None):
    """Written for transformers' codecs: what a speech language model's data preparation and its vocoder do.

    Returns codes, restored clips and the codec's own numbers: nothing here knows whose codec it is.
    """
    extractor = EncodecFeatureExtractor(feature_size=codec.config.audio_channels, sampling_rate=codec.config.sampling_rate)
    inputs = extractor(clips, sampling_rate=codec.config.sampling_rate, padding=True, return_tensors="pt").to(codec.device)
    values, mask = inputs["input_values"].to(codec.dtype), inputs["padding_mask"]
    codes = codec.encode(values, mask, num_quantizers=num_quantizers).audio_codes
    assert codes.dtype == torch.long and codes.dim() == 3
    wanted = num_quantizers or codec.config.num_quantizers
    assert codes.shape == (len(clips), wanted, int(codec.get_encoded_length(mask.sum(-1)).max()))
    assert int(codes.min()) >= 0 and int(codes.max()) < codec.config.codebook_size
    seconds = codes.shape[-1] / codec.config.frame_rate
    assert 0 <= seconds - values.shape[-1] / codec.config.sampling_rate <= 1 / codec.config.frame_rate
    audio = codec.decode(codes, mask).audio_values
    assert audio.shape == values.shape
    both = codec(values, mask, num_quantizers=num_quantizers)
    assert torch.equal(both.audio_codes, codes) and torch.equal(both.audio_values, audio)
    as_tuple = codec.encode(values, mask, return_dict=False)
    assert torch.equal(as_tuple[0][:, :wanted], codes)
    frames = codec.get_audio_codes_mask(mask).sum(-1).tolist()
    kept = [item[:, :count] for item, count in zip(codes, frames)]
    return kept, [item[0, :end] for item, end in zip(audio, mask.sum(-1).tolist())]


@pytest.mark.parametrize("name", CODECS)
def test_code_for_transformers_codecs_runs_with_ours(name, clips):
    codec = CODECS[name]()
    codes, restored = tokenize(codec, clips)
    assert [len(clip) for clip in restored] == [len(clip) for clip in clips]
    assert len(codes[0].unique()) > 3 and all(clip.abs().max() > 0 for clip in restored)
    fewer, _ = tokenize(codec, clips, num_quantizers=2)
    assert all(torch.equal(few, all_[:2]) for few, all_ in zip(fewer, codes))


@pytest.mark.parametrize("build", [dm_codec, lm_spt])
def test_padding_changes_nothing(build, clips):
    tokenizer = build().double()      # so that sums in another order do not count
    codes, restored = tokenize(TransformersCodec(tokenizer), clips)
    for i, clip in enumerate(clips):
        alone = torch.from_numpy(clip)[None, None].double()
        encoding = tokenizer.encode(alone)
        assert torch.equal(codes[i], encoding.codes[0])
        expected = tokenizer.decode(encoding.codes)[0, 0, : len(clip)]
        torch.testing.assert_close(restored[i].float(), expected.float(), atol=1e-6, rtol=0)


def test_config_says_what_theirs_say():
    ours, theirs = TransformersCodec(dm_codec()).config, mimi().config
    names = ("sampling_rate", "codebook_size", "num_quantizers", "num_codebooks", "frame_rate", "frame_size", "audio_channels")
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    dac = DacConfig(downsampling_ratios=[2, 4, 5, 8], n_codebooks=4)
    assert (ours.hop_length, ours.n_codebooks) == (dac.hop_length, dac.n_codebooks)
    assert ours.to_dict()["sampling_rate"] == 16_000


def test_save_load_and_types(tmp_path, clips):
    codec = TransformersCodec(dm_codec())
    codec.save_pretrained(tmp_path)
    loaded = TransformersCodec.from_pretrained(tmp_path)
    audio = torch.from_numpy(clips[1])[None, None]
    with torch.inference_mode():
        assert torch.equal(loaded.encode(audio).audio_codes, codec.encode(audio).audio_codes)
        half = TransformersCodec.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half(audio.to(half.dtype)).audio_values.dtype == torch.bfloat16
    with pytest.raises(InputError, match="cannot honour revision"):
        TransformersCodec.from_pretrained(tmp_path, revision="main")


def test_refusals():
    codec = TransformersCodec(dm_codec())
    audio, mask = torch.zeros(2, 1, 640), torch.ones(2, 640)
    mask[0, :100] = 0
    with pytest.raises(InputError, match="pad on the right"):
        codec.encode(audio, mask)
    stereo = torch.ones(2, 2, 640)
    stereo[1, 1, 300:] = 0
    with pytest.raises(InputError, match="in all channels alike"):
        codec.encode(audio, stereo)
    with pytest.raises(InputError, match=r"\(B, samples\) or \(B, channels, samples\), not \(640,\)"):
        codec.encode(audio, mask[0])
    with pytest.raises(InputError, match="num_quantizers must be 1 to 4, not 5"):
        codec.encode(audio, num_quantizers=5)
    with pytest.raises(InputError, match=r"must be finite and in \[-1, 1\]"):
        codec.encode(audio + 3)
    with pytest.raises(InputError, match=r"codes must be in \[0, 32\)"):
        codec.decode(torch.full((1, 4, 3), 32))
    with pytest.raises(InputError, match="takes audio at 16000 Hz and gives 8000 Hz"):
        TransformersCodec(lm_spt(decoding="auxiliary"))
