"""Texts as tokens: bytes, or pieces of words that were learnt from public text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedpriv.data.parts import Inside
from fedpriv.data.records import needed
from fedpriv.errors import InputError
from fedpriv.sections import Section

NO_TOKEN = -100
"""A target that is not one: the padding of a sequence."""

BYTES = 256
"""The vocabulary of a tokenizer that knows nothing but bytes."""


class TokenizerConfig(Section):
    """What texts are cut into; of users' texts nothing is ever learnt."""

    kind: Literal["bytes", "bpe", "file"] = Field(
        default="bytes",
        description="bytes: the 256 bytes of UTF-8; bpe: pieces of words, learnt from public text "
        "by byte-pair encoding; file: a tokenizer.json of Hugging Face's tokenizers",
    )
    vocabulary: Annotated[int, Field(gt=BYTES, le=1_000_000)] = Field(
        default=1024, description="bpe only: the most tokens that are learnt"
    )
    public: Inside | None = Field(
        default=None,
        description="bpe only: file or folder of public text within data.path to learn from, which "
        "belongs to nobody; null: the held-out part",
    )
    file: Inside | None = Field(
        default=None, description="file only: name of the tokenizer.json within data.path"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if (self.kind == "file") != (self.file is not None):
            raise ValueError("kind: file and a file go together; write both, or neither")
        if self.kind != "bpe" and self.public is not None:
            raise ValueError(f"public is what kind: bpe learns from, and kind is {self.kind}")
        return self


class Tokens(Protocol):
    """Cuts texts into tokens."""

    @property
    def size(self) -> int:
        """Size of the vocabulary."""

    @property
    def sha256(self) -> bytes:
        """What tells it from others."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the tokens of a text."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens."""


class ByteTokens:
    """Each byte of UTF-8 is a token."""

    size = BYTES
    sha256 = b"bytes"

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the bytes of a text."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of bytes; those that are none are replaced."""
        return bytes(tokens).decode("utf-8", "replace")


class LearntTokens:
    """A tokenizer of Hugging Face's `tokenizers`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def size(self) -> int:
        """Size of the vocabulary."""
        return int(self._tokenizer.get_vocab_size())

    @cached_property
    def sha256(self) -> bytes:
        """The digest of its whole description."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).digest()

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the tokens of a text."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens."""
        return str(self._tokenizer.decode(list(tokens)))


def learnt(texts: Iterable[str], vocabulary: int) -> LearntTokens:
    """Learn byte-pair encoding from *public* texts; the same texts give the same tokens.

    Of users' texts it would be a release that no ledger charges.
    """
    tokenizers = _library()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return LearntTokens(tokenizer)


def read_tokens(path: Path) -> LearntTokens:
    """Read a tokenizer.json.

    Raises:
        InputError: it is none.
    """
    if not path.is_file():
        raise InputError(
            f"data.tokenizer.file: there is no file {path}; name a tokenizer.json within the "
            "folder of data.path"
        )
    tokenizers = _library()
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
        said = " ".join(str(error).split())[:200]
        raise InputError(f"data.tokenizer.file: {path} is no tokenizer.json ({said})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return LearntTokens(tokenizer)


def _library() -> Any:
    return needed("tokenizers", "data.tokenizer.kind")
