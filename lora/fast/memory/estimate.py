"""What a step of one of transformers' models holds, estimated from the sizes in its config.json.

A rough stand-in for a trace: per token of a block its inputs, norms, attention and feed-forward.
"""

from __future__ import annotations

from lora.config import MAX_COUNT
from lora.fast.memory.plan import PlanInputs
from lora.fast.memory.trace import StepMemory
from lora.kernels.cross_entropy import CHUNK_TOKENS

BLOCK_VALUES = 40
"""Values that autograd keeps of each token and block, in widths of the model."""
LOSS_COPIES = 4
"""Of a chunk of logits in fp32."""


class StepEstimates:
    """Estimates in place of `lora.fast.memory.traces.StepTraces`.

    Args:
        inputs: of the plan.
        trainable: number of parameters that train.
    """

    def __init__(self, inputs: PlanInputs, trainable: int) -> None:
        self._inputs, self._trainable = inputs, trainable

    def trace(self, size: int, *, learns: bool = True) -> StepMemory:
        """Return what a step of `size` sequences holds; without `learns`, a validation pass."""
        inputs, config = self._inputs, self._inputs.config
        n_tokens, itemsize = size * inputs.tokens, inputs.compute_dtype.itemsize
        blocks = config.num_hidden_layers if learns else 1
        values = n_tokens * config.hidden_size * BLOCK_VALUES * blocks
        loss = LOSS_COPIES * 4 * min(n_tokens, CHUNK_TOKENS) * config.vocab_size
        return StepMemory(values * itemsize, loss, 4 * self._trainable if learns else 0)

    estimate = trace

    @property
    def largest_size(self) -> int:
        """The most sequences that were traced: any number, an estimate is as good as the next."""
        return MAX_COUNT
