import pytest

from tests.training.tiny_run import write_inputs


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """Model and data shared by the tests of this package; each run gets a sub-folder of its own name."""
    pytest.importorskip("megatron.core")
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("tiny")
    write_inputs(path)
    return path
