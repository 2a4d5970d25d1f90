"""What both engines need of a model's tokenizer and limits. transformers is imported late."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from poise.errors import InvalidRequest, Unusable
from poise.generation.prompts.chat_template import ChatTemplates
from poise.generation.prompts.time_limit import LimitReached, TimeLimit
from poise.runtime.models.decoder import position_limit
from poise.runtime.models.generation_config import load_generation_config
from poise_client.types import Message

UNLIMITED_MODEL_LEN = 8192
"""Taken for `max_model_len` where neither the settings nor the model, such as a recurrent one, set a limit."""


class Tokenizer:
    """Text to ids and back, and which ids end a response."""

    def __init__(self, tokenizer: Any, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._templates = ChatTemplates()
        self.stop_token_ids = stop_token_ids
        self._special_texts = _special_texts(tokenizer)
        self.digest = _digest(tokenizer)
        """SHA-256 of all that turns prompts into ids."""

    @classmethod
    def load(cls, model: str) -> Tokenizer:
        """Read a model's tokenizer. Raises `OSError` or `ValueError` when there is none."""
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        tokenizer("")  # drops padding and truncation that the files ask for: later, threads would fail while one does
        stops = {tokenizer.eos_token_id}
        # The learner reports what is wrong with it.
        generation_config, _ = load_generation_config(model, transformers.GenerationConfig)
        declared = None if generation_config is None else generation_config.eos_token_id
        stops |= set(declared) if isinstance(declared, list) else {declared}
        return cls(tokenizer, frozenset(stop for stop in stops if stop is not None))

    def encode(self, content: str | Sequence[Message], limit: TimeLimit | None = None) -> list[int]:
        """Return ids of a text as it stands, or of a conversation with its generation prompt.

        A text that already begins with BOS gets no second one.

        Raises:
            InvalidRequest: a text that the tokenizer rejects; a conversation that the chat template rejects, or no
                template.
            LimitReached: the chat template takes more than `limit` allows.
        """
        if isinstance(content, str):
            try:
                ids = list(self._tokenizer(content)["input_ids"])
            except Exception as error:  # tokenizers of models bring their own code
                raise InvalidRequest.field("text", f"the model's tokenizer rejects it: {error}") from error
            return ids[1:] if self._has_second_bos(content, ids) else ids
        try:
            return self._encode_chat(content, limit or TimeLimit())
        except LimitReached:
            raise
        except Exception as error:  # templates are programs: they raise what they like
            raise InvalidRequest.field("chat", f"the model's chat template refuses it: {error}") from error

    def _encode_chat(self, messages: Sequence[Message], limit: TimeLimit) -> list[int]:
        import transformers

        tokenizer = self._tokenizer
        if type(tokenizer).apply_chat_template is not transformers.PreTrainedTokenizerBase.apply_chat_template:
            # A tokenizer that brings code instead of a template, as Mistral's do.
            chat = [dict(message) for message in messages]
            return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
        template = tokenizer.get_chat_template()
        text = self._templates.render(template, messages, tokenizer.special_tokens_map, limit)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int], *, with_special: bool = False) -> str:
        """Return the text, special tokens left out unless `with_special`."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=not with_special)
        return text

    def names_special(self, stops: Sequence[str]) -> bool:
        """Whether any of these strings holds a special token, and so is found only in text that has them."""
        return any(special in stop for stop in stops for special in self._special_texts)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return each token's own text, special tokens included."""
        return [self._tokenizer.decode([token]) for token in token_ids]

    def _has_second_bos(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the tokenizer put BOS before a text that begins with it."""
        bos, bos_id = self._tokenizer.bos_token, self._tokenizer.bos_token_id
        if bos_id is None or not text.startswith(bos) or list(ids[:2]) != [bos_id, bos_id]:
            return False
        return list(self._tokenizer("")["input_ids"][:1]) == [bos_id]


def _special_texts(tokenizer: Any) -> frozenset[str]:
    """Return the texts of the tokens that `decode` leaves out."""
    added = tokenizer.added_tokens_decoder.values()
    return frozenset({str(token) for token in added if token.special} | set(tokenizer.all_special_tokens))


def _digest(tokenizer: Any) -> bytes:
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)  # only fast tokenizers have one
    about = [
        transformers.__version__,
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).digest()


def check_feature_layer(layer: int, num_layers: int) -> int:
    """Return `layer`, or raise `Unusable` when the model has no such layer."""
    if layer >= num_layers:
        raise Unusable(f"feature_layer is {layer}; the model has layers 0 to {num_layers - 1}")
    return layer


def model_len(wanted: int | None, model_config: Any) -> int:
    """Return most tokens of prompt and response together, or raise `Unusable` beyond the model's own limit."""
    own = position_limit(model_config)
    if wanted is not None and own is not None and wanted > own:
        raise Unusable(f"max_model_len is {wanted}; the model holds at most {own}")
    return wanted or own or UNLIMITED_MODEL_LEN
