"""Gradients of a step that keeps only the inputs of blocks and recomputes the blocks (arXiv 1604.06174).

`Cell.recompute` does not save memory on the CPU backend of MindSpore 2.10, because the inputs of every Cell with its
own `bprop` are kept. This module therefore writes out the backward pass.
"""

from collections.abc import Iterable, Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from mindvlm.nn.decoder import CausalLM, all_positions
from mindvlm.nn.image_text import ImageTextModel
from mindvlm.training.loss import LossScale, MeanLoss, ScaledLoss, mean_loss

BATCH, NOTHING, SHARED = 0, 1, 2
"""Further inputs of a Cell besides the states: the batch, nothing, or the inputs that all decoder layers share."""


class PassGradients(nn.Cell):
    """batch -> sum of the losses, number of labels, gradients of the sum (times the loss scale).

    Args:
        averages: returns the mean and 1 instead of sum and number.
    """

    def __init__(
        self,
        model: nn.Cell,
        parameters: list[Parameter],
        scale: LossScale | None,
        counter: Parameter | None,
        *,
        recompute: bool,
        averages: bool,
    ):
        super().__init__(auto_prefix=False)
        self.is_scaled = scale is not None
        if self.is_scaled:
            self.scale = scale.value
        self.counts = counter is not None
        if self.counts:
            self.num_passes = counter
        if recompute:
            self.compute = RecomputedGradients(model, parameters, is_scaled=self.is_scaled, averages=averages)
        else:
            mean = MeanLoss(model) if averages else model
            function = ScaledLoss(mean) if self.is_scaled else mean
            self.compute = ops.value_and_grad(function, None, ms.ParameterTuple(parameters), has_aux=True)

    def construct(self, *batch):
        if self.is_scaled:
            (_, loss, num_labels), gradients = self.compute(self.scale, *batch)
        else:
            (loss, num_labels), gradients = self.compute(*batch)
        if self.counts:
            one = ops.depend(Tensor(1, ms.int32), (loss, gradients))
            loss = ops.depend(loss, ops.assign_add(self.num_passes, one))
        return loss, num_labels, gradients


class RecomputedGradients(nn.Cell):
    """batch -> (sum of the losses, number of labels), gradients; equal to `value_and_grad` of the model.

    The blocks are the decoder's layers and, if a tower trains, those of the model's `recomputed_tower`. Everything
    before the first block runs once.

    Args:
        model: takes (input_ids, labels, inv_freq, *pixels, sources[, choices]).
        parameters: the parameters to differentiate; the gradients have this order.
        averages: returns the mean of the losses and 1.
        is_scaled: takes (scale, *batch), returns (loss * scale, loss, number of labels) and the gradients of the first.
    """

    def __init__(
        self, model: ImageTextModel, parameters: Sequence[Parameter], *, is_scaled: bool, averages: bool = False
    ):
        super().__init__(auto_prefix=False)
        decoder = model.language_model
        self.model = model
        self.is_scaled = is_scaled
        cells, kinds, start = list(decoder.layers), [SHARED] * len(decoder.layers), []
        if model.freeze_vision_tower:
            self.start = Embeds(model)
        else:
            tower = model.recomputed_tower
            self.start = TowerStart(tower, model.recomputed_pixels)
            front = set(map(id, tower.parameters_before_blocks()))
            start = [parameter for parameter in parameters if id(parameter) in front]
            blocks = list(tower.blocks)
            cells = [*blocks, EmbedsBehindBlocks(model), *cells]
            kinds = [NOTHING] * len(blocks) + [BATCH, *kinds]
        self.chain = nn.CellList(cells, auto_prefix=False)
        self.kinds = tuple(kinds)

        # the start then is the whole way to the decoder, which may move labels
        self.starts_decoder = model.freeze_vision_tower
        self.loss = Loss(decoder, is_scaled=is_scaled, averages=averages)
        ends = trained((decoder.norm, decoder.lm_head), parameters)
        own = [trained((cell,), parameters) if kind != BATCH else [] for cell, kind in zip(cells, kinds, strict=True)]
        table = set(map(id, decoder.embed_tokens.get_parameters()))
        placed = {id(one) for group in (ends, start, *own) for one in group} - table
        rest = [one for one in parameters if id(one) not in placed]
        if model.freeze_vision_tower:
            start = rest
        else:
            own[kinds.index(BATCH)] = rest
        # index of each parameter's gradient among all; the table of a tied head has a second one
        order = [one for group in (start, *own, ends) for one in group]
        found = [[i for i, one in enumerate(order) if one is wanted] for wanted in parameters]
        self.places = tuple(places[0] for places in found)
        self.second_places = tuple(places[1] if len(places) > 1 else -1 for places in found)
        # a loop over all parameters would exceed the compiler's recursion limit
        self.for_all = ops.HyperMap()

        self.has_start, self.has_ends = bool(start), bool(ends)
        self.num_weights = tuple(len(group) for group in own)
        # gradients flow back to the first Cell of the chain that has trained parameters
        self.first = 0 if start else next((i for i, group in enumerate(own) if group), len(cells))
        self.start_weights = ms.ParameterTuple(start)
        self.chain_weights = [ms.ParameterTuple(group) for group in own]
        self.of_loss = ops.value_and_grad(self.loss, 0, ms.ParameterTuple(ends) if ends else None, has_aux=True)
        self.of_weights = ops.GradOperation(get_by_list=True, sens_param=True)
        self.of_inputs = ops.GradOperation(get_all=True, sens_param=True)
        self.of_all = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)

    def construct(self, *batch):
        scale = batch[0]
        if self.is_scaled:
            batch = batch[1:]
        shared = self.model.shared_inputs(batch[0], *batch[2:])
        extras = (batch, (), shared)
        labels = batch[1]
        first = self.start(*batch)
        if self.starts_decoder:
            first, labels = first
        states = (first,)
        for i in range(len(self.kinds)):
            states = states + (self.chain[i](states[-1], *extras[self.kinds[i]]),)
        value, back = self.of_loss(states[-1], scale, labels)
        gradients = ()
        if self.has_ends:
            back, gradients = back
        for k in range(len(self.kinds) - self.first):
            i = len(self.kinds) - 1 - k
            # recomputed when the gradient arrives, instead of reused from the forward pass
            x = ops.depend(states[i], back)
            if self.num_weights[i] > 0:
                backward = self.of_all(self.chain[i], self.chain_weights[i])
                inputs, weights = backward(x, *extras[self.kinds[i]], back)
                gradients = weights + gradients
            else:
                inputs = self.of_inputs(self.chain[i])(x, *extras[self.kinds[i]], back)
            back = inputs[0]
        if self.has_start:
            if self.starts_decoder:
                back = (back, ops.zeros_like(labels))
            gradients = self.of_weights(self.start, self.start_weights)(*batch, back) + gradients
        return value, self.for_all(ops.Partial()(gradient_at, gradients), self.places, self.second_places)


