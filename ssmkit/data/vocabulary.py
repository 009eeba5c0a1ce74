"""Tokens of a language model and the text they stand for: bytes, or a tokenizer's file."""

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ssmkit.data.text import SEPARATOR


class Decoder(Protocol):
    """Tokens into text, as they come."""

    def push(self, token: int) -> str:
        """The text that is certain with this token; a character whose bytes are not all there waits."""

    def flush(self) -> str:
        """What was still waiting."""


class Vocabulary(Protocol):
    """Text into tokens and back. `end` are the tokens after which nothing follows."""

    end: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt; at least one."""

    def decoder(self, prompt: Sequence[int]) -> Decoder:
        """A decoder of what follows the prompt."""


class ByteDecoder:
    """UTF-8, where what is not UTF-8 shows as U+FFFD."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is certain with this byte."""
        return self.decoder.decode(bytes([token]))

    def flush(self) -> str:
        """U+FFFD if a character is unfinished."""
        return self.decoder.decode(b"", final=True)


class ByteVocabulary:
    """UTF-8 bytes, as in `Text`: a NUL begins a text, and so ends the one before."""

    end = frozenset({SEPARATOR})

    def encode(self, text: str) -> list[int]:
        """A NUL and the bytes."""
        return [SEPARATOR, *text.encode("utf-8", "surrogateescape")]

    def decoder(self, prompt: Sequence[int]) -> ByteDecoder:
        """A decoder; a prompt ends with a whole character."""
        return ByteDecoder()


class TokenizerDecoder:
    """Pieces of words; how a token reads may depend on those before it, so a few of them are decoded again with it."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer, self.tokens = tokenizer, list(prompt[-8:])
        self.before = 0
        self.shown = len(self.tokens)

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        self.tokens.append(token)
        new = self._new_text()
        if not new or new.endswith("\ufffd"):
            return ""
        self.before, self.shown = self.shown, len(self.tokens)
        return new

    def flush(self) -> str:
        """What was still waiting."""
        return self._new_text()

    def _new_text(self) -> str:
        known = self.tokenizer.decode(self.tokens[self.before : self.shown])
        text: str = self.tokenizer.decode(self.tokens[self.before :])
        return text[len(known) :]


class TokenizerVocabulary:
    """A tokenizer.json, read by the `tokenizers` package."""

    def __init__(self, file: str | Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(f"reading {file} needs tokenizers: pip install 'ssmkit[language]'") from error
        if not Path(file).is_file():
            raise FileNotFoundError(f"no tokenizer at {file}")
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        # The package raises nothing more precise.
        except Exception as error:
            raise ValueError(f"{file} is not a tokenizer.json: {error}") from error
        named: int | None = self.tokenizer.token_to_id("<|endoftext|>")
        self.end = frozenset(end_tokens(Path(file).parent) | (set() if named is None else {named}))

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt; an end of text before it, if it is empty."""
        return list(self.tokenizer.encode(text).ids) or sorted(self.end)[:1] or [0]

    def decoder(self, prompt: Sequence[int]) -> TokenizerDecoder:
        """A decoder of what follows the prompt."""
        return TokenizerDecoder(self.tokenizer, prompt)


def end_tokens(folder: Path) -> set[int]:
    """What the config files beside a model's weights call eos_token_id."""
    tokens: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            value = json.loads((folder / name).read_text()).get("eos_token_id")
            tokens.update(value if isinstance(value, list) else [] if value is None else [value])
    return tokens


def vocabulary_of(folder: str | Path, vocab_size: int, tokenizer: str | Path | None = None) -> Vocabulary:
    """The vocabulary of the weights in a folder.

    Args:
        tokenizer: A tokenizer.json; by default the one in the folder, or bytes if the model has 256 tokens.
    """
    beside = Path(folder) / "tokenizer.json"
    if tokenizer is not None or beside.is_file():
        return TokenizerVocabulary(tokenizer or beside)
    if vocab_size == 256:
        return ByteVocabulary()
    raise FileNotFoundError(
        f"{folder} has no tokenizer.json, and a model of {vocab_size} tokens does not write bytes; put the tokenizer.json "
        "it was trained with there, or name it with --tokenizer (state-spaces' models use that of EleutherAI/gpt-neox-20b)"
    )
