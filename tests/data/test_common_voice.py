import pytest
from schema import data_options
from sounds import write_tone

from fedpriv.data.common_voice import build_common_voice
from fedpriv.data.partition import PartitionConfig
from fedpriv.data.text import ENGLISH
from fedpriv.errors import EnvironmentFault, InputError

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
    return build_common_voice(data_options(**settings), seed)


def clips(recordings):
    return [int(one.path.rpartition("_")[2].removesuffix(".mp3")) for one in recordings]


def test_contributors_are_users(folder):
    dataset = build(folder)
    assert dataset.user_ids == ("speaker-anna", "speaker-ben", "speaker-cleo")
    assert [clips(user) for user in dataset.users] == [[1, 2], [3], [4]]
    assert clips(dataset.held_out) == [7, 8]
    assert dataset.alphabet.characters == ENGLISH
    assert dataset.description == (
        "common_voice (en: train): 3 speakers as users; 2 recordings by 1 speaker for test"
    )
    assert dataset.sizes == "3 users with 1 to 2 recordings each, 4 in all"


def test_what_is_said_of_it_is_true(folder):
    speech = {"train_subsets": ("validated",), "public_subsets": ("other",)}
    for dataset in (build(folder), build(folder, speech=speech)):
        held_out = {"emil"} if clips(dataset.held_out) == [7, 8] else set()
        assert held_out
        assert not {f"speaker-{name}" for name in held_out} & set(dataset.user_ids)
        assert (dataset.facts.users, dataset.facts.example) == ("person", "recording")
        assert dataset.facts.held_out == "others"
    assert "speaker-cleo" not in dataset.user_ids
    assert (build(folder).facts.public, dataset.facts.public) == ("none", "others")


def test_a_quote_does_not_have_to_be_closed(folder):
    dataset = build(folder, speech={"on_bad": "stop"})
    user = dataset.user(0)
    assert user.lengths.tolist() == [3_200, 3_200]
    texts = [dataset.alphabet.decode(target.tolist()) for target in user.targets]
    assert texts == ["no he said", "well yes"]


def test_development_measures_on_dev(folder):
    assert clips(build(folder, evaluation="development").held_out) == [6]


def test_public_and_held_out_contributors_are_no_users(folder):
    speech = {"train_subsets": ("validated",), "public_subsets": ("other",)}
    dataset = build(folder, speech=speech)
    assert dataset.user_ids == ("speaker-anna", "speaker-ben")
    assert clips(dataset.public) == [4, 5]
    assert dataset.alphabet.characters == "dfhiortu"


def test_held_out_contributors_are_not_public(folder):
    speech = {"train_subsets": ("train",), "public_subsets": ("validated",)}
    with pytest.raises(InputError, match="no training speaker here who is not also held out or"):
        build(folder, speech=speech)
    write_table(folder, "train", ("fay", 9, "Alone"))
    dataset = build(folder, speech=speech)
    assert dataset.user_ids == ("speaker-fay",)
    assert clips(dataset.public) == [1, 2, 4, 5]
    assert clips(dataset.public_held_out) == [3]


def test_a_clip_of_two_tables_counts_once(folder):
    dataset = build(folder, speech={"train_subsets": ("train", "validated")})
    assert [clips(user) for user in dataset.users] == [[1, 2], [3], [4, 5]]


def test_bad_clips_are_skipped_or_stop_the_run(folder):
    write_table(folder, "train", ("anna", 1, "Fine"), ("anna", 2, "Größe"), ("anna", 3, ""))
    (folder / "clips" / "cv_1.mp3").write_bytes(b"")
    user = build(folder).user(0)
    assert (len(user), user.skipped) == (0, 3)
    with pytest.raises(InputError, match=r"cv_1\.mp3: empty, 0 bytes"):
        build(folder, speech={"on_bad": "stop"}).user(0)


