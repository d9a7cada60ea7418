"""A GraphQL API with Strawberry, under FastAPI."""

import os
from asyncio import Lock
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import strawberry
from ctxalchemy import DBConnect, db_session, new_ctx, new_non_ctx_atomic_session, rollback_all_sessions
from ctxalchemy.fastapi import add_fastapi_http_db_session_middleware
from fastapi import FastAPI, Request
from graphql import OperationType
from sqlalchemy import ForeignKey, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from strawberry.dataloader import DataLoader
from strawberry.extensions import FieldExtension
from strawberry.extensions.field_extension import AsyncExtensionResolver
from strawberry.fastapi import GraphQLRouter
from strawberry.http import GraphQLHTTPResponse
from strawberry.types import ExecutionResult

db = DBConnect.from_url(os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///books.sqlite3"))
Info: TypeAlias = strawberry.Info[dict[str, Any], None]


class Base(DeclarativeBase): ...


class AuthorRow(Base):
    __tablename__ = "authors"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class BookRow(Base):
    __tablename__ = "books"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(AuthorRow.id))
    title: Mapped[str]


class Reads(FieldExtension):
    """Opens a context for each field of a query.  The fields of a mutation use the request's session in turn."""

    async def resolve_async(self, next_: AsyncExtensionResolver, source: Any, info: Info, **kwargs: Any) -> Any:
        if info.operation.operation is OperationType.MUTATION:
            async with info.context["lock"]:
                return await next_(source, info, **kwargs)
        async with new_ctx(read_only=True):
            return await next_(source, info, **kwargs)


def reads(resolver: Callable[..., Any]) -> Any:
    """Decorate each field that reads the database: fields next to each other are resolved at the same time."""
    return strawberry.field(resolver, extensions=[Reads()])


class Router(GraphQLRouter[dict[str, Any], None]):
    """Rolls back if the result has errors, because the status of the response is 200 even then."""

    async def process_result(self, request: Request, result: ExecutionResult) -> GraphQLHTTPResponse:
        if result.errors:
            await rollback_all_sessions()
        return await super().process_result(request, result)


@strawberry.type
class Book:
    id: int
    title: str


@strawberry.type
class Author:
    id: int
    name: str

    @reads
    async def books(self, info: Info) -> list[Book]:
        rows: list[BookRow] = await info.context["books"].load(self.id)
        return [Book(id=row.id, title=row.title) for row in rows]

    @reads
    async def longest_title(self) -> str | None:
        titles = select(BookRow.title).where(BookRow.author_id == self.id)
        return await (await db_session(db)).scalar(titles.order_by(func.length(BookRow.title).desc()).limit(1))


@strawberry.type
class Query:
    @reads
    async def authors(self) -> list[Author]:
        rows = await (await db_session(db)).scalars(select(AuthorRow).order_by(AuthorRow.id))
        return [Author(id=row.id, name=row.name) for row in rows]

    @reads
    async def books(self, containing: str = "") -> list[Book]:
        query = select(BookRow).where(BookRow.title.contains(containing, autoescape=True)).order_by(BookRow.id)
        rows = await (await db_session(db)).scalars(query)
        return [Book(id=row.id, title=row.title) for row in rows]


@strawberry.type
class Mutation:
    @strawberry.mutation
    async def add_author(self, name: str) -> Author:
        session = await db_session(db)
        row = AuthorRow(name=name)
        session.add(row)
        await session.flush()
        return Author(id=row.id, name=row.name)

    @strawberry.mutation
    async def add_book(self, author_id: int, title: str) -> Author:
        session = await db_session(db)
        author = await session.get_one(AuthorRow, author_id)
        session.add(BookRow(author_id=author.id, title=title))
        if not title:
            raise ValueError("a book must have a title")
        return Author(id=author.id, name=author.name)


async def load_books(author_ids: list[int]) -> list[list[BookRow]]:
    """Load the books of several authors with one statement."""
    rows = await (await db_session(db)).scalars(select(BookRow).where(BookRow.author_id.in_(author_ids)))
    books = defaultdict(list)
    for row in rows:
        books[row.author_id].append(row)
    return [books[author_id] for author_id in author_ids]


def graphql_context() -> dict[str, Any]:
    # Without a cache, a mutation never reads what was loaded before it.
    return {"lock": Lock(), "books": DataLoader(load_books, cache=False)}


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with new_non_ctx_atomic_session(db) as session:
        await (await session.connection()).run_sync(Base.metadata.create_all)
    yield
    await db.close()


app = FastAPI(lifespan=lifespan)
add_fastapi_http_db_session_middleware(app)
schema = strawberry.Schema(query=Query, mutation=Mutation)
app.include_router(Router(schema, context_getter=graphql_context), prefix="/graphql")
