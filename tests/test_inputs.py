"""What the public API takes as video and conditions, and the errors for what it does not take."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_far import FARVideoPipeline
from diffusers_far.inputs import video_tensor
from diffusers_far.video_files import save_video
from tests.tiny_models import TOLERANCE, latents, max_error, pipeline, relative_error, transformer

SIZE = 64


@pytest.fixture(scope="module")
def pipe() -> FARVideoPipeline:
    return pipeline(transformer(num_actions=4), sample_size=None, num_inference_steps=1)


def pixels(num_frames: int = 3, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """Smooth frames `[T, H, W, 3]` uint8, each of its own colour."""
    row, column = np.mgrid[0:height, 0:width]
    frames = [
        np.stack([row * 3 % 256, column * 3 % 256, np.full_like(row, 60 * index)], axis=-1)
        for index in range(num_frames)
    ]
    return np.stack(frames).astype(np.uint8)


def images(num_frames: int = 3, height: int = SIZE, width: int = SIZE) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in pixels(num_frames, height, width)]


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).movedim(-1, -3).float() / 255


FORMS = {
    "list of images": lambda: images(),
    "tuple of images": lambda: tuple(images()),
    "list of lists": lambda: [images()],
    "images with transparency": lambda: [image.convert("RGBA") for image in images()],
    "list of frame arrays": lambda: list(pixels()),
    "list of float frames": lambda: list(pixels().astype(np.float32) / 255),
    "list of frame tensors": lambda: list(as_tensor(pixels())),
    "list of a video array": lambda: [pixels()],
    "list of a video tensor": lambda: [as_tensor(pixels())],
    "list of lists of frames": lambda: [list(pixels())],
    "frames of several kinds": lambda: [pixels()[0], as_tensor(pixels())[1], images()[2]],
    "uint8 array": lambda: pixels(),
    "uint8 batch": lambda: pixels()[None],
    "float array": lambda: pixels().astype(np.float32) / 255,
    "double array": lambda: pixels()[None].astype(np.float64) / 255,
    "array of strides": lambda: pixels()[::-1].copy()[::-1],
    "uint8 tensor": lambda: torch.from_numpy(pixels()).movedim(-1, -3),
    "uint8 batch tensor": lambda: torch.from_numpy(pixels()).movedim(-1, -3)[None],
    "read-only array": lambda: np.broadcast_to(pixels(), (3, SIZE, SIZE, 3)),
    "tensor": lambda: as_tensor(pixels()),
    "batch tensor": lambda: as_tensor(pixels())[None],
    "double tensor": lambda: as_tensor(pixels()).double(),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_video(form: str) -> None:
    video = video_tensor(FORMS[form](), None, None)
    assert video.dtype == torch.float32
    assert relative_error(video, as_tensor(pixels())[None]) <= TOLERANCE


HALVES = {
    "half array": lambda: (pixels() / 255).astype(np.float16),
    "half tensor": lambda: as_tensor(pixels()).half(),
    "bfloat16 tensor": lambda: as_tensor(pixels()).bfloat16(),
}


@pytest.mark.parametrize("form", HALVES)
def test_pixels_of_half_precision(form: str) -> None:
    video = video_tensor(HALVES[form](), None, None)
    assert video.dtype == torch.float32
    assert max_error(video, as_tensor(pixels())[None]) < 2**-8


@pytest.mark.parametrize("size", [None, 24])
def test_integer_and_float_pixels_mean_the_same(size: int | None) -> None:
    whole = video_tensor(pixels(), size, size)
    for form in (pixels() / 255, (pixels() / 255).astype(np.float32), as_tensor(pixels())):
        assert relative_error(video_tensor(form, size, size), whole) <= TOLERANCE


def test_rounding_beyond_black_and_white_is_not_an_error() -> None:
    video = np.zeros((2, 8, 8, 3), np.float32)
    video[:, 4:] = np.nextafter(np.float32(1), np.float32(2))
    video[:, :, :2] = -1e-7
    tensor = video_tensor(video, None, None)
    assert (float(tensor.min()), float(tensor.max())) == (0, 1)


def test_a_batch_of_videos() -> None:
    first, last = pixels(), pixels()[::-1]
    for videos in (
        [images(), images()[::-1]],
        [first, last],
        (as_tensor(first), as_tensor(first).flip(0)),
        [list(first), list(last)],
        [first, images()[::-1]],
        np.stack([first, last]),
    ):
        video = video_tensor(videos, None, None)
        assert torch.equal(video[0], as_tensor(pixels())) and torch.equal(video[1], video[0].flip(0))


def test_a_batch_of_files_of_two_sizes(tmp_path: Path) -> None:
    paths = [tmp_path / "small.mp4", tmp_path / "large.gif"]
    save_video(pixels(4), paths[0], 10)
    save_video(pixels(4, 96, 128), paths[1], 10)
    assert video_tensor(paths, 32, 32).shape == (2, 4, 3, 32, 32)
    with pytest.raises(ValueError, match=r"64 x 64.*128 x 96.*or height and width be given"):
        video_tensor(paths, None, None)


def test_images_of_all_modes() -> None:
    grey = np.linspace(0, 255, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint8)
    deep = grey.astype(np.uint16) * 257
    colour = Image.fromarray(pixels()[1])
    expected = {
        "L": (Image.fromarray(grey), grey),
        "LA": (Image.fromarray(grey).convert("LA"), grey),
        "I;16": (Image.fromarray(deep), grey),
        "I": (Image.fromarray(deep.astype(np.int32)), grey),
        "F": (Image.fromarray(grey.astype(np.float32) / 255), grey),
        "1": (Image.fromarray(grey > 127), np.where(grey > 127, 255, 0)),
        "P": (colour.quantize(64), np.asarray(colour.quantize(64).convert("RGB"))),
        "CMYK": (colour.convert("CMYK"), pixels()[1]),
    }
    for mode, (image, values) in expected.items():
        assert image.mode == mode
        values = np.stack([values] * 3, axis=-1) if values.ndim == 2 else values
        found = video_tensor([image], None, None)[0, 0]
        assert max_error(found, as_tensor(values.astype(np.uint8))) <= 3 / 255, mode
    with pytest.raises(ValueError, match=r"^video\[0\] cannot be read as an image: its pixels are 0 to 255"):
        video_tensor([Image.fromarray(grey.astype(np.float32))], None, None)


def test_an_image_is_turned_as_exif_says() -> None:
    image = images(2, 40, 80)[1]
    image.getexif()[0x0112] = 6  # to be turned clockwise
    upright = np.rot90(pixels(2, 40, 80)[1], -1)
    assert torch.equal(video_tensor(image, None, None)[0, 0], as_tensor(upright.copy()))
    assert torch.equal(video_tensor([image], None, None)[0, 0], as_tensor(upright.copy()))


def test_an_animated_image_that_is_open_has_all_its_frames(tmp_path: Path) -> None:
    save_video(pixels(5), tmp_path / "moving.gif", 10)
    with Image.open(tmp_path / "moving.gif") as image:
        assert video_tensor(image, None, None).shape == (1, 5, 3, SIZE, SIZE)
        assert image.tell() == 0


def test_an_extreme_shape_is_cropped_before_it_is_enlarged() -> None:
    wide = np.zeros((1, 1, 16000, 3), np.uint8)
    wide[:, :, 7999:8001] = 255
    assert video_tensor(wide, 64, 64).min() == 1  # resized whole, it would have 65 million pixels


def test_one_image_is_a_video_of_one_frame(pipe: FARVideoPipeline) -> None:
    assert torch.equal(video_tensor(images()[1], None, None), as_tensor(pixels()[1:2])[None])
    assert len(pipe(video=images()[0], num_frames=2).frames[0]) == 2


def test_a_video_of_another_size_covers_and_is_cropped_at_the_centre() -> None:
    video = np.zeros((2, 40, 80, 3), dtype=np.uint8)
    video[:, :, 20:60] = 255  # the middle square
    resized = video_tensor(video, 32, 32)
    assert resized.shape == (1, 2, 3, 32, 32)
    assert resized[..., 3:-3].min() > 0.99
    assert video_tensor(video, None, None).shape == (1, 2, 3, 40, 80)
    assert video_tensor(video, 16, 48).shape == (1, 2, 3, 16, 48)


def test_mp4(tmp_path: Path, pipe: FARVideoPipeline) -> None:
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = SIZE, SIZE, "yuv420p", 4_000_000
        for frame in pixels(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    for form in (path, str(path)):
        video = video_tensor(form, None, None)
        assert video.shape == (1, 5, 3, SIZE, SIZE)
        # Blue tells the frames apart.
        assert max_error(video.mean((3, 4))[0, :, 2], torch.arange(5) * 60 / 255) < 0.05
    assert pipe(video=path, num_frames=6, output_type="pt").frames.shape == (1, 6, 3, SIZE, SIZE)


def test_gif(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (SIZE, SIZE), (80 * index, 0, 0)) for index in range(3)]
    frames[0].save(tmp_path / "video.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    video = video_tensor(tmp_path / "video.gif", None, None)
    assert video.shape == (1, 3, 3, SIZE, SIZE)
    assert max_error(video.mean((3, 4))[0, :, 0], torch.arange(3) * 80 / 255) < 0.02


def test_encoding_is_frame_by_frame_and_scaled(pipe: FARVideoPipeline) -> None:
    encoded = pipe.encode_video(pixels())
    with torch.no_grad():
        expected = pipe.vae.encode(as_tensor(pixels()) * 2 - 1).latent * pipe.vae.config.scaling_factor
    assert relative_error(encoded[0], expected) <= TOLERANCE
    called = pipe(video=pixels(), num_frames=4, output_type="latent").frames
    assert torch.equal(called[:, :3], encoded)


def bad(array: np.ndarray, value: float) -> np.ndarray:
    array = array.astype(np.float32) / 255
    array[0, 0, 0, 0] = value
    return array


NAN = latents(1, 2).index_fill(1, torch.tensor([1]), float("nan"))
BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"video": 3}, "video is a int"),
    ({"video": []}, "video is an empty list"),
    ({"video": [[]]}, r"video\[0\] holds nothing"),
    ({"video": [3, 4]}, r"video\[0\] is a int"),
    ({"video": [images(2), images(3)]}, r"video has videos of \[2, 3\] frames"),
    ({"video": [images(2), [1, 2]]}, r"video\[1\] holds \['int'\]"),
    ({"video": [images(1)[0], images(1, 32, 32)[0]]}, "video has images of sizes"),
    ({"video": [images(2), images(2, 32, 32)], "height": None}, "video has videos of sizes"),
    ({"video": [pixels(), [1]]}, r"video\[1\] holds \['int'\]"),
    ({"video": pixels()[..., :1]}, "video is an array of shape"),
    ({"video": pixels()[0]}, "video is an array of shape"),
    ({"video": pixels()[None, None]}, "video is an array of shape"),
    *(
        ({"video": pixels().astype(dtype)}, f"video is an array of {dtype}; it takes uint8")
        for dtype in ("int8", "uint16", "int64", "bool", "object", "complex64", ">f4")
    ),
    ({"video": torch.zeros(2, 3, 64, 64).long()}, "video is a tensor of torch.int64; it takes uint8"),
    ({"video": torch.zeros(2, 3, 64, 64) > 0}, "video is a tensor of torch.bool; it takes uint8"),
    ({"video": [pixels()[0], pixels().astype(int)[0]]}, r"video\[1\] is an array of int64"),
    ({"video": [pixels(), as_tensor(pixels()).int()]}, r"video\[1\] is a tensor of torch.int32"),
    ({"video": torch.zeros(2, 64, 64, 3)}, "video is a tensor of shape"),
    ({"video": torch.zeros(1, 0, 3, 64, 64)}, "video is a tensor of shape"),
    ({"video": 255.0 * pixels()}, "video has values from 0 to .*; floats are in"),
    ({"video": torch.zeros(2, 3, 60, 64), "height": None}, "height=60"),
    ({"video": torch.zeros(2, 3, 64, 60), "width": None}, "width=60"),
    ({"video": bad(pixels(), np.nan)}, "video holds 1 values"),
    ({"video": bad(pixels(), 1.5)}, "video has values from 0 to 1.5"),
    ({"video": bad(pixels(), -0.1)}, "video has values from -0.1"),
    ({"video": "missing.mp4"}, "video='missing.mp4' is not a file"),
    ({"video": images(), "video_latents": latents(1, 2)}, "video and video_latents"),
    ({"video": images(), "height": 60}, "height=60"),
    ({"video_latents": latents(1, 2)[0]}, "video_latents has shape"),
    ({"video_latents": latents(1, 2)[:, :, :3]}, "video_latents has shape"),
    ({"video_latents": latents(1, 2).numpy()}, "video_latents"),
    ({"video_latents": latents(1, 2).long()}, "video_latents is a tensor of torch.int64; it takes floats"),
    ({"latents": latents(1, 4).long()}, "latents is a tensor of torch.int64; it takes floats"),
    ({"video_latents": NAN}, "video_latents holds 256 values"),
    ({"latents": latents(1, 2)}, "latents has shape"),
    ({"latents": latents(2, 4), "batch_size": 1}, "batch_size=1, but the other arguments are of 2 videos"),
    (
        {"video_latents": latents(1, 2), "batch_size": 3},
        "batch_size=3, but the other arguments are of 1",
    ),
    ({"video_latents": latents(1, 2), "height": 128, "width": 128}, "height=128, but video_latents of 8 x 8"),
    ({"generator": 5}, "generator=5"),
    ({"generator": np.random.default_rng()}, "generator=Generator"),
    ({"latents": NAN.repeat(1, 2, 1, 1, 1)}, "latents holds 512 values"),
    ({"num_frames": 0}, "num_frames=0"),
    ({"num_frames": 2.0}, "num_frames=2.0"),
    ({"num_frames": True}, "num_frames=True"),
    ({"video_latents": latents(1, 4)}, "num_frames=4 must be more than the 4 context frames"),
    ({"video_latents": latents(1, 6)}, "num_frames=4 must be more than the 6 context frames"),
    ({"height": None}, "height=None"),
    ({"width": None}, "height=64 and width=None"),
    ({"height": 60}, "height=60"),
    ({"width": -64}, "width=-64"),
    ({"height": 0}, "height=0"),
    ({"width": 64.0}, "width=64.0"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"guidance_scale": -1}, "guidance_scale=-1"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ({"num_inference_steps": 0}, "num_inference_steps=0"),
    ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
    ({"flex_rope_slope": -0.1}, "flex_rope_slope=-0.1"),
    ({"flex_rope_slope": float("nan")}, "flex_rope_slope=nan"),
    ({"rope_interpolation": 0}, "rope_interpolation=0"),
    ({"context_schedule": 3}, "context_schedule=3"),
    ({"output_type": "mp4"}, "output_type='mp4'"),
    ({"generator": [torch.Generator()] * 2}, "generator has 2 entries for 1 videos"),
    ({"actions": [1, 2, 3]}, r"actions has shape \(3,\)"),
    ({"actions": [1, 2, 3, 0, 1]}, r"actions has shape \(5,\)"),
    ({"actions": [[1, 2, 3, 0]] * 3, "video_latents": latents(2, 1)}, r"actions has shape \(3, 4\)"),
    ({"actions": [1, 2, 3, 5]}, "actions has values from 1 to 5"),
    ({"actions": [1, 2, 3, -2]}, "actions has values from -2"),
    ({"actions": [1.0, 2.0, 3.0, 0.0]}, "actions has dtype"),
    ({"actions": [[1, 2], [1, 2, 3]]}, "actions"),
    ({"actions": ["left"] * 4}, "actions"),
    ({"actions": 3}, "actions has shape"),
    ({"class_labels": 1}, "class_labels is given"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_bad_calls(pipe: FARVideoPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        pipe(**{"num_frames": 4, "height": 64, "width": 64} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 6}, "class_labels has values"),
        ({"class_labels": [1, 2], "video_latents": latents(3, 1)}, "class_labels has shape"),
        ({"class_labels": [1.5]}, "class_labels has dtype"),
        ({"actions": [1, 2, 3, 0]}, "actions is given"),
        ({"class_labels": [[1]]}, "class_labels has shape"),
    ],
)
def test_bad_classes(arguments: dict[str, Any], message: str) -> None:
    pipe = pipeline(transformer(num_classes=5), num_inference_steps=1)
    with pytest.raises(ValueError, match=f"^{message}"):
        pipe(num_frames=4, **arguments)


def test_guidance_without_a_condition() -> None:
    with pytest.raises(ValueError, match="guidance_scale=2"):
        pipeline(transformer())(num_frames=2, guidance_scale=2)


@pytest.mark.parametrize("content", [b"", b"not a video" * 100])
def test_a_corrupt_file(tmp_path: Path, pipe: FARVideoPipeline, content: bytes) -> None:
    (tmp_path / "video.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"video=.*video\.mp4' cannot be read"):
        pipe(video=tmp_path / "video.mp4")


def test_frames_so_far_without_a_call() -> None:
    with pytest.raises(ValueError, match="frames_so_far"):
        pipeline().frames_so_far()


def test_bad_context_actions_of_a_rollout(pipe: FARVideoPipeline) -> None:
    with pytest.raises(ValueError, match=r"^context_actions has shape"):
        pipe.rollout(video_latents=latents(1, 2), context_actions=[1])
