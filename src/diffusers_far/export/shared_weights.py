"""SharedWeights: a file of tensors that several ONNX graphs read, each tensor written once."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any

SHARED_BYTES = 1024  # smaller tensors stay in their graph
ALIGNMENT = 64


class SharedWeights:
    """Writes the tensors of graphs to one file (external data of ONNX), and equal ones once.

    Args:
        path: to write, in the folder of the graphs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}  # of tensors by the hash of their bytes

    def __enter__(self) -> "SharedWeights":
        self._file = open(self.path, "wb")  # closed in __exit__
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def take(self, proto: Any) -> None:
        """Move the large tensors of an `onnx.ModelProto` to the file."""
        from onnx.external_data_helper import set_external_data

        for tensor in proto.graph.initializer:
            data = tensor.raw_data
            if len(data) < SHARED_BYTES:
                continue
            key = hashlib.sha256(data).digest()
            if key not in self._places:
                self._file.write(bytes(-self._file.tell() % ALIGNMENT))
                self._places[key] = self._file.tell()
                self._file.write(data)
            set_external_data(tensor, self.path.name, offset=self._places[key], length=len(data))
            tensor.ClearField("raw_data")
