"""Results in parts on disk: what exists is used, what is missing or damaged is computed again."""

import pytest
import torch

from ddpm_cli.evaluation.parts import complete, together


def squares(asked: list[list[int]]):
    def work(numbers):
        asked.append(list(numbers))
        for part in torch.tensor(numbers).split(4):
            yield {"numbers": part, "square": part.double()[:, None] ** 2}

    return work


def test_only_what_is_missing_is_computed(tmp_path):
    asked: list[list[int]] = []
    numbers = range(10)
    parts = complete(tmp_path, numbers, squares(asked))
    assert together(parts, "square").flatten().tolist() == [n**2 for n in numbers]
    assert together(complete(tmp_path, numbers, squares(asked)), "square").shape == (10, 1)
    assert asked == [list(numbers)]
    (tmp_path / "00000004.safetensors").write_bytes(b"damaged")
    again = complete(tmp_path, numbers, squares(asked))
    assert asked[1:] == [[4, 5, 6, 7]]
    assert together(again, "square").flatten().tolist() == [n**2 for n in numbers]


def test_other_images_take_the_parts_that_fit(tmp_path):
    asked: list[list[int]] = []
    complete(tmp_path, range(10), squares(asked))
    more = complete(tmp_path, range(14), squares(asked))
    assert asked[1:] == [[10, 11, 12, 13]]
    assert together(more, "square").flatten().tolist() == [n**2 for n in range(14)]
    fewer = complete(tmp_path, [0, 1, 2, 3, 5], squares(asked))  # the file with 4 to 7 is about other images too
    assert asked[2:] == [[5]]
    assert together(fewer, "square").flatten().tolist() == [0, 1, 4, 9, 25]
    # Two files are about image 5 now. It counts once.
    assert together(complete(tmp_path, range(14), squares(asked)), "square").flatten().tolist() == [
        n**2 for n in range(14)
    ]


def test_work_that_fails_keeps_what_it_has_done(tmp_path):
    def failing(numbers):
        yield from list(squares([])(numbers))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(tmp_path, range(10), failing)
    asked: list[list[int]] = []
    assert len(complete(tmp_path, range(10), squares(asked))) == 3
    assert asked == [[8, 9]]
