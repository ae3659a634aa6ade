"""SliME: a CLIP tower, a gated adapter for the global view, a compression and a router for local crops, and a decoder
(arXiv 2406.08487).

N pictures, V views of a picture, C crops of a view, T tokens of a view, Q tokens of a crop, W width of the tower, R
rows of a picture, B sequences, L length, P pictures of a sequence.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindvlm.core.interruption import uninterrupted
from mindvlm.core.runtime import EAGER_FLOAT32, BuildContext
from mindvlm.models.slime.adapter import ADAPTERS, QueryResampler
from mindvlm.models.slime.model_config import SlimeModelConfig
from mindvlm.models.slime.router import (
    kept_first,
    kept_mask,
    kept_rows,
    router_scores,
    scores_on_host,
    text_direction,
)
from mindvlm.nn.decoder import CausalLM
from mindvlm.nn.dropout import RowNoise, new_counter
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.nn.parameters import freeze
from mindvlm.nn.rows import concatenated, rows_at, works_on_host
from mindvlm.nn.splice import ANSWERED, PROMPT
from mindvlm.nn.vit import VisionTransformer

# tokens of text that are embedded together outside of graphs; always so many, so that one graph is enough
TEXT_UNIT = 64


class SlimeModel(ImageTextModel):
    """The tower, which does not train, the adapters and the decoder.

    The tower's input decides the path: a global view goes through the adapter, a bucket of crops through the local
    compression. The router chooses outside of graphs when asking, and within the graph in training.

    Args:
        config: sizes of the parts, and the use of the views.
        context: dtype and attention.
    """

    def __init__(self, config: SlimeModelConfig, context: BuildContext = EAGER_FLOAT32):
        super().__init__()
        self.config = config
        width, num_tokens = config.vision_tower.hidden_size, config.num_global_tokens
        self.language_model = CausalLM(config.language_model, context)
        self.vision_tower = VisionTransformer(
            config.vision_tower, context, select_layer=config.vision_select_layer, num_dropped_tokens=1
        )
        counter = new_counter()
        noise = RowNoise(index=0, counter=counter) if config.gate_noise else None
        adapter = ADAPTERS[config.gate]
        self.mm_projector = adapter(width, config.language_model.hidden_size, num_tokens, context, noise)
        self.sampler = QueryResampler(width, config.num_local_tokens, num_tokens, context)
        self.noise = RowNoise(index=1, counter=counter) if config.router.noise else None
        self.separator = Tensor([config.separator_id], ms.int32)
        self.freeze_vision_tower = True
        freeze(self.vision_tower)

    @property
    def rows_depend_on_text(self) -> bool:
        """Whether there are local rows, among which the router chooses."""
        return self.config.use != "global"

    @property
    def takes_choices(self) -> bool:
        """Whether there are local rows, among which the router chooses."""
        return self.rows_depend_on_text

    @property
    def towers(self) -> list[nn.Cell]:
        """The vision tower."""
        return [self.vision_tower]

    @property
    def unused_parameters(self) -> list[Parameter]:
        """As in the base class, with the parts of the adapters that the gate and the use of the views leave out."""
        adapter, parts = self.mm_projector, []
        uses_global = self.config.use != "local"
        if not uses_global or self.config.gate == "mlp":
            parts += [adapter.attn]
        if not self.rows_depend_on_text:
            parts += [self.sampler]
        unused = [adapter.w_noise, *(one for part in parts for one in part.get_parameters())]
        if not uses_global or self.config.gate != "learned":
            unused += [adapter.w_gate]
        return [*super().unused_parameters, *unused]

    @property
    def constant_parameters(self) -> list[Parameter]:
        """The positions of both resamplers, and the tower, which passes no gradient."""
        return [self.mm_projector.attn.pos_embed, self.sampler.pos_embed, *self.vision_tower.get_parameters()]

    def tower_features(self, pixels):
        """Returns the features of the tower: pixels (N, 3, height, width) -> (N, T, W)."""
        return ops.stop_gradient(self.vision_tower(pixels))

    def encode_images(self, *pixels):
        """Returns feature rows of views as decoder inputs, (N, T, hidden); those of several arrays follow each other.

        Args:
            pixels: see `encode_views`.
        """
        if len(pixels) == 1:
            return self.encode_views(pixels[0])
        return ops.concat((self.encode_views(pixels[0]), self.encode_views(pixels[1])), 0)

    def encode_views(self, pixels):
        """Returns feature rows of views of one kind, (N, T, hidden).

        Args:
            pixels: (N, 3, height, width), global views, or (N, C, 3, height, width), buckets of crops. The rows of a
                bucket are the C * Q rows of its crops, then zeros.
        """
        if pixels.ndim == 4:
            return self.mm_projector(self.tower_features(pixels))
        num_views, num_crops = pixels.shape[:2]
        rows = self.encode_crops(pixels.reshape((num_views * num_crops,) + pixels.shape[2:]))
        rows = rows.reshape((num_views, -1, rows.shape[-1]))
        missing = self.config.num_global_tokens - rows.shape[1]
        if missing == 0:
            return rows
        return ops.concat((rows, ops.zeros((num_views, missing, rows.shape[-1]), rows.dtype)), 1)

    def encode_crops(self, pixels):
        """Returns the compressed features of crops: pixels (N, 3, height, width) -> (N, Q, hidden)."""
        return self.mm_projector.projection(self.sampler(self.tower_features(pixels)))

    def insert(self, input_ids, labels, image_features, sources, choices=None):
        """Returns the inputs of the decoder, (B, L, hidden), and their labels.

        The rows that the router leaves out move behind the padding, so that causal attention never sees them. Then the
        sequence is cut to the context.

        Args:
            input_ids, labels, sources: (B, L) int32, see `SampleBatch`.
            image_features: (..., hidden), of all views.
            choices: (B, 1 + P, L) int32, see `SampleBatch`; None if all rows are kept.
        """
        embeds = self.embed(input_ids)
        hidden_size = embeds.shape[-1]
        separator = self.last_row().astype(image_features.dtype)
        rows = (embeds.reshape((-1, hidden_size)), image_features.reshape((-1, hidden_size)), separator)
        rows = ops.concat(rows, 0)
        if choices is not None:
            order = self.routed(ops.stop_gradient(rows), sources, choices)
            sources, labels = ops.gather_elements(sources, 1, order), ops.gather_elements(labels, 1, order)
        length = self.config.max_length
        if sources.shape[1] > length:
            sources, labels = sources[:, :length], labels[:, :length]
        return ops.gather(rows, sources.reshape((-1,)), 0).reshape(sources.shape + (hidden_size,)), labels

    def routed(self, rows, sources, choices):
        """Returns the order of a sequence with the rows that are left out at its end, (B, L) int32.

        Args:
            rows: (..., hidden), without gradient; sources and choices as of `insert`.
        """
        embeds = ops.gather(rows, sources.reshape((-1,)), 0).reshape(sources.shape + (rows.shape[-1],))
        text = choices[:, 0]
        mask = text == PROMPT
        if self.config.router.sees_answers:
            mask = ops.logical_or(mask, text == ANSWERED)
        scores = router_scores(embeds, text_direction(embeds, mask.astype(ms.float32)))
        if self.training and self.noise is not None:
            scores = scores + self.config.router.noise * self.noise(*scores.shape)
        members = choices[:, 1:] > 0
        kept = kept_mask(scores, members, self.config.router)
        num_dropped = members.astype(ms.float32).sum(1) - kept.astype(ms.float32).sum(1)
        return kept_first(num_dropped > 0)

    def last_row(self):
        """Returns the row of the separator, (1, hidden)."""
        return self.embed(self.separator)

    def picture_rows(self, features, layout, context):
        """Returns the global rows, the separator and the local rows that the router keeps for the text in `context`."""
        rows = super().picture_rows(features, layout, context)
        return rows_at(rows, self.kept_rows(rows, context))

    def kept_placeholders(self, features, layout, context):
        return self.kept_rows(super().picture_rows(features, layout, context), context)

    def kept_rows(self, rows, context):
        """Returns the indices of the rows (R, hidden) of a picture that the router keeps, int32."""
        num_fixed = self.num_fixed_rows
        if len(rows) <= num_fixed:
            return np.arange(len(rows), dtype=np.int32)
        scores = self.from_first_rank(self.scores(rows[num_fixed:], context))
        kept = kept_rows(scores, self.config.router)
        return np.concatenate((np.arange(num_fixed), num_fixed + kept)).astype(np.int32)

    @property
    def num_fixed_rows(self) -> int:
        """Number of rows of a picture that the router does not see: the global ones and the separator."""
        return {"both": self.config.num_global_tokens + 1, "global": self.config.num_global_tokens, "local": 0}[
            self.config.use
        ]

    def scores(self, rows, context):
        """Returns the router's scores of local rows (R, hidden) for the ids of a text, a float32 array (R,).

        Runs outside of graphs. It may compile the graph of `embed_text`.
        """
        embeds = self.embed_text(context)
        if works_on_host():
            return scores_on_host(rows.asnumpy(), embeds.asnumpy()[: len(context)])
        mask = Tensor((np.arange(len(embeds)) < len(context)).astype(np.float32))
        return router_scores(rows, text_direction(embeds, mask)).asnumpy()

    def embed_text(self, ids):
        """Returns the embeddings of ids, then those of padding up to a multiple of `TEXT_UNIT`, (L, hidden).

        Runs outside of graphs. It may compile one.
        """
        padded = np.zeros((-(-max(len(ids), 1) // TEXT_UNIT), TEXT_UNIT), np.int32)
        padded.flat[: len(ids)] = ids
        with uninterrupted():
            return concatenated(self.embed(Tensor(unit)) for unit in padded)