gradient_at = ops.MultitypeFuncGraph("gradient_at")


@gradient_at.register("Tuple", "Number", "Number")
def _gradient_at(gradients, place, second):
    """Returns the gradient at an index, plus a second one if its index is not -1."""
    if second >= 0:
        return gradients[place] + gradients[second]
    return gradients[place]


class Embeds(nn.Cell):
    """batch -> input of the decoder's first layer, labels."""

    def __init__(self, model: ImageTextModel):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, *batch):
        embeds, labels = self.model.inputs(batch[0], batch[1], *batch[3:])
        return self.enter(embeds), labels

    def enter(self, embeds):
        positions = all_positions(embeds.shape[0], embeds.shape[1])
        return self.model.language_model.embed_positions(embeds, positions)


class EmbedsBehindBlocks(Embeds):
    """Output of the tower's blocks, batch -> input of the decoder's first layer."""

    def construct(self, states, *batch):
        features = self.model.features_behind_blocks(states, *batch[3:-1])
        return self.enter(self.model.insert(batch[0], batch[1], features, batch[-1])[0])


class TowerStart(nn.Cell):
    """batch -> input of the tower's first block. `pixels` is the place of the tower's pixels among those of a batch."""

    def __init__(self, tower: nn.Cell, pixels: int):
        super().__init__(auto_prefix=False)
        self.tower = tower
        self.place = 3 + pixels

    def construct(self, *batch):
        return self.tower.embed(batch[self.place])


class Loss(nn.Cell):
    """Output of the decoder's last layer, scale, labels -> the model's results, after the scaled loss if scaled."""

    def __init__(self, decoder: CausalLM, *, is_scaled: bool, averages: bool):
        super().__init__(auto_prefix=False)
        self.norm = decoder.norm
        self.lm_head = decoder.lm_head
        self.is_scaled = is_scaled
        self.averages = averages

    def construct(self, states, scale, labels):
        loss, num_labels = self.lm_head.loss_sum(self.norm(states), labels)
        if self.averages:
            loss, num_labels = mean_loss(loss, num_labels)
        if self.is_scaled:
            return loss * scale, loss, num_labels
        return loss, num_labels


def trained(cells: Iterable[nn.Cell], parameters: Sequence[Parameter]) -> list[Parameter]:
    """Returns the parameters that belong to the Cells."""
    own = {id(parameter) for cell in cells for parameter in cell.get_parameters()}
    return [parameter for parameter in parameters if id(parameter) in own]
