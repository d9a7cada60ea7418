"""Serve the example service until it is stopped: ``python examples/serve.py``."""

from __future__ import annotations

import os

import uvicorn
from shop.api import app


def main() -> None:
    host, port = os.environ.get("HOST", "127.0.0.1"), int(os.environ.get("PORT", "8000"))
    print(f"The shop's endpoints are listed at http://{host}:{port}/", flush=True)
    uvicorn.run(app, host=host, port=port)


if __name__ == "__main__":
    main()
