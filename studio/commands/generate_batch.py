"""`studio generate --prompts`: a file of prompts, sampled by one process or by many, and gone on with after a kill.

What is sampled together depends on the file alone, never on the number of processes, and each image has a random stream
of its own: one process and many sample the same. An image is written under a temporary name, recorded, then renamed; it
counts as sampled when both its record and its file are there.
"""

import json
import os
import sys
import time
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from studio.checks import json_text, shown
from studio.commands.decodings import check_packed, decoding_of, named
from studio.commands.outputs import check_apart
from studio.commands.prompt_file import Request, read_prompts
from studio.console import emit, quiet_libraries, say, warn
from studio.errors import StudioError
from studio.processes import agreed, gather, join, process_count, process_index
from studio.records import Records, read_records, sync
from studio.saving import check_writable, holds, make_sheet, png_writer, save_all, slug

MANIFEST = "manifest.jsonl"
SHEET = "sheet.png"
_RECORDS = "records"
_LARGEST_SHEET = 400
_LARGEST_BATCH = 8
_BATCHES = 64  # as many there should be before they grow: work for so many processes
_WARNINGS = 5


@dataclass(frozen=True)
class PlannedImage:
    """One image to sample: the `index`-th of its request, in the file `path` of the output folder."""

    request: Request
    index: int
    path: str

    @property
    def seed(self) -> int:
        return self.request.seed + self.index

    def record(self, call: dict) -> dict:
        """What the manifest says of it; `call` is what all images share."""
        request = self.request
        what = {"prompt": request.prompt} if request.class_label is None else {"class_label": request.class_label}
        return {
            "path": self.path,
            "line": request.line,
            "index": self.index,
            "seed": self.seed,
            **what,
            **request.settings,
            "decoding": {**request.decoding, "approximate": True} if request.approximate else request.decoding,
            **call,
        }


