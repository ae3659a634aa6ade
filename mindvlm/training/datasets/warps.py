"""Geometric changes of RGB pictures that keep the size and fill what comes into view with white."""

import numpy as np
from PIL import Image

WHITE = (255, 255, 255)


def affine(image: Image.Image, matrix: np.ndarray, shift: np.ndarray | tuple[float, float] = (0.0, 0.0)) -> Image.Image:
    """Every pixel comes from `matrix` @ (its place - centre) + centre + `shift`.

    Args:
        matrix: (2, 2), for (x, y).
        shift: (x, y) in pixels.
    """
    centre = np.array([image.width / 2, image.height / 2])
    offset = centre - matrix @ centre + np.asarray(shift)
    data = (*matrix[0], offset[0], *matrix[1], offset[1])
    return image.transform(
        image.size, Image.Transform.AFFINE, tuple(map(float, data)), Image.Resampling.BICUBIC, fillcolor=WHITE
    )


def displace(image: Image.Image, moves: np.ndarray) -> Image.Image:
    """Every pixel comes from its place plus a displacement, given at the corners of a grid and linear between them.

    Args:
        moves: (rows + 1, columns + 1, 2), the displacement (x, y) in pixels at each corner of the cells.
    """
    num_rows, num_columns = moves.shape[0] - 1, moves.shape[1] - 1
    x = np.rint(np.linspace(0, image.width, num_columns + 1)).astype(int)
    y = np.rint(np.linspace(0, image.height, num_rows + 1)).astype(int)
    corners = np.stack(np.meshgrid(x, y), axis=-1) + moves
    mesh = []
    for row in range(num_rows):
        for column in range(num_columns):
            box = (int(x[column]), int(y[row]), int(x[column + 1]), int(y[row + 1]))
            if box[0] == box[2] or box[1] == box[3]:
                continue
            # Pillow's order: upper left, lower left, lower right, upper right
            around = ((row, column), (row + 1, column), (row + 1, column + 1), (row, column + 1))
            mesh.append((box, tuple(float(value) for corner in around for value in corners[corner])))
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC, fillcolor=WHITE)
