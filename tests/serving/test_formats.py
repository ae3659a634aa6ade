"""Formats of pictures that the server opens."""

import io
import subprocess
import sys

import pytest
from PIL import Image


def test_heic_is_opened_when_it_is_the_first_picture():
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 64), "red")).save(file)
    script = "import sys; from mindvlm.serving.pictures import check_format; check_format(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", script], input=file.getvalue(), check=True)
