"""What both engines need of a model's tokenizer and limits. transformers is imported late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from poise.errors import InvalidRequest, Unusable
from poise_client.types import Message


class Tokenizer:
    """Text to ids and back, and which ids end a response."""

    def __init__(self, tokenizer: Any, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids

    @classmethod
    def load(cls, model: str) -> Tokenizer:
        """Read a model's tokenizer. Raises `OSError` or `ValueError` when there is none."""
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        stops = {tokenizer.eos_token_id}
        try:
            declared = transformers.GenerationConfig.from_pretrained(model).eos_token_id
        except OSError:  # a model without generation_config.json
            declared = None
        stops |= set(declared) if isinstance(declared, list) else {declared}
        return cls(tokenizer, frozenset(stop for stop in stops if stop is not None))

    def encode(self, content: str | Sequence[Message]) -> list[int]:
        """Return ids of a text as it stands, or of a conversation with its generation prompt.

        Raises:
            InvalidRequest: a conversation that the chat template refuses, or no template.
        """
        if isinstance(content, str):
            return list(self._tokenizer(content)["input_ids"])
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in content], add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # templates are programs: they raise what they like
            raise InvalidRequest.field("chat", f"the model's chat template refuses it: {error}") from error
        return list(rendered["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return each token's own text, special tokens included."""
        return [self._tokenizer.decode([token]) for token in token_ids]


def check_feature_layer(layer: int, num_layers: int) -> int:
    """Return `layer`, or raise `Unusable` when the model has no such layer."""
    if layer >= num_layers:
        raise Unusable(f"feature_layer is {layer}; the model has layers 0 to {num_layers - 1}")
    return layer


def model_len(wanted: int | None, model_config: Any) -> int:
    """Return most tokens of prompt and response together, or raise `Unusable` beyond the model's own limit."""
    own: int = model_config.max_position_embeddings
    if wanted is not None and wanted > own:
        raise Unusable(f"max_model_len is {wanted}; the model holds at most {own}")
    return wanted or own
