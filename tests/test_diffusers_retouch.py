"""The retouch stage beyond one subject and one reference: readings by hand, subjects, banks, and what does not fit."""

import copy
import itertools

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import (
    TOLERANCE,
    distance,
    tiny_scheduler,
    tiny_unet,
)
from tiny_pipelines import IMAGES, MASK, NOISE, PROMPTS, SHARED, STEPS, attention, banked, fresh, run, seeded, with_lora
from torch.nn import functional as F

from lr_kernels.diffusers import (
    MultiSourceAttnProcessor,
    ReferenceBank,
    RetouchBatch,
    StableDiffusionLayoutRetouchPipeline,
    install_processors,
    route,
    select_layers,
    swap,
)
from lr_kernels.diffusers.processors.unet import AttentionState
from lr_kernels.diffusers.subjects.matching import FeatureRecorder
from lr_kernels.diffusers.subjects.subject import as_subjects, shown_subjects

pytestmark = pytest.mark.usefixtures("one_thread")


def retouch(pipe, prompt=PROMPTS, image=IMAGES[:1], reference_prompt="a sks ball", words=("sks", "ball"), **kwargs):
    kwargs = {**SHARED, "context_latents": NOISE[: len(prompt)], "reference_mask": MASK, **kwargs}
    kwargs.setdefault("generator", seeded())
    return pipe.retouch(prompt, image, reference_prompt, words, **kwargs)


# The readings, by hand


