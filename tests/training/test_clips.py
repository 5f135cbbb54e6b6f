"""training/clips.py: what is read of latents, what is refused, and which clips a batch has."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_far.training.clips import ClipBatches, LatentVideos
from tests.tiny_latents import write_latents


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> LatentVideos:
    return LatentVideos(write_latents(tmp_path_factory.mktemp("latents")) / "train")


# ----------------------------------------------------------------------------------------------------
# Latents


def write(
    file: Path, num_frames: int = 4, metadata: dict[str, str] | None = None, **more: torch.Tensor
) -> None:
    save_file({"latents": torch.zeros(num_frames, 2, 4, 4).half(), **more}, file, metadata=metadata)


def test_latents_that_do_not_fit_one_another_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", metadata={"autoencoder_sha256": "1"})
    wide = {"latents": torch.zeros(4, 2, 4, 6).half()}
    for file, content, metadata, message in (
        ("b", wide, {"autoencoder_sha256": "1"}, r"b\.safetensors has latents of \(2, 4, 6\), .*a\.safetens"),
        (
            "c",
            {},
            {"autoencoder_sha256": "2"},
            r"c\.safetensors and .*a\.safetensors were encoded by different",
        ),
        (
            "d",
            {"actions": torch.zeros(3, dtype=torch.int64)},
            {},
            r"d\.safetensors has 3 actions for 4 frames",
        ),
        ("e", {"latents": torch.zeros(4)}, {}, r"e\.safetensors has no latents \[T, C, H, W\]"),
    ):
        write(tmp_path / f"{file}.safetensors", metadata=metadata, **content)
        with pytest.raises(ValueError, match=message):
            LatentVideos(tmp_path)
        (tmp_path / f"{file}.safetensors").unlink()
    (tmp_path / "f.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"f\.safetensors cannot be read.*encode it anew"):
        LatentVideos(tmp_path)


def test_conditions_that_do_not_fit_the_model_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.safetensors", actions=torch.tensor([0, 1, 2, -1]))
    LatentVideos(tmp_path).keep_conditions(3, None)
    with pytest.raises(ValueError, match=r"num_actions=2: .*a\.safetensors has actions such as 2; .* 0 to 1"):
        LatentVideos(tmp_path).keep_conditions(2, None)
    with pytest.raises(ValueError, match=r"num_classes=2: .*a\.safetensors has no class labels"):
        LatentVideos(tmp_path).keep_conditions(3, 2)
    videos = LatentVideos(tmp_path)
    videos.keep_conditions(None, None)
    assert "has actions, which this model ignores (num_actions=None)" in caplog.text
    assert ClipBatches(videos, 1, 4)[0].actions is None
    write(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"num_actions=3: .*b\.safetensors has no actions"):
        LatentVideos(tmp_path).keep_conditions(3, None)


def test_latents_that_are_not_finite_are_named_when_they_are_drawn(tmp_path: Path) -> None:
    latents = torch.zeros(4, 2, 4, 4).half()
    latents[2, 0, 0, 0] = math.nan
    write(tmp_path / "a.safetensors", latents=latents)
    with pytest.raises(ValueError, match=r"a\.safetensors has NaN or infinite latents at frame 2"):
        ClipBatches(LatentVideos(tmp_path), 1, 4)[0]


def test_the_fingerprint_is_of_names_lengths_and_content(tmp_path: Path) -> None:
    found = set()
    for name, number, value in (("a", 4, 0.0), ("b", 4, 0.0), ("a", 5, 0.0), ("a", 4, 1.0)):
        for file in tmp_path.iterdir():
            file.unlink()
        write(tmp_path / f"{name}.safetensors", latents=torch.full((number, 2, 4, 4), value).half())
        assert LatentVideos(tmp_path).fingerprint() == LatentVideos(tmp_path).fingerprint()
        found.add(LatentVideos(tmp_path).fingerprint())
    assert len(found) == 4


# ----------------------------------------------------------------------------------------------------
# Clips


def test_a_batch_depends_on_its_index_only(videos: LatentVideos) -> None:
    first, second = (ClipBatches(videos, 2, 6, short_window=3, seed=5) for _ in range(2))
    second[0]
    for name, value in vars(first[7]).items():
        other = getattr(second[7], name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert first[7].sources != first[8].sources


def test_a_batch_says_where_it_is_from(videos: LatentVideos) -> None:
    clips = ClipBatches(videos, 3, 5)[2]
    for latents, source in zip(clips.latents, clips.sources, strict=True):
        path, _, start = source.partition(" from frame ")
        index = [str(path) for path in videos.paths].index(path)
        assert torch.equal(latents, videos.clip(index, int(start), 5))


def test_lengths_of_long_clips_vary_and_agree_between_processes(videos: LatentVideos) -> None:
    ranks = [ClipBatches(videos, 2, 6, short_window=3, rank=rank, num_ranks=2) for rank in range(2)]
    lengths = [[batches[index].latents.shape[1] for index in range(30)] for batches in ranks]
    assert lengths[0] == lengths[1]
    assert set(lengths[0]) == {3, 4, 5, 6}
    assert ranks[0][0].sources != ranks[1][0].sources


def test_log_uniform_lengths_are_mostly_short(videos: LatentVideos) -> None:
    batches = ClipBatches(videos, 1, 12, 2, length_distribution="log_uniform")
    lengths = torch.tensor([batches[index].latents.shape[1] for index in range(400)])
    assert lengths.min() == 2 and lengths.max() == 12
    assert (lengths < 5).float().mean().item() == pytest.approx(math.log(5 / 2) / math.log(13 / 2), abs=0.08)


def test_share_of_dropped_actions(videos: LatentVideos) -> None:
    batches = ClipBatches(videos, 64, 12, condition_dropout=0.25)
    actions = torch.cat([batches[index].actions for index in range(4)])
    assert (actions == -1).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_clips_of_revisits(tmp_path: Path) -> None:
    """The window shows a view that the clip has before its window."""
    revisits = torch.zeros(2, 40, dtype=torch.int64)
    revisits[0, 30], revisits[1, 12], revisits[1, 39] = 20, 9, 25
    frames = torch.arange(40.0).expand(2, 40)  # a frame is its number
    for video in range(2):
        content = {"latents": frames[video, :, None, None, None].half(), "revisits": revisits[video]}
        save_file(content, tmp_path / f"{video}.safetensors")
    batches = ClipBatches(LatentVideos(tmp_path), 8, 32, 4, revisit_probability=1.0)
    pairs = {(10, 30), (3, 12), (14, 39)}  # frames of the same view
    shown = set()
    for index in range(60):
        clips = batches[index].latents[:, :, 0, 0, 0].long()
        if clips.shape[1] in (*range(13, 17), *range(24, 33)):  # other lengths fit none of the three
            for first, last in zip(clips[:, 0].tolist(), clips[:, -1].tolist(), strict=True):
                before, window = range(first, last - 3), range(last - 3, last + 1)
                fitting = {pair for pair in pairs if pair[0] in before and pair[1] in window}
                assert fitting
                shown |= fitting
    assert shown == pairs
    with pytest.raises(ValueError, match=r"revisit_probability=0\.5"):
        ClipBatches(LatentVideos(tmp_path), 8, 32, revisit_probability=0.5)


def test_clips_longer_than_a_video_are_refused(videos: LatentVideos) -> None:
    with pytest.raises(
        ValueError, match=r"num_frames=13 must be from 1 .* to 12 \(the longest video, .*00000"
    ):
        ClipBatches(videos, 1, 13)
    with pytest.raises(ValueError, match="num_frames=2 must be from 3"):
        ClipBatches(videos, 1, 2, short_window=3)


def test_videos_that_are_too_short_are_named_and_the_rest_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One short video limits no other; a Long model uses it in clips that are short enough."""
    for name, num_frames in (("a", 9), ("b", 3), ("c", 5)):
        write(tmp_path / f"{name}.safetensors", num_frames)
    videos = LatentVideos(tmp_path)
    batches = ClipBatches(videos, 16, 6)
    assert "2 of 3 videos in" in caplog.text and "shorter than a clip of 6 frames: b, c" in caplog.text
    assert {Path(source.split()[0]).stem for source in batches[0].sources} == {"a"}
    caplog.clear()
    batches = ClipBatches(videos, 64, 6, short_window=3)
    assert not caplog.text
    used = {index: {Path(source.split()[0]).stem for source in batches[index].sources} for index in range(20)}
    lengths = {index: batches[index].latents.shape[1] for index in used}
    assert set(lengths.values()) == {3, 4, 5, 6}
    fitting = {3: {"a", "b", "c"}, 4: {"a", "c"}, 5: {"a", "c"}, 6: {"a"}}
    assert all(used[index] == fitting[length] for index, length in lengths.items())
    with pytest.raises(
        ValueError, match=r"num_frames=10 must be from 1 .* to 9 \(the longest video, .*a\.saf"
    ):
        ClipBatches(videos, 1, 10)
