"""Vocabularies: what is streamed token by token is what the tokens say together."""

import json

import pytest
from data.factories import save_tokenizer

from ssmkit.data.vocabulary import ByteVocabulary, TokenizerVocabulary, vocabulary_of

TEXTS = ["plain", "naïve café", "日本語と emoji 🎉🎉", "", "line\nline\ttab"]


def stream(decoder, tokens):
    pieces = [decoder.push(token) for token in tokens]
    return pieces, "".join(pieces) + decoder.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_stream_as_whole_characters(text):
    vocabulary = ByteVocabulary()
    tokens = vocabulary.encode(text)
    assert tokens[0] in vocabulary.end
    pieces, whole = stream(vocabulary.decoder([0]), tokens[1:])
    assert whole == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_bytes_that_are_not_utf_8_show_as_replaced():
    """A wrong byte at once, an unfinished character when nothing more comes."""
    pieces, whole = stream(ByteVocabulary().decoder([0]), [0xFF, 0x61, 0xE2, 0x82])
    assert pieces == ["\ufffd", "a", "", ""]
    assert whole == "\ufffda\ufffd"


def test_prompts_with_undecodable_bytes_keep_them():
    assert ByteVocabulary().encode(b"a\xff".decode("utf-8", "surrogateescape")) == [0, 0x61, 0xFF]


@pytest.fixture
def tokenizer_file(tmp_path):
    return save_tokenizer(tmp_path)


@pytest.mark.parametrize("text", TEXTS[:3])
def test_words_stream_as_whole_characters(text, tokenizer_file):
    vocabulary = vocabulary_of(tokenizer_file.parent, 300)
    prompt, tokens = vocabulary.encode("the line"), vocabulary.encode(text)
    pieces, whole = stream(vocabulary.decoder(prompt), tokens)
    assert whole == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert vocabulary.encode("") == [0]


def test_ends_of_text_are_read_from_the_files_beside(tokenizer_file):
    assert TokenizerVocabulary(tokenizer_file).end == {0}
    (tokenizer_file.parent / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tokenizer_file.parent / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert TokenizerVocabulary(tokenizer_file).end == {0, 7, 9}


def test_a_vocabulary_that_is_missing_or_broken_is_named(tmp_path):
    assert isinstance(vocabulary_of(tmp_path, 256), ByteVocabulary)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.json, and a model of 50280 tokens .* --tokenizer"):
        vocabulary_of(tmp_path, 50280)
    pytest.importorskip("tokenizers")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at none.json"):
        vocabulary_of(tmp_path, 256, "none.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer.json"):
        vocabulary_of(tmp_path, 256)
