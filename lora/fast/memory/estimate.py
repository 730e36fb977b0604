"""What a step of one of transformers' models holds, estimated from the sizes in its config.json.

A rough stand-in for a trace, for a model whose code needs values that a trace does not have: per
token of a block its inputs, norms, attention and feed-forward.
"""

from __future__ import annotations

from lora.fast.memory.plan import PlanInputs
from lora.fast.memory.trace import StepMemory
from lora.kernels.cross_entropy import CHUNK_TOKENS

BLOCK_VALUES = 40
"""Values that autograd keeps of each token and block, in widths of the model."""
LOSS_COPIES = 4
"""Of a chunk of logits in fp32."""


def estimate_step(inputs: PlanInputs, trainable: int, size: int, *, learns: bool) -> StepMemory:
    """Return what a step of `size` sequences holds; without `learns`, a validation pass.

    `trainable` is the number of parameters that train.
    """
    config, itemsize = inputs.config, inputs.compute_dtype.itemsize
    n_tokens, blocks = size * inputs.tokens, inputs.config.num_hidden_layers if learns else 1
    values = n_tokens * config.hidden_size * BLOCK_VALUES * blocks
    loss = LOSS_COPIES * 4 * min(n_tokens, CHUNK_TOKENS) * config.vocab_size
    return StepMemory(values * itemsize, loss, 4 * trainable if learns else 0)
