"""Remove details of the machine and the checkout from the results of pytest-benchmark."""

from __future__ import annotations

from typing import Any

from .measure import environment


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(environment([]))


def pytest_benchmark_update_json(config: object, benchmarks: object, output_json: dict[str, Any]) -> None:
    output_json["commit_info"] = {key: output_json["commit_info"].get(key) for key in ("id", "dirty")}
