"""Classes by name: whole labels, their parts, both cases; and labels that are kept with a pipeline."""

import json

import pytest
import torch

import studio
from studio import LlamaGenPipeline, StudioError
from studio.checkpoints.class_names import imagenet_labels
from studio.pipelines.class_labels import checked_labels, class_index

IMAGENET = checked_labels(imagenet_labels(1000), 1000)


@pytest.mark.parametrize(
    ("label", "number"),
    [
        (207, 207),
        ("207", 207),
        ("golden retriever", 207),
        (" Golden  RETRIEVER ", 207),
        ("toilet paper", 999),
        ("tench, Tinca tinca", 0),
        ("Cardigan", 264),  # as it is written there
        ("cardigan", 474),
        ("missile", 657),  # a whole label comes before a part of one
    ],
)
def test_a_class_is_found_by_number_and_by_name(label, number):
    assert class_index(label, IMAGENET, 1000) == number


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("crane", "'crane' names 2 classes: give the number 134 (crane) or 517 (crane)."),
        ("PANTHER", "286 (cougar"),
        ("goldn retriever", "did you mean golden retriever or"),
        ("xyzzy", "There is no class 'xyzzy': give a number from 0 to 999."),
        ("", "There is no class"),
        ("1000", "from 0 to 999, not 1000"),
        (1000, "from 0 to 999, not 1000"),
        ("-1", "from 0 to 999, not -1"),
        (True, "whole number"),
        (2.5, "whole number"),
    ],
)
def test_what_is_no_class_is_refused(label, sentence):
    with pytest.raises(StudioError) as refused:
        class_index(label, IMAGENET, 1000)
    assert sentence in str(refused.value)


def test_every_name_of_every_class_finds_a_class_that_has_it():
    for number, label in IMAGENET.items():
        for name in [label, *(part.strip() for part in label.split(","))]:
            try:
                found = class_index(name, IMAGENET, 1000)
            except StudioError as error:
                assert "names" in str(error) and f"{number} (" in str(error), name
            else:
                assert name in (IMAGENET[found], *IMAGENET[found].split(", ")), name


def test_names_sample_what_their_numbers_do(tiny_class_pipeline):
    def tokens(labels):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return tiny_class_pipeline(class_labels=labels, generator=generators, output_type="tokens").tokens

    assert torch.equal(tokens(["golden retriever", 9]), tokens([3, 9]))
    assert not torch.equal(tokens(["goldfish", 9]), tokens([3, 9]))


def test_labels_are_kept_as_in_diffusers(tiny_class_pipeline, tmp_path):
    tiny_class_pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["id2label"]["3"] == "golden retriever"
    loaded = studio.load(tmp_path, device="cpu")
    assert loaded.id2label == tiny_class_pipeline.id2label and loaded.class_index("tabby cat") == 9


@pytest.mark.parametrize("labels", [{10: "a"}, {"x": "a"}, {0: ""}, {0: 3}, ["a"], {0: "a" * 501}])
def test_labels_of_no_classes_are_refused(tiny_class_pipeline, labels):
    with pytest.raises(StudioError, match="id2label names classes by their numbers, 0 to 9"):
        LlamaGenPipeline(tiny_class_pipeline.image_tokenizer, tiny_class_pipeline.transformer, id2label=labels)


def test_a_text_conditional_model_has_no_classes(tiny_pipeline):
    with pytest.raises(StudioError, match="text-conditional"):
        tiny_pipeline.class_index("goldfish")
    with pytest.raises(StudioError, match="leave out id2label"):
        LlamaGenPipeline(tiny_pipeline.image_tokenizer, tiny_pipeline.transformer, id2label={0: "a"})
