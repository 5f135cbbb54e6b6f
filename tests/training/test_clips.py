"""training/clips.py: what is read of videos and latents, what is refused, and which clips a batch has."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_latents import write_latents
from training.clips import ClipBatches, LatentVideos, list_episodes


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> LatentVideos:
    return LatentVideos(write_latents(tmp_path_factory.mktemp("latents")) / "train")


# ----------------------------------------------------------------------------------------------------
# Videos: only their names are read here


def split(folder: Path, *names: str, rows: list[dict] | None = None) -> Path:
    """A data set whose train split has empty files of these names."""
    for name in names:
        (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "train" / name).touch()
    if rows is not None:
        (folder / "train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_metadata_say_what_is_known_of_a_video(tmp_path: Path) -> None:
    rows = [{"file_name": "b [1].mp4", "actions": [0, -1, 2]}, {"file_name": "a.mkv", "class_label": 3}]
    rows[0]["revisits"] = [0, 0, 2]
    episodes = list_episodes(split(tmp_path / "my [data]", "b [1].mp4", "a.mkv", rows=rows), "train")
    assert [episode.video.name for episode in episodes] == ["a.mkv", "b [1].mp4"]
    assert (episodes[0].actions, episodes[0].revisits, episodes[0].class_label) == (None, None, 3)
    assert (episodes[1].actions, episodes[1].revisits, episodes[1].class_label) == (
        (0, -1, 2),
        (0, 0, 2),
        None,
    )


def test_metadata_in_parquet_and_in_subfolders(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    split(tmp_path, "one/a.mp4", "two/a.mp4")
    for part, action in (("one", 1), ("two", 2)):
        table = pyarrow.table({"file_name": ["a.mp4"], "actions": [[action, action]]})
        parquet.write_table(table, tmp_path / "train" / part / "metadata.parquet")
    assert [episode.actions for episode in list_episodes(tmp_path, "train")] == [(1, 1), (2, 2)]


def test_folders_of_classes_give_the_same_labels_in_every_split(tmp_path: Path) -> None:
    split(tmp_path, "dogs/1.mp4", "cats/1.mp4", "birds/1.mp4")
    (tmp_path / "validation/dogs").mkdir(parents=True)
    (tmp_path / "validation/dogs/2.mp4").touch()
    labels = {episode.video.parent.name: episode.class_label for episode in list_episodes(tmp_path, "train")}
    assert labels == {"birds": 0, "cats": 1, "dogs": 2}
    assert [episode.class_label for episode in list_episodes(tmp_path, "validation")] == [2]


def test_what_is_left_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split(tmp_path, "a.mp4", "b.gif", "c.webm", "notes.txt", ".hidden", rows=[{"file_name": "a.mp4"}])
    with caplog.at_level(logging.WARNING):
        assert [episode.video.name for episode in list_episodes(tmp_path, "train")] == ["a.mp4"]
    unlisted, others = (record.getMessage() for record in caplog.records)
    assert "metadata do not list" in unlisted and unlisted.endswith("b.gif, c.webm")
    assert "no videos" in others and others.endswith("notes.txt")
    (tmp_path / "train/metadata.jsonl").unlink()
    names = [episode.video.name for episode in list_episodes(tmp_path, "train")]
    assert names == ["a.mp4", "b.gif", "c.webm"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "elsewhere.mp4"}, r"metadata name .*train/elsewhere\.mp4, which is no video"),
        ({"file_name": "../../secret.mp4"}, r"metadata name .*secret\.mp4, which is no video"),
        ({"actions": [1]}, "has a line without file_name"),
        (
            {"file_name": "a.mp4", "actions": [0, 0.5]},
            r"metadata\.jsonl: a\.mp4 has actions 0\.5 at frame 1; it takes integers of at least -1",
        ),
        ({"file_name": "a.mp4", "actions": ["left"]}, r"a\.mp4 has actions 'left' at frame 0"),
        ({"file_name": "a.mp4", "actions": [True]}, r"a\.mp4 has actions True at frame 0"),
        ({"file_name": "a.mp4", "actions": [-2]}, r"a\.mp4 has actions -2 at frame 0"),
        ({"file_name": "a.mp4", "actions": "012"}, r"a\.mp4 has actions '012'; it takes a list"),
        ({"file_name": "a.mp4", "label": "cat"}, r"a\.mp4 has class_label 'cat'"),
    ],
)
def test_metadata_that_do_not_fit_are_named(tmp_path: Path, row: dict, message: str) -> None:
    (tmp_path / "secret.mp4").touch()
    with pytest.raises(ValueError, match=message):
        list_episodes(split(tmp_path / "data", "a.mp4", rows=[row]), "train")


def test_bad_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no folder 'test'"):
        list_episodes(tmp_path, "test")
    rows = [{"file_name": "a.mp4"}, {"file_name": "./a.mp4"}]
    with pytest.raises(ValueError, match=r"metadata name .*a\.mp4, which is no video, or twice"):
        list_episodes(split(tmp_path / "twice", "a.mp4", rows=rows), "train")
    with pytest.raises(ValueError, match=r"train has no videos; .*\|mp4\|"):
        list_episodes(split(tmp_path, "notes.txt"), "train")
    (tmp_path / "train/metadata.jsonl").write_text("{not json\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl has a line that is no JSON .*: \{not json"):
        list_episodes(tmp_path, "train")


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
    ranks = [ClipBatches(videos, 2, 6, short_window=3, rank=rank) for rank in range(2)]
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
        ValueError, match=r"num_frames=13 must be from 1 .* to 12 \(the shortest video, .*00000"
    ):
        ClipBatches(videos, 1, 13)
    with pytest.raises(ValueError, match="num_frames=2 must be from 3"):
        ClipBatches(videos, 1, 2, short_window=3)
