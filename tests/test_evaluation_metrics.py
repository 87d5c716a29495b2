"""Metrics of an evaluation against independent transcriptions, with small encoders of random weights.

The transcriptions follow the code of DreamMatcher (github.com/KU-CVLAB/DreamMatcher), of its torchvision 0.14 and of
DINO's repository, and the preprocessing that the authors of CLIP, DINO and DINOv2 publish. They share no code with the
package: images are NumPy arrays here, and resizing by a bicubic filter is written out.
"""

import json
import math
import shutil

import numpy as np
import PIL.Image
import pytest
import skimage
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from lr_kernels import toy
from lr_kernels.evaluation import METRICS, PromptImages
from lr_kernels.evaluation.metrics.diversity import Pairwise, square, vendi_score
from lr_kernels.evaluation.metrics.masks import masks_by, segmenter
from lr_kernels.evaluation.metrics.metric import Column
from lr_kernels.evaluation.metrics.preprocess import hub_positions
from lr_kernels.evaluation.score import columns_of, mask, picture

CPU = torch.device("cpu")
NARROW = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = "a {} on sand"  # words of the toy model's tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small encoders with random weights, as `from_pretrained` reads them."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(toy.BASE / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=16, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, **NARROW,
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=224, patch_size=32, **NARROW)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24))
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    ViTModel(ViTConfig(image_size=224, patch_size=16, **NARROW), add_pooling_layer=False).save_pretrained(
        folder / "dino"
    )
    wide = {name: x for name, x in NARROW.items() if name != "intermediate_size"}
    Dinov2Model(Dinov2Config(image_size=518, patch_size=14, **wide)).save_pretrained(folder / "dinov2")
    return folder


def random_images(count, seed, sizes=((300, 260), (256, 256), (200, 333))):
    """Images with structure of all sizes, of several shapes: noise at several scales."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        layers = [
            np.asarray(PIL.Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize((width, height)))
            for side in (4, 16, 200)
        ]
        found.append(PIL.Image.fromarray(np.mean(layers, 0).astype(np.uint8)))
    return found


def shown(images, references, **more):
    given = {"concept": "c", "noun": "ball", "template": WORDS, "prompt": WORDS.replace("{}", "sks ball")}
    return PromptImages(images=images, samples=list(range(len(images))), references=references, **given | more)


def by_metric(name, seen, **options):
    """The only column of a metric."""
    ((_, values),) = METRICS[name](**options).score(seen, CPU).items()
    return values


# Transcriptions.


def cubic(x, a):
    """The kernel of a bicubic filter."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def plain_bicubic(length, wanted, scale=None):
    """The matrix (wanted, length) of torch's bicubic interpolation without antialiasing (a = -0.75), borders repeated.
    scale: that which was asked for, where the size follows from it."""
    matrix = np.zeros((wanted, length))
    step = length / wanted if scale is None else 1 / scale
    for i in range(wanted):
        centre = (i + 0.5) * step - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), length - 1)] += cubic(centre - j, -0.75)
    return matrix


def dreammatcher_image(image):
    """What its data loader makes of a file: (256, 256, 3) in [-1, 1]."""
    array = np.array(PIL.Image.fromarray(np.array(image).astype(np.uint8)).resize((256, 256), resample=3))
    return (array / 127.5 - 1.0).astype(np.float32)


def dreammatcher_clip_features(model, images):
    matrix = plain_bicubic(256, 224)
    inputs = []
    for image in images:
        x = (dreammatcher_image(image).astype(np.float64) - -1.0) / 2.0
        x = np.einsum("ih,hwc,jw->ijc", matrix, x, matrix, optimize=True)
        inputs.append((x - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor(np.stack(inputs)).float().permute(0, 3, 1, 2)
    features = model.get_image_features(pixel_values=pixels).pooler_output
    return features / features.norm(dim=-1, keepdim=True)


def dreammatcher_dino_features(model, images):
    """The class token of DINO's VisionTransformer on 256 x 256 pixels, layer by layer."""
    x = torch.stack([torch.from_numpy(dreammatcher_image(image)) for image in images]).permute(0, 3, 1, 2)
    weights = model.state_dict()
    patches = F.conv2d(
        x, weights["embeddings.patch_embeddings.projection.weight"],
        weights["embeddings.patch_embeddings.projection.bias"], stride=16,
    ).flatten(2).transpose(1, 2)  # fmt: skip
    tokens = torch.cat([weights["embeddings.cls_token"].expand(len(x), -1, -1), patches], 1)
    grid = weights["embeddings.position_embeddings"][0, 1:].view(14, 14, -1).double().numpy()
    matrix = plain_bicubic(14, 16, scale=(256 / 16 + 0.1) / 14)
    grown = torch.tensor(np.einsum("ih,hwc,jw->ijc", matrix, grid, matrix, optimize=True)).float().flatten(0, 1)
    tokens = tokens + torch.cat([weights["embeddings.position_embeddings"][0, :1], grown])
    for layer in model.layers if hasattr(model, "layers") else model.encoder.layer:
        tokens = layer(tokens)
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    features = model.layernorm(tokens)[:, 0]
    return features / features.norm(dim=-1, keepdim=True)


def pil_bicubic(length, wanted):
    """The matrix (wanted, length) of PIL's bicubic filter (a = -0.5), which widens where it shrinks."""
    scale = length / wanted
    support = 2 * max(scale, 1)
    matrix = np.zeros((wanted, length))
    for i in range(wanted):
        centre = (i + 0.5) * scale
        low, high = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), length)
        weights = [cubic((j - centre + 0.5) / max(scale, 1), -0.5) for j in range(low, high)]
        matrix[i, low:high] = np.array(weights) / sum(weights)
    return matrix


