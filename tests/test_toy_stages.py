"""The prompts of the demo, and the files of the subjects."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lr_kernels import toy
from lr_kernels.toy import world
from lr_kernels.toy.personalize import personalize
from lr_kernels.toy.stages import on_backgrounds
from lr_kernels.toy.subjects import FOLDER, lora_of, personalized, token, write


@pytest.mark.parametrize("subject", world.SUBJECTS)
def test_prompts_say_what_is_judged(subject):
    noun, task = world.class_word(subject), on_backgrounds(subject, 2)
    assert len(task.prompts) == 12 and task.prompts[0] == f"a sks {noun} on sky"
    assert task.layout_prompts[0] == f"a {noun} on sky"
    assert set(" ".join(task.prompts).split()) <= set(world.WORDS) and len(task.backgrounds) == len(task.prompts)


@pytest.mark.parametrize("subject", world.SUBJECTS)
def test_the_files_of_a_subject_are_its_pictures_and_small_weights(subject):
    images, masks = world.references(subject)
    for i in range(5):
        pixels = np.asarray(Image.open(FOLDER / subject / f"images/{i}.png"), np.float32)
        assert np.abs(pixels / 127.5 - 1 - images[i].permute(1, 2, 0).numpy()).max() <= 0.005
        assert np.array_equal(np.asarray(Image.open(FOLDER / subject / f"masks/{i}.png")) > 0, masks[i].numpy() > 0.5)
    assert (FOLDER / subject / "lora.safetensors").stat().st_size < 2**20
    assert list(load_file(FOLDER / subject / "token.safetensors")) == [token(subject)]


def test_a_lora_of_full_rank_is_the_whole_change_of_the_weights(tmp_path, monkeypatch):
    """A short training, written as its files and read again."""
    base = toy.load_pipeline()
    before = {name: x.clone() for name, x in base.unet.state_dict().items()}
    personal = personalize(base, world.references("star")[0], steps=3, progress=False)
    assert all(torch.equal(x, before[name]) for name, x in base.unet.state_dict().items())
    row = base.tokenizer.convert_tokens_to_ids("sks</w>")
    write("star", personal, base, tmp_path / "star")
    monkeypatch.setattr("lr_kernels.toy.subjects.lora_of", lambda *x: lora_of(*x, rank=10_000))
    write("star", personal, base, tmp_path / "whole" / "star")
    monkeypatch.setattr("lr_kernels.toy.subjects.FOLDER", tmp_path / "whole")
    unet, text_encoder = personalized(base, "star")
    trained, apart = personal.unet.state_dict(), []
    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            change = (trained[f"{name}.weight"] - before[f"{name}.weight"]).norm()
            apart.append(((layer.weight - trained[f"{name}.weight"]).norm() / change).item())
    assert max(apart) < 2e-3  # fp16
    embeddings = (x.get_input_embeddings().weight for x in (text_encoder, personal.text_encoder))
    assert torch.equal(*(x[row] for x in embeddings))
