"""A gRPC server with grpcio.  Its messages are JSON, so that the example needs no generated code."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from ctxalchemy import DBConnect, db_session, new_ctx, new_non_ctx_atomic_session, rollback_all_sessions
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///notes.sqlite3"))


class Base(DeclarativeBase): ...


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class NewContext(grpc.aio.ServerInterceptor):
    """Opens a context for each call.  It is rolled back if the method raises, aborts, or sets another code than OK."""

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # The server answers that the method does not exist.
            return None
        streaming = {False: "unary", True: "stream"}
        kind = f"{streaming[handler.request_streaming]}_{streaming[handler.response_streaming]}"
        method = getattr(handler, kind)  # For example handler.unary_stream.

        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            response = None
            async with new_ctx():
                if inspect.isasyncgenfunction(method):
                    async with aclosing(method(request, context)) as messages:
                        async for message in messages:
                            await context.write(message)
                else:
                    response = await method(request, context)
                if context.code() not in (None, grpc.StatusCode.OK):
                    await rollback_all_sessions()
            return response

        make_handler = getattr(grpc, f"{kind}_rpc_method_handler")
        return make_handler(call, handler.request_deserializer, handler.response_serializer)


async def add_note(request: dict[str, Any], context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, Any]:
    session = await db_session(db)
    note = Note(text=request["text"])
    session.add(note)
    await session.flush()
    if not note.text:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a note must have a text")
    return {"id": note.id}


async def list_notes(_request: Any, _context: Any) -> AsyncIterator[dict[str, Any]]:
    session = await db_session(db)
    async for text in await session.stream_scalars(select(Note.text).order_by(Note.id)):
        yield {"text": text}


def to_json(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode()


def create_server() -> grpc.aio.Server:
    server = grpc.aio.server(interceptors=[NewContext()])
    handlers = {
        "Add": grpc.unary_unary_rpc_method_handler(add_note, json.loads, to_json),
        "List": grpc.unary_stream_rpc_method_handler(list_notes, json.loads, to_json),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Notes", handlers)])
    return server


async def main(address: str = "localhost:50051") -> None:
    async with new_non_ctx_atomic_session(db) as session:
        await (await session.connection()).run_sync(Base.metadata.create_all)
    server = create_server()
    server.add_insecure_port(address)
    await server.start()
    try:
        await server.wait_for_termination()
    finally:
        await server.stop(grace=5)
        await db.close()


if __name__ == "__main__":
    asyncio.run(main())
