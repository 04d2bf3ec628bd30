"""Chats to token ids and token ids to text, by the model's own tokenizer and chat template."""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pxd.models.config import ModelConfig
from pxd.models.detokenizer import Detokenizer
from pxd.models.errors import ModelError
from pxd.models.pieces import Pieces
from pxd.models.templates import Render, python_template
from pxd.models.thinking import Thoughts, markers_of

TOKENIZERS = ("tokenizer.*", "vocab.*", "tekken.json", "*.model", "*.tiktoken", "*.bpe")
"""One of these is there wherever there is a tokenizer."""

_LAST_TOKENS = 16
"""Of a prompt, enough to hold the longest marker of thoughts."""


def check_tokenizer(path: Path) -> None:
    """Raises `ModelError` where a model directory has no tokenizer at all.

    For some models transformers would make an empty one up.
    """
    if not any(any(path.glob(pattern)) for pattern in TOKENIZERS):
        raise ModelError(
            f"{path} has no tokenizer; put tokenizer.json and tokenizer_config.json of the model "
            "there that it was made from"
        )


class MessageLike(Protocol):
    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...


class OptionRefused(ModelError):
    """A template option that is not for a request to set, or that the template cannot use."""


class ChatTokenizer:
    """A model's tokenizer. `eos` are the ids that end an answer; `render` takes the place of the
    tokenizer's own template; the rest is what the model wants where a request does not say."""

    def __init__(
        self,
        tokenizer: Any,
        eos: tuple[int, ...],
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        render: Render | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._render = render
        self._pieces = Pieces(tokenizer)
        self._markers = markers_of(tokenizer)
        self.eos = eos
        self.temperature, self.top_p = temperature, top_p
        self.top_k, self.min_p = top_k, min_p

    @classmethod
    def load(cls, path: Path) -> "ChatTokenizer":
        """Load from a model directory: slow, for a worker thread. Raises `ModelError`."""
        config = ModelConfig.read(path)
        tokenizer = _load_tokenizer(path)
        own = tokenizer.eos_token_id
        eos = dict.fromkeys([*config.eos, *([own] if isinstance(own, int) else [])])
        render = python_template(tokenizer.init_kwargs.get("chat_template_type"))
        return cls(tokenizer, tuple(eos), *config.sampling, render=render)

    def encode_chat(
        self, messages: Sequence[MessageLike], options: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of the templated chat, up to where the assistant's answer begins.

        `options` are variables of the template. Raises `OptionRefused` for some of them, and
        `ModelError` where there is no template or it refuses the messages.
        """
        options = options or {}
        self._check_options(options)
        template = self._tokenizer.chat_template
        if not template and self._render is None:
            raise ModelError("this model has no chat template, so it cannot chat")
        knows_developer = self._render is None and "developer" in str(template)
        chat = [
            {
                # Most templates silently drop roles they do not know.
                "role": "system"
                if message.role == "developer" and not knows_developer
                else message.role,
                "content": message.content,
            }
            for message in messages
        ]
        from jinja2 import TemplateError

        try:
            ids = self._apply(chat, options)
        except TemplateError as error:
            raise ModelError(f"the model's chat template refuses this chat: {error}") from error
        except Exception as error:
            if options:
                # A template reckons with values of some type, and clients send any.
                raise OptionRefused(
                    f"the model's chat template cannot use these options: {error}"
                ) from error
            if self._render is None:
                raise
            # A template in Python says by any exception what it refuses.
            raise ModelError(f"the model's chat template refuses this chat: {error}") from error
        return list(ids)

    def _apply(self, chat: list[dict[str, str]], options: Mapping[str, Any]) -> Any:
        if self._render is not None:
            text = self._render(chat, add_generation_prompt=True, **options)
            return self._tokenizer.encode(text, add_special_tokens=False)
        return self._tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False, **options
        )

    def _check_options(self, options: Mapping[str, Any]) -> None:
        # Among them `chat_template`: whose template runs here is not for a client to say.
        taken = {*inspect.signature(self._tokenizer.apply_chat_template).parameters, "messages"}
        for name in options:
            if name in taken or not name.isidentifier():
                raise OptionRefused(f"{name[:64]!r} cannot be set by a request")

    def thoughts(self, prompt: Sequence[int]) -> Thoughts:
        """What tells thoughts from the answer to `prompt`, which may end in their beginning."""
        if self._markers is None:
            return Thoughts(None)
        # Only the very end counts: a client may write markers into its messages.
        end = self._decode(list(prompt[-_LAST_TOKENS:])).rstrip()
        return Thoughts(self._markers, begun=end.endswith(self._markers.begin))

    def knows(self, token: int) -> bool:
        """Whether an id stands for anything."""
        return self._pieces.name(token) is not None

    def piece(self, token: int) -> bytes:
        """See `Pieces.of`."""
        return self._pieces.of(token)

    def detokenizer(self) -> Detokenizer:
        """A fresh one for one answer."""
        return Detokenizer(self._decode)

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up spaces would take back text already sent, and damages code.
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _load_tokenizer(path: Path) -> Any:
    check_tokenizer(path)
    # Or the import warns about frameworks that nobody here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer, PreTrainedConfig

    def load(**options: Any) -> Any:
        return AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True, **options
        )

    try:
        try:
            return load()
        except StrictDataclassError:
            # Its configuration is odd for transformers; that need not concern its tokenizer.
            return load(config=PreTrainedConfig.from_pretrained(str(path), local_files_only=True))
    except Exception as error:
        # Tokenizers of all makers run here, and a bad one must not end the daemon.
        words = " ".join(str(error).split())
        raise ModelError(
            f"the tokenizer in {path} cannot be loaded; fetch it again or put that of the model "
            f"there that it was made from: {words}"
        ) from error
