"""Pictures as the chat front ends of LLaVA send them: small, and what they send is also what the model sees."""

from typing import Literal

from PIL import Image

from mindvlm.processing.images.transforms import centre_on_square

PictureMode = Literal["Pad", "Default", "Crop", "Resize"]
LONGEST, SHORTEST, RESIZED = 800, 400, 336


def chat_picture(image: Image.Image, mode: PictureMode = "Default") -> Image.Image:
    """The picture within 800 x 400 pixels (either way round), its aspect ratio kept but for rounding.

    Args:
        mode: "Pad" lays it on a square of CLIP's mean colour first, "Resize" makes it 336 x 336 first.
    """
    if mode == "Pad":
        image = centre_on_square(image)
    elif mode == "Resize":
        image = image.resize((RESIZED, RESIZED))
    aspect = max(image.size) / min(image.size)
    # a line of 2000 pixels would have no width
    short = max(1, int(min(LONGEST / aspect, SHORTEST, min(image.size))))
    long = int(short * aspect)
    return image.resize((short, long) if image.height > image.width else (long, short))