@pytest.mark.parametrize(("context", "guided"), list(itertools.product([True, False], repeat=2)))
def test_several_subjects_and_references_read_by_hand(context, guided):
    torch.manual_seed(0)
    shows = (1, 0, 1)
    batch = RetouchBatch(2, context, guided, references=3)
    masks, seen = torch.rand(2, 2, 4, 6) < 0.4, torch.rand(3, 4, 6) < 0.5
    q, k, v = torch.randn(3, batch.size, 2, 24, 8)
    state = AttentionState(sharing=True, routings={24: route(batch, masks, seen, (4, 6), shows)})
    found = MultiSourceAttnProcessor(state).attend(q, k, v, None, False)
    expected = F.scaled_dot_product_attention(q, k, v)
    masks, seen = masks.flatten(2), seen.flatten(1)
    for start, image in itertools.product(range(0, batch.size, batch.half), range(2)):
        row = start + image
        references = [start + batch.half - 3 + r for r in range(3)]
        own = row + 2 if context else row
        nobody = ~masks[:, image].any(0)
        visible = [(nobody if context else torch.ones_like(nobody))[:, None].expand(24, 24)]
        visible += [masks[s, image][:, None] & seen[r][None] for r, s in enumerate(shows)]
        keys, values = (torch.cat([x[own], *(x[r] for r in references)], 1) for x in (k, v))
        expected[row] = attention(q[row], keys, values, torch.cat(visible, 1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("guided", [True, False])
def test_swap_takes_structure_from_the_context_and_values_from_where_it_matches(guided):
    torch.manual_seed(0)
    shows = (0, 0)
    batch = RetouchBatch(2, True, guided, references=2)
    masks, seen = torch.rand(1, 2, 4, 6) < 0.6, torch.rand(2, 4, 6) < 0.6
    matches = [(torch.randint(24, (2, 24)), torch.rand(2, 24) < 0.7) for _ in shows]
    q, k, v = torch.randn(3, batch.size, 2, 24, 8)
    state = AttentionState(sharing=True, routings={24: swap(batch, masks, seen, (4, 6), shows, matches)})
    found = MultiSourceAttnProcessor(state).attend(q, k, v, None, False)
    expected = F.scaled_dot_product_attention(q, k, v)
    masks, seen = masks.flatten(2), seen.flatten(1)
    taken = 0
    for start, image in itertools.product(range(0, batch.size, batch.half), range(2)):
        context = start + 2 + image
        values = v[context].clone()
        for token in range(24):
            for r in (0, 1):
                index, consistent = matches[r][0][image, token], matches[r][1][image, token]
                if consistent and masks[0, image, token] and seen[r, index]:
                    values[:, token] = v[start + batch.half - 2 + r, :, index]
                    taken += 1
                    break
        every = torch.ones(24, 24, dtype=torch.bool)
        expected[start + image] = attention(q[context], k[context], values, every)
    assert taken
    torch.testing.assert_close(found, expected)


def test_the_readings_differ_and_both_share(pipe):
    routing, swapped = (retouch(pipe, reading=reading).latents for reading in ("routing", "swap"))
    alone = retouch(pipe, retouch_start=1, retouch_end=1).latents
    assert distance(routing, swapped) > TOLERANCE and distance(swapped, alone) > TOLERANCE
    assert torch.equal(swapped, retouch(pipe, reading="swap").latents)


@pytest.mark.fault(number=16)
def test_swap_without_layouts_or_with_a_bank_is_refused(pipe):
    with pytest.raises(NotImplementedError, match="reading: expected 'routing' without layouts"):
        retouch(pipe, reading="swap", context_latents=None, latents=NOISE)
    with pytest.raises(NotImplementedError, match="reading: expected 'routing' with a reference_bank"):
        from_bank(pipe, banked(pipe), reading="swap")
    with pytest.raises(ValueError, match="reading: expected one of routing, swap, got 'both'"):
        retouch(pipe, reading="both")


# Several subjects and references


BOTH = ["a sks ball by a box", "a box and sks ball"]
SUBJECTS = [("sks", "ball"), ("box",)]


def two(pipe, prompt=BOTH, **kwargs):
    kwargs = {"reference_mask": [MASK, None], **kwargs}
    return retouch(pipe, prompt, list(IMAGES), ["a sks ball", "a box"], SUBJECTS, **kwargs)


@pytest.mark.parametrize(
    "kwargs", [{}, {"mask_blending": True}, {"reading": "swap"}, {"context_latents": None}], ids=str
)
def test_two_subjects(pipe, kwargs):
    kwargs = {**kwargs, "latents": NOISE} if "context_latents" in kwargs else kwargs
    out = two(pipe, **kwargs)
    assert out.subject_masks.shape == (2, 2, 8, 8) and out.reference_mask.shape == (2, 8, 8)
    assert torch.equal(out.masks, out.subject_masks.any(0))
    reference = two(pipe, backend="reference", **kwargs)
    assert distance(out.latents, reference.latents) <= TOLERANCE


def test_images_of_a_batch_are_independent_with_two_subjects(pipe):
    both = two(pipe, generator=[seeded(1), seeded(2)]).latents
    for i in range(2):
        one = two(pipe, BOTH[i : i + 1], generator=seeded(1 + i), context_latents=NOISE[i : i + 1]).latents
        assert distance(both[i : i + 1], one) <= TOLERANCE


def test_more_references_of_a_subject_add_to_it(pipe):
    one = retouch(pipe).latents
    more = retouch(pipe, image=IMAGES, reference_mask=[MASK, MASK]).latents
    again = retouch(pipe, image=[IMAGES[:1], IMAGES[1:]], reference_mask=[MASK, MASK]).latents
    assert distance(one, more) > TOLERANCE and torch.equal(more, again)
    twice = retouch(pipe, image=IMAGES[[0, 0]], reference_mask=[MASK, MASK]).latents  # of no more weight than once
    assert distance(one, twice) <= TOLERANCE


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reference_mask": [MASK]}, "reference_mask: expected 2 masks, one per reference, got 1"),
        ({"reference_mask": [MASK, np.zeros((4, 4))]}, r"reference_mask\[1\]: expected a foreground, got none"),
        ({"reference_subjects": [0, 0]}, r"reference_subjects: expected 2 numbers, among them each of 0 to 1"),
        ({"reference_subjects": [0, 2]}, r"reference_subjects: expected 2 numbers"),
        ({"prompt": ["a sks ball", "a box"]}, r"subject_tokens: expected words of the prompt 'a sks ball', got 'box'"),
    ],
)
def test_what_does_not_fit_several_subjects_is_named(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        two(pipe, **kwargs)


def test_words_of_subjects_and_subjects_of_references():
    assert as_subjects("dog") == [["dog"]] and as_subjects(("sks", "dog")) == [["sks", "dog"]]
    assert as_subjects([("sks", "dog"), ["cat"]]) == [["sks", "dog"], ["cat"]]
    assert shown_subjects(None, 3, 1) == (0, 0, 0) and shown_subjects(None, 2, 2) == (0, 1)
    with pytest.raises(ValueError, match="subject_tokens: expected words"):
        as_subjects(())
    with pytest.raises(ValueError, match="reference_subjects: expected the subject of each of 3 references"):
        shown_subjects(None, 3, 2)


def test_one_reference_image_is_needed(pipe):
    with pytest.raises(ValueError, match="reference_image: expected an image, several, or a reference_bank"):
        retouch(pipe, image=None)


# The reference bank


def from_bank(pipe, bank, **kwargs):
    return retouch(pipe, image=None, reference_prompt=None, reference_mask=None, reference_bank=bank, **kwargs)


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_bank_gives_what_the_reference_in_the_batch_gives(pipes, kind, guidance, context):
    pipe, kwargs = pipes[kind], {"guidance_scale": guidance}
    bank = banked(pipe, **kwargs)
    if not context:
        kwargs |= {"context_latents": None, "latents": NOISE}
    assert distance(from_bank(pipe, bank, **kwargs).latents, retouch(pipe, **kwargs).latents) <= TOLERANCE


def test_a_bank_of_several_subjects_in_a_file_serves_other_prompts_and_pipelines(pipe, tmp_path):
    shared = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "storage": "cpu"}
    bank = pipe.reference_bank(
        list(IMAGES), ["a sks ball", "a box"], SUBJECTS, reference_mask=[MASK, None], retouch_layers=[2], **shared
    )
    bank.save(tmp_path / "bank.safetensors", model="tiny")
    other = StableDiffusionLayoutRetouchPipeline(**{**pipe.components, "scheduler": tiny_scheduler()},
                                                 requires_safety_checker=False)  # fmt: skip
    other.set_progress_bar_config(disable=True)
    for prompts in (BOTH, BOTH[1:]):
        loaded = ReferenceBank.load(tmp_path / "bank.safetensors", model="tiny")
        arguments = {"words": SUBJECTS, "contexts_from": "renoise", "retouch_layers": [2]}
        found = from_bank(other, loaded, prompt=prompts, **arguments)
        arguments.pop("words")
        assert distance(found.latents, two(pipe, prompts, **arguments).latents) <= TOLERANCE
    assert found.reference_mask.shape == (2, 8, 8)


