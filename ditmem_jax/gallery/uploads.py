"""Uploads by token: a request can name no file but one that its own browser has sent to this server.

Gradio answers an upload with the path of the file, and takes a path for a file in any request: without checks of its
own where a page is mounted rather than launched. Here the browser gets a token in place of the path, and every file
of a request is one of its tokens or the request is refused, wherever in the request it stands.
"""

import json
import os
import secrets
from functools import partial
from typing import Any

from ditmem_jax.errors import UserError

UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"
COOKIE = "bank-uploads"  # whose uploads: random, and kept by the browser until it is closed
LIMIT = 1 << 20  # bytes of a request that carries no upload


class Uploads:
    """Puts tokens for the paths of uploads, and paths for tokens (an ASGI middleware)."""

    def __init__(self, app: Any):
        self.app = app
        self._paths: dict[tuple[str, str], str] = {}  # by session and token

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        answers = {UPLOAD: self._upload, JOIN: self._join}
        await answers.get(scope.get("path", ""), self.app)(scope, receive, send)

    async def _upload(self, scope: dict, receive: Any, send: Any) -> None:
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        messages = []

        async def keep(message: dict) -> None:
            messages.append(message)

        await self.app(scope, receive, keep)
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
