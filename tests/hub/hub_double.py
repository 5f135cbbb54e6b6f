"""A stand-in for the Hugging Face Hub on loopback: the part of its protocol that uploads and downloads take.

No such server exists as a package. Repositories are dictionaries in memory, one version per branch; a private
one answers only to the token. Data sets, named such as datasets/me/walks, can be read only. Spaces are named
such as spaces/me/game; a new one has a README.md, as on the Hub. Large-file storage is not played: every file
is a regular one.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

TOKEN = "hf_" + "t" * 34


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})

    def commit_id(self, branch: str) -> str:
        content = json.dumps(
            {name: hashlib.sha1(data).hexdigest() for name, data in self.files(branch).items()}
        )
        return hashlib.sha1(content.encode()).hexdigest()

    def files(self, revision: str) -> dict[str, bytes]:
        for branch, files in self.branches.items():
            if revision == branch or (len(revision) == 40 and self.commit_id(branch) == revision):
                return files
        raise HTTPException(404, headers={"X-Error-Code": "RevisionNotFound"})


@dataclass
class HubDouble:
    """The server's address, and what it holds."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    num_requests: int = 0
    messages: list[str] = field(default_factory=list)  # of the commits
    created: list[dict[str, Any]] = field(default_factory=list)  # what each new repository was asked for with


def build(hub: HubDouble) -> FastAPI:
    app = FastAPI()

    def find(name: str, request: Request, write: bool = False) -> Repository:
        repository = hub.repositories.get(name)
        signed = request.headers.get("authorization") == f"Bearer {TOKEN}"
        if write and not signed:
            raise HTTPException(401)
        if repository is None or (repository.private and not signed):
            raise HTTPException(401 if repository is None else 404, headers={"X-Error-Code": "RepoNotFound"})
        return repository

    @app.middleware("http")
    async def count(request: Request, call_next: Any) -> Any:
        hub.num_requests += 1
        return await call_next(request)

    @app.post("/api/repos/create")
    async def create(request: Request) -> Any:
        body = await request.json()
        name = "/".join(filter(None, [body.get("organization") or "me", body["name"]]))
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise HTTPException(401)
        is_space = body.get("type") == "space"
        name = f"spaces/{name}" if is_space else name
        repository = {"url": f"{hub.url}/{name}", "name": name, "id": name.removeprefix("spaces/")}
        if name in hub.repositories:
            return JSONResponse(repository, status_code=409)
        private = body.get("private") is True or body.get("visibility") == "private"
        hub.repositories[name] = Repository(private)
        hub.created.append(body)
        if is_space:
            hub.repositories[name].branches["main"] |= {".gitattributes": b"", "README.md": b"# A Space\n"}
        return repository

    @app.get("/api/whoami-v2")
    async def whoami() -> Any:
        return {"name": "me", "type": "user", "orgs": []}

    @app.post("/api/validate-yaml")
    async def validate() -> Any:
        return {"errors": [], "warnings": []}

    @app.post("/api/models/{owner}/{name}/branch/{branch}")
    async def branch(owner: str, name: str, branch: str, request: Request) -> Any:
        repository = find(f"{owner}/{name}", request, write=True)
        if branch in repository.branches:
            raise HTTPException(409)
        repository.branches[branch] = dict(repository.branches["main"])
        return {}

    @app.post("/api/spaces/{owner}/{name}/preupload/{revision}")
    async def preupload_to_space(owner: str, name: str, revision: str, request: Request) -> Any:
        return await preupload(f"spaces/{owner}", name, revision, request)

    @app.post("/api/spaces/{owner}/{name}/commit/{revision}")
    async def commit_to_space(owner: str, name: str, revision: str, request: Request) -> Any:
        return await commit(f"spaces/{owner}", name, revision, request)

    @app.post("/api/models/{owner}/{name}/preupload/{revision}")
    async def preupload(owner: str, name: str, revision: str, request: Request) -> Any:
        find(f"{owner}/{name}", request, write=True)
        files = [file["path"] for file in (await request.json())["files"]]
        return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}

    @app.post("/api/models/{owner}/{name}/commit/{revision}")
    async def commit(owner: str, name: str, revision: str, request: Request) -> Any:
        repository = find(f"{owner}/{name}", request, write=True)
        files = repository.branches[revision]
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                hub.messages.append(entry["value"]["summary"])
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            if entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        commit_id = repository.commit_id(revision)
        return {
            "success": True,
            "commitOid": commit_id,
            "commitUrl": f"{hub.url}/{owner}/{name}/commit/{commit_id}",
            "hookOutput": "",
        }

    @app.get("/api/models/{owner}/{name}")
    @app.get("/api/models/{owner}/{name}/revision/{revision}")
    async def model_info(owner: str, name: str, request: Request, revision: str = "main") -> Any:
        repository = find(f"{owner}/{name}", request)
        files = repository.files(revision)
        return {
            "id": f"{owner}/{name}",
            "modelId": f"{owner}/{name}",
            "sha": revision if len(revision) == 40 else repository.commit_id(revision),
            "private": repository.private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in files],
        }

    @app.get("/api/models/{owner}/{name}/tree/{revision}")
    @app.get("/api/models/{owner}/{name}/tree/{revision}/{path:path}")
    async def tree(owner: str, name: str, revision: str, request: Request, path: str = "") -> Any:
        files = find(f"{owner}/{name}", request).files(revision)
        return [
            {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for file, data in files.items()
            if file.startswith(path)
        ]

    @app.get("/api/datasets/{owner}/{name}")
    @app.get("/api/datasets/{owner}/{name}/revision/{revision}")
    async def dataset_info(owner: str, name: str, request: Request, revision: str = "main") -> Any:
        info = await model_info(f"datasets/{owner}", name, request, revision)
        return info | {"id": f"{owner}/{name}"}

    @app.get("/api/spaces/{owner}/{name}/tree/{revision}")
    async def space_tree(owner: str, name: str, revision: str, request: Request) -> Any:
        return await tree(f"spaces/{owner}", name, revision, request)

    @app.get("/api/datasets/{owner}/{name}/tree/{revision}")
    async def dataset_tree(owner: str, name: str, revision: str, request: Request) -> Any:
        return await tree(f"datasets/{owner}", name, revision, request)

    @app.api_route("/datasets/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve_in_dataset(
        owner: str, name: str, revision: str, path: str, request: Request
    ) -> Response:
        return await resolve(f"datasets/{owner}", name, revision, path, request)

    @app.api_route("/spaces/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve_in_space(owner: str, name: str, revision: str, path: str, request: Request) -> Response:
        return await resolve(f"spaces/{owner}", name, revision, path, request)

    @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve(owner: str, name: str, revision: str, path: str, request: Request) -> Response:
        repository = find(f"{owner}/{name}", request)
        files = repository.files(revision)
        if path not in files:
            raise HTTPException(404, headers={"X-Error-Code": "EntryNotFound"})
        commit_id = revision if len(revision) == 40 else repository.commit_id(revision)
        headers = {"X-Repo-Commit": commit_id, "ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"'}
        return Response(files[path], media_type="application/octet-stream", headers=headers)

    return app


@contextmanager
def serve() -> Iterator[HubDouble]:
    """A running server on a free port."""
    hub = HubDouble()
    server = uvicorn.Server(uvicorn.Config(build(hub), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join(timeout=10)
