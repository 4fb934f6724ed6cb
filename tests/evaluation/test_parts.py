"""Results in parts on disk: what exists is used, what is missing or damaged is computed again."""

import pytest
import torch

from ddpm_cli.errors import DataError
from ddpm_cli.evaluation.parts import complete


def squares(asked: list[list[int]]):
    def work(numbers):
        asked.append(list(numbers))
        for part in torch.tensor(numbers).split(4):
            yield {"numbers": part, "square": part.double()[:, None] ** 2}

    return work


def found(parts) -> dict[int, float]:
    """The squares by number. No number is in two parts."""
    pairs = [pair for part in parts for pair in zip(part["numbers"].tolist(), part["square"].tolist(), strict=True)]
    assert len(dict(pairs)) == len(pairs)
    return {number: square for number, (square,) in pairs}


def right(numbers) -> dict[int, float]:
    return {n: n**2 for n in numbers}


def test_only_what_is_missing_is_computed(tmp_path):
    asked: list[list[int]] = []
    numbers = range(10)
    assert found(complete(tmp_path, numbers, squares(asked))) == right(numbers)
    assert found(complete(tmp_path, numbers, squares(asked))) == right(numbers)
    assert asked == [list(numbers)]
    (tmp_path / "00000004.safetensors").write_bytes(b"damaged")
    again = complete(tmp_path, numbers, squares(asked))
    assert asked[1:] == [[4, 5, 6, 7]]
    assert found(again) == right(numbers)


def test_other_images_take_the_parts_that_fit(tmp_path):
    asked: list[list[int]] = []
    complete(tmp_path, range(10), squares(asked))
    more = complete(tmp_path, range(14), squares(asked))
    assert asked[1:] == [[10, 11, 12, 13]]
    assert found(more) == right(range(14))
    fewer = complete(tmp_path, [0, 1, 2, 3, 5], squares(asked))  # the file with 4 to 7 is about other images too
    assert asked[2:] == [[5]]
    assert found(fewer) == right([0, 1, 2, 3, 5])
    # Two files are about image 5 now. It counts once.
    assert found(complete(tmp_path, range(14), squares(asked))) == right(range(14))


def test_a_part_that_is_lost_before_it_is_read_is_an_error(tmp_path):
    """Results of fewer images than were asked for would look like those of all."""
    parts = complete(tmp_path, range(10), squares([]))
    next(parts)
    (tmp_path / "00000004.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="the results of 4 images cannot be read"):
        list(parts)
    asked: list[list[int]] = []
    assert found(complete(tmp_path, range(10), squares(asked))) == right(range(10))
    assert asked == [[4, 5, 6, 7]]


def test_work_that_fails_keeps_what_it_has_done(tmp_path):
    def failing(numbers):
        yield from list(squares([])(numbers))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(tmp_path, range(10), failing)
    asked: list[list[int]] = []
    assert found(complete(tmp_path, range(10), squares(asked))) == right(range(10))
    assert asked == [[8, 9]]
