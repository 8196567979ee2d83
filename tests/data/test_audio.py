import errno
import itertools
import os
import pickle
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import loudest_frequency, tone, write_tone

from fedpriv.data.audio import AudioFile, JoinedFiles, read_audio
from fedpriv.errors import EnvironmentFault, FedprivError, InputError

RATE = 16_000


def patch(path: Path, at: int, field: str, value: int) -> Path:
    """Overwrite one field of a file's header."""
    content = bytearray(path.read_bytes())
    struct.pack_into(field, content, at, value)
    path.write_bytes(content)
    return path


def cut(path: Path, share: float) -> Path:
    """Leave the first part of a file."""
    os.truncate(path, int(path.stat().st_size * share))
    return path


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_every_format_and_rate_sounds_alike(tmp_path, extension, rate):
    path = write_tone(tmp_path / f"tone.{extension}", seconds=0.5, rate=rate)
    wave = read_audio(path, RATE, max_seconds=1)
    assert wave.dtype == np.float32
    assert len(wave) == 8_000
    assert loudest_frequency(wave, RATE) == pytest.approx(440, abs=2)
    assert np.abs(wave).max() == pytest.approx(0.5, abs=0.1)


def test_rates_without_a_common_factor(tmp_path):
    wave = read_audio(write_tone(tmp_path / "odd.wav", 0.5, rate=11_027), RATE, max_seconds=1)
    assert len(wave) == pytest.approx(8_000, abs=1)
    assert loudest_frequency(wave, RATE) == pytest.approx(440, abs=2)


def test_eight_channels_are_averaged(tmp_path):
    loudness = np.arange(8) / 8
    soundfile.write(tmp_path / "eight.wav", tone(0.1, RATE)[:, None] * loudness, RATE)
    wave = read_audio(tmp_path / "eight.wav", RATE, max_seconds=1)
    np.testing.assert_allclose(wave, tone(0.1, RATE) * loudness.mean(), atol=1e-4)


def test_an_overshoot_is_clipped(tmp_path):
    soundfile.write(tmp_path / "loud.wav", 3 * tone(0.1, 8_000), 8_000, subtype="FLOAT")
    assert np.abs(read_audio(tmp_path / "loud.wav", RATE, max_seconds=1)).max() == 1


@pytest.mark.parametrize("scale", [2**7, 2**15, 2**23, 2**31, 1e30])
@pytest.mark.parametrize(
    ("extension", "subtype"),
    [("wav", "FLOAT"), ("wav", "DOUBLE")],
)
def test_floats_in_the_scale_of_integers_are_refused(tmp_path, scale, extension, subtype):
    path = tmp_path / f"scaled.{extension}"
    soundfile.write(path, scale * tone(0.1, 8_000), 8_000, subtype=subtype)
    with pytest.raises(InputError, match=r"scaled.*: its samples go up to .* 1 is full scale"):
        read_audio(path, RATE, max_seconds=1)


@pytest.mark.parametrize("share", [1, 0.5])
@pytest.mark.parametrize("kind", ["AIFF", "AU", "CAF", "NIST", "RF64", "W64", "VOC", "IRCAM"])
def test_formats_whose_cut_files_would_pass_for_whole_ones_are_not_read(tmp_path, kind, share):
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(1, 8_000), 8_000, format=kind, subtype="PCM_16")
    cut(path, share)
    with pytest.raises(InputError, match=r"clip\.wav: (is a .* and only wav, .* convert it|not a)"):
        read_audio(path, RATE, max_seconds=2)


def test_a_file_without_samples_is_an_empty_sound(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 8_000)
    assert read_audio(tmp_path / "none.wav", RATE, max_seconds=1).shape == (0,)


def test_a_wav_file_from_a_pipe_does_not_know_its_size(tmp_path):
    path = write_tone(tmp_path / "piped.wav")
    patch(path, 4, "<I", 0xFFFFFFFF)
    patch(path, 40, "<I", 0xFFFFFFFF)
    assert len(read_audio(path, RATE, max_seconds=1)) == 1_600