def generate_many(
    file: Path,
    out: Path,
    *,
    model: str,
    seed: int | None,
    options: dict,
    batch_size: int | None,
    device: str | None,
    dtype: str | None,
    sheet: bool = False,
) -> None:
    """Sample every line of a file of prompts.

    Args:
        file: see `read_prompts`, as for `seed` (its `base_seed`) and `options`.
        out: the folder for images, records and manifest.
        model, device, dtype: as of `studio.load`; "int8" for packed weights.
        batch_size: images sampled at a time; when `None`, one for few images and up to eight for many.
        sheet: also write all images as one.
    """
    start = time.monotonic()
    requests, pipe, device, weights = agreed(lambda: _prepare(file, out, model, seed, options, device, dtype, sheet))
    call = {"model": model, "dtype": weights}
    plan = plan_images(requests)
    done = set(gather(agreed(lambda: _sampled_before(out, plan, call, device))))
    mine = share(plan, done, batch_size or usual_batch_size(len(plan)))
    with closing(agreed(lambda: Records(out / _RECORDS, process_index()))) as records:
        _sample_share(pipe, mine, done, out, records, call, device)

    sampled = set(gather([image.path for image in sum(mine, []) if image.path not in done]))
    if process_index() == 0:
        lines = [json_text(image.record(call)) for image in plan]
        save_all({out / MANIFEST: lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8")})
        if sheet:
            _save_sheet(out, plan)
    emit(
        {
            "model": model,
            "out": str(out),
            "manifest": str(out / MANIFEST),
            **({"sheet": str(out / SHEET)} if sheet else {}),
            "prompts": len(requests),
            "images": len(plan),
            "sampled": len(sampled),
            "sampled_before": len(done),
            "processes": process_count(),
            "seconds": time.monotonic() - start,
        }
    )
    say(f"{out / MANIFEST}  {len(plan)} images of {len(requests)} prompts, {len(done)} of them sampled before")
    if sheet:
        say(f"{out / SHEET}  all {len(plan)}")
    say(f"{time.monotonic() - start:.1f} seconds, {process_count()} processes")


def _save_sheet(out, plan):
    from PIL import Image

    images = []
    for planned in plan:
        try:
            with Image.open(out / planned.path) as image:
                images.append(image.copy())
        except OSError as error:
            raise StudioError(f"{out / planned.path} cannot be read here, so there is no sheet: {error}.") from error
    save_all({out / SHEET: lambda path: make_sheet(images).save(path, format="PNG")})


def plan_images(requests: list[Request]) -> list[PlannedImage]:
    """The images of all requests in order, each with a file name of its own."""
    return [
        PlannedImage(request, index, f"{request.line:05d}-{slug(_title(request))}-{request.seed + index}.png")
        for request in requests
        for index in range(request.num_images)
    ]


def usual_batch_size(images: int) -> int:
    """How many images are sampled at a time, by how many there are: one by one until 64 processes have work."""
    return min(_LARGEST_BATCH, max(1, images // _BATCHES))


def share(plan: list[PlannedImage], done: Collection[str], batch_size: int) -> list[list[PlannedImage]]:
    """This process's part of what is left.

    Args:
        plan: all images.
        done: the paths of those that are sampled.
        batch_size: images sampled at a time, of neighbours in the plan with the same settings.

    Returns:
        A list of batches, each a list of `Image`. A batch of which some are sampled is whole, so that the others of it
        come out as they would have.
    """
    batches = []
    for _, group in groupby(plan, key=_how):
        alike = list(group)
        batches += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    left = [batch for batch in batches if any(image.path not in done for image in batch)]
    return left[process_index() :: process_count()]


def _how(image):
    request = image.request
    return json.dumps([request.prompt is None, request.settings, request.decoding], sort_keys=True)


def _title(request):
    return request.prompt or f"class {request.class_label}"


def _prepare(file, out, model, seed, options, device, dtype, sheet):
    """Everything that can be refused before an image is sampled."""
    requests = read_prompts(file, seed, options)
    if sheet and (images := sum(request.num_images for request in requests)) > _LARGEST_SHEET:
        raise StudioError(f"A sheet holds {_LARGEST_SHEET} images at most, and {file} asks for {images}: leave it out.")
    packed = dtype == "int8"
    for request in requests:
        if packed and request.decoding["name"] not in (None, "ar"):
            raise StudioError(f"{file}, line {request.line}: --dtype int8 goes with decoding ar only.")
    for name in (MANIFEST, SHEET)[: 1 + sheet]:
        check_apart(out / name, file)
        check_writable(out / name)

    from studio import load

    quiet_libraries()
    pipe = load(model, device=device or join(), dtype=None if packed else dtype)
    if not hasattr(pipe, "check_call"):
        raise StudioError(f"{model} samples no file of prompts: use a pipeline such as emoji-ar.")
    check_packed(dtype, model, pipe)
    pipe.set_progress_bar_config(disable=True)
    cautions = set()
    for number, request in enumerate(requests):
        try:
            asked = {**request.decoding, "name": "ar"} if packed else request.decoding
            label = request.class_label
            label = pipe.class_index(label) if isinstance(label, str) else label
            request = replace(request, class_label=label, decoding=named(pipe=pipe, **asked))
            how = _decoding(request, packed)
            pipe.check_arguments(request.settings)
            pipe.check_call(request.prompt, class_labels=request.class_label, decoding=how, **request.settings)
        except StudioError as error:
            raise StudioError(f"{file}, line {request.line}: {error}") from error
        cautions.add(pipe.validation_warning(how))
        requests[number] = replace(request, approximate=bool(getattr(how, "approximate", False)))
    for validation_warning in sorted(filter(None, cautions)):
        warn(validation_warning)
    _warn_of_unknown_words(pipe, requests)
    return requests, pipe, pipe.device, "int8" if packed else str(pipe.transformer.dtype).removeprefix("torch.")


def _decoding(request, packed):
    from studio import Autoregressive

    how = decoding_of(**request.decoding)
    return Autoregressive(weights="int8") if packed else how


def _warn_of_unknown_words(pipe, requests):
    from studio.checkpoints.vocabulary import prompt_warning

    found = [(request.line, warning) for request in requests if (warning := prompt_warning(pipe, request.prompt))]
    for line, warning in found[:_WARNINGS]:
        warn(f"Line {line}: {warning}")
    if len(found) > _WARNINGS:
        warn(f"{len(found) - _WARNINGS} more lines have words that the model does not know.")


def _sampled_before(out, plan, call, device):
    """The paths of the images that an earlier run sampled and this process can see.

    Raises:
        StudioError: there are images of other settings, or files that are none of ours, under the names of the plan.
    """
    planned = {image.path: image.record(call) for image in plan}
    records, damaged = read_records(out / _RECORDS)
    done = []
    for record in records:
        path = record.get("path")
        if not isinstance(path, str) or planned.get(path) != record:
            raise StudioError(
                f"{out} holds images of another file or other settings ({shown(path)}): choose another --out."
            )
        if (out / path).is_file():
            done.append(path)
    if damaged:
        warn(f"{out / _RECORDS} has {damaged} damaged lines: what they recorded is sampled again.")
    for image in plan:
        path = out / image.path
        if image.path not in done and os.path.lexists(path) and not holds(path, *_carried(image, call, device)):
            raise StudioError(f"{path} is a file that this command did not write: choose another --out.")
    return done


def _carried(image, call, device):
    """The call and the seed that the file of an image carries."""
    record = image.record(call)
    shown = {name: record[name] for name in record if name not in {"path", "line", "index", "seed"}}
    return {**shown, "device": device.type}, image.seed


def _sample_share(pipe, batches, done, out, records, call, device):
    import torch
    from tqdm import tqdm

    count = process_count()
    total = sum(planned.path not in done for batch in batches for planned in batch)
    bar = tqdm(
        total=total,
        desc="sampling" if count == 1 else f"sampling (process 1 of {count})",
        unit="image",
        file=sys.stderr,
        disable=process_index() > 0 or not total,
        mininterval=1,
    )
    with bar:
        for batch in batches:
            first = batch[0].request
            subject = (
                {"class_labels": [planned.request.class_label for planned in batch]}
                if first.prompt is None
                else {"prompt": [planned.request.prompt for planned in batch]}
            )
            try:
                output = pipe(
                    **subject,
                    generator=[torch.Generator().manual_seed(planned.seed) for planned in batch],
                    decoding=_decoding(first, call["dtype"] == "int8"),
                    **first.settings,
                )
            except StudioError as error:
                raise StudioError(f"Line {first.line}: {error}") from error
            for planned, image in zip(batch, output.images):
                if planned.path not in done:
                    _save(image, planned, out, records, call, device)
                    bar.update()


def _save(image, planned, out, records, call, device):
    record = planned.record(call)
    part = out / f".{planned.path}.part"
    try:
        png_writer(image, *_carried(planned, call, device))(part)
        with open(part, "rb") as file:
            sync(file)
        records.append(record)
        os.replace(part, out / planned.path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StudioError(f"The images cannot be written: {error.strerror or error}.") from error
