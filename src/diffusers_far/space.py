"""A Space of the Hub: the folder that it is made of, and its upload."""

import importlib.metadata
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    SpaceCardData,
    SpaceHardware,
)
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils._validators import validate_repo_id
from packaging.requirements import Requirement
from packaging.version import Version

from .browser.starts import starts_for_export
from .browser.static_page import ISOLATED, find_page
from .hub import MARKER, TAGS, told_in_our_words, visible_files
from .loading import load_pipeline
from .shipped import EPISODES, WORLDS, find, locate
from .whole_files import written_whole

SDKS = ("gradio", "static")
PACKAGE = Path(__file__).resolve().parent
ZERO_GPU = SpaceHardware.ZERO_A10G.value  # keeps its name, whatever the card behind it
ZERO_GPU_PYTHON = "3.12"  # it has few versions of Python
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"  # without CUDA, which is two gigabytes
HEADERS = {name.lower(): value for name, value in ISOLATED.items()}
HEADERS["cross-origin-resource-policy"] = "cross-origin"


def write_space(
    folder: str | Path,
    checkpoint: str,
    repo_id: str,
    sdk: str,
    *,
    title: str | None = None,
    license: str | None = None,
    variant: str | None = None,
    hardware: str | None = None,
    episodes: str | None = None,
    dtype: str | None = None,
    page: str | None = None,
) -> Path:
    """Write a whole Space; docs/spaces.md tells what is in it.

    Args:
        folder: to write; it must not exist, or be empty.
        checkpoint: folder or shipped model, which goes into the Space; or repo id, which the gradio app loads
            when it starts.
        repo_id: of the Space, "name/space".
        sdk: "gradio": the browser app in Python; "static": a page with the exported model, without a server.
        title: of the Space; by default the last part of `repo_id`.
        license: by default the one of the checkpoint's card; none where that states none.
        variant: of the checkpoint's weights, such as fp16.
        hardware: of a gradio Space, as `huggingface_hub.SpaceHardware` names it; by default cpu-basic. With
            zero-a10g the app asks ZeroGPU for a GPU while somebody plays.
        episodes: split of a videofolder to start games from; by default the shipped one for the shipped
            models, and none for others. A static Space gets short clips of it.
        dtype: of the exported model in a static Space; by default float16.
        page: folder of the built page of a static Space; by default `web/dist` of a checkout.

    Returns:
        The folder.

    Raises:
        ValueError: for an argument that does not fit.
    """
    folder = Path(folder)
    if sdk not in SDKS:
        raise ValueError(f"--space: got {sdk}; it takes {' or '.join(SDKS)}")
    foreign = {"hardware": hardware} if sdk == "static" else {"dtype": dtype, "page": page}
    for name, value in foreign.items():
        if value is not None:
            raise ValueError(f"--{name}: got {value}; a {sdk} Space takes none")
    validate_repo_id(repo_id)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"--dry-run: {folder} exists already; it takes a new folder, or an empty one")
    page_folder = find_page("page", page) if sdk == "static" else None
    hardware = check_hardware(hardware)
    world = WORLDS.get(Path(checkpoint).name)
    if world is not None:
        episodes = episodes or EPISODES
    episodes_folder = None if episodes is None else find(episodes, "episodes")
    source = locate(checkpoint)
    is_inside = Path(source).is_dir()
    pipeline = load_pipeline(checkpoint, "cpu", variant=variant)
    card: dict[str, Any] = {
        "title": title or repo_id.rpartition("/")[2],
        "emoji": "🎮",
        "colorFrom": "indigo",
        "colorTo": "green",
        "sdk": sdk,
        "license": license or stated_license(source),
        "short_description": short_description(pipeline),
        "models": None if is_inside else [checkpoint],
        "tags": TAGS,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(folder) as partial:
        partial.mkdir()
        if page_folder is not None:
            from .export import export_onnx

            shutil.copytree(page_folder, partial, dirs_exist_ok=True)
            shutil.rmtree(partial / "model", ignore_errors=True)  # of another, from trying the page
            size, space = pipeline.default_size, pipeline.transformer.action_space
            starts = starts_for_export(episodes_folder, size, space) if episodes_folder is not None else []
            export_onnx(pipeline, partial / "model", dtype or "float16", starts=starts, packed=True)
            card |= {"app_file": "index.html", "custom_headers": HEADERS}
        else:
            if episodes_folder is not None:
                shutil.copytree(episodes_folder, partial / "episodes")
            for file, path in visible_files(source).items() if is_inside else ():
                (partial / "model" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, partial / "model" / file)
            if not is_from_index():
                copy_package(partial / "diffusers_far")
            app = app_source(None if is_inside else checkpoint, hardware, episodes, world, variant)
            (partial / "app.py").write_text(app, encoding="utf-8")
            (partial / "requirements.txt").write_text(requirements(hardware), encoding="utf-8")
            card |= {
                "sdk_version": installed_version("gradio"),
                "python_version": ZERO_GPU_PYTHON if hardware == ZERO_GPU else python_version(),
                "app_file": "app.py",
                "suggested_hardware": hardware,
            }
        (partial / "README.md").write_text(readme(card, checkpoint, repo_id), encoding="utf-8")
    return folder


def push_space(
    folder: str | Path,
    repo_id: str,
    sdk: str,
    private: bool = False,
    hardware: str | None = None,
    token: str | None = None,
) -> str:
    """Upload what `write_space` wrote, in one commit that leaves nothing of an earlier one.

    Args:
        folder: of the Space.
        repo_id: "name/space"; created where it does not exist.
        sdk: of a new Space.
        private: whether a new Space is.
        hardware: that a new Space is to run on; by default the Hub's own default.
        token: by default the one of `hf auth login`.

    Returns:
        Address of the Space.

    Raises:
        ValueError: when the Hub refuses, or has a Space of that name that people have written.
    """
    api = HfApi(token=token)
    files = visible_files(folder)
    with told_in_our_words(repo_id):
        options: dict[str, Any] = {} if hardware is None else {"space_hardware": hardware}
        url = api.create_repo(
            repo_id, repo_type="space", space_sdk=sdk, private=private, exist_ok=True, **options
        )
        repo_id = str(url.repo_id)
        there = set(api.list_repo_files(repo_id, repo_type="space")) - {".gitattributes"}
        if there - {"README.md"}:  # a new one has at most this
            card = "README.md" in there and api.hf_hub_download(repo_id, "README.md", repo_type="space")
            if not card or MARKER not in Path(card).read_text(encoding="utf-8"):
                raise ValueError(
                    f"REPO_ID: the Space {repo_id} has files that diffusers-far did not write; take another "
                    "name, or empty it"
                )
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, path) for name, path in files.items()),
            *(CommitOperationDelete(name) for name in sorted(there - files.keys())),
        ]
        api.create_commit(
            repo_id, operations, commit_message=f"Upload a {sdk} Space of diffusers-far", repo_type="space"
        )
    return str(url)


