from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vae3d.panorama import DOWN, FACES, UP, cube_faces, latitude_weights, roll, wrap


def directions(height: int, width: int) -> torch.Tensor:
    """[1, 3, H, W]: a panorama of its pixels' directions: right, up, ahead."""
    latitude = math.pi / 2 - (torch.arange(height).double()[:, None] + 0.5) * math.pi / height
    longitude = (torch.arange(width).double()[None] + 0.5) * 2 * math.pi / width - math.pi
    x, z = torch.cos(latitude) * torch.sin(longitude), torch.cos(latitude) * torch.cos(longitude)
    return torch.stack([x, torch.sin(latitude).expand_as(x), z])[None]


def test_rows_weigh_the_cosine_of_their_latitude():
    assert latitude_weights(2).tolist() == pytest.approx([math.cos(math.pi / 4)] * 2)
    eighth = math.pi / 8
    assert latitude_weights(4).tolist() == pytest.approx([math.cos(k * eighth) for k in (3, 1, 1, 3)])


def test_weights_of_128_rows():
    weights = latitude_weights(128)
    assert weights[0].item() == pytest.approx(0.01227, abs=5e-6)
    assert weights[63].item() == pytest.approx(0.99992, abs=5e-6)
    assert weights.mean().item() == pytest.approx(0.63664, abs=5e-6) == 1 / (128 * math.sin(math.pi / 256))
    assert latitude_weights(512)[0].item() == pytest.approx(0.00307, abs=5e-6)


def test_a_roll_turns_by_half_by_default():
    row = torch.arange(6.0)
    assert roll(row).tolist() == [3, 4, 5, 0, 1, 2]
    assert roll(row, 1).tolist() == [5, 0, 1, 2, 3, 4]


def test_a_frame_goes_on_across_the_seam_and_over_the_poles():
    frame = torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7]])
    assert wrap(frame, 1, 1).tolist() == [
        [1, 2, 3, 0, 1, 2],
        [3, 0, 1, 2, 3, 0],
        [7, 4, 5, 6, 7, 4],
        [5, 6, 7, 4, 5, 6],
    ]
    assert wrap(frame, 0, 2)[:2].tolist() == [[6, 7, 4, 5], [2, 3, 0, 1]]
    assert wrap(torch.tensor([[0.0, 3, 6]]), 0, 1)[0].tolist() == [4.5, 3, 1.5]  # half a turn is one and a half columns
    with pytest.raises(ValueError, match="frames of 2x4 cannot be padded by 0 rows and 5 columns"):
        wrap(frame, 5)


def test_every_pixel_of_a_face_looks_where_it_should():
    """As seen from inside: right of the front face comes the right one, above it the one that looks up."""
    faces = cube_faces(directions(128, 256), 33)[0]
    for face, axis in zip(faces, [(0, 0, 1), (1, 0, 0), (0, 0, -1), (-1, 0, 0), (0, 1, 0), (0, -1, 0)], strict=True):
        assert face[:, 16, 16].tolist() == pytest.approx(axis, abs=1e-3)
        assert face.norm(dim=0).sub(1).abs().max() < 1e-3
    front, right, back, left, up, down = faces
    edge = 32 / 33  # of the cube's half side, in the middle of the outermost pixels
    ray = F.normalize(torch.tensor([edge, 0, 1]), dim=0).tolist()
    assert front[:, 16, -1].tolist() == pytest.approx(ray, abs=1e-3)
    corner = F.normalize(torch.tensor([-edge, edge, 1]), dim=0).tolist()
    assert front[:, 0, 0].tolist() == pytest.approx(corner, abs=1e-3)
    for one, other in [
        (front[..., -1], right[..., 0]),
        (right[..., -1], back[..., 0]),
        (back[..., -1], left[..., 0]),
        (left[..., -1], front[..., 0]),
        (up[:, -1], front[:, 0]),
        (down[:, 0], front[:, -1]),
        (up[..., -1], right[:, 0].flip(-1)),
        (down[..., -1], right[:, -1]),
        (up[:, 0], back[:, 0].flip(-1)),
    ]:
        torch.testing.assert_close(one, other, atol=0.05, rtol=0)  # a face's pixel is 0.06 wide


def test_faces_have_their_order_and_the_size_of_90_degrees_of_rows():
    assert list(FACES) == ["front", "right", "back", "left", "up", "down"]
    assert cube_faces(torch.zeros(2, 5, 10, 20)).shape == (2, 6, 5, 5, 5)
    sky = torch.zeros(1, 1, 32, 64)
    sky[:, :, :8] = 1  # beyond 45 degrees
    up, down = cube_faces(sky, 9)[0, [UP, DOWN], 0]
    assert up[4, 4] == 1
    assert down.abs().max() == 0


def test_the_seam_and_the_poles_are_no_borders_to_the_faces():
    """A quarter turn permutes the sides and rotates up and down."""
    frames = torch.rand(1, 2, 16, 32, dtype=torch.float64)
    before, after = cube_faces(frames)[0], cube_faces(roll(frames, 8))[0]
    torch.testing.assert_close(after[:4], before[:4].roll(1, 0))
    torch.testing.assert_close(after[4], before[4].rot90(1, (-2, -1)))
    torch.testing.assert_close(after[5], before[5].rot90(-1, (-2, -1)))
    constant = torch.full((1, 1, 7, 13), 0.25)
    torch.testing.assert_close(cube_faces(constant, 20), torch.full((1, 6, 1, 20, 20), 0.25))


def test_gradients_of_faces_are_finite_and_keep_their_sum():
    frames = torch.rand(2, 3, 8, 16, requires_grad=True)
    cube_faces(frames, 5).sum().backward()
    assert frames.grad.isfinite().all()
    assert frames.grad.sum().item() == pytest.approx(2 * 3 * 6 * 5 * 5, rel=1e-5)
    assert frames.grad.min() >= 0


def test_a_single_row_has_no_faces():
    with pytest.raises(ValueError, match="a panorama of 1x4 has no cube faces"):
        cube_faces(torch.zeros(1, 1, 1, 4))
