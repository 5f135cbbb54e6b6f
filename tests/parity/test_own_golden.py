"""Results of our own code stay what they were, also where the published goldens are absent."""

import pytest
from safetensors.torch import load_file

from tests.parity.make_own_golden import CASES, FOLDER
from tests.tiny_models import TOLERANCE, relative_error


def test_every_file_is_checked_and_small() -> None:
    files = list(FOLDER.iterdir())
    assert {file.name for file in files} == {f"{case}.safetensors" for case in CASES}
    assert sum(file.stat().st_size for file in files) < 200_000


@pytest.mark.parametrize("case", CASES)
def test_results_are_as_before(case: str) -> None:
    expected, found = load_file(FOLDER / f"{case}.safetensors"), CASES[case]()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) <= TOLERANCE, name
