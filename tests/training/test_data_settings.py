"""The `data` and `checkpoint` sections of a recipe: what is refused, and what the error says to do."""

import pytest
from phalanx.recipes.checkpoint import CheckpointConfig
from phalanx.recipes.data import DataConfig
from phalanx.recipes.parse import RecipeError, parse


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (DataConfig, {}, "paths = .* names no data; give files or URLs"),
        (DataConfig, {"format": "txt", "paths": ["a"]}, "format"),
        (DataConfig, {"path": ["a"]}, "path is not a field.*paths"),
        (DataConfig, {"paths": ["a"], "seq_len": 0}, "seq_len = 0 must be at least 1"),
        (DataConfig, {"paths": ["a"], "workers": -1}, "workers = -1 must be 0"),
        (CheckpointConfig, {"keep_last": 0}, "keep_last = 0 must be at least 1: the last one is resumed from"),
        (CheckpointConfig, {"best": "smallest"}, "best"),
        (CheckpointConfig, {"every_steps": -5}, "every_steps = -5 must be 0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fix(kind, given, said):
    with pytest.raises(RecipeError, match=said):
        parse(kind, given)


def test_the_usual_job_file_is_taken():
    data = parse(DataConfig, {"format": "jsonl", "paths": ["s3://bucket/*.jsonl"], "workers": 4})
    assert data.paths == ("s3://bucket/*.jsonl",)
    assert parse(DataConfig, {"format": "digits"}).paths == ()
    assert parse(CheckpointConfig, {"every_steps": 50, "keep_best": 2}).keep_best == 2
