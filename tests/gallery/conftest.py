"""The page of a small bank, served by a thread."""

import socket
import threading

import pytest

from ditmem_jax.gallery import server
from ditmem_jax.gallery.gallery import Gallery
from tests.gallery.small import config, load_random, make_bank


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    return make_bank(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="package")
def gallery(folder):
    with pytest.MonkeyPatch.context() as patch:
        load_random(patch, folder)
        yield Gallery.open(
            str(folder / "bank"),
            videos=str(folder / "videos"),
            config=config(folder),
            cache=str(folder / "cache"),
        )


@pytest.fixture(scope="package")
def address(gallery, folder):
    """Host and port of the page, served by a thread."""
    import uvicorn

    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        serving = uvicorn.Server(
            uvicorn.Config(server.application(gallery), log_level="warning", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        serving.should_exit = True
        thread.join()