def test_of_two_hours_no_more_is_decoded_than_may_be_used(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    soundfile.write(path, tone(0.1, 8_000), 8_000, subtype="PCM_U8")
    samples = 7_200 * 8_000
    patch(path, 4, "<I", samples + 36)
    patch(path, 40, "<I", samples)
    os.truncate(path, samples + 44)  # a sparse file: it takes no space on the disk
    read, decoded = soundfile.SoundFile.read, []

    def counting(self, frames, **options):
        block = read(self, frames, **options)
        decoded.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    expected = r"long\.wav: longer than data\.speech\.max_seconds \(36\)"
    with pytest.raises(InputError, match=expected):
        read_audio(path, RATE, max_seconds=36)
    assert sum(decoded) < 2 * 36 * 8_000


def flac_of(path, samples, total):
    """Write a FLAC file whose header says that it has `total` samples."""
    soundfile.write(path, samples, 8_000)
    content = bytearray(path.read_bytes())
    content[21] = content[21] & 0xF0 | total >> 32
    content[22:26] = (total & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("total", [0, 1, 7_000])
@pytest.mark.parametrize("tag", [b"", b"ID3\x04\0\0\0\0\x01\x05" + bytes(133)])
def test_a_flac_file_is_as_long_as_its_sound(tmp_path, total, tag):
    sound = tone(5, 8_000, frequency=300)
    path = flac_of(tmp_path / "stream.flac", sound, total)
    path.write_bytes(tag + path.read_bytes())
    wave = read_audio(path, 8_000, max_seconds=6)
    np.testing.assert_allclose(wave, sound, atol=1e-4)
    with pytest.raises(InputError, match=r"stream\.flac: longer than data\.speech\.max_seconds"):
        read_audio(path, 8_000, max_seconds=4.9)


@pytest.mark.parametrize("after", [b"TAG" + bytes(125), bytes(4096), b"\0"])
def test_what_follows_the_last_sample_of_a_flac_file_is_no_sound(tmp_path, after):
    sound = tone(5, 8_000, frequency=300)
    path = flac_of(tmp_path / "tagged.flac", sound, len(sound))
    path.write_bytes(path.read_bytes() + after)
    np.testing.assert_allclose(read_audio(path, 8_000, max_seconds=6), sound, atol=1e-4)
    flac_of(path, sound, 0)
    path.write_bytes(path.read_bytes() + after)
    with pytest.raises(InputError, match=r"tagged\.flac: damaged or truncated; replace it"):
        read_audio(path, 8_000, max_seconds=6)


def test_a_tag_does_not_hide_that_a_wav_file_is_cut(tmp_path):
    path = cut(write_tone(tmp_path / "tagged.wav", seconds=1), 0.5)
    path.write_bytes(b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + path.read_bytes())
    with pytest.raises(InputError, match=r"tagged\.wav: truncated: 7978 of 16000 bytes"):
        read_audio(path, RATE, max_seconds=2)


def test_of_an_ogg_file_with_two_sounds_none_is_taken_for_the_whole(tmp_path):
    path = tmp_path / "chain.ogg"
    links = []
    for _ in range(2):  # each has a random number of its own
        soundfile.write(path, tone(1, 8_000), 8_000)
        links.append(path.read_bytes())
    assert links[0][14:18] != links[1][14:18]
    path.write_bytes(b"".join(links))
    with pytest.raises(InputError, match=r"chain\.ogg: has several sounds, .*; split it"):
        read_audio(path, RATE, max_seconds=4)


def test_a_flac_file_without_what_its_header_says_is_truncated(tmp_path):
    path = flac_of(tmp_path / "long.flac", tone(1, 8_000), 2**35)
    with pytest.raises(InputError, match=r"long\.flac: truncated: 8000 of 34359738368 samples"):
        read_audio(path, RATE, max_seconds=36)


def varying_mp3(path, rate, channels, order):
    """Write an mp3 file of 6 s whose bit rate varies; return the sound's samples and its header.

    The first frame is the header, which has the number of those that follow.
    """
    noise = 0.3 * np.random.default_rng(0).standard_normal(3 * rate).clip(-3, 3)
    sound = np.concatenate([np.zeros(3 * rate), noise][::order])
    with soundfile.SoundFile(
        path, "w", rate, channels, bitrate_mode="VARIABLE", compression_level=0.2
    ) as file:
        file.write(np.repeat(sound[:, None], channels, axis=1))
    content = path.read_bytes()
    second = next(at for at in range(61, 3_000) if content[at : at + 2] == content[:2])
    return sound, content[:second], content[second:]


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("tag", [b"", b"ID3\x04\0\0\0\0\x01\x05" + bytes(133)])
def test_an_mp3_file_without_a_number_of_frames_is_heard_to_its_end(
    tmp_path, rate, channels, order, tag
):
    path = tmp_path / "varying.mp3"
    sound, header, frames = varying_mp3(path, rate, channels, order)
    assert b"Xing" in header
    path.write_bytes(tag + frames)
    wave = read_audio(path, rate, max_seconds=7)
    assert len(wave) == pytest.approx(len(sound), abs=4_000)
    loud = np.flatnonzero(np.abs(wave) > 0.05)
    first, last = np.flatnonzero(np.abs(sound) > 0.05)[[0, -1]]
    assert loud[[0, -1]] == pytest.approx([first, last], abs=4_000)


@pytest.mark.parametrize("frames", [1, 20])
def test_an_mp3_file_with_too_small_a_number_of_frames_is_heard_to_its_end(tmp_path, frames):
    path = tmp_path / "varying.mp3"
    sound, _, _ = varying_mp3(path, 16_000, 1, 1)
    whole = read_audio(path, 16_000, max_seconds=7)
    assert len(whole) == len(sound)
    patch(path, path.read_bytes().index(b"Xing") + 8, ">I", frames)
    np.testing.assert_array_equal(read_audio(path, 16_000, max_seconds=7), whole)
    patch(path, path.read_bytes().index(b"Xing") + 8, ">I", 1_000_000)
    with pytest.raises(InputError, match=r"varying\.mp3: truncated: "):
        read_audio(path, 16_000, max_seconds=7)


@pytest.mark.parametrize("subtype", ["GSM610", "MS_ADPCM", "IMA_ADPCM", "ULAW", "ALAW", "DOUBLE"])
def test_every_coding_of_a_wav_file(tmp_path, subtype):
    soundfile.write(tmp_path / "coded.wav", tone(4, 8_000), 8_000, subtype=subtype)
    wave = read_audio(tmp_path / "coded.wav", 8_000, max_seconds=5)
    assert len(wave) == pytest.approx(32_000, abs=1_000)
    assert loudest_frequency(wave, 8_000) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_blocks_give_the_sound_that_one_piece_gives(tmp_path, extension, monkeypatch):
    path = write_tone(tmp_path / f"long.{extension}", seconds=3)
    whole = read_audio(path, 8_000, max_seconds=4)
    monkeypatch.setattr("fedpriv.data.audio.BLOCK", 1_000)
    np.testing.assert_array_equal(read_audio(path, 8_000, max_seconds=4), whole)
    assert loudest_frequency(whole, 8_000) == pytest.approx(440, abs=1)


def test_a_wav_file_that_was_not_closed(tmp_path):
    path = patch(write_tone(tmp_path / "open.wav"), 40, "<I", 0)
    assert len(read_audio(path, RATE, max_seconds=1)) == 1_600


@pytest.mark.parametrize("after", [b"LIST\x04\0\0\0INFO", b"TAG" + bytes(125), b"\xff" * 20])
def test_what_a_wav_file_has_after_its_sound(tmp_path, after):
    path = write_tone(tmp_path / "tagged.wav")
    path.write_bytes(path.read_bytes() + after)
    assert len(read_audio(path, RATE, max_seconds=1)) == 1_600


def wav_with_more_sound(folder):
    return patch(write_tone(folder / "short.wav"), 40, "<I", 100)


def named_pipe(folder):
    os.mkfifo(folder / "pipe.wav")
    return folder / "pipe.wav"


def raw(folder):
    (folder / "sound.raw").write_bytes(bytes(range(256)) * 8)
    return folder / "sound.raw"


def empty(folder):
    (folder / "empty.wav").touch()
    return folder / "empty.wav"


def text(folder):
    (folder / "text.wav").write_text("no sound at all\n" * 20)
    return folder / "text.wav"


def text_as_mp3(folder):
    (folder / "text.mp3").write_text("no sound at all\n" * 20)
    return folder / "text.mp3"


def not_finite(folder):
    samples = tone(0.1, 8_000)
    samples[100] = np.nan
    soundfile.write(folder / "nan.wav", samples, 8_000, subtype="FLOAT")
    return folder / "nan.wav"


def wrong_rate(folder):
    return patch(write_tone(folder / "rate.wav"), 24, "<I", 2**31 - 1)


def cut_in_the_header(folder):
    return cut(write_tone(folder / "head.flac"), 0.01)


def cut_wav(folder):
    return cut(write_tone(folder / "cut.wav"), 0.5)


def cut_flac(folder):
    return cut(write_tone(folder / "cut.flac", seconds=2), 0.5)


def cut_ogg(folder):
    return cut(write_tone(folder / "cut.ogg", seconds=20), 0.5)


def cut_ogg_at_a_page(folder):
    path = write_tone(folder / "page.ogg", seconds=20)
    os.truncate(path, path.read_bytes().rindex(b"OggS"))
    return path


def ogg_without_its_last_byte(folder):
    path = write_tone(folder / "last.ogg", seconds=20)
    os.truncate(path, path.stat().st_size - 1)
    return path


def cut_mp3(folder):
    return cut(write_tone(folder / "cut.mp3", seconds=2), 0.5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda folder: write_tone(folder / "one.wav").with_name("none.wav"),
            "cannot be read (No such file or directory)",
        ),
        (lambda folder: folder, "cannot be read (Is a directory)"),
        (empty, "empty, 0 bytes; replace it"),
        (text, "not a wav, flac, ogg or mp3 file, or its header is damaged; replace it"),
        (text_as_mp3, "not a wav, flac, ogg or mp3 file, or its header is damaged; replace it"),
        (cut_in_the_header, "not a wav, flac, ogg or mp3 file, or its header is damaged"),
        (wrong_rate, "wrong header: a sample rate of 2147483647 Hz"),
        (not_finite, "has samples that are not finite; replace it"),
        (cut_wav, "truncated: 778 of 1600 bytes; replace it"),
        (wav_with_more_sound, "wrong header: 100 bytes of sound, and what follows them"),
        (named_pipe, "not a file; replace it"),
        (raw, "not a wav, flac, ogg or mp3 file, or its header is damaged; replace it"),
        (cut_flac, "damaged or truncated; replace it"),
        (cut_mp3, "truncated: "),
        (cut_ogg, "truncated: its last part is missing; replace it"),
        (cut_ogg_at_a_page, "truncated: its last part is missing; replace it"),
        (ogg_without_its_last_byte, "truncated: its last part is missing; replace it"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_by_name(tmp_path, make, reason):
    path = make(tmp_path)
    with pytest.raises(InputError, match=re.escape(f"{path}: {reason}")) as refused:
        read_audio(path, RATE, max_seconds=36)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nul\0.wav", "half\ud800.wav"])
def test_a_name_that_no_file_can_have(tmp_path, name):
    with pytest.raises(InputError, match="no file can have this name") as refused:
        read_audio(tmp_path / name, RATE, max_seconds=1)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, ZeroDivisionError])
def test_whatever_the_decoder_raises_is_about_the_recording(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error("a surprise")

    path = write_tone(tmp_path / "odd.wav")
    monkeypatch.setattr(soundfile.SoundFile, "read", fail)
    with pytest.raises(InputError, match=r"odd\.wav: damaged or truncated"):
        read_audio(path, RATE, max_seconds=1)
    monkeypatch.setattr(soundfile.SoundFile, "__init__", fail)
    with pytest.raises(InputError, match=r"odd\.wav: not a wav, flac, ogg or mp3 file"):
        read_audio(path, RATE, max_seconds=1)


@pytest.mark.parametrize(
    "code", [errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE]
)
@pytest.mark.parametrize("call", ["open", "pread"])
def test_a_fault_of_the_machine_is_no_bad_recording(tmp_path, monkeypatch, code, call):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    path = write_tone(tmp_path / "fine.wav")
    monkeypatch.setattr(os, call, fail)
    expected = re.escape(f"{path}: cannot be read ({os.strerror(code)}): a fault of the disk")
    with pytest.raises(EnvironmentFault, match=expected) as refused:
        read_audio(path, RATE, max_seconds=1)
    assert not isinstance(refused.value, InputError)


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_a_disk_that_breaks_while_a_file_is_decoded(tmp_path, monkeypatch, extension):
    path = write_tone(tmp_path / f"fine.{extension}", seconds=30)
    pread, reads = os.pread, itertools.count()

    def fail_later(*arguments):
        if next(reads) > 6:
            raise OSError(errno.EIO, "Input/output error")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", fail_later)
    with pytest.raises(EnvironmentFault, match="Input/output error"):
        read_audio(path, RATE, max_seconds=36)


def test_a_folder_that_is_gone_or_empty_is_no_bad_recording(tmp_path):
    (tmp_path / "clips").mkdir()
    for folder in ("clips", "gone"):
        expected = rf"{folder}: this folder is missing or empty, and 'a\.wav' should be in it"
        with pytest.raises(EnvironmentFault, match=expected):
            read_audio(tmp_path / folder / "a.wav", RATE, max_seconds=1)


@pytest.mark.parametrize("error", [ImportError("no soundfile"), OSError("no libsndfile")])
def test_without_soundfile_no_recording_is_to_blame(tmp_path, monkeypatch, error):
    class Missing:
        def find_spec(self, name, *_):
            if name == "soundfile":
                raise error

    monkeypatch.delitem(sys.modules, "soundfile")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(FedprivError, match=f"{error}.*pip install soundfile") as refused:
        read_audio(write_tone(tmp_path / "fine.wav"), RATE, max_seconds=1)
    assert not isinstance(refused.value, InputError)


def test_an_audio_file_is_read_when_it_is_needed(tmp_path):
    recording = pickle.loads(pickle.dumps(AudioFile(str(tmp_path / "late.wav"), "hello")))
    assert str(recording) == str(tmp_path / "late.wav")
    write_tone(tmp_path / "late.wav")
    assert recording.read(RATE, max_seconds=1).shape == (1_600,)


def test_joined_files_have_silence_between_them(tmp_path):
    paths = (
        write_tone(tmp_path / "low.wav", 0.5, 8_000, 300),
        write_tone(tmp_path / "high.wav", 0.25, 16_000, 1_200),
    )
    recording = pickle.loads(pickle.dumps(JoinedFiles(paths, "low high", pause_seconds=0.1)))
    wave = recording.read(RATE, max_seconds=1)
    low, pause, high = np.split(wave, [8_000, 9_600])
    assert loudest_frequency(low, RATE) == pytest.approx(300, abs=2)
    assert not pause.any()
    assert loudest_frequency(high, RATE) == pytest.approx(1_200, abs=4)
    assert str(recording) == f"{paths[0]} + {paths[1]}"


def test_joined_files_are_capped_as_a_whole(tmp_path):
    paths = (write_tone(tmp_path / "one.wav", 0.4), write_tone(tmp_path / "two.wav", 0.4))
    expected = r"one\.wav \+ .*two\.wav: 0\.9 s is longer than data\.speech\.max_seconds \(0\.8\)"
    with pytest.raises(InputError, match=expected):
        JoinedFiles(paths, "one two", pause_seconds=0.1).read(RATE, max_seconds=0.8)
    joined = JoinedFiles(paths, "one two", pause_seconds=0.0).read(RATE, max_seconds=0.8)
    assert len(joined) == round(0.8 * RATE)
