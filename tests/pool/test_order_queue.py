"""The thread that carries out a donor's orders to copy outlives what goes wrong with them."""

from __future__ import annotations

import queue
from contextlib import nullcontext
from typing import NamedTuple

import pytest

from vcache.memory.host import HostMemory
from vcache.pool.order_queue import OrderQueue
from vcache.pool.runtime_dir import RuntimeDir


class Order(NamedTuple):
    generation: int


def test_where_a_broken_device_has_no_stream_to_give_later_orders_are_carried_out(runtime_dir, monkeypatch) -> None:
    done: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    asked: queue.SimpleQueue[object] = queue.SimpleQueue()

    def work(number: int, orders: list[Order]) -> tuple[Order, ...]:
        done.put([order.generation for order in orders])
        return ()

    def broken_once(memory: HostMemory) -> nullcontext[None]:
        is_first = asked.empty()
        asked.put(memory)
        if is_first:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return nullcontext()

    monkeypatch.setattr("vcache.pool.order_queue.aside", broken_once)
    memory = HostMemory.create(RuntimeDir(runtime_dir), bytes(16), 1 << 20)
    orders: OrderQueue[Order] = OrderQueue("demotion", memory, work)
    try:
        orders.put(1, [Order(2)])
        assert asked.get(timeout=60) is memory
        asked.put(memory)  # the first is over
        orders.put(1, [Order(4)])
        assert done.get(timeout=60) == [4], "what failed is the server's to order again"
        with pytest.raises(queue.Empty):
            done.get(block=False)
    finally:
        assert orders.close(60)
        memory.close()
