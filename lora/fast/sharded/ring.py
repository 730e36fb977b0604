"""The ring of a sharded step: two slots, in which units are gathered one ahead of the computation.

While unit u is computed with, unit u + 1 (in the backward pass u − 1) is gathered into the other
slot, on a stream of its own. A unit's slot is fixed, so that weights are views that never move: the
embedding is unit 0, block l unit l + 1, the head unit L + 1, and unit u lies in slot u % 2. What
still lies there is not gathered again: at the end of the forward pass the last two units.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora.distributed.world import World
from lora.fast.sharded.base import ShardedBase
from lora.fast.sharded.gather import Gather, choose_gather
from lora.fast.sharded.layout import ShardedMatrix, Source, Unit, place

N_SLOTS = 2
EMBEDDING = 0
"""The unit of the embedding."""


def block_unit(layer: int) -> int:
    """Return the unit of a block."""
    return layer + 1


class ShardRing:
    """Reserves matrices, then holds this process's shard of all and two slots.

    Args:
        base: among whom the weights are split.
        model: whose weights they are, for their names.
        choose: called with the processes, a shard's bytes and the device: returns how to gather.
    """

    def __init__(
        self,
        base: ShardedBase,
        model: nn.Module,
        choose: Callable[[World, int, torch.device], Gather] = choose_gather,
    ) -> None:
        self.base, self.device = base, base.device
        self._names = {module: name for name, module in model.named_modules()}
        self.gather: Gather | None = None
        self._choose = choose
        self.blocks: list[ShardedMatrix] = []
        """The matrices of a block; all blocks are alike."""
        self.tables: list[ShardedMatrix] = []
        """The embedding, and the head where it is not tied to it."""
        self.units: list[Unit] = []
        self.slots: list[Tensor] = []
        self.shard = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._expected: deque[tuple[int, int]] = deque()
        self._held: list[Unit | None] = [None] * N_SLOTS
        """Whose content lies in the slots, or is being gathered there."""
        self._arrivals: list[torch.cuda.Event | None] = [None] * N_SLOTS
        is_cuda = self.device.type == "cuda"
        # Of high priority: a gather that waits for a matmul's last wave is late for the next block.
        self.stream = torch.cuda.Stream(self.device, priority=-1) if is_cuda else None

    def name_of(self, module: nn.Module) -> str:
        """Return the full name of a module's weight."""
        return f"{self._names[module]}.weight"

    def reserve_block_matrix(
        self,
        outputs: int,
        inputs: int,
        dtype: torch.dtype,
        sources: Sequence[Sequence[Source]],
        *,
        extra: int = 0,
    ) -> ShardedMatrix:
        """Return a matrix that every block has; `sources` are by block."""
        split = self.base.split
        self.blocks.append(ShardedMatrix(split, outputs, inputs, extra, dtype, sources))
        return self.blocks[-1]

    def reserve_table(
        self, outputs: int, inputs: int, dtype: torch.dtype, name: str
    ) -> ShardedMatrix:
        """Return the embedding, or at the second call the head; tied, there is no second call."""
        source = [[(name, slice(0, outputs))]]
        self.tables.append(ShardedMatrix(self.base.split, outputs, inputs, 0, dtype, source))
        return self.tables[-1]

    def allocate(self) -> None:
        """Give every matrix its views; the shard is still to be filled."""
        n_blocks = len(self.blocks[0].sources)
        tables, start = [], 0
        for table in self.tables:
            tables.append(Unit(table.sources[0][0][0], (table,), 0, start))
            start += place((table,))[0]
        block_bytes, _ = place(self.blocks)
        blocks = [
            Unit(f"block {layer}", self.blocks, layer, start + layer * block_bytes)
            for layer in range(n_blocks)
        ]
        self.units = [tables[0], *blocks, tables[-1]]
        slot_bytes = max(unit.slot_bytes for unit in self.units)
        n_bytes = start + n_blocks * block_bytes
        if self.device.type == "meta":
            self.shard = torch.empty(n_bytes, dtype=torch.uint8, device=self.device)
        else:
            self.gather = self._choose(self.base.world, n_bytes, self.device)
            self.shard = self.gather.shard
        self.slots = [
            torch.empty(slot_bytes, dtype=torch.uint8, device=self.device) for _ in range(N_SLOTS)
        ]
        for number, unit in enumerate(self.units):
            for matrix in unit.matrices:
                # A tied head gets a view of its own: it may lie in the other slot.
                matrix.views.append(matrix.view_of(self._slot(number)))

    def part_of_block(self, layer: int) -> Tensor:
        """Return the bytes of a block in this process's shard."""
        return self._part_of(self.units[block_unit(layer)])

    def part_of_table(self, table: ShardedMatrix) -> Tensor:
        """Return the bytes of the embedding or of the head in this process's shard."""
        return self._part_of(next(u for u in self.units if u.matrices[0] is table))

    def _part_of(self, unit: Unit) -> Tensor:
        return self.shard[unit.shard_start : unit.shard_start + unit.shard_bytes]

    def connect(self) -> None:
        """Make the shards readable for each other, once this process's is filled."""
        if self.gather is not None:
            self.gather = self.gather.connect()

    def describe(self) -> str:
        """Return in words how the weights are sharded."""
        how = "" if self.gather is None else f", {self.gather.name} one block ahead"
        return f"frozen weights sharded over {self.base.split.size} processes{how}"

    @property
    def held_bytes(self) -> int:
        """Bytes of this process's shard and of the slots."""
        return self.shard.nbytes + sum(slot.nbytes for slot in self.slots)

    @property
    def head(self) -> int:
        """The unit of the output head."""
        return len(self.units) - 1

    def enter(self, number: int, then: int) -> None:
        """Before unit `number` is read: wait until it is there, and begin to gather `then`.

        All that was computed with the former unit has been queued.
        """
        if self.gather is None:
            return
        self._need(number)
        event = self._arrivals[number % N_SLOTS]
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        if then % N_SLOTS != number % N_SLOTS:
            self._need(then)
        # Last: what fails before is left for `catch_up`, which gathers nothing twice.
        if self._expected and self._expected[0] == (number, then):
            self._expected.popleft()

    def expect(self, n_passes: int, first_trained: int) -> None:
        """Before forward and backward passes: what they will enter, the same in all processes."""
        lowest = block_unit(first_trained)
        forward = [(number, number + 1) for number in range(self.head)]
        backward = [
            (number, number - 1 if number > lowest else EMBEDDING)
            for number in range(self.head - 1, lowest - 1, -1)
        ]
        one_pass = [*forward, (self.head, self.head - 1), *backward]
        self._expected = deque(one_pass * n_passes)

    def catch_up(self) -> None:
        """After passes that failed in this process: gather what the others gather in theirs."""
        expected, self._expected = self._expected, deque()
        if self.gather is not None and self.gather.is_collective:
            for number, then in expected:
                self.enter(number, then)

    def wait(self) -> None:
        """Wait, on the device, for all gathers that have begun."""
        for event in self._arrivals:
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)

    def refresh(self) -> None:
        """After an optimizer step and `wait`: bring the adapters in the slots up to date."""
        for unit, slot in zip(self._held, self.slots, strict=True):
            if unit is not None:
                self._add_adapters(unit, slot)

    def _need(self, number: int) -> None:
        unit, slot = self.units[number], number % N_SLOTS
        held = self._held[slot]
        if held is not None and held.name == unit.name:
            return
        self._held[slot] = None  # a gather that fails leaves nothing whole behind
        if self.stream is None:
            self._fill(unit, self.slots[slot])
        else:
            # The slot's last readers and the newest adapters are queued on the current stream.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self._fill(unit, self.slots[slot])
            self._arrivals[slot] = self.stream.record_event()
        self._held[slot] = unit

    def _fill(self, unit: Unit, slot: Tensor) -> None:
        assert self.gather is not None
        self.gather.gather(unit.spans(), slot, f"the weights of {unit.name}")
        self._add_adapters(unit, slot)

    def _add_adapters(self, unit: Unit, slot: Tensor) -> None:
        for matrix in unit.matrices:
            if matrix.add_adapters is not None:
                matrix.add_adapters(unit.index, matrix.view_of(slot))

    def _slot(self, number: int) -> Tensor:
        return self.slots[number % N_SLOTS]