def test_a_bank_serves_the_whole_pipeline(pipe):
    bank = banked(pipe)
    arguments = {**SHARED, "latents": NOISE, "generator": seeded()}
    found = pipe(PROMPTS, "a ball", None, None, ("sks", "ball"), reference_bank=bank, **arguments)
    assert distance(found.latents, run(pipe).latents) <= TOLERANCE


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_inference_steps": 5}, r"bank: expected built for timesteps .*; use the same number of steps"),
        ({"retouch_start": 0}, "bank: expected built for timesteps"),
        ({"guidance_scale": 1.0}, "reference_bank: expected built for 1 rows, without guidance, got 2"),
        (
            {"context_latents": torch.zeros(2, 4, 4, 4)},
            r"expected built for latents of \(4, 4\), got \(8, 8\)",
        ),
        ({"context_latents": torch.zeros(2, 4, 4, 16)}, r"reference_bank: expected built for latents of \(4, 16\)"),
        ({"words": SUBJECTS, "prompt": BOTH}, r"subject_tokens: expected \[\['sks', 'ball'\]\], as the bank was built"),
        ({"reference_subjects": [1]}, r"reference_subjects: expected \[0\], as the bank was built, got \[1\]"),
    ],
    ids=["steps", "range", "guidance", "size", "turned size", "subjects", "other subjects"],
)
@pytest.mark.fault(number=33)
def test_a_bank_built_for_something_else_is_refused(pipe, kwargs, message):
    bank = banked(pipe)
    with pytest.raises(ValueError, match=message):
        from_bank(pipe, bank, **kwargs)