def standard_inputs(images, shorter, mean, std):
    """Resize, CenterCrop(224), ToTensor and Normalize of torchvision on PIL images; bytes between the two passes."""
    inputs = []
    for image in images:
        array = np.asarray(image).astype(np.float64)
        height, width = array.shape[:2]
        if width <= height:
            size = (int(shorter * height / width), shorter)
        else:
            size = (shorter, int(shorter * width / height))
        across = np.clip(np.floor(np.einsum("jw,hwc->hjc", pil_bicubic(width, size[1]), array) + 0.5), 0, 255)
        array = np.clip(np.floor(np.einsum("ih,hjc->ijc", pil_bicubic(height, size[0]), across) + 0.5), 0, 255)
        top, left = round((size[0] - 224) / 2.0), round((size[1] - 224) / 2.0)
        inputs.append((array[top : top + 224, left : left + 224] / 255 - mean) / std)
    return torch.tensor(np.stack(inputs)).float().permute(0, 3, 1, 2)


def unit(features):
    return features / features.norm(dim=-1, keepdim=True)


IMAGES, REFERENCES = random_images(5, 1), random_images(3, 2)
CLIP_COLOURS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@torch.no_grad()
def expected(name, protocol, folder):
    """The column of a metric for IMAGES, by transcription."""
    if name == "clip_t":
        model = CLIPModel.from_pretrained(folder / "clip").eval()
        text = WORDS if protocol == "dreammatcher" else "a ball on sand"
        ids = CLIPTokenizer.from_pretrained(folder / "clip")(text, return_tensors="pt")
        features = unit(model.get_text_features(**ids).pooler_output)
        if protocol == "dreammatcher":
            return (dreammatcher_clip_features(model, IMAGES) @ features.T)[:, 0]
        pixels = standard_inputs(IMAGES, 224, *CLIP_COLOURS)
        return (unit(model.get_image_features(pixel_values=pixels).pooler_output) @ features.T)[:, 0]
    kind = {"clip_i": CLIPModel, "dino": ViTModel, "dinov2": Dinov2Model}[name]
    model = kind.from_pretrained(folder / name.removesuffix("_i")).eval()

    def features(images):
        if name == "clip_i":
            if protocol == "dreammatcher":
                return dreammatcher_clip_features(model, images)
            return unit(
                model.get_image_features(pixel_values=standard_inputs(images, 224, *CLIP_COLOURS)).pooler_output
            )
        if name == "dino" and protocol == "dreammatcher":
            return dreammatcher_dino_features(model, images)
        return unit(model(standard_inputs(images, 256, *IMAGENET)).last_hidden_state[:, 0])

    return (features(REFERENCES) @ features(IMAGES).T).mean(0)


@pytest.mark.parametrize("protocol", ["standard", "dreammatcher"])
@pytest.mark.parametrize("name", ["clip_i", "clip_t", "dino", "dinov2"])
def test_scores_are_those_of_an_independent_transcription(models, name, protocol):
    model = str(models / name.removesuffix("_i").removesuffix("_t"))
    found = by_metric(name, shown(IMAGES, REFERENCES), protocol=protocol, model=model)
    wanted = expected(name, protocol, models)
    assert len(set(found)) == 5 and torch.tensor(found).sub(wanted).abs().max() <= 1e-5


def test_the_protocols_differ(models):
    """What the oddities of the older protocol cost: other numbers."""
    for name in ("clip_i", "dino"):
        options = {"model": str(models / name.removesuffix("_i"))}
        both = [by_metric(name, shown(IMAGES, REFERENCES), protocol=x, **options) for x in ("standard", "dreammatcher")]
        assert np.abs(np.subtract(*both)).max() > 1e-4


def test_positions_for_the_size_of_the_training_are_left_as_they_are():
    positions = torch.randn(1, 1 + 14 * 14, 8)
    assert hub_positions(positions, (14, 14)) is positions


