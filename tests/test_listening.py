"""The language model that listens to a codec: what it counts, that batches change nothing, which of its parts train."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from tokenizers_lab.errors import ConfigError, InputError
from tokenizers_lab.teachers.listening import END, InputAdapter, ListeningLM, build_listener, causal_network
from tokenizers_lab.teachers.listening_config import ListenerConfig, check_listener
from tokenizers_lab.text import TextConfig, build_text_tokenizer

CONFIG = ListenerConfig(backend="bytes", mode="trained", width=16, depth=2, heads=2, hidden=32, adapter_width=16)
CHANNELS = 6
TEXTS = ["one two", None, "drei", ""]


def build(cfg=CONFIG):
    torch.manual_seed(0)
    return build_listener(cfg, CHANNELS)


def features(items=4, frames=7, seed=1):
    return torch.randn(items, CHANNELS, frames, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def gpt2():
    """A folder with a small GPT-2 as save_pretrained writes it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(folder):
        torch.manual_seed(3)
        config = GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=298, eos_token_id=299,
                            resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
        GPT2LMHeadModel(config).save_pretrained(folder)
        return causal_network(str(folder))

    return make


def listener_of(network, mode="frozen", **changes):
    torch.manual_seed(0)
    text = build_text_tokenizer(TextConfig(vocabulary=300))
    return ListeningLM(replace(CONFIG, backend="transformers", mode=mode, **changes), CHANNELS, network, text, [], 299, "test")


def test_the_loss_is_the_mean_over_the_tokens_of_known_transcripts_with_their_end():
    listener, x, lengths = build(), features(), torch.tensor([7, 7, 5, 3])
    heard = listener(x, lengths, TEXTS)
    assert heard.tokens.tolist() == [8, 0, 5, 0] and heard.item_losses[1] == heard.item_losses[3] == 0
    assert heard.loss.item() == pytest.approx((heard.item_losses * heard.tokens).sum().item() / 13, rel=1e-6)
    # by hand: the model's own probabilities of each byte and of the end
    prefix, _ = listener.adapter(x[2:3, :, :5], torch.tensor([5]))
    said = torch.tensor([256, *b"drei"])
    logits = listener.network(inputs_embeds=torch.cat([prefix[0], listener.network.model.embed_tokens(said)])[None]).logits[0]
    expected = nn.functional.cross_entropy(logits[5:], torch.tensor([*b"drei", END]))
    assert heard.item_losses[2].item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0.5 * math.log(258) < heard.loss < 2 * math.log(258)


@pytest.mark.parametrize("stack", [1, 3])
def test_an_items_loss_does_not_depend_on_the_batch_or_on_what_stands_behind_its_end(stack):
    listener, x, lengths = build(replace(CONFIG, stack=stack)), features(), torch.tensor([7, 7, 5, 4])
    together = listener(x, lengths, ["a longer text than the others", "b", "c d", "e"]).item_losses
    for i, text in ((1, "b"), (2, "c d"), (3, "e")):
        alone = listener(x[i : i + 1, :, : lengths[i]], lengths[i : i + 1], [text])
        assert alone.item_losses[0].item() == pytest.approx(together[i].item(), rel=1e-5)
    loud = x.clone()
    loud[2, :, 5:] = 100.0
    torch.testing.assert_close(listener(loud, lengths, ["a longer text than the others", "b", "c d", "e"]).item_losses, together)
    louder = x.clone()
    louder[2, :, 4] = 100.0
    assert listener(louder, lengths, ["", "", "c d", ""]).loss.item() != pytest.approx(together[2].item(), rel=1e-4)


@pytest.mark.parametrize("texts", [None, [None] * 4, ["", None, "", None]])
def test_without_any_text_the_loss_is_0_with_a_gradient(texts):
    listener, x = build(), features().requires_grad_()
    heard = listener(x, torch.full((4,), 7), texts)
    heard.loss.backward()
    assert heard.loss == 0 and heard.tokens.sum() == 0 and x.grad is not None and not x.grad.any()


def test_training_teaches_it_to_hear():
    """Features that tell which of two texts is said: the loss falls to what the texts leave uncertain without, 0 with them."""
    listener = build()
    texts = ["yes", "no"]
    x = torch.zeros(2, CHANNELS, 3)
    x[0, 0], x[1, 1] = 1.0, 1.0
    optimizer = torch.optim.Adam(listener.trainable().parameters(), 1e-2)
    for _ in range(60):
        loss = listener(x, torch.tensor([3, 3]), texts).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 < listener(x.flip(0), torch.tensor([3, 3]), texts).loss


