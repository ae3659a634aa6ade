"""What image-text models share: image features in the places of their placeholders, and the loss.

N images, T tokens an image, B batch, L length, V vocabulary.
"""

from mindspore import nn, ops

from mindvlm.nn.loss import NextTokenLoss


class ImageTextModel(nn.Cell):
    """Base of a family's model; a subclass sets `language_model` (a `CausalLM`), and defines `encode_images` and
    `towers`, the Cells whose output no gradient leaves where `freeze_vision_tower` is set.

    Of the tower whose blocks a training may compute twice it says which one it is, `recomputed_tower` (with `embed`,
    `blocks` and `parameters_before_blocks`), and what follows them, `features_behind_blocks`: what `encode_images`
    gives, from the last block's output and the pixels.
    """

    def stop_at_frozen_parts(self) -> None:
        """Spares the gradients of the towers and of the head where nothing in them trains."""
        self.freeze_vision_tower = not any(map(trains, self.towers))
        head = self.language_model.lm_head
        if isinstance(head.token_loss, NextTokenLoss):
            head.token_loss.matrix_trains = trains(head)

    def embed(self, input_ids):
        """Token embeddings (B, L, hidden) of input_ids (B, L) int32."""
        return self.language_model.embed_tokens(input_ids)

    def merge(self, input_ids, image_features, sources):
        """Token embeddings with image features in their places.

        Args:
            input_ids: (B, L) int32.
            image_features: (N, T, hidden).
            sources: (B, L) int32 from `splice_sources`: the row of [token embeddings; image features] to take.

        Returns:
            (B, L, hidden).
        """
        embeds = self.embed(input_ids)
        hidden_size = embeds.shape[-1]
        rows = ops.concat((embeds.reshape((-1, hidden_size)), image_features.reshape((-1, hidden_size))), 0)
        return ops.gather(rows, sources.reshape((-1,)), 0).reshape(embeds.shape)

    def text_loss(self, embeds, labels, inv_freq):
        """Sum of the next-token losses and their number, float32 scalars.

        Args:
            embeds: (B, L, hidden), merged embeddings.
            labels: (B, L) int32, -100 to ignore.
            inv_freq: (D/2,) float32.
        """
        return self.language_model.lm_head.loss_sum(self.language_model(embeds, inv_freq), labels)


def freeze(cell: nn.Cell) -> None:
    """Takes a Cell's parameters out of training, weight decay included."""
    for parameter in cell.get_parameters():
        parameter.requires_grad = False


def trains(cell: nn.Cell) -> bool:
    """Whether any parameter of it does."""
    return any(parameter.requires_grad for parameter in cell.get_parameters())