def check_hardware(name: str | None) -> str:
    """A name of `SpaceHardware`; by default the free one.

    Raises:
        ValueError: for another.
    """
    names = [hardware.value for hardware in SpaceHardware]
    if name is not None and name not in names:
        raise ValueError(f"--hardware: got {name}; it takes one of {', '.join(names)}")
    return name or SpaceHardware.CPU_BASIC.value


def stated_license(source: str | Path) -> str | None:
    """What a checkpoint's card says."""
    if Path(source).is_dir():
        file = Path(source) / "README.md"
        card = ModelCard.load(file) if file.is_file() else None
    else:
        with told_in_our_words(str(source)):
            try:
                card = ModelCard.load(str(source))
            except EntryNotFoundError:
                card = None
    return None if card is None else card.data.get("license")


def short_description(pipeline: Any) -> str:
    """One line for lists of Spaces."""
    if pipeline.transformer.action_space is None:
        return "Videos that go on, frame after frame"
    return "Play a world model in your browser"


def installed_version(package: str) -> str:
    """What is installed, without the label of a build such as +cpu.

    Raises:
        ValueError: where it is not.
    """
    try:
        return Version(importlib.metadata.version(package)).public
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f'a gradio Space needs {package}: pip install "diffusers-far[app]"') from error


def python_version() -> str:
    """That of this process, such as 3.12."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def is_from_index() -> bool:
    """Whether pip can install what runs here by its version: not a checkout or a file of one's own."""
    return installed_package().read_text("direct_url.json") is None


