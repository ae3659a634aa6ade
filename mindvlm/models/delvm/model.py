"""DeLVM: a VQGAN that turns pictures into codes, and a decoder that continues sequences of codes (arXiv 2402.04841).

N pictures, P codes of a picture, B batch, L length, E width of a code.
"""

from mindspore import Parameter, nn, ops

from mindvlm.core.runtime import EAGER_FLOAT32, BuildContext
from mindvlm.models.delvm.model_config import DelvmModelConfig
from mindvlm.models.delvm.vqgan import Vqgan
from mindvlm.nn.decoder import CausalLM, all_positions
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.nn.linear import Embedding, Linear
from mindvlm.nn.loss import IGNORED_LABEL
from mindvlm.nn.parameters import freeze


class CodeEmbedding(nn.Cell):
    """The row of each code in the VQGAN's codebook, through a projection. codes (...) int32 -> (..., hidden).

    Args:
        codebook: (V, E), of the VQGAN.
        hidden_size: width of the decoder.
    """

    def __init__(self, codebook: Embedding, hidden_size: int, dtype):
        super().__init__()
        self.projection = Linear(codebook.product.shape[1], hidden_size, has_bias=False, dtype=dtype)
        self.dtype = dtype
        # held in a tuple, so that its parameter belongs to the VQGAN alone
        self.codebook = (codebook,)

    def construct(self, codes):
        return self.projection(self.codebook[0](codes).astype(self.dtype))


class DelvmModel(ImageTextModel):
    """The VQGAN, which trains only without decoder and computes in float32, and the decoder over its codes.

    Args:
        config: sizes of the parts; an absent part is not built.
        context: dtype and attention of the decoder.
    """

    def __init__(self, config: DelvmModelConfig, context: BuildContext = EAGER_FLOAT32):
        super().__init__()
        self.config = config
        if config.vqgan:
            self.vqgan = Vqgan(config.vqgan)
            if config.language_model:
                freeze(self.vqgan)
        if config.language_model:
            self.language_model = CausalLM(config.language_model, context)
            if config.input_embedding == "codebook":
                hidden_size = config.language_model.hidden_size
                codebook = self.vqgan.quantize.embedding
                self.language_model.embed_tokens = CodeEmbedding(codebook, hidden_size, context.dtype)

    @property
    def towers(self) -> list[nn.Cell]:
        """The VQGAN."""
        return [self.vqgan] if self.config.vqgan else []

    def stop_at_frozen_parts(self) -> None:
        if self.config.language_model:
            super().stop_at_frozen_parts()

    @property
    def constant_parameters(self) -> list[Parameter]:
        """Those of the VQGAN beside a decoder, which trains on codes that the VQGAN has computed before."""
        return list(self.vqgan.get_parameters()) if self.config.vqgan and self.config.language_model else []

    def encode_images(self, pixels):
        """Returns the codes of pictures: pixels (N, 3, height, width) float32 in 0..1 -> (N, P) int32."""
        return self.vqgan.encode(pixels)

    def decode_images(self, codes):
        """Returns pixels (N, 3, height, width), float32 around 0..1, of codes (N, P) int32."""
        return self.vqgan.decode_codes(codes)

    def inputs(self, codes, labels, *segments):
        """Returns the inputs of the decoder (B, L, hidden), and the labels with a column before them (B, L + 1)."""
        return self.embed(codes), ops.concat((ops.full_like(labels[:, :1], IGNORED_LABEL), labels), 1)

    def shared_inputs(self, codes, inv_freq, positions=None, segment_ids=None):
        """Returns the inputs that all decoder layers share for a batch."""
        if positions is None:
            positions = all_positions(*codes.shape)
        return self.language_model.shared_inputs(positions, inv_freq, segment_ids)

    def construct(self, codes, labels, inv_freq, positions=None, segment_ids=None):
        """Returns the sum of the next-code losses and their number, float32 scalars.

        Args:
            codes: (B, L) int32.
            labels: (B, L) int32, the code after each position; -100 to ignore.
            inv_freq: (D/2,) float32.
            positions, segment_ids: (B, L) int32, see `CausalLM`; both None if each row is one segment.
        """
        embeds, labels = self.inputs(codes, labels)
        states = self.language_model(embeds, inv_freq, positions, segment_ids)
        return self.language_model.lm_head.loss_sum(states, labels)
