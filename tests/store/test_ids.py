"""Ids are ordered, readable and strict."""

import pytest
from phalanx_server.store.ids import encode, new_id, parse


def test_ids_of_one_process_never_go_back():
    made = [new_id() for _ in range(5000)]
    assert made == sorted(set(made))
    assert all(each.version == 7 for each in made)


def test_the_api_form_reads_back():
    value = new_id()
    assert parse("attempt", encode("attempt", value)) == value
    assert encode("job", value).startswith("job_")


@pytest.mark.parametrize("text", ["", "job_", "job_12", "att_" + "0" * 32, "job_" + "G" * 32, "job_" + "A" * 32])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="no job id"):
        parse("job", text)
