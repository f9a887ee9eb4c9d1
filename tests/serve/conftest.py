"""One server process and one in-process application, shared by the tests."""

import pytest

from tests.serve import fixtures
from vila.model.loading import save_model
from vila.serve.app import create_app


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    save_model(*fixtures.model(), folder)
    return folder


@pytest.fixture(scope="session")
def server(model_folder):
    with fixtures.Process(model_folder, "--dtype", "float32", "--allow-private-urls", "--max-queue", "16") as process:
        process.await_ready()
        yield process


@pytest.fixture(scope="session")
def service():
    service = fixtures.ready()
    yield service
    service.models.close()


@pytest.fixture(scope="session")
def app(service):
    return create_app(service)
