"""Quart: ``uvicorn frameworks.with_quart:app``."""

from __future__ import annotations

from ctxalchemy import ASGIHTTPDBSessionMiddleware
from quart import Quart, ResponseReturnValue, abort, jsonify, request

from . import notes

app = Quart(__name__)
app.before_serving(notes.start)
app.after_serving(notes.stop)


@app.post("/notes")
async def add_note() -> ResponseReturnValue:
    try:
        return jsonify(await notes.add_note(request.args["text"])), 201
    except ValueError as error:
        abort(400, str(error))


@app.get("/notes")
async def list_notes() -> ResponseReturnValue:
    return jsonify(await notes.list_notes())


# In Quart, ASGI middleware replaces app.asgi_app, whose type is a method.
app.asgi_app = ASGIHTTPDBSessionMiddleware(app.asgi_app)  # type: ignore[method-assign]
