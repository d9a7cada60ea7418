"""Queue consumers and a command line, without a web framework.

python -m frameworks.worker add "a note" "another"
python -m frameworks.worker list
"""

from __future__ import annotations

import argparse
import asyncio
import logging

from ctxalchemy import new_ctx

from . import notes

logger = logging.getLogger(__name__)


async def consume(queue: asyncio.Queue[str]) -> None:
    """Add each note in its own context.  If one note fails, the others are still committed."""
    while True:
        text = await queue.get()
        try:
            async with new_ctx():
                await notes.add_note(text)
        except Exception:
            logger.exception("could not add %r", text)
        finally:
            queue.task_done()


async def add(texts: list[str]) -> None:
    """Add the notes with two consumers."""
    queue: asyncio.Queue[str] = asyncio.Queue()
    async with asyncio.TaskGroup() as group:
        consumers = [group.create_task(consume(queue)) for _ in range(2)]
        for text in texts:
            queue.put_nowait(text)
        await queue.join()
        for consumer in consumers:
            consumer.cancel()


async def show() -> None:
    """Print all notes."""
    async with new_ctx():
        print(*await notes.list_notes(), sep="\n")


async def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="worker")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("add").add_argument("texts", nargs="+")
    commands.add_parser("list")
    options = parser.parse_args(arguments)
    await notes.start()
    try:
        await (add(options.texts) if options.command == "add" else show())
    finally:
        await notes.stop()


if __name__ == "__main__":
    asyncio.run(main())
