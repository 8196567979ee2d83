"""Texts become blocks of tokens; what they are cut into is learnt from public text alone."""

import math
import pickle

import numpy as np
import pytest
import torch
from held_out import held_out
from own_data import CASES, HELD_OUT, USERS, text_of, write_lines, write_texts
from pydantic import ValidationError
from schema import data_options

from fedpriv.data import build_dataset
from fedpriv.data.tokens import BYTES, NO_TOKEN, ByteTokens, learnt
from fedpriv.errors import InputError
from fedpriv.tasks.next_token import NextToken

BPE = {"kind": "bpe", "vocabulary": 300, "public": "public.en"}


def built(folder, seed=3, **options):
    settings = {"name": "text", "path": folder, "held_out": HELD_OUT, "block": 16}
    return build_dataset(data_options(**{**settings, **options}), seed)


def users_of(dataset):
    return {user_id: dataset.user(place) for place, user_id in enumerate(dataset.user_ids)}


def read_back(examples, tokens):
    """The text that blocks were cut from, but for its first token."""
    targets = examples.targets.flatten()
    return tokens.decode(targets[targets != NO_TOKEN].tolist())


@pytest.fixture
def folder(tmp_path):
    return write_texts(tmp_path / "texts")


def test_a_users_texts_are_joined_and_cut(folder):
    dataset = built(folder)
    assert dataset.user_ids == USERS
    assert (dataset.task, dataset.classes, dataset.input_shape) == ("next_token", BYTES, (16,))
    assert (dataset.facts.users, dataset.facts.example) == ("person", "block")
    read = dataset.user(2)
    whole = "\n".join(text_of(USERS[2], number) for number in range(2))
    assert read_back(read, ByteTokens()) == whole[1:]
    assert len(read) == math.ceil((len(whole.encode()) - 1) / 16)
    stream = np.frombuffer(whole.encode(), np.uint8)
    assert read.inputs.flatten()[: len(stream) - 1].tolist() == stream[:-1].tolist()


def test_texts_that_are_not_joined_are_cut_alone(folder):
    read = built(folder, join=None).user(0)
    texts = [text_of(USERS[0], number) for number in range(2)]
    assert len(read) == sum(math.ceil((len(text.encode()) - 1) / 16) for text in texts)
    assert read_back(read, ByteTokens()) == "".join(text[1:] for text in texts)


def test_a_vocabulary_is_learnt_from_public_text_alone(folder):
    dataset = built(folder, tokenizer=BPE)
    digest = dataset.digest()
    assert BYTES < dataset.classes <= 300
    tokens = dataset.records.tokens
    whole = "\n".join(text_of(USERS[1], number) for number in range(2))
    assert tokens.decode(tokens.encode(whole)) == whole
    assert len(tokens.encode(whole)) < len(whole.encode())
    for user in USERS:
        for path in (folder / user).iterdir():
            path.write_text("entirely different words, entirely different words " * 9)
    again = built(folder, tokenizer=BPE)
    assert again.records.tokens.sha256 == tokens.sha256
    assert again.digest() != digest
    assert learnt(["abab" * 9], 260).sha256 == learnt(["abab" * 9], 260).sha256


def test_public_text_is_nobodys_and_a_held_out_part_may_be_learnt_from(folder):
    (folder / "public.txt").write_text("words " * 99)
    assert "public" in built(folder).user_ids
    assert "public" not in built(folder, tokenizer={**BPE, "public": "public.txt"}).user_ids
    of_held_out = built(folder, tokenizer={"kind": "bpe", "vocabulary": 300})
    assert BYTES < of_held_out.classes <= 300
    with pytest.raises(InputError, match=r"data\.tokenizer\.public: bpe learns from public text"):
        built(folder, tokenizer={"kind": "bpe"}, held_out=None)


def test_a_tokenizer_in_a_file_is_the_one_that_is_used(folder):
    tokens = learnt(["or not to be"] * 5, 290)
    (folder / "tokenizer.json").write_text(tokens._tokenizer.to_str())
    dataset = built(folder, tokenizer={"kind": "file", "file": "tokenizer.json"})
    assert dataset.classes == tokens.size
    assert read_back(dataset.user(0), tokens) in "\n".join(text_of(USERS[0], n) for n in range(2))


def test_a_bad_text_is_one_record_of_one_user(folder):
    before = users_of(built(folder, tokenizer=BPE))
    (folder / USERS[3] / "0.txt").write_bytes(b"\xff\xfe not UTF-8")
    (folder / USERS[4] / "2.txt").write_bytes(b"")
    after = users_of(built(folder, tokenizer=BPE))
    assert (after[USERS[3]].skipped, after[USERS[4]].skipped) == (1, 1)
    assert 0 < len(after[USERS[3]]) < len(before[USERS[3]])
    for user in set(USERS) - {USERS[3]}:
        assert torch.equal(before[user].inputs, after[user].inputs)


def test_a_cap_keeps_blocks_drawn_for_each_user_alone(folder):
    whole = users_of(built(folder))
    capped = users_of(built(folder, examples_per_user=3))
    (folder / USERS[0] / "9.txt").write_text("one more text of somebody else")
    again = users_of(built(folder, examples_per_user=3))
    for user in USERS[1:]:
        assert len(capped[user]) == 3
        rows = {tuple(row) for row in whole[user].inputs.tolist()}
        assert {tuple(row) for row in capped[user].inputs.tolist()} <= rows
        assert torch.equal(capped[user].inputs, again[user].inputs)


