"""`training/encode_latents.py` on videos of noise, with a random autoencoder of a few thousand parameters."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_far import read_video
from diffusers_far.training import encode_latents as script
from diffusers_far.training.clips import LatentVideos
from diffusers_far.training.options import FrameOptions
from diffusers_far.training.sources import open_source
from tests.python_process import run_python
from tests.training.processes import finish, start
from tests.video_writing import numbered_frames
from tests.video_writing import write_video as numbered_video

NUM_FRAMES = 7


def write_video(file: Path, seed: int, height: int = 32, width: int = 32) -> None:
    frames = np.random.default_rng(seed).integers(0, 256, (NUM_FRAMES, height, width, 3), dtype=np.uint8)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=15)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A videofolder: episodes 0 and 1 for training, 2 for validation; action t of episode n is n + t."""
    folder = tmp_path / "data"
    for split, episodes in {"train": (0, 1), "validation": (2,)}.items():
        (folder / split).mkdir(parents=True)
        lines = []
        for episode in episodes:
            write_video(folder / split / f"{episode:05d}.mp4", episode)
            actions = [episode + t for t in range(NUM_FRAMES)]
            lines.append(json.dumps({"file_name": f"{episode:05d}.mp4", "actions": actions}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def save_autoencoder(folder: Path, seed: int = 0, scaling_factor: float = 0.5) -> AutoencoderDC:
    torch.manual_seed(seed)
    sizes = {f"{side}_block_out_channels": (8, 16) for side in ("encoder", "decoder")}
    sizes |= {f"{side}_layers_per_block": (0, 1) for side in ("encoder", "decoder")}
    sizes |= {f"{side}_qkv_multiscales": ((), ()) for side in ("encoder", "decoder")}
    autoencoder = AutoencoderDC(latent_channels=4, scaling_factor=scaling_factor, **sizes)
    autoencoder.save_pretrained(folder)
    return autoencoder


def encode(data: Path, autoencoder: Path, output: Path, *more: str) -> None:
    script.main([str(data), "--autoencoder", str(autoencoder), "--output", str(output), *more])


def test_round_trip(data: Path, tmp_path: Path) -> None:
    autoencoder = save_autoencoder(tmp_path / "autoencoder")
    encode(data, tmp_path / "autoencoder", tmp_path / "latents", "--batch_size", "3")
    files = sorted(str(path.relative_to(tmp_path / "latents")) for path in tmp_path.glob("latents/*/*"))
    assert files == ["train/00000.safetensors", "train/00001.safetensors", "validation/00002.safetensors"]

    content = load_file(tmp_path / "latents/train/00001.safetensors")
    assert content["latents"].dtype == torch.float16 and content["actions"].dtype == torch.int64
    assert content["actions"].tolist() == [1 + t for t in range(NUM_FRAMES)]
    frames = torch.from_numpy(read_video(data / "train/00001.mp4")).movedim(-1, 1) / 255
    with torch.no_grad():
        expected = autoencoder.encode(2 * frames - 1).latent * 0.5
        decoded = autoencoder.decode(content["latents"].float() / 0.5).sample
        reconstruction = autoencoder(2 * frames - 1).sample
    assert content["latents"].shape == (NUM_FRAMES, 4, 16, 16)
    torch.testing.assert_close(content["latents"].float(), expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(decoded, reconstruction, atol=2e-2, rtol=2e-2)


def test_finished_files_are_kept(data: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    encode(data, tmp_path / "autoencoder", tmp_path / "latents", "--splits", "train")
    kept, missing = (tmp_path / f"latents/train/0000{episode}.safetensors" for episode in (0, 1))
    assert not (tmp_path / "latents/validation").exists()
    time_of_kept, content = kept.stat().st_mtime_ns, load_file(missing)
    missing.unlink()
    missing.with_suffix(".1.partial").write_bytes(kept.read_bytes()[:50])  # what an interruption leaves
    encode(data, tmp_path / "autoencoder", tmp_path / "latents")
    assert kept.stat().st_mtime_ns == time_of_kept
    assert all(torch.equal(value, content[name]) for name, value in load_file(missing).items())


def test_jobs_share_out_the_videos(data: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    encode(data, tmp_path / "autoencoder", tmp_path / "whole")

    def files(output: str) -> dict[str, int]:
        folder = tmp_path / output
        found = folder.rglob("*.safetensors")
        return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in found}

    second = {"train/00001.safetensors"}
    parts = {"1/2": files("whole").keys() - second, "2/2": second}
    done: dict[str, int] = {}
    for shard in ("2/2", "1/2", "2/2"):  # in any order, and again
        encode(data, tmp_path / "autoencoder", tmp_path / "shared", "--shard", shard)
        now = files("shared")
        assert done.items() <= now.items() and now.keys() == done.keys() | parts[shard]
        done = now
    assert done.keys() == files("whole").keys()
    for name in done:
        whole, shared = load_file(tmp_path / "whole" / name), load_file(tmp_path / "shared" / name)
        assert all(torch.equal(value, whole[key]) for key, value in shared.items())


def test_processes_share_out_the_videos(data: Path, tmp_path: Path, repository: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    encode(data, tmp_path / "autoencoder", tmp_path / "whole")
    words = [str(data), "--autoencoder", str(tmp_path / "autoencoder"), "--output", str(tmp_path / "shared")]
    processes = start(["-m", "training.encode_latents", *words], 2, repository)
    said = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    shares = [re.findall(r"(train|validation): (\d+) of \d+ episodes", text) for text in said]
    assert shares == [[("train", "1"), ("validation", "1")], [("train", "1"), ("validation", "0")]]
    for name in ("train/00000", "train/00001", "validation/00002"):
        whole, shared = (load_file(tmp_path / f / f"{name}.safetensors") for f in ("whole", "shared"))
        assert all(torch.equal(value, whole[key]) for key, value in shared.items())


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "1/0", "-1/4", "1/4/2", "a/b"])
def test_bad_shards_are_refused(data: Path, tmp_path: Path, shard: str) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    with pytest.raises(ValueError, match=f"shard='{shard}' must be a part of all parts, from 1 on"):
        encode(data, tmp_path / "autoencoder", tmp_path / "latents", f"--shard={shard}")


@pytest.mark.parametrize("change", [{"seed": 1}, {"scaling_factor": 0.25}])
def test_latents_of_another_autoencoder_are_refused(
    data: Path, tmp_path: Path, change: dict[str, float]
) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    encode(data, tmp_path / "autoencoder", tmp_path / "latents")
    save_autoencoder(tmp_path / "other", **change)
    with pytest.raises(ValueError, match=r"output: .*safetensors is of another autoencoder"):
        encode(data, tmp_path / "other", tmp_path / "latents")


def test_latents_stay_valid_when_only_the_decoder_changes(data: Path, tmp_path: Path) -> None:
    autoencoder = save_autoencoder(tmp_path / "autoencoder")
    encode(data, tmp_path / "autoencoder", tmp_path / "latents")
    torch.nn.init.zeros_(autoencoder.decoder.conv_in.weight)
    autoencoder.save_pretrained(tmp_path / "finetuned")
    encode(data, tmp_path / "finetuned", tmp_path / "latents")


def test_bf16_is_close(data: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    name = "validation/00002.safetensors"
    for precision in ("no", "bf16"):
        more = ("--splits", "validation", "--mixed_precision", precision)
        encode(data, tmp_path / "autoencoder", tmp_path / precision, *more)
    full, half = (load_file(tmp_path / precision / name)["latents"].float() for precision in ("no", "bf16"))
    assert 0 < (full - half).abs().max() < 0.05 * full.std()


def test_hash_is_in_the_metadata(data: Path, tmp_path: Path) -> None:
    autoencoder = save_autoencoder(tmp_path / "autoencoder")
    encode(data, tmp_path / "autoencoder", tmp_path / "latents", "--splits", "validation")
    with safe_open(tmp_path / "latents/validation/00002.safetensors", framework="pt") as content:
        assert content.metadata()[script.AUTOENCODER_KEY] == script.hash_autoencoder(autoencoder)


def test_corrupt_video_is_named_and_leaves_nothing(data: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    video = data / "train/00001.mp4"
    video.write_bytes(video.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"00001\.mp4.* cannot be read as a video"):
        encode(data, tmp_path / "autoencoder", tmp_path / "latents")
    assert list(tmp_path.rglob("*.safetensors")) == [
        tmp_path / "autoencoder/diffusion_pytorch_model.safetensors"
    ]


def test_wrong_number_of_actions_is_named(data: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    (data / "validation/metadata.jsonl").write_text(json.dumps({"file_name": "00002.mp4", "actions": [0, 1]}))
    with pytest.raises(ValueError, match=r"00002\.mp4: 7 frames, but 2 actions"):
        encode(data, tmp_path / "autoencoder", tmp_path / "latents")


def test_videos_without_actions(data: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    for file in data.glob("*/metadata.jsonl"):
        file.unlink()
    encode(data, tmp_path / "autoencoder", tmp_path / "latents", "--splits", "validation")
    assert list(load_file(tmp_path / "latents/validation/00002.safetensors")) == ["latents"]


def test_bad_arguments_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"autoencoder='.*nowhere' must be a folder with config\.json"):
        encode(data, tmp_path / "nowhere", tmp_path / "latents")
    save_autoencoder(tmp_path / "autoencoder")
    with pytest.raises(ValueError, match="batch_size=0 must be an integer of at least 1"):
        encode(data, tmp_path / "autoencoder", tmp_path / "latents", "--batch_size", "0")
    with pytest.raises(ValueError, match=r"data=.* has no folder 'test'"):
        encode(data, tmp_path / "autoencoder", tmp_path / "latents", "--splits", "test")


def test_latents_too_large_for_float16_are_refused(data: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder", scaling_factor=1e9)
    with pytest.raises(ValueError, match="do not fit float16: is scaling_factor set"):
        encode(data, tmp_path / "autoencoder", tmp_path / "latents")


def test_script_runs_from_the_command_line(data: Path, repository: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    command = ["-m", "training.encode_latents", str(data), "--splits", "validation"]
    command += ["--autoencoder", str(tmp_path / "autoencoder"), "--output", str(tmp_path / "latents")]
    result = run_python(command, repository)
    assert result.returncode == 0, result.stderr
    assert "validation: 1 of 1 episodes" in result.stderr
    assert (tmp_path / "latents/validation/00002.safetensors").is_file()


def test_changed_videos_and_actions_are_encoded_anew(data: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    encode(data, tmp_path / "autoencoder", tmp_path / "latents")
    files = [tmp_path / f"latents/train/0000{episode}.safetensors" for episode in (0, 1)]
    before = [load_file(file) for file in files]
    time = (data / "train/00000.mp4").stat().st_mtime
    write_video(data / "train/00000.mp4", seed=9)
    os.utime(data / "train/00000.mp4", (time, time))  # its content has changed, whatever the clock says
    metadata = data / "train/metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("[1, 2, 3", "[2, 2, 3"))
    encode(data, tmp_path / "autoencoder", tmp_path / "latents")
    after = [load_file(file) for file in files]
    assert not torch.equal(before[0]["latents"], after[0]["latents"])
    assert torch.equal(before[1]["latents"], after[1]["latents"])
    assert after[1]["actions"].tolist()[:3] == [2, 2, 3]


def test_videos_of_one_name_in_two_folders(data: Path, tmp_path: Path) -> None:
    for split, name in (("train", "cats"), ("train", "dogs"), ("validation", "dogs")):
        (data / "classes" / split / name).mkdir(parents=True)
        write_video(data / "classes" / split / name / "1.mp4", len(name + split))
    save_autoencoder(tmp_path / "autoencoder")
    encode(data / "classes", tmp_path / "autoencoder", tmp_path / "latents")
    videos = LatentVideos(tmp_path / "latents/train")
    assert [path.parent.name for path in videos.paths] == ["cats", "dogs"]
    assert [int(label) for label in videos.class_labels] == [0, 1]
    assert int(LatentVideos(tmp_path / "latents/validation").class_labels[0]) == 1
    videos.keep_conditions(None, 2)


def test_what_would_be_lost_or_stale_is_named(data: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    for file in data.glob("*/metadata.jsonl"):
        file.unlink()
    shutil.copy(data / "train/00001.mp4", data / "train/00001.mkv")
    with pytest.raises(ValueError, match=r"two videos would both become .*00001\.safetensors: rename one"):
        encode(data, tmp_path / "autoencoder", tmp_path / "latents")
    (data / "train/00001.mkv").unlink()
    encode(data, tmp_path / "autoencoder", tmp_path / "latents")
    (data / "train/00001.mp4").unlink()
    with pytest.raises(ValueError, match=r"1 files are of no video of train: .*00001\.safetensors; remove"):
        encode(data, tmp_path / "autoencoder", tmp_path / "latents")


def test_two_autoencoders_cannot_begin_in_one_folder(data: Path, tmp_path: Path) -> None:
    """The folder is claimed before the first file is there."""
    script.claim_folder(tmp_path / "latents", "a" * 64)
    with pytest.raises(ValueError, match=r"\.autoencoder-a+ is of another autoencoder than b+"):
        script.claim_folder(tmp_path / "latents", "b" * 64)
    script.claim_folder(tmp_path / "latents", "a" * 64)


def test_a_video_that_does_not_fit_the_autoencoder_is_named(data: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    write_video(data / "train/00001.mp4", 1, height=34, width=33)
    with pytest.raises(ValueError, match=r"00001\.mp4: frames of 34 x 33 pixels; it takes multiples of 2"):
        encode(data, tmp_path / "autoencoder", tmp_path / "latents")


def test_videos_of_mixed_size_length_and_rate(tmp_path: Path) -> None:
    """They become latents of one size and pace, with the action that led to each frame that is kept."""
    data = tmp_path / "data"
    rows = []
    for name, rate, num_frames, size in (
        ("a", 10, 9, (32, 48)),
        ("b", 20, 20, (48, 32)),
        ("c", 30, 7, (64, 64)),
    ):
        numbered_video(data / f"{name}.mp4", numbered_frames(num_frames, *size), rate)
        rows.append(
            {"file_name": f"{name}.mp4", "actions": list(range(num_frames)), "revisits": [0] * num_frames}
        )
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_autoencoder(tmp_path / "autoencoder")
    sizes = ("--resolution", "16x24", "--fps", "10")
    encode(data, tmp_path / "autoencoder", tmp_path / "latents", *sizes)
    files = {file.stem: load_file(file) for file in tmp_path.glob("latents/*/*.safetensors")}
    assert {tuple(content["latents"].shape[1:]) for content in files.values()} == {(4, 8, 12)}
    assert files["a"]["actions"].tolist() == list(range(9)) and "revisits" in files["a"]
    assert files["b"]["actions"].tolist() == list(range(0, 20, 2)) and "revisits" not in files["b"]
    assert files["c"]["actions"].tolist() == [0, 3, 6]
    assert len(LatentVideos(tmp_path / "latents/train")) == 1  # two are held out
    encode(data, tmp_path / "autoencoder", tmp_path / "latents", "--resolution", "16x24", "--stride", "2")
    (again,) = (load_file(file) for file in tmp_path.glob("latents/*/c.safetensors"))
    assert again["actions"].tolist() == [0, 2, 4, 6]  # other options, other frames


def test_an_episode_without_actions(data: Path, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "autoencoder")
    encode(data, tmp_path / "autoencoder", tmp_path / "latents", "--ignore_actions")
    assert list(load_file(tmp_path / "latents/train/00001.safetensors")) == ["latents"]


def test_hashes_of_earlier_latents_stay_valid(data: Path) -> None:
    """What was encoded before there were options is not encoded anew."""
    (first, _) = open_source(data).split("train")
    expected = hashlib.sha256((data / "train/00000.mp4").read_bytes())
    expected.update(repr((tuple(range(NUM_FRAMES)), None, None)).encode())
    assert script.hash_episode(first, FrameOptions()) == expected.hexdigest()
    other = FrameOptions(resolution="16")
    assert script.hash_episode(first, other) != script.hash_episode(first, FrameOptions())


def test_all_videos_are_encoded_where_no_validation_is_asked_for(data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "validation")
    save_autoencoder(tmp_path / "vae")
    encode(data, tmp_path / "vae", tmp_path / "latents", "--splits", "train")
    names = [path.name for path in sorted((tmp_path / "latents/train").iterdir()) if path.suffix]
    assert [name for name in names if name.endswith(".safetensors")] == [
        "00000.safetensors",
        "00001.safetensors",
    ]


def test_validation_alone_is_encoded(data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / "train")
    save_autoencoder(tmp_path / "vae")
    encode(data, tmp_path / "vae", tmp_path / "latents", "--splits", "validation")
    assert [path.name for path in (tmp_path / "latents/validation").iterdir()] == ["00002.safetensors"]
