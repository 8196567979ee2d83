import gzip
import struct

import numpy as np
import pytest

from fedpriv.data.idx import find_idx, read_idx
from fedpriv.errors import EnvironmentFault, InputError

UINT8 = bytes([0, 0, 8, 2]) + struct.pack(">II", 2, 3) + bytes([0, 1, 2, 3, 4, 255])
INT32 = bytes([0, 0, 12, 1]) + struct.pack(">I", 3) + struct.pack(">iii", 1, -2, 2**31 - 1)
# Without the time, which would give tests other names in each process that collects them.
GZIPPED = gzip.compress(UINT8, mtime=0)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "some-idx"


def test_uint8(file):
    file.write_bytes(UINT8)
    array = read_idx(file)
    assert array.dtype == np.uint8
    assert array.tolist() == [[0, 1, 2], [3, 4, 255]]


def test_int32_is_big_endian_on_file_and_native_in_memory(file):
    file.write_bytes(INT32)
    array = read_idx(file)
    assert array.dtype == np.int32
    assert array.dtype.isnative
    assert array.flags.writeable
    assert array.tolist() == [1, -2, 2**31 - 1]


def test_found_with_and_without_gz(file):
    compressed = file.with_name("some-idx.gz")
    compressed.write_bytes(GZIPPED)
    assert find_idx(file) == find_idx(compressed) == compressed
    assert read_idx(file).shape == read_idx(compressed).shape == (2, 3)
    compressed.unlink()
    file.write_bytes(UINT8)
    assert find_idx(compressed) == file
    assert read_idx(compressed).shape == (2, 3)


def test_a_plain_file_with_a_gz_name_is_read(tmp_path):
    (tmp_path / "idx.gz").write_bytes(UINT8)
    assert read_idx(tmp_path / "idx").shape == (2, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (UINT8[:-1], r"truncated idx file: expected 18 bytes for shape \(2, 3\), found 17"),
        (UINT8[:3], "truncated idx file: expected at least 4 header bytes, found 3"),
        (UINT8[:9], "truncated idx file: expected 12 header bytes, found 9"),
        (b"", "truncated idx file: expected at least 4 header bytes, found 0"),
        (UINT8 + b"x", r"trailing bytes .*expected 18 bytes .*found 19"),
        (b"\x89PNG\r\n", "wrong idx magic: expected 00 00 08 .*found 89 50 4e"),
        (bytes([0, 0, 13]) + UINT8[3:], "wrong idx magic: .*found 00 00 0d"),
        (GZIPPED[:-9], "corrupt gzip file"),
        (GZIPPED + b"x", "corrupt gzip file"),
        (GZIPPED[:12] + b"\xff\xff\xff\xff", "corrupt gzip file"),
        # A header that announces 2**96 values must not be believed.
        (bytes([0, 0, 8, 3]) + b"\xff" * 12, "truncated idx file"),
    ],
)
def test_bad_content_is_one_line_that_names_the_file(file, content, message):
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_idx(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_absent_file(file):
    with pytest.raises(InputError, match="some-idx: no such file, with or without"):
        read_idx(file)


def test_unreadable_file(file, monkeypatch):
    file.write_bytes(UINT8)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(EnvironmentFault, match=r"some-idx: cannot be read \(Permission denied\)"):
        read_idx(file)
