"""The layers of a decoder as one operator on the C++ kernels, without gradients.

B batch, L new tokens.
"""

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn

from mindvlm.native.library import Library
from mindvlm.nn.config import DecoderConfig
from mindvlm.nn.linear import Linear, matrices
from mindvlm.nn.mlp import activation
from mindvlm.nn.native_layers import ACTIVATION_KERNELS
from mindvlm.nn.native_operator import first_shape, operator


class NativeLayers(nn.Cell):
    """Computes the layers of a `CausalLM`.

    With one operator for all layers, MindSpore compiles few nodes, and a decode step does not wait between them.

    Args:
        parts: the norms and Linears of all layers in the order of computation.
    """

    def __init__(self, library: Library, config: DecoderConfig, parts: Sequence[nn.Cell]):
        super().__init__(auto_prefix=False)
        self.run = operator(library, "MindvlmDecoder", first_shape)
        self.dialect = Tensor(np.array(dialect_of(config), np.int32))
        self.eps = Tensor(np.array([parts[0].eps], np.float32))
        parameters = [matrices((part,)) if isinstance(part, Linear) else part.get_parameters() for part in parts]
        self.parameters = tuple(parameter for found in parameters for parameter in found)

    def with_cache(self, x, caches, cos, sin, positions, rows, scale):
        """x (B, L, hidden) of new tokens -> (B, L, hidden); writes their keys and values to the caches.

        Args:
            caches: one `LayerKVCache` per layer.
            cos, sin, positions, rows, scale: see `CachedAttention.shared_inputs`.
        """
        cached = ()
        for cache in caches:
            cached = cached + (cache.key, cache.value)
        return self.run(x, cos, sin, positions, rows, scale, self.dialect, self.eps, *cached, *self.parameters)


def dialect_of(config: DecoderConfig) -> tuple[int, ...]:
    """Returns the numbers of `Dialect` in native/src/decoder.cpp."""
    is_gated = config.mlp == "gated"
    return (
        config.num_hidden_layers,
        config.residual == "parallel",
        config.norm == "layer_norm",
        config.qkv_bias,
        config.o_bias,
        is_gated,
        config.mlp_bias and not is_gated,
        ACTIVATION_KERNELS.index(activation(config.hidden_act).kernel),
    )
