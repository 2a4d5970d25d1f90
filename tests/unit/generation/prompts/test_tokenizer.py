"""Prompts to token ids, and special tokens in stop strings."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from poise.errors import InvalidRequest
from poise.generation.prompts.tokenizer import Tokenizer

BOS, EOS, END = 26, 27, 28
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"


def backend(adds_bos: bool = True, bos: str = "<s>") -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of letters that puts BOS before every text."""
    vocabulary = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    vocabulary |= {bos: BOS, "</s>": EOS, "<|im_end|>": END}
    inner = Backend(models.WordLevel(vocabulary, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token="</s>", additional_special_tokens=["<|im_end|>"]
    )
    fast.chat_template = TEMPLATE
    return fast


def tokenizer(**settings: Any) -> Tokenizer:
    return Tokenizer(backend(**settings), frozenset({EOS}))


@pytest.mark.parametrize("bos", ["<s>", "<|begin_of_text|>", "[BOS]"])
@pytest.mark.parametrize(
    ("text", "ids"),
    [("ab", [BOS, 0, 1]), ("{bos}ab", [BOS, 0, 1]), ("{bos}{bos}a", [BOS, BOS, 0]), ("{bos}", [BOS]), ("", [BOS])],
)
def test_text_that_begins_with_bos_gets_no_second_one(bos: str, text: str, ids: list[int]) -> None:
    assert tokenizer(bos=bos).encode(text.format(bos=bos)) == ids


def test_text_is_unchanged_if_the_tokenizer_adds_no_bos() -> None:
    assert tokenizer(adds_bos=False).encode("<s><s>a") == [BOS, BOS, 0]


def test_chat_whose_template_writes_bos_has_one() -> None:
    assert tokenizer().encode([{"role": "user", "content": "ab"}]) == [BOS, 0, 1]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "no element 5"),
        ("{% for %}", "Expected an expression"),
        (None, "chat template"),
    ],
)
def test_chat_rejected_by_the_template_is_an_invalid_request(template: str | None, said: str) -> None:
    fast = backend()
    fast.chat_template = template
    with pytest.raises(InvalidRequest, match=f"chat: is rejected by the model's chat template: .*{said}"):
        Tokenizer(fast, frozenset()).encode([{"role": "user", "content": "ab"}])


@pytest.mark.parametrize(
    ("stops", "names"),
    [
        (["<|im_end|>"], True),
        (["x", "a<|im_end|>b"], True),
        (["</s>"], True),
        (["<s>"], True),
        (["im_end"], False),
        (["<|im_end|"], False),
        ([], False),
    ],
)
def test_stops_with_a_special_token_are_recognized(stops: list[str], names: bool) -> None:
    assert tokenizer().contains_special_token(stops) is names


def test_special_tokens_are_decoded_on_request_only() -> None:
    assert tokenizer().decode([0, END, 1]) == "ab"
    assert tokenizer().decode([0, END, 1], with_special=True) == "a<|im_end|>b"


def test_digest_covers_tokenizer_and_template() -> None:
    other_template = backend()
    other_template.chat_template = TEMPLATE + " "
    digests = {
        tokenizer().digest,
        tokenizer(adds_bos=False).digest,
        tokenizer(bos="[BOS]").digest,
        Tokenizer(other_template, frozenset()).digest,
    }
    assert len(digests) == 4
    assert tokenizer().digest in digests
    assert len(tokenizer().digest) == 32


class Refusing:
    """A tokenizer with its own code, which raises."""

    bos_token = bos_token_id = chat_template = None
    all_special_tokens = special_tokens_map = ()

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return {}

    def __call__(self, text: str) -> Any:
        raise KeyError(text)

    def get_vocab(self) -> dict[str, int]:
        return {}


def test_text_rejected_by_the_tokenizer_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="text: is rejected by the model's tokenizer: 'x'"):
        Tokenizer(Refusing(), frozenset()).encode("x")
