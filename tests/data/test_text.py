import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpriv.data.text import BLANK, ENGLISH, Alphabet, normalise
from fedpriv.errors import InputError


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("CHAPTER ONE", "chapter one"),
        ("  two\tspaces \n", "two spaces"),
        ("It’s o'clock", "it's o'clock"),
        ("well-known, (really)!", "well known really"),
        ("ｆｕｌｌ ﬁ", "full fi"),
        ("cafe\u0301", "café"),
        ("ÄRGER", "ärger"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalise(given_text, expected):
    assert normalise(given_text) == expected


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(ENGLISH))
def test_decoding_undoes_encoding(text):
    alphabet = Alphabet(ENGLISH)
    indices = alphabet.encode(text)
    assert indices.dtype == torch.int64
    assert len(indices) == len(text)
    assert alphabet.decode(indices.tolist()) == text


def test_indices_leave_room_for_the_blank():
    alphabet = Alphabet("ab ")
    assert alphabet.classes == 4
    assert alphabet.encode("b a").tolist() == [2, 3, 1]
    assert alphabet.decode([BLANK, 1, BLANK, 2]) == "ab"


def test_unknown_characters_are_named():
    with pytest.raises(InputError, match=r"the transcript 'añb1' has unknown characters '1ñ'"):
        Alphabet("ab").encode("añb1")


def test_the_alphabet_of_texts_is_sorted():
    assert Alphabet.of(["Bad!", "a  cab"]).characters == " abcd"


@pytest.mark.parametrize("characters", ["", "aba"])
def test_an_alphabet_has_characters_once(characters):
    with pytest.raises(ValueError, match="each once"):
        Alphabet(characters)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_alphabet_file_has_one_character_a_line(tmp_path, ending, mark):
    path = tmp_path / "alphabet.txt"
    path.write_bytes((mark + ending.join([" ", "a", "é", ""])).encode())
    assert Alphabet.read(path).characters == " aé"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a\nbc\n", "entry 2 is 'bc'; write one character a line, each once"),
        (b"a\nb\na\n", "entry 3 is 'a'; write one character a line, each once"),
        (b"\n\n", "is empty; write one character a line"),
        (b"a\n\xff\n", "cannot read"),
        (b"\xff\xfea\0", "is in UTF-16; save it as UTF-8"),
    ],
)
def test_a_wrong_alphabet_file_is_refused(tmp_path, content, reason):
    path = tmp_path / "alphabet.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        Alphabet.read(path)
    assert reason in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_alphabet_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"data\.speech\.alphabet: cannot read .*none\.txt"):
        Alphabet.read(tmp_path / "none.txt")
