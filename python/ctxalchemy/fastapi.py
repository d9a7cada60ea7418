"""The middleware for FastAPI: the same class and the same functions as for Starlette."""

from __future__ import annotations

from .starlette import add_starlette_http_db_session_middleware, starlette_http_db_session_middleware

__all__ = ["add_fastapi_http_db_session_middleware", "fastapi_http_db_session_middleware"]

add_fastapi_http_db_session_middleware = add_starlette_http_db_session_middleware
fastapi_http_db_session_middleware = starlette_http_db_session_middleware