def test_a_prompt_that_clip_cannot_read_whole_is_refused(models):
    seen = shown(IMAGES, REFERENCES, template=" ".join(["a ball on sand"] * 5 + ["{}"]))
    with pytest.raises(ValueError, match="prompt: expected at most 16 tokens, which CLIP reads, got 23"):
        by_metric("clip_t", seen, model=str(models / "clip"))


def test_masked_likeness_sees_the_subject_alone(models):
    """Other surroundings change nothing; without a mask, or with an empty one, there is no value."""
    model = str(models / "dino")
    rng = np.random.default_rng(3)
    inside = np.zeros((256, 256), bool)
    inside[60:200, 80:180] = True
    subject = np.asarray(random_images(1, 4, [(256, 256)])[0])
    images = [np.where(inside[..., None], subject, rng.integers(0, 256, subject.shape)) for _ in range(2)]
    images = [PIL.Image.fromarray(x.astype(np.uint8)) for x in images]
    masks = [inside, inside]
    seen = shown([*images, *images], [images[0]], masks=[*masks, None, inside & False], reference_masks=[inside])
    first, second, *missing = by_metric("dino", seen, model=model, masked=True)
    assert first == pytest.approx(1, abs=1e-6) and second == pytest.approx(1, abs=1e-6) and missing == [None, None]
    assert by_metric("dino", seen, model=model)[1] < 1 - 1e-4
    with pytest.raises(ValueError, match=r"concepts\.c\.masks: expected masks of its images"):
        by_metric("dino", shown(images, images, masks=masks), model=model, masked=True)


def bright(image, noun):
    """A segmenter of the tests."""
    assert noun == "ball"
    return image.convert("L").point(lambda x: 255 * (x > 127))


def test_masks_may_come_from_a_function_of_ones_own():
    seen = shown(IMAGES, REFERENCES)
    found = masks_by(segmenter("test_evaluation_metrics:bright"), seen)
    assert [x.shape for x in found] == [(image.height, image.width) for image in IMAGES] and found[0].dtype == bool
    assert masks_by(None, seen) == [None] * 5


def test_the_vendi_score_counts_what_differs(models):
    """1 for equal images, n for orthogonal features; in between the exponential of an entropy, by NumPy."""
    one = F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)))
    assert vendi_score(one.expand(6, -1)) == pytest.approx(1)
    assert vendi_score(torch.eye(6)) == pytest.approx(6)
    options = {"model": str(models / "dino")}
    seen = shown(IMAGES, REFERENCES)
    kernel = np.eye(5)
    for i in range(5):  # by the metric of likeness: one image against another
        kernel[i] = by_metric("dino", shown(IMAGES, [IMAGES[i]]), **options)
    shares = np.linalg.eigvalsh((kernel + kernel.T) / 2 / 5)
    shares = shares[shares > 1e-12]
    assert by_metric("vendi", seen, **options) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=1e-4)
    assert by_metric("vendi", shown(IMAGES[:1], REFERENCES), **options) is None


def test_layout_diversity_is_one_less_the_mean_iou_of_pairs():
    masks = [np.zeros((8, 8), bool) for _ in range(3)]
    masks[0][:, :4] = masks[1][:, 2:6] = masks[2][:, 4:] = True  # IoU 1/3, 0, 1/3
    found = by_metric("layout_iou", shown(IMAGES[:3], REFERENCES, masks=masks))
    assert found == pytest.approx([(2 / 3 + 1) / 2, 2 / 3, (2 / 3 + 1) / 2])
    assert np.mean(found) == pytest.approx(1 - (1 / 3 + 0 + 1 / 3) / 3)
    assert by_metric("layout_iou", shown(IMAGES[:3], REFERENCES, masks=[masks[0], None, masks[2]])) == [1.0, None, 1.0]
    assert by_metric("layout_iou", shown(IMAGES[:1], REFERENCES, masks=masks[:1])) == [None]


class Brightness(Pairwise):
    """A metric of one's own: the difference of mean brightness."""

    def __init__(self, *, protocol: str = "standard", factor: float = 1.0):
        self.factor, self.columns = factor, {"brightness": Column("diversity", "")}

    def pairs(self, seen, device):
        means = [self.factor * np.asarray(image).mean() for image in seen.images]
        return square(len(means), lambda i, j: abs(means[i] - means[j]))


class Wrong(Brightness):
    """A metric that returns other columns than it says."""

    def score(self, seen, device):
        return {"darkness": [0.0] * len(seen.images)}


def test_a_metric_of_ones_own_is_scored(tmp_path):
    means = [np.asarray(image).mean() for image in IMAGES[:3]]
    found = columns_of([Brightness(factor=2.0)], shown(IMAGES[:3], REFERENCES), CPU)
    assert found["images"]["0"]["brightness"] == pytest.approx(abs(means[0] - means[1]) + abs(means[0] - means[2]))
    with pytest.raises(ValueError, match=r"Wrong: expected the columns \{'brightness'\}, got \{'darkness'\}"):
        columns_of([Wrong()], shown(IMAGES, REFERENCES), CPU)