def read_rows(folder, *lines, **speech):
    """Return the data set of a table of these rows, as bytes, and one good one of anna's."""
    rows = (b"anna\tcv_1.mp3\t77\tGood\t2", *lines)
    (folder / "train.tsv").write_bytes(HEADER.encode() + b"\n".join(rows) + b"\n")
    return build(folder, speech=dict(**speech))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (b"anna\tcv_2.mp3", "has 2 fields and line 1 has 5"),
        (b"anna\tcv_2.mp3\t77\tToo\tmany\t2", "has 6 fields and line 1 has 5"),
        (b"anna\t\t77\tNo clip\t2", "has no client_id or no path"),
        (b"anna\tcv_\x002.mp3\t77\tNul\t2", "has a path that names no clip"),
        (b"anna\t../clips/cv_2.mp3\t77\tElsewhere\t2", "has a path that names no clip"),
        (b"anna\t._cv_2.mp3\t77\tHidden\t2", "has a path that names no clip"),
        (b"anna\tcv_2.mp3\t77\tGr\xf6\xdfe\t2", "is not UTF-8"),
        (b"anna\tcv_2.mp3\t" + b"a" * 200_000, "has 3 fields and line 1 has 5"),
    ],
)
def test_a_damaged_row_is_a_bad_recording_of_its_speaker(folder, row, problem):
    dataset = read_rows(folder, row, b"ben\tcv_3.mp3\t77\tFine\t2")
    assert dataset.user_ids == ("speaker-anna", "speaker-ben")
    anna, ben = dataset.user(0), dataset.user(1)
    assert (len(anna), anna.skipped, len(ben), ben.skipped) == (1, 1, 1, 0)
    stopping = read_rows(folder, row, on_bad="stop")
    with pytest.raises(InputError, match=rf"train\.tsv: line 3 {problem}") as refused:
        stopping.user(0)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "row",
    [
        b"and the rest of a sentence\t2",
        b"phantom\tcv_2.mp3",
        b"\tcv_2.mp3\t77\tWhose?\t2",
        b"phan\x00tom\tcv_2.mp3\t77\tNul\t2",
        b"phan\xfftom\tcv_2.mp3\t77\tBytes\t2",
        b"ph\xe2\x80\xa8m\tcv_2.mp3\t77\tLine separator\t2",
        HEADER.encode().strip(),
    ],
)
def test_a_row_of_nobody_makes_no_user(folder, row):
    dataset = read_rows(folder, row)
    assert dataset.user_ids == ("speaker-anna",)
    assert dataset.user(0).skipped == 0
    assert dataset.sizes.endswith("; 1 row of nobody, left out")
    dataset.require_usable()
    with pytest.raises(InputError, match=r"train\.tsv: line 3 "):
        read_rows(folder, row, on_bad="stop").require_usable()


