"""Numbers of things as people say them."""

import pytest

from fedpriv import counting


@pytest.mark.parametrize(
    ("counted", "said"),
    [
        ((1, "round"), "1 round"),
        ((0, "round"), "0 rounds"),
        ((1500, "user"), "1,500 users"),
        ((2.5, "user"), "2.5 users"),
        ((1, "class", "classes"), "1 class"),
        ((10, "class", "classes"), "10 classes"),
    ],
)
def test_one_is_no_several(counted, said):
    assert counting.numbered(*counted) == said


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([25, 25], "2 users with 25 records each, 50 in all"),
        ([1, 1, 1], "3 users with 1 record each, 3 in all"),
        ([0, 1], "2 users with 0 to 1 record each, 1 in all"),
        ([2, 5], "2 users with 2 to 5 records each, 7 in all"),
        ([4], "1 user with 4 records"),
        ([], "0 users with 0 records each, 0 in all"),
    ],
)
def test_sizes_are_said_as_people_say_them(sizes, said):
    assert counting.in_words(sizes, "record") == said