PHOTOS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")


def test_photos_go_through_every_metric(models):
    """Photos of scikit-image as a concept's images, cut and turned as images of it, another photo beside."""
    folder = f"{skimage.__path__[0]}/data"
    cat, *others = (picture(f"{folder}/{name}") for name in PHOTOS)
    images = [cat.crop((30, 0, 400, 280)), cat.rotate(20), others[0]]
    masks = [mask(f"{folder}/{PHOTOS[0]}")] * 1 + [np.asarray(x.convert("L")) > 127 for x in images[1:]]
    masks[0] = masks[0][: images[0].height, : images[0].width]
    seen = shown(images, [cat], masks=masks, reference_masks=[mask(f"{folder}/{PHOTOS[0]}")])
    metrics = [
        METRICS[name](model=str(models / kind))
        for name, kind in (
            ("clip_i", "clip"),
            ("clip_t", "clip"),
            ("dino", "dino"),
            ("dinov2", "dinov2"),
            ("vendi", "dino"),
        )
    ]
    metrics += [METRICS["dino"](model=str(models / "dino"), masked=True)]
    found = columns_of(metrics, seen, CPU)
    for name in ("clip_i", "dino", "dinov2", "dino_masked"):
        cropped, turned, other = (found["images"][str(i)][name] for i in range(3))
        assert all(-1 <= x <= 1 for x in (cropped, turned, other))
    assert 1 <= found["prompt"]["vendi"] <= 3


def test_an_encoder_without_its_weights_is_refused(models, tmp_path):
    """transformers would draw what is missing at random, and each run would score otherwise."""
    for name, kind in (("dino", "clip"), ("clip_i", "dino")):
        with pytest.raises(ValueError, match=r"model: expected a folder of a '\w+' of transformers, got '\w+'"):
            METRICS[name](model=str(models / kind))
    shutil.copytree(models / "dino", tmp_path / "dino")
    weights = load_file(tmp_path / "dino/model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, tmp_path / "dino/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model: expected the weights of a ViTModel in .*, got none for"):
        by_metric("dino", shown(IMAGES, REFERENCES), model=str(tmp_path / "dino"))


def test_other_weights_or_another_name_are_other_scores_and_another_path_is_not(models, tmp_path):
    shutil.copytree(models / "dino", tmp_path / "dino")
    one, same = (METRICS["dino"](model=str(folder / "dino")).settings() for folder in (models, tmp_path))
    assert one == same
    weights = {name: 1.05 * x for name, x in load_file(tmp_path / "dino/model.safetensors").items()}
    save_file(weights, tmp_path / "dino/model.safetensors", metadata={"format": "pt"})
    assert METRICS["dino"](model=str(tmp_path / "dino")).settings() != one


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.array([0.5, 1.0], np.float32), [0.5, 1.0]),
        (torch.tensor([1, 2]), [1.0, 2.0]),
        ([np.float32(0.5), None], [0.5, None]),
        ([math.nan, 1.0], "expected finite numbers, or None"),
        (["a", "b"], "expected finite numbers, or None"),
        ("ab", "expected finite numbers, or None"),
        ([1.0], "expected 2 values, one for each image, got 1"),
        ([[1.0], [2.0]], "expected finite numbers, or None"),
    ],
)
def test_numbers_of_any_type_are_kept_and_everything_else_is_refused(given, wanted):
    metric = Brightness()
    metric.score = lambda seen, device: {"brightness": given}
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=f"brightness: {wanted}"):
            columns_of([metric], shown(IMAGES[:2], REFERENCES), CPU)
        return
    found = columns_of([metric], shown(IMAGES[:2], REFERENCES), CPU)["images"]
    assert [found[str(i)]["brightness"] for i in range(2)] == wanted and json.dumps(found)


def test_pictures_of_16_bits_and_masks_of_any_range_are_read_as_the_pipelines_read_them(tmp_path):
    grey = np.full((6, 8), 180 * 257, np.uint16)
    PIL.Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.asarray(picture(tmp_path / "grey.png")).tolist() == np.full((6, 8, 3), 180).tolist()
    half = np.arange(8)[None] < 4
    for name, array in (("ones", np.uint8(half)), ("wide", np.uint16(half * 60000)), ("bytes", np.uint8(half * 255))):
        PIL.Image.fromarray(np.repeat(array, 6, 0)).save(tmp_path / f"{name}.png")
        assert mask(tmp_path / f"{name}.png").tolist() == np.repeat(half, 6, 0).tolist(), name
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"broken\.png: expected a picture, got"):
        picture(tmp_path / "broken.png")