def test_a_frozen_model_passes_gradients_on_and_keeps_its_weights(gpt2, tmp_path):
    listener, x = listener_of(gpt2(tmp_path)).train(), features(2).requires_grad_()
    assert not listener.training and set(listener.trainable()) == {"adapter"}
    first, second = (listener(x, torch.tensor([7, 6]), ["ab", "cd"]) for _ in range(2))
    assert torch.equal(first.loss, second.loss)      # no dropout
    first.loss.backward()
    assert x.grad is not None and x.grad[0].abs().sum() > 0 and all(p.grad is None for p in listener.network.parameters())
    assert all(p.grad is not None for p in listener.adapter.parameters())
    with pytest.raises(InputError, match="take 67 positions, the language model has 64"):
        listener(x, torch.tensor([7, 6]), ["a" * 60, "cd"])


def test_trained_and_lora_say_what_trains(gpt2, tmp_path):
    trained = listener_of(gpt2(tmp_path / "a"), "trained")
    parts = trained.trainable()
    assert set(parts) == {"adapter", "model"} and {*parts.parameters()} == {*trained.parameters()}      # its output is tied
    trained.network.lm_head = nn.Linear(16, 300, bias=False)
    parts = trained.trainable()
    assert set(parts) == {"adapter", "model", "output"} and {*parts.parameters()} == {*trained.parameters()}
    pytest.importorskip("peft")
    listener = listener_of(gpt2(tmp_path / "b"), "lora", lora_rank=2)
    parts = listener.trainable()
    assert set(parts) == {"adapter", "lora"}
    low_rank = {id(p) for p in parts["lora"].parameters()}
    assert {id(p) for p in listener.network.parameters() if p.requires_grad} == low_rank and len(low_rank) == 2 * 2
    listener(features(2), torch.tensor([7, 7]), ["ab", "cd"]).loss.backward()
    assert sum(float(p.grad.abs().sum()) for p in parts["lora"].parameters()) > 0
    parts.requires_grad_(True)      # as the loop does with heads: the model itself stays frozen
    assert not any(p.requires_grad for name, p in listener.network.named_parameters() if "lora" not in name)
    with pytest.raises(ConfigError, match="lora_targets"):
        listener_of(gpt2(tmp_path / "c"), "lora", lora_targets=["nothing"])


def test_a_model_with_its_tokenizer_comes_from_one_folder(gpt2, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "say": 1, "yes": 2, "no": 3}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    gpt2(tmp_path)
    torch.manual_seed(0)
    listener = build_listener(ListenerConfig(source=str(tmp_path), prompt="say", adapter_width=8, normaliser="basic"), CHANNELS)
    assert (listener.prompt, listener.end, listener.provenance) == ([1], 299, f"{tmp_path} (transformers), frozen")
    heard = listener(features(1), torch.tensor([7]), ["Yes, no!"])
    prefix, _ = listener.adapter(features(1), torch.tensor([7]))
    inputs = torch.cat([prefix[0], listener.network.get_input_embeddings()(torch.tensor([1, 2, 3]))])
    logits = listener.network(inputs_embeds=inputs[None]).logits[0, 7:]
    assert heard.tokens.tolist() == [3]
    assert heard.loss.item() == pytest.approx(nn.functional.cross_entropy(logits, torch.tensor([2, 3, 299])).item(), rel=1e-5)


def test_lora_without_peft_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'tokenizers-lab\[lora\]'"):
        build_listener(ListenerConfig(mode="lora"), CHANNELS)


def test_stacked_frames_keep_their_order_and_padding_counts_as_0():
    adapter = InputAdapter(2, 4, 4, stack=2)
    adapter.layers = nn.Identity()
    x = torch.arange(1.0, 13).view(2, 2, 3)
    given, lengths = adapter(x, torch.tensor([3, 2]))
    assert lengths.tolist() == [2, 1]
    assert given[0].tolist() == [[1, 4, 2, 5], [3, 6, 0, 0]] and given[1].tolist() == [[7, 10, 8, 11], [0, 0, 0, 0]]


@pytest.mark.parametrize("changes, message", [
    ({"mode": "frozen"}, "must be trained: the bytes model"),
    ({"mode": "lora"}, "must be trained: the bytes model"),
    ({"backend": "byte"}, "x.backend must be one of transformers, bytes, none"),
    ({"width": 10, "heads": 4}, "x.width 10 must be a multiple"),
    ({"stack": 0}, "x.stack must be at least 1"),
    ({"normaliser": "dutch"}, "x.normaliser must be one of"),
])
def test_impossible_options_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_listener(replace(CONFIG, **changes), "x")