@pytest.mark.fault(number=33)
def test_a_bank_without_a_foreground_or_never_filled_is_refused(pipe):
    bank = ReferenceBank([1, 2])
    with pytest.raises(ValueError, match="reference_bank: expected one with a foreground"):
        from_bank(pipe, bank)
    bank.foreground = torch.ones(1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="reference_bank: expected built for 2 rows, with guidance, got 0"):
        from_bank(pipe, bank)


@pytest.mark.fault(number=33)
def test_two_pipelines_with_banks_interleaved(pipes):
    """Each keeps its own; the other's is refused or gives the other's result, never a mixture."""
    first, second = banked(pipes["sd"]), banked(pipes["sd"], reference_mask=~MASK)
    alone = [from_bank(pipes["sd"], bank).latents for bank in (first, second)]
    for bank, expected in ((first, alone[0]), (second, alone[1]), (first, alone[0])):
        assert torch.equal(from_bank(pipes["sd"], bank).latents, expected)
    assert distance(*alone) > TOLERANCE


def test_what_a_bank_has_is_not_given_again(pipe):
    with pytest.raises(ValueError, match="reference_mask: expected None, since the reference_bank has it"):
        retouch(pipe, image=None, reference_prompt=None, reference_bank=banked(pipe))


@pytest.mark.fault(number=44)
def test_a_bank_beyond_its_limit_is_refused(pipe):
    with pytest.raises(ValueError, match="limit: expected a bank within 1000 bytes"):
        banked(pipe, limit=1000)
    assert all(type(p).__name__ == "AttnProcessor2_0" for p in pipe.personalized_unet.attn_processors.values())


# Faults that were found by using the pipelines, each with its test


def test_a_bank_for_fewer_layers_in_a_later_step_is_refused(pipe):
    layers = select_layers(pipe.personalized_unet, "self")
    some = dict(list(layers.items())[:1])
    bank, text = ReferenceBank([9, 5]), torch.randn(1, 5, 16)

    def extract(layers, step):
        with install_processors(layers, bank.processors(layers)), bank.extract(step), torch.no_grad():
            pipe.personalized_unet(NOISE[:1], 5, encoder_hidden_states=text)

    extract(some, 0)
    with pytest.raises(ValueError, match=r"bank: expected layer .* in every step, got it first in step 1"):
        extract(layers, 1)
    bank.reset()
    extract(layers, 0)
    with pytest.raises(ValueError, match=r"bank: expected layer .* in every step, got a pass without it in step 1"):
        extract(some, 1)


def test_a_bank_made_in_inference_mode_serves_outside_it(pipe):
    with torch.inference_mode():
        bank = banked(pipe)
    assert distance(from_bank(pipe, bank).latents, retouch(pipe).latents) <= TOLERANCE


def test_a_file_that_is_no_bank_is_named(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"x": torch.zeros(2, 2, 1, 4, 1, 8)}, tmp_path / "old.safetensors", {"timesteps": "[5, 1]", "model": ""})
    assert ReferenceBank.load(tmp_path / "old.safetensors").shows is None
    with pytest.raises(ValueError, match="path: expected a file that save"):
        ReferenceBank.load(tmp_path / "x.safetensors")


def test_arguments_of_the_second_stage_are_checked_before_the_first(pipe):
    steps = []
    words = {"subject_tokens": ("sks", "ball")}
    for bad, message in (
        ({"subject_tokens": ("cat",)}, "subject_tokens: expected words of the prompt"),
        ({"subject_tokens": [(c,) for c in "abcdefg"]}, "subject_tokens: expected at most 6 subjects, got 7"),
        ({**words, "reference_image": None}, "reference_image: expected an image"),
        ({**words, "negative_prompt": ["a"] * 3, "guidance_scale": 1.0}, "negative_prompt: expected 1 or 2 strings"),
        ({**words, "reference_mask": np.ones(3, bool)}, "reference_mask: expected shape"),
    ):
        arguments = {**SHARED, "latents": NOISE, "reference_image": IMAGES[:1], "reference_prompt": "a sks ball", **bad}
        with pytest.raises(ValueError, match=message):
            pipe(PROMPTS, "a ball", callback_on_step_end=lambda *a: steps.append(a) or {}, **arguments)
    assert not steps