def test_a_table_gives_what_files_give(folder, tmp_path):
    lines = write_lines(tmp_path / "lines")
    options = {"held_out": "test.csv", "user": "role", "text": "line"}
    in_table = built(lines / "people.csv", **options)
    for user, examples in users_of(built(folder)).items():
        if user in USERS:
            other = in_table.user(in_table.user_ids.index(user))
            assert torch.equal(examples.inputs, other.inputs)
    assert in_table.facts.held_out == "others"
    assert len(list(in_table.evaluation())) == 1
    assert len(built(lines, **options).user_ids) == len(USERS)


def test_held_out_texts_are_measured_by_perplexity_and_by_the_likeliest_token(folder):
    dataset = built(folder)

    class Uniform(torch.nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, BYTES)

    measured = NextToken().measure(Uniform(), [held_out(dataset)], 8)
    assert measured["perplexity"] == pytest.approx(BYTES, rel=1e-5)
    assert measured["accuracy"] == 0


def test_one_file_each_a_pattern_and_pickles(tmp_path):
    for user in USERS:
        (tmp_path / f"{user}.txt").write_text(text_of(user, 0), encoding="utf-8")
    dataset = built(tmp_path, held_out=None, tokenizer={})
    assert set(dataset.user_ids) < set(USERS)
    by_digit = built(tmp_path, held_out=None, pattern=r"user0?(?P<user>\d+)\.txt")
    assert all(name.isdigit() for name in by_digit.user_ids)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again.user(1).inputs, dataset.user(1).inputs)


def test_nothing_of_a_users_is_read_before_the_user(folder, monkeypatch):
    from fedpriv.data import texts

    opened = []
    own = texts.read_text
    monkeypatch.setattr(
        texts, "read_text", lambda path: opened.append(path.parent.name) or own(path)
    )
    dataset = built(folder, tokenizer=BPE)
    assert USERS[0] not in opened
    dataset.user(0)
    assert USERS[0] in opened
    assert USERS[1] not in opened


def test_joined_texts_are_refused_where_an_example_is_protected():
    assert data_options(name="text").caps()["join"] == "\n"
    assert data_options(name="text", join=None).caps()["join"] is None


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"kind": "words"},
        {"kind": "bpe", "vocabulary": 200},
        {"kind": "bpe", "public": "/etc/passwd"},
        {"kind": "file", "file": "../tokenizer.json"},
        {"kind": "bytes", "public": "public.en"},
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused(tokenizer):
    with pytest.raises(ValidationError):
        data_options(name="text", tokenizer=tokenizer)


@pytest.mark.parametrize("join", ["\n", None])
def test_blocks_that_are_padding_by_half_are_told(tmp_path, join):
    write_texts(tmp_path)
    for folder in tmp_path.iterdir():
        for path in folder.glob("*.txt") if folder.is_dir() else ():
            path.write_text("é" * 20)  # 40 bytes, twice a user
    longest = 40 if join is None else 81
    (note,) = built(tmp_path, join=join, tokenizer={}, block=2 * longest).notes
    whose = "text has" if join is None else "user's texts together have"
    assert f"data.block is {2 * longest} tokens and no {whose} more than {longest}:" in note
    assert f"write block: {longest} or less" in note
    assert not built(tmp_path, join=join, tokenizer={}, block=2 * longest - 1).notes
    assert built(tmp_path, join=join, tokenizer={}).sizes.endswith("cut into blocks of 16 tokens")


def test_blocks_of_a_tables_texts_are_told_too(tmp_path):
    write_lines(tmp_path)
    options = {"path": tmp_path / "people.csv", "held_out": "test.csv", "tokenizer": {}}
    columns = {"user": "role", "text": "line"}
    assert not built(tmp_path, **options, **columns).notes
    assert "is padding" in built(tmp_path, **options, **columns, block=4096).notes[0]


def test_cells_without_text_are_in_no_count(tmp_path):
    folder = write_lines(tmp_path / "lines")
    lines = (folder / "people.csv").read_text().splitlines()
    lines[2] = lines[2].split(",")[0] + ","
    (folder / "people.csv").write_text("\n".join(lines))
    options = {**CASES["text in a table"]["data"], "path": folder / "people.csv"}
    dataset = build_dataset(data_options(**options), 3)
    assert sum(dataset.user(place).skipped for place in range(len(USERS))) == 1
    assert f"{2 * len(USERS) - 1} in all, to be cut" in dataset.sizes
    assert "1 that cannot be used, left out" in dataset.sizes


@pytest.mark.parametrize(
    ("tokenizer", "told"),
    [
        ({"kind": "file", "file": "no.json"}, "file: there is no file .*no.json; name a tokenizer"),
        (
            {"kind": "bpe", "public": "no.txt"},
            "public: there is no .*no.txt; name a file or folder",
        ),
    ],
)
def test_a_tokenizers_file_that_is_not_there_is_said_with_what_to_name(folder, tokenizer, told):
    with pytest.raises(InputError, match=rf"^data\.tokenizer\.{told}.*within the folder of data"):
        built(folder, tokenizer=tokenizer)
