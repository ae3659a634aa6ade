"""The typed config of a SliME model, its checks, and the shapes of its parameters. Needs no framework."""

import math
from dataclasses import InitVar, dataclass
from typing import Literal, get_args

from mindvlm.core.errors import UserError
from mindvlm.models.slime.views import MAX_CROPS, Use
from mindvlm.nn.config import DecoderConfig, VitConfig, check_language_model, check_vision_tower
from mindvlm.nn.shapes import Shapes, decoder_shapes, linear_shapes, norm_shapes, vit_shapes

Gate = Literal["learned", "mlp", "resampler"]
RESAMPLER_HEAD_DIM = 128


@dataclass(kw_only=True)
class RouterConfig:
    """The choice among the local rows of a picture by the text of the prompt.

    Attributes:
        top_p: rows are kept, the likeliest first, up to and including the one that exceeds this sum of probabilities.
        temperature: divisor of the scores before the softmax.
        noise: in training, standard deviation of the normal noise that is added to the scores.
        sees_answers: in training, whether the text is the whole conversation, without padding; otherwise it ends before
            the first answer, as it does when asking the first question.
    """

    top_p: float = 0.95
    temperature: float = 1.0
    noise: float = 0.0
    sees_answers: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.top_p <= 1:
            raise UserError(f"model.router.top_p is {self.top_p}; expected 0 (keeps one row) to 1 (keeps all rows)")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"model.router.temperature is {self.temperature}; expected a finite number above 0")
        if not 0 <= self.noise < math.inf:
            raise UserError(f"model.router.noise is {self.noise}; expected 0 (none) or a finite number above it")


@dataclass(kw_only=True)
class SlimeModelConfig:
    """The parts of a SliME model.

    Attributes:
        vision_select_layer: index of the features among the hidden states [embeddings, output of layer 0, ...]. The
            class token is dropped.
        num_local_tokens: number of feature rows of a crop, after compression (`mm_resampler_dim`).
        gate: how the global adapter mixes its two experts: "learned" for each token, or one expert alone.
        gate_noise: in training, adds normal noise to the logits of the gate, of the standard deviation
            softplus(logit) + 0.01.
        use: the views that the model gets ("global", "local" or "both").
        separator_id: token whose embedding stands between global and local rows: the last one of ",".
        router: the choice among local rows.
        max_length: limit of prompt plus answer in tokens, image features included. In training, longer ones are cut
            after the choice of the router.
        validate: whether to check that the model can run; if False, the config only describes tensor sizes.
    """

    language_model: DecoderConfig
    vision_tower: VitConfig
    vision_select_layer: int = -2
    num_local_tokens: int = 144
    gate: Gate = "learned"
    gate_noise: bool = False
    use: Use = "both"
    separator_id: int
    router: RouterConfig
    max_length: int = 4096
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool):
        if not validate:
            return
        check_language_model(self.language_model, max_length=self.max_length)
        check_vision_tower(self.vision_tower, self.vision_select_layer)
        for name, choices in (("gate", Gate), ("use", Use)):
            if getattr(self, name) not in get_args(choices):
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(choices))}"
                )
        self.check_training_keys()
        if self.max_length < 1:
            raise UserError(f"model.max_length is {self.max_length}; expected at least 1")
        if self.vision_tower.dialect != "clip":
            raise UserError(f"model.vision_tower.dialect is {self.vision_tower.dialect!r}; expected clip")
        if self.vision_tower.hidden_size % RESAMPLER_HEAD_DIM:
            raise UserError(
                f"model.vision_tower.hidden_size is {self.vision_tower.hidden_size}; expected a multiple of "
                f"{RESAMPLER_HEAD_DIM}, the width of a head of the resampler"
            )
        num_global = self.num_global_tokens
        for name, number in (("vision_tower.num_patches", num_global), ("num_local_tokens", self.num_local_tokens)):
            if math.isqrt(number) ** 2 != number:
                raise UserError(f"model.{name} is {number}; expected a square number")
        if not 1 <= self.num_local_tokens < num_global:
            raise UserError(
                f"model.num_local_tokens is {self.num_local_tokens}; expected 1 to {num_global - 1}, less than the "
                "tokens of a view"
            )
        if not 0 <= self.separator_id < self.language_model.vocab_size:
            raise UserError(
                f"model.separator_id is {self.separator_id}; expected 0 to {self.language_model.vocab_size - 1}"
            )

    def check_training_keys(self) -> None:
        """Raises UserError if a key that acts in training has no effect on this model."""
        routes, router = self.use != "global", self.router
        for key, is_set, has_effect, default in (
            ("gate_noise", self.gate_noise, self.gate == "learned" and self.use != "local", "false"),
            ("router.noise", router.noise > 0, routes, "0"),
            ("router.sees_answers", not router.sees_answers, routes, "true"),
        ):
            if is_set and not has_effect:
                raise UserError(
                    f"model.{key} has no effect with model.gate {self.gate!r} and model.use {self.use!r}; set it to "
                    f"{default}"
                )

    @property
    def num_global_tokens(self) -> int:
        """Number of feature rows of the global view."""
        return self.vision_tower.num_patches

    @property
    def image_token_len(self) -> int:
        """Largest number of feature rows of a picture in the mode "anyres"."""
        num_local = MAX_CROPS["anyres"] * self.num_local_tokens
        return {"global": self.num_global_tokens, "local": num_local}.get(
            self.use, self.num_global_tokens + 1 + num_local
        )


def model_shapes(config: SlimeModelConfig) -> Shapes:
    """Returns name -> shape of the parameters of `SlimeModel`."""
    width, hidden_size = config.vision_tower.hidden_size, config.language_model.hidden_size
    return (
        decoder_shapes(config.language_model, "language_model.")
        | vit_shapes(config.vision_tower, "vision_tower.")
        | adapter_shapes(width, hidden_size, config.num_global_tokens)
        | resampler_shapes("sampler.", width, config.num_local_tokens)
    )


def adapter_shapes(width: int, hidden_size: int, num_tokens: int) -> Shapes:
    """Returns name -> shape of the parameters of `GlobalAdapter`."""
    name = "mm_projector"
    return (
        linear_shapes(f"{name}.projection.0", hidden_size, width)
        | linear_shapes(f"{name}.projection.2", hidden_size, hidden_size)
        | resampler_shapes(f"{name}.attn.", width, num_tokens)
        | {f"{name}.{gate}": (width, 2) for gate in ("w_gate", "w_noise")}
    )


def resampler_shapes(prefix: str, width: int, num_queries: int) -> Shapes:
    """Returns name -> shape of the parameters of `QueryResampler`."""
    shapes: Shapes = {f"{prefix}{name}": (num_queries, width) for name in ("query", "pos_embed")}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= linear_shapes(f"{prefix}attn.{name}", width, width)
    for name in ("ln_q", "ln_kv", "ln_post"):
        shapes |= norm_shapes(f"{prefix}{name}", width)
    return shapes
