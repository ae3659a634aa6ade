"""Base of image-text models: insertion of image features at their placeholders, and the loss.

N views, T tokens per view, B batch, L length, V vocabulary.
"""

import numpy as np
from mindspore import Parameter, nn, ops

from mindvlm.core.interruption import uninterrupted
from mindvlm.nn.decoder import all_positions
from mindvlm.nn.loss import NextTokenLoss
from mindvlm.nn.parameters import trains
from mindvlm.nn.rows import concatenated, rows_at


class ImageTextModel(nn.Cell):
    """Base class of a family's model.

    A subclass sets `language_model` (a `CausalLM`) and defines `encode_images` and `towers`, the Cells that pass no
    gradient if `freeze_vision_tower` is set. The inputs of training are (input_ids, labels, inv_freq, *pixels,
    sources), see `SampleBatch`; a family that leaves out rows overrides `insert` and takes `choices` behind `sources`
    (`takes_choices`). A tower may have `unused_parameters`. For training a tower with recomputation, the subclass also
    defines `recomputed_tower` (with `embed`, `blocks` and `parameters_before_blocks`), `recomputed_pixels`, the index
    of this tower's pixels among the arguments of `encode_images`, and `features_behind_blocks`, which computes the
    result of `encode_images` from the output of the last block and the pixels. `freezing_keys` are the keys of its
    config that freeze parameters. `rows_depend_on_text` says whether `picture_rows` depends on the prompt.

    Attributes:
        from_first_rank: returns an array as the first of the tensor-parallel ranks has it, so that all ranks choose
            alike; without other ranks the array itself.
    """

    rows_depend_on_text: bool = False
    takes_choices: bool = False
    recomputed_pixels: int = 0
    freezing_keys: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.from_first_rank = np.asarray

    @property
    def unused_parameters(self) -> list[Parameter]:
        """The parameters that no output depends on, such as those of a tower's layers after the selected one."""
        towers = (tower for tower in self.towers if hasattr(tower, "unused_parameters"))
        return [parameter for tower in towers for parameter in tower.unused_parameters()]

    @property
    def constant_parameters(self) -> list[Parameter]:
        """The parameters that never train although outputs depend on them, such as fixed positions."""
        return []

    def stop_at_frozen_parts(self) -> None:
        """Skips the gradients of the towers and of the head's matrix if they are frozen."""
        self.freeze_vision_tower = not any(map(trains, self.towers))
        head = self.language_model.lm_head
        if isinstance(head.token_loss, NextTokenLoss):
            head.token_loss.matrix_trains = trains(head)

    def last_row(self):
        """Returns the row that follows those of all views, (1, hidden); None without one, as in the base class.

        Runs inside and outside of graphs.
        """
        return None

    def picture_rows(self, features, layout, context):
        """Returns the feature rows of a picture in the order of its placeholders, (R, hidden).

        Runs outside of graphs. A family whose rows depend on the prompt overrides it and `rows_depend_on_text`.

        Args:
            features: (V, T, hidden), features of the picture's views.
            layout: (R,) int32 array, index into the rows of all views for each placeholder; -1 is `last_row`.
            context: ids of the prompt without placeholders.
        """
        rows = features.reshape((-1, features.shape[-1]))
        if (layout < 0).any():
            with uninterrupted():
                last = self.last_row()
            rows = concatenated((rows, last.astype(rows.dtype, copy=False)))
        return rows_at(rows, np.where(layout < 0, len(rows) - 1, layout).astype(np.int32))

    def kept_placeholders(self, features, layout, context):
        """Returns the indices of the placeholders whose rows the model keeps, ascending, int32.

        Arguments are those of `picture_rows`.
        """
        return np.arange(len(layout), dtype=np.int32)

    def embed(self, input_ids):
        """Returns the token embeddings (B, L, hidden) of input_ids (B, L) int32."""
        return self.language_model.embed_tokens(input_ids)

    def merge(self, input_ids, image_features, sources):
        """Returns token embeddings with image features in place of placeholders.

        Args:
            input_ids: (B, L) int32.
            image_features: (..., hidden).
            sources: (B, L) int32, row indices into [token embeddings; image features].

        Returns:
            (B, L, hidden).
        """
        embeds = self.embed(input_ids)
        hidden_size = embeds.shape[-1]
        rows = ops.concat((embeds.reshape((-1, hidden_size)), image_features.reshape((-1, hidden_size))), 0)
        return ops.gather(rows, sources.reshape((-1,)), 0).reshape(embeds.shape)

    def insert(self, input_ids, labels, image_features, sources):
        """Returns the inputs of the decoder, (B, L, hidden), and their labels, for the features of all views."""
        rows, last = image_features.reshape((-1, image_features.shape[-1])), self.last_row()
        if last is not None:
            rows = ops.concat((rows, last), 0)
        return self.merge(input_ids, rows, sources), labels

    def inputs(self, input_ids, labels, *images):
        """Returns the result of `insert` for a batch; images are (*pixels, sources[, choices])."""
        num_pixels = len(images) - 1 - int(self.takes_choices)
        return self.insert(input_ids, labels, self.encode_images(*images[:num_pixels]), *images[num_pixels:])

    def construct(self, input_ids, labels, inv_freq, *images):
        """Returns the sum and the number of next-token losses of a batch; see `inputs` and `text_loss`."""
        embeds, labels = self.inputs(input_ids, labels, *images)
        return self.text_loss(embeds, labels, inv_freq)

    def shared_inputs(self, input_ids, inv_freq, *images):
        """Returns the inputs that all decoder layers share for a batch; images are those of `inputs`."""
        return self.language_model.shared_inputs(all_positions(*input_ids.shape), inv_freq)

    def text_loss(self, embeds, labels, inv_freq):
        """Returns the sum of the next-token losses and their number, float32 scalars.

        Args:
            embeds: (B, L, hidden), merged embeddings.
            labels: (B, L) int32, -100 to ignore.
            inv_freq: (D/2,) float32.
        """
        return self.language_model.lm_head.loss_sum(self.language_model(embeds, inv_freq), labels)
