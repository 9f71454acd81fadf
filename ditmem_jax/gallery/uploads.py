"""Uploads by token: a request can name no file but one that its own browser has sent to this server.

Gradio answers an upload with the path of the file, and takes a path for a file in any request: without checks of its
own where a page is mounted rather than launched. Here the browser gets a token in place of the path, and every file
of a request is one of its tokens or the request is refused, wherever in the request it stands.

All uploads together take `VOLUME` of the disk at most, whole and broken off ones, and none is kept for longer than an
hour.
"""

import contextlib
import json
import os
import secrets
import time
from functools import partial
from pathlib import Path
from typing import Any

from ditmem_jax.errors import UserError

UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"
COOKIE = "bank-uploads"  # whose uploads: random, and kept by the browser until it is closed
LIMIT = 1 << 20  # bytes of a request that carries no upload
VOLUME = 2 << 30  # bytes of all uploads together
LEAST = 2 << 20  # bytes that a small one counts as, so that there are not very many
KEPT = 3600  # seconds


class Uploads:
    """Puts tokens for the paths of uploads, and paths for tokens (an ASGI middleware)."""

    def __init__(self, app: Any):
        self.app = app
        self._paths: dict[tuple[str, str], str] = {}  # by session and token
        self._held = self._coming = (
            0  # bytes: on the disk, and of uploads under way, which may not be on it yet
        )

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        answers = {UPLOAD: self._upload, JOIN: self._join}
        await answers.get(scope.get("path", ""), self.app)(scope, receive, send)

    async def _upload(self, scope: dict, receive: Any, send: Any) -> None:
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse

        messages, refused, received = [], False, 0

        async def keep(message: dict) -> None:
            messages.append(message)

        async def counted() -> dict:
            nonlocal refused, received
            message = await receive()
            received += len(message.get("body", b""))
            self._coming += len(message.get("body", b""))
            refused = refused or self._held + self._coming > VOLUME
            return {"type": "http.disconnect"} if refused else message

        self._look()
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        refused = self._held + (int(declared) if declared.isdigit() else 0) > VOLUME
        if not refused:
            try:
                await self.app(scope, counted, keep)
            except ClientDisconnect:
                pass
            finally:
                self._coming -= received
                self._look()
        if refused:
            told = "there is no room for this upload now; uploads are kept for an hour"
            return await JSONResponse({"detail": told}, 413)(scope, receive, send)
        if not messages:  # the browser went away
            return
        if messages[0]["status"] != 200:
            for message in messages:
                await send(message)
            return
        session = Request(scope).cookies.get(COOKIE) or secrets.token_urlsafe()
        paths = json.loads(b"".join(message.get("body", b"") for message in messages))
        tokens = {secrets.token_urlsafe(): path for path in paths}
        self._paths |= {(session, token): path for token, path in tokens.items()}
        response = JSONResponse(list(tokens))
        response.set_cookie(COOKIE, session, httponly=True, samesite="strict")
        await response(scope, receive, send)

    def _look(self) -> None:
        """Counts what is on the disk, and takes away what is older than an hour."""
        self._held = 0
        folder, now = Path(os.environ["GRADIO_TEMP_DIR"]), time.time()
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                if now - path.stat().st_mtime > KEPT:
                    path.unlink()
                else:
                    self._held += max(path.stat().st_size, LEAST)
        self._paths = {key: path for key, path in self._paths.items() if os.path.isfile(path)}

    async def _join(self, scope: dict, receive: Any, send: Any) -> None:
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        request, body = Request(scope, receive), bytearray()
        async for part in request.stream():
            body += part
            if len(body) > LIMIT:
                return await JSONResponse({"detail": "this request is too long"}, 413)(scope, receive, send)
        try:
            parsed = json.loads(body, object_hook=partial(self._file, request.cookies.get(COOKIE, "")))
            body = json.dumps(parsed).encode()
        except UserError as error:
            return await JSONResponse({"detail": str(error)}, 403)(scope, receive, send)
        except (ValueError, RecursionError):
            return await JSONResponse({"detail": "this request is no JSON"}, 400)(scope, receive, send)
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))

        async def rewritten() -> dict:
            nonlocal body
            part, body = body, b""
            return {"type": "http.request", "body": part} if part else await receive()

        await self.app(scope | {"headers": headers}, rewritten, send)

    def _file(self, session: str, value: dict) -> dict:
        """The value, or where it names a file, that of an upload and nothing else that was said of it.

        Raises:
            UserError: if it names anything but a token of the session.
        """
        if "path" not in value:
            return value
        path = self._paths.get((session, str(value["path"])))
        if path is None or not os.path.isfile(path):
            raise UserError("this file is no upload of this session", fix="upload it again")
        return {"path": path, "meta": {"_type": "gradio.FileData"}}
