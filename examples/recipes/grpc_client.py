"""A client of the gRPC server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc


def to_json(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode()


async def main(address: str = "localhost:50051") -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        print(await channel.unary_unary("/Notes/Add", to_json, json.loads)({"text": "hello"}))
        async for note in channel.unary_stream("/Notes/List", to_json, json.loads)({}):
            print(note)


if __name__ == "__main__":
    asyncio.run(main())
