import pytest
from sounds import write_tone

from fedpriv.data.common_voice import build_common_voice
from fedpriv.data.config import DataConfig, PartitionConfig, SpeechConfig
from fedpriv.data.text import ENGLISH
from fedpriv.errors import InputError

NATURAL = PartitionConfig(kind="natural")
HEADER = "client_id\tpath\tsentence_id\tsentence\tup_votes\n"


def write_table(folder, name, *rows, header=HEADER):
    """Rows are (client, clip number, sentence); clips that are missing are written."""
    (folder / "clips").mkdir(exist_ok=True)
    lines = [f"{client}\tcv_{clip}.mp3\t77\t{sentence}\t2\n" for client, clip, sentence in rows]
    (folder / f"{name}.tsv").write_text(header + "".join(lines), encoding="utf-8")
    for _, clip, _ in rows:
        path = folder / "clips" / f"cv_{clip}.mp3"
        if not path.exists():
            write_tone(path, seconds=0.2, rate=48_000)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "en"
    folder.mkdir()
    anna = [("anna", 2, "Well, yes."), ("anna", 1, '"No, he said.')]
    ben = [("ben", 3, "It’s late")]
    cleo = [("cleo", 4, "Third"), ("cleo", 5, "Fourth")]
    write_table(folder, "train", *anna, *ben, cleo[0])
    write_table(folder, "dev", ("dora", 6, "Develop"))
    write_table(folder, "test", ("emil", 7, "Tests"), ("emil", 8, "More tests"))
    write_table(folder, "other", *cleo)
    write_table(folder, "validated", *anna, *ben, *cleo, ("emil", 7, "Tests"))
    return folder


def build(folder, seed=1, **changes):
    settings = {"name": "common_voice", "path": folder, "partition": NATURAL, **changes}
    return build_common_voice(DataConfig(**settings), seed)


def clips(recordings):
    return [int(one.path.rpartition("_")[2].removesuffix(".mp3")) for one in recordings]


def test_contributors_are_users(folder):
    dataset = build(folder)
    assert dataset.user_ids == ("speaker-anna", "speaker-ben", "speaker-cleo")
    assert [clips(user) for user in dataset.users] == [[1, 2], [3], [4]]
    assert clips(dataset.held_out) == [7, 8]
    assert dataset.alphabet.characters == ENGLISH
    assert dataset.description == (
        "common_voice (en: train): 3 speakers as users; 2 recordings by 1 speakers for test"
    )
    assert dataset.sizes == "3 users with 1 to 2 recordings each, 4 in all"


def test_what_is_said_of_it_is_true(folder):
    speech = SpeechConfig(train_subsets=("validated",), public_subsets=("other",))
    for dataset in (build(folder), build(folder, speech=speech)):
        held_out = {"emil"} if clips(dataset.held_out) == [7, 8] else set()
        assert held_out
        assert not {f"speaker-{name}" for name in held_out} & set(dataset.user_ids)
        assert (dataset.facts.users, dataset.facts.example) == ("person", "recording")
        assert dataset.facts.held_out == "others"
    assert "speaker-cleo" not in dataset.user_ids
    assert (build(folder).facts.public, dataset.facts.public) == ("none", "others")


def test_a_quote_does_not_have_to_be_closed(folder):
    dataset = build(folder, speech=SpeechConfig(on_bad="stop"))
    user = dataset.user(0)
    assert user.lengths.tolist() == [3_200, 3_200]
    texts = [dataset.alphabet.decode(target.tolist()) for target in user.targets]
    assert texts == ["no he said", "well yes"]


def test_development_measures_on_dev(folder):
    assert clips(build(folder, evaluation="development").held_out) == [6]


def test_public_and_held_out_contributors_are_no_users(folder):
    speech = SpeechConfig(train_subsets=("validated",), public_subsets=("other",))
    dataset = build(folder, speech=speech)
    assert dataset.user_ids == ("speaker-anna", "speaker-ben")
    assert clips(dataset.public) == [4, 5]
    assert dataset.alphabet.characters == "dfhiortu"


def test_held_out_contributors_are_not_public(folder):
    speech = SpeechConfig(train_subsets=("train",), public_subsets=("validated",))
    with pytest.raises(InputError, match="no training speaker here who is not also held out or"):
        build(folder, speech=speech)
    write_table(folder, "train", ("fay", 9, "Alone"))
    dataset = build(folder, speech=speech)
    assert dataset.user_ids == ("speaker-fay",)
    assert clips(dataset.public) == [1, 2, 4, 5]
    assert clips(dataset.public_held_out) == [3]


def test_a_clip_of_two_tables_counts_once(folder):
    dataset = build(folder, speech=SpeechConfig(train_subsets=("train", "validated")))
    assert [clips(user) for user in dataset.users] == [[1, 2], [3], [4, 5]]


def test_bad_clips_are_skipped_or_stop_the_run(folder):
    write_table(folder, "train", ("anna", 1, "Fine"), ("anna", 2, "Größe"), ("anna", 3, ""))
    (folder / "clips" / "cv_1.mp3").write_bytes(b"")
    user = build(folder).user(0)
    assert (len(user), user.skipped) == (0, 3)
    with pytest.raises(InputError, match=r"cv_1\.mp3: empty, 0 bytes"):
        build(folder, speech=SpeechConfig(on_bad="stop")).user(0)


def test_a_row_that_ends_early_has_no_transcript(folder):
    write_table(folder, "train", header=HEADER + "anna\tcv_1.mp3\n")
    with pytest.raises(InputError, match=r"cv_1\.mp3: no transcript"):
        build(folder, speech=SpeechConfig(on_bad="stop")).user(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"train\.tsv: no column client_id, path, sentence"),
        (b"client_id,path,sentence\n", r"train\.tsv: no column client_id, path, sentence"),
        (b"client_id\tpath\nanna\tx.mp3\n", r"train\.tsv: no column sentence"),
        (HEADER.encode(), r"train\.tsv: lists no recordings"),
        (HEADER.encode() + b"anna\n", r"train\.tsv: line 2 has no client_id or no path"),
        (HEADER.encode() + b"a\tb.mp3\t1\t\xff\t2\n", r"train\.tsv: cannot be read"),
        (HEADER.encode() + b"a" * 200_000, r"train\.tsv: cannot be read .*field larger than"),
    ],
)
def test_a_malformed_table(folder, content, message):
    (folder / "train.tsv").write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        build(folder)
    assert "\n" not in str(refused.value)


def test_a_missing_table(folder):
    expected = r"data\.path: .*invalidated\.tsv is missing; .*Mozilla Common Voice"
    with pytest.raises(InputError, match=expected):
        build(folder, speech=SpeechConfig(train_subsets=("invalidated",)))
    with pytest.raises(InputError, match=r"data\.path must name the folder of common_voice"):
        build(None)
