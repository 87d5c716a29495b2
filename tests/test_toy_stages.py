"""The prompts that the evaluation asks for, and what of them is judged."""

import pytest

from benchmarks import method
from lr_kernels.toy import world
from lr_kernels.toy.stages import composed, on_backgrounds


@pytest.mark.parametrize("subject", world.SUBJECTS)
def test_prompts_say_what_is_judged(subject):
    noun = world.class_word(subject)
    alone, more = on_backgrounds(subject, 2), composed(subject)
    assert len(alone.prompts) == 12 and alone.prompts[0] == f"a sks {noun} on sky"
    assert len(more.prompts) == 10 and more.prompts[0] == f"a sks {noun} at left on sky"
    second = "ball" if noun == "box" else "box"
    assert more.prompts[4] == f"a sks {noun} and a green {second} on sky"
    assert more.layout_prompts[4] == f"a {noun} and a green {second} on sky"
    for task in (alone, more):
        words = " ".join(task.prompts).split()
        assert set(words) <= set(world.WORDS) and len(task.backgrounds) == len(task.prompts)


def test_attributes_count_where_they_are_asked_for():
    common = {"subject": "ball", "seed": 1, "stage": "layout", "background": 1.0, "present": 1.0, "identity": 0.5}
    nothing = dict.fromkeys(("place", "other_shape", "other_color"))
    rows = [{**common, **nothing, "place": 1.0}, {**common, **nothing, "other_shape": 0.0, "other_color": 1.0}]
    (found,) = method.summary_by_attribute(rows).values()
    assert found["place"] == [1.0, 1.0, 1.0] and found["other_shape"][0] == 0 and found["identity"][0] == 0.5
