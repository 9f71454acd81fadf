"""The page's server, which answers with the page, what Gradio needs for it, and clips of the bank by id. Nothing else.

Gradio has routes of its own for files, proxies and run histories. They are closed here, so that no address leads
to a file but that of a row of the bank, and the browser is told to load nothing from elsewhere. What requests name
as files is seen to in `gallery.uploads`.
"""

import mimetypes
import os
import socket
import tempfile
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from ditmem_jax.errors import UserError
from ditmem_jax.gallery import views
from ditmem_jax.gallery.gallery import Gallery
from ditmem_jax.gallery.uploads import JOIN, UPLOAD, Uploads

LOCAL = ("127.0.0.1", "localhost", "::1")
ANY = ("0.0.0.0", "::")
# Exact paths, or beginnings where they end in "/".
ROUTES = (
    "/", "/config", "/clip", "/theme.css", "/favicon.ico", "/assets/", "/static/", "/svelte/",
    "/gradio_api/startup-events", "/gradio_api/heartbeat/", JOIN, "/gradio_api/queue/data",
    UPLOAD, "/gradio_api/upload_progress", "/gradio_api/reset", "/gradio_api/cancel",
)  # fmt: skip
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}


class Gate:
    """Lets through what the page needs, and only from the page itself (an ASGI middleware).

    Args:
        hosts: names under which the server may be asked for, beside the address that a request came to. That keeps
            out other sites' names for this address (DNS rebinding).
    """

    def __init__(self, app: Any, hosts: Sequence[str]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        from starlette.responses import PlainTextResponse

        refusal = self._refusal(scope)
        app = PlainTextResponse(refusal, 403) if refusal else self.app

        async def guarded(message: dict) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", ()), *added]}
            await send(message)

        await app(scope, receive, guarded)

    def _refusal(self, scope: dict) -> str:
        """Why a request is refused, or ""."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:  # brackets without an address
            name = None
        if name not in (*self.hosts, scope["server"][0]):
            return "unknown host; a name of this server is made known by --host ADDRESS,NAME"
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            return "another site's request"
        path = scope["path"]
        inside = any(
            path == route or (route.endswith("/") and route != "/" and path.startswith(route))
            for route in ROUTES
        )
        return "" if inside and ".." not in path else "the bank's page has nothing here"


def application(gallery: Gallery, hosts: Sequence[str] = LOCAL) -> Any:
    """The page and the clips as an ASGI application; for `hosts` see `Gate`. GRADIO_TEMP_DIR names the folder for uploads."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise UserError("gradio is not installed", fix="pip install 'ditmem_jax[page]'") from error
    from fastapi import FastAPI
    from starlette.responses import FileResponse, PlainTextResponse

    from ditmem_jax.gallery.page import STYLE, blocks, theme

    app = FastAPI(openapi_url=None)

    @app.get("/clip")
    def clip(version: int, id: str) -> Any:
        try:
            path = gallery.clips.file(gallery.row(id, version))
        except UserError as error:
            return PlainTextResponse(views.without_folders(str(error)), 404)
        return FileResponse(path, media_type=mimetypes.guess_type(path.name)[0])

    app.add_middleware(Uploads)
    app.add_middleware(Gate, hosts=hosts)
    page = blocks(gallery)
    # Gradio checks the files that requests name on launched pages only, and this one is mounted.
    page.has_launched = True
    return gradio.mount_gradio_app(
        app, page, "/", footer_links=[], run_history=False, show_error=False, max_file_size="1gb",
        css=STYLE.read_text(encoding="utf-8"), theme=theme(), ssr_mode=False, mcp_server=False, enable_monitoring=False,
    )  # fmt: skip


def serve(gallery: Gallery, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serves the page until it is interrupted.

    Args:
        host: the address to answer at, and after commas further names under which browsers know it.
        port: 0 for any that is free.
    Raises:
        UserError: if the address cannot be had, or gradio is not installed.
    """
    host, *names = host.lower().split(",")
    names += [*LOCAL, socket.gethostname().lower() if host in ANY else host]
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot serve at {host}:{port}", found=error, fix="another --port or --host"
        ) from error
    with listener, tempfile.TemporaryDirectory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        app = application(gallery, names)
        import uvicorn

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                app.routes[-1].app.stop_event.set()  # ends the streams that tell Gradio which pages are open
                await super().shutdown(sockets)

        name = f"[{host}]" if ":" in host else host
        print(f"{gallery.about().uri}: http://{name}:{listener.getsockname()[1]}  (Ctrl-C ends)", flush=True)
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        Server(settings).run(sockets=[listener])