def installed_package() -> importlib.metadata.Distribution:
    """What pip installed: beside the sources of a checkout there may be metadata of a build, too."""
    found = list(importlib.metadata.distributions(name="diffusers-far"))
    by_pip = [distribution for distribution in found if distribution.read_text("RECORD")]
    if not by_pip:
        raise ValueError(
            "diffusers-far is not installed, so its requirements are not known: pip install -e ."
        )
    return by_pip[0]


def requirements(hardware: str) -> str:
    """What the app needs, at the versions that are installed here.

    Those that diffusers-far names are pinned, not what these need in turn: a Space has demands of its own on
    some of them.
    """
    distribution = installed_package()
    lines = [f"--extra-index-url {CPU_WHEELS}"] if hardware.startswith("cpu-") else []
    if is_from_index():
        lines.append(f"diffusers-far[app]=={distribution.version}")
    for text in distribution.requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "app"}):
            lines.append(f"{requirement.name}=={installed_version(requirement.name)}")
    if hardware == ZERO_GPU:
        lines.append("spaces")  # as the Hub has it: it must fit the machines there
    return "\n".join(lines) + "\n"


def copy_package(target: Path) -> None:
    """The package as it is here, without models, and its license."""
    ignored = shutil.ignore_patterns("__pycache__", "shipped_files")
    shutil.copytree(PACKAGE, target, ignore=ignored)
    for file in installed_package().files or []:
        if file.name == "LICENSE":
            shutil.copyfile(str(file.locate()), target / file.name)


def app_source(
    checkpoint: str | None,
    hardware: str,
    episodes: str | None,
    world: str | None,
    variant: str | None,
) -> str:
    """app.py; without a checkpoint, the model is in the Space."""
    arguments = [
        'str(HERE / "model")' if checkpoint is None else json.dumps(checkpoint),
        "episodes=None" if episodes is None else 'episodes=str(HERE / "episodes")',
        'host="0.0.0.0"',
    ]
    arguments += [
        f"{name}={json.dumps(value)}" for name, value in (("world", world), ("variant", variant)) if value
    ]
    lends = hardware == ZERO_GPU
    if lends:
        arguments.append("lent_gpu=spaces.GPU")
    lines = [
        '"""The app of this Space, by diffusers-far."""',
        "",
        "from pathlib import Path",
        "",
        *(["import spaces  # first: it prepares PyTorch for a GPU that is lent", ""] if lends else []),
        "from diffusers_far.browser.app import launch",
        "",
        "HERE = Path(__file__).parent",
        "",
        'if __name__ == "__main__":',
        "    launch(",
        *(f"        {argument}," for argument in arguments),
        "    )",
    ]
    return "\n".join(lines) + "\n"


def readme(card: dict[str, Any], checkpoint: str, repo_id: str) -> str:
    """README.md, whose first lines configure the Space."""
    data = SpaceCardData(**{name: value for name, value in card.items() if value is not None})
    name = checkpoint if card["models"] else Path(checkpoint).name  # whose folders are where concerns nobody
    link = f"[{name}](https://huggingface.co/{name})" if card["models"] else name
    text = f"""
        # {card["title"]}

        {card["short_description"]}: {link}, a [FAR](https://arxiv.org/abs/2503.19325) model.
        Made by `diffusers-far push {name} {repo_id} --space {card["sdk"]}`.
        """
    return f"---\n{data.to_yaml()}\n---\n\n{MARKER}\n{textwrap.dedent(text)}"
