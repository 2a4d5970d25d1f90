"""A model's tokenizer and chat template, and the model's limits, for both engines. transformers is imported late."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from poise.algorithms.features import default_feature_layer
from poise.errors import InvalidRequest, Unusable
from poise.generation.prompts.chat_template import ChatTemplates
from poise.generation.prompts.time_limit import LimitReached, TimeLimit
from poise.runtime.models.decoder import position_limit
from poise.runtime.models.generation_config import load_generation_config
from poise_client.types import Message

DEFAULT_MODEL_LEN = 8192
"""`max_model_len` if neither the settings nor the model limit it. Recurrent models have no limit."""


class Tokenizer:
    """Converts text to token ids and back, and knows which ids end a response."""

    def __init__(self, tokenizer: Any, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._templates = ChatTemplates()
        self.stop_token_ids = stop_token_ids
        self._special_texts = _special_texts(tokenizer)
        self.digest = _digest(tokenizer)
        """SHA-256 of everything that decides how a prompt is tokenized."""

    @classmethod
    def load(cls, model: str) -> Tokenizer:
        """Load a model's tokenizer. Raises `OSError` or `ValueError` if there is none."""
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        tokenizer("")  # the first call resets padding and truncation, which is not thread-safe
        stops = {tokenizer.eos_token_id}
        # The learner reports problems in the generation config.
        generation_config, _ = load_generation_config(model, transformers.GenerationConfig)
        declared = None if generation_config is None else generation_config.eos_token_id
        stops |= set(declared) if isinstance(declared, list) else {declared}
        return cls(tokenizer, frozenset(stop for stop in stops if stop is not None))

    def encode(self, content: str | Sequence[Message], limit: TimeLimit | None = None) -> list[int]:
        """Return the token ids of a text, or of a conversation with its generation prompt.

        A text that already begins with BOS gets no second one.

        Raises:
            InvalidRequest: the tokenizer rejects the text, the chat template rejects the conversation, or there is no
                chat template.
            LimitReached: the chat template exceeds `limit`.
        """
        if isinstance(content, str):
            try:
                ids = list(self._tokenizer(content)["input_ids"])
            except Exception as error:  # some tokenizers have code of their own
                raise InvalidRequest.field("text", f"is rejected by the model's tokenizer: {error}") from error
            return ids[1:] if self._has_second_bos(content, ids) else ids
        try:
            return self._encode_chat(content, limit or TimeLimit())
        except LimitReached:
            raise
        except Exception as error:  # templates are programs and raise any type
            raise InvalidRequest.field("chat", f"is rejected by the model's chat template: {error}") from error

    def _encode_chat(self, messages: Sequence[Message], limit: TimeLimit) -> list[int]:
        import transformers

        tokenizer = self._tokenizer
        if type(tokenizer).apply_chat_template is not transformers.PreTrainedTokenizerBase.apply_chat_template:
            # A tokenizer with code instead of a template, such as Mistral's.
            chat = [dict(message) for message in messages]
            return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
        template = tokenizer.get_chat_template()
        text = self._templates.render(template, messages, tokenizer.special_tokens_map, limit)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int], *, with_special: bool = False) -> str:
        """Return the text, without special tokens unless `with_special`."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=not with_special)
        return text

    def contains_special_token(self, stops: Sequence[str]) -> bool:
        """Return whether a stop string contains a special token, and so occurs only in text decoded with them."""
        return any(special in stop for stop in stops for special in self._special_texts)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token, including special tokens."""
        return [self._tokenizer.decode([token]) for token in token_ids]

    def _has_second_bos(self, text: str, ids: Sequence[int]) -> bool:
        """Return whether the tokenizer added BOS to a text that begins with it."""
        bos, bos_id = self._tokenizer.bos_token, self._tokenizer.bos_token_id
        if bos_id is None or not text.startswith(bos) or list(ids[:2]) != [bos_id, bos_id]:
            return False
        return list(self._tokenizer("")["input_ids"][:1]) == [bos_id]


def _special_texts(tokenizer: Any) -> frozenset[str]:
    """Return the texts of the special tokens, which `decode` leaves out."""
    added = tokenizer.added_tokens_decoder.values()
    return frozenset({str(token) for token in added if token.special} | set(tokenizer.all_special_tokens))


def _digest(tokenizer: Any) -> bytes:
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)  # only fast tokenizers have one
    parts = [
        transformers.__version__,
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).digest()


def resolve_feature_layer(configured: int | None, num_layers: int) -> int:
    """Return the decoder layer to pool. Raises `Unusable` if the model does not have the configured one."""
    if configured is None:
        return default_feature_layer(num_layers)
    if configured >= num_layers:
        raise Unusable(f"feature_layer is {configured}; required: 0 to {num_layers - 1}, the model's decoder layers")
    return configured


def resolve_max_model_len(configured: int | None, model_config: Any) -> int:
    """Return the most tokens of prompt and response together. Raises `Unusable` beyond the model's own limit."""
    limit = position_limit(model_config)
    if configured is not None and limit is not None and configured > limit:
        raise Unusable(f"max_model_len is {configured}; required: at most {limit}, the model's limit")
    return configured or limit or DEFAULT_MODEL_LEN
