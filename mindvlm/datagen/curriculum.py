"""From eight characters on a fixed grid to everything: the stages of Vary-nano's data and when to move on."""

from dataclasses import dataclass

from mindvlm.datagen.rendered_text import Stage

# Margins are cut off before the model sees the picture, so training keeps them narrow: drawing them costs time.
TRAINING_MARGIN = 12

STAGES = (
    Stage(num_fonts=1, min_characters=8, max_characters=8, two_lines=0, spaces=False, tints=False, min_font_size=22),
    Stage(num_fonts=1, min_characters=3, max_characters=12, two_lines=0, spaces=False, min_font_size=18),
    Stage(num_fonts=3, min_characters=2, max_characters=16, two_lines=0.1),
    Stage(num_fonts=3, min_characters=1, max_characters=24, two_lines=0.25),
    Stage(),
)
TRAINING_STAGES = tuple(Stage(**{**vars(stage), "max_margin": TRAINING_MARGIN}) for stage in STAGES)

SMOOTHING = 0.95
MIN_STEPS_PER_STAGE = 50


@dataclass
class Curriculum:
    """Moves to the next stage when the smoothed loss falls below `threshold`.

    Every field is a plain number, so that a checkpoint can hold it.
    """

    threshold: float = 0.5
    stage: int = 0
    smoothed_loss: float = 10.0
    steps_in_stage: int = 0

    def update(self, loss: float) -> bool:
        """Takes in the loss of one step; True if a new stage begins."""
        self.smoothed_loss = SMOOTHING * self.smoothed_loss + (1 - SMOOTHING) * loss
        self.steps_in_stage += 1
        is_last = self.stage == len(TRAINING_STAGES) - 1
        if is_last or self.steps_in_stage < MIN_STEPS_PER_STAGE or self.smoothed_loss >= self.threshold:
            return False
        self.stage += 1
        self.steps_in_stage = 0
        # the harder pictures raise the loss at once; waiting for the average to notice would skip a stage
        self.smoothed_loss = max(self.smoothed_loss, 2 * self.threshold)
        return True
