"""Files as people have them: turned, cut off, damaged, animated, or no videos at all; and what is written."""

import os
import struct
import tracemalloc
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from diffusers_far import read_video
from diffusers_far.video_files import VideoFile, VideoWriter, check_output, save_video
from tests.python_process import run_python

HEIGHT, WIDTH = 48, 80


def walk(num_frames: int = 12, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth frames `[T, H, W, 3]` uint8 that move and differ in all directions."""
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack([np.sin(0.08 * x + 0.3 * t), np.cos(0.05 * y), np.sin(0.04 * (x + y) + 0.1 * t)], axis=-1)
        for t in range(num_frames)
    ]
    return ((np.stack(frames) + 1) * 127).astype(np.uint8)


def noisy(num_frames: int = 24) -> np.ndarray:
    """Frames whose files are large, so that what is cut from them is seen."""
    noise = np.random.default_rng(0).integers(0, 120, (num_frames, HEIGHT, WIDTH, 3))
    return (walk(num_frames) // 2 + noise).astype(np.uint8)


def encode(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    rate: int = 10,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    with av.open(str(path), "w", options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=rate, options={"g": "6", "crf": "12"} | (options or {}))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.bit_rate = 4_000_000
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found.astype(float) - expected).mean())


# ------------------------------------------------------------------------------------------------------------
# Upright and of square pixels

# What the track header's matrix (a, b, c, d) does to the frame that is stored.
MATRICES = {
    (1, 0, 0, 1): lambda frames: frames,
    (0, 1, -1, 0): lambda frames: np.rot90(frames, -1, (1, 2)),
    (-1, 0, 0, -1): lambda frames: np.rot90(frames, 2, (1, 2)),
    (0, -1, 1, 0): lambda frames: np.rot90(frames, 1, (1, 2)),
    (-1, 0, 0, 1): lambda frames: frames[:, :, ::-1],
    (1, 0, 0, -1): lambda frames: frames[:, ::-1],
    (0, 1, 1, 0): lambda frames: frames.swapaxes(1, 2),
    (0, -1, -1, 0): lambda frames: np.rot90(frames, 2, (1, 2)).swapaxes(1, 2),
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_video_is_turned_as_its_header_says(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    path = encode(tmp_path / "phone.mp4", walk())
    stored = read_video(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    assert error(read_video(path), MATRICES[matrix](stored)) < 0.01
    assert error(np.stack(list(VideoFile(path).last_frames(3))), MATRICES[matrix](stored)[-3:]) < 0.01


@pytest.mark.parametrize(
    ("aspect", "height", "width"), [(Fraction(16, 11), HEIGHT, 116), (Fraction(1, 2), 96, WIDTH)]
)
def test_pixels_become_square(aspect: Fraction, height: int, width: int, tmp_path: Path) -> None:
    path = encode(tmp_path / "dvd.mp4", walk(), aspect=aspect)
    expected = [np.asarray(Image.fromarray(frame).resize((width, height))) for frame in walk()]
    assert error(read_video(path), np.stack(expected)) < 4


@pytest.mark.parametrize(("kind", "options"), [("jpg", {"quality": 95}), ("png", {}), ("tiff", {})])
def test_a_photo_is_turned_as_exif_says(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned anticlockwise
    Image.fromarray(walk(1)[0]).save(tmp_path / f"photo.{kind}", exif=exif, **options)
    assert error(read_video(tmp_path / f"photo.{kind}"), np.rot90(walk(1), 1, (1, 2))) < 4


# ------------------------------------------------------------------------------------------------------------
# Animated images


@pytest.mark.parametrize(
    ("kind", "options"),
    [("gif", {}), ("webp", {"quality": 95}), ("avif", {"quality": 95}), ("png", {}), ("tiff", {})],
)
def test_animated_images_and_pages(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    path, images = tmp_path / f"moving.{kind}", [Image.fromarray(frame) for frame in walk()]
    images[0].save(path, save_all=True, append_images=images[1:], duration=40, **options)
    video = VideoFile(path)
    assert error(read_video(path), walk()) < 12
    assert error(np.stack(list(video.last_frames(5))), read_video(path)[-5:]) < 1
    assert len(list(video.last_frames(50))) == 12
    assert video.frame_rate == (None if kind == "tiff" else 25)


def test_a_picture_that_animated_png_shows_elsewhere_is_no_frame(tmp_path: Path) -> None:
    images = [Image.fromarray(frame) for frame in walk(4)]
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:], default_image=True)
    assert error(read_video(tmp_path / "a.png"), walk(4)[1:]) == 0


def test_previews_in_a_photo_are_no_frames(tmp_path: Path) -> None:
    images = [Image.fromarray(frame) for frame in walk(2)]
    images[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=images[1:])
    assert len(read_video(tmp_path / "phone.jpg")) == 1


def test_pages_of_several_sizes_are_named(tmp_path: Path) -> None:
    pages = [Image.fromarray(walk(1)[0]), Image.fromarray(walk(1, 30, 20)[0])]
    pages[0].save(tmp_path / "scan.tiff", save_all=True, append_images=pages[1:])
    with pytest.raises(
        ValueError, match=r"scan\.tiff' has frames of sizes 80 x 48 and, after 1 of them, 20 x 30"
    ):
        read_video(tmp_path / "scan.tiff")


def test_sixteen_bits(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    expected = np.stack([grey / 257] * 3, axis=-1)[None]
    assert error(read_video(tmp_path / "deep.png"), expected) < 1


# ------------------------------------------------------------------------------------------------------------
# Cut off, damaged, or no video

KINDS: dict[str, dict[str, Any]] = {
    "walk.mp4": {},
    "web.mp4": {"container": {"movflags": "faststart"}},
    "pieces.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "walk.mov": {},
    "walk.mkv": {},
    "walk.webm": {"codec": "libvpx"},
    "next.webm": {"codec": "libvpx-vp9"},
    "walk.avi": {"codec": "mpeg4"},
    "walk.flv": {"codec": "flv"},
    "walk.ts": {},
    "walk.wmv": {"codec": "wmv2"},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=error"}},
}


@pytest.mark.parametrize("name", KINDS)
def test_whole_and_cut_videos(name: str, tmp_path: Path) -> None:
    path = encode(tmp_path / name, noisy(), **KINDS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = read_video(path)
        assert len(whole) == 24
        last = np.stack(list(VideoFile(path).last_frames(5)))
        assert error(last, whole[-5:]) == 0
    content = path.read_bytes()
    for share in (0.3, 0.5, 0.8):
        # Odd, as a transport stream that ends with a whole packet of 188 bytes may be a whole file.
        path.write_bytes(content[: int(share * len(content)) | 1])
        with pytest.raises(ValueError, match=f"{name}' .*(cut off|damaged)"):
            read_video(path)
        if name != "pieces.mp4":
            with pytest.raises(ValueError, match=f"{name}' .*(cut off|damaged)"):
                list(VideoFile(path).last_frames(5))


def test_a_transport_stream_cut_anywhere_in_a_packet(tmp_path: Path) -> None:
    path = encode(tmp_path / "walk.ts", noisy())
    content = path.read_bytes()
    for size in range(len(content) // 2, len(content) // 2 + 3 * 188, 11):
        if size % 188:
            path.write_bytes(content[:size])
            with pytest.raises(ValueError, match=r"cut off|damaged"):
                read_video(path)


@pytest.mark.parametrize("name", ["web.mp4", "walk.mkv", "walk.avi", "hevc.mp4"])
def test_a_hole_in_a_video(name: str, tmp_path: Path) -> None:
    path = encode(tmp_path / name, noisy(48), **KINDS[name])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8192] = bytes(8192)  # as of a file whose download was not finished
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}' .*damaged after [0-9]+ frames"):
        read_video(path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("jpg", {}), ("png", {}), ("webp", {}), ("gif", {}), ("avif", {}), ("tiff", {}), ("bmp", {})],
)
def test_cut_images(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / f"photo.{kind}"
    Image.fromarray(noisy(1)[0]).save(path, **options)
    content = path.read_bytes()
    for share in (0.01, 0.5, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=rf"photo\.{kind}' cannot be read as"):
            read_video(path)


def test_a_gif_that_is_cut_between_two_frames(tmp_path: Path) -> None:
    images = [Image.fromarray(frame) for frame in walk(4)]
    path = tmp_path / "moving.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"\x21\xf9\x04")])  # where the last frame begins
    with pytest.warns(UserWarning, match=r"moving\.gif is cut off"):
        assert len(read_video(path)) == 3


@pytest.mark.parametrize("name", ["notes.txt", "notes.mp4", "notes.nfo", "words.srt", "page.svg"])
def test_texts_are_no_videos(name: str, tmp_path: Path) -> None:
    text = "1\n00:00:01,000 --> 00:00:02,000\nThings to buy: bread, milk.\n\n"
    (tmp_path / name).write_text("<svg></svg>" if name == "page.svg" else text * 100)
    with pytest.raises(ValueError, match=f"{name}' cannot be read as a video"):
        read_video(tmp_path / name)


def test_a_list_of_files_is_not_followed(tmp_path: Path) -> None:
    encode(tmp_path / "walk.mp4", walk())
    lists = {
        "list.mp4": "ffconcat version 1.0\nfile walk.mp4\n",
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\nwalk.mp4\n#EXT-X-ENDLIST\n",
        "list.sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 9000 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}' cannot be read as a video"):
            read_video(tmp_path / name)


def test_sound_without_pictures(tmp_path: Path) -> None:
    for name, codec in (("song.wav", "pcm_s16le"), ("song.mp4", "aac")):
        with av.open(str(tmp_path / name), "w") as file:
            stream: Any = file.add_stream(codec, rate=44100)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100 * stream.channels), np.int16), "s16")
            frame.sample_rate = 44100
            for part in av.AudioResampler(stream.format, "stereo", 44100).resample(frame):
                file.mux(stream.encode(part))
            file.mux(stream.encode())
        with pytest.raises(ValueError, match=f"{name}' cannot be read as a video"):
            read_video(tmp_path / name)


def test_names_that_look_like_addresses(tmp_path: Path) -> None:
    for name in ("a:b.mp4", "100%d.mp4", "[1]*.mp4", "concat:x|y.mp4", "ü ß.mp4"):
        path = encode(tmp_path / "plain.mp4", walk(3)).rename(tmp_path / name)
        assert len(read_video(path)) == 3
    with pytest.raises(ValueError, match="is not a file"):
        read_video("http://localhost/a.mp4")
    with pytest.raises(ValueError, match="is not a file"):
        read_video(tmp_path)


def test_pictures_that_would_fill_the_memory(tmp_path: Path) -> None:
    for name, size in (
        ("wide.png", (200_000, 1)),
        ("large.png", (9_000, 9_000)),
        ("wide.gif", (65_535, 1)),
    ):
        Image.new("L", size).save(tmp_path / name)
        tracemalloc.start()
        with pytest.raises(
            ValueError, match=rf"{name}' has frames of {size[0]} x {size[1]} pixels; it takes"
        ):
            read_video(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()


# ------------------------------------------------------------------------------------------------------------
# The end of a long video


@pytest.mark.parametrize("name", ["long.mp4", "long.mkv", "long.avi", "long.ts", "long.webm"])
def test_the_end_is_read_from_the_key_frame_before_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = walk(400)
    codec = {"long.avi": "mpeg4", "long.webm": "libvpx"}.get(name, "libx264")
    path = encode(tmp_path / name, frames, codec)
    expected = read_video(path)[-9:]
    drawn = []
    decoded = VideoFile._decoded

    def count(self: VideoFile, *arguments: Any) -> Any:
        made = decoded(self, *arguments)
        drawn.extend(made)
        return made

    monkeypatch.setattr(VideoFile, "_decoded", count)
    assert error(np.stack(list(VideoFile(path).last_frames(9))), expected) == 0
    # AVI files of some kinds do not say when frames are shown: all are decoded, though none is kept.
    assert len(drawn) < 60 or name == "long.avi"
    assert len(list(VideoFile(path).last_frames(1000))) == 400


def test_a_video_of_changing_rate(tmp_path: Path) -> None:
    """A phone records fewer frames in the dark: the last ones may begin long before what the rate says."""
    with av.open(str(tmp_path / "phone.mp4"), "w") as file:
        stream: Any = file.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30)
        for number, frame in enumerate(walk(100)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number if number < 80 else 80 + 30 * (number - 80)
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    whole = read_video(tmp_path / "phone.mp4")
    assert len(whole) == 100
    for number in (1, 15, 30, 99):
        assert (
            error(np.stack(list(VideoFile(tmp_path / "phone.mp4").last_frames(number))), whole[-number:]) == 0
        )


# ------------------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize(
    ("kind", "magic", "most"), [("mp4", b"ftyp", 3), ("webm", b"\x1a\x45\xdf\xa3", 3), ("gif", b"GIF89a", 12)]
)
def test_the_extension_is_the_kind(kind: str, magic: bytes, most: float, tmp_path: Path) -> None:
    path = tmp_path / f"walk.{kind}"
    save_video(walk(), path, 25)
    assert magic in path.read_bytes()[:16]
    assert error(read_video(path), walk()) < most
    assert VideoFile(path).frame_rate == 25
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_rates_and_odd_sizes_are_kept(tmp_path: Path) -> None:
    for rate in (Fraction(30000, 1001), Fraction(24000, 1001), 12.5, 60):
        save_video(walk(6), tmp_path / "rate.mp4", rate)
        assert VideoFile(tmp_path / "rate.mp4").frame_rate == Fraction(rate)
    for kind in ("mp4", "webm", "gif"):
        save_video(walk(3, 47, 63) / 255, tmp_path / f"odd.{kind}", 10)
        assert read_video(tmp_path / f"odd.{kind}").shape == (3, 47, 63, 3)


def test_frames_that_stay_the_same_are_all_written(tmp_path: Path) -> None:
    save_video(np.repeat(walk(1), 5, axis=0), tmp_path / "still.gif", 10)
    assert len(read_video(tmp_path / "still.gif")) == 5


@pytest.mark.parametrize(
    "name", ["far", "far.txt", "far.png", "far.MP3", "folder/far.mp4", "taken.mp4", "pipe.mp4"]
)
def test_outputs_that_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "taken.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match=name.rpartition("/")[2]):
        check_output(tmp_path / name)
    with pytest.raises(ValueError, match=name.rpartition("/")[2]):
        save_video(walk(2), tmp_path / name, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe.mp4", "taken.mp4"]


def test_a_link_leads_to_the_file_that_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real.mp4").write_bytes(b"old")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "real.mp4")
    save_video(walk(2), tmp_path / "link.mp4", 10)
    assert (tmp_path / "link.mp4").is_symlink() and len(read_video(tmp_path / "real.mp4")) == 2
    (tmp_path / "null.mp4").symlink_to("/dev/null")
    with pytest.raises(ValueError, match=r"null\.mp4 is not a file"):
        save_video(walk(2), tmp_path / "null.mp4", 10)


def test_nothing_is_left_of_a_video_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "walk.mp4"
    path.write_bytes(b"mine")
    with pytest.raises(RuntimeError, match="in the middle"), VideoWriter(path, 10) as video:
        video.write(walk(1)[0])
        raise RuntimeError("in the middle")
    with VideoWriter(path, 10):
        pass  # no frame
    assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
def test_a_full_disk(kind: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails in the same place."""
    code = (
        "import resource, sys, numpy as np; from diffusers_far.video_files import save_video; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "frames = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)\n"
        "try: save_video(frames, sys.argv[1], 10)\n"
        "except OSError as error: print('OSError', error)"
    )
    path = tmp_path / f"walk.{kind}"
    path.write_bytes(b"mine")
    run = run_python(["-c", code, str(path)])
    assert run.stdout.startswith("OSError"), run.stdout + run.stderr
    assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1