def test_recorders_of_two_threads_leave_compilation_as_it_was(pipe):
    first, second = (FeatureRecorder(pipe.personalized_unet) for _ in range(2))
    before = torch._dynamo.eval_frame._stance
    first.__enter__(), second.__enter__()
    first.__exit__(), second.__exit__()
    assert torch._dynamo.eval_frame._stance == before


def test_an_interrupted_layout_is_not_retouched(pipe):
    seen = []

    def interrupt(pipe, step, t, tensors):
        seen.append(step)
        pipe._interrupt = step == 1
        return {}

    out = run(pipe, callback_on_step_end=interrupt)
    assert seen == [0, 1] and torch.equal(out.images, out.layout_images) and out.masks is None
    assert not torch.equal(run(pipe).latents, out.latents)


def test_integer_images_and_masks_are_those_of_255(pipe):
    pixels = (IMAGES[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    mask = np.where(MASK, 210, 10).astype(np.uint8)
    expected = retouch(pipe, image=PIL.Image.fromarray(pixels)).latents
    black_and_white = pipe.encode_images(MASK[:16, :16, None].repeat(3, 2), 16, 16)
    assert torch.equal(black_and_white, pipe.encode_images(PIL.Image.fromarray(MASK[:16, :16]), 16, 16))
    assert distance(retouch(pipe, image=pixels.astype(np.uint16) * 257).latents, expected) <= TOLERANCE
    assert distance(retouch(pipe, reference_mask=MASK[::-1]).latents, retouch(pipe).latents) <= TOLERANCE
    for image in (pixels, torch.from_numpy(pixels).permute(2, 0, 1), PIL.Image.fromarray(pixels).convert("RGBA")):
        assert distance(retouch(pipe, image=image, reference_mask=mask).latents, expected) <= TOLERANCE


def test_a_target_without_foreground_is_warned_about(pipe):
    with pytest.warns(
        RuntimeWarning,
        match="subject 0 is nowhere in layout 1; see mask_threshold and subject_tokens, or pass layout_mask",
    ):
        retouch(pipe, mask_threshold=1.0)


def test_adapters_beside_a_whole_unet_are_refused():
    with pytest.raises(ValueError, match="personalized_adapters: expected None, since personalized_unet is given"):
        fresh(personalized_adapters=["subject"])


def test_a_model_whose_adapters_are_off_is_not_used_by_another_call():
    unet = with_lora(tiny_unet(0), "subject")
    one, other = (fresh(unet=unet, personalized_unet=None) for _ in range(2))
    for call in (run, retouch, banked):
        with one.as_vanilla(), pytest.raises(RuntimeError, match="unet: expected a model that no other call is using"):
            call(other)
    assert unet.active_adapters() == ["subject"]


def test_an_ip_adapter_in_a_unet_is_refused_by_name(pipe):
    parts = {**pipe.components, "unet": copy.deepcopy(pipe.unet), "requires_safety_checker": False}
    parts["unet"].register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(NotImplementedError, match=r"unet: expected one without image embeddings, .*unload_ip_adapter"):
        run(fresh(**parts))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps: expected a positive integer"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: expected a positive integer"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number"),
        ({"layout_steps": 1.5}, "layout_steps: expected 0 to 4, got 1.5"),
        ({"height": 0}, "height: expected a multiple of 2"),
        ({"retouch_layers": []}, "retouch_layers: expected scales"),
        ({"generator": [torch.Generator()]}, "generator: expected one, or 2, one per image, got 1"),
        ({"negative_prompt": []}, "negative_prompt: expected a string or several"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.fault(number=7)
def test_what_does_not_fit_is_named(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **{"latents": None, **kwargs})