@pytest.mark.parametrize("stray", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", '"'])
def test_nothing_but_a_line_feed_ends_a_row(folder, stray):
    row = f"ben\tcv_3.mp3\t77\tOne{stray}two\t2".encode()
    dataset = read_rows(folder, row, on_bad="stop")
    assert dataset.user_ids == ("speaker-anna", "speaker-ben")
    assert dataset.alphabet.decode(dataset.user(1).targets[0].tolist()) == "one two"
    assert not dataset.strays


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_a_byte_order_mark_is_no_part_of_a_column(folder, ending):
    for table in ("train", "test"):
        content = (folder / f"{table}.tsv").read_bytes()
        (folder / f"{table}.tsv").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", ending))
    dataset = build(folder, speech={"on_bad": "stop"})
    assert dataset.user_ids == ("speaker-anna", "speaker-ben", "speaker-cleo")
    assert dataset.user(0).lengths.tolist() == [3_200, 3_200]


def test_clips_of_old_releases_are_listed_without_their_ending(folder):
    dataset = read_rows(folder, b"anna\tcv_2\t77\tOld\t2", on_bad="stop")
    assert clips(dataset.users[0]) == [1, 2]
    assert dataset.user(0).lengths.tolist() == [3_200, 3_200]


@pytest.mark.parametrize("name", ["cv_1.mp3", "cv_1"])
def test_a_clip_of_two_people_is_refused(folder, name):
    expected = r"cv_1\.mp3 is listed for two speakers, anna \(training\) and ben \(training\)"
    with pytest.raises(InputError, match=expected):
        read_rows(folder, f"ben\t{name}\t77\tGood\t2".encode()).require_usable()


def test_whoever_lists_the_clip_of_another_decides_for_itself_alone(folder):
    """A deployment, which checks no such thing: its nodes would lose all others with it."""
    before = read_rows(folder).user(0)
    dataset = read_rows(folder, b"ben\tcv_1.mp3\t77\tGood\t2")
    assert dataset.user_ids == ("speaker-anna", "speaker-ben")
    assert dataset.user(0).inputs.equal(before.inputs)
    assert (len(dataset.user(1)), dataset.user(1).skipped) == (1, 0)


@pytest.mark.parametrize(("table", "part"), [("test", "held out"), ("other", "public")])
def test_a_clip_of_a_user_is_not_measured_and_not_public(folder, table, part):
    write_table(folder, table, ("zoe", 3, "It’s late"))
    expected = rf"cv_3\.mp3 is listed for two speakers, ben \(training\) and zoe \({part}\)"
    with pytest.raises(InputError, match=expected):
        build(folder, speech={"public_subsets": ("other",)}).require_usable()


def test_a_clip_with_two_sentences_has_none(folder):
    dataset = read_rows(folder, b"anna\tcv_2.mp3\t77\tOne\t2", b"anna\tcv_2.mp3\t77\tTwo\t2")
    assert (len(dataset.user(0)), dataset.user(0).skipped) == (1, 1)


def test_clips_that_are_not_unpacked_are_nobodys_fault(folder):
    dataset = build(folder)
    for clip in (folder / "clips").iterdir():
        clip.unlink()
    for _ in range(2):
        with pytest.raises(EnvironmentFault, match=r"clips: this folder is missing or empty"):
            dataset.user(0)
        if (folder / "clips").exists():
            (folder / "clips").rmdir()


def test_a_missing_clip_is_a_bad_recording_and_a_population_of_them_is_none(folder):
    dataset = build(folder)
    (folder / "clips" / "cv_1.mp3").unlink()
    assert (len(dataset.user(0)), dataset.user(0).skipped) == (1, 1)
    dataset.require_usable()
    for number in (2, 3, 4):
        (folder / "clips" / f"cv_{number}.mp3").unlink()
    expected = (
        r"none of the users' recordings can be used; .*the first: .*cv_1\.mp3: cannot be read"
    )
    with pytest.raises(InputError, match=expected):
        dataset.require_usable()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"train\.tsv: no column client_id, path, sentence"),
        (b"client_id,path,sentence\n", r"train\.tsv: no column client_id, path, sentence"),
        (b"client_id\tpath\nanna\tx.mp3\n", r"train\.tsv: no column sentence"),
        (HEADER.encode(), r"train\.tsv: lists no recordings"),
        (
            HEADER.encode() + b"anna\n",
            r"train\.tsv: lists no recordings that can be used; .*train\.tsv: line 2 has 1 fields",
        ),
        (HEADER.encode("utf-16"), r"train\.tsv: is in UTF-16; save it as UTF-8"),
    ],
)
def test_a_malformed_table(folder, content, message):
    (folder / "train.tsv").write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        build(folder)
    assert "\n" not in str(refused.value)


def test_a_missing_table(folder):
    expected = r"data\.path: .*invalidated\.tsv does not exist; name .*Mozilla Common Voice"
    with pytest.raises(InputError, match=expected):
        build(folder, speech={"train_subsets": ("invalidated",)})
    with pytest.raises(InputError, match=r"data\.path must name the folder of common_voice"):
        build(None)
